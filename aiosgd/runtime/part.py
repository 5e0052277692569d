"""A node's part in one job: from prepare to release."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import logging
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import threadpoolctl

from aiosgd.errors import AiosgdError, ClusterError, ConfigError, PluginNotFoundError
from aiosgd.plugins.datasets.base import sha256 as sha256_of
from aiosgd.plugins.kinds import KINDS
from aiosgd.plugins.registry import describe, error_text
from aiosgd.plugins.trackers import Csv
from aiosgd.runtime import archive, checkpoint, config, results, workload
from aiosgd.runtime.archive import CHECKPOINTS, END
from aiosgd.runtime.config import Address, JobConfig
from aiosgd.runtime.connection import Link
from aiosgd.runtime.coordinator import Estate
from aiosgd.runtime.executor import Executor
from aiosgd.runtime.frame import MAX_BODY, Limits
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.job import node_name
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.pool import Pool
from aiosgd.runtime.record import Recorder
from aiosgd.runtime.security import OPEN, Security
from aiosgd.runtime.session import Evaluation, News, Place, Progress, Session
from aiosgd.runtime.watchdog import Watchdog
from aiosgd.runtime.workload import Workload, file_code, group_size, named_code

SHA256 = re.compile(r"[0-9a-f]{64}")
# bytes that a message may have however small the model is
SMALL_MODEL = 64 << 20
# rows of a table at a time for whoever looks on: packed within a millisecond
ROWS = 4096
LINKS = ("peer", "messages_sent", "bytes_sent", "messages_received", "bytes_received")
# how long a codec's hook may take to notice that it was cancelled
LET_GO = 2.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a node was started.

    Attributes:
        security: what all its links are protected with.
        unix: whether links within this machine may go over unix sockets.
        metrics: where `GET /metrics` is answered; None is nowhere.
        clock: the time in seconds, as `Place` takes it.
    """

    host: str = "127.0.0.1"
    port: int = 0
    run_dir: Path
    data_dir: Path
    allow_code: bool = False
    security: Security = OPEN
    unix: bool = True
    metrics: Address | None = None
    clock: Callable[[], float] = time.perf_counter


