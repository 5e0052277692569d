"""What a launcher is: the one file for authors of launchers.

A launcher brings nodes up for the time of a context. Where they run, with which resources, and what
becomes of a host that fails is the business of the engine that it asks: `ssh`, Slurm, Ray, ….
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from aiosgd.errors import ConfigError

Printed: TypeAlias = Callable[[str, str], None]
"""Told each line that a node prints, or that the engine has to say, with the name of who says it."""

STOP_TIMEOUT = 10.0
"""Seconds in which nodes that are told to stop have to; what is left of them is killed."""


def ignore(node: str, text: str) -> None:
    """Take what a node printed, and forget it."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The nodes to bring up.

    Attributes:
        workers, servers: how many of each.
        data_dir: where nodes on this machine keep data; None: where nodes usually do.
        allow_code: whether the nodes run code that a job names: codecs in files, `model.factory`.
        secret_file: the secret that nodes and submitters share; None: the launcher makes one up.
        supervised: whether a node process that dies is started again, on the same port.
    """

    workers: int
    servers: int = 0
    data_dir: Path | None = None
    allow_code: bool = False
    secret_file: Path | None = None
    supervised: bool = False

    @property
    def names(self) -> list[str]:
        """The nodes' names, workers first: `worker 0`, …, `server -1`, …."""
        servers = [f"server {-1 - i}" for i in range(self.servers)]
        return [*(f"worker {i}" for i in range(self.workers)), *servers]

    @contextlib.contextmanager
    def secret(self) -> Iterator[Path]:
        """Give the file of the secret, made for the time of the context unless there is one."""
        if self.secret_file is not None:
            yield self.secret_file
            return
        with new_secret() as path:
            yield path


@dataclass(frozen=True)
class Launched:
    """Nodes, as `host:port` each, in the order of their ids.

    Attributes:
        workers, servers: where they listen, as the submitter and all other nodes reach them.
        secret_file: the secret that they share.
        over: done once none of the nodes is there any more, with the reason; None: nobody knows.
        next_steps: of nodes that are not up yet: what the user has to do first, a line each.
    """

    workers: tuple[str, ...]
    servers: tuple[str, ...]
    secret_file: Path | None = None
    over: asyncio.Future[str] | None = None
    next_steps: tuple[str, ...] = ()

    @classmethod
    def split(cls, wanted: Wanted, addresses: Sequence[str], **more: Any) -> Launched:
        """Return what was wanted, its addresses in the order of `wanted.names`."""
        return cls(tuple(addresses[: wanted.workers]), tuple(addresses[wanted.workers :]), **more)


class Launcher(ABC):
    """Brings up nodes for one job, or for as many as are submitted while they are up.

    A subclass has a frozen dataclass `Params`, as all plugins, and an entry point of the group
    `aiosgd.launchers`. It hands the secret over in a way that others cannot see: through standard
    input (`aiosgd node --secret-stdin`) or a file of mode 0600 (`--secret-file`), never in a
    command line or an environment. Its nodes end with the context, and also if this process dies.
    """

    Params: ClassVar[type]

    @abstractmethod
    def __init__(self, params: Any) -> None:
        """Take the launcher's parameters."""

    @abstractmethod
    def launch(
        self, wanted: Wanted, printed: Printed = ignore
    ) -> AbstractAsyncContextManager[Launched]:
        """Run nodes for the time of the context, and stop all of them at its end.

        Raises:
            ConfigError: the parameters cannot be right.
            PluginError: what the launcher needs is not installed here.
            ClusterError: a node does not start; the message has its or the engine's last words.
        """


@contextlib.contextmanager
def new_secret() -> Iterator[Path]:
    """Give a file with a new secret, so that other users of the machine cannot take part."""
    with tempfile.TemporaryDirectory(prefix="aiosgd-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "secret"
        path.touch(0o600)
        path.write_text(secrets.token_hex(32))
        yield path


def node_words(
    python: Sequence[str], wanted: Wanted, *, host: str = "127.0.0.1", data_dir: str = ""
) -> list[str]:
    """Return the command of a node on a port that the system picks, but for its own options.

    Args:
        python: the command of the Python that has aiosgd, on the node's machine.
        host: the address to listen on.
        data_dir: where it keeps data, on its machine; empty: where nodes usually do.
    """
    return [
        *python,
        "-P",  # the current folder may hold files that are called like somebody's modules
        *("-m", "aiosgd", "node", "--host", host, "--port", "0"),
        *(["--data-dir", data_dir] if data_dir else []),
        *(["--allow-code"] if wanted.allow_code else []),
    ]


def folder_name(node: str) -> str:
    """Return a node's name as a folder's: `worker-0`, `server-1`."""
    return node.replace(" -", " ").replace(" ", "-")


def check_seconds(name: str, value: float) -> None:
    """Refuse a time that is none, with ValueError, as `Params` do."""
    if not value > 0:
        raise ValueError(f"{name} is {value!r}; expected seconds, more than 0")


def check_words(name: str, command: str) -> None:
    """Refuse a command that is not in shell words, with ValueError, as `Params` do."""
    try:
        shlex.split(command)
    except ValueError as error:
        reason = str(error).lower()
        raise ValueError(
            f"{name} is {command!r}, which has {reason}; expected a command in shell words"
        ) from error


def read_secret_line(path: Path) -> str:
    """Return a secret file's text, for a node that reads it as the first line of its input.

    Raises:
        ConfigError: it cannot be read, or is more than one line.
    """
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"secret file {path} cannot be read: {error}") from error
    if len(text.splitlines()) != 1:
        raise ConfigError(f"secret file {path} has several lines or none; expected one")
    return text
