"""The test kit for codecs: n nodes in memory, any order of delivery, nothing to wait for.

    async def test_the_result_is_the_mean():
        cluster = LocalCluster(Plain, workers=3, seed=7)
        results = await cluster.step({0: [1.0], 1: [2.0], 2: [6.0]})
        assert results == {0: [3.0], 1: [3.0], 2: [3.0]}

A seeded scheduler decides, one thing at a time, which worker hands in its next block and which
link delivers its next message. Whatever it decides could happen on a real cluster, and the kit is
as strict as one: received arrays are read-only, content is what the wire would make of it, a sent
array must not change, and messages meet a node in the step that they belong to.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.codecs.base import (
    Array,
    Block,
    Codec,
    Context,
    Envelope,
    Exchange,
    Graph,
    Message,
    Mode,
    pass_on,
)
from aiosgd.errors import CodecError, ConfigError, JobFailedError
from aiosgd.plugins.registry import describe, make_params

Feed: TypeAlias = Callable[[int, int], Mapping[int, npt.ArrayLike]]  # worker, step -> blocks

# seconds; nothing in memory is ever waited for, so a hook that takes longer waits for nothing
HOOK_LIMIT = 10.0

# types that arrive as themselves even if a subclass was sent, each with its condition
_PLAIN: dict[type, Callable[[Any], bool]] = {
    int: lambda number: -(2**63) <= number < 2**64,
    **dict.fromkeys((float, str), lambda _: True),
}


class Sent(NamedTuple):
    """One entry of the log of what was sent; an envelope to three nodes makes three."""

    sender: int
    to: int
    step: int
    content: Any


class Happening(NamedTuple):
    """One thing that happened in a cluster, as its witness is told.

    Attributes:
        kind: `send`; `deliver`, before the receiver handles it; `drop`, for it comes too late;
            `update`, before the codec handles a block; `result`, when it was taken.
        node: where: the sender of what is sent, the receiver of what is delivered or dropped.
        peer: the other end of a message.
        step: the step that it belongs to.
        what: the content, the block or the result.
        number: the same for a message's two ends, from 1 on; 0 for what is no message.
    """

    kind: Literal["send", "deliver", "drop", "update", "result"]
    node: int
    peer: int | None
    step: int
    what: Any
    number: int = 0


Witness: TypeAlias = Callable[[Happening], None]


class _Parcel(NamedTuple):
    number: int
    step: int
    content: Any
    originals: list[tuple[Array, Array]]  # what the sender sent, and how it was then


class LocalCluster:
    """A codec on several nodes in memory.

    Args:
        codec: the workers' codec.
        workers: how many; their ids are 0 … workers - 1.
        servers: how many; their ids are -1, -2, …. One if there is a server codec, else none.
        server_codec: what the servers run; the codec's own server half by default.
        redundancy: how many workers compute each block; every subset of that size owns one block.
        owners: for each block the workers that compute it, instead of `redundancy`.
        exchange: what values and results are; the codec's own by default.
        params: the codec's parameters, as a job gives them.
        server_params: the server codec's, if it has its own; otherwise it gets the worker's.
        initial: the initial weights; without them the first value says how long a result is, and
            `ctx.initial` is zeros from then on. Results of another shape are refused.
        topology: who exchanges with whom, such as `Ring(RingParams()).graph(workers, seed)` of
            `aiosgd.plugins.topologies`; everybody with everybody by default.
        seed: the job's, as in `ctx.seed`; decides the order of everything, and seeds `ctx.rng`.
        schedule: decides the order in its place: other orders, with the same `ctx.rng`.
        fifo: whether each link keeps its order, as TCP does.
        compressor: makes each node's compressor from a random generator.
        witness: told of everything, at once.
        facts: more of the context: `steps` for codecs that end in a special way, `shapes`, ….

    Attributes:
        codecs: node id -> codec, started.
        sent: all that was sent, in order.
        late: messages that were dropped, because the receiver had left their step behind.
        results: per step so far, worker id -> result; in async mode None where there was none.

    Raises:
        ConfigError: the parameters are wrong, or the codec is not made for the mode.
    """

    def __init__(
        self,
        codec: type[Codec],
        *,
        workers: int = 2,
        servers: int | None = None,
        server_codec: type[Codec] | None = None,
        redundancy: int = 1,
        owners: Sequence[Sequence[int]] | None = None,
        mode: Mode = "sync",
        exchange: Exchange | None = None,
        params: Mapping[str, Any] | None = None,
        server_params: Mapping[str, Any] | None = None,
        initial: npt.ArrayLike = (),
        topology: Graph | None = None,
        seed: int = 0,
        schedule: int | None = None,
        fifo: bool = True,
        compressor: Callable[[np.random.Generator], Any] | None = None,
        witness: Witness = lambda _: None,
        **facts: Any,
    ) -> None:
        if mode not in codec.modes:
            raise ConfigError(f"mode is {mode!r}; {codec.__name__} is made for {codec.modes}")
        if topology is not None and not codec.uses_topology:
            raise ConfigError(f"topology has no effect: {codec.__name__} does not use it")
        server = server_codec or codec.server or codec
        count = int(server is not codec) if servers is None else servers
        own = theirs = make_params(codec, params or {}, "codec")
        if server is not codec and (server_params or hasattr(server, "Params")):
            theirs = make_params(server, server_params or {}, "server_codec")
        self.workers = tuple(range(workers))
        self.servers = tuple(range(-1, -1 - count, -1))
        self.late = 0
        self.sent: list[Sent] = []
        self.results: list[dict[int, Any]] = []
        self.codecs: dict[int, Codec] = {}
        self._mode, self._fifo = mode, fifo
        self._initial = frozen(vector(initial))
        self._size = self._initial.size  # of a result; 0: not known yet
        self._rng = np.random.default_rng(seed if schedule is None else schedule)
        self._tell = witness
        self._feeds: list[Feed] = []
        self._blocks: dict[int, deque[Block]] = {worker: deque() for worker in self.workers}
        self._links: dict[tuple[int, int], list[_Parcel]] = {}
        self._rescued: set[tuple[int, int]] = set()  # (worker, step)
        self._leaving: set[int] = set()  # workers through with their blocks, until they may go on
        owners = owners or list(itertools.combinations(self.workers, redundancy))
        for node in (*self.workers, *self.servers):
            rng = np.random.default_rng([seed, node % 2**32])
            made = compressor(rng) if compressor else None
            if made is not None and "shapes" in facts:
                made.shapes = facts["shapes"]
            context = Context(
                node=node,
                role="server" if node < 0 else "worker",
                workers=self.workers,
                servers=self.servers,
                server=self.servers[0] if self.servers else None,
                block_owners=tuple(map(tuple, owners)),
                mode=mode,
                exchange=exchange or codec.exchange,
                params=theirs if node < 0 else own,
                rng=rng,
                seed=seed,
                initial=self._initial,
                topology=topology,
                compressor=made,
                **facts,
            )
            self.codecs[node] = (server if node < 0 else codec).create(context)
            self.codecs[node].start()

    def __repr__(self) -> str:
        name, pending = type(self.codecs[0]).__name__, len(self.pending)
        steps = [self._step(worker) for worker in self.workers]
        return f"LocalCluster({name}, {self._mode}, in steps {steps}, {pending} pending)"

    async def step(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """Let every worker take one step.

        Args:
            values: `{worker: value}` with one block each, `{worker: {block: value}}` otherwise.
                A worker whose value is None hands in nothing and still waits for the result.

        Returns:
            Worker id -> result, in the order of the ids.

        Raises:
            ValueError: a worker or block is missing, or there is none of that id.
            CodecError: a hook broke its contract.
            JobFailedError: nothing can happen any more, and results are missing.
        """
        self.begin(values)
        await self.finish()
        return self.results[-1]

    async def run(
        self, values: Callable[[int, int], npt.ArrayLike], steps: int
    ) -> list[dict[int, Any]]:
        """Let every worker take several steps, each as far ahead as the codec lets it.

        Args:
            values: (step, block id) -> value.
            steps: how many.

        Returns:
            For each step, worker id -> result. In async mode the last step's results contain
            all that arrived later.

        Raises:
            CodecError, JobFailedError: as `step`.
        """

        def feed(worker: int, step: int) -> Mapping[int, npt.ArrayLike]:
            return {block: values(step, block) for block in self.codecs[worker].ctx.blocks}

        return await self.train(feed, steps)

    async def train(self, feed: Feed, steps: int) -> list[dict[int, Any]]:
        """Let every worker take several steps, whose blocks may depend on the results before.

        Args:
            feed: (worker, step) -> its blocks, id -> value; called when the worker enters the
                step, with its result of the one before in `results`.
            steps: how many.

        Returns, Raises:
            As `run`.
        """
        self._extend(feed, steps)
        await self.finish()
        return self.results[-steps:] if steps else []

    def begin(self, values: Mapping[int, Any]) -> None:
        """Give the workers the blocks of their next step, as `step` does; hand in none yet."""
        if unknown := [worker for worker in values if worker not in self.workers]:
            raise ValueError(f"values for workers {unknown}; expected {list(self.workers)}")
        blocks = {worker: self._own(worker, values) for worker in self.workers}
        self._extend(lambda worker, _step: blocks[worker], 1)

    def _own(self, worker: int, values: Mapping[int, Any]) -> Mapping[int, npt.ArrayLike]:
        """Return a worker's part of the values, block id -> value."""
        own = self.codecs[worker].ctx.blocks
        value = values.get(worker, {})
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            if len(own) == 1:
                return {own[0]: value}
            raise ValueError(
                f"one value for worker {worker}, which computes blocks {list(own)}; "
                "expected {block: value}"
            )
        if set(value) != set(own):
            raise ValueError(
                f"worker {worker} has values for blocks {list(value)}; expected {list(own)}, "
                "or None for a worker that hands in nothing"
            )
        return value

    @property
    def pending(self) -> list[tuple[int | None, int]]:
        """What may happen next: (sender, receiver) of a message, (None, worker) for a block."""
        blocks = [(None, worker) for worker, queue in self._blocks.items() if queue]
        return [*blocks, *(link for link in self._links if self._places(*link))]

    async def deliver(self, sender: int | None, to: int) -> None:
        """Make one of `pending` happen.

        Raises:
            LookupError: it is not pending.
            CodecError: the hook broke its contract.
        """
        if sender is None and self._blocks[to]:
            block = self._blocks[to].popleft()
            self._tell(Happening("update", to, None, block.step, block))
            await self._call(to, "update", block.step, block)
        elif sender is not None and (places := self._places(sender, to)):
            place = places[0] if len(places) == 1 else self._rng.choice(places)
            await self._receive(sender, to, place)
        else:
            raise LookupError(f"({sender}, {to}) is not pending; pending are {self.pending}")

    async def finish(self) -> None:
        """Go on until all steps that were begun have their results (async: to the very end).

        Raises:
            CodecError, JobFailedError: as `step`.
        """
        while waiting := self._unfinished():
            if pending := self.pending:
                await self.deliver(*pending[self._rng.integers(len(pending))])
            elif self._mode == "sync":
                await self._rescue(waiting)
            elif self._leaving:
                raise JobFailedError(
                    "nothing is under way, but codecs do not let their workers go on: "
                    + self._whereabouts(sorted(self._leaving))
                )
            else:
                for worker in waiting:
                    self._advance(worker)

    def stop(self) -> None:
        """Stop all codecs."""
        for codec in self.codecs.values():
            codec.stop()

    def _step(self, node: int) -> int:
        return self.codecs[node].ctx.step

    def _unfinished(self) -> list[int]:
        return [worker for worker in self.workers if self._step(worker) < len(self.results)]

    def _stepwise(self, node: int) -> bool:
        return self._mode == "sync" and node >= 0

    def _extend(self, feed: Feed, steps: int) -> None:
        if waiting := self._unfinished():
            raise LookupError(f"nodes {waiting} have not finished the last step")
        self.results += [{} for _ in range(steps)]
        self._feeds += [feed] * steps
        for worker in self.workers:
            self._load(worker)

    def _load(self, worker: int) -> None:
        """Make the blocks of the worker's step pending; what is left of the last is skipped."""
        ctx = self.codecs[worker].ctx
        values = self._feeds[ctx.step](worker, ctx.step) if ctx.step < len(self._feeds) else {}
        self._blocks[worker] = deque(
            Block(block, ctx.step, frozen(vector(value)), 1, ctx.shapes)
            for block, value in sorted(values.items())
        )
        if self._blocks[worker] and not self._size:
            self._size = self._blocks[worker][0].value.size
            for codec in self.codecs.values():
                codec.ctx.initial = frozen(np.zeros(self._size, np.float32))

    def _places(self, sender: int, to: int) -> list[int]:
        """Return the places in a link of those messages that may be the next."""
        parcels = self._links.get((sender, to))
        if not parcels:  # most links, most of the time
            return []
        now = self._step(to) if self._stepwise(to) else math.inf
        if self._fifo and parcels[0].step <= now:
            return [0]
        ready = (place for place, parcel in enumerate(parcels) if parcel.step <= now)
        return list(itertools.islice(ready, 1 if self._fifo else None))

    async def _receive(self, sender: int, to: int, place: int) -> None:
        parcel = self._links[sender, to].pop(place)
        if any(array.tobytes() != copy.tobytes() for array, copy in parcel.originals):
            raise CodecError(
                f"codec {type(self.codecs[sender]).__name__} on node {sender} changed an array "
                f"after it was sent in step {parcel.step}"
            )
        codec = self.codecs[to]
        if self._stepwise(to) and parcel.step < codec.ctx.step and not codec.accepts_late:
            self.late += 1
            self._tell(Happening("drop", to, sender, parcel.step, parcel.content, parcel.number))
            return
        if codec.ctx.role == "server":
            codec.ctx.step = parcel.step
        self._tell(Happening("deliver", to, sender, parcel.step, parcel.content, parcel.number))
        message = Message(sender, parcel.step, wire_copy(parcel.content))
        await self._call(to, "receive", parcel.step, message)

    async def _rescue(self, waiting: list[int]) -> None:
        fresh = {(node, self._step(node)) for node in waiting} - self._rescued
        if not fresh:
            where = self._whereabouts(waiting)
            raise JobFailedError(f"nothing is under way, but results are missing: {where}")
        self._rescued |= fresh
        for node, step in sorted(fresh):
            await self._call(node, "rescue", step)

    def _whereabouts(self, nodes: Sequence[int]) -> str:
        return ", ".join(f"node {node} in step {self._step(node)}" for node in nodes)

    async def _call(self, node: int, hook: str, step: int, *args: Block | Message) -> None:
        codec = self.codecs[node]
        timeout = asyncio.timeout(HOOK_LIMIT)
        try:
            async with timeout:
                send = functools.partial(self._send, node, step)
                await pass_on(getattr(codec, hook)(*args), send)
        except (Exception, SystemExit) as error:
            late = f"has not returned within {HOOK_LIMIT:g} s"
            why = late if timeout.expired() else describe(error)
            raise CodecError(
                f"codec {type(codec).__name__}: {hook} failed on node {node} in step {step}: {why}"
            ) from error
        if self._stepwise(node):
            if codec.is_done:
                self._advance(node)
        elif node >= 0:
            if hook == "update" and not self._blocks[node] and step + 1 < len(self.results):
                self._leaving.add(node)
            if node in self._leaving and codec.may_go_on:
                self._leaving.remove(node)
                self._advance(node)

    def _send(self, sender: int, step: int, envelope: Envelope) -> None:
        originals: list[tuple[Array, Array]] = []
        content = wire_copy(envelope.content, originals)
        for to in self.codecs[sender].ctx.resolve(envelope.to):
            self.sent.append(Sent(sender, to, step, content))
            parcel = _Parcel(len(self.sent), step, content, originals)
            self._links.setdefault((sender, to), []).append(parcel)
            self._tell(Happening("send", sender, to, step, content, parcel.number))

    def _advance(self, worker: int) -> None:
        """Take the worker's result, if there is one, and let it enter the next step."""
        codec = self.codecs[worker]
        result, expected = None, (self._size,)
        if codec.is_done:
            result = codec.take_result()
            if expected != (0,) and np.shape(result) != expected:
                raise CodecError(
                    f"codec {type(codec).__name__} on node {worker} in step {codec.ctx.step}: "
                    f"set_result got shape {np.shape(result)}; expected {expected}"
                )
            self._tell(Happening("result", worker, None, codec.ctx.step, result))
        results = {**self.results[codec.ctx.step], worker: result}
        self.results[codec.ctx.step] = dict(sorted(results.items()))
        codec.ctx.step += 1
        self._load(worker)


