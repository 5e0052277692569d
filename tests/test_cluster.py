"""Jobs on real node processes: what they compute, what they leave, how they fail."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from aiosgd import aio
from aiosgd.errors import ClusterError, ConfigError, JobFailedError
from aiosgd.runtime import harvest, results
from aiosgd.runtime.config import Address, Cluster, to_dict
from aiosgd.runtime.job import Phase

pytestmark = pytest.mark.usefixtures("no_process_left")

FOR_EVER = {"epochs": 1_000_000, "step_timeout": 60.0}

RING = '''
from aiosgd import Codec, Envelope


class Ring(Codec):
    """Each block goes once around; every worker ends with the mean."""

    accepts_late = True

    def start(self):
        self.values = {}

    def next(self):
        place = self.ctx.workers.index(self.ctx.node)
        return self.ctx.workers[(place + 1) % self.ctx.worker_count]

    async def update(self, block):
        self.add(block.step, block.id, block.value)
        if self.ctx.worker_count > 1:
            yield Envelope(self.next(), (self.ctx.node, block.step, block.id, block.value))

    async def receive(self, message):
        origin, step, block, value = message.content
        self.add(step, block, value)
        if self.next() != origin:
            yield Envelope(self.next(), message.content)

    def add(self, step, block, value):
        values = self.values.setdefault(step, {})
        values[block] = value
        if len(values) == self.ctx.block_count:
            del self.values[step]
            self.set_result(sum(values[i] for i in sorted(values)) / len(values))
'''

RAISES = """
from aiosgd import Codec


class Raises(Codec):
    async def update(self, block):
        if block.step == 3 and self.ctx.node == 1:
            raise ValueError("no good")
        self.set_result(block.value)
"""


class Watch(aio.Silent):
    """An observer whose news can be awaited."""

    def __init__(self):
        self.phases = {phase: asyncio.Event() for phase in Phase}
        self.job_id = ""
        self.moving = asyncio.Event()

    def entered(self, phase, job_id):
        self.job_id = job_id
        self.phases[phase].set()

    def progressed(self, progress):
        self.moving.set()


def job(cluster, tmp_path, **options):
    """Run a job on running nodes."""
    with_defaults = {"output": str(tmp_path / "runs"), **options}
    return asyncio.run(asyncio.wait_for(aio.submit(cluster, **with_defaults), 60))


def vector(outcome):
    return np.concatenate([value.ravel() for value in outcome.parameters.values()])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# What a job leaves ----------------------------------------------------------------------------


def check_run(folder, workers, servers):
    """Check that a run's folder is complete and agrees with itself."""
    summary = json.loads((folder / "summary.json").read_text())
    train, evaluation = results.read_table(folder, "train"), results.read_table(folder, "eval")
    nodes = [*range(workers), *range(-servers, 0)]
    files = {
        "job.toml",
        "summary.json",
        "model.safetensors",
        "train.csv",
        "eval.csv",
        "consensus.csv",
    }
    assert {path.name for path in folder.iterdir()} == {*files, "submit.log", "nodes"}
    assert {path.name for path in (folder / "nodes").iterdir()} == {str(node) for node in nodes}
    assert summary["job_id"] == folder.name
    assert (summary["state"], summary["error"]) == ("done", None)
    assert summary["nodes"] == len(nodes)
    assert len(train) == workers * summary["steps"]
    assert sorted(set(zip(train.node, train.step, strict=True))) == [
        (node, step) for node in range(workers) for step in range(summary["steps"])
    ]
    assert len(evaluation) == workers * summary["epochs"]
    assert summary["samples"] == train.samples.sum()
    last = evaluation[(evaluation.node == 0) & (evaluation.epoch == summary["epochs"] - 1)]
    assert summary["metrics"] == {"loss": last.loss[0], "accuracy": last.accuracy[0]}
    assert summary["bytes_sent"] == summary["bytes_received"] > 0
    assert 0 < summary["train_s"] < summary["wall_s"]
    assert summary["samples_per_s"] == pytest.approx(summary["samples"] / summary["train_s"])
    assert {int(node) for node in summary["per_node"]} == set(nodes)
    assert all((folder / f"nodes/{node}/node.log").stat().st_size for node in nodes)
    assert "done" in (folder / "submit.log").read_text()
    assert safetensors.numpy.load_file(folder / "model.safetensors").keys()
    return summary


