"""Models that are PyTorch modules: gradients in the flat vector, seeds, states, refusals."""

import dataclasses
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.extra

from torch import nn  # noqa: E402

import aiosgd  # noqa: E402
import aiosgd.aio  # noqa: E402
from aiosgd.errors import ConfigError, PluginLoadError  # noqa: E402
from aiosgd.plugins.code import Code  # noqa: E402
from aiosgd.plugins.registry import make_params  # noqa: E402
from aiosgd.plugins.torch.model import SharedMemory, Staged, Torch, TorchModel, TorchParams  # noqa: E402
from aiosgd.runtime import workload  # noqa: E402
from aiosgd.runtime.config import Cluster  # noqa: E402

INPUTS, CLASSES = (8, 8), 10


def cnn(**more):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        *more.values(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Own(TorchModel):
    """Whatever a test wants it to be."""

    made = staticmethod(cnn)

    def module(self, params, inputs, classes):
        return self.made()


def model(made=cnn, device="cpu"):
    kind = type("Own", (Own,), {"made": staticmethod(made)})
    return kind(TorchParams(device=device), INPUTS, CLASSES)


def batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((n, *INPUTS), np.float32), rng.integers(0, CLASSES, n)


def gradients(one, weights, x, y):
    out = np.full(one.size, np.nan, np.float32)
    return out, one.gradients(weights, x, y, out)


# Gradients


def test_gradients_are_pytorchs_own():
    one, (x, y) = model(), batch()
    weights = one.initial(np.random.default_rng(3))
    out, (loss, accuracy) = gradients(one, weights, x, y)

    plain = cnn()
    with torch.no_grad():
        for parameter, array in zip(plain.parameters(), one.views(weights).values(), strict=True):
            parameter.copy_(torch.from_numpy(array))
    logits = plain(torch.from_numpy(x))
    expected = nn.functional.cross_entropy(logits, torch.from_numpy(y))
    expected.backward()
    for name, parameter in plain.named_parameters():
        np.testing.assert_array_equal(one.views(out)[name], parameter.grad.numpy())
    assert loss == expected.item()
    assert accuracy == (logits.argmax(1).numpy() == y).mean()


def test_the_parameters_are_the_memory_of_the_weights():
    one, (x, y) = model(), batch()
    weights = one.initial(np.random.default_rng(3))
    first, _ = gradients(one, weights, x, y)
    for array, parameter in zip(one.views(weights).values(), one._weights, strict=True):
        assert np.shares_memory(array, parameter.detach().numpy())
    weights *= 0.5  # in place, as an optimizer does
    second, _ = gradients(one, weights, x, y)
    assert not np.array_equal(first, second)
    fresh, _ = gradients(model(), weights.copy(), x, y)
    assert second.tobytes() == fresh.tobytes()


def test_read_only_arrays_are_taken_and_left_as_they_are():
    one, (x, y) = model(), batch()
    weights = one.initial(np.random.default_rng(3))
    expected, _ = gradients(one, weights, x, y)
    for array in (weights, x, y):
        array.flags.writeable = False
    out, _ = gradients(one, weights, x, y)
    assert out.tobytes() == expected.tobytes()
    changed = weights * 2
    changed.flags.writeable = False
    assert gradients(one, changed, x, y)[0].tobytes() != expected.tobytes()


def test_one_instance_serves_many_vectors_in_turn():
    one, (x, y) = model(), batch()
    vectors = [one.initial(np.random.default_rng(seed)) for seed in range(3)]
    alone = [gradients(model(), vector, x, y)[0] for vector in vectors]
    for _ in range(2):
        for vector, expected in zip(vectors, alone, strict=True):
            assert gradients(one, vector, x, y)[0].tobytes() == expected.tobytes()


def test_evaluation_is_the_mean_over_all_samples_in_any_pieces(monkeypatch):
    one, (x, y) = model(), batch(50)
    weights = one.initial(np.random.default_rng(3))
    whole = one.evaluate(weights, x, y)
    monkeypatch.setattr("aiosgd.plugins.torch.model.EVALUATION_ROWS", 7)
    assert one.evaluate(weights, x, y) == pytest.approx(whole, rel=1e-6)
    assert gradients(one, weights, x, y)[1] == pytest.approx(whole, rel=1e-6)


def test_unused_parameters_have_no_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    one, (x, y) = model(Half), batch()
    out, _ = gradients(one, one.initial(np.random.default_rng(0)), x, y)
    assert not one.views(out)["idle.weight"].any()
    assert one.views(out)["used.weight"].any()


def test_tied_parameters_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(x.flatten(1))))

    one, (x, y) = model(Tied), batch()
    assert list(one.shapes) == ["a.weight", "a.bias", "b.bias", "out.weight", "out.bias"]
    assert one.state == {}
    weights = one.initial(np.random.default_rng(0))
    before = one.evaluate(weights, x, y)[0]
    for _ in range(20):
        weights -= 0.1 * gradients(one, weights, x, y)[0]
    assert one.evaluate(weights, x, y)[0] < before


