"""Partitions: which samples a worker can see at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import NoParams

Labels: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = npt.NDArray[np.int64]


class Partition(ABC):
    """Divides the training samples among the workers.

    Class attributes:
        shared: whether every worker sees all samples; otherwise each sample is one worker's own.
    """

    Params: ClassVar[type] = NoParams
    shared: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def split(self, labels: Labels, workers: int, rng: np.random.Generator) -> list[Indices]:
        """Return each worker's sample indices: ascending int64, never none at all.

        Unless `shared`, every sample goes to exactly one worker. The same arguments and state of
        `rng` give the same indices.

        Raises:
            ConfigError: there are too few samples for the workers.
        """


class Shared(Partition):
    """Every worker sees every sample: one data set, several machines."""

    shared: ClassVar[bool] = True

    def split(self, labels: Labels, workers: int, rng: np.random.Generator) -> list[Indices]:
        """Return the same read-only indices for each worker."""
        _check_counts("shared", len(labels), workers, least=1)
        indices = np.arange(len(labels), dtype=np.int64)
        indices.setflags(write=False)
        return [indices] * workers


class Iid(Partition):
    """Samples are dealt out at random; sizes differ by one at most."""

    def split(self, labels: Labels, workers: int, rng: np.random.Generator) -> list[Indices]:
        """Deal out a random order in equal parts."""
        _check_counts("iid", len(labels), workers, least=workers)
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), workers)]


class Shards(Partition):
    """Samples are sorted by label and cut into shards; each worker gets a few at random.

    Source: McMahan, Moore, Ramage, Hampson and Agüera y Arcas, AISTATS 2017, 1602.05629,
    section 3 (there 200 shards of MNIST, two for each of 100 clients).
    """

    @dataclass(frozen=True)
    class Params:
        """Parameters.

        Attributes:
            per_worker: shards that each worker gets; about as many labels as it will see.
        """

        per_worker: int = 2

        def __post_init__(self) -> None:
            if self.per_worker < 1:
                raise ValueError(f"per_worker is {self.per_worker}; expected at least 1")

    def split(self, labels: Labels, workers: int, rng: np.random.Generator) -> list[Indices]:
        """Cut the samples, sorted by label, and deal out the shards."""
        count = workers * self.params.per_worker
        _check_counts("shards", len(labels), workers, least=count)
        shards = np.array_split(np.argsort(labels, kind="stable"), count)
        dealt = rng.permutation(count).reshape(workers, self.params.per_worker)
        return [np.sort(np.concatenate([shards[i] for i in own])) for own in dealt]


class Dirichlet(Partition):
    """Each class is divided among the workers in proportions drawn from Dirichlet(alpha).

    A small alpha gives each worker few classes and workers of very different sizes; a large one
    comes close to `iid`.

    Draws that leave a worker with too little are repeated. With hundreds of workers none may do:
    then those with too little get samples at random, each from the worker that has most.

    Source: Hsu, Qi and Brown 2019, 1909.06335; drawn per class instead of per client, so that
    every sample is used, as in Yurochkin et al., ICML 2019, 1905.12022.
    """

    DRAWS: ClassVar[int] = 100

    @dataclass(frozen=True)
    class Params:
        """Parameters.

        Attributes:
            alpha: concentration; above 0.
            minimum: samples that each worker must get.
        """

        alpha: float = 0.5
        minimum: int = 1

        def __post_init__(self) -> None:
            if not 0 < self.alpha < float("inf"):
                raise ValueError(f"alpha is {self.alpha}; expected a finite number above 0")
            if self.minimum < 1:
                raise ValueError(f"minimum is {self.minimum}; expected at least 1")

    def split(self, labels: Labels, workers: int, rng: np.random.Generator) -> list[Indices]:
        """Draw how much of each class each worker gets, then which samples."""
        minimum = self.params.minimum
        _check_counts("dirichlet", len(labels), workers, least=workers * minimum)
        sizes = np.unique(labels, return_counts=True)[1]
        for _ in range(self.DRAWS):
            ends = self._ends(sizes, workers, rng)
            if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= minimum:
                return _dealt(labels, ends, rng)
        return _mended(_dealt(labels, ends, rng), minimum, rng)

    def _ends(self, sizes: npt.NDArray[np.intp], workers: int, rng: np.random.Generator) -> Indices:
        """Return where each worker's part of each class ends; (classes, workers)."""
        shares = rng.dirichlet(np.full(workers, self.params.alpha), len(sizes)).cumsum(axis=1)
        return np.rint(shares * sizes[:, None]).astype(np.int64)


def _dealt(labels: Labels, ends: Indices, rng: np.random.Generator) -> list[Indices]:
    """Cut each class, in random order, at its ends."""
    parts = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), cuts[:-1])
        for label, cuts in zip(np.unique(labels), ends, strict=True)
    ]
    return [np.sort(np.concatenate(own)) for own in zip(*parts, strict=True)]


def _mended(parts: list[Indices], minimum: int, rng: np.random.Generator) -> list[Indices]:
    """Give each worker the minimum: one sample after the other, from whoever has most then."""
    owned = [list(part) for part in parts]
    counts = np.array([len(own) for own in owned])
    for poor, own in enumerate(owned):
        while len(own) < minimum:
            rich = int(counts.argmax())
            own.append(owned[rich].pop(rng.integers(counts[rich])))
            counts[[poor, rich]] += 1, -1
    return [np.sort(np.array(own, np.int64)) for own in owned]


def _check_counts(name: str, samples: int, workers: int, least: int) -> None:
    if workers < 1:
        raise ConfigError(f"partition {name}: there are {workers} workers; expected at least 1")
    if samples < least:
        raise ConfigError(
            f"partition {name}: {samples} training samples for {workers} workers; "
            f"expected at least {least}"
        )
