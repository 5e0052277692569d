"""The submitter's I/O around runtime.job: links, orders, what comes back, the run folder."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from aiosgd.codecs.base import Vector
from aiosgd.errors import (
    AiosgdError,
    ClusterError,
    ConfigError,
    JobFailedError,
    PeerLostError,
    RemoteProtocolError,
)
from aiosgd.plugins.datasets import DataFile
from aiosgd.plugins.registry import check_value, error_text, make_dataclass
from aiosgd.runtime import config, results, workload
from aiosgd.runtime.archive import write_job
from aiosgd.runtime.config import Address, JobConfig
from aiosgd.runtime.connection import Link
from aiosgd.runtime.harvest import End, Harvest, Outcome
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.job import (
    ENDS,
    SUBMITTER,
    Begin,
    Cancel,
    Enter,
    Evaluated,
    Event,
    Instruction,
    Job,
    Lost,
    Order,
    Paused,
    Phase,
    Report,
    Reported,
    Returned,
    Tell,
    Tick,
    Verdict,
    node_name,
)
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.security import OPEN, Security
from aiosgd.runtime.session import Evaluation, News, Note, Pause, Progress
from aiosgd.runtime.tracking import PARTING, PATIENCE, Tracking, check_trackers
from aiosgd.runtime.workload import Workload

# how often deadlines are looked at
TICK = 0.25
# how often a lost worker is looked for, and how long another may take to send its weights
RETURN_PAUSE = 0.5
NEWEST_TIMEOUT = 60.0
# seconds between two notes of a node, and characters of one
NOTE_INTERVAL, NOTE_LENGTH = 5.0, 300
# longest wait for the nodes to end their links after a job
FAREWELL = 1.0


class Observer(Protocol):
    """Watches a job, for the screen. Every method returns at once."""

    def entered(self, phase: Phase, job_id: str) -> None:
        """The job entered a phase."""

    def progressed(self, progress: Progress) -> None:
        """A worker said how far it is."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """A worker evaluated its weights."""

    def printed(self, node: str, text: str) -> None:
        """A node that was started for this job printed a line."""

    def noted(self, text: str) -> None:
        """Something about the job is worth a line."""

    def attended(self, present: Collection[int], workers: int) -> None:
        """These of so many workers take part from now on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, where.

    Attributes:
        job: the checked configuration.
        workers, servers: the nodes to choose from; the job uses the first ones.
        data_dir: this machine's folder for data.
        security: what the links to the nodes are protected with.
        connect_timeout: how long to try to reach a node, in seconds.
        places: node id -> address of a job that is resumed, whose nodes have its checkpoints, or
            that runs already; None: wherever they are.
    """

    job: JobConfig
    workers: Sequence[Address]
    servers: Sequence[Address] = ()
    data_dir: Path
    security: Security = OPEN
    connect_timeout: float = 5.0
    places: Mapping[int, Address] | None = None


@dataclass(frozen=True, kw_only=True)
class Estate:
    """A job that runs and has lost its submitter: all that its new leader has to know.

    Attributes:
        job_id: the job.
        load: its plugins.
        nodes: node id -> address; without those that are lost.
        token: lets the nodes of this job know each other.
    """

    job_id: str
    load: Workload
    nodes: Mapping[int, Address]
    token: str


def choose_nodes(request: Request) -> dict[int, Address]:
    """Return node id -> address: the first workers, and servers only if the codec has a use.

    Raises:
        ConfigError: the job wants more workers than there are, or a server where none is.
    """
    if request.places is not None:
        return dict(request.places)
    job, codecs = request.job, workload.load_codecs(request.job)
    count = job.workers or len(request.workers)
    if count > len(request.workers):
        raise ConfigError(f"workers is {count}, but the cluster has {len(request.workers)}")
    nodes = dict(enumerate(request.workers[:count]))
    if codecs.server_codec is None:
        return nodes
    if not request.servers:
        raise ConfigError(
            f'codec {job.codec!r} needs a server; add servers = ["host:port"] to the cluster'
        )
    if job.servers == 0:
        raise ConfigError(f"servers is 0, but codec {job.codec!r} needs one or more")
    wanted = job.servers or len(request.servers)
    if wanted > len(request.servers):
        raise ConfigError(f"servers is {wanted}, but the cluster has {len(request.servers)}")
    return nodes | {-1 - i: address for i, address in enumerate(request.servers[:wanted])}


def file_sources(job: JobConfig) -> list[tuple[str, bytes]]:
    """Return the sources of the code that a job names as FILE.py:NAME; reads a file once."""
    names = workload.file_code(job)
    texts = {path: Path(path).read_bytes() for path in {_path_of(name) for name in names}}
    return [(name, texts[_path_of(name)]) for name in names]


def code_files(job: JobConfig) -> dict[str, str]:
    """Return, for each FILE.py:NAME of a job, what the copy of its file in `code/` is called."""
    names, copies = workload.file_code(job), dict[str, str]()
    for i, path in enumerate(dict.fromkeys(map(_path_of, names))):
        base = Path(path).name
        copies[path] = f"{i}-{base}" if base in copies.values() else base
    return {name: copies[_path_of(name)] for name in names}


def write_code(folder: Path, job: JobConfig, sources: Sequence[tuple[str, bytes]]) -> None:
    """Write the sources of a job's own code into the run folder's `code/`."""
    copies, code = code_files(job), folder / "code"
    try:
        for name, text in sources:
            code.mkdir(exist_ok=True)
            (code / copies[name]).write_bytes(text)
    except OSError as error:
        raise ConfigError(f"{code} cannot be written: {error.strerror}") from error


def _path_of(name: str) -> str:
    return name.rpartition(":")[0]


Loaded: TypeAlias = tuple[Workload, list[DataFile]]


def load_job(job: JobConfig, workers: int, data_dir: Path) -> Loaded:
    """Load and check everything that a job names; its data files are looked up only once.

    Raises:
        ConfigError, PluginError: see `workload.load`; also for trackers, which only the submitter
            needs.
    """
    check_trackers(job)
    files = workload.dataset_files(job, data_dir)
    paths = {file.name: file.path for file in files}
    return workload.load(job, workers, data_dir, paths=paths or None), files


async def run_job(request: Request, observer: Observer, loaded: Loaded | None = None) -> Outcome:
    """Run a job on a cluster and collect what it leaves.

    Cancelling this coroutine cancels the job: the nodes are told, their logs collected, and then
    the cancellation goes on.

    Args:
        request: what to run, where.
        observer: told how the job goes.
        loaded: what `load_job` gave, if it was called before.

    Raises:
        ConfigError, PluginError: before any node is spoken to.
        ClusterError: a node is unreachable or refused the job.
        JobFailedError: the job started and failed, or what it left could not all be written.
    """
    return await (await _coordinator(request, observer, loaded)).run()


async def lead(estate: Estate, security: Security, data_dir: Path, folder: Path) -> None:
    """Take a job that runs to its end, in the place of its submitter.

    What it leaves stays on the nodes, which keep it until somebody fetches it.

    Args:
        estate: the job.
        security: what the links to the nodes are protected with.
        data_dir: this machine's folder for data.
        folder: where `lead.log` goes.

    Raises:
        ClusterError: a node cannot be reached, or follows somebody else.
        JobFailedError: the job failed.
    """
    request = Request(
        job=estate.load.job,
        workers=(),
        places=estate.nodes,
        data_dir=data_dir,
        security=security,
    )
    coordinator = Coordinator(request, Silent(), choose_nodes(request), estate.load, [], estate)
    await coordinator.lead(folder)


class Silent:
    """An observer that looks away."""

    def entered(self, *_: Any) -> None:
        """Do nothing."""

    progressed = evaluated = printed = noted = attended = entered


async def start_job(request: Request, observer: Observer) -> Path:
    """Have a cluster begin with a job, and leave it to its nodes: one of them takes it to its end.

    Returns:
        Its run folder, which has no results: the nodes keep them until somebody fetches them.

    Raises:
        As `run_job`, up to the job's first step.
    """
    return await (await _coordinator(request, observer)).start()


async def _coordinator(
    request: Request, observer: Observer, loaded: Loaded | None = None
) -> Coordinator:
    """Choose the nodes of a job, load it unless it is loaded, and return who takes it on."""
    nodes = choose_nodes(request)
    if loaded is None:
        workers = sum(node >= 0 for node in nodes)
        loaded = await asyncio.to_thread(load_job, request.job, workers, request.data_dir)
    return Coordinator(request, observer, nodes, *loaded)


@dataclass
class Coordinator:
    """One job, from voting to its run folder; of an estate, from where it is to its end."""

    request: Request
    observer: Observer
    nodes: dict[int, Address]
    load: Workload
    files: list[DataFile]
    estate: Estate | None = None
    _links: dict[int, Mesh] = field(default_factory=dict)
    _sockets: dict[int, Link] = field(default_factory=dict)
    _watches: list[asyncio.Future[None]] = field(default_factory=list)
    _missing: dict[int, list[str]] = field(default_factory=dict)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _quiet: set[int] = field(default_factory=set)
    _checkpoints: dict[int, list[int]] = field(default_factory=dict)
    _noted: dict[int, float] = field(default_factory=dict)
    _cause: Exception | None = None
    _cancelled: bool = False
    _leaves: bool = False
    _tracking: Tracking | None = None
    _began: dict[str, Any] | None = None
    _incarnations: Counter[int] = field(default_factory=Counter)
    _steps: dict[int, int] = field(default_factory=dict)  # worker -> the newest that is known
    _newest: Vector | None = None
    _asked: dict[int, asyncio.Future[Vector]] = field(default_factory=dict)
    _ending: Literal["failed", "cancelled"] = "failed"

    def __post_init__(self) -> None:
        job, estate = self.request.job, self.estate
        self.job_id = results.draw_job_id(job) if estate is None else estate.job_id
        self.workers = sorted(node for node in self.nodes if node >= 0)
        self.servers = sorted((node for node in self.nodes if node < 0), reverse=True)
        self.machine = Job(
            self.workers,
            self.servers,
            job.target_accuracy,
            adopted=estate is not None,
            min_workers=job.min_workers if job.bears_loss else None,
            resumes=bool(job.resume),
        )
        self._started = time.monotonic()
        # once: what is sent is what is kept
        self.sources = file_sources(job) if estate is None else []
        # lets the nodes of this job know each other
        self._token = secrets.token_hex(16) if estate is None else estate.token

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> Outcome:
        """Run the job; see `run_job`."""
        async with self._folder():
            try:
                await self._drive()
            finally:
                outcome = await self._written()
            return self._judge(outcome)

    async def start(self) -> Path:
        """Run the job until all workers train, and leave it to its nodes; see `start_job`."""
        self._leaves = True
        async with self._folder():
            try:
                await self._drive()
            finally:
                if self.machine.phase is not Phase.RUNNING:
                    outcome = await self._written()
            if self.machine.phase is not Phase.RUNNING:
                self._judge(outcome)
            self._log.info("left to its nodes")
        return self.folder

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[None]:
        """Make the run folder, and take leave of the nodes in the end."""
        self.job_id, self.folder = results.new_folder(self.request.job, self.job_id)
        self._log, handler = results.open_log(self.folder / "submit.log")
        self._harvest = Harvest(self.folder, self.load, self.nodes, self._log)
        if not self._leaves:  # a job that is left to its nodes is tracked once it is fetched
            loop = asyncio.get_running_loop()

            def tell(text: str) -> None:
                loop.call_soon_threadsafe(self.observer.noted, text)

            self._tracking = Tracking(self.request.job, self.folder, self._log, tell)
        try:
            self._write_job()
            if text := self.load.mixing:
                self._log.info(text)
                self.observer.noted(text)
            yield
        finally:
            if self._tracking is not None:
                self._tracking.abandon()
            handler.close()
            await self._part_from_nodes()

    async def lead(self, folder: Path) -> None:
        """Take the estate to its end; see `lead`."""
        self.folder = folder
        self._log, handler = results.open_log(folder / "lead.log")
        try:
            await self._drive()
            if self.machine.phase is not Phase.DONE:
                raise JobFailedError(f"job {self.job_id}: {self.machine.error}")
        finally:
            handler.close()
            await self._part_from_nodes()

    async def _drive(self) -> None:
        """Connect, then let the state machine say what to do until the job is over."""
        try:
            await self._connect()
            self._apply(Begin(self._now()))
            await self._wait()
        except asyncio.CancelledError:
            self._cancelled = True
            self._ending = "failed" if self.machine.error else "cancelled"
            self._apply(Cancel(self._now()))
            await self._wait()
        except AiosgdError as error:
            self.machine.error, self.machine.phase = str(error), Phase.FAILED
            self._log.error(str(error))
            raise

    async def _written(self) -> Outcome:
        """Write what is left, whole, even if this is cancelled meanwhile."""
        writing = asyncio.ensure_future(
            asyncio.to_thread(self._harvest.write, self.job_id, self._end())
        )
        while not writing.done():
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                self._cancelled = True
        outcome = writing.result()
        await self._tracked(outcome)
        return outcome

    async def _tracked(self, outcome: Outcome) -> None:
        """Wait for the trackers, who come last; if this is cancelled, for them no more."""
        if self._tracking is not None:
            patience = PARTING if self._cancelled else PATIENCE
            self._cancelled |= await self._tracking.ended(outcome, patience)

    async def _wait(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._over.wait()
            self._apply(Tick(self._now()))

    def _judge(self, outcome: Outcome) -> Outcome:
        where = f"logs in {self.folder}"
        if self.machine.checkpoint is not None:
            where += f"; --resume {self.job_id} goes on after step {self.machine.checkpoint}"
        if self._cancelled:
            raise asyncio.CancelledError(f"job {self.job_id} was cancelled; {where}")
        if self.machine.phase is Phase.FAILED and self.machine.refused:
            raise ClusterError(f"{self.machine.error}; {where}")
        if self.machine.phase is Phase.CANCELLED:  # by somebody else
            raise JobFailedError(f"job {self.job_id} was {self.machine.error}; {where}")
        if error := self._harvest.error(self.machine.error):
            failed = JobFailedError(f"job {self.job_id} failed: {error}; {where}")
            for text in self._harvest.tracebacks():
                failed.add_note(text)
            if self.machine.lost or self.machine.missing or " lost: " in error:
                failed.last_checkpoint = self._last_checkpoint()
            raise failed from self._cause
        return outcome

    def _last_checkpoint(self) -> tuple[str, int] | None:
        """Return the job and the step to go on from: this job's last, or what it went on from."""
        if self.machine.checkpoint is not None:
            return self.job_id, self.machine.checkpoint
        return (self._began["job_id"], self._began["step"]) if self._began else None

    def _end(self) -> End:
        return End(
            state=self._state(),
            error=self.machine.error,
            wall_s=time.monotonic() - self._started,
            checkpoint=self.machine.checkpoint,
        )

    def _state(self) -> Literal["done", "failed", "cancelled"]:
        if self.machine.phase is Phase.DONE:
            return "done"
        return "cancelled" if self.machine.phase is Phase.CANCELLED else self._ending

    # links

    async def _connect(self) -> None:
        links = await asyncio.gather(
            *(self._reach(node, address) for node, address in self.nodes.items()),
            return_exceptions=True,
        )
        for error in links:
            if isinstance(error, BaseException):
                raise error

    async def _reach(self, node: int, address: Address) -> None:
        """Connect to a node; one that is about to start is tried again until the time is up."""
        hello = greeting(role="submitter")
        deadline, pause = self._now() + self.request.connect_timeout, 0.05
        while True:
            try:
                link = await introduce(
                    address,
                    hello,
                    self.request.connect_timeout,
                    security=self.request.security,
                    unix=self.request.job.wire.unix,
                )
                break
            except ClusterError as error:
                if self._now() + pause > deadline or not _may_pass(error):
                    raise ClusterError(f"{node_name(node)}: {error}") from error
            await asyncio.sleep(pause)
            pause *= 2
        self._take(node, link)

    def _take(self, node: int, link: Link) -> None:
        mesh = Mesh(SUBMITTER, self._deliver, self._lost, eager_credit=False)
        mesh.add(node, link)
        self._links[node], self._sockets[node] = mesh, link
        self._watches.append(asyncio.ensure_future(mesh.watch()))

    async def _await(self, node: int) -> None:
        """Try to have a lost worker back, until it is or the job ends."""
        while self.machine.phase not in ENDS and node in self.machine.lost:
            await asyncio.sleep(RETURN_PAUSE)
            if self.machine.phase is Phase.RUNNING and self.machine.returning is None:
                # whatever goes wrong, it may go better next time
                with contextlib.suppress(AiosgdError, OSError, ValueError):
                    await self._invite(node)

    async def _invite(self, node: int) -> None:
        """Ask a lost worker whether it takes part again."""
        if node not in self._links[node].peers:
            link = await introduce(
                self.nodes[node],
                greeting(role="submitter"),
                security=self.request.security,
                unix=self.request.job.wire.unix,
            )
            self._take(node, link)
        if not self.servers or self.load.exchange == "weights":  # else it gets differences
            self._newest = await self._ask_newest(self._first)
        self._apply(Returned(node, self._now()))

    async def _ask_newest(self, worker: int) -> Vector:
        """Return the weights that a worker has now.

        Raises:
            TimeoutError: it does not answer.
            ValueError: they are of another model.
        """
        asked = self._asked[worker] = asyncio.get_running_loop().create_future()
        self._send(worker, {"order": "newest"})
        async with asyncio.timeout(NEWEST_TIMEOUT):
            weights: Vector = await asked
        if weights.dtype != np.float32 or weights.shape != (self.load.model.size,):
            raise ValueError(f"weights are {weights.dtype}{weights.shape}")
        return weights

    async def _part_from_nodes(self) -> None:
        """End the links; wait until the nodes have, too: then they are free for the next job."""
        ended = []
        for watch in self._watches:
            watch.cancel()
        for node, mesh in self._links.items():
            alive = node in mesh.peers
            mesh.close()
            if alive:
                ended.append(_end_of(self._sockets[node]))
        if ended:
            await asyncio.wait(ended, timeout=FAREWELL)
            for link in self._sockets.values():
                link.abort()  # of a node that is too slow to say goodbye
            await asyncio.sleep(0)

    def _deliver(self, node: int, content: Any, size: int) -> None:
        self._links[node].consumed(node)
        if isinstance(content, dict) and isinstance(content.get("newest"), np.ndarray):
            if (asked := self._asked.pop(node, None)) is not None and not asked.done():
                asked.set_result(content["newest"])
            return
        try:
            news = self._read(node, content)
        except (AiosgdError, KeyError, TypeError, ValueError) as error:
            news = self._nonsense(node, content, error)
        match news:
            case Progress():
                self._steps[node] = news.step
                with self._guarded():
                    self.observer.progressed(news)
                    if self._tracking is not None:
                        self._tracking.progressed(news)
            case Evaluation():
                with self._guarded():
                    self.observer.evaluated(news)
                    if self._tracking is not None:
                        self._tracking.evaluated(news)
                self._apply(Evaluated(node, news.epoch, news.accuracy))
            case Pause():
                self._apply(Paused(node, news.step, self._now()))
            case Note():
                with self._guarded():
                    self._pass_on(news)
            case _:
                self._apply(news)

    def _read(self, node: int, content: Any) -> News | Event:
        """Return what a node says, checked."""
        match content:
            case {"report": str(report), "job_id": self.job_id}:
                return self._reported(node, Report(report), content)
            case {"progress": dict(facts)}:
                return _news(Progress, node, facts, "progress")
            case {"evaluation": dict(facts)}:
                return _news(Evaluation, node, facts, "evaluation")
            case {"pause": dict(facts)}:
                return _news(Pause, node, facts, "pause")
            case {"note": dict(facts)}:
                return _news(Note, node, facts, "note")
        raise RemoteProtocolError("it is no report of this job")

    def _nonsense(self, node: int, content: Any, error: Exception) -> Event:
        """Return what to make of a report that cannot be read: the job fails."""
        reason = f"it sent a report that makes no sense: {error_text(error)}"
        self._log.error("%s: %s: %s", self.machine.phase, node_name(node), reason)
        match content:
            case {"report": str(report)} if report == Report.ABORTED:
                return Lost(node, reason, self._now())  # nothing more comes from it
        return Reported(node, Report.FAILED, self._now(), reason)

    def _lost(self, node: int, error: Exception) -> None:
        text, phase = f"{node_name(node)} lost: {error}", self.machine.phase
        self._log.info("%s: %s", phase, text)
        self._apply(Lost(node, str(error), self._now()))
        if not self.machine.error and node in self.machine.lost and phase not in ENDS:
            self._without(node, str(error))

    def _without(self, node: int, reason: str) -> None:
        """Note that the job goes on without a worker."""
        living = self._attend()
        self.observer.noted(
            f"{node_name(node)} lost: {reason}; going on with {living} of {len(self.workers)}"
        )
        if self.estate is None:  # who leads in a submitter's place takes nobody back
            self._harvest.lost[node] = reason
            self._incarnations[node] += 1
            self._watches.append(asyncio.ensure_future(self._await(node)))

    def _attend(self) -> int:
        """Tell which workers take part, and return how many."""
        living = [node for node in self.workers if node not in self.machine.lost]
        self.observer.attended(living, len(self.workers))
        return len(living)

    @property
    def _first(self) -> int:
        """The first worker that is not lost."""
        return min(node for node in self.workers if node not in self.machine.lost)

    # the state machine's shell

    def _apply(self, event: Event) -> None:
        with self._guarded():
            for instruction in self.machine.handle(event):
                self._obey(instruction)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """End the job with what goes wrong on this side; else a link's node would be blamed."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's error must say it
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        text, first = error_text(error), not self.machine.error
        self._log.error(text, exc_info=None if isinstance(error, AiosgdError) else error)
        if self.machine.phase in ENDS:
            return
        instructions = self.machine.handle(Reported(SUBMITTER, Report.FAILED, self._now()))
        if first:
            self._cause, self.machine.error = error, text
        for instruction in instructions:
            with self._guarded():
                self._obey(instruction)

    def _obey(self, instruction: Instruction) -> None:
        match instruction:
            case Enter(phase):
                self._entered(phase)
            case Tell(nodes, order):
                for node in nodes:
                    self._send(node, {"order": str(order), **self._payload(node, order)})
            case Verdict(nodes, epoch, stop):
                for node in nodes:
                    self._send(node, {"order": "verdict", "epoch": epoch, "stop": stop})

    def _entered(self, phase: Phase) -> None:
        self._log.info("%s%s", phase, f": {self.machine.error}" if self.machine.error else "")
        if phase is Phase.COLLECTING and self.estate is None:
            self._harvest.source = self.machine.source
        if phase is Phase.PREPARING:  # all nodes agree
            self.observer.noted(f"job {self.job_id}: {self.load.banner(self.nodes)}")
        if phase is Phase.RUNNING:
            self._attend()
        if phase is Phase.RUNNING and self._tracking is not None:
            self._tracking.begin(self.job_id, self.nodes)
        if phase is Phase.RUNNING and self.machine.unsaved:
            self._note_unsaved()
        if phase in ENDS and self.estate is None:
            self._note_skipped()
        if phase in ENDS or (self._leaves and phase is Phase.RUNNING):
            self._over.set()
        self.observer.entered(phase, self.job_id)

    def _pass_on(self, note: Note) -> None:
        """Show a node's note as one line, unless its last one is only seconds old."""
        if self._now() - self._noted.get(note.node, -NOTE_INTERVAL) < NOTE_INTERVAL:
            return
        self._noted[note.node] = self._now()
        line = "".join(c if c.isprintable() else " " for c in note.text[:NOTE_LENGTH])
        self._log.info("%s %s", node_name(note.node), line)
        self.observer.noted(f"{node_name(note.node)} {line}")

    def _note_skipped(self) -> None:
        """Say what was left out, node by node."""
        for node, part in sorted(self._harvest.collected.items()):
            if part.figures is not None and part.figures.skipped:
                count = part.figures.skipped
                text = f"{node_name(node)} skipped {count} blocks or results that were not finite"
                self._log.warning(text)
                self.observer.noted(text)

    def _note_unsaved(self) -> None:
        reasons = (f"{node_name(node)}: {why}" for node, why in self.machine.unsaved.items())
        text = f"the last checkpoint is not whole: {'; '.join(reasons)}"
        self._log.warning(text)
        self.observer.noted(text)

    def _send(self, node: int, content: dict[str, Any]) -> None:
        with contextlib.suppress(PeerLostError):  # the link's end is on its way as an event
            self._links[node].send([node], {"job_id": self.job_id, **content})

    def _reported(self, node: int, report: Report, content: Mapping[str, Any]) -> Reported:
        """Keep what a report brings."""
        if report is Report.VOTE:
            self._missing[node] = _fact(content, "missing", list[str])
            self._checkpoints[node] = _fact(content, "checkpoints", list[int])
        elif report in (Report.COLLECTED, Report.ABORTED) and self.estate is None:
            self._harvest.keep(node, content, whole=report is Report.COLLECTED)
            self._blame(node, check_value(content.get("stuck", ""), str, "stuck"))
        names = ("sent", "consumed") if report is Report.QUIET else ()
        sent, consumed = [_fact(content, name, int) for name in names] or (0, 0)
        reason = check_value(content.get("reason", ""), str, "reason")
        self._note(node, report, reason)
        return Reported(node, report, self._now(), reason, (sent, consumed))

    def _blame(self, node: int, stuck: str) -> None:
        """Add to why the job fails that a hook of another node than the one that said so hangs."""
        said = self.machine.error.startswith(f"{node_name(node)}:")
        if stuck and self._ending == "failed" and not said:
            self._log.error("%s: %s", node_name(node), stuck)
            self.machine.error = f"{self.machine.error}; {node_name(node)}: {stuck}"

    def _note(self, node: int, report: Report, reason: str) -> None:
        if report is Report.QUIET:  # in every round again
            if node in self._quiet:
                return
            self._quiet.add(node)
        words = f": {reason}" if reason else ""
        self._log.info("%s: %s %s%s", self.machine.phase, node_name(node), report, words)

    def _payload(self, node: int, order: Order) -> dict[str, Any]:
        if order is Order.CAN_COMMIT:
            return self._question(node)
        if order is Order.PREPARE:
            self._send_files(node)
            return self._assignment(node)
        if order is Order.COLLECT:
            return {"weights": node == self.machine.source and self.estate is None}
        if order is Order.ADOPT:
            return {"token": self._token}
        if order is Order.START and self._incarnations[node]:
            self._note_return(node)
        if order is Order.SAVE:
            return {"step": self.machine.paused_after}
        if order is Order.GO_ON:
            return {
                "step": self.machine.released.get(node, -1),
                "whole": self.machine.checkpoint,
            }
        if order is Order.ABORT:
            if node in self.machine.lost:
                return {"reason": "its return was broken off", "state": "failed"}
            return {"reason": self.machine.error, "state": self.machine.ending}
        return {}

    def _question(self, node: int) -> dict[str, Any]:
        return {
            "node": node,
            "sources": workload.named_code(self.request.job),
            "plugins": self._plugins,
            "files": self._files(),
            "resume": "" if self._incarnations[node] else self.request.job.resume,
            "incarnation": self._incarnations[node],
        }

    def _assignment(self, node: int) -> dict[str, Any]:
        hosts = [address.host for address in self.nodes.values()]
        return {
            "job": config.to_dict(self.request.job),
            "node": node,
            "addresses": [[peer, str(address)] for peer, address in self.nodes.items()],
            "nodes_on_host": hosts.count(self.nodes[node].host),
            "token": self._token,
            "sources": [[name, np.frombuffer(text, np.uint8)] for name, text in self.sources],
            "files": self._files(),
            "initial": self._initial,
            "resume": self._resume,
        } | (self._return(node) if self._incarnations[node] else {})

    def _note_return(self, node: int) -> None:
        text = f"{node_name(node)} is back"
        self._log.info(text)
        self.observer.noted(text)
        self._attend()
        self._harvest.lost[node] = f"{self._harvest.lost[node]}; it came back"

    def _return(self, node: int) -> dict[str, Any]:
        """What else a worker that is back has to know."""
        living = [step for other, step in self._steps.items() if other not in self.machine.lost]
        return {
            "initial": self._initial if self._newest is None else self._newest,
            "resume": None,
            "incarnation": self._incarnations[node],
            "absent": sorted(self.machine.lost - {node}),
            "first": min(living, default=0),
        }

    @functools.cached_property
    def _initial(self) -> Vector:
        return self.load.initial()

    @functools.cached_property
    def _resume(self) -> dict[str, Any] | None:
        """The job and the step that this one goes on from.

        Raises:
            ConfigError: there is no step that all nodes have a checkpoint of.
        """
        job_id = self.request.job.resume
        if not job_id:
            return None
        common = set.intersection(*map(set, self._checkpoints.values()))
        if not common:
            have = "; ".join(
                f"{node_name(node)} ({self.nodes[node]}) has {', '.join(map(str, steps)) or 'none'}"
                for node, steps in sorted(self._checkpoints.items())
            )
            raise ConfigError(f"no step of job {job_id} has a checkpoint on all nodes: {have}")
        text = f"goes on after step {max(common)} of job {job_id}"
        self._log.info(text)
        self.observer.noted(text)
        self._began = {"job_id": job_id, "step": max(common)}
        return self._began

    @functools.cached_property  # to look them up costs milliseconds, and each node is told
    def _plugins(self) -> list[list[str]]:
        return [
            [entry.kind, entry.name, entry.distribution, entry.version]
            for entry in workload.plugins_of(self.request.job)
        ]

    def _files(self) -> list[list[Any]]:
        return [[file.name, file.sha256, file.size] for file in self.files]

    def _send_files(self, node: int) -> None:
        """Send the data files that a node lacks, each once, straight from the page cache."""
        for file in self.files:
            if file.sha256 in self._missing.get(node, ()):
                data = np.memmap(file.path, dtype=np.uint8, mode="r")
                self._log.info("%s gets %s (%d bytes)", node_name(node), file.name, file.size)
                self._send(node, {"order": "file", "sha256": file.sha256, "data": data})

    # what is left

    def _write_job(self) -> None:
        """Write job.toml, and the code that it needs."""
        write_job(self.folder, self.job_id, self.load, self.nodes, self.sources)
        write_code(self.folder, self.request.job, self.sources)


def _may_pass(error: ClusterError) -> bool:
    """Tell whether a node may be reachable a moment later: a name that is unknown stays so."""
    cause = error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, socket.gaierror)


def _end_of(link: Link) -> asyncio.Future[None]:
    """Return what is done once a link that was closed is gone."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_closed(link: Link, error: Exception | None) -> None:
        if not gone.done():
            gone.set_result(None)

    link.on_closed = on_closed
    return gone


# What nodes say, checked -----------------------------------------------------------------------

_News = TypeVar("_News", Progress, Evaluation, Pause, Note)


def _news(kind: type[_News], node: int, facts: Mapping[str, Any], place: str) -> _News:
    news: _News = make_dataclass(kind, facts, place, f"{place} of a worker")
    if news.node != node:
        raise RemoteProtocolError(f"{place}.node is {news.node}; expected {node}")
    return news


def _fact(content: Mapping[str, Any], name: str, expected: Any) -> Any:
    if name not in content:
        raise RemoteProtocolError(f"{name} is missing")
    return check_value(content[name], expected, name)
