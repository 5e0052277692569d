"""Runs -> the parts of a page: what a report and the live page both show, as HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from aiosgd.display import size
from aiosgd.errors import AiosgdError
from aiosgd.report import charts, curves
from aiosgd.report.charts import Axis, Scale, Series
from aiosgd.report.curves import BYS, By, Curve, Shares
from aiosgd.report.facts import Fact, facts, given, options
from aiosgd.report.markup import Html, join, tag
from aiosgd.report.run import TAIL_LINES, Run
from aiosgd.runtime.job import node_name

Curves: TypeAlias = Callable[[Run, By], Curve]
Y: TypeAlias = Literal["plain", "log"]

YS: tuple[Y, ...] = ("plain", "log")

ROWS = 10  # nodes with a row of their own that are always shown
NODES = 64  # with a row of their own at all, the others folded; the rest share one
NAMED = 9  # nodes of a matrix whose cells have room for sizes
TABLED = 32  # nodes of a matrix whose cells have room for numbers
INTERVALS = 200  # of a timeline
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_STATES = {
    "done": "✓ done",
    "failed": "✗ failed",
    "cancelled": "■ cancelled",
    "running": "▶ running",
    "lost": "? lost",
}
_BY_NAMES = {"step": "steps, epochs", "time": "time", "bytes": "bytes"}
_SCALES: dict[By, Scale] = {"step": "whole", "time": "seconds", "bytes": "bytes"}


def section(title: str, *content: Any, note: str = "", id: str | None = None) -> Html:
    """Return a part with a heading and, below it, what else there is to say."""
    said = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", title), said, content, id=id)


# The head ------------------------------------------------------------------------------------


def state(run: Run) -> Html:
    """Return a badge."""
    name = run.summary.state
    return tag("span", _STATES.get(name, name), class_=f"state {name}")


def sentence(run: Run) -> str:
    """Say in one line what ran."""
    job, made = run.job, run.summary.simulated
    where = f", simulated on {_network(made)}" if made is not None else ""
    servers = run.summary.nodes - run.workers
    beside = f" and {count(servers, 'server')}" if servers > 0 else ""
    return (
        f"codec {job.codec}, {job.mode}, {count(run.workers, 'worker')}{beside}; "
        f"model {job.model} on {job.dataset}{where}"
    )


def _network(made: dict[str, Any]) -> str:
    network = made.get("network")
    return str(network.get("name", "?")) if isinstance(network, dict) else "?"


def count(number: int, noun: str) -> str:
    """Return so many of something in words."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def trouble(run: Run, letter: str = "") -> Html | None:
    """Return why a run did not end well, whom it lost, and what is not there."""
    summary, said = run.summary, []
    if summary.state not in ("done", "running"):
        reason = summary.error or "the summary does not say why"
        said.append(tag("p", tag("strong", f"{summary.state.capitalize()}: "), reason))
    for node, why in summary.lost.items():
        said.append(tag("p", tag("strong", f"Went on without {node_name(node)}: "), why))
    if run.missing:
        said.append(tag("p", f"Not in the folder: {', '.join(run.missing)}."))
    if lacking := curves.lacking(run, "loss"):
        rows = count(lacking, "row")
        said.append(
            tag("p", f"{rows} of {len(run.train):,} in train.csv without a finite loss: not drawn.")
        )
    if not said:
        return None
    name = tag("p", f"{letter}: {summary.job_id}", class_="note") if letter else None
    return tag("div", name, said, class_="box" + (" bad" if summary.state == "failed" else ""))


def tiles(run: Run) -> Html:
    """Return the main results."""
    shown = [fact for fact in facts(run) if fact.is_main and fact.text]
    return tag(
        "dl",
        [tag("div", tag("dt", fact.name), tag("dd", fact.text), _noted(fact)) for fact in shown],
        class_="tiles",
    )


def _noted(fact: Fact) -> Html | None:
    return tag("small", f" {fact.note}") if fact.note else None


def swatch(i: int) -> Html:
    """Return the letter of a run in its colour."""
    return tag("span", LETTERS[i], class_=f"swatch s{i % 8}")


# Curves --------------------------------------------------------------------------------------


def curves_of(runs: Sequence[Run]) -> Html:
    """Return all curves; the switches before them say which are shown."""
    return curves_section(figures(runs))


