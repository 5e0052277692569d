"""What the nodes of a cluster know of its jobs, put together: for whoever did not submit them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np

from aiosgd.errors import AiosgdError, ClusterError, ConfigError, RemoteProtocolError
from aiosgd.plugins.registry import check_value
from aiosgd.runtime import archive, results
from aiosgd.runtime.archive import LOST, RUNNING, SPENT, Entry
from aiosgd.runtime.config import Address, Cluster, JobConfig, from_dict
from aiosgd.runtime.coordinator import write_code
from aiosgd.runtime.harvest import LINE, End, Harvest, Outcome
from aiosgd.runtime.job import node_name
from aiosgd.runtime.results import read_job
from aiosgd.runtime.security import Security
from aiosgd.runtime.tracking import ALWAYS, Tracking
from aiosgd.runtime.visit import NOBODY, Status, Visitor, visiting
from aiosgd.runtime.workload import Workload, file_code

# seconds between two looks at a log, or at a job that is about to end
LOOK = 0.2
# seconds until a cancelled job must have ended: its leader gives each node 5, and if that is gone,
# too, another one takes its place first
CANCEL_WITHIN = 20.0
# seconds until the nodes are asked to cancel once more
ASK_AGAIN = 3.0
# what a submitter leaves in the folder of a job that it left to the nodes, or that it lost
BEGUN = frozenset({"job.toml", "submit.log", "code"})

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of one node of a cluster.

    Attributes:
        place: which line of the cluster file names it: `workers[0]`.
        error: why it could not be asked; empty if it answered.
        history: its jobs, newest first.
    """

    place: str
    address: Address
    error: str = ""
    status: Status | None = None
    history: tuple[Entry, ...] = ()

    def entry(self, job_id: str) -> Entry | None:
        """Return what it knows of a job."""
        return next((entry for entry in self.history if entry.job_id == job_id), None)


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of a job, as far as its nodes know.

    Attributes:
        state: `running`, `done`, `failed`, `cancelled` or `lost`.
        reason: why it ended so.
        took: seconds that it ran on the node where it ran longest.
        spent: what it took: sums over its nodes of those of `archive.SPENT`, but for `train_s`,
            which is the longest.
    """

    job_id: str
    state: str
    reason: str = ""
    began: float | None = None
    took: float | None = None
    nodes: tuple[int, ...] = ()
    spent: dict[str, float] = field(default_factory=dict)


class Asking:
    """Links to the nodes of a cluster, opened when they are first used; a context manager.

    Args:
        cluster: the nodes.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._security: Security | None = None
        self._visitors: dict[Address, Visitor] = {}
        self._links: dict[Address, contextlib.AsyncExitStack] = {}

    async def __aenter__(self) -> Self:
        self._security = await asyncio.to_thread(self.cluster.security.load)
        return self

    async def __aexit__(self, *_: object) -> None:
        for links in self._links.values():
            await links.aclose()

    @property
    def places(self) -> dict[str, Address]:
        """Place in the cluster file -> address, of all nodes."""
        return {
            f"{kind}[{i}]": address
            for kind, nodes in (
                ("workers", self.cluster.workers),
                ("servers", self.cluster.servers),
            )
            for i, address in enumerate(nodes)
        }

    async def visitor(self, address: Address) -> Visitor:
        """Return the link to a node; raises ClusterError."""
        known = self._visitors.get(address)
        if known is None or known.link.is_closed:
            assert self._security is not None
            links = self._links.setdefault(address, contextlib.AsyncExitStack())
            await links.aclose()  # of weeks of reconnecting nothing stays
            link = visiting(address, security=self._security)
            self._visitors[address] = known = await links.enter_async_context(link)
        return known

    async def look(self, *, why: bool = False) -> list[Seen]:
        """Ask all nodes at once what they do and did.

        Raises:
            ClusterError: none of them answers.
        """
        looks = (self._see(place, address, why) for place, address in self.places.items())
        seen = await asyncio.gather(*looks)
        if all(one.error for one in seen):
            reasons = "; ".join(f"{one.place}: {one.error}" for one in seen)
            raise ClusterError(f"no node of {self.cluster} answers: {reasons}")
        return seen

    async def _see(self, place: str, address: Address, why: bool) -> Seen:
        seen = Seen(place=place, address=address)
        try:
            visitor = await self.visitor(address)
            status, history = await visitor.status(why=why), await visitor.history()
        except ClusterError as error:
            return dataclasses.replace(seen, error=str(error))
        return dataclasses.replace(seen, status=status, history=tuple(history))


