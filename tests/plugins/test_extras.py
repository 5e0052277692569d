"""Plugins that need an extra, where it is not installed, and what a job may have them load."""

import sys

import pytest

import aiosgd
import aiosgd.aio
from aiosgd.errors import ClusterError, ConfigError, JobFailedError
from aiosgd.plugins.code import Code
from aiosgd.plugins.jax import Jax
from aiosgd.plugins.torch.dataset import Torch as TorchDataset
from aiosgd.plugins.torch.model import Torch, TorchModel, TorchParams
from aiosgd.runtime import workload
from aiosgd.runtime.config import Cluster, JobConfig

REFUSAL = "is the job's own code, which this node does not take; start it with --allow-code"


@pytest.fixture
def nothing_installed(monkeypatch):
    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)


class MyCnn(TorchModel):
    """A package's own model."""

    def module(self, params, inputs, classes):
        raise AssertionError


def test_each_says_what_to_install(nothing_installed, tmp_path):
    code = Code("nets:make").allowed()
    for make, message in (
        (
            lambda: Torch(Torch.Params(factory=code), (8, 8), 10),
            "the model 'torch' needs PyTorch: pip install 'aiosgd[torch]'",
        ),
        (
            lambda: MyCnn(TorchParams(), (8, 8), 10),
            "the model MyCnn needs PyTorch: pip install 'aiosgd[torch]'",
        ),
        (
            lambda: TorchDataset(TorchDataset.Params(factory=code), tmp_path).files(),
            "the data set 'torch' needs PyTorch: pip install 'aiosgd[torch]'",
        ),
        (
            lambda: Jax(Jax.Params(factory=code), (8, 8), 10),
            "the model 'jax' needs JAX: pip install 'aiosgd[jax]'",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("factory", "model"),
    [("subprocess:run", "torch"), ("os:abort", "jax"), ("{trap}:run", "torch")],
)
async def test_a_node_never_loads_what_a_job_names(factory, model, tmp_path, running, monkeypatch):
    """The submitter's own checks are left out: whoever wants harm does so."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    factory = factory.format(trap=trap)

    def other(job, sources, settings):
        loaded.append(factory)

    loaded = []
    monkeypatch.setattr(Code, "load", other)
    honest = await aiosgd.aio.asyncio.to_thread(workload.load, JobConfig(max_steps=1), 1, tmp_path)
    monkeypatch.setattr(workload, "load", lambda *_, **__: honest)
    options = {"model": model, "model_params": {"factory": factory}, "max_steps": 1}
    async with running() as (node, address):
        with pytest.raises(ClusterError, match=REFUSAL):
            await aiosgd.aio.submit(Cluster((address,)), **options, output=str(tmp_path / "runs"))
        monkeypatch.setattr(workload, "named_code", lambda job: [])  # so the node votes for it
        with pytest.raises(JobFailedError, match=REFUSAL):
            await aiosgd.aio.submit(Cluster((address,)), **options, output=str(tmp_path / "runs"))
        assert node.part is None
    assert not loaded
    assert not (tmp_path / "it ran").exists()


def test_a_data_set_on_a_node_reads_its_file_and_loads_no_code(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    job = JobConfig(dataset="torch", dataset_params={"factory": f"{trap}:read"})
    with pytest.raises(ConfigError, match=r"data file 'arrays\.npy' did not come with the job"):
        workload.load(job, 1, tmp_path, paths={}, sources={})
    broken = tmp_path / "broken"
    broken.write_bytes(b"nothing like it")
    with pytest.raises(ConfigError, match=r"^dataset\.factory '.*trap\.py:read': "):
        workload.load(job, 1, tmp_path, paths={"arrays.npy": broken}, sources={})
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("params", "message"),
    [({"test_fraction": 1.0}, "between 0 and 1"), ({"seed": -1}, "expected a number from 0")],
)
def test_parameters_of_the_data_set_have_ranges(params, message):
    with pytest.raises(ValueError, match=message):
        TorchDataset.Params(factory=Code("a:b"), **params)
