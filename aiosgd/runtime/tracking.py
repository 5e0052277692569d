"""The trackers of one job, beside what trains it: whatever they do, the job goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosgd.errors import ConfigError
from aiosgd.plugins.kinds import TRACKERS
from aiosgd.plugins.registry import error_text, make_params, nearest
from aiosgd.plugins.trackers import Job, Tracker
from aiosgd.runtime.config import JobConfig, to_dict

if TYPE_CHECKING:
    from aiosgd.runtime.harvest import Outcome
    from aiosgd.runtime.session import Evaluation, Progress

# seconds that a tracker may take for a call once the job has ended
PATIENCE = 60.0
# the same after Ctrl-C
PARTING = 5.0
# news that wait for a tracker at most; those of a job with 100 workers come 500 times per second
WAITING = 1000
# seconds after which it is said who is waited for
SAID_AFTER = 2.0
# seconds between two looks at a tracker that has not ended
LOOK = 0.2

ALWAYS = "csv"
"""The tracker that all jobs have; its files are part of what a run leaves."""


def load_tracker(job: JobConfig, name: str, folder: Path) -> Tracker:
    """Return a new tracker of a job.

    Raises:
        ConfigError: a parameter is wrong, or something that it needs is not installed.
        PluginError: there is no such tracker, or it is broken.
    """
    kind, params = _checked(job, name)
    return kind(params, folder)


def _checked(job: JobConfig, name: str) -> tuple[type[Tracker], Any]:
    kind = TRACKERS.load(name)
    params = make_params(kind, job.tracker_params.get(name, {}), f"tracker.{name}")
    kind.require()
    return kind, params


def check_trackers(job: JobConfig) -> None:
    """Check a job's trackers, before any node is spoken to; raises as `load_tracker`."""
    for name in job.tracker_params:
        if name not in job.tracker:
            raise ConfigError(
                f"tracker.{name}: the job has no such tracker{nearest(name, job.tracker)}; "
                f"--tracker {name} adds it"
            )
    for name in job.tracker:
        _checked(job, name)


