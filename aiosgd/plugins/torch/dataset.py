"""Data sets that are PyTorch's: read through once, on the submitter's machine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from aiosgd.errors import ConfigError
from aiosgd.plugins.code import Code, call
from aiosgd.plugins.datasets import Data, DataFile, Dataset, sha256
from aiosgd.plugins.datasets.base import Labels, Samples
from aiosgd.plugins.registry import describe
from aiosgd.plugins.torch import load_torch

FILE = "arrays.npy"
PARTS = ("train_x", "train_y", "test_x", "test_y")


class Torch(Dataset):
    """Any `torch.utils.data.Dataset`, made by a function of the user's own; needs the extra `torch`.

    The function returns one of (sample, label) pairs, from which test samples are set aside, or a
    pair of them: to train on, and to test on. It is called on the submitter's machine alone, and all
    samples are kept as arrays, which nodes get as a file: they need neither PyTorch nor the data for
    it, and run nothing. Labels are whole numbers from 0. Samples are all of one shape; what
    transforms draw is drawn once, from a generator with `seed`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Params:
        """Parameters of `Torch`.

        Attributes:
            factory: called with `args`; returns a data set, or a pair: to train and to test.
            args: the function's arguments, by name.
            test_fraction: the part that is set aside for testing, of a single data set.
            seed: decides which samples these are, and what transforms draw.
        """

        factory: Code
        args: dict[str, Any] = field(default_factory=dict)
        test_fraction: float = 0.2
        seed: int = 0

        def __post_init__(self) -> None:
            if not 0 < self.test_fraction < 1:
                raise ValueError(f"test_fraction is {self.test_fraction}; expected between 0 and 1")
            if self.seed < 0:
                raise ValueError(f"seed is {self.seed}; expected a number from 0")

    def files(self) -> list[DataFile]:
        """Read the data set through, and write its samples as arrays: the same ones, the same file."""
        arrays = self._arrays()
        folder = self.data_dir / "torch"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                path = Path(temporary, FILE)
                with path.open("wb") as file:
                    for name in PARTS:
                        np.lib.format.write_array(file, arrays[name], allow_pickle=False)
                path = path.rename(folder / f"{sha256(path)}.npy")
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({describe(error)})") from error
        return [DataFile.of(FILE, path)]

    def load(self, paths: Mapping[str, Path]) -> Data:
        """Read the arrays."""
        try:
            with paths[FILE].open("rb") as file:
                x, y, test_x, test_y = (_read_array(file) for _ in PARTS)
            classes = 1 + int(max(y.max(initial=0), test_y.max(initial=0)))
            return Data(x, y, test_x, test_y, classes)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._origin}: {error}") from error

    @property
    def _origin(self) -> str:
        return f"dataset.factory {self.params.factory.text!r}"

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        torch = load_torch("the data set 'torch'")
        make = self.params.factory.function("dataset.factory")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.params.seed)
            made = call(self._origin, make, **self.params.args)
            given = made if isinstance(made, tuple) else (made,)
            parts = [call(self._origin, _materialise, one) for one in given]
        if len(parts) not in (1, 2) or not all(len(labels) for _, labels in parts):
            raise ConfigError(
                f"{self._origin} returned {made!r:.80}; expected a data set with samples, or a pair "
                "of them"
            )
        pairs = parts if len(parts) == 2 else self._split(*parts[0])
        return dict(zip(PARTS, [array for pair in pairs for array in pair], strict=True))

    def _split(self, x: Samples, y: Labels) -> list[tuple[Samples, Labels]]:
        """Set a random part aside for testing; orders are kept."""
        if len(y) < 2:
            raise ConfigError(f"{self._origin} has 1 sample; expected one to test on, too")
        count = min(max(math.floor(len(y) * self.params.test_fraction), 1), len(y) - 1)
        order = np.random.default_rng(self.params.seed).permutation(len(y))
        test, train = np.sort(order[:count]), np.sort(order[count:])
        return [(x[train], y[train]), (x[test], y[test])]


def _materialise(dataset: Any) -> tuple[Samples, Labels]:
    """Read a data set through: one with a length by its indices, another as it comes."""
    items = (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__len__") else dataset
    samples: list[npt.NDArray[np.float32]] = []
    labels: list[int] = []
    for i, item in enumerate(items):
        x, y = _pair(item, i)
        samples.append(x)
        labels.append(y)
        if x.shape != samples[0].shape:
            raise ValueError(
                f"sample {i} has shape {x.shape}, sample 0 {samples[0].shape}; expected the same"
            )
    return np.stack(samples) if samples else np.empty((0, 1), np.float32), np.array(
        labels, np.int64
    )


def _pair(item: Any, i: int) -> tuple[npt.NDArray[np.float32], int]:
    if not isinstance(item, Sequence) or len(item) != 2:
        raise ValueError(f"item {i} is a {type(item).__name__}; expected a sample and its label")
    x = np.atleast_1d(np.asarray(item[0], np.float32))
    y = np.asarray(item[1])
    if y.shape != () or y.dtype.kind not in "iub" or y < 0:
        raise ValueError(f"label {i} is {item[1]!r:.40}; expected a whole number from 0")
    return x, int(y)


def _read_array(file: BinaryIO) -> Any:
    return np.lib.format.read_array(file, allow_pickle=False)
