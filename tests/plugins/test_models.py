"""Models: layout, gradients against float64 finite differences, evaluation, refusals."""

import math
import tracemalloc

import numpy as np
import pytest

from aiosgd.plugins import models
from aiosgd.plugins.models import Blank, Mlp, Softmax
from aiosgd.plugins.registry import make_params

ACTIVATIONS = {
    "relu": lambda z: np.where(z > 0, z, 0.0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}
HIDDEN = [(), (5,), (4, 3), (6, 5, 4)]


def mlp(inputs=(3,), hidden=(5,), classes=4, activation="relu"):
    return Mlp(Mlp.Params(hidden, activation), inputs, classes)


def batch(n, inputs=(3,), classes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *inputs)).astype(np.float32)
    y = rng.integers(0, classes, n)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def random_weights(model, seed=1):
    """Weights whose biases are not zero."""
    weights = np.random.default_rng(seed).standard_normal(model.size).astype(np.float32)
    weights.flags.writeable = False
    return weights


def logits64(model, weights, x, activation):
    arrays = []
    offset = 0
    for shape in model.shapes.values():
        arrays.append(np.float64(weights[offset : offset + math.prod(shape)]).reshape(shape))
        offset += math.prod(shape)
    values = np.float64(x).reshape(len(x), -1)
    for i in range(0, len(arrays), 2):
        values = values @ arrays[i] + arrays[i + 1]
        if i < len(arrays) - 2:
            values = ACTIVATIONS[activation](values)
    return values


def loss64(model, weights, x, y, activation):
    z = logits64(model, weights, x, activation)
    z -= z.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y])


def finite_differences(loss, weights, h=1e-6):
    """Central differences: truncation of order h² = 1e-12, rounding of order 1e-16 / h = 1e-10."""
    point = np.float64(weights)
    gradient = np.empty_like(point)
    for i in range(len(point)):
        upper, lower = point.copy(), point.copy()
        upper[i] += h
        lower[i] -= h
        gradient[i] = (loss(upper) - loss(lower)) / (2 * h)
    return gradient


# Gradients


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_gradient_is_that_of_the_loss_in_every_coordinate(activation, hidden):
    model = mlp(hidden=hidden, activation=activation)
    (x, y), weights = batch(7), random_weights(model)
    out = np.empty(model.size, np.float32)

    model.gradients(weights, x, y, out)

    expected = finite_differences(lambda w: loss64(model, w, x, y, activation), weights)
    # float32 rounds at 6e-8 per operation; a few dozen operations on values of order 1 to 10
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_loss_along_random_directions(activation, seed):
    model = mlp((4, 5), (16, 12), 10, activation)
    weights = model.initial(np.random.default_rng(seed))
    x, y = batch(64, (4, 5), 10, seed)
    out = np.empty(model.size, np.float32)

    model.gradients(weights, x, y, out)

    direction = np.random.default_rng(seed).standard_normal(model.size)
    direction /= np.linalg.norm(direction)
    h = 1e-6
    upper, lower = (
        loss64(model, weights + sign * h * direction, x, y, activation) for sign in (1, -1)
    )
    # the sum of 600 coordinates of error 1e-7 in random signs, weighted by a unit vector
    assert np.float64(out) @ direction == pytest.approx((upper - lower) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_accuracy_are_the_reference(activation):
    model = mlp(hidden=(5, 4), activation=activation)
    (x, y), weights = batch(50), random_weights(model)
    loss, accuracy = model.gradients(weights, x, y, np.empty(model.size, np.float32))

    best = logits64(model, weights, x, activation).argmax(axis=1)
    assert 0 < accuracy < 1
    assert accuracy == np.mean(best == y)
    assert loss == pytest.approx(loss64(model, weights, x, y, activation), rel=1e-5)
    assert (type(loss), type(accuracy)) == (float, float)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_out_is_overwritten_completely(activation, hidden):
    model = mlp(hidden=hidden, activation=activation)
    (x, y), weights = batch(9), random_weights(model)
    garbage = np.full(model.size, np.nan, np.float32)
    zeros = np.zeros(model.size, np.float32)
    model.gradients(weights, x, y, garbage)
    model.gradients(weights, x, y, zeros)
    assert garbage.tobytes() == zeros.tobytes()


def test_reused_scratch_changes_no_bit():
    used = mlp(hidden=(5, 4), activation="tanh")
    weights = random_weights(used)
    for n in (3, 64, 1, 64, 17, 100, 3):
        x, y = batch(n, seed=n)
        fresh = mlp(hidden=(5, 4), activation="tanh")
        results = []
        for model in (used, fresh):
            out = np.empty(model.size, np.float32)
            results.append((model.gradients(weights, x, y, out), out.tobytes()))
            results[-1] += (model.evaluate(weights, x, y),)
        assert results[0] == results[1]


def test_two_half_batches_average_to_the_whole():
    model = mlp((8,), (16,), 4)
    (x, y), weights = batch(64, (8,)), random_weights(model)
    whole, first, second = np.empty((3, model.size), np.float32)
    loss = model.gradients(weights, x, y, whole)[0]
    half_losses = [
        model.gradients(weights, x[:32], y[:32], first)[0],
        model.gradients(weights, x[32:], y[32:], second)[0],
    ]
    np.testing.assert_allclose((first + second) / 2, whole, atol=1e-6)
    assert np.mean(half_losses) == pytest.approx(loss, rel=1e-6)


def test_samples_of_any_shape_are_rows():
    (x, y) = batch(6, (2, 3, 2))
    image, flat = mlp((2, 3, 2)), mlp((12,))
    weights = random_weights(flat)
    results = np.empty((2, flat.size), np.float32)
    image.gradients(weights, x, y, results[0])
    flat.gradients(weights, x.reshape(6, 12), y, results[1])
    assert results[0].tobytes() == results[1].tobytes()


def test_softmax_is_an_mlp_without_hidden_layers():
    softmax, network = Softmax(Softmax.Params(), (3,), 4), mlp(hidden=())
    (x, y), weights = batch(9), random_weights(network)
    results = np.empty((2, network.size), np.float32)
    assert softmax.shapes == network.shapes
    assert softmax.gradients(weights, x, y, results[0]) == network.gradients(
        weights, x, y, results[1]
    )
    assert results[0].tobytes() == results[1].tobytes()


def test_l2_is_part_of_loss_and_gradient_and_leaves_the_bias_free():
    model = Softmax(Softmax.Params(l2=0.3), (3,), 4)
    (x, y), weights = batch(9), random_weights(model)

    def loss(w):
        return loss64(model, w, x, y, "relu") + 0.15 * np.sum(np.square(w[:12]))

    out = np.empty(model.size, np.float32)
    value, accuracy = model.gradients(weights, x, y, out)
    assert value == pytest.approx(loss(np.float64(weights)), rel=1e-5)
    assert model.evaluate(weights, x, y) == pytest.approx((value, accuracy))
    np.testing.assert_allclose(out, finite_differences(loss, weights), rtol=1e-5, atol=1e-6)


# Extremes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_logits_give_the_exact_loss(activation):
    model = mlp(activation=activation)
    weights = random_weights(model) * np.float32(30)
    x, y = batch(20)
    out = np.empty(model.size, np.float32)
    loss, _ = model.gradients(weights, x * 30, y, out)
    with np.errstate(over="ignore"):
        expected = loss64(model, weights, x * 30, y, activation)
    assert expected > 20
    assert loss == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [1e38, math.inf, math.nan])
