"""Nodes through a launcher, and the files that submitters find them with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from aiosgd.errors import ClusterError, ConfigError
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.launchers import Launched, Printed, Wanted, ignore
from aiosgd.plugins.registry import make_params
from aiosgd.runtime import survey
from aiosgd.runtime.config import load_cluster
from aiosgd.runtime.security import write_secret


@contextlib.asynccontextmanager
async def launch(
    launcher: str,
    *,
    workers: int = 2,
    servers: int = 0,
    params: Mapping[str, Any] | None = None,
    cluster_file: str | Path = "cluster.toml",
    allow_code: bool = False,
    printed: Printed = ignore,
) -> AsyncIterator[Launched]:
    """Have nodes up for the time of the context, with a cluster.toml and a new secret for them.

    Both files are gone after the context, as the nodes are, unless the launcher only prepares
    nodes: then `next_steps` says what to do, and the files stay.

    Args:
        launcher: its name: `local`, `ssh`, `slurm`, `ray`, ….
        workers, servers: how many nodes of each.
        params: the launcher's parameters.
        cluster_file: a file to write; the secret's lies beside it and ends in `.secret`.
        allow_code: whether the nodes run code that a job names: codecs in files, `model.factory`.
        printed: told what nodes print and what the engine says.

    Raises:
        ConfigError, PluginError: something is wrong or missing here; nothing was started.
        ClusterError: the nodes did not start, or this machine does not reach them.
    """
    path = Path(cluster_file)
    secret_file = _secret_beside(path)
    _check_sizes(workers, servers)
    plugin = LAUNCHERS.load(launcher)
    chosen = plugin(make_params(plugin, params or {}, "launcher"))
    _check_new(path, secret_file)
    with contextlib.ExitStack() as files:
        write_secret(secret_file)
        files.callback(secret_file.unlink, missing_ok=True)
        wanted = Wanted(
            workers=workers,
            servers=servers,
            allow_code=allow_code,
            secret_file=secret_file,
            supervised=True,
        )
        async with chosen.launch(wanted, printed) as nodes:
            _write_new(path, cluster_text(launcher, nodes, secret_file.name))
            files.callback(path.unlink, missing_ok=True)
            if nodes.next_steps:
                files.pop_all()
            else:
                await _check_reached(path)
            yield nodes


def _secret_beside(path: Path) -> Path:
    """Return where the secret of a cluster file lies."""
    if not path.name or path.suffix == ".secret":
        raise ConfigError(
            f"--cluster-file is '{path}', beside which no file ending in .secret can lie; expected "
            "a name such as cluster.toml"
        )
    return path.with_suffix(".secret")


def _check_sizes(workers: int, servers: int) -> None:
    for name, value, least in (("workers", workers, 1), ("servers", servers, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")


def _check_new(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} exists already; nothing is ever overwritten: name another with "
                "--cluster-file, or remove it if its nodes are gone"
            )


def cluster_text(launcher: str, nodes: Launched, secret_name: str) -> str:
    """Return the cluster.toml of nodes; JSON's strings and lists are TOML's, too."""
    servers = f"servers = {_list(nodes.servers)}\n" if nodes.servers else ""
    return (
        f"# written by `aiosgd launch {launcher}`\n"
        f"workers = {_list(nodes.workers)}\n{servers}"
        f"\n[security]\nsecret_file = {json.dumps(secret_name)}\n"
    )


def _list(texts: Iterable[str]) -> str:
    return "[\n" + "".join(f"    {json.dumps(text)},\n" for text in texts) + "]"


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


async def _check_reached(path: Path) -> None:
    """Raise ClusterError if a node that listens does not answer here."""
    for one in await _looked_at(path):
        if one.error:
            raise ClusterError(
                f"{one.place} listens on {one.address}, but this machine does not reach it there: "
                f"{one.error}; the launcher may have parameters that say where nodes listen and "
                "are reached: aiosgd plugins show launcher NAME"
            )


async def _looked_at(path: Path) -> list[survey.Seen]:
    try:
        return await survey.look(load_cluster(path))
    except ClusterError as error:
        raise ClusterError(
            f"the nodes listen, but this machine does not reach them: {error}"
        ) from error
