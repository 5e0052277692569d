"""Visitor links: what a node answers to whoever asks about its jobs, and who asks.

A link whose HELLO has the role "visitor" carries requests, one at a time; each gets one answer.

    {"status": why}     what the node is doing: the fields of `Status`; `why` is a bool, whether to
                        add what its codecs wait for
    {"history": None}   {"history": its jobs, newest first: the fields of `archive.Entry`}
    {"log": job, "node": id, "from": offset}
                        {"state": as in the history, "log": what follows in the log, a piece of it}
    {"job": job, "node": id}
                        {"job": its options, "run": what describes it}: the tables of job.toml
    {"rows": job, "node": id, "train": first, "evaluations": first}
                        of a job under way, what training has left since these rows, some of it:
                        `Part.rows`
    {"copy": job, "node": id, "weights": bool}
                        what `archive.read_copy` returns, beside the fields of `archive.Entry`
    {"cancel": job}     {"cancelled": whether the node's leader was told, or the node left the job}

A request that cannot be met is answered by {"error": reason}. Anything else closes the link.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiosgd import __version__
from aiosgd.errors import AiosgdError, ClusterError, ConfigError, RemoteProtocolError
from aiosgd.plugins.registry import check_value, make_dataclass
from aiosgd.runtime import archive
from aiosgd.runtime.actor import Actor, frames_of
from aiosgd.runtime.archive import Entry
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import MESSAGES, Link
from aiosgd.runtime.frame import Kind, Limits, encode
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.job import Member
from aiosgd.runtime.part import Part
from aiosgd.runtime.session import Session

ROLE = "visitor"
MAX_LINKS = 16
"""Visitor links at a time: a few people who look, and scripts."""
IDLE = 60.0
"""Seconds without a request after which a visitor's link is closed."""
ACTORS = 32
"""Codecs of a node that are described at most, those in a hook first."""
TEXT = 500
"""Characters of a description or a reason."""
NOBODY, SUBMITTER = "nobody", "its submitter"

DOING = {
    "_compute": "computes a block",
    "_completed": "waits for the step's result",
    "_released": "waits until it may go on",
    "_pause": "waits for a checkpoint",
    "_evaluate": "evaluates",
    "_end_epoch": "waits for the epoch's verdict",
}
"""What the training loop does in which of its functions; the innermost one counts."""

_REQUESTS = Limits(max_metadata=1024, max_body=0)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What one codec of a node waits for.

    Attributes:
        group: which tensor group it is for.
        hook: the hook that is under way; empty if none is.
        since: seconds since its call.
        at: FILE:LINE where it waits.
        waiting, early: blocks and messages in its mailbox, and messages of later steps.
        explain: whom it waits for.
    """

    group: int
    codec: str
    step: int
    hook: str
    since: float
    at: str
    waiting: int
    early: int
    explain: str

    def __post_init__(self) -> None:
        archive.check_range({"since": self.since}, archive.LATEST)


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a node is doing.

    Attributes:
        version: of aiosgd.
        job_id: its job; empty if it is free.
        seat: where it is in the job; see `runtime.job.Seat`. `leaving`: it writes what is left.
        leader: who leads the job: `its submitter`, `worker 0`, `nobody`.
        node: as which node of the job.
        began: when it took part, in seconds since 1970.
        step, steps: how many steps it has taken, and takes at most; of a server, the newest step.
        loss, accuracy, samples_per_s, bytes_per_s: from the newest progress of a worker.
        quiet_s: seconds since then, while it trains.
        spent: what the job took so far: those of `archive.SPENT`.
        checkpoint: the step of its newest checkpoint.
        failure: why it cannot go on.
        training: what the training loop does.
        why: what its codecs wait for, if that was asked; `actors` of them there are in all.
    """

    version: str
    job_id: str
    seat: str
    leader: str
    node: int | None = None
    began: float | None = None
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    samples_per_s: float | None = None
    bytes_per_s: float | None = None
    quiet_s: float | None = None
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    checkpoint: int | None = None
    failure: str = ""
    training: str = ""
    actors: int = 0
    why: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        archive.check_range({"began": self.began}, archive.LATEST)
        archive.check_range(self.spent, archive.MOST)


# What a node is doing ----------------------------------------------------------------------------


