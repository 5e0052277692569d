"""The peer of step.py: the same training step with PyTorch, over two processes and gloo.

python ddp_step.py STEPS BATCH EXCHANGE   prints steps per second
"""

import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
WARM_UP = 50


def worker(rank: int, port: int, steps: int, batch: int, exchange: bool, queue: mp.Queue) -> None:
    """Train and report the median time of a step."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    if exchange:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(20_000, 784), torch.randint(0, 10, (20_000,))
    times = []
    for step in range(steps + WARM_UP):
        times.append(time.perf_counter())
        index = torch.arange(batch) + (step * batch) % (len(x) - batch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    dist.barrier()
    if rank == 0:
        steps_s = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
        queue.put(1 / statistics.median(steps_s))
    dist.destroy_process_group()


def main() -> None:
    """Start the two processes and print what rank 0 measured."""
    steps, batch, exchange = int(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=worker, args=(rank, port, steps, batch, exchange, queue))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    print(queue.get(timeout=300))
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
