"""One run as a report sees it: everything that is read from its folder."""

from __future__ import annotations

import csv
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from aiosgd.errors import AiosgdError, ConfigError
from aiosgd.plugins.kinds import CODECS, TOPOLOGIES
from aiosgd.plugins.registry import describe, make_params
from aiosgd.plugins.topologies import Graph
from aiosgd.runtime import results
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.results import CONSENSUS, EVAL, TRAIN, Summary

Table: TypeAlias = np.recarray[Any, Any]
Links: TypeAlias = dict[tuple[int, int], tuple[int, int]]
"""(sender, receiver) -> messages, bytes."""

# of a log, what a page shows, and what it reads to find it
TAIL_LINES = 40
TAIL_BYTES = 65_536
# the lines about links are a node's last
LINK_BYTES = 1_048_576

_LINK = re.compile(
    r"^\S+ (?:\S+ INFO )?link to (?:worker|server) (-?\d{1,9}) over \S+: sent (\d{1,18}) messages, "
    r"(\d{1,18}) bytes; received (\d{1,18}), (\d{1,18}) bytes(?:;|$)",
    re.MULTILINE,
)
# what a float still counts one by one; and more seconds than there were
_MOST = 2**53
_NODE = re.compile(r"\b(?:worker (\d{1,9})|server (-\d{1,9}))\b")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What there is of a run, checked; of one that goes on, so far.

    Attributes:
        facts: what describes the run: [run] of job.toml.
        missing: tables that are not there; they count as empty.
        links: what went over each link; of both ends' counts, the sender's.
        logs: the ends of logs, of a run that did not end well: of nodes, and None of the submitter.
    """

    job: JobConfig
    facts: Mapping[str, Any]
    summary: Summary
    train: Table
    eval: Table
    consensus: Table
    missing: tuple[str, ...] = ()
    links: Links = field(default_factory=dict)
    logs: Mapping[int | None, str] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """How many workers took part."""
        nodes = self.facts.get("nodes")
        if isinstance(nodes, dict):
            return sum(not str(node).startswith("-") for node in nodes)
        return self.job.workers or sum(node >= 0 for node in self.summary.per_node)

    @property
    def is_simulated(self) -> bool:
        """Whether its times are virtual."""
        return self.summary.simulated is not None

    def figure(self, node: int, name: str) -> float:
        """Return one of a node's own figures; NaN if there is none."""
        figures = self.summary.per_node.get(node)
        value = figures.get(name) if isinstance(figures, dict) else None
        return float(value) if isinstance(value, int | float) else np.nan

    @property
    def culprit(self) -> int | None:
        """The node that the reason of a failure names first, if it names any."""
        return culprit(self.summary)

    def graph(self) -> Graph | None:
        """Return who exchanged with whom, where the codec has a topology.

        Code that came with the job is not run for that: of FILE.py:CLASS codecs a full topology,
        which they may not even use, is None.

        Raises:
            AiosgdError: the topology cannot be made on this machine.
        """
        if not self._has_topology() or not self.workers:
            return None
        kind = TOPOLOGIES.load(self.job.topology)
        topology = kind(make_params(kind, self.job.topology_params, "topology"))
        return topology.graph(self.workers, self.job.seed)

    def _has_topology(self) -> bool:
        if self.job.topology != JobConfig.topology:
            return True
        if ":" in self.job.codec:
            return False
        try:
            return CODECS.load(self.job.codec).uses_topology
        except AiosgdError:
            return False


