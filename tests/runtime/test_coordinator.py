"""The submitter's side, with nodes on the same loop."""

import asyncio
import hashlib
import json
import tomllib

import numpy as np
import pytest

from aiosgd.aio import Silent
from aiosgd.errors import (
    ClusterError,
    CodecError,
    ConfigError,
    JobFailedError,
    LocalProtocolError,
    PluginNotFoundError,
    RemoteProtocolError,
)
from aiosgd.plugins.trackers import Csv
from aiosgd.runtime import coordinator, harvest, results
from aiosgd.runtime.config import Address, make_job
from aiosgd.runtime.connection import Link
from aiosgd.runtime.coordinator import (
    Coordinator,
    Request,
    choose_nodes,
    code_files,
    file_sources,
    load_job,
    run_job,
)
from aiosgd.runtime.endpoint import listen
from aiosgd.runtime.frame import Kind, encode
from aiosgd.runtime.hello import accept, greet, receive
from aiosgd.runtime.job import Begin, Cancel, Phase, Report, Reported, Seat
from aiosgd.runtime.mesh import Mesh
from aiosgd.runtime.results import EVAL, TRAIN, Rows
from aiosgd.runtime.security import OPEN

FIVE = [Address("node", port) for port in range(1, 6)]


def request(tmp_path, workers, servers=(), /, **options):
    options = {"output": str(tmp_path / "runs"), **options}
    return Request(
        job=make_job(options),
        workers=workers,
        servers=servers,
        data_dir=tmp_path / "data",
        connect_timeout=0.3,
    )


class Watch(Silent):
    """Calls back once a phase begins."""

    def __init__(self, phase=None, then=None):
        self.phase, self.then, self.phases = phase, then, []

    def entered(self, phase, job_id):
        self.phases.append(phase)
        if phase is self.phase:
            self.then()


# Which nodes, which sources -------------------------------------------------------------------


def test_all_workers_take_part_unless_fewer_are_asked_for(tmp_path):
    assert choose_nodes(request(tmp_path, FIVE)) == dict(enumerate(FIVE))
    assert choose_nodes(request(tmp_path, FIVE, workers=2)) == {0: FIVE[0], 1: FIVE[1]}
    with pytest.raises(ConfigError, match="workers is 6, but the cluster has 5"):
        choose_nodes(request(tmp_path, FIVE, workers=6))


def test_servers_take_part_only_where_the_codec_has_a_use_for_them(tmp_path):
    workers, servers = FIVE[:2], FIVE[2:]
    nodes = dict(enumerate(workers))
    assert choose_nodes(request(tmp_path, workers, servers, codec="plain")) == nodes
    served = {**nodes, -1: servers[0], -2: servers[1], -3: servers[2]}
    assert choose_nodes(request(tmp_path, workers, servers, codec="fedavg")) == served
    one = choose_nodes(request(tmp_path, workers, servers, codec="fedavg", servers=1))
    assert one == {**nodes, -1: servers[0]}


@pytest.mark.parametrize(
    ("given", "wanted", "reason"),
    [
        (0, None, r'codec \'fedavg\' needs a server; add servers = \["host:port"\]'),
        (2, 3, "servers is 3, but the cluster has 2"),
        (2, 0, "servers is 0, but codec 'fedavg' needs one or more"),
    ],
)
def test_too_few_servers_are_refused(tmp_path, given, wanted, reason):
    with pytest.raises(ConfigError, match=reason):
        choose_nodes(request(tmp_path, FIVE[:2], FIVE[:given], codec="fedavg", servers=wanted))


def test_each_source_file_is_read_once(tmp_path):
    (tmp_path / "mine.py").write_text("text")
    mine = f"{tmp_path}/mine.py:A"
    assert file_sources(make_job({"codec": "plain", "server_codec": "plain"})) == []
    assert file_sources(make_job({"codec": mine, "server_codec": mine})) == [(mine, b"text")]
    other = f"{tmp_path}/mine.py:B"
    both = file_sources(make_job({"codec": mine, "server_codec": other}))
    assert both == [(mine, b"text"), (other, b"text")]


