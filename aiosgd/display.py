"""What a long run shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aiosgd.runtime.job import ENDS, Phase, node_name

if TYPE_CHECKING:
    from aiosgd.runtime.session import Evaluation, Progress

# seconds between two plain lines
LINE_INTERVAL = 2.0
BAR_WIDTH = 20
GAP = 2
WIDTHS = {
    "epoch": 5,
    "loss": 8,
    "accuracy": 8,
    "test accuracy": 13,
    "samples/s": 10,
    "traffic/s": 9,
}
# what a narrow terminal leaves out, first to last
SPARE = ("traffic/s", "accuracy", "epoch", "loss", "samples/s", "progress", "test accuracy")


class Display:
    """An observer that writes to stderr; use it as a context manager.

    Args:
        title: what goes on before there is a job.
        console: where to write; stderr unless given.
        clock: the time in seconds.
    """

    def __init__(
        self,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._lively = self._console.is_terminal and not self._console.is_dumb_terminal
        self._title = title
        self._started = clock()
        self._progress: dict[int, Progress] = {}
        self._evaluations: dict[int, Evaluation] = {}
        self._next_line = 0.0
        self._live = Live(
            console=self._console,
            get_renderable=self.picture,
            refresh_per_second=8,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._lively:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lively:
            self._live.stop()

    def entered(self, phase: Phase, job_id: str) -> None:
        """Show the phase."""
        self._title = f"job {job_id}: {phase}"
        if not self._lively and phase in ENDS | {Phase.RUNNING, Phase.STOPPING}:
            self._line(self._title)

    def progressed(self, progress: Progress) -> None:
        """Show a worker's progress."""
        self._progress[progress.node] = progress
        if not self._lively and self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_INTERVAL
            self._line(self._sentence(progress))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Show a worker's test accuracy from its next progress on."""
        self._evaluations[evaluation.node] = evaluation

    def printed(self, node: str, text: str) -> None:
        """Show what a node on this machine printed."""
        self._line(f"{node}: {text}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _sentence(self, progress: Progress) -> str:
        evaluation = self._evaluations.get(progress.node)
        tested = f"test accuracy {evaluation.accuracy:.4f}, " if evaluation else ""
        return (
            f"{node_name(progress.node)}: epoch {progress.epoch + 1}, "
            f"step {progress.step}/{progress.steps}, "
            f"loss {progress.loss:.4f}, accuracy {progress.accuracy:.4f}, {tested}"
            f"{progress.samples_per_s:,.0f} samples/s, {size(progress.bytes_per_s)}/s"
        )

    def picture(self) -> Group:
        """Return what the terminal shows now: a headline and, once there is progress, a table."""
        elapsed = self._clock() - self._started
        headline = Text(f"{self._title} ({elapsed:.0f} s)", style="bold", overflow="ellipsis")
        headline.no_wrap = True
        return Group(headline, *([self.table()] if self._progress else []))

    def table(self) -> Table:
        """Return one row per worker; columns keep their widths while numbers change."""
        columns = self._columns()
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for name, width in columns.items():
            left = name in ("node", "progress")
            table.add_column(name, justify="left" if left else "right", width=width, no_wrap=True)
        for node in sorted(self._progress):
            cells = self._cells(node)
            table.add_row(*(cells[name] for name in columns))
        return table

    def _columns(self) -> dict[str, int]:
        """Return the columns that the terminal has room for, with their widths."""
        digits = max(len(str(progress.steps)) for progress in self._progress.values())
        names = max(len(node_name(node)) for node in self._progress)
        columns = {"node": names, "progress": BAR_WIDTH, "step": 2 * digits + 1, **WIDTHS}
        for name in SPARE:
            if sum(columns.values()) + GAP * len(columns) <= self._console.width:
                break
            del columns[name]
        return columns

    def _cells(self, node: int) -> dict[str, str | Text]:
        progress, evaluation = self._progress[node], self._evaluations.get(node)
        done = round(BAR_WIDTH * progress.step / progress.steps)
        bar = Text.assemble(("━" * done, "green"), ("━" * (BAR_WIDTH - done), "dim"))
        return {
            "node": node_name(node),
            "progress": bar,
            "step": f"{progress.step}/{progress.steps}",
            "epoch": str(progress.epoch + 1),
            "loss": f"{progress.loss:.4f}",
            "accuracy": f"{progress.accuracy:.4f}",
            "test accuracy": f"{evaluation.accuracy:.4f}" if evaluation else "-",
            "samples/s": f"{progress.samples_per_s:,.0f}",
            "traffic/s": size(progress.bytes_per_s),
        }


def size(count: float) -> str:
    """Return a byte count as people read it: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        # 999.95 would be rounded to 1000.0
        if count < (999.5 if unit == "B" else 999.95):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
