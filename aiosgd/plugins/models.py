"""Models: classifiers over one flat float32 parameter vector, with hand-written gradients."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]
Array: TypeAlias = npt.NDArray[Any]

EVALUATION_ROWS = 1024
"""Samples per forward pass of `evaluate`: 128 units take 0.5 MiB then, whatever the data set's
size; chunks of 512 to 8192 measure within 5 % of each other."""


class Model(ABC):
    """A differentiable classifier over one flat parameter vector.

    A parameter `factory: Code` names code of the user's own, which a node runs for a job only if it
    was started with --allow-code.

    Attributes:
        shapes: the parameters in the order of the flat vector, name -> shape.
    """

    Params: ClassVar[type]
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def __init__(self, params: Any, inputs: tuple[int, ...], classes: int) -> None:
        """Lay out a model for samples of shape `inputs` and `classes` labels."""

    @functools.cached_property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, vector: Vector) -> dict[str, Vector]:
        """Return the parameters as views of `vector`, each in its shape.

        Raises:
            ValueError: `vector` is not contiguous, or not of `size` elements.
        """
        if vector.shape != (self.size,) or not vector.flags.c_contiguous:
            raise ValueError(
                f"parameters have shape {vector.shape} and strides {vector.strides}; "
                f"expected a contiguous vector of {self.size}"
            )
        return {name: vector[part].reshape(shape) for name, part, shape in self._layout}

    @functools.cached_property
    def _layout(self) -> list[tuple[str, slice, tuple[int, ...]]]:
        """The parameters as (name, place in the vector, shape)."""
        ends = itertools.accumulate(map(math.prod, self.shapes.values()))
        return [
            (name, slice(end - math.prod(shape), end), shape)
            for (name, shape), end in zip(self.shapes.items(), ends, strict=True)
        ]

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> Vector:
        """Return fresh weights: float32, one contiguous vector of `size`."""

    @abstractmethod
    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the batch's mean loss into `out`; return (mean loss, accuracy).

        Args:
            weights: float32 vector of `size`; read only.
            x: float32 samples, (n, *inputs).
            y: labels, (n,), each 0 … classes - 1.
            out: float32 vector of `size`; what it holds is overwritten completely.

        Raises:
            ValueError: the batch is empty, or shapes or labels do not fit the model.
        """

    @abstractmethod
    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss, accuracy) without training; arguments and errors as `gradients`."""

    # what a model may have besides: randomness, a memory, threads of its own

    def reseed(self, seed: Sequence[int]) -> None:
        """Begin to draw anew: called before each block with what names it in all the world.

        Two workers that compute the same block draw the same, and so does a simulation.

        Args:
            seed: non-negative numbers: the job's seed, the step, the block, ….
        """

    def for_worker(self) -> Model:
        """Return the model that one worker computes with: itself, unless it has a state."""
        return self

    @property
    def state(self) -> dict[str, Array]:
        """Copies of what it remembers besides the weights; each worker has its own.

        It is not exchanged. Checkpoints keep it, and `model.safetensors` has it beside the weights.
        """
        return {}

    @state.setter
    def state(self, state: Mapping[str, Array]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but got {', '.join(state)}")

    def limit_threads(self, threads: int) -> int:
        """Compute with so many threads from now on; return how many there were.

        Those of numpy's BLAS are not its concern.
        """
        return threads


def check_batch(x: Vector, y: Labels, inputs: tuple[int, ...], classes: int) -> None:
    """Raise ValueError if a batch is empty, or not of these samples and labels."""
    if y.ndim != 1 or not y.size or x.shape != (y.size, *inputs):
        raise ValueError(
            f"samples have shape {x.shape} and labels {y.shape}; "
            f"expected (n, *{inputs}) and (n,) with n of at least 1"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels range from {y.min()} to {y.max()}; expected 0 … {classes - 1}")


# Activations ----------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An elementwise non-linearity whose derivative is a function of its own output.

    Attributes:
        apply: replaces its argument z by f(z).
        backward: called with (a, delta) where a = f(z); multiplies `delta` by f'(z) in place and
            may destroy `a`.
        scale: initial weights have the variance scale / fan_in (He) where it is given, else
            2 / (fan_in + fan_out) (Glorot).
    """

    apply: Callable[[Vector], Any]
    backward: Callable[[Vector, Vector], Any]
    scale: float | None = None


