"""How fast links are: beside a bare blocking socket that carries the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from aiosgd.bench.rows import Note, Report, Row, Samples, row, with_more
from aiosgd.errors import ClusterError
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.launchers import Printed, Wanted, ignore
from aiosgd.plugins.registry import make_params
from aiosgd.runtime.config import Address, Cluster
from aiosgd.runtime.frame import HEADER_SIZE, encode
from aiosgd.runtime.probe import Prober, probing, receive_into, tune
from aiosgd.runtime.security import OPEN, Security, SecurityFiles

Transport: TypeAlias = Literal["tcp", "unix"]

STALL = 60.0
"""Seconds within which a round of one contestant must be over."""
ROUND_BYTES = 50_000_000
"""Small arrays are sent this often in a round, up to 50 times: one transfer of 1 MB is over before
the machine has woken up."""
PIPELINED = 20_000
ROUND_TRIPS = 1_000
BATCH = 64
"""Messages between two turns of the loop: a codec that sends in a loop has as many."""
SMALL = 64_000
"""Bytes of a message that is still small."""
IN_FLIGHT = 4 << 20
"""Bytes that may wait to be sent."""


@dataclass(frozen=True)
class Target:
    """A node to measure, and what its links are protected with."""

    address: Address
    security: Security = OPEN


def targets_of(cluster: Cluster) -> list[Target]:
    """Return all nodes of a cluster."""
    security = cluster.security.load()
    return [Target(address, security) for address in (*cluster.workers, *cluster.servers)]


@contextlib.asynccontextmanager
async def local_node(printed: Printed = ignore, *, apart: bool = True) -> AsyncIterator[Target]:
    """Run a node process on this machine for the time of the context.

    Args:
        printed: told what the node prints.
        apart: whether it and this process have a core each, where there are two: a wake-up of
            another core takes ten times as long as one of the same, and the scheduler puts the
            ends of a raw socket on one core but two event loops on two.
    """
    launcher = LAUNCHERS.load("local")
    launched = launcher(make_params(launcher, {}, "launcher")).launch(Wanted(workers=1), printed)
    async with launched as nodes:
        security = SecurityFiles(secret_file=nodes.secret_file).load()
        target = Target(Address.parse(nodes.workers[0], "local node"), security)
        async with link_to(target, "tcp") as prober:
            pid = int((await prober.ask({"about": None}))["pid"])
        with cores_apart(pid) if apart else contextlib.nullcontext():
            yield target


@contextlib.contextmanager
def cores_apart(pid: int) -> Iterator[None]:
    """Give another process and this one a core each; their new threads have the same."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(pid, cores[1:2])
        os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.asynccontextmanager
async def link_to(target: Target, transport: Transport) -> AsyncIterator[Prober]:
    """Open a probe link of that transport.

    Raises:
        ClusterError: the node cannot be reached, or not like that.
    """
    unix = transport == "unix"
    async with probing(target.address, security=target.security, unix=unix) as prober:
        if transport == "unix" and prober.link.over != "unix":
            raise ClusterError(
                f"{target.address} has no unix socket for us: that takes a node on this machine, "
                "without TLS and not started with --no-unix; use --transport tcp"
            )
        yield prober


# Contestants ----------------------------------------------------------------------------------


@dataclass
class Contestant:
    """Somebody who carries arrays, and what was measured.

    Attributes:
        measure: runs one round and returns its times in seconds.
        cpu_s: CPU seconds of both ends, over all rounds.
    """

    name: str
    measure: Callable[[], Awaitable[list[float]]]
    samples: Samples = field(default_factory=Samples)
    cpu_s: float = 0.0


async def interleave(
    prober: Prober, contestants: Sequence[Contestant], rounds: int, note: Note
) -> None:
    """Measure all in turn, round by round, so that they meet the same machine; the first warms up.

    Raises:
        ClusterError: the node does not answer any more.
    """
    for number in range(rounds + 1):
        note(f"round {number} of {rounds}" if number else "warming up")
        for contestant in contestants:
            try:
                async with asyncio.timeout(STALL):
                    await _round(prober, contestant, keep=number > 0)
            except TimeoutError:
                text = f"{prober.address}: a round of {contestant.name} took over {STALL:g} s"
                raise ClusterError(text) from None


