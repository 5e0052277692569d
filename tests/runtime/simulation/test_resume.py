"""Whole clusters that die and go on from their checkpoints: with the bits of a run without a fault.

The nodes, the submitter and the orders between them are the real ones, on simulated machines in
virtual time. An instant is a packet of a machine: right before or right after it, all processes are
killed at once. New ones on the same folders then resume the job.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from aiosgd.aio import Silent
from aiosgd.codecs.base import Codec
from aiosgd.errors import AiosgdError, ConfigError, JobFailedError
from aiosgd.plugins.compressors import chain
from aiosgd.plugins.compressors.base import Wrapper
from aiosgd.plugins.kinds import CODECS, COMPRESSORS, OPTIMIZERS
from aiosgd.plugins.registry import NoParams
from aiosgd.runtime import checkpoint, learner, part
from aiosgd.runtime.actor import Actor
from aiosgd.runtime.config import Address, JobConfig, make_job
from aiosgd.runtime.coordinator import Request, load_job, run_job
from aiosgd.runtime.harvest import Outcome
from aiosgd.runtime.job import Job, Phase
from aiosgd.runtime.node import Node
from aiosgd.runtime.part import CHECKPOINTS, Part, Settings
from aiosgd.runtime.session import Session
from aiosgd.runtime.simulation.network import Network
from aiosgd.runtime.simulation.network import Path as Path_
from aiosgd.runtime.simulation.streams import Internet, Machine, StreamLoop
from aiosgd.runtime.simulation.trace import Trace
from aiosgd.runtime.workload import Workload
from tests.runtime.simulation import test_crash_points
from tests.runtime.simulation.test_crash_points import JOB, MODEL, PORT, SUBMITTER

quick = test_crash_points.quick
EVERY, STEPS = 5, 13
EVERYTHING = "AIOSGD_EVERY_FAULT" in os.environ
# nodes are told to save at different times, and messages of one overtake those of another
JITTER = dataclasses.replace(MODEL, path=Path_(latency_s=1e-3, jitter_s=9e-3))
# what a run of these jobs takes at most, in virtual seconds
HANG = 60.0
SMALL = {
    **JOB,
    "dataset_params": {"samples": 72, "features": 5, "classes": 3},
    "batch_size": 3,
    "learning_rate": 0.1,
    "max_steps": STEPS,
    "checkpoint_every": EVERY,
    "epochs": 3,
    "optimizer_params": {"momentum": 0.9},
}


# Clusters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A job, and machines for it whose disks outlive their processes."""

    job: JobConfig
    load: Workload
    workers: int
    servers: int
    folder: Path

    @property
    def hosts(self) -> dict[int, str]:
        """Node id -> name of its machine."""
        ids = [*range(self.workers), *range(-1, -1 - self.servers, -1)]
        return {node: f"node{i}" for i, node in enumerate(ids)}

    def run_dir(self, host: str) -> Path:
        return self.folder / host / "runs"

    def part(self, job_id: str, node: int) -> Path:
        """Return a node's folder of a job."""
        return self.run_dir(self.hosts[node]) / job_id / "nodes" / str(node)

    def checkpoints(self, job_id: str) -> dict[int, list[int]]:
        """Return the steps of each node's checkpoints that can be read."""
        return {
            node: checkpoint.steps(self.part(job_id, node) / CHECKPOINTS) for node in self.hosts
        }

    def common(self, job_id: str) -> int:
        """Return the newest step that all nodes have a checkpoint of; -1 without."""
        return max(set.intersection(*map(set, self.checkpoints(job_id).values())), default=-1)

    def models(self, job_id: str) -> dict[int, bytes]:
        """Return the weights that each node ended with."""
        files = {node: self.part(job_id, node) / "model.safetensors" for node in self.hosts}
        arrays = {n: safetensors.numpy.load_file(f) for n, f in files.items() if f.exists()}
        return {n: b"".join(a.tobytes() for _, a in sorted(m.items())) for n, m in arrays.items()}

    def tidy(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def but(self, **changes: Any) -> "Site":
        """Return the same site for a job that is different in something."""
        return dataclasses.replace(self, job=dataclasses.replace(self.job, **changes))


def make_site(folder: Path, workers: int, servers: int, **options: Any) -> Site:
    job = make_job({**SMALL, "output": str(folder / "out"), **options})
    return Site(job, load_job(job, workers, folder / "data")[0], workers, servers, folder)


class Watch(Silent):
    """Knows where the job is, and what was said about it."""

    def __init__(self) -> None:
        self.phases: list[Phase] = [Phase.NEW]
        self.notes: list[str] = []
        self.job_id = ""

    def entered(self, phase: Phase, job_id: str) -> None:
        self.phases.append(phase)
        self.job_id = job_id

    def noted(self, text: str) -> None:
        if not text.startswith(f"job {self.job_id}"):  # what is about to be trained
            self.notes.append(text)

    @property
    def whole(self) -> int:
        """How many checkpoints are on all nodes for sure."""
        return sum(
            pair == (Phase.SAVING, Phase.RUNNING)
            for pair in zip(self.phases, self.phases[1:], strict=False)
        )


@dataclass(frozen=True)
class Instant:
    """A packet of a machine, and whether what happens there happens before it."""

    machine: str
    point: int
    before: bool


@dataclass
class World:
    """The machines of a site, for as long as an event loop runs."""

    site: Site
    loop: StreamLoop = field(default_factory=asyncio.get_running_loop)
    watch: Watch = field(default_factory=Watch)
    instants: list[tuple[Instant, Phase]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.internet = Internet(self.loop, Network(self.loop, JITTER, 0, Trace()))
        for i, name in enumerate([*self.site.hosts.values(), SUBMITTER]):
            self.internet.add(i, name)

    def boot(self, hosts: Any = None) -> None:
        """Start the node processes of these machines."""
        for host in hosts or self.site.hosts.values():
            settings = Settings(
                host=host,
                port=PORT,
                run_dir=self.site.run_dir(host),
                data_dir=self.site.folder / host / "data",
                unix=False,
                clock=self.loop.time,
            )
            self.internet.machines[host].start(Node(settings).serve(lambda address: None))

    def submit(self, resume: str = "") -> asyncio.Task[Outcome]:
        site, self.watch = self.site, Watch()
        addresses = {node: Address(host, PORT) for node, host in site.hosts.items()}
        request = Request(
            job=dataclasses.replace(site.job, resume=resume),
            workers=[address for node, address in addresses.items() if node >= 0],
            servers=[address for node, address in addresses.items() if node < 0],
            data_dir=site.folder / "data",
        )
        running = run_job(request, self.watch, (site.load, []))
        return self.internet.machines[SUBMITTER].start(running)

    async def crash(self, instant: Instant, hosts: list[str], resume: str = "") -> bool:
        """Run the job and kill these machines at an instant; tell whether it was ever reached."""
        struck = asyncio.Event()

        def observe(machine: Machine, point: int, before: bool) -> None:
            here = Instant(machine.name, point, before)
            if here == instant and not struck.is_set():
                for host in hosts:
                    self.internet.machines[host].kill()
                struck.set()

        self.boot()
        submitter = self.submitter = self.submit(resume)
        for machine in self.internet.machines.values():
            machine.points = 0
        self.internet.observer = observe
        waiting = self.loop.create_task(struck.wait())
        await asyncio.wait({submitter, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        self.internet.observer = None
        if SUBMITTER in hosts:
            self.internet.machines[SUBMITTER].kill()
        else:
            await asyncio.wait({submitter})
        for machine in self.internet.machines.values():
            machine.kill()
        return struck.is_set()

    async def finish(self, resume: str = "") -> Outcome:
        """Run, or resume, the job to its end on new nodes."""
        self.boot()
        outcome = await self.submit(resume)
        for machine in self.internet.machines.values():
            machine.kill()
        return outcome

    def note_instants(self) -> None:
        """Take down every packet from here on, and where the job is then."""
        for machine in self.internet.machines.values():
            machine.points = 0

        def observe(machine: Machine, point: int, before: bool) -> None:
            here = Instant(machine.name, point, before)
            self.instants.append((here, self.watch.phases[-1]))

        self.internet.observer = observe


def in_virtual_time(site: Site, story: Any) -> Any:
    """Run `story(world)` on new machines."""

    async def main() -> Any:
        world = World(site)
        try:
            async with asyncio.timeout(HANG):
                return await story(world)
        finally:
            world.loop.set_exception_handler(lambda *_: None)
            world.internet.observer = None
            world.internet.close()

    with asyncio.Runner(loop_factory=StreamLoop) as runner:
        return runner.run(main())


def finished(site: Site, resume: str = "") -> tuple[str, dict[int, bytes], list[str]]:
    """Run a job without a fault: its id, the weights of all nodes, what was said."""

    async def story(world: World) -> Any:
        outcome = await world.finish(resume)
        models = site.models(world.watch.job_id)
        assert np.isfinite([*map(np.sum, outcome.parameters.values())]).all()
        return world.watch.job_id, models, world.watch.notes

    return in_virtual_time(site, story)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder that costs no disk."""
    parent = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="aiosgd-", dir=parent if parent.is_dir() else None
    ) as folder:
        yield Path(folder)


# Every instant --------------------------------------------------------------------------------

RING = {"topology": "ring"}
JOBS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain, momentum, ef(topk)": (3, 0, {"codec": "plain", "compressor": "ef(topk(ratio=0.3))"}),
    "plain, overlap, redundancy": (3, 0, {"codec": "plain", "overlap": True, "redundancy": 2}),
    "plain, updates, adam": (
        *(2, 0),
        {"exchange": "updates", "optimizer": "adam", "optimizer_params": {}, "redundancy": 2},
    ),
    "allreduce": (3, 0, {"codec": "allreduce"}),
    "allreduce, in parts": (3, 0, {"codec": "allreduce", "codec_params": {"small": 0}}),
    "parameter_server, 2 servers": (
        *(2, 2),
        {"codec": "parameter_server", "granularity": "tensor", "compressor": "ef(qsgd)"},
    ),
    "fedavg": (3, 1, {"codec": "fedavg", "codec_params": {"turn": 4, "fraction": 0.6}}),
    "dpsgd on a ring": (4, 0, {"codec": "dpsgd", **RING}),
    "choco on a ring": (
        *(4, 0),
        {"codec": "choco", "compressor": "topk(ratio=0.4)", "codec_params": {"gamma": 0.3}, **RING},
    ),
}


@dataclass(frozen=True)
class Well:
    """A job without a fault."""

    site: Site
    models: dict[int, bytes]
    instants: list[tuple[Instant, Phase]]

    def draw(self, rng: random.Random) -> Instant:
        """Draw an instant: half of them while a checkpoint is made."""
        phases = rng.choice([{*Phase}, {*Phase}, {Phase.DRAINING}, {Phase.SAVING}])
        return rng.choice([instant for instant, phase in self.instants if phase in phases])


@pytest.fixture(scope="module")
def well(memory: Path) -> Any:
    """`well(name)`: a site of JOBS, and what comes of its job without a fault."""

    @functools.cache
    def make(name: str) -> Well:
        workers, servers, options = JOBS[name]
        site = make_site(memory / name, workers, servers, **options)

        async def story(world: World) -> Any:
            world.boot()
            submitter = world.submit()
            world.note_instants()
            await submitter
            return site.models(world.watch.job_id), world.instants

        models, instants = in_virtual_time(site, story)
        assert models.keys() >= {*range(workers)}
        return Well(site, models, instants)

    return make


def resumed(well: Well, instant: Instant, again: Instant | None) -> tuple[str, str]:
    """Kill the cluster at an instant, perhaps again while it resumes, then let it end.

    Returns:
        What is wrong with how it ended, and the phase in which it was killed.
    """
    site = well.site

    async def story(world: World) -> tuple[str, str]:
        everybody = [*site.hosts.values(), SUBMITTER]
        await world.crash(instant, everybody)
        phase, whole, job_id = str(world.watch.phases[-1]), world.watch.whole, world.watch.job_id
        if not job_id:
            return "", phase  # before anything began
        common = site.common(job_id)
        if common < whole * EVERY - 1:
            return f"{whole} checkpoints were whole, there are {site.checkpoints(job_id)}", phase
        if common >= 0 and again is not None:
            await world.crash(again, everybody, job_id)
            if site.common(world.watch.job_id or job_id) > common:
                job_id = world.watch.job_id
                common = site.common(job_id)
        if common < 0:
            return await refused(world, job_id), phase
        await world.finish(job_id)
        where = f"goes on after step {common} of job {job_id}"
        if where not in world.watch.notes:
            return f"it says {world.watch.notes}, not {where!r}", phase
        models = site.models(world.watch.job_id)
        unlike = [node for node in well.models if models.get(node) != well.models[node]]
        return f"after step {common}: other weights on {unlike}" if unlike else "", phase

    try:
        return in_virtual_time(site, story)
    except (AiosgdError, TimeoutError) as error:
        return repr(error), ""
    finally:
        site.tidy()


async def refused(world: World, job_id: str) -> str:
    """Resume what has no common checkpoint; return what is wrong with the error."""
    try:
        await world.finish(job_id)
    except JobFailedError as error:
        right = f"no step of job {job_id} has a checkpoint on all nodes: " in str(error)
        return "" if right else str(error)
    return "it resumed from nothing"


def check_instants(well: Any, count: int, seed: int) -> None:
    phases: Counter[str] = Counter()
    wrong = []
    for i in range(count):
        name = [*JOBS][i % len(JOBS)]
        rng, one = random.Random(seed + i), well(name)
        instant, again = one.draw(rng), one.draw(rng)
        problem, phase = resumed(one, instant, again if i % 4 == 0 else None)
        phases[phase] += 1
        if problem:
            wrong.append(f"{name}, {instant}, {again if i % 4 == 0 else ''}: {problem}")
    print(f"{count} instants: {dict(phases)}")
    assert not wrong
    assert phases.keys() >= {"saving", "running"}


@pytest.mark.proof
def test_after_a_few_instants_a_job_goes_on_with_the_same_bits(well):
    check_instants(well, 18, seed=5)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_after_many_instants_a_job_goes_on_with_the_same_bits(well):
    """100 instants; 200 if AIOSGD_EVERY_FAULT is set."""
    check_instants(well, 200 if EVERYTHING else 100, seed=1000)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_at_every_instant_of_a_checkpoint_being_made_nothing_is_lost(well):
    """Every third packet from the first pause on until all go on, of one job with a server.

    Every packet if AIOSGD_EVERY_FAULT is set.
    """
    one = well("parameter_server, 2 servers")
    phases = [phase for _, phase in one.instants]
    first = phases.index(Phase.DRAINING)
    end = first + phases[first:].index(Phase.RUNNING) + 20
    wrong = [
        f"{instant}: {problem}"
        for instant, _ in one.instants[first - 20 : end : 1 if EVERYTHING else 3]
        if (problem := resumed(one, instant, None)[0])
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["plain, momentum, ef(topk)", "fedavg"])
@pytest.mark.parametrize("number", range(8))
def test_a_write_that_was_cut_short_is_no_checkpoint(well, monkeypatch, name, number):
    """All processes die while a node writes: of what it wrote, half of a file is on its disk."""
    one, write, calls = well(name), checkpoint.write, []
    site = one.site
    if number >= 2 * len(site.hosts):
        number -= 2 * len(site.hosts)

    async def story(world: World) -> None:
        died = asyncio.Event()

        def cut_short(folder: Path, state: Any, shapes: Any) -> Path:
            calls.append(folder)
            path = write(folder, state, shapes)
            if len(calls) == number + 1:
                content = (path / checkpoint.STATE).read_bytes()
                (path / checkpoint.STATE).write_bytes(content[: len(content) // 2])
                path = path.rename(folder / f".{state.step}.0123abcd.tmp")
                for machine in world.internet.machines.values():
                    machine.kill()
                died.set()
            return path

        monkeypatch.setattr(part.checkpoint, "write", cut_short)
        world.boot()
        world.submitter = world.submit()
        await died.wait()
        monkeypatch.setattr(part.checkpoint, "write", write)
        job_id, common = world.watch.job_id, site.common(world.watch.job_id)
        assert common == (-1 if number < len(site.hosts) else 4)
        if common < 0:
            assert not await refused(world, job_id)
            return
        await world.finish(job_id)
        assert site.models(world.watch.job_id) == one.models

    in_virtual_time(site, story)
    site.tidy()


# Other ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain, momentum, ef(topk)", "parameter_server, 2 servers"])
@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9])
def test_a_job_that_lost_a_node_says_how_to_go_on_and_does(well, name, place):
    one = well(name)
    site, phases = one.site, [phase for _, phase in one.instants]
    whole = phases.index(Phase.RUNNING, phases.index(Phase.SAVING))
    later = [
        instant
        for instant, phase in one.instants[whole:]
        if phase is not Phase.DONE and instant.machine != SUBMITTER
    ]
    lost = later[int(place * len(later))]

    async def story(world: World) -> None:
        assert await world.crash(lost, [lost.machine])
        job_id, common = world.watch.job_id, site.common(world.watch.job_id)
        with pytest.raises(JobFailedError, match="lost") as caught:
            await world.submitter
        assert f"--resume {job_id} goes on after step {common}" in str(caught.value)
        await world.finish(job_id)
        assert site.models(world.watch.job_id) == one.models

    in_virtual_time(site, story)
    site.tidy()


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        *(("plain, momentum, ef(topk)", phase) for phase in (Phase.RUNNING, Phase.SAVING)),
        ("parameter_server, 2 servers", Phase.DRAINING),
        ("parameter_server, 2 servers", Phase.SAVING),
        ("parameter_server, 2 servers", Phase.RUNNING),
    ],
)
def test_who_waits_for_a_checkpoint_when_the_submitter_dies_is_not_forgotten(well, name, phase):
    """The nodes end the job by themselves; nobody waits for ever for the order to go on."""
    one = well(name)
    site = one.site
    begun = [entered for _, entered in one.instants].index(Phase.DRAINING)  # all nodes run then
    later = one.instants[begun:]
    mine = [i for i, entered in later if entered is phase and i.machine == SUBMITTER]

    async def story(world: World, instant: Instant) -> None:
        died = asyncio.Event()

        def observe(machine: Machine, point: int, before: bool) -> None:
            if Instant(machine.name, point, before) == instant:
                machine.kill()
                died.set()

        world.boot()
        world.submitter = world.submit()
        for machine in world.internet.machines.values():
            machine.points = 0
        world.internet.observer = observe
        await died.wait()
        while site.models(world.watch.job_id).keys() != one.models.keys():
            await asyncio.sleep(0.1)
        assert site.models(world.watch.job_id) == one.models

    for instant in random.Random(2).sample(mine, 3):
        in_virtual_time(site, functools.partial(story, instant=instant))
        site.tidy()


def test_a_job_that_was_cancelled_goes_on(well):
    one = well("fedavg")
    site = one.site

    async def story(world: World) -> None:
        world.boot()
        submitter = world.submit()
        while world.watch.whole < 1:
            await asyncio.sleep(1e-3)
        submitter.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"--resume .* goes on after step 4"):
            await submitter
        await world.submit(world.watch.job_id)  # on the same nodes, which are free again
        assert site.models(world.watch.job_id) == one.models

    in_virtual_time(site, story)
    site.tidy()


def test_only_the_last_two_checkpoints_are_left_on_each_node(well):
    one = well("plain, momentum, ef(topk)")
    job_id, models, _ = finished(one.site)
    assert models == one.models
    assert one.site.checkpoints(job_id) == {node: [4, 9] for node in one.site.hosts}
    one.site.tidy()


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1, 2}])
def test_a_node_that_cannot_write_does_not_hold_the_job_up(well, monkeypatch, failing):
    one = well("plain, momentum, ef(topk)")
    site, write = one.site, checkpoint.write

    def no_room(folder: Path, state: Any, shapes: Any) -> Path:
        if state.step == 9 and int(folder.parent.name) in failing:
            raise OSError(28, "No space left on device")
        return write(folder, state, shapes)

    monkeypatch.setattr(part.checkpoint, "write", no_room)
    job_id, models, notes = finished(site)
    assert models == one.models
    (note,) = notes
    assert "the last checkpoint is not whole: " in note
    assert note.count("No space left on device") == len(failing)
    for node, steps in site.checkpoints(job_id).items():
        assert steps == ([4] if node in failing else [4, 9])  # the older one is needed still
    monkeypatch.setattr(part.checkpoint, "write", write)
    _, models, notes = finished(site, job_id)
    assert notes == [f"goes on after step 4 of job {job_id}"]
    assert models == one.models
    site.tidy()


def test_a_damaged_checkpoint_on_one_node_is_noticed_and_the_one_before_serves(well):
    one = well("plain, momentum, ef(topk)")
    job_id, _, _ = finished(one.site)

    def damage(step: int) -> None:
        path = one.site.part(job_id, 1) / CHECKPOINTS / f"{step:09d}" / "state.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    damage(9)
    _, models, notes = finished(one.site, job_id)
    assert (models, notes) == (one.models, [f"goes on after step 4 of job {job_id}"])
    damage(4)
    with pytest.raises(JobFailedError, match=r"worker 1 \(node1:7000\) has none"):
        finished(one.site, job_id)
    one.site.tidy()


def test_a_checkpoint_of_another_optimizer_is_refused(well):
    one = well("plain, momentum, ef(topk)")
    job_id, _, _ = finished(one.site)
    with pytest.raises(JobFailedError, match="the checkpoint is of another job"):
        finished(one.site.but(optimizer="adam", optimizer_params={}), job_id)
    one.site.tidy()


# Every plugin ---------------------------------------------------------------------------------

# parameters that have something under way at a checkpoint after step 4
ROUNDS = {"turn": 4, "period": 4, "entropy": "seed", "hostile": 1, "buffer": 2}
OWN: dict[str, dict[str, Any]] = {
    "streaming_diloco": {"period": 6, "fragments": 2},
    "fedopt": {"turn": 4, "optimizer": "adam"},
    "dp": {"clip": 1.0, "noise": 0.1, "entropy": "seed"},
}
WORKERS = 4


def codecs() -> list[Any]:
    """Return every codec in each of its modes."""
    names = [entry.name for entry in CODECS.entries()]
    pairs = [(name, mode) for name in names for mode in CODECS.load(name).modes]
    return [pytest.param(*pair) for pair in pairs]


def options_of(name: str, mode: str) -> dict[str, Any]:
    kind = CODECS.load(name)
    fields = [one.name for one in dataclasses.fields(getattr(kind, "Params", NoParams))]
    params = OWN.get(name) or {key: ROUNDS[key] for key in fields if key in ROUNDS}
    options: dict[str, Any] = {"codec": name, "mode": mode, "codec_params": params}
    if kind.uses_topology:
        options["topology"] = "ring"
    if name in ("dc_asgd", "adam_server"):
        options["optimizer_params"] = {}
    return options


def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Have sessions say what they keep, and what they have after they took it back."""
    said: list[tuple[str, Any]] = []
    snapshot, start = Session.snapshot, Session._start

    def noted(self: Session, step: int) -> Any:
        found = snapshot(self, step)
        said.append((f"{self.place.node} keeps", form(found)))
        return found

    async def started(self: Session) -> None:
        is_resumed = self._restored is not None
        await start(self)
        if is_resumed:
            said.append((f"{self.place.node} has", form(snapshot(self, self._step))))

    monkeypatch.setattr(Session, "snapshot", noted)
    monkeypatch.setattr(Session, "_start", started)
    return said


def form(found: checkpoint.Checkpoint) -> Any:
    """Return all that a checkpoint has, as text that is alike if it is alike."""
    writer = checkpoint._Writer()
    tree = writer.tree(dict(found.state), "the state")
    arrays = {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in writer.arrays.items()}
    weights = None if found.weights is None else found.weights.tobytes()
    return found.step, weights, tree, arrays


def check_resumes(site: Site, monkeypatch: pytest.MonkeyPatch, *, exact: bool) -> None:
    """Check that a job that goes on from its middle is like one that was never interrupted."""
    said = snapshots(monkeypatch)
    _, never, _ = finished(site.but(checkpoint_every=None))
    job_id, models, notes = finished(site)
    assert "not whole" not in "".join(notes)
    kept = {who.split()[0]: state for who, state in said if state[0] == 9}
    assert site.checkpoints(job_id) == {node: [4, 9] for node in site.hosts}
    if exact:
        assert models == never, "a pause changes something"
    said.clear()
    _, again, _ = finished(site, job_id)
    has = {who.split()[0]: state for who, state in said if who.endswith("has")}
    assert has == kept, "something is lost on the way"
    assert again.keys() == models.keys()
    if exact:
        assert again == models
    assert apart(again) <= 1e-5 or apart(models) > 1e-5, "the nodes end apart"
    for model in again.values():
        assert np.isfinite(np.frombuffer(model, np.float32)).all()
    site.tidy()


def apart(models: dict[int, bytes]) -> float:
    """Return how far the nodes' weights are apart at most."""
    vectors = np.array([np.frombuffer(model, np.float32) for model in models.values()])
    return float(np.ptp(vectors, axis=0).max())


@pytest.mark.parametrize(("name", "mode"), codecs())
def test_every_codec_goes_on_from_its_middle(memory, monkeypatch, name, mode):
    servers = int(CODECS.load(name).server is not None)
    site = make_site(memory / f"{name}-{mode}", WORKERS, servers, **options_of(name, mode))
    check_resumes(site, monkeypatch, exact=mode == "sync")


def chains() -> list[str]:
    """Return every compressor, and every wrapper around each that it can be put around."""
    names = [entry.name for entry in COMPRESSORS.entries()]
    found = [name for name in names if not issubclass(COMPRESSORS.load(name), Wrapper)]
    for text in [f"{name}({inner})" for name in {*names} - {*found} for inner in names]:
        with contextlib.suppress(ConfigError):
            chain.factory(COMPRESSORS, text, {})
            found.append(text)
    return sorted(found)


@pytest.mark.proof
@pytest.mark.parametrize("compressor", chains())
def test_every_compressor_goes_on_from_its_middle(memory, monkeypatch, compressor):
    options = {"compressor": compressor, "learning_rate": 0.01}
    site = make_site(memory / compressor, 2, 0, codec="plain", **options)
    check_resumes(site, monkeypatch, exact=True)


@pytest.mark.proof
@pytest.mark.parametrize("exchange", ["gradients", "updates"])
@pytest.mark.parametrize("name", [entry.name for entry in OPTIMIZERS.entries()])
def test_every_optimizer_goes_on_from_its_middle(memory, monkeypatch, name, exchange):
    params = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    options = {"optimizer": name, "optimizer_params": {**params, "schedule": "cosine"}}
    site = make_site(memory / f"{name}-{exchange}", 2, 0, exchange=exchange, **options)
    check_resumes(site, monkeypatch, exact=True)


# Planted bugs ---------------------------------------------------------------------------------

original_snapshot, original_restore, original_save = Actor.snapshot, Session.restore, Part.save


def snapshot_without_the_compressor(self: Actor) -> dict[str, Any]:
    return {**original_snapshot(self), "compressor": {}}


def snapshot_with_new_random_numbers(self: Actor) -> dict[str, Any]:
    return {**original_snapshot(self), "compressor_rng": np.random.default_rng(1)}


def restore_without_what_was_ahead(self: Session, found: checkpoint.Checkpoint) -> None:
    original_restore(self, found)
    self._ahead = []


def restore_without_the_step(self: Session, found: checkpoint.Checkpoint) -> None:
    original_restore(self, found)
    self._first = 0


async def save_and_forget_the_older(self: Part, step: int) -> str:
    reason = await original_save(self, step)
    checkpoint.prune(self.folder / CHECKPOINTS, step)
    return reason


def checkpoint_without_draining(self: Job, now: float) -> Any:
    return self._enter(Phase.SAVING, now)


def nothing(*_: Any) -> None:
    pass


# what is replaced, by what, and the job that shows it
BUGS = {
    "a codec's memory is lost": (Codec, "restore", nothing, "fedavg"),
    "a compressor's memory is lost": (
        *(Actor, "snapshot", snapshot_without_the_compressor),
        "plain, momentum, ef(topk)",
    ),
    "random numbers begin anew": (
        *(Actor, "snapshot", snapshot_with_new_random_numbers),
        "parameter_server, 2 servers",
    ),
    "an optimizer's memory is lost": (learner, "_refill", nothing, "plain, momentum, ef(topk)"),
    "what was computed ahead is lost": (
        *(Session, "restore", restore_without_what_was_ahead),
        "plain, overlap, redundancy",
    ),
    "steps are taken again": (Session, "restore", restore_without_the_step, "dpsgd on a ring"),
    "a node forgets the older one by itself": (
        *(Part, "save", save_and_forget_the_older),
        "choco on a ring",
    ),
    "nothing is pruned, nothing is written": (checkpoint, "write", nothing, "allreduce"),
}


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(well, monkeypatch, bug):
    *place, name = BUGS[bug]
    one, rng = well(name), random.Random(3)
    monkeypatch.setattr(*place)
    problems = (resumed(one, one.draw(rng), None)[0] for _ in range(60))
    tries = [*itertools.takewhile(lambda problem: not problem, problems)]
    assert len(tries) < 60


@pytest.mark.proof
def test_messages_that_were_under_way_would_be_missed(memory, monkeypatch):
    """Without draining, an update that no checkpoint has is lost: the nodes end apart."""
    monkeypatch.setattr(Job, "_checkpoint", checkpoint_without_draining)
    options = options_of("parameter_server", "async")
    site = make_site(memory / "undrained", WORKERS, 1, **options)
    with pytest.raises(AssertionError, match="the nodes end apart"):
        check_resumes(site, monkeypatch, exact=False)