def test_the_main_job_three_times_without_a_restart(
    shared_nodes, command, tmp_path, cluster_of, write_cluster
):
    workers, server = cluster_of(shared_nodes[:3]), cluster_of(shared_nodes[:2], shared_nodes[2:3])
    file = write_cluster(workers)
    with_server = write_cluster(server)
    for words, sizes in (
        ((file, "--codec", "plain"), (3, 0)),
        ((file, "--codec", "plain"), (3, 0)),
        ((with_server, "--codec", "fedavg", "--set", "codec.turn=5"), (2, 1)),
    ):
        before = set((tmp_path / "runs").glob("*"))
        done = command("submit", *words, "--epochs", 3)
        assert done.code == 0, done.err
        (folder,) = set((tmp_path / "runs").glob("*")) - before
        summary = check_run(folder, *sizes)
        assert summary["epochs"] == 3
        assert f"results in runs/{folder.name}" in done.out
        assert f"test accuracy {summary['metrics']['accuracy']:.4f}" in done.out
        kept = list(shared_nodes[0].run_dir.glob(f"{folder.name}/nodes/0/*"))
        assert {path.name for path in kept} >= {"node.log", "train.csv", "eval.csv"}


def test_the_outcome_is_what_the_folder_holds(cluster, tmp_path):
    outcome = job(cluster, tmp_path, workers=2, epochs=2, title="mine", seed=7)
    folder = outcome.folder
    assert "-mine-" in folder.name
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    assert saved.keys() == outcome.parameters.keys()
    assert all(np.array_equal(saved[name], outcome.parameters[name]) for name in saved)
    for name, rows in (("train", outcome.train), ("eval", outcome.eval)):
        again = results.read_table(folder, name)
        for column in rows.dtype.names:
            np.testing.assert_allclose(rows[column], again[column], rtol=1e-5)
    read = results.read_job(folder)
    assert (read.title, read.seed, read.workers, read.epochs) == ("mine", 7, 2, 2)
    assert outcome.metrics == outcome.summary.metrics
    assert results.read_summary(folder) == outcome.summary


def test_a_job_file_gives_the_same_parameters_again(cluster, tmp_path):
    first = job(cluster, tmp_path, workers=2, epochs=2, seed=3, learning_rate=0.1)
    again = job(cluster, tmp_path, **to_dict(results.read_job(first.folder)))
    assert np.array_equal(vector(first), vector(again))


# What a job computes --------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_jobs_in_a_row_end_with_the_same_bits(cluster, tmp_path):
    first = vector(job(cluster, tmp_path, workers=2, epochs=3))
    for _ in range(49):
        assert np.array_equal(first, vector(job(cluster, tmp_path, workers=2, epochs=3)))


def test_two_workers_with_half_the_batch_equal_one_with_the_whole(cluster, tmp_path):
    two = job(cluster, tmp_path, workers=2, batch_size=32, epochs=3)
    one = job(cluster, tmp_path, workers=1, batch_size=64, epochs=3)
    np.testing.assert_allclose(vector(two), vector(one), atol=1e-6, rtol=0)
    assert two.summary.steps == one.summary.steps


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_ring_from_a_file_reaches_the_mean(cluster, tmp_path, mode):
    file = write(tmp_path / "ring.py", RING)
    ring = job(cluster, tmp_path, codec=f"{file}:Ring", workers=4, epochs=3, mode=mode)
    plain = job(cluster, tmp_path, codec="plain", workers=4, epochs=3)
    if mode == "sync":
        assert np.array_equal(vector(ring), vector(plain))
        assert ring.summary.bytes_sent > plain.summary.bytes_sent / 2
    else:
        assert ring.metrics["accuracy"] == pytest.approx(plain.metrics["accuracy"], abs=0.15)
    assert np.all(ring.train.bytes_sent[ring.train.step == 5] > 0)


