"""Whole jobs on real nodes over simulated connections, with a fault at every point of their lives.

A point is a packet that a machine sends, or that reaches it. A job without a fault is counted in
them. Then, for every machine and each of its points, the same job runs again, and right before or
right after it the machine's process is killed, the machine falls silent, or the network is cut.
"""

import asyncio
import functools
import gc
import json
import logging
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiosgd.errors import AiosgdError
from aiosgd.plugins.registry import Registry
from aiosgd.runtime import config, connection, coordinator, mesh, node, workload
from aiosgd.runtime.config import Address, JobConfig, make_job
from aiosgd.runtime.coordinator import Coordinator, Request, Silent, load_job, run_job
from aiosgd.runtime.harvest import Outcome
from aiosgd.runtime.hello import introduce
from aiosgd.runtime.job import Job, Phase, Seat, node_name
from aiosgd.runtime.node import Control, Node
from aiosgd.runtime.part import Part, Settings
from aiosgd.runtime.simulation import network
from aiosgd.runtime.simulation.loop import SECOND
from aiosgd.runtime.simulation.network import Network, NetworkModel
from aiosgd.runtime.simulation.streams import Internet, Machine, StreamLoop
from aiosgd.runtime.simulation.trace import Trace
from aiosgd.runtime.workload import Workload

PORT = 7000
SUBMITTER = "submitter"
# what a message weighs makes no difference: its time would depend on the digits in a log line
MODEL = NetworkModel(
    bytes_per_s=float("inf"), message_s=0, byte_s=0, path=network.Path(latency_s=1e-3)
)
JOB = {
    "dataset": "synthetic",
    "dataset_params": {"samples": 40, "features": 3, "classes": 2},
    "model": "softmax",
    "batch_size": 4,
    "max_steps": 2,
    "wire": {"unix": False},
    "compute": {"policy": "inline"},
}

# seconds from a fault until the submitter has its answer and all living nodes are free: a broken
# link tells at once, silence is noticed by heartbeats, an absent node is tried for again for 5 s
AT_ONCE, SILENCE, ABSENT = 0.1, 6.2, 6.2
PATIENCE = {"kill": AT_ONCE, "silence": SILENCE, "cut": SILENCE, "rift": SILENCE, "blink": SILENCE}
LASTS = {"cut": 8.0, "rift": 8.0, "blink": 3.0}
CRASHES = ("kill", "silence")
CUTS = ("cut", "rift", "blink")
# seconds until the links to a silent machine are given up, too
LINGER = 12.0
# after how many of the faults another job is run on the same nodes
AGAIN = 5
# a job that takes longer hangs
HANG = 60.0


@dataclass(frozen=True)
class Fault:
    """A fault of a machine at one of its points.

    Attributes:
        machine: its name.
        point: the number of the point, from 0 on.
        before: whether what would happen there does not happen any more.
        kind: `kill` (the process dies, and others are told), `silence` (the machine is gone),
            `cut` (from all others, longer than anybody waits), `rift` (from one other node),
            `blink` (from all others, for so short that nobody must notice).
    """

    machine: str
    point: int
    before: bool
    kind: str


@dataclass
class Result:
    """What came of a job.

    Attributes:
        state: `done`, `failed`, or `dead` as the submitter is.
        error: what the submitter said.
        phase: where the job was when the fault happened; empty: it was over.
        ended_s: from the fault to the submitter's answer.
        free_s: from the fault until all living nodes are free.
        weights: of the job, if it is done.
        again: weights, or the error, of a second job on the same nodes.
        points: machine -> how many points it went through before the job's end.
        problems: what must not happen, whatever the fault is.
    """

    state: str = "hangs"
    error: str = ""
    phase: str = ""
    ended_s: float = 0.0
    free_s: float = 0.0
    weights: bytes = b""
    again: bytes | str | None = None
    points: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    digest: str = ""


@dataclass(frozen=True)
class Cluster:
    """A job and nodes for it: workers, then servers."""

    job: JobConfig
    load: Workload
    workers: int
    servers: int
    folder: Path

    @property
    def names(self) -> list[str]:
        """The nodes' machines."""
        return [f"node{i}" for i in range(self.workers + self.servers)]

    def role(self, name: str) -> str:
        """Return how messages name a node."""
        place = self.names.index(name)
        return node_name(place if place < self.workers else self.workers - 1 - place)

    def runs(self) -> list[Path]:
        """Return the submitter's run folders so far."""
        return list((self.folder / "out").glob("*"))

    def tidy(self) -> None:
        """Remove what the jobs so far have left."""
        for folder in (*self.names, "out"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)


