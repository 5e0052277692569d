"""Traces as files of JSON lines, and the first event in which two of them differ.

The first line says what the simulation was made with: the same facts should give the same events.
Each other line is one event, its keys those of `Event`.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import aiosgd
from aiosgd.errors import ConfigError
from aiosgd.runtime.job import node_name
from aiosgd.runtime.simulation.loop import SECOND
from aiosgd.runtime.simulation.trace import Event, Trace, What

FORMAT = "aiosgd trace 1"


@dataclass(frozen=True)
class Recorded:
    """A trace that was read.

    Attributes:
        header: what it was made with.
        events: all of them.
    """

    header: Mapping[str, Any]
    events: Sequence[Event]


class Difference(NamedTuple):
    """Where two traces part.

    Attributes:
        place: how many events they have in common.
        first, second: the next of each; None where a trace ends.
        sentence: all of it for people.
    """

    place: int
    first: Event | None
    second: Event | None
    sentence: str


Source: TypeAlias = Trace | Recorded | str | Path


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return what of this machine and its programs decides a simulation's bits.

    The kind of processor does, for BLAS chooses by it how to add.
    """
    facts = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "aiosgd": aiosgd.__version__,
        "machine": platform.machine(),
    }
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            facts.setdefault("cpu", value)
        elif key in ("flags", "Features"):  # x86's and ARM's
            facts.setdefault("cpu_flags", " ".join(sorted(value.split())))
    return facts


def write_trace(path: str | Path, trace: Trace, seed: int, job: Mapping[str, Any]) -> None:
    """Write a trace whose events were kept.

    Args:
        path: of the file; what is there is replaced.
        trace: the trace.
        seed: of the simulation.
        job: the job's options, as JSON has them.

    Raises:
        ValueError: its events were not kept.
    """
    if len(trace.events) != trace.count:
        raise ValueError(f"{path}: the trace kept {len(trace.events)} of {trace.count} events")
    header = {
        "format": FORMAT,
        **machine(),
        "seed": seed,
        "job": dict(job),
        "events": trace.count,
        "sha256": trace.digest,
    }
    with Path(path).open("w", encoding="utf-8") as file:
        file.write(json.dumps(header) + "\n")
        file.writelines(
            json.dumps({**event._asdict(), "what": event.what.name}) + "\n"
            for event in trace.events
        )


def read_trace(path: str | Path) -> Recorded:
    """Read a trace's file.

    Raises:
        ConfigError: it cannot be read, is something else, or is not whole.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    header = _parsed(lines[0] if lines else "", path, 1)
    if header.get("format") != FORMAT:
        raise ConfigError(f"{path} is no trace; expected a first line with format {FORMAT!r}")
    events = [_event(line, path, number) for number, line in enumerate(lines[1:], 2)]
    if len(events) != header.get("events"):
        raise ConfigError(
            f"{path} has {len(events)} events; expected {header.get('events')}, as it begins"
        )
    return Recorded(header, events)


def _parsed(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {number} is {line[:40]!r}; expected a JSON object")
    return value


def _event(line: str, path: str | Path, number: int) -> Event:
    value = _parsed(line, path, number)
    what = str(value.get("what"))
    integers = [value.get(key) for key in Event._fields if key != "what"]
    is_whole = value.keys() == {*Event._fields} and all(type(one) is int for one in integers)
    if not is_whole or what not in What.__members__:
        keys = ", ".join(Event._fields)
        raise ConfigError(f"{path}, line {number} is {line[:40]!r}…; expected an event: {keys}")
    return Event(**{**value, "what": What[what]})


def first_difference(first: Source, second: Source) -> Difference | None:
    """Return where two traces part; None if they are equal, event by event.

    Raises:
        ValueError: a trace did not keep its events.
        ConfigError: as `read_trace`.
    """
    one, other = _recorded(first), _recorded(second)
    pairs = itertools.zip_longest(one.events, other.events)
    for index, (a, b) in enumerate(pairs):
        if a != b:
            parts = f"event {index + 1} differs: {_said(a)} in the first, {_said(b)} in the second"
            return Difference(index, a, b, parts + _made_with(one.header, other.header))
    return None


def _recorded(source: Source) -> Recorded:
    if isinstance(source, Recorded):
        return source
    if not isinstance(source, Trace):
        return read_trace(source)
    if len(source.events) != source.count:
        raise ValueError(f"the trace kept {len(source.events)} of {source.count} events")
    return Recorded({}, source.events)


def _made_with(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Say which facts of two headers differ, if both have them."""
    keys = [key for key in first if key in second and key not in ("events", "sha256")]
    differ = [key for key in keys if first[key] != second[key]]
    said = [
        key if key in ("cpu_flags", "job") else f"{key} ({first[key]} and {second[key]})"
        for key in differ
    ]
    return f"; they were made with different {', '.join(said)}" if said else ""


def _said(event: Event | None) -> str:
    """Say what happened, and when."""
    if event is None:
        return "the end"
    node, peer = node_name(event.node), node_name(event.peer)
    message = f"message {event.number} ({event.size} bytes)"
    match event.what:
        case What.SEND:
            said = f"{node} sends {message} to {peer}"
        case What.DELIVER:
            said = f"{peer} gets {message} from {node}"
        case What.DROP:
            said = f"{message} from {node} to {peer} is dropped"
        case What.COMPUTE:
            said = f"{node} has computed block {event.number} (checksum {event.size:08x})"
        case What.CRASH:
            said = f"{node} crashes"
        case What.BREAK:
            said = f"{node} is found to be gone"
        case What.CUT:
            said = f"{event.node} and {event.peer} nodes are cut apart"
        case What.HEAL:
            said = "all cuts end"
    return f"{said} at {event.time_ns / SECOND:.9f} s"
