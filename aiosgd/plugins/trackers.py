"""Trackers: where a job's tables go."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from aiosgd.errors import AiosgdError
from aiosgd.plugins.registry import NoParams, describe

Rows: TypeAlias = np.recarray[Any, Any]


class Tracker(ABC):
    """Records the tables of one job.

    Args:
        params: an instance of the class's `Params`.
        folder: the job's folder, `runs/<job id>/`.
    """

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any, folder: Path) -> None:
        self.params = params
        self.folder = folder

    @abstractmethod
    def write(self, table: str, rows: Rows) -> None:
        """Record a whole table; called once for each.

        Args:
            table: its name: `train`, `eval`.
            rows: one record per row, one field per column; may be empty.

        Raises:
            AiosgdError: it cannot be recorded; nothing recorded earlier is lost.
        """


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