def curves_section(drawn: Iterable[Html]) -> Html:
    """Return the section of the curves, with its switches."""
    note = (
        "Line: mean of all workers; band: smallest to largest. By bytes: sent by all workers until "
        "then. Neighbouring steps are drawn together where there are more than there is room for."
    )
    grid = tag("div", drawn, class_="grid", id="curves")
    return section("Curves", _switches(), grid, note=note)


def figures(runs: Sequence[Run], bys: Sequence[By] = BYS, scales: Sequence[Y] = YS) -> list[Html]:
    """Return the curves of runs.

    Args:
        runs: beside each other in each chart.
        bys, scales: the settings of the switches that there are charts for.
    """
    points = curves.POINTS if len(runs) <= 3 else curves.POINTS // 2

    def figure(title: str, curve_of: Curves, unit: str, *, share: bool = False) -> Html:
        drawn = [_chart(runs, title, curve_of, by, unit, share=share, scales=scales) for by in bys]
        return tag("figure", tag("figcaption", title), drawn)

    found = [
        figure("Training loss", lambda r, by: curves.training(r, "loss", by, points), "step"),
        figure("Test loss", lambda r, by: curves.testing(r, "loss", by), "epoch"),
        figure(
            "Training accuracy",
            lambda r, by: curves.training(r, "accuracy", by, points),
            "step",
            share=True,
        ),
        figure(
            "Test accuracy", lambda r, by: curves.testing(r, "accuracy", by), "epoch", share=True
        ),
    ]
    if any((run.consensus["mean"] > 0).any() for run in runs):
        found.append(figure("Consensus distance", curves.apart, "epoch"))
    return found


def _switches() -> Html:
    """Return the switches; the charts after them look at them."""
    inputs: list[Html] = []
    for by in BYS:
        inputs += _switch("by", f"by-{by}", _BY_NAMES[by], on=by == "step")
    inputs.append(tag("span", class_="gap"))
    for scale, name in (("plain", "linear"), ("log", "log")):
        inputs += _switch("y", f"y-{scale}", name, on=scale == "plain")
    return join(inputs)


def _switch(group: str, name: str, text: str, *, on: bool) -> list[Html]:
    box = tag("input", type="radio", name=group, id=name, checked=on)
    return [box, tag("label", text, for_=name)]


def _chart(
    runs: Sequence[Run],
    title: str,
    curve_of: Curves,
    by: By,
    unit: str,
    *,
    share: bool,
    scales: Sequence[Y],
) -> list[Html]:
    """Return charts of one x axis, one per y axis; shares have a linear one whatever is asked."""
    found = [curve_of(run, by) for run in runs]
    caption = {"step": unit, "time": _time_caption(runs), "bytes": "sent"}[by]
    if not any(len(curve.x) for curve in found):
        return [tag("p", "nothing was recorded", class_=f"empty by-{by}")]
    if by == "bytes" and not any(curve.x.max(initial=0) > 0 for curve in found):
        return [tag("p", "no bytes were sent", class_=f"empty by-{by}")]
    if is_log := by == "bytes" and curves.are_far_apart(found):
        found, caption = [curves.behind_zero(curve) for curve in found], f"{caption}, log scale"
    x = Axis.over([curve.x for curve in found], _SCALES[by], zero=by != "step", log=is_log)
    series = [_series(runs, i, curve) for i, curve in enumerate(found)]
    described = f"{title} by {caption}: {'; '.join(map(_ends, series))}"

    def drawn(y: Axis, class_: str = "") -> Html:
        return charts.lines(series, x, y, caption, described, f"by-{by} {class_}")

    plain = Axis.over(map(_room, found), zero=not share).rounded()
    logs = [charts.positive(curve) for curve in found]
    if share or not any(len(curve.x) for curve in logs):
        return [drawn(plain)]
    axes = {"plain": lambda: plain, "log": lambda: Axis.over(map(_room, logs), log=True)}
    return [drawn(axes[scale](), f"y-{scale}") for scale in scales]


def _time_caption(runs: Iterable[Run]) -> str:
    virtual = [run.is_simulated for run in runs]
    if any(virtual):
        return "virtual time" if all(virtual) else "time, real or virtual"
    return "time"


