"""Runs of Weights & Biases, offline: what would be sent is a file, which is read back."""

import json
import os
import struct

import pytest

import aiosgd

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2 as messages  # noqa: E402

pytestmark = pytest.mark.extra

BLOCK, WHOLE, LAST = 1 << 15, 1, 4


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


def records(folder):
    """Yield what is in the file of a run: LevelDB's log format after 7 bytes of its own."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # no room for a head: the block's end is padding
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (WHOLE, LAST):
            record = messages.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def pairs(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_job_reads_back_as_its_tables(tmp_path):
    outcome = aiosgd.simulate(
        workers=2,
        epochs=2,
        tracker="wandb",
        tracker_params={"wandb": {"project": "digits"}},
        output=tmp_path,
    )
    assert outcome.tracker_errors == {}
    kept = list(records(outcome.folder))
    (run,) = [record.run for record in kept if record.HasField("run")]
    assert (run.display_name, run.project) == (outcome.summary.job_id, "digits")
    config = pairs(run.config.update)
    assert (config["dataset"], config["epochs"]) == ("digits", 2)
    assert not run.host
    assert not run.git.commit
    rows = [pairs(record.history.item) for record in kept if record.HasField("history")]
    own = outcome.train[outcome.train.node == 0]
    losses = [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sorted(losses) == list(zip(own.step.tolist(), own.loss.tolist(), strict=True))
    tested = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert tested == outcome.eval.accuracy[outcome.eval.node == 0].tolist()
    metrics = {r.metric.glob_name: r.metric.step_metric for r in kept if r.HasField("metric")}
    assert metrics["train/*"] == "train/step"
    summary = {}
    for record in kept:
        if record.HasField("summary"):
            summary |= pairs(record.summary.update)
    assert summary["state"] == "done"
    assert not [record for record in kept if record.HasField("stats")]  # of the machine
    (end,) = [record.exit.exit_code for record in kept if record.HasField("exit")]
    assert end == 0


def test_wandb_reports_no_errors_of_its_own():
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