def make_cluster(folder: Path, workers: int, servers: int, codec: str) -> Cluster:
    asked = make_job({**JOB, "output": str(folder / "out"), "codec": codec})
    return Cluster(asked, load_job(asked, workers, folder / "data")[0], workers, servers, folder)


# One job -------------------------------------------------------------------------------------


class Watch(Silent):
    """Knows where the job is."""

    phase = Phase.NEW

    def entered(self, phase: Phase, job_id: str) -> None:
        self.phase = phase


class Errors(logging.Handler):
    """Takes what only a log tells of: errors in tasks that nobody waits for."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.problems.append(f"{record.getMessage()}: {cause!r}")


class Play:
    """A job on its own machines, and the fault that befalls it."""

    def __init__(self, cluster: Cluster, fault: Fault | None, *, again: bool) -> None:
        self.cluster = cluster
        self.fault = fault
        self.again = again
        self.result = Result()
        self.watch = Watch()
        self.nodes: dict[str, Node] = {}
        self.struck = asyncio.Event()
        self.struck_s = 0.0
        self.dead = ""
        self.loop: StreamLoop = asyncio.get_running_loop()
        self.trace = Trace()
        self.network = Network(self.loop, MODEL, 0, self.trace)
        self.internet = Internet(self.loop, self.network)
        for i, name in enumerate([*cluster.names, SUBMITTER]):
            self.internet.add(i, name)

    async def run(self) -> Result:
        """Run the job, then another one if asked to."""
        errors = Errors(self.result.problems)
        node.logger.addHandler(errors)
        self.loop.set_exception_handler(self._failed)
        try:
            async with asyncio.timeout(HANG):
                await self._play()
        except TimeoutError:
            self.result.problems.append(f"not over after {HANG:g} s")
        finally:
            node.logger.removeHandler(errors)
            self.loop.set_exception_handler(lambda *_: None)
            self.internet.observer = None
            self.internet.close()
        return self.result

    def _failed(self, loop: Any, context: dict[str, Any]) -> None:
        self.result.problems.append(f"{context['message']}: {context.get('exception')!r}")

    async def _play(self) -> None:
        result = self.result
        for name in self.cluster.names:
            self._start(name)
        self.internet.observer = self._observe
        await self._outcome(self._submit(self.watch))
        result.ended_s = self.loop.time() - self.struck_s
        result.digest = self.trace.digest
        result.points = {name: one.points for name, one in self.internet.machines.items()}
        if self.fault is None or self.struck.is_set():
            self.internet.observer = None
        await self._until(lambda: all(map(self._is_free, self._living())))
        result.free_s = self.loop.time() - self.struck_s
        await self._until(lambda: not any(map(self._has_links, self._living())))
        if self.loop.time() - self.struck_s > LINGER:
            result.problems.append("links to somebody who is gone are left")
        self.internet.observer = None
        if self.again:
            await self._play_again()

    def _start(self, name: str) -> None:
        folder = self.cluster.folder / name
        settings = Settings(
            host=name,
            port=PORT,
            run_dir=folder / "runs",
            data_dir=folder / "data",
            unix=False,
            clock=self.loop.time,
        )
        one = self.nodes[name] = Node(settings)
        self.internet.machines[name].start(one.serve(lambda address: None))

    def _submit(self, watch: Silent) -> asyncio.Task[Outcome]:
        addresses = [Address(name, PORT) for name in self.cluster.names]
        request = Request(
            job=self.cluster.job,
            workers=addresses[: self.cluster.workers],
            servers=addresses[self.cluster.workers :],
            data_dir=self.cluster.folder / "data",
        )
        running = run_job(request, watch, (self.cluster.load, []))
        return self.internet.machines[SUBMITTER].start(running)

    def _observe(self, machine: Machine, point: int, before: bool) -> None:
        fault = self.fault
        if fault is not None and (machine.name, point, before) == (
            fault.machine,
            fault.point,
            fault.before,
        ):
            self.fault = None
            self._strike(machine, fault.kind)

    def _strike(self, machine: Machine, kind: str) -> None:
        self.struck_s = self.loop.time()
        self.struck.set()
        self.result.phase = str(self.watch.phase)
        if kind in CRASHES:
            self.dead = machine.name
            machine.kill() if kind == "kill" else machine.fail()
            return
        others = [i for i in range(len(self.internet.machines)) if i != machine.node]
        if kind == "rift":
            others = [(machine.node + 1) % len(self.cluster.names)]
        self.network.cut([machine.node], others)
        heals = self.loop.time_ns() + round(LASTS[kind] * SECOND)
        self.loop.call_at_ns(heals, 0, self.network.heal)

    async def _outcome(self, submitter: asyncio.Task[Outcome]) -> None:
        """Wait for the submitter's answer, or until it dies."""
        result, before = self.result, set(self.cluster.runs())
        struck = self.loop.create_task(self.struck.wait())
        await asyncio.wait({submitter, struck}, return_when=asyncio.FIRST_COMPLETED)
        if self.dead == SUBMITTER and not submitter.done():
            result.state = "dead"
            return
        struck.cancel()
        try:
            outcome = await submitter
        except AiosgdError as error:
            result.state, result.error = "failed", str(error)
        else:
            result.state, result.weights = outcome.summary.state, weights_of(outcome)
        (folder,) = set(self.cluster.runs()) - before
        summary = json.loads((folder / "summary.json").read_text())
        if (summary["state"], summary["error"] is None) != (result.state, result.state == "done"):
            result.problems.append(f"the summary says {summary['state']}, {summary['error']}")

    def _living(self) -> list[str]:
        return [name for name in self.nodes if name != self.dead]

    def _is_free(self, name: str) -> bool:
        one = self.nodes[name]
        return one.member.seat is Seat.FREE and one.part is None

    def _has_links(self, name: str) -> bool:
        return bool(self.internet.machines[name].process.connections)

    async def _until(self, condition: Any) -> None:
        began = self.loop.time()
        while not condition():
            await asyncio.sleep(0.01 if self.loop.time() < began + 0.1 else 0.1)

    async def _play_again(self) -> None:
        """Heal the network, boot what is dead, and run the job once more."""
        self.network.heal()
        if self.dead and self.dead != SUBMITTER:
            self._start(self.dead)
        try:
            outcome = await self._submit(Silent())
        except AiosgdError as error:
            self.result.again = str(error)
        else:
            self.result.again = weights_of(outcome)


