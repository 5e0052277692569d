"""Data, DataFile and the base class."""

import dataclasses
import hashlib

import numpy as np
import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins.datasets import Data, DataFile, Dataset, sha256


def fields(n=4, test=2, shape=(2, 3), classes=3):
    rng = np.random.default_rng(0)
    return {
        "train_x": rng.standard_normal((n, *shape), np.float32),
        "train_y": np.arange(n) % classes,
        "test_x": rng.standard_normal((test, *shape), np.float32),
        "test_y": np.arange(test) % classes,
        "classes": classes,
    }


def with_value(array, value, at):
    changed = array.copy()
    changed[at] = value
    return changed


def test_inputs_is_the_shape_of_one_sample():
    assert Data(**fields(shape=(2, 3))).inputs == (2, 3)
    assert Data(**fields(shape=(5,))).inputs == (5,)


def test_one_training_sample_and_no_test_sample_are_enough():
    data = Data(**fields(n=1, test=0))
    assert (len(data.train_y), len(data.test_y)) == (1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["train_x", "test_x"])
def test_values_that_are_not_finite_are_refused_with_their_position(name, value):
    values = fields()
    values[name] = with_value(values[name], value, (1, 0, 2))
    with pytest.raises(ValueError, match=rf"{name}\[1, 0, 2\] is {value}; expected finite"):
        Data(**values)


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("name", ["train_y", "test_y"])
def test_labels_out_of_range_are_refused(name, label):
    values = fields()
    values[name] = with_value(values[name], label, 0)
    with pytest.raises(ValueError, match=rf"{name} has labels .*{label}.*; expected 0 to 2"):
        Data(**values)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train_x", np.zeros((4, 2, 3)), "train_x is float64; expected float32"),
        ("test_y", np.zeros(2, np.int32), "test_y is int32; expected int64"),
        ("train_x", np.zeros(4, np.float32), r"train_x has shape \(4,\)"),
        ("train_x", np.zeros((4, 0), np.float32), r"train_x has shape \(4, 0\)"),
        ("train_y", np.zeros(3, np.int64), r"train_y has shape \(3,\); expected \(4,\)"),
        ("test_y", np.zeros((2, 1), np.int64), r"test_y has shape \(2, 1\); expected \(2,\)"),
        ("test_x", np.zeros((2, 6), np.float32), r"shape \(2, 3\), test_x of \(6,\)"),
    ],
)
def test_wrong_forms_are_refused(name, array, message):
    with pytest.raises(ValueError, match=message):
        Data(**{**fields(), name: array})


def test_no_training_samples_are_refused():
    with pytest.raises(ValueError, match="train_x has no samples"):
        Data(**fields(n=0))


def test_data_cannot_be_reassigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Data(**fields()).classes = 5


@pytest.mark.parametrize("content", [b"", b"x", bytes(3_000_000)], ids=len)
def test_a_data_file_is_described_by_its_content(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert sha256(path) == digest
    assert DataFile.of("name", path) == DataFile("name", digest, len(content), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: cannot be read"):
        DataFile.of("name", tmp_path / "nowhere")


def test_a_data_set_needs_no_files_unless_it_says_so(tmp_path):
    class One(Dataset):
        def load(self, paths):
            return Data(**fields())

    assert One(One.Params(), tmp_path / "missing").files() == []
