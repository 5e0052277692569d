"""All-reduce in real jobs beside PyTorch's gloo: 0.4, 10 and 100 MB on 2 and 4 nodes.

    python tests/bench/allreduce.py [--peers PYTHON] [--codec allreduce] [--nodes 2,4]
                                    [--rounds 5] [--quick] [--json]

aiosgd: from a worker's handing over its block to its having the result, of the worker that waits
the longest, median over the steps of a job whose model computes nothing; `least ms` is the wait of
the worker that waits the shortest, the last one to hand over. gloo: all_reduce after a barrier, of
the slowest rank. Every job is followed by as many all_reduces of gloo.

`exchange tcp`, `exchange unix`: the codec, its actor, the mesh and links without the training around
them, after a barrier, of the slowest rank: the same measure as gloo's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import numpy as np
from contest import Case, has, parser, report, rounds_of, run, sizes_of

from aiosgd.bench import jobs
from aiosgd.bench.peers import free_port, gloo, peer, slowest
from aiosgd.bench.rows import read_counts

SIZES = (400_000, 10_000_000, 100_000_000)


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--codec", default="allreduce")
    words.add_argument("--nodes", default="2,4")
    options = words.parse_args()
    nodes, rows = read_counts(options.nodes), []
    async with contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(jobs.site(max(nodes), 0))
        for count in nodes:
            async with contextlib.AsyncExitStack() as inner:
                group = None
                if has(options.peers, "torch"):
                    group = await inner.enter_async_context(gloo(count, options.peers))
                exchanges = [
                    await inner.enter_async_context(ranks(count, over)) for over in ("tcp", "unix")
                ]
                for size in sizes_of(options, SIZES):
                    rows += await measure(place, group, exchanges, count, size, options)
    report(rows, options)


def ranks(count: int, over: str):
    """Run `count` ranks of our own for the time of the context."""
    ports = ",".join(str(free_port()) for _ in range(count))
    script = str(Path(__file__).with_name("exchange_rank.py"))
    return peer(
        f"exchange {over}",
        [[sys.executable, script, str(rank), over, ports] for rank in range(count)],
    )


async def measure(place, group, exchanges, count: int, size: int, options) -> list[dict]:
    steps, least = jobs.steps_for(size), []

    async def ours() -> list[float]:
        job = jobs.blank_job(size, count, steps + jobs.WARM_UP, codec=options.codec)
        outcome = await place.run(**job)
        least.append(float(np.median(jobs.waits(outcome, np.min))))
        return jobs.waits(outcome)

    contestants = {"aiosgd": ours}
    for ranks in exchanges:
        contestants[ranks.name] = functools.partial(slowest, ranks, "all_reduce", size, steps)
    if group is not None:
        contestants["gloo"] = lambda: slowest(group, "all_reduce", size, steps)
    case = await Case(f"{size / 1e6:g} MB on {count}").run(
        contestants, rounds_of(options), warm_up=False
    )
    if least:
        case.more["aiosgd"] = {"least ms": float(np.median(least)) * 1e3}
    return case.rows()


if __name__ == "__main__":
    run(main)
