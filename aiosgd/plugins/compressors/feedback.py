"""Error feedback: what was not sent is added to what comes next."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiosgd.errors import ConfigError
from aiosgd.plugins.compressors.base import Array, Compressor, Wrapper


class ErrorFeedback(Wrapper):
    """Error feedback around a compressor that keeps no memory of its own.

    Rule: send C(x + e); e ← x + e - C(x + e), one e per stream, 0 at first. Around an unbiased
    compressor, C is its output divided by 1 + ω: by itself it is no contraction, and e would grow.

    Where a codec keeps no stream, C(x) is sent.

    Traffic: the inner compressor's.

    Source: Seide et al.: 1-Bit Stochastic Gradient Descent, Interspeech 2014; Karimireddy et al.:
    Error Feedback Fixes SignSGD and other Gradient Compression Schemes, ICML 2019, algorithm 2.

    Law: Σ sent + e = Σ x after every step.
    """

    keeps = ("error",)

    def __init__(self, params: Any, rng: np.random.Generator, inner: Compressor) -> None:
        super().__init__(params, rng, inner)
        self._scale(1 << 20)

    def _scale(self, size: int) -> float:
        """Return what makes a contraction of the inner compressor's output.

        Raises:
            ConfigError: nothing is known to do so.
        """
        if self.inner.delta(size) is not None:
            return 1.0
        omega = self.inner.omega(size) if self.inner.unbiased else None
        if omega is None:
            raise ConfigError(
                f"error feedback around {type(self.inner).__name__}: expected a compressor that "
                f"loses a known part at most (topk, randk, ...) and keeps no memory of its own"
            )
        return 1 / (1 + omega)

    def compress(self, array: Array, stream: str | None) -> Any:
        """Return the inner compressor's payload of the array and what was not sent before."""
        if stream is None:
            return self.inner.compress(array, None)
        error = self.recall("error", stream, array.shape)
        wanted = array if error is None else array + error
        payload = self.inner.compress(wanted, None)  # no stream: e is the memory
        self.memory["error"][stream] = wanted - self.decompress(payload)
        return payload

    def decompress(self, payload: Any) -> Array:
        """Return what the inner compressor makes of its payload, as a contraction."""
        array = self.inner.decompress(payload)
        scale = self._scale(array.size)
        return array if scale == 1 else array * array.dtype.type(scale)
