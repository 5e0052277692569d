"""Simulated jobs: the bits and bytes of real ones, the same in every run, and honest failures."""

import asyncio
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import aiosgd
from aiosgd import aio
from aiosgd.errors import ConfigError, JobFailedError
from aiosgd.runtime import results
from aiosgd.runtime.config import make_job
from aiosgd.runtime.coordinator import load_job
from aiosgd.runtime.simulation.faults import Crash, Cut, parse_faults, parse_stragglers
from aiosgd.runtime.simulation.network import NetworkModel
from aiosgd.runtime.simulation.network import Path as Way
from aiosgd.runtime.simulation.simulate import Simulation, play

SMALL = {"epochs": 3, "max_steps": 8, "batch_size": 16}
JITTERY = NetworkModel(path=Way(latency_s=1e-3, jitter_s=5e-3, loss=0.05))
SYNC = [
    {"codec": "plain", "workers": 3},
    {"codec": "plain", "workers": 3, "compressor": "fp16", "redundancy": 2, "batch_size": 8},
    {"codec": "fedavg", "workers": 4, "codec_params": {"turn": 2}},
    {"codec": "parameter_server", "workers": 4, "overlap": True},
    {"codec": "allreduce", "workers": 4, "granularity": "tensor"},
    {"codec": "dpsgd", "topology": "ring", "workers": 4},
    {"codec": "plain", "workers": 2, "optimizer_params": {"momentum": 0.9}, "partition": "iid"},
]
"""Jobs whose results a real run and a simulation must have in common."""


def name(options):
    return "-".join(str(value) for value in list(options.values())[:3])


@pytest.fixture
def runs(tmp_path):
    return str(tmp_path / "runs")


def bits(outcome):
    return {name: array.tobytes() for name, array in outcome.parameters.items()}


# like a real run ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SYNC, ids=name)
def test_parameters_and_bytes_are_those_of_a_real_run(cluster, runs, options):
    options = {**SMALL, **options, "output": runs}
    real = aiosgd.submit(cluster, **options)
    virtual = aiosgd.simulate(network=JITTERY, stragglers="1:3", **options)
    assert bits(virtual) == bits(real)
    assert virtual.metrics == real.metrics
    for column in ("node", "step", "epoch", "loss", "accuracy", "samples"):
        assert (virtual.train[column] == real.train[column]).all()
    totals = [
        (summary.bytes_sent, summary.bytes_received, summary.samples, summary.steps)
        for summary in (virtual.summary, real.summary)
    ]
    assert totals[0] == totals[1]
    for node, figures in real.summary.per_node.items():
        assert virtual.summary.per_node[node]["bytes_sent"] == figures["bytes_sent"]


