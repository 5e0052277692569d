"""Charts as SVG: lines with bands, bars, staircases, circles.

Colours are classes of the page's style sheet, so that a chart follows its light and dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from aiosgd.plugins.topologies import Graph
from aiosgd.report.curves import Curve, Floats
from aiosgd.report.markup import Html, tag

Scale: TypeAlias = Literal["plain", "whole", "seconds", "bytes"]

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 50, 10, 36
TICKS = 5
_TINY = 1e-290  # what is less counts as 0: its own fractions would
_MIDDLE = (LEFT + WIDTH - RIGHT) / 2
_LETTER = 7.5  # the width that one takes, with some room
# a topology's picture: what can still be told apart
NAMED, DRAWN = 40, 400

_UNITS: dict[Scale, tuple[tuple[float, str], ...]] = {
    "seconds": ((3600, "hours"), (60, "minutes"), (1, "seconds"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")),
}


# Axes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A range of values, how it is divided, and in which unit.

    Attributes:
        low, high: its ends.
        factor, unit: values are written as so many of a unit.
        is_log: whether equal factors take equal room.
        is_whole: whether values between whole numbers mean nothing.
    """

    low: float
    high: float
    factor: float = 1.0
    unit: str = ""
    is_log: bool = False
    is_whole: bool = False

    @classmethod
    def over(
        cls,
        values: Iterable[Floats],
        scale: Scale = "plain",
        *,
        zero: bool = False,
        log: bool = False,
    ) -> Axis:
        """Return an axis on which all values have room.

        Args:
            values: finite ones; of a logarithmic axis more than 0.
            scale: what they are.
            zero: whether it begins at 0; a logarithmic one never does.
            log: whether it is logarithmic.
        """
        joined = np.concatenate([np.empty(0), *values])
        low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
        units = _UNITS.get(scale, ((1.0, ""),))
        if log:
            low, high = low / 1.05, high * 1.05
        elif zero:
            low = min(low, 0.0)
        if high - low <= 1e-12 * max(abs(low), abs(high), _TINY):
            low, high = (0.0, 1.0) if abs(low) < _TINY else (low - abs(low), low + abs(low))
        factor, unit = next((one for one in units if high >= one[0]), units[-1])
        return cls(low, high, factor, unit, log, scale == "whole")

    def rounded(self) -> Axis:
        """Return the axis with its ends at ticks."""
        if self.is_log:
            return self
        step = self._step()
        low, high = (
            math.floor(self.low / step + 1e-9) * step,
            math.ceil(self.high / step - 1e-9) * step,
        )
        return replace(self, low=low, high=high)

    def _step(self) -> float:
        """Return a distance of ticks: 1, 2 or 5 times a power of ten of the unit."""
        raw = (self.high / self.factor - self.low / self.factor) / TICKS
        raw = max(raw, 1.0) if self.is_whole else raw
        power = 10.0 ** math.floor(math.log10(raw))
        return self.factor * power * next(m for m in (1, 2, 5, 10, 20) if m * power >= raw * 0.999)

    def ticks(self) -> list[tuple[float, str]]:
        """Return where ticks are, and what they say."""
        if self.is_log:
            return [(value, f"{value / self.factor:g}") for value in self._log_ticks()]
        step = self._step()
        count = math.floor((self.high - self.low) / step + 1e-6)
        first = math.ceil(self.low / step - 1e-6)
        values = [(first + i) * step for i in range(count + 1)]
        return [(v, tick_text(v / self.factor, step / self.factor)) for v in values if self.has(v)]

    def _log_ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = range(first, last + 1, max(1, (last - first) // TICKS))
        for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            values = [m * 10.0**power for power in powers for m in factors]
            found = [value for value in values if self.has(value)]
            if len(found) >= 3:
                break
        return found

    def has(self, value: float) -> bool:
        """Tell whether a value is on the axis, but for rounding."""
        slack = 0 if self.is_log else 1e-6 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack

    def at(self, values: Floats | float) -> Floats:
        """Return how far along the axis values are, 0 to 1."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            return (np.log(values) - low) / (high - low)
        return (np.asarray(values, float) / self.factor - self.low / self.factor) / (
            self.high / self.factor - self.low / self.factor
        )

    def __str__(self) -> str:
        return f"{self.low:.9g} {self.high:.9g} {self.factor:g} {self.is_log:d} {self.unit}"


def tick_text(value: float, step: float) -> str:
    """Return a tick's number with the digits that its step has."""
    if abs(value) >= 1e6 or step < 1e-5:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


# Lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A curve of a chart: which colour it has, what stands at its end, what it is called."""

    curve: Curve
    colour: int
    label: str
    name: str


def lines(
    series: Sequence[Series], x: Axis, y: Axis, caption: str, described: str, class_: str = ""
) -> Html:
    """Return a chart of curves; a band is drawn where it is wider than the line.

    Args:
        series: what to draw; on a log scale only what is more than 0.
        x, y: the axes.
        caption: below the x axis.
        described: what it says, for those who do not see it.
        class_: of the element.
    """
    drawn = [_clipped(one, y) for one in series]
    return tag(
        "svg",
        _grid(x, y, caption),
        [_band(one, x, y) for one in drawn],
        [_line(one, x, y) for one in drawn],
        _labels(drawn, x, y),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=described,
        class_=f"chart {class_}".strip(),
        data_x=x,
        data_y=y,
        data_box=f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}",
    )


def positive(curve: Curve) -> Curve:
    """Return what a log scale can show of a curve; a band's end at 0 or below becomes the line."""
    fits = curve.mean > _TINY
    mean, low = curve.mean[fits], curve.low[fits]
    return Curve(curve.x[fits], mean, np.where(low > _TINY, low, mean), curve.high[fits])


def _clipped(series: Series, y: Axis) -> Series:
    if not y.is_log:
        return series
    return Series(positive(series.curve), series.colour, series.label, series.name)


def _grid(x: Axis, y: Axis, caption: str) -> list[Html]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, text in y.ticks():
        top = _number(_down(y, value))
        parts.append(tag("path", d=f"M{LEFT} {top}H{right}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 6, y=top, dy="0.35em", class_="tick end"))
    for value, text in x.ticks():
        left = _number(_across(x, value))
        parts.append(tag("path", d=f"M{left} {bottom}v4", class_="axis"))
        parts.append(tag("text", text, x=left, y=bottom + 15, class_="tick middle"))
    words = f"{caption} ({x.unit})" if x.unit and x.unit not in caption else caption
    return [
        *parts,
        tag("path", d=f"M{LEFT} {bottom}H{right}", class_="axis"),
        tag("text", words, x=_MIDDLE, y=HEIGHT - 4, class_="tick middle"),
    ]


def _across(x: Axis, values: Floats | float) -> Floats:
    return LEFT + x.at(values) * (WIDTH - RIGHT - LEFT)


def _down(y: Axis, values: Floats | float) -> Floats:
    return HEIGHT - BOTTOM - y.at(values) * (HEIGHT - BOTTOM - TOP)


def _number(value: Floats | float) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _points(across: Floats, down: Floats) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in zip(across, down, strict=True))


def _band(one: Series, x: Axis, y: Axis) -> Html | None:
    curve = one.curve
    across, low, high = _across(x, curve.x), _down(y, curve.low), _down(y, curve.high)
    if not len(across) or (low - high).max() < 1:
        return None
    there, back = _points(across, high), _points(across[::-1], low[::-1])
    return tag("polygon", points=f"{there} {back}", class_=f"band {_colour(one)}")


def _line(one: Series, x: Axis, y: Axis) -> Html | None:
    across, down = _across(x, one.curve.x), _down(y, one.curve.mean)
    if not len(across):
        return None
    parts = [
        tag(
            "polyline",
            points=_points(across, down),
            class_=f"line {_colour(one)}",
            data_name=one.name,
        )
    ]
    if len(across) <= 20:
        dots = zip(across, down, strict=True)
        parts += [
            tag("circle", cx=_number(a), cy=_number(d), r=2.5, class_=f"dot {_colour(one)}")
            for a, d in dots
        ]
    return tag("g", parts)


def _colour(one: Series) -> str:
    """Return the classes of a curve's colour: there are 8, then they come dashed."""
    return f"c{one.colour % 8}" + (" dashed" if one.colour >= 8 else "")


def _labels(series: Sequence[Series], x: Axis, y: Axis) -> list[Html]:
    """Return what stands at the ends of curves, moved apart where they would touch."""
    ends = [
        (float(_down(y, one.curve.mean[-1])), float(_across(x, one.curve.x[-1])), one)
        for one in series
        if len(one.curve.x)
    ]
    return [label for column in _columns(ends) for label in _column(column)]


_End: TypeAlias = tuple[float, float, Series]  # from the top, from the left, whose


def _columns(ends: Sequence[_End]) -> list[list[_End]]:
    """Gather the ends that are so near each other from left to right that labels may touch."""
    columns: list[list[_End]] = []
    for end in sorted(ends, key=lambda end: end[1]):
        if columns and end[1] - columns[-1][-1][1] < 2 * _LETTER:
            columns[-1].append(end)
        else:
            columns.append([end])
    return columns


def _column(ends: Sequence[_End]) -> list[Html]:
    ends = sorted(ends, key=lambda end: end[0])
    tops = _apart([top for top, _, _ in ends], 12, TOP + 4, HEIGHT - BOTTOM - 4)
    return [
        tag("text", one.label, x=_number(left + 5), y=_number(top), dy="0.35em",
            class_=f"label {_colour(one)}")
        for top, (_, left, one) in zip(tops, ends, strict=True)
    ]  # fmt: skip


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places so far apart; what goes beyond the high end pushes back."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


# Bars and staircases -------------------------------------------------------------------------


def bars(
    names: Sequence[str], shares: Sequence[tuple[int, Floats]], caption: str, described: str
) -> Html:
    """Return bars of shares, several beside each other.

    Args:
        names: what stands below each group of bars.
        shares: a colour, and the height of its bar in each group, 0 to 1.
        caption: below the names.
        described: what it says, for those who do not see it.
    """
    y = Axis.over([heights for _, heights in shares], zero=True).rounded()
    return tag(
        "svg",
        tag("title", described),
        _percents(y),
        [_group(names, i, shares, y) for i in range(len(names))],
        tag("text", caption, x=_MIDDLE, y=HEIGHT - 4, class_="tick middle"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )


def _percents(y: Axis) -> list[Html]:
    parts = []
    for value, _ in y.ticks():
        top, text = _number(_down(y, value)), f"{100 * value:.3g} %"
        parts.append(tag("path", d=f"M{LEFT} {top}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 6, y=top, dy="0.35em", class_="tick end"))
    return parts


def _group(
    names: Sequence[str], i: int, shares: Sequence[tuple[int, Floats]], y: Axis
) -> list[Html]:
    """Return the bars above one name, and the name where there is room for it."""
    room = (WIDTH - RIGHT - LEFT) / len(names)
    left, each = LEFT + i * room, 0.8 * room / len(shares)
    parts = [
        _bar(left + 0.1 * room + j * each, each, y, heights[i], names[i], colour)
        for j, (colour, heights) in enumerate(shares)
    ]
    if i % math.ceil(max(map(len, names)) * _LETTER / room) == 0:
        middle, low = _number(left + room / 2), HEIGHT - BOTTOM + 15
        parts.append(tag("text", names[i], x=middle, y=low, class_="tick middle"))
    return parts


def _bar(left: float, room: float, y: Axis, height: float, name: str, colour: int) -> Html:
    top = float(_down(y, height))
    return tag(
        "rect",
        tag("title", f"{name}: {100 * height:.2f} %"),
        x=_number(left),
        y=_number(top),
        width=_number(max(room - 1, 0.5)),
        height=_number(HEIGHT - BOTTOM - top),
        class_=f"bar c{colour % 8}",
    )


def staircases(layers: Sequence[tuple[str, Floats]], described: str) -> Html:
    """Return heights, 0 to 1, stacked: a class and its height in each interval, lowest first."""
    total = np.zeros(len(layers[0][1]))
    drawn = []
    for name, heights in layers:
        total = total + heights
        drawn.append(tag("path", d=_staircase(total), class_=name))
    return tag(
        "svg",
        tag("title", described),
        drawn[::-1],
        viewBox=f"0 0 {len(total)} 100",
        preserveAspectRatio="none",
        role="img",
        class_="strip",
    )


def _staircase(heights: Floats) -> str:
    """Return the outline of columns; those of the same height are one."""
    tops = 100 - np.round(100 * np.clip(heights, 0, 1)).astype(int)
    starts = np.flatnonzero(np.diff(tops, prepend=-1))
    ends = [*starts[1:], len(tops)]
    return (
        "M0 100" + "".join(f"V{tops[s]}H{e}" for s, e in zip(starts, ends, strict=True)) + "V100Z"
    )


# Circles -------------------------------------------------------------------------------------

ARROW = Html(
    '<svg width="0" height="0" class="defs" aria-hidden="true"><defs><marker id="arrow" '
    'viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8Z" class="arrow"/></marker></defs></svg>'
)
"""The head of all arrows: once per page that has a circle."""


def circle(graph: Graph, described: str) -> Html:
    """Return workers on a circle and the links between them, those of all steps of a period.

    A link that goes both ways is a line, another one an arrow; of many workers only the circle is
    drawn, and only few have names.
    """
    places = _places(graph.workers)
    links = links_of(graph) if graph.workers <= DRAWN else set()
    edges = [
        _edge(places[a], places[b], both=(b, a) in links)
        for a, b in sorted(links)
        if a < b or (b, a) not in links
    ]
    radius = 9 if graph.workers <= NAMED else 2.5
    return tag(
        "svg",
        tag("title", described),
        edges,
        [_place(worker, place, radius) for worker, place in enumerate(places)],
        viewBox="0 0 300 300",
        role="img",
        class_="circle" + ("" if len(links) < 300 else " dense"),
    )


def links_of(graph: Graph) -> set[tuple[int, int]]:
    """Return all links (sender, receiver) of a period."""
    return {
        (sender, receiver)
        for step in range(graph.period)
        for sender in range(graph.workers)
        for receiver in graph.receivers(sender, step)
    }


def _places(count: int) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(150 + 132 * math.sin(angle), 150 - 132 * math.cos(angle)) for angle in angles]


def _edge(one: tuple[float, float], other: tuple[float, float], *, both: bool) -> Html:
    (x1, y1), (x2, y2) = one, other
    distance = max(math.hypot(x2 - x1, y2 - y1), 1e-9)
    cut = 0 if both else min(10 / distance, 0.4)  # an arrow ends at the circle, not below it
    x2, y2 = x2 - cut * (x2 - x1), y2 - cut * (y2 - y1)
    path = f"M{_number(x1)} {_number(y1)}L{_number(x2)} {_number(y2)}"
    return tag("path", d=path, class_="edge", marker_end=None if both else "url(#arrow)")


def _place(worker: int, place: tuple[float, float], radius: float) -> list[Html]:
    x, y = map(_number, place)
    parts = [tag("circle", cx=x, cy=y, r=radius, class_="node")]
    if radius > 5:
        parts.append(tag("text", worker, x=x, y=y, dy="0.35em", class_="middle"))
    return parts


# Matrices ------------------------------------------------------------------------------------


def matrix(
    nodes: Sequence[int],
    names: Mapping[int, str],
    cells: Mapping[tuple[int, int], tuple[float, str, str]],
) -> Html:
    """Return a table of who sent what to whom.

    Args:
        nodes: rows and columns.
        names: what they are called, in short.
        cells: (row, column) -> how dark it is, 0 to 1, its text, and what it says if asked.
    """

    def cell(row: int, column: int) -> Html:
        share, text, more = cells.get((row, column), (0.0, "", ""))
        return tag("td", text, class_=_shade(share) if text else None, title=more or None)

    head = tag("tr", tag("th", "from \\ to"), [tag("th", names[n], scope="col") for n in nodes])
    rows = [
        tag("tr", tag("th", names[row], scope="row"), [cell(row, column) for column in nodes])
        for row in nodes
    ]
    return tag("table", tag("thead", head), tag("tbody", rows), class_="matrix")


def _shade(share: float) -> str:
    """Return the class of a share of the most: 0 to 10 of 10, and only nothing is 0."""
    return f"h{math.ceil(10 * min(share, 1.0))}"


def heat(nodes: Sequence[int], cells: Mapping[tuple[int, int], float], described: str) -> Html:
    """Return the same for many nodes, as a picture: who sends is at the left.

    Args:
        nodes: rows and columns.
        cells: (row, column) -> how dark it is, 0 to 1.
        described: what it says, for those who do not see it.
    """
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(nodes):
        shades = [_shade(cells.get((row, column), 0.0)) for column in nodes]
        x = 0
        for shade, same in itertools.groupby(shades):
            width = len(list(same))
            paths.setdefault(shade, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    count = len(nodes)
    return tag(
        "svg",
        tag("title", described),
        [tag("path", d="".join(parts), class_=f"heat {shade}") for shade, parts in paths.items()],
        viewBox=f"0 0 {count} {count}",
        role="img",
        class_="circle",
    )
