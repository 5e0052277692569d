"""What a tracker is: it is told of a job while it trains, and gets its tables once it has ended."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import NoParams

Rows: TypeAlias = np.recarray[Any, Any]
Facts: TypeAlias = Mapping[str, Any]

INDEX = ("node", "step", "epoch", "time_s", "workers")
"""Columns that say where a row belongs; all others are figures."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a tracker is told of a job when it begins to train.

    Attributes:
        id: the job's.
        options: as [job] of job.toml has them.
        nodes: node id -> address.
        began: when it began to train, in seconds since 1970. Rows count from there (`time_s`), in
            virtual time where the job is simulated.
        simulated: whether it is.
    """

    id: str
    options: Facts
    nodes: Mapping[int, str]
    began: float
    simulated: bool = False


class Tracker(ABC):
    """Records one job; only `write` has to be there.

    It runs in the submitter's process, in a thread of its own: `begin`, then `progress` and
    `evaluation` as news come, then `write` for each table, then `end`. Of a job that is fetched, no
    news come. A call may take its time: what cannot wait is left out, and never the job held up.
    After a call that raises anything, no other comes.

    What it leaves in the run folder is named after it: `<name>`, `<name>.*` or `*.<name>`. It
    overwrites nothing of others there.

    Args:
        params: an instance of the class's `Params`.
        folder: the job's folder, `runs/<job id>/`.
    """

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any, folder: Path) -> None:
        self.params = params
        self.folder = folder

    @classmethod
    def require(cls) -> None:
        """Refuse to track, before any node is spoken to, where something is not installed.

        Raises:
            ConfigError: something is missing; the message says how to install it.
        """

    def begin(self, job: Job) -> None:
        """Take note of a job that begins to train."""

    def progress(self, facts: Facts) -> None:
        """Take note of how far a worker is: a few times per second of each.

        Args:
            facts: `node`, `step` (as in train.csv, from 0), `steps` (of the job), `epoch`, `loss`
                and `accuracy` of its newest blocks, `samples_per_s`, `bytes_per_s` and `waited` (the
                share of the time) since its last news, and `time_s` since the job began.
        """

    def evaluation(self, facts: Facts) -> None:
        """Take note of a worker's test: `node`, `epoch`, `step`, `loss`, `accuracy`, `time_s`."""

    @abstractmethod
    def write(self, table: str, rows: Rows) -> None:
        """Record a whole table; called once for each.

        Args:
            table: its name: `train`, `eval`, `consensus`.
            rows: one record per row, one field per column; may be empty; must not be changed.

        Raises:
            AiosgdError: it cannot be recorded; nothing recorded earlier is lost.
        """

    def end(self, summary: Facts) -> None:
        """Close the record.

        Args:
            summary: what summary.json has: None in the place of NaN and infinity.
        """


# What trackers have in common --------------------------------------------------------------------


def missing(tracker: str, needs: str) -> ConfigError:
    """Return the error to raise where a library is not installed that an extra brings."""
    return ConfigError(f"tracker {tracker} needs {needs}: pip install 'aiosgd[{tracker}]'")


def thinned(rows: Rows, points: int) -> Rows:
    """Return at most so many rows, evenly spread, the last one among them; never fewer than one."""
    every = math.ceil(len(rows) / points)
    return rows[(len(rows) - 1) % every :: every].view(np.recarray) if every > 1 else rows


def figures(table: str, rows: Rows) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield step (or epoch, if there are no steps), seconds and `table/column` -> value of rows.

    Values that are not finite, which is what is not measured, are left out.
    """
    names = [name for name in rows.dtype.names or () if name not in INDEX]
    steps = rows["step" if "step" in (rows.dtype.names or ()) else "epoch"].tolist()
    times = rows["time_s"].tolist() if "time_s" in (rows.dtype.names or ()) else [0.0] * len(rows)
    columns = [rows[name].tolist() for name in names]
    for step, time_s, *values in zip(steps, times, *columns, strict=True):
        named = zip(names, values, strict=True)
        yield step, time_s, {f"{table}/{name}": v for name, v in named if math.isfinite(v)}


def news_figures(table: str, facts: Facts) -> dict[str, float]:
    """Return `table/column` -> value of news, as `figures` does of rows."""
    names = [name for name in facts if name not in (*INDEX, "steps")]
    return {f"{table}/{name}": facts[name] for name in names if math.isfinite(facts[name])}


def flattened(table: Facts, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dots in its keys; None is left out."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