def test_each_copy_of_a_source_has_a_name_of_its_own():
    job = make_job({"codec": "a/mine.py:A", "server_codec": "b/mine.py:B"})
    assert code_files(job) == {"a/mine.py:A": "mine.py", "b/mine.py:B": "1-mine.py"}
    job = make_job({"codec": "a/mine.py:A", "server_codec": "a/mine.py:B"})
    assert set(code_files(job).values()) == {"mine.py"}


def test_trackers_are_looked_up_before_any_node_is_spoken_to(tmp_path):
    with pytest.raises(PluginNotFoundError, match="no tracker is named 'nonesuch'"):
        load_job(make_job({"tracker": ("csv", "nonesuch")}), 1, tmp_path)


# What nodes say -------------------------------------------------------------------------------


def table(dtype, node, values):
    """Columns of a table of one row per value, all fields alike."""
    rows = Rows(dtype)
    for value in values:
        rows.append(node, *[value] * (len(dtype.names) - 1))
    return rows.columns()


def facts(size, node=0, **changes):
    """Return what a node of a job of three steps collects."""
    return {
        "train": table(TRAIN, node, (0, 1, 2)),
        "evaluations": table(EVAL, node, (0, 1)),
        "sketches": np.zeros((2, 64)) if node >= 0 else None,
        "log": np.frombuffer(b"log", np.uint8),
        "weights": np.arange(size, dtype=np.float32) if node == 0 else None,
        "figures": {
            "samples": 192,
            "train_s": 0.5,
            "late": 0,
            "bytes_sent": 10,
            "bytes_received": 20,
        },
        **changes,
    }


class Recorder:
    """The mesh to one node: records what is sent, and answers in this turn."""

    def __init__(self):
        self.sent, self.peers = [], []

    def send(self, to, content):
        self.sent.append(content)

    def consumed(self, node):
        pass

    def orders(self):
        return [content["order"] for content in self.sent]


@pytest.fixture
async def begun(tmp_path):
    """A coordinator of two workers that has just begun to vote; nothing of it is on a network."""
    asked = request(tmp_path, FIVE[:2])
    nodes = choose_nodes(asked)
    coordinator_ = Coordinator(asked, Silent(), nodes, *load_job(asked.job, 2, tmp_path))
    coordinator_.folder = results.create_folder(tmp_path / "runs", coordinator_.job_id)
    coordinator_._log, handler = results.open_log(coordinator_.folder / "submit.log")
    coordinator_._harvest = harvest.Harvest(
        coordinator_.folder, coordinator_.load, nodes, coordinator_._log
    )
    coordinator_._links = {node: Recorder() for node in nodes}
    coordinator_._apply(Begin(0.0))
    yield coordinator_
    handler.close()


def say(job, node, report, **content):
    job._deliver(node, {"report": report, "job_id": job.job_id, **content}, 1)


def go_to(job, phase):
    """Let both nodes report until the job is in that phase."""
    size = job.load.model.size
    while job.machine.phase is not phase:
        report = {
            Phase.VOTING: lambda node: ("vote", {"missing": [], "checkpoints": []}),
            Phase.PREPARING: lambda node: ("prepared", {}),
            Phase.LINKING: lambda node: ("linked", {}),
            Phase.RUNNING: lambda node: ("trained", {}),
            Phase.FINISHING: lambda node: ("quiet", {"sent": 1, "consumed": 1}),
            Phase.COLLECTING: lambda node: ("collected", facts(size, node)),
        }[job.machine.phase]
        for node in (0, 1):
            name, content = report(node)
            say(job, node, name, **content)


def summary_of(job):
    job._harvest.write(job.job_id, job._end())
    return results.read_summary(job.folder)


def log_of(job):
    return (job.folder / "submit.log").read_text()


