"""What is known of a cluster: put together from what its nodes tell, in whatever order it comes."""

import math

import numpy as np
import pytest

from aiosgd import __version__
from aiosgd.dashboard import live
from aiosgd.dashboard.live import Live, Trace
from aiosgd.runtime.archive import Entry
from aiosgd.runtime.config import Address, JobConfig
from aiosgd.runtime.harvest import Collected, Figures
from aiosgd.runtime.learner import SKETCH
from aiosgd.runtime.results import EVAL, TRAIN, Rows
from aiosgd.runtime.survey import Fate, Seen
from aiosgd.runtime.visit import Status

OLD, NEW = "20260102-030405-old-00ff", "20260102-030406-new-00fe"
PLACES = {f"workers[{i}]": Address("127.0.0.1", 9000 + i) for i in range(2)}
RUNS = Fate(job_id=NEW, state="running")


def status(job_id="", node=None, **more):
    seat = "running" if job_id else "free"
    return Status(version=__version__, job_id=job_id, seat=seat, leader="nobody", node=node, **more)


def seen(number, job_id="", *entries, error="", **more):
    own = None if error else status(job_id, number if job_id else None, **more)
    place = f"workers[{number}]"
    return Seen(place=place, address=PLACES[place], error=error, status=own, history=entries)


def entry(job_id, node, state="done", reason=""):
    return Entry(job_id=job_id, node=node, state=state, reason=reason, began=10.0, ended=13.0)