async def look(cluster: Cluster, *, why: bool = False) -> list[Seen]:
    """Ask all nodes of a cluster what they do and did; raises ClusterError if none answers."""
    async with Asking(cluster) as asking:
        return await asking.look(why=why)


# Jobs --------------------------------------------------------------------------------------------


def fates(seen: Sequence[Seen]) -> list[Fate]:
    """Return what became of all jobs that these nodes know, newest first."""
    known: dict[str, list[Entry]] = {}
    for entry in (entry for one in seen for entry in one.history):
        known.setdefault(entry.job_id, []).append(entry)
    live: dict[str, list[dict[str, float]]] = {}
    for one in seen:
        if one.status is not None and one.status.job_id:
            known.setdefault(one.status.job_id, [])
            live.setdefault(one.status.job_id, []).append(one.status.spent)
    found = [_fate(job_id, entries, live.get(job_id)) for job_id, entries in known.items()]
    return sorted(found, key=lambda fate: (fate.state == RUNNING, fate.job_id), reverse=True)


def _fate(
    job_id: str, entries: Sequence[Entry], live: Sequence[Mapping[str, float]] | None
) -> Fate:
    """Return what became of a job: once it is done or cancelled, no node can make it undone.

    Args:
        job_id: the job.
        entries: what its nodes know.
        live: of one that runs, what it took so far on each node.
    """
    running = live is not None
    states = [entry.state for entry in entries]
    ranks = ("done", "cancelled", "failed", LOST)
    state = RUNNING if running else next((s for s in ranks if s in states), LOST)
    reasons = [entry.reason for entry in entries if entry.state == state]
    spans = [e.ended - e.began for e in entries if e.began is not None and e.ended is not None]
    return Fate(
        job_id=job_id,
        state=state,
        reason="" if state in (RUNNING, "done") else next(filter(None, reasons), ""),
        began=min((e.began for e in entries if e.began is not None), default=None),
        took=max(spans, default=None),
        nodes=tuple(sorted({entry.node for entry in entries})),
        spent=_total([entry.spent for entry in entries] if live is None else live),
    )


def _total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what a job took on all its nodes together; nothing unless each node knows."""
    names = [name for name in SPENT if parts and all(name in part for part in parts)]
    return {
        name: (max if name == "train_s" else sum)(part[name] for part in parts) for name in names
    }


def fate_of(seen: Sequence[Seen], job_id: str | None, cluster: object) -> Fate:
    """Return what became of a job; without an id, of the one that runs or else the newest.

    Args:
        seen: the nodes.
        job_id: the job; its first or last letters do, where no other job has them.
        cluster: names the nodes in messages.

    Raises:
        ConfigError: no node knows it.
    """
    known = fates(seen)
    wanted = None
    if job_id is not None:
        ids = [fate.job_id for fate in known]
        wanted = results.meant(job_id, ids, f"the history of {cluster}")
        wanted = wanted or results.check_job_id(job_id)
    for fate in known:
        if wanted in (None, fate.job_id):
            return fate
    if job_id is None:
        raise ConfigError(f"the nodes of {cluster} have had no job yet{_silent(seen)}")
    newest = f"; the newest that they know is {known[0].job_id}" if known else ""
    raise ConfigError(f"no node of {cluster} knows job {job_id}{newest}{_silent(seen)}")


def _silent(seen: Sequence[Seen]) -> str:
    """Return who was not asked, as the end of a sentence."""
    silent = [f"{one.address}" for one in seen if one.error]
    return f"; {', '.join(silent)} did not answer" if silent else ""


# Logs --------------------------------------------------------------------------------------------


@dataclass
class Tail:
    """One node's log of a job, as far as it was read."""

    node: int
    address: Address
    offset: int = 0
    rest: bytes = b""
    over: bool = False
    _stamp: str = ""

    def take(self, piece: bytes) -> list[tuple[str, int, str]]:
        """Return the lines that a piece completes: time, node, text.

        A line without a time of its own, as in a traceback, belongs to the one before.
        """
        self.offset += len(piece)
        *whole, self.rest = (self.rest + piece).split(b"\n")
        return [self._line(raw) for raw in whole]

    def last(self) -> list[tuple[str, int, str]]:
        """Return what is left of a log whose last line has no end."""
        raw, self.rest = self.rest, b""
        return [self._line(raw)] if raw else []

    def _line(self, raw: bytes) -> tuple[str, int, str]:
        text = raw.decode(errors="replace")
        match = LINE.match(text)
        self._stamp = match[0] if match else self._stamp
        return self._stamp, self.node, text


