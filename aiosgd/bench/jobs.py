"""How fast jobs exchange what they compute: real jobs, through the same door as every job.

What is measured is what a codec's author gets: from handing over a block to having the result, as
`wait_s` in train.csv says it, of the worker that waits the longest.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiosgd import aio
from aiosgd.bench.peers import Peer, gloo, slowest
from aiosgd.bench.rows import Note, Report, Row, Samples, row, with_more
from aiosgd.errors import ConfigError
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.launchers import Printed, Wanted, ignore
from aiosgd.plugins.registry import make_params
from aiosgd.runtime.config import Address, Cluster
from aiosgd.runtime.harvest import Outcome
from aiosgd.runtime.security import SecurityFiles

WARM_UP = 2
"""Steps of a job that do not count: memory is new, links are cold."""
ROUND_BYTES = 200_000_000
STEPS_AT_MOST = 50
STEPS_AT_LEAST = 4
PATIENCE = 120.0
"""Seconds that a step may take: large models on slow networks."""


@dataclass
class Site:
    """The nodes that jobs run on.

    Attributes:
        kept: where local nodes keep their copies of a job; None for nodes that are not ours.
        folder: where results go until they are read.
    """

    cluster: Cluster
    folder: Path
    kept: Path | None = None

    async def run(self, **options: Any) -> Outcome:
        """Run a job and return what it leaves, but for its files."""
        outcome = await aio.submit(self.cluster, output=str(self.folder), title="bench", **options)
        copies = self.kept.glob(f"*/{outcome.summary.job_id}") if self.kept else ()
        for folder in (outcome.folder, *copies):
            shutil.rmtree(folder, ignore_errors=True)
        return outcome


@contextlib.asynccontextmanager
async def site(
    workers: int,
    servers: int,
    cluster: Cluster | None = None,
    printed: Printed = ignore,
    *,
    allow_code: bool = False,
) -> AsyncIterator[Site]:
    """Give nodes for the time of the context: those of `cluster`, or new ones on this machine.

    Args:
        allow_code: whether new ones take jobs with code of their own.

    Raises:
        ConfigError: the cluster has too few nodes.
    """
    with tempfile.TemporaryDirectory(prefix="aiosgd-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if cluster is not None:
            check_cluster(cluster, workers, servers)
            yield Site(cluster, folder)
            return
        launcher = LAUNCHERS.load("local")
        params = make_params(launcher, {"run_dir": str(folder / "nodes")}, "launcher")
        async with launcher(params).launch(
            Wanted(workers=workers, servers=servers, allow_code=allow_code), printed
        ) as nodes:
            local_workers, local_servers = (
                tuple(Address.parse(text, "local node") for text in texts)
                for texts in (nodes.workers, nodes.servers)
            )
            local = Cluster(
                local_workers, local_servers, security=SecurityFiles(secret_file=nodes.secret_file)
            )
            yield Site(local, folder / "results", folder / "nodes")


def check_cluster(cluster: Cluster, workers: int, servers: int) -> None:
    """Raise ConfigError if a cluster has too few nodes."""
    for name, needed, there in (
        ("workers", workers, cluster.workers),
        ("servers", servers, cluster.servers),
    ):
        if needed > len(there):
            raise ConfigError(
                f"{needed} {name} are to be measured, but the cluster has {len(there)}"
            )


def default_counts(cluster: Cluster | None) -> list[int]:
    """Return the numbers of workers that are measured unless the user says otherwise."""
    if cluster is None:
        return [2, 4]
    count = len(cluster.workers)
    return [n for n in (2, 4) if n <= count] or [count]


def blank_job(size: int, workers: int, steps: int, **options: Any) -> dict[str, Any]:
    """Return the options of a job that exchanges `size` bytes per block and computes nothing."""
    return {
        "model": "blank",
        "model_params": {"parameters": size // 4},
        "dataset": "synthetic",
        "dataset_params": {"samples": max(2, workers * steps), "features": 1, "classes": 2},
        "batch_size": 1,
        "workers": workers,
        "max_steps": steps,
        "step_timeout": PATIENCE,
        **options,
    }


def steps_for(size: int) -> int:
    """Return how many steps of a job are counted."""
    return max(STEPS_AT_LEAST, min(STEPS_AT_MOST, ROUND_BYTES // size))


def waits(outcome: Outcome, of: Callable[..., Any] = np.max) -> list[float]:
    """Return the longest wait of a worker in each step that counts; another one with `of`."""
    rows = outcome.train
    steps = range(WARM_UP, int(rows.step.max()) + 1)
    return [float(of(rows.wait_s[rows.step == step])) for step in steps]


@dataclass
class _Case:
    """One size on so many workers, and what was measured."""

    size: int
    workers: int
    ours: Samples
    theirs: Samples
    least: Samples

    def row(self) -> Row:
        """Return the case's row."""
        theirs = self.theirs if self.theirs.rounds else None
        return with_more(
            row(self.size, self.workers, self.ours, "torch gloo", theirs),
            least_wait_s=self.least.median,
        )


