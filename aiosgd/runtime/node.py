"""A node: listens, takes one job at a time, and runs its session.

A submitter talks to a node over one link: orders go in, reports come out (runtime.job says which
when). The nodes of a job talk to each other over links of their own, the mesh of the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aiosgd.errors import AiosgdError, ClusterError, ConfigError, RemoteProtocolError
from aiosgd.plugins.registry import describe, error_text
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.coordinator import lead
from aiosgd.runtime.endpoint import Listening, TlsLink, UnixLink, listen, listen_tls, listen_unix
from aiosgd.runtime.frame import Kind
from aiosgd.runtime.handshake import Answerer
from aiosgd.runtime.hello import STRANGER, accept, greet, receive, refuse
from aiosgd.runtime.job import SUBMITTER, Member, Order, Report, Seat, node_name
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.metrics import Counts, Exposition, text_of
from aiosgd.runtime.part import Part, Settings, check_request, checkpoints, first_error, store_file
from aiosgd.runtime.probe import ROLE as PROBE
from aiosgd.runtime.probe import Probes
from aiosgd.runtime.results import is_job_id
from aiosgd.runtime.session import News
from aiosgd.runtime.visit import NOBODY, Status, Visits, describe_node
from aiosgd.runtime.visit import ROLE as VISITOR
from aiosgd.runtime.visit import SUBMITTER as ITS_SUBMITTER

# a link that has not said and proved who it is after this long is closed
HELLO_TIMEOUT = 5.0
# seconds that a job whose submitter is gone waits for a leader, and that a node waits until it knows
# that the submitter is gone: others may notice it up to a heartbeat earlier
ADOPTION_TIMEOUT = 10.0
ADOPTION_PATIENCE = 3.0
# links that have not said who they are yet
PENDING_LIMIT = 64

# the first byte of a TLS handshake (RFC 8446, section 5.1)
TLS_RECORD = 0x16

# characters of a reason that are sent
REASON_LIMIT = 2000

AnyLink = TypeVar("AnyLink", bound=Link)

logger = logging.getLogger("aiosgd.node")


class Node:
    """One listening process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.member = Member()
        self.part: Part | None = None
        self._tasks = asyncio.TaskGroup()
        self._controls: set[Control] = set()
        self._probes = Probes(settings.host, lambda: self.member.job_id)
        self._visits = Visits(self, self.spawn)
        self._parting: list[Part] = []
        self._pending: dict[Link, asyncio.TimerHandle] = {}  # in the order of their arrival
        self._leaderless = asyncio.Event()
        self.counts = Counts()
        self.metrics: Address | None = None  # where it tells them, once it listens
        self._exposition = Exposition(functools.partial(text_of, self))
        self._unix = ""  # the name of the unix socket, which callers on this machine are told

    async def serve(self, started: Callable[[Address], None]) -> None:
        """Listen until cancelled.

        Args:
            started: told the address as soon as the node listens.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        servers = await self._listen()
        try:
            if self.settings.metrics is not None:
                self.metrics = await self._exposition.listen(self.settings.metrics)
                logger.info("metrics on http://%s/metrics", self.metrics)
        except ConfigError:
            for server in servers:
                server.close()
            raise
        port = servers[-1].sockets[0].getsockname()[1]
        try:
            async with self._tasks:
                started(Address(self.settings.host, port))
                try:
                    await asyncio.Event().wait()
                finally:
                    for server in servers:
                        server.close()
                    self._exposition.close()
                    self._close_links("the node was stopped")
                    await asyncio.sleep(0)  # the links write in the next turn of the loop
        finally:
            if self.part is not None:
                await self.part.leave("the node was stopped")

    async def _listen(self) -> list[Listening]:
        """Listen on a unix socket for this machine, and then for whoever reaches the address."""
        servers: list[Listening] = []
        if self.settings.unix and self.settings.security.tls is None:
            with contextlib.suppress(OSError):  # a system without: links go over TCP
                make = functools.partial(self._accept, UnixLink)
                unix_server, self._unix = await listen_unix(make)
                servers.append(unix_server)
        try:
            return [*servers, await self._listen_at_address()]
        except ClusterError as error:
            for server in servers:
                server.close()
            raise ConfigError(str(error)) from error

    async def _listen_at_address(self) -> Listening:
        host, port, tls = self.settings.host, self.settings.port, self.settings.security.tls
        if tls is None:
            return await listen(host, port, functools.partial(self._accept, Link))
        make = functools.partial(self._accept, TlsLink)
        return await listen_tls(host, port, make, tls.server, self.spawn)

    def _close_links(self, reason: str) -> None:
        """Tell the submitter why, and take no more orders."""
        for link in list(self._pending):
            self._expire(link, reason)
        # a job that can do without this worker takes the end of its links for its loss
        is_spared = self.part is not None and self.part.node >= 0 and self.part.job.bears_loss
        for control in self._controls:
            if not is_spared:
                control.fail(reason)
            control.mesh.close()
        self._probes.close()
        self._visits.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a child of the node; whatever it raises, the node lives on."""
        task = self._tasks.create_task(self._guarded(work))
        task.add_done_callback(lambda _: work.close())  # one cancelled before its first step
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            logger.exception("a task of the node failed")

    async def leave(self, reason: str, state: str = "failed") -> None:
        """Give the seat back; `state` is what became of the job."""
        if self.member.job_id:
            logger.info("job %s: left, %s", self.member.job_id, reason)
        part, self.part = self.part, None
        self._leaderless.clear()
        self.member.leave()
        if part is not None:
            self._parting.append(part)
            try:
                await part.leave(reason, state)
            finally:
                self._parting.remove(part)
                self.counts.left(part, state)

    # what visitors ask for

    @property
    def run_dir(self) -> Path:
        """Where this node keeps its jobs."""
        return self.settings.run_dir

    @property
    def under_way(self) -> list[Part]:
        """Its part in a job, and those that it is about to leave."""
        return [*([self.part] if self.part else []), *self._parting]

    def status(self, *, why: bool) -> Status:
        """Return what this node is doing."""
        control = self._leader
        leader = NOBODY if control is None else control.leader
        part = next(iter(self.under_way), None)
        if self.member.job_id and part is not self.part:
            part = None  # the new job has none yet
        return describe_node(self.member, part, leader, why=why)

    @property
    def _leader(self) -> Control | None:
        job_id = self.member.job_id
        return next((control for control in self._controls if control.leads(job_id)), None)

    async def cancel(self, job_id: str) -> bool:
        """Have a job end: tell whoever leads it, or leave it where nobody does."""
        if not job_id or self.member.job_id != job_id:
            raise ClusterError(f"job {job_id} does not run here")
        logger.info("job %s: a visitor cancels it", job_id)
        control = self._leader
        if control is None:
            self._leaderless.clear()
            leaving = self.spawn(self.leave("cancelled by request", "cancelled"))
            await asyncio.shield(leaving)  # even if whoever asked does not wait
            return False
        control.report(Report.CANCEL, job_id)
        return True

    # a job without a submitter

    async def _orphaned(self, job_id: str) -> None:
        """Go on without the submitter: worker 0's node leads the job, the others wait for it."""
        part = self.part
        if self.member.job_id != job_id:
            return
        if part is None or part.failure or self.member.seat not in (Seat.RUNNING, Seat.QUIET):
            await self.leave("the submitter is gone")
            return
        logger.warning("job %s: the submitter is gone; the nodes go on", job_id)
        part.tell, part.failed = _tell_nobody, functools.partial(self._orphan_failed, job_id)
        self._leaderless.set()
        if part.node == 0:
            self.spawn(self._lead(part))
        await asyncio.sleep(ADOPTION_TIMEOUT)
        if self._leaderless.is_set() and self.member.job_id == job_id:
            await self.leave("the submitter is gone, and no node leads the job")

    def _orphan_failed(self, job_id: str, reason: str) -> None:
        if self.member.job_id == job_id:
            self.spawn(self.leave(f"the submitter is gone, and {reason}"))

    async def _lead(self, part: Part) -> None:
        """Take a job to its end in the place of its submitter."""
        settings = self.settings
        try:
            await lead(part.estate(), settings.security, settings.data_dir, part.folder)
        except AiosgdError as error:
            logger.warning("job %s: %s", part.job_id, error)

    async def led(self) -> None:
        """Wait until this node, too, knows that the submitter is gone."""
        await self._leaderless.wait()
        self._leaderless.clear()

    # links that come in

    def _accept(self, kind: type[AnyLink]) -> AnyLink:
        loop, unix = asyncio.get_running_loop(), self._unix if kind is Link else ""
        hello = functools.partial(self._hello, greet(self.settings.security, unix))
        link = kind(hello, self._unknown_closed, STRANGER)
        if len(self._pending) >= PENDING_LIMIT:
            # later in this turn: links that came in one burst with this one are not set up yet
            loop.call_soon(self._crowd_out)
        reason = f"it did not say who it is within {HELLO_TIMEOUT:g} s"
        self._pending[link] = loop.call_later(HELLO_TIMEOUT, self._expire, link, reason)
        return link

    def _crowd_out(self) -> None:
        """Send the oldest caller away of the address that has the most: a flood its own, that is."""
        if len(self._pending) > PENDING_LIMIT:
            hosts = [link.address.rpartition(":")[0] for link in self._pending]
            fullest = max(dict.fromkeys(hosts), key=hosts.count)
            victim = list(self._pending)[hosts.index(fullest)]
            self._expire(victim, f"too many links of {fullest or 'its address'} wait")

    def _expire(self, link: Link, reason: str) -> None:
        if self._settle(link):
            link.abort(RemoteProtocolError(f"link to {link.address}: {reason}"))

    def _settle(self, link: Link) -> bool:
        """Wait for a caller's HELLO no more; tell whether it was waited for."""
        timer = self._pending.pop(link, None)
        if timer is not None:
            timer.cancel()  # it would keep the link, and its buffer, until then
        return timer is not None

    def _unknown_closed(self, link: Link, error: Exception | None) -> None:
        self._settle(link)
        if error is not None:
            hint = "; that is how TLS begins, which this node does not speak"
            tls = f"starts with {TLS_RECORD:#04x}" in str(error)
            logger.warning(
                "closed a link that had not said who it is: %s%s", error, hint if tls else ""
            )

    def _hello(
        self, answerer: Answerer, link: Link, kind: Kind, number: int, content: Any, size: int
    ) -> None:
        try:
            hello = receive(link, answerer, kind, content)
            if hello is not None:
                self._introduce(link, hello)
                self._settle(link)
        except RemoteProtocolError as error:
            logger.warning("refused a link to %s: %s", link.address, error)
            link.on_closed = self._refused_closed
            refuse(link, str(error))

    def _refused_closed(self, link: Link, error: Exception | None) -> None:
        self._settle(link)  # only now: a flood of wrong HELLOs has no room either

    def _introduce(self, link: Link, hello: Mapping[str, Any]) -> None:
        if hello.get("role") == "submitter":
            self._make_room()
            accept(link)
            control = Control(self, link)
            self._controls.add(control)
            self.spawn(control.watch())
        elif hello.get("role") == PROBE:
            self._probes.check()
            accept(link)
            self._probes.add(link)
        elif hello.get("role") == VISITOR:
            self._visits.check()
            accept(link)
            self._visits.add(link)
        elif self.part is not None and self.part.knows(hello):
            accept(link)
            self.part.join(hello["node"], link)
        else:
            raise RemoteProtocolError("it is no node of this node's job")

    def _make_room(self) -> None:
        """Close the links of submitters that lead nothing, once they are too many."""
        idle = [control for control in self._controls if not control.job_id]
        if len(idle) >= PENDING_LIMIT:
            for control in idle:
                control.link.abort(RemoteProtocolError("too many submitters without a job"))

    def forget(self, control: Control) -> None:
        """Drop a submitter's link, and the job that it leads."""
        self._controls.discard(control)
        if control.leads(self.member.job_id):
            self.spawn(self._orphaned(self.member.job_id))


