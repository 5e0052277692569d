"""The Python calls as coroutines: `await aiosgd.aio.run(...)`, `.submit(...)`, `.simulate(...)`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiosgd.codecs.base import Codec
from aiosgd.errors import ConfigError, JobFailedError
from aiosgd.plugins.code import is_file
from aiosgd.plugins.kinds import CODECS, LAUNCHERS
from aiosgd.plugins.launchers import Wanted
from aiosgd.plugins.registry import check_value, make_params
from aiosgd.runtime import survey
from aiosgd.runtime.config import (
    KINDS,
    Address,
    Cluster,
    JobConfig,
    from_dict,
    load_cluster,
    make_job,
    to_dict,
)
from aiosgd.runtime.coordinator import (
    Observer,
    Request,
    Silent,
    choose_nodes,
    code_files,
    load_job,
    run_job,
    start_job,
)
from aiosgd.runtime.harvest import Outcome
from aiosgd.runtime.job import node_name, server_ids
from aiosgd.runtime.results import find_run
from aiosgd.runtime.security import SecurityFiles
from aiosgd.runtime.simulation.faults import parse_faults, parse_stragglers
from aiosgd.runtime.simulation.network import NetworkModel
from aiosgd.runtime.simulation.networks import load_network
from aiosgd.runtime.simulation.simulate import Simulated, Simulation
from aiosgd.runtime.simulation.simulate import simulate as simulate_job
from aiosgd.runtime.simulation.world import Scenario
from aiosgd.runtime.survey import Fate, Seen
from aiosgd.runtime.toml_source import TomlSource
from aiosgd.runtime.workload import load_codecs, named_code, portable, with_code

ATTEMPTS = 3
"""How often a job goes on from one and the same checkpoint."""
RETURN_TIMEOUT = 30.0
"""Seconds that a job waits for a lost node to come back."""
SIMULATED_WORKERS = 100
SIMULATED_SAMPLES = 1000
"""Of a simulated job unless it says otherwise: workers, and samples of all of them per step."""


def default_data_dir() -> Path:
    """Return where data sets are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aiosgd"


async def submit(
    cluster: str | Path | Cluster,
    *,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    job_file: str | Path | None = None,
    **options: Any,
) -> Outcome:
    """Run a job on a cluster of nodes and collect its results.

    Args:
        cluster: path of a cluster.toml.
        sets: `key.path=value` each, as `--set` takes them.
        data_dir: this machine's folder for data.
        observer: told of the job's phases and progress.
        job_file: path of the job.toml that an earlier run left: its options take the place of
            the cluster's and of the defaults. A FILE.py:CLASS codec whose file is gone is taken
            from the run's own `code/`.
        options: job options: `codec`, `epochs`, `learning_rate`, …. A codec may also be a class
            that is defined at the top of a file; a script that starts jobs guards its calls with
            `if __name__ == "__main__"`, for the nodes import it.

    Raises:
        ConfigError, PluginError: the job is wrong; no node was spoken to.
        ClusterError: a node is unreachable or refused.
        JobFailedError: the job failed.
        asyncio.CancelledError: this call was cancelled; the nodes are free and their logs
            collected by then.
    """
    request = await _request(cluster, options, sets, data_dir, job_file)
    return await _persistently(request, observer or Silent())


async def _persistently(request: Request, observer: Observer) -> Outcome:
    """Run a job; where it says so, go on from its last checkpoint when a node was lost.

    Raises:
        As `run_job`, of the last attempt: a node did not come back, or nothing was gained any more.
    """
    step, attempts = -1, 0
    while True:
        try:
            return await run_job(request, observer)
        except JobFailedError as error:
            if request.job.on_loss == "stop" or error.last_checkpoint is None:
                raise
            job_id, reached = error.last_checkpoint
            attempts, step = (0, reached) if reached > step else (attempts + 1, step)
            if attempts == ATTEMPTS:
                raise
            observer.noted(f"{error}; going on from there")
        request = dataclasses.replace(
            request,
            job=dataclasses.replace(request.job, resume=job_id),
            places=choose_nodes(request),
            connect_timeout=RETURN_TIMEOUT,
        )


async def start(
    cluster: str | Path | Cluster,
    *,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    job_file: str | Path | None = None,
    **options: Any,
) -> Path:
    """Have a cluster begin with a job, and leave it to its nodes.

    Args and errors: as `submit`, up to the job's first step.

    Returns:
        The job's run folder, named after its id. Its results stay on the nodes: `aiosgd fetch`.
    """
    request = await _request(cluster, options, sets, data_dir, job_file)
    return await start_job(request, observer or Silent())


