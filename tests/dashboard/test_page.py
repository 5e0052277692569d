"""What the live page shows of a moment; the charts are those of reports, which have tests."""

import dataclasses
import math
import re

import pytest
from test_live import NEW, OLD, entry, piece, seen

from aiosgd.cli_jobs import status_lines
from aiosgd.dashboard import page
from aiosgd.dashboard.live import Moment, Trace
from aiosgd.dashboard.page import Drawing, View
from aiosgd.report import sections
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.survey import Fate

TITLE = "cluster.toml"


def moment(*nodes, **more):
    from aiosgd.runtime.survey import fates

    return Moment(**{"seen": nodes, "all_asked": True, "fates": tuple(fates(nodes))} | more)


def run_of(state="running", job=None, **fate):
    trace = Trace(NEW)
    trace.job = job or JobConfig(workers=2, learning_rate=0.125)
    trace.facts = {"nodes": {"0": "127.0.0.1:9000", "1": "127.0.0.1:9001"}}
    for node in range(2):
        links = {(node, 1 - node): (3, 300 + node)}
        trace.left(node, 1.0).add(piece(node, 0, 4, epochs=[0, 1]), links)
    if state != "running":
        trace.end(1, piece(1, 0, 4, epochs=[0, 1], log=b"it is all over"))
    return trace.run(Fate(job_id=NEW, state=state, **fate))


def text_of(parts):
    return " ".join(re.sub("<[^>]*>", " ", " ".join(parts.values())).split())


@pytest.fixture
def running():
    figures = {"step": 4, "steps": 1000, "loss": 0.5, "samples_per_s": 1234.4, "bytes_per_s": 5e6}
    slow = figures | {"step": 3}
    return moment(seen(0, NEW, **figures), seen(1, NEW, **slow), run=run_of())


def test_the_shell_has_a_place_for_every_part_and_nothing_from_elsewhere():
    text = page.shell(TITLE)
    for name in page.PARTS:
        assert text.count(f'id="{name}"') == 1
    loaded = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert set(loaded) == {*page.files(), "data:,"}
    assert not re.search(r"style=|\son\w+=|<script>|https?:", text)