def test_a_loss_of_ones_own():
    def smooth(logits, labels):
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    (x, y), own, plain = batch(), model(lambda: (cnn(), smooth)), model()
    weights = own.initial(np.random.default_rng(0))
    loss = gradients(own, weights, x, y)[1][0]
    logits = own._net(torch.from_numpy(x))
    assert loss == pytest.approx(smooth(logits, torch.from_numpy(y)).item(), rel=1e-6)
    assert loss != gradients(plain, weights, x, y)[1][0]


# The host's side and the device's


def test_over_staging_vectors_the_bits_are_the_same():
    """A device's way, with this machine's memory in the place of the device's."""
    (x, y), here, there = batch(), model(), model()
    there._link = Staged(torch, torch.device("cpu"), there.size, pin=False)
    weights = here.initial(np.random.default_rng(3))
    for _ in range(3):
        expected, facts = gradients(here, weights, x, y)
        out, others = gradients(there, weights, x, y)
        assert (out.tobytes(), others) == (expected.tobytes(), facts)
        assert there.evaluate(weights, x, y) == here.evaluate(weights, x, y)
        weights -= np.float32(0.1) * out
    assert not any(np.shares_memory(weights, one.detach().numpy()) for one in there._weights)


def test_a_staged_vector_goes_through_page_locked_memory_where_it_is_asked_for(monkeypatch):
    asked, real = [], torch.empty

    def empty(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    Staged(torch, torch.device("cpu"), 8, pin=True)
    assert asked == [True, True, False, False]


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(model(device="auto")._link, SharedMemory)
    with pytest.raises(ConfigError, match=r"model\.device is 'cuda', but PyTorch finds no GPU"):
        model(device="cuda")


# Seeds


def test_initial_weights_are_a_function_of_the_generator_and_leave_pytorchs_alone():
    one = model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (one.initial(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert first.dtype == np.float32
    assert first.shape == (one.size,)


def test_what_a_block_draws_is_a_function_of_its_seed():
    one, (x, y) = model(lambda: cnn(dropout=nn.Dropout(0.5))), batch()
    weights = one.initial(np.random.default_rng(0))
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def block(step):
        one.reseed([0, 4, step, 1])
        return gradients(one, weights, x, y)[0].tobytes()

    drawn = [block(step) for step in (0, 1, 0, 1)]
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert one.evaluate(weights, x, y) == one.evaluate(weights, x, y)  # nothing is left out then


# State


def norm():
    return cnn(norm=nn.BatchNorm2d(4))


def test_running_statistics_are_state_and_each_worker_has_its_own():
    one, (x, y) = model(norm), batch()
    first, second = one.for_worker(), one.for_worker()
    assert first is one
    assert second is not one
    weights = one.initial(np.random.default_rng(0))
    gradients(second, weights, x, y)
    assert first.state["2.num_batches_tracked"] == 0
    assert second.state["2.num_batches_tracked"] == 1
    assert not np.array_equal(first.state["2.running_mean"], second.state["2.running_mean"])
    assert first.evaluate(weights, x, y) != second.evaluate(weights, x, y)
    assert set(one.state) == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_a_model_without_running_statistics_is_shared_by_all_workers():
    one = model()
    assert one.for_worker() is one.for_worker() is one


def test_state_is_copied_out_and_put_back():
    one, other, (x, y) = model(norm), model(norm), batch()
    weights = one.initial(np.random.default_rng(0))
    empty = one.state
    gradients(one, weights, x, y)
    assert empty["2.num_batches_tracked"] == 0
    other.state = one.state
    assert other.evaluate(weights, x, y) == one.evaluate(weights, x, y)
    with pytest.raises(ValueError, match="expected"):
        other.state = {}


def test_parameters_without_gradients_are_state_and_not_trained():
    def frozen():
        net = cnn()
        net[1].weight.requires_grad_(False)
        return net

    one, (x, y) = model(frozen), batch()
    assert list(one.shapes) == ["1.bias", "4.weight", "4.bias"]
    weights = one.initial(np.random.default_rng(0))
    before = one.state
    weights -= gradients(one, weights, x, y)[0]
    gradients(one, weights, x, y)
    assert list(before) == ["1.weight"]
    assert before["1.weight"].tobytes() == one.state["1.weight"].tobytes()
    assert model(frozen).state["1.weight"].tobytes() == before["1.weight"].tobytes()


def test_lazy_modules_get_their_parameters():
    one = model(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    assert one.shapes == {"1.weight": (10, 64), "1.bias": (10,)}
    assert np.isfinite(one.initial(np.random.default_rng(0))).all()


# Threads


def test_threads_are_limited_and_given_back():
    one, before = model(), torch.get_num_threads()
    assert one.limit_threads(1) == before
    assert torch.get_num_threads() == 1
    assert one.limit_threads(before) == 1
    assert torch.get_num_threads() == before


# Refusals


def double():
    return cnn().double()


def shared_memory():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    net[2].weight.data = net[1].weight.data
    return net


def half_buffer():
    net = cnn()
    net.register_buffer("table", torch.zeros(3, dtype=torch.bfloat16))
    return net


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: 5, "returned 5; expected an nn.Module, or a pair of one and its loss function"),
        (lambda: None, "returned None; expected an nn.Module"),
        (
            lambda: (cnn(), 3),
            r"returned \(Seq.*; expected an nn.Module, or a pair of one and its loss function",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1)), r"gives \(2, 64\) for 2 samples"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)),
            r"gives \(2, 7\) for 2 samples; expected \(2, 10\): a logit for each class",
        ),
        (lambda: nn.LSTM(8, 10), "gives tuple for 2 samples"),
        (lambda: nn.Conv2d(3, 4, 3), r"does not take samples of shape \(8, 8\): RuntimeError"),
        (lambda: (cnn(), nn.CrossEntropyLoss(reduction="none")), r"has a loss that gives \(2,\)"),
        (lambda: (cnn(), lambda a, b: 1.0), "has a loss that gives float; expected the mean"),
        (lambda: (cnn(), lambda a: a), "has a loss that fails: TypeError"),
        (
            lambda: cnn().requires_grad_(False),
            "has no parameters that require gradients; there is nothing to train",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double()), "does not take samples"),
        (shared_memory, r"has parameters '1\.weight' and '2\.weight' that share memory"),
        (half_buffer, "has 'table' of torch.bfloat16, which no file of a run can hold"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(made, message):
    with pytest.raises(ConfigError, match=f"^model Own {message}") as caught:
        model(made)
    assert "\n" not in str(caught.value)


def test_parameters_that_are_no_float32_are_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10).double()

        def forward(self, x):
            return self.fc(x.flatten(1).double()).float()

    message = r"model Own has parameter 'fc\.weight' of torch\.float64; expected float32: module"
    with pytest.raises(ConfigError, match=message):
        model(Mixed)


