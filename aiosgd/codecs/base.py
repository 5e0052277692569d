"""THE file for codec authors: Codec, Block, Envelope, Message, Context, SERVER, WORKERS.

A codec is an actor: one instance per node and tensor group, whose hooks never run at the same
time as each other. It needs no locks and never sees a socket. It is fed blocks (values computed
on this node) and messages (what other codecs sent), answers with envelopes, and says with
`set_result` when the step's result is complete.

    class Plain(Codec):
        def start(self):
            self.blocks = {}

        async def update(self, block):
            self.add(block.id, block.value)
            content = {"block": block.id, "value": block.value}
            return Envelope(self.ctx.workers_without(block.id), content)

        async def receive(self, message):
            self.add(message.content["block"], message.content["value"])

        def add(self, block_id, value):
            self.blocks[block_id] = value
            if len(self.blocks) == self.ctx.block_count:
                self.set_result(mean(self.blocks))
                self.blocks.clear()

A job may name a codec as FILE.py:CLASS. That file is sent to the nodes alone, without the modules
next to it: a codec of several modules is a package that is installed on every node.
"""

from __future__ import annotations

import copy
import enum
import functools
import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.errors import CodecError

Array: TypeAlias = npt.NDArray[Any]
Vector: TypeAlias = npt.NDArray[np.float32]
Mode: TypeAlias = Literal["sync", "async"]
Exchange: TypeAlias = Literal["gradients", "updates", "weights"]
Role: TypeAlias = Literal["worker", "server"]


class Group(enum.Enum):
    """A set of receivers that each node resolves for itself."""

    SERVER = "SERVER"
    WORKERS = "WORKERS"

    def __repr__(self) -> str:
        return self.value


SERVER = Group.SERVER
"""The server that is responsible for this tensor group."""
WORKERS = Group.WORKERS
"""All workers, but for the sender itself, whatever the topology."""


@dataclass(frozen=True, slots=True)
class Block:
    """What this node computed from one block of the global batch.

    Attributes:
        id: 0 … `ctx.block_count` - 1.
        step: the step it was computed in.
        value: float32 vector of the tensor group: the gradient of the block's mean loss, the
            optimizer's update, or the weights after it, as the job's `exchange` says. It may be
            put into envelopes and kept; it must not be changed.
        samples: how many samples the block has.
        shapes: the parameters of this tensor group in order, name -> shape.
    """

    id: int
    step: int
    value: Vector
    samples: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def view(self, name: str) -> Vector:
        """Return the part of `value` that belongs to one parameter, in its shape.

        Raises:
            KeyError: the tensor group has no parameter of that name.
        """
        offset = 0
        for other, shape in self.shapes.items():
            size = int(np.prod(shape, dtype=np.int64))
            if other == name:
                return self.value[offset : offset + size].reshape(shape)
            offset += size
        raise KeyError(name)


Target: TypeAlias = int | Group | Iterable[int]


@dataclass(frozen=True, slots=True)
class Envelope:
    """Something to send.

    Attributes:
        to: a node id, an iterable of ids, `SERVER` or `WORKERS`. An envelope to oneself is
            delivered like any other.
        content: anything that msgpack takes, plus numpy arrays and scalars; a tuple arrives as a
            tuple. Arrays must not be changed afterwards.
    """

    to: Target
    content: Any


@dataclass(frozen=True, slots=True)
class Message:
    """Something that another node's codec sent.

    Attributes:
        sender: the node that sent it.
        step: the step that it belongs to: the sender's own for what `update` sent; for what
            `receive` sent, the step of the message that it answers or passes on.
        content: as it was sent. Arrays are read-only views of the received bytes.
    """

    sender: int
    step: int
    content: Any


class Graph(Protocol):
    """Who sends to whom among the workers; the topologies make them.

    Attributes:
        period: after how many steps the links repeat; 1: they never change.
    """

    period: int

    def receivers(self, worker: int, step: int = 0) -> tuple[int, ...]:
        """Return the workers that a worker sends to in a step, ascending."""

    def weights(self, worker: int, step: int = 0) -> Mapping[int, float]:
        """Return the worker's row of the mixing matrix: whom it hears from, itself included."""