async def _round(prober: Prober, contestant: Contestant, *, keep: bool) -> None:
    before = await cpu_s(prober)
    times = await contestant.measure()
    used = await cpu_s(prober) - before
    if keep:
        contestant.samples.rounds.append(times)
        contestant.cpu_s += used


async def cpu_s(prober: Prober) -> float:
    """Return the CPU seconds that both ends have used so far."""
    about = await prober.ask({"about": None})
    return time.process_time() + float(about["cpu_s"])


def repeats(size: int) -> int:
    """Return how often an array of that size is sent in a round."""
    return max(1, min(50, ROUND_BYTES // size))


def payload(size: int) -> Any:
    """Return a float32 array of so many bytes that no zero page stands for."""
    return np.random.default_rng(size).random(size // 4, np.float32)


# Ours -----------------------------------------------------------------------------------------


async def send_arrays(prober: Prober, array: Any, count: int) -> list[float]:
    """Send an array, wait until the node holds it, and so on; return the seconds of each."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await prober.ask({"sink": array})
        times.append(time.perf_counter() - started)
    return times


async def send_messages(prober: Prober, array: Any, count: int) -> list[float]:
    """Send so many messages in a row, one answer at the end; return the seconds per message."""
    started = time.perf_counter()
    arrived = prober.request(encode({"count": count}))
    for number in range(count):
        prober.link.send(encode({"value": array}))
        if number % BATCH == BATCH - 1:
            await asyncio.sleep(0)
            if prober.link.queued > IN_FLIGHT:
                await prober.link.flushed()
    await arrived
    return [(time.perf_counter() - started) / count]


async def round_trips(prober: Prober, array: Any, count: int) -> list[float]:
    """Have an array sent back, and so on; return the seconds of each."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await prober.ask({"echo": array})
        times.append(time.perf_counter() - started)
    return times


# The raw socket -------------------------------------------------------------------------------


class Raw:
    """The asking end of a node's raw peer: a blocking socket, in a thread that does nothing else.

    Args:
        size: bytes at a time.
        every: how many of these are answered together, by one byte.
        echo: whether the same bytes come back instead.
    """

    def __init__(self, connection: socket.socket, size: int, every: int, *, echo: bool) -> None:
        self._connection = connection
        # what is sent differs from what is received into, as with arrays
        self._view = memoryview(payload(max(4, size + 3)).view(np.uint8))[:size]
        self._answer = memoryview(bytearray(size if echo else 1))
        self._every = every

    async def transfers(self, count: int) -> list[float]:
        """Send and await the answer so often; return the seconds per `every`.

        Raises:
            ClusterError: the other end is gone, or does not answer in time.
        """
        try:
            return await asyncio.to_thread(self._transfers, count)
        except OSError as error:
            raise ClusterError(f"the raw peer is gone: {error.strerror or error}") from error

    def _transfers(self, count: int) -> list[float]:
        times = []
        send, view = self._connection.sendall, self._view
        for _ in range(count):
            started = time.perf_counter()
            for _ in range(self._every):
                send(view)
            if not receive_into(self._connection, self._answer):
                raise ClusterError("the raw peer is gone: it closed the connection")
            times.append((time.perf_counter() - started) / self._every)
        return times


@contextlib.asynccontextmanager
async def raw_peer(
    prober: Prober, size: int, transport: Transport, every: int = 1, *, echo: bool = False
) -> AsyncIterator[Raw]:
    """Have the node open a raw peer, and connect to it.

    Raises:
        ClusterError: it cannot be reached.
    """
    unix = transport == "unix"
    place = await prober.ask({"raw": size, "every": every, "echo": echo, "unix": unix})
    connection = await asyncio.to_thread(_connect, prober.address, place["address"])
    try:
        connection.sendall(place["token"])
        yield Raw(connection, size, every, echo=echo)
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
        connection.close()


def _connect(address: Address, place: int | str) -> socket.socket:
    try:
        if isinstance(place, int):
            connection = socket.create_connection((address.host, place), timeout=10)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"\0{place}")
    except OSError as error:
        raise ClusterError(f"{address}: its raw peer cannot be reached: {error}") from error
    tune(connection)
    connection.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # still blocking, but not for ever
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(STALL), 0))
    return connection


