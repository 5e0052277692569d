"""What is known of a cluster and of the job that is shown, put together as the nodes tell it.

No input or output: `dashboard.watch` asks the nodes, `dashboard.page` draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aiosgd.report.run import Links, Run, Table, last_lines, links_in
from aiosgd.runtime.archive import RUNNING
from aiosgd.runtime.config import Address, JobConfig
from aiosgd.runtime.harvest import Collected, Figures, distances
from aiosgd.runtime.learner import Sketch
from aiosgd.runtime.results import EVAL, TRAIN, Rows, Summary
from aiosgd.runtime.survey import Fate, Seen, fates

# seconds without a job after which what one left is read from the nodes' disks: the next job may
# begin at once, and should not have to share their processors
SETTLED = 3.0


@dataclass
class Left:
    """What one node has left of a job so far.

    Attributes:
        node: as which node of the job.
        train, evaluations, sketches: its rows.
        links: what it says of its links, both ways.
        log: the end of its log, once the job is over.
    """

    node: int
    train: Rows = field(default_factory=lambda: Rows(TRAIN))
    evaluations: Rows = field(default_factory=lambda: Rows(EVAL))
    sketches: list[Sketch] = field(default_factory=list)
    links: Links = field(default_factory=dict)
    figures: Figures | None = None
    log: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """How many rows of each table there are."""
        return len(self.train), len(self.evaluations)

    def add(self, piece: Collected, links: Links) -> None:
        """Take what followed."""
        self.train.extend(piece.train)
        self.evaluations.extend(piece.evaluations)
        self.sketches.append(piece.sketches[: len(piece.evaluations)])
        self.links |= links
        self.figures = piece.figures or self.figures


class Trace:
    """One job, as far as its nodes have told."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.job: JobConfig | None = None
        self.facts: Mapping[str, Any] = {}
        self._left: dict[tuple[int, float | None], Left] = {}  # a node that was back began later
        self._whole: set[int] = set()

    def left(self, node: int, began: float | None) -> Left:
        """Return what a node that began to take part then has left so far."""
        return self._left.setdefault((node, began), Left(node))

    def is_whole(self, node: int) -> bool:
        """Tell whether there is all that a node has left."""
        return node in self._whole

    def end(self, node: int, copy: Collected) -> None:
        """Take what a node kept of the job; rows that only came while it ran stay."""
        self._whole.add(node)
        log = copy.log.decode(errors="replace")
        own = [key for key in self._left if key[0] == node]
        if len(copy.train) >= max((self._left[key].place[0] for key in own), default=0):
            newest = max(own, key=lambda key: key[1] or 0.0, default=(node, None))
            links = self._left.get(newest, Left(node)).links
            self._left[newest] = Left(node)
            self._left[newest].add(copy, links | links_in(node, log))
        for key in own or [(node, None)]:
            self._left.setdefault(key, Left(node)).log = last_lines(log)

    # What it looks like ------------------------------------------------------------------------

    def run(self, fate: Fate) -> Run | None:
        """Return the job as a report takes it; None until a node has told what it is."""
        if self.job is None:
            return None
        parts = sorted(self._left.values(), key=lambda part: part.node)
        train = _joined(TRAIN, [part.train for part in parts])
        evaluations = _joined(EVAL, [part.evaluations for part in parts])
        consensus = distances(evaluations.epoch, [one for part in parts for one in part.sketches])
        run = Run(
            job=self.job,
            facts=self.facts,
            summary=self._summary(fate, train, evaluations),
            train=train,
            eval=evaluations,
            consensus=consensus,
            links=_links(parts),
        )
        if fate.state in (RUNNING, "done"):
            return run
        logs: dict[int | None, str] = {part.node: part.log for part in parts if part.log}
        return dataclasses.replace(run, logs=logs)

    def _summary(self, fate: Fate, train: Table, evaluations: Table) -> Summary:
        figures = self._figures()
        samples = sum(one["samples"] for one in figures.values())
        train_s = max((one["train_s"] for one in figures.values()), default=0.0)
        addresses = self.facts.get("nodes")
        addresses = addresses if isinstance(addresses, dict) else {}
        state: Any = fate.state
        return Summary(
            job_id=self.job_id,
            state=state,
            error=fate.reason or None,
            metrics=_final(evaluations, min(evaluations.node, default=0)),
            nodes=len(addresses) or len(figures),
            steps=int(train.step.max()) + 1 if len(train) else 0,
            epochs=int(train.epoch.max()) + 1 if len(train) else 0,
            samples=samples,
            wall_s=math.nan if fate.took is None else fate.took,
            train_s=train_s,
            samples_per_s=samples / train_s if train_s else math.nan,
            bytes_sent=sum(one["bytes_sent"] for one in figures.values()),
            bytes_received=sum(one["bytes_received"] for one in figures.values()),
            staleness_mean=_of_finite(np.mean, train.staleness),
            staleness_max=_of_finite(np.max, train.staleness),
            per_node={
                node: {"address": str(addresses.get(str(node), "")), **one}
                | _final(evaluations, node)
                for node, one in sorted(figures.items())
            },
        )

    def _figures(self) -> dict[int, dict[str, Any]]:
        """Return each node's newest figures."""
        newest = sorted(self._left.items(), key=lambda item: item[0][1] or 0.0)
        known = {key[0]: part.figures for key, part in newest if part.figures}
        return {node: dataclasses.asdict(figures) for node, figures in known.items()}