def weights_of(outcome: Outcome) -> bytes:
    return b"".join(np.ascontiguousarray(a).tobytes() for a in outcome.parameters.values())


def play(cluster: Cluster, fault: Fault | None = None, *, again: bool = True) -> Result:
    async def main() -> Result:
        return await Play(cluster, fault, again=again).run()

    with asyncio.Runner(loop_factory=StreamLoop) as runner:
        return runner.run(main())


# All of them ----------------------------------------------------------------------------------


def faults(cluster: Cluster, kinds: Iterable[str], well: Result) -> list[Fault]:
    """Return every fault of these kinds; a cut before a point is one after the last point, too."""
    return [
        Fault(machine, point, before, kind)
        for machine in [*cluster.names, SUBMITTER]
        for point in range(well.points[machine])
        for before in (True, False)
        for kind in kinds
        if (kind in CRASHES or before) and not (kind == "rift" and machine == SUBMITTER)
    ]


def judge(cluster: Cluster, fault: Fault, result: Result, well: Result) -> list[str]:
    """Return what is wrong with how a job ended."""
    wrong = list(result.problems)
    patience = ABSENT if result.phase == Phase.NEW else PATIENCE[fault.kind]
    if max(result.ended_s, result.free_s) > patience and result.phase != Phase.DONE:
        wrong.append(f"ended after {result.ended_s:.3f} s, free after {result.free_s:.3f} s")
    if result.state == "done" and result.weights != well.weights:
        wrong.append("done, and the weights are not those of a job without a fault")
    if result.again not in (None, well.weights):
        wrong.append(f"the next job: {str(result.again)[:200]}")
    if fault.kind == "blink" and result.state != "done":
        wrong.append(f"it healed in time, but: {result.error}")
    by_a_node = fault.kind in CRASHES and fault.machine != SUBMITTER
    if result.state == "failed" and by_a_node and cluster.role(fault.machine) not in result.error:
        wrong.append(f"it blames another: {result.error}")
    return wrong