def piece(node, first, last, *, epochs=(), log=b"", sent=0):
    """Return the rows of a node's steps, and of the epochs that it has ended."""
    train, tests = Rows(TRAIN), Rows(EVAL)
    for step in range(first, last):
        train.append(node, step, step // 2, 0.5 * (step + 1), 1.0, 0.5, 8, 0.1, 0.2, 100, 90, 1.0)
    for epoch in epochs:
        tests.append(node, epoch, 2 * epoch + 1, epoch + 1.0, 2.0 - epoch, 0.25 * (epoch + 1))
    figures = Figures(
        samples=8 * last,
        train_s=0.5 * last,
        late=0,
        bytes_sent=sent or 100 * last,
        bytes_received=90 * last,
    )
    sketches = np.full((len(epochs), SKETCH), float(node))
    return Collected(train, tests, log, None, sketches, figures, None, {})


@pytest.fixture
def trace():
    made = Trace(NEW)
    made.job = JobConfig(workers=2, mode="async")
    made.facts = {"nodes": {"0": "127.0.0.1:9000", "1": "127.0.0.1:9001"}}
    return made


# A cluster --------------------------------------------------------------------------------------


def test_nothing_is_known_before_all_have_been_asked():
    known = Live(PLACES)
    known.saw(0.0, seen(0))
    assert not known.moment().all_asked
    known.saw(0.0, seen(1, error="cannot be reached"))
    now = known.moment()
    assert now.all_asked
    assert now.answers
    assert (now.fate, now.run) == (None, None)


def test_the_job_that_runs_is_shown_and_before_and_after_it_the_newest():
    known = Live(PLACES)
    known.saw(0.0, seen(0, "", entry(OLD, 0)))
    assert known.fate.job_id == OLD
    known.saw(1.0, seen(0, NEW, entry(NEW, 0, "running"), entry(OLD, 0)))
    assert (known.fate.job_id, known.fate.state) == (NEW, "running")
    known.saw(2.0, seen(0, "", entry(NEW, 0, "failed", "worker 1 lost"), entry(OLD, 0)))
    assert (known.fate.state, known.fate.reason) == ("failed", "worker 1 lost")


def test_a_node_that_is_silent_is_remembered_with_what_it_did():
    known = Live(PLACES)
    known.saw(0.0, seen(0, "", entry(OLD, 0)))
    known.saw(1.0, seen(1))
    known.saw(2.0, seen(0, error="gone"))
    known.saw(2.0, seen(1, error="gone, too"))
    now = known.moment()
    assert not now.answers
    assert now.fate.job_id == OLD
    assert [one.error for one in now.seen] == ["gone", "gone, too"]


def test_only_what_is_new_is_a_new_version():
    known = Live(PLACES)
    versions = [known.version]
    for one in (seen(0), seen(0), seen(0, NEW), seen(0, NEW), seen(0, error="x"), seen(0)):
        known.saw(0.0, one)
        versions.append(known.version)
    assert np.diff(versions).tolist() == [1, 0, 1, 0, 1, 1]


def test_nodes_are_asked_for_what_is_left_once_no_job_has_run_for_a_while():
    known = Live(PLACES)
    known.saw(0.0, seen(0))
    assert not known.is_settled(0.0)
    assert known.is_settled(live.SETTLED)
    known.saw(4.0, seen(1, NEW))
    assert not known.is_settled(100.0)
    known.saw(5.0, seen(1))
    assert [known.is_settled(5.0 + s) for s in (0.0, live.SETTLED)] == [False, True]


def test_what_there_was_of_another_job_is_forgotten():
    known = Live(PLACES)
    old = known.trace(OLD)
    assert known.trace(OLD) is old
    known.trace(NEW)
    assert known.trace(OLD) is not old


# A job ------------------------------------------------------------------------------------------


def test_before_a_node_has_told_what_a_job_is_there_is_nothing_to_draw():
    made = Trace(NEW)
    made.left(0, 1.0).add(piece(0, 0, 3), {})
    assert made.run(RUNS) is None


def test_a_job_that_nobody_has_told_anything_of_has_empty_tables(trace):
    run = trace.run(RUNS)
    assert (len(run.train), len(run.eval), len(run.consensus)) == (0, 0, 0)
    assert (run.summary.steps, run.summary.nodes, run.links) == (0, 2, {})
    assert math.isnan(run.summary.samples_per_s)


def test_rows_go_on_where_they_ended(trace):
    left = trace.left(0, 1.0)
    left.add(piece(0, 0, 3, epochs=[0]), {})
    assert left.place == (3, 1)
    trace.left(0, 1.0).add(piece(0, 3, 5, epochs=[1]), {})
    trace.left(1, 1.0).add(piece(1, 0, 4, epochs=[0]), {})
    run = trace.run(RUNS)
    assert run.train.step[run.train.node == 0].tolist() == [0, 1, 2, 3, 4]
    assert run.train.step[run.train.node == 1].tolist() == [0, 1, 2, 3]
    summary = run.summary
    assert (summary.state, summary.steps, summary.epochs) == ("running", 5, 3)
    assert (summary.samples, summary.train_s, summary.bytes_sent) == (72, 2.5, 900)
    assert summary.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert summary.per_node[1]["accuracy"] == 0.25
    assert (summary.staleness_mean, summary.staleness_max) == (1.0, 1.0)
    assert run.consensus["mean"][0] == pytest.approx(0.5 * SKETCH**0.5)


def test_of_both_ends_counts_the_senders_is_taken_and_of_a_lost_one_the_other(trace):
    trace.left(0, 1.0).add(piece(0, 0, 1), {(0, 1): (5, 500), (1, 0): (4, 400)})
    trace.left(1, 1.0).add(piece(1, 0, 1), {(1, 0): (6, 600), (1, -1): (1, 10), (-1, 1): (2, 20)})
    links = trace.run(RUNS).links
    assert links == {(0, 1): (5, 500), (1, 0): (6, 600), (1, -1): (1, 10), (-1, 1): (2, 20)}
    trace.left(0, 1.0).add(piece(0, 1, 2), {})  # its peer is gone: what is known of it stays
    assert trace.run(RUNS).links == links


def test_a_worker_that_was_back_begins_anew_and_keeps_what_it_did(trace):
    trace.left(0, 1.0).add(piece(0, 0, 3), {})
    again = trace.left(0, 9.0)
    assert again.place == (0, 0)
    again.add(piece(0, 5, 7, sent=50), {})
    run = trace.run(RUNS)
    assert run.train.step.tolist() == [0, 1, 2, 5, 6]
    assert run.summary.bytes_sent == 50  # its newest figures


LINE = (
    "2026-01-02 03:04:05,678 INFO link to worker 1 over tcp: sent 7 messages, 700 bytes; received "
    "8, 800 bytes; longest queue 9 bytes; round trip 0.1 ms\n"
)


def test_at_the_end_what_a_node_has_kept_takes_the_place_of_what_it_told(trace):
    trace.left(0, 1.0).add(piece(0, 0, 3), {(0, 1): (1, 100), (0, -1): (2, 200)})
    assert not trace.is_whole(0)
    trace.end(0, piece(0, 0, 6, epochs=[0, 1, 2], log=LINE.encode()))
    assert trace.is_whole(0)
    run = trace.run(Fate(job_id=NEW, state="failed", reason="worker 0: no", took=3.0))
    assert run.train.step.tolist() == list(range(6))
    assert run.links == {(0, 1): (7, 700), (1, 0): (8, 800), (0, -1): (2, 200)}
    assert (run.summary.error, run.summary.wall_s) == ("worker 0: no", 3.0)
    assert "link to worker 1" in run.logs[0]
    assert trace.run(RUNS).logs == {}


def test_a_copy_without_rows_leaves_those_that_were_told(trace):
    trace.left(0, 1.0).add(piece(0, 0, 3), {})
    trace.end(0, piece(0, 0, 0, log=b"it was killed"))
    run = trace.run(Fate(job_id=NEW, state="lost"))
    assert run.train.step.tolist() == [0, 1, 2]
    assert run.logs == {0: "it was killed"}


def test_a_job_that_was_over_before_anyone_looked_is_what_the_nodes_have_kept(trace):
    trace.end(1, piece(1, 0, 4, log=b"left: the job is done"))
    run = trace.run(Fate(job_id=NEW, state="done"))
    assert run.train.node.tolist() == [1] * 4
    assert run.logs == {}
