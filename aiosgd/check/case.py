"""A case: everything that one run of a check depends on, as a line of text that replays it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from dataclasses import dataclass

from aiosgd.codecs.base import Exchange, Mode
from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import check_value, nearest
from aiosgd.runtime.job import server_ids
from aiosgd.runtime.simulation.faults import parse_faults, parse_stragglers

LIMITS = {"workers": 64, "servers": 8, "steps": 100_000, "size": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a check.

    Attributes:
        check: the check's name.
        mode, exchange: of the job.
        workers, servers, redundancy, steps: of the job.
        size: elements of the vector.
        seed: of the values and of `ctx.rng`.
        schedule: of everything that decides the order: who is next, or the network's draws.
        jitter: seconds that a simulated message may be late.
        slow: which simulated workers are slow: WORKER:FACTOR.
        faults: what goes wrong in a simulation, as `aiosgd simulate --faults` takes it.
    """

    check: str
    mode: Mode = "sync"
    exchange: Exchange = "gradients"
    workers: int = 2
    servers: int = 0
    redundancy: int = 1
    steps: int = 1
    size: int = 1
    seed: int = 0
    schedule: int = 0
    jitter: float = 0.0
    slow: str = ""
    faults: str = ""

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            low = 0 if name == "servers" else 1
            if not low <= getattr(self, name) <= limit:
                raise ConfigError(
                    f"--case: {name} is {getattr(self, name)}; expected {low}..{limit}"
                )
        if not 1 <= self.redundancy <= self.workers:
            raise ConfigError(
                f"--case: redundancy is {self.redundancy}; expected 1..{self.workers}, the workers"
            )
        if min(self.seed, self.schedule) < 0 or self.jitter < 0:
            raise ConfigError("--case: seed, schedule and jitter are 0 or more")
        parse_stragglers(self.slow, self.workers, self.seed, "--case: slow")
        parse_faults(self.faults, self.nodes, "--case: faults")

    @property
    def nodes(self) -> tuple[int, ...]:
        """All nodes: workers 0, 1, …, servers -1, -2, …."""
        return (*range(self.workers), *server_ids(self.servers))

    def __str__(self) -> str:
        """Return the text that `parse` reads; what has its default is left out."""
        words = [self.check]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={value}")
        return " ".join(words)

    def but(self, **changes: typing.Any) -> Case:
        """Return the same case but for some attributes."""
        return dataclasses.replace(self, **changes)


def parse(text: str, checks: Collection[str]) -> Case:
    """Read a case.

    Args:
        text: such as `schedules workers=3 schedule=7`.
        checks: the names of checks.

    Raises:
        ConfigError: it is no case; the message says what would be.
    """
    check, *words = text.split() or [""]
    if check not in checks:
        known = ", ".join(checks)
        raise ConfigError(
            f"--case: there is no check {check!r}{nearest(check, list(checks))}; checks: {known}"
        )
    hints = typing.get_type_hints(Case)
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in hints:
            known = ", ".join(f"{field.name}=…" for field in dataclasses.fields(Case)[1:])
            raise ConfigError(f"--case has {word!r}; expected any of {known}")
        values[name] = check_value(_number(value, hints[name]), hints[name], f"--case: {name}")
    return Case(check=check, **values)


def _number(text: str, kind: object) -> str | int | float:
    if kind in (int, float):
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            pass
    return text
