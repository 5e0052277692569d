"""How long a PING waits while a gigabyte goes the same way on the same link.

    python tests/bench/heartbeat.py [--rounds 5] [--quick] [--json]

A PING every 2 ms, from handing it to the link to its PONG; 10 arrays of 100 MB meanwhile, two of
them under way at a time. Seconds are the median PING, p99 and max are of all rounds together.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time

from contest import parser, report, rounds_of, run

from aiosgd.bench.wire import link_to, local_node, payload
from aiosgd.runtime.frame import encode

PAUSE, COUNT, UNDER_WAY = 0.002, 10, 2


async def ping(prober, seconds: list[float]) -> None:
    """Ping until cancelled."""
    while True:
        started = time.perf_counter()
        await prober.ping()
        seconds.append(time.perf_counter() - started)
        await asyncio.sleep(PAUSE)


async def transfer(prober, array) -> float:
    """Send all arrays; return bytes per second."""
    started = time.perf_counter()
    frame, answers = encode({"sink": array}), []
    for _ in range(COUNT):
        answers.append(prober.request(frame))
        if len(answers) >= UNDER_WAY:
            await answers.pop(0)
    await asyncio.gather(*answers)
    return COUNT * array.nbytes / (time.perf_counter() - started)


async def measure(prober, rounds: int, array) -> dict:
    medians, seconds, rates = [], [], []
    for _ in range(rounds):
        mine: list[float] = []
        pinging = asyncio.ensure_future(ping(prober, mine))
        if array is None:
            await asyncio.sleep(0.5)
        else:
            rates.append(await transfer(prober, array))
        pinging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pinging
        medians.append(statistics.median(mine))
        seconds += mine
    seconds.sort()
    return {
        "n": len(seconds),
        "seconds": statistics.median(seconds),
        "range": [min(medians), max(medians)],
        "ratio": None,
        "p99 ms": seconds[int(0.99 * len(seconds))] * 1e3,
        "max ms": seconds[-1] * 1e3,
        "GB/s": statistics.median(rates) / 1e9 if rates else None,
    }


async def main() -> None:
    options = parser(__doc__).parse_args()
    array = payload(10_000_000 if options.quick else 100_000_000)
    rows = []
    async with local_node() as target:
        for over in ("tcp", "unix"):
            async with link_to(target, over) as prober:
                await transfer(prober, array)
                for work, load in (("idle", None), (f"beside {COUNT} x {array.nbytes} B", array)):
                    figures = await measure(prober, rounds_of(options), load)
                    rows.append({"work": f"PING, {work}", "who": f"aiosgd {over}", **figures})
    report(rows, options)


if __name__ == "__main__":
    run(main)