def vector(value: npt.ArrayLike) -> Array:
    """Return a value as a float32 vector."""
    return np.asarray(value, np.float32).reshape(-1)


def frozen(array: Array) -> Array:
    """Return a copy that nobody can make writable."""
    return np.ndarray(array.shape, array.dtype, array.tobytes())


def wire_copy(content: Any, originals: list[tuple[Array, Array]] | None = None) -> Any:
    """Return content as it arrives at another node.

    Args:
        content: what a codec sends.
        originals: collects each array together with its copy.

    Raises:
        TypeError: something in it cannot be sent.
    """
    if content is None or isinstance(content, bool | bytes | np.generic):
        return content
    if isinstance(content, np.ndarray) and content.dtype.kind in "biufc":
        copy = frozen(content)
        if originals is not None:
            originals.append((content, copy))
        return copy
    if isinstance(content, tuple | list):
        items = [wire_copy(item, originals) for item in content]
        return tuple(items) if isinstance(content, tuple) else items
    if isinstance(content, dict):
        return {wire_copy(key): wire_copy(value, originals) for key, value in content.items()}
    if isinstance(content, bytearray | memoryview):
        return bytes(content)
    for kind, is_sendable in _PLAIN.items():
        if isinstance(content, kind) and is_sendable(content):
            return kind(content)
    what = f"array of {content.dtype}" if isinstance(content, np.ndarray) else repr(content)
    raise TypeError(f"{what} ({type(content).__name__}) cannot be sent")
