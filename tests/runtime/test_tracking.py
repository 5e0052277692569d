"""Trackers beside a job: told of everything, and never in its way."""

import asyncio
import json
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import aiosgd
from aiosgd.aio import Silent
from aiosgd.errors import ConfigError, PluginNotFoundError
from aiosgd.plugins.trackers import Tracker
from aiosgd.runtime import results, tracking
from aiosgd.runtime.config import make_job
from aiosgd.runtime.coordinator import Request, load_job, run_job
from aiosgd.runtime.results import CONSENSUS, EVAL, TRAIN, Rows, Summary
from aiosgd.runtime.session import Evaluation, Progress
from aiosgd.runtime.tracking import Tracking, check_trackers

JOB_ID = "20250102-030405-test-0123"
DEADLINE = 30.0


def progress(step):
    return Progress(0, step, 10, 0, 0.5, 0.75, 100.0, 200.0, 0.25)


class Spy(Tracker):
    """Notes what it is told; `told` is shared by all instances of a test."""

    told = ()

    def begin(self, job):
        self.told.append(("begin", job))

    def progress(self, facts):
        self.told.append(("progress", facts))

    def evaluation(self, facts):
        self.told.append(("evaluation", facts))

    def write(self, table, rows):
        self.told.append((table, rows))

    def end(self, summary):
        self.told.append(("end", summary))


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(Spy, "told", [])
    return install(monkeypatch, spy=Spy)


def install(monkeypatch, **trackers):
    real = tracking.TRACKERS.load
    monkeypatch.setattr(tracking.TRACKERS, "load", lambda name: trackers.get(name) or real(name))
    return trackers


@pytest.fixture
def outcome():
    train, evaluations, consensus = Rows(TRAIN), Rows(EVAL), Rows(CONSENSUS)
    train.append(0, 0, 0, 0.5, 1.0, 0.1, 64, 0.1, 0.2, 10, 20, np.nan)
    return SimpleNamespace(
        train=train.array(),
        eval=evaluations.array(),
        consensus=consensus.array(),
        summary=Summary(job_id=JOB_ID, state="done", wall_s=float("nan")),
        tracker_errors={},
    )


@pytest.fixture
def begun(tmp_path):
    """`begun(tracker)`: trackers of a job that trains; `.lines`: what was told of them."""

    def begin(names, **options):
        lines = []
        job = make_job({"tracker": names, **options})
        one = Tracking(job, tmp_path, logging.getLogger("test"), lines.append)
        one.begin(JOB_ID, {0: "a:1", -1: "b:2"}, began=1000.0)
        one.lines = lines
        return one

    return begin


# In order -----------------------------------------------------------------------------------------


def test_a_tracker_is_told_of_everything_in_order(spy, begun, outcome):
    one = begun("spy,csv")
    one.begin(JOB_ID, {})  # after a checkpoint the job enters the phase again
    one.progressed(progress(1))
    one.evaluated(Evaluation(0, 0, 3, 0.5, 0.75))
    one.end(outcome)
    names = [name for name, _ in Spy.told]
    assert names == ["begin", "progress", "evaluation", "train", "eval", "consensus", "end"]
    told = dict(Spy.told)
    assert (told["begin"].id, told["begin"].began) == (JOB_ID, 1000.0)
    assert told["begin"].nodes == {0: "a:1", -1: "b:2"}
    assert told["begin"].options["tracker"] == ["spy", "csv"]
    assert (told["progress"]["step"], told["evaluation"]["step"]) == (0, 3)  # as in the tables
    assert told["progress"]["time_s"] > 0
    assert told["end"]["wall_s"] is None
    assert (one.lines, outcome.tracker_errors) == ([], {})


def test_before_a_job_trains_nobody_is_told(spy, tmp_path, outcome):
    one = Tracking(make_job({"tracker": "spy"}), tmp_path, logging.getLogger("test"))
    one.progressed(progress(1))
    one.end(outcome)
    assert Spy.told == []


