"""A job's nodes in virtual time: the sessions of a real run, on a simulated network.

A session does not know where it is: its clock, transport and executor come from here, everything
else is what runs on a cluster. What the nodes tell the submitter, and what it answers, goes through
the state machine of real jobs, and takes no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from aiosgd.errors import PeerLostError
from aiosgd.plugins.registry import error_text
from aiosgd.runtime.executor import INLINE_LIMIT
from aiosgd.runtime.frame import encode
from aiosgd.runtime.job import (
    Evaluated,
    Instruction,
    Job,
    Lost,
    Order,
    Phase,
    Report,
    Reported,
    Tell,
    Verdict,
    node_name,
)
from aiosgd.runtime.learner import Computed, Learner, Sampler
from aiosgd.runtime.mesh import DEAD_AFTER, HEARTBEAT
from aiosgd.runtime.part import first_error
from aiosgd.runtime.session import Evaluation, News, Place, Session
from aiosgd.runtime.simulation.draws import uniform
from aiosgd.runtime.simulation.faults import Crash, Cut, Fault
from aiosgd.runtime.simulation.loop import SECOND, VirtualLoop
from aiosgd.runtime.simulation.network import Network, NetworkModel
from aiosgd.runtime.simulation.trace import Trace, What
from aiosgd.runtime.workload import Workload

T = TypeVar("T")

FLOPS_PER_WEIGHT = 6
"""Operations per parameter and sample: two forward and four backward."""
PASSES = 3
"""How many times longer a sample's gradient takes than its evaluation."""
_NOISE = 3  # the purpose of a draw


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a job is simulated on.

    Attributes:
        network: the network and the machines.
        slow: worker -> factor by which its computing is slower.
        faults: what goes wrong, and when.
        seed: of everything that the network draws.
    """

    network: NetworkModel = field(default_factory=NetworkModel)
    slow: Mapping[int, float] = field(default_factory=dict)
    faults: Sequence[Fault] = ()
    seed: int = 0


@dataclass
class Ending:
    """How a simulated job ended.

    Attributes:
        state: as in the summary.
        error: the first reason why it did not end well; empty if it did.
        cause: that reason as it was raised.
        time_s: virtual seconds that it took.
    """

    state: Literal["done", "failed", "cancelled"]
    error: str
    cause: BaseException | None
    time_s: float


class VirtualTransport:
    """One node's links: what a session sends and gets.

    Content is encoded and decoded as on the wire, once for all receivers of an envelope.

    Attributes:
        traffic: (sender, receiver) -> messages and bytes, of all links of this node.
    """

    def __init__(self, node: int, world: World) -> None:
        self.node = node
        self.bytes_sent = self.bytes_received = 0
        self.traffic: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
        self.deliver: Callable[[int, Any], None]
        self._world = world
        self._network = world.network
        self._loop = world.loop
        self._is_async = world.load.job.mode == "async"
        self._bears_loss = world.load.job.bears_loss
        self._sent: Counter[int] = Counter()  # to each node
        self._consumed: Counter[int] = Counter()  # of each node
        self.sleeps = False  # a worker that has handed its block over
        self._awake = 0  # when it has woken up
        self._outstanding: Counter[int] = Counter()  # receiver -> messages it has not consumed
        self._lost: dict[int, str] = {}
        self._waiters: dict[asyncio.Future[None], int] = {}  # -> the window it waits for

    @property
    def messages_sent(self) -> int:
        """Messages to all living nodes."""
        return sum(count for node, count in self._sent.items() if node not in self._lost)

    @property
    def messages_consumed(self) -> int:
        """Messages of all living nodes that were handled."""
        return sum(count for node, count in self._consumed.items() if node not in self._lost)

    def send(self, to: Sequence[int], content: Any, channel: int) -> int:
        """Send to each node without waiting; return the bytes sent in all."""
        if self._bears_loss and self._lost:
            to = [node for node in to if node not in self._lost]
        for node in to:
            if node in self._lost:
                raise PeerLostError(f"node {node} is lost; nothing can be sent to it")
        frame = encode(content, number=channel)
        received, size = frame.received(), frame.size
        for node in to:
            self._sent[node] += 1
            if node == self.node:
                self._loop.call_soon(self.deliver, node, received)
                continue
            self.bytes_sent += size
            self._count(self.node, node, size)
            self._outstanding[node] += 1
            arrival = _Delivery(self.node, self._world.transports[node], received, size)
            self._network.send(self.node, node, size, arrival)
        return size * sum(node != self.node for node in to)

    def take(self, sender: int, content: Any, size: int) -> None:
        """Hand a message over that has arrived; a worker that waits for one wakes up first."""
        self.bytes_received += size
        self._count(sender, self.node, size)
        wake_s, now = self._network.model.wake_s, self._loop.time_ns()
        if self.sleeps and wake_s:
            self._awake = self._network.occupy(self.node, round(wake_s * SECOND), thread=False)
        self.sleeps = False
        if self._awake > now:
            self._loop.call_at_ns(self._awake, 0, self.deliver, sender, content)
        else:
            self.deliver(sender, content)

    def _count(self, sender: int, receiver: int, size: int) -> None:
        counts = self.traffic[sender, receiver]
        counts[0] += 1
        counts[1] += size

    def consumed(self, sender: int) -> None:
        """Note that a message was handled; in async mode its sender hears of it later."""
        self._consumed[sender] += 1
        if sender == self.node:
            return
        if self._is_async:
            when = self._loop.time_ns() + round(self._network.model.path.latency_s * SECOND)
            self._loop.call_at_ns(when, 0, self._world.credit, sender, self.node)
        else:
            self._world.credit(sender, self.node)

    def credit(self, receiver: int) -> None:
        """Take a receiver's word that it has handled one more."""
        self._outstanding[receiver] -= receiver not in self._lost
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        if self._waiters:
            fullest = self._fullest()
            for waiter, window in self._waiters.items():
                if fullest <= window and not waiter.done():
                    waiter.set_result(None)

    def _fullest(self) -> int:
        return max(self._outstanding.values(), default=0)

    async def room(self, window: int) -> None:
        """Wait until no peer has more than `window` of our messages unhandled."""
        while self._fullest() > window:
            waiter = self._loop.create_future()
            self._waiters[waiter] = window
            try:
                await waiter
            finally:
                del self._waiters[waiter]

    def lose(self, peer: int, reason: str) -> None:
        """Learn that a peer is gone."""
        self._lost[peer] = reason
        if self._bears_loss:
            self._outstanding.pop(peer, None)
            self._wake_waiters()
            return
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(PeerLostError(f"node {peer} is lost: {reason}"))

    async def watch(self) -> None:
        """Wait for ever: dead links are noticed by the world, heartbeats cost nothing."""
        await self._loop.create_future()


