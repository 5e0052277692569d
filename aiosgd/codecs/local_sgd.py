"""Local SGD and DiLoCo: workers train alone for some steps, then all average, without a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aiosgd.codecs.base import (
    WORKERS,
    Array,
    Block,
    Codec,
    Context,
    Envelope,
    Message,
    Vector,
    mean,
)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")


@dataclass(frozen=True)
class LocalSgdParams:
    """Parameters of `LocalSgd`.

    Attributes:
        period: local steps from one average to the next, H.
        warmup_steps: steps at the beginning that are averaged one by one (post-local SGD).
    """

    period: int = 10
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _at_least_one(period=self.period)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")


class LocalSgd(Codec):
    """Trains alone; every H steps all workers go on from the average of their weights.

    Rule: x_i ← y_i, the worker's own weights after its step; at step t with (t + 1) mod H = 0, in
    the warm-up and at the job's last step, x_i ← 1/n · Σ_j y_j, added in the order of the worker
    ids. A worker with several blocks per step takes the mean over them as its y_i.

    A job that stops before its last step, as at its `target_accuracy`, may end without an average.

    Traffic: (n - 1) · S from each worker every H steps, for a vector of S bytes.

    Source: Stich: Local SGD Converges Fast and Communicates Little, ICLR 2019, arXiv 1805.09767;
    the warm-up: Lin, Stich, Patel, Jaggi: Don't Use Large Mini-Batches, Use Local SGD, ICLR 2020,
    arXiv 1808.07217, there called post-local SGD.

    Law: with H = 1 all weights are their mean after each step, which is sync SGD.
    """

    exchange = "weights"
    exchanges = ("weights",)
    modes = ("sync",)
    laws = frozenset({"final", "single", "zero", "scale"})
    Params: ClassVar[type] = LocalSgdParams

    def start(self) -> None:
        """Begin without weights."""
        self.local: dict[int, Array] = {}  # own block -> weights after it
        self.models: dict[int, Array] = {}  # worker -> what it shares in this step

    async def update(self, block: Block) -> Envelope | None:
        """Go on alone after the last own block, or share what all average in this step."""
        self.local[block.id] = block.value
        if len(self.local) < len(self.ctx.blocks):
            return None
        self.model = mean(self.local)
        self.local.clear()
        part = self.part(self.ctx, block.step)
        if part is None:
            self.set_result(self.model)
            return None
        self.add(self.ctx.node, self.model[part])
        return Envelope(WORKERS, self.model[part])

    async def receive(self, message: Message) -> None:
        """Count another worker's weights in."""
        self.add(message.sender, message.content)

    def add(self, worker: int, model: Array) -> None:
        """Keep what a worker shares; the last of the step completes the average."""
        self.models[worker] = model
        if len(self.models) == self.ctx.worker_count:
            self.set_result(self.merged(mean(self.models)))
            self.models.clear()

    @classmethod
    def part(cls, ctx: Context, step: int) -> slice | None:
        """Return which part of the weights is averaged after a step."""
        params = ctx.params
        due = step < params.warmup_steps or (step + 1) % params.period == 0
        return slice(None) if due or step + 1 == ctx.steps else None

    def merged(self, average: Array) -> Array:
        """Return the weights to go on from."""
        return average

    @classmethod
    def traffic(cls, ctx: Context, size: int) -> float:
        """Return the bytes of arrays per step, of all nodes together."""
        parts = (cls.part(ctx, step) for step in range(ctx.steps))
        count = sum(len(range(size)[part]) for part in parts if part is not None)
        workers = ctx.worker_count
        return 4 * count * workers * (workers - 1) / ctx.steps


@dataclass(frozen=True)
class DiLoCoParams:
    """Parameters of `DiLoCo`.

    Attributes:
        period: local steps of a round, H; the paper's is 500.
        learning_rate: that of the outer optimizer.
        momentum: that of the outer optimizer, in Nesterov's form.
    """

    period: int = 10
    learning_rate: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _at_least_one(period=self.period)
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; expected at least 0 and below 1")


