"""What is shown of a running job."""

import io
import math

import pytest
from rich.console import Console

from aiosgd.display import LINE_INTERVAL, SPARKS, Curve, Display, size, span
from aiosgd.runtime.job import Phase
from aiosgd.runtime.session import Evaluation, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def progress(node=0, step=5, **changes):
    facts = {
        "node": node,
        "step": step,
        "steps": 1320,
        "epoch": 0,
        "loss": 1.5,
        "accuracy": 0.25,
        "samples_per_s": 12345.6,
        "bytes_per_s": 2e6,
        "waited": 0.25,
    }
    return Progress(**{**facts, **changes})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain(clock):
    """A display that is no terminal."""
    return Display("starting", Console(file=io.StringIO(), width=200), clock)


def lines(display):
    return display._console.file.getvalue().splitlines()


def drawn(display, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(display.picture())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def terminal(clock, width=120):
    return Display("starting", Console(file=io.StringIO(), width=width, force_terminal=True), clock)


# Lines ----------------------------------------------------------------------------------------


def test_phases_that_matter_are_lines_of_their_own(plain):
    with plain:
        for phase in (Phase.VOTING, Phase.PREPARING, Phase.RUNNING, Phase.FINISHING, Phase.DONE):
            plain.entered(phase, "j1")
    assert lines(plain) == ["job j1: running", "job j1: done"]


@pytest.mark.parametrize("end", [Phase.DONE, Phase.FAILED, Phase.CANCELLED])
def test_every_end_is_said(plain, end):
    plain.entered(end, "j1")
    assert lines(plain) == [f"job j1: {end}"]


def test_progress_is_a_line_of_the_whole_job_now_and_then(plain, clock):
    plain.attended([0, 1], 2)
    for _ in range(5):
        plain.progressed(progress())
    assert lines(plain) == [
        (
            "epoch 1, step 5/1320: loss 1.5000, accuracy 0.2500, 12,346 samples/s, 2.0 MB/s, "
            "2 of 2 workers"
        )
    ]
    clock.now += LINE_INTERVAL
    plain.evaluated(Evaluation(0, 2, 30, 0.5, 0.75))
    plain.evaluated(Evaluation(1, 2, 30, 0.5, 0.25))
    plain.progressed(progress(1, step=4, loss=0.5))
    assert lines(plain)[1:] == [
        (
            "epoch 1, step 4/1320: loss 1.0000, accuracy 0.2500, test accuracy 0.5000, "
            "24,691 samples/s, 4.0 MB/s, 2 of 2 workers"
        )
    ]


def test_a_lost_worker_counts_no_more(plain, clock):
    plain.attended([0, 1, 2], 3)
    plain.progressed(progress(0, step=700))
    plain.progressed(progress(1, step=7))
    plain.attended([0, 2], 3)
    clock.now += LINE_INTERVAL
    plain.progressed(progress(2, step=600))
    assert lines(plain)[-1].startswith("epoch 1, step 600/1320: ")
    assert lines(plain)[-1].endswith(", 2 of 3 workers")


def test_a_job_whose_only_worker_that_reported_is_lost_is_still_shown(clock):
    display = terminal(clock)
    display.entered(Phase.RUNNING, "j1")
    display.progressed(progress(0))
    clock.now += 10
    display.attended([1], 2)
    assert drawn(display, 80) == ["job j1: running (10 s)"]


def test_another_attempt_at_a_job_begins_anew(plain, clock):
    plain.progressed(progress(0, step=1000))
    plain.entered(Phase.PREPARING, "j2")
    clock.now += 10
    plain.progressed(progress(1, step=10))
    assert lines(plain)[-1].startswith("epoch 1, step 10/1320: ")
    clock.now += 10
    plain.progressed(progress(1, step=670))
    assert lines(plain)[-1].endswith(", 9.8 s left")


def test_the_time_that_is_left_follows_the_slowest_worker(plain, clock):
    plain.progressed(progress(0, step=10, steps=110))
    for step, left in ((20, "90 s"), (60, "50 s"), (109, "1.0 s")):
        clock.now += 10 if step == 20 else 0
        clock.now = 100 + (step - 10)
        plain._progress[1] = progress(1, step=step, steps=110)
        plain.progressed(progress(0, step=110, steps=110))
        assert lines(plain)[-1].endswith(f", {left} left")
    plain.entered(Phase.DONE, "j1")
    assert plain._time_left() == ""


def test_no_time_is_guessed_at_the_start_or_without_progress(plain, clock):
    plain.progressed(progress(0, step=10))
    clock.now += 2.9
    plain.progressed(progress(0, step=20))
    assert "left" not in lines(plain)[-1]
    clock.now += 10
    plain.progressed(progress(0, step=10))
    assert "left" not in lines(plain)[-1]


def test_what_a_node_prints_is_passed_on_as_it_is(plain):
    plain.printed("worker 1", "[bold]not markup[/bold]")
    assert lines(plain) == ["worker 1: [bold]not markup[/bold]"]


# Table ----------------------------------------------------------------------------------------


def test_before_there_is_progress_the_picture_is_its_headline(clock):
    display = terminal(clock)
    assert drawn(display, 80) == ["starting (0 s)"]
    clock.now += 61.4
    display.entered(Phase.RUNNING, "j1")
    assert drawn(display, 80) == ["job j1: running (61 s)"]


def test_the_picture_has_a_row_for_each_worker_in_order(clock):
    display = terminal(clock, 160)
    display.progressed(progress(1, step=1320, epoch=119))
    display.progressed(progress(0, step=0))
    display.evaluated(Evaluation(1, 118, 1300, 0.1, 0.975))
    _, head, *rows, total = drawn(display, 160)
    assert head.split()[-5:] == ["test", "accuracy", "samples/s", "traffic/s", "waits"]
    assert [row.split()[:2] for row in rows] == [["worker", "0"], ["worker", "1"]]
    assert total.split() == ["all", "1.5000", "0.2500", "0.9750", "24,691", "4.0", "MB"]
    rates = ["12,346", "2.0", "MB", "25%"]
    assert rows[0].split()[3:] == ["0/1320", "1", "1.5000", "▁", "0.2500", "-", *rates]
    assert rows[1].split()[3:6] == ["1320/1320", "120", "1.5000"]
    assert "0.9750" in rows[1]


def test_columns_stay_where_they_are_while_numbers_change(clock):
    display = terminal(clock)
    display.progressed(progress(0, step=1, loss=0.1, samples_per_s=5, bytes_per_s=0))
    before = drawn(display, 120)[1]
    display.progressed(
        progress(0, step=1320, epoch=99, loss=12.3456, samples_per_s=1e6, bytes_per_s=999.9e6)
    )
    display.evaluated(Evaluation(0, 98, 1300, 0.1, 0.975))
    assert drawn(display, 120)[1] == before


def test_the_bar_is_as_long_as_the_way_taken(clock):
    display = terminal(clock)
    for step, cells in ((0, 0), (660, 10), (1320, 20)):
        display.progressed(progress(0, step=step))
        bar = display._cells(0, slow=False)["progress"]
        assert len(bar) == 20
        assert sum(span.end - span.start for span in bar.spans if span.style == "green") == cells


def test_who_waits_less_than_another_is_who_it_waits_for(clock):
    display = terminal(clock)
    for node, waited in ((0, 0.5), (1, 0.1), (2, 0.4)):
        display.progressed(progress(node, waited=waited))
    assert [row.split()[-1] for row in drawn(display, 130)[2:5]] == ["50%", "slow", "40%"]
    display.progressed(progress(1, waited=0.3))
    assert [row.split()[-1] for row in drawn(display, 130)[2:5]] == ["50%", "30%", "40%"]


def test_a_wide_terminal_shows_the_course_of_the_loss(clock):
    display = terminal(clock, 160)
    for loss in (2.0, 1.0, math.nan, 0.0):
        display.progressed(progress(0, loss=loss))
    assert "█▅▁" in drawn(display, 160)[2]


@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 24, 25, 1000])
def test_a_curve_shows_its_whole_course_in_its_cells(count):
    curve = Curve(12)
    for i in range(count):
        curve.add(float(i))
    text = str(curve)
    assert len(text) <= 12
    assert list(text) == sorted(text)
    assert (len(text) > 5) == (count > 5)
    if count > 1:
        assert (text[0], text[-1]) == (SPARKS[0], SPARKS[-1])


