"""Trackers that need nothing else: tables and news as files; what all trackers have in common."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest

from aiosgd.errors import AiosgdError
from aiosgd.plugins.trackers import Csv, Job, Jsonl
from aiosgd.plugins.trackers.base import figures, flattened, news_figures, thinned
from aiosgd.plugins.trackers.single import SingleRecord


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


# As lines of JSON ---------------------------------------------------------------------------------

JOB = Job(
    id="20250102-030405-t-0123", options={"epochs": 1}, nodes={0: "a:1", -1: "b:2"}, began=9.0
)


def lines(folder):
    return [json.loads(line) for line in (folder / "job.jsonl").read_text().splitlines()]


def test_every_line_is_an_object_with_the_job(tmp_path):
    tracker = Jsonl(Jsonl.Params(), tmp_path)
    tracker.begin(JOB)
    tracker.progress({"node": 0, "step": 3, "loss": np.inf})
    assert lines(tmp_path)[1]["loss"] is None  # it is there at once
    tracker.evaluation({"node": 0, "accuracy": 0.5})
    records = rows(node=np.array([0, -1]), loss=np.array([0.1, np.nan]), name=np.array(["ü", "b"]))
    tracker.write("train", records)
    tracker.write("eval", records[:0])
    tracker.end({"state": "done", "metrics": {"loss": None}})
    assert {line["job_id"] for line in lines(tmp_path)} == {JOB.id}
    begin, progress, evaluation, first, second, end = lines(tmp_path)
    assert begin["nodes"] == {"0": "a:1", "-1": "b:2"}
    assert begin["options"] == {"epochs": 1}
    assert abs(begin["time"] - time.time()) < 60
    assert (progress["event"], evaluation["event"], end["event"]) == (
        "progress",
        "evaluation",
        "end",
    )
    del first["job_id"], second["job_id"]
    assert first == {"table": "train", "node": 0, "loss": 0.1, "name": "ü"}
    assert second == {"table": "train", "node": -1, "loss": None, "name": "b"}
    assert end["summary"] == {"state": "done", "metrics": {"loss": None}}


@pytest.mark.parametrize("earlier", ["", '{"a": 1}\n', '{"a": 1}\n{"torn": '])
def test_what_a_killed_submitter_wrote_is_kept(tmp_path, earlier):
    (tmp_path / "job.jsonl").write_text(earlier)
    Jsonl(Jsonl.Params(), tmp_path).begin(JOB)
    text = (tmp_path / "job.jsonl").read_text()
    assert text.startswith(earlier)
    assert json.loads(text.splitlines()[-1])["event"] == "begin"


def test_a_file_that_cannot_be_opened_is_reported(tmp_path):
    (tmp_path / "job.jsonl").mkdir()
    with pytest.raises(AiosgdError, match="cannot be written"):
        Jsonl(Jsonl.Params(), tmp_path).begin(JOB)


# What trackers have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25, 1000])
@pytest.mark.parametrize("points", [1, 3, 10])
def test_thinned_rows_are_few_and_evenly_spread_to_the_last(count, points):
    table = rows(step=np.arange(count))
    some = thinned(table, points)
    assert len(some) <= points
    assert len(some) >= min(count, points) / 2
    assert list(some.step[-1:]) == list(table.step[-1:])
    assert len(set(np.diff(some.step))) <= 1


def test_figures_leave_out_what_is_not_measured():
    table = rows(
        node=np.array([0, 0]),
        step=np.array([3, 4]),
        epoch=np.array([0, 1]),
        time_s=np.array([0.5, 1.5]),
        loss=np.array([2.0, np.inf]),
        samples=np.array([64, 64]),
    )
    assert list(figures("train", table)) == [
        (3, 0.5, {"train/loss": 2.0, "train/samples": 64}),
        (4, 1.5, {"train/samples": 64}),
    ]


def test_figures_of_epochs_have_no_time():
    table = rows(epoch=np.array([0, 1]), mean=np.array([0.5, 0.25]))
    expected = [(0, 0.0, {"consensus/mean": 0.5}), (1, 0.0, {"consensus/mean": 0.25})]
    assert list(figures("consensus", table)) == expected


def test_figures_of_news_are_named_as_those_of_rows():
    facts = {"node": 0, "step": 1, "steps": 9, "epoch": 0, "time_s": 1.0, "loss": 2.0, "x": np.nan}
    assert news_figures("train", facts) == {"train/loss": 2.0}


def test_tables_are_flattened():
    assert flattened({"a": 1, "b": {"c": [2], "d": {"e": None, "f": "x"}}, "g": {}}) == {
        "a": 1,
        "b.c": [2],
        "b.d.f": "x",
    }


# One record per job -------------------------------------------------------------------------------


class Record(SingleRecord):
    """Keeps what is recorded."""

    def record(self, table, points):
        self.points = [*getattr(self, "points", []), *points]


def test_a_single_record_has_all_of_worker_0_once():
    one = Record(Record.Params(), Path())
    one.begin(JOB)
    news = {"node": 0, "step": 1, "steps": 3, "epoch": 0, "time_s": 2.0, "loss": 0.5}
    one.progress(news)
    one.progress({**news, "node": 1, "loss": 9.0})
    one.evaluation({**news, "accuracy": 0.25})
    table = rows(
        node=np.array([0, 0, 0, 1]),
        step=np.array([0, 1, 2, 0]),
        time_s=np.array([1.0, 2.0, 3.0, 1.0]),
        loss=np.array([0.75, 0.5, 0.25, 9.0]),
        wait_s=np.array([0.1, 0.2, 0.3, 0.4]),
    )
    one.write("train", table)
    one.write("consensus", rows(epoch=np.array([0]), mean=np.array([0.0])))
    assert one.points == [
        (1, 11.0, {"train/loss": 0.5}),
        (1, 11.0, {"eval/loss": 0.5, "eval/accuracy": 0.25}),
        (0, 10.0, {"train/loss": 0.75, "train/wait_s": 0.1}),
        (1, 11.0, {"train/wait_s": 0.2}),
        (2, 12.0, {"train/loss": 0.25, "train/wait_s": 0.3}),
        (0, 9.0, {"consensus/mean": 0.0}),
    ]
