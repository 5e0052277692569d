"""All-reduce in real jobs beside PyTorch's gloo: 0.4, 10 and 100 MB on 2 and 4 nodes.

    python tests/bench/allreduce.py [--peers PYTHON] [--codec allreduce] [--nodes 2,4]
                                    [--rounds 5] [--quick] [--json]

aiosgd: from a worker's handing over its block to its having the result, of the worker that waits
the longest, median over the steps of a job whose model computes nothing; `least ms` is the wait of
the worker that waits the shortest, the last one to hand over. gloo: all_reduce after a barrier, of
the slowest rank. Every job is followed by as many all_reduces of gloo.
"""

from __future__ import annotations

import contextlib

import numpy as np
from contest import Case, has, parser, report, rounds_of, run, sizes_of

from aiosgd.bench import jobs
from aiosgd.bench.peers import gloo, slowest
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
                for size in sizes_of(options, SIZES):
                    rows += await measure(place, group, count, size, options)
    report(rows, options)


async def measure(place, group, count: int, size: int, options) -> list[dict]:
    steps, least = jobs.steps_for(size), []

    async def ours() -> list[float]:
        job = jobs.blank_job(size, count, steps + jobs.WARM_UP, codec=options.codec)
        outcome = await place.run(**job)
        least.append(float(np.median(jobs.waits(outcome, np.min))))
        return jobs.waits(outcome)

    contestants = {"aiosgd": ours}
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
