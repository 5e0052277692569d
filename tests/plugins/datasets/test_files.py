"""Data sets that are one file: npz and csv."""

import zipfile

import numpy as np
import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins.datasets import Csv, Npz, sha256
from aiosgd.plugins.registry import make_params


@pytest.fixture
def npz(tmp_path):
    """Write arrays and load them under a name without a suffix, as a node does."""

    def load(arrays, **params):
        np.savez(tmp_path / "own.npz", **arrays)
        (tmp_path / "own.npz").rename(tmp_path / "c0ffee")
        dataset = Npz(Npz.Params(path="own.npz", **params), tmp_path)
        return dataset.load({"own.npz": tmp_path / "c0ffee"})

    return load


@pytest.fixture
def table(tmp_path):
    """Write a text and load it as CSV under a name without a suffix."""

    def load(text, **params):
        path = tmp_path / "c0ffee"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        dataset = Csv(Csv.Params(path="own.csv", **{"scale": False, **params}), tmp_path)
        return dataset.load({"own.csv": path})

    return load


def numbered(n, features=2):
    """Samples that say which they are: sample i is filled with i."""
    return {
        "x": np.repeat(np.arange(n, dtype=np.float32), features).reshape(n, features),
        "y": np.arange(n) % 3,
    }


def rows(n):
    return "".join(f"{i},{i}.5,{i % 3}\n" for i in range(n))


# Locating ------------------------------------------------------------------------------------


def test_a_relative_path_is_found_in_the_current_folder_first(tmp_path, monkeypatch):
    here, data_dir = tmp_path / "here", tmp_path / "data"
    for folder in (here, data_dir):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "own.npz").write_text(folder.name)
    monkeypatch.chdir(here)
    dataset = Npz(Npz.Params("sub/own.npz"), data_dir)
    (file,) = dataset.files()
    assert (file.name, file.size, file.path.read_text()) == ("own.npz", 4, "here")
    assert file.sha256 == sha256(here / "sub" / "own.npz")
    (here / "sub" / "own.npz").unlink()
    (file,) = dataset.files()
    assert file.path == data_dir / "sub" / "own.npz"


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.csv").write_text("x")
    (file,) = Csv(Csv.Params("~/own.csv"), tmp_path / "data").files()
    assert file.path == tmp_path / "own.csv"


def test_a_missing_file_is_reported_with_both_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"'own.npz'.*no such file in {tmp_path} or .*/data"):
        Npz(Npz.Params("own.npz"), tmp_path / "data").files()


@pytest.mark.parametrize("kind", [Npz, Csv])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "dataset.path: .* needs this parameter"),
        ({"path": ""}, "path is ''"),
        ({"path": "f", "test_fraction": 0.0}, "test_fraction is 0.0; expected between 0 and 1"),
        ({"path": "f", "test_fraction": 1}, "test_fraction is 1.0"),
        ({"path": "f", "split_seed": -1}, "split_seed is -1"),
        ({"path": "f", "test_fractoin": 0.1}, "did you mean 'test_fraction'"),
    ],
)
def test_impossible_parameters_are_refused(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        make_params(kind, values, "dataset")


# Setting test samples aside ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "fraction", "test"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (101, 0.5, 50)]
)
def test_every_sample_is_trained_or_tested_on_once_with_its_label(npz, samples, fraction, test):
    data = npz(numbered(samples), test_fraction=fraction)
    assert len(data.test_y) == test
    train, held_out = data.train_x[:, 0], data.test_x[:, 0]
    assert sorted([*train, *held_out]) == list(range(samples))
    assert np.array_equal(data.train_y, train % 3)
    assert np.array_equal(data.test_y, held_out % 3)


def test_the_split_seed_decides_which_samples_are_tested_on(npz):
    tested = [npz(numbered(50), split_seed=seed).test_x.tolist() for seed in (0, 0, 1)]
    assert tested[0] == tested[1] != tested[2]


