"""One worker's numeric side: its weights, its samples, and what a block is made of.

Everything here is plain computation that may run in an executor's thread, one call at a time.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosgd.codecs.base import Array, Exchange, Vector
from aiosgd.errors import JobFailedError
from aiosgd.plugins.optimizers import Optimizer
from aiosgd.runtime import finite
from aiosgd.runtime.frame import Bytes, allocate
from aiosgd.runtime.workload import Workload

Indices = npt.NDArray[np.int64]
Sketch = npt.NDArray[np.float64]

SKETCH = 64
"""Numbers of a sketch: what it says of a distance is off by 1/√128, 9 %, on average at most."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of one block.

    Attributes:
        block: its id.
        value: gradient, update or weights, as the job's exchange says.
        loss: mean loss over the block, before the step.
        accuracy: share of the block's samples that were classified rightly.
        samples: number of samples.
        seconds: time that the computation took.
        flaw: what was not finite, so that the value is a neutral one; empty if nothing was.
    """

    block: int
    value: Vector
    loss: float
    accuracy: float
    samples: int
    seconds: float
    flaw: str = ""


class Sampler:
    """Which samples a block of a step has: a function of seed, step, block and nothing else.

    Shared data: each pass over the data is one permutation, cut into global batches, and those
    into blocks; what is left over after the last whole batch waits for another permutation.
    Federated data: each worker goes through its own samples, shuffled anew in every pass; what is
    left over at the end of a pass comes with the first of the next.
    """

    def __init__(self, workload: Workload) -> None:
        self._load = workload
        orders = 4 * len(workload.shares or [0])
        self._order = functools.lru_cache(maxsize=orders)(self._permutation)

    def indices(self, step: int, block: int) -> Indices:
        """Return the sample indices of a block."""
        size = self._load.job.batch_size
        if self._load.shares is not None:
            worker, place, count = self._places[block]
            return self._own(worker, (step * count + place) * size, size)
        epoch, position = divmod(step, self._load.steps_per_epoch)
        first = (position * self._load.block_count + block) * size
        return self._order(epoch, -1)[first : first + size]

    @functools.cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """For each block its worker, its place among that worker's blocks, and their number."""
        firsts = [owners[0] for owners in self._load.owners]
        counts, before, places = Counter(firsts), Counter[int](), []
        for worker in firsts:
            places.append((worker, before[worker], counts[worker]))
            before[worker] += 1
        return places

    def _own(self, worker: int, start: int, count: int) -> Indices:
        available = len(self._share(worker))
        parts = []
        while count:
            epoch, offset = divmod(start, available)
            part = self._order(epoch, worker)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _share(self, worker: int) -> Indices:
        if self._load.shares is None or worker < 0:
            return np.arange(len(self._load.data.train_y))
        return self._load.shares[worker]

    def _permutation(self, epoch: int, worker: int) -> Indices:
        rng = np.random.default_rng([self._load.job.seed, 1, worker + 1, epoch])
        return rng.permutation(self._share(worker))