def _room(curve: Curve) -> Any:
    return np.concatenate([curve.low, curve.high])


def _series(runs: Sequence[Run], i: int, curve: Curve) -> Series:
    last = _short(float(curve.mean[-1])) if len(curve.mean) else ""
    label, name = (last, "") if len(runs) == 1 else (LETTERS[i], LETTERS[i])
    return Series(curve, i, label, name)


def _short(value: float) -> str:
    """Return a number that has room at the end of a curve."""
    for digits in (3, 2):
        if len(text := f"{value:.{digits}g}") <= 6:
            return text
    return f"{value:.0e}"


def _ends(series: Series) -> str:
    mean = series.curve.mean
    said = f"from {mean[0]:.4g} to {mean[-1]:.4g}" if len(mean) else "nothing"
    return f"{series.name} {said}".strip()


# Where time goes -----------------------------------------------------------------------------


def timeline(run: Run) -> Html | None:
    """Return what each worker's time was for; None before there is any."""
    train = run.train[np.isfinite(run.train.time_s)]
    end = float(train.time_s.max(initial=0.0))
    if not end:
        return None
    workers = [int(node) for node in np.unique(train.node)]
    rows = {node: train[train.node == node] for node in workers}
    shares = {n: curves.timeline(rows[n], node_name(n), end, INTERVALS) for n in workers}
    slowest = sorted(workers, key=lambda n: -float(np.nan_to_num(rows[n].compute_s).mean()))
    note = (
        "What each worker's time was for: computing, waiting for the exchange (the others "
        "included), and the rest: evaluation, applying results, the codec's own work. "
        f"Each of {INTERVALS} intervals is {_duration(end / INTERVALS)} wide and shows the shares "
        "in it."
    )
    first, more, rest = _ranked(slowest)
    if more:
        note += " The workers that compute the longest per step come first."
    mean = [curves.average(f"{len(rest)} others", [shares[n] for n in rest])] if rest else []
    axis = Axis(0, end, *_unit(end))
    key = tag(
        "p",
        [tag("span", tag("i", class_=f"key {name}"), f" {name} ") for name in _KINDS],
        class_="keys",
    )
    title = "Time per worker" + (" (virtual)" if run.is_simulated else "")
    folded = _strips([*(shares[node] for node in more), *mean], axis) if more else None
    return section(
        title,
        key,
        _strips([shares[node] for node in first], axis),
        _folded(f"{len(workers) - len(first)} more workers", folded) if folded else None,
        note=note,
    )


