"""The older synchronous codec interface, adapted.

A codec written for it runs with nothing but its import lines changed:

    from aiosgd.legacy import BlockWeight, Codec, GlobalSettings, netEncapsulation, Parameter_Server

Its hooks are plain methods or generators; `create` wraps each instance in an actor of this
framework, so its attributes and methods may have any name. As there, what a hook gets and sends
is its own: arrays are copied on the way in and out, and may be changed. Servers are called -2.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

from aiosgd.codecs import base
from aiosgd.codecs.base import SERVER, Array, Block, Context, Envelope, Message, Vector

__all__ = ["BlockWeight", "Codec", "GlobalSettings", "Parameter_Server", "netEncapsulation"]

Parameter_Server = -2  # the older framework's own spelling
"""Stands for the server, alone or among other targets; also the `node_id` of a server's codec."""

# the context of the codec whose hook runs now: several nodes may share a process
_context: ContextVar[Context] = ContextVar("aiosgd.legacy")


class netEncapsulation:  # noqa: N801
    """Something to send.

    Attributes:
        target: node ids.
        content: what they get.
    """

    def __init__(self, send_to_who: int | Iterable[int], content: Any) -> None:
        several = isinstance(send_to_who, Iterable)
        self.target: list[int] = list(send_to_who) if several else [send_to_who]  # type: ignore[arg-type, list-item]
        self.content = content


class BlockWeight:
    """What this node computed from one block.

    Attributes:
        block_id: 0 … `GlobalSettings.get_default().block_count` - 1.
        content: the gradient, update or weights, as the job's exchange says.
        company: the workers that compute the block.
        adversary: the workers that do not.
    """

    def __init__(
        self,
        block_id: int,
        content: Array,
        company: Iterable[int] = (),
        adversary: Iterable[int] = (),
    ) -> None:
        self.block_id = block_id
        self.content = content
        self.company = set(company)
        self.adversary = set(adversary)


class GlobalSettings:
    """The job as a codec's hook sees it."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def node_count(self) -> int:
        """Number of workers."""
        return self._context.worker_count

    @property
    def nodes(self) -> set[int]:
        """The workers' ids."""
        return set(self._context.workers)

    @property
    def redundancy(self) -> int:
        """How many workers compute each block."""
        return self._context.redundancy

    @property
    def block_count(self) -> int:
        """Number of blocks in a global batch."""
        return self._context.block_count

    @property
    def blocks(self) -> list[int]:
        """The blocks that this node computes."""
        return list(self._context.blocks)

    @property
    def block_2_node(self) -> list[list[int]]:
        """For each block the workers that compute it."""
        return [list(owners) for owners in self._context.block_owners]

    @property
    def node_2_block(self) -> dict[int, list[int]]:
        """For each worker the blocks that it computes."""
        return {node: list(self._context.blocks_of(node)) for node in self._context.workers}

    @property
    def block_assignment(self) -> GlobalSettings:
        """Where the older framework has the properties on blocks: the settings themselves."""
        return self

    @staticmethod
    def get_default() -> GlobalSettings:
        """Return the settings of the job whose codec is running.

        Raises:
            LookupError: no codec's hook or constructor is running.
        """
        context = _context.get(None)
        if context is None:
            raise LookupError(
                "GlobalSettings.get_default(): no codec is running; call it in a hook"
            )
        return GlobalSettings(context)

    def get_adversary(self, block_id: int) -> set[int]:
        """Return the workers that do not compute a block."""
        return set(self._context.workers_without(block_id))


Sends: TypeAlias = netEncapsulation | Iterable[netEncapsulation | None] | None