async def test_what_was_collected_outlives_an_abort(begun):
    go_to(begun, Phase.COLLECTING)
    size = begun.load.model.size
    say(begun, 0, "collected", **facts(size))
    begun._lost(1, RemoteProtocolError("gone"))
    say(begun, 0, "aborted", log=np.frombuffer(b"longer", np.uint8))
    assert begun.machine.phase is Phase.FAILED
    summary = summary_of(begun)
    assert (summary.state, summary.steps, summary.samples) == ("failed", 3, 192)
    assert (begun.folder / "nodes/0/node.log").read_text() == "longer"
    assert (begun.folder / "model.safetensors").exists()


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_what_an_aborted_job_had_is_kept(begun, state):
    go_to(begun, Phase.RUNNING)
    if state == "failed":
        say(begun, 1, "failed", reason="no memory")
    else:
        begun._ending = "cancelled"
        begun._apply(Cancel(0.0))
    size = begun.load.model.size
    say(begun, 0, "aborted", **facts(size))
    say(begun, 1, "aborted", log=np.frombuffer(b"short", np.uint8))
    outcome = begun._harvest.write(begun.job_id, begun._end())
    summary = results.read_summary(begun.folder)
    assert (summary.state, summary.steps, summary.samples) == (state, 3, 192)
    assert (summary.bytes_sent, summary.bytes_received) == (10, 20)
    assert summary.per_node.keys() == {0}
    assert summary.metrics == {"loss": 1.0, "accuracy": 1.0}
    assert len(results.read_table(begun.folder, "train")) == 3
    assert len(results.read_table(begun.folder, "eval")) == 2
    kept = results.read_parameters(begun.folder)
    assert sum(map(np.size, kept.values())) == size
    assert outcome.parameters.keys() == kept.keys()
    assert (begun.folder / "nodes/1/node.log").read_text() == "short"


@pytest.mark.parametrize(
    "wrong",
    [
        {"log": b"log"},
        {"log": None},
        {"log": np.zeros(3)},
        {"weights": None},
        {"weights": [0.0]},
        {"weights": np.zeros(7, np.float32)},
        {"weights": np.zeros(4810)},
        {"weights": np.zeros((4810, 1), np.float32)},
        {"train": {}},
        {"train": 7},
        {"train": None},
        {"train": table(TRAIN, 1, (0,))},
        {"evaluations": table(EVAL, -1, (0,))},
        {"sketches": None},
        {"sketches": np.zeros((2, 63))},
        {"sketches": np.zeros((2, 64), np.float32)},
        {"figures": None},
        {"figures": 7},
        {"figures": {}},
        *(
            {"figures": facts(0)["figures"] | change}
            for change in (
                {"samples": 1.5},
                {"samples": -1},
                {"train_s": "1"},
                {"train_s": float("nan")},
                {"late": None},
                {"more": 1},
                {7: 1},
            )
        ),
    ],
    ids=repr,
)
async def test_a_wrong_collection_fails_the_job_and_names_the_node(begun, wrong):
    go_to(begun, Phase.COLLECTING)
    size = begun.load.model.size
    assert size == 4810
    say(begun, 1, "collected", **facts(size, 1))
    say(begun, 0, "collected", **facts(size, **wrong))
    assert begun.machine.phase is Phase.STOPPING
    (key,) = wrong
    assert begun.machine.error.startswith("worker 0: it sent a report that makes no sense: ")
    assert key in begun.machine.error or "node" in begun.machine.error
    say(begun, 0, "aborted", log=7)
    say(begun, 1, "aborted", log=np.zeros(0, np.uint8))
    assert begun.machine.phase is Phase.FAILED
    assert summary_of(begun).state == "failed"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"report": "dance"}, "dance"),
        ({"report": "vote"}, "missing is missing"),
        ({"report": "vote", "missing": [1]}, r"missing\[0\] is 1"),
        ({"report": "quiet", "sent": 1}, "consumed is missing"),
        ({"report": "prepared", "reason": 7}, "reason is 7"),
        ({"report": 7}, "no report of this job"),
        ({"report": "vote", "job_id": "another", "missing": []}, "no report of this job"),
        ({}, "no report of this job"),
        ({"progress": {"node": 0}}, r"progress\.step"),
        ({"evaluation": {"node": 1, "epoch": 0, "step": 0, "loss": 1, "accuracy": 1}}, "is 1"),
    ],
)
async def test_a_report_that_makes_no_sense_fails_the_job_and_frees_the_nodes(
    begun, content, reason
):
    begun._deliver(0, {"job_id": begun.job_id, **content}, 1)
    assert begun.machine.phase is Phase.STOPPING
    with pytest.raises(AssertionError, match=rf"worker 0: it sent .* no sense: .*{reason}"):
        raise AssertionError(begun.machine.error)
    assert [link.orders()[-1] for link in begun._links.values()] == ["abort", "abort"]
    assert reason.replace("\\", "") in log_of(begun)