class Control:
    """The link to one submitter: follows its orders and reports back.

    Attributes:
        job_id: the job that this submitter leads on this node; empty if none.
        leader: who it is.
    """

    def __init__(self, node: Node, link: Link) -> None:
        self.node = node
        self.link = link
        self.job_id = ""
        self.leader = ITS_SUBMITTER
        self._peer_closed = asyncio.Event()
        self._work: asyncio.Task[Any] | None = None
        self._training: asyncio.Task[Any] | None = None
        self._stores: list[asyncio.Task[None]] = []
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
        self._cancel()
        self.node.forget(self)

    def _cancel(self) -> None:
        """Leave off what this submitter's orders began."""
        for task in (self._work, self._training):
            if task is not None:
                task.cancel()

    def leads(self, job_id: str) -> bool:
        """Tell whether this submitter leads that job here."""
        return bool(job_id) and job_id == self.job_id

    def fail(self, reason: str) -> None:
        """Tell the submitter, if it leads a job here, why that cannot go on."""
        if self.leads(self.node.member.job_id):
            self.report(Report.FAILED, self.job_id, reason=reason)

    def _lost(self, peer: int, error: Exception) -> None:
        self._peer_closed.set()

    def report(self, report: Report, job_id: str, **facts: Any) -> None:
        """Tell the submitter how an order went."""
        if "reason" in facts:
            facts["reason"] = _sendable(facts["reason"])
        self._send({"report": str(report), "job_id": job_id, **facts})

    def tell(self, news: News) -> None:
        """Pass a session's news on."""
        self._send({type(news).__name__.lower(): asdict(news)})

    def _send(self, content: dict[str, Any]) -> None:
        """Send, unless the submitter is gone."""
        if SUBMITTER in self.mesh.peers and not self.link.is_closed:
            self.mesh.send([SUBMITTER], content)

    def _deliver(self, sender: int, content: Any, size: int) -> None:
        self.mesh.consumed(sender)
        match content:
            case {"order": str(order), "job_id": str(job_id)} if is_job_id(job_id):
                self._take(order, job_id, content)
            case _:
                self.link.abort(RemoteProtocolError("a submitter sent something that is no order"))

    def _take(self, order: str, job_id: str, content: dict[str, Any]) -> None:
        mine = self.leads(job_id) and job_id == self.node.member.job_id
        if order in ("verdict", "newest", "file", Order.GO_ON):
            if mine:
                self._do_at_once(order, job_id, content)
        elif order in (Order.ABORT, Order.RELEASE):
            if mine:
                self._cancel()
            self.node.spawn(self._leave(Order(order), job_id, content, mine=mine))
        elif order in list(Order) and self._work is not None and not self._work.done():
            self.report(Report.REFUSED, job_id, reason=f"{order} came before the last order's end")
        elif order == Order.START:
            self._begin(job_id)
        elif order in list(Order):
            self._work = self.node.spawn(self._follow(Order(order), job_id, content))
        else:
            self.report(Report.REFUSED, job_id, reason=f"unknown order {order!r}")

    def _begin(self, job_id: str) -> None:
        """Start, in this turn of the loop: a submitter may leave right after this order."""
        member, part = self.node.member, self.node.part
        if reason := member.refusal(job_id, Order.START) or self._stranger(Order.START):
            self.report(Report.REFUSED, job_id, reason=reason)
            return
        assert part is not None
        member.follow(job_id, Order.START)
        part.start()
        self._training = self.node.spawn(self._report_trained(part, job_id))

    def _do_at_once(self, order: str, job_id: str, content: dict[str, Any]) -> None:
        """Do what is no step of the job's life: the next order may come meanwhile."""
        part = self.node.part
        if order == "file":
            self._stores.append(self.node.spawn(self._store(content, job_id)))
        elif part is None or part.session is None:
            return
        elif order == "verdict":
            part.verdict(int(content.get("epoch", -1)), bool(content.get("stop")))
        elif order == "newest":
            self._send({"newest": np.array(part.session.weights)})  # they go on changing
        else:
            self._go_on(part, job_id, content)

    def _go_on(self, part: Part, job_id: str, content: Mapping[str, Any]) -> None:
        if self._training is None:  # the job was adopted
            self._training = self.node.spawn(self._report_trained(part, job_id))
            part.tell_again()
        part.go_on(int(content["step"]), content.get("whole"))

    async def _inherit(self, job_id: str, token: str) -> None:
        """Wait until this node knows that the job's submitter is gone.

        Raises:
            ClusterError: it is not, or this leader knows nothing of the job.
        """
        part = self.node.part
        if part is None or part.job_id != job_id:
            raise ClusterError(f"job {job_id} does not run here")
        if not hmac.compare_digest(token.encode(), part.token.encode()):
            raise ClusterError(f"job {job_id} is not this leader's")
        try:
            async with asyncio.timeout(ADOPTION_PATIENCE):
                await self.node.led()
        except TimeoutError:
            raise ClusterError(f"job {job_id} has a submitter already") from None
        self.job_id, self.leader = job_id, node_name(0)

    async def _adopt(self, part: Part, job_id: str) -> None:
        """Follow another leader's orders from now on."""
        await part.renounce()
        if self.link.is_closed:
            return  # and the job is an orphan again
        # in the turn in which workers are let go: the new leader hears of every later pause
        part.tell, part.failed = self.tell, self.fail
        logger.info("job %s: follows another leader", job_id)
        if part.failure:
            self.fail(part.failure)
        self.report(Report.ADOPTED, job_id)

    async def _report_trained(self, part: Part, job_id: str) -> None:
        await part.trained()
        self.report(Report.TRAINED, job_id)

    async def _store(self, content: dict[str, Any], job_id: str) -> None:
        folder = self.node.settings.data_dir
        try:
            await asyncio.to_thread(store_file, folder, content["sha256"], content["data"])
        except Exception as error:  # noqa: BLE001 - the content is a peer's: anything may be wrong
            reason = f"cannot keep a data file: {describe(error)}"
            self.report(Report.REFUSED, job_id, reason=reason)

    async def _leave(
        self, order: Order, job_id: str, content: dict[str, Any], *, mine: bool
    ) -> None:
        facts: dict[str, Any] = {"log": np.empty(0, np.uint8)}
        if mine:
            self.job_id = ""
            part = self.node.part
            state = str(content.get("state", "done" if order is Order.RELEASE else "failed"))
            await self.node.leave(str(content.get("reason", "the job is done")), state)
            if part is not None and order is Order.ABORT:
                facts = part.facts(weights=part.node == 0)
        if order is Order.ABORT:
            self.report(Report.ABORTED, job_id, **facts)

    async def _follow(self, order: Order, job_id: str, content: dict[str, Any]) -> None:
        member = self.node.member
        if order is Order.ADOPT:
            try:
                await self._inherit(job_id, str(content.get("token")))
            except ClusterError as error:
                self.report(Report.FAILED, job_id, reason=str(error))
                return
        if reason := member.refusal(job_id, order) or self._stranger(order):
            self.report(Report.REFUSED, job_id, reason=reason)
            return
        member.follow(job_id, order, time.strftime("%H:%M:%S"))
        try:
            await self._carry_out(order, job_id, content)
        except Exception as error:
            first = first_error(error)
            if not isinstance(first, AiosgdError | OSError):
                logger.exception("order %s failed", order)
            await self._refuse(order, job_id, first)

    def _stranger(self, order: Order) -> str:
        member = self.node.member
        free = order is Order.CAN_COMMIT and not member.job_id
        if free or self.leads(member.job_id):
            return ""
        return f"busy with job {member.job_id} of another link; is this node listed twice?"

    async def _refuse(self, order: Order, job_id: str, error: BaseException) -> None:
        if order is Order.CAN_COMMIT:
            self.job_id = ""
            await self.node.leave("it voted no")
        report = Report.REFUSED if order is Order.CAN_COMMIT else Report.FAILED
        self.report(report, job_id, reason=error_text(error))

    async def _carry_out(self, order: Order, job_id: str, content: dict[str, Any]) -> None:
        node = self.node
        if order is Order.CAN_COMMIT:
            missing = check_request(content, node.settings)
            steps = await asyncio.to_thread(checkpoints, content, node.settings)
            self.job_id = job_id
            self.report(Report.VOTE, job_id, missing=missing, checkpoints=steps)
            return
        if order is Order.PREPARE:
            await asyncio.gather(*self._stores)
            part = node.part = Part(
                node.settings, job_id, content, node.spawn, self.tell, self.fail
            )
            await part.prepare()
            logger.info("job %s: prepared as %s", job_id, node_name(part.node))
            self.report(Report.PREPARED, job_id)
            return
        assert node.part is not None
        if order is Order.ADOPT:
            await self._adopt(node.part, job_id)
        elif order is Order.LINK:
            await node.part.link()
            self.report(Report.LINKED, job_id)
        elif order is Order.SAVE:
            self.report(Report.SAVED, job_id, reason=await node.part.save(int(content["step"])))
        elif order in (Order.DRAIN, Order.FINISH):
            self.report(Report.QUIET, job_id, **await node.part.quiet())
        elif order is Order.COLLECT:
            facts = await node.part.collect(weights=bool(content.get("weights")))
            self.report(Report.COLLECTED, job_id, **facts)


def _sendable(reason: str) -> str:
    """Return a reason that fits a report, whatever a codec put into its error; the log has all."""
    text = reason.encode(errors="backslashreplace").decode()
    return text if len(text) <= REASON_LIMIT else f"{text[:REASON_LIMIT]}… (see the node's log)"


def _tell_nobody(news: News) -> None:
    """Drop a session's news: nobody is there to hear them."""