async def log_lines(
    cluster: Cluster,
    job_id: str | None = None,
    *,
    node: int | None = None,
    follow: bool = False,
    note: Note = lambda _: None,
) -> AsyncIterator[tuple[int, str]]:
    """Yield the lines of all nodes' logs of a job, ordered by time: node id and text.

    Args:
        cluster: the nodes.
        job_id: the job; None: the one that runs, or else the newest.
        node: whose log alone.
        follow: whether to go on until the job ends on all nodes.
        note: told what is missing.

    Raises:
        ConfigError: no node knows the job, or no such node of it is here.
        ClusterError: no node answers.
    """
    async with Asking(cluster) as asking:
        seen = await asking.look()
        fate = fate_of(seen, job_id, cluster)
        tails = _tails(seen, fate.job_id)
        if node is not None and node not in tails:
            known = ", ".join(map(str, sorted(tails))) or "none"
            raise ConfigError(f"there is no log of node {node} of job {fate.job_id}; of: {known}")
        wanted = [tail for tail in tails.values() if node in (None, tail.node)]
        for one in seen:
            if one.error:
                note(f"{one.place}: {one.error}")
        while True:
            lines = await _read_on(asking, fate.job_id, wanted, note)
            for _, who, text in sorted(lines, key=lambda line: line[0]):
                yield who, text
            if all(tail.over for tail in wanted) or not (follow or lines):
                return
            if follow:
                await asyncio.sleep(LOOK)


def _tails(seen: Sequence[Seen], job_id: str) -> dict[int, Tail]:
    return {node: Tail(node, address) for node, address in _homes(seen, job_id).items()}


def _homes(seen: Sequence[Seen], job_id: str) -> dict[int, Address]:
    """Return where the copy of each node of a job is; best one that knows how it ended."""
    found = [
        (entry.state == LOST, entry.node, one.address)
        for one in seen
        for entry in one.history
        if entry.job_id == job_id
    ]
    homes: dict[int, Address] = {}
    for _, node, address in sorted(found, key=lambda row: row[0]):
        homes.setdefault(node, address)
    return dict(sorted(homes.items(), key=lambda item: (item[0] < 0, abs(item[0]))))


async def _read_on(
    asking: Asking, job_id: str, tails: Sequence[Tail], note: Note
) -> list[tuple[str, int, str]]:
    """Read on in all logs at once, each to where it ends now."""
    parts = await asyncio.gather(
        *(_read_tail(asking, job_id, tail, note) for tail in tails if not tail.over)
    )
    return [line for part in parts for line in part]


async def _read_tail(
    asking: Asking, job_id: str, tail: Tail, note: Note
) -> list[tuple[str, int, str]]:
    lines, piece = [], b"more"
    try:
        visitor = await asking.visitor(tail.address)
        while piece:
            state, piece = await visitor.log(job_id, tail.node, tail.offset)
            lines += tail.take(piece)
            if state != RUNNING and not piece:
                tail.over = True
    except ClusterError as error:
        note(f"{node_name(tail.node)}: {error}")
        tail.over = True
    return lines + (tail.last() if tail.over else [])


# Collecting ----------------------------------------------------------------------------------------


@dataclass
class Copies:
    """What the nodes of a job keep of it.

    Attributes:
        entries: node id -> how it ended there.
        contents: node id -> what it left.
        missing: node id -> why there is nothing of it.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    contents: dict[int, dict[str, Any]] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Made:
    """What a harvest has to know of a job's plugins, without loading them."""

    job: JobConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def model(self) -> Any:
        """The sizes of the model."""
        size = sum(int(np.prod(shape)) for shape in self.shapes.values())
        return SimpleNamespace(shapes=self.shapes, size=size)


