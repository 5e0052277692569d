"""Whole jobs in one process: sessions in one event loop, in virtual time, without a socket.

    outcome = run_sessions({"codec": "plain", "epochs": 2}, workers=3)
    outcome.weights[0]; outcome.train(0).loss; outcome.evaluations(0).accuracy

Messages are encoded and decoded as on the wire, links keep their order, and a seed decides how
long everything is under way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aiosgd.codecs.base import Array, Codec
from aiosgd.plugins.registry import make_params
from aiosgd.runtime import workload
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.frame import encode
from aiosgd.runtime.job import Job, Phase, Report, Reported
from aiosgd.runtime.session import Evaluation, Place, Progress, Session
from aiosgd.runtime.simulation.loop import run_virtually
from aiosgd.runtime.workload import Workload

T = TypeVar("T")

HOPS = 6
"""A message or a turn of the executor takes fewer than so many turns of the loop."""

SMALL: Mapping[str, Any] = {
    "dataset": "synthetic",
    "dataset_params": {"samples": 96, "features": 6, "classes": 3},
    "model_params": {"hidden": [4]},
    "batch_size": 4,
    "learning_rate": 0.1,
}
"""A job small enough to run in milliseconds, yet with two layers."""


# The network ----------------------------------------------------------------------------------


class Network:
    """All links of a job. What waits in a link is delivered in order, after a random while."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._links: dict[tuple[int, int, str], deque[Callable[[], None]]] = {}
        self.transports: dict[int, MemoryTransport] = {}

    def join(self, node: int) -> MemoryTransport:
        """Return a node's transport."""
        self.transports[node] = MemoryTransport(node, self)
        return self.transports[node]

    def carry(self, sender: int, to: int, kind: str, arrive: Callable[[], None]) -> None:
        """Let something arrive later, behind what is under way in the same link."""
        link = self._links.setdefault((sender, to, kind), deque())
        link.append(arrive)
        if len(link) == 1:
            self._hop(link, int(self._rng.integers(HOPS)))

    def _hop(self, link: deque[Callable[[], None]], left: int) -> None:
        loop = asyncio.get_running_loop()
        if left:
            loop.call_soon(self._hop, link, left - 1)
        else:
            loop.call_soon(self._arrive, link)

    def _arrive(self, link: deque[Callable[[], None]]) -> None:
        link.popleft()()
        if link:
            self._hop(link, int(self._rng.integers(HOPS)))

    @property
    def is_idle(self) -> bool:
        """Whether everything that was sent has been consumed."""
        return not any(transport.outstanding.total() for transport in self.transports.values())


class MemoryTransport:
    """One node's links in memory; as strict as a real one, and more.

    Attributes:
        outstanding: receiver -> our messages that it has not consumed.
        peak: the most that any receiver had outstanding when `room` let a step pass.
        steps: step -> how many messages were sent for it.
    """

    def __init__(self, node: int, network: Network) -> None:
        self.node = node
        self.bytes_sent = self.bytes_received = 0
        self.messages_sent = self.messages_consumed = 0
        self.outstanding: Counter[int] = Counter()
        self.peak = 0
        self.steps: Counter[int] = Counter()
        self.deliver: Callable[[int, Any], None]
        self._network = network
        self._unconsumed: Counter[int] = Counter()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    def send(self, to: Sequence[int], content: Any, channel: int) -> int:
        frame = encode(content, number=channel)
        snapshot = b"".join(frame.buffers)
        for node in to:
            self.steps[content[1]] += 1
            self.messages_sent += 1
            peer = self._network.transports[node]
            if peer is not self:
                self.outstanding[node] += 1

            def arrive(peer: MemoryTransport = peer) -> None:
                assert b"".join(frame.buffers) == snapshot, "an array was changed after sending"
                peer.take(self.node, frame.received(), frame.size)

            self._network.carry(self.node, node, "message", arrive)
        size = frame.size * sum(node != self.node for node in to)
        self.bytes_sent += size
        return size

    def take(self, sender: int, content: Any, size: int) -> None:
        if sender != self.node:
            self._unconsumed[sender] += 1
            self.bytes_received += size
        self.deliver(sender, content)

    def consumed(self, sender: int) -> None:
        self.messages_consumed += 1
        if sender == self.node:
            return
        assert self._unconsumed[sender] > 0, f"node {self.node} consumes what {sender} never sent"
        self._unconsumed[sender] -= 1
        peer = self._network.transports[sender]
        self._network.carry(self.node, sender, "credit", lambda: peer.credit(self.node))

    def credit(self, receiver: int) -> None:
        self.outstanding[receiver] -= 1
        for window, waiter in self._waiters:
            if self._fullest() <= window and not waiter.done():
                waiter.set_result(None)

    def _fullest(self) -> int:
        return max(self.outstanding.values(), default=0)

    async def room(self, window: int) -> None:
        while self._fullest() > window:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append((window, waiter))
            await waiter
            self._waiters.remove((window, waiter))
        self.peak = max(self.peak, self._fullest())

    async def watch(self) -> None:
        await asyncio.get_running_loop().create_future()


class InlineCompute:
    """Computes on the loop, after a random number of its turns.

    Args:
        seconds: virtual time that the training computations take, in turn, then from the first.
    """

    def __init__(self, rng: np.random.Generator, seconds: Sequence[float]) -> None:
        self._rng = rng
        self._seconds = itertools.cycle(seconds)

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        if seconds := next(self._seconds):
            await asyncio.sleep(seconds)
        return await self.assist(function, *args)

    async def assist(self, function: Callable[..., T], *args: Any) -> T:
        for _ in range(self._rng.integers(HOPS)):
            await asyncio.sleep(0)
        return function(*args)


