"""FedAvg: long local training, now and then the average of all models."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from aiosgd.codecs.base import (
    SERVER,
    WORKERS,
    Array,
    Block,
    Codec,
    Context,
    Envelope,
    Message,
    mean,
)


@functools.lru_cache(maxsize=64)
def draw(seed: int, number: int, total: int, count: int) -> tuple[int, ...]:
    """Return `count` of the workers 0 … `total` - 1, ascending: the same for the same arguments."""
    chosen = np.random.default_rng([seed, number]).choice(total, count, replace=False)
    return tuple(sorted(chosen.tolist()))


def participants(ctx: Context, step: int) -> tuple[int, ...]:
    """Return the workers that take part in the round of a step; all nodes draw the same."""
    total = ctx.worker_count
    count = max(1, round(ctx.params.fraction * total))
    if count == total:
        return ctx.workers
    return draw(ctx.seed, step // ctx.params.turn, total, count)


def local_turn(ctx: Context, worker: int) -> int:
    """Return how many local steps a worker takes in a round that is not cut short."""
    turn: int = ctx.params.turn
    if not ctx.params.proportional or not ctx.sample_counts:
        return turn
    return max(1, round(turn * ctx.sample_counts[worker] / max(ctx.sample_counts)))


def shares(ctx: Context) -> dict[int, float]:
    """Return each worker's weight p_i in the mean of all: 1/n, or its share of the samples."""
    counts = ctx.sample_counts if ctx.params.weighted else ()
    parts = counts or (1,) * ctx.worker_count
    return {worker: part / sum(parts) for worker, part in zip(ctx.workers, parts, strict=True)}


@dataclass(frozen=True)
class FedAvgParams:
    """Parameters of `FedAvg`.

    Attributes:
        turn: local steps per round.
        fraction: C, how many of the workers take part in a round, drawn anew for each; one at
            least.
        weighted: whether means are weighted by the workers' numbers of samples.
        proportional: whether a worker takes local steps in proportion to its number of samples,
            `turn` if it has the most: local epochs instead of local steps.
    """

    turn: int = 150
    fraction: float = 1.0
    weighted: bool = False
    proportional: bool = False

    def __post_init__(self) -> None:
        if self.turn < 1:
            raise ValueError(f"turn is {self.turn}; expected 1 or more local steps per round")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; expected above 0 and at most 1")


class FedAvgServer(Codec):
    """Waits for the models of all who take part, and gives every worker what it makes of them.

    Attributes:
        model: the weights x that the round began with.
        shares: each worker's weight p_i in the mean of all.
    """

    modes = ("sync",)

    def start(self) -> None:
        """Begin without models."""
        self.model: Array = self.ctx.initial
        self.models: dict[int, Array] = {}
        self.shares = shares(self.ctx)

    async def receive(self, message: Message) -> Envelope | None:
        """Keep a worker's model; the last one of the round completes it."""
        self.models[message.sender] = message.content
        if len(self.models) < len(participants(self.ctx, message.step)):
            return None
        models, self.models = self.models, {}
        self.model = self.combine(models)
        return Envelope(WORKERS, self.model)

    def combine(self, models: Mapping[int, Array]) -> Array:
        """Return the next weights, given the models y_i of the workers i that took part."""
        return self.average(models)

    def average(self, values: Mapping[int, Array]) -> Array:
        """Return Σ_i p_i v_i / Σ_i p_i, added in the order of the ids."""
        if not self.ctx.params.weighted:
            return mean(values)
        whole = self.share(values)
        first, *others = sorted(values)
        total: Array = values[first] * np.float32(self.shares[first] / whole)
        for worker in others:
            total += values[worker] * np.float32(self.shares[worker] / whole)
        return total

    def share(self, workers: Collection[int]) -> float:
        """Return what share of all some workers stand for, Σ_i p_i over them."""
        return sum(self.shares[worker] for worker in sorted(workers))


class FedAvg(Codec):
    """Trains locally for `turn` steps, then goes on from the average of all workers' models.

    Rule: y_i starts from x and is the worker's own below the turn; at step t with (t + 1) mod turn
    = 0, and at the job's last step, x ← Σ_i p_i y_i / Σ_i p_i over those that take part, and
    every worker goes on from there; p_i = 1/n, or n_i/N if `weighted` by the numbers of samples.
    A worker with several blocks per step takes the mean over them as its own model.

    With a `fraction` C below 1, m = max(1, C · n) workers are drawn for each round, by every node
    for itself from the job's seed. The others compute their blocks as ever, but keep x.

    Traffic: m models up and n down in a round.

    A job that stops before its last step, as at its `target_accuracy`, may end without the last
    average: each worker then ends with the newest that arrived and what it trained since.

    Source: McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
    Deep Networks from Decentralized Data, AISTATS 2017, arXiv 1602.05629, Algorithm 1; there the
    mean is `weighted`, which differs where workers have different numbers of samples.

    Law: with turn 1 and all workers, all models are the mean after each step: sync SGD.

    Attributes:
        model: the weights x that the round began with.
        current: the worker's own weights y_i.
    """

    exchange = "weights"
    exchanges = ("weights",)
    modes = ("sync",)
    server = FedAvgServer
    laws = frozenset({"final", "single"})
    Params = FedAvgParams

    @classmethod
    def traffic(cls, ctx: Context, size: int) -> float:
        """Return the bytes of arrays per step."""
        rounds: int = -(-ctx.steps // ctx.params.turn)
        models = len(participants(ctx, 0)) + ctx.worker_count
        return rounds * models * 4 * size / ctx.steps

    def start(self) -> None:
        """Begin without blocks; each step replaces those of the step before."""
        self.local: dict[int, Array] = {}
        self.model: Array = self.ctx.initial
        self.current: Array = self.ctx.initial
        self.turn = local_turn(self.ctx, self.ctx.node)
        self.takes_part = True

    async def update(self, block: Block) -> Envelope | None:
        """Go on alone, or send the model to the server at the end of a round."""
        self.local[block.id] = block.value
        if block.id != self.ctx.blocks[-1]:
            return None
        place = block.step % self.ctx.params.turn
        if place == 0:
            self.takes_part = self.ctx.node in participants(self.ctx, block.step)
        if self.takes_part and place < self.turn:
            self.current = self.corrected(mean(self.local))
        if place + 1 < self.ctx.params.turn and block.step + 1 != self.ctx.steps:
            self.set_result(self.current)
        elif self.takes_part:
            self.conclude()
            return Envelope(SERVER, self.current)
        return None

    async def receive(self, message: Message) -> None:
        """Go on from the average."""
        self.renew(message.content)
        self.model = self.current = message.content
        self.set_result(self.model)

    def corrected(self, weights: Array) -> Array:
        """Return what becomes of `current` in a local step that leads to some weights."""
        return weights

    def conclude(self) -> None:
        """Take note that this worker's part of a round ends with `current`."""

    def renew(self, model: Array) -> None:
        """Take note of the weights that come after `model`, whether this worker took part or not."""
