"""What a benchmark returns, and how its options are read."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiosgd.errors import ConfigError

ROUNDS = 5

Note: TypeAlias = Callable[[str], None]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case beside one peer; times in seconds.

    Attributes:
        bytes: of one array.
        nodes: that take part.
        seconds: median.
        span: smallest and largest value of a round.
        peer: what was measured beside it, round by round; None if nothing was.
        peer_seconds: its median.
        more: further figures of this kind of work, by name.
    """

    bytes: int
    nodes: int
    seconds: float
    span: tuple[float, float]
    peer: str | None = None
    peer_seconds: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times longer the peer takes."""
        return self.peer_seconds / self.seconds if self.peer_seconds is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON takes it."""
        return {
            "bytes": self.bytes,
            "nodes": self.nodes,
            "seconds": self.seconds,
            "peer": self.peer,
            "peer_seconds": self.peer_seconds,
            "ratio": self.ratio,
            "range": list(self.span),
            **self.more,
        }


@dataclass(frozen=True)
class Report:
    """A benchmark's rows.

    Attributes:
        work: what was measured: `wire`, `messages`, ….
        rounds: how often each case was measured.
        warnings: what may have disturbed it, a sentence each.
    """

    work: str
    rows: Sequence[Row]
    rounds: int
    warnings: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {"work": self.work, "rows": [row.to_dict() for row in self.rows]}


@dataclass
class Samples:
    """The values of one contestant, one list per round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(self._medians)

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest of the rounds' medians."""
        return min(self._medians), max(self._medians)

    @property
    def _medians(self) -> list[float]:
        return [statistics.median(values) for values in self.rounds]


def row(bytes: int, nodes: int, ours: Samples, peer: str | None, theirs: Samples | None) -> Row:
    """Make a row of two contestants' samples."""
    return Row(
        bytes=bytes,
        nodes=nodes,
        seconds=ours.median,
        span=ours.span,
        peer=peer if theirs else None,
        peer_seconds=theirs.median if theirs else None,
    )


def with_more(one: Row, **more: Any) -> Row:
    """Return a row with further figures."""
    return dataclasses.replace(one, more={**one.more, **more})


def machine() -> str:
    """Return a line that says what this machine is."""
    return (
        f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )


# Options --------------------------------------------------------------------------------------


def read_sizes(text: str, largest: int | None = None) -> list[int]:
    """Read `1MB,10MB,100MB`: numbers of bytes, rounded down to whole float32 values.

    Raises:
        ConfigError: no size, a size below 4 bytes, or above `largest`.
    """
    sizes = [_size(part) // 4 * 4 for part in text.split(",")]
    for part, size in zip(text.split(","), sizes, strict=True):
        if size < 4 or (largest is not None and size > largest):
            expected = f"4 to {largest}" if largest is not None else "4 or more"
            raise ConfigError(f"--bytes: {part.strip()!r} is {size} bytes; expected {expected}")
    return sizes


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(
            f"--bytes: {text.strip()!r} is no size; expected a number of B, kB, MB or GB: 1MB,10MB"
        )
    return round(float(match[1]) * factor)


def read_counts(text: str, option: str = "--nodes") -> list[int]:
    """Read `2,4`.

    Raises:
        ConfigError: one of them is no number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or not 0 < int(part) < 10**6:
            raise ConfigError(f"{option}: {part!r} is no number from 1; expected such as 2,4")
    return [int(part) for part in parts]


def check_rounds(rounds: int) -> None:
    """Raise ConfigError unless there is at least one round."""
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected 1 or more")
