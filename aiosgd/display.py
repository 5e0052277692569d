"""What a long run shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aiosgd.runtime.job import ENDS, Phase, node_name

if TYPE_CHECKING:
    from aiosgd.bench.rows import Report
    from aiosgd.runtime.session import Evaluation, Progress
    from aiosgd.runtime.simulation.compare import Comparison

# seconds between two plain lines
LINE_INTERVAL = 2.0
BAR_WIDTH = 20
CURVE_WIDTH = 12
GAP = 2
ROWS = 16  # workers at most; the others are counted
WIDTHS = {
    "epoch": 5,
    "loss": 8,
    "curve": CURVE_WIDTH,
    "accuracy": 8,
    "test accuracy": 13,
    "samples/s": 10,
    "traffic/s": 9,
    "waits": 5,
}
# what a narrow terminal leaves out, first to last
SPARE = (
    *("accuracy", "traffic/s", "curve", "waits", "epoch"),
    *("loss", "samples/s", "progress", "test accuracy"),
)
# seconds of training before the time that is left is worth guessing
SETTLED = 3.0
# a worker is slow if it waits for this share of the time less than another: that one waits for it
SLOWER = 0.3
SPARKS = "▁▂▃▄▅▆▇█"


class Curve:
    """The course of a number in a fixed number of cells, however long it gets.

    Once all cells are full, neighbours become their mean, and a cell stands for twice as many
    values.
    """

    def __init__(self, width: int = CURVE_WIDTH) -> None:
        self._width = width
        self._means: list[float] = []
        self._open: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        """Take the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._stride:
            return
        self._means.append(statistics.fmean(self._open))
        self._open.clear()
        if len(self._means) == 2 * self._width:
            self._means = [statistics.fmean(pair) for pair in batched(self._means, 2)]
            self._stride *= 2

    def __str__(self) -> str:
        shown = self._means[-self._width :]
        if len(self._means) > self._width:  # the whole course, two values a cell
            shown = [statistics.fmean(pair) for pair in batched(self._means, 2)]
        low, high = min(shown, default=0.0), max(shown, default=0.0)
        scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
        return "".join(SPARKS[round((value - low) * scale)] for value in shown)