async def allreduce(
    place: Site,
    nodes: Sequence[int],
    sizes: Sequence[int],
    rounds: int,
    note: Note,
    *,
    codec: str = "allreduce",
    python: str | None = None,
) -> Report:
    """Measure how long a codec takes to give every worker the mean.

    Args:
        python: a Python that has torch, whose gloo is then measured beside it, on this machine.
    """
    async with AsyncExitStack() as stack:
        groups = {}
        for count in nodes if python else ():
            groups[count] = await stack.enter_async_context(gloo(count, python or ""))
        rows = await _measure(place, nodes, sizes, rounds, note, groups, codec=codec)
    return Report("allreduce", [with_more(one, codec=codec) for one in rows], rounds)


async def server(
    place: Site,
    nodes: Sequence[int],
    sizes: Sequence[int],
    rounds: int,
    note: Note,
    *,
    codec: str = "parameter_server",
) -> Report:
    """Measure a round of a codec with one server: updates in, the new state out."""
    rows = await _measure(place, nodes, sizes, rounds, note, {}, codec=codec, servers=1)
    return Report("server", [with_more(one, codec=codec) for one in rows], rounds)


async def _measure(
    place: Site,
    nodes: Sequence[int],
    sizes: Sequence[int],
    rounds: int,
    note: Note,
    groups: Mapping[int, Peer],
    **options: Any,
) -> list[Row]:
    """Measure all cases in turn, round by round; a job's own first steps warm it up."""
    cases = [
        _Case(size, count, Samples(), Samples(), Samples()) for count in nodes for size in sizes
    ]
    for number in range(1, rounds + 1):
        for case in cases:
            note(f"{case.size} B on {case.workers} workers, round {number} of {rounds}")
            await _round(place, case, groups.get(case.workers), options)
    return [case.row() for case in cases]


async def _round(place: Site, case: _Case, group: Peer | None, options: Mapping[str, Any]) -> None:
    steps = steps_for(case.size)
    outcome = await place.run(**blank_job(case.size, case.workers, steps + WARM_UP, **options))
    case.ours.rounds.append(waits(outcome))
    case.least.rounds.append(waits(outcome, np.min))
    if group is not None:
        case.theirs.rounds.append(await slowest(group, "all_reduce", case.size, steps))


# Training steps -------------------------------------------------------------------------------

STEP_WORKERS, STEP_BATCH = 2, 64
STEP_JOB: Mapping[str, Any] = {
    "dataset": "synthetic",
    "dataset_params": {"samples": 20_000, "features": 784},
    "model_params": {"hidden": [128, 128]},
    "batch_size": STEP_BATCH,
    "workers": STEP_WORKERS,
    "learning_rate": 0.01,
    "compute": {"threads": 1},
}
STEP_BYTES = 4 * (784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)


async def step_s(place: Site, codec: str, steps: int, *, overlap: bool = False) -> float:
    """Return the seconds of a training step: an MLP 784-128-128-10, batch 64, two workers."""
    outcome = await place.run(
        codec=codec, overlap=overlap, epochs=steps, max_steps=steps, **STEP_JOB
    )
    rows = outcome.train[outcome.train.node == 0]
    # evaluations between epochs are no part of a step
    return float(statistics.median(rows.time_s[1:] - rows.time_s[:-1]))


async def step(place: Site, codecs: Sequence[str], steps: int, rounds: int, note: Note) -> Report:
    """Measure whole training steps; the peer is the same work with nothing exchanged."""
    cases = [(codec, overlap) for codec in codecs for overlap in (False, True)]
    samples = {case: Samples() for case in [("local", False), *cases]}
    for number in range(1, rounds + 1):
        for (codec, overlap), mine in samples.items():
            note(f"codec {codec}{' with overlap' * overlap}, round {number} of {rounds}")
            mine.rounds.append([await step_s(place, codec, steps, overlap=overlap)])
    alone = samples["local", False]
    return Report("step", [_step_row(case, samples[case], alone) for case in cases], rounds)


def _step_row(case: tuple[str, bool], mine: Samples, alone: Samples) -> Row:
    codec, overlap = case
    return with_more(
        row(STEP_BYTES, STEP_WORKERS, mine, "nothing exchanged", alone),
        codec=codec,
        overlap=overlap,
        steps_per_s=1 / mine.median,
    )
