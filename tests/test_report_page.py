"""Reports: what a page says is what the run's files say, and it needs nothing but itself."""

import base64
import hashlib
import html.parser
import json
import re
import sys
import types
import webbrowser

import numpy as np
import pytest

from aiosgd import cli
from aiosgd.errors import ConfigError
from aiosgd.plugins.trackers import Csv
from aiosgd.report import charts, curves, facts, page, picture, publish, run, sections
from aiosgd.report.charts import Axis
from aiosgd.report.markup import Html, join, tag
from aiosgd.runtime import results
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.results import CONSENSUS, EVAL, TRAIN, Summary

JOB_ID = "20260102-030405-plain-00ff"
EVIL = "<script>alert('\"x\"')</script><img src=http://evil.example/x.png> & \x1b[31m\x00"


# Runs, made of nothing ------------------------------------------------------------------------


def train_rows(workers=2, steps=6, *, stale=np.nan, loss=lambda node, step: 2.0 / (step + 1)):
    rows = [
        (
            *(node, step, step // 3, 0.1 * (step + 1), loss(node, step), step / steps),
            *(8, 0.02, 0.05, 1000, 900, stale if np.isscalar(stale) else stale[step]),
        )
        for node in range(workers)
        for step in range(steps)
    ]
    return np.array(rows, TRAIN).view(np.recarray)


def eval_rows(workers=2, epochs=2):
    rows = [
        (node, epoch, 3 * epoch + 2, 0.3 * (epoch + 1) + 0.01, 1.5 - epoch, 0.25 * (epoch + 1) + node / 100)
        for node in range(workers)
        for epoch in range(epochs)
    ]  # fmt: skip
    return np.array(rows, EVAL).view(np.recarray)


def summary_of(workers=2, **changes):
    values = {
        "job_id": JOB_ID,
        "state": "done",
        "metrics": {"loss": 0.5417, "accuracy": 0.8361},
        "nodes": workers,
        "steps": 6,
        "epochs": 2,
        "samples": 96,
        "wall_s": 1.75,
        "train_s": 0.625,
        "samples_per_s": 153.6,
        "bytes_sent": 12_345,
        "bytes_received": 12_345,
        "consensus_distance": 0.0,
        "per_node": {
            node: {"address": f"10.0.0.{node}:9000", "samples": 48, "train_s": 0.6, "late": 0}
            | {"bytes_sent": 6000 + node, "bytes_received": 6000}
            for node in range(workers)
        },
    }
    return Summary(**(values | changes))


@pytest.fixture
def make(tmp_path):
    """Write a run's folder; what is not given is that of a small run that went well."""

    def write(name="one", job=None, summary=None, train=None, tests=None, logs=(), apart=()):
        folder = tmp_path / name
        folder.mkdir()
        results.write_summary(folder, summary or summary_of())
        results.write_job(folder, job or JobConfig(workers=2), {"job_id": name})
        tables = {"train": train_rows() if train is None else train, "eval": eval_rows()}
        tables["eval"] = tables["eval"] if tests is None else tests
        tables["consensus"] = np.array(list(apart), CONSENSUS).view(np.recarray)
        for table, rows in tables.items():
            Csv(None, folder).write(table, rows)
        for node, text in dict(logs).items():
            results.write_node_log(folder, node, text)
        (folder / "submit.log").write_text("2026-01-02 03:04:05,000 INFO the submitter's line\n")
        return folder

    return write


class Page(html.parser.HTMLParser):
    """A page's elements, its text, and what it refers to."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " " + data

    def all(self, name, class_=""):
        return [
            attributes
            for element, attributes in self.elements
            if element == name and {*class_.split()} <= {*(attributes.get("class") or "").split()}
        ]

    def element(self, name):
        return re.search(f"<{name}>(.*?)</{name}>", self.source, re.DOTALL)[1]


@pytest.fixture
def page_of(make):
    return lambda **facts: Page(page.page([run.read(make(**facts))]))


# The page needs nothing else -------------------------------------------------------------------


def check_self_contained(shown):
    for name, attributes in shown.elements:
        assert name not in ("link", "img", "iframe", "object", "embed", "base", "image", "use")
        for key in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            assert key not in attributes, (name, attributes)
        for value in attributes.values():
            assert all(one.startswith("#") for one in re.findall(r"url\(([^)]*)\)", value or ""))
        assert not any(key.startswith("on") or key == "style" for key in attributes)
    style, script = shown.element("style"), shown.element("script")
    assert not re.search(r"url\(|@import|//", style)
    words = script.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|fetch|import\(|XMLHttp|WebSocket|innerHTML|eval", words)
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_page_refers_to_nothing_outside_of_it(page_of):
    check_self_contained(page_of(job=JobConfig(codec="dpsgd", topology="ring", workers=2)))


def test_a_page_of_several_runs_refers_to_nothing_outside_of_it(make):
    runs = [run.read(make(name)) for name in "abc"]
    check_self_contained(Page(page.page(runs)))


def test_the_policy_allows_the_script_and_the_style_of_this_page_alone(page_of):
    shown = page_of()
    policy = next(a["content"] for a in shown.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(shown.element(name).encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_every_setting_of_the_switches_has_its_charts(page_of):
    shown = page_of()
    for by in curves.BYS:
        assert (
            len(shown.all("svg", f"chart by-{by}")) == 6
        )  # two losses, linear and log, two shares
        for scale in ("y-plain", "y-log"):
            assert len(shown.all("svg", f"by-{by} {scale}")) == 2
    style = shown.element("style")
    names = [a["id"] for a in shown.all("input")]
    assert names == ["by-step", "by-time", "by-bytes", "y-plain", "y-log"]
    assert all(f"#{name}:not(:checked) ~ .grid .{name}" in style for name in names)
    assert sum("checked" in a for a in shown.all("input")) == 2


# It says what the run's files say -------------------------------------------------------------


def test_the_numbers_of_a_page_are_those_of_the_run(page_of):
    text = page_of().text
    for figure in ("0.8361", "0.5417", "0.625 s", "1.750 s", "154", "12.3 kB", "12,345", "2.1 kB"):
        assert f" {figure}" in text
    assert JOB_ID in text
    assert "✓ done" in text


def test_the_ends_of_curves_are_told(page_of):
    text = page_of().source
    assert "Training loss by step: from 2 to 0.3333" in text
    assert "Training loss by time: from 2 to 0.3333" in text
    assert "Test accuracy by epoch: from 0.255 to 0.505" in text  # of two workers, the mean


def test_options_that_differ_from_the_defaults_come_first(page_of):
    job = JobConfig(workers=2, learning_rate=0.125, optimizer_params={"momentum": 0.875})
    text = page_of(job=job).text
    folded = text.index("options with their defaults")
    for name in ("learning_rate 0.125", "optimizer.momentum 0.875", "workers 2"):
        assert text.index(name) < folded
    assert text.index("batch_size 64") > folded


def test_options_are_those_of_the_job_file_and_no_more():
    job = JobConfig(workers=3, codec_params={"turn": 7}, epochs=9)
    assert facts.given(job) == {"workers", "codec.turn", "epochs"}
    assert facts.options(job)["codec.turn"] == "7"
    assert facts.options(job)["compute.policy"] == "auto"
    assert facts.given(JobConfig()) == set()


def test_where_workers_end_apart_the_page_says_so(page_of):
    own = {0: {"accuracy": 0.5, "loss": 1.0}, 1: {"accuracy": 0.75, "loss": 1.0}}
    text = page_of(summary=summary_of(per_node=own)).text
    assert "all: 0.5000 to 0.7500" in text
    assert "all: 1.0000" not in text


def test_a_consensus_distance_has_a_chart_unless_it_is_zero(make):
    apart = run.read(make("a", apart=[(0, 2, 0.5, 0.75), (1, 2, 0.25, 0.375)]))
    same = run.read(make("b", apart=[(0, 2, 0.0, 0.0)]))
    assert "Consensus distance by epoch: from 0.5 to 0.25" in page.page([apart])
    assert curves.apart(apart, "step").high.tolist() == [0.75, 0.375]
    assert "Consensus distance by epoch" not in page.page([same])


# What failed ----------------------------------------------------------------------------------

FAILED = "worker 1: codec Plain: update failed on node 1 in step 3: ValueError: too wet"


def test_a_failed_run_says_why_and_shows_the_log_of_who_failed(page_of):
    lines = [f"line {i} of worker 1" for i in range(100)]
    logs = {0: "a line of worker 0", 1: "\n".join(lines)}
    text = page_of(summary=summary_of(state="failed", error=FAILED), logs=logs).text
    assert f"Failed:  {FAILED}" in text
    assert "✗ failed" in text
    assert [f"line {i} of worker 1" in text for i in (0, 59, 60, 99)] == [False, False, True, True]
    assert "a line of worker 0" not in text
    assert "the submitter's line" in text


def test_a_node_whose_log_did_not_come_back_is_named_all_the_same(page_of):
    reason = "worker 7 lost: no heartbeat for 5 s"
    text = page_of(summary=summary_of(state="failed", error=reason)).text
    assert "Log of worker 7" in text
    assert "It did not come back" in text


def test_a_cancelled_run_and_one_that_lost_a_worker_say_so(page_of, make):
    text = page_of(summary=summary_of(state="cancelled", error="interrupted")).text
    assert "Cancelled:  interrupted" in text
    lost = run.read(make("two", summary=summary_of(lost={1: "it fell silent"})))
    assert "Went on without worker 1: </strong>it fell silent" in page.page([lost])


def test_a_run_that_never_trained_has_a_page(page_of):
    nothing = summary_of(state="failed", error="no vote", metrics={}, per_node={}, steps=0)
    shown = page_of(summary=nothing, train=train_rows(steps=0), tests=eval_rows(epochs=0))
    assert "nothing was recorded" in shown.text
    assert not shown.all("svg", "chart")


def test_a_table_that_is_missing_is_told(make):
    folder = make()
    (folder / "eval.csv").unlink()
    (folder / "consensus.csv").unlink()
    text = page.page([run.read(folder)])
    assert "Not in the folder: eval.csv, consensus.csv." in text
    assert "Training loss by step" in text


def test_losses_that_are_no_numbers_are_counted_and_not_drawn(page_of):
    bad = {2: np.nan, 3: np.inf, 4: 1.7e308}
    rows = train_rows(loss=lambda node, step: bad.get(step, 1.0))
    shown = page_of(train=rows)
    assert "6 rows of 12 in train.csv without a finite loss" in shown.text
    for name, attributes in shown.elements:
        for key in ("points", "d", "x", "y", "cx", "cy", "width", "height"):
            assert not re.search("nan|inf", attributes.get(key) or ""), (name, attributes)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_stands_in_the_tables_there_is_a_page(page_of, seed):
    rng = np.random.default_rng(seed)
    rows, tests = train_rows(3, 7), eval_rows(3)
    strange = [np.nan, np.inf, -np.inf, 0, -1, 5e-324, -1e308, 1e308]
    known = [np.nan, 0, 5e-324, 0.5, 2**53]
    for table in (rows, tests):
        for name in table.dtype.names:
            hit = rng.random(len(table)) < 0.4
            if table.dtype[name].kind == "i":
                table[name][hit] = rng.choice([0, 3, 2**53], hit.sum())
            else:
                free = name in ("loss", "accuracy")
                table[name][hit] = rng.choice(strange if free else known, hit.sum())
    job = JobConfig(workers=3, mode="async")
    shown = page_of(train=rows, tests=tests, job=job, summary=summary_of(3))
    for name, attributes in shown.elements:
        for key in ("points", "d", "x", "y", "cx", "cy", "width", "height", "data-x", "data-y"):
            assert not re.search("nan|inf", attributes.get(key) or ""), (name, attributes)


# Strange texts --------------------------------------------------------------------------------


def test_what_others_wrote_is_text_and_never_markup(make):
    per_node = {0: {"address": EVIL, "bytes_sent": 5, "bytes_received": 5}}
    summary = summary_of(
        job_id=EVIL, state="failed", error=f"worker 0: {EVIL}", per_node=per_node, lost={1: EVIL},
        simulated={"network": {"name": EVIL}},
    )  # fmt: skip
    job = JobConfig(workers=2, codec_params={"title": EVIL.partition("\x1b")[0]})
    folder = make(summary=summary, job=job, logs={0: f"</pre>{EVIL}"})
    one = run.read(folder)
    for runs in ([one], [one, one]):
        shown = Page(page.page(runs))
        assert len(shown.all("script")) == 1
        assert not shown.all("img")
        assert shown.text.count("<script>alert('\"x\"')</script><img") >= 6 * len(runs)
        assert not re.search("[\x00\x1b]", shown.source)
        check_self_contained(shown)


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", class_='a"b') == '<p class="a&quot;b">&lt;b&gt;</p>'
    assert tag("p", Html("<b>"), None, 3, ["x", ["y&"]]) == "<p><b>3xy&amp;</p>"
    assert tag("input", checked=True, id=None, name="n") == '<input checked name="n">'
    assert join("a\x00b\ud800\n\tc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}\n\tc"


# Curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_curve_of_many_rows_keeps_its_spikes(seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.uniform(0, 9, 3000)), rng.normal(size=3000)
    y[rng.integers(3000, size=3)] = 50, -70, np.nan
    curve = curves.reduce(x, y, 40)
    assert len(curve.x) <= 40
    assert curve.high.max() == 50
    assert curve.low.min() == -70
    assert ((curve.low <= curve.mean) & (curve.mean <= curve.high)).all()
    assert (np.diff(curve.x) > 0).all()
    assert (curve.x[0], curve.x[-1]) >= (x[0], 0)


def test_few_rows_are_themselves():
    curve = curves.reduce(np.array([2.0, 1, 2]), np.array([5.0, 1, 7]), 400)
    assert curve.x.tolist() == [1, 2]
    assert curve.mean.tolist() == [1, 6]
    assert (curve.low.tolist(), curve.high.tolist()) == ([1, 5], [1, 7])


def test_a_spike_of_one_worker_is_in_the_picture(page_of):
    rows = train_rows(4, 600, loss=lambda node, step: 8.0 if (node, step) == (2, 301) else 1.0)
    chart = re.search('<svg [^>]*by-step y-plain".*?</svg>', page_of(train=rows).source)[0]
    band = re.search('<polygon points="([^"]*)" class="band c0"', chart)[1]
    tops = [float(point.split(",")[1]) for point in band.split()]
    assert min(tops) == charts.TOP  # 8 is the axis's end
    assert sorted(tops)[1] > charts.TOP + 150


def test_a_logarithmic_axis_shows_what_is_more_than_nothing():
    y = np.array([0.0, -1, 5e-324, 0.5])
    curve = charts.positive(curves.Curve(np.arange(4.0), y, y - 1, y))
    assert (curve.x.tolist(), curve.mean.tolist(), curve.low.tolist()) == ([3], [0.5], [0.5])


def test_curves_by_bytes_count_what_all_workers_had_sent_by_then(make):
    one = run.read(make())
    assert curves.training(one, "loss", "bytes").x[[0, -1]].tolist() == [2000, 12_000]
    assert curves.testing(one, "accuracy", "bytes").x.tolist() == [6000, 12_000]
    assert curves.testing(one, "accuracy", "time").x.tolist() == pytest.approx([0.31, 0.61])


def test_a_page_of_a_long_run_is_small():
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.1, 3, (8, 3000))
    rows = train_rows(8, 3000, loss=lambda node, step: noise[node, step])
    rows.time_s += rng.uniform(0, 0.05, len(rows))
    rows.compute_s, rows.wait_s = rng.uniform(0, 0.05, (2, len(rows)))
    one = run.Run(
        job=JobConfig(workers=8), facts={}, summary=summary_of(8),
        train=rows, eval=eval_rows(8, 500), consensus=np.empty(0, CONSENSUS).view(np.recarray),
    )  # fmt: skip
    assert len(page.page([one]).encode()) < 1_000_000
    assert len(page.page([one] * 3).encode()) < 3_000_000


# Axes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_an_axis_has_a_few_ticks_that_say_where_they_are(seed):
    rng = np.random.default_rng(seed)
    low, high = np.sort(10 ** rng.uniform(-7, 9, 2))
    for scale, log in (("plain", False), ("seconds", False), ("bytes", False), ("bytes", True)):
        axis = Axis.over([np.array([low, high])], scale, log=log).rounded()
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 11
        assert axis.at(low) >= -1e-9
        assert axis.at(high) <= 1 + 1e-9
        places = [float(axis.at(value)) for value, _ in ticks]
        assert places == sorted(places)
        for value, text in ticks:
            told = float(text.replace(",", "")) * axis.factor
            assert told == pytest.approx(value, rel=6e-3, abs=1e-3 * (axis.high - axis.low))


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 3), (0, 7), (1, 440), (12, 12)])
def test_steps_and_epochs_have_whole_ticks(low, high):
    ticks = Axis.over([np.array([low, high], float)], "whole").ticks()
    assert all(value == round(value) and text.isdecimal() for value, text in ticks)
    assert len(ticks) >= 2


@pytest.mark.parametrize("values", [[], [0.0], [3.0], [-2.0, -2.0], [0.0, 0.0], [1e-300, 1e299]])
def test_an_axis_of_whatever_there_is_has_ends(values):
    axis = Axis.over([np.array(values, float)]).rounded()
    assert axis.low < axis.high
    assert np.isfinite(axis.at(np.array(values, float))).all()


@pytest.mark.parametrize("seed", range(10))
def test_labels_are_moved_apart_in_their_order_and_stay_inside(seed):
    places = np.sort(np.random.default_rng(seed).choice([20.0, 30, 33, 34, 100, 199, 200], 8))
    moved = charts._apart(places.tolist(), 12, 10, 210)
    assert np.diff(moved).min() >= 12
    assert 10 <= moved[0] <= moved[-1] <= 210


def test_labels_at_the_ends_of_curves_do_not_touch(make):
    text = page.page([run.read(make(name)) for name in "abcde"])
    chart = re.search(
        '<svg role="img" class="chart by-step.*?</svg>|<svg [^>]*by-step.*?</svg>', text
    )
    tops = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*label c', chart[0])]
    assert len(tops) == 5
    assert min(np.diff(sorted(tops))) >= 12


# Time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_timeline_has_all_the_time_once(seed):
    rng = np.random.default_rng(seed)
    rows = train_rows(1, 500)
    rows.compute_s, rows.wait_s = rng.uniform(0, 0.05, (2, 500))
    rows.time_s = np.cumsum(rng.uniform(0.1, 0.2, 500))
    end = rows.time_s[-1] * 1.5
    shares = curves.timeline(rows, "worker 0", end, 64)
    seconds = [part.sum() * end / 64 for part in (shares.compute, shares.wait, shares.rest)]
    assert seconds[0] == pytest.approx(rows.compute_s.sum())
    assert seconds[1] == pytest.approx(rows.wait_s.sum())
    assert sum(seconds) == pytest.approx(rows.time_s[-1])
    total = shares.compute + shares.wait + shares.rest
    assert total.max() <= 1 + 1e-9
    assert total[-20:].sum() == pytest.approx(0)  # after its end there is nothing
    assert sum(shares.totals) == pytest.approx(1)


def test_a_timeline_puts_computing_before_waiting():
    shares = curves.timeline(train_rows(1, 1), "worker 0", 0.1, 10)
    assert shares.rest.round(6).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert shares.compute.round(6).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert shares.wait.round(6).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_of_many_workers_the_slowest_have_a_row_and_the_others_share_one(page_of):
    rows = train_rows(50, 2)
    rows.compute_s[rows.node == 49] = 0.045
    shown = page_of(train=rows, summary=summary_of(50))
    always, folded = shown.source.split("40 more workers")
    assert (always.count('class="strip"'), folded.count('class="strip"')) == (sections.ROWS, 40)
    assert "worker 49: compute 45%" in always


def test_of_very_many_workers_the_fastest_share_a_row(page_of):
    rows = train_rows(100, 2)
    shown = page_of(train=rows, summary=summary_of(100))
    assert len(shown.all("svg", "strip")) == sections.NODES + 1
    assert "36 others: compute 20%, wait 50%, rest 30%" in shown.text
    assert shown.text.count("36 others, mean") == 1  # of the traffic


# Traffic, staleness, topology ------------------------------------------------------------------


def link(peer, sent, received):
    return (
        f"2026-01-02 03:04:05,678 INFO link to {peer} over tcp: sent {sent[0]} messages, {sent[1]} "
        f"bytes; received {received[0]}, {received[1]} bytes; longest queue 9 bytes; round trip "
        "0.1 ms\n"
    )


def test_links_are_read_from_both_ends(make):
    logs = {0: link("worker 1", (3, 300), (4, 400)), -1: link("worker 0", (5, 500), (6, 600))}
    one = run.read(make(logs=logs))
    assert one.links == {(0, 1): (3, 300), (1, 0): (4, 400), (-1, 0): (5, 500), (0, -1): (6, 600)}
    shown = Page(page.page([one]))
    assert {a.get("title") for a in shown.all("td")} >= {
        "worker 0 to worker 1: 3 messages, 300 bytes",
        "server -1 to worker 0: 5 messages, 500 bytes",
    }


def test_of_many_nodes_the_links_are_a_picture(page_of):
    count = sections.TABLED + 1
    logs = {
        node: "".join(
            link(f"worker {peer}", (1, 1000 * (peer == node + 1)), (1, 1000 * (peer == node - 1)))
            for peer in range(count)
            if peer != node
        )
        for node in range(count)
    }
    shown = page_of(logs=logs, summary=summary_of(count))
    assert not shown.all("table", "matrix")
    [most, nothing] = [
        next(a["d"] for a in shown.all("path", f"heat {shade}")) for shade in ("h10", "h0")
    ]
    assert most.count("M") == count - 1  # from each to the next
    assert sum(map(int, re.findall(r"h(\d+)v1", most + nothing))) == count**2


def test_without_lines_about_links_there_is_no_table_of_them(page_of):
    shown = page_of(
        logs={0: "2026-01-02 03:04:05,678 INFO she said: link to worker 1 over tcp: ..."}
    )
    assert not shown.all("table", "matrix")
    assert shown.text.count("6.0 kB") == 4  # what each node sent and received


def test_staleness_has_bars_in_async_mode_alone(page_of, make):
    rows = train_rows(2, 6, stale=[np.nan, -1, 0, 2, 2, 5])
    text = page_of(train=rows, job=JobConfig(mode="async", workers=2)).text
    assert "Staleness of results: mean 1.80, most 5" in text
    assert [f"{i}: {share:.2f} %" in text for i, share in enumerate((40, 0, 40, 0, 0, 20))] == [
        True
    ] * 6
    sync = run.read(make("two", train=rows))
    assert "Staleness" not in page.page([sync])


@pytest.mark.parametrize("largest", [0, 1, 15, 16, 17, 1000])
def test_bars_are_few_and_have_every_value_once(largest):
    ranges = curves.bins(largest)
    assert len(ranges) <= 16
    covered = [value for low, high in ranges for value in range(low, high + 1)]
    assert covered[: largest + 1] == list(range(largest + 1))
    assert curves.histogram(np.arange(largest + 1.0), ranges).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("job", "lines", "arrows"),
    [
        (JobConfig(codec="dpsgd", topology="ring", workers=6), 6, 0),
        (
            JobConfig(
                codec="dpsgd", topology="ring", workers=6, topology_params={"directed": True}
            ),
            6,
            6,
        ),
        (JobConfig(codec="dpsgd", workers=6), 15, 0),
    ],
)
def test_a_topology_is_drawn_with_a_line_per_link(page_of, job, lines, arrows):
    shown = page_of(job=job, summary=summary_of(6))
    edges = shown.all("path", "edge")
    assert len(edges) == lines
    assert sum(edge.get("marker-end") == "url(#arrow)" for edge in edges) == arrows
    assert len(shown.all("circle", "node")) == 6


def test_a_codec_without_a_topology_has_no_picture(page_of, make):
    assert not page_of().all("svg", "circle")
    mine = run.read(make("two", job=JobConfig(codec="mine.py:Mine", workers=2)))
    assert 'class="circle' not in page.page([mine])


def test_a_worker_that_is_alone_in_an_epoch_has_no_distance(make):
    one = run.read(make(apart=[(0, 2, 0.5, 0.75), (1, 1, 0.0, 0.0)]))
    assert curves.apart(one, "step").mean.tolist() == [0.5]


def test_a_topology_that_is_not_installed_here_is_told(page_of):
    text = page_of(job=JobConfig(codec="dpsgd", topology="moebius", workers=4)).text
    assert "No picture:" in text
    assert "moebius" in text


def test_a_large_topology_is_a_circle_alone():
    graph = run.TOPOLOGIES.load("full")(None).graph(charts.DRAWN + 1, 0)
    assert "edge" not in charts.circle(graph, "")


# Several runs ---------------------------------------------------------------------------------


def test_runs_are_compared_in_what_differs(make):
    first = run.read(make("a", job=JobConfig(workers=2, learning_rate=0.5)))
    second = run.read(
        make(
            "b",
            job=JobConfig(workers=2, compressor="topk"),
            summary=summary_of(
                job_id="20260102-030406-topk-00fe",
                metrics={"loss": 0.6, "accuracy": 0.9361},
                bytes_sent=2469,
                state="failed",
                error=FAILED,
            ),
        )
    )
    shown = Page(page.page([first, second]))
    text = " ".join(shown.text.split())
    assert "test accuracy 0.8361 0.9361 +0.1" in text
    assert "bytes sent 12.3 kB 2.5 kB ×0.2" in text  # noqa: RUF001
    assert "compressor none topk" in text
    assert "learning_rate 0.5 0.05" in text
    assert "epochs 1 1" not in text  # an option that is the same in both
    assert JOB_ID in text
    assert "20260102-030406-topk-00fe" in text
    assert FAILED in text
    lines = [a for a in shown.all("polyline") if a.get("data-name") == "B"]
    assert len(lines) == 18  # of 4 charts by 3 x axes, losses twice


def test_curves_far_apart_in_bytes_share_a_logarithmic_axis(make):
    little = train_rows()
    little.bytes_sent //= 100
    runs = [run.read(make("a")), run.read(make("b", train=little))]
    assert "Training loss by sent, log scale" in page.page(runs)
    assert "log scale" not in page.page(runs[:1])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((2.0, "by"), (2.5, "by"), "+0.5"),
        ((2.0, "times"), (3.0, "times"), "×1.5"),  # noqa: RUF001
        ((2.0, "by"), (2.0, "by"), "="),
        ((0.0, "times"), (3.0, "times"), ""),
        ((np.nan, "by"), (2.0, "by"), ""),
        ((1.0, "no"), (2.0, "no"), ""),
    ],
)
def test_a_difference_in_words(one, other, said):
    facts_ = [facts.Fact("x", "", value, compared) for value, compared in (one, other)]
    assert facts.difference(*facts_) == said


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def aiosgd(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


def test_nothing_is_overwritten_and_each_report_has_a_name(aiosgd, make):
    make()
    assert aiosgd("report", "one") == (0, "report in one/report.html\n", "")
    first = publish.Path("one/report.html").read_bytes()
    assert aiosgd("report", "one") == (0, "report in one/report-2.html\n", "")
    assert publish.Path("one/report.html").read_bytes() == first
    code, _, error = aiosgd("report", "one", "--output", "one/report.html")
    assert (code, error.count("\n")) == (2, 1)
    assert "exists already" in error


def test_a_report_of_several_goes_into_this_folder(aiosgd, make, tmp_path):
    make("one")
    make("two")
    assert aiosgd("report", "one", "two") == (0, "report in report.html\n", "")
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


def test_open_opens_the_file(aiosgd, make, monkeypatch, tmp_path):
    make()
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert aiosgd("report", "one", "--open")[0] == 0
    assert opened == [(tmp_path / "one/report.html").as_uri()]


def damage(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: damage(folder, "train.csv", "node,step\n"), "train.csv:1: columns are"),
        (
            lambda folder: damage(
                folder, "eval.csv", "node,epoch,step,time_s,loss,accuracy\n1,2\n"
            ),
            "eval.csv:2: the row has 2 cells",
        ),
        (
            lambda folder: damage(
                folder,
                "eval.csv",
                "node,epoch,step,time_s,loss,accuracy\n0,0,0,1,1,1\n0,0,0,-2,1,1\n",
            ),
            "eval.csv:3: time_s is -2.0; expected 0 to 9007199254740992",
        ),
        (lambda folder: damage(folder, "consensus.csv", "x\n"), "consensus.csv:1: columns are x"),
        (
            lambda folder: damage(folder, "consensus.csv", "epoch,workers,mean,max\n1,2,oh,3\n"),
            "consensus.csv:2: ValueError",
        ),
        (
            lambda folder: damage(folder, "consensus.csv", "epoch,workers,mean,max\n,2,1,3\n"),
            "consensus.csv:2: ValueError",
        ),
        (lambda folder: damage(folder, "summary.json", "{"), "summary.json is no JSON"),
        (lambda folder: damage(folder, "job.toml", "="), "job.toml is no TOML"),
        (lambda folder: damage(folder, "job.toml", "[job]\nworkers = 'x'"), "workers is 'x'"),
        (lambda folder: (folder / "job.toml").unlink(), "job.toml cannot be read"),
        (lambda folder: (folder / "summary.json").unlink(), "has no summary.json"),
        (lambda folder: folder.rename("elsewhere"), "one is no folder"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(aiosgd, make, spoil, said):
    spoil(make())
    code, out, error = aiosgd("report", "one")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert said in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one", "--output", "nowhere/x.html"], "nowhere/x.html cannot be written: No such file"),
        (["one"] * 27, "27 runs are too many; expected 26 at most"),
        ([], "Missing argument"),
        (["one", "--format", "pdf"], "pdf"),
    ],
)
def test_a_command_that_cannot_be_is_refused_in_one_line(aiosgd, make, words, said):
    make()
    code, out, error = aiosgd("report", *words)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert said in error


def test_what_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, content):
            raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.touch()
    monkeypatch.setattr(publish.Path, "open", lambda *_: Full())
    with pytest.raises(ConfigError, match=r"report\.html cannot be written: No space left"):
        publish.publish_to(path, b"...")
    assert not path.exists()


# A picture ------------------------------------------------------------------------------------


def test_a_picture_without_matplotlib_names_what_to_install(aiosgd, make, monkeypatch):
    make()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, error = aiosgd("report", "one", "--format", "png")
    assert (code, out) == (2, "")
    assert error == (
        "aiosgd: --format png needs matplotlib, which is not installed: pip install 'aiosgd[plots]'\n"
    )
    assert not publish.Path("one/report.png").exists()


class Axes:
    """Notes what is drawn, as matplotlib's axes would draw it."""

    def __init__(self):
        self.lines, self.bands, self.calls = [], [], {}

    def plot(self, x, y, style, **more):
        self.lines.append((list(x), list(y)))

    def fill_between(self, x, low, high, **more):
        self.bands.append((list(low), list(high)))

    def __getattr__(self, name):
        return lambda *values, **more: self.calls.setdefault(name, values)


def test_a_picture_has_the_curves_of_the_page(aiosgd, make, monkeypatch, tmp_path):
    grid = [[Axes() for _ in range(3)] for _ in range(2)]

    class Figure:
        def __init__(self, **more):
            self.subplots = lambda rows, columns: grid

        def savefig(self, file, **more):
            file.write(b"png")

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    fake = types.ModuleType("matplotlib.figure")
    fake.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib.figure", fake)
    folder = make()
    assert aiosgd("report", "one", "--output", "x.png")[:2] == (0, "report in x.png\n")
    assert (tmp_path / "x.png").read_bytes() == b"png"
    one = run.read(folder)
    for column, by in enumerate(curves.BYS):
        loss, accuracy = curves.training(one, "loss", by), curves.testing(one, "accuracy", by)
        assert grid[0][column].lines == [(list(loss.x), list(loss.mean))]
        assert grid[1][column].lines == [(list(accuracy.x), list(accuracy.mean))]
        assert grid[1][column].bands == [(list(accuracy.low), list(accuracy.high))]
    names = [axes.calls["set_xlabel"] for axes in grid[0]]
    assert names == [("step",), ("seconds",), ("bytes sent",)]


def test_colours_of_a_picture_are_told_apart():
    assert len(set(picture.COLOURS)) == len(picture.COLOURS) == 8


# Of a job that ran ----------------------------------------------------------------------------


def test_a_simulated_run_has_a_page_of_its_own_numbers(aiosgd, tmp_path):
    words = "--workers 3 --epochs 2 --codec dpsgd --topology ring --batch-size 64 --title real"
    code, out, _ = aiosgd("simulate", *words.split(), "--json")
    assert code == 0
    summary = json.loads(out)
    folder = tmp_path / "runs" / summary["job_id"]
    assert aiosgd("report", folder)[0] == 0
    shown = Page((folder / "report.html").read_text())
    check_self_contained(shown)
    assert f"{summary['metrics']['accuracy']:.4f}" in shown.text
    assert f"{summary['bytes_sent']:,}" in shown.text
    assert "simulated on lan" in shown.text
    assert len(shown.all("svg", "strip")) == 3
    assert len(shown.all("path", "edge")) == 3
    # who sent what to whom adds up to what all nodes sent
    told = re.findall(r"worker \d to worker \d: \d+ messages, ([\d,]+) bytes", shown.source)
    assert len(told) == 6
    assert sum(int(text.replace(",", "")) for text in told) == summary["bytes_sent"]