def _relu(z: Vector) -> None:
    np.maximum(z, 0, out=z)


def _relu_backward(a: Vector, delta: Vector) -> None:
    np.multiply(delta, a > 0, out=delta)


def _tanh(z: Vector) -> None:
    np.tanh(z, out=z)


def _tanh_backward(a: Vector, delta: Vector) -> None:
    np.multiply(a, a, out=a)
    np.subtract(1, a, out=a)
    np.multiply(delta, a, out=delta)


def _sigmoid(z: Vector) -> None:
    # 1 / (1 + exp(-z)) = (1 + tanh(z / 2)) / 2, which cannot overflow
    np.multiply(z, 0.5, out=z)
    np.tanh(z, out=z)
    np.multiply(z, 0.5, out=z)
    np.add(z, 0.5, out=z)


def _sigmoid_backward(a: Vector, delta: Vector) -> None:
    np.multiply(delta, a, out=delta)
    np.subtract(1, a, out=a)
    np.multiply(delta, a, out=delta)


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": Activation(_relu, _relu_backward, scale=2.0),
    "tanh": Activation(_tanh, _tanh_backward),
    "sigmoid": Activation(_sigmoid, _sigmoid_backward),
}


# Feed-forward networks ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scratch:
    """The intermediate arrays of one pass over up to `len(index)` samples, reused by every pass.

    Attributes:
        index: (rows,), 0 … rows - 1.
        ones: (rows,), to sum over samples by a product.
        outputs: what each layer computes, (rows, width).
        deltas: the loss's derivative by each hidden layer's pre-activation, (rows, width).
    """

    index: Labels
    ones: Vector
    outputs: list[Vector]
    deltas: list[Vector]

    @classmethod
    def allocate(cls, rows: int, widths: Sequence[int]) -> _Scratch:
        """Make the arrays for layers of these widths."""
        return cls(
            np.arange(rows),
            np.ones(rows, np.float32),
            [np.empty((rows, width), np.float32) for width in widths],
            [np.empty((rows, width), np.float32) for width in widths[:-1]],
        )

    def first(self, rows: int) -> _Scratch:
        """Return the part for `rows` samples; it shares this one's memory."""
        return _Scratch(
            self.index[:rows],
            self.ones[:rows],
            [array[:rows] for array in self.outputs],
            [array[:rows] for array in self.deltas],
        )


