"""Models that are pure functions of JAX's."""

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.extra

import aiosgd  # noqa: E402
from aiosgd.errors import ConfigError, PluginLoadError  # noqa: E402
from aiosgd.plugins.jax import Jax  # noqa: E402
from aiosgd.plugins.models import Softmax  # noqa: E402
from aiosgd.plugins.registry import make_params  # noqa: E402

SOURCE = """
import jax
import jax.numpy as jnp


def make(width=0, **changes):
    def init(key):
        first, second = jax.random.split(key)
        if not width:
            return {"weight": 0.1 * jax.random.normal(first, (64, 10)), "bias": jnp.zeros(10)}
        return [
            {"weight": 0.1 * jax.random.normal(first, (64, width)), "bias": jnp.zeros(width)},
            {"weight": 0.1 * jax.random.normal(second, (width, 10)), "bias": jnp.zeros(10)},
        ]

    def predict(params, x):
        layers = params if width else [params]
        x = x.reshape(len(x), -1)
        for i, layer in enumerate(layers):
            x = (jax.nn.relu(x) if i else x) @ layer["weight"] + layer["bias"]
        return x

    def loss(params, x, y):
        scores = jax.nn.log_softmax(predict(params, x))
        return -jnp.take_along_axis(scores, y[:, None], 1).mean()

    made = {"init": init, "loss": loss, "predict": predict}
    wrong = {
        "ints": lambda key: {"a": jnp.zeros(3, jnp.int32)},
        "nothing": lambda key: {},
        "failing": lambda key: 1 / 0,
        "wide": lambda params, x: jnp.zeros((len(x), 7)),
        "each": lambda params, x, y: jnp.zeros(len(x)),
        "broken": lambda params, x: x @ jnp.zeros((3, 10)),
        "twice": lambda key: {"a": {"b": jnp.zeros(2)}, "a.b": jnp.zeros(2)},
    }
    made |= {name: wrong[which] for name, which in changes.items()}
    return tuple(made.values())


def none():
    return 5


number = 3
"""


@pytest.fixture
def build(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)

    def make(name="make", **args):
        params = make_params(Jax, {"factory": f"{path}:{name}", "args": args}, "model")
        return Jax(dataclasses.replace(params, factory=params.factory.allowed()), (8, 8), 10)

    return make


def batch(n=16):
    rng = np.random.default_rng(0)
    return rng.random((n, 8, 8), np.float32), rng.integers(0, 10, n)


def test_gradients_loss_and_accuracy_are_those_of_the_numpy_model(build):
    one, other, (x, y) = build(), Softmax(Softmax.Params(), (8, 8), 10), batch()
    weights = one.initial(np.random.default_rng(1))
    same = np.concatenate([one.views(weights)["weight"].ravel(), one.views(weights)["bias"]])
    out, expected = (np.full(650, np.nan, np.float32) for _ in range(2))
    facts, others = one.gradients(weights, x, y, out), other.gradients(same, x, y, expected)
    assert facts == pytest.approx(others, rel=1e-6)
    for name, numpys in (("weight", "weight0"), ("bias", "bias0")):
        np.testing.assert_allclose(
            one.views(out)[name], other.views(expected)[numpys], rtol=1e-4, atol=1e-7
        )
    assert one.evaluate(weights, x, y) == pytest.approx(facts, rel=1e-6)


def test_parameters_are_named_by_their_place_and_weights_change_in_place(build):
    one, (x, y) = build(width=5), batch()
    assert list(one.shapes) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    weights = one.initial(np.random.default_rng(1))
    assert weights.tobytes() == one.initial(np.random.default_rng(1)).tobytes()
    assert weights.tobytes() != one.initial(np.random.default_rng(2)).tobytes()
    before, out = one.evaluate(weights, x, y)[0], np.empty_like(weights)
    for _ in range(20):
        one.gradients(weights, x, y, out)
        weights -= out
    assert one.evaluate(weights, x, y)[0] < before - 0.1


def test_evaluation_is_the_mean_over_all_samples_in_any_pieces(build, monkeypatch):
    one, (x, y) = build(), batch(20)
    weights = one.initial(np.random.default_rng(1))
    whole = one.evaluate(weights, x, y)
    monkeypatch.setattr("aiosgd.plugins.jax.EVALUATION_ROWS", 16)
    assert one.evaluate(weights, x, y) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"name": "none"}, ConfigError, r"returned 5; expected \(init, loss, predict\), functions"),
        ({"name": "number"}, PluginLoadError, "is 3; expected a function"),
        ({"name": "other"}, PluginLoadError, r"nets\.py has no 'other'"),
        ({"init": "ints"}, ConfigError, "has parameter 'a' of int32; expected float32"),
        ({"init": "nothing"}, ConfigError, "has no parameters; there is nothing to train"),
        ({"init": "failing"}, PluginLoadError, "init failed: ZeroDivisionError"),
        ({"init": "twice"}, ConfigError, "has parameters of the same name"),
        ({"predict": "wide"}, ConfigError, r"a predict that gives \(2, 7\) for 2 .* \(2, 10\)"),
        ({"loss": "each"}, ConfigError, r"a loss that gives \(2,\) for 2 samples; expected \(\)"),
        ({"predict": "broken"}, ConfigError, r"a predict that fails for samples of shape \(8, 8\)"),
        ({"init": "no such"}, PluginLoadError, "failed: KeyError"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(args, error, message, build):
    with pytest.raises(error, match=message) as caught:
        build(**args)
    assert str(caught.value).startswith("model.factory '")
    assert "\n" not in str(caught.value)


def test_batches_that_do_not_fit_are_refused(build):
    one, (x, y) = build(), batch()
    weights, out = one.initial(np.random.default_rng(0)), np.empty(one.size, np.float32)
    for bad in ((x[:, 1:], y), (x, y[1:]), (x[:0], y[:0]), (x, y + 10), (x, y - 10)):
        with pytest.raises(ValueError, match="expected"):
            one.gradients(weights, *bad, out)


async def test_a_job_on_a_node_and_its_simulation_have_the_same_bits(build, tmp_path, running):
    options = {
        "model": "jax",
        "model_params": {"factory": f"{tmp_path}/nets.py:make", "args": {"width": 32}},
        "max_steps": 8,
        "output": str(tmp_path / "runs"),
        "step_timeout": 60.0,
    }
    from aiosgd.runtime.config import Cluster

    async with running(allow_code=True) as (_, address):
        ran = await aiosgd.aio.submit(Cluster((address,)), **options)
    simulated = await aiosgd.aio.simulate(**options, workers=1, batch_size=64)
    for name, array in ran.parameters.items():
        assert array.tobytes() == simulated.parameters[name].tobytes(), name