async def fetch(
    cluster: Cluster,
    job_id: str | None = None,
    output: Path = Path("runs"),
    *,
    partial: bool = False,
    note: Note = lambda _: None,
) -> Outcome:
    """Collect what a job left on its nodes into `<output>/<job id>/`.

    Args:
        cluster: the nodes.
        job_id: the job; None: the newest.
        output: where run folders are. What a submitter began there is completed.
        partial: whether to take what there is if the node with the model does not answer.
        note: told what is missing.

    Raises:
        ConfigError: no node knows the job, or its folder has results already.
        ClusterError: no node answers, the job still runs, or the model is missing.
        JobFailedError: what was collected could not all be written.
    """
    async with Asking(cluster) as asking:
        seen = await asking.look()
        fate = fate_of(seen, job_id, cluster)
        if fate.state == RUNNING:
            raise ClusterError(
                f"job {fate.job_id} still runs; `aiosgd logs -f` follows it, and `aiosgd cancel` "
                "ends it"
            )
        _check_folder(output / fate.job_id)
        copies = await _collect(asking, seen, fate)
    source = _source(copies, fate, partial=partial)
    for node, reason in copies.missing.items():
        note(f"{node_name(node)}: {reason}")
    if 0 not in copies.contents and source:
        note(f"the model is that of {node_name(source)}")
    submitted = output / fate.job_id / "job.toml"
    own = await asyncio.to_thread(read_job, submitted.parent) if submitted.exists() else None
    outcome = await asyncio.to_thread(_write, output, fate, copies, source)
    if own is None:
        _note_untracked(read_job(outcome.folder), note)
    else:
        await _track(own, outcome, fate, note)
    return outcome


def _note_untracked(job: JobConfig, note: Note) -> None:
    """Say which trackers are not told of a job.

    Its options come from its nodes here, and trackers may send what there is to whoever they name.
    """
    names = [name for name in job.tracker if name != ALWAYS]
    if names:
        note(
            f"the job's trackers ({', '.join(names)}) are told nothing: the job was not submitted "
            "from here"
        )


async def _track(job: JobConfig, outcome: Outcome, fate: Fate, note: Note) -> None:
    """Have the trackers record a job that this machine submitted.

    Raises:
        asyncio.CancelledError: this was cancelled, which ends the waiting for the trackers.
    """
    log, handler = results.open_log(outcome.folder / "submit.log")
    tracking = Tracking(job, outcome.folder, log)
    try:
        nodes = {node: one["address"] for node, one in outcome.summary.per_node.items()}
        tracking.begin(fate.job_id, nodes, began=fate.began)
        cancelled = await tracking.ended(outcome)
    finally:
        tracking.abandon()
        handler.close()
    for name, reason in outcome.tracker_errors.items():
        note(f"tracker {name!r} {reason}")
    if cancelled:
        raise asyncio.CancelledError


def _check_folder(folder: Path) -> None:
    """Refuse a folder that has results, of which nothing may be overwritten.

    What trackers left there that were told of a job's beginning is no result.
    """
    paths = list(folder.iterdir()) if folder.is_dir() else []
    others = [path for path in paths if path.name not in BEGUN]
    trackers = read_job(folder).tracker if others and (folder / "job.toml").exists() else ()
    if any(not {path.name, path.stem, path.suffix[1:]} & {*trackers} for path in others):
        raise ConfigError(
            f"{folder} exists already; nothing is ever overwritten; --output FOLDER puts the "
            "results elsewhere"
        )


async def _collect(asking: Asking, seen: Sequence[Seen], fate: Fate) -> Copies:
    """Fetch all copies of a job; of the first worker that ended with it, the model, too."""
    homes, copies = _homes(seen, fate.job_id), Copies()
    states = {e.node: e.state for one in seen for e in one.history if e.job_id == fate.job_id}
    ended = [node for node in homes if node >= 0 and states[node] == fate.state]
    source = min(ended, default=0) if fate.state == "done" else 0

    async def take(node: int, address: Address) -> None:
        try:
            visitor = await asking.visitor(address)
            entry, content = await visitor.copy(fate.job_id, node, weights=node == source)
            copies.entries[node], copies.contents[node] = entry, content
        except ClusterError as error:
            copies.missing[node] = str(error)

    for node, address in homes.items():  # one after the other: each may be as large as the model
        await take(node, address)
    silent = {one.address: one.error for one in seen if one.error}
    for node, address in _addresses(copies).items():
        if node not in homes:
            copies.missing[node] = silent.get(address, f"{address} has no copy of the job")
    return copies