def test_it_leaves_the_files_of_a_real_run_and_says_that_it_was_simulated(cluster, runs):
    options = {**SMALL, "workers": 2, "output": runs}
    real, virtual = aiosgd.submit(cluster, **options), aiosgd.simulate(**options)
    files = [
        sorted(str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*"))
        for outcome in (real, virtual)
    ]
    assert files[0] == files[1]
    summary = results.read_summary(virtual.folder)
    assert results.read_summary(real.folder).simulated is None
    assert summary.simulated["network"]["name"] == "lan"
    assert summary.simulated["trace_sha256"] == virtual.trace.digest
    assert summary.wall_s < 1 < summary.wall_s + summary.simulated["real_s"] + 1
    again = aiosgd.simulate(job_file=virtual.folder / "job.toml", output=runs)
    assert bits(again) == bits(virtual)
    assert again.trace.digest == virtual.trace.digest


def test_the_spectral_gap_is_said_and_kept(cluster, runs):
    options = {**SMALL, "workers": 4, "output": runs, "codec": "dpsgd", "topology": "ring"}
    for outcome in (aiosgd.submit(cluster, **options), aiosgd.simulate(**options)):
        run = tomllib.loads((outcome.folder / "job.toml").read_text())["run"]
        assert run["spectral_gap"] == pytest.approx(2 / 3)
        log = (outcome.folder / "submit.log").read_text()
        assert "INFO topology ring: spectral gap 0.667\n" in log


def test_the_consensus_distance_is_that_of_the_workers_weights(runs):
    options = {**SMALL, "codec": "dpsgd", "topology": "ring", "workers": 8, "max_steps": 5}
    load, _ = load_job(make_job({**options, "output": runs}), 8, Path(runs))
    played = play(Simulation(load=load, workers=8))
    weights = np.array([played.world.sessions[node].weights for node in range(8)])
    distance = np.linalg.norm(weights - weights.mean(axis=0), axis=1).mean()
    outcome = aiosgd.simulate(output=runs, **options)
    assert outcome.summary.consensus_distance == pytest.approx(distance, rel=0.2)
    assert outcome.summary.consensus_distance == outcome.consensus["mean"][-1]
    assert outcome.consensus.epoch.tolist() == np.unique(outcome.eval.epoch).tolist()
    equal = aiosgd.simulate(output=runs, **{**options, "topology": "full"})
    assert equal.summary.consensus_distance == 0


def test_staleness_is_summed_up(runs):
    options = {**SMALL, "codec": "parameter_server", "mode": "async", "workers": 4}
    outcome = aiosgd.simulate(output=runs, stragglers="1:5", **options)
    stale = outcome.train.staleness[np.isfinite(outcome.train.staleness)]
    assert outcome.summary.staleness_mean == np.maximum(stale, 0).mean()
    assert outcome.summary.staleness_max == stale.max()


def test_times_are_virtual(runs):
    model = NetworkModel(path=Way(latency_s=5.0), block_s=100.0)
    outcome = aiosgd.simulate(network=model, workers=2, max_steps=3, output=runs)
    assert outcome.train.compute_s.tolist() == [100.0] * 6
    assert outcome.train.wait_s == pytest.approx([5.0] * 6, abs=0.1)
    assert outcome.summary.train_s == pytest.approx(315, abs=1)


def test_stragglers_slow_their_steps_only_as_far_as_the_codec_waits(runs):
    def compute(mode):
        outcome = aiosgd.simulate(
            network=NetworkModel(block_s=1.0),
            stragglers="1:4",
            codec="parameter_server",
            mode=mode,
            workers=3,
            max_steps=4,
            output=runs,
        )
        last = {row.node: row.time_s for row in outcome.train}
        return [round(last[node]) for node in range(3)]

    assert compute("sync") == [16, 16, 16]
    assert compute("async") == [4, 16, 4]


# the same in every run ------------------------------------------------------------------------

AGAIN = """
import aiosgd, hashlib, json, sys
options = json.loads(sys.argv[1])
outcome = aiosgd.simulate(**options)
table = hashlib.sha256((outcome.folder / "train.csv").read_bytes())
table.update((outcome.folder / "eval.csv").read_bytes())
table.update((outcome.folder / "model.safetensors").read_bytes())
for log in sorted(outcome.folder.glob("nodes/*/node.log")):
    table.update(log.read_bytes())
print(outcome.trace.digest, table.hexdigest())
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_same_options_give_the_same_files_whatever_the_hash_seed(runs, mode):
    options = {"codec": "parameter_server", "mode": mode, "workers": 5, "stragglers": "40%:3"}
    options |= {"network": "wan", "epochs": 2, "batch_size": 8, "output": runs, "servers": 2}
    options |= {"granularity": "tensor"}

    def digests(hash_seed, seed=0):
        return subprocess.run(
            [sys.executable, "-c", AGAIN, json.dumps({**options, "seed": seed})],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout

    assert len({digests(1), digests(1), digests(2)}) == 1
    assert digests(1, seed=1) != digests(1)


# failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "reason", "noticed"),
    [
        ("crash:1@5", "worker 1 lost: node 1 closed its link", (5, 5.1)),
        ("crash:-1@5", "server -1 lost: node -1 closed its link", (5, 5.1)),
        ("host:1@5", "worker 1 lost: silent for 5 s", (10, 11.1)),
        ("cut:0|-1@5-30", "lost: node 0 has not heard of node -1", (10, 11.1)),
    ],
)
def test_a_lost_node_ends_the_job_with_its_name_in_time(runs, faults, reason, noticed):
    options = {"codec": "parameter_server", "workers": 3, "epochs": 9, "output": runs}
    with pytest.raises(JobFailedError, match=reason):
        aiosgd.simulate(network=NetworkModel(block_s=1.0), faults=faults, **options)
    (folder,) = Path(runs).iterdir()
    summary = results.read_summary(folder)
    assert summary.state == "failed"
    assert noticed[0] < summary.wall_s < noticed[1]
    assert reason in summary.error


def test_a_cut_that_heals_in_time_changes_nothing_but_times(runs):
    options = {"workers": 4, "epochs": 2, "output": runs, "network": NetworkModel(block_s=0.1)}
    whole = aiosgd.simulate(**options)
    healed = aiosgd.simulate(faults="cut:0,1|2,3@0.3-4", **options)
    assert bits(healed) == bits(whole)
    assert healed.summary.wall_s > whole.summary.wall_s + 3


def test_a_node_that_crashes_after_the_end_harms_nobody(runs):
    assert aiosgd.simulate(workers=2, faults="crash:1@1000", output=runs).summary.state == "done"


def test_a_codec_that_waits_for_ever_ends_with_the_step_timeout(runs, tmp_path):
    source = tmp_path / "waits.py"
    source.write_text(
        "from aiosgd import Codec\n"
        "class Waits(Codec):\n"
        "    async def update(self, block): pass\n"
        "    async def receive(self, message): pass\n"
    )
    began = time.monotonic()
    with pytest.raises(JobFailedError, match="no result within 10 s; waiting for nodes: 1"):
        aiosgd.simulate(codec=f"{source}:Waits", workers=2, output=runs)
    assert time.monotonic() - began < 5


def test_cancelling_leaves_a_cancelled_run(runs):
    async def main():
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        watch = Watch(lambda: loop.call_soon_threadsafe(event.set))
        work = asyncio.ensure_future(
            aio.simulate(workers=3, epochs=1_000_000, output=runs, observer=watch)
        )
        await event.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())
    (folder,) = Path(runs).iterdir()
    summary = results.read_summary(folder)
    assert summary.state == "cancelled"
    assert summary.steps > 0


class Watch(aio.Silent):
    def __init__(self, progressed):
        self.progressed = lambda _: progressed()


def test_target_accuracy_stops_all_workers_after_the_same_epoch(runs):
    outcome = aiosgd.simulate(workers=3, epochs=50, target_accuracy=0.5, output=runs)
    assert 1 < outcome.summary.epochs < 50
    assert len({tuple(part.step.tolist()) for part in split(outcome.eval)}) == 1
    assert outcome.metrics["accuracy"] > 0.4


def split(rows):
    return [rows[rows.node == node] for node in np.unique(rows.node)]


# what users type ------------------------------------------------------------------------------


def test_faults_are_read():
    nodes = [0, 1, 2, -1]
    assert parse_faults("crash:2@3.5; host:-1@4;cut:0,1|2,-1@1-4.5", nodes) == [
        Crash(3.5, 2),
        Crash(4.0, -1, silent=True),
        Cut(1.0, (0, 1), (2, -1), 3.5),
    ]
    assert parse_faults("", nodes) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("crash:7@1", "there is no node 7"),
        ("cut:0|9@1-2", "there is no node 9"),
        ("cut:0|1@2-2", "expected FROM < TO"),
        ("cut:0,1|1@1-2", "two sides"),
        ("boom", "expected crash:NODE@SECONDS"),
        ("crash:1@-3", "expected crash:NODE@SECONDS"),
    ],
)
def test_wrong_faults_are_refused_with_what_is_expected(text, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_faults(text, [0, 1, 2])


def test_stragglers_are_read():
    assert parse_stragglers("3:2.5, 1:4", 5, 0) == {3: 2.5, 1: 4.0}
    drawn = parse_stragglers("10%:5", 200, 1)
    assert len(drawn) == 20
    assert set(drawn.values()) == {5.0}
    assert drawn != parse_stragglers("10%:5", 200, 2)


@pytest.mark.parametrize("text", ["5:2", "1:0.5", "10:", "x", "-1:2"])
def test_wrong_stragglers_are_refused(text):
    with pytest.raises(ConfigError, match="--stragglers has"):
        parse_stragglers(text, 5, 0)


def test_the_command_prints_what_came_of_it(command):
    done = command("simulate", "--workers", 4, "--epochs", 2, "--network", "wan")
    assert done.code == 0
    assert "simulated on wan with seed 0" in done.out
    assert "test accuracy" in done.out
    told = command("simulate", "--workers", 4, "--json")
    assert json.loads(told.out)["simulated"]["network"]["name"] == "lan"


def test_a_trace_is_written_once_and_a_second_run_is_compared(command, tmp_path):
    done = command("simulate", "--workers", 3, "--trace", "events", "--check")
    assert done.code == 0, done.err
    count = len((tmp_path / "events").read_text().splitlines()) - 1
    assert f"a second run is the same in all {count} events" in done.out
    again = command("simulate", "--workers", 3, "--trace", "events")
    assert (again.code, len((tmp_path / "events").read_text().splitlines())) == (2, count + 1)
    assert "--trace events exists already" in again.err


def test_the_first_event_that_differs_is_told(command, tmp_path):
    (tmp_path / "drifts.py").write_text(
        "from aiosgd import Codec\n"
        "class Drifts(Codec):\n"
        "    async def update(self, block):\n"
        "        self.set_result(block.value * (hash('a') % 97))\n"
        "    async def receive(self, message): pass\n"
    )
    failed = command("simulate", "--codec", "drifts.py:Drifts", "--epochs", 2, "--check")
    assert failed.code == 1
    assert "the second run differs: event" in failed.err
    assert "has computed block" in failed.err


def test_a_recorded_run_is_played_again_and_a_run_is_predicted(command, cluster, write_cluster):
    options = ["--codec", "parameter_server", "--mode", "async", "--workers", 2, "--epochs", 2]
    ran = command("submit", write_cluster(cluster), *options, "--record")
    folder = ran.out.splitlines()[-1].removeprefix("results in ")
    played = command("simulate", "--replay", folder)
    assert played.code == 0, played.err
    assert "bit for bit" in played.out
    assert command("simulate", "--replay", folder, "--node", 1).code == 2
    compared = command("simulate", "--compare", folder, "--json")
    assert compared.code == 0, compared.err
    assert json.loads(compared.out)["figures"].keys() >= {"step_s", "wait_s", "bytes_per_step"}
    shown = command("simulate", "--compare", folder)
    assert "predicted  measured" in shown.out
    assert command("simulate", "--record").code == 2


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--network", "lann"], 2, "lann"),
        (["--faults", "crash:0@0.001"], 1, "worker 0 lost"),
        (["--faults", "crash:100@1"], 2, "there is no node 100"),
        (["--workers", "0"], 2, "--workers is 0"),
        (["--codec", "plian"], 2, "did you mean 'plain'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, words, code, text):
    failed = command("simulate", *words)
    assert failed.code == code
    (line,) = [line for line in failed.err.splitlines() if line.startswith("aiosgd: ")]
    assert text in line