def test_what_the_page_loads_refers_to_nothing_else():
    for name, (text, _) in page.files().items():
        words = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(|eval\(|import\(", words), name


def test_every_part_is_drawn_for_every_moment(running):
    drawing = Drawing(TITLE)
    for now in (Moment(seen=(), all_asked=False), moment(seen(0)), running):
        assert sorted(drawing.parts(now, View())) == sorted(page.PARTS)


def test_before_all_nodes_were_asked_the_page_says_so():
    shown = Drawing(TITLE).parts(Moment(seen=(seen(0),), all_asked=False), View())
    assert "asking the nodes" in shown["head"]
    assert shown["nodes"] == ""


def test_a_cluster_that_has_had_no_job_says_so():
    shown = Drawing(TITLE).parts(moment(seen(0), seen(1)), View())
    assert "no job runs, and there was none yet" in shown["head"]
    assert text_of(shown).count("free") == 2


def test_a_job_that_runs_shows_how_far_it_is(running):
    shown = Drawing(TITLE).parts(running, View())
    assert "▶ running" in shown["head"]
    assert f'data-title="running {NEW}"' in shown["head"]
    assert '<progress max="1000" value="3"' in shown["head"]
    assert "step 3 of 1,000, epoch 2, about 11 min left" in shown["head"]  # 2 s for 3 steps
    nodes = text_of({"nodes": shown["nodes"]})
    assert "worker 0 127.0.0.1:9000 trains 4 of 1,000 0.5000 1,234 5.0 MB/s" in nodes
    assert "checkpoint" not in nodes  # none has any
    assert "learning_rate 0.125" in text_of(shown)
    assert 'class="box' not in shown["head"]
    assert "worker 0 to worker 1: 3 messages, 300 bytes" in shown["traffic"]
    assert shown["time"].count('class="strip"') == 2
    assert (shown["stale"], shown["shape"], shown["logs"]) == ("", "", "")


def test_a_job_that_has_not_begun_has_no_progress():
    now = moment(seen(0, NEW), run=run_of())
    assert "about to begin" in Drawing(TITLE).parts(now, View())["head"]


@pytest.mark.parametrize(
    ("chosen", "view"),
    [
        ({}, View("step", "plain")),
        ({"by": "time", "y": "log"}, View("time", "log")),
        ({"by": "<script>", "y": ""}, View("step", "plain")),
    ],
)
def test_a_view_is_what_the_switches_say(chosen, view):
    assert View.of(chosen) == view


@pytest.mark.parametrize("by", ["step", "time", "bytes"])
@pytest.mark.parametrize("y", ["plain", "log"])
def test_only_the_charts_that_are_looked_at_are_drawn(running, by, y):
    drawn = Drawing(TITLE).parts(running, View(by, y))["curves"]
    classes = re.findall(r'class="chart ([^"]*)"', drawn)
    assert sorted(classes) == [f"by-{by}", f"by-{by}", *[f"by-{by} y-{y}"] * 3]


def test_a_job_that_failed_says_why_and_shows_the_log_of_who_failed():
    run = run_of("failed", reason="worker 1: codec Plain: it broke")
    now = moment(seen(0, "", entry(NEW, 0, "failed", "worker 1: codec Plain: it broke")), run=run)
    shown = Drawing(TITLE).parts(now, View())
    assert "no job runs; the newest" in shown["head"]
    assert "✗ failed" in shown["head"]
    assert "worker 1: codec Plain: it broke" in shown["head"]
    assert "it is all over" in shown["logs"]
    assert "the submitter" not in shown["logs"]


def test_jobs_that_the_nodes_remember_are_listed_the_newest_first():
    nodes = [seen(0, "", entry(NEW, 0, "cancelled", "by request"), entry(OLD, 0))]
    shown = text_of({"about": Drawing(TITLE).parts(moment(*nodes), View())["about"]})
    assert re.search(f"{NEW} cancelled .* 3 s by request {OLD} done .* 3 s", shown)


def test_nodes_that_do_not_answer_come_first_with_the_reason():
    now = moment(seen(0), seen(1, error="127.0.0.1:9001 cannot be reached"))
    nodes = text_of({"nodes": Drawing(TITLE).parts(now, View())["nodes"]})
    assert nodes.index("workers[1] 127.0.0.1:9001 no answer") < nodes.index("workers[0]")
    assert "127.0.0.1:9001 cannot be reached" in nodes


def test_a_cluster_that_does_not_answer_is_told_and_shows_what_was_known(running):
    silent = [dataclasses.replace(one, status=None, error="gone") for one in running.seen]
    now = moment(*silent, fates=running.fates, run=running.run)
    shown = Drawing(TITLE).parts(now, View())
    assert "No node answers." in shown["head"]
    assert shown["curves"]


def test_a_node_that_is_in_another_job_or_about_to_fail_says_so():
    other = seen(1, OLD)
    failing = dataclasses.replace(seen(0, NEW), status=dataclasses.replace(
        seen(0, NEW).status, failure="it broke", checkpoint=40))  # fmt: skip
    fates = (Fate(job_id=NEW, state="running"), Fate(job_id=OLD, state="running"))
    nodes = text_of(Drawing(TITLE).parts(moment(failing, other, fates=fates), View()))
    assert "failing step 40 it broke" in nodes
    assert f"trains: {OLD}" in nodes


def test_of_very_many_nodes_some_are_counted():
    place = seen(0)
    many = [dataclasses.replace(place, place=f"workers[{i}]") for i in range(sections.NODES + 5)]
    shown = Drawing(TITLE).parts(moment(*many), View())["nodes"]
    assert shown.count("<tr>") == sections.NODES + 1
    assert "and 5 nodes more" in shown


def test_a_topology_is_drawn_once_per_job(monkeypatch):
    drawn = []
    monkeypatch.setattr(sections, "topology", lambda run: drawn.append(run) or "a ring")
    now = moment(seen(0, NEW), run=run_of(job=JobConfig(codec="dpsgd", workers=2, mode="async")))
    drawing = Drawing(TITLE)
    for _ in range(3):
        shown = drawing.parts(now, View())
    assert (shown["shape"], len(drawn)) == ("a ring", 1)
    assert "Staleness" in shown["stale"]


@pytest.mark.parametrize(
    ("job", "is_drawn"),
    [
        (JobConfig(topology="ring", workers=400), True),
        (JobConfig(topology="edges", topology_params={"file": "", "links": [[0, 1]]}), True),
        (JobConfig(topology="edges", topology_params={"file": "/dev/zero"}), False),
        (JobConfig(topology="ring", workers=10**9), False),
    ],
)
def test_a_topology_that_a_node_names_reads_no_file_and_takes_little_memory(job, is_drawn):
    run = run_of(job=job)
    run = dataclasses.replace(run, facts={}) if job.workers else run
    shape = Drawing(TITLE).parts(moment(seen(0, NEW), run=run), View())["shape"]
    assert ("<svg" in shape) == is_drawn
    assert "No picture" not in shape


def test_figures_that_are_no_numbers_are_shown_as_such():
    figures = {"step": 4, "steps": 1000, "epoch": 0}
    rates = ("loss", "accuracy", "samples_per_s", "bytes_per_s", "quiet_s")
    for value in (math.nan, math.inf, -math.inf):
        one = seen(0, NEW, **figures, **dict.fromkeys(rates, value))
        shown = Drawing(TITLE).parts(moment(one, run=run_of()), View())["nodes"]
        assert str(value) in shown
        assert str(value) in "".join(status_lines(TITLE, [one], None, by_name=False))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (7300, "2 h 2 min")]
)
def test_a_duration_in_words(seconds, said):
    assert page._span(seconds) == said


def test_what_nodes_say_is_text_and_never_markup():
    evil = "<img src=x onerror=alert(1)>"
    nodes = [seen(0, error=evil), seen(1, "", entry(NEW, 0, "failed", evil))]
    parts = Drawing(evil).parts(moment(*nodes, run=run_of("failed", reason=evil)), View())
    assert "<img" not in "".join(parts.values())
    assert sum(part.count("&lt;img") for part in parts.values()) >= 4