def test_a_curve_of_one_value_is_flat():
    curve = Curve(12)
    for _ in range(5):
        curve.add(3.0)
    assert str(curve) == SPARKS[0] * 5


@pytest.mark.parametrize("width", range(30, 131, 5))
def test_a_narrow_terminal_gets_fewer_columns_and_no_broken_lines(clock, width):
    display = terminal(clock, width)
    display.entered(Phase.RUNNING, "20250102-030405-a-long-title-of-a-job-0123")
    display.progressed(progress(0, step=1320))
    picture = drawn(display, width)
    assert len(picture) == 3
    assert all(len(line) <= width for line in picture)
    assert "1320/1320" in picture[2]
    assert picture[2].startswith("worker 0")
    if width >= 80:
        assert "test accuracy" in picture[1]
        assert "━" * 20 in picture[2]


def test_a_live_display_leaves_nothing_but_lines_behind(clock):
    display = terminal(clock)
    with display:
        display.entered(Phase.RUNNING, "j1")
        display.progressed(progress())
        display.printed("worker 0", "hello")
        display._live.refresh()
    text = display._console.file.getvalue()
    assert "worker 0: hello" in text
    assert text.rindex("\x1b[2K") > text.rindex("1320")


def test_a_dumb_terminal_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    display = terminal(clock)
    with display:
        display.entered(Phase.RUNNING, "j1")
    assert lines(display) == ["job j1: running"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.5, "1.0 kB"),
        (1000, "1.0 kB"),
        (123_456, "123.5 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2e6, "2.0 MB"),
        (1e9, "1.0 GB"),
        (5e12, "5000.0 GB"),
    ],
)
def test_sizes_as_people_read_them(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (150, "2 min"),
        (7170, "2 h 0 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_spans_as_people_say_them(seconds, text):
    assert span(seconds) == text
