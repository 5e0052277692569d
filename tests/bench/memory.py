"""Memory over 1,000 messages of 100 MB, and what an idle node costs.

    python tests/bench/memory.py [--messages 1000] [--rounds 5] [--quick] [--json]

Resident megabytes of both ends after every tenth of the messages; the growth is from the first
tenth to the end. Then a new node, `--rounds` times: seconds until it listens, and its resident
megabytes while it is idle.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from contest import parser, report, rounds_of, run, say

from aiosgd.bench.wire import link_to, local_node, payload

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int | str) -> float:
    """Return a process's resident megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6


async def steady(options) -> list[dict]:
    count, size = (50, 10_000_000) if options.quick else (options.messages, 100_000_000)
    array, rows = payload(size), []
    async with local_node() as target:
        for over in ("tcp", "unix"):
            async with link_to(target, over) as prober:
                pid = (await prober.ask({"about": None}))["pid"]
                times, samples = [], []
                for number in range(1, count + 1):
                    started = time.perf_counter()
                    await prober.ask({"sink": array})
                    times.append(time.perf_counter() - started)
                    if number % max(1, count // 10) == 0:
                        samples.append((resident("self"), resident(pid)))
                        say(f"{over}: {number} of {count}")
                row = {
                    "work": f"{count} x {size / 1e6:g} MB",
                    "who": f"aiosgd {over}",
                    "n": count,
                    "seconds": statistics.median(times),
                    "range": [min(times), max(times)],
                    "ratio": None,
                }
                for end, values in zip(("sender", "node"), zip(*samples, strict=True), strict=True):
                    row[f"{end} MB"] = values[-1]
                    row[f"{end} growth MB"] = values[-1] - values[0]
                    row[f"{end} peak MB"] = max(values)
                rows.append(row)
    return rows


async def idle(options) -> dict:
    times, sizes = [], []
    for _ in range(rounds_of(options)):
        started = time.perf_counter()
        async with local_node() as target:
            times.append(time.perf_counter() - started)
            async with link_to(target, "tcp") as prober:
                sizes.append(resident((await prober.ask({"about": None}))["pid"]))
    return {
        "work": "a new node until it answers",
        "who": "aiosgd",
        "n": len(times),
        "seconds": statistics.median(times),
        "range": [min(times), max(times)],
        "ratio": None,
        "node MB": statistics.median(sizes),
    }


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--messages", type=int, default=1000)
    options = words.parse_args()
    report([*await steady(options), await idle(options)], options)


if __name__ == "__main__":
    run(main)
