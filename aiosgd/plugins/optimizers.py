"""Optimizers: they turn a gradient into what is added to the weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _require_at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(low <= value < math.inf, name, value, f"a finite number of at least {low}")


def _require_above_zero(**values: float) -> None:
    for name, value in values.items():
        _require(0 < value < math.inf, name, value, "a finite number above 0")


def _require_fraction(**values: float) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, name, value, "at least 0 and below 1")


# Learning rates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes with the step; every optimizer's parameters include it.

    With the job's learning rate η, `warmup_steps` w and t = step - w:

    - warm-up, while step < w: η · (step + 1) / w, linear (Goyal et al., 2017, section 2.2);
    - `constant`: η;
    - `step`: η · decay_rate ** floor(t / decay_steps);
    - `exponential`: η · decay_rate ** (t / decay_steps);
    - `cosine`: from η to `final_rate` f along half a cosine that ends with the job,
      f + (η - f) · (1 + cos(π · t / (steps - w))) / 2
      (Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5), and f after it.

    Attributes:
        schedule: the rule after the warm-up.
        warmup_steps: length of the warm-up; 0 is without.
        decay_steps: steps per factor of `decay_rate` in `step` and `exponential`.
        decay_rate: that factor.
        final_rate: the learning rate that `cosine` approaches, in absolute terms.
    """

    schedule: Literal["constant", "step", "exponential", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 1000
    decay_rate: float = 0.1
    final_rate: float = 0.0

    def __post_init__(self) -> None:
        _require_at_least(0, warmup_steps=self.warmup_steps, final_rate=self.final_rate)
        _require_at_least(1, decay_steps=self.decay_steps)
        _require(0 < self.decay_rate <= 1, "decay_rate", self.decay_rate, "above 0 and at most 1")

    def rate(self, learning_rate: float, step: int, steps: int) -> float:
        """Return the learning rate of a step.

        Args:
            learning_rate: the job's.
            step: counted from 0 over the whole job.
            steps: how many the job has; only `cosine` uses it.
        """
        if step < self.warmup_steps:
            return learning_rate * (step + 1) / self.warmup_steps
        t = step - self.warmup_steps
        if self.schedule == "step":
            return learning_rate * math.pow(self.decay_rate, t // self.decay_steps)
        if self.schedule == "exponential":
            return learning_rate * math.pow(self.decay_rate, t / self.decay_steps)
        if self.schedule == "cosine":
            progress = min(1.0, t / max(1, steps - self.warmup_steps))
            height = (1 + math.cos(math.pi * progress)) / 2
            return self.final_rate + (learning_rate - self.final_rate) * height
        return learning_rate


# The base class -------------------------------------------------------------------------------


class Optimizer(ABC):
    """One optimizer over one flat float32 vector of weights.

    `delta` and `apply` take the same step in two forms, and both advance the optimizer's state:
    call one of them once per step. All arithmetic is float32; a run that diverges gets inf or nan,
    without warnings. An instance serves one thread at a time.

    An optimizer implements `_write`; it makes its arrays with `_array` in `__init__`, after that
    of this class.

    Class attributes:
        Params: its parameters, a frozen dataclass that derives from `Schedule`.

    Args:
        params: an instance of `Params`.
        learning_rate: what the schedule starts from.
        size: number of weights.
        steps: how many steps the job has.

    Raises:
        ValueError: `learning_rate` is negative or not finite.
    """

    Params: ClassVar[type[Schedule]] = Schedule

    def __init__(self, params: Any, learning_rate: float, size: int, steps: int) -> None:
        _require_at_least(0, learning_rate=learning_rate)
        self.learning_rate = float(learning_rate)
        self.steps = steps
        self._schedule: Schedule = params
        self._state: dict[str, Vector] = {}
        self._delta: Vector = np.empty(size, np.float32)

    @property
    def state(self) -> dict[str, Vector]:
        """What the optimizer remembers between steps, name -> float32 vector of `size`.

        The arrays are the optimizer's own: copy them into a checkpoint, and write a checkpoint
        back with `optimizer.state[name][:] = saved`. The step is not part of it.
        """
        return dict(self._state)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self._schedule.rate(self.learning_rate, step, self.steps)

    def delta(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        """Write what has to be added to the weights into `out`, and advance the state.

        Args:
            weights: float32 vector of `size`; read only.
            gradient: of the loss at these weights; read only.
            step: counted from 0; sets the learning rate and the bias correction.
            out: float32 vector of `size`, overwritten; not one of the other two.

        Raises:
            ValueError: an array is not a vector of `size`.
        """
        expected = self._delta.shape
        if not weights.shape == gradient.shape == out.shape == expected:
            raise ValueError(
                f"weights, gradient and out have shapes {weights.shape}, {gradient.shape}, "
                f"{out.shape}; expected {expected} each"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            self._write(weights, gradient, step, out)

    def apply(self, weights: Vector, gradient: Vector, step: int) -> None:
        """Add `delta` to the weights in place: the same bits as with `delta` and an addition."""
        self.delta(weights, gradient, step, self._delta)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(weights, self._delta, out=weights)

    @abstractmethod
    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        """Do what `delta` says; the shapes are checked. `out` may hold intermediate results."""

    def _array(self, name: str, fill: float = 0.0) -> Vector:
        """Make a vector that `state` has under that name."""
        self._state[name] = np.full_like(self._delta, fill)
        return self._state[name]


class _Decay:
    """L2 regularisation: adds weight_decay · weights to the gradient, without touching it."""

    def __init__(self, weight_decay: float, size: int) -> None:
        self._factor = weight_decay
        self._sum: Vector = np.empty(size if weight_decay else 0, np.float32)

    def add(self, weights: Vector, gradient: Vector) -> Vector:
        """Return gradient + weight_decay · weights, valid until the next call."""
        if not self._factor:
            return gradient
        np.multiply(weights, self._factor, out=self._sum)
        return np.add(self._sum, gradient, out=self._sum)


def _average_square(average: Vector, value: Vector, decay: float, scratch: Vector) -> None:
    """Let average = decay · average + (1 - decay) · value²."""
    np.multiply(value, value, out=scratch)
    np.multiply(scratch, 1 - decay, out=scratch)
    np.multiply(average, decay, out=average)
    np.add(average, scratch, out=average)


# Built-ins ------------------------------------------------------------------------------------


class Sgd(Optimizer):
    """Stochastic gradient descent, with heavy-ball or Nesterov momentum.

    With g = gradient + weight_decay · weights: b = momentum · b + g, and the weights change by
    -rate · b, or with `nesterov` by -rate · (g + momentum · b). The rate stands outside of b.

    Source:
        Robbins and Monro, 1951; Polyak, 1964; Sutskever, Martens, Dahl and Hinton, ICML 2013,
        eqs. 1-4, in the form of `torch.optim.SGD` without dampening.
    """

    @dataclass(frozen=True)
    class Params(Schedule):
        """Parameters of `Sgd`.

        Attributes:
            momentum: how much of the last step's direction is kept.
            nesterov: look ahead by one momentum step; needs momentum.
            weight_decay: factor of the weights in the gradient.
        """

        momentum: float = 0.0
        nesterov: bool = False
        weight_decay: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _require_fraction(momentum=self.momentum)
            _require_at_least(0, weight_decay=self.weight_decay)
            if self.nesterov and not self.momentum:
                raise ValueError("nesterov is True and momentum is 0; expected momentum above 0")

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._params = params
        self._decay = _Decay(params.weight_decay, size)
        self._momentum = self._array("momentum") if params.momentum else None

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        direction = self._decay.add(weights, gradient)
        if self._momentum is not None:
            direction = self._accelerate(self._momentum, direction, out)
        np.multiply(direction, -self.rate(step), out=out)

    def _accelerate(self, momentum: Vector, gradient: Vector, scratch: Vector) -> Vector:
        np.multiply(momentum, self._params.momentum, out=momentum)
        np.add(momentum, gradient, out=momentum)
        if not self._params.nesterov:
            return momentum
        np.multiply(momentum, self._params.momentum, out=scratch)
        return np.add(scratch, gradient, out=scratch)


class Adam(Optimizer):
    """Adaptive moment estimation; weight decay is part of the gradient.

    With g = gradient + weight_decay · weights and t = step + 1: m = beta1 · m + (1 - beta1) · g,
    v = beta2 · v + (1 - beta2) · g², and the weights change by
    -rate · m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon).

    Source:
        Kingma and Ba, ICLR 2015, algorithm 1.
    """

    @dataclass(frozen=True)
    class Params(Schedule):
        """Parameters of `Adam`.

        Attributes:
            beta1: decay of the mean gradient.
            beta2: decay of the mean squared gradient.
            epsilon: keeps the quotient finite.
            weight_decay: factor of the weights in the gradient.
        """

        beta1: float = 0.9
        beta2: float = 0.999
        epsilon: float = 1e-8
        weight_decay: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _require_fraction(beta1=self.beta1, beta2=self.beta2)
            _require_above_zero(epsilon=self.epsilon)
            _require_at_least(0, weight_decay=self.weight_decay)

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._params = params
        self._decay = _Decay(params.weight_decay, size)
        self._mean = self._array("mean")
        self._mean_square = self._array("mean_square")

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        self._write_moments(self._decay.add(weights, gradient), step, out)

    def _write_moments(self, gradient: Vector, step: int, out: Vector) -> None:
        """Update both moments and write algorithm 1's step.

        The corrections are scalars, moved out of the quotient as section 2 proposes:
        (m / c1) / (sqrt(v / c2) + ε) = sqrt(c2) / c1 · m / (sqrt(v) + ε · sqrt(c2)).
        """
        params = self._params
        np.subtract(gradient, self._mean, out=out)
        np.multiply(out, 1 - params.beta1, out=out)
        np.add(self._mean, out, out=self._mean)
        _average_square(self._mean_square, gradient, params.beta2, out)
        root = math.sqrt(1 - params.beta2 ** (step + 1))
        np.sqrt(self._mean_square, out=out)
        np.add(out, params.epsilon * root, out=out)
        np.divide(self._mean, out, out=out)
        np.multiply(out, -self.rate(step) * root / (1 - params.beta1 ** (step + 1)), out=out)


class AdamW(Adam):
    """Adam with decoupled weight decay: the weights also change by -rate · weight_decay · weights.

    The decay is multiplied by the scheduled rate, as in `torch.optim.AdamW`.

    Source:
        Loshchilov and Hutter, ICLR 2019, algorithm 2.
    """

    @dataclass(frozen=True)
    class Params(Adam.Params):
        """Parameters of `AdamW`, those of `Adam`; here `weight_decay` is not in the gradient."""

        weight_decay: float = 0.01

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._shrinkage: Vector = np.empty(size, np.float32)

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        self._write_moments(gradient, step, out)
        np.multiply(weights, -self.rate(step) * self._params.weight_decay, out=self._shrinkage)
        np.add(out, self._shrinkage, out=out)


class Adagrad(Optimizer):
    """Rates that shrink with the sum of each weight's squared gradients.

    With g = gradient + weight_decay · weights: s = s + g², and the weights change by
    -rate · g / (sqrt(s) + epsilon).

    Source:
        Duchi, Hazan and Singer, JMLR 12, 2011, eq. 1 without the projection.
    """

    @dataclass(frozen=True)
    class Params(Schedule):
        """Parameters of `Adagrad`.

        Attributes:
            initial_sum: what the sum of squares starts with.
            epsilon: keeps the quotient finite.
            weight_decay: factor of the weights in the gradient.
        """

        initial_sum: float = 0.0
        epsilon: float = 1e-10
        weight_decay: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _require_above_zero(epsilon=self.epsilon)
            _require_at_least(0, initial_sum=self.initial_sum, weight_decay=self.weight_decay)

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._params = params
        self._decay = _Decay(params.weight_decay, size)
        self._sum_square = self._array("sum_square", params.initial_sum)

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        gradient = self._decay.add(weights, gradient)
        np.multiply(gradient, gradient, out=out)
        np.add(self._sum_square, out, out=self._sum_square)
        np.sqrt(self._sum_square, out=out)
        np.add(out, self._params.epsilon, out=out)
        np.divide(gradient, out, out=out)
        np.multiply(out, -self.rate(step), out=out)


class RmsProp(Optimizer):
    """Gradients divided by a running root mean square.

    With g = gradient + weight_decay · weights: v = alpha · v + (1 - alpha) · g² and
    d = g / (sqrt(v) + epsilon); the weights change by -rate · d, or with momentum by -rate · b
    where b = momentum · b + d.

    Source:
        Tieleman and Hinton, Coursera lecture 6.5, 2012; momentum as in Graves,
        arXiv:1308.0850, 2013, eqs. 38-41, but uncentred and with the rate outside of b, as in
        `torch.optim.RMSprop`.
    """

    @dataclass(frozen=True)
    class Params(Schedule):
        """Parameters of `RmsProp`.

        Attributes:
            alpha: decay of the mean squared gradient.
            momentum: how much of the last step's direction is kept.
            epsilon: keeps the quotient finite.
            weight_decay: factor of the weights in the gradient.
        """

        alpha: float = 0.99
        momentum: float = 0.0
        epsilon: float = 1e-8
        weight_decay: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _require_fraction(alpha=self.alpha, momentum=self.momentum)
            _require_above_zero(epsilon=self.epsilon)
            _require_at_least(0, weight_decay=self.weight_decay)

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._params = params
        self._decay = _Decay(params.weight_decay, size)
        self._mean_square = self._array("mean_square")
        self._momentum = self._array("momentum") if params.momentum else None

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        gradient = self._decay.add(weights, gradient)
        _average_square(self._mean_square, gradient, self._params.alpha, out)
        np.sqrt(self._mean_square, out=out)
        np.add(out, self._params.epsilon, out=out)
        direction = np.divide(gradient, out, out=out)
        if self._momentum is not None:
            np.multiply(self._momentum, self._params.momentum, out=self._momentum)
            direction = np.add(self._momentum, direction, out=self._momentum)
        np.multiply(direction, -self.rate(step), out=out)


class Adadelta(Optimizer):
    """Gradients scaled to the size of the past steps; its own rate is 1.

    With g = gradient + weight_decay · weights: v = rho · v + (1 - rho) · g²,
    d = sqrt(u + epsilon) / sqrt(v + epsilon) · g, u = rho · u + (1 - rho) · d², and the weights
    change by -rate · d.

    Source:
        Zeiler, arXiv:1212.5701, 2012, algorithm 1.
    """

    @dataclass(frozen=True)
    class Params(Schedule):
        """Parameters of `Adadelta`.

        Attributes:
            rho: decay of both means.
            epsilon: what the first steps grow from.
            weight_decay: factor of the weights in the gradient.
        """

        rho: float = 0.9
        epsilon: float = 1e-6
        weight_decay: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _require_fraction(rho=self.rho)
            _require_above_zero(epsilon=self.epsilon)
            _require_at_least(0, weight_decay=self.weight_decay)

    def __init__(self, params: Params, learning_rate: float, size: int, steps: int) -> None:
        super().__init__(params, learning_rate, size, steps)
        self._params = params
        self._decay = _Decay(params.weight_decay, size)
        self._mean_square = self._array("mean_square")
        self._mean_square_step = self._array("mean_square_step")
        self._scratch: Vector = np.empty(size, np.float32)

    def _write(self, weights: Vector, gradient: Vector, step: int, out: Vector) -> None:
        params, scratch = self._params, self._scratch
        gradient = self._decay.add(weights, gradient)
        _average_square(self._mean_square, gradient, params.rho, scratch)
        np.add(self._mean_square_step, params.epsilon, out=out)
        np.add(self._mean_square, params.epsilon, out=scratch)
        # one root of the quotient instead of a quotient of two
        np.divide(out, scratch, out=out)
        np.sqrt(out, out=out)
        np.multiply(out, gradient, out=out)
        _average_square(self._mean_square_step, out, params.rho, scratch)
        np.multiply(out, -self.rate(step), out=out)