# The benchmarks -------------------------------------------------------------------------------


async def wire(
    targets: Sequence[Target], sizes: Sequence[int], rounds: int, transport: Transport, note: Note
) -> Report:
    """Measure one way and an answer for float32 arrays of each size, to each node."""

    async def measure(prober: Prober, at: Note) -> list[Row]:
        return [await _one_way(prober, size, rounds, transport, at) for size in sizes]

    return await _each("wire", targets, transport, rounds, note, measure)


async def messages(
    targets: Sequence[Target], sizes: Sequence[int], rounds: int, transport: Transport, note: Note
) -> Report:
    """Measure small messages, to each node: many in a row, and one by one there and back."""

    async def measure(prober: Prober, at: Note) -> list[Row]:
        return [
            await one(prober, size, rounds, transport, at)
            for size in sizes
            for one in (_pipelined, _there_and_back)
        ]

    return await _each("messages", targets, transport, rounds, note, measure)


async def _each(
    work: str,
    targets: Sequence[Target],
    transport: Transport,
    rounds: int,
    note: Note,
    measure: Callable[[Prober, Note], Awaitable[list[Row]]],
) -> Report:
    rows, warnings = [], []
    for target in targets:
        address = target.address
        async with link_to(target, transport) as prober:
            about = await prober.ask({"about": None})
            if about["job"]:
                warnings.append(f"{address} is busy with job {about['job']}: it is slower for that")
            measured = await measure(prober, functools.partial(_noted, note, address))
        rows += [with_more(one, node=str(address), transport=transport) for one in measured]
    return Report(work, rows, rounds, warnings)


def _noted(note: Note, address: Address, text: str) -> None:
    note(f"{address}: {text}")


async def _one_way(prober: Prober, size: int, rounds: int, transport: Transport, note: Note) -> Row:
    array, count = payload(size), repeats(size)
    async with raw_peer(prober, size, transport) as raw:
        ours = Contestant("aiosgd", lambda: send_arrays(prober, array, count))
        theirs = Contestant(f"raw {transport} socket", lambda: raw.transfers(count))
        await interleave(prober, [ours, theirs], rounds, lambda text: note(f"{size} B, {text}"))
    gigabytes = size * count * rounds / 1e9
    return with_more(
        row(size, 1, ours.samples, theirs.name, theirs.samples),
        gb_per_s=size / ours.samples.median / 1e9,
        cpu_s_per_gb=ours.cpu_s / gigabytes,
        peer_cpu_s_per_gb=theirs.cpu_s / gigabytes,
    )


async def _pipelined(
    prober: Prober, size: int, rounds: int, transport: Transport, note: Note
) -> Row:
    array, count = payload(size), PIPELINED
    async with raw_peer(prober, HEADER_SIZE + size, transport, count) as raw:
        ours = Contestant("aiosgd", lambda: send_messages(prober, array, count))
        theirs = Contestant(f"raw {transport} socket", lambda: raw.transfers(1))
        await interleave(prober, [ours, theirs], rounds, lambda text: note(f"in a row, {text}"))
    one = row(size, 1, ours.samples, theirs.name, theirs.samples)
    return with_more(
        one,
        what="in a row",
        messages_per_s=1 / one.seconds,
        peer_messages_per_s=1 / theirs.samples.median,
    )


async def _there_and_back(
    prober: Prober, size: int, rounds: int, transport: Transport, note: Note
) -> Row:
    array, count = payload(size), ROUND_TRIPS
    async with raw_peer(prober, HEADER_SIZE + size, transport, echo=True) as raw:
        ours = Contestant("aiosgd", lambda: round_trips(prober, array, count))
        theirs = Contestant(f"raw {transport} socket", lambda: raw.transfers(count))
        await interleave(prober, [ours, theirs], rounds, lambda text: note(f"round trip, {text}"))
    one = row(size, 1, ours.samples, theirs.name, theirs.samples)
    return with_more(one, what="round trip", messages_per_s=1 / one.seconds)