# What goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["begin", "progress", "evaluation", "write", "end"])
@pytest.mark.parametrize("error", [RuntimeError("no net"), ConfigError("no net"), SystemExit(1)])
def test_one_that_fails_is_told_no_more_and_the_others_go_on(
    monkeypatch, begun, outcome, method, error, spy, caplog
):
    class Faulty(Spy):
        calls = ()

    def fail(self, *_):
        Faulty.calls += (method,)
        raise error

    setattr(Faulty, method, fail)
    install(monkeypatch, faulty=Faulty, spy=Spy)
    one = begun("faulty,spy")
    one.progressed(progress(1))
    one.evaluated(Evaluation(0, 0, 3, 0.5, 0.75))
    one.end(outcome)
    assert Faulty.calls == (method,)
    assert [name for name, _ in Spy.told].count("end") == 1
    (line,) = one.lines
    assert line.startswith("tracker 'faulty' failed and records no more: ")
    assert line.endswith("; the job is not affected")
    assert line in caplog.text
    assert outcome.tracker_errors.keys() == {"faulty"}


class Hanging(Spy):
    """Hangs in a call until the test lets it go."""

    method = "end"
    entered = threading.Event()
    free = threading.Event()

    def __getattribute__(self, name):
        if name == type(self).method:
            self.entered.set()
            assert self.free.wait(DEADLINE)
        return super().__getattribute__(name)


@pytest.fixture
def hanging(monkeypatch, spy):
    monkeypatch.setattr(Hanging, "entered", threading.Event())
    monkeypatch.setattr(Hanging, "free", threading.Event())
    install(monkeypatch, hanging=Hanging, spy=Spy)
    yield Hanging
    Hanging.free.set()
    for thread in threading.enumerate():
        if thread.name == "hanging":
            thread.join(DEADLINE)


def test_one_that_hangs_is_left_behind(monkeypatch, hanging, begun, outcome):
    monkeypatch.setattr(tracking, "LOOK", 0.01)
    monkeypatch.setattr(tracking, "SAID_AFTER", 0.0)
    one = begun("hanging,spy")
    one.end(outcome, patience=0.3)
    first, second = one.lines
    assert first == "waiting for tracker 'hanging'; the results are written"
    assert second.startswith("tracker 'hanging' is still busy after 0.3 s and is left behind")
    assert outcome.tracker_errors.keys() == {"hanging"}
    assert "end" in dict(Spy.told)  # the other one is whole


def test_what_is_left_behind_says_nothing_later(monkeypatch, hanging, begun, outcome):
    monkeypatch.setattr(Hanging, "end", lambda *_: 1 / 0)
    one = begun("hanging")
    one.end(outcome, patience=0.05)
    count = len(one.lines)
    Hanging.free.set()
    one._tracks[0].join(DEADLINE)
    assert not one._tracks[0].is_alive()
    assert len(one.lines) == count


def test_whoever_is_in_a_hurry_does_not_wait(hanging, begun, outcome):
    one = begun("hanging")
    ending = threading.Thread(target=one.end, args=(outcome, 1e9))
    ending.start()
    assert hanging.entered.wait(DEADLINE)
    one.hurry()
    ending.join(DEADLINE)
    assert not ending.is_alive()
    assert outcome.tracker_errors == {"hanging": "was not waited for"}


async def test_a_cancellation_ends_the_waiting(hanging, begun, outcome):
    one = begun("hanging")
    waiting = asyncio.ensure_future(one.ended(outcome, 1000.0))
    assert await asyncio.to_thread(hanging.entered.wait, DEADLINE)
    waiting.cancel()
    async with asyncio.timeout(20):
        assert await waiting
    assert outcome.tracker_errors == {"hanging": "was not waited for"}


def test_threads_of_a_job_that_went_wrong_end(spy, begun):
    one = begun(["spy"])
    one.abandon()
    for track in one._tracks:
        track.join(20)
        assert not track.is_alive()
    assert one.lines == []


def test_one_that_is_slow_misses_news_and_nothing_else(
    monkeypatch, hanging, begun, outcome, caplog
):
    monkeypatch.setattr(Hanging, "method", "begin")
    monkeypatch.setattr(tracking, "WAITING", 3)
    caplog.set_level(logging.INFO)
    one = begun("hanging")
    assert hanging.entered.wait(DEADLINE)
    for step in range(10):
        one.progressed(progress(step + 1))
    Hanging.free.set()
    one.end(outcome)
    names = [name for name, _ in Spy.told]
    assert names == ["begin", *["progress"] * 3, "train", "eval", "consensus", "end"]
    assert "tracker 'hanging' was too slow for 7 news" in caplog.text
    assert one.lines == []


