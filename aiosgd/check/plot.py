"""What both kinds of charts are drawn from: a story's nodes, messages, rows and endings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from aiosgd.check.story import Kind, Moment
from aiosgd.runtime.job import node_name

End: TypeAlias = Literal["waits", "crashed", "failed", "done", "ran"]

FINE: tuple[End, ...] = ("done", "ran")
TROUBLE: tuple[Kind, ...] = ("wait", "crash", "fail")


class Gap(NamedTuple):
    """Rows that a chart leaves out, and when they were."""

    events: int
    start: float
    end: float


_Messages: TypeAlias = dict[tuple[int, int, int], Moment]
Row: TypeAlias = Moment | Gap


class Ending(NamedTuple):
    """How a node ended: in a word, and in a sentence."""

    word: End
    sentence: str


def link_of(moment: Moment) -> tuple[int, int, int]:
    """Return what the two ends of a message have in common: sender, receiver, number."""
    assert moment.peer is not None
    if moment.kind == "deliver":
        return moment.peer, moment.node, moment.number
    return moment.node, moment.peer, moment.number


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _about(moment: Moment) -> str:
    return f"{_one_line(moment.label)}, step {moment.step}".removeprefix(", ")


@dataclass
class Plot:
    """What both charts are drawn from.

    Attributes:
        moments: those of the nodes that have a column.
        nodes: these, servers first.
        ends: a message's two ends -> where it ended, if it did.
        sends: the same -> where it began.
        endings: node -> how it ended.
        notes: what is left out.
        is_counted: whether times are the moments' numbers.
    """

    moments: list[Moment]
    nodes: list[int]
    ends: _Messages
    sends: _Messages
    endings: dict[int, Ending]
    notes: list[str]
    is_counted: bool

    @classmethod
    def of(cls, story: Iterable[Moment], most: int) -> Plot:
        """Prepare a story for a chart of at most so many nodes."""
        moments = list(story)
        nodes, notes = _choose(moments, most)
        ends = {
            link_of(m): m for m in moments if m.kind in ("deliver", "drop") and m.peer is not None
        }
        sends = {link_of(m): m for m in moments if m.kind == "send" and m.peer is not None}
        endings = {node: _ending(node, moments, sends, ends) for node in nodes}
        shown = [m for m in moments if {m.node, m.node if m.peer is None else m.peer} <= {*nodes}]
        is_counted = all(float(m.time).is_integer() for m in moments)
        return cls(shown, nodes, ends, sends, endings, notes, is_counted)

    def is_whole(self, moment: Moment) -> bool:
        """Tell whether this is the sending of a message that has an end."""
        return moment.kind == "send" and link_of(moment) in self.ends

    def said(self, moment: Moment) -> str:
        """Return what a moment's row says, on one line."""
        label = _one_line(moment.label)
        match moment.kind:
            case "update":
                return f"update {_about(moment)}"
            case "result":
                return f"result of step {moment.step}{label and f': {label}'}"
            case "crash":
                return f"crashes{label and f': {label}'}"
            case "fail":
                return f"fails: {label}"
            case "drop":
                sent = self.sends.get(link_of(moment))
                return f"{_fate(sent, moment)}: {_about(sent or moment)}"
            case "send":
                return f"undelivered: {_about(moment)}"
        return _about(moment)

    def gap(self, row: Gap) -> str:
        """Return what a gap says."""
        when = f"{self.time(row.start)} to {self.time(row.end)}"
        return f"… {row.events} events left out, {when} …"

    def time(self, seconds: float) -> str:
        """Return a time as the chart writes it: moments are counted, seconds have a point."""
        return f"{seconds:.0f}" if self.is_counted else f"{seconds:.6f}"


def _fate(sent: Moment | None, end: Moment | None) -> str:
    """Return what became of a message that was not handled."""
    if end is None:
        return "under way"
    reason = _one_line(end.label)
    return reason if sent and reason not in ("", _one_line(sent.label)) else "lost"


def _choose(moments: Sequence[Moment], most: int) -> tuple[list[int], list[str]]:
    """Return the nodes that get a column, and what to say of the others."""
    everybody = {m.node for m in moments} | {m.peer for m in moments if m.peer is not None}
    order = sorted(everybody, key=lambda node: (node >= 0, abs(node)))
    if len(order) <= most:
        return order, []
    troubled = {m.node for m in moments if m.kind in TROUBLE}
    chosen = sorted(order, key=lambda node: node >= 0 and node not in troubled)[:most]
    absent = everybody - {*chosen}
    count = sum(m.node in absent or m.peer in absent for m in moments)
    note = f"… {len(absent)} of {len(order)} nodes left out, with {count} events …"
    return [node for node in order if node in chosen], [note]


def _ending(node: int, moments: Sequence[Moment], sends: _Messages, ends: _Messages) -> Ending:
    own = [m for m in moments if m.node == node]
    last = next((m for m in reversed(own) if m.kind in TROUBLE), None)
    if last is None:
        results = [m.step for m in own if m.kind == "result"]
        if not results:
            return Ending("ran", "no result, no error")
        return Ending("done", f"done, last result of step {results[-1]}")
    label = _one_line(last.label)
    if last.kind == "crash":
        return Ending("crashed", f"crashed in step {last.step}{label and f': {label}'}")
    if last.kind == "fail":
        return Ending("failed", f"failed in step {last.step}: {label}")
    waits = label if label.startswith("waits") else f"waits in step {last.step} for {label}"
    return Ending("waits", waits + _missing(last, sends, ends))


def _missing(wait: Moment, sends: _Messages, ends: _Messages) -> str:
    """Say which messages to a waiting node it never had; those of later steps only count."""
    missing = [
        (sent, end)
        for key, sent in sends.items()
        if sent.peer == wait.node and ((end := ends.get(key)) is None or end.kind == "drop")
    ]
    now = [(sent, end) for sent, end in missing if sent.step <= wait.step]
    said = [
        f"{_about(sent)}, from {node_name(sent.node)} ({_fate(sent, end)})" for sent, end in now[:3]
    ]
    if now[3:]:
        said.append(f"{len(now) - 3} more")
    if len(missing) > len(now):
        said.append(f"{len(missing) - len(now)} of later steps")
    return f"; undelivered: {'; '.join(said)}" if said else ""


def cut(rows: list[Moment], most: int) -> list[Row]:
    """Leave out the middle of too many rows; the end says more than the beginning."""
    if len(rows) <= most:
        return [*rows]
    head = most // 3
    tail = len(rows) - (most - head)
    gap = Gap(tail - head, rows[head].time, rows[tail - 1].time)
    return [*rows[:head], gap, *rows[tail:]]


def shorten(text: str, size: int) -> str:
    """Cut a text to so many characters; its step stays."""
    if len(text) <= size:
        return text
    _, comma, step = text.rpartition(", step ")
    tail = "…" + comma + step if comma else "…"
    return text[: max(0, size - len(tail))] + tail[: max(0, size)]