@dataclass
class Figures:
    """What an enumeration has found.

    Attributes:
        wrong: each fault after which something is wrong, and what.
        times: (kind, phase, state) -> seconds until the submitter had its answer and until all
            nodes were free, per fault.
    """

    wrong: list[tuple[Fault, list[str]]] = field(default_factory=list)
    times: dict[tuple[str, ...], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    played: int = 0
    per_s: float = 0.0


def enumerate_faults(cluster: Cluster, plan: list[Fault], well: Result, most: int = 10) -> Figures:
    """Play the faults of a plan one after the other, until so many were wrong."""
    figures, started = Figures(), time.perf_counter()
    for i, fault in enumerate(plan):
        result = play(cluster, fault, again=i % AGAIN == 0)
        whose = SUBMITTER if fault.machine == SUBMITTER else "node"
        key = (fault.kind, whose, result.phase, result.state)
        figures.times[key].append((result.ended_s, result.free_s))
        figures.played += 1
        if wrong := judge(cluster, fault, result, well):
            figures.wrong.append((fault, wrong))
            if len(figures.wrong) >= most:
                break
        if i % 50 == 0:
            cluster.tidy()
            gc.collect()
    figures.per_s = figures.played / (time.perf_counter() - started)
    return figures


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave out what only costs time: the disk, BLAS, and to compute the same for each node again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Part, "_limit_blas", lambda self: 1)
        patch.setattr(Registry, "entries", functools.cache(Registry.entries))
        patch.setattr(config, "from_dict", remembering(config.from_dict))
        patch.setattr(workload, "load", remembering(workload.load))
        patch.setattr(node.logger, "propagate", False)
        gc.collect()
        gc.freeze()
        gc.disable()
        yield
        gc.enable()
        gc.unfreeze()


def remembering(function: Any) -> Any:
    """Remember what a function without effects gave for arguments that look the same."""
    known: dict[str, Any] = {}

    def remembered(*args: Any, **options: Any) -> Any:
        key = repr((args, options))
        if key not in known:
            known[key] = function(*args, **options)
        return known[key]

    return remembered


CLUSTERS = {
    "two workers and a server": (2, 1, "parameter_server"),
    "five workers": (5, 0, "plain"),
    "four workers and a server": (4, 1, "parameter_server"),
}


@pytest.fixture(scope="module")
def clusters(tmp_path_factory) -> Any:
    """`clusters(name)`: a cluster, and what comes of its job without a fault."""
    memory = Path("/dev/shm")  # hundreds of thousands of small files: a disk takes most of the time
    parent = memory if memory.is_dir() else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="aiosgd-", dir=parent) as folder:

        @functools.cache
        def make(name: str) -> tuple[Cluster, Result]:
            cluster = make_cluster(Path(folder, name), *CLUSTERS[name])
            return cluster, play(cluster)

        yield make


@pytest.mark.parametrize("name", CLUSTERS)
def test_without_a_fault_a_job_is_done_twice_and_repeats_itself(clusters, name):
    cluster, well = clusters(name)
    assert (well.state, well.problems) == ("done", [])
    assert well.weights
    assert well.again == well.weights
    repeated = play(cluster)
    assert (repeated.digest, repeated.points) == (well.digest, well.points)


def sample(plan: list[Fault], count: int) -> list[Fault]:
    """Return some of the faults, spread evenly, of all kinds alike."""
    return [plan[(i * 7919) % len(plan)] for i in range(count)]


def report(name: str, figures: Figures) -> None:
    print(f"{name}: {figures.played} faults, {figures.per_s:.0f} per second")
    for key, times in sorted(figures.times.items()):
        ended, free = (max(column) for column in zip(*times, strict=True))
        print(f"  {' '.join(key)}: {len(times)}, ended within {ended:.3f} s, free {free:.3f} s")


PHASES = {"new", "voting", "preparing", "linking", "running", "finishing", "collecting", "done"}