# What goes wrong on this side -------------------------------------------------------------------


async def test_an_order_that_cannot_be_sent_is_this_sides_fault(tmp_path, running, monkeypatch):
    send = Mesh.send

    def refuse(self, to, content):
        if isinstance(content, dict) and content.get("order") == "prepare":
            raise LocalProtocolError("metadata is too long")
        return send(self, to, content)

    monkeypatch.setattr(Mesh, "send", refuse)
    async with running() as (node, address):
        with pytest.raises(JobFailedError, match="failed: metadata is too long; logs") as caught:
            await run_job(request(tmp_path, [address]), Silent())
        assert node.member.seat is Seat.FREE
    assert isinstance(caught.value.__cause__, LocalProtocolError)
    (folder,) = (tmp_path / "runs").iterdir()
    assert results.read_summary(folder).error == "metadata is too long"
    assert (folder / "nodes/0/node.log").exists()


@pytest.mark.parametrize("method", ["entered", "evaluated"])
async def test_an_observer_that_breaks_is_not_blamed_on_a_node(tmp_path, running, method):
    class Broken(Silent):
        pass

    def broken(self, *_):
        raise ZeroDivisionError("by zero")

    setattr(Broken, method, broken)
    async with running() as (node, address):
        with pytest.raises(JobFailedError, match="failed: ZeroDivisionError: by zero; logs"):
            await run_job(request(tmp_path, [address], max_steps=1), Broken())
        assert node.member.seat is Seat.FREE


# What cannot be written -----------------------------------------------------------------------


async def test_what_cannot_be_written_fails_the_job_but_nothing_else(
    tmp_path, running, monkeypatch
):
    write = Csv.write

    def fail(self, table, rows):
        if table == "eval" and self.folder.parent.name == "runs":
            raise RuntimeError("disk of another world")
        write(self, table, rows)

    async with running() as (_, address):
        monkeypatch.setattr(Csv, "write", fail)
        asked = request(tmp_path, [address], max_steps=2)
        with pytest.raises(JobFailedError, match=r"eval.csv could not .* another world"):
            await run_job(asked, Silent())
    (folder,) = (tmp_path / "runs").iterdir()
    summary = results.read_summary(folder)
    assert (summary.state, summary.steps) == ("failed", 2)
    assert "disk of another world" in summary.error
    assert "train.csv" not in summary.error
    assert "disk of another world" in (folder / "submit.log").read_text()
    assert len(results.read_table(folder, "train")) == 2
    assert (folder / "model.safetensors").exists()
    assert (folder / "nodes/0/node.log").exists()


@pytest.mark.parametrize("writer", ["write_model", "write_node_log", "write_summary"])
@pytest.mark.parametrize("error", [ConfigError("full"), OSError("full"), SystemExit("full")])
async def test_each_writer_may_fail(begun, monkeypatch, writer, error):
    def fail(*_):
        raise error

    go_to(begun, Phase.DONE)
    monkeypatch.setattr(results, writer, fail)
    outcome = begun._harvest.write(begun.job_id, begun._end())
    with pytest.raises(JobFailedError, match=r"could not be written: .*full"):
        begun._judge(outcome)
    if writer != "write_summary":
        assert results.read_summary(begun.folder).state == "failed"


