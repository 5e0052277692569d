"""Event files for TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from aiosgd.errors import AiosgdError
from aiosgd.plugins.registry import describe
from aiosgd.plugins.trackers.base import (
    Facts,
    Job,
    Rows,
    Tracker,
    figures,
    flattened,
    missing,
    news_figures,
    thinned,
)

# TensorBoard reads files with `tfevents` in their names, those of a folder in alphabetical order
LIVE, WHOLE = "live", "whole"
# of TensorFlow's log format: the first event of a file names it
VERSION = "brain.Event:2"
JOB = "job"
"""The run with what is about all workers."""


@dataclass(frozen=True)
class TensorBoardParams:
    """Parameters of `TensorBoard`.

    Attributes:
        workers: how many workers have a run, the first ones.
        points: of a curve, at most; TensorBoard itself shows 1,000 unless told otherwise.
    """

    workers: int = 32
    points: int = 2000

    def __post_init__(self) -> None:
        for name in ("workers", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


class TensorBoard(Tracker):
    """Event files for TensorBoard; needs the extra `tensorboard`.

    In the run folder's `tensorboard/` each worker has a run, `worker-0` and so on, with the columns
    of train.csv and eval.csv by step, such as `train/loss` and `eval/accuracy`, the rates
    `train/samples_per_s` and `train/bytes_per_s`, and `train/waited`, the share of the time. The
    run `job` has the options as text and the columns of consensus.csv by epoch.

    While the job trains, there is a point of each worker a few times per second. In the end, files
    with all rows (`*.whole`) take the place of those (`*.live`); TensorBoard forgets them then.
    """

    Params = TensorBoardParams
    params: TensorBoardParams

    def __init__(self, params: TensorBoardParams, folder: Path) -> None:
        super().__init__(params, folder)
        self._live: dict[str, EventFile] = {}
        self._whole: dict[str, EventFile] = {}
        self._began = 0.0
        self._options = ""

    @classmethod
    def require(cls) -> None:
        """See the base class."""
        library()

    def begin(self, job: Job) -> None:
        """Show the options."""
        self._began = job.began
        self._options = _markdown(flattened(job.options))
        self._file(self._live, JOB).text(self._began, "options", self._options)

    def progress(self, facts: Facts) -> None:
        """Add a point to a worker's curves."""
        self._add("train", facts)

    def evaluation(self, facts: Facts) -> None:
        """Add a point to a worker's curves."""
        self._add("eval", facts)

    def _add(self, table: str, facts: Facts) -> None:
        if 0 <= facts["node"] < self.params.workers:
            file = self._file(self._live, _run(facts["node"]))
            values = news_figures(table, facts)
            file.scalars(self._began + facts["time_s"], facts["step"], values)

    def write(self, table: str, rows: Rows) -> None:
        """Write all rows, or of too many some."""
        names = rows.dtype.names or ()
        if "node" not in names:
            self._curves(JOB, table, rows)
            return
        for node in range(self.params.workers):
            own = rows[rows.node == node]
            if len(own):
                self._curves(_run(node), table, own)

    def _curves(self, run: str, table: str, rows: Rows) -> None:
        file, shown = self._file(self._whole, run), thinned(rows, self.params.points)
        for step, time_s, values in figures(table, shown):
            file.scalars(self._began + time_s, step, values)
        if "samples" in (rows.dtype.names or ()):
            for step, time_s, values in rates(rows, shown):
                file.scalars(self._began + time_s, step, values)

    def end(self, summary: Facts) -> None:
        """Close all files."""
        end = _markdown({key: v for key, v in flattened(summary).items() if "per_node" not in key})
        job = self._file(self._whole, JOB)
        job.text(self._began, "options", self._options)
        job.text(self._began + (summary["wall_s"] or 0.0), "summary", end)
        for file in (*self._live.values(), *self._whole.values()):
            file.close()

    def _file(self, files: dict[str, EventFile], run: str) -> EventFile:
        """Return a run's file, a new one when it is first asked for."""
        if run not in files:
            kind = LIVE if files is self._live else WHOLE
            name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}.{kind}"
            files[run] = EventFile(self.folder / "tensorboard" / run / name)
            if kind == WHOLE:  # a file is not removed while somebody watches it
                files[run].restart(self._began)
        return files[run]


def rates(rows: Rows, shown: Rows) -> Any:
    """Yield step, time_s and the rates since the row before it, for each row that is shown.

    They are those of a worker's progress: samples and bytes per second, and the share of waiting.
    """
    at = np.searchsorted(rows.step, shown.step)
    seconds = np.diff(shown.time_s, prepend=0.0)
    totals = {
        "samples_per_s": rows.samples,
        "bytes_per_s": rows.bytes_sent + rows.bytes_received,
        "waited": rows.wait_s,
    }
    counts = {name: np.diff(np.cumsum(one)[at], prepend=0) for name, one in totals.items()}
    for i in np.flatnonzero(seconds > 0):
        values = {f"train/{name}": float(n[i] / seconds[i]) for name, n in counts.items()}
        yield int(shown.step[i]), float(shown.time_s[i]), values


class EventFile:
    """A file of events, as TensorFlow writes them.

    Args:
        path: the file; it must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._pb, records = library()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: whoever watches sees each event at once, and whole
            self._records = records(path.open("xb", buffering=0))
        except OSError as error:
            raise AiosgdError(f"{path}: cannot be written ({describe(error)})") from error
        self._write(wall_time=time.time(), file_version=VERSION)

    def scalars(self, wall_time: float, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured at a step."""
        if values:
            value = [self._pb.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
            self._write(wall_time=wall_time, step=step, summary=self._pb.Summary(value=value))

    def text(self, wall_time: float, tag: str, markdown: str) -> None:
        """Write a text."""
        self._write(wall_time=wall_time, step=0, summary=self._pb.text(tag, markdown))

    def restart(self, wall_time: float) -> None:
        """Say that what was written before, in other files, is over."""
        start = self._pb.SessionLog(status=self._pb.SessionLog.START)
        self._write(wall_time=wall_time, step=0, session_log=start)

    def close(self) -> None:
        """Write no more."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._pb.Event(**fields).SerializeToString())


class Messages:
    """The messages of TensorBoard's protocol that are written here."""

    def __init__(self, event: Any, summary: Any, text: Any) -> None:
        self.Event, self.SessionLog = event.Event, event.SessionLog
        self.Summary = summary.Summary
        self.text = text.text_pb

    @classmethod
    def load(cls) -> Self:
        """Import them."""
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415
        from tensorboard.plugins.text import summary_v2  # noqa: PLC0415

        return cls(event_pb2, summary_pb2, summary_v2)


def library() -> tuple[Messages, Any]:
    """Return the messages, and who writes them to a file.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

        return Messages.load(), RecordWriter
    except ImportError:
        raise missing("tensorboard", "TensorBoard") from None


def _run(node: int) -> str:
    return f"worker-{node}"


def _markdown(table: Mapping[str, Any]) -> str:
    """Return a table as TensorBoard shows it; what Markdown takes for more stands in code."""
    rows = (f"| {key} | `{str(value).replace('|', '/')}` |" for key, value in table.items())
    return "\n".join(["| | |", "|---|---|", *rows])
