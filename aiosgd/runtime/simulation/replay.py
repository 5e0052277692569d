"""A recorded run, played again in one process: each codec gets the same things in the same order.

The sessions are those of a run, on nodes that follow their records (`player`). Everything else is
computed anew from the job and its seed, so that the same code on the same class of machine gives
the same bits.
"""

from __future__ import annotations

import asyncio
import dataclasses
from bdb import BdbQuit
from collections.abc import Callable, Mapping
from pathlib import Path
from pdb import Pdb
from typing import Any, TypeAlias

import numpy as np

from aiosgd.errors import ConfigError, JobCancelledError, JobFailedError
from aiosgd.runtime import results, workload
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.coordinator import code_files
from aiosgd.runtime.harvest import Outcome, distances
from aiosgd.runtime.job import node_name, server_ids
from aiosgd.runtime.learner import SKETCH, Sampler
from aiosgd.runtime.part import first_error
from aiosgd.runtime.pool import Pool
from aiosgd.runtime.session import News, Place, Session
from aiosgd.runtime.simulation.loop import DeadlockError, LimitError, run_virtually
from aiosgd.runtime.simulation.player import Blas, Player, ReplayError, ReplayTransport
from aiosgd.runtime.simulation.stepping import stepped
from aiosgd.runtime.workload import Workload

__all__ = ["ReplayError", "replay"]

Report: TypeAlias = Callable[[News], None]

# Timeouts are part of the record, and must not come by themselves; codecs may still sleep.
NEVER_S = 1e9
LIMIT_S = 1e6
# columns that say when something was or how long it took
TIMES = {"time_s", "compute_s", "wait_s"}


def replay(
    folder: Path,
    *,
    data_dir: Path,
    node: int | None = None,
    pdb: bool = False,
    report: Report = lambda _: None,
) -> Outcome:
    """Play a recorded run again; must be called where no event loop runs. Nothing is written.

    Args:
        folder: the run's folder; its job has the option `record`.
        data_dir: this machine's folder for data.
        node: the node whose hooks are debugged.
        pdb: whether to stop in the debugger at the first line of each hook of `node`.
        report: told how far the workers are.

    Returns:
        The recorded run, with tables and parameters that were computed anew: they equal the
        recorded ones in all but times.

    Raises:
        ConfigError: there is no record, or no such node.
        ReplayError: it goes another way: other code, data, libraries or class of machine.
        CodecError: the run failed with it, and so does the replay.
        JobFailedError: the run did not come to its end for another reason; nor does the replay.
        JobCancelledError: the debugger was quit.
    """
    summary, job = results.read_summary(folder), _read_job(folder)
    nodes = (*range(job.workers or 1), *server_ids(job.servers or 0))
    if pdb != (node is not None) or not (node is None or node in nodes):
        expected = f"neither, or both with a node of {', '.join(map(str, nodes))}"
        raise ConfigError(f"node is {node} and pdb is {pdb}; expected {expected}")
    stage = Stage(
        load=workload.load(job, job.workers or 1, data_dir),
        records={i: results.read_record(folder / "nodes" / str(i)) for i in nodes},
        whole=summary.state == "done",
        debugged=node,
        report=report,
    )
    try:
        stage.play()
        if stage.whole:
            outcome = Outcome(folder, summary, *stage.tables(), stage.parameters())
            _compare(outcome)
            return outcome
    except ReplayError as error:
        raise ReplayError(f"{folder}: {error}; {_advice(folder)}") from error.__cause__
    raise JobFailedError(
        f"{folder}: the record ends here, for the run was {summary.state}: {summary.error}"
    )


def _read_job(folder: Path) -> JobConfig:
    """Return the job, with the run's own copies of its code."""
    job = results.read_job(folder)
    if not job.record:
        raise ConfigError(f"{folder} has no record; run its job again with --record")
    kept = {
        name: f"{folder / 'code' / copy}:{name.rpartition(':')[2]}"
        for name, copy in code_files(job).items()
    }
    return workload.with_code(job, kept)