def test_integer_buffers_are_fine():
    one = model(norm)
    assert one.state["2.num_batches_tracked"].dtype == np.int64


def test_batches_that_do_not_fit_are_refused():
    one, (x, y) = model(), batch()
    weights, out = one.initial(np.random.default_rng(0)), np.empty(one.size, np.float32)
    for bad in ((x[:, 1:], y), (x, y[1:]), (x[:0], y[:0]), (x, y + CLASSES), (x, y - CLASSES)):
        with pytest.raises(ValueError, match="expected"):
            one.gradients(weights, *bad, out)
        with pytest.raises(ValueError, match="expected"):
            one.evaluate(weights, *bad)
    with pytest.raises(ValueError, match="weights have shape"):
        one.evaluate(weights[1:], x, y)


# A factory of the user's own


def test_a_factory_gets_its_arguments_and_each_mistake_is_one_clear_line(tmp_path):
    nets = tmp_path / "nets.py"
    nets.write_text(
        "from torch import nn\n"
        "def make(width=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))\n"
        "number = 3\n"
    )

    def build(text, **args):
        params = make_params(Torch, {"factory": text, "args": args}, "model")
        return Torch(dataclasses.replace(params, factory=params.factory.allowed()), INPUTS, CLASSES)

    assert build(f"{nets}:make", width=5).shapes["1.weight"] == (5, 64)
    for text, args, error, message in (
        (f"{nets}:make", {"widht": 5}, PluginLoadError, "failed: TypeError: .*'widht'"),
        (f"{nets}:number", {}, PluginLoadError, r"number' is 3; expected a function"),
        (f"{nets}:other", {}, PluginLoadError, r"nets\.py has no 'other'"),
        (f"{tmp_path}/no.py:make", {}, ConfigError, "there is no file"),
        ("no_such_package:make", {}, PluginLoadError, "No module named 'no_such_package'; install"),
    ):
        with pytest.raises(error, match=f"^model.factory .*{message}"):
            build(text, **args)
    with pytest.raises(ConfigError, match=r"model\.factory: Torch needs this parameter"):
        make_params(Torch, {}, "model")


