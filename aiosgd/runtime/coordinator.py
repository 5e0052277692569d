"""The submitter's I/O around runtime.job: links, orders, what comes back, the run folder."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

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
from aiosgd.plugins.kinds import TRACKERS
from aiosgd.plugins.registry import describe, make_params
from aiosgd.runtime import config, results, workload
from aiosgd.runtime.config import Address, JobConfig
from aiosgd.runtime.connection import Link
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
    Phase,
    Report,
    Reported,
    Tell,
    Tick,
    Verdict,
    node_name,
)
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.results import EVAL, TRAIN, Rows, Summary
from aiosgd.runtime.session import Evaluation, Progress
from aiosgd.runtime.workload import Workload

_STATES: Mapping[Phase, Literal["done", "failed", "cancelled"]] = {
    Phase.DONE: "done",
    Phase.CANCELLED: "cancelled",
}
# how often deadlines are looked at
TICK = 0.25
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, where.

    Attributes:
        job: the checked configuration.
        workers, servers: the nodes to choose from; the job uses the first ones.
        data_dir: this machine's folder for data.
        connect_timeout: how long to try to reach a node, in seconds.
    """

    job: JobConfig
    workers: Sequence[Address]
    servers: Sequence[Address] = ()
    data_dir: Path
    connect_timeout: float = 5.0


@dataclass
class _Collected:
    """What came back from one node."""

    train: Rows
    evaluations: Rows
    log: bytes
    weights: Vector | None
    figures: dict[str, Any]


@dataclass
class Outcome:
    """A job that was run: its folder and what is in it.

    Attributes:
        train, eval: the rows of train.csv and eval.csv.
        parameters: name -> array, in the model's order; model.safetensors has the same.
    """

    folder: Path
    summary: Summary
    train: np.recarray[Any, Any]
    eval: np.recarray[Any, Any]
    parameters: dict[str, Vector]

    @property
    def metrics(self) -> dict[str, float]:
        """The final `loss` and `accuracy` on the test set."""
        return self.summary.metrics


def choose_nodes(request: Request) -> dict[int, Address]:
    """Return node id -> address: the first workers, and servers only if the codec has a use.

    Raises:
        ConfigError: the job wants more workers than there are, or a server where none is.
    """
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
    """Return the source files of a job's FILE.py:CLASS codecs."""
    names = [name for name in (job.codec, job.server_codec) if name]
    return [
        (name, Path(name.rpartition(":")[0]).read_bytes())
        for name in dict.fromkeys(names)
        if workload.is_file_codec(name)
    ]


Loaded: TypeAlias = tuple[Workload, list[DataFile]]


