"""Asks the nodes of a cluster what they do and what their job has left so far, while anyone looks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from aiosgd.dashboard.live import Live, Trace
from aiosgd.errors import AiosgdError, ClusterError
from aiosgd.plugins.registry import check_value
from aiosgd.report.run import Links, check_table
from aiosgd.runtime.archive import RUNNING, Entry
from aiosgd.runtime.config import Address, Cluster, JobConfig, from_dict
from aiosgd.runtime.harvest import Collected, unpack
from aiosgd.runtime.part import ROWS
from aiosgd.runtime.survey import Asking, Seen
from aiosgd.runtime.visit import Status, Visitor

INTERVAL = 1.0
"""Seconds between two questions to a node; of many nodes, so many that `RATE` are asked a second."""
RATE = 20
REMEMBERED = 5.0
"""Seconds for which a node's history is taken to be the same, unless its job changes: it is read
from its disk."""
PIECES = 16
"""Pieces of rows that are read of a node at a time: more of them wait for the next time."""


class Watch:
    """Follows a cluster while anyone looks.

    Args:
        cluster: the nodes.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._asking = Asking(cluster)
        self.live = Live(self._asking.places)
        self._looked_at = asyncio.Event()
        self._viewers = 0
        self._news = asyncio.Event()
        self._histories: dict[str, tuple[float, str]] = {}  # place -> when it was read, its job

    @contextlib.contextmanager
    def viewer(self) -> Iterator[None]:
        """Count someone who looks: while there is nobody, the nodes are left alone."""
        self._viewers += 1
        self._looked_at.set()
        try:
            yield
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._looked_at.clear()

    @property
    def viewers(self) -> int:
        """How many look."""
        return self._viewers

    async def news(self, version: int) -> None:
        """Wait until there is something newer than a version of `live`."""
        while self.live.version == version:
            await self._news.wait()

    async def run(self) -> None:
        """Ask until cancelled.

        Raises:
            ConfigError: the cluster's secret or certificates cannot be read.
        """
        async with self._asking, asyncio.TaskGroup() as tasks:
            for place, address in self._asking.places.items():
                tasks.create_task(self._follow(place, address))

    async def _follow(self, place: str, address: Address) -> None:
        interval = max(INTERVAL, len(self.live.seen) / RATE)
        while True:
            await self._looked_at.wait()
            version = self.live.version
            await self.ask(place, address)
            if self.live.version != version:
                self._news.set()
                self._news.clear()
            await asyncio.sleep(interval)

    async def ask(self, place: str, address: Address) -> None:
        """Ask one node once."""
        now = asyncio.get_running_loop().time()
        try:
            visitor = await self._asking.visitor(address)
            seen = await self._see(visitor, place, address)
            if not self.live.seen[place].error:
                self.live.saw(now, seen)
            await self._read(visitor, seen, now)
            self.live.saw(now, seen)  # what was wrong with it is mended once all of it is right
        except AiosgdError as error:
            self._histories.pop(place, None)
            self.live.saw(now, Seen(place=place, address=address, error=str(error)))

    async def _see(self, visitor: Visitor, place: str, address: Address) -> Seen:
        status, now = await visitor.status(), asyncio.get_running_loop().time()
        read, job_id = self._histories.get(place, (-REMEMBERED, ""))
        history = self.live.seen[place].history
        if now - read >= REMEMBERED or job_id != status.job_id:
            history = tuple(await visitor.history())
            self._histories[place] = now, status.job_id
        return Seen(place=place, address=address, status=status, history=history)

    async def _read(self, visitor: Visitor, seen: Seen, now: float) -> None:
        """Read on in the job that is shown, if the node has a part in it."""
        fate, status = self.live.fate, seen.status
        if fate is None or status is None:
            return
        trace, entry = self.live.trace(fate.job_id), seen.entry(fate.job_id)
        if status.job_id == fate.job_id and status.node is not None:
            await self._name(visitor, trace, status.node)
            await self._read_on(visitor, trace, status)
        elif entry is not None and entry.state != RUNNING and self.live.is_settled(now):
            await self._read_end(visitor, trace, entry)

    async def _name(self, visitor: Visitor, trace: Trace, node: int) -> None:
        """Learn what the job is."""
        if trace.job is None:
            with contextlib.suppress(AiosgdError):  # it is about to be written, or another has it
                job, run = await visitor.job(trace.job_id, node)
                trace.job, trace.facts = from_dict(job), run
                self.live.changed()

    async def _read_on(self, visitor: Visitor, trace: Trace, status: Status) -> None:
        assert status.node is not None
        left = trace.left(status.node, status.began)
        for _ in range(PIECES):
            answer = await visitor.rows(trace.job_id, status.node, *left.place)
            piece = _unpacked(status.node, answer)
            left.add(piece, _links(status.node, answer.get("links")))
            if len(piece.train) < ROWS:
                break
        self.live.changed()

    async def _read_end(self, visitor: Visitor, trace: Trace, entry: Entry) -> None:
        """Read what the node has kept of a job that is over, once."""
        if trace.is_whole(entry.node):
            return
        _, content = await visitor.copy(trace.job_id, entry.node, weights=False)
        left = _unpacked(entry.node, content)
        if trace.job is None and content.get("job") is not None:
            trace.job, trace.facts = _named(entry.node, content)
        trace.end(entry.node, left)
        self.live.changed()


def _named(node: int, content: dict[str, Any]) -> tuple[JobConfig, dict[str, Any]]:
    """Return what a node says that the job is, and what describes the run."""
    try:
        job, run = (check_value(content.get(k), dict[str, Any], k) for k in ("job", "run"))
        return from_dict(job), run
    except AiosgdError as error:
        raise ClusterError(f"node {node} answered nonsense: {error}") from error


def _unpacked(node: int, content: dict[str, Any]) -> Collected:
    plain = {"log": np.empty(0, np.uint8), **content, "weights": None, "record": None}
    try:
        piece = unpack(node, plain, 0)
        check_table(piece.train.array(), "train")
        check_table(piece.evaluations.array(), "evaluations")
    except AiosgdError as error:
        raise ClusterError(f"node {node} answered nonsense: {error}") from error
    return piece


def _links(node: int, table: Any) -> Links:
    """Return what a node says of its links."""
    if not isinstance(table, np.ndarray) or table.dtype != np.int64 or table.shape[1:] != (5,):
        raise ClusterError(f"node {node} answered nonsense: links is {table!r:.80}")
    found: Links = {}
    for peer, out, out_bytes, back, back_bytes in table.tolist():
        found[node, peer], found[peer, node] = (out, out_bytes), (back, back_bytes)
    return found