class DiLoCo(LocalSgd):
    """Trains alone for H steps, then takes an outer step along what the workers did on average.

    Rule: x_i ← y_i, the worker's own weights after its step, and at the end of a round, at step t
    with (t + 1) mod H = 0 and at the job's last, with the weights θ that the round began with:
    Δ = θ - 1/n · Σ_j y_j, the outer gradient; b ← μ b + Δ; θ ← θ - η (Δ + μ b); x_i ← θ.
    All workers compute the same outer step of their own, in the same order: nobody sends θ.

    The inner optimizer is the job's, and keeps its state from round to round; the paper's is AdamW.

    Traffic: as `LocalSgd`, (n - 1) · S from each worker every H steps.

    Source: Douillard, Feng, Rusu, Chhaparia, Donchev, Kuncoro, Ranzato, Szlam, Shen: DiLoCo:
    Distributed Low-Communication Training of Language Models, 2023, arXiv 2311.08105, Algorithm 1
    with its outer optimizer of choice, Nesterov's momentum, in the form of `torch.optim.SGD`.

    Law: with an outer learning rate of 1 and no momentum it is `LocalSgd`, up to rounding.
    """

    laws = frozenset({"final"})
    Params = DiLoCoParams

    def start(self) -> None:
        """Begin the first round with the initial weights."""
        super().start()
        self.outer: Vector = self.ctx.initial.copy()
        self.momentum = np.zeros_like(self.outer)

    @classmethod
    def part(cls, ctx: Context, step: int) -> slice | None:
        """Return which part of the weights ends a round after a step."""
        due = (step + 1) % ctx.params.period == 0 or step + 1 == ctx.steps
        return slice(None) if due else None

    def merged(self, average: Array) -> Array:
        """Take the outer step; return the weights that the next round begins with."""
        return self.stepped(slice(None), average).copy()

    def stepped(self, part: slice, average: Array) -> Array:
        """Take the outer step of a part of the weights, and return a view of that."""
        params, outer, momentum = self.ctx.params, self.outer[part], self.momentum[part]
        gradient = outer - average
        momentum *= params.momentum
        momentum += gradient
        outer -= params.learning_rate * (gradient + params.momentum * momentum)
        return outer


@dataclass(frozen=True)
class StreamingDiLoCoParams(DiLoCoParams):
    """Parameters of `StreamingDiLoCo`.

    Attributes:
        fragments: into how many parts of about the same size the weights are cut.
    """

    fragments: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(fragments=self.fragments)
        if self.period % self.fragments:
            raise ValueError(
                f"period is {self.period} with {self.fragments} fragments; expected a multiple"
            )


class StreamingDiLoCo(DiLoCo):
    """DiLoCo one fragment at a time: each has rounds of its own, which end one after the other.

    Rule: as `DiLoCo` for each of P fragments of the weights by itself; fragment p ends its rounds
    at steps t with (t + 1) mod H = (p + 1) · H/P mod H, and all of them end at the job's last. The
    rest of a worker's weights stays its own meanwhile.

    A fragment is a part of the vector, whatever layers it cuts; the paper's are sets of layers. Of
    its three ideas this is the first: nothing is computed while a fragment is under way, and
    nothing is quantised.

    Traffic: (n - 1) · S/P from each worker every H/P steps: as much as `DiLoCo`, with 1/P of its
    peak.

    Source: Douillard et al.: Streaming DiLoCo with overlapping communication: Towards a Distributed
    Free Lunch, 2025, arXiv 2501.18512.

    Law: with one fragment it is `DiLoCo`, bit for bit.
    """

    Params = StreamingDiLoCoParams

    @classmethod
    def part(cls, ctx: Context, step: int) -> slice | None:
        """Return the fragment that ends its round after a step."""
        turn, rest = divmod(step + 1, ctx.params.period // ctx.params.fragments)
        if step + 1 == ctx.steps:
            return slice(None)
        if rest:
            return None
        size, count, place = (
            ctx.initial.size,
            ctx.params.fragments,
            (turn - 1) % ctx.params.fragments,
        )
        return slice(size * place // count, size * (place + 1) // count)

    def merged(self, average: Array) -> Array:
        """Take the fragment's outer step; return it within this worker's own weights."""
        part = self.part(self.ctx, self.ctx.step)
        assert part is not None
        result: Array = self.model.copy()
        result[part] = self.stepped(part, average)
        return result
