"""The live page: a shell that stays, and its parts, each of which is sent again when it changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiosgd.dashboard.live import Moment
from aiosgd.display import size
from aiosgd.report import charts, sections
from aiosgd.report.curves import BYS, By
from aiosgd.report.markup import Html, join, tag
from aiosgd.report.page import asset
from aiosgd.report.run import Run
from aiosgd.report.sections import YS, Y
from aiosgd.runtime.archive import RUNNING
from aiosgd.runtime.job import node_name
from aiosgd.runtime.survey import Fate, Seen
from aiosgd.runtime.visit import Status

PARTS = ("head", "tiles", "nodes", "curves", "time", "traffic", "stale", "shape", "logs", "about")
JOBS = 12  # of the history

ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
OWN = {"live.css": "text/css", "live.js": "text/javascript"}


@dataclass(frozen=True)
class View:
    """What the switches of the curves are set to."""

    by: By = "step"
    y: Y = "plain"

    @classmethod
    def of(cls, chosen: Mapping[str, str]) -> View:
        """Return a view by the names of its settings; what is none is the default."""
        by = next((one for one in BYS if one == chosen.get("by")), cls.by)
        return cls(by, next((one for one in YS if one == chosen.get("y")), cls.y))


def files() -> dict[str, tuple[str, str]]:
    """Return what the page needs beside itself: name -> its text and media type."""
    found = {name: (asset(name), kind) for name, kind in ASSETS.items()}
    own = {name: Path(__file__).with_name(name).read_text("utf-8") for name in OWN}
    return found | {name: (own[name], kind) for name, kind in OWN.items()}


def shell(title: str) -> str:
    """Return the page without its contents.

    Args:
        title: of the cluster.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} - aiosgd"),
        tag("link", rel="icon", href="data:,"),
        [tag("link", rel="stylesheet", href=name) for name in ("page.css", "live.css")],
    )
    waiting = tag("noscript", tag("p", "This page needs JavaScript: it changes as jobs run."))
    parts: dict[str, Html] = {name: tag("div", id=name) for name in PARTS}
    parts["curves"] = sections.curves_section([])
    content = tag(
        "body",
        charts.ARROW,
        tag("main", tag("p", "connecting …", id="link", role="status"), waiting, parts.values()),
        tag("script", src="page.js"),
        tag("script", src="live.js", type="module"),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, content, lang="en") + "\n"