class Codec(base.Codec):
    """Base class of codecs in the older form: override `update_blocks` and `receive_blocks`.

    An instance is a codec of the older framework only; `create` makes one that this framework
    can use. The class attributes (`exchange`, `modes`, `server`, …) are this framework's.
    """

    __result: Any = None

    def __init__(self, node_id: int) -> None:
        self.__node_id = node_id

    @classmethod
    def create(cls, ctx: Context) -> base.Codec:
        """Make the actor of one node; it is named like this class, for messages."""
        facts = {"accepts_late": cls.accepts_late, "__module__": cls.__module__}
        actor: _Actor = type(cls.__name__, (_Actor,), facts)()
        actor.ctx = ctx
        actor.codec = actor.within(cls, Parameter_Server if ctx.role == "server" else ctx.node)
        return actor

    @property
    def node_id(self) -> int:
        """This node's id: `Parameter_Server` on a server."""
        return self.__node_id

    def update_blocks(self, block_weight: BlockWeight) -> Sends:
        """Handle a block that was computed here; return or yield what to send."""
        raise NotImplementedError(f"{type(self).__name__} does not implement update_blocks")

    def receive_blocks(self, content: Any) -> Sends:
        """Handle the content of a message; return or yield what to send."""
        raise NotImplementedError(f"{type(self).__name__} does not implement receive_blocks")

    def do_something_to_save_yourself(self) -> Sends:
        """Return or yield what may unblock a step that timed out (sync); called once per step."""

    def dispose(self) -> None:
        """Clean up; called once when the job ends."""

    def record(self, message: object) -> None:
        """Write a line to this node's log of the job."""
        context = _context.get(None)
        if context is not None:
            context.log(f"Codec: {type(self).__name__}, Report: {message}.")

    def set_result(self, content: Any, operation: Callable[[Any, Any], Any] | None = None) -> None:
        """Make `operation(old, content)` the step's result.

        Args:
            content: array of the size of the weights.
            operation: addition by default. `old` is `numpy.asarray(0.0)` where there is none.
        """
        old = np.asarray(0.0) if self.__result is None else self.__result
        self.__result = old + content if operation is None else operation(old, content)

    def get_result(self) -> Any:
        """Return the result and make room for the next.

        Raises:
            LookupError: there is none.
        """
        if self.__result is None:
            raise LookupError(f"{type(self).__name__} has no result to take")
        result, self.__result = self.__result, None
        return result

    def is_done(self) -> bool:  # type: ignore[override]
        """Tell whether a result waits to be taken."""
        return self.__result is not None


class _Actor(base.Codec):
    """Runs a codec of the older form in this framework."""

    codec: Codec

    def within(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the codec, for which `GlobalSettings` are this node's meanwhile."""
        token = _context.set(self.ctx)
        try:
            return function(*args)
        finally:
            _context.reset(token)

    def stop(self) -> None:
        self.within(self.codec.dispose)

    async def update(self, block: Block) -> AsyncIterator[Envelope]:
        company, adversary = self.ctx.workers_with(block.id), self.ctx.workers_without(block.id)
        weight = BlockWeight(block.id, block.value.copy(), company, adversary)
        for envelope in self.sends(self.codec.update_blocks, weight):
            yield envelope

    async def receive(self, message: Message) -> AsyncIterator[Envelope]:
        for envelope in self.sends(self.codec.receive_blocks, _copy(message.content)):
            yield envelope

    async def rescue(self) -> AsyncIterator[Envelope]:
        for envelope in self.sends(self.codec.do_something_to_save_yourself):
            yield envelope

    @property
    def is_done(self) -> bool:
        return self.codec.is_done()

    def take_result(self) -> Vector:
        return np.asarray(self.codec.get_result(), np.float32)

    def sends(self, hook: Callable[..., Sends], *args: Any) -> Iterator[Envelope]:
        """Call a hook and yield what it sends, each as soon as it is there."""
        sends = self.within(hook, *args)
        iterator = iter(sends if isinstance(sends, Iterable) else [sends])
        while (sent := self.within(next, iterator, _END)) is not _END:
            if sent is not None:
                yield self.envelope(sent)

    def envelope(self, sent: object) -> Envelope:
        """Return what `sent` is here, in the framework's own form."""
        if not isinstance(sent, netEncapsulation):
            raise TypeError(f"gave {type(sent).__name__}; expected a netEncapsulation")
        server = self.ctx.resolve(SERVER) if Parameter_Server in sent.target else ()
        targets = [server[0] if node == Parameter_Server else node for node in sent.target]
        return Envelope(targets, _copy(sent.content))


_END = object()


def _copy(content: Any) -> Any:
    """Return a copy of content in which every array is new and writable."""
    if isinstance(content, np.ndarray):
        return content.copy()
    if isinstance(content, list | tuple):
        items = [_copy(item) for item in content]
        return items if isinstance(content, list) else tuple(items)
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return content
