"""Models that draw and remember: seeds of blocks, and states that each worker has of its own."""

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

import aiosgd
import aiosgd.aio
from aiosgd.errors import ConfigError, RemoteProtocolError
from aiosgd.plugins.kinds import MODELS
from aiosgd.plugins.models import Mlp, Softmax
from aiosgd.runtime import checkpoint, harvest, workload
from aiosgd.runtime.config import Cluster, JobConfig
from aiosgd.runtime.learner import Learner
from tests.runtime.memory_transport import load_small


class Remembering(Softmax):
    """Counts its blocks, and shifts its gradients by what it draws."""

    @dataclass(frozen=True)
    class Params(Softmax.Params):
        """As the base's."""

    def __init__(self, params, inputs, classes):
        super().__init__(params, inputs, classes)
        self.count = np.zeros((), np.int64)
        self.mean = np.zeros(inputs, np.float32)
        self.limits = []

    def reseed(self, seed):
        self.rng = np.random.default_rng(seed)

    def for_worker(self):
        return copy.deepcopy(self)

    @property
    def state(self):
        return {"count": self.count.copy(), "mean": self.mean.copy()}

    @state.setter
    def state(self, state):
        self.count[...], self.mean[...] = state["count"], state["mean"]

    def limit_threads(self, threads):
        self.limits.append(threads)
        return 7

    def gradients(self, weights, x, y, out):
        self.count += 1
        self.mean += 0.1 * (x.mean(axis=0) - self.mean)
        facts = super().gradients(weights, x, y, out)
        out += 1e-3 * self.rng.standard_normal(out.size, np.float32)
        return facts


@pytest.fixture(autouse=True)
def remembering(monkeypatch):
    """The model `softmax` is this one, which every process of the test would have to know."""
    MODELS.load("softmax")
    monkeypatch.setitem(MODELS._loaded, "softmax", Remembering)


OPTIONS = {"model": "softmax", "codec": "plain", "batch_size": 64, "max_steps": 6}


def same(some, others):
    return {n: a.tobytes() for n, a in some.items()} == {n: a.tobytes() for n, a in others.items()}


async def test_a_run_leaves_worker_0s_state_beside_the_weights(tmp_path, running):
    async with running() as (_, first), running() as (_, second):
        cluster = Cluster((first, second))
        outcome = await aiosgd.aio.submit(cluster, **OPTIONS, output=str(tmp_path / "runs"))
        fetched = await aiosgd.aio.fetch(cluster, output=tmp_path / "fetched")
    simulated = await aiosgd.aio.simulate(**OPTIONS, workers=2, output=str(tmp_path / "runs"))
    assert list(outcome.parameters) == ["weight0", "bias0", "count", "mean"]
    assert outcome.parameters["count"] == 6
    assert same(outcome.parameters, fetched.parameters)
    assert same(outcome.parameters, simulated.parameters)
    written = harvest.results.read_parameters(outcome.folder)
    assert same(written, outcome.parameters)


async def test_a_resumed_job_has_the_state_of_its_checkpoint(tmp_path, running):
    async with running() as (_, address):
        cluster, output = Cluster((address,)), str(tmp_path / "runs")
        whole = await aiosgd.aio.submit(cluster, **OPTIONS, output=output)
        short = {**OPTIONS, "max_steps": 4, "checkpoint_every": 2}
        part = await aiosgd.aio.submit(cluster, **short, output=output)
        rest = await aiosgd.aio.submit(
            cluster, resume=part.summary.job_id, max_steps=6, output=output
        )
    assert same(whole.parameters, rest.parameters)


async def test_what_a_recorded_run_drew_a_replay_draws(tmp_path, running):
    from aiosgd.runtime.simulation.replay import replay

    async with running() as (_, address):
        options = {**OPTIONS, "record": True, "output": str(tmp_path / "runs")}
        outcome = await aiosgd.aio.submit(Cluster((address,)), **options)
    played = await aiosgd.aio.asyncio.to_thread(replay, outcome.folder, data_dir=tmp_path)
    assert same(played.parameters, outcome.parameters)


def test_each_worker_of_a_simulation_has_a_state_of_its_own(tmp_path):
    outcome = aiosgd.simulate(**OPTIONS, workers=3, output=str(tmp_path))
    assert outcome.parameters["count"] == 6


def test_each_block_is_seeded_by_job_step_and_id(monkeypatch):
    seeds = []
    monkeypatch.setattr(Mlp, "reseed", lambda self, seed: seeds.append(list(seed)))
    load = load_small({"seed": 5, "model": "mlp", "model_params": {}})
    learner = Learner(load, load.initial())
    for step, block in ((0, 0), (0, 1), (3, 0)):
        learner.advance(step, block)
    assert seeds == [[5, 4, 0, 0], [5, 4, 0, 1], [5, 4, 3, 0]]


def test_threads_are_limited_for_a_job_and_given_back(tmp_path, monkeypatch):
    made = []
    real = workload.load

    def load(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(workload, "load", load)
    aiosgd.simulate(**OPTIONS, workers=2, output=str(tmp_path))
    assert made[-1].model.limits == [1, 7]


def test_a_model_without_a_state_takes_none(tmp_path):
    model = Mlp(Mlp.Params(), (3,), 2)
    assert model.for_worker() is model
    assert model.state == {}
    assert model.limit_threads(3) == 3
    model.state = {}
    with pytest.raises(ValueError, match="Mlp remembers nothing, but got mean"):
        model.state = {"mean": np.zeros(3)}


def test_a_checkpoint_of_a_model_with_another_state_is_refused(tmp_path):
    load = load_small({"model": "softmax", "model_params": {}})
    learner = Learner(load, load.initial())
    other = Learner(dataclasses.replace(load, model=Mlp(Mlp.Params(()), (3,), 2)), load.initial())
    state = checkpoint.Checkpoint(1, learner.weights, learner.snapshot())
    checkpoint.write(tmp_path, state, load.model.shapes)
    read = checkpoint.read(tmp_path, 1, load.model.shapes)
    assert same(read.state["model"], learner.model_state)
    with pytest.raises(ValueError, match="remembers nothing"):
        other.restore(learner.weights, read.state)


@pytest.mark.parametrize(
    "state", [{"mean": [1.0]}, {"mean": np.array(["a"])}, {3: np.zeros(2)}, [1], {"mean": None}]
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises((RemoteProtocolError, ConfigError), match="model_state"):
        harvest._state(state)


# code of the user's own -------------------------------------------------------------------------


def test_a_jobs_own_code_is_what_nodes_run_for_it():
    job = JobConfig(
        codec="my.py:A",
        model_params={"factory": "nets.py:make"},
        dataset_params={"factory": "data.py:read"},
    )
    assert workload.named_code(job) == workload.file_code(job) == ["my.py:A", "nets.py:make"]
    module = dataclasses.replace(job, codec="plain", model_params={"factory": "pkg.nets:make"})
    assert (workload.named_code(module), workload.file_code(module)) == (["pkg.nets:make"], [])


def test_a_jobs_own_code_gets_other_names():
    job = JobConfig(
        codec="my.py:A", server_codec="plain", model_params={"factory": "n.py:m", "a": 1}
    )
    names = {"my.py:A": "kept/my.py:A", "n.py:m": "kept/n.py:m"}
    renamed = workload.with_code(job, names)
    assert (renamed.codec, renamed.server_codec) == ("kept/my.py:A", "plain")
    assert renamed.model_params == {"factory": "kept/n.py:m", "a": 1}
    assert workload.with_code(job, {}) == job
