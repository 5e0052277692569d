"""A parameter server's round beside Ray, Flower and naive streams: 2 and 4 workers, 3 sizes.

    python tests/bench/server.py [--peers PYTHON] [--codec parameter_server] [--nodes 2,4]
                                 [--only NAME,NAME] [--rounds 5] [--quick] [--json]

Every worker has an update of 0.47, 10 or 100 MB, one server gets all of them, and every worker gets
what they change. aiosgd: real jobs whose model computes nothing, from handing over the update to
having the result, of the worker that waits the longest. The peers, see server_peers.py: Ray actors
on one node (shared memory), Ray actors on nodes of their own, Flower's gRPC path, and asyncio
streams with msgpack-numpy. All of them take turns, round by round.
"""

from __future__ import annotations

import contextlib
import sys

from contest import HERE, Case, has, parser, report, rounds_of, run, sizes_of

from aiosgd.bench import jobs
from aiosgd.bench.peers import free_port, peer
from aiosgd.bench.rows import read_counts

SIZES = (470_000, 10_000_000, 100_000_000)
MODULES = {"ray": "ray", "raylets": "ray.cluster_utils", "flower": "flwr"}
STEPS_AT_MOST, STEPS_OF_LARGE, LARGE = 20, 2, 50_000_000


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--codec", default="parameter_server")
    words.add_argument("--nodes", default="2,4")
    words.add_argument("--only", default="ray,raylets,flower,naive", help="of the peers")
    options = words.parse_args()
    nodes, rows = read_counts(options.nodes), []
    names = [
        name
        for name in options.only.split(",")
        if name not in MODULES or has(options.peers, MODULES[name])
    ]
    async with jobs.site(max(nodes), 1) as place:
        for count in nodes:
            async with contextlib.AsyncExitStack() as stack:
                others = {
                    name: await stack.enter_async_context(
                        peer(name, commands(name, count, options))
                    )
                    for name in names
                }
                for size in sizes_of(options, SIZES):
                    rows += await measure(place, others, count, size, options)
    report(rows, options)


def commands(name: str, workers: int, options) -> list[list[str]]:
    python = options.peers if name in MODULES else sys.executable
    command = [python, str(HERE / "server_peers.py"), name, str(workers), str(free_port())]
    if name != "naive":
        return [command]
    return [[*command, str(rank)] for rank in range(workers + 1)]


async def measure(place, others, count: int, size: int, options) -> list[dict]:
    steps = STEPS_OF_LARGE if size > LARGE else min(STEPS_AT_MOST, jobs.steps_for(size))

    async def ours() -> list[float]:
        job = jobs.blank_job(size, count, steps + jobs.WARM_UP, codec=options.codec, servers=1)
        return jobs.waits(await place.run(**job))

    async def theirs(other) -> list[float]:
        answers = [seconds for seconds in await other.order("round", size, steps) if seconds]
        return [max(seconds) for seconds in zip(*answers, strict=True)]

    contestants = {"aiosgd": ours}
    contestants |= {name: lambda other=other: theirs(other) for name, other in others.items()}
    work = f"{size / 1e6:g} MB, {count} workers"
    return (await Case(work).run(contestants, rounds_of(options), warm_up=False)).rows()


if __name__ == "__main__":
    run(main)
