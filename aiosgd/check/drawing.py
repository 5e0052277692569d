"""Message sequence charts as drawings: SVG that any browser shows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from aiosgd.check.plot import FINE, Gap, Plot, Row, cut, link_of, shorten
from aiosgd.check.story import Moment
from aiosgd.runtime.job import node_name

SVG_ROWS = 160
SVG_NODES = 16
ROW = 20
"""Pixels from one row to the next; the text of each has its row for itself."""
CHARACTER = 7.3
"""Pixels that a character of 12 pixels takes in the widest of the usual fixed-width fonts."""
LABELS = 24, 46, 140
"""Characters of a row's text: at least, at most, and together over all columns."""
STEP_COLOURS = ("#1f4e9c", "#7a3e9d", "#0b6b5e", "#8a5a00", "#5b5f66")
WARNING, WARNING_FILL = "#b42318", "#fff1d6"

_STYLE = """
text { font: 12px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #222; }
.name { font-weight: bold; } .time { fill: #667; text-anchor: end; } .note { fill: #667; }
.row { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round; }
.bad { fill: #b42318; } .badge { font-weight: bold; text-anchor: middle; }
.life { stroke: #b8bcc4; } .waits { stroke: #e8a33d; stroke-width: 3; }
.lost { stroke: #b42318; stroke-dasharray: 5 4; }
line { stroke-width: 1.3; }
"""


def svg(moments: Iterable[Moment]) -> str:
    """Return a chart as an SVG document that needs nothing else.

    An arrow goes from the row in which its message was sent to the one in which it arrived, in a
    colour of its step. What never arrives is dashed and red; the lifeline of a node that waits is
    yellow from the last thing on that happened to it.
    """
    plot = Plot.of(moments, SVG_NODES)
    rows = cut([m for m in plot.moments if m.kind != "wait"], SVG_ROWS)
    return _Drawing(plot, rows).document()


