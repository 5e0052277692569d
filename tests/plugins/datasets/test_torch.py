"""Data sets of PyTorch's: read through once, kept as arrays."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.extra

import aiosgd  # noqa: E402
from aiosgd.errors import ConfigError, PluginLoadError  # noqa: E402
from aiosgd.plugins.registry import make_params  # noqa: E402
from aiosgd.plugins.torch.dataset import Torch  # noqa: E402

SOURCE = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def tensors(n=10, shape=(2, 3), first=0):
    x = torch.arange(first, first + n * 6, dtype=torch.float64).reshape(n, *shape) / 7
    return TensorDataset(x, torch.arange(n) % 3)


def pair():
    return tensors(6), tensors(4, first=100)


class Drawn(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.rand(4), i % 2


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.full((2,), float(i)), i % 2) for i in range(5))


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def of(kind):
    one, two = torch.zeros(2), torch.zeros(3)
    return {
        "empty": Items(),
        "one": Items((one, 0)),
        "shapes": Items((one, 0), (two, 1)),
        "no label": Items(one),
        "float": Items((one, 0), (one, 0.5)),
        "negative": Items((one, 0), (one, -1)),
        "nan": Items((one, 0), (one * float("nan"), 1)),
        "three": (tensors(), tensors(), tensors()),
    }[kind]
"""


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "sets.py"
    path.write_text(SOURCE)

    def make(name, **params):
        read = make_params(Torch, {"factory": f"{path}:{name}", **params}, "dataset")
        allowed = dataclasses.replace(read, factory=read.factory.allowed())
        return Torch(allowed, tmp_path / "data")

    return make


def loaded(dataset):
    (file,) = dataset.files()
    return dataset.load({file.name: file.path})


def test_a_pair_is_to_train_and_to_test(made):
    data = loaded(made("pair"))
    assert data.inputs == (2, 3)
    assert data.classes == 3
    np.testing.assert_array_equal(data.train_x.ravel(), np.float32(np.arange(36) / 7))
    assert data.train_y.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test_x[0, 0, 0] == np.float32(100 / 7)
    assert len(data.test_y) == 4


def test_of_a_single_one_a_part_is_set_aside(made):
    data = loaded(made("tensors", args={"n": 20}, test_fraction=0.25))
    assert (len(data.train_y), len(data.test_y)) == (15, 5)
    firsts = [*data.train_x[:, 0, 0], *data.test_x[:, 0, 0]]
    np.testing.assert_array_equal(np.sort(firsts), np.float32(np.arange(0, 120, 6) / 7))


@pytest.mark.parametrize("name", ["tensors", "Drawn", "Stream"])
def test_the_same_set_is_the_same_file(name, made):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (first,), (second,) = made(name).files(), made(name).files()
    assert first == second
    assert first.path.name == f"{first.sha256}.npy"
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_transforms_draw_depends_on_the_seed(made):
    (first,), (second,) = made("Drawn").files(), made("Drawn", seed=1).files()
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("empty", ConfigError, "expected a data set with samples, or a pair of them"),
        ("three", ConfigError, "expected a data set with samples, or a pair of them"),
        ("one", ConfigError, "has 1 sample; expected one to test on, too"),
        (
            "shapes",
            PluginLoadError,
            r"sample 1 has shape \(3,\), sample 0 \(2,\); expected the same",
        ),
        ("no label", PluginLoadError, "item 0 is a Tensor; expected a sample and its label"),
        ("float", PluginLoadError, "label 1 is 0.5; expected a whole number from 0"),
        ("negative", PluginLoadError, "label 1 is -1; expected a whole number from 0"),
        ("nan", ConfigError, r"x\[\d, 0\] is nan; expected finite float32 values"),
        ("other", PluginLoadError, "failed: KeyError: 'other'"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(kind, error, message, made):
    with pytest.raises(error, match=rf"^dataset\.factory '.*sets\.py:of'.*{message}"):
        loaded(made("of", args={"kind": kind}))


def test_a_folder_that_cannot_be_written_is_named(made, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigError, match=r"data/torch cannot be written \(NotADirectoryError"):
        made("pair").files()


def test_a_job_trains_on_it_and_nodes_get_the_arrays(tmp_path):
    path = tmp_path / "sets.py"
    path.write_text(SOURCE)
    outcome = aiosgd.simulate(
        dataset="torch",
        dataset_params={"factory": f"{path}:tensors", "args": {"n": 40}},
        workers=2,
        batch_size=4,
        data_dir=tmp_path / "data",
        output=str(tmp_path / "runs"),
    )
    assert outcome.summary.steps == 4