def batched(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """Return the values in groups of so many; the last may have fewer."""
    return [values[i : i + count] for i in range(0, len(values), count)]


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
        self._phase: Phase | None = None
        self._started = clock()
        self._progress: dict[int, Progress] = {}
        self._curves: defaultdict[int, Curve] = defaultdict(Curve)
        self._attendance = ""
        self._trains_since: tuple[float, float] | None = None  # when, and the share done then
        self._evaluations: dict[int, Evaluation] = {}
        self._next_line = 0.0
        # what is drawn by a thread of rich's own
        self._lock = threading.RLock()
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

    def note(self, text: str) -> None:
        """Show what goes on; plain lines come now and then."""
        self._title = text
        if self._line_is_due():
            self._line(text)

    def entered(self, phase: Phase, job_id: str) -> None:
        """Show the phase."""
        resumed, self._phase = self._phase is Phase.SAVING, phase
        if phase is Phase.PREPARING:  # perhaps the next attempt at a job
            self._forget()
        self._title = f"job {job_id}: {phase}"
        if not (self._lively or resumed) and phase in ENDS | {Phase.RUNNING, Phase.STOPPING}:
            self._line(self._title)

    def progressed(self, progress: Progress) -> None:
        """Show a worker's progress."""
        with self._lock:
            self._progress[progress.node] = progress
            self._curves[progress.node].add(progress.loss)
            if self._trains_since is None:
                self._trains_since = (self._clock(), self._share())
        if self._line_is_due():
            self._line(self._sentence())

    def evaluated(self, evaluation: Evaluation) -> None:
        """Show a worker's test accuracy from its next progress on."""
        with self._lock:
            self._evaluations[evaluation.node] = evaluation

    def printed(self, node: str, text: str) -> None:
        """Show what a node on this machine printed."""
        self._line(f"{node}: {text}")

    def noted(self, text: str) -> None:
        """Show something about the job that is worth a line."""
        self._line(text)

    def attended(self, present: Collection[int], workers: int) -> None:
        """Show how many workers take part, and no row of one that does not."""
        self._attendance = f"{len(present)} of {workers} workers"
        with self._lock:
            for known in (self._progress, self._evaluations):
                for node in known.keys() - set(present):
                    del known[node]

    def _forget(self) -> None:
        """Forget how far the workers were."""
        with self._lock:
            for known in (self._progress, self._evaluations, self._curves):
                known.clear()
            self._trains_since = None

    def _line_is_due(self) -> bool:
        if self._lively or self._clock() < self._next_line:
            return False
        self._next_line = self._clock() + LINE_INTERVAL
        return True

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _sentence(self) -> str:
        """Return how far the job is, as a whole."""
        slowest = min(self._progress.values(), key=lambda progress: progress.step)
        tested = self._test_accuracy()
        facts = [
            f"loss {self._mean('loss'):.4f}",
            f"accuracy {self._mean('accuracy'):.4f}",
            *([] if tested is None else [f"test accuracy {tested:.4f}"]),
            f"{self._sum('samples_per_s'):,.0f} samples/s",
            f"{size(self._sum('bytes_per_s'))}/s",
            *([self._attendance] if self._attendance else []),
            *([left] if (left := self._time_left()) else []),
        ]
        place = f"epoch {slowest.epoch + 1}, step {slowest.step}/{slowest.steps}"
        return f"{place}: {', '.join(facts)}"

    def _mean(self, name: str) -> float:
        return statistics.fmean(getattr(one, name) for one in self._progress.values())

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(one, name) for one in self._progress.values())

    def _test_accuracy(self) -> float | None:
        """Return the mean of the workers' newest evaluations."""
        if not self._evaluations:
            return None
        return statistics.fmean(one.accuracy for one in self._evaluations.values())

    def _share(self) -> float:
        """Return the share of its steps that the slowest worker has taken."""
        return min(one.step / one.steps for one in self._progress.values())

    def _time_left(self) -> str:
        """Return how long the job takes from now on, if it goes on like this."""
        if self._trains_since is None or not self._progress or self._phase in ENDS:
            return ""
        since, share = self._trains_since
        took, done = self._clock() - since, self._share() - share
        if took < SETTLED or done <= 0:
            return ""
        return f"{span(took * (1 - share - done) / done)} left"

    def _slow(self) -> set[int]:
        """Return the workers that others wait for."""
        waits = {node: one.waited for node, one in self._progress.items()}
        limit = max(waits.values()) - SLOWER
        return {node for node, share in waits.items() if share < limit}

    def picture(self) -> Group:
        """Return what the terminal shows now: a headline and, once there is progress, a table."""
        with self._lock:
            return self._picture()

    def _picture(self) -> Group:
        elapsed = self._clock() - self._started
        times = [f"{elapsed:.0f} s", *([left] if (left := self._time_left()) else [])]
        facts = f" {self._attendance}" if self._progress and self._attendance else ""
        headline = Text(
            f"{self._title} ({', '.join(times)}){facts}", style="bold", overflow="ellipsis"
        )
        headline.no_wrap = True
        return Group(headline, *([self.table()] if self._progress else []))

    def table(self) -> Table:
        """Return one row per worker; columns keep their widths while numbers change."""
        columns = self._columns()
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for name, width in columns.items():
            left = name in ("node", "progress", "curve")
            table.add_column(name, justify="left" if left else "right", width=width, no_wrap=True)
        nodes, slow = sorted(self._progress), self._slow()
        for node in nodes[:ROWS]:
            cells = self._cells(node, slow=node in slow)
            table.add_row(*(cells[name] for name in columns))
        if len(nodes) > ROWS:
            table.add_row(Text(f"… {len(nodes) - ROWS} more", style="dim"))
        if len(nodes) > 1:
            total = self._total()
            table.add_row(*(total.get(name, "") for name in columns), style="bold")
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

    def _cells(self, node: int, *, slow: bool) -> dict[str, str | Text]:
        progress, evaluation = self._progress[node], self._evaluations.get(node)
        done = round(BAR_WIDTH * progress.step / progress.steps)
        bar = Text.assemble(("━" * done, "green"), ("━" * (BAR_WIDTH - done), "dim"))
        return {
            "node": Text(node_name(node), style="yellow" if slow else ""),
            "progress": bar,
            "step": f"{progress.step}/{progress.steps}",
            "epoch": str(progress.epoch + 1),
            "loss": f"{progress.loss:.4f}",
            "curve": Text(str(self._curves[node]).ljust(CURVE_WIDTH), style="cyan"),
            "accuracy": f"{progress.accuracy:.4f}",
            "test accuracy": f"{evaluation.accuracy:.4f}" if evaluation else "-",
            "samples/s": f"{progress.samples_per_s:,.0f}",
            "traffic/s": size(progress.bytes_per_s),
            "waits": Text("slow", style="yellow") if slow else f"{progress.waited:.0%}",
        }

    def _total(self) -> dict[str, str]:
        """Return the last row: means over the workers, and sums of what adds up."""
        tested = self._test_accuracy()
        return {
            "node": "all",
            "loss": f"{self._mean('loss'):.4f}",
            "accuracy": f"{self._mean('accuracy'):.4f}",
            "test accuracy": "-" if tested is None else f"{tested:.4f}",
            "samples/s": f"{self._sum('samples_per_s'):,.0f}",
            "traffic/s": size(self._sum("bytes_per_s")),
        }


