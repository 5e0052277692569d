"""Samples of any number and size, made up on the spot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from aiosgd.plugins.datasets.base import Data, Dataset, Labels, Samples


class Synthetic(Dataset):
    """Gaussian classes of any size: learnable, balanced, seeded, nothing to download.

    Class centres are drawn so that two of them lie `DISTANCE` apart on average, whatever the
    number of features; samples are their centre plus normal noise. With the defaults a perfect
    classifier is right for about 99 % of the samples. There is one test sample for every six
    training samples, and at least one per class.
    """

    DISTANCE: ClassVar[float] = 6.0
    ROWS: ClassVar[int] = 4096  # samples whose noise is drawn at a time: bounds the memory

    @dataclass(frozen=True)
    class Params:
        """Parameters.

        Attributes:
            samples: training samples.
            features: number of features, or the shape of a sample as a list.
            classes: number of classes.
            noise: standard deviation of each feature around its class's centre.
            seed: of the centres, labels and noise.
        """

        samples: int = 60_000
        features: int | tuple[int, ...] = 784
        classes: int = 10
        noise: float = 1.0
        seed: int = 0

        def __post_init__(self) -> None:
            if self.classes < 2:
                raise ValueError(f"classes is {self.classes}; expected at least 2")
            if self.samples < self.classes:
                raise ValueError(
                    f"samples is {self.samples}; expected at least one for each of "
                    f"{self.classes} classes"
                )
            if not self.inputs or min(self.inputs) < 1:
                raise ValueError(f"features is {self.features}; expected positive numbers")
            if not 0 <= self.noise < math.inf:
                raise ValueError(f"noise is {self.noise}; expected a finite number from 0")
            if self.seed < 0:
                raise ValueError(f"seed is {self.seed}; expected a number from 0")

        @property
        def inputs(self) -> tuple[int, ...]:
            """Shape of one sample."""
            return (self.features,) if isinstance(self.features, int) else self.features

    def load(self, paths: Mapping[str, Path]) -> Data:
        """Make the samples; the training and the test part share their class centres."""
        params = self.params
        rng = np.random.default_rng(params.seed)
        size = math.prod(params.inputs)
        centres = rng.standard_normal((params.classes, size), dtype=np.float32)
        centres *= np.float32(self.DISTANCE / math.sqrt(2 * size))
        train = self._part(rng, centres, params.samples)
        test = self._part(rng, centres, max(params.classes, params.samples // 6))
        return Data(*train, *test, classes=params.classes)

    def _part(
        self, rng: np.random.Generator, centres: Samples, samples: int
    ) -> tuple[Samples, Labels]:
        y = rng.permutation(np.arange(samples, dtype=np.int64) % len(centres))
        x = centres[y]
        for start in range(0, samples, self.ROWS):
            rows = x[start : start + self.ROWS]
            rows += np.float32(self.params.noise) * rng.standard_normal(rows.shape, np.float32)
        return x.reshape(samples, *self.params.inputs), y
