"""What a compressor is: an array to a smaller payload, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.plugins.registry import NoParams

Array: TypeAlias = npt.NDArray[Any]


class Compressor(ABC):
    """Makes what a codec sends smaller: C(x). One instance per node and tensor group.

    Args:
        params: an instance of the class's `Params`.
        rng: random numbers, seeded by job, node and tensor group.

    Class attributes:
        Params: its parameters, a frozen dataclass; a compressor without has none.
        unbiased: whether E C(x) = x.
    """

    Params: ClassVar[type] = NoParams
    unbiased: ClassVar[bool] = False

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

    def omega(self, size: int) -> float | None:
        """Return ω with E‖C(x) - x‖² ≤ ω ‖x‖² for every x of `size` elements, if it is known."""
        return None

    def delta(self, size: int) -> float | None:
        """Return δ > 0 with E‖x - C(x)‖² ≤ (1 - δ) ‖x‖² for every x of `size` elements.

        None where it is no contraction: then error feedback cannot make up for what is lost.
        """
        return None

    @property
    def state(self) -> dict[str, Array]:
        """What it remembers, stream by stream, as a checkpoint keeps it: name -> array."""
        return {}

    @state.setter
    def state(self, state: dict[str, Array]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but got {sorted(state)}")


class Wrapper(Compressor):
    """A compressor around another one.

    Args:
        params, rng: as above.
        inner: the compressor that makes the payloads.
    """

    def __init__(self, params: Any, rng: np.random.Generator, inner: Compressor) -> None:
        super().__init__(params, rng)
        self.inner = inner

    def decompress(self, payload: Any) -> Array:
        """Return what the inner compressor makes of its payload."""
        return self.inner.decompress(payload)
