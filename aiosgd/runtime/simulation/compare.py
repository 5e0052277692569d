"""What a simulation predicts of a run, beside what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiosgd.errors import ConfigError, JobFailedError
from aiosgd.runtime import results
from aiosgd.runtime.simulation.network import NetworkModel
from aiosgd.runtime.simulation.simulate import Simulation, play
from aiosgd.runtime.simulation.world import Scenario
from aiosgd.runtime.workload import Workload, load


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run is compared by; NaN where it has too few steps.

    Attributes:
        step_s: median time between two steps of a worker.
        wait_s: median time that a worker waits for a step's result.
        bytes_per_step: sent by all nodes.
        train_s: from the first step to the end of the last, of the slowest worker.
    """

    step_s: float
    wait_s: float
    bytes_per_step: float
    train_s: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A prediction beside a measurement.

    Attributes:
        run: the run's id.
        network: the name of what it was simulated on.
        is_exact: whether the bytes have to be the same: not in async mode, where what is sent
            depends on time.
    """

    run: str
    network: str
    predicted: Figures
    measured: Figures
    is_exact: bool

    @property
    def errors(self) -> dict[str, float]:
        """How far each figure is off, as a share of the measured one; NaN if that is 0."""
        return {
            field.name: error(
                getattr(self.predicted, field.name), getattr(self.measured, field.name)
            )
            for field in dataclasses.fields(Figures)
        }

    @property
    def warning(self) -> str:
        """What is wrong beyond all noise; empty if nothing is."""
        sent, expected = self.measured.bytes_per_step, self.predicted.bytes_per_step
        if not self.is_exact or sent == expected:
            return ""
        return (
            f"the run sent {sent:.10g} bytes per step, its simulation {expected:.10g}: they do "
            "not do the same; do both have the same version and options?"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON takes it: None for NaN."""
        return {
            "run": self.run,
            "network": self.network,
            "figures": {
                name: {
                    "predicted": _or_none(getattr(self.predicted, name)),
                    "measured": _or_none(getattr(self.measured, name)),
                    "error": _or_none(share),
                }
                for name, share in self.errors.items()
            },
            "warning": self.warning or None,
        }


def error(predicted: float, measured: float) -> float:
    """Return by which share of the measured value a prediction is too high."""
    if predicted == measured:
        return 0.0
    return (predicted - measured) / measured if measured else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(
    folder: Path,
    model: NetworkModel,
    data_dir: Path,
    sources: Mapping[str, Path] | None = None,
) -> Comparison:
    """Simulate a run's job and compare; must be called where no event loop runs.

    Args:
        folder: the run's folder.
        model: what to simulate it on.
        data_dir: this machine's folder for data.
        sources: where the file of a FILE.py:CLASS codec is, if not at its name.

    Raises:
        ConfigError: the folder is no run that has ended well.
        PluginError: the job needs a plugin that is missing or broken.
        JobFailedError: the simulated job fails.
    """
    summary = results.read_summary(folder)
    if summary.state != "done":
        raise ConfigError(f"{folder / 'summary.json'}: state is {summary.state}; expected done")
    job, workers = results.read_job(folder), sum(node >= 0 for node in summary.per_node)
    predicted = predict(
        load(job, workers, data_dir, sources=sources),
        workers,
        len(summary.per_node) - workers,
        model,
    )
    rows = results.read_table(folder, "train")
    return Comparison(
        run=summary.job_id,
        network=model.name,
        predicted=predicted,
        measured=figures(rows, summary.bytes_sent, summary.train_s),
        is_exact=job.mode == "sync",
    )


def predict(load: Workload, workers: int, servers: int, model: NetworkModel) -> Figures:
    """Return what a simulation of a job says; must be called where no event loop runs.

    Raises:
        JobFailedError: the simulated job fails.
    """
    scenario = Scenario(network=model, seed=load.job.seed)
    played = play(Simulation(load=load, workers=workers, servers=servers, scenario=scenario))
    if played.ending.error:
        text = f"the simulation failed: {played.ending.error}"
        raise JobFailedError(text) from played.ending.cause
    world = played.world
    learning = [session for node, session in world.sessions.items() if node >= 0]
    rows = np.concatenate([session.train.array() for session in learning]).view(np.recarray)
    sent = sum(transport.bytes_sent for transport in world.transports.values())
    return figures(rows, sent, max(session.train_s for session in learning))


def figures(rows: Any, bytes_sent: int, train_s: float) -> Figures:
    """Return what a table like train.csv says.

    Args:
        rows: the table.
        bytes_sent: by all nodes, over all steps.
        train_s: of the slowest worker.
    """
    nodes = np.unique(rows.node)
    pauses = np.concatenate([np.empty(0), *(np.diff(rows.time_s[rows.node == n]) for n in nodes)])
    steps = int(rows.step.max()) + 1 if len(rows) else 0
    return Figures(
        step_s=float(np.median(pauses)) if len(pauses) else math.nan,
        wait_s=float(np.median(rows.wait_s)) if len(rows) else math.nan,
        bytes_per_step=bytes_sent / steps if steps else math.nan,
        train_s=train_s,
    )
