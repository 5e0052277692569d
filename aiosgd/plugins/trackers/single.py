"""Trackers with one record per job: of worker 0, whose weights are the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from aiosgd.plugins.trackers.base import Facts, Job, Rows, Tracker, figures, news_figures, thinned

WORKER = 0
POINTS = 1000
"""Rows of a table that are recorded at most."""

Point: TypeAlias = tuple[int, float, Mapping[str, float]]


class SingleRecord(Tracker):
    """Records what worker 0 did: while it trains what is heard of it, and in the end the rest.

    Columns are named after their tables: `train/loss`, `eval/accuracy`.
    """

    _began = 0.0

    def begin(self, job: Job) -> None:
        """Note when it began."""
        self._began = job.began
        self._heard: set[tuple[int, str]] = set()  # steps and names that are recorded already

    def progress(self, facts: Facts) -> None:
        """Record it."""
        self._add("train", facts)

    def evaluation(self, facts: Facts) -> None:
        """Record it."""
        self._add("eval", facts)

    def _add(self, table: str, facts: Facts) -> None:
        if facts["node"] == WORKER:
            values = news_figures(table, facts)
            self._heard |= {(facts["step"], name) for name in values}
            self.record(table, [(facts["step"], self._began + facts["time_s"], values)])

    def write(self, table: str, rows: Rows) -> None:
        """Record what was not heard before; of too many rows some."""
        own = rows[rows.node == WORKER] if "node" in (rows.dtype.names or ()) else rows
        points = []
        for step, time_s, values in figures(table, thinned(own, POINTS)):
            new = {name: v for name, v in values.items() if (step, name) not in self._heard}
            points.append((step, self._began + time_s, new))
        self.record(table, points)

    @abstractmethod
    def record(self, table: str, points: Sequence[Point]) -> None:
        """Record step, time in seconds since 1970, and `table/column` -> value."""