@dataclass
class Part:
    """This node's part in one job, from prepare to release.

    Args:
        settings: how the node was started.
        job_id: the job.
        request: the content of the order to prepare.
        spawn: runs a coroutine as a child of the node.
        tell: passes the session's news to the submitter.
        failed: tells the submitter why the part cannot go on.

    Attributes:
        failure: why the part cannot go on; empty while it can.
        progress: the newest of this worker.
        heard: when it came, on the monotonic clock.
        saved: the step of the newest checkpoint.
        began: when it took part, in seconds since 1970.
    """

    settings: Settings
    job_id: str
    request: Mapping[str, Any]
    spawn: Callable[[Any], asyncio.Task[Any]]
    tell: Callable[[News], None]
    failed: Callable[[str], None]
    failure: str = ""
    session: Session | None = None
    mesh: Mesh | None = None
    progress: Progress | None = None
    heard: float = field(default_factory=time.monotonic)
    saved: int | None = None
    began: float = field(default_factory=time.time)
    _log: logging.Logger = field(init=False)
    _handler: logging.Handler = field(init=False)
    _executor: Executor | None = None
    _watchdog: Watchdog | None = None
    _run: asyncio.Task[None] | None = None
    _joined: asyncio.Event = field(default_factory=asyncio.Event)
    _blas: Any = None
    _former_threads: int = 0
    _recorder: Recorder | None = None
    _load: Workload | None = None
    _over: bool = False
    _lost_workers: set[int] = field(default_factory=set)
    _whole: int = -1
    _evaluated: Evaluation | None = None
    _saving: asyncio.Future[Any] | None = None
    _kept: bool = False
    _stuck: str = ""

    def __post_init__(self) -> None:
        self.node = int(self.request["node"])
        self.addresses = {
            int(node): Address.parse(text, f"address of node {node}")
            for node, text in self.request["addresses"]
        }
        self.token = str(self.request["token"])
        self.job = config.from_dict(self.request["job"])
        self.absent = {int(node) for node in self.request.get("absent", ())}
        self.folder = job_folder(self.settings, self.job_id, self.node)
        if self.request.get("incarnation") and self.folder.exists():
            places = (Path(f"{self.folder}-before-{i}") for i in itertools.count(1))
            self.folder.rename(next(place for place in places if not place.exists()))
        self.folder.mkdir(parents=True, exist_ok=False)
        self._log, self._handler = results.open_log(self.folder / "node.log")

    # the orders

    async def prepare(self) -> None:
        """Load the job's plugins and data, and make the session."""
        check_code(self.job, self.request["sources"], self.settings)
        sources = keep_sources(self.folder, self.request["sources"], self._log.info)
        paths = {
            name: file_path(self.settings.data_dir, sha256)
            for name, sha256, _ in self.request["files"]
        }
        await asyncio.to_thread(check_files, paths)
        load = await asyncio.to_thread(
            workload.load,
            self.job,
            len(self.workers),
            self.settings.data_dir,
            paths=paths,  # a job reads no other files of this machine
            sources=sources,
        )
        self._load = load
        await asyncio.to_thread(self._keep_job, load, sources)
        threads = self._limit_blas()
        self._former_threads = load.model.limit_threads(threads)
        self._recorder = Recorder(threads) if self.job.record else None
        slow = self.job.compute.slow.get(str(self.node), 1.0)
        self._executor = Executor(self.job.compute.policy, slow, self._log.info)
        memory = Pool().take
        self.mesh = Mesh(
            self.node,
            self._deliver,
            self._lost,
            eager_credit=self.job.mode == "async",
            memory=memory,
            limits=Limits(max_body=largest_message(load)),
            bears_loss=self.job.bears_loss,
        )
        place = Place(
            node=self.node,
            workers=self.workers,
            servers=self.servers,
            transport=self.mesh,
            executor=self._executor,
            report=self._report,
            log=self._log.info,
            clock=self.settings.clock,
            memory=memory,
            journal=self._recorder,
            pauses=True,
        )
        self.session = Session(place, load, np.array(self.request["initial"], np.float32))
        if earlier := self.request.get("resume"):
            await asyncio.to_thread(self._resume, str(earlier["job_id"]), int(earlier["step"]))
        if self.request.get("incarnation"):
            self.session.begin_at(int(self.request["first"]))
            for worker in self.absent:
                self.session.lose(worker)
        self._log.info("prepared as %s of job %s", node_name(self.node), self.job_id)

    def _keep_job(self, load: Workload, sources: Mapping[str, Path]) -> None:
        texts = [(name, path.read_bytes()) for name, path in sources.items()]
        try:
            archive.write_job(self.folder, self.job_id, load, self.addresses, texts)
        except AiosgdError as error:
            self._log.warning("what was run is not written: %s", error)

    def _report(self, news: News) -> None:
        """Pass news on to whoever leads the job now."""
        if isinstance(news, Progress):
            self.progress, self.heard = news, time.monotonic()
        elif isinstance(news, Evaluation):
            self._evaluated = news
        self.tell(news)

    def estate(self) -> Estate:
        """Return what whoever leads the job from now on has to know."""
        assert self._load is not None
        lost = self.absent | self._lost_workers
        living = {node: place for node, place in self.addresses.items() if node not in lost}
        return Estate(job_id=self.job_id, load=self._load, nodes=living, token=self.token)

    async def link(self) -> None:
        """Connect to the nodes with lower ids; the others connect to us.

        A worker that is back connects to all that are there: they wait for nobody.
        """
        is_back = bool(self.request.get("incarnation"))
        async with asyncio.TaskGroup() as tasks:
            for peer in self.addresses.keys() - self.absent:
                if peer < self.node or (is_back and peer != self.node):
                    tasks.create_task(self._dial(peer))
        self._count_links()
        await self._joined.wait()

    def start(self) -> None:
        """Begin to train."""
        assert self.session is not None
        self._log.info("started")
        self._watchdog = Watchdog(self.folder / "node.log", self._warn)
        self._watchdog.start()
        self._run = self.spawn(self._supervise(self.session))

    async def trained(self) -> None:
        """Wait until a worker has taken its steps; a server is always ready."""
        assert self.session is not None
        if self.node >= 0:
            await self.session.trained()

    async def quiet(self) -> dict[str, int]:
        """Wait until all that we sent was handled; return our totals of messages."""
        assert self.session is not None
        sent, consumed = await self.session.quiet()
        return {"sent": sent, "consumed": consumed}

    async def save(self, step: int) -> str:
        """Write a checkpoint of the step after which all nodes pause.

        Returns:
            Why there is none; empty if there is.
        """
        session = self.session
        assert session is not None
        if self.node >= 0 and session.paused_after != step:
            return f"worker {self.node} does not wait after step {step}"
        state, folder = session.snapshot(step), self.folder / CHECKPOINTS
        writing = asyncio.to_thread(checkpoint.write, folder, state, session.shapes)
        self._saving = asyncio.ensure_future(writing)
        try:
            await asyncio.shield(self._saving)
        except OSError as error:
            reason = f"{self.folder / CHECKPOINTS}: {describe(error)}"
            self._log.warning("no checkpoint of step %d: %s", step, reason)
            return reason
        self.saved = step
        self._log.info("checkpoint of step %d", step)
        return ""

    def go_on(self, step: int, whole: int | None) -> None:
        """Go on after a pause.

        Args:
            step: the step that it followed.
            whole: the step of which all nodes have a checkpoint. It and the one before it are kept:
                another node may not hear of this one any more.
        """
        if self.session is not None:
            self.session.go_on(step)
        if whole is not None and whole != self._whole:
            before, self._whole = self._whole, whole
            folder = self.folder / CHECKPOINTS
            self.spawn(asyncio.to_thread(checkpoint.prune, folder, before))

    def tell_again(self) -> None:
        """Tell a new leader what may have been lost on the way: a worker may wait for its verdict."""
        if self._evaluated is not None:
            self.tell(self._evaluated)

    async def renounce(self) -> None:
        """Leave off a checkpoint that the submitter's loss has interrupted, and go on.

        Some nodes may have written it and others not, or while others had gone on already: nobody
        knows any more, so it goes.
        """
        if self._saving is not None:
            await asyncio.wait([self._saving])
        await asyncio.to_thread(checkpoint.drop, self.folder / CHECKPOINTS, self._whole)
        if self.session is not None:
            self.session.go_on()

    def _resume(self, job_id: str, step: int) -> None:
        """Take over what this node remembers of an earlier job."""
        assert self.session is not None
        folder = job_folder(self.settings, job_id, self.node) / CHECKPOINTS
        self.session.restore(checkpoint.read(folder, step, self.session.shapes))
        self._log.info("goes on after step %d of job %s", step, job_id)

    async def collect(self, *, weights: bool) -> dict[str, Any]:
        """Finish the session; return (and keep) all that the run leaves on this node."""
        session = self.session
        assert session is not None
        await session.conclude()
        self._over = True
        session.stop()
        if session.late:
            self._log.warning("%d messages came too late for their step", session.late)
        self._log.info("finished: %d samples in %.3f s", session.samples, session.train_s)
        self._log_links()
        await asyncio.to_thread(self._keep, session)
        return self.facts(weights=weights)

    def _log_links(self) -> None:
        """Write a line about each link to another node."""
        assert self.mesh is not None
        table = self.mesh.statistics()
        for row in zip(*table.values(), strict=True):
            link = dict(zip(table, row, strict=True))
            self._log.info(
                "link to %s over %s: sent %d messages, %d bytes; received %d, %d bytes; "
                "longest queue %d bytes; round trip %.3f ms",
                node_name(link["peer"]),
                link["over"],
                link["messages_sent"],
                link["bytes_sent"],
                link["messages_received"],
                link["bytes_received"],
                link["queue_peak"],
                1e3 * link["round_trip_s"],
            )

    def facts(self, *, weights: bool) -> dict[str, Any]:
        """Return what there is of the run on this node: its log at least.

        Args:
            weights: whether to add the weights.
        """
        session = self.session
        if session is None:
            return {"log": np.frombuffer(self.log_bytes(), np.uint8)}
        return {
            **session.facts(weights=weights),
            "log": np.frombuffer(self.log_bytes(), np.uint8),
            "record": self._recorder.rows.columns() if self._recorder else None,
            "stuck": self._stuck,
        }

    def rows(self, train: int, evaluations: int) -> dict[str, Any]:
        """Return what training has left so far, for whoever looks on.

        Args:
            train, evaluations: the first row of each table, of which there are `ROWS` at most.

        Returns:
            As `facts`, and `links`: a row per living peer, its id, and messages and bytes sent to
            and received from it; before the session there is nothing but that.
        """
        table = self.mesh.statistics() if self.mesh else {}
        links = np.array([table.get(name, []) for name in LINKS], np.int64).T
        rows = self.session.rows(train, evaluations, ROWS) if self.session else {}
        return {**rows, "links": np.ascontiguousarray(links)}

    def verdict(self, epoch: int, stop: bool) -> None:
        """Pass on whether training goes on after an epoch."""
        if self.session is not None:
            self.session.verdict(epoch, stop)

    async def leave(self, reason: str, state: str = "failed") -> None:
        """End the part, whatever it is at.

        Args:
            reason: why.
            state: what became of the job, as far as this node knows.
        """
        self._over = True
        self._log.info("left: %s", reason)
        try:
            if self._run is not None:
                self._note_stuck()
                self._run.cancel()
                _, stuck = await asyncio.wait([self._run], timeout=LET_GO)
                if stuck:
                    self._log.error("a hook of the codec does not let itself be cancelled")
            if self.session is not None and len(self.session.train):
                await asyncio.to_thread(self._keep, self.session)
            self._note_end(state, reason)
        finally:
            self._close()

    def _note_stuck(self) -> None:
        """Note which hook is under way for very long, while it can be seen where."""
        assert self.session is not None
        self._stuck = self.session.stuck()
        if self._stuck:
            self._log.error(self._stuck)

    def _note_end(self, state: str, reason: str) -> None:
        """Write what became of the job, for who asks later."""
        facts = self.session.figures() if self.session else None
        end = {"job_id": self.job_id, "node": self.node, "state": state, "reason": reason}
        end["shapes"] = list(self.session.shapes.items()) if self.session else None
        end |= {"began": self.began, "ended": time.time(), "figures": facts}
        try:
            results.write_json(self.folder / END, end)
        except AiosgdError as error:
            self._log.warning("what became of the job is not written: %s", error)

    def _warn(self, text: str) -> None:
        """Warn in the job's log and in the node's."""
        self._log.warning(text)
        logging.getLogger("aiosgd.node").warning("job %s: %s", self.job_id, text)

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.mesh is not None:
            self.mesh.close()
        if self._executor is not None:
            self._executor.close()
        if self._blas is not None:
            self._blas.restore_original_limits()
        if self._load is not None and self._former_threads:
            self._load.model.limit_threads(self._former_threads)
        with contextlib.suppress(OSError):  # a full disk
            self._handler.close()

    # links of the mesh

    @property
    def workers(self) -> tuple[int, ...]:
        """Ids of all workers, ascending."""
        return tuple(sorted(node for node in self.addresses if node >= 0))

    @property
    def servers(self) -> tuple[int, ...]:
        """Ids of all servers, -1 first."""
        return tuple(sorted((node for node in self.addresses if node < 0), reverse=True))

    def knows(self, hello: Mapping[str, Any]) -> bool:
        """Tell whether a link's HELLO is that of a node of this job."""
        token, peer = hello.get("token"), hello.get("node")
        return (
            hello.get("job_id") == self.job_id
            and isinstance(token, str)
            and hmac.compare_digest(token.encode(), self.token.encode())
            and type(peer) is int
            and peer in self.addresses
            and peer != self.node
            and self.mesh is not None
            and peer not in self.mesh.peers
            and (self._run is None or (self.session is not None and self.session.has_left(peer)))
        )

    def join(self, peer: int, link: Link) -> None:
        """Take a link to another node of the job."""
        assert self.mesh is not None
        self.mesh.add(peer, link)
        self._log.info("linked to %s over %s", node_name(peer), _road(link))
        if self._run is not None and self.session is not None:
            self._lost_workers.discard(peer)
            self.absent.discard(peer)
            self.session.regain(peer)
        self._count_links()

    def _count_links(self) -> None:
        others = self.addresses.keys() - {self.node} - self.absent
        if self.mesh is not None and others <= set(self.mesh.peers):
            self._joined.set()

    async def _dial(self, peer: int) -> None:
        hello = greeting(role="peer", job_id=self.job_id, node=self.node, token=self.token)
        try:
            link = await introduce(
                self.addresses[peer],
                hello,
                security=self.settings.security,
                unix=self.settings.unix and self.job.wire.unix,
            )
            self.join(peer, link)
        except ClusterError as error:
            raise ClusterError(f"link to {node_name(peer)}: {error}") from error

    def _deliver(self, sender: int, content: Any, size: int) -> None:
        assert self.session is not None
        self.session.deliver(sender, content)

    def _lost(self, peer: int, error: Exception) -> None:
        if self._over:
            return
        if peer >= 0 and self.session is not None and self.job.bears_loss:
            self._log.warning("%s lost: %s; going on without it", node_name(peer), error)
            self._lost_workers.add(peer)
            self.session.lose(peer)
        else:
            self._fail(f"{node_name(peer)} lost: {error}")

    # the session as a task

    async def _supervise(self, session: Session) -> None:
        with contextlib.suppress(Exception):  # _broke has heard of it
            await session.run(self._broke)

    def _broke(self, error: Exception) -> None:
        first = first_error(error)
        self._log.error("".join(traceback.format_exception(first)))
        self._fail(error_text(first))

    def _fail(self, reason: str) -> None:
        self._log.error(reason)
        self.failure = self.failure or reason
        self.failed(reason)

    def _limit_blas(self) -> int:
        """Share the host's cores among its nodes: BLAS threads that compete slow all down.

        Returns:
            How many threads this node has.
        """
        cores = len(os.sched_getaffinity(0))
        threads = self.job.compute.threads or max(1, cores // int(self.request["nodes_on_host"]))
        self._blas = threadpoolctl.threadpool_limits(threads, user_api="blas")
        self._log.info("%d BLAS threads", threads)
        return threads

    def _keep(self, session: Session) -> None:
        """Write this node's own copy, in case the submitter is gone; once."""
        if self._kept:
            return
        self._kept = True
        try:
            self._write_copy(session)
        except (AiosgdError, OSError) as error:  # the submitter gets the rows all the same
            self._log.warning("this node's own copy of the run is not complete: %s", error)

    def _write_copy(self, session: Session) -> None:
        table = Csv(Csv.Params(), self.folder)
        table.write("train", session.train.array())
        table.write("eval", session.evaluations.array())
        archive.write_sketches(self.folder, session.sketches)
        if self._recorder is not None:
            results.write_record(self.folder, self._recorder.rows)
        if session.weights is not None:
            state = session.model_state
            results.write_model(self.folder, session.weights, session.shapes, state)

    def log_bytes(self) -> bytes:
        """Return the node's log of this job so far."""
        with contextlib.suppress(OSError):
            self._handler.flush()
            return (self.folder / "node.log").read_bytes()
        return b""


def largest_message(load: Workload) -> int:
    """Return the bytes that a message of a job may have: twice all blocks, so any sensible one."""
    model = 4 * sum(group_size(group) for group in load.groups)
    return min(MAX_BODY, max(SMALL_MODEL, 2 * (load.block_count + 1) * model))


def first_error(error: BaseException) -> BaseException:
    """Return the first deliberate error of an exception group, else the first error."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(inner) for inner in error.exceptions]
    deliberate = [leaf for leaf in leaves if isinstance(leaf, AiosgdError)]
    return (deliberate or leaves)[0]


def _road(link: Link) -> str:
    """Return what a link goes over, as the log says it."""
    return "a unix socket" if link.over == "unix" else f"{link.over.upper()} {link.address}"


# What a node checks and keeps ----------------------------------------------------------------


def job_folder(settings: Settings, job_id: str, node: int) -> Path:
    """Return this node's folder of a job; the id is checked, for it comes from a peer."""
    return settings.run_dir / results.check_job_id(job_id) / "nodes" / str(int(node))


def file_path(data_dir: Path, sha256: object) -> Path:
    """Return where a node keeps a data file: by content, never by a name from a peer."""
    if not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise ConfigError(f"{sha256!r} is no sha256")
    return data_dir / "sha256" / sha256


def store_file(data_dir: Path, sha256: object, data: np.ndarray[Any, Any]) -> None:
    """Keep a data file after checking what it is."""
    path = file_path(data_dir, sha256)
    digest = hashlib.sha256(data.data).hexdigest()
    if digest != sha256:
        raise ConfigError(f"a data file's sha256 is {digest}; the submitter said {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_bytes(data.data)
        temporary.rename(path)


def check_files(paths: Mapping[str, Path]) -> None:
    """Check that kept data files are what their names say; one that is not is removed.

    Raises:
        ConfigError: a file was damaged since it was kept; the next job brings it again.
    """
    for name, path in paths.items():
        if sha256_of(path) != path.name:
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"the kept copy of data file {name} was damaged and is removed; submit again: "
                "the file is then sent again"
            )


def check_code(job: JobConfig, sources: Sequence[Sequence[Any]], settings: Settings) -> None:
    """Check that a job names and brings code only where it may, and just the code that it names.

    Raises:
        ClusterError: the node does not take code.
        ConfigError: a file is named that the job does not bring, or the other way round.
    """
    files = set(file_code(job))
    brought = {str(name) for name, _ in sources}
    if (found := brought.union(named_code(job))) and not settings.allow_code:
        _refuse_code(sorted(found))
    if files != brought:
        raise ConfigError(f"the job names the files {sorted(files)}, but brings {sorted(brought)}")


def _refuse_code(names: Iterable[object]) -> NoReturn:
    raise ClusterError(
        f"{', '.join(map(str, names))} is the job's own code, which this node does not take; "
        "start it with --allow-code, or install the code as a plugin"
    )


def keep_sources(
    folder: Path, sources: Sequence[Sequence[Any]], log: Callable[[str], None]
) -> dict[str, Path]:
    """Write the source files that came with a job into its folder; return where each is."""
    kept = {}
    for i, (name, text) in enumerate(sources):
        source = np.asarray(text, np.uint8).tobytes()
        path = folder / f"codec_{i}.py"
        path.write_bytes(source)
        log(f"code from the submitter: {name}, sha256 {hashlib.sha256(source).hexdigest()}")
        kept[str(name)] = path
    return kept


def check_request(request: Mapping[str, Any], settings: Settings) -> list[str]:
    """Check whether this node can take the job; return the sha256 of data files it lacks.

    Raises:
        AiosgdError: the node votes no; the message says why.
    """
    folder = job_folder(settings, str(request["job_id"]), int(request["node"]))
    if folder.exists() and not request.get("incarnation"):
        raise ConfigError(f"job {request['job_id']} was here before; a job id is never reused")
    if request["sources"] and not settings.allow_code:
        _refuse_code(request["sources"])
    for kind, name, distribution, version in request["plugins"]:
        try:
            entry = KINDS[kind].entry(name)
        except PluginNotFoundError as error:
            raise ClusterError(f"{error} there; install it and restart the node") from error
        if (entry.distribution, entry.version) != (distribution, version):
            raise ClusterError(
                f"{kind} {name!r} is from {entry.distribution} {entry.version} here, from "
                f"{distribution} {version} at the submitter; install the same version on both"
            )
    return [
        str(sha256)
        for _, sha256, size in request["files"]
        if not _has_file(file_path(settings.data_dir, sha256), int(size))
    ]


def checkpoints(request: Mapping[str, Any], settings: Settings) -> list[int]:
    """Return the steps of the checkpoints that this node has of the job to resume, if any is."""
    if not request.get("resume"):
        return []
    folder = job_folder(settings, str(request["resume"]), int(request["node"]))
    return checkpoint.steps(folder / CHECKPOINTS)


def _has_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
