"""Peers in processes of their own, which take orders line by line on their standard input."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiosgd.errors import ClusterError

GLOO = Path(__file__).with_name("gloo.py")
STOP_TIMEOUT = 10.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Peer:
    """Processes that all get the same orders.

    Args:
        name: for messages.
        processes: they answer each order with one line of JSON.
    """

    def __init__(self, name: str, processes: Sequence[Process]) -> None:
        self.name = name
        self.processes = processes

    async def order(self, *words: object) -> list[Any]:
        """Give an order to all and return what each answers.

        Raises:
            ClusterError: one of them has ended.
        """
        line = " ".join(map(str, words)) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line.encode())
        return await self.answers()

    async def answers(self) -> list[Any]:
        """Return the next line of each; raises as `order`."""
        return await asyncio.gather(*map(self._answer, self.processes))

    async def _answer(self, process: Process) -> Any:
        assert process.stdout is not None
        while True:
            line = await process.stdout.readline()
            if not line:
                raise ClusterError(
                    f"{self.name}: a process ended with exit code {process.returncode}"
                )
            with contextlib.suppress(ValueError):  # a library's own words on stdout
                return json.loads(line)


@contextlib.asynccontextmanager
async def peer(name: str, commands: Sequence[Sequence[str]]) -> AsyncIterator[Peer]:
    """Run a peer's processes for the time of the context, once each has answered that it is ready.

    Raises:
        ClusterError: one of them cannot start.
    """
    processes: list[Process] = []
    try:
        for command in commands:
            process = await _start(command)
            processes.append(process)  # one by one: those that have started must end
        running = Peer(name, processes)
        await running.answers()
        yield running
    finally:
        await asyncio.gather(*map(_ended, processes))


async def _ended(process: Process) -> None:
    """Close a process's standard input, which ends it; whatever it started ends with it."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()


async def _start(command: Sequence[str]) -> Process:
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=PIPE,
        stderr=None if os.environ.get("AIOSGD_BENCH_STDERR") else DEVNULL,
        env={**os.environ, **ONE_THREAD},
        start_new_session=True,
        limit=1 << 24,
    )


def has_torch() -> bool:
    """Tell whether this Python has torch."""
    return importlib.util.find_spec("torch") is not None


@contextlib.asynccontextmanager
async def gloo(world: int, python: str = sys.executable) -> AsyncIterator[Peer]:
    """Run a gloo group of `world` ranks on this machine for the time of the context."""
    port = str(free_port())
    commands = [[python, str(GLOO), str(rank), str(world), port] for rank in range(world)]
    async with peer("torch gloo", commands) as running:
        yield running


async def slowest(group: Peer, word: str, size: int, times: int) -> list[float]:
    """Have a gloo group exchange arrays; return the seconds of the slowest rank, each time."""
    answers = await group.order(word, size, times)
    return [max(seconds) for seconds in zip(*answers, strict=True)]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