def test_a_diverged_model_reports_no_number_and_no_warning(activation, value):
    model = Mlp(Mlp.Params((5,), activation), (3,), 4)
    weights = np.full(model.size, value, np.float32)
    weights[1::2] *= -1
    (x, y), out = batch(5), np.empty(model.size, np.float32)
    loss, accuracy = model.gradients(weights, x * 10, y, out)
    assert not math.isfinite(loss)
    assert 0 <= accuracy <= 1
    assert not math.isfinite(model.evaluate(weights, x * 10, y)[0])


def test_one_sample_and_one_class():
    model = mlp((1,), (1,), 1)
    out = np.empty(model.size, np.float32)
    x, y = batch(1, (1,), 1)
    assert model.gradients(random_weights(model), x, y, out) == (0.0, 1.0)
    assert not out.any()


# Evaluation


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_evaluation_in_chunks_is_the_whole(n, monkeypatch):
    monkeypatch.setattr(models, "EVALUATION_ROWS", 8)
    model = mlp()
    (x, y), weights = batch(n), random_weights(model)
    loss, accuracy = model.evaluate(weights, x, y)
    hits = logits64(model, weights, x, "relu").argmax(axis=1) == y
    assert loss == pytest.approx(loss64(model, weights, x, y, "relu"), rel=1e-5)
    assert accuracy == np.mean(hits)