class Tracking:
    """Tells the trackers of a job what happens, each in a thread of its own.

    One that is slow misses news; one that fails or hangs is left behind. All methods but `end`
    return at once.

    Args:
        job: the job; its tables as CSV files are not made here.
        folder: its run folder.
        log: the submitter's log.
        tell: shown a line about a tracker, from the tracker's own thread.

    Attributes:
        errors: tracker -> what went wrong with it.
    """

    def __init__(
        self,
        job: JobConfig,
        folder: Path,
        log: logging.Logger,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.errors: dict[str, str] = {}
        self._job = job
        self._folder = folder
        self._log = log
        self._tell = tell
        self._began: float | None = None
        self._tracks: list[_Track] = []
        self._hurry = threading.Event()
        self._over = False

    def begin(
        self,
        job_id: str,
        nodes: Mapping[int, object],
        *,
        began: float | None = None,
        simulated: bool = False,
    ) -> None:
        """Tell the trackers that the job trains; once, however often it is called.

        Args:
            job_id: the job.
            nodes: node id -> address.
            began: when, in seconds since 1970; None is now.
            simulated: whether it is.
        """
        if self._began is not None:
            return
        self._began = time.time() if began is None else began
        facts = Job(
            id=job_id,
            options=to_dict(self._job),
            nodes={node: str(address) for node, address in nodes.items()},
            began=self._began,
            simulated=simulated,
        )
        for name in self._job.tracker:
            if name != ALWAYS:
                track = _Track(name, functools.partial(self._made, name), self._failed)
                self._tracks.append(track)
                track.call("begin", facts)
                track.start()

    def _made(self, name: str) -> Tracker:
        return load_tracker(self._job, name, self._folder)

    def _failed(self, name: str, reason: str) -> None:
        if self._over:
            return  # nobody listens any more to one that was left behind
        self.errors[name] = reason
        line = f"tracker {name!r} {reason}; the job is not affected"
        self._log.warning(line)
        self._tell(line)

    def progressed(self, progress: Progress) -> None:
        """Pass a worker's progress on."""
        # what is reported counts steps that were taken, what is tracked numbers them
        facts = {**dataclasses.asdict(progress), "step": progress.step - 1}
        self._news("progress", facts)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Pass a worker's test on."""
        self._news("evaluation", dataclasses.asdict(evaluation))

    def _news(self, method: str, facts: dict[str, Any]) -> None:
        if self._began is not None:
            facts["time_s"] = time.time() - self._began
            for track in self._tracks:
                track.news(method, facts)

    def end(self, outcome: Outcome, patience: float = PATIENCE) -> None:
        """Give the trackers all that the job left, and wait until they have recorded it.

        Args:
            outcome: what it left; told what went wrong with the trackers.
            patience: seconds that each may take for a table.
        """
        tables = {"train": outcome.train, "eval": outcome.eval, "consensus": outcome.consensus}
        for track in self._tracks:
            for table, rows in tables.items():
                track.call("write", table, rows)
            track.call("end", outcome.summary.to_dict())
            track.close()
        for track in self._tracks:
            self._await(track, patience)
        self._over = True
        outcome.tracker_errors = dict(self.errors)

    def _await(self, track: _Track, patience: float) -> None:
        since, is_said = time.monotonic(), False
        while track.is_alive() and not self._hurry.is_set():
            track.join(LOOK)
            now = time.monotonic()
            if track.is_alive() and now - track.moved > patience:
                self._failed(track.name, f"is still busy after {patience:g} s and is left behind")
                return
            if track.is_alive() and now - since > SAID_AFTER and not is_said:
                self._tell(f"waiting for tracker {track.name!r}; the results are written")
                is_said = True
        if track.is_alive():
            self._failed(track.name, "was not waited for")
        elif track.missed:
            self._log.info("tracker %r was too slow for %d news", track.name, track.missed)

    async def ended(self, outcome: Outcome, patience: float = PATIENCE) -> bool:
        """Do as `end`, in a thread; to cancel this ends the waiting for the trackers.

        Returns:
            Whether this was cancelled.
        """
        cancelled = False
        ending = asyncio.ensure_future(asyncio.to_thread(self.end, outcome, patience))
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                cancelled = True
                self.hurry()
        ending.result()
        return cancelled

    def hurry(self) -> None:
        """Wait for no tracker any more; may be called from any thread."""
        self._hurry.set()

    def abandon(self) -> None:
        """Expect nothing of trackers that `end` was not called for: something else went wrong."""
        self._over = True
        for track in self._tracks:
            track.close()


class _Track(threading.Thread):
    """One tracker and what it is still to be told.

    The thread is a daemon: a tracker that hangs does not keep the program from ending.

    Args:
        name: the tracker's.
        make: returns it; called in the thread.
        failed: told the name and what went wrong, in the thread.

    Attributes:
        moved: when it last ended a call, on the monotonic clock; or began to have something to do.
        missed: news that it was too slow for.
    """

    def __init__(
        self, name: str, make: Callable[[], Tracker], failed: Callable[[str, str], None]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.moved = math.inf
        self.missed = 0
        self._make = make
        self._failed = failed
        self._calls = queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None]()

    def call(self, method: str, *args: Any) -> None:
        """Have the tracker do something after what it does now."""
        self._calls.put((method, args))

    def news(self, method: str, facts: dict[str, Any]) -> None:
        """Tell the tracker something that it may miss."""
        if self._calls.qsize() < WAITING:
            self.call(method, facts)
        else:
            self.missed += 1

    def close(self) -> None:
        """Let the thread end after the calls so far; from now on they are waited for."""
        self.moved = time.monotonic()
        self._calls.put(None)

    def run(self) -> None:
        """Do what is asked for until `close`, or until something goes wrong."""
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                method, args = call
                getattr(tracker, method)(*args)
                self.moved = time.monotonic()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker may raise anything
            self._failed(self.name, f"failed and records no more: {error_text(error)}")
