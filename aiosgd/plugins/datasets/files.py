"""Data sets that are one file of the user's own."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import zipfile
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosgd.errors import ConfigError
from aiosgd.plugins.datasets.base import Data, DataFile, Dataset, Labels, Samples
from aiosgd.plugins.registry import describe, nearest

FLOAT32_MAX = float(np.finfo(np.float32).max)
# what zipfile and numpy raise for damaged, encrypted or pickled members
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class FileParams:
    """Parameters of a data set that is one file.

    Attributes:
        path: the file; a relative path is looked up in the current folder, then in the folder
            for data.
        test_fraction: the part of the samples that is set aside for testing, where the file does
            not say which.
        split_seed: decides which samples these are.
    """

    path: str
    test_fraction: float = 0.2
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not Path(self.path).name:
            raise ValueError(f"path is {self.path!r}; expected a file")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; expected between 0 and 1")
        if self.split_seed < 0:
            raise ValueError(f"split_seed is {self.split_seed}; expected a number from 0")


class OneFile(Dataset):
    """A data set that is one file, named by the parameter `path`."""

    def files(self) -> list[DataFile]:
        """Locate the file."""
        given = Path(self.params.path).expanduser()
        for path in (given, self.data_dir / given):
            if path.is_file():
                return [DataFile.of(given.name, path)]
        raise ConfigError(
            f"dataset.path is {self.params.path!r}, but there is no such file in {Path.cwd()} "
            f"or {self.data_dir}; name an existing file"
        )

    def load(self, paths: Mapping[str, Path]) -> Data:
        """Read the file, set test samples aside if it has none, scale if that is asked for."""
        x, y, test_x, test_y, classes = self.read(paths[Path(self.params.path).name])
        try:
            if test_x is None or test_y is None:
                none = np.empty((0, *x.shape[1:]), np.float32), np.empty(0, np.int64)
                data = self._split(Data(x, y, *none, classes))
            else:
                data = Data(x, y, test_x, test_y, classes)
            if not len(data.test_y):
                raise ValueError("test_x has no samples; expected at least one")
            return _standardised(data) if self.params.scale else data
        except ValueError as error:
            raise self.error(str(error)) from error

    def _split(self, data: Data) -> Data:
        """Set a random part of the training samples aside for testing; orders are kept."""
        samples = len(data.train_y)
        if samples < 2:
            raise ValueError("has 1 sample; expected one to train on and one to test on at least")
        count = min(max(round(samples * self.params.test_fraction), 1), samples - 1)
        order = np.random.default_rng(self.params.split_seed).permutation(samples)
        test, train = np.sort(order[:count]), np.sort(order[count:])
        x, y = data.train_x, data.train_y
        return Data(x[train], y[train], x[test], y[test], data.classes)

    @abstractmethod
    def read(self, path: Path) -> tuple[Samples, Labels, Samples | None, Labels | None, int]:
        """Return train x and y, test x and y where the file has them, and the class count."""

    def error(self, text: str) -> ConfigError:
        """Return the error that says `text` about the file, under the name that the user knows."""
        return ConfigError(f"{self.params.path}: {text}")


def _standardised(data: Data) -> Data:
    """Give every feature zero mean and unit variance over the training samples, in place.

    A feature that is constant there is only shifted.

    Raises:
        ValueError: a test value is so far out that it leaves the range of float32.
    """
    x = data.train_x
    mean = x.mean(axis=0, dtype=np.float64)  # exact where all values are equal
    variance = sum(np.square(rows - mean).sum(axis=0) for rows in _pieces(x)) / len(x)
    deviation = np.where(variance == 0, 1, np.sqrt(variance))
    with np.errstate(over="ignore"):
        for rows in itertools.chain(_pieces(x), _pieces(data.test_x)):
            rows[...] = (rows - mean) / deviation
    return dataclasses.replace(data)  # checks the new values


def _pieces(x: Samples) -> Iterator[Samples]:
    """Yield views of some rows at a time: float64 copies of the whole would be large."""
    for start in range(0, len(x), 4096):
        yield x[start : start + 4096]


class Npz(OneFile):
    """Arrays `x` and `y`, or `train_x`, `train_y`, `test_x`, `test_y`, of a numpy .npz file.

    Samples run along the first axis of x; labels are whole numbers 0, 1, …. With `train_x` the
    arrays `x` and `y` are not looked at.
    """

    @dataclass(frozen=True)
    class Params(FileParams):
        """Parameters.

        Attributes:
            scale: give every feature zero mean and unit variance over the training samples.
        """

        scale: bool = False

    def read(self, path: Path) -> tuple[Samples, Labels, Samples | None, Labels | None, int]:
        """Read the arrays; the highest label decides how many classes there are."""
        arrays = self._arrays(path)
        train = "train_" if "train_x" in arrays else ""
        x, y = self._samples(arrays, f"{train}x"), self._labels(arrays, f"{train}y")
        if not train or not {"test_x", "test_y"} & arrays.keys():
            return x, y, None, None, 1 + int(y.max(initial=0))
        test_x, test_y = self._samples(arrays, "test_x"), self._labels(arrays, "test_y")
        return x, y, test_x, test_y, 1 + int(max(y.max(initial=0), test_y.max(initial=0)))

    def _arrays(self, path: Path) -> dict[str, npt.NDArray[Any]]:
        names = ("x", "y", "train_x", "train_y", "test_x", "test_y")
        if not zipfile.is_zipfile(path):
            raise self.error("is no .npz file; expected what numpy.savez writes")
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: np.asarray(stored[name]) for name in names if name in stored}
        except UNREADABLE as error:
            raise self.error(
                f"cannot be read as .npz of plain arrays ({describe(error)})"
            ) from error

    def _array(self, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
        if name not in arrays:
            raise self.error(
                f"has no array {name!r} (it has: {', '.join(arrays) or 'none'}); expected x and y, "
                f"or train_x, train_y, test_x and test_y"
            )
        return arrays[name]

    def _samples(self, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Samples:
        values = self._array(arrays, name)
        if values.dtype.kind not in "fiub":
            raise self.error(f"{name} is {values.dtype}; expected numbers")
        with np.errstate(over="ignore"):  # what becomes infinite is refused with its position
            return values.astype(np.float32)

    def _labels(self, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Labels:
        values = self._array(arrays, name)
        if values.dtype.kind not in "iub":
            raise self.error(f"{name} is {values.dtype}; expected whole numbers")
        return values.astype(np.int64)


class Csv(OneFile):
    """A table with one sample per line: one column of labels, all others numbers.

    Labels may be anything: their distinct values in order (numeric where all are numbers) become
    the classes 0, 1, …. Blank lines are skipped; the encoding is UTF-8.
    """

    @dataclass(frozen=True)
    class Params(FileParams):
        """Parameters.

        Attributes:
            label: the column with the labels: its name, or its index (-1 is the last).
            header: whether the first line holds the names of the columns.
            delimiter: the character between two columns.
            scale: give every feature zero mean and unit variance over the training samples.
        """

        label: str | int = -1
        header: bool = True
        delimiter: str = ","
        scale: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
                raise ValueError(f"delimiter is {self.delimiter!r}; expected one character")
            if isinstance(self.label, str) and not self.header:
                raise ValueError(
                    f"label is {self.label!r}; without a header it has to be the column's index"
                )

    def read(self, path: Path) -> tuple[Samples, Labels, Samples | None, Labels | None, int]:
        """Read the table."""
        values = array("f")
        labels: list[str] = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for label, numbers in self._rows(file):
                    labels.append(label)
                    values.extend(numbers)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise self.error(f"cannot be read as CSV in UTF-8 ({describe(error)})") from error
        if not labels:
            raise self.error("has no lines with samples; expected at least two")
        names, y = np.unique(_comparable(labels), return_inverse=True)
        x = np.array(values, np.float32).reshape(len(labels), -1)
        return x, y.astype(np.int64), None, None, len(names)

    def _rows(self, lines: Iterator[str]) -> Iterator[tuple[str, list[float]]]:
        """Yield each line's label and numbers."""
        reader = csv.reader(lines, delimiter=self.params.delimiter, strict=True)
        rows = filter(None, reader)
        first = [cell.strip() for cell in next(rows, ())]
        if not first:
            return
        width, column = len(first), self._label_column(first)
        if self.params.header:
            self._check_header(first[:column] + first[column + 1 :])
        else:
            yield self._row(first, column, reader.line_num)
        for row in rows:
            if len(row) != width:
                raise self.error(f"line {reader.line_num} has {len(row)} columns; expected {width}")
            yield self._row(row, column, reader.line_num)

    def _label_column(self, first: Sequence[str]) -> int:
        label, width = self.params.label, len(first)
        if width < 2:
            raise self.error(
                f"the first line has one column with delimiter {self.params.delimiter!r}; "
                f"expected a label and at least one number"
            )
        if isinstance(label, int):
            if not -width <= label < width:
                raise self.error(
                    f"dataset.label is {label}, but the first line has {width} columns"
                )
            return label % width
        if first.count(label) != 1:
            raise self.error(
                f"dataset.label is {label!r}, which names {first.count(label)} columns of the first "
                f"line; expected one{nearest(label, first)}"
            )
        return first.index(label)

    def _check_header(self, names: Sequence[str]) -> None:
        """Refuse a first line of data, which would be lost as a header.

        Consecutive whole numbers are names: that is how tables without names are often saved.
        """
        try:
            numbers = list(map(float, names))
        except ValueError:
            return
        if numbers != [numbers[0] + i for i in range(len(numbers))]:
            raise self.error("the first line has numbers, not names; set dataset.header to false")

    def _row(self, row: list[str], column: int, line: int) -> tuple[str, list[float]]:
        label = row.pop(column).strip()
        if not label:
            raise self.error(f"line {line} has no label in column {column}")
        try:
            numbers = list(map(float, row))
        except ValueError:
            numbers = []
        # one pass for all; false for NaN too
        if not (numbers and sum(map(abs, numbers)) <= FLOAT32_MAX):
            self._check_cells(row, column, line)
        return label, numbers

    def _check_cells(self, row: Sequence[str], label_column: int, line: int) -> None:
        for i, cell in enumerate(row):
            try:
                usable = abs(float(cell)) <= FLOAT32_MAX
            except ValueError:
                usable = False
            if not usable:
                column = i + (i >= label_column)
                raise self.error(
                    f"line {line}, column {column} is {cell!r}; expected a finite float32 number"
                )


def _comparable(labels: list[str]) -> npt.NDArray[Any]:
    """Return labels as numbers if all are, so that 10 comes after 9 and 1.0 is 1."""
    try:
        return np.array(list(map(float, labels)))
    except ValueError:
        return np.array(labels)