# The log --------------------------------------------------------------------------------------


async def test_the_log_names_phase_and_node_and_each_quiet_node_once(begun):
    go_to(begun, Phase.DONE)
    lines = [line.split(" ", 3)[3] for line in log_of(begun).splitlines()]
    assert "voting: worker 1 vote" in lines
    assert "running: worker 0 trained" in lines
    assert lines.count("finishing: worker 0 quiet") == 1
    assert begun._links[0].orders().count("finish") == 2
    assert not [line for line in log_of(begun).splitlines() if line != line.rstrip()]


async def test_the_log_says_why(begun):
    say(begun, 0, "refused", reason="busy")
    assert "voting: worker 0 refused: busy" in log_of(begun)


# Whole jobs -----------------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_a_job_goes_through_its_phases_and_frees_the_nodes(tmp_path, running):
    watch = Watch()
    async with running() as (one, first), running() as (other, second):
        for _ in range(2):
            outcome = await run_job(request(tmp_path, [first, second], max_steps=3), watch)
            assert (one.member.seat, other.member.seat) == (Seat.FREE, Seat.FREE)
    order = ["voting", "preparing", "linking", "running", "finishing", "collecting", "done"]
    assert watch.phases == order * 2
    assert outcome.summary.steps == 3
    assert outcome.metrics.keys() == {"loss", "accuracy"}
    assert sum(value.size for value in outcome.parameters.values()) == 4810


async def test_a_server_takes_part(tmp_path, running):
    async with running() as (_, worker), running() as (_, server):
        asked = request(tmp_path, [worker], [server], codec="parameter_server", max_steps=3)
        outcome = await run_job(asked, Silent())
    assert outcome.summary.per_node.keys() == {0, -1}
    assert (outcome.folder / "nodes/-1/node.log").exists()
    assert set(outcome.train.node) == {0}


async def test_the_target_ends_training_on_all_workers_after_the_same_epoch(tmp_path, running):
    options = {"epochs": 50, "learning_rate": 0.2, "target_accuracy": 0.6}
    async with running() as (_, first), running() as (_, second):
        outcome = await run_job(request(tmp_path, [first, second], **options), Silent())
    own = [outcome.eval[outcome.eval.node == node] for node in (0, 1)]
    assert len(own[0]) == len(own[1]) == outcome.summary.epochs < 50
    assert own[0].accuracy[-1] >= 0.6


async def test_two_jobs_of_one_second_never_share_a_folder(tmp_path, running, monkeypatch):
    tokens = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(coordinator.secrets, "token_hex", lambda n: next(tokens, "c" * 2 * n))
    monkeypatch.setattr(coordinator.results, "new_job_id", lambda _, name, token: job_id(token))
    async with running() as (_, address):
        first = await run_job(request(tmp_path, [address], max_steps=1), Silent())
        second = await run_job(request(tmp_path, [address], max_steps=1), Silent())
    assert first.folder.name == job_id("aaaa")
    assert second.folder.name == second.summary.job_id != first.folder.name


def job_id(token):
    return f"20250102-030405-test-{token[:4]}"


# Reaching nodes -------------------------------------------------------------------------------


async def test_a_node_that_starts_a_moment_later_is_waited_for(tmp_path, running, monkeypatch):
    refused = asyncio.Event()
    introduce = coordinator.introduce

    async def first_refused(address, *rest, **more):
        if not refused.is_set():
            refused.set()
            raise ClusterError("not yet") from ConnectionRefusedError()
        return await introduce(address, *rest, **more)

    monkeypatch.setattr(coordinator, "introduce", first_refused)
    async with running() as (_, address):
        outcome = await run_job(request(tmp_path, [address], max_steps=1), Silent())
    assert outcome.summary.state == "done"
    assert refused.is_set()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (Address("127.0.0.1", 1), "worker 0: 127.0.0.1:1 cannot be reached: Connection refused"),
        (Address("no-such-host.invalid", 1), "worker 0: no-such-host.invalid:1 cannot be reached"),
    ],
)
async def test_a_node_that_is_not_there_is_named_and_the_run_says_failed(tmp_path, address, reason):
    with pytest.raises(ClusterError, match=reason):
        await run_job(request(tmp_path, [address]), Silent())
    (folder,) = (tmp_path / "runs").iterdir()
    summary = results.read_summary(folder)
    assert summary.state == "failed"
    assert str(address) in summary.error
    assert str(address) in (folder / "submit.log").read_text()