def read(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigError: it is none, its job has not ended, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; expected that of a run: runs/<job id>")
    if not (folder / "summary.json").exists():
        raise ConfigError(f"{folder} has no summary.json: it is no run, or one that has not ended")
    summary, job = results.read_summary(folder), results.read_job(folder)
    names = ("train", "eval", "consensus")
    return Run(
        job=job,
        facts=_facts(folder / "job.toml"),
        summary=summary,
        train=_table(folder, "train"),
        eval=_table(folder, "eval"),
        consensus=_consensus(folder / "consensus.csv"),
        missing=tuple(f"{n}.csv" for n in names if not (folder / f"{n}.csv").exists()),
        links=_links(folder),
        logs={} if summary.state == "done" else _logs(folder, culprit(summary)),
    )


def culprit(summary: Summary) -> int | None:
    """Return the node that the reason of a failure names first, if it names any."""
    found = _NODE.search(summary.error or "")
    return int(found[1] or found[2]) if found else None


def last_lines(text: str) -> str:
    """Return the end of a log."""
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def _facts(path: Path) -> dict[str, Any]:
    facts = tomllib.loads(path.read_text("utf-8")).get("run")
    return facts if isinstance(facts, dict) else {}


def _table(folder: Path, name: Literal["train", "eval"]) -> Table:
    """Read a table; one that could not be written, or that no tracker wrote, is empty."""
    if not (folder / f"{name}.csv").exists():
        return np.empty(0, {"train": TRAIN, "eval": EVAL}[name]).view(np.recarray)
    table = results.read_table(folder, name)
    check_table(table, str(folder / f"{name}.csv"))
    return table


def check_table(table: Table, source: str) -> None:
    """Refuse a table with what cannot be; losses and accuracies may be anything.

    Args:
        table: rows of train.csv or eval.csv.
        source: where it comes from.

    Raises:
        ConfigError: the message names the line that it would have in a file.
    """
    for name in table.dtype.names or ():
        if name in ("node", "loss", "accuracy"):
            continue
        least = -_MOST if name == "staleness" else 0  # results may be ahead
        wrong = np.flatnonzero((table[name] < least) | (table[name] > _MOST))
        if len(wrong):
            place, value = f"{source}:{wrong[0] + 2}: {name}", table[name][wrong[0]]
            raise ConfigError(f"{place} is {value}; expected {least} to {_MOST}")


def _consensus(path: Path) -> Table:
    names = list(CONSENSUS.names or ())
    text = path.read_text("utf-8", errors="replace") if path.exists() else ",".join(names)
    lines = csv.reader(text.splitlines())
    if (header := next(lines, [])) != names:
        raise ConfigError(f"{path}:1: columns are {','.join(header)}; expected {','.join(names)}")
    try:
        rows = [tuple(float(cell or "nan") for cell in cells) for cells in lines]
        return np.array(rows, CONSENSUS).view(np.recarray)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path}:{lines.line_num}: {describe(error)}") from error


def _end(path: Path, count: int) -> str | None:
    """Return the last bytes of a file as text; None if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _logs(folder: Path, node: int | None) -> dict[int | None, str]:
    """Return the ends of a node's log and of the submitter's, as far as they are there."""
    names: dict[int | None, str] = {None: "submit.log"}
    names |= {} if node is None else {node: f"nodes/{node}/node.log"}
    texts = {whose: _end(folder / name, TAIL_BYTES) for whose, name in names.items()}
    return {whose: last_lines(text) for whose, text in texts.items() if text is not None}


def _links(folder: Path) -> Links:
    sent: Links = {}
    received: Links = {}
    for node in _logging_nodes(folder):
        log = _end(folder / "nodes" / str(node) / "node.log", LINK_BYTES) or ""
        for link, counts in links_in(node, log).items():
            (sent if link[0] == node else received)[link] = counts
    return received | sent


def links_in(node: int, log: str) -> Links:
    """Return what a node's log says of its links, both ways."""
    found: Links = {}
    for line in _LINK.finditer(log):
        peer, out, out_bytes, back, back_bytes = map(int, line.groups())
        found[node, peer], found[peer, node] = (out, out_bytes), (back, back_bytes)
    return found


def _logging_nodes(folder: Path) -> list[int]:
    names = [path.parent.name for path in folder.glob("nodes/*/node.log")]
    return sorted(int(name) for name in names if re.fullmatch(r"-?\d{1,9}", name))
