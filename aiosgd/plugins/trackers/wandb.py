"""Runs of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from aiosgd.plugins.trackers.base import Facts, Job, missing
from aiosgd.plugins.trackers.single import Point, SingleRecord

# nothing but what the job recorded goes to the server: neither the machine nor the code
QUIET = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True)
class WandbParams:
    """Parameters of `Wandb`.

    Attributes:
        project: the project that the run is part of; empty: WANDB_PROJECT, or `aiosgd`.
        entity: the user or team; empty: WANDB_ENTITY, or who is logged in.
        group: the group of runs; empty: none.
    """

    project: str = ""
    entity: str = ""
    group: str = ""


class Wandb(SingleRecord):
    """A run of Weights & Biases for each job; needs the extra `wandb`.

    The job's options are the run's config. Its history has the columns of worker 0's rows, such as
    `train/loss` against `train/step`, those of consensus.csv against `consensus/step` (the epoch),
    and its summary the figures of summary.json. The run's name is the job's id.

    WANDB_MODE=offline writes files alone, in the run folder's `wandb/`, for `wandb sync`. What
    wandb would tell of the machine and the code is switched off, and so are its error reports,
    unless WANDB_ERROR_REPORTING says otherwise.
    """

    Params = WandbParams
    params: WandbParams

    def __init__(self, params: WandbParams, folder: Path) -> None:
        super().__init__(params, folder)
        self._run: Any = None

    @classmethod
    def require(cls) -> None:
        """See the base class."""
        library()

    def begin(self, job: Job) -> None:
        """Start a run."""
        super().begin(job)
        wandb = library()
        self._run = wandb.init(
            project=self.params.project or os.environ.get("WANDB_PROJECT") or "aiosgd",
            entity=self.params.entity or None,
            group=self.params.group or None,
            name=job.id,
            config=dict(job.options),
            dir=self.folder,
            reinit="create_new",  # a run of the caller's own goes on
            settings=wandb.Settings(**QUIET),
        )
        for table in ("train", "eval", "consensus"):
            self._run.define_metric(f"{table}/*", step_metric=f"{table}/step")

    def record(self, table: str, points: Sequence[Point]) -> None:
        """Log rows of the history."""
        for step, time, values in points:
            self._run.log({**values, f"{table}/step": step, "_timestamp": time})

    def end(self, summary: Facts) -> None:
        """Set the summary, and wait until all of it is written or sent."""
        figures = {name: value for name, value in summary.items() if name != "per_node"}
        self._run.summary.update(figures)
        self._run.finish(exit_code=0 if summary["state"] == "done" else 1)


def library() -> ModuleType:
    """Return the module wandb.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it reads it when it is imported
    try:
        import wandb  # noqa: PLC0415
    except ImportError:
        raise missing("wandb", "Weights & Biases") from None
    module: ModuleType = wandb
    return module