def test_a_factory_without_leave_is_not_imported(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    with pytest.raises(PluginLoadError, match="may not be run here"):
        Torch(Torch.Params(factory=Code(f"{trap}:make")), INPUTS, CLASSES)
    assert not (tmp_path / "it ran").exists()


# Whole jobs


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(),\n"
        "                         nn.Dropout(0.2), nn.Linear(32, 10))\n"
    )
    return f"{path}:make"


def job(nets, tmp_path, **options):
    return {
        "codec": "plain",
        "model": "torch",
        "model_params": {"factory": nets},
        "workers": 2,
        "batch_size": 64,
        "max_steps": 12,
        "epochs": 2,
        "output": str(tmp_path / "runs"),
        **options,
    }


def test_a_run_on_nodes_and_its_simulation_have_the_same_bits(nets, tmp_path):
    """Dropout and batch norm: what is drawn, and whose statistics, does not depend on where it runs."""
    ran = aiosgd.run(**job(nets, tmp_path))
    simulated = aiosgd.simulate(**job(nets, tmp_path))
    assert ran.parameters.keys() == simulated.parameters.keys()
    for name, array in ran.parameters.items():
        assert array.tobytes() == simulated.parameters[name].tobytes(), name
    assert ran.metrics == simulated.metrics
    assert (ran.folder / "code/nets.py").exists()

    from safetensors.torch import load_file

    module = workload._own_code(Torch.Params(factory=Code(nets))).factory.load("model.factory")()
    module.load_state_dict(load_file(ran.folder / "model.safetensors"))
    assert module[2].num_batches_tracked == 12


def test_two_owners_of_a_block_draw_the_same(nets, tmp_path):
    options = job(nets, tmp_path, redundancy=2, assignment="duplicate", workers=4, codec="plain")
    once = aiosgd.simulate(**{**options, "redundancy": 1, "assignment": "iid", "workers": 2})
    twice = aiosgd.simulate(**options)
    name = "1.weight"
    assert twice.parameters[name].tobytes() == once.parameters[name].tobytes()


async def test_a_job_goes_on_from_a_checkpoint_with_its_statistics(nets, tmp_path, running):
    async with running(allow_code=True) as (_, address):
        cluster = Cluster((address,))
        options = job(nets, tmp_path, workers=1)
        whole = await aiosgd.aio.submit(cluster, **options)
        part = await aiosgd.aio.submit(cluster, **{**options, "max_steps": 8}, checkpoint_every=4)
        rest = await aiosgd.aio.submit(
            cluster, resume=part.summary.job_id, max_steps=12, output=options["output"]
        )
        fetched = await aiosgd.aio.fetch(cluster, rest.summary.job_id, tmp_path / "fetched")
    assert "2.running_mean" in whole.parameters
    for name, array in whole.parameters.items():
        assert array.tobytes() == rest.parameters[name].tobytes(), name
        assert array.tobytes() == fetched.parameters[name].tobytes(), name


def test_a_simulation_leaves_pytorch_as_it_was(nets, tmp_path):
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    aiosgd.simulate(**job(nets, tmp_path, workers=3, max_steps=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_pytorch_is_imported_only_by_who_needs_it():
    import subprocess

    script = (
        "import sys, aiosgd.cli, aiosgd.catalogue as c\n"
        "assert c.describe_plugin('model', 'torch')['parameters'][0]['name'] == 'device'\n"
        "assert c.describe_plugin('dataset', 'torch') and c.describe_plugin('model', 'jax')\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
