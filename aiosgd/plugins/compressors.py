"""Compressors: an array to a smaller payload, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.plugins.registry import NoParams

Array: TypeAlias = npt.NDArray[Any]


class Compressor(ABC):
    """Makes what a codec sends smaller. One instance per node and tensor group.

    Args:
        params: an instance of the class's `Params`.
        rng: random numbers, seeded by job, node and tensor group.
    """

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any, rng: np.random.Generator) -> None:
        self.params = params
        self.rng = rng

    @abstractmethod
    def compress(self, array: Array, stream: str | None) -> Any:
        """Return the payload of a float array: what msgpack takes, plus numpy arrays.

        Args:
            array: of any shape; it is never changed.
            stream: names the sequence of arrays that this one belongs to; a compressor with
                memory keeps one state per stream. None: use and keep no memory, for the caller
                makes up itself for what is lost.

        Raises:
            ValueError: the array cannot be represented, not even roughly.
        """

    @abstractmethod
    def decompress(self, payload: Any) -> Array:
        """Return the array, in its shape, as far as `compress` kept it; needs no state.

        Raises:
            ValueError: the payload is not what `compress` returns.
        """


class NoCompression(Compressor):
    """The array itself is the payload."""

    def compress(self, array: Array, stream: str | None) -> Any:
        """Return the array object that was given."""
        return array

    def decompress(self, payload: Any) -> Array:
        """Return the array object that was given."""
        if not isinstance(payload, np.ndarray):
            kind = type(payload).__name__
            raise ValueError(f"payload is {kind}; expected an array")  # noqa: TRY004 (a peer's value)
        return payload


class Fp16(Compressor):
    """Half the bytes: IEEE 754 binary16, rounded to nearest, ties to even.

    Relative error at most 2**-11 for magnitudes from 2**-14 on, absolute error at most 2**-25
    below. What it cannot represent (65520 and more, infinities, NaN) is an error: a value that
    silently became infinite would end the training unnoticed.
    """

    LIMIT: ClassVar[float] = 65520.0  # the first magnitude that rounds to infinity, not to 65504

    def compress(self, array: Array, stream: str | None) -> Any:
        """Return the array as float16, in its shape."""
        if array.dtype.kind != "f":
            raise ValueError(f"array is {array.dtype}; expected a float array")
        if array.size:
            low, high = array.min(), array.max()  # both are NaN if any value is
            if not (low > -self.LIMIT and high < self.LIMIT):
                largest = high if abs(high) >= abs(low) else low
                raise ValueError(
                    f"largest value is {largest} in stream {stream!r}; fp16 takes finite values "
                    f"up to 65504"
                )
        return array.astype(np.float16)

    def decompress(self, payload: Any) -> Array:
        """Return the values as float32."""
        if not isinstance(payload, np.ndarray) or payload.dtype != np.float16:
            kind = getattr(payload, "dtype", type(payload).__name__)
            raise ValueError(f"payload is {kind}; expected an array of float16")
        return payload.astype(np.float32)
