"""Assignments: which worker computes which block of the global batch."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import NoParams

Owners: TypeAlias = tuple[tuple[int, ...], ...]

MAX_BLOCKS = 100_000
"""A block is at least one sample and one message: more per step is a mistake, not a job."""


class Assignment(ABC):
    """Decides how many blocks a global batch has and who computes each."""

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def owners(self, workers: int, redundancy: int) -> Owners:
        """Return for each block the workers that compute it, ascending.

        Args:
            workers: how many there are; their ids are 0 … workers - 1.
            redundancy: how many of them compute each block.

        Raises:
            ConfigError: it cannot be done with these numbers.
        """


class Iid(Assignment):
    """Every `redundancy`-subset of the workers owns one block, in lexicographic order.

    With redundancy 1, block i belongs to worker i.
    """

    def owners(self, workers: int, redundancy: int) -> Owners:
        """Return all subsets."""
        _check(workers, redundancy)
        blocks = math.comb(workers, redundancy)
        if blocks > MAX_BLOCKS:
            raise ConfigError(
                f"assignment iid: {workers} workers with redundancy {redundancy} make {blocks} "
                f"blocks; expected at most {MAX_BLOCKS}: take assignment 'duplicate' or another "
                f"redundancy"
            )
        return tuple(itertools.combinations(range(workers), redundancy))


class Duplicate(Assignment):
    """Each group of `redundancy` consecutive workers owns one block."""

    def owners(self, workers: int, redundancy: int) -> Owners:
        """Return the groups."""
        _check(workers, redundancy)
        if workers % redundancy:
            raise ConfigError(
                f"assignment duplicate: {workers} workers are no whole number of groups of "
                f"redundancy {redundancy}; expected a multiple"
            )
        return tuple(
            tuple(range(first, first + redundancy)) for first in range(0, workers, redundancy)
        )


def _check(workers: int, redundancy: int) -> None:
    if not 1 <= redundancy <= workers:
        raise ConfigError(
            f"redundancy is {redundancy} with {workers} workers; expected 1 to the number of workers"
        )
    if workers > MAX_BLOCKS:
        raise ConfigError(f"{workers} workers; expected at most {MAX_BLOCKS}")