def describe_node(member: Member, part: Part | None, leader: str, *, why: bool) -> Status:
    """Return what a node is doing.

    Args:
        member: its seat.
        part: its part in the job; one that it is about to leave, too.
        leader: who leads the job.
        why: whether to look into the codecs.
    """
    job_id = member.job_id or (part.job_id if part else "")
    seat = str(member.seat) if member.job_id or not part else "leaving"
    plain = Status(version=__version__, job_id=job_id, seat=seat, leader=leader)
    if part is None:
        return plain
    status = dataclasses.replace(
        plain,
        node=part.node,
        began=part.began,
        checkpoint=part.saved,
        failure=_short(part.failure),
        **_progress(part),
    )
    return dataclasses.replace(status, **_causes(part)) if why else status


def _progress(part: Part) -> dict[str, Any]:
    if part.session is None:
        return {}
    step = min(actor.ctx.step for actor in part.session.actors)
    spent = archive.spent_of(part.session.figures())
    facts = {"step": step, "steps": part.session.steps, "spent": spent}
    newest = part.progress
    if newest is None:
        return facts
    names = ("epoch", "loss", "accuracy", "samples_per_s", "bytes_per_s")
    facts |= {name: getattr(newest, name) for name in names}
    return facts | {"step": max(step, newest.step), "quiet_s": time.monotonic() - part.heard}


def _causes(part: Part) -> dict[str, Any]:
    """Return where the training loop and the codecs are."""
    if part.session is None:
        return {}
    actors = part.session.actors
    waiting = [_waiting(group, actor) for group, actor in enumerate(actors)]
    waiting.sort(key=lambda one: (not one.hook, one.group))
    return {
        "actors": len(actors),
        "why": [dataclasses.asdict(one) for one in waiting[:ACTORS]],
        "training": _training(part.session),
    }


def _waiting(group: int, actor: Actor) -> Waiting:
    state = {**actor.state(), "explain": _short(actor.state()["explain"])}
    return Waiting(group=group, codec=type(actor.codec).__name__, **state)