class Drawing:
    """Draws the parts of the page; what depends on the job alone is drawn once.

    Args:
        title: of the cluster.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._shapes: tuple[str, Html | None] = ("", None)

    def parts(self, now: Moment, view: View) -> dict[str, Html]:
        """Return the contents of all parts."""
        run = now.run
        tables = sections.tables(run) if run else None
        return {
            "head": join(self._head(now), _trouble(now)),
            "nodes": _nodes(now) if now.all_asked else Html(),
            **(self._of_run(run, view) if run else dict.fromkeys(_OF_RUN, Html())),
            "about": join(tables, _history(now.fates) if now.fates else None),
        }

    def _of_run(self, run: Run, view: View) -> dict[str, Html]:
        over = run.summary.state != RUNNING
        return {
            "tiles": sections.tiles(run),
            "curves": join(sections.figures([run], (view.by,), (view.y,))),
            "time": join(sections.timeline(run)),
            "traffic": join(sections.traffic(run)),
            "stale": join(sections.staleness([run]) if run.job.mode == "async" else None),
            "shape": join(self._shape(run)),
            "logs": join(sections.logs(run) if over and run.logs else None),
        }

    def _shape(self, run: Run) -> Html | None:
        job_id, drawn = self._shapes
        if job_id != run.summary.job_id:
            drawn = sections.topology(run) if _can_be_drawn(run) else None
            self._shapes = run.summary.job_id, drawn
        return drawn

    def _head(self, now: Moment) -> Html:
        fate, run = now.fate, now.run
        if not now.all_asked:
            return tag("header", tag("h1", self._title), tag("p", "asking the nodes …"))
        if fate is None:
            said = "no job runs, and there was none yet" if now.answers else ""
            return tag("header", tag("h1", self._title), tag("p", said))
        runs = fate.state == RUNNING
        title = fate.job_id if run is None else join(fate.job_id, sections.state(run))
        return tag(
            "header",
            tag("p", self._title, "" if runs else ": no job runs; the newest", class_="note"),
            tag("h1", title),
            tag("p", sections.sentence(run)) if run else None,
            _progress(now, run) if runs and run else None,
            data_title=f"{fate.state} {fate.job_id}",
        )


def _can_be_drawn(run: Run) -> bool:
    """Tell whether a topology may be made here, though a node says which.

    Nodes get the links in a file's place, so none of this machine is read; and of more workers than
    have links in a picture, some options would take all memory.
    """
    return run.workers <= charts.DRAWN and not run.job.topology_params.get("file")


_OF_RUN = ("tiles", "curves", "time", "traffic", "stale", "shape", "logs")


def _progress(now: Moment, run: Run) -> Html:
    """Return how far the job is, as its slowest worker is, and how long the rest will take."""
    states = [one.status for one in now.seen if one.status is not None]
    own = [one for one in states if one.job_id == run.summary.job_id and (one.node or 0) >= 0]
    known = [(one.step, one.steps) for one in own if one.step is not None and one.steps]
    if not known:
        return tag("p", "it is about to begin", class_="note")
    step, steps = min(known)
    took = run.summary.train_s
    left = f", about {_span(took / step * (steps - step))} left" if step and took else ""
    words = f"step {step:,} of {steps:,}, epoch {run.summary.epochs or 1:,}{left}"
    bar = tag("progress", max=steps, value=step, aria_label="steps")
    return tag("p", bar, " ", words, class_="progress")


def _span(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _trouble(now: Moment) -> Html | None:
    """Return what is wrong: silent nodes, then the job."""
    silent, run = [one for one in now.seen if one.error], now.run
    if not now.all_asked:
        return None
    if silent and not now.answers:
        said = [tag("p", tag("strong", "No node answers. "), "The page shows what was known last.")]
        said += [tag("p", f"{one.place}: {one.error}") for one in silent[: sections.ROWS]]
        return join(tag("div", said, class_="box bad"), sections.trouble(run) if run else None)
    return sections.trouble(run) if run else None


# Nodes and jobs ------------------------------------------------------------------------------

_COLUMNS = ("node", "address", "state", "step", "loss", "samples/s", "traffic", "checkpoint", "why")
_SEATS = {"quiet": "has trained", "collected": "has trained"}


def _nodes(now: Moment) -> Html:
    """Return a row per node of the cluster, those that do not answer first."""
    ordered = sorted(now.seen, key=lambda one: not one.error)
    rows = [_node(one, now.fate) for one in ordered[: sections.NODES]]
    more = len(ordered) - len(rows)
    rest = tag("p", f"… and {sections.count(more, 'node')} more", class_="note") if more else None
    return sections.section("Nodes", _listed(_COLUMNS, rows), rest)


def _listed(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """Return a table; columns that say nothing are left out."""
    shown = [i for i in range(len(names)) if any(row[i] for row in rows)]
    head = tag("tr", [tag("th", names[i], scope="col") for i in shown])
    kinds = [name if name == "why" else None for name in names]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [tag("td", row[i], class_=kinds[i]) for i in shown[1:]],
        )
        for row in rows
    ]
    table = tag("table", tag("thead", head), tag("tbody", body), class_="nodes")
    return tag("div", table, class_="scroll")


def _node(one: Seen, fate: Fate | None) -> list[str]:
    status, address = one.status, str(one.address)
    if status is None:
        nothing = [""] * (len(_COLUMNS) - 4)
        return [one.place, address, tag("span", "no answer", class_="failed"), *nothing, one.error]
    other = status.job_id and fate is not None and status.job_id != fate.job_id
    state = f"{_state(status)}: {status.job_id}" if other else _state(status)
    return [_name(status) or one.place, address, state, *_figures(status), status.failure]


def _name(status: Status) -> str:
    return "" if status.node is None else node_name(status.node)


def _state(status: Status) -> str:
    """Return what a node does, in a word or two."""
    if status.failure:
        return "failing"
    if status.seat == "running" and status.node is not None:
        return "trains" if status.node >= 0 else "serves"
    return _SEATS.get(status.seat, status.seat)


def _figures(status: Status) -> list[str]:
    steps = f" of {status.steps:,}" if status.steps and (status.node or 0) >= 0 else ""
    return [
        "" if status.step is None else f"{status.step:,}{steps}",
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.samples_per_s is None else f"{status.samples_per_s:,.0f}",
        "" if status.bytes_per_s is None else f"{size(status.bytes_per_s)}/s",
        "" if status.checkpoint is None else f"step {status.checkpoint:,}",
    ]


def _history(fates: Sequence[Fate]) -> Html:
    """Return the jobs that the nodes remember, newest first."""
    names = ("job", "state", "began", "took", "why")
    return sections.section("Jobs of these nodes", _listed(names, [_fate(f) for f in fates[:JOBS]]))


def _fate(one: Fate) -> list[str]:
    began = "" if one.began is None else time.strftime("%d %b %H:%M:%S", time.localtime(one.began))
    took = "" if one.took is None else _span(one.took)
    return [one.job_id, one.state, began, took, one.reason]
