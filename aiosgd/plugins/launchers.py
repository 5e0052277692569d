"""Launchers: bring up nodes, say where they are, take them down again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aiosgd.errors import ClusterError

# a node imports numpy and listens; a loaded machine takes seconds for that
START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


@dataclass(frozen=True)
class Launched:
    """Nodes that run, as `host:port` each."""

    workers: tuple[str, ...]
    servers: tuple[str, ...]


class Launcher(ABC):
    """Brings up nodes for one job."""

    Params: ClassVar[type]

    @abstractmethod
    def __init__(self, params: Any) -> None:
        """Take the launcher's parameters."""

    @abstractmethod
    def launch(
        self, workers: int, servers: int, *, allow_code: bool = False
    ) -> AbstractAsyncContextManager[Launched]:
        """Run nodes for the time of the context, and stop all of them at its end."""


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
        self, workers: int, servers: int, *, allow_code: bool = False
    ) -> AsyncIterator[Launched]:
        """Start the processes; they also end by themselves if this process dies."""
        async with contextlib.AsyncExitStack() as stack:
            run_dir = Path(self._run_dir or stack.enter_context(_temporary_folder()))
            nodes = [
                await stack.enter_async_context(_process(run_dir / f"node-{i}", allow_code))
                for i in range(workers + servers)
            ]
            addresses = await asyncio.gather(*(_address(node) for node in nodes))
            yield Launched(tuple(addresses[:workers]), tuple(addresses[workers:]))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="aiosgd-") as folder:
        yield folder


@contextlib.asynccontextmanager
async def _process(run_dir: Path, allow_code: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "aiosgd", "node", "--port", "0", "--run-dir", str(run_dir)]
    if allow_code:
        command.append("--allow-code")
    process = await asyncio.create_subprocess_exec(
        *command,
        "--until-stdin-closes",  # so that no node outlives us, however we end
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C is for the submitter: it cancels the job
    )
    try:
        yield process
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT):
            line = (await process.stdout.readline()).decode()
    except TimeoutError:
        raise ClusterError(f"a local node did not listen within {START_TIMEOUT:g} s") from None
    match = re.search(r"listening on (\S+)", line)
    if match is None:
        assert process.stderr is not None
        reason = (await process.stderr.read()).decode().strip().splitlines()
        raise ClusterError(f"a local node did not start: {reason[-1] if reason else line!r}")
    return match[1]
