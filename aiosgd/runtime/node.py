"""A node: listens, takes one job at a time, and runs its session.

A submitter talks to a node over one link: orders go in, reports come out (runtime.job says which
when). The nodes of a job talk to each other over links of their own, the mesh of the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from aiosgd import __version__
from aiosgd.errors import AiosgdError, ClusterError, ConfigError, RemoteProtocolError
from aiosgd.plugins.kinds import KINDS
from aiosgd.plugins.registry import describe
from aiosgd.runtime import config, results, workload
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link, Mesh, connect, listen
from aiosgd.runtime.executor import Executor
from aiosgd.runtime.frame import Kind, encode
from aiosgd.runtime.job import Member, Order, Report, Seat, node_name
from aiosgd.runtime.session import Evaluation, Place, Progress, Session

WIRE_VERSION = 1
# the submitter's id on its links; no node has it
SUBMITTER = 1 << 30
# a link that has not said who it is after this long is closed
HELLO_TIMEOUT = 5.0
# links that have not said who they are yet
PENDING_LIMIT = 64

JOB_ID = re.compile(r"\d{8}-\d{6}-[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}-[0-9a-f]{4}")
SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger("aiosgd.node")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a node was started."""

    host: str = "127.0.0.1"
    port: int = 0
    run_dir: Path
    data_dir: Path
    allow_code: bool = False


class Node:
    """One listening process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.member = Member()
        self.part: Part | None = None
        self._tasks = asyncio.TaskGroup()
        self._controls: set[Control] = set()
        self._pending: set[Link] = set()

    async def serve(self, started: Callable[[Address], None]) -> None:
        """Listen until cancelled.

        Args:
            started: told the address as soon as the node listens.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        server = await listen(self.settings.host, self.settings.port, self._accept)
        port = server.sockets[0].getsockname()[1]
        try:
            async with self._tasks:
                started(Address(self.settings.host, port))
                while True:
                    await asyncio.sleep(1)
                    self._tick()
        finally:
            server.close()
            if self.part is not None:
                await self.part.leave("the node was stopped")
            for control in self._controls:
                control.mesh.close()

    def _tick(self) -> None:
        for control in self._controls:
            if control.leads:
                self.member.heard = control.link.last_heard
        if self.member.abandoned(self.now()):
            self.spawn(self.leave("nothing was heard from the submitter"))

    def now(self) -> float:
        """Return the monotonic time that decides everything here."""
        return asyncio.get_running_loop().time()

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine as a child of the node."""
        return self._tasks.create_task(work)

    async def leave(self, reason: str) -> None:
        """Give the seat back."""
        part, self.part = self.part, None
        self.member.leave()
        if part is not None:
            await part.leave(reason)

    # links that come in

    def _accept(self) -> Link:
        link = Link(self._hello, self._unknown_closed)
        if len(self._pending) >= PENDING_LIMIT:
            asyncio.get_running_loop().call_soon(link.abort, "too many links")
            return link
        self._pending.add(link)
        asyncio.get_running_loop().call_later(HELLO_TIMEOUT, self._expire, link)
        return link

    def _expire(self, link: Link) -> None:
        if link in self._pending:
            self._pending.discard(link)
            link.abort("it did not say who it is")

    def _unknown_closed(self, link: Link, error: Exception | None) -> None:
        self._pending.discard(link)
        if error is not None:
            logger.warning("closed a link that had not said who it is: %s", error)

    def _hello(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        self._pending.discard(link)
        try:
            if kind is not Kind.HELLO or not isinstance(content, dict):
                raise RemoteProtocolError("the first frame is no HELLO")
            if content.get("wire") != WIRE_VERSION:
                raise RemoteProtocolError(
                    f"wire version {content.get('wire')!r}; this node speaks {WIRE_VERSION}"
                )
            self._introduce(link, content)
        except RemoteProtocolError as error:
            logger.warning("refused a link: %s", error)
            link.send(encode({"error": str(error)}, Kind.HELLO))
            link.close()

    def _introduce(self, link: Link, hello: Mapping[str, Any]) -> None:
        if hello.get("role") == "submitter":
            link.send(encode({"wire": WIRE_VERSION, "version": __version__}, Kind.HELLO))
            control = Control(self, link)
            self._controls.add(control)
            self.spawn(control.watch())
        elif self.part is not None and self.part.knows(hello):
            link.send(encode({"wire": WIRE_VERSION, "version": __version__}, Kind.HELLO))
            self.part.join(hello["node"], link)
        else:
            raise RemoteProtocolError("it is no node of this node's job")

    def forget(self, control: Control) -> None:
        """Drop a submitter's link, and the job that it leads."""
        self._controls.discard(control)
        if control.leads:
            self.spawn(self.leave("the submitter is gone"))