async def _request(
    cluster: str | Path | Cluster,
    options: Mapping[str, Any],
    sets: tuple[str, ...],
    data_dir: str | Path | None,
    job_file: str | Path | None,
) -> Request:
    """Return what to run where, checked."""
    cluster = _cluster(cluster)
    options, job_file = _resumed(options, job_file)
    security = await asyncio.to_thread(cluster.security.load)
    job = _make_job(options, sets, job_file, cluster)
    return Request(
        job=job,
        workers=cluster.workers,
        servers=cluster.servers,
        data_dir=Path(data_dir or default_data_dir()),
        security=security,
        places=_places(job_file, cluster) if job.resume and job_file else None,
    )


async def status(cluster: str | Path | Cluster, *, why: bool = False) -> list[Seen]:
    """Ask all nodes of a cluster what they do, and what they did.

    Args:
        cluster: path of a cluster.toml.
        why: whether to look into the codecs, for what they wait for.

    Returns:
        One per node, in the cluster's order; `error` says why one did not answer.

    Raises:
        ClusterError: none of them answers.
    """
    return await survey.look(_cluster(cluster), why=why)


async def fetch(
    cluster: str | Path | Cluster,
    job: str | None = None,
    output: str | Path = "runs",
    *,
    partial: bool = False,
    note: Callable[[str], None] | None = None,
) -> Outcome:
    """Collect what a job that has ended left on its nodes into `<output>/<job id>/`.

    Args:
        cluster: path of a cluster.toml.
        job: its id; None: the newest job.
        output: where run folders are. A folder that a submitter left without results is completed.
        partial: whether to do without the model if the node that has it is gone.
        note: told which nodes did not answer.

    Raises:
        ConfigError: no node knows the job, or there are results of it in `output` already.
        ClusterError: no node answers, the job still runs, or its model is missing.
    """
    return await survey.fetch(
        _cluster(cluster), job, Path(output), partial=partial, note=note or (lambda _: None)
    )


async def cancel(cluster: str | Path | Cluster, job: str | None = None) -> Fate:
    """Have a job end, whoever submitted it, and wait until its nodes are free.

    Args:
        cluster: path of a cluster.toml.
        job: its id; None: the job that runs.

    Raises:
        ConfigError: it does not run.
        ClusterError: no node answers, or one of them does not leave the job.
    """
    return await survey.cancel(_cluster(cluster), job)


def _cluster(cluster: str | Path | Cluster) -> Cluster:
    return cluster if isinstance(cluster, Cluster) else load_cluster(cluster)


async def run(
    *,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    job_file: str | Path | None = None,
    **options: Any,
) -> Outcome:
    """Run a job on this machine: start local nodes, submit, collect, stop them.

    Args and errors: as `submit`. `workers` is 2 unless given; `servers` is 1 if the codec needs
    one.
    """
    options, job_file = _resumed(options, job_file)
    job = _make_job(options, sets, job_file, workers=2)
    workers, servers = _sizes(job)
    data_dir = Path(data_dir or default_data_dir())
    loaded = await asyncio.to_thread(load_job, job, workers, data_dir)
    observer = observer or Silent()
    launcher = LAUNCHERS.load("local")
    wanted = Wanted(
        workers=workers, servers=servers, data_dir=data_dir, allow_code=bool(named_code(job))
    )
    with _run_dir(job) as run_dir:
        launched = launcher(make_params(launcher, {"run_dir": str(run_dir)}, "launcher")).launch(
            wanted, observer.printed
        )
        async with launched as nodes:
            request = Request(
                job=job,
                workers=[Address.parse(text, "local worker") for text in nodes.workers],
                servers=[Address.parse(text, "local server") for text in nodes.servers],
                data_dir=data_dir,
                security=SecurityFiles(secret_file=nodes.secret_file).load(),
            )
            try:
                return await run_job(request, observer, loaded)
            except JobFailedError:
                _keep_logs(run_dir, Path(job.output))
                raise