class FeedForward(Model):
    """Fully connected layers, softmax and cross-entropy.

    Layer i is `weight{i}` of shape (fan_in, fan_out) and `bias{i}` of shape (fan_out,). The
    gradient is back-propagation (Rumelhart, Hinton and Williams, Nature 1986). Sums over samples
    and products are those of the BLAS in float32. A run that diverges reports inf or nan, without
    warnings.

    An instance owns the scratch arrays of its passes: it serves one thread at a time.

    Raises:
        ValueError: a layer, the samples or the classes are of size 0.
    """

    def __init__(
        self, inputs: tuple[int, ...], hidden: Sequence[int], classes: int, activation: str
    ) -> None:
        self._widths = [math.prod(inputs), *hidden, classes]
        if min(self._widths) < 1:
            raise ValueError(f"layers have sizes {self._widths}; expected at least 1 each")
        self._activation = ACTIVATIONS[activation]
        self._inputs = inputs
        self._whole = self._scratch = _Scratch.allocate(0, self._widths[1:])
        self.shapes = {
            name: shape
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(self._widths))
            for name, shape in ((f"weight{i}", (fan_in, fan_out)), (f"bias{i}", (fan_out,)))
        }

    def initial(self, rng: np.random.Generator) -> Vector:
        """Return random weights and zero biases; the same `rng` gives the same bits.

        Source:
            He et al., ICCV 2015, eq. 10, for layers that end in relu; Glorot and Bengio, AISTATS
            2010, eq. 16, for the others.
        """
        vector: Vector = np.zeros(self.size, np.float32)
        weights = self._layers(vector)[0]
        for weight in weights[:-1]:
            _randomise(weight, rng, self._activation.scale)
        _randomise(weights[-1], rng, None)
        return vector

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the batch's mean loss into `out`; return (mean loss, accuracy)."""
        rows = self._rows(x, y)
        matrices, biases = self._layers(weights)
        with np.errstate(over="ignore", invalid="ignore"):
            scratch = self._forward(matrices, biases, rows)
            loss, hits = _cross_entropy(scratch, y)
            self._backward(matrices, rows, scratch, out)
        return loss / len(y), hits / len(y)

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss, accuracy) without training."""
        rows = self._rows(x, y)
        matrices, biases = self._layers(weights)
        loss, hits = 0.0, 0
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(y), EVALUATION_ROWS):
                part = slice(start, start + EVALUATION_ROWS)
                scratch = self._forward(matrices, biases, rows[part])
                part_loss, part_hits = _cross_entropy(scratch, y[part])
                loss, hits = loss + part_loss, hits + part_hits
        return loss / len(y), hits / len(y)

    def _rows(self, x: Vector, y: Labels) -> Vector:
        """Return the samples as rows of a matrix, or raise ValueError."""
        check_batch(x, y, self._inputs, self._widths[-1])
        return x.reshape(len(x), -1)

    def _layers(self, vector: Vector) -> tuple[list[Vector], list[Vector]]:
        """Return the weight matrices and the biases as views of `vector`."""
        arrays = list(self.views(vector).values())
        return arrays[::2], arrays[1::2]

    def _scratch_for(self, rows: int) -> _Scratch:
        """Return scratch arrays for exactly `rows` samples; memory only ever grows."""
        if rows > len(self._whole.index):
            self._whole = _Scratch.allocate(rows, self._widths[1:])
        if rows != len(self._scratch.index):
            self._scratch = self._whole.first(rows)
        return self._scratch

    def _forward(
        self, weights: Sequence[Vector], biases: Sequence[Vector], rows: Vector
    ) -> _Scratch:
        """Fill `outputs` up to the logits."""
        scratch = self._scratch_for(len(rows))
        last = scratch.outputs[-1]
        below = rows
        for weight, bias, output in zip(weights, biases, scratch.outputs, strict=True):
            np.dot(below, weight, out=output)
            np.add(output, bias, out=output)
            if output is not last:
                self._activation.apply(output)
            below = output
        return scratch

    def _backward(
        self, weights: Sequence[Vector], rows: Vector, scratch: _Scratch, out: Vector
    ) -> None:
        """Write all gradients, given the loss's derivative by the logits in `outputs[-1]`."""
        matrices, biases = self._layers(out)
        delta = scratch.outputs[-1]
        for i in reversed(range(1, len(weights))):
            below, next_delta = scratch.outputs[i - 1], scratch.deltas[i - 1]
            np.dot(below.T, delta, out=matrices[i])
            np.dot(scratch.ones, delta, out=biases[i])
            np.dot(delta, weights[i].T, out=next_delta)
            self._activation.backward(below, next_delta)
            delta = next_delta
        np.dot(rows.T, delta, out=matrices[0])
        np.dot(scratch.ones, delta, out=biases[0])


def _cross_entropy(scratch: _Scratch, y: Labels) -> tuple[float, int]:
    """Turn the logits into the mean loss's derivative by them; return (summed loss, hits).

    With z shifted by its maximum, which is then 0, the loss is log Σ exp(z) - z[y] and its
    derivative softmax(z) - onehot(y): no exponential overflows and no logarithm sees 0.
    """
    logits, index = scratch.outputs[-1], scratch.index
    # argmax and a gather: a third of the time of a maximum over such short rows
    best = logits.argmax(axis=1)
    np.subtract(logits, logits[index, best, None], out=logits)
    at_label = logits[index, y]
    np.exp(logits, out=logits)
    sums = logits.sum(axis=1, keepdims=True)
    loss = np.log(sums).sum(dtype=np.float64) - at_label.sum(dtype=np.float64)
    np.multiply(sums, len(y), out=sums)
    np.divide(logits, sums, out=logits)
    logits[index, y] -= np.float32(1 / len(y))
    return float(loss), int(np.count_nonzero(best == y))


