"""A report as people read it, and as a folder."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

from aiosgd.check import chart
from aiosgd.check.runner import Failure, Outcome, Report
from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import describe

NAME_WIDTH = 12


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """Yield the lines on a check: what it found, or how much it tried."""
    state = "ok" if outcome.passed else "FAILED"
    count = f"{outcome.runs} run{'s' * (outcome.runs != 1)}"
    yield f"{outcome.check:<{NAME_WIDTH}} {state:<6} {count:>9} {outcome.seconds:7.2f} s  {outcome.text}"
    if outcome.check == "traffic":  # of each mode the last, with the most workers
        yield from {note.partition(",")[0]: f"    {note}" for note in outcome.notes}.values()
    for known in outcome.known:
        yield f"    as {known}"
    for failure in outcome.failures:
        yield from failure_lines(failure)


def failure_lines(failure: Failure) -> Iterator[str]:
    """Yield the lines on a failure: what is wrong, what replays it, and what happens there."""
    yield f"    {failure.error}"
    yield f"    replay: {failure.command}"
    yield from (f"    {line}".rstrip() for line in chart.text(failure.story).splitlines())


def text(report: Report) -> str:
    """Return a report as text."""
    lines = [line for outcome in report.outcomes for line in outcome_lines(outcome)]
    return "\n".join([*lines, *last_lines(report)])


def last_lines(report: Report) -> list[str]:
    """Return what is wrong with the class itself, and the verdict in one line."""
    runs = sum(outcome.runs for outcome in report.outcomes)
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    failed = [outcome.check for outcome in report.outcomes if not outcome.passed]
    if report.flaws:
        return [*report.flaws, f"codec {report.codec} FAILED: its class is wrong; nothing was run"]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "passed"
    return [f"codec {report.codec} {verdict}; {runs} runs in {seconds:.1f} s"]


def write(report: Report, folder: Path) -> Path:
    """Write `check-…` into a folder: report.json, and a chart of each failure as SVG.

    Returns:
        The new folder.

    Raises:
        ConfigError: it cannot be written.
    """
    own = folder / f"check-{Path(report.codec.rpartition(':')[2]).name}-{secrets.token_hex(2)}"
    try:
        own.mkdir(parents=True)
        (own / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        for failure in report.failures:
            name = f"{failure.case.check}-{failure.case.mode}.svg"
            (own / name).write_text(chart.svg(failure.story))
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written ({describe(error)})") from error
    return own