def test_csv_and_npz_split_alike(npz, table):
    from_table = table("a,b,label\n" + "".join(f"{i},{i},{i % 3}\n" for i in range(30)))
    from_arrays = npz(numbered(30))
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert np.array_equal(getattr(from_table, name), getattr(from_arrays, name))


def test_one_sample_is_too_few_to_split(npz, table):
    with pytest.raises(ConfigError, match=r"own.npz: has 1 sample; expected"):
        npz(numbered(1))
    with pytest.raises(ConfigError, match=r"own.csv: has 1 sample; expected"):
        table("a,b,label\n1,2,3\n")


# Scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [7, 5000])
def test_features_are_scaled_by_the_training_part_alone(npz, samples):
    rng = np.random.default_rng(3)
    train = rng.normal([5, -1e6, 3e-3], [2, 1e3, 1e-6], (samples, 3)).astype(np.float32)
    test = rng.normal([5, -1e6, 3e-3], [2, 1e3, 1e-6], (4500, 3)).astype(np.float32)
    labels = {"train_y": np.zeros(samples, int), "test_y": np.zeros(4500, int)}
    data = npz({"train_x": train, "test_x": test, **labels}, scale=True)
    mean, deviation = train.mean(axis=0, dtype=float), train.std(axis=0, dtype=float)
    np.testing.assert_allclose(data.train_x, (train - mean) / deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.test_x, (test - mean) / deviation, rtol=1e-5, atol=1e-6)


def test_a_constant_feature_becomes_zero_and_is_not_blown_up(npz):
    arrays = {
        "train_x": np.full((9999, 2, 1), 0.1),
        "train_y": np.zeros(9999, int),
        "test_x": np.full((1, 2, 1), 3.1),
        "test_y": np.zeros(1, int),
    }
    data = npz(arrays, scale=True)
    assert not data.train_x.any()
    np.testing.assert_allclose(data.test_x, 3, rtol=1e-6)


def test_a_test_value_that_scaling_makes_infinite_is_refused(npz):
    arrays = {
        "train_x": np.array([[0], [1e-30]]),
        "train_y": np.zeros(2, int),
        "test_x": np.array([[1e30]]),
        "test_y": np.zeros(1, int),
    }
    with pytest.raises(ConfigError, match=r"own.npz: test_x\[0, 0\] is inf"):
        npz(arrays, scale=True)


def test_scaling_is_on_for_tables_and_off_for_arrays():
    assert Csv.Params("f").scale
    assert not Npz.Params("f").scale


# Npz -----------------------------------------------------------------------------------------


def test_a_given_test_part_is_kept(npz):
    train, test = numbered(4), numbered(3)
    arrays = {f"train_{k}": v for k, v in train.items()} | {f"test_{k}": v for k, v in test.items()}
    data = npz(arrays)
    assert np.array_equal(data.train_x, train["x"])
    assert np.array_equal(data.train_y, train["y"])
    assert np.array_equal(data.test_x, test["x"])
    assert np.array_equal(data.test_y, test["y"])


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, bool, np.float16])
def test_samples_may_have_any_shape_and_real_type(npz, dtype):
    data = npz({"x": np.ones((6, 2, 3, 4), dtype), "y": np.zeros(6, np.uint8)})
    assert data.inputs == (2, 3, 4)
    assert data.train_x.dtype == np.float32
    assert data.train_x.min() == data.train_x.max() == 1


@pytest.mark.parametrize(("train", "test"), [(6, 2), (2, 6)])
def test_the_highest_label_of_both_parts_decides_the_classes(npz, train, test):
    x = np.ones((1, 2))
    y, test_y = np.array([train]), np.array([test])
    assert npz({"train_x": x, "train_y": y, "test_x": x, "test_y": test_y}).classes == 7


