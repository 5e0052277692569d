"""Nodes that hang on processes of this machine: themselves, or what holds them elsewhere.

Each has a pipe as its standard input, and ends when that closes: at the end of the context, and
however this process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from aiosgd.errors import ClusterError
from aiosgd.plugins.launchers import base
from aiosgd.plugins.launchers.base import Printed

START_TIMEOUT = 30.0
"""Seconds until a node listens: it imports numpy, and a loaded machine takes its time for that."""

Process: TypeAlias = asyncio.subprocess.Process


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        words: the program and its arguments.
        secret: the first line of its standard input; empty: none.
        place: where it runs, for messages: ` on node2`.
    """

    words: Sequence[str]
    secret: str = field(default="", repr=False)
    place: str = ""


@contextlib.asynccontextmanager
async def node_processes(
    commands: Mapping[str, Command], printed: Printed, *, timeout: float | None = None
) -> AsyncIterator[tuple[list[str], asyncio.Future[str]]]:
    """Run nodes for the time of the context, by name.

    Args:
        commands: of each node; it says `listening on host:port` when it does.
        printed: told what they print after that, and when one ends by itself.
        timeout: seconds until all of them listen.

    Yields:
        Where they say that they listen, and what is done when all of them have ended.

    Raises:
        ClusterError: one of them ended or did not listen; the message has its last words.
    """
    async with children(commands) as processes:
        listening = await _addresses(commands, processes, timeout or START_TIMEOUT)
        async with _passed_on(processes, printed) as over:
            yield listening, over


@contextlib.asynccontextmanager
async def children(
    commands: Mapping[str, Command], stop_timeout: float | None = None
) -> AsyncIterator[dict[str, Process]]:
    """Run commands for the time of the context; at its end their standard input closes.

    Args:
        commands: by name.
        stop_timeout: seconds that they have to end then, before they are killed.

    Raises:
        ClusterError: a program cannot be started.
    """
    processes: dict[str, Process] = {}
    try:
        for name, command in commands.items():
            processes[name] = await _started(command)
        yield processes
    finally:
        _end(processes.values())
        seconds = stop_timeout or base.STOP_TIMEOUT
        await asyncio.gather(*(_stopped(process, seconds) for process in processes.values()))


async def _started(command: Command) -> Process:
    try:
        process = await asyncio.create_subprocess_exec(
            *command.words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the submitter: it cancels the job
        )
    except OSError as error:
        reason = error.strerror or error
        raise ClusterError(f"{command.words[0]} cannot be started: {reason}") from error
    if command.secret:
        assert process.stdin is not None
        process.stdin.write(command.secret.encode() + b"\n")
    return process


def _end(processes: Iterable[Process]) -> None:
    """Close the nodes' standard input, which ends them: no race with those that have ended."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()


async def _stopped(process: Process, seconds: float) -> None:
    """Wait until a process that was told to stop has ended; its pipes are read to their ends."""
    try:
        async with asyncio.timeout(seconds):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()


# Addresses --------------------------------------------------------------------------------------


async def _addresses(
    commands: Mapping[str, Command], processes: Mapping[str, Process], seconds: float
) -> list[str]:
    """Return where all nodes listen; as soon as one fails, the others are not waited for."""
    waits = [
        asyncio.ensure_future(_address(f"{name}{commands[name].place}", process, seconds))
        for name, process in processes.items()
    ]
    try:
        return await asyncio.gather(*waits)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)


async def _address(name: str, process: Process, seconds: float) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            line = (await process.stdout.readline()).decode(errors="replace")
            found = listening_in(line)
            reason = "" if found else await _last_words(process) or f"it printed {line!r}"
    except TimeoutError:
        raise ClusterError(f"{name} did not listen within {seconds:g} s") from None
    if found is None:
        raise ClusterError(f"{name} did not start: {reason}")
    return found


def listening_in(text: str) -> str | None:
    """Return the address in a node's line of what it listens on; None: there is no such line."""
    match = re.search(r"listening on (\S+)", text)
    return match[1] if match else None


async def _last_words(process: Process) -> str:
    assert process.stderr is not None
    lines = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("aiosgd: ").strip() if lines else ""


# What they print --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _passed_on(
    nodes: Mapping[str, Process], printed: Printed
) -> AsyncIterator[asyncio.Future[str]]:
    """Pass on what nodes print, to their last words; stop them at the end of the context.

    A pipe that nobody empties would stop them sooner or later.
    """
    streams = [(name, s) for name, node in nodes.items() for s in (node.stdout, node.stderr)]
    readers = [asyncio.ensure_future(_pass_on(name, s, printed)) for name, s in streams if s]
    ends = [asyncio.ensure_future(_tell_end(name, node, printed)) for name, node in nodes.items()]
    over = asyncio.ensure_future(_all_ended(ends))
    try:
        yield over
    finally:
        for task in (over, *ends):
            task.cancel()
        _end(nodes.values())
        await asyncio.wait(readers, timeout=base.STOP_TIMEOUT)
        for reader in readers:
            reader.cancel()
        await asyncio.wait([*readers, *ends, over])


async def _tell_end(name: str, process: Process, printed: Printed) -> None:
    code = await process.wait()
    how = f"of signal {-code}" if code < 0 else f"with exit code {code}"
    printed(name, f"ended {how}")


async def _all_ended(ends: Sequence[asyncio.Future[None]]) -> str:
    await asyncio.wait(ends)
    return "all nodes have ended"


async def _pass_on(name: str, stream: asyncio.StreamReader, printed: Printed) -> None:
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # a line longer than the reader's limit: it is dropped
            continue
        if not line:
            return
        printed(name, line.decode(errors="replace").rstrip())
