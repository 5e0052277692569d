"""The data set that comes with aiosgd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from aiosgd.plugins.datasets.base import Data, Dataset


class Digits(Dataset):
    """1,797 handwritten digits of 8 x 8 pixels, 1,437 to train on; part of aiosgd itself.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository 1998, doi 10.24432/C50P49, CC BY 4.0; see data/LICENSE-digits.txt.
    """

    content: ClassVar[Path] = Path(__file__).parents[1] / "data" / "digits.npz"

    def load(self, paths: Mapping[str, Path]) -> Data:
        """Read the embedded file; pixels are scaled to 0 … 1."""
        with np.load(self.content, allow_pickle=False) as stored:
            return Data(
                stored["train_x"] / np.float32(16),
                stored["train_y"].astype(np.int64),
                stored["test_x"] / np.float32(16),
                stored["test_y"].astype(np.int64),
                classes=10,
            )
