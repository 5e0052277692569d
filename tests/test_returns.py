"""A worker's process is killed in the middle of an async job, started again, and taken back."""

import asyncio
import os
import signal
import subprocess

import pytest

from aiosgd import aio


class Told(aio.Silent):
    """Knows when the job trains, and what is worth a line."""

    def __init__(self):
        self.lines, self.moving = [], asyncio.Event()

    def progressed(self, progress):
        self.moving.set()

    def noted(self, text):
        self.lines.append(text)


def child_of(parent):
    """Return the node process that a supervisor runs."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "victim", "every"), [("pull", 0, None), ("adpsgd", 1, 200), ("ssp", 0, 200)]
)
def test_a_killed_worker_comes_back_to_its_job(
    start_nodes, cluster_of, tmp_path, codec, victim, every
):
    servers = 0 if codec == "adpsgd" else 1
    nodes = start_nodes(3 + servers)
    options = {"codec": codec, "mode": "async", "on_loss": "continue", "epochs": 10**6}
    steps = {"max_steps": 6_000 if codec == "adpsgd" else 2_500, "checkpoint_every": every}

    async def story():
        told = Told()
        cluster = cluster_of(nodes[:3], nodes[3:])
        job = aio.submit(cluster, observer=told, output=str(tmp_path / "runs"), **options, **steps)
        task = asyncio.create_task(job)
        await told.moving.wait()
        os.kill(child_of(nodes[victim].process.process.pid), signal.SIGKILL)
        return await asyncio.wait_for(task, 60), told.lines

    outcome, lines = asyncio.run(story())
    assert any(line.startswith(f"worker {victim} lost: ") for line in lines)
    assert f"worker {victim} is back" in lines
    summary = outcome.summary
    assert (summary.state, summary.metrics["accuracy"] > 0.9) == ("done", True)
    assert summary.lost[victim].endswith("it came back")
    assert outcome.parameters
    own = outcome.train[outcome.train.node == victim]
    assert own.step[0] > 0  # it went on where the others were
    if every:
        assert summary.checkpoint > own.step[0]  # checkpoints go on, with all workers
