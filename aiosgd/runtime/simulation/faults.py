"""What goes wrong in a simulation, and when; read from the text that users give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from aiosgd.errors import ConfigError
from aiosgd.runtime.simulation.draws import uniform

EXPECTED = (
    "crash:NODE@SECONDS (its links break), host:NODE@SECONDS (it falls silent) or "
    "cut:NODES|NODES@FROM-TO (nothing gets through, nothing is lost); several with ';' between"
)
_SECONDS = r"(\d+(?:\.\d+)?)"
_NODE = r"(-?\d+)"
_NODES = r"(-?\d+(?:,-?\d+)*)"
_CRASH = re.compile(rf"(crash|host):{_NODE}@{_SECONDS}")
_CUT = re.compile(rf"cut:{_NODES}\|{_NODES}@{_SECONDS}-{_SECONDS}")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%:(\d+(?:\.\d+)?)")
_WORKER = re.compile(r"(\d+):(\d+(?:\.\d+)?)")
_STRAGGLER = 4  # the purpose of a draw


@dataclass(frozen=True)
class Crash:
    """A node ends.

    Attributes:
        time_s: virtual seconds after the start.
        node: its id.
        silent: whether its host goes with it: then nobody is told, its links just fall silent.
    """

    time_s: float
    node: int
    silent: bool = False


@dataclass(frozen=True)
class Cut:
    """For a while nothing gets through between two sets of nodes; what was sent arrives after it."""

    time_s: float
    some: tuple[int, ...]
    others: tuple[int, ...]
    lasts_s: float


Fault: TypeAlias = Crash | Cut


def parse_faults(text: str, nodes: Sequence[int], place: str = "--faults") -> list[Fault]:
    """Read faults as users write them.

    Args:
        text: such as `crash:2@3.5; cut:0,1|2,3@1-4`.
        nodes: the ids that there are.
        place: where the text stands, for messages.

    Raises:
        ConfigError: it is something else, or names a node that does not exist.
    """
    faults: list[Fault] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        if match := _CRASH.fullmatch(part):
            faults.append(Crash(float(match[3]), int(match[2]), match[1] == "host"))
        elif match := _CUT.fullmatch(part):
            some, others = (tuple(map(int, match[i].split(","))) for i in (1, 2))
            start, end = float(match[3]), float(match[4])
            if end <= start or set(some) & set(others):
                raise ConfigError(f"{place} has {part!r}; expected FROM < TO and two sides")
            faults.append(Cut(start, some, others, end - start))
        else:
            raise ConfigError(f"{place} has {part!r}; expected {EXPECTED}")
        _check(faults[-1], nodes, part, place)
    return faults


def _check(fault: Fault, nodes: Sequence[int], part: str, place: str) -> None:
    named = (fault.node,) if isinstance(fault, Crash) else (*fault.some, *fault.others)
    for node in named:
        if node not in nodes:
            raise ConfigError(f"{place} has {part!r}; there is no node {node}")


def parse_stragglers(
    text: str, workers: int, seed: int, place: str = "--stragglers"
) -> dict[int, float]:
    """Read which workers are slow, and by which factor.

    Args:
        text: `SHARE%:FACTOR` for so many of a hundred workers, drawn from the seed, or
            `WORKER:FACTOR`; several with commas between.
        workers: how many there are.
        seed: of the draw.
        place: where the text stands, for messages.

    Raises:
        ConfigError: it is something else, or names a worker that does not exist.
    """
    slow: dict[int, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        if match := _SHARE.fullmatch(part):
            count = round(float(match[1]) / 100 * workers)
            order = sorted(range(workers), key=lambda node: uniform(seed, node, _STRAGGLER))
            chosen = order[:count]
        elif (match := _WORKER.fullmatch(part)) and int(match[1]) < workers:
            chosen = [int(match[1])]
        else:
            raise ConfigError(
                f"{place} has {part!r}; expected SHARE%:FACTOR or WORKER:FACTOR with a worker of "
                f"0..{workers - 1}"
            )
        if float(match[2]) < 1:
            raise ConfigError(f"{place} has {part!r}; expected a factor of 1 or more")
        slow.update(dict.fromkeys(chosen, float(match[2])))
    return slow
