"""PyTorch's gloo as a peer: one process per rank that takes orders on its standard input.

    python gloo.py RANK WORLD PORT

It needs torch and nothing else, so that any Python which has torch can run it. An order is a line
`all_reduce BYTES TIMES` or `broadcast BYTES TIMES`, the same for every rank; the answer is a line
of JSON: the seconds of each, after one that warms up.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WORDS = {"all_reduce", "broadcast"}


def main() -> None:
    """Join the group, then follow orders until the input ends."""
    import torch  # noqa: PLC0415 - whoever imports this module to start it may not have torch
    import torch.distributed as dist  # noqa: PLC0415

    rank, world, port = map(int, sys.argv[1:4])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    answer("ready")
    for line in sys.stdin:
        word, size, times = line.split()
        array = torch.ones(int(size) // 4)
        exchange = dist.all_reduce if word == "all_reduce" else lambda one: dist.broadcast(one, 0)
        answer(measure(exchange, dist.barrier, array, int(times)))
    dist.destroy_process_group()


def measure(
    exchange: Callable[[Any], object], barrier: Callable[[], object], array: Any, times: int
) -> list[float]:
    """Return the seconds of each exchange: all ranks begin together."""
    seconds = []
    for _ in range(times + 1):
        array.fill_(1)
        barrier()
        started = time.perf_counter()
        exchange(array)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def answer(value: Any) -> None:
    """Tell whoever gives the orders."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
