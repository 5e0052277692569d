"""Message sequence charts: who sent what to whom when, and where each node waits.

Rows are what happened, in its order; how far two rows are apart says nothing of time. A long story
is cut in the middle, and of many nodes a chart has servers and those that did not end well; it says
what it leaves out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from aiosgd.check.drawing import svg
from aiosgd.check.plot import Gap, Plot, Row, cut, link_of, shorten
from aiosgd.check.story import Moment
from aiosgd.runtime.job import node_name

__all__ = ["svg", "text"]

TEXT_ROWS = 60


def text(moments: Iterable[Moment], width: int = 100) -> str:
    """Return a chart for a terminal.

    An arrow stands where its message arrives; one that never does, where it was sent (`○`) or
    lost (`✗`).

    Args:
        moments: the story, in its order.
        width: characters per line; less than 60 counts as 60.
    """
    width = max(width, 60)
    plot = Plot.of(moments, most=(width - 30) // 5)
    if not plot.nodes:
        return "nothing happened\n"
    events = [m for m in plot.moments if m.kind != "wait" and not plot.is_whole(m)]
    rows = cut(events, TEXT_ROWS)
    lines = _Lines(plot, width, [plot.said(row) for row in rows if isinstance(row, Moment)])
    parts = [*lines.header(), *map(lines.line, rows), lines.footer(), *plot.notes, ""]
    return "\n".join([*parts, *lines.endings()]) + "\n"


class _Lines:
    """Lays a chart out in lines of characters.

    Args:
        plot: what to draw.
        width: of a line.
        texts: what the rows say; it goes between the lifelines where all of it fits, else to the
            right of them.
    """

    def __init__(self, plot: Plot, width: int, texts: Sequence[str]) -> None:
        self.plot = plot
        self.width = width
        self.gutter = max([4, *(len(plot.time(m.time)) for m in plot.moments)]) + 1
        count, room = len(plot.nodes), width - self.gutter
        longest = max(map(len, texts), default=0)
        pitch = room // count
        self.is_inside = longest + 6 <= pitch
        if not self.is_inside:
            margin = min(longest + 2, max(room // 2, room - 14 * count))
            pitch = min(14, (room - margin) // count)
        pitch = min(pitch, 30)
        self.columns = {node: self.gutter + 2 + i * pitch for i, node in enumerate(plot.nodes)}
        self.right = self.gutter + 2 + pitch * count
        self.pitch = pitch
        self.gone: set[int] = set()

    def header(self) -> list[str]:
        names = [node_name(node) for node in self.plot.nodes]
        if max(map(len, names)) >= self.pitch:
            names = [f"{name[0]}{name.split()[1]}" for name in names]
        canvas = self._blank()
        for node, name in zip(self.plot.nodes, names, strict=True):
            self._put(canvas, max(self.gutter, self.columns[node] - 2), name)
        self._put(canvas, 0, "time")
        return ["".join(canvas).rstrip(), self._finish(self._lifelines())]

    def line(self, row: Row) -> str:
        """Return the line of one row."""
        canvas = self._lifelines()
        if isinstance(row, Gap):
            return f"{'':{self.gutter}}{self.plot.gap(row)}"
        self._put(canvas, 0, self.plot.time(row.time))
        if row.peer is None or row.peer == row.node:
            inside_at = self._mark(canvas, row)
        else:
            inside_at = self._arrow(canvas, row)
        said = self.plot.said(row)
        if self.is_inside:
            self._put(canvas, inside_at, f" {said} ")
        else:
            self._put(canvas, self.right, shorten(said, self.width - self.right))
        return self._finish(canvas)

    def _mark(self, canvas: list[str], row: Moment) -> int:
        signs = {"update": "■", "result": "●", "crash": "✗", "fail": "!", "deliver": "↺"}
        column = self.columns[row.node]
        canvas[column] = signs.get(row.kind, "○")
        if row.kind == "crash":
            self.gone.add(row.node)
        return column + 1

    def _arrow(self, canvas: list[str], row: Moment) -> int:
        sender, receiver, _ = link_of(row)
        start, end = self.columns[sender], self.columns[receiver]
        step = 1 if start < end else -1
        line = "─" if row.kind == "deliver" else "╌"
        for column in range(start + step, end, step):
            canvas[column] = "┼" if canvas[column] == "│" else line
        heads = {"deliver": "▶" if step > 0 else "◀", "drop": "✗", "send": "○"}
        canvas[start] = "├" if step > 0 else "┤"
        canvas[end - step] = heads[row.kind]
        return (start if step > 0 else end) + 3

    def footer(self) -> str:
        canvas = self._blank()
        for node, ending in self.plot.endings.items():
            word = ending.word if len(ending.word) < self.pitch else ending.word[0].upper()
            self._put(canvas, max(self.gutter, self.columns[node] - 2), word)
        return "".join(canvas).rstrip()

    def endings(self) -> list[str]:
        size = max(len(node_name(node)) for node in self.plot.nodes) + 2
        said = (f"{node_name(n):{size}}{e.sentence}" for n, e in self.plot.endings.items())
        indent = " " * size
        return [
            line
            for text in said
            for line in textwrap.wrap(text, self.width, subsequent_indent=indent)
        ]

    def _blank(self) -> list[str]:
        return [" "] * self.width

    def _lifelines(self) -> list[str]:
        canvas = self._blank()
        for node, column in self.columns.items():
            canvas[column] = " " if node in self.gone else "│"
        return canvas

    def _put(self, canvas: list[str], start: int, said: str) -> None:
        said = said[: self.width - start]
        canvas[start : start + len(said)] = said

    def _finish(self, canvas: list[str]) -> str:
        return "".join(canvas).rstrip()