@pytest.mark.proof
@pytest.mark.parametrize(
    ("name", "count"),
    [("two workers and a server", 100), ("five workers", 30), ("four workers and a server", 30)],
)
def test_after_some_faults_nobody_hangs_or_is_busy_or_wrong(clusters, name, count):
    cluster, well = clusters(name)
    plan = sample(faults(cluster, (*CRASHES, *CUTS), well), count)
    figures = enumerate_faults(cluster, plan, well)
    report(name, figures)
    assert not figures.wrong


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("kinds", [CRASHES, CUTS], ids=["crashes", "cuts"])
def test_after_any_fault_nobody_hangs_or_is_busy_or_wrong(clusters, name, kinds):
    """Half of the three nodes' faults, a sixth of five nodes'; all if AIOSGD_EVERY_FAULT is set."""
    cluster, well = clusters(name)
    plan = faults(cluster, kinds, well)
    if "AIOSGD_EVERY_FAULT" not in os.environ:
        plan = sample(plan, len(plan) // (2 if name == "two workers and a server" else 6))
    figures = enumerate_faults(cluster, plan, well)
    report(name, figures)
    assert not figures.wrong
    assert {phase for _, _, phase, _ in figures.times} >= PHASES


# Planted bugs -------------------------------------------------------------------------------


async def watch_without_heartbeats(self: Control) -> None:
    await self._peer_closed.wait()
    self.mesh.close()
    if self._work is not None:
        self._work.cancel()
    self.node.forget(self)


def forget_without_leaving(self: Node, control: Control) -> None:
    self._controls.discard(control)


def lose_without_failing(self: Job, number: int, reason: str, now: float) -> Any:
    self.lost.add(number)
    self.missing.discard(number)
    return self._advance(now)


def enter_and_wait_for_the_dead(self: Job, phase: Phase, now: float) -> Any:
    instructions = original_enter(self, phase, now)
    if phase is Phase.STOPPING:
        self.missing = set(self.nodes)
    return instructions


def lose_without_failing_while_collecting(self: Job, number: int, reason: str, now: float) -> Any:
    lose = lose_without_failing if self.phase is Phase.COLLECTING else original_lost
    return lose(self, number, reason, now)


async def introduce_in_any_time(
    address: Address, facts: Any, timeout: float, **options: Any
) -> Any:
    return await introduce(address, facts, 1e6, **options)


def facts_with_weights_before_the_start(self: Part, *, weights: bool) -> Any:
    if self.session is not None:
        self.session.weights  # noqa: B018 - a server's codec has none yet
    return original_facts(self, weights=weights)


def nothing(*_: Any) -> None:
    pass


original_enter, original_lost, original_facts = Job._enter, Job._lost, Part.facts

# what is replaced, by what, and which faults show it
BUGS = {
    "a node does not notice that its submitter is silent": (
        *(Control, "watch", watch_without_heartbeats),
        "silence",
    ),
    "a node keeps its seat when its submitter is gone": (
        *(Node, "forget", forget_without_leaving),
        "kill",
    ),
    "a node does not notice that a peer is silent": (Part, "_lost", nothing, "rift"),
    "a server that was not started cannot be aborted": (
        *(Part, "facts", facts_with_weights_before_the_start),
        "kill",
    ),
    "the submitter ignores lost nodes": (Coordinator, "_lost", nothing, "kill"),
    "the submitter goes on without a lost node": (Job, "_lost", lose_without_failing, "kill"),
    "the submitter waits for the dead to stop": (
        Job,
        "_enter",
        enter_and_wait_for_the_dead,
        "kill",
    ),
    "the submitter collects without a lost node": (
        *(Job, "_lost", lose_without_failing_while_collecting),
        "kill node0",
    ),
    "silence counts only after 15 s": (mesh, "DEAD_AFTER", 15.0, "silence"),
    "a blink is taken for the end": (mesh, "DEAD_AFTER", 1.5, "blink"),
    "the submitter waits for a HELLO for ever": (
        *(coordinator, "introduce", introduce_in_any_time),
        "silence",
    ),
    "a node waits for a HELLO for ever": (node, "HELLO_TIMEOUT", 1e6, "silence"),
    "a link waits for its other end for ever": (connection, "LINGER", 1e6, "silence"),
}


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(clusters, monkeypatch, bug):
    cluster, well = clusters("two workers and a server")
    *place, shown_by = BUGS[bug]
    kind, _, machine = shown_by.partition(" ")
    monkeypatch.setattr(*place)
    plan = [one for one in faults(cluster, (kind,), well) if machine in ("", one.machine)]
    figures = enumerate_faults(cluster, sample(plan, len(plan)), well, most=1)
    assert figures.wrong
    print(f"{bug}: found by fault {figures.played}: {figures.wrong[0]}")
