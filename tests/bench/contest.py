"""What all benchmarks share: contestants that take turns, medians, and one table or JSON object.

A contestant is a function that runs one round and returns seconds. All of them run in each round,
so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiosgd.runtime.pool import keep_heap_warm

HERE = Path(__file__).parent
SIZES = (1_000_000, 10_000_000, 100_000_000)

Round = Callable[[], "Sequence[float] | Awaitable[Sequence[float]]"]


@dataclass
class Case:
    """One piece of work and the medians of its contestants' rounds, in seconds.

    Attributes:
        more: further figures, contestant -> name -> value.
    """

    work: str
    times: dict[str, list[float]] = field(default_factory=dict)
    more: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def run(
        self, contestants: Mapping[str, Round], rounds: int, *, warm_up: bool = True
    ) -> Case:
        """Let all take turns; one that fails is out, with a word on stderr.

        Args:
            contestants: by name.
            rounds: that count.
            warm_up: whether there is one before them; not where each round has its own.
        """
        left = dict(contestants)
        for number in range(0 if warm_up else 1, rounds + 1):
            for name in list(left):
                say(f"{self.work}: {name}, round {number} of {rounds}")
                try:
                    times = left[name]()
                    times = await times if inspect.isawaitable(times) else times
                except Exception as error:  # noqa: BLE001 - a peer may fail in any way
                    del left[name]
                    sys.stderr.write(f"{self.work}: {name} is out: {error!r}\n")
                    continue
                if number:
                    self.times.setdefault(name, []).append(statistics.median(times))
        return self

    def rows(self, ours: str = "aiosgd") -> list[dict[str, Any]]:
        """Return a row for each contestant; ratios are to the first named `ours`, by medians."""
        base = statistics.median(self.times[ours]) if ours in self.times else None
        return [
            {
                "work": self.work,
                "who": name,
                "n": len(times),
                "seconds": statistics.median(times),
                "range": [min(times), max(times)],
                "ratio": statistics.median(times) / base if base else None,
                **self.more.get(name, {}),
            }
            for name, times in self.times.items()
        ]


def parser(text: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument(
        "--peers",
        default=sys.executable,
        metavar="PYTHON",
        help="a Python with the peers installed",
    )
    made.add_argument("--quick", action="store_true", help="small sizes and 2 rounds: does it run?")
    made.add_argument("--json", action="store_true")
    return made


def rounds_of(options: argparse.Namespace) -> int:
    """Return how many rounds to run."""
    return 2 if options.quick else int(options.rounds)


def sizes_of(options: argparse.Namespace, sizes: Sequence[int] = SIZES) -> list[int]:
    """Return which sizes to run."""
    return [size for size in sizes if size <= 1_000_000] if options.quick else list(sizes)


def has(python: str, module: str) -> bool:
    """Tell whether a Python can import a module."""
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    return done.returncode == 0


def say(text: str) -> None:
    """Show how far it is, where somebody looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def machine() -> str:
    """Return what this machine is."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def report(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print what was measured: one JSON object, or command, machine and a table."""
    say("")
    command = " ".join(["python", *sys.argv])
    if options.json:
        print(json.dumps({"command": command, "machine": machine(), "rows": list(rows)}))
        return
    print(
        f"{command}\n{machine()}; medians of {rounds_of(options)} rounds; ratio: this / the first row"
    )
    more = dict.fromkeys(
        name for row in rows for name in row if name not in Case("").__dict__ and name not in KNOWN
    )
    head = f"{'':38}{'who':22}{'n':>5}{'median':>10}{'min':>10}{'max':>10}{'ratio':>7}"
    print(head + "".join(f"{name:>{len(name) + 2}}" for name in more))
    last = None
    for row in rows:
        print(_line(row, last) + "".join(_cell(row.get(name), len(name) + 2) for name in more))
        last = row["work"]


KNOWN = ("work", "who", "n", "seconds", "range", "ratio")


def _line(row: Mapping[str, Any], last: str | None) -> str:
    low, high = row["range"]
    times = "".join(f"{duration(value):>10}" for value in (row["seconds"], low, high))
    ratio = f"{row['ratio']:7.2f}" if row["ratio"] else f"{'':7}"
    return (
        f"{row['work'] if row['work'] != last else '':38}{row['who']:22}{row['n']:5}{times}{ratio}"
    )


def _cell(value: Any, width: int) -> str:
    if isinstance(value, float):
        value = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return f"{'' if value is None else value:>{width}}"


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:  # 999.6 would be rounded to 1000
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a benchmark on the loop that nodes run on, with the heap that they have."""
    import uvloop

    keep_heap_warm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(main())
        except KeyboardInterrupt:
            sys.exit(130)
