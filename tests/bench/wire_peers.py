"""Both ends of the peers of wire.py: `python wire_peers.py NAME send|receive PORT`.

Takes orders on standard input, the same for both ends, and answers each with a line of JSON:

    arrays BYTES TIMES      one way and an answer of a byte
    trips BYTES TIMES       there and back
    messages BYTES TIMES    in a row, one answer at the end

The sending end answers [seconds each, CPU seconds], the receiving end [[], CPU seconds]. Each peer
has the fastest configuration that its documentation offers for arrays: buffers are reused and
nothing is copied where the library allows it. What arrives is a float32 array at the receiving end.
"""

import asyncio
import json
import os
import queue
import struct
import sys
import time

import numpy as np

DEADLINE = 20.0


class Gloo:
    """torch.distributed send and recv into tensors that are reused."""

    def __init__(self, sends, port):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(sends), world_size=2
        )
        self.torch, self.dist, self.other = torch, dist, int(not sends)
        self.byte, self.place = torch.zeros(1, dtype=torch.uint8), np.empty(0, "f4")

    def send(self, array):
        self.dist.send(self.torch.from_numpy(array), self.other)

    def receive(self, size):
        if self.place.nbytes != size:
            self.place = np.zeros(size // 4, "f4")
        self.dist.recv(self.torch.from_numpy(self.place), self.other)
        return self.place

    def acknowledge(self):
        self.dist.send(self.byte, self.other)

    def await_byte(self):
        self.dist.recv(self.byte, self.other)


class Zmq:
    """pyzmq with copy=False: what arrives is a view of the message.

    Below zmq.COPY_THRESHOLD a copy is cheaper.
    """

    SMALL = 65_536

    def __init__(self, sends, port):
        import zmq

        self.socket = zmq.Context.instance().socket(zmq.PAIR)
        (self.socket.connect if sends else self.socket.bind)(f"tcp://127.0.0.1:{port}")

    def send(self, array):
        self.socket.send(array, copy=array.nbytes < self.SMALL)

    def receive(self, size):
        if size < self.SMALL:
            return np.frombuffer(self.socket.recv(), "f4")
        return np.frombuffer(self.socket.recv(copy=False).buffer, "f4")

    def acknowledge(self):
        self.socket.send(b"x")

    def await_byte(self):
        self.socket.recv()


class Grpc:
    """A stream both ways of raw bytes, in messages of 1 MB, received into one array."""

    CHUNK = 1_000_000
    OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

    def __init__(self, sends, port):
        self.out, self.place = queue.SimpleQueue(), np.empty(0, "f4")
        self.incoming = self._call(port) if sends else self._serve(port)

    def _call(self, port):
        import grpc

        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=self.OPTIONS)
        grpc.channel_ready_future(channel).result(DEADLINE)
        return channel.stream_stream("/bench.Bench/Stream")(iter(self.out.get, None))

    def _serve(self, port):
        from concurrent import futures

        import grpc

        begun = queue.SimpleQueue()

        def stream(requests, context):
            begun.put(requests)
            yield from iter(self.out.get, None)

        self.server = grpc.server(futures.ThreadPoolExecutor(2), options=self.OPTIONS)
        handlers = {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bench.Bench", handlers),)
        )
        self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()
        return begun.get()

    def send(self, array):
        view = memoryview(array).cast("B")
        for start in range(0, len(view), self.CHUNK):
            self.out.put(bytes(view[start : start + self.CHUNK]))  # gRPC takes nothing but bytes

    def receive(self, size):
        if size <= self.CHUNK:
            return np.frombuffer(next(self.incoming), "f4")
        if self.place.nbytes != size:
            self.place = np.zeros(size // 4, "f4")
        view, filled = memoryview(self.place).cast("B"), 0
        while filled < size:
            chunk = next(self.incoming)
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return self.place

    def acknowledge(self):
        self.out.put(b"x")

    def await_byte(self):
        next(self.incoming)


class Streams:
    """asyncio streams on uvloop, a length and what msgpack-numpy packs: the naive way."""

    def __init__(self, sends, port):
        import uvloop

        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.reader, self.writer = self.runner.run(self._open(sends, port))

    async def _open(self, sends, port):
        if sends:
            return await self._connect(port)
        begun = asyncio.get_running_loop().create_future()
        self.server = await asyncio.start_server(
            lambda *ends: begun.set_result(ends), "127.0.0.1", port
        )
        return await begun

    async def _connect(self, port):
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.02)  # the other end is about to listen

    async def send(self, array):
        import msgpack
        import msgpack_numpy

        packed = msgpack.packb(array, default=msgpack_numpy.encode)
        self.writer.write(struct.pack("<Q", len(packed)))
        self.writer.write(packed)
        await self.writer.drain()

    async def receive(self, size):
        import msgpack
        import msgpack_numpy

        (length,) = struct.unpack("<Q", await self.reader.readexactly(8))
        return msgpack.unpackb(
            await self.reader.readexactly(length), object_hook=msgpack_numpy.decode
        )

    async def acknowledge(self):
        self.writer.write(b"x")

    async def await_byte(self):
        await self.reader.readexactly(1)


PEERS = {"gloo": Gloo, "pyzmq": Zmq, "grpc": Grpc, "streams": Streams}


def follow(end, sends, word, size, times):
    """Do one order at an end whose calls block."""
    array, seconds = np.random.default_rng(size).random(size // 4, "f4"), []
    started = time.perf_counter()
    for _ in range(times):
        if sends:
            end.send(array)
        else:
            got = end.receive(size)
        if word == "arrays":
            end.await_byte() if sends else end.acknowledge()
        elif word == "trips":
            end.receive(size) if sends else end.send(got)
        if word != "messages":
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    if word == "messages":
        end.await_byte() if sends else end.acknowledge()
        seconds = [(time.perf_counter() - started) / times]
    return seconds


async def follow_async(end, sends, word, size, times):
    """Do one order at an end whose calls are awaited."""
    array, seconds = np.random.default_rng(size).random(size // 4, "f4"), []
    started = time.perf_counter()
    for _ in range(times):
        if sends:
            await end.send(array)
        else:
            got = await end.receive(size)
        if word == "arrays":
            await (end.await_byte() if sends else end.acknowledge())
        elif word == "trips":
            await (end.receive(size) if sends else end.send(got))
        if word != "messages":
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    if word == "messages":
        await (end.await_byte() if sends else end.acknowledge())
        seconds = [(time.perf_counter() - started) / times]
    return seconds


def main():
    name, sends, port = sys.argv[1], sys.argv[2] == "send", int(sys.argv[3])
    end = PEERS[name](sends, port)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        word, size, times = line.split()
        cpu_s = time.process_time()
        if name == "streams":
            seconds = end.runner.run(follow_async(end, sends, word, int(size), int(times)))
        else:
            seconds = follow(end, sends, word, int(size), int(times))
        answer = [seconds if sends else [], time.process_time() - cpu_s]
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
