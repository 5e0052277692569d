"""The networks of torch_step.py, and its peer: the same steps with DistributedDataParallel over gloo.

python torch_ddp.py cnn|mlp STEPS BATCH EXCHANGE   prints the seconds of rank 0's median step
"""

import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
WARM_UP = 10
SAMPLES = 20_000
FEATURES = {"cnn": 64, "mlp": 784}


def make_cnn() -> nn.Module:
    """Return the network of examples/torch_cnn, for samples that are vectors."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_mlp() -> nn.Module:
    """Return a network of a million parameters."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def worker(
    rank: int, port: int, work: str, steps: int, batch: int, exchange: bool, queue: mp.Queue
) -> None:
    """Train and report the median time of a step."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = {"cnn": make_cnn, "mlp": make_mlp}[work]()
    if exchange:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(SAMPLES, FEATURES[work]), torch.randint(0, 10, (SAMPLES,))
    times = []
    for _ in range(steps + WARM_UP):
        times.append(time.perf_counter())
        index = torch.randint(0, SAMPLES, (batch,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        loss.item()
    dist.barrier()
    if rank == 0:
        steps_s = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
        queue.put(statistics.median(steps_s))
    dist.destroy_process_group()


def main() -> None:
    """Start the two processes and print what rank 0 measured."""
    work, steps, batch, exchange = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(
            target=worker, args=(rank, port, work, steps, batch, exchange == "1", queue)
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    print(queue.get(timeout=300))
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