def _addresses(copies: Copies) -> dict[int, Address]:
    """Return all nodes of the job, as any of the copies names them."""
    for node, content in copies.contents.items():
        if content.get("run") is not None:
            place = f"the copy of {node_name(node)}"
            with contextlib.suppress(AiosgdError, ValueError):
                run = check_value(content["run"], dict[str, Any], place)
                nodes = check_value(run.get("nodes"), dict[str, str], f"{place}: nodes")
                return {int(peer): Address.parse(text, place) for peer, text in nodes.items()}
    return {}


def _source(copies: Copies, fate: Fate, *, partial: bool) -> int:
    """Return the worker whose copy has the model.

    Raises:
        ClusterError: it is missing, and that was not asked for.
    """
    with_model = [n for n, content in copies.contents.items() if content.get("weights") is not None]
    lacks = fate.state == "done" and not with_model
    if (lacks or 0 not in copies.contents) and not partial:
        why = copies.missing.get(0, "there is no copy of it")
        raise ClusterError(
            f"the model of job {fate.job_id} is missing, nothing was written: worker 0: "
            f"{'its copy has no weights' if 0 in copies.contents else why}; --partial takes what "
            "there is"
        )
    return min(with_model, default=0)


def _write(output: Path, fate: Fate, copies: Copies, source: int) -> Outcome:
    """Make the run folder of what was fetched."""
    job, run, shapes = _facts(copies, source, fate.job_id)
    made = cast("Workload", _Made(job, shapes))
    folder = output / fate.job_id
    if not folder.is_dir():
        results.create_folder(output, fate.job_id)
    log, handler = results.open_log(folder / "submit.log")
    try:
        if not (folder / "job.toml").exists():
            results.write_job(folder, job, run)
            write_code(folder, job, _sources(job, copies))
        nodes: dict[int, Any] = {**dict.fromkeys(copies.contents, ""), **_addresses(copies)}
        harvest = Harvest(folder, made, nodes, log)
        harvest.source = source
        reasons = _keep(harvest, fate, copies, log)
        outcome = harvest.write(fate.job_id, _end(fate, copies, reasons))
        _write_lead_logs(folder, copies)
        log.info("fetched from %s", ", ".join(map(node_name, sorted(copies.contents))))
    finally:
        handler.close()
    return outcome


