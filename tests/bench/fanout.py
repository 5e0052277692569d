"""One to four and four to one: 100 MB of float32 each.

    python tests/bench/fanout.py [--peers PYTHON] [--rounds 5] [--quick] [--json]

Broadcast: one frame is encoded and sent to four node processes, until all of them have answered
that they hold the array. Beside it: gloo's broadcast over five ranks, the slowest rank's time.

Incast: four processes send an array each to one, until that one has their mean. Beside it: asyncio
streams on uvloop with msgpack-numpy, and numpy.mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time

import msgpack
import msgpack_numpy
import numpy as np
from contest import HERE, Case, has, parser, report, rounds_of, run

from aiosgd.bench.jobs import site
from aiosgd.bench.peers import free_port, gloo, peer, slowest
from aiosgd.bench.wire import Target, link_to, payload
from aiosgd.codecs.base import mean
from aiosgd.runtime.frame import encode

COUNT, TIMES = 4, 3


async def broadcast(links, array) -> list[float]:
    """Send one array to all, and wait for all answers."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        frame = encode({"sink": array})
        await asyncio.gather(*(link.request(frame) for link in links))
        seconds.append(time.perf_counter() - started)
    return seconds


async def incast(links, size: int) -> list[float]:
    """Have all send an array, and compute the mean."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        arrays = await asyncio.gather(*(link.ask({"give": size}) for link in links))
        result = mean(dict(enumerate(arrays)))
        seconds.append(time.perf_counter() - started)
        assert result[0] == result[-1] == 1
        del arrays, result
    return seconds


class Naive:
    """Four senders and this process, over streams."""

    def __init__(self) -> None:
        self.ends = []
        self.port = free_port()

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        server = await asyncio.start_server(
            lambda *ends: self.ends.append(ends), "127.0.0.1", self.port
        )
        stack.callback(server.close)
        command = [sys.executable, str(HERE / "wire_peers.py"), "streams", "send", str(self.port)]
        self.senders = await stack.enter_async_context(peer("streams", [command] * COUNT))

    async def incast(self, size: int) -> list[float]:
        orders = asyncio.ensure_future(self.senders.order("arrays", size, TIMES))
        seconds = []
        for _ in range(TIMES):
            started = time.perf_counter()
            arrays = await asyncio.gather(*(self.receive(reader) for reader, _ in self.ends))
            np.mean(arrays, axis=0)
            seconds.append(time.perf_counter() - started)
            for _, writer in self.ends:
                writer.write(b"x")
            del arrays
        await orders
        return seconds

    @staticmethod
    async def receive(reader: asyncio.StreamReader):
        (length,) = struct.unpack("<Q", await reader.readexactly(8))
        return msgpack.unpackb(await reader.readexactly(length), object_hook=msgpack_numpy.decode)


async def main() -> None:
    options = parser(__doc__).parse_args()
    size, rounds = 1_000_000 if options.quick else 100_000_000, rounds_of(options)
    array = payload(size)
    async with contextlib.AsyncExitStack() as stack:
        place = await stack.enter_async_context(site(COUNT, 0))
        security = place.cluster.security.load()
        targets = [Target(address, security) for address in place.cluster.workers]
        links = {
            over: [await stack.enter_async_context(link_to(target, over)) for target in targets]
            for over in ("tcp", "unix")
        }
        one_to_four = {
            f"aiosgd {over}": lambda over=over: broadcast(links[over], array) for over in links
        }
        if has(options.peers, "torch"):
            group = await stack.enter_async_context(gloo(COUNT + 1, options.peers))
            one_to_four["gloo"] = lambda: slowest(group, "broadcast", size, TIMES)
        naive = Naive()
        await naive.open(stack)
        four_to_one = {
            f"aiosgd {over}": lambda over=over: incast(links[over], size) for over in links
        }
        four_to_one["streams"] = lambda: naive.incast(size)
        megabytes = f"{size / 1e6:g} MB"
        rows = (await Case(f"{megabytes} to {COUNT}").run(one_to_four, rounds)).rows("aiosgd tcp")
        case = await Case(f"{COUNT} x {megabytes} to one, and mean").run(four_to_one, rounds)
        report([*rows, *case.rows("aiosgd tcp")], options)


if __name__ == "__main__":
    run(main)