def _ranked(nodes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Divide nodes, the most interesting first, into those shown, folded, and only counted."""
    if len(nodes) <= ROWS + 2:  # to fold two rows away would save nothing
        return sorted(nodes), [], []
    return sorted(nodes[:ROWS]), sorted(nodes[ROWS:NODES]), list(nodes[NODES:])


def _strips(parts: Sequence[Shares], axis: Axis) -> Html:
    ticks = [
        tag("text", text, x=f"{100 * value / axis.high:.2f}%", y=13, class_="tick middle")
        for value, text in axis.ticks()
        if value < 0.97 * axis.high  # the unit stands there
    ]
    scale = tag("td", tag("svg", ticks, class_="ticks", aria_hidden="true"))
    last = tag("tr", tag("th"), scale, tag("td", axis.unit, class_="said"))
    return tag("table", tag("tbody", map(_strip, parts), last), class_="timeline")


_KINDS = ("compute", "wait", "rest")


def _strip(one: Shares) -> Html:
    compute, wait, rest = one.totals
    said = f"compute {_percent(compute)}, wait {_percent(wait)}, rest {_percent(rest)}"
    layers = [(name, getattr(one, name)) for name in _KINDS]
    return tag(
        "tr",
        tag("th", one.name, scope="row"),
        tag("td", charts.staircases(layers, f"{one.name}: {said}")),
        tag("td", said, class_="said"),
    )


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _unit(seconds: float) -> tuple[float, str]:
    axis = Axis.over([np.array([0.0, seconds])], "seconds")
    return axis.factor, axis.unit


def _duration(seconds: float) -> str:
    factor, unit = _unit(seconds)
    return f"{seconds / factor:.3g} {unit}"


# Traffic -------------------------------------------------------------------------------------


def traffic(run: Run) -> Html | None:
    """Return what each node sent and received, and to whom; None where nothing tells."""
    known = {
        node: (run.figure(node, "bytes_sent"), run.figure(node, "bytes_received"))
        for node in run.summary.per_node
    }
    known = {node: both for node, both in known.items() if np.isfinite(both).all()}
    if not known:
        return None
    busiest = sorted(known, key=lambda node: (node >= 0, -sum(known[node])))
    first, more, rest = _ranked(busiest)
    most = max(map(max, known.values())) or 1.0
    others = [(node_name(node), *known[node]) for node in more]
    if rest:
        sent, received = np.mean([known[node] for node in rest], axis=0)
        others.append((f"{len(rest)} others, mean", float(sent), float(received)))
    return section(
        "Traffic",
        _bars([(node_name(node), *known[node]) for node in first], most),
        _folded(f"{len(known) - len(first)} more nodes", _bars(others, most)) if others else None,
        _matrix(run),
    )


def _bars(rows: Sequence[tuple[str, float, float]], most: float) -> Html:
    head = tag("tr", [tag("th", name, scope="col") for name in ("node", "sent", "received")])
    body = [
        tag("tr", tag("th", name, scope="row"), tag("td", _bar(sent, most, "c0")),
            tag("td", _bar(received, most, "c1")))
        for name, sent, received in rows
    ]  # fmt: skip
    return tag("table", tag("thead", head), tag("tbody", body), class_="bars")


def _bar(amount: float, most: float, class_: str) -> Html:
    """Return a bar and, in a column of its own, its size in words."""
    width = f"{100 * max(amount, 0) / most:.2f}%"
    bar = tag("svg", tag("rect", width=width, height=12, y=4, rx=2, class_=f"bar {class_}"))
    return tag("div", bar, tag("span", size(amount)), class_="size")


def _matrix(run: Run) -> Html | None:
    """Return who sent what to whom, where anybody says it."""
    nodes = sorted({node for link in run.links for node in link})
    if not nodes:
        return None
    most = max(sent for _, sent in run.links.values()) or 1
    cells = {link: sent / most for link, (_, sent) in run.links.items()}
    unit = "" if len(nodes) <= NAMED else f", as shares of the most: {size(most)}"
    if len(nodes) > TABLED:
        ends = f"{node_name(nodes[0])} to {node_name(nodes[-1])}"
        unit += f". A row for each sender, a column for each receiver, {ends}"
    return join(
        tag("h3", "Who sent what to whom"),
        tag("p", f"Bytes on each link, headers included{unit}.", class_="note"),
        _table_of_links(run, nodes, most)
        if len(nodes) <= TABLED
        else tag("figure", charts.heat(nodes, cells, "Bytes on each link"), class_="half"),
    )


def _table_of_links(run: Run, nodes: Sequence[int], most: int) -> Html:
    cells = {
        (a, b): (
            sent / most,
            _share(sent, most, are_named=len(nodes) <= NAMED),
            f"{node_name(a)} to {node_name(b)}: {messages:,} messages, {sent:,} bytes",
        )
        for (a, b), (messages, sent) in run.links.items()
    }
    names = {node: f"server {node}" if node < 0 else str(node) for node in nodes}
    return tag("div", charts.matrix(nodes, names, cells), class_="scroll")


def _share(count: int, most: int, *, are_named: bool) -> str:
    if not count:
        return "-"
    return size(count) if are_named else f"{count / most:.2f}"


# Staleness and topology ----------------------------------------------------------------------


def staleness(runs: Sequence[Run]) -> Html | None:
    """Return how old results were; None of runs that are sync."""
    values = [curves.staleness(run) if run.job.mode == "async" else np.empty(0) for run in runs]
    if not any(map(len, values)):
        return None
    ranges = curves.bins(max(float(one.max()) for one in values if len(one)))
    names = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    shares = [(i, curves.histogram(one, ranges)) for i, one in enumerate(values) if len(one)]
    said = [
        f"{LETTERS[i] + ': ' if len(runs) > 1 else ''}mean {one.mean():.2f}, most {one.max():.0f}"
        for i, one in enumerate(values)
        if len(one)
    ]
    chart = charts.bars(names, shares, "steps old", f"Staleness of results: {'; '.join(said)}")
    told = "; ".join(said)
    note = f"How many steps old results were when workers took them: {told}."
    return section("Staleness", tag("figure", chart, class_="half"), note=note)


def topology(run: Run) -> Html | None:
    """Return a picture of who exchanges with whom, where the codec has a topology."""
    try:
        graph = run.graph()
    except AiosgdError as error:
        return section("Topology", tag("p", f"No picture: {error}"))
    if graph is None:
        return None
    links = len(charts.links_of(graph)) if graph.workers <= charts.DRAWN else 0
    gap = graph.spectral_gap if graph.workers <= charts.DRAWN else None
    said = [f"{run.job.topology}, {count(graph.workers, 'worker')}"]
    said += [f"{links:,} links, each direction counts"] if links else ["too many to draw links"]
    said += [f"the links of all {graph.period} steps of a period"] if graph.period > 1 else []
    said += [f"spectral gap {gap:.3g}"] if gap is not None else []
    picture = charts.circle(graph, f"topology {said[0]}")
    return section("Topology", tag("figure", picture, class_="half"), note="; ".join(said) + ".")


# Tables --------------------------------------------------------------------------------------


def tables(run: Run) -> Html:
    """Return a run's options and its figures, side by side."""
    return tag("div", chosen(run), measured(run), class_="pair")


def chosen(run: Run) -> Html:
    """Return a run's options."""
    values, own = options(run.job), given(run.job)
    named = [_row(name, values[name]) for name in values if name in own]
    others = [_row(name, text) for name, text in values.items() if name not in own]
    made = [_row(name, _text(value)) for name, value in run.facts.items() if _is_plain(value)]
    return section(
        "Options",
        _table(named) if named else tag("p", "All options have their defaults."),
        _folded(f"{len(others)} options with their defaults", _table(others)),
        _folded("What it was made with", _table(made)) if made else "",
        note="Those that differ from the defaults.",
    )


def measured(run: Run) -> Html:
    """Return a run's results."""
    known = [fact for fact in facts(run) if fact.text]
    return section(
        "Figures", _table(_row(f.name, join(f.text, _noted(f))) for f in known), _nodes(run)
    )


def _row(name: str, text: str) -> Html:
    return tag("tr", tag("th", name, scope="row"), tag("td", text))


def _table(rows: Iterable[Html]) -> Html:
    return tag("table", tag("tbody", rows), class_="facts")


def _folded(title: str, content: Html) -> Html:
    return tag("details", tag("summary", title), content)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | list)


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