# Jobs -----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a job leaves behind.

    Attributes:
        errors: node -> what its session failed with.
        logs: node -> its lines.
        reports: Progress and Evaluation of all nodes, in order.
        now: virtual time at the end.
    """

    sessions: dict[int, Session]
    network: Network
    errors: dict[int, BaseException] = field(default_factory=dict)
    logs: dict[int, list[str]] = field(default_factory=dict)
    reports: list[Progress | Evaluation] = field(default_factory=list)
    now: float = 0.0

    @property
    def workers(self) -> list[int]:
        return [node for node in self.sessions if node >= 0]

    @property
    def weights(self) -> dict[int, Array | None]:
        return {node: session.weights for node, session in self.sessions.items()}

    def train(self, node: int) -> Any:
        return self.sessions[node].train.array()

    def evaluations(self, node: int) -> Any:
        return self.sessions[node].evaluations.array()

    def codecs(self, node: int) -> list[Any]:
        return [actor.codec for actor in self.sessions[node]._actors]


def load_small(
    options: Mapping[str, Any], workers: int = 2, codec: type[Codec] | None = None
) -> Workload:
    """Load a job; a codec class takes the place of the named one."""
    job = JobConfig(**{**SMALL, **options})
    load = workload.load(job, workers, Path("no data here"))
    if codec is None:
        return load
    return dataclasses.replace(
        load,
        codec=codec,
        codec_params=make_params(codec, {}, "codec"),
        server_codec=codec.server,
        exchange=job.exchange or codec.exchange,
    )


def run_sessions(
    options: Mapping[str, Any],
    workers: int = 2,
    servers: int = 0,
    *,
    codec: type[Codec] | None = None,
    seed: int = 0,
    seconds: Mapping[int, float | Sequence[float]] | None = None,
    stop_after: int | None = None,
    fails: bool = False,
) -> Outcome:
    """Run a job to its end, as the nodes and their submitter would.

    Args:
        options: of the job, on top of SMALL.
        codec: instead of the one in the options.
        seed: decides how long everything is under way; not the job's seed.
        seconds: worker -> virtual time that it needs for a block, or for one after the other.
        stop_after: the epoch after which the verdict is to stop; without, it is to go on.
        fails: whether sessions may fail; otherwise what they raise is raised here.
    """
    load = load_small(options, workers, codec)
    paces = {
        node: pace if isinstance(pace, Sequence) else (pace,)
        for node, pace in (seconds or {}).items()
    }
    return run_virtually(_run(load, workers, servers, seed, paces, stop_after, fails))


async def _run(
    load: Workload,
    workers: int,
    servers: int,
    seed: int,
    paces: Mapping[int, Sequence[float]],
    stop_after: int | None,
    fails: bool,
) -> Outcome:
    rng = np.random.default_rng([seed, 99])
    outcome = Outcome({}, Network(rng))
    nodes = (*range(workers), *range(-1, -1 - servers, -1))
    heard: Counter[int] = Counter()

    def report(news: Progress | Evaluation) -> None:
        outcome.reports.append(news)
        if isinstance(news, Evaluation):
            heard[news.epoch] += 1
            if heard[news.epoch] == workers and load.job.target_accuracy is not None:
                stop = stop_after is not None and news.epoch >= stop_after
                for node in range(workers):
                    judge = outcome.sessions[node].verdict
                    outcome.network.carry(-99, node, "verdict", lambda j=judge: j(news.epoch, stop))

    for node in nodes:
        log: list[str] = outcome.logs.setdefault(node, [])
        place = Place(
            node=node,
            workers=nodes[:workers],
            servers=nodes[workers:],
            transport=outcome.network.join(node),
            executor=InlineCompute(rng, paces.get(node, (0.0,))),
            report=report,
            log=log.append,
            clock=asyncio.get_running_loop().time,
        )
        outcome.sessions[node] = Session(place, load, load.initial())
        outcome.network.transports[node].deliver = outcome.sessions[node].deliver
    await _live(outcome, fails)
    outcome.now = asyncio.get_running_loop().time()
    return outcome


async def _live(outcome: Outcome, fails: bool) -> None:
    runs = {asyncio.ensure_future(s.run()): node for node, s in outcome.sessions.items()}
    finish = asyncio.ensure_future(_finish(outcome))
    await asyncio.wait([*runs, finish], return_when=asyncio.FIRST_COMPLETED)
    for task in (*runs, finish):
        task.cancel()
    await asyncio.wait([*runs, finish])
    for task, node in runs.items():
        if not task.cancelled() and (error := task.exception()) is not None:
            outcome.errors[node] = error
            if not fails:
                raise error
    if not finish.cancelled():
        finish.result()


async def _finish(outcome: Outcome) -> None:
    sessions = outcome.sessions
    await asyncio.gather(*(sessions[node].trained() for node in outcome.workers))
    job = Job(outcome.workers, [node for node in sessions if node < 0], phase=Phase.RUNNING)
    job.missing = set(outcome.workers)
    for node in outcome.workers:
        job.handle(Reported(node, Report.TRAINED, 0))
    while job.phase is Phase.FINISHING:
        totals = await asyncio.gather(*(session.quiet() for session in sessions.values()))
        for node, total in zip(sessions, totals, strict=True):
            job.handle(Reported(node, Report.QUIET, 0, totals=total))
    assert outcome.network.is_idle
    await asyncio.gather(*(session.conclude() for session in sessions.values()))