@contextlib.contextmanager
def _run_dir(job: JobConfig) -> Iterator[Path]:
    """Give the folder in which nodes on this machine keep their jobs: for as long as they live."""
    if job.checkpoint_every or job.resume:
        yield Path(job.output, ".nodes")
        return
    with tempfile.TemporaryDirectory(prefix="aiosgd-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _keep_logs(run_dir: Path, output: Path) -> None:
    """Keep the logs of nodes that could not send theirs: they hang, or are gone."""
    for log in run_dir.glob("*/*/nodes/*/node.log"):
        kept = output / log.relative_to(log.parents[3])
        if (output / log.parents[2].name).is_dir() and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, kept)


async def simulate(
    *,
    network: str | Path | NetworkModel = "lan",
    stragglers: str = "",
    faults: str = "",
    keep_trace: bool = False,
    sets: tuple[str, ...] = (),
    data_dir: str | Path | None = None,
    observer: Observer | None = None,
    job_file: str | Path | None = None,
    **options: Any,
) -> Simulated:
    """Run a job on virtual nodes in virtual time, in a thread of this process.

    The same options give the same results, bit for bit, on one class of machine; in sync mode
    they are those of a real run. `workers` is 100 unless given; `servers` is 1 if the codec needs
    one; `batch_size` is so small that all workers together have 1,000 samples per step.

    Args:
        network: `lan`, `wan`, `mobile`, a file that describes one, or a model.
        stragglers: which workers are slow: `10%:5` for a tenth of them, five times; `3:2`.
        faults: what goes wrong: `crash:2@3.5; cut:0,1|2,3@1-4`.
        keep_trace: whether the outcome has every event.
        sets: as `submit`.
        data_dir: as `submit`.
        observer: as `submit`.
        job_file: as `submit`.
        options: as `submit`.

    Raises:
        ConfigError, PluginError: the job is wrong.
        JobFailedError: the job failed.
    """
    job = _make_job(options, sets, job_file, **_simulated_sizes(options))
    if job.record:
        raise ConfigError("record is for real runs; a simulation is the same every time")
    workers, servers = _sizes(job)
    loaded, _ = await asyncio.to_thread(
        load_job, job, workers, Path(data_dir or default_data_dir())
    )
    nodes = [*range(workers), *server_ids(servers)]
    scenario = Scenario(
        network=network if isinstance(network, NetworkModel) else load_network(network),
        slow=parse_stragglers(stragglers, workers, job.seed),
        faults=parse_faults(faults, nodes),
        seed=job.seed,
    )
    simulation = Simulation(
        load=loaded, workers=workers, servers=servers, scenario=scenario, keep_trace=keep_trace
    )
    return await _in_thread(simulation, observer or Silent())


def _simulated_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default numbers of workers and of samples per block."""
    workers = options.get("workers")
    count = workers if type(workers) is int and workers > 0 else SIMULATED_WORKERS
    share = min(JobConfig.batch_size, max(1, SIMULATED_SAMPLES // count))
    return {"workers": SIMULATED_WORKERS, "batch_size": share}


async def _in_thread(simulation: Simulation, observer: Observer) -> Simulated:
    """Simulate in a thread; cancelling this cancels the job, which still leaves its results."""
    cancels: list[Callable[[], object]] = []
    work = asyncio.ensure_future(
        asyncio.to_thread(simulate_job, simulation, observer, cancels.append)
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        for cancel in cancels:
            cancel()
        await asyncio.wait([work])
        raise


# Options ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a job needs of nodes: how many of each at least, and whether they must take code."""

    workers: int
    servers: int
    code: bool


def needs(
    *, sets: tuple[str, ...] = (), job_file: str | Path | None = None, **options: Any
) -> Needs:
    """Return what a job needs, before there is a node; options and errors are those of `submit`."""
    options, job_file = _resumed(options, job_file)
    job = _make_job(options, sets, job_file)
    workers, servers = _sizes(job)
    return Needs(workers, servers, bool(named_code(job)))


def _make_job(
    options: Mapping[str, Any],
    sets: Sequence[str],
    job_file: str | Path | None,
    cluster: Cluster | None = None,
    **defaults: Any,
) -> JobConfig:
    """Combine what the caller gave with an earlier run's options or, without one, the cluster's."""
    given = {name: value for name, value in options.items() if value is not None}
    for kind in ("codec", "server_codec"):
        if isinstance(given.get(kind), type):
            given[kind] = _codec_name(given[kind], kind)
    if job_file is None:
        return portable(make_job({**defaults, **given}, sets, cluster))
    path = Path(job_file)
    earlier = _read_job(path)
    wanted = _merge(_still_wanted(earlier, given, sets), given)
    cluster = cluster and dataclasses.replace(cluster, job=())
    job = make_job({**defaults, **wanted}, sets, cluster)
    return portable(_with_kept_code(job, code_files(earlier), path.parent / "code"))


