"""Launchers: bring up nodes, say where they are, take them down again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from aiosgd.errors import ClusterError

# a node imports numpy and listens; a loaded machine takes seconds for that
START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0

Printed: TypeAlias = Callable[[str, str], None]
Process: TypeAlias = asyncio.subprocess.Process


def ignore(node: str, text: str) -> None:
    """Take what a node printed, and forget it."""


@dataclass(frozen=True)
class Launched:
    """Nodes that run, as `host:port` each, and the file of the secret that they share."""

    workers: tuple[str, ...]
    servers: tuple[str, ...]
    secret_file: Path | None = None


class Launcher(ABC):
    """Brings up nodes for one job."""

    Params: ClassVar[type]

    @abstractmethod
    def __init__(self, params: Any) -> None:
        """Take the launcher's parameters."""

    @abstractmethod
    def launch(
        self,
        workers: int,
        servers: int,
        *,
        data_dir: Path | None = None,
        allow_code: bool = False,
        printed: Printed = ignore,
    ) -> AbstractAsyncContextManager[Launched]:
        """Run nodes for the time of the context, and stop all of them at its end.

        Args:
            workers, servers: how many of each.
            data_dir: where the nodes keep data; None: where nodes usually do.
            allow_code: whether the nodes take codecs as source code.
            printed: told each line that a node prints, with the node's name.

        Raises:
            ClusterError: a node does not start; the message has its last words.
        """


class Local(Launcher):
    """Nodes as processes on this machine, on ports that the system picks."""

    @dataclass(frozen=True)
    class Params:
        """Where the nodes keep their own copies; empty: a temporary folder."""

        run_dir: str = ""

    def __init__(self, params: Params) -> None:
        self._run_dir = params.run_dir

    @contextlib.asynccontextmanager
    async def launch(
        self,
        workers: int,
        servers: int,
        *,
        data_dir: Path | None = None,
        allow_code: bool = False,
        printed: Printed = ignore,
    ) -> AsyncIterator[Launched]:
        """Start the processes; they also end by themselves if this process dies."""
        names = [f"worker {i}" for i in range(workers)] + [
            f"server {-1 - i}" for i in range(servers)
        ]
        with self._folder() as run_dir, _new_secret() as secret_file:
            commands = [
                _command(run_dir / _folder_name(name), data_dir, allow_code, secret_file)
                for name in names
            ]
            async with _processes(commands) as processes:
                addresses = await _addresses(processes)
                async with _passed_on(dict(zip(names, processes, strict=True)), printed):
                    yield Launched(
                        tuple(addresses[:workers]), tuple(addresses[workers:]), secret_file
                    )

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        if self._run_dir:
            yield Path(self._run_dir)
            return
        with tempfile.TemporaryDirectory(prefix="aiosgd-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def _folder_name(node: str) -> str:
    return node.replace(" -", " ").replace(" ", "-")


@contextlib.contextmanager
def _new_secret() -> Iterator[Path]:
    """Give a file with a new secret, so that other users of the machine cannot take part."""
    with tempfile.TemporaryDirectory(prefix="aiosgd-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "secret"
        path.touch(0o600)
        path.write_text(secrets.token_hex(32))
        yield path


def _command(
    run_dir: Path, data_dir: Path | None, allow_code: bool, secret_file: Path
) -> list[str]:
    command = [
        sys.executable,
        "-P",  # the current folder may hold files that are called like somebody's modules
        *("-m", "aiosgd", "node", "--port", "0", "--run-dir", str(run_dir)),
        *("--secret-file", str(secret_file)),
        "--until-stdin-closes",  # so that no node outlives us, however we end
    ]
    command += ["--data-dir", str(data_dir)] if data_dir else []
    return [*command, "--allow-code"] if allow_code else command


@contextlib.asynccontextmanager
async def _processes(commands: Sequence[Sequence[str]]) -> AsyncIterator[list[Process]]:
    """Run commands for the time of the context."""
    processes: list[Process] = []
    try:
        for command in commands:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for the submitter: it cancels the job
            )
            processes.append(process)
        yield processes
    finally:
        _end(processes)
        await asyncio.gather(*map(_stopped, processes))


def _end(processes: Iterable[Process]) -> None:
    """Close the nodes' standard input, which ends them: no race with those that have ended."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()


async def _stopped(process: Process) -> None:
    """Wait until a process that was told to stop has ended; its pipes are read to their ends."""
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()


async def _addresses(processes: Sequence[Process]) -> list[str]:
    """Return where all nodes listen; as soon as one fails, the others are not waited for."""
    waits = [asyncio.ensure_future(_address(process)) for process in processes]
    try:
        return await asyncio.gather(*waits)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)


async def _address(process: Process) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT):
            line = (await process.stdout.readline()).decode(errors="replace")
    except TimeoutError:
        raise ClusterError(f"a local node did not listen within {START_TIMEOUT:g} s") from None
    match = re.search(r"listening on (\S+)", line)
    if match is None:
        assert process.stderr is not None
        errors = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
        reason = errors[-1] if errors else f"it printed {line!r}"
        raise ClusterError(f"a local node did not start: {reason}")
    return match[1]


@contextlib.asynccontextmanager
async def _passed_on(nodes: Mapping[str, Process], printed: Printed) -> AsyncIterator[None]:
    """Pass on what nodes print, to their last words; stop them at the end of the context.

    A pipe that nobody empties would stop them sooner or later.
    """
    streams = [(name, s) for name, node in nodes.items() for s in (node.stdout, node.stderr)]
    readers = [asyncio.ensure_future(_pass_on(name, s, printed)) for name, s in streams if s]
    try:
        yield
    finally:
        _end(nodes.values())
        await asyncio.wait(readers, timeout=STOP_TIMEOUT)
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)


async def _pass_on(name: str, stream: asyncio.StreamReader, printed: Printed) -> None:
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # a line longer than the reader's limit: it is dropped
            continue
        if not line:
            return
        printed(name, line.decode(errors="replace").rstrip())
