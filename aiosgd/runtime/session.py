"""One job on one node: the actors around its codecs and, on a worker, the training loop.

What a session needs from the world comes through three narrow things: a clock,
a transport and an executor. It never sees a socket, so it runs unchanged on simulated ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from aiosgd.codecs.base import Array, Block, Message, Vector
from aiosgd.errors import ConfigError, JobFailedError, RemoteProtocolError
from aiosgd.plugins.registry import describe
from aiosgd.runtime.actor import Actor, Joined, Left
from aiosgd.runtime.checkpoint import Checkpoint
from aiosgd.runtime.frame import Bytes, allocate
from aiosgd.runtime.learner import SKETCH, Computed, Learner, Sampler, Sketch, sketch
from aiosgd.runtime.record import Journal, Kind
from aiosgd.runtime.results import EVAL, TRAIN, Rows
from aiosgd.runtime.workload import Workload, group_size

T = TypeVar("T")

# async workers keep at most this many messages unconsumed at any peer: enough to overlap sending
# with the peer's work, few enough that a slow peer does not see ever staler updates
WINDOW = 2
# seconds between two progress reports of a node
PROGRESS_INTERVAL = 0.2
# a sync step that waits so many times the median step, and so many seconds, is worth a line, once
# there are so many steps to compare it with; and any that waits for half the step timeout
SLOW, SLOW_SECONDS, SLOW_STEPS = 3, 0.2, 10
# blocks that were left out and have a line each in the log; those after them are only counted
SKIPPED_LINES = 20


class Transport(Protocol):
    """Carries messages between the nodes of one job, in order for each pair and channel.

    Attributes:
        bytes_sent, bytes_received: of messages, headers included.
        messages_sent, messages_consumed: to and from all nodes, this one included.
    """

    bytes_sent: int
    bytes_received: int

    @property
    def messages_sent(self) -> int:
        """See above."""

    @property
    def messages_consumed(self) -> int:
        """See above."""

    def send(self, to: Sequence[int], content: Any, channel: int) -> int:
        """Send to each node without waiting; return the bytes sent in all.

        Messages of a channel keep their order; large ones of several channels take turns.
        """

    def consumed(self, sender: int) -> None:
        """Tell a sender that one of its messages was handled."""

    async def room(self, window: int) -> None:
        """Wait until no peer has more than `window` of our messages unhandled."""

    async def watch(self) -> None:
        """Keep links alive and notice dead ones, until cancelled."""


class Compute(Protocol):
    """Runs computations; see runtime.executor."""

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Run a training computation."""

    async def assist(self, function: Callable[..., T], *args: Any) -> T:
        """Run heavy work of a codec, or an evaluation."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a worker is; loss and accuracy of its newest block, rates since the last report.

    Attributes:
        waited: the share of the time since then that it waited for the exchange, 0 … 1.
    """

    node: int
    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float
    samples_per_s: float
    bytes_per_s: float
    waited: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A worker's loss and accuracy on the test set after an epoch."""

    node: int
    epoch: int
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A worker has taken a step that a checkpoint follows, and waits until it may go on."""

    node: int
    step: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is worth a line to the submitter; the text goes on after the node's name."""

    node: int
    text: str


News: TypeAlias = Progress | Evaluation | Pause | Note


@dataclass(kw_only=True)
class Place:
    """A node's place in a job and what the node lends to it.

    Attributes:
        node: this node's id.
        workers, servers: ids of all nodes of the job.
        report: takes Progress, Evaluation, Pause and Note.
        log: writes a line to the node's log of this job.
        clock: the time in seconds, finely; uvloop's own clock counts whole milliseconds.
        memory: where large vectors come from, a function of their size in bytes.
        journal: writes, or dictates, the order in which things reach the codecs.
        pauses: whether workers stop for checkpoints; somebody must let them go on then.
    """

    node: int
    workers: Sequence[int]
    servers: Sequence[int]
    transport: Transport
    executor: Compute
    report: Callable[[News], None]
    log: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter
    memory: Callable[[int], Bytes] = allocate
    journal: Journal | None = None
    pauses: bool = False


