"""Low-rank compressors: a matrix as the product of two thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiosgd.plugins.compressors.base import (
    FLOATS,
    Array,
    Compressor,
    checked_array,
    checked_shape,
    fields,
    floats,
    require_finite,
)


@dataclass(frozen=True)
class PowerSgdParams:
    """Parameters of `PowerSgd`.

    Attributes:
        rank: r, of what is sent.
        feedback: whether what was not sent is added to the next array.
    """

    rank: int = 4
    feedback: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected 1 or more")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the matrix that an array is seen as: itself, or nearly square with room for all."""
    if len(shape) == 2:
        return shape
    size = math.prod(shape)
    rows = max(1, math.isqrt(size))
    return rows, -(-size // rows)


class PowerSgd(Compressor):
    """The best approximation of low rank, as one step of power iteration finds it.

    Rule: M ← x + e as a matrix of m rows and n columns; P ← orthogonal basis of M Q; Q ← Mᵀ P;
    send P and Q, C(x) = P Qᵀ; e ← M - P Qᵀ. The next step begins with this Q, so that the
    iteration goes on from step to step; the first begins with a random one.

    An array that is no matrix is read row by row into one that is nearly square. Each node
    compresses its own values: P and Q are not added on the way, as the paper's all-reduce does;
    what a codec adds are the products, so it needs no all-reduce, and the mean over N nodes has
    rank up to r N. It makes up itself for what is lost, unless `feedback` is off. Where a codec
    keeps no stream, Q is random each time and there is no e.

    Traffic: 4 r (m + n) bytes.

    Source: Vogels, Karimireddy & Jaggi: PowerSGD: Practical Low-Rank Gradient Compression for
    Distributed Optimization, NeurIPS 2019, algorithms 1 and 2.

    Law: exact for matrices of rank r or less; for a constant matrix without feedback, the squared
    error approaches that of the best approximation by a factor of (s_{r+1}/s_r)⁴ per step, s being
    its singular values.
    """

    Params = PowerSgdParams
    params: PowerSgdParams
    keeps = ("q", "error")

    def compress(self, array: Array, stream: str | None) -> dict[str, Any]:
        """Return the array's shape, and P and Q."""
        rows, columns = matrix_shape(array.shape)
        matrix = np.zeros((rows, columns), array.dtype)
        matrix.reshape(-1)[: array.size] = floats(array)
        q, error = self._recalled(matrix, stream)
        if error is not None:
            matrix += error
        p = np.linalg.qr(matrix @ q)[0]
        q = matrix.T @ p
        require_finite(q, stream)
        if stream is not None:
            self.memory["q"][stream] = q
            if self.params.feedback:
                self.memory["error"][stream] = matrix - p @ q.T
        return {"shape": array.shape, "p": p, "q": q}

    def _recalled(self, matrix: Array, stream: str | None) -> tuple[Array, Array | None]:
        """Return the Q to begin with, and what was not sent."""
        q = error = None
        rank = min(self.params.rank, *matrix.shape)
        if stream is not None:
            q = self.recall("q", stream, (matrix.shape[1], rank))
            error = self.recall("error", stream, matrix.shape)
        if q is None:
            q = self.rng.standard_normal((matrix.shape[1], rank)).astype(matrix.dtype)
        return q, error

    def decompress(self, payload: Any) -> Array:
        """Return P Qᵀ in the array's shape."""
        shape, p, q = fields(payload, "shape", "p", "q")
        shape = checked_shape(shape)
        rows, columns = matrix_shape(shape)
        rank = min(self.params.rank, rows, columns)
        checked_array(p, "p", FLOATS, (rows, rank))
        checked_array(q, "q", (p.dtype,), (columns, rank))
        matrix: Array = p @ q.T
        return matrix.reshape(-1)[: math.prod(shape)].reshape(shape)