def test_blocks_computed_twice_give_the_same_mean(cluster, tmp_path):
    twice = job(cluster, tmp_path, workers=4, redundancy=2, batch_size=16, epochs=2)
    once = job(cluster, tmp_path, workers=1, batch_size=16 * 6, epochs=2)  # 4 over 2 is 6 blocks
    np.testing.assert_allclose(vector(twice), vector(once), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "epochs", "learning_rate"),
    # async adds four updates where sync takes their mean: a quarter of the rate
    [("sync", 40, 0.2), ("async", 120, 0.05)],
)
def test_a_parameter_server_learns_digits(cluster, tmp_path, mode, epochs, learning_rate):
    outcome = job(
        cluster,
        tmp_path,
        codec="parameter_server",
        mode=mode,
        workers=4,
        batch_size=16,
        epochs=epochs,
        learning_rate=learning_rate,
    )
    assert outcome.metrics["accuracy"] >= 0.95
    assert outcome.summary.nodes == 5


def test_a_fast_async_worker_does_not_wait_for_a_slow_one(cluster, tmp_path):
    outcome = job(
        cluster,
        tmp_path,
        codec="parameter_server",
        mode="async",
        workers=2,
        epochs=8,
        model_params={"hidden": [512, 512]},
        compute={"slow": {"1": 5.0}},
    )
    fast, slow = (outcome.train[outcome.train.node == node] for node in (0, 1))
    assert len(fast) == len(slow)
    # at the end of the fast worker's last step, the slow one was still in its first half
    assert slow.time_s[len(slow) // 2] > fast.time_s[-1]
    assert fast.wait_s.sum() < slow.time_s[-1] / 4


def test_a_job_ends_early_once_the_target_is_reached(cluster, tmp_path):
    outcome = job(cluster, tmp_path, workers=2, epochs=60, learning_rate=0.2, target_accuracy=0.8)
    reached = outcome.eval[outcome.eval.node == 0].accuracy
    assert outcome.summary.epochs < 60
    assert reached[-1] >= 0.8 > max(reached[:-2], default=0)


# Codecs from files ----------------------------------------------------------------------------


def test_a_node_without_allow_code_refuses_source_code(
    start_nodes, command, tmp_path, cluster_of, write_cluster
):
    nodes = start_nodes(2)
    file = write_cluster(cluster_of(nodes))
    write(tmp_path / "ring.py", RING)
    refused = command("submit", file, "--codec", "ring.py:Ring")
    assert refused.code == 3
    assert "start it with --allow-code" in refused.err
    assert "Traceback" not in refused.err
    assert job(cluster_of(nodes), tmp_path).summary.state == "done"


def test_what_a_codec_logs_and_the_source_it_came_from_are_in_the_nodes_log(cluster, tmp_path):
    text = RAISES.replace('raise ValueError("no good")', 'self.ctx.log(f"hello from {block.step}")')
    file = write(tmp_path / "talks.py", text)
    outcome = job(cluster, tmp_path, codec=f"{file}:Raises", workers=2)
    log = (outcome.folder / "nodes/1/node.log").read_text()
    assert "hello from 3" in log
    assert "sha256" in log


# Data files -----------------------------------------------------------------------------------


@pytest.fixture
def blobs(tmp_path):
    """A data file that no node has."""
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    x = (rng.normal(size=(600, 4)) + 3 * np.eye(3, 4)[y]).astype(np.float32)
    np.savez(tmp_path / "blobs.npz", x=x, y=y)
    return tmp_path / "blobs.npz"


def sent_files(outcome):
    log = (outcome.folder / "submit.log").read_text()
    return [line for line in log.splitlines() if " gets blobs.npz" in line]


def test_a_data_file_is_sent_once_to_each_node_and_kept(start_nodes, tmp_path, blobs, cluster_of):
    nodes = start_nodes(2)
    options = {"dataset": "npz", "dataset_params": {"path": str(blobs)}, "batch_size": 32}
    first = job(cluster_of(nodes), tmp_path, **options)
    second = job(cluster_of(nodes), tmp_path, **options)
    assert len(sent_files(first)) == 2
    assert f"{blobs.stat().st_size} bytes" in sent_files(first)[0]
    assert sent_files(second) == []
    assert np.array_equal(vector(first), vector(second))
    (kept,) = (nodes[0].data_dir / "sha256").iterdir()
    assert kept.read_bytes() == blobs.read_bytes()


def test_a_damaged_copy_is_noticed_removed_and_sent_again(start_nodes, tmp_path, blobs, cluster_of):
    (node,) = start_nodes(1)
    options = {"dataset": "npz", "dataset_params": {"path": str(blobs)}, "batch_size": 32}
    job(cluster_of([node]), tmp_path, **options)
    (kept,) = (node.data_dir / "sha256").iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    with pytest.raises(
        JobFailedError, match=r"blobs\.npz was damaged and is removed; submit again"
    ):
        job(cluster_of([node]), tmp_path, **options)
    assert len(sent_files(job(cluster_of([node]), tmp_path, **options))) == 1


# Failures -------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_node_that_is_down_is_named(shared_nodes, command, tmp_path, cluster_of, write_cluster):
    address = Address("127.0.0.1", free_port())
    cluster = Cluster((shared_nodes[0].address, address))
    done = command("submit", write_cluster(cluster))
    assert done.code == 3
    (line,) = done.err.splitlines()
    assert str(address) in line
    assert "worker 1" in line
    assert job(cluster_of(shared_nodes[:1]), tmp_path, epochs=1).summary.state == "done"


def test_a_busy_node_says_with_what_and_goes_on(cluster, tmp_path):
    options = {"workers": 2, "output": str(tmp_path / "runs")}

    async def two_jobs():
        watch = Watch()
        first = asyncio.create_task(aio.submit(cluster, observer=watch, epochs=100, **options))
        await watch.phases[Phase.RUNNING].wait()
        with pytest.raises(ClusterError, match=f"busy with job {watch.job_id} since ") as caught:
            await aio.submit(cluster, **options)
        assert caught.value.exit_code == 3
        assert not first.done()
        return await first

    disturbed = asyncio.run(asyncio.wait_for(two_jobs(), 60))
    alone = job(cluster, tmp_path, workers=2, epochs=100)
    assert np.array_equal(vector(disturbed), vector(alone))


def test_where_a_codec_failed_on_a_node_is_shown_with_debug(
    cluster, command, tmp_path, write_cluster
):
    write(tmp_path / "raises.py", RAISES)
    words = ("submit", write_cluster(cluster), "--codec", "raises.py:Raises", "--workers", 2)
    done = command(*words, "--debug")
    assert done.code == 1
    *shown, line = done.err.splitlines()
    assert line.startswith("aiosgd: job ")
    start = next(i for i, text in enumerate(shown) if text.startswith("traceback of worker "))
    assert any("raises.py" in text and ", line " in text for text in shown[start:])
    assert "traceback of worker" not in command(*words).err


@pytest.mark.parametrize(
    ("log", "text"),
    [
        (b"", ""),
        (b"2026-01-01 10:00:00,123 ERROR no number\n", ""),
        (
            (
                b"2026-01-01 10:00:00,123 INFO started\n"
                b"2026-01-01 10:00:00,124 ERROR Traceback (most recent call last):\n"
                b"  File x.py\nValueError: \x1b[31mred\n\n"
                b"2026-01-01 10:00:00,125 ERROR left\n"
            ),
            "  File x.py\nValueError: \ufffd[31mred",
        ),
        (
            b"2026-01-01 10:00:00,124 ERROR Traceback (most recent call last):\n"
            + b"  line\n" * 100
            + b"KeyError",
            "  line\n" * (harvest.TRACEBACK_LINES - 1) + "KeyError",
        ),
    ],
)
def test_the_traceback_of_a_log(log, text):
    assert harvest.traceback_in(log) == text


def test_a_codec_that_raises_is_named_with_its_place(cluster, command, tmp_path, write_cluster):
    file = write_cluster(cluster)
    write(tmp_path / "raises.py", RAISES)
    done = command("submit", file, "--codec", "raises.py:Raises", "--workers", 2)
    assert done.code == 1
    error = done.err.splitlines()[-1]
    assert "codec Raises: update failed on node 1 in step 3: ValueError: no good" in error
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(folder.relative_to(tmp_path)) in error
    log = (folder / "nodes/1/node.log").read_text()
    assert "Traceback" in log
    assert 'raise ValueError("no good")' in log
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert "codec Raises" in summary["error"]
    assert job(cluster, tmp_path, workers=2).summary.state == "done"


def test_a_codec_that_never_finishes_fails_after_the_step_timeout(cluster, tmp_path):
    text = "from aiosgd import Codec\n\n\nclass Mute(Codec):\n    async def update(self, block):\n        pass\n"
    file = write(tmp_path / "mute.py", text)
    with pytest.raises(JobFailedError, match="step 0"):
        job(cluster, tmp_path, codec=f"{file}:Mute", workers=2, step_timeout=0.1)
    assert job(cluster, tmp_path, workers=2).summary.state == "done"


def test_a_worker_that_is_killed_is_named_and_the_other_is_free(start_nodes, tmp_path, cluster_of):
    nodes = start_nodes(2)

    async def kill_one():
        watch = Watch()
        options = {**FOR_EVER, "output": str(tmp_path / "runs")}
        task = asyncio.create_task(aio.submit(cluster_of(nodes), observer=watch, **options))
        await watch.moving.wait()
        nodes[1].process.signal(signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(JobFailedError, match="worker 1") as caught:
                await task
        return caught.value

    error = asyncio.run(kill_one())
    assert error.exit_code == 1
    assert job(cluster_of(nodes[:1]), tmp_path).summary.state == "done"


@pytest.mark.slow
def test_a_worker_that_falls_silent_is_named(start_nodes, tmp_path, cluster_of):
    nodes = start_nodes(2, "--no-supervisor")

    async def freeze_one():
        watch = Watch()
        options = {**FOR_EVER, "output": str(tmp_path / "runs")}
        task = asyncio.create_task(aio.submit(cluster_of(nodes), observer=watch, **options))
        await watch.moving.wait()
        nodes[1].process.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                with pytest.raises(JobFailedError, match=r"worker 1 lost: .*silent"):
                    await task
        finally:
            nodes[1].process.signal(signal.SIGCONT)

    asyncio.run(freeze_one())
    assert job(cluster_of(nodes), tmp_path).summary.state == "done"


def test_nodes_go_on_once_their_submitter_was_killed_and_can_be_freed(
    cluster, start_command, tmp_path, write_cluster
):
    file = write_cluster(cluster)
    submitter = start_command("submit", file, "--epochs", FOR_EVER["epochs"])
    submitter.wait_for(r"step \d+/")
    submitter.signal(signal.SIGKILL)
    submitter.end()
    with pytest.raises(ClusterError, match="busy with job"):
        job(cluster, tmp_path)
    asyncio.run(aio.cancel(file))
    assert until_free(cluster, tmp_path).summary.state == "done"


def until_free(cluster, tmp_path):
    """Run a job as soon as the nodes take it."""

    async def insist():
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(ClusterError):
                    return await aio.submit(cluster, output=str(tmp_path / "after"))

    return asyncio.run(insist())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_submit_cancels_the_job(
    cluster, start_command, tmp_path, number, write_cluster
):
    file = write_cluster(cluster)
    submitter = start_command("submit", file, "--epochs", FOR_EVER["epochs"])
    submitter.wait_for(r"step \d+/")
    submitter.signal(number)
    assert submitter.end() == 130
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"{folder.name} was cancelled" in submitter.err.splitlines()[-1]
    assert "Traceback" not in submitter.err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "cancelled"
    assert sorted(path.name for path in (folder / "nodes").iterdir()) == ["0", "1", "2", "3"]
    assert "started" in (folder / "nodes/0/node.log").read_text()
    assert job(cluster, tmp_path).summary.state == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_node_says_so_and_exits_at_once(start_nodes, tmp_path, number, cluster_of):
    nodes = start_nodes(2)

    async def stop_one():
        watch = Watch()
        options = {**FOR_EVER, "output": str(tmp_path / "runs")}
        task = asyncio.create_task(aio.submit(cluster_of(nodes), observer=watch, **options))
        await watch.moving.wait()
        async with asyncio.timeout(5):
            code = await asyncio.to_thread(nodes[1].stop, number)
            with pytest.raises(JobFailedError, match=r"worker 1(: the node was stopped| lost)"):
                await task
        return code

    assert asyncio.run(stop_one()) == 0
    assert "Traceback" not in nodes[1].process.err
    assert "ERROR" not in nodes[1].process.err


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
        b"\0" * 1000,
        os.urandom(100_000),
        b"",
    ],
    ids=["http", "zeros", "random", "nothing"],
)
def test_noise_on_a_nodes_port_disturbs_nobody(shared_nodes, cluster, tmp_path, noise):
    address = shared_nodes[0].address
    with socket.create_connection((address.host, address.port), 5) as link:
        link.sendall(noise)
        assert job(cluster, tmp_path, workers=1).summary.state == "done"
        if noise:
            link.settimeout(10)
            assert ended(link)