def load_job(job: JobConfig, workers: int, data_dir: Path) -> Loaded:
    """Load and check everything that a job names; its data files are looked up only once.

    Raises:
        ConfigError, PluginError: see `workload.load`.
    """
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
        JobFailedError: the job started and failed.
    """
    nodes = choose_nodes(request)
    if loaded is None:
        workers = sum(node >= 0 for node in nodes)
        loaded = await asyncio.to_thread(load_job, request.job, workers, request.data_dir)
    return await Coordinator(request, observer, nodes, *loaded).run()


@dataclass
class Coordinator:
    """One job, from voting to its run folder."""

    request: Request
    observer: Observer
    nodes: dict[int, Address]
    load: Workload
    files: list[DataFile]
    _links: dict[int, Mesh] = field(default_factory=dict)
    _sockets: dict[int, Link] = field(default_factory=dict)
    _watches: list[asyncio.Future[None]] = field(default_factory=list)
    _collected: dict[int, _Collected] = field(default_factory=dict)
    _missing: dict[int, list[str]] = field(default_factory=dict)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _cancelled: bool = False

    def __post_init__(self) -> None:
        job, now = self.request.job, dt.datetime.now()
        name = job.title or Path(job.codec.rpartition(":")[2]).name
        self.job_id = results.new_job_id(now, name, secrets.token_hex(2))
        self.workers = sorted(node for node in self.nodes if node >= 0)
        self.servers = sorted((node for node in self.nodes if node < 0), reverse=True)
        self.machine = Job(self.workers, self.servers, job.target_accuracy)
        self._started = time.monotonic()
        self.initial = self.load.initial()
        self._token = secrets.token_hex(16)  # lets the nodes of this job know each other

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> Outcome:
        """Run the job; see `run_job`."""
        self.folder = results.create_folder(Path(self.request.job.output), self.job_id)
        self._log, close_log = _submit_log(self.folder)
        try:
            results.write_job(self.folder, self.request.job, self._versions())
            try:
                await self._drive()
            finally:
                outcome = await asyncio.to_thread(self._write)
            return self._judge(outcome)
        finally:
            close_log()
            await self._part_from_nodes()

    async def _drive(self) -> None:
        """Connect, then let the state machine say what to do until the job is over."""
        try:
            await self._connect()
            self._apply(Begin(self._now()))
            await self._wait()
        except asyncio.CancelledError:
            self._cancelled = True
            self._apply(Cancel(self._now()))
            await self._wait()
        except AiosgdError as error:
            self.machine.error, self.machine.phase = str(error), Phase.FAILED
            self._log.error(str(error))
            raise

    async def _wait(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._over.wait()
            self._apply(Tick(self._now()))

    def _judge(self, outcome: Outcome) -> Outcome:
        where = f"logs in {self.folder}"
        if self._cancelled:
            raise asyncio.CancelledError(f"job {self.job_id} was cancelled; {where}")
        if self.machine.phase is Phase.FAILED:
            if self.machine.refused:
                raise ClusterError(f"{self.machine.error}; {where}")
            raise JobFailedError(f"job {self.job_id} failed: {self.machine.error}; {where}")
        return outcome

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
                link = await introduce(address, hello, self.request.connect_timeout)
                break
            except ClusterError as error:
                if self._now() + pause > deadline or not _may_pass(error):
                    raise ClusterError(f"{node_name(node)}: {error}") from error
            await asyncio.sleep(pause)
            pause *= 2
        mesh = Mesh(SUBMITTER, self._deliver, self._lost, eager_credit=False)
        mesh.add(node, link)
        self._links[node], self._sockets[node] = mesh, link
        self._watches.append(asyncio.ensure_future(mesh.watch()))

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

    def _deliver(self, node: int, content: Any, size: int) -> None:
        self._links[node].consumed(node)
        try:
            self._take(node, content)
        except (KeyError, TypeError, ValueError) as error:
            text = f"{node_name(node)} sent a report that makes no sense: {describe(error)}"
            raise RemoteProtocolError(text) from error

    def _take(self, node: int, content: Any) -> None:
        match content:
            case {"report": str(report), "job_id": self.job_id}:
                self._reported(node, Report(report), content)
            case {"progress": dict(facts)}:
                self.observer.progressed(Progress(**facts))
            case {"evaluation": dict(facts)}:
                evaluation = Evaluation(**facts)
                self.observer.evaluated(evaluation)
                self._apply(Evaluated(node, evaluation.epoch, evaluation.accuracy))

    def _lost(self, node: int, error: Exception) -> None:
        self._apply(Lost(node, str(error), self._now()))

    # the state machine's shell

    def _apply(self, event: Event) -> None:
        for instruction in self.machine.handle(event):
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
        self.observer.entered(phase, self.job_id)
        if phase in ENDS:
            self._over.set()

    def _send(self, node: int, content: dict[str, Any]) -> None:
        with contextlib.suppress(PeerLostError):  # the link's end is on its way as an event
            self._links[node].send([node], {"job_id": self.job_id, **content})

    def _reported(self, node: int, report: Report, content: dict[str, Any]) -> None:
        if report is Report.VOTE:
            self._missing[node] = list(content["missing"])
        elif report is Report.COLLECTED:
            self._collected[node] = _unpack(content)
        elif report is Report.ABORTED:
            empty = Rows(TRAIN), Rows(EVAL)
            self._collected[node] = _Collected(*empty, bytes(content["log"]), None, {})
        reason = str(content.get("reason", ""))
        self._log.info("%s: %s %s", node_name(node), report, reason)
        totals = int(content.get("sent", 0)), int(content.get("consumed", 0))
        self._apply(Reported(node, report, self._now(), reason, totals))

    def _payload(self, node: int, order: Order) -> dict[str, Any]:
        if order is Order.CAN_COMMIT:
            return self._question(node)
        if order is Order.PREPARE:
            self._send_files(node)
            return self._assignment(node)
        if order is Order.COLLECT:
            return {"weights": node == 0}
        if order is Order.ABORT:
            return {"reason": self.machine.error}
        return {}

    def _question(self, node: int) -> dict[str, Any]:
        return {
            "node": node,
            "sources": [name for name, _ in file_sources(self.request.job)],
            "plugins": self._plugins(),
            "files": self._files(),
        }

    def _assignment(self, node: int) -> dict[str, Any]:
        hosts = [address.host for address in self.nodes.values()]
        return {
            "job": config.to_dict(self.request.job),
            "node": node,
            "addresses": [[peer, str(address)] for peer, address in self.nodes.items()],
            "nodes_on_host": hosts.count(self.nodes[node].host),
            "token": self._token,
            "sources": [
                [name, np.frombuffer(text, np.uint8)]
                for name, text in file_sources(self.request.job)
            ],
            "files": self._files(),
            "initial": self.initial,
        }

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

    def _versions(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "plugins": [f"{kind} {name}: {dist} {v}" for kind, name, dist, v in self._plugins()],
            "nodes": {str(node): str(address) for node, address in self.nodes.items()},
            "steps": self.load.steps,
        }

    def _write(self) -> Outcome:
        """Write everything that came back; runs in a thread."""
        shapes = self.load.model.shapes
        for node, part in sorted(self._collected.items()):
            results.write_node_log(self.folder, node, part.log.decode(errors="replace"))
        train = _stack(TRAIN, [part.train for part in self._in_order()])
        evaluations = _stack(EVAL, [part.evaluations for part in self._in_order()])
        for name in self.request.job.trackers:
            kind = TRACKERS.load(name)
            tracker = kind(make_params(kind, {}, "tracker"), self.folder)
            tracker.write("train", train)
            tracker.write("eval", evaluations)
        weights = self._collected[0].weights if 0 in self._collected else None
        parameters: dict[str, Vector] = {}
        if weights is not None:
            results.write_model(self.folder, weights, shapes)
            parameters = results.named_parameters(weights, shapes)
        summary = self._summarise(train, evaluations)
        results.write_summary(self.folder, summary)
        return Outcome(
            folder=self.folder,
            summary=summary,
            train=train,
            eval=evaluations,
            parameters=parameters,
        )

    def _in_order(self) -> list[_Collected]:
        return [self._collected[node] for node in self.workers if node in self._collected]

    def _summarise(self, train: Any, evaluations: Any) -> Summary:
        figures = {node: part.figures for node, part in self._collected.items() if part.figures}
        samples = sum(one["samples"] for one in figures.values())
        train_s = max((one["train_s"] for one in figures.values()), default=0.0)
        phase = self.machine.phase
        return Summary(
            job_id=self.job_id,
            state=_STATES.get(phase, "failed"),
            error=self.machine.error or None,
            metrics=_final(evaluations, 0),
            nodes=len(self.nodes),
            steps=int(train.step.max()) + 1 if len(train) else 0,
            epochs=int(train.epoch.max()) + 1 if len(train) else 0,
            samples=samples,
            wall_s=time.monotonic() - self._started,
            train_s=train_s,
            samples_per_s=samples / train_s if train_s else 0.0,
            bytes_sent=sum(one["bytes_sent"] for one in figures.values()),
            bytes_received=sum(one["bytes_received"] for one in figures.values()),
            per_node={
                node: {"address": str(self.nodes[node]), **one, **_final(evaluations, node)}
                for node, one in figures.items()
            },
        )


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


def _unpack(content: Mapping[str, Any]) -> _Collected:
    weights = content["weights"]
    return _Collected(
        Rows.from_columns(TRAIN, content["train"]),
        Rows.from_columns(EVAL, content["evaluations"]),
        bytes(content["log"]),
        None if weights is None else np.asarray(weights, np.float32),
        dict(content["figures"]),
    )


def _stack(dtype: Any, parts: Sequence[Rows]) -> Any:
    arrays = [part.array() for part in parts]
    joined = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    return joined.view(np.recarray)


def _final(evaluations: Any, node: int) -> dict[str, float]:
    own = evaluations[evaluations.node == node]
    if not len(own):
        return {}
    return {"loss": float(own.loss[-1]), "accuracy": float(own.accuracy[-1])}


def _submit_log(folder: Path) -> tuple[logging.Logger, Any]:
    handler = logging.FileHandler(folder / "submit.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.Logger("aiosgd.submit")
    log.addHandler(handler)
    return log, handler.close
