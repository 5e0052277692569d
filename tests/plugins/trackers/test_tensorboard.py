"""Event files, read back with what TensorBoard itself reads them with."""

import numpy as np
import pytest

import aiosgd
from aiosgd.errors import AiosgdError
from aiosgd.plugins.trackers import Job

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
from aiosgd.plugins.trackers.tensorboard import TensorBoard, TensorBoardParams, rates  # noqa: E402

pytestmark = pytest.mark.extra

EVERYTHING = {"scalars": 0, "tensors": 0}
JOB = Job(
    id="20250102-030405-t-0123", options={"epochs": 1, "a": {"b": "x|y"}}, nodes={}, began=9e8
)
NEWS = {"node": 0, "step": 7, "steps": 10, "epoch": 0, "time_s": 2.5, "loss": 0.5, "accuracy": 0.25}
SUMMARY = {"wall_s": 1.0, "state": "done"}


def read(folder, run):
    one = accumulator.EventAccumulator(str(folder / "tensorboard" / run), EVERYTHING)
    return one.Reload()


def curve(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


def text(events, tag):
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_a_job_reads_back_as_its_tables(tmp_path):
    outcome = aiosgd.simulate(
        workers=3,
        epochs=2,
        tracker="tensorboard",
        tracker_params={"tensorboard": {"workers": 2}},
        output=tmp_path,
    )
    folder = outcome.folder
    runs = sorted(path.name for path in (folder / "tensorboard").iterdir())
    assert runs == ["job", "worker-0", "worker-1"]
    for node in (0, 1):
        events, own = read(folder, f"worker-{node}"), outcome.train[outcome.train.node == node]
        for column in ("loss", "accuracy", "compute_s", "wait_s", "bytes_sent", "staleness"):
            steps, values = zip(*curve(events, f"train/{column}"), strict=True)
            assert np.array_equal(steps, own.step)
            assert np.array_equal(np.float32(values), own[column].astype("f4"))
        times = np.array([e.wall_time for e in events.Scalars("train/loss")])
        assert np.allclose(np.diff(times), np.diff(own.time_s), atol=1e-5)  # of virtual time
        own = outcome.eval[outcome.eval.node == node]
        expected = list(zip(own.step, own.accuracy.astype("f4"), strict=True))
        assert curve(events, "eval/accuracy") == expected
        assert events.Scalars("train/samples_per_s")[0].value > 0
    job = read(folder, "job")
    assert [step for step, _ in curve(job, "consensus/mean")] == [0, 1]
    assert "| dataset | `digits` |" in text(job, "options")
    assert "| state | `done` |" in text(job, "summary")


def test_points_are_there_at_once_and_make_place_for_all_rows(tmp_path):
    tracker = TensorBoard(TensorBoardParams(), tmp_path)
    tracker.begin(JOB)
    tracker.progress(NEWS)
    tracker.progress({**NEWS, "node": 99})
    tracker.evaluation({**NEWS, "accuracy": 0.75})
    watching, job = read(tmp_path, "worker-0"), read(tmp_path, "job")
    assert curve(watching, "train/loss") == [(7, 0.5)]
    assert watching.Scalars("train/loss")[0].wall_time == 9e8 + 2.5
    assert curve(watching, "eval/accuracy") == [(7, 0.75)]
    assert "| a.b | `x/y` |" in text(job, "options")
    rows = np.rec.fromarrays(
        [np.zeros(9, int), np.arange(9), np.arange(9.0), np.linspace(1, 0.5, 9)],
        names=["node", "step", "time_s", "loss"],
    )
    tracker.write("train", rows)
    tracker.write("eval", rows[:0])
    tracker.end(SUMMARY)
    watching.Reload()  # of one who watches, and of one who comes later
    for events in (watching, read(tmp_path, "worker-0")):
        assert curve(events, "train/loss") == [(i, np.float32(rows.loss[i])) for i in range(9)]


def test_what_a_killed_submitter_left_makes_place_when_the_job_is_fetched(tmp_path):
    killed = TensorBoard(TensorBoardParams(), tmp_path)
    killed.begin(JOB)
    killed.progress(NEWS)
    for file in killed._live.values():
        file.close()
    rows = np.rec.fromarrays(
        [np.zeros(1, int), np.zeros(1, int), np.ones(1)], names="node,step,loss"
    )
    again = TensorBoard(TensorBoardParams(), tmp_path)
    again.begin(JOB)
    again.write("train", rows)
    again.end(SUMMARY)
    assert curve(read(tmp_path, "worker-0"), "train/loss") == [(0, 1.0)]


def test_rates_are_those_between_the_points_that_are_shown():
    names = ["step", "time_s", "samples", "bytes_sent", "bytes_received", "wait_s"]
    columns = [[0, 1, 2], [1.0, 1.0, 3.0], [10, 20, 30], [1, 1, 1], [2, 2, 2], [0.5, 0.0, 1.0]]
    rows = np.rec.fromarrays([np.array(c) for c in columns], names=names)
    all_points = {step: values["train/samples_per_s"] for step, _, values in rates(rows, rows)}
    assert all_points == {0: 10.0, 2: 15.0}  # none where no time has passed
    ((step, time_s, values),) = rates(rows, rows[2:])
    assert (step, time_s) == (2, 3.0)
    assert values == {"train/samples_per_s": 20.0, "train/bytes_per_s": 3.0, "train/waited": 0.5}


def test_many_rows_are_thinned(tmp_path):
    tracker = TensorBoard(TensorBoardParams(points=10), tmp_path)
    tracker.begin(JOB)
    rows = np.rec.fromarrays(
        [np.zeros(95, int), np.arange(95), np.ones(95)], names="node,step,loss"
    )
    tracker.write("train", rows)
    tracker.end(SUMMARY)
    steps = [step for step, _ in curve(read(tmp_path, "worker-0"), "train/loss")]
    assert steps == list(range(4, 95, 10))


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(AiosgdError, match=r"tfevents.* cannot be written"):
        TensorBoard(TensorBoardParams(), tmp_path).begin(JOB)