class Session:
    """One job on one node, from its first block to its last evaluation.

    Args:
        place: where it runs.
        workload: the job's plugins.
        weights: the initial weights; must not change while the session lives.
        sampler: as `Learner` takes it.

    Attributes:
        train, evaluations: the rows that the run leaves behind.
        sketches: of the worker's weights, one for each row of `evaluations`.
        samples: how many samples this node computed.
        paused_after: the step after which this worker waits for a checkpoint; -1 while it does not.
        train_s: how long training took.
        compute_s, wait_s: how long this worker computed, and waited for the exchange.
    """

    def __init__(
        self, place: Place, workload: Workload, weights: Vector, sampler: Sampler | None = None
    ) -> None:
        self.place = place
        self.train = Rows(TRAIN)
        self.evaluations = Rows(EVAL)
        self.sketches: list[Sketch] = []
        self.samples = 0
        self.train_s = self.compute_s = self.wait_s = 0.0
        self._load = workload
        learns = place.node >= 0
        self._learner = Learner(workload, weights, place.memory, sampler) if learns else None
        self._sizes = [group_size(group) for group in workload.groups]
        self._offsets = np.cumsum([0, *self._sizes])
        self._actors = [self._make_actor(group, weights) for group in range(len(self._sizes))]
        self._skipped_blocks = 0
        self._verdicts: dict[int, asyncio.Future[bool]] = {}
        self._stop_early = False
        self._started_at = 0.0
        self._mark = _Mark()
        self._ahead: list[Computed] = []
        self._evaluated_step = -1
        self._first = 0
        self._step = 0
        self.paused_after = -1
        self._may_go_on = asyncio.Event()
        self._restored: Mapping[str, Any] | None = None
        self._trained = asyncio.Event()
        self._stopped = False

    def _make_actor(self, group: int, weights: Vector) -> Actor:
        place, journal = self.place, self.place.journal
        assist = place.executor.assist
        codec = self._load.make_codec(
            place.node,
            group,
            place.workers,
            place.servers,
            _read_only(weights[self._slice(group)]),
            executor=journal.runner(group, assist) if journal else assist,
            logger=place.log,
            memory=place.memory,
        )

        def send(to: tuple[int, ...], step: int, content: Any) -> None:
            if to:
                place.transport.send(to, [group, step, content], group & 0xFFFF)

        mailbox = journal.mailbox(group) if journal else None
        skips = self._load.job.nan == "skip"
        consumed = place.transport.consumed
        return Actor(codec, self._sizes[group], send, consumed, mailbox, skips=skips)

    def _slice(self, group: int) -> slice:
        return slice(self._offsets[group], self._offsets[group + 1])

    @property
    def weights(self) -> Vector | None:
        """The weights that this node holds: a worker's own, or what a server keeps."""
        if self._learner is not None:
            return self._learner.weights
        kept = [part for actor in self._actors if (part := self._kept(actor)) is not None]
        return np.concatenate(kept) if len(kept) == len(self._actors) else None

    def _kept(self, actor: Actor) -> Vector | None:
        """Return a server's weights of a tensor group, if it is the one responsible for it."""
        return actor.codec.weights() if actor.ctx.server == self.place.node else None

    @property
    def model_state(self) -> dict[str, Array]:
        """What a worker's model remembers besides the weights."""
        return self._learner.model_state if self._learner is not None else {}

    @property
    def actors(self) -> Sequence[Actor]:
        """One for each tensor group."""
        return self._actors

    @property
    def steps(self) -> int:
        """How many steps a worker takes at most."""
        return self._load.steps

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All parameters in the order of the weights, name -> shape."""
        return {name: shape for group in self._load.groups for name, shape in group.items()}

    @property
    def late(self) -> int:
        """How many messages came too late to be handed over."""
        return sum(actor.late for actor in self._actors)

    @property
    def skipped(self) -> int:
        """How many blocks and results were not finite and were left out."""
        return self._skipped_blocks + sum(actor.skipped for actor in self._actors)

    def deliver(self, sender: int, content: Any) -> None:
        """Take a message from the transport.

        Raises:
            RemoteProtocolError: it is no codec message of this job.
        """
        match content:
            case [int(group), int(step), inner] if (
                0 <= group < len(self._actors) and 0 <= step < self._load.steps
            ):
                self._actors[group].post(Message(sender, step, inner))
            case _:
                raise RemoteProtocolError(f"node {sender} sent something that is no codec message")

    def stuck(self) -> str:
        """Return which hook has taken half the step timeout or more and goes on; empty if none."""
        limit = self._load.job.step_timeout / 2
        return next(filter(None, (actor.lingers(limit) for actor in self._actors)), "")

    def lose(self, worker: int) -> None:
        """Go on without a worker."""
        for actor in self._actors:
            actor.post(Left(worker))

    def regain(self, worker: int) -> None:
        """Have a lost worker again."""
        for actor in self._actors:
            actor.post(Joined(worker))

    def has_left(self, worker: int) -> bool:
        """Tell whether all codecs know that a worker is lost: before, it cannot come back."""
        return all(worker in actor.ctx.lost for actor in self._actors)

    def begin_at(self, step: int) -> None:
        """Begin with a later step than the first; before `run`."""
        self._first = self._step = step

    def verdict(self, epoch: int, stop: bool) -> None:
        """Take the submitter's word on whether training goes on after an epoch."""
        self._stop_early = self._stop_early or stop
        if self._stop_early and self._load.job.mode == "async":
            for actor in self._actors:
                actor.free()
        future = self._verdict(epoch)
        if not future.done():
            future.set_result(stop)

    def _verdict(self, epoch: int) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        return self._verdicts.setdefault(epoch, loop.create_future())

    async def run(self, failed: Callable[[Exception], None] = lambda _: None) -> None:
        """Run until cancelled; `trained` and `quiet` tell how far it is.

        Args:
            failed: told the first error at once; a hook that does not let itself be cancelled
                may keep this coroutine from ending for ever.

        Raises:
            ExceptionGroup: of what went wrong: CodecError, JobFailedError, PeerLostError, ….
        """

        async def watched(work: Callable[[], Awaitable[None]]) -> None:
            try:
                await work()
            except Exception as error:
                failed(error)
                raise

        try:
            await watched(self._start)
            async with asyncio.TaskGroup() as tasks:
                for work in self._tasks():
                    tasks.create_task(watched(work))
        finally:
            self.stop()

    def _tasks(self) -> list[Callable[[], Awaitable[None]]]:
        tasks: list[Callable[[], Awaitable[None]]] = [actor.run for actor in self._actors]
        tasks.append(self.place.transport.watch)
        if self._load.job.mode == "async" or self._learner is None:
            tasks.append(self._guard)
        if self._learner is not None:
            tasks.append(functools.partial(self._train, self._learner))
        return tasks

    async def _start(self) -> None:
        for actor in self._actors:
            actor.start()
        if self._restored is not None:
            for actor, state in zip(self._actors, self._restored["actors"], strict=True):
                actor.restore(state)
            self._restored = None

    def stop(self) -> None:
        """Let the codecs clean up; once, however often it is called."""
        if not self._stopped:
            self._stopped = True
            for actor in self._actors:
                actor.stop(self.place.log)

    async def trained(self) -> None:
        """Wait until this worker has taken all its steps."""
        await self._trained.wait()

    async def quiet(self) -> tuple[int, int]:
        """Wait until everything that this node has sent was handled by its receivers.

        Returns:
            How many messages it has sent and consumed so far. Handling a message may send others:
            the job as a whole is quiet once these totals agree and stay as they are.
        """
        transport = self.place.transport
        for actor in self._actors:
            await actor.settled()
        await transport.room(0)
        return transport.messages_sent, transport.messages_consumed

    async def conclude(self) -> None:
        """Apply what came in after the last step and evaluate the final weights."""
        learner = self._learner
        if learner is None:
            return
        step = self._step
        await self._reach(Kind.CONCLUDE, step)
        if (result := self._leftover(learner)) is not None:
            learner.hold(result, step)
            await self.place.executor.assist(learner.settle)
        elif self._evaluated_step == step:
            return  # the target accuracy ended training: this epoch has its row
        await self._evaluate(learner, step)

    def _leftover(self, learner: Learner) -> Vector | None:
        """Return what came after the last step; tensor groups without a result stay as they are."""
        parts = [actor.newest() for actor in self._actors]
        return None if all(part is None for part in parts) else self._whole(parts, learner)

    def _whole(self, parts: list[Vector | None], learner: Learner) -> Vector:
        """Join the results of all tensor groups; one without leaves its weights as they are."""
        there = [part for part in parts if part is not None]
        if len(there) == len(parts):
            return there[0] if len(there) == 1 else np.concatenate(there)
        whole = learner.neutral()
        for group, part in enumerate(parts):
            if part is not None:
                whole[self._slice(group)] = part
        return whole

    async def _guard(self) -> None:
        """Fail when a hook does not return: without steps that time out, nobody else would."""
        limit = self._load.job.step_timeout
        while True:
            calls = [actor.call for actor in self._actors]
            await asyncio.sleep(limit)
            for actor, call in zip(self._actors, calls, strict=True):
                if call is not None and actor.call == call:
                    raise actor.stuck(limit)

    async def _reach(self, kind: Kind, step: int) -> None:
        """Let the journal know that this task is about to look at the actors, or to change them."""
        if self.place.journal is not None:
            await self.place.journal.reach(kind, step, self.place.transport.bytes_received)

    # training

    async def _train(self, learner: Learner) -> None:
        self._started_at = self._now()
        self._mark.time = self._started_at
        for step in range(self._first, self._load.steps):
            self._step = step
            computed = await self._work(learner, step)
            waiting = self._now()
            result = await self._outcome(step, learner)
            self._record(step, computed, self._now() - waiting, fresh=result is not None)
            if result is not None:
                await self._hold(learner, result, step)
            if self._ends_epoch(step) and await self._end_epoch(learner, step):
                break
            if self._has_checkpoint(step):
                await self._pause(learner, step)
        await self.place.executor.assist(learner.settle)
        self.train_s = self._now() - self._started_at
        self._trained.set()

    # checkpoints

    def _has_checkpoint(self, step: int) -> bool:
        every = self._load.job.checkpoint_every
        last = step + 1 == self._load.steps
        return self.place.pauses and every is not None and (step + 1) % every == 0 and not last

    async def _pause(self, learner: Learner, step: int) -> None:
        """Say that this worker has taken a step, and wait until `go_on`."""
        await self.place.executor.assist(learner.settle)
        for actor in self._actors:
            await actor.settled()
        self._may_go_on.clear()
        self.paused_after = step
        self.place.report(Pause(self.place.node, step))
        await self._may_go_on.wait()

    def go_on(self, step: int | None = None) -> None:
        """Let a worker that pauses take its next step.

        Args:
            step: the step that it pauses after; any other pause goes on. None: whichever it is.
        """
        if step is None or step == self.paused_after:
            self.paused_after = -1
            self._may_go_on.set()

    def snapshot(self, step: int) -> Checkpoint:
        """Return what this node has to remember of the job up to a step, while all nodes pause.

        The arrays are those in use: write them before anything goes on.
        """
        learner = self._learner
        state = {
            "actors": [actor.snapshot() for actor in self._actors],
            "learner": None if learner is None else learner.snapshot(),
            "ahead": [dataclasses.astuple(one) for one in self._ahead],
        }
        return Checkpoint(step, None if learner is None else learner.weights, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was made; before `run`.

        Raises:
            ConfigError: it is of another job.
        """
        state, learner = checkpoint.state, self._learner
        try:
            if learner is not None and checkpoint.weights is not None:
                learner.restore(checkpoint.weights, state["learner"])
            self._ahead = [Computed(*values) for values in state["ahead"]]
            if len(state["actors"]) != len(self._actors):
                raise ValueError(f"it has {len(state['actors'])} codecs, not {len(self._actors)}")
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"the checkpoint is of another job: {describe(error)}") from error
        self._restored, self._first = state, checkpoint.step + 1
        self._step = checkpoint.step

    async def _work(self, learner: Learner, step: int) -> list[Computed]:
        """Compute this step's blocks and hand each to the codec as soon as it is there.

        With overlap the blocks of this step were computed during the last exchange; they are
        handed over, and the next step's are computed while this step is exchanged.
        """
        if self._load.job.mode == "async":
            await self._reach(Kind.LOOK, step)
            for actor in self._actors:
                actor.ctx.step = step
        ready, self._ahead = self._ahead, []
        for one in ready:
            self._post(one, step)
        if not ready:
            ready = await self._compute(learner, step, hand_over=True)
        if self._load.job.overlap and step + 1 < self._load.steps:
            self._ahead = await self._compute(learner, step + 1, hand_over=False)
        return ready

    async def _compute(self, learner: Learner, step: int, *, hand_over: bool) -> list[Computed]:
        computed = []
        for block in self._actors[0].ctx.blocks:
            if learner.may_skip and await self._is_finished(step):
                break  # with redundancy, others may have done our share
            one = await self.place.executor.compute(learner.advance, step, block)
            computed.append(one)
            if one.flaw:
                self._skip(one, step)
            if hand_over:
                self._post(one, step)
        return computed

    def _skip(self, one: Computed, step: int) -> None:
        """Count a block whose value was left out, and say so in the log."""
        self._skipped_blocks += 1
        if self._skipped_blocks <= SKIPPED_LINES:
            last = "; no more lines about such" if self._skipped_blocks == SKIPPED_LINES else ""
            block = f"skipped block {one.block}, step {step}"
            self.place.log(f"{block}: {one.flaw}; loss {one.loss:.4g}{last}")

    async def _is_finished(self, step: int) -> bool:
        """Tell whether a step has its result before its blocks were computed (sync)."""
        if self._load.job.mode == "async":
            return False
        await self._reach(Kind.LOOK, step)
        return not self._unfinished(step)

    async def _outcome(self, step: int, learner: Learner) -> Vector | None:
        """Return the step's result (sync) or the newest, if there is one (async)."""
        if self._load.job.mode == "sync":
            await self._completed(step)
            await self._reach(Kind.TAKE, step)
            return self._whole([actor.result() for actor in self._actors], learner)
        if not (self.place.journal and self.place.journal.dictates):
            for actor in self._actors:
                await actor.settled()
            await self._released()
            await self.place.transport.room(WINDOW)
        await self._reach(Kind.TAKE, step)
        return self._newest(learner)

    async def _released(self) -> None:
        """Wait until all codecs let this worker leave its step (async).

        Raises:
            JobFailedError: one did not within the step timeout.
        """
        for actor in self._actors:
            if not (actor.is_released or await self._in_time(actor.released())):
                raise JobFailedError(actor.held(self._load.job.step_timeout))

    async def _hold(self, learner: Learner, result: Vector, step: int) -> None:
        """Keep a result for the next computation to apply: one hop to the executor, not two."""
        if learner.holds_result:
            await self.place.executor.assist(learner.settle)
        learner.hold(result, step)

    def _post(self, computed: Computed, step: int) -> None:
        for group, actor in enumerate(self._actors):
            value = computed.value[self._slice(group)]
            shapes = actor.ctx.shapes
            actor.post(Block(computed.block, step, value, computed.samples, shapes))

    def _newest(self, learner: Learner) -> Vector | None:
        """Take the newest result of all tensor groups, once each has one.

        Of updates, as soon as any has one: a group without one stays as it is. What a codec held
        its worker back for is taken then, whatever the other groups have heard.
        """
        done = [actor.codec.is_done for actor in self._actors]
        if not (any(done) if self._load.exchange == "updates" else all(done)):
            return None
        return self._leftover(learner)

    async def _completed(self, step: int) -> None:
        """Wait until a step has its result, let the codecs rescue it once, then give up.

        Raises:
            JobFailedError: there is none; the message says who is waited for.
        """
        if not self._unfinished(step) or await self._in_time(self._wait_for(step)):
            return
        limit = self._load.job.step_timeout
        self.place.log(f"step {step}: no result after {limit:g} s; asking the codec to rescue")
        await self._in_time(self._rescue(step))
        if late := self._unfinished(step):
            raise JobFailedError(late[0].overdue(step, limit))

    def _unfinished(self, step: int) -> list[Actor]:
        return [actor for actor in self._actors if not actor.finished(step)]

    async def _in_time(self, waiting: Awaitable[None]) -> bool:
        """Tell whether something happens within the step timeout."""
        try:
            async with asyncio.timeout(self._load.job.step_timeout):
                await waiting
        except TimeoutError:
            return False
        return True

    async def _wait_for(self, step: int) -> None:
        """Wait until a step has its result, and say so if that takes unusually long."""
        loop, since = asyncio.get_running_loop(), self._now()
        self._alarm = loop.call_later(SLOW_SECONDS, self._look_at_wait, step, since)
        try:
            await self._finish(step)
        finally:
            self._alarm.cancel()

    def _look_at_wait(self, step: int, since: float) -> None:
        """Say whom a step waits for, if that is long by now; else look again when it is."""
        waited, limit, typical = self._now() - since, self._load.job.step_timeout / 2, ""
        if len(self.train) >= SLOW_STEPS:
            median = float(np.median(np.diff(self.train.array().time_s, prepend=0.0)))
            limit = min(limit, max(SLOW_SECONDS, SLOW * median))
            typical = f", median {1e3 * median:.0f} ms"
        if waited < limit:
            loop, left = asyncio.get_running_loop(), max(limit - waited, 1e-3)
            self._alarm = loop.call_later(left, self._look_at_wait, step, since)
        elif late := self._unfinished(step):
            text = f"waits for {late[0].culprit} in step {step}: {1e3 * waited:.0f} ms{typical}"
            self.place.log(text)
            self.place.report(Note(self.place.node, text))

    async def _finish(self, step: int) -> None:
        for actor in self._actors:
            await actor.completed(step)

    async def _rescue(self, step: int) -> None:
        """Wait for the step once more, if each codec that lacks it has a rescue of its own."""
        calls = [(actor, actor.rescue(step)) for actor in self._unfinished(step)]
        for actor, sent in calls:
            await sent
            if not (actor.can_rescue or actor.finished(step)):
                return
        await self._finish(step)

    def _staleness(self) -> int:
        if self._load.job.mode == "sync":
            return 0
        return max(actor.staleness or 0 for actor in self._actors)

    # what a run leaves

    def facts(self, *, weights: bool) -> dict[str, Any]:
        """Return all of it that there is so far, as the submitter gets it.

        Args:
            weights: whether to add the weights; a server has none before the start.
        """
        return {
            **self.rows(0, 0),
            "weights": self.weights if weights else None,
            "model_state": self.model_state if weights else None,
        }

    def rows(self, train: int, evaluations: int, most: int | None = None) -> dict[str, Any]:
        """Return the rows that there are so far, and the node's own figures.

        Args:
            train, evaluations: the first row of each table.
            most: how many rows of each at most; None: all.
        """
        end = None if most is None else evaluations + most
        return {
            "train": self.train.columns(train, most),
            "evaluations": self.evaluations.columns(evaluations, most),
            "sketches": np.array(self.sketches[evaluations:end]).reshape(-1, SKETCH),
            "figures": self.figures(),
        }

    def figures(self) -> dict[str, float]:
        """Return what this node did so far, as numbers."""
        transport = self.place.transport
        return {
            "samples": self.samples,
            "train_s": self.train_s,
            "compute_s": self.compute_s,
            "wait_s": self.wait_s,
            "late": self.late,
            "skipped": self.skipped,
            "bytes_sent": transport.bytes_sent,
            "bytes_received": transport.bytes_received,
        }

    def _now(self) -> float:
        return self.place.clock()

    def _epoch(self, step: int) -> int:
        return step // self._load.steps_per_epoch

    def _ends_epoch(self, step: int) -> bool:
        """Tell whether a step ends an epoch that is not the last: that one `conclude` ends."""
        return (step + 1) % self._load.steps_per_epoch == 0 and step + 1 < self._load.steps

    async def _end_epoch(self, learner: Learner, step: int) -> bool:
        """Evaluate; return whether the job's target accuracy is reached."""
        if self._stop_early and self._load.job.mode == "async":
            return True  # decided on an earlier epoch; `conclude` evaluates
        await self.place.executor.assist(learner.settle)
        await self._evaluate(learner, step)
        if self._load.job.target_accuracy is None or self._load.job.mode == "async":
            return False
        return await self._verdict(self._epoch(step))

    async def _evaluate(self, learner: Learner, step: int) -> None:
        loss, accuracy = await self.place.executor.assist(learner.evaluate)
        self.sketches.append(await self.place.executor.assist(sketch, learner.weights))
        self._evaluated_step = step
        epoch, node = self._epoch(step), self.place.node
        elapsed = self._now() - self._started_at
        self.evaluations.append(node, epoch, step, elapsed, loss, accuracy)
        self.place.log(f"epoch {epoch + 1}: test loss {loss:.4f}, accuracy {accuracy:.4f}")
        self.place.report(Evaluation(node, epoch, step, loss, accuracy))

    def _record(self, step: int, computed: list[Computed], wait_s: float, *, fresh: bool) -> None:
        transport, now = self.place.transport, self._now()
        count = len(computed) or 1
        samples = sum(one.samples for one in computed)
        loss = sum(one.loss for one in computed) / count if computed else np.nan
        accuracy = sum(one.accuracy for one in computed) / count if computed else np.nan
        mark, compute_s = self._mark, sum(one.seconds for one in computed)
        self.samples += samples
        self.compute_s += compute_s
        self.wait_s += wait_s
        self.train_s = now - self._started_at
        self.train.append(
            self.place.node,
            step,
            self._epoch(step),
            now - self._started_at,
            loss,
            accuracy,
            samples,
            compute_s,
            wait_s,
            transport.bytes_sent - mark.sent,
            transport.bytes_received - mark.received,
            self._staleness() if fresh else np.nan,
        )
        mark.sent, mark.received = transport.bytes_sent, transport.bytes_received
        mark.waited += wait_s
        if now - mark.time >= PROGRESS_INTERVAL:
            self._report_progress(step, loss, accuracy, now)

    def _report_progress(self, step: int, loss: float, accuracy: float, now: float) -> None:
        mark, elapsed = self._mark, now - self._mark.time
        traffic = self.place.transport.bytes_sent + self.place.transport.bytes_received
        self.place.report(
            Progress(
                self.place.node,
                step + 1,
                self._load.steps,
                self._epoch(step),
                loss,
                accuracy,
                (self.samples - mark.samples) / elapsed,
                (traffic - mark.traffic) / elapsed,
                min(mark.waited / elapsed, 1.0),
            )
        )
        mark.time, mark.samples, mark.traffic, mark.waited = now, self.samples, traffic, 0.0


@dataclass(slots=True)
class _Mark:
    """Counters as they were at the last row (sent, received) and the last progress report."""

    time: float = 0.0
    samples: int = 0
    traffic: int = 0
    waited: float = 0.0
    sent: int = 0
    received: int = 0


def _read_only(array: Vector) -> Vector:
    """Return a view that nobody can change by accident."""
    view = array.view()
    view.setflags(write=False)
    return view
