"""Optimizers: published formulas in float64, delta and apply, state, schedules, refusals."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from aiosgd.plugins.optimizers import (
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Optimizer,
    RmsProp,
    Schedule,
    Sgd,
)
from aiosgd.plugins.registry import make_params

STEPS = 20
SIZE = 50


# The formulas, in float64: each returns the new weights; `s` starts with zeros for every name


def sgd(p, s, w, g, t, rate):
    g = g + p.weight_decay * w
    s.b = p.momentum * s.b + g
    return w - rate * (g + p.momentum * s.b if p.nesterov else s.b)


def adam(p, s, w, g, t, rate):
    g = g + p.weight_decay * w
    s.m = p.beta1 * s.m + (1 - p.beta1) * g
    s.v = p.beta2 * s.v + (1 - p.beta2) * g**2
    m, v = s.m / (1 - p.beta1**t), s.v / (1 - p.beta2**t)
    return w - rate * m / (np.sqrt(v) + p.epsilon)


def adamw(p, s, w, g, t, rate):
    s.m = p.beta1 * s.m + (1 - p.beta1) * g
    s.v = p.beta2 * s.v + (1 - p.beta2) * g**2
    m, v = s.m / (1 - p.beta1**t), s.v / (1 - p.beta2**t)
    return w - rate * (m / (np.sqrt(v) + p.epsilon) + p.weight_decay * w)


def adagrad(p, s, w, g, t, rate):
    g = g + p.weight_decay * w
    s.v = s.v + g**2 + (p.initial_sum if t == 1 else 0)
    return w - rate * g / (np.sqrt(s.v) + p.epsilon)


def rmsprop(p, s, w, g, t, rate):
    g = g + p.weight_decay * w
    s.v = p.alpha * s.v + (1 - p.alpha) * g**2
    s.b = p.momentum * s.b + g / (np.sqrt(s.v) + p.epsilon)
    return w - rate * s.b


def adadelta(p, s, w, g, t, rate):
    g = g + p.weight_decay * w
    s.v = p.rho * s.v + (1 - p.rho) * g**2
    d = np.sqrt(s.m + p.epsilon) / np.sqrt(s.v + p.epsilon) * g
    s.m = p.rho * s.m + (1 - p.rho) * d**2
    return w - rate * d


CASES = [
    (Sgd, sgd, {}),
    (Sgd, sgd, {"weight_decay": 0.1}),
    (Sgd, sgd, {"momentum": 0.9}),
    (Sgd, sgd, {"momentum": 0.8, "nesterov": True}),
    (Sgd, sgd, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (Adam, adam, {}),
    (Adam, adam, {"beta1": 0.7, "beta2": 0.9, "epsilon": 0.1, "weight_decay": 0.1}),
    (AdamW, adamw, {}),
    (AdamW, adamw, {"beta1": 0.7, "beta2": 0.9, "epsilon": 0.1, "weight_decay": 0.5}),
    (Adagrad, adagrad, {}),
    (Adagrad, adagrad, {"initial_sum": 0.5, "epsilon": 0.1, "weight_decay": 0.1}),
    (RmsProp, rmsprop, {}),
    (RmsProp, rmsprop, {"alpha": 0.8, "epsilon": 0.1, "weight_decay": 0.1}),
    (RmsProp, rmsprop, {"momentum": 0.9, "weight_decay": 0.1}),
    (Adadelta, adadelta, {}),
    (Adadelta, adadelta, {"rho": 0.7, "epsilon": 0.1, "weight_decay": 0.1}),
]
IDS = [f"{kind.__name__}-{'-'.join(values) or 'default'}" for kind, _, values in CASES]
each_case = pytest.mark.parametrize(("kind", "formula", "values"), CASES, ids=IDS)
each_optimizer = pytest.mark.parametrize(("kind", "values"), [c[::2] for c in CASES], ids=IDS)
SCHEDULES = [
    {},
    {"schedule": "cosine", "warmup_steps": 5, "final_rate": 0.01},
    {"schedule": "step", "decay_steps": 4, "decay_rate": 0.5},
]


def make(kind, values, learning_rate=0.1, size=SIZE):
    return kind(kind.Params(**values), learning_rate, size, STEPS)


def vectors(count, size=SIZE, seed=0):
    """Read-only float32 vectors, so that an optimizer that writes to one of them fails."""
    array = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    array.flags.writeable = False
    return array


# Formulas


@each_case
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["constant", "cosine", "step"])
def test_weights_follow_the_published_formula(kind, formula, values, schedule):
    optimizer = make(kind, {**values, **schedule})
    start, *gradients = vectors(1 + STEPS)
    weights, expected = start.copy(), np.float64(start)
    memory = SimpleNamespace(b=0, m=0, v=0)
    for step, gradient in enumerate(gradients):
        optimizer.apply(weights, gradient, step)
        expected = formula(
            kind.Params(**values),
            memory,
            expected,
            np.float64(gradient),
            step + 1,
            optimizer.rate(step),
        )
        # each step rounds by 6e-8 of the larger of weight and delta (of order 1), a few times
        tolerance = 3e-7 * (step + 2)
        np.testing.assert_allclose(weights, expected, rtol=tolerance, atol=tolerance)


def test_first_steps_by_hand():
    """Numbers worked out on paper, for one weight of 1 and gradients of 2."""
    steps = {
        (Sgd, ()): [0.8, 0.6],
        (Sgd, (("momentum", 0.5),)): [0.8, 0.5],
        (Sgd, (("momentum", 0.5), ("nesterov", True))): [0.7, 0.35],
        (Sgd, (("weight_decay", 1.0),)): [0.7, 0.43],
        (Adam, ()): [0.9, 0.8],
        (AdamW, (("weight_decay", 1.0),)): [0.8, 0.62],
        (Adagrad, ()): [0.9, 0.9 - 0.1 / math.sqrt(2)],
        (RmsProp, (("alpha", 0.75),)): [0.8, 0.8 - 0.2 / math.sqrt(1.75)],
        (Adadelta, (("epsilon", 1.0),)): [1 - 0.2 / math.sqrt(1.4)],
    }
    for (kind, values), expected in steps.items():
        optimizer = make(kind, dict(values), size=1)
        weights, gradient = np.ones(1, np.float32), np.full(1, 2, np.float32)
        for step, value in enumerate(expected):
            optimizer.apply(weights, gradient, step)
            assert weights[0] == pytest.approx(value, rel=1e-6), (kind, step)


def test_adamw_without_decay_is_adam():
    first, second = make(Adam, {}), make(AdamW, {"weight_decay": 0.0})
    start, *gradients = vectors(6)
    results = []
    for optimizer in (first, second):
        weights = start.copy()
        for step, gradient in enumerate(gradients):
            optimizer.apply(weights, gradient, step)
        results.append(weights.tobytes())
    assert results[0] == results[1]


# Two forms of one step


@each_optimizer
def test_delta_and_apply_give_the_same_bits(kind, values):
    applied, added = make(kind, values), make(kind, values)
    start, *gradients = vectors(1 + STEPS, seed=1)
    weights, other = start.copy(), start.copy()
    out = np.full(SIZE, np.nan, np.float32)
    for step, gradient in enumerate(gradients):
        applied.apply(weights, gradient, step)
        other.flags.writeable = False
        added.delta(other, gradient, step, out)
        other = other + out
        out[:] = np.nan
        assert weights.tobytes() == other.tobytes()
    for name, array in applied.state.items():
        assert array.tobytes() == added.state[name].tobytes()


@each_optimizer
def test_a_zero_gradient_from_the_start_changes_nothing_without_decay(kind, values):
    optimizer = make(kind, {**values, "weight_decay": 0.0})
    weights, zeros = vectors(1)[0].copy(), np.zeros(SIZE, np.float32)
    before = weights.tobytes()
    for step in range(3):
        optimizer.apply(weights, zeros, step)
    assert weights.tobytes() == before


@each_optimizer
@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_vectors(kind, values, size):
    optimizer = make(kind, values, size=size)
    weights, gradient = np.ones(size, np.float32), np.ones(size, np.float32)
    optimizer.apply(weights, gradient, 0)
    assert weights.shape == (size,)
    assert (weights < 1).all()


@each_optimizer
def test_a_step_allocates_no_vector(kind, values):
    size = 20_000
    optimizer = make(kind, values, size=size)
    start, gradient = vectors(2, size)
    weights, out = start.copy(), np.empty(size, np.float32)
    tracemalloc.start()
    try:
        optimizer.apply(weights, gradient, 0)
        optimizer.delta(weights, gradient, 1, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size


@each_optimizer
@pytest.mark.parametrize("value", [3e38, math.inf, math.nan])
def test_a_diverged_run_goes_on_without_warnings(kind, values, value):
    optimizer = make(kind, values, learning_rate=10.0)
    weights, gradient = np.ones((2, SIZE), np.float32)
    optimizer.apply(weights, gradient * np.float32(value), 0)
    optimizer.apply(weights, -gradient * np.float32(value), 1)
    assert weights.dtype == np.float32


@each_optimizer
@pytest.mark.parametrize("position", range(3))
def test_vectors_of_another_size_are_refused(kind, values, position):
    optimizer = make(kind, values)
    arrays = [np.zeros(SIZE, np.float32) for _ in range(3)]
    arrays[position] = np.zeros(1, np.float32)
    weights, gradient, out = arrays
    with pytest.raises(ValueError, match=r"expected \(50,\) each"):
        optimizer.delta(weights, gradient, 0, out)


# State


@each_optimizer
def test_a_restored_state_continues_with_the_same_bits(kind, values):
    whole, first, second = (make(kind, values) for _ in range(3))
    start, *gradients = vectors(9)
    weights, resumed = start.copy(), start.copy()
    for step, gradient in enumerate(gradients):
        whole.apply(weights, gradient, step)
        (first if step < 4 else second).apply(resumed, gradient, step)
        if step == 3:
            for name, array in first.state.items():
                second.state[name][:] = array
    assert resumed.tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        (Sgd, {"weight_decay": 0.1}, []),
        (Sgd, {"momentum": 0.9}, ["momentum"]),
        (Adam, {}, ["mean", "mean_square"]),
        (AdamW, {}, ["mean", "mean_square"]),
        (Adagrad, {}, ["sum_square"]),
        (RmsProp, {}, ["mean_square"]),
        (RmsProp, {"momentum": 0.9}, ["mean_square", "momentum"]),
        (Adadelta, {}, ["mean_square", "mean_square_step"]),
    ],
)
def test_state_has_every_array_by_name(kind, values, names):
    state = make(kind, values).state
    assert list(state) == names
    for array in state.values():
        assert (array.dtype, array.shape) == (np.float32, (SIZE,))
        assert not array.any()


def test_an_optimizer_of_ones_own_needs_one_method():
    class Signed(Optimizer):
        def _write(self, weights, gradient, step, out):
            np.multiply(np.sign(gradient), -self.rate(step), out=out)

    weights = np.zeros(2, np.float32)
    Signed(Schedule(), 0.5, 2, 1).apply(weights, np.array([3, -4], np.float32), 0)
    assert weights.tolist() == [-0.5, 0.5]


# Learning rates


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({}, {0: 0.4, 99: 0.4}),
        ({"warmup_steps": 4}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.4, 99: 0.4}),
        (
            {"schedule": "step", "decay_steps": 10, "decay_rate": 0.5},
            {0: 0.4, 9: 0.4, 10: 0.2, 19: 0.2, 20: 0.1},
        ),
        (
            {"schedule": "exponential", "decay_steps": 10, "decay_rate": 0.25},
            {0: 0.4, 5: 0.2, 10: 0.1, 15: 0.05},
        ),
        (
            {"schedule": "exponential", "decay_steps": 10, "decay_rate": 0.25, "warmup_steps": 2},
            {0: 0.2, 1: 0.4, 2: 0.4, 7: 0.2},
        ),
        (
            {"schedule": "step", "decay_steps": 10, "decay_rate": 0.5, "warmup_steps": 2},
            {1: 0.4, 11: 0.4, 12: 0.2},
        ),
        ({"schedule": "cosine"}, {0: 0.4, 25: 0.2 + 0.2 * math.sqrt(0.5), 50: 0.2, 100: 0, 120: 0}),
        (
            {"schedule": "cosine", "final_rate": 0.2, "warmup_steps": 20},
            {0: 0.02, 19: 0.4, 20: 0.4, 60: 0.3, 100: 0.2, 1000: 0.2},
        ),
        ({"schedule": "cosine", "warmup_steps": 200}, {99: 0.2, 199: 0.4, 200: 0.4}),
        ({"schedule": "cosine", "warmup_steps": 100}, {99: 0.4, 100: 0.4, 101: 0}),
        ({"schedule": "step", "decay_steps": 1, "decay_rate": 1.0}, {0: 0.4, 99: 0.4}),
    ],
)
def test_rates(values, rates):
    optimizer = Sgd(Sgd.Params(**values), 0.4, 1, 100)
    assert {step: optimizer.rate(step) for step in rates} == pytest.approx(rates, abs=1e-12)


def test_the_schedule_scales_the_step():
    optimizer = make(Sgd, {"warmup_steps": 2}, learning_rate=1.0, size=1)
    weights = np.zeros(1, np.float32)
    for step, expected in enumerate([-0.5, -1.5, -2.5]):
        optimizer.apply(weights, np.ones(1, np.float32), step)
        assert weights[0] == expected


def test_a_learning_rate_of_numpy_stays_out_of_the_arithmetic():
    optimizer = make(Sgd, {}, learning_rate=np.float64(0.1))
    assert type(optimizer.rate(0)) is float


# Parameters


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Sgd, {"warmup_steps": -1}, "warmup_steps is -1"),
        (Adam, {"decay_steps": 0}, "decay_steps is 0; expected a finite number of at least 1"),
        (AdamW, {"decay_rate": 0.0}, "decay_rate is 0.0; expected above 0"),
        (Adagrad, {"decay_rate": 1.1}, "decay_rate is 1.1"),
        (RmsProp, {"final_rate": -0.1}, "final_rate is -0.1"),
        (Adadelta, {"final_rate": math.inf}, "final_rate is inf"),
        (Sgd, {"momentum": 1.0}, "momentum is 1.0; expected at least 0 and below 1"),
        (Sgd, {"momentum": -0.1}, "momentum is -0.1"),
        (Sgd, {"momentum": math.nan}, "momentum is nan"),
        (Sgd, {"nesterov": True}, "expected momentum above 0"),
        (Sgd, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (Adam, {"beta1": 1.0}, "beta1 is 1.0"),
        (Adam, {"beta2": 1.0}, "beta2 is 1.0"),
        (Adam, {"epsilon": 0.0}, "epsilon is 0.0; expected a finite number above 0"),
        (Adam, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (AdamW, {"beta1": 1.0}, "beta1 is 1.0"),
        (Adagrad, {"initial_sum": -1.0}, "initial_sum is -1.0"),
        (Adagrad, {"epsilon": 0.0}, "epsilon is 0.0"),
        (Adagrad, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (RmsProp, {"alpha": 1.0}, "alpha is 1.0"),
        (RmsProp, {"momentum": 1.0}, "momentum is 1.0"),
        (RmsProp, {"epsilon": 0.0}, "epsilon is 0.0"),
        (RmsProp, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (Adadelta, {"rho": 1.0}, "rho is 1.0"),
        (Adadelta, {"epsilon": 0.0}, "epsilon is 0.0"),
        (Adadelta, {"weight_decay": math.inf}, "weight_decay is inf"),
    ],
)
def test_parameters_outside_their_range_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind.Params(**values)


@pytest.mark.parametrize("learning_rate", [-0.1, math.inf, math.nan])
def test_learning_rates_outside_their_range_are_refused(learning_rate):
    with pytest.raises(ValueError, match="learning_rate is"):
        make(Sgd, {}, learning_rate)


@pytest.mark.parametrize("kind", [Sgd, Adam, AdamW, Adagrad, RmsProp, Adadelta])
def test_params_come_from_a_job(kind):
    params = make_params(kind, {"schedule": "cosine", "weight_decay": 1}, "optimizer")
    assert params == kind.Params(schedule="cosine", weight_decay=1.0)


def test_defaults_are_those_of_the_references():
    def own(kind):
        fields = vars(kind.Params())
        return {name: value for name, value in fields.items() if name not in vars(Schedule())}

    assert own(Sgd) == {"momentum": 0, "nesterov": False, "weight_decay": 0}
    assert own(Adam) == {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0}
    assert own(AdamW) == {**own(Adam), "weight_decay": 0.01}
    assert own(Adagrad) == {"initial_sum": 0, "epsilon": 1e-10, "weight_decay": 0}
    assert own(RmsProp) == {"alpha": 0.99, "momentum": 0, "epsilon": 1e-8, "weight_decay": 0}
    assert own(Adadelta) == {"rho": 0.9, "epsilon": 1e-6, "weight_decay": 0}
