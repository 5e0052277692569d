"""One link: arrays one way, small messages in a row, and round trips, beside other ways.

    python tests/bench/wire.py [--peers PYTHON] [--rounds 5] [--free] [--quick] [--json]

1, 10 and 100 MB of float32: from handing the array over to an answer of the other end, which holds
it as an array by then. 1 kB messages: per message in a row with one answer at the end, and there
and back. Every round of one is followed by a round of the next. CPU s/GB is of both ends together.

    aiosgd tcp, unix    a probe link to a node process
    raw tcp, unix       a bare blocking socket between the same two processes, into a reused buffer
    gloo                torch.distributed send and recv into reused tensors
    pyzmq               copy=False
    grpc                a stream of bytes in messages of 1 MB
    streams             asyncio streams on uvloop with msgpack-numpy: what aiosgd would be without
                        its own links
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator

from contest import HERE, Case, has, parser, report, rounds_of, run, sizes_of

from aiosgd.bench import wire
from aiosgd.bench.peers import Peer, free_port, peer
from aiosgd.runtime.frame import HEADER_SIZE

MODULES = {"gloo": "torch", "pyzmq": "zmq", "grpc": "grpc"}
MESSAGE, IN_A_ROW, TRIPS = 1000, 20_000, 1000


class Cpu:
    """Counts CPU seconds of one contestant, both ends."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    @property
    def per_gb(self) -> float:
        return self.seconds / (self.bytes / 1e9)


class Other:
    """A peer whose both ends are processes of their own."""

    def __init__(self, pair: Peer) -> None:
        self.pair = pair
        self.cpu = Cpu()

    async def order(self, word: str, size: int, times: int) -> list[float]:
        answers = await self.pair.order(word, size, times)
        self.cpu.seconds += sum(cpu_s for _, cpu_s in answers)
        self.cpu.bytes += size * times
        return answers[1][0]


@contextlib.asynccontextmanager
async def others(options: argparse.Namespace) -> AsyncIterator[dict[str, Other]]:
    """Run the peers that are installed; the naive one needs only what aiosgd needs."""
    pythons = {
        name: options.peers for name, module in MODULES.items() if has(options.peers, module)
    }
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for name, python in {**pythons, "streams": sys.executable}.items():
            script, port = str(HERE / "wire_peers.py"), str(free_port())
            commands = [[python, script, name, end, port] for end in ("receive", "send")]
            found[name] = Other(await stack.enter_async_context(peer(name, commands)))
        yield found


async def counted(prober, cpu: Cpu, size: int, times: int, work) -> list[float]:
    before = await wire.cpu_s(prober)
    seconds = await work
    cpu.seconds += await wire.cpu_s(prober) - before
    cpu.bytes += size * times
    return seconds


async def arrays(links, peers, size: int, rounds: int) -> list[dict]:
    times, array = wire.repeats(size), wire.payload(size)
    async with contextlib.AsyncExitStack() as stack:
        contestants, cpus = {}, {}
        for over, prober in links.items():
            raw = await stack.enter_async_context(wire.raw_peer(prober, size, over))
            ours, bare = cpus[f"aiosgd {over}"], cpus[f"raw {over}"] = Cpu(), Cpu()
            contestants[f"aiosgd {over}"] = lambda prober=prober, cpu=ours: counted(
                prober, cpu, size, times, wire.send_arrays(prober, array, times)
            )
            contestants[f"raw {over}"] = lambda prober=prober, cpu=bare, raw=raw: counted(
                prober, cpu, size, times, raw.transfers(times)
            )
        for name, other in peers.items():
            other.cpu = cpus[name] = Cpu()
            contestants[name] = lambda other=other: other.order("arrays", size, times)
        case = await Case(f"{size / 1e6:g} MB one way").run(contestants, rounds)
    for name, seconds in case.times.items():
        gb_per_s = size / sorted(seconds)[len(seconds) // 2] / 1e9
        case.more[name] = {"GB/s": gb_per_s, "CPU s/GB": cpus[name].per_gb}
    return case.rows("aiosgd tcp")


async def messages(links, peers, rounds: int, scale: int) -> list[dict]:
    array, row, trips = wire.payload(MESSAGE), IN_A_ROW // scale, TRIPS // scale
    rows = []
    for work, word, times in (
        ("1 kB in a row, per message", "messages", row),
        ("1 kB there and back", "trips", trips),
    ):
        async with contextlib.AsyncExitStack() as stack:
            contestants = {}
            for over, prober in links.items():
                every = times if word == "messages" else 1
                raw = await stack.enter_async_context(
                    wire.raw_peer(prober, HEADER_SIZE + MESSAGE, over, every, echo=word == "trips")
                )
                measure = wire.send_messages if word == "messages" else wire.round_trips
                contestants[f"aiosgd {over}"] = lambda prober=prober, measure=measure, times=times: (
                    measure(prober, array, times)
                )
                contestants[f"raw {over}"] = lambda raw=raw, n=times // every: raw.transfers(n)
            for name, other in peers.items():
                contestants[name] = lambda other=other, word=word, times=times: other.order(
                    word, MESSAGE, times
                )
            case = await Case(work).run(contestants, rounds)
        rows += case.rows("aiosgd tcp")
    return rows


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--free", action="store_true", help="let the scheduler choose cores")
    options = words.parse_args()
    rounds = rounds_of(options)
    async with contextlib.AsyncExitStack() as stack:
        peers = await stack.enter_async_context(others(options))
        target = await stack.enter_async_context(wire.local_node(apart=not options.free))
        links = {
            over: await stack.enter_async_context(wire.link_to(target, over))
            for over in ("tcp", "unix")
        }
        rows = []
        for size in sizes_of(options):
            rows += await arrays(links, peers, size, rounds)
        rows += await messages(links, peers, rounds, 10 if options.quick else 1)
    report(rows, options)


if __name__ == "__main__":
    run(main)
