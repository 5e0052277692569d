"""Datasets: where samples come from.

The submitter calls `files()` to find (or download) what a data set needs; nodes get those files
by content, and every process calls `load()` with its own copies.
"""

from aiosgd.plugins.datasets.base import Data, DataFile, Dataset, sha256
from aiosgd.plugins.datasets.digits import Digits
from aiosgd.plugins.datasets.files import Csv, Npz
from aiosgd.plugins.datasets.mnist import Mnist
from aiosgd.plugins.datasets.synthetic import Synthetic

__all__ = [
    "Csv",
    "Data",
    "DataFile",
    "Dataset",
    "Digits",
    "Mnist",
    "Npz",
    "Synthetic",
    "sha256",
]