async def test_one_refusal_frees_the_nodes_that_agreed(tmp_path, running):
    (tmp_path / "mine.py").write_text(
        "from aiosgd import Codec\nclass Mine(Codec):\n    async def update(self, block):\n"
        "        self.set_result(block.value)\n"
    )
    codec = f"{tmp_path}/mine.py:Mine"
    async with running(allow_code=True) as (willing, first), running() as (_, second):
        with pytest.raises(ClusterError, match=r"worker 1: .*own code.* --allow-code.*; logs in "):
            await run_job(request(tmp_path, [first, second], codec=codec), Silent())
        assert willing.member.seat is Seat.FREE
        outcome = await run_job(request(tmp_path, [first], codec=codec, max_steps=1), Silent())
    assert outcome.summary.state == "done"


# Failing --------------------------------------------------------------------------------------


async def test_a_failed_job_leaves_logs_of_all_nodes(tmp_path, running):
    (tmp_path / "bad.py").write_text(
        "from aiosgd import Codec\nclass Bad(Codec):\n    async def update(self, block):\n"
        "        return 7\n"
    )
    async with running(allow_code=True) as (_, first), running(allow_code=True) as (_, second):
        asked = request(tmp_path, [first, second], codec=f"{tmp_path}/bad.py:Bad")
        with pytest.raises(JobFailedError, match="codec Bad: update failed on node") as caught:
            await run_job(asked, Silent())
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(folder) in str(caught.value)
    assert not isinstance(caught.value, CodecError)
    assert sorted(path.name for path in (folder / "nodes").iterdir()) == ["0", "1"]
    assert json.loads((folder / "summary.json").read_text())["state"] == "failed"
    assert results.read_parameters(folder)  # the newest weights: here the initial ones


async def test_a_node_that_reports_nonsense_fails_the_job(tmp_path):
    answerer = greet(OPEN)

    def answer(link, kind, number, content, size):
        if kind is Kind.HELLO:
            if receive(link, answerer, kind, content):
                accept(link)
        elif isinstance(content, dict):
            report = {"can_commit": "dance", "abort": "aborted"}[content["order"]]
            link.send(encode({"report": report, "job_id": content["job_id"]}))

    server = await listen("127.0.0.1", 0, lambda: Link(answer, lambda *_: None))
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    with pytest.raises(JobFailedError, match=r"worker 0: it sent .*makes no sense: .*dance"):
        await run_job(request(tmp_path, [address]), Silent())
    server.close()


# Cancelling -----------------------------------------------------------------------------------


@pytest.mark.both_loops
@pytest.mark.parametrize("phase", [Phase.VOTING, Phase.PREPARING, Phase.RUNNING])
async def test_cancelling_cancels_the_job_and_goes_on(tmp_path, running, phase):
    watch = Watch(phase)
    async with running() as (node, address):
        job = asyncio.create_task(run_job(request(tmp_path, [address], epochs=10**6), watch))
        watch.then = job.cancel
        with pytest.raises(asyncio.CancelledError, match="was cancelled; logs in"):
            await job
        assert job.cancelled()
        assert node.member.seat is Seat.FREE
    (folder,) = (tmp_path / "runs").iterdir()
    assert results.read_summary(folder).state == "cancelled"
    assert (folder / "nodes/0/node.log").exists()


