"""What a link costs to set up, and what it carries: plain, with a secret, over TLS, over unix.

    python tests/bench/handshake.py [--rounds 7] [--size 100000000] [--json]

One client process (uvloop) and one `aiosgd node` process for each kind of link, all on this
machine; every round measures one kind after the other. Set-up is from nothing to a link that a
submitter could use, the median of 20 in a row. Throughput is one float32 array to the node and its
answer, a round trip is a request of a few bytes and its answer, the median of 200 in a row.

    tcp            no secret, no TLS; no unix socket
    tcp, secret    both ends prove that they have the secret
    tls            certificates of both ends (P-256), TLS 1.3
    tls, secret    both
    unix           tcp first, then the unix socket that the node offers
    unix, secret   the same, and both ends prove on both
    unix, 208 KiB  unix with the kernel's usual send buffer, for comparison; throughput only
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.frame import encode
from aiosgd.runtime.hello import introduce
from aiosgd.runtime.security import SecurityFiles, write_secret

SETUPS, TRIPS = 20, 200
SMALL_BUFFER = 212_992
"""Bytes: net.core.wmem_default of most kernels; setsockopt doubles what it is given."""


@dataclass
class Way:
    """One kind of link: the node at its other end, and how to reach it."""

    name: str
    files: SecurityFiles
    unix: bool = False
    buffer: int = 0
    address: Address | None = None

    def __post_init__(self) -> None:
        self.security = self.files.load()

    async def open(self, role: str = "submitter") -> Link:
        assert self.address is not None
        link = await introduce(self.address, {"role": role}, security=self.security, unix=self.unix)
        if self.buffer:
            sock = link._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer // 2)
        return link


async def setup(way: Way) -> float:
    """Return seconds from nothing to a link."""
    times = []
    for _ in range(SETUPS):
        start = time.perf_counter()
        link = await way.open()
        times.append(time.perf_counter() - start)
        link.close()
    return statistics.median(times)


async def ask(link: Link, content: Any) -> Any:
    """Send a request over a probe link and return the answer."""
    answered = asyncio.get_running_loop().create_future()
    link.on_frame = lambda link, kind, number, content, size: answered.set_result(content)
    link.send(encode(content))
    return await answered


async def throughput(way: Way, data: np.ndarray) -> float:
    """Return bytes per second of one array and its answer; the first one warms up."""
    async with probing(way) as link:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            answer = await ask(link, {"sink": data})
            times.append(time.perf_counter() - start)
            assert answer >= data.nbytes, answer
    return data.nbytes / statistics.median(times[1:])


async def round_trip(way: Way) -> float:
    """Return seconds of a small request and its answer."""
    async with probing(way) as link:
        times = []
        for number in range(TRIPS):
            start = time.perf_counter()
            assert await ask(link, {"echo": number}) == number
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextlib.asynccontextmanager
async def probing(way: Way) -> AsyncIterator[Link]:
    link = await way.open("probe")
    assert link.over == way.name[: len(link.over)], (link.over, way.name)
    gone = asyncio.get_running_loop().create_future()
    try:
        yield link
    finally:
        link.on_closed = lambda *_: gone.set_result(None)
        link.close()
        await gone


@contextlib.contextmanager
def nodes(ways: list[Way], folder: Path):
    """Run a node for each way."""
    processes = []
    try:
        for i, way in enumerate(ways):
            given = {k: v for k, v in vars(way.files).items() if v is not None}
            options = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
            command = ["-m", "aiosgd", "node", "--port", "0", "--run-dir", str(folder / str(i))]
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command, *options],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
        for way, process in zip(ways, processes, strict=True):
            way.address = Address.parse(process.stdout.readline().split()[-1], "node")
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def certificates(folder: Path) -> dict[str, Path]:
    """Make a certificate that is its own authority."""
    key, certificate = folder / "node.key", folder / "node.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=node"
    subject = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", *words.split(), *subject, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return {"tls_cert": certificate, "tls_key": key, "tls_ca": certificate}


def ways_in(folder: Path) -> list[Way]:
    write_secret(folder / "secret")
    secret, tls = {"secret_file": folder / "secret"}, certificates(folder)
    return [
        Way("tcp", SecurityFiles()),
        Way("tcp, secret", SecurityFiles(**secret)),
        Way("tls", SecurityFiles(**tls)),
        Way("tls, secret", SecurityFiles(**tls, **secret)),
        Way("unix", SecurityFiles(), unix=True),
        Way("unix, secret", SecurityFiles(**secret), unix=True),
        Way("unix, 208 KiB", SecurityFiles(), unix=True, buffer=SMALL_BUFFER),
    ]


async def measure(ways: list[Way], rounds: int, size: int) -> dict[str, dict[str, list[float]]]:
    """Return figure -> way -> one value per round."""
    data = np.ones(size // 4, np.float32)
    figures: dict[str, Callable[[Way], Awaitable[float]]] = {
        "set-up ms": setup,
        "GB/s": lambda way: throughput(way, data),
        "round trip us": round_trip,
    }
    scale = {"set-up ms": 1e3, "GB/s": 1e-9, "round trip us": 1e6}
    found: dict[str, dict[str, list[float]]] = {figure: {} for figure in figures}
    for _ in range(rounds):
        for figure, run in figures.items():
            for way in ways:
                if not (way.buffer and figure != "GB/s"):
                    value = scale[figure] * await run(way)
                    found[figure].setdefault(way.name, []).append(value)
    return found


def print_table(found: dict[str, dict[str, list[float]]], ways: list[Way]) -> None:
    print(f"{'':14}", *(f"{figure:>26}" for figure in found))
    for way in ways:
        cells = []
        for figure in found.values():
            words, values = "-", figure.get(way.name)
            if values:
                median = statistics.median(values)
                words = f"{median:.3g} ({min(values):.3g} to {max(values):.3g})"
            cells.append(f"{words:>26}")
        print(f"{way.name:14}", *cells)


def main() -> None:
    """Measure, then print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=100_000_000, help="bytes of the array")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ways = ways_in(Path(name))
        with nodes(ways, Path(name)), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure(ways, options.rounds, options.size))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    facts = {"command": " ".join(sys.argv), "machine": machine, "n": options.rounds}
    if options.json:
        print(json.dumps({**facts, "size": options.size, "figures": found}))
        return
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    print("median (lowest to highest) of the rounds:")
    print_table(found, ways)


if __name__ == "__main__":
    main()
