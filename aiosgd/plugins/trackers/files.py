"""Trackers that write files, with nothing but the standard library."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from aiosgd.errors import AiosgdError
from aiosgd.plugins.registry import describe
from aiosgd.plugins.trackers.base import Facts, Job, Rows, Tracker


class Csv(Tracker):
    """Writes `<table>.csv`: a header, then one line per row.

    Numbers are written with the fewest digits that read back as the same value of their type;
    NaN, which stands for "not measured", is an empty cell.
    """

    def write(self, table: str, rows: Rows) -> None:
        """Write the file; one that exists already is left alone and reported."""
        names = rows.dtype.names
        if not names:
            raise AiosgdError(f"table {table!r} has {rows.dtype} rows; expected named columns")
        if not table.isidentifier():
            raise AiosgdError(f"table {table!r} cannot name a file; expected letters and digits")
        path = self.folder / f"{table}.csv"
        columns = [_cells(np.asarray(rows[name])) for name in names]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(names)
                writer.writerows(zip(*columns, strict=True))
        except OSError as error:
            raise AiosgdError(f"{path}: cannot be written ({describe(error)})") from error


def _cells(column: np.ndarray[Any, Any]) -> list[Any]:
    if column.dtype.kind != "f":
        return list(column.tolist())
    # numpy's own text keeps float32 short: 0.1, not 0.10000000149011612
    cells: list[str] = column.astype(str).tolist()
    return ["" if cell == "nan" else cell for cell in cells]


class Jsonl(Tracker):
    """Writes `job.jsonl`: a JSON object per line, as things happen and then for each row.

    All have `job_id`, and either `event`: `begin`, `progress`, `evaluation` or `end`, with the
    `time` in seconds since 1970, or `table` and the columns of a row. What is no number in JSON, NaN
    and infinity, is null.
    """

    _job_id = ""

    def begin(self, job: Job) -> None:
        """Write what is run; what a submitter wrote that was killed is kept."""
        self._job_id = job.id
        facts = {"options": job.options, "nodes": job.nodes, "simulated": job.simulated}
        self._event("begin", facts)

    def progress(self, facts: Facts) -> None:
        """Write a line."""
        self._event("progress", facts)

    def evaluation(self, facts: Facts) -> None:
        """Write a line."""
        self._event("evaluation", facts)

    def write(self, table: str, rows: Rows) -> None:
        """Write a line per row."""
        names = list(rows.dtype.names or ())
        columns = [rows[name].tolist() for name in names]
        self._add(
            {"table": table, **dict(zip(names, values, strict=True))}
            for values in zip(*columns, strict=True)
        )

    def end(self, summary: Facts) -> None:
        """Write what came of it."""
        self._event("end", {"summary": summary})

    def _event(self, event: str, facts: Facts) -> None:
        self._add([{"event": event, "time": time.time(), **facts}])

    def _add(self, lines: Iterable[Facts]) -> None:
        path = self.folder / "job.jsonl"
        try:
            with path.open("a+b") as file:
                if file.tell() and _last_byte(file) != b"\n":
                    file.write(b"\n")  # it ends where a submitter was killed
                for facts in lines:
                    values = _json_value({"job_id": self._job_id, **facts})
                    text = json.dumps(values, allow_nan=False, ensure_ascii=False)
                    file.write(f"{text}\n".encode())
        except OSError as error:
            raise AiosgdError(f"{path}: cannot be written ({describe(error)})") from error


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, io.SEEK_END)
    return file.read()


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