# Benchmarks -----------------------------------------------------------------------------------


# what only some benchmarks have, and the heads of their columns
LABELS = {"what": "", "node": "node", "codec": "codec", "overlap": "overlap"}
FIGURES = {
    "gb_per_s": "GB/s",
    "messages_per_s": "messages/s",
    "steps_per_s": "steps/s",
    "cpu_s_per_gb": "CPU s/GB",
    "peer_cpu_s_per_gb": "its CPU s/GB",
}


def bench_text(report: Report, machine: str) -> str:
    """Return a benchmark as people read it: a table, and a line on where it comes from."""
    rows = [row.to_dict() for row in report.rows]
    labels, figures = (
        {name: head for name, head in names.items() if any(name in row for row in rows)}
        for names in (LABELS, FIGURES)
    )
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for head in labels.values():
        table.add_column(head, no_wrap=True)
    for head in ("size", "nodes", "median", "range", "beside it", "median", "ratio"):
        left = head == "beside it"
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for head in figures.values():
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        own = (_figure(row.get(name)) for name in labels)
        table.add_row(*own, *_bench_cells(row), *(_figure(row.get(name)) for name in figures))
    source = f"{report.work} on {machine}; medians of {report.rounds} rounds"
    warnings = [f"warning: {warning}" for warning in report.warnings]
    return "\n".join([*_lines(table), source, *warnings])


def comparison_text(comparison: Comparison) -> str:
    """Return what was predicted of a run beside what was measured, as people read it."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column(f"{comparison.run} on {comparison.network}", no_wrap=True)
    for head in ("predicted", "measured", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, share in comparison.errors.items():
        show = size if name == "bytes_per_step" else duration
        pair = (getattr(figures, name) for figures in (comparison.predicted, comparison.measured))
        table.add_row(name, *map(show, pair), f"{share:+.1%}")
    return "\n".join(_lines(table))


def _lines(table: Table) -> list[str]:
    """Return a table as wide as it wants to be."""
    file = io.StringIO()
    Console(file=file, width=500, highlight=False).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def _bench_cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["range"]
    return [
        size(row["bytes"]),
        str(row["nodes"]),
        duration(row["seconds"]),
        f"{duration(low)} - {duration(high)}",
        row["peer"] or "",
        duration(row["peer_seconds"]) if row["peer"] else "",
        f"{row['ratio']:.2f}" if row["peer"] else "",
    ]


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """Return a time as people read it: 1.23 ms."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        # 999.6 would be rounded to 1000
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def span(seconds: float) -> str:
    """Return how long something takes, as people say it: 4.1 s, 12 min, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Return a byte count as people read it: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        # 999.95 would be rounded to 1000.0
        if count < (999.5 if unit == "B" else 999.95):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