def _facts(
    copies: Copies, source: int, job_id: str
) -> tuple[JobConfig, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the job's options, what describes the run, and the model's shapes.

    Raises:
        ClusterError: no copy has them.
    """
    order = sorted(copies.contents, key=lambda node: node != source)
    for node in order:
        content, place = copies.contents[node], f"the copy of {node_name(node)}"
        if content.get("job") is not None:
            job = from_dict(check_value(content["job"], dict[str, Any], place), place)
            run = check_value(content.get("run"), dict[str, Any], place)
            pairs = content.get("shapes") or []
            shapes = check_value(pairs, list[tuple[str, list[int]]], f"{place}: shapes")
            return job, run, {name: tuple(shape) for name, shape in shapes}
    raise ClusterError(f"no copy of job {job_id} says what was run")


def _sources(job: JobConfig, copies: Copies) -> list[tuple[str, bytes]]:
    """Return the code that came with a job, as far as the copies have it."""
    found: dict[str, bytes] = {}
    for content in copies.contents.values():
        for pair in content.get("sources") or ():
            match pair:
                case [str(name), text] if (octets := archive.as_octets(text)) is not None:
                    found.setdefault(name, octets)
    return [(name, found[name]) for name in file_code(job) if name in found]


def _keep(harvest: Harvest, fate: Fate, copies: Copies, log: logging.Logger) -> list[str]:
    """Give a harvest all copies; return what is wrong with them, a sentence each."""
    reasons = [f"the copy of {node_name(n)} is missing: {why}" for n, why in copies.missing.items()]
    for node, content in sorted(copies.contents.items()):
        entry = copies.entries[node]
        whole = fate.state == entry.state == "done"
        if fate.state == "done" and not whole:
            harvest.lost[node] = entry.reason
        try:
            harvest.keep(node, content, whole=whole)
        except (RemoteProtocolError, ConfigError) as error:
            reasons.append(f"the copy of {node_name(node)} is not whole: {error}")
            with contextlib.suppress(RemoteProtocolError, ConfigError):
                harvest.keep(node, {"log": content.get("log")}, whole=False)
    for reason in reasons:
        log.warning(reason)
    return reasons


def _end(fate: Fate, copies: Copies, reasons: Sequence[str]) -> End:
    state: Any = fate.state if fate.state in archive.STATES else "failed"
    own = [e.reason for e in copies.entries.values() if e.state == fate.state and e.reason]
    error = (own or [fate.reason])[0] if state != "done" else ""
    return End(
        state=state,
        error="; ".join(filter(None, [error, *reasons])),
        wall_s=fate.took or 0.0,
        checkpoint=_checkpoint(copies),
    )


def _checkpoint(copies: Copies) -> int | None:
    """Return the newest step of which all nodes have a checkpoint."""
    steps = [set(content.get("checkpoints") or ()) for content in copies.contents.values()]
    common = set.intersection(*steps) if steps and not copies.missing else set()
    return max((step for step in common if type(step) is int), default=None)


def _write_lead_logs(folder: Path, copies: Copies) -> None:
    for node, content in copies.contents.items():
        if text := archive.as_octets(content.get("lead_log")):
            with contextlib.suppress(OSError):
                (folder / "nodes" / str(node) / "lead.log").write_bytes(text)


# Cancelling --------------------------------------------------------------------------------------


async def cancel(cluster: Cluster, job_id: str | None = None) -> Fate:
    """Have a job end, and wait until its nodes are free.

    Args:
        cluster: the nodes.
        job_id: the job; None: the one that runs.

    Raises:
        ConfigError: it does not run.
        ClusterError: no node answers, or a node does not leave the job.
    """
    async with Asking(cluster) as asking:
        seen = await asking.look()
        fate = fate_of(seen, job_id, cluster)
        if fate.state != RUNNING:
            newest = f"no job runs on {cluster}; the newest is {fate.job_id}"
            ended = f"job {fate.job_id} does not run any more"
            raise ConfigError(f"{newest if job_id is None else ended}: {fate.state}")
        deadline, again = time.monotonic() + CANCEL_WITHIN, 0.0
        while busy := _busy(seen, fate.job_id):
            if time.monotonic() > deadline:
                names = ", ".join(str(one.address) for one in busy)
                raise ClusterError(f"job {fate.job_id} does not end on {names}")
            if time.monotonic() > again:
                again = time.monotonic() + ASK_AGAIN
                await _ask_to_cancel(asking, busy, fate.job_id)
            await asyncio.sleep(LOOK)
            seen = await asking.look()
        return fate_of(seen, fate.job_id, cluster)


def _busy(seen: Sequence[Seen], job_id: str) -> list[Seen]:
    return [one for one in seen if one.status is not None and one.status.job_id == job_id]


async def _ask_to_cancel(asking: Asking, busy: Sequence[Seen], job_id: str) -> None:
    """Have the job's leader told by one node; where nobody leads, have all nodes leave."""
    led = [one for one in busy if one.status is not None and one.status.leader != NOBODY]
    led.sort(key=lambda one: _rank(one.status))
    for one in led:
        if await _ask_one(asking, one, job_id):
            return
    await asyncio.gather(*(_ask_one(asking, one, job_id) for one in busy if one not in led))


def _rank(status: Status | None) -> tuple[bool, int]:
    node = status.node if status is not None and status.node is not None else 1 << 30
    return node < 0, abs(node)


async def _ask_one(asking: Asking, one: Seen, job_id: str) -> bool:
    """Ask one node; return whether it told a leader."""
    with contextlib.suppress(ClusterError):
        return await (await asking.visitor(one.address)).cancel(job_id)
    return False
