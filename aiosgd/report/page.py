"""Runs -> one HTML page that needs nothing else: no network, no library, and no script to be read.

All charts are in the page; its switches are radio buttons that the style sheet looks at. The script
only tells the values under the pointer.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from aiosgd.report import charts, sections
from aiosgd.report.facts import Fact, difference, facts, options
from aiosgd.report.markup import Html, join, tag
from aiosgd.report.run import Run
from aiosgd.report.sections import LETTERS


def page(runs: Sequence[Run]) -> str:
    """Return the page of a run, or of several beside each other."""
    if len(runs) == 1:
        title, body = runs[0].summary.job_id, _single(runs[0])
    else:
        title, body = f"{len(runs)} runs", _compared(runs)
    style, script = asset("page.css"), asset("page.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("title", f"{title} - aiosgd report"),
        tag("style", Html(style)),
    )
    content = tag("body", charts.ARROW, tag("main", body), tag("script", Html(script)))
    return "<!DOCTYPE html>\n" + tag("html", head, content, lang="en") + "\n"


def asset(name: str) -> str:
    """Return a style sheet or a script: `page.css`, `page.js`."""
    return Path(__file__).with_name(name).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    """Allow this page's script and styles, and nothing else from anywhere."""
    return f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# Pages ---------------------------------------------------------------------------------------


def _single(run: Run) -> Html:
    return join(
        tag(
            "header",
            tag("h1", run.summary.job_id, sections.state(run)),
            tag("p", sections.sentence(run)),
        ),
        sections.trouble(run),
        sections.tiles(run),
        sections.logs(run),
        sections.curves_of([run]),
        _details(run),
    )


def _compared(runs: Sequence[Run]) -> Html:
    return join(
        tag("header", tag("h1", f"{len(runs)} runs compared"), _legend(runs)),
        [sections.trouble(run, LETTERS[i]) for i, run in enumerate(runs)],
        _differences(runs),
        sections.curves_of(runs),
        sections.staleness(runs),
        [
            tag(
                "details",
                tag(
                    "summary",
                    sections.swatch(i),
                    f" {run.summary.job_id}: its nodes, options and figures",
                ),
                sections.logs(run),
                _details(run),
                class_="run",
            )
            for i, run in enumerate(runs)
        ],
    )


def _details(run: Run) -> Html:
    """Return what is about one run alone."""
    return join(
        sections.timeline(run),
        sections.traffic(run),
        sections.staleness([run]) if run.job.mode == "async" else None,
        sections.topology(run),
        sections.tables(run),
    )


def _legend(runs: Sequence[Run]) -> Html:
    return tag(
        "ul",
        [
            tag("li", sections.swatch(i), tag("b", run.summary.job_id), tag("p", sections.sentence(run)), sections.state(run))
            for i, run in enumerate(runs)
        ],
        class_="legend",
    )  # fmt: skip


def _differences(runs: Sequence[Run]) -> Html:
    """Return how runs differ: what came out, then the options that are not the same in all."""
    values = [options(run.job) for run in runs]
    names = list(dict.fromkeys(name for one in values for name in one))
    differ = [name for name in names if len({one.get(name) for one in values}) > 1]
    head = tag(
        "tr", tag("th"), [tag("th", sections.swatch(i), scope="col") for i in range(len(runs))]
    )
    outcome = [_fact_row(row) for row in zip(*map(facts, runs), strict=True)]
    chosen = [
        tag("tr", tag("th", name, scope="row"), [tag("td", one.get(name, "-")) for one in values])
        for name in differ
    ]
    span = len(runs) + 1
    bodies = [
        tag("tbody", tag("tr", tag("th", "Results", colspan=span, class_="part")), outcome),
        tag("tbody", tag("tr", tag("th", "Options", colspan=span, class_="part")), chosen),
    ]
    table = tag("table", tag("thead", head), bodies[: 2 if chosen else 1], class_="compare")
    note = f"Differences are from A. {len(names) - len(differ)} options are the same in all runs."
    return sections.section("Differences", tag("div", table, class_="scroll"), note=note)


def _fact_row(row: Sequence[Fact]) -> Html | None:
    if not any(fact.text for fact in row):
        return None
    same = len({fact.text for fact in row}) == 1
    cells = [
        tag(
            "td",
            fact.text or "-",
            tag("small", " ", difference(row[0], fact)) if i and not same else None,
        )
        for i, fact in enumerate(row)
    ]
    return tag("tr", tag("th", row[0].name, scope="row"), cells, class_="same" if same else None)
