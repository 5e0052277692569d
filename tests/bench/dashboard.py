"""What the dashboard costs the training that it shows: seconds of a step, with it and without.

    python tests/bench/dashboard.py [--steps 4000] [--rounds 5] [--quick] [--json]

The work is the MLP 784-128-128-10, batch 64 per worker, plain SGD, codec plain, two workers on this
machine; a time is a job's whole training time over its steps. Rows, in turn:

    alone            no dashboard
    nobody looks     `aiosgd dashboard` runs, no page is open
    a page is open   a page reads all events, as a browser on another machine would
    Chromium         a headless Chromium on this machine shows the page, where there is one
"""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from contest import Case, parser, report, rounds_of, run

from aiosgd.bench import jobs

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import Browser, binary


@contextlib.contextmanager
def dashboard(path: Path) -> Iterator[str]:
    """Run one for the time of the context; give its address."""
    words = [sys.executable, "-m", "aiosgd", "dashboard", str(path), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://(\S+)", process.stdout.readline())[1]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def reader(address: str) -> Iterator[None]:
    """Read all events for the time of the context."""
    link = http.client.HTTPConnection(address)
    link.request("GET", "/events")
    answer = link.getresponse()

    def read() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError, ValueError):
            while answer.read1(1 << 20):
                pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        link.sock.shutdown(2)
        thread.join()
        link.close()


@contextlib.contextmanager
def browser(address: str) -> Iterator[None]:
    """Show the page for the time of the context."""
    with Browser() as page:
        page.open(f"http://{address}")
        page.until("document.getElementById('link').innerText === 'live'")
        yield


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--steps", type=int, default=4000)
    options = words.parse_args()
    steps = 300 if options.quick else options.steps
    async with jobs.site(jobs.STEP_WORKERS, 0) as place:
        cluster = place.folder.parent / "cluster.toml"
        workers = [str(address) for address in place.cluster.workers]
        secret = place.cluster.security.secret_file
        cluster.write_text(f'workers = {workers}\n[security]\nsecret_file = "{secret}"\n')

        async def step() -> list[float]:
            outcome = await place.run(codec="plain", epochs=steps, max_steps=steps, **jobs.STEP_JOB)
            return [outcome.summary.train_s / outcome.summary.steps]

        async def shown(look=contextlib.nullcontext) -> list[float]:
            with dashboard(cluster) as address, look(address):
                return await step()

        contestants = {
            "alone": step,
            "nobody looks": shown,
            "a page is open": lambda: shown(reader),
        }
        if binary():
            contestants["Chromium"] = lambda: shown(browser)
        case = await Case(f"a step, {jobs.STEP_WORKERS} workers").run(
            contestants, rounds_of(options), warm_up=False
        )
    for name, seconds in case.times.items():
        case.more[name] = {"steps/s": 1 / sorted(seconds)[len(seconds) // 2]}
    report(case.rows("alone"), options)


if __name__ == "__main__":
    run(main)
