"""One exchange of a codec on the simulator's network, with arrays that have a length and no content.

The codecs are the library's own: who sends what to whom, in which parts and when is theirs. A
gigabyte costs no memory and adding it no time, so thousands of workers fit into one process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any, cast

import numpy as np

from aiosgd.codecs.base import Block, Codec, Context, Envelope, Graph, Message
from aiosgd.plugins.registry import params_class
from aiosgd.runtime.simulation.loop import VirtualLoop, run_virtually
from aiosgd.runtime.simulation.network import Network, NetworkModel
from aiosgd.runtime.simulation.trace import Trace

HEADER = 50
"""Bytes of a message besides its array."""


class Sized(np.lib.mixins.NDArrayOperatorsMixin):
    """A float32 vector that has a length and no content; computing with it takes no time."""

    dtype = np.dtype(np.float32)

    def __init__(self, size: int) -> None:
        self.size = size
        self.shape = (size,)

    def __array_ufunc__(
        self, _ufunc: Any, _method: str, *terms: Any, out: Any = (), **_: Any
    ) -> Any:
        return out[0] if out else next(term for term in terms if isinstance(term, Sized))

    def __getitem__(self, where: slice) -> Sized:
        return Sized(len(range(*where.indices(self.size))))

    def __setitem__(self, where: slice, value: Any) -> None:
        pass

    def view(self, _dtype: Any) -> Sized:
        """Return it as float32 again."""
        return self

    def copy(self) -> Sized:
        """Return another of the same length."""
        return Sized(self.size)


class Identity:
    """The compressor that keeps arrays without content as they are."""

    def compress(self, array: Any, _stream: str | None) -> Any:
        """Return the array."""
        return array

    def decompress(self, payload: Any) -> Any:
        """Return the array."""
        return payload


def answer(hook: Any) -> list[Envelope]:
    """Return what a codec's hook sends; it is a coroutine that waits for nothing."""
    try:
        hook.send(None)
    except StopIteration as stop:
        sends = stop.value or ()
        return [sends] if isinstance(sends, Envelope) else list(sends)
    raise RuntimeError(f"{hook} waits for something")


class Exchange:
    """One exchange among workers that begin at the same time.

    Args:
        codec: the workers' codec.
        params: of the codec.
        size: bytes of the model; each server is responsible for an equal part of it.
        workers, servers: how many.
        model: the network.
        topology: who exchanges with whom, for codecs that use one.

    Attributes:
        sent: node -> bytes.
    """

    def __init__(
        self,
        codec: type[Codec],
        params: dict[str, Any],
        size: int,
        workers: int,
        servers: int,
        model: NetworkModel,
        topology: Graph | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.network = Network(loop, model, 0, Trace())
        self.sent: Counter[int] = Counter()
        self.over = loop.create_future()
        self.part = Sized(size // 4 // max(servers, 1))
        ids, servers_ids = tuple(range(workers)), tuple(range(-1, -1 - servers, -1))
        facts: dict[str, Any] = {
            "workers": ids,
            "servers": servers_ids,
            "block_owners": tuple((worker,) for worker in ids),
            "exchange": codec.exchange,
            "params": params_class(codec)(**params),
            "compressor": Identity(),
            "topology": topology,
            "initial": self.part,
            "memory": lambda size: Sized(size // 4),
        }
        self.codecs: dict[tuple[int, int | None], Codec] = {}
        for server in servers_ids or (None,):
            for node in ids if server is None else (*ids, server):
                role = "server" if node < 0 else "worker"
                context = Context(node=node, role=role, server=server, **facts)
                context.blocks = (node,)  # looking it up takes long with many owners
                kind = codec.server if node < 0 and codec.server else codec
                self.codecs[node, server] = kind.create(context)
                self.codecs[node, server].start()
        self.missing = sum(node >= 0 for node, _ in self.codecs)

    async def run(self) -> float:
        """Return the seconds until the last worker has its whole result."""
        for (node, group), codec in self.codecs.items():
            if node >= 0:
                block = Block(node, 0, cast("Any", self.part), 1)
                self.handle(node, group, codec.update(block))
        await self.over
        return self.loop.time()

    def handle(self, node: int, group: int | None, hook: Any) -> None:
        """Send what a codec's hook answers, and see whether it is done."""
        codec = self.codecs[node, group]
        for envelope in answer(hook):
            content = envelope.content
            values = content.values() if isinstance(content, dict) else [content]
            size = HEADER + sum(4 * each.size for each in values if isinstance(each, Sized))
            for to in codec.ctx.resolve(envelope.to):
                self.sent[node] += size
                arrive = partial(self.arrive, to, group, Message(node, 0, content))
                self.network.send(node, to, size, arrive)
        if node >= 0 and codec.is_done:
            codec.take_result()
            self.missing -= 1
            if not self.missing:
                self.over.set_result(None)

    def arrive(self, to: int, group: int | None, message: Message) -> None:
        """Let a codec handle a message."""
        self.handle(to, group, self.codecs[to, group].receive(message))


def simulate(
    codec: type[Codec],
    params: dict[str, Any],
    size: int,
    workers: int,
    servers: int,
    model: NetworkModel,
    topology: Graph | None = None,
) -> tuple[float, float]:
    """Return the seconds of an `Exchange`, and how many models its busiest node sends."""

    async def main() -> tuple[float, float]:
        exchange = Exchange(codec, params, size, workers, servers, model, topology)
        return await exchange.run(), max(exchange.sent.values()) / size

    return run_virtually(main())