async def test_cancelling_before_any_node_was_reached(tmp_path):
    silent = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    address = Address("127.0.0.1", silent.sockets[0].getsockname()[1])
    job = asyncio.create_task(run_job(request(tmp_path, [address]), Silent()))
    while not (tmp_path / "runs").exists():
        await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    (folder,) = (tmp_path / "runs").iterdir()
    assert results.read_summary(folder).state == "cancelled"
    silent.close()


async def test_a_second_cancellation_leaves_a_cancelled_job(begun, monkeypatch):
    async def connect():
        begun._apply(Begin(0.0))

    monkeypatch.setattr(begun, "_connect", connect)
    job = asyncio.create_task(begun._drive())
    await asyncio.sleep(0)
    for _ in range(2):
        job.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await job
    assert begun.machine.phase is Phase.STOPPING
    assert summary_of(begun).state == "cancelled"


async def test_a_job_that_failed_before_it_was_cancelled_has_failed(begun, monkeypatch):
    async def connect():
        begun._apply(Reported(0, Report.FAILED, 0.0, "no memory"))

    monkeypatch.setattr(begun, "_connect", connect)
    job = asyncio.create_task(begun._drive())
    await asyncio.sleep(0)
    for _ in range(2):
        job.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await job
    summary = summary_of(begun)
    assert (summary.state, summary.error) == ("failed", "worker 0: no memory")


async def test_a_cancellation_waits_until_all_is_written(begun):
    writing = asyncio.create_task(begun._written())
    await asyncio.sleep(0)
    for _ in range(3):
        writing.cancel()
        await asyncio.sleep(0)
    outcome = await writing
    assert results.read_summary(begun.folder).job_id == begun.job_id
    with pytest.raises(asyncio.CancelledError, match="was cancelled"):
        begun._judge(outcome)


async def test_a_timeout_around_a_job_is_a_timeout(tmp_path, running):
    async with running() as (node, address):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await run_job(request(tmp_path, [address], epochs=10**6), Silent())
        assert node.member.seat is Seat.FREE


async def test_what_an_observer_is_told(tmp_path, running):
    class Diary(Silent):
        def __init__(self):
            self.evaluations = []

        def evaluated(self, evaluation):
            self.evaluations.append(evaluation)

    diary = Diary()
    async with running() as (_, address):
        outcome = await run_job(request(tmp_path, [address], epochs=3), diary)
    assert [(e.node, e.epoch) for e in diary.evaluations] == [(0, 0), (0, 1), (0, 2)]
    told = [evaluation.accuracy for evaluation in diary.evaluations]
    assert np.array_equal(told, outcome.eval.accuracy)


# job.toml -------------------------------------------------------------------------------------

SOURCE = (
    "from aiosgd import Codec\nclass Mine(Codec):\n    async def update(self, block):\n"
    "        self.set_result(block.value)\n"
)


async def test_the_code_that_was_sent_is_kept_with_its_sha256(tmp_path, running, monkeypatch):
    source = tmp_path / "mine.py"
    source.write_text(SOURCE)
    codec = f"{source}:Mine"
    watch = Watch(Phase.VOTING, lambda: source.write_text("raise SystemExit"))
    async with running(allow_code=True) as (node, address):
        outcome = await run_job(request(tmp_path, [address], codec=codec, max_steps=1), watch)
        (sent,) = node.settings.run_dir.rglob("codec_0.py")
    assert sent.read_text() == SOURCE
    assert (outcome.folder / "code/mine.py").read_text() == SOURCE
    run = tomllib.loads((outcome.folder / "job.toml").read_text())["run"]
    assert run["code"] == {codec: hashlib.sha256(SOURCE.encode()).hexdigest()}


async def test_job_toml_says_how_many_nodes_there_were(tmp_path, running):
    async with running() as (_, first), running() as (_, second):
        outcome = await run_job(request(tmp_path, [first, second], max_steps=1), Silent())
    job = results.read_job(outcome.folder)
    assert (job.workers, job.servers) == (2, None)
    assert not (outcome.folder / "code").exists()
    assert "code" not in tomllib.loads((outcome.folder / "job.toml").read_text())["run"]