@dataclass(kw_only=True)
class Context:
    """What a codec may know and use. Read-only for codecs.

    Servers have all of it too, such as `block_count` and `initial`; only `blocks` is empty there.

    Attributes:
        node: this node's id: workers are 0 … n-1, servers -1, -2, ….
        role: `worker` or `server`.
        workers: ids of all workers, ascending; those that are lost are not among them any more.
        servers: ids of all servers, -1 first.
        server: the server that is responsible for this tensor group, if there is one.
        block_owners: for each block id, the workers that compute it, ascending.
        mode: `sync` or `async`.
        exchange: what blocks and results are: `gradients`, `updates` or `weights`.
        steps: how many steps each worker takes in this job.
        learning_rate: the job's, which an optimizer's schedule starts from; see `rate`.
        sample_counts: how many training samples each worker has, in the order of the ids.
        step: the step that this node is in, numbered over the whole job from 0. On a server: the
            step of the message being handled.
        params: the codec's own parameters, an instance of its `Params`.
        rng: random numbers, seeded by job, node and tensor group.
        seed: the job's, the same on every node: for draws that all nodes must make alike.
        initial: the weights that every node starts with (float32 vector of the tensor group).
        shapes: the parameters of this tensor group in order, name -> shape.
        topology: who exchanges with whom, for codecs with `uses_topology`; None is everybody with
            everybody. `neighbours` and `weights` are this node's part of it.
        lost: workers that were lost on the way, in a job that goes on without them.
    """

    node: int
    role: Role
    workers: tuple[int, ...]
    servers: tuple[int, ...] = ()
    server: int | None = None
    block_owners: tuple[tuple[int, ...], ...] = ()
    mode: Mode = "sync"
    exchange: Exchange = "gradients"
    steps: int = 0
    learning_rate: float = 0.05
    sample_counts: tuple[int, ...] = ()
    step: int = 0
    params: Any = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    seed: int = 0
    initial: Vector = field(default_factory=lambda: np.empty(0, np.float32), repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    topology: Graph | None = field(default=None, repr=False)
    schedule: Callable[[int], float] | None = field(default=None, repr=False)
    blocks_by_node: Mapping[int, tuple[int, ...]] | None = field(default=None, repr=False)
    compressor: Any = field(default=None, repr=False)
    executor: Callable[..., Awaitable[Any]] | None = field(default=None, repr=False)
    memory: Callable[[int], Array] | None = field(default=None, repr=False)
    lost: frozenset[int] = frozenset()
    logger: Callable[[str], None] | None = field(default=None, repr=False)
    _row: tuple[int, Mapping[int, float]] | None = field(default=None, init=False, repr=False)

    @property
    def rate(self) -> float:
        """The learning rate of this step, as the optimizer's schedule has it."""
        return self.learning_rate if self.schedule is None else self.schedule(self.step)

    @property
    def worker_count(self) -> int:
        """Number of workers in the job."""
        return len(self.workers)

    @property
    def block_count(self) -> int:
        """Number of blocks in a global batch."""
        return len(self.block_owners)

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that this node computes in every step."""
        return self.blocks_of(self.node)

    @property
    def redundancy(self) -> int:
        """How many workers compute each block."""
        return len(self.block_owners[0]) if self.block_owners else 1

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The workers that this one sends to in this step, ascending: all others by default.

        In a directed topology these are not those that it hears from, which are in `weights`. To
        a server all workers are neighbours.
        """
        if self.topology is None or self.role == "server":
            return self._others
        receivers = self.topology.receivers(self.node, self.step)
        return tuple(i for i in receivers if i not in self.lost) if self.lost else receivers

    @property
    def weights(self) -> Mapping[int, float]:
        """Mixing weights of those that this node hears from in this step, ascending, and its own.

        They add up to one: row `node` of the topology's mixing matrix, by default 1/n each. What
        was a lost worker's is this node's own: so the living preserve their mean where all did.
        """
        turn = self.step % self.topology.period if self.topology else 0
        if self._row is None or self._row[0] != turn:
            self._row = (turn, self._weights())
        return self._row[1]

    def _weights(self) -> Mapping[int, float]:
        if self.topology is None or self.role == "server":
            return dict.fromkeys(self.workers, 1 / self.worker_count)
        weights = self.topology.weights(self.node, self.step)
        if not self.lost:
            return weights
        living = {i: weight for i, weight in weights.items() if i not in self.lost}
        living[self.node] += sum(weights.values()) - sum(living.values())
        return living

    def lose(self, worker: int) -> None:
        """Go on without a worker; the framework calls it, before the codec's `left`."""
        self.workers = tuple(i for i in self.workers if i != worker)
        self.lost |= {worker}
        self._row = None

    def regain(self, worker: int) -> None:
        """Have a lost worker again; the framework calls it, before the codec's `joined`."""
        self.workers = tuple(sorted({*self.workers, worker}))
        self.lost -= {worker}
        self._row = None

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(worker for worker in self.workers if worker != self.node)

    def blocks_of(self, node: int) -> tuple[int, ...]:
        """Return the blocks that a node computes, ascending."""
        if self.blocks_by_node is not None:
            return self.blocks_by_node.get(node, ())
        return tuple(i for i, owners in enumerate(self.block_owners) if node in owners)

    def workers_with(self, block: int) -> tuple[int, ...]:
        """Return the workers that compute a block."""
        return self.block_owners[block]

    def workers_without(self, block: int) -> tuple[int, ...]:
        """Return the workers that do not compute a block."""
        owners = self.block_owners[block]
        return tuple(worker for worker in self.workers if worker not in owners)

    def log(self, text: object) -> None:
        """Write a line to this node's log of the job."""
        if self.logger is not None:
            self.logger(str(text))

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run heavy numpy work in the executor, so that the node stays responsive meanwhile."""
        if self.executor is None:
            return function(*args)
        return await self.executor(function, *args)

    def empty(self, size: int) -> Vector:
        """Return an uninitialised float32 vector of `size` elements out of the node's warm memory.

        New memory costs a page fault for every 4 KiB, which takes longer than the arithmetic that
        fills it. This memory was in use before, and goes back when nothing refers to it any more.
        """
        if self.memory is None:
            return np.empty(size, np.float32)
        return self.memory(4 * size).view(np.float32)

    @functools.cached_property
    def is_exact(self) -> bool:
        """Whether `compress` gives the very array that it got, as it does without a compressor."""
        probe, copied = np.ones(1, np.float32), copy.deepcopy(self.compressor)  # draws nothing
        return copied is None or copied.compress(probe, None) is probe

    def compress(self, array: Array, stream: str | None = "") -> Any:
        """Turn an array into the payload of the job's compressor.

        Args:
            array: what to send.
            stream: names the sequence of arrays that this one belongs to; compressors with
                memory keep one state per stream. None for a codec that makes up itself for what
                was lost: then they neither use nor keep a state, for twice is too much.
        """
        return array if self.compressor is None else self.compressor.compress(array, stream)

    def decompress(self, payload: Any) -> Array:
        """Return the array that `compress` made the payload of, as far as it kept it."""
        if self.compressor is None:
            return np.asarray(payload)
        restored: Array = self.compressor.decompress(payload)
        return restored

    def resolve(self, to: Target) -> tuple[int, ...]:
        """Return the node ids that an envelope's target stands for.

        Raises:
            ValueError: it is no target, names an unknown node, or there is no server.
        """
        if to is WORKERS:
            return self._others
        if to is SERVER:
            if self.server is None:
                raise ValueError("sends to SERVER, but the job has no server")
            return (self.server,)
        try:
            ids = (operator.index(to),)  # type: ignore[arg-type]
        except TypeError:
            try:
                ids = tuple(map(operator.index, to))  # type: ignore[assignment, arg-type]
            except TypeError:
                raise ValueError(
                    f"sends to {to!r}; expected a node id, ids, SERVER or WORKERS"
                ) from None
        if self.lost:
            ids = tuple(i for i in ids if i not in self.lost)  # type: ignore[assignment]
        for node in ids:
            if not (_has(self.workers, node) or node in self.servers):
                raise ValueError(f"sends to node {node}, which the job does not have")
        return ids


def _has(ascending: Sequence[int], node: int) -> bool:
    """Tell whether a node is among ids in ascending order, of which there may be thousands."""
    place = bisect_left(ascending, node)
    return place < len(ascending) and ascending[place] == node


Sends: TypeAlias = Envelope | Iterable[Envelope] | None
Hook: TypeAlias = Awaitable[Sends] | AsyncIterator[Envelope]


class Codec:
    """Decides what is sent to whom and when a step's result is complete.

    The three hooks may be `async def` that return None, one Envelope or an iterable of them, or
    async generators that yield envelopes; each is sent at once.

    Attributes:
        exchange: what the blocks and results are, unless the job says otherwise.
        exchanges: what they may be instead; a job that asks for something else is refused.
        modes: the modes that the codec is made for.
        server: the codec that servers run, if there is a server half.
        bears_loss: whether it can go on without a worker that is lost (async); a job that wants
            that, with `on_loss = "continue"`, is refused otherwise.
        accepts_late: whether `receive` wants messages of steps that this node has left behind
            (a relay may still have to pass them on); otherwise they are counted and logged.
        compresses: whether it calls `ctx.compress`; a job's compressor is refused otherwise.
        uses_topology: whether it sends to `ctx.neighbours` alone; a job's topology is refused
            otherwise.
        transient: names of attributes that `start` makes, or the codec when it needs them, and that
            a checkpoint leaves out.
        laws: names of the laws that the codec promises to keep; `aiosgd check` tests them.
        Params: its parameters, a frozen dataclass; a codec without has none.
        traffic: optional, a class method `(ctx, size) -> float`: the bytes of arrays that all nodes
            together send to others per step, on average over `ctx.steps` and without a compressor,
            for a vector of `size` elements. `aiosgd check` compares it with what is sent.
    """

    exchange: ClassVar[Exchange] = "gradients"
    exchanges: ClassVar[Sequence[Exchange]] = ("gradients", "updates", "weights")
    modes: ClassVar[Sequence[Mode]] = ("sync", "async")
    server: ClassVar[type[Codec] | None] = None
    bears_loss: ClassVar[bool] = False
    accepts_late: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    uses_topology: ClassVar[bool] = False
    transient: ClassVar[frozenset[str]] = frozenset()
    laws: ClassVar[frozenset[str]] = frozenset()
    Params: ClassVar[type]

    ctx: Context
    _result: Any = None
    _done: bool = False

    @classmethod
    def create(cls, ctx: Context) -> Codec:
        """Make the instance of one node and tensor group; the framework calls it.

        Raises:
            CodecError: a worker's codec does not implement `update`.
        """
        if ctx.role == "worker" and cls.update is Codec.update:
            raise CodecError(f"codec {cls.__name__} has no update(block); workers need one")
        codec = cls()
        codec.ctx = ctx
        return codec

    def start(self) -> None:
        """Prepare; called once before anything else, with `self.ctx` in place."""

    def stop(self) -> None:
        """Clean up; called once when the job ends, however it ends."""

    def update(self, block: Block) -> Hook:
        """Handle a block that was computed here; awaited once per block and step.

        A worker's codec must have it; a server never gets blocks and need not.
        """
        return _nothing()

    def receive(self, message: Message) -> Hook:
        """Handle a message.

        In sync mode a message of step s comes once this node is in step s, which may be before
        its own `update` of that step. What is returned is sent before the next message is
        handled, in both modes.
        """
        return _nothing()

    def rescue(self) -> Hook:
        """Return what may unblock a step that timed out (sync); called once per step.

        A codec with a rescue of its own is given the step timeout once more; the default gives up.
        """
        return _nothing()

    def left(self, worker: int) -> Hook:
        """Make up for the loss of a worker, which is gone from `ctx.workers`, `ctx.weights`, ….

        Called once for each that is lost, in jobs that go on then: whatever waits for it has to
        go on, and nobody else's messages may be lost with it.
        """
        return _nothing()

    def joined(self, worker: int) -> Hook:
        """Take in a worker that was lost and is back; it has forgotten everything.

        It begins with its `ctx.initial`. Those are the job's, or where it exchanges weights or has no
        server, what another worker has now.
        """
        return _nothing()

    def weights(self) -> Vector | None:
        """Return the weights that this codec itself keeps (a server's), or None."""
        return None

    def snapshot(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep; asked between two steps, when nothing is under way.

        By default all attributes but `ctx` and the `transient` ones: plain values, arrays and
        collections of them. A codec that keeps anything else makes it again in `restore`.
        """
        left_out = {"ctx", *self.transient}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take back what `snapshot` returned; called once, after `start`."""
        for name, value in snapshot.items():
            fresh = vars(self).get(name)  # a checkpoint keeps no factories
            factory = fresh.default_factory if isinstance(fresh, defaultdict) else None
            setattr(self, name, defaultdict(factory, value) if factory else value)

    def set_result(self, value: Any, operation: Callable[[Any, Any], Any] | None = None) -> None:
        """Publish this step's result: what the node applies next, in the form of the exchange.

        Args:
            value: float32 vector of the tensor group; not to be changed afterwards.
            operation: how a second call in the same step combines with the first,
                `operation(old, new)`; addition by default. Weights have no default, for the sum
                of two models is none.

        Raises:
            ValueError: a second call without `operation`, and the exchange is `weights`.
        """
        if self._done:
            if operation is None and self.ctx.exchange == "weights":
                raise ValueError(
                    "a second result in one step: weights are not added; give an operation, "
                    "such as lambda old, new: new"
                )
            value = (operation or operator.add)(self._result, value)
        self._result = value
        self._done = True

    @property
    def may_go_on(self) -> bool:
        """Whether this worker may leave its step (async); by default it always may.

        Asked once the step's blocks were handled, and then after each hook until it is true: a
        codec that bounds how far workers are apart says no until a message has told it more. A
        worker that is held for as long as the step timeout fails its job.
        """
        return True

    @property
    def is_done(self) -> bool:
        """Whether a result waits to be taken."""
        return self._done

    def take_result(self) -> Any:
        """Return the result and make room for the next.

        Raises:
            LookupError: there is none.
        """
        if not self._done:
            raise LookupError(f"{type(self).__name__} has no result to take")
        value, self._result, self._done = self._result, None, False
        return value


async def _nothing() -> None:
    """Send nothing."""


async def pass_on(hook: Any, send: Callable[[Envelope], None]) -> int:
    """Let a hook run, and give `send` each envelope of it at once, whichever way it is written.

    Returns:
        How many there were.

    Raises:
        TypeError: the hook is neither a coroutine nor an async generator, or gave something
            that is no Envelope.
    """
    count = 0
    if isinstance(hook, AsyncIterator):
        async for envelope in hook:
            send(_checked(envelope))
            count += 1
        return count
    if not isinstance(hook, Awaitable):
        raise TypeError(f"is not `async def`: it returned {type(hook).__name__}")
    sends = await hook
    if sends is None:
        return 0
    if isinstance(sends, Envelope):
        send(sends)
        return 1
    if not isinstance(sends, Iterable):
        raise TypeError(f"returned {type(sends).__name__}; expected None, Envelope or several")
    for envelope in sends:
        send(_checked(envelope))
        count += 1
    return count


def _checked(envelope: object) -> Envelope:
    if not isinstance(envelope, Envelope):
        raise TypeError(f"gave {type(envelope).__name__}; expected an Envelope")
    return envelope


def slices(size: int, step: int) -> list[slice]:
    """Cut `size` elements into consecutive slices of `step` elements; the last may be shorter.

    A codec that sends a large vector slice by slice lets its receiver add the first while the
    next is on the wire: a pipeline, and no more memory than what is under way.
    """
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def mean(values: Mapping[int, Array], out: Array | None = None) -> Array:
    """Return the mean over the mapping's values, added in the order of their keys.

    The fixed order gives the same bits whatever the order of arrival was.

    Args:
        values: arrays of one shape.
        out: where to put it, such as `ctx.empty(size)`; none of the values.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("the mean of no values")
    first, *others = (values[key] for key in sorted(values))
    if not others:
        return np.positive(first, out=out)
    total: Array = np.add(first, others[0], out=out)  # saves a pass that a copy would take
    for other in others[1:]:
        total += other
    if len(values) & (len(values) - 1):
        total /= len(values)
    else:  # a power of two: the same bits as a division, in half the time
        total *= total.dtype.type(1 / len(values))
    return total


def mixture(
    values: Mapping[int, Array], weights: Mapping[int, float], out: Array | None = None
) -> Array:
    """Return Σ_j weights[j] · values[j], added in the order of their keys.

    Equal weights give the bits of `mean`.

    Args:
        values: arrays of one shape.
        weights: with the keys of `values`; they add up to one, as those of `ctx.weights` do.
        out: as in `mean`.
    """
    if len(set(weights.values())) == 1:
        return mean(values, out)
    first, *others = sorted(weights)
    total: Array = np.multiply(values[first], weights[first], out=out)
    for key in others:
        total += weights[key] * values[key]
    return total
