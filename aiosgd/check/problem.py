"""A convex problem whose optimum is known, small enough to be trained hundreds of times."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiosgd.check.case import Case
from aiosgd.check.subject import Subject
from aiosgd.codecs.base import Vector
from aiosgd.plugins.assignments import Iid
from aiosgd.plugins.compressors.casts import NoCompression
from aiosgd.plugins.datasets.base import Data
from aiosgd.plugins.models import Labels, Model
from aiosgd.plugins.optimizers import Sgd
from aiosgd.plugins.registry import NoParams, make_params
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.workload import Workload

BATCH = 8
"""Samples per block: enough for each block to have an optimum of its own."""
LEARNING_RATE = 0.05
"""Stable also where the updates of a few workers are added, each a few steps old."""
_DATA = 3  # the purpose of random numbers


class LeastSquares(Model):
    """Linear regression: the loss of a sample (x, t) is 1/2 (x·w - t)².

    A sample carries its target: its last element is t.
    """

    Params = NoParams

    def __init__(self, params: Any, inputs: tuple[int, ...], classes: int) -> None:
        size = inputs[0] - 1
        half = size // 2
        parts = {"low": (half,), "high": (size - half,)}  # two, so that they can be two groups
        self.shapes = {name: shape for name, shape in parts.items() if shape[0]}

    def initial(self, rng: np.random.Generator) -> Vector:
        """Return random weights."""
        return rng.standard_normal(self.size, np.float32)

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the mean loss; see `Model`."""
        residual = self._residual(weights, x)
        out[:] = (residual[:, None] * x[:, :-1]).sum(axis=0) / len(x)
        return float(np.mean(residual**2)) / 2, 0.0

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss, 0)."""
        return float(np.mean(self._residual(weights, x) ** 2)) / 2, 0.0

    def _residual(self, weights: Vector, x: Vector) -> Vector:
        # sums, not products of matrices: small ones of those differ between machines
        residual: Vector = (x[:, :-1] * weights).sum(axis=1) - x[:, -1]
        return residual


def make_samples(case: Case, blocks: int, *, noise: float) -> Vector:
    """Return samples and their targets, as many as a global batch has.

    The features are orthogonal over all samples: each step goes the same share of the way.
    """
    rng = np.random.default_rng([case.seed, _DATA])
    count = blocks * BATCH
    x = rng.standard_normal((count, case.size))
    if case.size <= count:
        x = np.linalg.qr(x)[0] * np.sqrt(count)
    targets = x @ rng.standard_normal(case.size) + noise * rng.standard_normal(count)
    return np.column_stack([x, targets]).astype(np.float32)


def optimum(samples: Vector) -> Vector:
    """Return the weights with the least loss over some samples."""
    x = samples.astype(np.float64)
    solution: Vector = np.linalg.lstsq(x[:, :-1], x[:, -1], rcond=None)[0]
    return solution


def make_workload(subject: Subject, case: Case, *, noise: float = 0.0) -> Workload:
    """Return the job that a case simulates: each step is one pass over all samples.

    Args:
        subject: its codec.
        case: its mode, its numbers.
        noise: of the targets; without it, each block alone has the optimum of all.
    """
    owners = Iid(NoParams()).owners(case.workers, case.redundancy)
    samples = make_samples(case, len(owners), noise=noise)
    labels = np.zeros(len(samples), np.int64)
    data = Data(samples, labels, samples[:0], labels[:0], 1)
    model = LeastSquares(NoParams(), samples.shape[1:], 1)
    params, server_params = subject.make_params()
    shapes = model.shapes
    return Workload(
        job=JobConfig(
            mode=case.mode,
            overlap=case.overlap,
            seed=case.seed,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
        ),
        codec=subject.codec,
        codec_params=params,
        server_codec=subject.server,
        server_params=server_params,
        exchange=case.exchange,
        compressor=lambda rng: NoCompression(NoParams(), rng),
        optimizer=Sgd,
        optimizer_params=make_params(Sgd, {}, "optimizer"),
        model=model,
        data=data,
        owners=owners,
        shares=None,
        steps_per_epoch=1,
        steps=case.steps,
        # with several servers, each has a group of its own
        groups=tuple({n: s} for n, s in shapes.items()) if case.servers > 1 else (dict(shapes),),
    )
