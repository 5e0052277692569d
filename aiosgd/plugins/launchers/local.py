"""The launcher of nodes on this machine."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from aiosgd.plugins.launchers.base import (
    Launched,
    Launcher,
    Printed,
    Wanted,
    folder_name,
    ignore,
    node_words,
)
from aiosgd.plugins.launchers.processes import Command, node_processes


class Local(Launcher):
    """Nodes as processes on this machine, on ports that the system picks."""

    @dataclass(frozen=True)
    class Params:
        """Where the nodes keep their own copies; empty: a temporary folder."""

        run_dir: str = ""

    def __init__(self, params: Params) -> None:
        self._run_dir = params.run_dir

    @contextlib.asynccontextmanager
    async def launch(self, wanted: Wanted, printed: Printed = ignore) -> AsyncIterator[Launched]:
        """Start the processes; they also end by themselves if this process dies."""
        with self._folder() as run_dir, wanted.secret() as secret_file:
            commands = {
                name: Command(_words(run_dir / folder_name(name), wanted, secret_file))
                for name in wanted.names
            }
            async with node_processes(commands, printed) as (addresses, over):
                yield Launched.split(wanted, addresses, secret_file=secret_file, over=over)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        if self._run_dir:
            yield Path(self._run_dir)
            return
        with tempfile.TemporaryDirectory(prefix="aiosgd-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def _words(run_dir: Path, wanted: Wanted, secret_file: Path) -> list[str]:
    return [
        *node_words([sys.executable], wanted, data_dir=str(wanted.data_dir or "")),
        *("--run-dir", str(run_dir), "--secret-file", str(secret_file)),
        "--until-stdin-closes",  # so that no node outlives us, however we end
        *(["--supervisor"] if wanted.supervised else []),
    ]
