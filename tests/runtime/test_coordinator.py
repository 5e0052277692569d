"""The submitter's side, with nodes on the same loop."""

import asyncio
import json

import numpy as np
import pytest

from aiosgd.aio import Silent
from aiosgd.errors import ClusterError, CodecError, ConfigError, JobFailedError
from aiosgd.runtime import coordinator, results
from aiosgd.runtime.config import Address, make_job
from aiosgd.runtime.connection import Link, listen
from aiosgd.runtime.coordinator import Request, choose_nodes, file_sources, run_job
from aiosgd.runtime.frame import encode
from aiosgd.runtime.hello import accept
from aiosgd.runtime.job import Phase, Seat

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


# Reaching nodes -------------------------------------------------------------------------------


async def test_a_node_that_starts_a_moment_later_is_waited_for(tmp_path, running, monkeypatch):
    refused = asyncio.Event()
    introduce = coordinator.introduce

    async def first_refused(address, *rest):
        if not refused.is_set():
            refused.set()
            raise ClusterError("not yet") from ConnectionRefusedError()
        return await introduce(address, *rest)

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
        with pytest.raises(ClusterError, match=r"worker 1: codec .* --allow-code.*; logs in "):
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
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "report",
    [
        {"report": "dance", "job_id": None},
        {"report": "vote", "job_id": None},
        {"progress": {"node": 0}},
        {"evaluation": {"loss": 1}},
    ],
)
async def test_a_node_that_reports_nonsense_fails_the_job(tmp_path, report):
    def answer(link, kind, number, content, size):
        if kind.name == "HELLO":
            accept(link)
        elif isinstance(content, dict):
            own = {"job_id": content["job_id"]} if "job_id" in report else {}
            link.send(encode({**report, **own}))

    server = await listen("127.0.0.1", 0, lambda: Link(answer, lambda *_: None))
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    with pytest.raises(JobFailedError, match=r"worker 0 lost: .*makes no sense"):
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