class Control:
    """The link to one submitter: follows its orders and reports back."""

    def __init__(self, node: Node, link: Link) -> None:
        self.node = node
        self.link = link
        self.leads = False
        self._peer_closed = asyncio.Event()
        self._work: asyncio.Task[Any] | None = None
        self.mesh = Mesh(0, self._deliver, self._lost, eager_credit=False)
        self.mesh.add(SUBMITTER, link)

    async def watch(self) -> None:
        """Keep the link alive until it closes."""
        watching = asyncio.ensure_future(self.mesh.watch())
        try:
            await self._peer_closed.wait()
        finally:
            watching.cancel()
            self.mesh.close()
            self.node.forget(self)

    def _lost(self, peer: int, error: Exception) -> None:
        self._peer_closed.set()

    def report(self, report: Report, job_id: str, **facts: Any) -> None:
        """Tell the submitter; a submitter that is gone is told nothing."""
        if not self._peer_closed.is_set():
            self.mesh.send([SUBMITTER], {"report": str(report), "job_id": job_id, **facts})

    def tell(self, news: Progress | Evaluation) -> None:
        """Pass a session's news on."""
        if not self._peer_closed.is_set():
            self.mesh.send([SUBMITTER], {type(news).__name__.lower(): asdict(news)})

    def _deliver(self, sender: int, content: Any, size: int) -> None:
        self.mesh.consumed(sender)
        match content:
            case {"order": str(order), "job_id": str(job_id)}:
                self._take(order, job_id, content)
            case _:
                self.link.abort("a submitter sent something that is no order")

    def _take(self, order: str, job_id: str, content: dict[str, Any]) -> None:
        mine = self.leads and job_id == self.node.member.job_id
        if order == "verdict":
            if mine and self.node.part is not None:
                self.node.part.verdict(int(content["epoch"]), bool(content["stop"]))
        elif order == "file":
            self._store(content, job_id)
        elif order in (Order.ABORT, Order.RELEASE):
            self.node.spawn(self._leave(Order(order), job_id, content, mine=mine))
        elif order in list(Order):
            self._work = self.node.spawn(self._follow(Order(order), job_id, content))
        else:
            self.report(Report.REFUSED, job_id, reason=f"unknown order {order!r}")

    def _store(self, content: dict[str, Any], job_id: str) -> None:
        try:
            store_file(self.node.settings.data_dir, content["sha256"], content["data"])
        except (AiosgdError, OSError) as error:
            self.report(Report.REFUSED, job_id, reason=f"cannot keep a data file: {error}")

    async def _leave(
        self, order: Order, job_id: str, content: dict[str, Any], *, mine: bool
    ) -> None:
        log = b""
        if mine:
            self.leads = False
            part = self.node.part
            if self._work is not None:
                self._work.cancel()
            await self.node.leave(str(content.get("reason", "the job is done")))
            log = part.log_bytes() if part is not None else b""
        if order is Order.ABORT:
            self.report(Report.ABORTED, job_id, log=np.frombuffer(log, np.uint8))

    async def _follow(self, order: Order, job_id: str, content: dict[str, Any]) -> None:
        member = self.node.member
        if reason := member.refusal(job_id, order) or self._stranger(order):
            self.report(Report.REFUSED, job_id, reason=reason)
            return
        member.follow(job_id, order, self.node.now(), time.strftime("%H:%M:%S"))
        try:
            await self._carry_out(order, job_id, content)
        except (AiosgdError, OSError) as error:
            await self._refuse(order, job_id, error)
        except Exception as error:
            logger.exception("order %s failed", order)
            await self._refuse(order, job_id, error)

    def _stranger(self, order: Order) -> str:
        if order is not Order.CAN_COMMIT and not self.leads:
            return "another submitter leads this job"
        return ""

    async def _refuse(self, order: Order, job_id: str, error: Exception) -> None:
        if order is Order.CAN_COMMIT:
            self.leads = False
            await self.node.leave("it voted no")
        report = Report.REFUSED if order is Order.CAN_COMMIT else Report.FAILED
        text = str(error) if isinstance(error, AiosgdError) else describe(error)
        self.report(report, job_id, reason=text)

    async def _carry_out(self, order: Order, job_id: str, content: dict[str, Any]) -> None:
        node = self.node
        if order is Order.CAN_COMMIT:
            missing = check_request(content, node.settings)
            self.leads = True
            self.report(Report.VOTE, job_id, missing=missing)
            return
        if order is Order.PREPARE:
            part = Part(node, self, job_id, content)
            node.part = part
            await part.prepare()
            self.report(Report.PREPARED, job_id)
            return
        assert node.part is not None
        if order is Order.LINK:
            await node.part.link()
            self.report(Report.LINKED, job_id)
        elif order is Order.START:
            node.part.start()
            await node.part.trained()
            self.report(Report.TRAINED, job_id)
        elif order is Order.FINISH:
            await node.part.quiet()
            self.report(Report.QUIET, job_id)
        elif order is Order.COLLECT:
            facts = await node.part.collect(weights=bool(content.get("weights")))
            self.report(Report.COLLECTED, job_id, **facts)


