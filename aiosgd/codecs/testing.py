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

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.codecs.base import (
    Array,
    Block,
    Codec,
    Context,
    Envelope,
    Message,
    Mode,
    Vector,
    envelopes,
)
from aiosgd.errors import CodecError, ConfigError, JobFailedError
from aiosgd.plugins.registry import describe, make_params

Values: TypeAlias = Mapping[int, "npt.ArrayLike | Mapping[int, npt.ArrayLike]"]
Results: TypeAlias = dict[int, Any]
Feed: TypeAlias = Callable[[int, int], Mapping[int, npt.ArrayLike]]


class Sent(NamedTuple):
    """One entry of the log of what was sent; an envelope to three nodes makes three."""

    sender: int
    to: int
    step: int
    content: Any


class Pending(NamedTuple):
    """Something that may happen next: a message is delivered, or a worker hands in a block.

    `sender` is None for a worker's own next block.
    """

    sender: int | None
    to: int


class _Parcel(NamedTuple):
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
        mode: `sync` or `async`.
        params: the codec's parameters, as a job gives them.
        server_params: the server codec's, if it has its own; otherwise it gets the worker's.
        initial: the initial weights. With them, results of another shape are refused.
        shapes: the parameters that the vectors are made of, name -> shape.
        steps: `ctx.steps`, for codecs that do something special in the last one.
        seed: decides the order of everything, and seeds `ctx.rng`.
        fifo: whether each link keeps its order, as TCP does.
        compressor: makes each node's compressor from a random generator.

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
        params: Mapping[str, Any] | None = None,
        server_params: Mapping[str, Any] | None = None,
        initial: npt.ArrayLike = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        steps: int = 0,
        seed: int = 0,
        fifo: bool = True,
        compressor: Callable[[np.random.Generator], Any] | None = None,
    ) -> None:
        if mode not in codec.modes:
            raise ConfigError(f"mode is {mode!r}; {codec.__name__} is made for {codec.modes}")
        server_codec = server_codec or codec.server
        if servers is None:
            servers = 1 if server_codec else 0
        own = make_params(codec, params or {}, "codec")
        theirs = own
        if server_codec and (server_params or hasattr(server_codec, "Params")):
            theirs = make_params(server_codec, server_params or {}, "server_codec")
        self.workers = tuple(range(workers))
        self.servers = tuple(-1 - i for i in range(servers))
        self.steps = steps
        self.late = 0
        self.sent: list[Sent] = []
        self.results: list[Results] = []
        self._mode = mode
        self._fifo = fifo
        self._initial = vector(initial)
        self._rng = np.random.default_rng(seed)
        self._feeds: list[Feed] = []
        self._blocks: dict[int, deque[Block]] = {worker: deque() for worker in self.workers}
        self._links: dict[tuple[int, int], list[_Parcel]] = {}
        self._rescued: set[tuple[int, int]] = set()  # (worker, step)
        if owners is None:
            owners = list(itertools.combinations(self.workers, redundancy))

        def create(node: int) -> Codec:
            rng = np.random.default_rng([seed, node % 2**32])
            ctx = Context(
                node=node,
                role="server" if node < 0 else "worker",
                workers=self.workers,
                servers=self.servers,
                server=self.servers[0] if self.servers else None,
                block_owners=tuple(map(tuple, owners)),
                mode=mode,
                steps=steps,
                params=theirs if node < 0 else own,
                rng=rng,
                initial=self._initial,
                shapes=shapes or {},
                compressor=compressor(rng) if compressor else None,
            )
            return ((server_codec or codec) if node < 0 else codec).create(ctx)

        self.codecs = {node: create(node) for node in (*self.workers, *self.servers)}
        for one in self.codecs.values():
            one.start()

    def __repr__(self) -> str:
        name = type(self.codecs[0]).__name__
        steps = [self._step(worker) for worker in self.workers]
        return f"LocalCluster({name}, {self._mode}, steps {steps}, {len(self.pending)} pending)"

    # playing whole steps

    async def step(self, values: Values) -> Results:
        """Let every worker take one step.

        Args:
            values: worker id -> the value of each of its blocks, or block id -> value. A worker
                that is left out hands in nothing and still waits for the result.

        Returns:
            Worker id -> result.

        Raises:
            CodecError: a hook broke its contract.
            JobFailedError: nothing can happen any more, and results are missing.
        """
        self.begin(values)
        await self.finish()
        return self.results[-1]

    async def run(
        self, values: Callable[[int, int], npt.ArrayLike], steps: int | None = None
    ) -> list[Results]:
        """Let every worker take several steps, each as far ahead as the codec lets it.

        Args:
            values: (step, block id) -> value.
            steps: how many; by default those that are left of the job's `steps`.

        Returns:
            For each step, worker id -> result. In async mode the last step's results contain
            all that arrived later.

        Raises:
            CodecError, JobFailedError: as `step`.
        """
        first = len(self.results)
        count = self.steps - first if steps is None else steps
        self._extend(
            lambda worker, step: {b: values(step, b) for b in self._ctx(worker).blocks}, count
        )
        await self.finish()
        return self.results[first:]

    # playing by hand

    def begin(self, values: Values) -> None:
        """Give the workers the blocks of their next step, as `step` does; hand in none yet."""

        def feed(worker: int, _step: int) -> Mapping[int, npt.ArrayLike]:
            if worker not in values:
                return {}
            value = values[worker]
            if isinstance(value, Mapping):
                return value
            return dict.fromkeys(self._ctx(worker).blocks, value)

        self._extend(feed, 1)

    @property
    def pending(self) -> list[Pending]:
        """Everything that may happen next."""
        blocks = [Pending(None, worker) for worker, queue in self._blocks.items() if queue]
        links = [Pending(*link) for link in self._links if self._deliverable(*link)]
        return blocks + links

    async def deliver(self, sender: int | None, to: int) -> None:
        """Make one of `pending` happen.

        Raises:
            LookupError: it is not pending.
            CodecError: the hook broke its contract.
        """
        if Pending(sender, to) not in self.pending:
            raise LookupError(f"{Pending(sender, to)} is not pending; pending: {self.pending}")
        if sender is None:
            block = self._blocks[to].popleft()
            await self._call(to, "update", block.step, block)
        else:
            await self._receive(sender, to)

    async def finish(self) -> None:
        """Go on until all steps that were begun have their results (async: to the very end).

        Raises:
            CodecError, JobFailedError: as `step`.
        """
        while self._unfinished():
            pending = self.pending
            if pending:
                await self.deliver(*pending[self._rng.integers(len(pending))])
            elif self._mode == "sync":
                await self._rescue()
            else:
                for worker in self._unfinished():
                    self._advance(worker)

    def stop(self) -> None:
        """Stop all codecs."""
        for codec in self.codecs.values():
            codec.stop()

    # the machinery

    def _ctx(self, node: int) -> Context:
        return self.codecs[node].ctx

    def _step(self, node: int) -> int:
        return self._ctx(node).step

    def _unfinished(self) -> list[int]:
        return [worker for worker in self.workers if self._step(worker) < len(self.results)]

    def _extend(self, feed: Feed, steps: int) -> None:
        if self._unfinished():
            raise LookupError(f"nodes {self._unfinished()} have not finished the last step")
        self.results += [{} for _ in range(steps)]
        self._feeds += [feed] * steps
        for worker in self.workers:
            self._load(worker)

    def _load(self, worker: int) -> None:
        """Make the worker's blocks of its step pending; what is left of the last is skipped."""
        ctx = self._ctx(worker)
        values: Mapping[int, Any] = {}
        if ctx.step < len(self._feeds):
            values = self._feeds[ctx.step](worker, ctx.step)
        self._blocks[worker] = deque(
            Block(block, ctx.step, frozen(vector(value)), 1, ctx.shapes)
            for block, value in sorted(values.items())
        )

    def _stepwise(self, node: int) -> bool:
        return self._mode == "sync" and node in self._blocks

    def _deliverable(self, sender: int, to: int) -> list[int]:
        """Return the places in a link of those messages that may be the next."""
        parcels = self._links[sender, to]
        ready = [
            i
            for i, parcel in enumerate(parcels)
            if not self._stepwise(to) or parcel.step <= self._step(to)
        ]
        return ready[:1] if self._fifo else ready

    async def _receive(self, sender: int, to: int) -> None:
        places = self._deliverable(sender, to)
        parcel = self._links[sender, to].pop(places[self._rng.integers(len(places))])
        if any(array.tobytes() != copy.tobytes() for array, copy in parcel.originals):
            name = type(self.codecs[sender]).__name__
            raise CodecError(
                f"codec {name} on node {sender} changed an array after it was sent in step "
                f"{parcel.step}"
            )
        codec = self.codecs[to]
        if self._stepwise(to) and parcel.step < codec.ctx.step and not codec.accepts_late:
            self.late += 1
            return
        if to in self.servers:
            codec.ctx.step = parcel.step
        message = Message(sender, parcel.step, wire_copy(parcel.content))
        await self._call(to, "receive", parcel.step, message)

    async def _rescue(self) -> None:
        waiting = self._unfinished()
        fresh = [node for node in waiting if (node, self._step(node)) not in self._rescued]
        if not fresh:
            steps = ", ".join(f"node {node} in step {self._step(node)}" for node in waiting)
            raise JobFailedError(f"nothing is under way, but results are missing: {steps}")
        for node in fresh:
            self._rescued.add((node, self._step(node)))
            await self._call(node, "rescue", self._step(node))

    async def _call(self, node: int, hook: str, step: int, *args: Block | Message) -> None:
        codec = self.codecs[node]
        try:
            async for envelope in envelopes(getattr(codec, hook)(*args)):
                self._send(node, step, envelope)
        except Exception as error:
            raise CodecError(
                f"codec {type(codec).__name__}: {hook} failed on node {node} in step {step}: "
                f"{describe(error)}"
            ) from error
        if self._stepwise(node):
            if codec.is_done:
                self._advance(node)
        elif hook == "update" and not self._blocks[node] and step + 1 < len(self.results):
            self._advance(node)

    def _send(self, sender: int, step: int, envelope: Envelope) -> None:
        originals: list[tuple[Array, Array]] = []
        content = wire_copy(envelope.content, originals)
        for to in self._ctx(sender).resolve(envelope.to):
            self.sent.append(Sent(sender, to, step, content))
            self._links.setdefault((sender, to), []).append(_Parcel(step, content, originals))

    def _advance(self, worker: int) -> None:
        """Take the worker's result, if there is one, and let it enter the next step."""
        codec, ctx = self.codecs[worker], self._ctx(worker)
        result = codec.take_result() if codec.is_done else None
        shape, expected = np.shape(result), self._initial.shape
        if result is not None and self._initial.size and shape != expected:
            raise CodecError(
                f"codec {type(codec).__name__} on node {worker} in step {ctx.step}: set_result "
                f"got shape {shape}; expected {expected}"
            )
        self.results[ctx.step][worker] = result
        ctx.step += 1
        self._load(worker)


def vector(value: npt.ArrayLike) -> Vector:
    """Return a value as a float32 vector."""
    return np.asarray(value, np.float32).reshape(-1)


def frozen(array: Array) -> Array:
    """Return a copy that nobody can make writable, as a view of received bytes is."""
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


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
    if isinstance(content, bytearray | memoryview):
        return bytes(content)
    if isinstance(content, np.ndarray) and content.dtype.kind in "biufc":
        copy = frozen(content)
        if originals is not None:
            originals.append((content, copy))
        return copy
    if isinstance(content, tuple | list):
        items = [wire_copy(item, originals) for item in content]
        return tuple(items) if isinstance(content, tuple) else items
    if isinstance(content, dict):
        return {wire_copy(k): wire_copy(v, originals) for k, v in content.items()}
    for kind in (int, float, str):
        if isinstance(content, kind):
            return kind(content)
    if isinstance(content, np.ndarray):
        raise TypeError(f"an array of dtype {content.dtype} cannot be sent")
    raise TypeError(f"{type(content).__name__} cannot be sent")