def _joined(dtype: np.dtype[Any], tables: Iterable[Rows]) -> Table:
    return np.concatenate([np.empty(0, dtype), *(t.array() for t in tables)]).view(np.recarray)


def _links(parts: Iterable[Left]) -> Links:
    """Return what went over each link; of both ends' counts, the sender's."""
    found: Links = {}
    sent: Links = {}
    for part in parts:
        for link, counts in part.links.items():
            (sent if link[0] == part.node else found)[link] = counts
    return found | sent


def _final(evaluations: Table, node: int) -> dict[str, float]:
    own = evaluations[evaluations.node == node]
    return {name: float(own[name][-1]) for name in ("loss", "accuracy") if len(own)}


def _of_finite(function: Any, values: Any) -> float:
    finite = np.maximum(values[np.isfinite(values)], 0)
    return float(function(finite)) if len(finite) else math.nan


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is known at some time, for whoever draws it.

    Attributes:
        seen: what was seen of each node last.
        all_asked: whether each has answered, or failed to.
        fates: what became of all jobs that the nodes remember, those that run first.
        run: the first of these, as far as there is anything of it.
    """

    seen: tuple[Seen, ...]
    all_asked: bool
    fates: tuple[Fate, ...] = ()
    run: Run | None = None

    @property
    def fate(self) -> Fate | None:
        """What becomes of the job that is shown: the one that runs, or else the newest."""
        return next(iter(self.fates), None)

    @property
    def answers(self) -> bool:
        """Whether any node does."""
        return any(one.status is not None for one in self.seen)


class Live:
    """What is known of a cluster's nodes, and of the job that is shown.

    Args:
        places: place in the cluster file -> address.

    Attributes:
        seen: place -> what was seen there last.
        version: grows whenever anything is new.
        quiet_since: since when no job runs; None while one does.
    """

    def __init__(self, places: Mapping[str, Address]) -> None:
        self.seen = {place: Seen(place=place, address=at) for place, at in places.items()}
        self.version = 0
        self.quiet_since: float | None = None
        self._asked: set[str] = set()
        self._fates: tuple[Fate, ...] | None = ()
        self._trace: Trace | None = None

    def saw(self, now: float, seen: Seen) -> None:
        """Take what was seen of a node; one that is silent is remembered with its history."""
        before = self.seen[seen.place]
        if seen.error:
            seen = dataclasses.replace(seen, history=before.history)
        self.seen[seen.place] = seen
        if (seen.history, _job_of(seen)) != (before.history, _job_of(before)):
            self._fates = None
        if seen != before or seen.place not in self._asked:
            self.changed()
        self._asked.add(seen.place)
        runs = any(map(_job_of, self.seen.values()))
        self.quiet_since = None if runs else now if self.quiet_since is None else self.quiet_since

    def changed(self) -> None:
        """Note that there is something new."""
        self.version += 1

    @property
    def fate(self) -> Fate | None:
        """What becomes of the job that is shown: the one that runs, or else the newest."""
        if self._fates is None:
            self._fates = tuple(fates(list(self.seen.values())))
        return next(iter(self._fates), None)

    def moment(self) -> Moment:
        """Return what is known now."""
        fate = self.fate
        return Moment(
            seen=tuple(self.seen.values()),
            all_asked=len(self._asked) == len(self.seen),
            fates=self._fates or (),
            run=self.trace(fate.job_id).run(fate) if fate else None,
        )

    def trace(self, job_id: str) -> Trace:
        """Return what there is of a job; what there was of another one is forgotten."""
        if self._trace is None or self._trace.job_id != job_id:
            self._trace = Trace(job_id)
        return self._trace

    def is_settled(self, now: float) -> bool:
        """Tell whether no job has run for so long that the nodes may be asked for what is left."""
        return self.quiet_since is not None and now - self.quiet_since >= SETTLED


def _job_of(seen: Seen) -> str:
    return seen.status.job_id if seen.status else ""