class _Drawing:
    """Lays a chart out in pixels.

    Args:
        plot: what to draw.
        rows: what happened, one below the other.
    """

    def __init__(self, plot: Plot, rows: Sequence[Row]) -> None:
        self.plot = plot
        self.rows = rows
        said = [plot.said(row) for row in rows if isinstance(row, Moment) and self._speaks(row)]
        least, most, together = LABELS
        self.label = min(most, max(least, together // max(1, len(plot.nodes))))
        longest = min(self.label, max(map(len, said), default=0))
        times = [len(plot.time(m.time)) for m in plot.moments]
        self.gutter = 24 + CHARACTER * max(times, default=4)
        self.pitch = max(120.0, CHARACTER * longest + 26)
        first = self.gutter + (self.pitch if self._needs_left(rows) else 60)
        self.x = {node: first + i * self.pitch for i, node in enumerate(plot.nodes)}
        self.top = 56
        self.bottom = self.top + ROW * len(rows)
        self.shown = {id(row) for row in rows}
        self.y: dict[int, float] = {}  # id of a moment -> the middle of its row
        self._place()

    def _place(self) -> None:
        hidden = None
        for i, row in enumerate(self.rows):
            middle = self.top + ROW * (i + 0.5)
            if isinstance(row, Moment):
                self.y[id(row)] = middle
            else:
                hidden = middle
        if hidden is not None:
            for moment in self.plot.moments:
                self.y.setdefault(id(moment), hidden)

    def _needs_left(self, rows: Sequence[Row]) -> bool:
        """Tell whether a text stands to the left of the first lifeline."""
        first = self.plot.nodes[:1]
        return any(
            isinstance(row, Moment)
            and self._speaks(row)
            and row.peer not in (None, row.node)
            and first == [row.node if row.kind in ("send", "deliver") else row.peer]
            for row in rows
        )

    def _speaks(self, row: Moment) -> bool:
        """Tell whether a row has a text: a message says at its end what it is."""
        return not self.plot.is_whole(row)

    def document(self) -> str:
        """Return the whole document."""
        notes = [(False, note) for note in self.plot.notes]
        for node, ending in self.plot.endings.items():
            notes.append((ending.word not in FINE, f"{node_name(node)}  {ending.sentence}"))
        widest = max((CHARACTER * len(note) for _, note in notes), default=0) + 40
        last = max(self.x.values(), default=self.gutter)
        width = max(last + self.pitch, min(widest, 1000))
        folded = [line for bad, note in notes for line in self._fold(bad, note, width)]
        height = self.bottom + 56 + ROW * len(folded)
        body = [*self._lifelines(), *self._arrows(), *self._texts(), *self._notes(folded, width)]
        size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                "<title>Message sequence chart</title>",
                f"<style>{_STYLE}</style>",
                '<rect width="100%" height="100%" fill="#fff"/>',
                *body,
                "</svg>\n",
            ]
        )

    def _fold(self, bad: bool, note: str, width: float) -> list[tuple[bool, str]]:
        """Break a note into lines; each says whether it warns."""
        size = int((width - 40) / CHARACTER)
        return [(bad, line) for line in textwrap.wrap(note, size, subsequent_indent="    ")]

    def _lifelines(self) -> list[str]:
        """Draw each node's line: to its end, in a warning colour while it waits."""
        drawn = []
        for node, x in self.x.items():
            ending = self.plot.endings[node]
            own = [m for m in self.plot.moments if m.node == node and m.kind != "wait"]
            last = max((self.y[id(m)] for m in own), default=self.top)
            end = last if ending.word == "crashed" else self.bottom + 8
            drawn.append(_line(x, self.top - 10, x, end, "life"))
            if ending.word == "waits":
                drawn.append(_line(x, last, x, end, "waits"))
            drawn.append(self._badge(x, self.top - 30, node_name(node), "#eef0f4", "name"))
            fill = "#e4f3e6" if ending.word in FINE else WARNING_FILL
            drawn.append(self._badge(x, self.bottom + 10, ending.word, fill, ""))
        return drawn

    def _badge(self, x: float, y: float, said: str, fill: str, style: str) -> str:
        width = CHARACTER * len(said) + 16
        box = f'<rect x="{x - width / 2:.1f}" y="{y}" width="{width:.1f}" height="20" rx="4" '
        return f'{box}fill="{fill}"/>{_text(x, y + 14, said, f"badge {style}")}'

    def _arrows(self) -> list[str]:
        drawn = []
        for moment in self.plot.moments:
            if moment.peer is None or moment.peer == moment.node:
                continue
            sent, end = self._ends(moment)
            if moment is (sent if end is None else end):
                drawn += self._arrow(moment, sent, end)
        return drawn

    def _ends(self, moment: Moment) -> tuple[Moment | None, Moment | None]:
        key = link_of(moment)
        if moment.kind == "send":
            return moment, self.plot.ends.get(key)
        return self.plot.sends.get(key), moment

    def _arrow(self, moment: Moment, sent: Moment | None, end: Moment | None) -> list[str]:
        """Draw a message from where it was sent to where it ended; three rows if it did not."""
        sender, receiver, _ = link_of(moment)
        if not {id(sent), id(end)} & self.shown:
            return []
        y2 = self.y[id(end)] if end else self.y[id(moment)] + ROW
        y1 = self.y[id(sent)] if sent else y2
        x1, x2 = self.x[sender], self.x[receiver]
        if end is not None and end.kind == "deliver":
            colour = STEP_COLOURS[moment.step % len(STEP_COLOURS)]
            return [_line(x1, y1, x2, y2, "", colour), _head(x1, y1, x2, y2, colour)]
        side = 1 if x1 < x2 else -1
        if end is None:  # it stops short of the next lifeline
            x2 = x1 + side * self.pitch * 0.6
            return [_line(x1, y1, x2, y2, "lost"), _ring(x2, y2)]
        x2 -= side * 16
        return [_line(x1, y1, x2, y2, "lost"), _cross(x2, y2)]

    def _texts(self) -> list[str]:
        drawn, before = [], ""
        for row in self.rows:
            if isinstance(row, Gap):
                drawn.append(self._gap(row))
                continue
            y, when = self.y[id(row)], self.plot.time(row.time)
            if when != before:
                drawn.append(_text(self.gutter - 8, y + 4, when, "time"))
            before = when
            drawn.append(self._mark(row, y))
            if self._speaks(row):
                drawn.append(self._said(row, y))
        return drawn

    def _gap(self, row: Gap) -> str:
        y = self.top + ROW * self.rows.index(row)
        box = f'<rect x="0" y="{y}" width="100%" height="{ROW}" fill="#f2f3f5"/>'
        return box + _text(self.gutter, y + 14, self.plot.gap(row), "note")

    def _mark(self, row: Moment, y: float) -> str:
        x = self.x[row.node]
        match row.kind:
            case "update":
                return f'<rect x="{x - 4:.1f}" y="{y - 4}" width="8" height="8" fill="#444"/>'
            case "result":
                return f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="#2e7d32"/>'
            case "crash" | "fail":
                return _cross(x, y)
            case "send":
                return f'<circle cx="{x:.1f}" cy="{y}" r="2.5" fill="#444"/>'
        return ""

    def _said(self, row: Moment, y: float) -> str:
        """Write a row's text beside its lifeline, on the side that its arrow does not come from."""
        full = self.plot.said(row)
        sender, receiver, _ = (row.node, row.node, 0) if row.peer is None else link_of(row)
        place = sender if row.kind == "send" else receiver
        other = receiver if row.kind == "send" else sender
        leftward = self.x[place] < self.x[other]
        x = self.x[place] + (-10 if leftward else 10)
        bad = "bad" if row.kind in ("send", "drop", "crash", "fail") else ""
        anchor = ' text-anchor="end"' if leftward else ""
        return _text(x, y + 4, shorten(full, self.label), f"row {bad}", anchor, full)

    def _notes(self, folded: Sequence[tuple[bool, str]], width: float) -> list[str]:
        drawn = []
        for i, (bad, line) in enumerate(folded):
            y = self.bottom + 44 + ROW * i
            if bad:
                box = f'<rect x="12" y="{y}" width="{width - 24:.0f}" height="{ROW}" '
                drawn.append(f'{box}fill="{WARNING_FILL}"/>')
            drawn.append(_text(20, y + 14, line, "" if bad else "note", ' xml:space="preserve"'))
        return drawn