async def test_a_job_that_is_interrupted_while_a_tracker_is_busy_is_written(
    hanging, tmp_path, running
):
    async with running() as (_, address):
        job = make_job({"output": str(tmp_path), "max_steps": 2, "tracker": "hanging"})
        asked = Request(job=job, workers=[address], data_dir=tmp_path / "data")
        working = asyncio.ensure_future(run_job(asked, Silent()))
        assert await asyncio.to_thread(hanging.entered.wait, DEADLINE)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
    (folder,) = tmp_path.glob("2*")
    assert results.read_summary(folder).state == "done"
    assert "tracker 'hanging' was not waited for" in (folder / "submit.log").read_text()


# Before a job -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tracker": "jsnol"}, PluginNotFoundError, r"'jsnol' \(did you mean 'jsonl'\?\)"),
        (
            {"tracker": "jsonl", "tracker_params": {"jsonl": {"x": 1}}},
            ConfigError,
            r"^tracker.jsonl.x: Jsonl has no such parameter",
        ),
        (
            {"tracker": "jsonl", "tracker_params": {"json": {"x": 1}}},
            ConfigError,
            r"^tracker.json: the job has no such tracker \(did you mean 'jsonl'\?\); --tracker json",
        ),
        (
            {"tracker": "tensorboard", "tracker_params": {"tensorboard": {"points": 0}}},
            ConfigError,
            r"^tracker.tensorboard: points is 0; expected 1 or more",
        ),
        (
            {"tracker": "mlflow", "tracker_params": {"mlflow": {"experiment": " "}}},
            ConfigError,
            r"^tracker.mlflow: experiment is empty",
        ),
    ],
)
def test_what_is_wrong_is_said_before_any_node_is_spoken_to(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        load_job(make_job(options), 1, tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_extra_is_said_before_any_node_is_spoken_to(monkeypatch, name):
    for module in (name, "tensorboard.summary.writer.record_writer"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"tracker {name} needs .*: pip install 'aiosgd\[{name}\]'"
    ):
        check_trackers(make_job({"tracker": name}))


# With jobs ----------------------------------------------------------------------------------------


def lines_of(folder):
    return [json.loads(line) for line in (folder / "job.jsonl").read_text().splitlines()]


def test_a_simulated_job_is_tracked(tmp_path):
    outcome = aiosgd.simulate(workers=2, max_steps=3, tracker="jsonl", output=tmp_path)
    lines = lines_of(outcome.folder)
    assert (lines[0]["event"], lines[0]["simulated"]) == ("begin", True)
    rows = [line for line in lines if line.get("table") == "train"]
    assert [row["loss"] for row in rows] == outcome.train.loss.tolist()
    assert lines[-1]["summary"]["metrics"] == outcome.metrics
    assert results.read_job(outcome.folder).tracker == ("jsonl",)


def test_a_tracker_that_fails_is_a_line_and_the_job_is_done(tmp_path, monkeypatch):
    class Faulty(Spy):
        def write(self, table, rows):
            raise RuntimeError("disk of another world")

    class Watch(Silent):
        lines = ()

        def noted(self, text):
            self.lines += (text,)

    monkeypatch.setattr(Spy, "told", [])
    install(monkeypatch, faulty=Faulty)
    watch = Watch()
    outcome = aiosgd.simulate(
        workers=1, max_steps=2, tracker="faulty", output=tmp_path, observer=watch
    )
    assert outcome.summary.state == "done"
    (line,) = [line for line in watch.lines if "tracker 'faulty' failed" in line]
    assert line in (outcome.folder / "submit.log").read_text()
    assert "another world" in outcome.tracker_errors["faulty"]
    names = {path.name for path in outcome.folder.iterdir()}
    assert names >= {"train.csv", "eval.csv", "consensus.csv", "model.safetensors", "summary.json"}
