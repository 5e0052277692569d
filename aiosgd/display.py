"""What a long run shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aiosgd.runtime.job import ENDS, Phase, node_name

if TYPE_CHECKING:
    from aiosgd.runtime.session import Evaluation, Progress

# seconds between two plain lines
LINE_INTERVAL = 2.0
BAR_WIDTH = 20


class Display:
    """An observer that writes to stderr; use it as a context manager."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._lively = self._console.is_terminal
        self._title = ""
        self._progress: dict[int, Progress] = {}
        self._evaluations: dict[int, Evaluation] = {}
        self._next_line = 0.0

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
        if self._lively:
            self._refresh()
        elif phase in ENDS or phase in (Phase.RUNNING, Phase.STOPPING):
            self._line(self._title)

    def progressed(self, progress: Progress) -> None:
        """Show a worker's progress."""
        self._progress[progress.node] = progress
        if self._lively:
            self._refresh()
        elif self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_INTERVAL
            self._line(self._sentence(progress))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Show a worker's test accuracy."""
        self._evaluations[evaluation.node] = evaluation
        if self._lively:
            self._refresh()
        elif evaluation.node == 0 and self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_INTERVAL
            self._line(
                f"epoch {evaluation.epoch + 1}: test loss {evaluation.loss:.4f}, "
                f"accuracy {evaluation.accuracy:.4f} (worker 0)"
            )

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _sentence(self, progress: Progress) -> str:
        return (
            f"{node_name(progress.node)}: step {progress.step}/{progress.steps}, "
            f"loss {progress.loss:.4f}, accuracy {progress.accuracy:.4f}, "
            f"{progress.samples_per_s:,.0f} samples/s, {size(progress.bytes_per_s)}/s"
        )

    def _refresh(self) -> None:
        self._live.update(self.table())

    def table(self) -> Table:
        """Return the live table as it is now."""
        table = Table(title=self._title, title_justify="left", title_style="bold", box=None)
        table.add_column("node")
        table.add_column("progress")
        for name in ("step", "epoch", "loss", "accuracy", "test", "samples/s", "traffic/s"):
            table.add_column(name, justify="right")
        for node in sorted(self._progress):
            table.add_row(*self._row(node))
        return table

    def _row(self, node: int) -> list[str | Text]:
        progress, evaluation = self._progress[node], self._evaluations.get(node)
        done = round(BAR_WIDTH * progress.step / progress.steps)
        bar = Text("━" * done, style="green") + Text("━" * (BAR_WIDTH - done), style="dim")
        return [
            node_name(node),
            bar,
            f"{progress.step}/{progress.steps}",
            str(progress.epoch + 1),
            f"{progress.loss:.4f}",
            f"{progress.accuracy:.4f}",
            f"{evaluation.accuracy:.4f}" if evaluation else "-",
            f"{progress.samples_per_s:,.0f}",
            size(progress.bytes_per_s),
        ]


def size(count: float) -> str:
    """Return a byte count as people read it: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
