"""Dataset: where samples come from; Data: what they are once loaded."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import NoParams, describe

Samples: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Data:
    """A loaded data set.

    Attributes:
        train_x: float32, (n, *inputs), all finite, n >= 1.
        train_y: int64, (n,), labels 0 … classes - 1.
        test_x: as `train_x`, but may be empty.
        test_y: as `train_y`, but may be empty.
        classes: how many labels there are.

    Raises:
        ValueError: the arrays are not of that form; the message names the array.
    """

    train_x: Samples
    train_y: Labels
    test_x: Samples
    test_y: Labels
    classes: int

    def __post_init__(self) -> None:
        _check_part("train", self.train_x, self.train_y, self.classes)
        _check_part("test", self.test_x, self.test_y, self.classes)
        if not len(self.train_y):
            raise ValueError("train_x has no samples; expected at least one")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"train_x has samples of shape {self.train_x.shape[1:]}, "
                f"test_x of {self.test_x.shape[1:]}; expected the same"
            )

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.train_x.shape[1:]


def _check_part(part: str, x: Samples, y: Labels, classes: int) -> None:
    for name, values, dtype in ((f"{part}_x", x, np.float32), (f"{part}_y", y, np.int64)):
        if values.dtype != dtype:
            raise ValueError(f"{name} is {values.dtype}; expected {np.dtype(dtype)}")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{part}_x has shape {x.shape}; expected (samples, features, ...)")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{part}_y has shape {y.shape}; expected ({len(x)},), a label for each sample"
        )
    if len(y) and not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"{part}_y has labels {y.min()} to {y.max()}; expected 0 to {classes - 1}")
    # min and max let NaN through and need no temporary of the data's size
    if len(x) and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        where = np.unravel_index(int(np.isfinite(x).argmin()), x.shape)
        position = ", ".join(map(str, where))
        raise ValueError(f"{part}_x[{position}] is {x[where]}; expected finite float32 values")


@dataclass(frozen=True)
class DataFile:
    """A file that nodes need before they can load a data set.

    Attributes:
        name: what the data set calls it; a plain file name.
        sha256: of its content, in hexadecimal.
        size: in bytes.
        path: where it is on this machine.
    """

    name: str
    sha256: str
    size: int
    path: Path

    @classmethod
    def of(cls, name: str, path: Path) -> DataFile:
        """Describe the file at `path`.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return cls(name, sha256(path), path.stat().st_size, path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({describe(error)})") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Dataset(ABC):
    """A source of samples.

    Args:
        params: an instance of the class's `Params`.
        data_dir: this machine's folder for data; it may not exist yet.
    """

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any, data_dir: Path) -> None:
        self.params = params
        self.data_dir = data_dir

    def files(self) -> list[DataFile]:
        """Locate the files that `load` needs on this machine; download what must be.

        Raises:
            ConfigError: a file is missing or is not what it should be.
        """
        return []

    @abstractmethod
    def load(self, paths: Mapping[str, Path]) -> Data:
        """Read the data; the same files and parameters give the same bits everywhere.

        Args:
            paths: for each name in `files`, where this process finds the content. The paths may
                be named by content: nothing follows from their names or suffixes.

        Raises:
            ConfigError: a file's content is not what it should be.
        """
