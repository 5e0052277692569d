"""The Python calls as coroutines: `await aiosgd.aio.run(...)`, `await aiosgd.aio.submit(...)`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiosgd.errors import ConfigError
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.registry import make_params
from aiosgd.runtime.config import Address, Cluster, JobConfig, load_cluster, make_job
from aiosgd.runtime.coordinator import Observer, Outcome, Request, load_job, run_job
from aiosgd.runtime.workload import is_file_codec, load_codecs


class Silent:
    """An observer that looks away."""

    def entered(self, *_: Any) -> None:
        """Do nothing."""

    progressed = evaluated = printed = entered


def default_data_dir() -> Path:
    """Return where data sets are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aiosgd"


async def submit(
    cluster: str | Path | Cluster,
    *,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Outcome:
    """Run a job on a cluster of nodes and collect its results.

    Args:
        cluster: path of a cluster.toml.
        sets: `key.path=value` each, as `--set` takes them.
        data_dir: this machine's folder for data.
        observer: told of the job's phases and progress.
        options: job options: `codec`, `epochs`, `learning_rate`, ….

    Raises:
        ConfigError, PluginError: the job is wrong; no node was spoken to.
        ClusterError: a node is unreachable or refused.
        JobFailedError: the job failed.
        asyncio.CancelledError: this call was cancelled; the nodes are free and their logs
            collected by then.
    """
    if not isinstance(cluster, Cluster):
        cluster = load_cluster(cluster)
    request = Request(
        job=make_job(options, sets, cluster),
        workers=cluster.workers,
        servers=cluster.servers,
        data_dir=Path(data_dir or default_data_dir()),
    )
    return await run_job(request, observer or Silent())


async def run(
    *,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Outcome:
    """Run a job on this machine: start local nodes, submit, collect, stop them.

    Args and errors: as `submit`. `workers` is 2 unless given; `servers` is 1 if the codec needs
    one.
    """
    if options.get("workers") is None:
        options["workers"] = 2
    job = make_job(options, sets)
    workers, servers = _sizes(job)
    data_dir = Path(data_dir or default_data_dir())
    loaded = await asyncio.to_thread(load_job, job, workers, data_dir)
    observer = observer or Silent()
    launcher = LAUNCHERS.load("local")
    launched = launcher(make_params(launcher, {}, "launcher")).launch(
        workers, servers, allow_code=_has_code(job), printed=observer.printed
    )
    async with launched as nodes:
        request = Request(
            job=job,
            workers=[Address.parse(text, "local worker") for text in nodes.workers],
            servers=[Address.parse(text, "local server") for text in nodes.servers],
            data_dir=data_dir,
        )
        return await run_job(request, observer, loaded)


def _sizes(job: JobConfig) -> tuple[int, int]:
    """Return how many local workers and servers a job needs."""
    workers = job.workers or 2
    if load_codecs(job).server_codec is None:
        if job.servers:
            raise ConfigError(f"servers is {job.servers}, but codec {job.codec!r} uses no server")
        return workers, 0
    if job.servers == 0:
        raise ConfigError(f"servers is 0, but codec {job.codec!r} needs one or more")
    return workers, 1 if job.servers is None else job.servers


def _has_code(job: JobConfig) -> bool:
    names: Mapping[str, str | None] = {"codec": job.codec, "server_codec": job.server_codec}
    return any(is_file_codec(name) for name in names.values() if name)