@dataclasses.dataclass
class Stage:
    """The nodes of a recorded run.

    Attributes:
        load: the job's plugins; steps never time out but as recorded.
        records: node -> its record.
        whole: whether the run came to its end.
        debugged: the node whose hooks run under a debugger, if any.
        report: told how far the workers are.
        sessions: node -> its session, once it plays.
    """

    load: Workload
    records: Mapping[int, Any]
    whole: bool
    debugged: int | None
    report: Report
    sessions: dict[int, Session] = dataclasses.field(default_factory=dict)
    _players: dict[int, Player] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        job = dataclasses.replace(self.load.job, step_timeout=NEVER_S)
        self.load = dataclasses.replace(self.load, job=job)

    def play(self) -> None:
        """Play the records to their end.

        Raises:
            ReplayError: it goes another way than the records say.
            CodecError, …: what ended the run.
            JobCancelledError: the debugger was quit.
        """
        blas = Blas(self.load.model)
        try:
            run_virtually(self._main(blas), seconds=LIMIT_S)
        except (DeadlockError, LimitError) as error:
            if self.whole:
                raise self._stuck().deviation() from error
        except ExceptionGroup as errors:
            first = first_error(errors)
            if isinstance(first.__cause__, BdbQuit):
                raise JobCancelledError("the debugger was quit") from None
            raise first from first.__cause__
        finally:
            blas.restore()

    async def _main(self, blas: Blas) -> None:
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def failed(error: ReplayError) -> None:
            if not failure.done():
                failure.set_exception(error)

        for node, record in self.records.items():
            transport = ReplayTransport(node, self._players)
            self._players[node] = Player(node, record, transport, blas, failed)
        initial, sampler = self.load.initial(), Sampler(self.load)
        for node in self.records:
            self.sessions[node] = self._session(node, initial, sampler)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(_outcome(failure))]
            running += [tasks.create_task(one.run()) for one in self.sessions.values()]
            for session in self.sessions.values():
                await self._end(session)
            self._check_left(failed)
            await asyncio.sleep(1)  # virtual: the last hooks may fail, as they did in the run
            for task in running:
                task.cancel()

    def _session(self, node: int, initial: Any, sampler: Sampler) -> Session:
        player = self._players[node]
        place = Place(
            node=node,
            workers=tuple(i for i in self.records if i >= 0),
            servers=tuple(i for i in self.records if i < 0),
            transport=player.transport,
            executor=player,
            report=self.report,
            log=lambda _: None,
            memory=Pool().take,
            journal=player,
        )
        session = Session(place, self._load_of(node), initial, sampler)
        player.deliver = session.deliver
        player.taken = lambda step: self._judge(node, session, step)
        return session

    def _load_of(self, node: int) -> Workload:
        """Return the plugins of a node; one that is debugged has codecs of its own."""
        if node != self.debugged:
            return self.load
        server, debugger = self.load.server_codec, Pdb(nosigint=True)
        return dataclasses.replace(
            self.load,
            codec=stepped(self.load.codec, debugger),
            server_codec=server and stepped(server, debugger),
        )

    def _judge(self, node: int, session: Session, step: int) -> None:
        """Give the verdict on an epoch: training ends where the record has no further step."""
        epoch, left = divmod(step + 1, self.load.steps_per_epoch)
        if self.load.job.target_accuracy is not None and not left:
            session.verdict(epoch - 1, self.whole and step == self._players[node].last_step)

    async def _end(self, session: Session) -> None:
        """Wait until all of a node's record has happened."""
        node = session.place.node
        if self.whole and node >= 0:
            await session.trained()
            await session.conclude()
        await self._players[node].over.wait()

    def _check_left(self, failed: Callable[[ReplayError], None]) -> None:
        """Fail if messages are left over: a run ends only when all were handled."""
        for player in self._players.values():
            if self.whole and player.left:
                failed(player.deviation())

    def _stuck(self) -> Player:
        """Return the node that does not go on: who waits for a message waits for its sender."""
        stuck = {node: one for node, one in self._players.items() if one.is_stuck}
        node: int | None = next(iter(stuck or self._players))
        seen: list[int] = []
        while node is not None and (node in stuck or not seen) and node not in seen:
            seen.append(node)
            node = self._players[node].waits_for
        return self._players[seen[-1]]

    def tables(self) -> tuple[Any, Any, Any]:
        """Return the rows of all workers: of training, of evaluations, of their consensus."""
        learners = [session for node, session in sorted(self.sessions.items()) if node >= 0]
        tables = ([one.train for one in learners], [one.evaluations for one in learners])
        train, evaluations = (
            np.concatenate([rows.array() for rows in table]).view(np.recarray) for table in tables
        )
        sketches = [np.array(one.sketches).reshape(-1, SKETCH) for one in learners]
        return train, evaluations, distances(evaluations.epoch, sketches)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that worker 0 ends with."""
        session = self.sessions[0]
        assert session.weights is not None
        named = results.named_parameters(session.weights, self.load.model.shapes)
        return {**named, **session.model_state}


async def _outcome(future: asyncio.Future[None]) -> None:
    await future


# Is it the same? ------------------------------------------------------------------------------


def _compare(outcome: Outcome) -> None:
    """Check that a replay has the results of the run.

    Raises:
        ReplayError: it has others; the message names the earliest step that differs.
    """
    folder = outcome.folder
    if (folder / "train.csv").exists():
        _compare_rows(results.read_table(folder, "train"), outcome.train)
        _compare_rows(results.read_table(folder, "eval"), outcome.eval)
    for name, value in results.read_parameters(folder).items():
        if value.tobytes() != outcome.parameters[name].tobytes():
            raise ReplayError(f"parameter {name} ends with other bits")


def _compare_rows(run: Any, here: Any) -> None:
    if len(run) != len(here):
        raise ReplayError(f"the run has {len(run)} rows of its workers; here are {len(here)}")
    names = [name for name in run.dtype.names if name not in TIMES]
    unequal = {name: ~np.isclose(run[name], here[name], 0, 0, equal_nan=True) for name in names}
    rows = np.flatnonzero(np.any([*unequal.values()], axis=0))
    if len(rows):
        row = min(rows, key=lambda row: run.step[row])
        name = next(name for name in names if unequal[name][row])
        raise ReplayError(
            f"{node_name(int(run.node[row]))}, step {run.step[row]}: {name} was "
            f"{run[name][row]!s} in the run; here it is {here[name][row]!s}"
        )


def _advice(folder: Path) -> str:
    """Return what may be the reason that a replay differs."""
    made, here = results.read_versions(folder), results.versions()
    others = [f"{name} {text}" for name, text in made.items() if text != here[name]]
    if others:
        return f"the run was made with {', '.join(others)}"
    return "expected the code, data and class of machine of the run"