def test_training_arrays_without_a_test_part_are_split(npz):
    data = npz({f"train_{name}": array for name, array in numbered(10).items()})
    assert (len(data.train_y), len(data.test_y)) == (8, 2)


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"no array 'x' \(it has: none\)"),
        ({"x": ONES}, r"no array 'y' \(it has: x\)"),
        ({"train_x": ONES, "y": np.zeros(3, int)}, "no array 'train_y'"),
        ({"train_x": ONES, "train_y": np.zeros(3, int), "test_x": ONES}, "no array 'test_y'"),
        ({"x": ONES, "y": np.zeros(3)}, "y is float64; expected whole numbers"),
        ({"x": ONES.astype(str), "y": np.zeros(3, int)}, "x is <U.*; expected numbers"),
        ({"x": ONES * 1j, "y": np.zeros(3, int)}, "x is complex128; expected numbers"),
        ({"x": ONES, "y": np.zeros(2, int)}, r"train_y has shape \(2,\); expected \(3,\)"),
        ({"x": np.array(1), "y": np.array(1)}, r"train_x has shape \(\)"),
        ({"x": ONES, "y": np.array([0, -1, 1])}, "train_y has labels -1 to 1"),
        ({"x": ONES * 1e300, "y": np.zeros(3, int)}, r"train_x\[0, 0\] is inf"),
        ({"x": np.empty((0, 2)), "y": np.empty(0, int)}, "train_x has no samples"),
        (
            {
                "train_x": ONES,
                "train_y": np.zeros(3, int),
                "test_x": ONES[:0],
                "test_y": np.zeros(0, int),
            },
            "test_x has no samples",
        ),
    ],
)
def test_arrays_that_are_no_data_are_refused(npz, arrays, message):
    with pytest.raises(ConfigError, match=f"own.npz: .*{message}"):
        npz(arrays)


def test_objects_are_never_unpickled(npz):
    with pytest.raises(ConfigError, match=r"own.npz: cannot be read as .npz of plain arrays"):
        npz({"x": np.array([[{}]]), "y": np.zeros(1, int)})


def damaged(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
        archive.writestr("y.npy", b"no array")


def corrupted(path):
    np.savez(path.with_suffix(".npz"), **numbered(50))
    content = bytearray(path.with_suffix(".npz").read_bytes())
    content[200] ^= 255  # inside the first array
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        damaged,
        corrupted,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY"),
    ],
)
def test_damaged_files_are_refused(tmp_path, write):
    path = tmp_path / "c0ffee"
    write(path)
    with pytest.raises(ConfigError, match=r"own.npz: "):
        Npz(Npz.Params("own.npz"), tmp_path).load({"own.npz": path})


# Csv -----------------------------------------------------------------------------------------


def whole(data):
    """Undo the split of a table whose first column counts the samples."""
    x, y = np.concatenate([data.train_x, data.test_x]), [*data.train_y, *data.test_y]
    order = x[:, 0].argsort()
    return x[order].tolist(), [int(y[i]) for i in order]


@pytest.mark.parametrize(
    ("header", "params"),
    [
        ("id,value,kind\n", {}),
        ("id,value,kind\n", {"label": "kind"}),
        ("id, value, kind\n", {"label": "kind"}),
        ("id,value,kind\n", {"label": 2}),
        ("0,1,2\n", {}),
        ("1,2,kind\n", {}),
        ("", {"header": False}),
        ("", {"header": False, "label": 2}),
        ("\n\nid,value,kind\n\n", {}),
        ("\ufeff", {"header": False}),
    ],
)
def test_the_label_column_can_be_named_or_counted(table, header, params):
    data = table(header + rows(4), **params)
    assert whole(data) == ([[i, i + 0.5] for i in range(4)], [0, 1, 2, 0])
    assert data.classes == 3


def test_the_label_column_may_stand_anywhere(table):
    data = table("a,kind,b\n1,7,3\n4,8,6\n", label="kind")
    assert whole(data) == ([[1, 3], [4, 6]], [0, 1])