class _Delivery:
    """A message's arrival at its receiver."""

    __slots__ = ("content", "sender", "size", "to")

    def __init__(self, sender: int, to: VirtualTransport, content: Any, size: int) -> None:
        self.sender, self.to, self.content, self.size = sender, to, content, size

    def __call__(self) -> None:
        self.to.take(self.sender, self.content, self.size)


class VirtualCompute:
    """One node's computations: done at once, and ready after the time that the model says.

    Args:
        node: its id.
        world: where it is.
    """

    def __init__(self, node: int, world: World) -> None:
        self._node = node
        self._world = world
        self._model = world.scenario.network
        self._block_s, self._evaluation_s = world.costs(node)
        self._replayed_s = self._model.replayed_s.get(node, ())
        self._count = 0
        policy = world.load.job.compute.policy
        is_short = policy == "auto" and self._typical_s() <= INLINE_LIMIT
        self._in_thread = policy != "inline" and not is_short
        self._more_s = self._besides_s()

    def _typical_s(self) -> float:
        return statistics.median(self._replayed_s) if self._replayed_s else self._block_s

    def _besides_s(self) -> float:
        """Return what a block takes beyond its computation."""
        model, load = self._model, self._world.load
        codec_s = model.codec_byte_s * 4 * load.model.size
        codec_s += model.codec_message_s * (len(load.groups) - 1)
        return model.step_s + codec_s + (model.hop_s if self._in_thread else 0.0)

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Run a training computation."""
        world, seconds = self._world, self._next_s()
        value = await self._work(seconds, function, *args)
        if isinstance(value, Computed):
            now, crc = world.loop.time_ns(), zlib.crc32(value.value.data)
            world.trace.add(now, What.COMPUTE, self._node, self._count, value.block, crc)
            return dataclasses.replace(value, seconds=seconds)
        return value

    def _next_s(self) -> float:
        """Return how long the next block takes."""
        count, noise, seed = self._count, self._model.noise, self._world.scenario.seed
        self._count += 1
        if self._replayed_s:
            slow = self._world.scenario.slow.get(self._node, 1.0)
            return slow * self._replayed_s[count % len(self._replayed_s)]
        if noise:
            return self._block_s * (1 + noise * (2 * uniform(seed, self._node, count, _NOISE) - 1))
        return self._block_s

    async def _work(self, seconds: float, function: Callable[..., T], *args: Any) -> T:
        """Occupy the loop or the thread, and whatever else a block takes."""
        world, loop = self._world, self._world.loop
        cost = round((seconds + self._more_s) * SECOND)
        done = world.network.occupy(self._node, cost, thread=self._in_thread)
        value = await loop.do_work(done - loop.time_ns(), function, *args)
        world.transports[self._node].sleeps = True
        return value

    async def assist(self, function: Callable[..., T], *args: Any) -> T:
        """Run heavy work of a codec, or an evaluation; of the former only the hop takes time."""
        is_evaluation = getattr(function, "__func__", None) is Learner.evaluate
        seconds = self._model.hop_s + (self._evaluation_s if is_evaluation else 0.0)
        if not seconds:
            return function(*args)
        cost, loop = round(seconds * SECOND), self._world.loop
        done = self._world.network.occupy(self._node, cost, thread=True)
        return await loop.do_work(done - loop.time_ns(), function, *args)


class World:
    """All nodes of one job.

    Args:
        load: the job's plugins.
        workers, servers: ids.
        scenario: what it is simulated on.
        trace: told of everything.
        report: told how far the workers are.

    Attributes:
        sessions, logs: node -> its session, its lines with their virtual times.
        lost: node -> why it is lost.
    """

    def __init__(
        self,
        load: Workload,
        workers: Sequence[int],
        servers: Sequence[int],
        scenario: Scenario,
        trace: Trace,
        report: Callable[[News], None] = lambda _: None,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.load = load
        self.scenario = scenario
        self.trace = trace
        self.network = Network(loop, scenario.network, scenario.seed, trace)
        self.logs: defaultdict[int, list[str]] = defaultdict(list)
        self.transports: dict[int, VirtualTransport] = {}
        self.sessions: dict[int, Session] = {}
        self._report = report
        self._machine = Job(
            workers,
            servers,
            load.job.target_accuracy,
            min_workers=load.job.min_workers if load.job.bears_loss else None,
            phase=Phase.RUNNING,
        )
        self._machine.missing = set(workers)
        self._cause: BaseException | None = None
        self._over = asyncio.Event()
        self._runs: dict[int, asyncio.Task[None]] = {}
        self._orders: set[asyncio.Task[None]] = set()
        self._dead: set[int] = set()
        self.lost: dict[int, str] = {}
        initial = load.initial()
        self._sampler = Sampler(load)
        for node in (*workers, *servers):
            self._add(node, tuple(workers), tuple(servers), initial)

    def _add(self, node: int, workers: tuple[int, ...], servers: tuple[int, ...], w: Any) -> None:
        transport = self.transports[node] = VirtualTransport(node, self)
        place = Place(
            node=node,
            workers=workers,
            servers=servers,
            transport=transport,
            executor=VirtualCompute(node, self),
            report=self._news,
            log=lambda text: self.log(node, text),
            clock=self.loop.time,
        )
        session = self.sessions[node] = Session(place, self.load, w, self._sampler)
        transport.deliver = session.deliver

    def costs(self, node: int) -> tuple[float, float]:
        """Return how many seconds a block and an evaluation take a node."""
        model, load = self.scenario.network, self.load
        size, batch = load.model.size, load.job.batch_size
        sample_s = FLOPS_PER_WEIGHT * size / model.flops
        block_s = model.least_s + sample_s * batch + model.weight_s * size
        if model.block_s is not None:
            sample_s, block_s = model.block_s / batch, model.block_s
        evaluation_s = model.evaluation_s + sample_s * len(load.data.test_y) / PASSES
        slow = self.scenario.slow.get(node, 1.0) * load.job.compute.slow.get(str(node), 1.0)
        slow *= model.slow.get(node, 1.0)
        return slow * block_s, slow * evaluation_s

    def log(self, node: int, text: str) -> None:
        """Write a line to a node's log."""
        self.logs[node].append(f"{self.loop.time():.6f} {text}")

    def credit(self, sender: int, receiver: int) -> None:
        """Tell a sender that one of its messages was handled."""
        self.transports[sender].credit(receiver)

    # the job

    async def run(self) -> Ending:
        """Run the job to its end, whatever that is; cancelling this cancels the job."""
        started = self.loop.time()
        state: Literal["done", "failed", "cancelled"]
        for fault in self.scenario.faults:
            self.loop.call_later(fault.time_s, self._befall, fault)
        for node, session in self.sessions.items():
            self._runs[node] = self.loop.create_task(self._live(node, session), name=f"node {node}")
            if node >= 0:
                self._order(node, Order.START)
        try:
            await self._over.wait()
            state = "failed" if self._machine.error else "done"
        except asyncio.CancelledError:
            state, self._machine.error = "cancelled", "cancelled by the submitter"
        await self._end()
        return Ending(state, self._machine.error, self._cause, self.loop.time() - started)

    async def _live(self, node: int, session: Session) -> None:
        def failed(error: Exception) -> None:
            self._fail(node, error)

        with contextlib.suppress(Exception):  # `failed` has heard of it
            await session.run(failed)

    async def _end(self) -> None:
        """Stop everything that still runs."""
        tasks = [*self._runs.values(), *self._orders]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node, session in self.sessions.items():
            if node not in self._dead:
                session.stop()

    def _fail(self, node: int, error: BaseException) -> None:
        """Take a node's word that it cannot go on."""
        if node in self._dead:
            return
        first = first_error(error)
        if not self._machine.error:
            self._cause = first
        text = error_text(first)
        self.log(node, text)
        self._apply(Reported(node, Report.FAILED, self.loop.time(), text))

    def _news(self, news: News) -> None:
        if news.node in self._dead:
            return
        self._report(news)
        if isinstance(news, Evaluation):
            self._apply(Evaluated(news.node, news.epoch, news.accuracy))

    def _apply(self, event: Any) -> None:
        for instruction in self._machine.handle(event):
            self._obey(instruction)

    def _obey(self, instruction: Instruction) -> None:
        phase = self._machine.phase
        if phase in (Phase.STOPPING, Phase.DONE, Phase.FAILED):
            self._over.set()
            return
        match instruction:
            case Tell(nodes, order):
                for node in nodes:
                    self._order(node, order)
            case Verdict(nodes, epoch, stop):
                for node in nodes:
                    self.sessions[node].verdict(epoch, stop)

    def _order(self, node: int, order: Order) -> None:
        """Let a node follow an order, and report when it has."""
        task = self.loop.create_task(self._follow(node, order), name=f"order {order} of {node}")
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _follow(self, node: int, order: Order) -> None:
        session, totals = self.sessions[node], (0, 0)
        try:
            if order is Order.START:
                await session.trained()
                report = Report.TRAINED
            elif order is Order.FINISH:
                totals = await session.quiet()
                report = Report.QUIET
            else:
                await session.conclude()
                report = Report.COLLECTED
        except Exception as error:  # noqa: BLE001 - whatever it is, the job fails with it
            self._fail(node, error)
            return
        if node not in self._dead:
            self._apply(Reported(node, report, self.loop.time(), totals=totals))

    # what goes wrong

    def _befall(self, fault: Fault) -> None:
        match fault:
            case Crash(node=node, silent=silent):
                self._crash(node, silent)
            case Cut(some=some, others=others):
                self.network.cut(some, others)
                self.loop.call_later(fault.lasts_s, self.network.heal)
                self.loop.call_later(self._notice_s(), self._notice_cut, some, others)

    def _notice_s(self) -> float:
        """Return after how long silence counts as death: heartbeats look once a second."""
        return DEAD_AFTER + HEARTBEAT

    def _crash(self, node: int, silent: bool) -> None:
        """End a node at once; a process's links break, a host falls silent."""
        if node in self._dead or node not in self.sessions:
            return
        self._dead.add(node)
        self.network.crash(node)
        self._runs[node].cancel()
        if silent:
            self.loop.call_later(self._notice_s(), self._lost, node, f"silent for {DEAD_AFTER:g} s")
        else:
            latency = self.scenario.network.path.latency_s
            self.loop.call_later(latency, self._lost, node, f"node {node} closed its link")

    def _notice_cut(self, some: Sequence[int], others: Sequence[int]) -> None:
        goes_on = self.load.job.bears_loss
        if goes_on and (min(others) < 0, len(others)) > (min(some) < 0, len(some)):
            some, others = others, some  # the side with a server goes on, or else the larger one
        for a in some:
            for b in others:
                if self.network.is_cut(a, b):
                    self._lost(b, f"node {a} has not heard of node {b} for {DEAD_AFTER:g} s")
                    if not goes_on:
                        return

    def _lost(self, node: int, reason: str) -> None:
        """Let everybody know that a node is gone."""
        if node in self.lost:
            return  # two faults can be noticed of one node
        if self.load.job.bears_loss and node not in self._dead:  # cut off: its links are closed
            self._dead.add(node)
            self.network.crash(node)
            self._runs[node].cancel()
        self.trace.add(self.loop.time_ns(), What.BREAK, node, 0, 0, 0)
        self.lost[node] = reason
        for other, transport in self.transports.items():
            if other != node and other not in self._dead:
                transport.lose(node, reason)
                self.log(other, f"{node_name(node)} lost: {reason}")
                if node >= 0 and self.load.job.bears_loss:
                    self.sessions[other].lose(node)
        if not self._machine.error:
            self._cause = PeerLostError(f"{node_name(node)} lost: {reason}")
        self._apply(Lost(node, reason, self.loop.time()))