def test_evaluation_needs_no_more_memory_for_more_samples():
    model = mlp((2,), (32,))
    weights = random_weights(model)
    x, y = batch(32 * models.EVALUATION_ROWS, (2,))
    tracemalloc.start()
    try:
        model.evaluate(weights, x, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_layer_of_all = 4 * 32 * len(x)
    assert peak < one_layer_of_all / 4


# Layout and initial weights


def test_views_cover_the_vector_in_order():
    model = mlp((2, 3), (5, 4), 3)
    vector = np.arange(model.size, dtype=np.float32)
    views = model.views(vector)
    assert {name: view.shape for name, view in views.items()} == {
        "weight0": (6, 5),
        "bias0": (5,),
        "weight1": (5, 4),
        "bias1": (4,),
        "weight2": (4, 3),
        "bias2": (3,),
    }
    assert model.size == 6 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3
    assert np.array_equal(np.concatenate([view.ravel() for view in views.values()]), vector)
    views["bias2"][:] = -1
    assert vector[-3:].tolist() == [-1] * 3


@pytest.mark.parametrize(
    "vector",
    [np.zeros(34), np.zeros(36), np.zeros((1, 35)), np.zeros(70)[::2]],
    ids=["short", "long", "matrix", "strided"],
)
def test_views_refuse_what_is_no_contiguous_vector_of_the_size(vector):
    model = mlp((4,), (4,), 3)
    assert model.size == 35
    with pytest.raises(ValueError, match="expected a contiguous vector of 35"):
        model.views(vector)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_seed_gives_the_same_initial_bits(activation):
    model = mlp((8,), (16,), 4, activation)
    first, again, other = (model.initial(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.dtype == np.float32
    assert first.shape == (model.size,)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("activation", "hidden"), [("relu", 2 / 100), ("tanh", 2 / 180), ("sigmoid", 2 / 180)]
)
def test_initial_weights_have_the_published_variance(activation, hidden):
    model = mlp((100,), (80, 100), 40, activation)
    views = model.views(model.initial(np.random.default_rng(0)))
    last = 2 / 140
    for name, variance in (("weight0", hidden), ("weight2", last)):
        # 4,000 and more samples: the variance is within 10 %, the mean within 4 deviations
        assert np.var(views[name]) == pytest.approx(variance, rel=0.1)
        assert abs(np.mean(views[name])) < 4 * math.sqrt(variance / views[name].size)
    assert np.abs(views["weight2"]).max() <= math.sqrt(6 / 140)
    assert not any(views[f"bias{i}"].any() for i in range(3))


# Refusals


@pytest.mark.parametrize("method", ["gradients", "evaluate"])
@pytest.mark.parametrize(
    ("x_shape", "labels", "message"),
    [
        ((0, 3), [], "n of at least 1"),
        ((2, 4), [0, 1], "samples have shape"),
        ((2, 3), [0], "labels"),
        ((2, 3), [[0], [1]], "labels"),
        ((3,), [0], "samples have shape"),
        ((2, 3), [0, 4], "labels range from 0 to 4; expected 0 … 3"),
        ((2, 3), [-1, 0], "labels range from -1 to 0"),
    ],
)
def test_batches_that_do_not_fit_are_refused(method, x_shape, labels, message):
    model = mlp()
    x, y = np.zeros(x_shape, np.float32), np.array(labels, np.int64)
    args = (np.empty(model.size, np.float32),) if method == "gradients" else ()
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(random_weights(model), x, y, *args)


@pytest.mark.parametrize(("inputs", "classes"), [((0,), 2), ((3, 0), 2), ((3,), 0)])
def test_models_without_inputs_or_classes_are_refused(inputs, classes):
    with pytest.raises(ValueError, match="at least 1 each"):
        mlp(inputs, (), classes)


@pytest.mark.parametrize("hidden", [(0,), (8, -1)])
def test_hidden_layers_without_units_are_refused(hidden):
    with pytest.raises(ValueError, match="expected sizes of at least 1"):
        Mlp.Params(hidden)


@pytest.mark.parametrize("l2", [-0.1, math.inf, math.nan])
def test_l2_outside_its_range_is_refused(l2):
    with pytest.raises(ValueError, match="l2 is"):
        Softmax.Params(l2)


def test_params_come_from_a_job():
    params = make_params(Mlp, {"hidden": [128, 128], "activation": "tanh"}, "model")
    assert params == Mlp.Params((128, 128), "tanh")
    assert make_params(Softmax, {"l2": 1}, "model") == Softmax.Params(1.0)


# Learning


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_descent_learns_what_no_linear_model_can(activation):
    model = mlp((2,), (16,), 2, activation)
    rng = np.random.default_rng(5)
    x = rng.uniform(-1, 1, (128, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    weights, gradient = model.initial(rng), np.empty(model.size, np.float32)
    for _ in range(600):
        model.gradients(weights, x, y, gradient)
        weights -= 2 * gradient
    assert model.evaluate(weights, x, y)[1] > 0.9


# No computation


def test_blank_has_as_many_parameters_as_asked_for():
    model = Blank(make_params(Blank, {"parameters": 7}, "model"), (2, 3), 5)
    assert (model.size, dict(model.shapes)) == (7, {"blank": (7,)})
    assert not model.initial(np.random.default_rng(0)).any()


def test_blank_computes_nothing_but_fills_the_gradient():
    model, out = Blank(Blank.Params(7), (3,), 4), np.full(7, np.nan, np.float32)
    x, y = batch(5)
    weights = random_weights(model)
    assert model.gradients(weights, x, y, out) == model.evaluate(weights, x, y) == (0.0, 0.0)
    np.testing.assert_array_equal(out, np.ones(7, np.float32))


def test_blank_without_parameters_is_refused():
    with pytest.raises(ValueError, match="parameters is 0; expected at least 1"):
        Blank.Params(0)
