"""A simulated job from its options to its run folder, which is like that of a real run."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import threadpoolctl

from aiosgd.errors import JobCancelledError, JobFailedError
from aiosgd.plugins.models import Model
from aiosgd.runtime import results
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.coordinator import Observer
from aiosgd.runtime.harvest import End, Harvest, Outcome
from aiosgd.runtime.job import Phase, node_name, server_ids
from aiosgd.runtime.session import Evaluation, News, Progress
from aiosgd.runtime.simulation.guard import guard, modules_of, unguarded
from aiosgd.runtime.simulation.loop import run_virtually
from aiosgd.runtime.simulation.trace import Trace
from aiosgd.runtime.simulation.world import Ending, Scenario, World
from aiosgd.runtime.tracking import PARTING, PATIENCE, Tracking
from aiosgd.runtime.workload import Workload

Cancel: TypeAlias = Callable[[], object]

VIRTUAL = "virtual"
"""The address of a simulated node."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate.

    Attributes:
        load: the job's plugins.
        workers, servers: how many.
        scenario: what it is simulated on.
        seconds: virtual time that it may take; None is any.
        keep_trace: whether the outcome has every event.
    """

    load: Workload
    workers: int
    servers: int = 0
    scenario: Scenario = dataclasses.field(default_factory=Scenario)
    seconds: float | None = None
    keep_trace: bool = False


@dataclass(kw_only=True)
class Simulated(Outcome):
    """A job that was simulated.

    Attributes:
        trace: what happened.
    """

    trace: Trace


@dataclass
class Played:
    """A simulation in memory, before anything is written.

    Attributes:
        world: its nodes, as they ended.
        ending: how the job ended.
        trace: what happened.
        real_s: how long it really took.
    """

    world: World
    ending: Ending
    trace: Trace
    real_s: float


def play(
    simulation: Simulation,
    report: Callable[[News], None] = lambda _: None,
    begun: Callable[[Cancel], None] = lambda _: None,
) -> Played:
    """Simulate a job in memory; must be called where no event loop runs.

    Args:
        simulation: what to simulate.
        report: told how far the workers are.
        begun: told how to cancel it, from any thread.

    Raises:
        DeadlockError, LimitError: nothing can happen any more, or not within `seconds`.
    """
    trace = Trace(keep=simulation.keep_trace)
    started = time.perf_counter()

    async def main() -> tuple[World, Ending]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        unguarded(begun)(lambda: loop.call_soon_threadsafe(task.cancel))
        workers = tuple(range(simulation.workers))
        servers = server_ids(simulation.servers)
        scenario, observer = simulation.scenario, unguarded(report)
        world = World(simulation.load, workers, servers, scenario, trace, observer)
        return world, await world.run()

    load = simulation.load
    plugins = load.codec, load.server_codec, load.optimizer, type(load.model)
    with _undisturbed(load.model), guard(modules_of(*plugins)):
        world, ending = run_virtually(main(), seconds=simulation.seconds)
    return Played(world, ending, trace, time.perf_counter() - started)


@contextmanager
def _undisturbed(model: Model) -> Iterator[None]:
    """Compute in one thread, for more of them change sums; collect no garbage meanwhile."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    threads = model.limit_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            yield
    finally:
        model.limit_threads(threads)
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def simulate(
    simulation: Simulation, observer: Observer, begun: Callable[[Cancel], None] = lambda _: None
) -> Simulated:
    """Simulate a job and write its run folder; must be called where no event loop runs.

    Args:
        simulation: what to simulate.
        observer: told how the job goes, from this thread.
        begun: as `play`.

    Raises:
        ConfigError: the folder cannot be made.
        JobFailedError: the job failed.
        JobCancelledError: it was cancelled.
    """

    def report(news: News) -> None:
        if isinstance(news, Progress):
            observer.progressed(news)
            tracking.progressed(news)
        elif isinstance(news, Evaluation):
            observer.evaluated(news)
            tracking.evaluated(news)

    job = simulation.load.job
    job_id, folder = results.new_folder(job, results.draw_job_id(job))
    log, handler = results.open_log(folder / "submit.log")
    tracking = Tracking(job, folder, log, observer.noted)
    try:
        _write_job(folder, simulation, job_id)
        log.info("simulated on %s", simulation.scenario.network)
        nodes = (*range(simulation.workers), *server_ids(simulation.servers))
        observer.noted(f"job {job_id}: {simulation.load.banner(nodes)}")
        if text := simulation.load.mixing:
            log.info(text)
            observer.noted(text)
        observer.attended(range(simulation.workers), simulation.workers)
        observer.entered(Phase.RUNNING, job_id)
        tracking.begin(job_id, dict.fromkeys(nodes, VIRTUAL), simulated=True)
        played = play(simulation, report, begun)
        outcome = _write(played, simulation, folder, job_id, log)
        begun(tracking.hurry)
        tracking.end(outcome, PARTING if outcome.summary.state == "cancelled" else PATIENCE)
        observer.entered(Phase(outcome.summary.state), job_id)
        return _judged(outcome, played, folder)
    finally:
        tracking.abandon()
        handler.close()


