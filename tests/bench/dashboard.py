"""What the dashboard costs the training that it shows: a job, looked at every other few seconds.

    python tests/bench/dashboard.py [--rounds 10] [--seconds 5] [--quick] [--json]

The work is the MLP 784-128-128-10, batch 64 per worker, plain SGD, codec plain, two workers and the
dashboard on this machine. A round is so many seconds of one job with nobody looking, then as many
with each kind of reader; the first second of each is left out. Times are wall-clock seconds of a
step; beside them are the processor seconds that the nodes spend on a step, and the share of one
processor that the dashboard takes, which other programs on the machine hardly change. Rows:

    nobody looks     `aiosgd dashboard` runs, no page is open
    a page is open   a page reads all events, as a browser on another machine would
    Chromium         a headless Chromium on this machine shows the page, where there is one
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contest import Case, parser, report, rounds_of, run, say

from aiosgd import aio
from aiosgd.bench import jobs
from aiosgd.errors import JobFailedError
from aiosgd.runtime.job import Phase
from aiosgd.runtime.results import read_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import Browser, binary

SETTLE = 1.0
LOOKS: dict[str, Callable[[str], Any]] = {}


@contextlib.contextmanager
def reader(address: str) -> Iterator[None]:
    """Read all events for the time of the context."""
    link = http.client.HTTPConnection(address)
    link.request("GET", "/events")
    answer, plug = link.getresponse(), link.sock

    def read() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError, ValueError):
            while answer.read1(1 << 20):
                pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        plug.shutdown(2)
        thread.join()
        link.close()


@contextlib.contextmanager
def browser(address: str) -> Iterator[None]:
    """Show the page for the time of the context."""
    with Browser() as page:
        page.open(f"http://{address}")
        page.until("document.getElementById('link').innerText === 'live'")
        yield


def cpu_s(pids: list[int]) -> float:
    """Return the processor seconds that processes have had."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """Return the processes that this one has started."""
    return [int(pid) for pid in Path("/proc/self/task").joinpath(
        str(os.getpid()), "children").read_text().split()]  # fmt: skip


class Begun(aio.Silent):
    """Knows when a job trains, and its id."""

    def __init__(self) -> None:
        self.running, self.at = asyncio.Event(), 0.0

    def entered(self, phase: Phase, job_id: str) -> None:
        if phase is Phase.RUNNING:
            self.job_id, self.at = job_id, time.monotonic()
            self.running.set()


@dataclass
class Span:
    """Some seconds of the job: who looked, from when to when, and what they took."""

    who: str
    begin: float = 0.0
    end: float = 0.0
    nodes_s: float = 0.0
    dashboard_s: float = 0.0
    steps: int = field(default=0)


async def spans(
    seconds: float, rounds: int, nodes: list[int], own: int, address: str
) -> list[Span]:
    found = []
    for number in range(1, rounds + 1):
        for who, look in LOOKS.items():
            say(f"{who}, round {number} of {rounds}")
            context = look(address)
            await asyncio.to_thread(context.__enter__)
            await asyncio.sleep(SETTLE)
            span = Span(who, time.monotonic(), 0.0, cpu_s(nodes), cpu_s([own]))
            await asyncio.sleep(seconds)
            span.end = time.monotonic()
            span.nodes_s = cpu_s(nodes) - span.nodes_s
            span.dashboard_s = cpu_s([own]) - span.dashboard_s
            await asyncio.to_thread(context.__exit__, None, None, None)
            found.append(span)
    return found


async def measure(place: jobs.Site, seconds: float, rounds: int) -> list[Span]:
    path, watch = place.folder.parent / "cluster.toml", Begun()
    secret = place.cluster.security.secret_file
    workers = [str(address) for address in place.cluster.workers]
    path.write_text(f'workers = {workers}\n[security]\nsecret_file = "{secret}"\n')
    nodes = children()
    words = [sys.executable, "-m", "aiosgd", "dashboard", str(path), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://(\S+)", process.stdout.readline())[1]
        options = {"codec": "plain", "epochs": 10**7, "output": str(place.folder)} | jobs.STEP_JOB
        job = asyncio.create_task(aio.submit(place.cluster, observer=watch, **options))
        await watch.running.wait()
        found = await spans(seconds, rounds, nodes, process.pid, address)
        await aio.cancel(place.cluster)
        with contextlib.suppress(JobFailedError):
            await job
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    times = read_table(place.folder / watch.job_id, "train")
    times = times.time_s[times.node == 0] + watch.at
    for span in found:
        span.steps = int(((times >= span.begin) & (times < span.end)).sum())
    return found


async def main() -> None:
    words = parser(__doc__, rounds=10)
    words.add_argument("--seconds", type=float, default=5.0)
    options = words.parse_args()
    seconds = 1.0 if options.quick else options.seconds
    LOOKS["nobody looks"] = lambda _: contextlib.nullcontext()
    LOOKS["a page is open"] = reader
    if binary():
        LOOKS["Chromium"] = browser
    async with jobs.site(jobs.STEP_WORKERS, 0) as place:
        found = await measure(place, seconds, rounds_of(options))
    case = Case(f"a step, {jobs.STEP_WORKERS} workers")
    for who in LOOKS:
        own = [span for span in found if span.who == who]
        case.times[who] = [(span.end - span.begin) / span.steps for span in own]
        case.more[who] = {
            "nodes' cpu ms/step": 1e3 * statistics.median(s.nodes_s / s.steps for s in own),
            "dashboard cpu %": statistics.median(
                100 * s.dashboard_s / (s.end - s.begin) for s in own
            ),
        }
    report(case.rows("nobody looks"), options)


if __name__ == "__main__":
    run(main)