def _short(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"


def _training(session: Session) -> str:
    """Return what the training loop does: the innermost of its functions says it."""
    for task in asyncio.all_tasks():
        frames = frames_of(task.get_coro())
        names = [f.f_code.co_name for f in frames if f.f_locals.get("self") is session]
        if "_train" in names:
            return next((DOING[name] for name in reversed(names) if name in DOING), "takes a step")
    return ""


# The node's end ----------------------------------------------------------------------------------


class Visited(Protocol):
    """What visitors get to see of a node, and may ask of it."""

    @property
    def run_dir(self) -> Path:
        """Where it keeps its jobs."""

    @property
    def under_way(self) -> Sequence[Part]:
        """Its part in a job, and those that it is about to leave."""

    def status(self, *, why: bool) -> Status:
        """Return what it is doing."""

    async def cancel(self, job_id: str) -> bool:
        """Have a job end: tell whoever leads it, or leave it where nobody does.

        Returns:
            Whether the leader was told.

        Raises:
            ClusterError: it does not run here.
        """


Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Visits:
    """The visitor links of one node."""

    def __init__(self, node: Visited, spawn: Spawn) -> None:
        self.node = node
        self.spawn = spawn
        self.copying = asyncio.Lock()  # one model in memory at a time
        self._links: set[Visit] = set()

    def check(self) -> None:
        """Raise RemoteProtocolError if no further link is taken."""
        if len(self._links) >= MAX_LINKS:
            raise RemoteProtocolError(f"{MAX_LINKS} visitor links are open; close one of them")

    def add(self, link: Link) -> None:
        """Answer what comes over an accepted link."""
        self._links.add(Visit(self, link))

    def remove(self, visit: Visit) -> None:
        """Forget a link that is gone."""
        self._links.discard(visit)

    def close(self) -> None:
        """End all links."""
        for visit in list(self._links):
            visit.close()

    async def answer(self, content: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            AiosgdError: it cannot be met.
            RemoteProtocolError: it is none.
        """
        match content:
            case {"status": bool(why), **rest} if not rest:
                return dataclasses.asdict(self.node.status(why=why))
            case {"history": None, **rest} if not rest:
                entries = await asyncio.to_thread(
                    archive.history, self.node.run_dir, self._running()
                )
                return {"history": [dataclasses.asdict(entry) for entry in entries]}
            case {"log": str(job_id), "node": int(node), "from": int(offset), **rest} if (
                not rest and 0 <= offset < 1 << 60
            ):
                return await asyncio.to_thread(self._log, job_id, node, offset, self._running())
            case {"job": str(job_id), "node": int(node), **rest} if not rest:
                folder = archive.folder_of(self.node.run_dir, job_id, node)
                return await asyncio.to_thread(archive.read_job, folder)
            case {
                "rows": str(job_id),
                "node": int(node),
                "train": int(train),
                "evaluations": int(evaluations),
                **rest,
            } if not rest and 0 <= train < 1 << 40 and 0 <= evaluations < 1 << 40:
                return self._part(job_id, node).rows(train, evaluations)
            case {"copy": str(job_id), "node": int(node), "weights": bool(weights), **rest} if (
                not rest
            ):
                async with self.copying:
                    return await asyncio.to_thread(
                        self._copy, job_id, node, weights, self._running()
                    )
            case {"cancel": str(job_id), **rest} if not rest:
                return {"cancelled": await self.node.cancel(job_id)}
        raise RemoteProtocolError("a visitor sent something that is no request")

    def _running(self) -> set[tuple[str, int]]:
        return {(part.job_id, part.node) for part in self.node.under_way}

    def _part(self, job_id: str, node: int) -> Part:
        for part in self.node.under_way:
            if (part.job_id, part.node) == (job_id, node):
                return part
        raise ClusterError(f"job {job_id} does not run here as node {node}")

    def _log(
        self, job_id: str, node: int, offset: int, running: set[tuple[str, int]]
    ) -> dict[str, Any]:
        entry = archive.entry_of(self.node.run_dir, job_id, node, running)
        piece = archive.read_log(archive.folder_of(self.node.run_dir, job_id, node), offset)
        return {"state": entry.state, "log": archive.as_array(piece)}

    def _copy(
        self, job_id: str, node: int, weights: bool, running: set[tuple[str, int]]
    ) -> dict[str, Any]:
        entry = archive.entry_of(self.node.run_dir, job_id, node, running)
        if entry.state == archive.RUNNING:
            raise ClusterError(f"job {job_id} still runs")
        folder = archive.folder_of(self.node.run_dir, job_id, node)
        return {**archive.read_copy(folder, weights=weights), **dataclasses.asdict(entry)}


class Visit:
    """One visitor's link on the node's side."""

    def __init__(self, visits: Visits, link: Link) -> None:
        self._visits = visits
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._work: asyncio.Task[None] | None = None
        link.limits = _REQUESTS
        link.on_closed = self._closed
        link.on_frame = self._receive
        self._timer = self._loop.call_later(IDLE / 4, self._check_idle)

    def close(self) -> None:
        """End the link."""
        self._timer.cancel()
        self._link.close()

    def _closed(self, link: Link, reason: Exception | None) -> None:
        self._timer.cancel()
        if self._work is not None:
            self._work.cancel()
        self._visits.remove(self)

    def _check_idle(self) -> None:
        self._timer = self._loop.call_later(IDLE / 4, self._check_idle)
        quiet = self._loop.time() - max(self._link.last_heard, self._link.last_sent)
        if quiet > IDLE and (self._work is None or self._work.done()):
            self._link.abort(RemoteProtocolError(f"a visitor was silent for {quiet:.0f} s"))

    def _receive(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        if kind not in MESSAGES:
            raise RemoteProtocolError(f"a {kind.name} frame came over a visitor's link")
        if (self._work is not None and not self._work.done()) or link.queued:
            raise RemoteProtocolError("a visitor asks before it has the last answer")
        self._work = self._visits.spawn(self._answer(content))

    async def _answer(self, content: Any) -> None:
        try:
            answer = await self._visits.answer(content)
            frame = encode(answer)
        except RemoteProtocolError as error:
            self._link.abort(error)
            return
        except AiosgdError as error:
            frame = encode({"error": _short(str(error))})
        if not self._link.is_closed:
            self._link.send(frame)


# The asking end ----------------------------------------------------------------------------------

# seconds for an answer: a node reads a few files for most of them; a model may be large
PATIENCE = 10.0
COPY_PATIENCE = 600.0


@contextlib.asynccontextmanager
async def visiting(address: Address, **options: Any) -> AsyncIterator[Visitor]:
    """Open a visitor's link for the time of the context.

    Args:
        address: the node.
        options: of `introduce`.

    Raises:
        ClusterError: unreachable, or refused.
    """
    visitor = Visitor(address, await introduce(address, greeting(role=ROLE), **options))
    try:
        yield visitor
    finally:
        visitor.link.abort()


class Visitor:
    """The asking end of a visitor's link. What the node answers is checked."""

    def __init__(self, address: Address, link: Link) -> None:
        self.address = address
        self.link = link
        self._answer: asyncio.Future[Any] | None = None
        self._turn = asyncio.Lock()  # a node takes one request at a time
        link.on_closed = self._closed
        link.on_frame = self._receive

    async def status(self, *, why: bool = False) -> Status:
        """Return what the node is doing."""
        status: Status = self._read(Status, await self._ask({"status": why}))
        for one in status.why or ():
            self._read(Waiting, one)
        return status

    async def history(self) -> list[Entry]:
        """Return what the node did, newest first."""
        answer = await self._ask({"history": None})
        with self._checked():
            rows = check_value(answer.get("history"), list[dict[str, Any]], "history")
        return [self._read(Entry, row) for row in rows]

    async def log(self, job_id: str, node: int, offset: int) -> tuple[str, bytes]:
        """Return the state of a job, and a piece of its log; empty if there is no more now."""
        answer = await self._ask({"log": job_id, "node": node, "from": offset})
        with self._checked():
            return check_value(answer.get("state"), str, "state"), _octets(answer.get("log"))

    async def job(self, job_id: str, node: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a job's options, and what describes the run: the tables of its job.toml."""
        answer = await self._ask({"job": job_id, "node": node})
        with self._checked():
            job, run = (check_value(answer.get(k), dict[str, Any], k) for k in ("job", "run"))
            return job, run

    async def rows(self, job_id: str, node: int, train: int, evaluations: int) -> dict[str, Any]:
        """Return what training has left since some rows of each table; see `Part.rows`."""
        request = {"rows": job_id, "node": node, "train": train, "evaluations": evaluations}
        return await self._ask(request)

    async def copy(self, job_id: str, node: int, *, weights: bool) -> tuple[Entry, dict[str, Any]]:
        """Return how a job ended there, and all that it left."""
        request = {"copy": job_id, "node": node, "weights": weights}
        answer = await self._ask(request, COPY_PATIENCE)
        names = [field.name for field in dataclasses.fields(Entry)]
        entry: Entry = self._read(Entry, {name: answer.pop(name, None) for name in names})
        return entry, answer

    async def cancel(self, job_id: str) -> bool:
        """Have a job end; return whether somebody leads it, who was told."""
        answer = await self._ask({"cancel": job_id})
        with self._checked():
            return bool(check_value(answer.get("cancelled"), bool, "cancelled"))

    def _read(self, kind: type, values: Any) -> Any:
        with self._checked():
            return make_dataclass(kind, check_value(values, dict[str, Any], "it"), "it", "a node")

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            raise ClusterError(f"{self.address} answered nonsense: {error}") from error

    async def _ask(self, content: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            ClusterError: the link is closed, the node is silent, or cannot do what it is asked for.
        """
        async with self._turn:
            answer = await self._exchange(content, patience)
        if not isinstance(answer, dict):
            raise ClusterError(f"{self.address} answered nonsense: {answer!r:.80}")
        if answer.keys() == {"error"}:
            raise ClusterError(f"{self.address}: {answer['error']!s:.{TEXT}}")
        return answer

    async def _exchange(self, content: dict[str, Any], patience: float) -> Any:
        if self.link.is_closed:
            raise ClusterError(f"{self.address} closed the link")
        self._answer = asyncio.get_running_loop().create_future()
        self.link.send(encode(content))
        try:
            async with asyncio.timeout(patience):
                return await self._answer
        except TimeoutError:
            self.link.abort()
            raise ClusterError(
                f"{self.address} does not answer for {patience:g} s: a hook of a codec may keep "
                "it busy"
            ) from None

    def _receive(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        if kind not in MESSAGES or self._answer is None or self._answer.done():
            raise RemoteProtocolError(f"{self.address} sent something that answers nothing")
        self._answer.set_result(content)

    def _closed(self, link: Link, reason: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            text = f"{self.address} closed the link: {reason or 'without a word'}"
            self._answer.set_exception(ClusterError(text))


def _octets(value: Any) -> bytes:
    array = archive.as_octets(value)
    if array is None:
        raise ConfigError(f"log is {type(value).__name__}; expected bytes")
    return array
