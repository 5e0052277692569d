"""Jobs looked at, followed, collected and cancelled by somebody who did not submit them."""

import asyncio
import json
import re
import signal

import numpy as np
import pytest

from aiosgd import aio
from aiosgd.errors import ClusterError, ConfigError
from aiosgd.runtime import results
from aiosgd.runtime.config import Cluster
from aiosgd.runtime.node import ADOPTION_TIMEOUT

pytestmark = pytest.mark.usefixtures("no_process_left")

UNKNOWN = "20250102-030405-test-0123"
JOB_ID = r"\d{8}-\d{6}-[\w.-]+-[0-9a-f]{4}"
FOR_EVER = ("--epochs", 1_000_000)
STEPS, GATE = 400, 300
GATED = """
import asyncio
from pathlib import Path

from aiosgd.codecs.plain import Plain


class Gated(Plain):
    async def update(self, block):
        while block.step == {gate} and not Path({path!r}).exists():
            await asyncio.sleep(0.01)
        return await super().update(block)
"""


@pytest.fixture
def two(shared_nodes, cluster_of) -> Cluster:
    """Two workers."""
    return cluster_of(shared_nodes[:2])


@pytest.fixture
def file(two, write_cluster):
    """The path of a cluster.toml with two workers."""
    return write_cluster(two)


@pytest.fixture
def opened(tmp_path):
    """The file without which the jobs of `some` stop short of their end."""
    return tmp_path / "opened"


@pytest.fixture
def some(tmp_path, opened):
    """Options of a job that waits at step GATE until it may go on."""
    codec = tmp_path / "gated.py"
    codec.write_text(GATED.format(gate=GATE, path=str(opened)))
    words = ("--codec", f"{codec}:Gated", "--max-steps", STEPS, "--epochs", 1000, "--seed", 3)
    return (*words, "--step-timeout", 60)


@pytest.fixture
def detach(command, file):
    """`detach(*options)`: the id of a job that was left to its nodes."""

    def start(*options):
        done = command("submit", file, "--detach", *options)
        assert done.code == 0, done.err
        return re.search(rf"job ({JOB_ID}) trains", done.out)[1]

    return start


