"""Gossip: every worker averages with a few neighbours, and nobody knows the average of all."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from aiosgd.codecs.base import Array, Block, Codec, Envelope, Message, mean

Topology: TypeAlias = Literal["ring", "exponential", "one_peer", "full"]


@lru_cache
def offsets(topology: Topology, count: int, step: int = 0) -> tuple[int, ...]:
    """Return how far from its place each worker sends: place i to (i + offset) mod `count`.

    All workers have the same offsets, so that all have the same number d of neighbours, and
    W_ij = 1/(d + 1) for these and for itself is doubly stochastic, directed though the graph may
    be. In a ring and a full graph these are the Metropolis-Hastings weights.

    Args:
        topology: see `DPsgdParams`.
        count: how many workers there are.
        step: which one it is; it matters for `one_peer`.
    """
    rounds = (count - 1).bit_length()  # ⌈log2 count⌉
    steps: Iterable[int] = range(1, count)
    if topology == "ring":
        steps = (1, count - 1)
    elif topology == "exponential":
        steps = (1 << k for k in range(rounds))
    elif topology == "one_peer":
        steps = (1 << step % max(rounds, 1),)
    return tuple(sorted({each % count for each in steps} - {0}))


@dataclass(frozen=True)
class DPsgdParams:
    """Parameters of `DPsgd`.

    Attributes:
        topology: whom a worker i of n sends to.
            `ring`: i ± 1.
            `exponential`: i + 1, i + 2, i + 4, …, ⌈log2 n⌉ of them.
            `one_peer`: of these one per step, in turn. If n is a power of two, log2 n steps of
            mixing alone give the exact average.
            `full`: all others.
    """

    topology: Topology = "exponential"


class DPsgd(Codec):
    """D-PSGD: a step of one's own, then the average with one's neighbours.

    Rule: y_i = x_i - lr · g_i(x_i), the optimizer's own step, and x_i ← Σ_j W_ij y_j over worker i and
    the d neighbours that send to it, with W_ij = 1/(d + 1), added in the order of their ids. A
    worker with several blocks per step takes the mean over them as its y_i; with redundancy that
    is all the blocks that it computes, for nobody else computed them from the same weights.

    The second eigenvalue |λ| of W is what is left of the workers' differences after a step of
    mixing: about 1 - 13/n² in a large ring, (⌈log2 n⌉ - 1)/(⌈log2 n⌉ + 1) in an exponential graph
    with even n, 0 in a full one. Workers never agree exactly but in a full graph. The output of the
    published algorithm is the average of all models, that of a job is worker 0's own.

    Traffic: d payloads of S bytes per worker and step for a vector of S: d is 2, ⌈log2 n⌉, 1 or
    n - 1. A worker waits for its neighbours alone, and is at most as many steps ahead of another
    as there are hops between them.

    It does not compress: what is lost of weights is lost, for no later message makes up for it.

    Source: Lian, Zhang, Zhang, Hsieh, Zhang, Liu: Can Decentralized Algorithms Outperform
    Centralized Algorithms? A Case Study for Decentralized Parallel Stochastic Gradient Descent,
    NIPS 2017, arXiv 1705.09056, Algorithm 1 with its lines 4 (average) and 5 (step) exchanged, as
    the paper allows: X ← (X - lr ∂F(X)) W instead of X W - lr ∂F(X), in columns x_i. Exponential
    graphs: Ying, Yuan, Chen, Hu, Pan, Yin: Exponential Graph is Provably Efficient for
    Decentralized Deep Training, NeurIPS 2021, arXiv 2110.13363.

    Law: mixing preserves the average, Σ_i x_i = Σ_i y_i, which hence goes by the average gradient.
    """

    exchange = "weights"
    exchanges = ("weights",)
    modes = ("sync",)
    laws = frozenset({"single", "zero", "scale"})
    Params = DPsgdParams

    def start(self) -> None:
        """Begin without models."""
        self.place = bisect_left(self.ctx.workers, self.ctx.node)
        self.local: dict[int, Array] = {}  # own block -> weights after it
        self.models: dict[int, Array] = {}  # worker -> weights to mix in this step

    async def update(self, block: Block) -> Envelope | None:
        """Send the weights after the last own block to the neighbours, and mix them in."""
        self.local[block.id] = block.value
        if len(self.local) < len(self.ctx.blocks):
            return None
        model = block.value if len(self.local) == 1 else mean(self.local)
        self.local.clear()
        self.mix(self.ctx.node, model)
        workers, places = self.ctx.workers, (self.place + each for each in self.offsets)
        return Envelope([workers[place % len(workers)] for place in places], model)

    async def receive(self, message: Message) -> None:
        """Mix in a neighbour's weights."""
        self.mix(message.sender, message.content)

    @property
    def offsets(self) -> tuple[int, ...]:
        """How far away in the row of workers this step's neighbours are."""
        return offsets(self.ctx.params.topology, self.ctx.worker_count, self.ctx.step)

    def mix(self, worker: int, model: Array) -> None:
        """Keep a model; the last one of the step completes the average."""
        self.models[worker] = model
        if len(self.models) == len(self.offsets) + 1:
            self.set_result(mean(self.models, self.ctx.empty(model.size)))
            self.models.clear()