def ended(link) -> bool:
    """Tell whether the other side closes the link, in whatever way."""
    try:
        return link.recv(1) == b""
    except ConnectionError:
        return True


def test_half_a_hello_disturbs_nobody(shared_nodes, cluster, tmp_path):
    from aiosgd.runtime.frame import Kind, encode
    from aiosgd.runtime.hello import greeting

    hello = b"".join(bytes(part) for part in encode(greeting(role="submitter"), Kind.HELLO).buffers)
    address = shared_nodes[0].address
    with socket.create_connection((address.host, address.port), 5) as link:
        link.sendall(hello[: len(hello) // 2])
        assert job(cluster, tmp_path, workers=1).summary.state == "done"
    with socket.create_connection((address.host, address.port), 5) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.sendall(hello)  # and a reset right after it
    assert job(cluster, tmp_path, workers=1).summary.state == "done"


def test_many_idle_links_keep_no_submitter_out(shared_nodes, cluster, tmp_path):
    address = shared_nodes[0].address
    links = [socket.create_connection((address.host, address.port), 5) for _ in range(150)]
    try:
        assert job(cluster, tmp_path, workers=1).summary.state == "done"
    finally:
        for link in links:
            link.close()


def test_a_port_in_use_is_named(shared_nodes, command):
    address = shared_nodes[0].address
    done = command("node", "--port", address.port)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert str(address) in line
    assert "in use" in line


def test_a_wrong_job_never_reaches_a_node(tmp_path):
    nowhere = Cluster((Address("127.0.0.1", free_port()),))
    with pytest.raises(ConfigError, match="batch_size"):
        job(nowhere, tmp_path, batch_size=10_000)
    assert not (tmp_path / "runs").exists()