def _text(x: float, y: float, said: str, style: str, more: str = "", full: str = "") -> str:
    title = f"<title>{_clean(full)}</title>" if full not in ("", said) else ""
    kind = f' class="{style.strip()}"' if style.strip() else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{more}>{_clean(said)}{title}</text>'


def _clean(said: str) -> str:
    """Return text as XML has it; what is no character there becomes a sign that says so."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said))


def _line(x1: float, y1: float, x2: float, y2: float, style: str, colour: str = "") -> str:
    look = f'stroke="{colour}"' if colour else f'class="{style}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def _head(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Draw the head of an arrow at its end."""
    angle = math.atan2(y2 - y1, x2 - x1)
    corners = ((0, 0), (-9, 4), (-9, -4))
    points = " ".join(
        f"{x2 + dx * math.cos(angle) - dy * math.sin(angle):.1f},"
        f"{y2 + dx * math.sin(angle) + dy * math.cos(angle):.1f}"
        for dx, dy in corners
    )
    return f'<polygon points="{points}" fill="{colour}"/>'


def _cross(x: float, y: float) -> str:
    path = f"M{x - 5:.1f} {y - 5:.1f} l10 10 m0 -10 l-10 10"
    return f'<path d="{path}" stroke="{WARNING}" stroke-width="2.5"/>'


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#fff" stroke="{WARNING}"/>'