@dataclass
class Part:
    """This node's part in one job, from prepare to release."""

    owner: Node
    control: Control
    job_id: str
    request: Mapping[str, Any]
    session: Session | None = None
    mesh: Mesh | None = None
    _log: logging.Logger = field(init=False)
    _handler: logging.Handler = field(init=False)
    _executor: Executor | None = None
    _run: asyncio.Task[None] | None = None
    _joined: asyncio.Event = field(default_factory=asyncio.Event)
    _blas: Any = None
    _over: bool = False

    def __post_init__(self) -> None:
        self.node = int(self.request["node"])
        self.addresses = {
            int(node): Address.parse(text, f"address of node {node}")
            for node, text in self.request["addresses"]
        }
        self.token = str(self.request["token"])
        self.job = config.from_dict(self.request["job"])
        self.folder = job_folder(self.owner.settings, self.job_id, self.node)
        self.folder.mkdir(parents=True, exist_ok=False)
        self._handler = logging.FileHandler(self.folder / "node.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._log = logging.Logger(f"aiosgd.job.{self.job_id}.{self.node}")
        self._log.addHandler(self._handler)

    # the orders

    async def prepare(self) -> None:
        """Load the job's plugins and data, and make the session."""
        settings = self.owner.settings
        sources = keep_sources(self.folder, self.request["sources"], self._log.info)
        paths = {
            name: file_path(settings.data_dir, sha256) for name, sha256, _ in self.request["files"]
        }
        load = await asyncio.to_thread(
            workload.load,
            self.job,
            len(self.workers),
            settings.data_dir,
            paths=paths or None,
            sources=sources,
        )
        self._limit_blas()
        slow = self.job.compute.slow.get(str(self.node), 1.0)
        self._executor = Executor(self.job.compute.policy, slow, self._log.info)
        self.mesh = Mesh(
            self.node, self._deliver, self._lost, eager_credit=self.job.mode == "async"
        )
        place = Place(
            node=self.node,
            workers=self.workers,
            servers=self.servers,
            transport=self.mesh,
            executor=self._executor,
            report=self.control.tell,
            log=self._log.info,
        )
        self.session = Session(place, load, np.array(self.request["initial"], np.float32))
        self._log.info("prepared as %s of job %s", node_name(self.node), self.job_id)

    async def link(self) -> None:
        """Connect to the nodes with lower ids; the others connect to us."""
        async with asyncio.TaskGroup() as tasks:
            for peer in self.addresses:
                if peer < self.node:
                    tasks.create_task(self._dial(peer))
        self._count_links()
        await self._joined.wait()

    def start(self) -> None:
        """Begin to train."""
        assert self.session is not None
        self._log.info("started")
        self._run = self.owner.spawn(self._supervise(self.session))

    async def trained(self) -> None:
        """Wait until a worker has taken its steps; a server is always ready."""
        assert self.session is not None
        if self.node >= 0:
            await self.session.trained()

    async def quiet(self) -> None:
        """Wait until all that we sent was handled."""
        assert self.session is not None
        await self.session.quiet()

    async def collect(self, *, weights: bool) -> dict[str, Any]:
        """Finish the session; return (and keep) all that the run leaves on this node."""
        session, mesh = self.session, self.mesh
        assert session is not None
        assert mesh is not None
        await session.conclude()
        self._over = True
        if session.late:
            self._log.warning("%d messages came too late for their step", session.late)
        self._log.info("finished: %d samples in %.3f s", session.samples, session.train_s)
        await asyncio.to_thread(self._keep, session)
        held = session.weights
        return {
            "train": session.train.columns(),
            "evaluations": session.evaluations.columns(),
            "log": np.frombuffer(self.log_bytes(), np.uint8),
            "weights": held if weights else None,
            "figures": {
                "samples": session.samples,
                "train_s": session.train_s,
                "late": session.late,
                "bytes_sent": mesh.bytes_sent,
                "bytes_received": mesh.bytes_received,
            },
        }

    def verdict(self, epoch: int, stop: bool) -> None:
        """Pass on whether training goes on after an epoch."""
        if self.session is not None:
            self.session.verdict(epoch, stop)

    async def leave(self, reason: str) -> None:
        """End the part, whatever it is at."""
        self._over = True
        self._log.info("left: %s", reason)
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait([self._run])
        if self.mesh is not None:
            self.mesh.close()
        if self._executor is not None:
            self._executor.close()
        if self._blas is not None:
            self._blas.restore_original_limits()
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
            and self.mesh is not None
            and peer not in self.mesh.peers
        )

    def join(self, peer: int, link: Link) -> None:
        """Take a link to another node of the job."""
        assert self.mesh is not None
        self.mesh.add(peer, link)
        self._count_links()

    def _count_links(self) -> None:
        if self.mesh is not None and len(self.mesh.peers) == len(self.addresses) - 1:
            self._joined.set()

    async def _dial(self, peer: int) -> None:
        hello = {
            "wire": WIRE_VERSION,
            "version": __version__,
            "role": "peer",
            "job_id": self.job_id,
            "node": self.node,
            "token": self.token,
        }
        link = await introduce(self.addresses[peer], hello)
        self.join(peer, link)

    def _deliver(self, sender: int, content: Any, size: int) -> None:
        assert self.session is not None
        self.session.deliver(sender, content)

    def _lost(self, peer: int, error: Exception) -> None:
        if not self._over:
            self._fail(f"{node_name(peer)} lost: {error}")

    # the session as a task

    async def _supervise(self, session: Session) -> None:
        try:
            await session.run()
        except Exception as error:
            first = first_error(error)
            self._log.error("".join(traceback.format_exception(first)))
            self._fail(str(first) if isinstance(first, AiosgdError) else describe(first))

    def _fail(self, reason: str) -> None:
        self._log.error(reason)
        self.control.report(Report.FAILED, self.job_id, reason=reason)

    def _limit_blas(self) -> None:
        """Share the host's cores among its nodes: BLAS threads that compete slow all down."""
        cores = len(os.sched_getaffinity(0))
        threads = self.job.compute.threads or max(1, cores // int(self.request["nodes_on_host"]))
        self._blas = threadpoolctl.threadpool_limits(threads, user_api="blas")
        self._log.info("%d BLAS threads", threads)

    def _keep(self, session: Session) -> None:
        """Write this node's own copy, for `fetch` and for the case that the submitter is gone."""
        if session.weights is not None:
            shapes = {name: shape for group in session.groups for name, shape in group.items()}
            results.write_model(self.folder, session.weights, shapes)

    def log_bytes(self) -> bytes:
        """Return the node's log of this job so far."""
        self._handler.flush()
        with contextlib.suppress(OSError):
            return (self.folder / "node.log").read_bytes()
        return b""


def first_error(error: BaseException) -> BaseException:
    """Return the first deliberate error of an exception group, else the first error."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(inner) for inner in error.exceptions]
    deliberate = [leaf for leaf in leaves if isinstance(leaf, AiosgdError)]
    return (deliberate or leaves)[0]


# The handshake, as the side that calls -------------------------------------------------------


async def introduce(address: Address, hello: Mapping[str, Any], timeout: float = 5.0) -> Link:
    """Connect and say who we are; return the link once the node has accepted it.

    Raises:
        ClusterError: unreachable, refused, or no aiosgd node.
    """
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_frame(link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        if not answered.done():
            answered.set_result(content if kind is Kind.HELLO else None)

    def on_closed(link: Link, error: Exception | None) -> None:
        if not answered.done():
            reason = f"{address} closed the link: {error or 'without a word'}"
            answered.set_exception(ClusterError(reason))

    link = await connect(address.host, address.port, on_frame, on_closed, timeout)
    link.send(encode(dict(hello), Kind.HELLO))
    try:
        async with asyncio.timeout(timeout):
            answer = await answered
    except TimeoutError:
        link.abort("no answer")
        raise ClusterError(f"{address} did not answer: is it an aiosgd node?") from None
    if not isinstance(answer, dict) or "error" in answer:
        link.abort("refused")
        reason = answer.get("error") if isinstance(answer, dict) else "it is no aiosgd node"
        raise ClusterError(f"{address} refused the link: {reason}")
    return link


# What a node checks and keeps ----------------------------------------------------------------


def job_folder(settings: Settings, job_id: str, node: int) -> Path:
    """Return this node's folder of a job; the id is checked, for it comes from a peer."""
    if not JOB_ID.fullmatch(job_id):
        raise ConfigError(f"{job_id!r} is no job id")
    return settings.run_dir / job_id / "nodes" / str(int(node))


def file_path(data_dir: Path, sha256: object) -> Path:
    """Return where a node keeps a data file: by content, never by a name from a peer."""
    if not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise ConfigError(f"{sha256!r} is no sha256")
    return data_dir / "sha256" / sha256


def store_file(data_dir: Path, sha256: object, data: np.ndarray[Any, Any]) -> None:
    """Keep a data file after checking what it is."""
    path = file_path(data_dir, sha256)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ConfigError(f"a data file's sha256 is {digest}; the submitter said {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(memoryview(data))
    Path(file.name).rename(path)


def keep_sources(
    folder: Path, sources: Sequence[Sequence[Any]], log: Callable[[str], None]
) -> dict[str, Path]:
    """Write the source files that came with a job into its folder; return where each is."""
    kept = {}
    for i, (name, text) in enumerate(sources):
        source = bytes(text)
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
    if job_folder(settings, str(request["job_id"]), int(request["node"])).exists():
        raise ConfigError(f"job {request['job_id']} was here before; a job id is never reused")
    if request["sources"] and not settings.allow_code:
        names = ", ".join(str(name) for name in request["sources"])
        raise ClusterError(
            f"codec {names} comes as source code, which this node does not take; "
            "start it with --allow-code, or install the codec as a plugin"
        )
    for kind, name, distribution, version in request["plugins"]:
        entry = KINDS[kind].entry(name)
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


def _has_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