class Learner:
    """A worker's weights and everything that changes them.

    Args:
        workload: the job's plugins.
        weights: the initial weights, float32; copied.
        memory: where each block's vectors come from, a function of their size in bytes.
        sampler: one that several workers share, where they are in one process.
    """

    def __init__(
        self,
        workload: Workload,
        weights: Vector,
        memory: Callable[[int], Bytes] = allocate,
        sampler: Sampler | None = None,
    ) -> None:
        self.weights = np.array(weights, dtype=np.float32)
        self._memory = memory
        self.sampler = sampler or Sampler(workload)
        self._load = workload
        self._model = workload.model.for_worker()
        self._shapes = {name: shape for group in workload.groups for name, shape in group.items()}
        self._optimizer = workload.make_optimizer()
        # updates and weights are made locally: then each block has an optimizer of its own, so
        # that all owners of a block compute the same values
        self._block_optimizers: dict[int, Optimizer] = {}
        self._held: tuple[Vector, int] | None = None

    @property
    def holds_result(self) -> bool:
        """Whether a result waits to be applied."""
        return self._held is not None

    @property
    def model_state(self) -> dict[str, Array]:
        """What the model remembers besides the weights, copied."""
        return self._model.state

    @property
    def may_skip(self) -> bool:
        """Whether a block may be left uncomputed.

        Not where its optimizer remembers: it would fall behind that of the block's other owners.
        """
        return self._load.exchange == "gradients" or not self._optimizer.state

    def neutral(self) -> Vector:
        """Return the result that leaves the weights as they are (with momentum: nearly so)."""
        if self._load.exchange == "weights":
            return (self.weights if self._held is None else self._held[0]).copy()
        return np.zeros_like(self.weights)

    def hold(self, result: Vector, step: int) -> None:
        """Keep a step's result until the next `advance` or `settle` applies it."""
        self._held = (result, step)

    def settle(self) -> None:
        """Apply the result that is held, if there is one."""
        if self._held is not None:
            self.apply(*self._held)
            self._held = None

    def advance(self, step: int, block: int) -> Computed:
        """Apply the result that is held, then compute a block of a step; its value is read-only.

        Raises:
            JobFailedError: the value is not finite, or the weights are not, and the job is not to
                skip it, or cannot.
        """
        started = time.perf_counter()
        self.settle()
        gradient, loss, accuracy, samples = self._compute(step, block)
        value, flaw = self._checked(gradient, step, block)
        if flaw:
            self._bear(flaw, step, loss)
        value.setflags(write=False)
        return Computed(block, value, loss, accuracy, samples, time.perf_counter() - started, flaw)

    def apply(self, result: Vector, step: int) -> None:
        """Make a step's result part of the weights."""
        if self._load.exchange == "gradients":
            self._optimizer.apply(self.weights, result, step)
        elif self._load.exchange == "updates":
            self.weights += result
        else:
            self.weights[:] = result

    def snapshot(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep of it, but for the weights; nothing may be held."""
        return {
            "model": self._model.state,
            "optimizer": self._optimizer.state,
            "block_optimizers": {b: one.state for b, one in self._block_optimizers.items()},
        }

    def restore(self, weights: Vector, snapshot: Mapping[str, Any]) -> None:
        """Take back what `snapshot` returned, and the weights that go with it.

        Raises:
            KeyError, ValueError: it is of another model or optimizer.
        """
        self.weights[:] = weights
        self._model.state = snapshot.get("model", {})
        _refill(self._optimizer, snapshot["optimizer"])
        for block, state in snapshot["block_optimizers"].items():
            self._block_optimizers[block] = self._load.make_optimizer()
            _refill(self._block_optimizers[block], state)

    def evaluate(self) -> tuple[float, float]:
        """Return (mean loss, accuracy) on the test set; NaN if there is none."""
        data = self._load.data
        if not len(data.test_y):
            return np.nan, np.nan
        return self._model.evaluate(self.weights, data.test_x, data.test_y)

    def _compute(self, step: int, block: int) -> tuple[Vector, float, float, int]:
        data = self._load.data
        indices = self.sampler.indices(step, block)
        x, y = data.train_x[indices], data.train_y[indices]
        gradient = self._empty()
        self._model.reseed([self._load.job.seed, 4, step, block])
        loss, accuracy = self._model.gradients(self.weights, x, y, gradient)
        return gradient, loss, accuracy, len(y)

    def _checked(self, gradient: Vector, step: int, block: int) -> tuple[Vector, str]:
        """Return a block's value, and what is not finite; then the value is a neutral one.

        An optimizer that remembers never sees a gradient that is not finite.
        """
        if flaw := self._flaw(gradient, "gradients"):
            return self.neutral(), flaw
        value = self._value(gradient, step, block)
        if value is not gradient and (flaw := self._flaw(value, self._load.exchange)):
            return self.neutral(), flaw
        return value, ""

    def _flaw(self, values: Vector, exchange: Exchange) -> str:
        return finite.flaw(values, self._shapes, exchange)

    def _bear(self, flaw: str, step: int, loss: float) -> None:
        """Raise JobFailedError, unless the job goes on without a block's value."""
        place = f"step {step}: {self._flaw(self.weights, 'weights') or flaw}; loss {loss:.4g}"
        if self._load.job.nan == "stop":
            raise JobFailedError(f"{place}; a smaller learning rate, or --nan skip")
        if not finite.is_finite(self.weights):  # no block can mend that
            raise JobFailedError(f"{place}; a smaller learning rate")

    def _empty(self) -> Vector:
        return self._memory(self.weights.nbytes).view(np.float32)

    def _value(self, gradient: Vector, step: int, block: int) -> Vector:
        if self._load.exchange == "gradients":
            return gradient
        optimizer = self._block_optimizers.get(block)
        if optimizer is None:
            optimizer = self._block_optimizers[block] = self._load.make_optimizer()
        value = self._empty()
        optimizer.delta(self.weights, gradient, step, value)
        if self._load.exchange == "weights":
            value += self.weights
        return value


def _refill(optimizer: Optimizer, state: Mapping[str, Vector]) -> None:
    for name, array in optimizer.state.items():
        array[...] = state[name]


def sketch(weights: Vector) -> Sketch:
    """Return a vector of 64 numbers that is cheap to send, and keeps distances on average.

    With a sign s_j per element, drawn once and the same on all workers, E‖S x‖² = ‖x‖² for
    (S x)_i = Σ s_j x_j over all j with j mod 64 = i (Charikar, Chen, Farach-Colton: Finding
    Frequent Items in Data Streams, ICALP 2002, with a single row). S is linear: the sketch of a
    mean is the mean of the sketches.
    """
    signs = np.frombuffer(_sign_bits(weights.size), np.uint8)
    minus = np.unpackbits(signs, count=weights.size).view(bool)
    signed = np.zeros(-(-weights.size // SKETCH) * SKETCH, np.float32)
    np.negative(weights, out=signed[: weights.size])
    np.copyto(signed[: weights.size], weights, where=minus)
    folded: Sketch = signed.reshape(-1, SKETCH).sum(axis=0, dtype=np.float64)
    return folded


@functools.lru_cache(maxsize=1)  # a job's vectors are all of one size
def _sign_bits(size: int) -> bytes:
    """Return a sketch's signs, a bit each."""
    return np.random.default_rng(SKETCH).bytes(-(-size // 8))
