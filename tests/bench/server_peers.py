"""The peers of server.py: `python server_peers.py KIND WORKERS PORT [RANK]`.

A round: every worker has an update, a server gets all of them, and every worker gets the mean. An
order on standard input is `round BYTES TIMES`; the answer is a line of JSON, the seconds of each
round after one that warms up.

    ray        actors on one node: arrays go through the object store, which is shared memory
    raylets    the same with a node of their own for the server and each worker, on this machine:
               arrays are copied from object store to object store over TCP
    flower     start_server and start_client, Flower's gRPC path: from the time that the server
               sends the model out to the time that it has the mean of what came back
    naive      asyncio streams on uvloop with msgpack-numpy and numpy.mean; a process per rank,
               rank 0 is the server
"""

import asyncio
import json
import os
import struct
import subprocess
import sys
import time

import numpy as np

WARM_UP = 1
DEADLINE = 30.0


def answer(value):
    print(json.dumps(value), flush=True)


def timed(one_round, times):
    seconds = []
    for _ in range(WARM_UP + times):
        started = time.perf_counter()
        one_round()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


# Ray ------------------------------------------------------------------------------------------


def ray_actors(workers, apart):
    """Follow orders with one server actor and a worker actor each; `apart`: on nodes of their own.

    The pattern is that of Ray's documentation for a synchronous parameter server: references to
    the workers' arrays go to the server, a reference to its result to the workers.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    cluster, store = None, 800_000_000
    if apart:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for rank in range(workers + 1):
            cluster.add_node(num_cpus=1, resources={f"rank{rank}": 1}, object_store_memory=store)
        ray.init(address=cluster.address, log_to_driver=False)
    else:
        ray.init(
            num_cpus=workers + 1,
            object_store_memory=3 * store,
            include_dashboard=False,
            log_to_driver=False,
        )

    @ray.remote
    class Worker:
        def make(self, size):
            self.update = np.ones(size // 4, "f4")

        def send(self):
            return self.update

        def take(self, mean):
            return float(mean[-1])

    @ray.remote
    class Server:
        def mean(self, *updates):
            total = updates[0].copy()  # what comes out of the object store is read-only
            for update in updates[1:]:
                total += update
            total /= len(updates)
            return total

    def place(rank):
        return {"resources": {f"rank{rank}": 1}, "num_cpus": 1} if apart else {"num_cpus": 1}

    server = Server.options(**place(0)).remote()
    actors = [Worker.options(**place(rank + 1)).remote() for rank in range(workers)]

    def one_round():
        mean = server.mean.remote(*[actor.send.remote() for actor in actors])
        assert ray.get([actor.take.remote(mean) for actor in actors]) == [1.0] * workers

    answer("ready")
    for line in sys.stdin:
        _, size, times = line.split()
        ray.get([actor.make.remote(int(size)) for actor in actors])
        answer(timed(one_round, int(times)))
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


# Flower ---------------------------------------------------------------------------------------


def flower(workers, port):
    """Follow each order with a server in this process and a client process for each worker."""
    answer("ready")
    for line in sys.stdin:
        _, size, times = line.split()
        answer(flower_rounds(workers, port, int(size), int(times)))


def flower_rounds(workers, port, size, times):
    import flwr

    seconds = []

    class Timed(flwr.server.strategy.FedAvg):
        def configure_fit(self, *args, **options):
            self.started = time.perf_counter()
            return super().configure_fit(*args, **options)

        def aggregate_fit(self, server_round, results, failures):
            assert len(results) == workers, failures
            made = super().aggregate_fit(server_round, results, failures)
            seconds.append(time.perf_counter() - self.started)
            return made

    strategy = Timed(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=workers,
        min_available_clients=workers,
        initial_parameters=flwr.common.ndarrays_to_parameters([np.ones(size // 4, "f4")]),
    )
    address = f"127.0.0.1:{port}"
    command = [sys.executable, __file__, "flower-client", str(workers), str(port)]
    clients = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(workers)
    ]
    try:
        flwr.server.start_server(
            server_address=address,
            strategy=strategy,
            config=flwr.server.ServerConfig(num_rounds=WARM_UP + times),
        )
    finally:
        for client in clients:
            client.kill()
            client.wait()
    return seconds[WARM_UP:]


def flower_client(port):
    import flwr

    class Same(flwr.client.NumPyClient):
        def fit(self, parameters, config):
            return parameters, 1, {}

    flwr.client.start_client(server_address=f"127.0.0.1:{port}", client=Same().to_client())


# Naive ----------------------------------------------------------------------------------------


def naive(workers, port, rank):
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(naive_server(workers, port) if rank == 0 else naive_worker(port))


async def lines():
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _, size, times = line.split()
        yield int(size), int(times)


async def naive_server(workers, port):
    ends, ready = [], asyncio.Event()

    def connected(*pair):
        ends.append(pair)
        if len(ends) == workers:
            ready.set()

    async with await asyncio.start_server(connected, "127.0.0.1", port):
        await ready.wait()
        answer("ready")
        async for _, times in lines():
            for _ in range(WARM_UP + times):
                updates = await asyncio.gather(*(receive(reader) for reader, _ in ends))
                mean = np.mean(updates, axis=0)
                await asyncio.gather(*(send(writer, mean) for _, writer in ends))
            answer([])


async def naive_worker(port):
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.02)  # the server is about to listen
    answer("ready")
    async for size, times in lines():
        update, seconds = np.ones(size // 4, "f4"), []
        for _ in range(WARM_UP + times):
            started = time.perf_counter()
            await send(writer, update)
            await receive(reader)
            seconds.append(time.perf_counter() - started)
        answer(seconds[WARM_UP:])


async def send(writer, array):
    import msgpack
    import msgpack_numpy

    packed = msgpack.packb(array, default=msgpack_numpy.encode)
    writer.write(struct.pack("<Q", len(packed)))
    writer.write(packed)
    await writer.drain()


async def receive(reader):
    import msgpack
    import msgpack_numpy

    (length,) = struct.unpack("<Q", await reader.readexactly(8))
    return msgpack.unpackb(await reader.readexactly(length), object_hook=msgpack_numpy.decode)


def main():
    kind, workers, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if kind in ("ray", "raylets"):
        ray_actors(workers, apart=kind == "raylets")
    elif kind == "flower":
        flower(workers, port)
    elif kind == "flower-client":
        flower_client(port)
    else:
        naive(workers, port, int(sys.argv[4]))


if __name__ == "__main__":
    main()
