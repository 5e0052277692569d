"""Trackers: tables as files."""

import csv

import numpy as np
import pytest

from aiosgd.errors import AiosgdError
from aiosgd.plugins.trackers import Csv


def rows(**columns):
    return np.rec.fromarrays(list(columns.values()), names=list(columns))


def write(folder, table, records):
    Csv(Csv.Params(), folder).write(table, records)
    return (folder / f"{table}.csv").read_text(encoding="utf-8")


def test_a_table_is_a_header_and_a_line_per_row(tmp_path):
    records = rows(node=np.array([0, -1]), loss=np.array([0.5, 2.0]), staleness=np.array([0, 3]))
    assert write(tmp_path, "train", records) == "node,loss,staleness\n0,0.5,0\n-1,2.0,3\n"


def test_an_empty_table_has_a_header_alone(tmp_path):
    assert write(tmp_path, "eval", rows(node=np.empty(0, int), loss=np.empty(0))) == "node,loss\n"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_floats_read_back_as_the_same_value(tmp_path, dtype, seed):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(500) * 10.0 ** rng.uniform(-4, 4, 500)).astype(dtype)
    extremes = [
        0.0,
        -0.0,
        0.1,
        1e22,
        np.inf,
        np.finfo(dtype).max,
        np.finfo(dtype).smallest_subnormal,
    ]
    with np.errstate(over="ignore"):
        values = np.concatenate([values, np.array(extremes, dtype)])
    lines = write(tmp_path, "train", rows(x=values)).splitlines()[1:]
    np.testing.assert_array_equal(np.array(lines).astype(dtype), values, strict=True)
    assert np.array_equal(np.signbit(np.array(lines).astype(dtype)), np.signbit(values))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (np.float64(1 / 3), "0.3333333333333333"),
        (np.float32(1 / 3), "0.33333334"),
        (np.int64(2**62 + 1), str(2**62 + 1)),
        (np.uint64(2**64 - 1), str(2**64 - 1)),
        (np.int8(-5), "-5"),
        (np.float64(3), "3.0"),
    ],
)
def test_numbers_have_no_more_digits_than_they_need(tmp_path, value, text):
    assert write(tmp_path, "train", rows(x=np.array([value]))) == f"x\n{text}\n"


def test_nan_is_an_empty_cell(tmp_path):
    records = rows(a=np.array([1, 2]), b=np.array([np.nan, 1.5]), c=np.array([3, 4]))
    assert write(tmp_path, "train", records) == "a,b,c\n1,,3\n2,1.5,4\n"


def test_a_row_of_one_empty_cell_is_still_a_row(tmp_path):
    text = write(tmp_path, "train", rows(b=np.array([np.nan, 1.0])))
    assert list(csv.reader(text.splitlines())) == [["b"], [""], ["1.0"]]


def test_texts_with_commas_and_quotes_survive(tmp_path):
    texts = ["a,b", 'say "x"', "ü"]
    text = write(tmp_path, "train", rows(name=np.array(texts)))
    assert [row["name"] for row in csv.DictReader(text.splitlines())] == texts


def test_a_missing_folder_is_made_and_tables_stand_beside_each_other(tmp_path):
    folder = tmp_path / "runs" / "job"
    tracker = Csv(Csv.Params(), folder)
    for table in ("train", "eval"):
        tracker.write(table, rows(x=np.arange(2)))
    assert {path.name for path in folder.iterdir()} == {"train.csv", "eval.csv"}


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "train.csv").write_text("precious")
    with pytest.raises(AiosgdError, match=r"train.csv: cannot be written \(FileExistsError"):
        write(tmp_path, "train", rows(x=np.arange(2)))
    assert (tmp_path / "train.csv").read_text() == "precious"


@pytest.mark.parametrize("table", ["../train", "", "a/b", ".hidden"])
def test_a_table_name_cannot_leave_the_folder(tmp_path, table):
    with pytest.raises(AiosgdError, match="cannot name a file"):
        write(tmp_path, table, rows(x=np.arange(2)))
    assert list(tmp_path.iterdir()) == []


def test_rows_without_names_are_refused(tmp_path):
    with pytest.raises(AiosgdError, match="'train' has float64 rows; expected named columns"):
        write(tmp_path, "train", np.ones(3))


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AiosgdError, match="cannot be written"):
        write(tmp_path / "file", "train", rows(x=np.arange(2)))