def test_the_delimiter_quotes_and_line_ends_may_vary(table):
    data = table('a;b;kind\r\n"1";2.5;"x;y"\r\n\r\n-3e2; 4 ;z\r\n', delimiter=";")
    assert whole(data) == ([[-300, 4], [1, 2.5]], [1, 0])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "c", "a"], [1, 0, 2, 0]),
        (["10", "9", "9", "-1"], [2, 1, 1, 0]),
        (["1.0", "0.000e+00", "1", "0"], [1, 0, 1, 0]),
        (["10", "9", "x", "9"], [0, 1, 2, 1]),
        (["nan", "1", "nan", "2"], [2, 0, 2, 1]),
    ],
)
def test_distinct_labels_in_order_become_the_classes(table, labels, expected):
    data = table("n,kind\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    assert whole(data)[1] == expected
    assert data.classes == len(set(expected))


def test_scaling_is_applied_to_tables(table):
    data = table("a,b,kind\n" + rows(100), scale=True)
    np.testing.assert_allclose(data.train_x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.train_x.std(axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "params", "message"),
    [
        ("", {}, "has no lines with samples"),
        ("a,b\n", {}, "has no lines with samples"),
        ("a\n1\n", {}, "the first line has one column with delimiter ','"),
        ("a,b\n1,2\n\n1,2,3\n", {}, "line 4 has 3 columns; expected 2"),
        ("a,b\n1,2\n1\n", {}, "line 3 has 1 columns; expected 2"),
        ("a,b\nx,2\n", {}, "line 2, column 0 is 'x'; expected a finite float32 number"),
        ("k,b,c\n0,1,\n", {"label": 0}, "line 2, column 2 is ''"),
        ("b,k,c\n1,0,nan\n", {"label": 1}, "line 2, column 2 is 'nan'"),
        ("a,b\ninf,2\n", {}, "line 2, column 0 is 'inf'"),
        ("a,b\n1e39,2\n", {}, "line 2, column 0 is '1e39'"),
        ("a,b\n-1e39,2\n", {}, "line 2, column 0 is '-1e39'"),
        ("1,x\n", {"header": False}, "has 1 sample"),
        ("x,1\n", {"header": False}, "line 1, column 0 is 'x'"),
        ("a,b\n1, \n", {}, "line 2 has no label in column 1"),
        ("a,b\n1,2\n", {"label": 2}, "dataset.label is 2, but the first line has 2 columns"),
        ("a,b\n1,2\n", {"label": -3}, "dataset.label is -3"),
        ("a,kind\n1,2\n", {"label": "kimd"}, "names 0 columns .*did you mean 'kind'"),
        ("a,a\n1,2\n", {"label": "a"}, "names 2 columns of the first line"),
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n", {}, "has numbers, not names; set dataset.header"),
        (b"a,b\n\xff,2\n", {}, "cannot be read as CSV in UTF-8"),
        ('a,b\n"1"x,2\n', {}, "cannot be read as CSV in UTF-8"),
    ],
)
def test_tables_that_are_no_data_are_refused(table, text, params, message):
    with pytest.raises(ConfigError, match=f"own.csv: .*{message}"):
        table(text, **params)


def test_values_whose_sum_alone_is_too_large_are_taken(table):
    data = table("a,b,kind\n3e38,3e38,x\n1,2,x\n")
    assert max(data.train_x.max(), data.test_x.max()) == np.float32(3e38)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delimiter": ""}, "delimiter is ''"),
        ({"delimiter": ",,"}, "delimiter is ',,'"),
        ({"delimiter": "\n"}, "delimiter is"),
        ({"label": "kind", "header": False}, "label is 'kind'; without a header"),
        ({"label": 1.5}, "dataset.label is 1.5"),
    ],
)
def test_impossible_csv_parameters_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make_params(Csv, {"path": "f", **values}, "dataset")


def test_a_table_that_vanished_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"own.csv: cannot be read"):
        Csv(Csv.Params("own.csv"), tmp_path).load({"own.csv": tmp_path / "nowhere"})