_COLUMNS = ("address", "samples", "train_s", "late", "skipped", "loss", "accuracy")


def _nodes(run: Run) -> Html | None:
    """Return each node's own figures, of so many nodes."""
    figures = {n: one for n, one in run.summary.per_node.items() if isinstance(one, dict)}
    if not figures:
        return None
    shown = sorted(figures)[:NODES]
    names = [name for name in _COLUMNS if any(name in figures[node] for node in shown)]
    head = tag("tr", tag("th", "node"), [tag("th", name) for name in names])
    rows = [
        tag("tr", tag("th", node_name(n), scope="row"),
            [tag("td", _cell(figures[n].get(name))) for name in names])
        for n in shown
    ]  # fmt: skip
    more = len(figures) - len(shown)
    rest = tag("p", f"… and {count(more, 'node')} more, in summary.json") if more else None
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="nodes")
    return _folded("Figures of each node", join(tag("div", table, class_="scroll"), rest))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


# Logs ----------------------------------------------------------------------------------------


def logs(run: Run) -> Html | None:
    """Return the ends of the failing node's log and of the submitter's, if a run failed."""
    if run.summary.state == "done":
        return None
    node = run.culprit
    parts = [] if node is None else [_log(node_name(node), run.logs.get(node), is_open=True)]
    if None in run.logs:
        parts.append(_log("the submitter", run.logs[None], is_open=node is None))
    return section("Logs", parts, note=f"The last {TAIL_LINES} lines at most.") if parts else None


def _log(whose: str, text: str | None, *, is_open: bool) -> Html:
    body = tag("pre", text) if text is not None else tag("p", "It did not come back.")
    return tag("details", tag("summary", f"Log of {whose}"), body, open=is_open)