def _judged(outcome: Simulated, played: Played, folder: Path) -> Simulated:
    summary, where = outcome.summary, f"logs in {folder}"
    if summary.state == "cancelled":
        raise JobCancelledError(f"job {summary.job_id} was cancelled; {where}")
    if summary.state == "failed":
        reason = f"job {summary.job_id} failed: {summary.error}; {where}"
        raise JobFailedError(reason) from played.ending.cause
    return outcome


def _write_job(folder: Path, simulation: Simulation, job_id: str) -> None:
    job: JobConfig = dataclasses.replace(
        simulation.load.job, workers=simulation.workers, servers=simulation.servers or None
    )
    load = simulation.load
    extra = {"job_id": job_id, "simulated": facts(simulation), "steps": load.steps}
    extra["spectral_gap"] = load.topology and load.topology.spectral_gap
    results.write_job(folder, job, extra)


def facts(simulation: Simulation) -> dict[str, Any]:
    """Return what a simulation was made with: the same facts, the same run."""
    scenario = simulation.scenario
    return {
        "network": _plain(dataclasses.asdict(scenario.network)),
        "slow": {str(node): factor for node, factor in sorted(scenario.slow.items())},
        "faults": [str(fault) for fault in scenario.faults],
        "seed": scenario.seed,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _plain(value: Any) -> Any:
    """Return a value as TOML has it: without None, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(inner) for inner in value]
    return value


def _write(
    played: Played, simulation: Simulation, folder: Path, job_id: str, log: Any
) -> Simulated:
    world, error = played.world, played.ending.error
    whole = played.ending.state == "done"
    harvest = Harvest(folder, simulation.load, dict.fromkeys(world.sessions, VIRTUAL), log)
    harvest.lost = world.lost if whole else {}
    harvest.source = min(node for node in world.sessions if node >= 0 and node not in harvest.lost)
    for node in world.sessions.keys() - harvest.lost.keys():
        harvest.keep(node, _left(world, node, weights=node == harvest.source), whole=whole)
    simulated = {
        **facts(simulation),
        "real_s": played.real_s,
        "messages": world.network.messages,
        "events": world.loop.events,
        "trace_sha256": played.trace.digest,
    }
    end = End(
        state=played.ending.state,
        error=error,
        wall_s=played.ending.time_s,
        simulated=simulated,
    )
    return Simulated(**vars(harvest.write(job_id, end)), trace=played.trace)


def _links(world: World, node: int) -> list[str]:
    """Return a line about each link of a node, as a real one writes it."""
    traffic, now = world.transports[node].traffic, world.loop.time()
    lines = []
    for peer in sorted({peer for link in traffic for peer in link} - {node}):
        (out, out_bytes), (back, back_bytes) = traffic[node, peer], traffic[peer, node]
        lines.append(
            f"{now:.6f} link to {node_name(peer)} over virtual: sent {out} messages, {out_bytes} "
            f"bytes; received {back}, {back_bytes} bytes"
        )
    return lines


def _left(world: World, node: int, *, weights: bool) -> dict[str, Any]:
    """Return what a node leaves, as a real one sends it to its submitter."""
    log = "".join(f"{line}\n" for line in [*world.logs[node], *_links(world, node)])
    facts_of_run = world.sessions[node].facts(weights=weights)
    return {**facts_of_run, "log": np.frombuffer(log.encode(), np.uint8)}
