"""Runs of MLflow."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from aiosgd.plugins.trackers.base import Facts, Job, flattened, missing
from aiosgd.plugins.trackers.single import Point, SingleRecord

# what a tracking server takes at a time (MLflow's REST API, "Request Limits")
METRICS, PARAMS = 1000, 100
# characters of a parameter's value that it keeps
VALUE = 6000
FILES = ("train.csv", "eval.csv", "consensus.csv", "job.toml", "summary.json")
STATES = {"done": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


@dataclass(frozen=True)
class MlflowParams:
    """Parameters of `Mlflow`.

    Attributes:
        uri: where runs are kept: a server's URL or `sqlite:///FILE`; empty: MLFLOW_TRACKING_URI, or
            without that the file `mlflow.db` beside the run folders.
        experiment: the experiment that the run is part of.
        files: whether the run gets the tables, job.toml and summary.json as artifacts.
    """

    uri: str = ""
    experiment: str = "aiosgd"
    files: bool = True

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise ValueError("experiment is empty; expected a name")


class Mlflow(SingleRecord):
    """A run of MLflow for each job; needs the extra `mlflow`.

    The job's options are the run's parameters. Its metrics are the columns of worker 0's rows, such
    as `train/loss` and `eval/accuracy` by step, those of consensus.csv by epoch, and in the end the
    figures of summary.json, such as `summary/accuracy`. The run's name is the job's id.

    MLflow's own telemetry is switched off, unless MLFLOW_DISABLE_TELEMETRY says otherwise.
    """

    Params = MlflowParams
    params: MlflowParams

    def __init__(self, params: MlflowParams, folder: Path) -> None:
        super().__init__(params, folder)
        self._client: Any = None
        self._run = ""

    @classmethod
    def require(cls) -> None:
        """See the base class."""
        library()

    def begin(self, job: Job) -> None:
        """Start a run; the experiment is made where there is none."""
        super().begin(job)
        mlflow = library()
        self._client = mlflow.MlflowClient(self._uri())
        run = self._client.create_run(
            self._experiment(),
            start_time=round(1e3 * job.began),
            run_name=job.id,
            tags={"aiosgd.nodes": str(len(job.nodes)), "aiosgd.simulated": str(job.simulated)},
        )
        self._run = run.info.run_id
        options = [
            mlflow.entities.Param(name, str(value)[:VALUE])
            for name, value in flattened(job.options).items()
        ]
        for some in _batches(options, PARAMS):
            self._client.log_batch(self._run, params=some)

    def _uri(self) -> str:
        own = f"sqlite:///{(self.folder.parent / 'mlflow.db').absolute()}"
        return self.params.uri or os.environ.get("MLFLOW_TRACKING_URI") or own

    def _experiment(self) -> str:
        """Return the experiment's id."""
        name, client = self.params.experiment, self._client
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # of a file beside the run folders, artifacts are there, too
        is_own = not (self.params.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        place = (self.folder.parent / "mlflow-artifacts").absolute().as_uri() if is_own else None
        return str(client.create_experiment(name, artifact_location=place))

    def record(self, table: str, points: Sequence[Point]) -> None:
        """Log metrics."""
        metric = library().entities.Metric
        metrics = (
            metric(name, value, round(1e3 * time), step)
            for step, time, values in points
            for name, value in values.items()
        )
        for some in _batches(metrics, METRICS):
            self._client.log_batch(self._run, metrics=some)

    def end(self, summary: Facts) -> None:
        """Log the final figures and the files, and end the run."""
        figures = summary["metrics"] | {k: v for k, v in summary.items() if k != "checkpoint"}
        values = {
            f"summary/{name}": value
            for name, value in figures.items()
            if type(value) in (int, float)
        }
        ended = self._began + summary["wall_s"]
        self.record("summary", [(summary["steps"], ended, values)])
        if self.params.files:
            for name in FILES:
                if (self.folder / name).exists():
                    self._client.log_artifact(self._run, str(self.folder / name))
        if summary["error"]:
            self._client.set_tag(self._run, "aiosgd.error", summary["error"][:VALUE])
        self._client.set_terminated(
            self._run, STATES[summary["state"]], end_time=round(1e3 * ended)
        )


def _batches(items: Any, size: int) -> Any:
    """Yield lists of so many items; the last may be shorter."""
    rest = iter(items)
    return iter(lambda: list(itertools.islice(rest, size)), [])


def library() -> ModuleType:
    """Return the module mlflow.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reads it when it is imported
    try:
        import mlflow  # noqa: PLC0415
    except ImportError:
        raise missing("mlflow", "MLflow") from None
    for noisy in ("mlflow.store.db", "alembic"):  # about each table of a new file
        logging.getLogger(noisy).setLevel(logging.WARNING)
    module: ModuleType = mlflow
    return module
