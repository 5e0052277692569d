"""Runs of MLflow, read back through its own client; no server, no network."""

import os

import pytest

import aiosgd
from aiosgd.errors import JobFailedError

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("alembic")

pytestmark = [
    pytest.mark.extra,
    pytest.mark.filterwarnings("ignore:.*loader strategy is deprecated"),  # SQLAlchemy to MLflow
]


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_jobs_read_back_as_their_tables(tmp_path):
    options = {"workers": 2, "epochs": 2, "tracker": "mlflow", "output": tmp_path}
    first = aiosgd.simulate(**options)
    with pytest.raises(JobFailedError):
        aiosgd.simulate(faults="crash:1@0.0001", **options)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("aiosgd")
    failed, run = client.search_runs(experiment.experiment_id)
    assert (run.info.run_name, run.info.status) == (first.summary.job_id, "FINISHED")
    assert run.data.params["dataset"] == "digits"
    assert run.data.params["compute.policy"] == "auto"
    assert run.data.tags["aiosgd.simulated"] == "True"
    assert run.data.metrics["summary/accuracy"] == first.metrics["accuracy"]
    assert run.data.metrics["summary/steps"] == first.summary.steps
    own = first.train[first.train.node == 0]
    for column in ("loss", "accuracy", "compute_s", "bytes_sent"):
        history = client.get_metric_history(run.info.run_id, f"train/{column}")
        points = {point.step: point.value for point in history}
        assert len(history) == len(points)
        assert points == dict(zip(own.step.tolist(), own[column].tolist(), strict=True))
    tested = client.get_metric_history(run.info.run_id, "eval/accuracy")
    accuracies = first.eval.accuracy[first.eval.node == 0]
    assert [point.value for point in tested] == accuracies.tolist()
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"train.csv", "eval.csv", "consensus.csv", "job.toml", "summary.json"}
    assert failed.info.status == "FAILED"
    assert "worker 1" in failed.data.tags["aiosgd.error"]


def test_mlflow_tells_nobody():
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