def _randomise(weight: Vector, rng: np.random.Generator, scale: float | None) -> None:
    fan_in, fan_out = weight.shape
    if scale is not None:
        rng.standard_normal(out=weight, dtype=np.float32)
        weight *= math.sqrt(scale / fan_in)
    else:
        rng.random(out=weight, dtype=np.float32)
        weight -= 0.5
        weight *= 2 * math.sqrt(6 / (fan_in + fan_out))


class Mlp(FeedForward):
    """A multi-layer perceptron; without hidden layers it is `Softmax`."""

    @dataclass(frozen=True)
    class Params:
        """Parameters of `Mlp`.

        Attributes:
            hidden: units of each hidden layer, the first layer first.
            activation: what follows each hidden layer.
        """

        hidden: tuple[int, ...] = (64,)
        activation: Literal["relu", "tanh", "sigmoid"] = "relu"

        def __post_init__(self) -> None:
            if any(units < 1 for units in self.hidden):
                raise ValueError(f"hidden is {list(self.hidden)}; expected sizes of at least 1")

    def __init__(self, params: Params, inputs: tuple[int, ...], classes: int) -> None:
        super().__init__(inputs, params.hidden, classes, params.activation)


class Softmax(FeedForward):
    """Multinomial logistic regression: convex, and strongly convex in the weights with l2 > 0."""

    @dataclass(frozen=True)
    class Params:
        """Parameters of `Softmax`.

        Attributes:
            l2: adds l2 / 2 · ‖weight0‖² to the loss; the bias is free.
        """

        l2: float = 0.0

        def __post_init__(self) -> None:
            if not 0 <= self.l2 < math.inf:
                raise ValueError(f"l2 is {self.l2}; expected a finite number of at least 0")

    def __init__(self, params: Params, inputs: tuple[int, ...], classes: int) -> None:
        super().__init__(inputs, (), classes, "relu")
        self._l2 = params.l2

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Write the gradient of the mean loss and its penalty; return (their sum, accuracy)."""
        loss, accuracy = super().gradients(weights, x, y, out)
        if self._l2:
            self.views(out)["weight0"] += self._l2 * self.views(weights)["weight0"]
        return loss + self._penalty(weights), accuracy

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (mean loss with its penalty, accuracy) without training."""
        loss, accuracy = super().evaluate(weights, x, y)
        return loss + self._penalty(weights), accuracy

    def _penalty(self, weights: Vector) -> float:
        if not self._l2:
            return 0.0
        matrix = self.views(weights)["weight0"].ravel()
        return self._l2 / 2 * float(np.dot(matrix, matrix))


# No computation -------------------------------------------------------------------------------


class Blank(Model):
    """Any number of parameters and nothing to compute: for measuring everything else.

    The loss is 0, whatever the weights; what stands in for the gradient is 1 everywhere.
    """

    @dataclass(frozen=True)
    class Params:
        """Parameters of `Blank`.

        Attributes:
            parameters: how many there are, 4 bytes each.
        """

        parameters: int = 1_000_000

        def __post_init__(self) -> None:
            if self.parameters < 1:
                raise ValueError(f"parameters is {self.parameters}; expected at least 1")

    def __init__(self, params: Params, inputs: tuple[int, ...], classes: int) -> None:
        self.shapes = {"blank": (params.parameters,)}

    def initial(self, rng: np.random.Generator) -> Vector:
        """Return zeros."""
        return np.zeros(self.size, np.float32)

    def gradients(self, weights: Vector, x: Vector, y: Labels, out: Vector) -> tuple[float, float]:
        """Fill `out` with 1; return (0, 0)."""
        out.fill(1)
        return 0.0, 0.0

    def evaluate(self, weights: Vector, x: Vector, y: Labels) -> tuple[float, float]:
        """Return (0, 0)."""
        return 0.0, 0.0