def status(command, *words):
    done = command("status", *words, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


async def at_the_gate(cluster):
    """Wait until a job that worker 0 leads stops short of its end."""
    while True:
        seen = await aio.status(cluster)
        if all((s.status.leader, s.status.step) == ("worker 0", GATE) for s in seen):
            return seen
        await asyncio.sleep(0.05)


def same_run(folder, other):
    """Check that two runs left the same, but for times, traffic and the job's id."""
    for name in ("model.safetensors", "consensus.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    kept = {
        "train": ["node", "step", "epoch", "loss", "accuracy", "samples", "staleness"],
        "eval": ["node", "epoch", "step", "loss", "accuracy"],
    }
    for table, names in kept.items():
        mine, theirs = (results.read_table(one, table) for one in (folder, other))
        for name in names:
            np.testing.assert_array_equal(mine[name], theirs[name])
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    mine, theirs = (results.read_summary(one) for one in (folder, other))
    assert mine.metrics == theirs.metrics
    assert mine.per_node.keys() == theirs.per_node.keys()
    for name in ("state", "error", "nodes", "steps", "epochs", "samples", "checkpoint"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert results.read_job(folder).seed == results.read_job(other).seed
    for node in mine.per_node:
        assert (folder / "nodes" / str(node) / "node.log").stat().st_size > 0


# A job without its submitter ---------------------------------------------------------------------


def test_a_detached_job_is_seen_followed_and_collected(
    detach, command, start_command, file, two, tmp_path, some, opened
):
    job_id = detach(*some)
    follower = start_command("logs", "-f", file)
    follower.wait_for(r"epoch \d+: test loss")

    seen = asyncio.run(asyncio.wait_for(at_the_gate(two), 30))
    assert [one.status.job_id for one in seen] == [job_id] * 2
    assert [one.status.node for one in seen] == [0, 1]
    shown = command("status", file, "--why")
    assert re.search(r"worker 0 +127.0.0.1:\d+ +trains +300/400 +\d\.\d{4} +[\d,]+ ", shown.out)
    assert f"job {job_id}: worker 0 leads it, for its submitter is gone" in shown.out
    assert re.search(r"Gated .*in update for .*waits at gated.py:\d+", shown.out)
    refused = command("fetch", file, job_id)
    assert refused.code == 3
    assert f"job {job_id} still runs" in refused.err

    opened.touch()
    assert follower.end() == 0
    lines = follower.out.splitlines()
    assert {line[:9] for line in lines} == {"worker 0 ", "worker 1 "}
    assert sum("left: the job is done" in line for line in lines) == 2
    assert follower.err == ""
    again = command("logs", file, job_id)
    assert sorted(again.out.splitlines()) == sorted(lines)
    times = re.findall(r"^worker \d +(\d{4}-\S+ \S+) ", again.out, re.MULTILINE)
    assert times == sorted(times)

    fetched = command("fetch", file)
    assert fetched.code == 0, fetched.err
    assert f"job {job_id}: done\n" in fetched.out
    assert f"results in runs/{job_id}" in fetched.out
    attached = command("submit", file, *some, "--output", "attached")
    assert attached.code == 0
    (other,) = (tmp_path / "attached").iterdir()
    same_run(tmp_path / "runs" / job_id, other)

    twice = command("fetch", file, job_id)
    assert twice.code == 2
    assert f"runs/{job_id} exists already; nothing is ever overwritten; --output" in twice.err
    elsewhere = command("fetch", file, job_id, "--output", "third", "--json")
    assert json.loads(elsewhere.out)["state"] == "done"
    same_run(tmp_path / "third" / job_id, other)


def test_a_job_whose_submitter_is_killed_is_collected_all_the_same(
    start_command, command, file, two, tmp_path, some, opened
):
    submitter = start_command("submit", file, *some)
    submitter.wait_for(r"step \d+/")
    submitter.signal(signal.SIGKILL)
    submitter.end()
    asyncio.run(asyncio.wait_for(at_the_gate(two), 30))
    opened.touch()
    (folder,) = (tmp_path / "runs").iterdir()
    follower = command("logs", "-f", file, folder.name, "--node", 1)
    assert follower.code == 0
    assert "left: the job is done" in follower.out
    assert {line[:9] for line in follower.out.splitlines()} == {"worker 1 "}
    fetched = command("fetch", file, folder.name)
    assert fetched.code == 0, fetched.err
    attached = command("submit", file, *some, "--output", "attached")
    assert attached.code == 0
    (other,) = (tmp_path / "attached").iterdir()
    same_run(folder, other)


def test_a_job_with_servers_and_code_is_collected_whole(
    command, shared_nodes, cluster_of, write_cluster, tmp_path
):
    file = write_cluster(cluster_of(shared_nodes[:2], shared_nodes[4:]))
    (tmp_path / "mine.py").write_text(
        "from aiosgd.codecs.parameter_server import ParameterServer\n\n\n"
        "class Mine(ParameterServer):\n    pass\n"
    )
    words = ("submit", file, "--codec", f"{tmp_path / 'mine.py'}:Mine", "--record")
    assert (done := command(*words, "--max-steps", 30)).code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert command("fetch", file, "--output", "again").code == 0
    other = tmp_path / "again" / folder.name
    same_run(other, folder)
    texts = [(one / "code" / "mine.py").read_bytes() for one in (folder, other)]
    assert texts[0] == texts[1] == (tmp_path / "mine.py").read_bytes()
    jobs = [(one / "job.toml").read_text() for one in (folder, other)]
    assert jobs[0] == jobs[1]
    for node in ("0", "1", "-1"):
        records = [(one / "nodes" / node / "record.npz").read_bytes() for one in (folder, other)]
        assert records[0] == records[1]
    mine, theirs = (results.read_summary(one).to_dict() for one in (folder, other))
    for summary in (mine, theirs):
        del summary["wall_s"]
    assert mine == theirs


# Cancelling --------------------------------------------------------------------------------------


def test_a_job_is_cancelled_behind_its_submitters_back(start_command, command, file, tmp_path):
    submitter = start_command("submit", file, *FOR_EVER)
    submitter.wait_for(r"step \d+/")
    shown = command("status", file, "--why")
    assert "its submitter leads it" in shown.out
    assert re.search(r"Plain \(group 0, step \d+\): ", shown.out)
    done = command("cancel", file)
    assert done.code == 0, done.err
    assert submitter.end() == 1
    (folder,) = (tmp_path / "runs").iterdir()
    words = "cancelled by request at worker 0"
    assert f"aiosgd: job {folder.name} was {words}; logs in " in submitter.err
    assert f"job {folder.name}: {words}\n" in done.out
    summary = results.read_summary(folder)
    assert (summary.state, summary.error) == ("cancelled", words)
    assert summary.steps > 0
    again = command("cancel", file)
    assert again.code == 2
    assert f"no job runs on {file}; the newest is {folder.name}: cancelled" in again.err


def test_a_detached_job_is_cancelled_and_what_it_left_collected(detach, command, file, tmp_path):
    job_id = detach(*FOR_EVER)
    done = command("cancel", file, job_id)
    assert done.code == 0, done.err
    assert f"job {job_id}: cancelled by request" in done.out
    one = status(command, file, job_id)
    assert one["job"]["state"] == "cancelled"
    assert [node["status"]["seat"] for node in one["nodes"]] == ["free", "free"]
    fetched = command("fetch", file, job_id)
    assert fetched.code == 0
    assert f"job {job_id}: cancelled by request" in fetched.out
    assert results.read_summary(tmp_path / "runs" / job_id).state == "cancelled"


# What was, and what is not -----------------------------------------------------------------------


def test_jobs_are_remembered_newest_first(command, file, tmp_path):
    for title in ("first", "second"):
        done = command("submit", file, "--max-steps", 5, "--title", title)
        assert done.code == 0
    second, first = sorted((path.name for path in (tmp_path / "runs").iterdir()), reverse=True)
    assert ("-first-" in first, "-second-" in second) == (True, True)
    facts = status(command, file, "--history")
    assert [job["job_id"] for job in facts["history"]][:2] == [second, first]
    assert facts["job"]["job_id"] == second
    shown = command("status", file, "--history").out
    assert f"no job runs; the newest is {second}, began " in shown
    rows = re.findall(rf"^({JOB_ID}) +done +2  ", shown, re.MULTILINE)
    assert rows[:2] == [second, first]
    older = command("status", file, first)
    took = r"\d\d:\d\d:\d\d( +\d\.\d s){3}( +[\d.]+ kB){2}"
    assert re.search(rf"worker 1 +\S+ +done +{took}\n", older.out)
    assert re.search(
        r"^prepared .*, trained for .* 640 samples, computed ", older.out, re.MULTILINE
    )
    short = command("status", file, first[-4:])
    assert (short.code, short.out) == (0, older.out)
    unclear = command("status", file, first[:8])
    assert (unclear.code, unclear.out) == (2, "")
    assert re.match(rf"aiosgd: '{first[:8]}' may be any of .*{second}", unclear.err)
    assert f"aiosgd fetch {file} {first} collects what it left" in older.out
    assert command("fetch", file, "--output", "newest").code == 0
    assert [path.name for path in (tmp_path / "newest").iterdir()] == [second]


@pytest.mark.parametrize("word", ["status", "logs", "fetch", "cancel"])
def test_an_unknown_job_is_wrong_usage(command, file, tmp_path, word):
    done = command(word, file, UNKNOWN)
    assert done.code == 2
    assert f"no node of {file} knows job {UNKNOWN}" in done.err
    done = command(word, file, "../../etc")
    assert done.code == 2
    assert "job id is '../../etc'" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["status", "logs", "fetch", "cancel"])
def test_without_any_node_there_is_exit_code_3(
    command, start_nodes, cluster_of, write_cluster, word
):
    nodes = start_nodes(2)
    file = write_cluster(cluster_of(nodes))
    for node in nodes:
        node.stop()
    done = command(word, file)
    assert done.code == 3
    (line,) = done.err.splitlines()
    assert line.startswith(f"aiosgd: no node of {file} answers: workers[0]: {nodes[0].address}")


def test_nodes_that_are_gone_are_told_and_the_rest_is_collected(
    command, start_nodes, cluster_of, write_cluster, tmp_path
):
    nodes = start_nodes(2)
    file = write_cluster(cluster_of(nodes))
    assert command("submit", file, "--max-steps", 20).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    nodes[1].stop(signal.SIGKILL)
    shown = command("status", file)
    assert shown.code == 0
    assert f"workers[1]: {nodes[1].address} cannot be reached" in shown.out
    assert re.search(rf"- +{nodes[1].address} +no answer\n", shown.out)
    done = command("fetch", file, "--output", "rest")
    assert done.code == 0
    assert f"aiosgd: worker 1: {nodes[1].address} cannot be reached" in done.err
    rest = tmp_path / "rest" / folder.name
    assert (rest / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert set(results.read_table(rest, "train").node) == {0}
    summary = results.read_summary(rest)
    assert summary.state == "done"
    assert summary.error.startswith("the copy of worker 1 is missing")


def test_without_the_model_nothing_is_written_unless_asked_for(
    command, start_nodes, cluster_of, write_cluster, tmp_path
):
    nodes = start_nodes(2)
    file = write_cluster(cluster_of(nodes))
    assert command("submit", file, "--max-steps", 20).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    nodes[0].stop(signal.SIGKILL)
    done = command("fetch", file, "--output", "rest")
    assert done.code == 3
    assert f"the model of job {folder.name} is missing, nothing was written" in done.err
    assert not (tmp_path / "rest").exists()
    done = command("fetch", file, "--output", "rest", "--partial")
    assert done.code == 0
    assert "aiosgd: the model is that of worker 1\n" in done.err
    rest = tmp_path / "rest" / folder.name
    assert set(results.read_table(rest, "train").node) == {1}
    assert (rest / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_crashed_node_that_is_back_knows_what_it_lost(
    command, start_command, start_nodes, cluster_of, write_cluster, tmp_path
):
    nodes = start_nodes(2)
    submitter = start_command("submit", write_cluster(cluster_of(nodes)), *FOR_EVER)
    submitter.wait_for(r"step \d+/")
    nodes[1].stop(signal.SIGKILL)
    assert submitter.end() == 1
    (folder,) = (tmp_path / "runs").iterdir()
    places = ("--run-dir", nodes[1].run_dir, "--data-dir", nodes[1].data_dir)
    back = start_command("node", "--port", 0, *places)
    address = back.wait_for(r"listening on (\S+)\n")[1]
    file = tmp_path / "again.toml"
    file.write_text(f"workers = ['{nodes[0].address}', '{address}']\n")
    facts = status(command, file)
    assert facts["job"]["state"] == "failed"
    assert "worker 1 lost" in facts["job"]["reason"]
    assert [one["job"]["state"] for one in facts["nodes"]] == ["failed", "lost"]
    assert command("fetch", file, "--output", "rest").code == 0
    rest = tmp_path / "rest" / folder.name
    assert "started" in (rest / "nodes/1/node.log").read_text()
    assert results.read_summary(rest).state == "failed"
    back.signal(signal.SIGTERM)
    assert back.end() == 0


# Python ------------------------------------------------------------------------------------------


def test_the_same_from_python(two, tmp_path):
    async def work():
        folder = await aio.start(two, output=str(tmp_path), epochs=1_000_000)
        seen = await aio.status(two, why=True)
        assert {one.status.job_id for one in seen} == {folder.name}
        assert all(one.status.why for one in seen)
        with pytest.raises(ClusterError, match="still runs"):
            await aio.fetch(two, folder.name, tmp_path)
        fate = await aio.cancel(two)
        assert (fate.job_id, fate.state) == (folder.name, "cancelled")
        outcome = await aio.fetch(two, output=tmp_path)
        assert outcome.folder == folder
        assert outcome.parameters
        with pytest.raises(ConfigError, match="exists already"):
            await aio.fetch(two, output=tmp_path)

    asyncio.run(asyncio.wait_for(work(), 3 * ADOPTION_TIMEOUT))