def _resumed(
    options: Mapping[str, Any], job_file: str | Path | None
) -> tuple[dict[str, Any], str | Path | None]:
    """Return the options with the id of the job to resume, and where its own options are.

    Raises:
        ConfigError: there is no such run, or two that give options.
    """
    name = str(options.get("resume") or "")
    if not name:
        return dict(options), job_file
    if job_file is not None:
        raise ConfigError("--resume and --job both give an earlier run's options; expected one")
    folder = find_run(name, options.get("output") or JobConfig.output)
    if not (folder / "job.toml").is_file():
        raise ConfigError(
            f"--resume {name}: there is no {folder / 'job.toml'}; expected a job id, with --output "
            "if its folder is not in runs, or the run's folder"
        )
    return {**options, "resume": folder.resolve().name}, folder / "job.toml"


def _places(job_file: str | Path, cluster: Cluster) -> dict[int, Address]:
    """Return which nodes an earlier run was on: there its checkpoints are.

    Raises:
        ConfigError: the cluster has them no more.
    """
    run = TomlSource(Path(job_file)).table("run")
    nodes = check_value(run.get("nodes"), dict[str, str], f"{job_file}: [run] nodes")
    places = {
        int(node): Address.parse(text, f"{job_file}: node {node}") for node, text in nodes.items()
    }
    for node, address in places.items():
        if address not in (cluster.servers if node < 0 else cluster.workers):
            raise ConfigError(
                f"{node_name(node)} was on {address}, where its checkpoints are, but {cluster} "
                "does not have it"
            )
    return places


def _read_job(path: Path) -> JobConfig:
    source = TomlSource(path)
    if "job" not in source.data:
        raise ConfigError(f"{path} has no [job]; expected the job.toml that a run left")
    return from_dict(source.table("job"), f"{path}: job")


def _still_wanted(
    earlier: JobConfig, given: Mapping[str, Any], sets: Sequence[str]
) -> dict[str, Any]:
    """Return an earlier run's options without those of a plugin that is replaced."""
    written = {text.partition("=")[0].strip().removeprefix("job.") for text in sets}
    new, dropped = make_job(given, sets), set[str]()
    for kind in (*KINDS, "tracker"):
        if kind in written | set(given) and getattr(new, kind) != getattr(earlier, kind):
            dropped.add(f"{kind}_params")
            if kind == "codec":
                dropped |= {"server_codec", "server_codec_params", "servers"}
    return {name: value for name, value in to_dict(earlier).items() if name not in dropped}


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, tables key by key; the new values win."""
    merged = {**old, **new}
    for name in old.keys() & new.keys():
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            merged[name] = _merge(old[name], new[name])
    return merged


def _with_kept_code(job: JobConfig, copies: Mapping[str, str], folder: Path) -> JobConfig:
    """Return the job with the run's copies in the place of source files that are gone."""
    kept: dict[str, str] = {}
    for code, copy in copies.items():
        path, _, name = code.rpartition(":")
        if not Path(path).is_file() and (folder / copy).is_file():
            kept[code] = f"{folder / copy}:{name}"
    return with_code(job, kept)


def _codec_name(codec: type, option: str) -> str:
    """Return what the job calls a codec that is given as a class.

    Raises:
        ConfigError: it is no codec, or no file has it: the nodes could not import it.
    """
    if not issubclass(codec, Codec):
        raise ConfigError(f"{option} is {codec!r}; expected a name or a subclass of Codec")
    for entry in CODECS.entries():
        if entry.target == f"{codec.__module__}:{codec.__qualname__}":
            return entry.name
    name = f"{_source_file(codec)}:{codec.__qualname__}"
    if not is_file(name) or "." in codec.__qualname__:
        raise ConfigError(
            f"{option} {codec.__qualname__} is not defined at the top of a file, where nodes "
            "could find it; put the class into a file or a package"
        )
    return name


def _source_file(codec: type) -> str:
    """Return the file that defines a class; empty where there is none, as in a notebook."""
    try:
        file = inspect.getsourcefile(codec) or ""
    except (TypeError, OSError):
        return ""
    return file if Path(file).is_file() else ""


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
