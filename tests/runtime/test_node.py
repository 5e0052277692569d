"""A node, spoken to order by order over a real link."""

import asyncio
import contextlib
import hashlib
import json
import socket
import threading

import numpy as np
import pytest
import threadpoolctl

from aiosgd import __version__
from aiosgd.errors import ClusterError, ConfigError
from aiosgd.runtime import config, node, workload
from aiosgd.runtime.endpoint import listen
from aiosgd.runtime.frame import WIRE_VERSION, Kind, encode
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.job import Seat
from aiosgd.runtime.node import Node
from aiosgd.runtime.part import Settings
from aiosgd.runtime.security import OPEN, Security, load_tls
from tests.runtime.certificates import Authority

pytestmark = pytest.mark.both_loops

JOB = "20250102-030405-test-0123"
OTHER_JOB = "20250102-030405-other-4567"


class Submitter:
    """The other end: sends orders and takes reports."""

    def __init__(self, address):
        self.address = address
        self.reports = asyncio.Queue()
        self.closed = asyncio.Event()

    async def __aenter__(self):
        self.link = await introduce(self.address, greeting(role="submitter"))
        self.link.on_frame = self._frame
        self.link.on_closed = lambda *_: self.closed.set()
        return self

    async def __aexit__(self, *_):
        self.link.close()

    def _frame(self, link, kind, number, content, size):
        if kind is Kind.MESSAGE:
            self.reports.put_nowait(content)

    def send(self, content):
        self.link.send(encode(content))

    async def order(self, order, job_id=JOB, **facts):
        """Give an order and return what is reported next."""
        self.send({"order": order, "job_id": job_id, **facts})
        return await self.report()

    async def report(self):
        while True:
            content = await self.reports.get()
            print({k: v for k, v in content.items() if k != "log"})
            if "report" in content:
                return content


QUESTION = {"node": 0, "sources": [], "plugins": [], "files": []}


def assignment(address, **options):
    """Return the content of an order to prepare: a job on one worker."""
    job = config.make_job({"workers": 1, "max_steps": 3, **options})
    return {
        "job": config.to_dict(job),
        "node": 0,
        "addresses": [[0, str(address)]],
        "nodes_on_host": 1,
        "token": "secret",
        "sources": [],
        "files": [],
        "initial": workload.load(job, 1, "unused").initial(),
    }


async def test_a_job_from_vote_to_release_and_then_another(running, tmp_path):
    async with running() as (own, address), Submitter(address) as submitter:
        for job_id in (JOB, OTHER_JOB):
            vote = await submitter.order("can_commit", job_id, **QUESTION)
            assert (vote["report"], vote["missing"]) == ("vote", [])
            for order, report in (
                ("prepare", "prepared"),
                ("link", "linked"),
                ("start", "trained"),
                ("finish", "quiet"),
            ):
                facts = assignment(address) if order == "prepare" else {}
                assert (await submitter.order(order, job_id, **facts))["report"] == report
            collected = await submitter.order("collect", job_id, weights=True)
            assert collected["report"] == "collected"
            assert len(collected["train"]["step"]) == 3
            assert collected["weights"].dtype == np.float32
            assert b"prepared as worker 0" in bytes(collected["log"])
            submitter.send({"order": "release", "job_id": job_id})
        await submitter.order("can_commit", JOB[:-4] + "9999", **QUESTION)
        assert own.member.seat is Seat.PROMISED
    folder = tmp_path / "node-0/runs" / JOB / "nodes/0"
    kept = {"job.toml", "node.log", "train.csv", "eval.csv", "sketches.npy", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*kept, "end.json"}


async def test_a_node_that_is_taken_says_by_whom_and_keeps_its_job(running):
    async with (
        running() as (own, address),
        Submitter(address) as first,
        Submitter(address) as second,
    ):
        await first.order("can_commit", **QUESTION)
        refused = await second.order("can_commit", OTHER_JOB, **QUESTION)
        assert refused["report"] == "refused"
        assert f"busy with job {JOB} since " in refused["reason"]
        assert (await second.order("abort", OTHER_JOB))["report"] == "aborted"
        assert (await second.order("abort", JOB))["report"] == "aborted"
        second.send({"order": "release", "job_id": JOB})
        stranger = await second.order("prepare", JOB, **assignment(address))
        assert f"busy with job {JOB} of another link" in stranger["reason"]
        second.link.close()
        await second.closed.wait()
        assert (await first.order("prepare", **assignment(address)))["report"] == "prepared"
        assert own.member.job_id == JOB


@pytest.mark.parametrize("order", ["prepare", "link", "start", "finish", "collect"])
async def test_orders_out_of_turn_are_refused(running, order):
    async with running() as (own, address), Submitter(address) as submitter:
        assert f"{order} is out of turn" in (await submitter.order(order))["reason"]
        await submitter.order("can_commit", **QUESTION)
        if order != "prepare":
            assert "out of turn" in (await submitter.order(order))["reason"]
        assert (await submitter.order("dance"))["reason"] == "unknown order 'dance'"
        assert own.member.seat is Seat.PROMISED


@pytest.mark.parametrize("content", ["hello", 7, None, {"order": 1}, {"order": "link"}, []])
async def test_what_is_no_order_ends_the_link_and_the_job(running, content):
    async with running() as (own, address):
        async with Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            submitter.send(content)
            await submitter.closed.wait()
        await free(own, address)


async def free(own, address):
    """Wait until a node takes another job."""
    async with Submitter(address) as submitter:
        while (await submitter.order("can_commit", OTHER_JOB, **QUESTION))["report"] != "vote":
            pass
        assert own.member.job_id == OTHER_JOB


@pytest.mark.parametrize("orders", [0, 1, 2])
async def test_a_node_whose_submitter_leaves_before_the_start_is_free(running, orders):
    async with running() as (own, address):
        async with Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            for order in ("prepare", "link")[:orders]:
                await submitter.order(order, **assignment(address))
        await free(own, address)
        assert own.part is None


async def test_a_node_whose_submitter_leaves_while_it_trains_takes_the_job_to_its_end(
    running, tmp_path
):
    async with running() as (own, address):
        async with Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            for order in ("prepare", "link"):
                await submitter.order(order, **assignment(address, max_steps=50, epochs=50))
            submitter.send({"order": "start", "job_id": JOB})
            while own.member.seat is not Seat.RUNNING:
                await asyncio.sleep(0)
        folder = tmp_path / "node-0/runs" / JOB / "nodes/0"
        while not (folder / "end.json").exists():
            await asyncio.sleep(0.01)
    end = json.loads((folder / "end.json").read_text())
    assert (end["state"], end["reason"]) == ("done", "the job is done")
    assert len((folder / "train.csv").read_text().splitlines()) == 51
    assert "done" in (folder / "lead.log").read_text()


async def test_nothing_of_a_job_lives_on_after_its_submitter_left(running):
    before = asyncio.all_tasks()
    async with running() as (own, address):
        idle = asyncio.all_tasks()
        async with Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            facts = assignment(address)
            facts["addresses"].append([1, "127.0.0.1:9"])  # it will wait for worker 1 for ever
            await submitter.order("prepare", **facts)
            submitter.send({"order": "link", "job_id": JOB})
        await free(own, address)
        while len(asyncio.all_tasks()) > len(idle):
            await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_submitter_that_falls_silent_loses_the_node(running):
    async with running() as (own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        (control,) = own._controls
        now = asyncio.get_running_loop().time()
        for second in range(6):  # heartbeats that hear nothing
            assert own.member.seat is Seat.PROMISED
            control.mesh.beat(now + second)
        await submitter.closed.wait()
        await free(own, address)


async def test_code_that_was_not_announced_is_refused(running, tmp_path):
    trap = tmp_path / "trap"
    source = f"open({str(trap)!r}, 'w')".encode()
    here = tmp_path / "mine.py"
    here.write_bytes(source)
    for name, brought in (("x.py:C", True), (f"{here}:C", False), (f"{here}:C", True)):
        async with running() as (_own, address), Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            order = assignment(address)
            order["job"]["codec"] = name
            order["sources"] = [[name, np.frombuffer(source, np.uint8)]] if brought else []
            failed = await submitter.order("prepare", **order)
            assert failed["report"] == "failed"
            assert "which this node does not take; start it with --allow-code" in failed["reason"]
            assert not trap.exists()


async def test_a_job_may_bring_just_the_files_that_it_names(running, tmp_path):
    here = tmp_path / "mine.py"
    here.write_text("raise RuntimeError")
    async with running(allow_code=True) as (_own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        order = assignment(address)
        order["job"]["codec"] = f"{here}:C"  # a path on the node, not a file that was sent
        failed = await submitter.order("prepare", **order)
        assert failed["report"] == "failed"
        assert "but brings []" in failed["reason"]


async def test_a_job_is_not_taken_from_who_leads_it(running):
    async with running() as (_own, address), Submitter(address) as first:
        await first.order("can_commit", **QUESTION)
        async with Submitter(address) as second:
            refused = await second.order("can_commit", JOB, **{**QUESTION, "files": [["x"]]})
            assert f"busy with job {JOB} of another link" in refused["reason"]
        assert (await first.order("prepare", **assignment(address)))["report"] == "prepared"


@pytest.mark.parametrize(
    "content",
    [
        {"order": "file"},
        {"order": "file", "sha256": "0" * 64, "data": [1, 2]},
        {"order": "file", "sha256": 7, "data": 10**13},
        {"order": "verdict", "epoch": "x"},
        {"order": "can_commit", "node": 0},
        {"order": "prepare"},
        {"order": "prepare", "job": 3, "node": {}, "addresses": 1, "token": None, "sources": 5},
    ],
    ids=str,
)
async def test_a_malformed_order_harms_only_its_sender(running, content):
    async with running() as (own, address):
        async with Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            submitter.send({"job_id": JOB, **content})
            submitter.send({"order": "release", "job_id": JOB})
        await free(own, address)


async def test_a_job_id_that_is_none_ends_the_link(running):
    async with running() as (own, address):
        for job_id in ("../up", "\0" * 30_000):
            async with Submitter(address) as submitter:
                submitter.send({"order": "can_commit", "job_id": job_id, **QUESTION})
                await submitter.closed.wait()
        await free(own, address)


async def test_an_order_before_the_end_of_the_last_is_refused(running):
    async with running() as (_own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        submitter.send({"order": "prepare", "job_id": JOB, **assignment(address)})
        refused = await submitter.order("link")
        assert refused["reason"] == "link came before the last order's end"
        assert (await submitter.report())["report"] == "prepared"


async def test_a_stranger_may_not_send_much(running):
    async with running() as (own, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(encode(np.zeros(1000), Kind.HELLO).buffers[0])
        assert await reader.read() == b""
        writer.close()
        await free(own, address)


async def test_submitters_without_a_job_are_limited(running, monkeypatch):
    monkeypatch.setattr(node, "PENDING_LIMIT", 3)
    async with running() as (own, address):
        idle = [await Submitter(address).__aenter__() for _ in range(3)]
        await free(own, address)
        for submitter in idle:
            await submitter.closed.wait()


async def test_a_node_that_is_stopped_tells_its_submitter(running):
    async with running() as (_, address):
        submitter = await Submitter(address).__aenter__()
        await submitter.order("can_commit", **QUESTION)
        await submitter.order("prepare", **assignment(address))
    failed = await submitter.report()
    assert (failed["report"], failed["reason"]) == ("failed", "the node was stopped")
    await submitter.closed.wait()


# Votes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"sources": ["my.py:My"]}, "my.py:My is the job's own code"),
        ({"plugins": [["codec", "plain", "aiosgd", "0.0"]]}, "from aiosgd 0.0 at the submitter"),
        ({"plugins": [["codec", "plian", "x", "1"]]}, "no codec is named 'plian'"),
        ({"plugins": [["soup", "plain", "x", "1"]]}, "KeyError: 'soup'"),
        ({"files": [["x", "../../etc/passwd", 1]]}, "is no sha256"),
        ({"node": "0/../../x"}, "ValueError"),
    ],
)
async def test_a_node_that_cannot_take_a_job_says_why_and_stays_free(
    running, tmp_path, facts, reason
):
    async with running() as (own, address), Submitter(address) as submitter:
        refused = await submitter.order("can_commit", **{"job_id": JOB, **QUESTION, **facts})
        assert refused["report"] == "refused"
        assert reason in refused["reason"]
        assert own.member.seat is Seat.FREE
        assert not (tmp_path / "node-0").exists()


async def test_a_job_id_is_never_used_twice(running):
    async with running() as (_, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        await submitter.order("prepare", **assignment(address))
        await submitter.order("abort")
        refused = await submitter.order("can_commit", **QUESTION)
        assert "was here before" in refused["reason"]


async def test_a_job_that_cannot_be_prepared_fails_with_the_reason(running):
    async with running() as (own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        facts = assignment(address)
        facts["job"]["codec"] = "nobodys"
        failed = await submitter.order("prepare", **facts)
        assert failed["report"] == "failed"
        assert "no codec is named 'nobodys'" in failed["reason"]
        aborted = await submitter.order("abort")
        assert aborted["report"] == "aborted"
        assert own.member.seat is Seat.FREE


async def test_a_peer_that_cannot_be_reached_is_named(running):
    async with running() as (_, address), Submitter(address) as submitter:
        gone = await listen("127.0.0.1", 0, asyncio.Protocol)
        port = gone.sockets[0].getsockname()[1]
        gone.close()
        await submitter.order("can_commit", **{**QUESTION, "node": 1})
        facts = assignment(address, workers=2)
        facts |= {"node": 1, "addresses": [[0, f"127.0.0.1:{port}"], [1, str(address)]]}
        await submitter.order("prepare", **facts)
        failed = await submitter.order("link")
        assert failed["report"] == "failed"
        assert f"link to worker 0: 127.0.0.1:{port} cannot be reached" in failed["reason"]


# Data files -----------------------------------------------------------------------------------


async def test_a_file_is_kept_by_its_content_and_only_from_who_leads(running, tmp_path):
    data = np.arange(100, dtype=np.uint8)
    sha256, other = (hashlib.sha256(content).hexdigest() for content in (data, data[::-1].copy()))
    question = {**QUESTION, "files": [["x.npz", sha256, 100]]}
    folder = tmp_path / "node-0/data/sha256"
    async with (
        running() as (_, address),
        Submitter(address) as submitter,
        Submitter(address) as stranger,
    ):
        assert (await submitter.order("can_commit", **question))["missing"] == [sha256]
        stranger.send({"order": "file", "job_id": JOB, "sha256": other, "data": data[::-1].copy()})
        await stranger.order("dance")
        submitter.send({"order": "file", "job_id": JOB, "sha256": sha256, "data": data})
        await submitter.order("prepare", **assignment(address))
        assert (folder / sha256).read_bytes() == data.tobytes()
        await submitter.order("abort")
        again = await submitter.order("can_commit", OTHER_JOB, **question)
        assert again["missing"] == []
    assert [path.name for path in folder.iterdir()] == [sha256]


async def test_a_job_is_prepared_once_its_files_are_kept(running, monkeypatch):
    may_store = threading.Event()
    monkeypatch.setattr(node, "store_file", lambda *_: may_store.wait(10))
    async with running() as (own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        data = np.zeros(1, np.uint8)
        submitter.send({"order": "file", "job_id": JOB, "sha256": "0" * 64, "data": data})
        submitter.send({"order": "prepare", "job_id": JOB, **assignment(address)})
        assert (await submitter.order("dance"))["report"] == "refused"
        assert own.part is None
        may_store.set()
        assert (await submitter.report())["report"] == "prepared"


async def test_blas_threads_are_the_jobs_and_then_the_nodes_own_again(running):
    def threads():
        return [
            pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        ]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        async with running() as (_, address), Submitter(address) as submitter:
            await submitter.order("can_commit", **QUESTION)
            await submitter.order("prepare", **assignment(address, compute={"threads": 1}))
            assert set(threads()) == {1}
            await submitter.order("abort")
            assert set(threads()) == {2}


async def test_a_file_that_is_not_what_it_was_announced_as_is_refused(running, tmp_path):
    data, sha256 = np.arange(100, dtype=np.uint8), "0" * 64
    async with running() as (_, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **{**QUESTION, "files": [["x.npz", sha256, 100]]})
        refused = await submitter.order("file", sha256=sha256, data=data)
        assert refused["report"] == "refused"
        assert "sha256" in refused["reason"]
    assert not list((tmp_path / "node-0/data").rglob("0" * 64))


FIRST = b"".join(encode(greeting(nonce=b"n" * 32), Kind.HELLO).buffers)


# Links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({}, "it is no node of this node's job"),
        (
            {"role": "peer", "job_id": JOB, "node": 0, "token": "secret"},
            "no node of this node's job",
        ),
        ({"role": "submitter", "wire": 99}, "the caller speaks wire version 99"),
    ],
)
async def test_a_caller_that_has_no_business_here_is_told_so(running, hello, reason):
    async with running() as (own, address):
        with pytest.raises(ClusterError, match=f"{address}: no link: .*{reason}"):
            await introduce(address, hello)
        while own._pending:  # until the link is gone
            await asyncio.sleep(0)


async def test_a_caller_of_another_wire_version_hears_of_both(running, caplog):
    words = f"wire version 99 (aiosgd 9.9), the node {WIRE_VERSION} (aiosgd {__version__})"
    async with running() as (_, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        hello = encode({"wire": 99, "version": "9.9", "nonce": bytes(32)}, Kind.HELLO)
        writer.write(b"".join(hello.buffers))
        assert f"the caller speaks {words}".encode() in await reader.read()
        writer.close()
    assert words in caplog.text


async def test_submitters_and_peers_need_the_nodes_secret(running):
    secret, other = Security(b"k" * 32), Security(b"K" * 32)
    async with running(security=secret) as (own, address):
        link = await introduce(address, {"role": "submitter"}, security=secret)
        link.close()
        for security, reason in ((OPEN, "the caller has none"), (other, "different secrets")):
            with pytest.raises(ClusterError, match=reason):
                await introduce(address, {"role": "submitter"}, security=security)
        assert len(own._controls) <= 1


@pytest.mark.parametrize(("wanted", "offered"), [(True, True), (True, False), (False, True)])
async def test_a_submitter_on_the_nodes_machine_may_use_a_unix_socket(running, wanted, offered):
    async with running(unix=offered) as (own, address):
        link = await introduce(address, {"role": "submitter"}, unix=wanted)
        (control,) = own._controls
        assert link.over == control.link.over == ("unix" if wanted and offered else "tcp")
        link.close()


async def test_only_over_tcp_the_unix_socket_is_offered(running):
    async with running() as (own, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(FIRST)
        assert own._unix.encode() in await reader.read(1000)
        writer.close()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, b"\0" + own._unix.encode())
            await loop.sock_sendall(connection, FIRST)
            hello = await loop.sock_recv(connection, 1000)
            assert b"nonce" in hello
            assert own._unix.encode() not in hello


async def test_a_system_without_unix_sockets_has_links_over_tcp(running, monkeypatch):
    async def no(_):
        raise OSError

    monkeypatch.setattr(node, "listen_unix", no)
    async with running() as (_, address):
        link = await introduce(address, {"role": "submitter"}, unix=True)
        assert link.over == "tcp"
        link.close()


async def test_with_tls_there_is_no_other_way_in(running, tmp_path):
    tls = load_tls(**Authority(tmp_path).issue("node"))
    async with running(security=Security(None, tls)) as (own, address):
        link = await introduce(
            address, {"role": "submitter"}, security=Security(None, tls), unix=True
        )
        assert link.over == "tls"
        assert own._unix == ""
        link.close()
        with pytest.raises(ClusterError, match="the node speaks TLS only"):
            await introduce(address, {"role": "submitter"})
        while own._pending:
            await asyncio.sleep(0)
    async with running() as (_, address):
        with pytest.raises(ClusterError, match=f"{address}: no TLS: "):
            await introduce(address, {}, security=Security(None, tls))


@pytest.mark.parametrize(
    "wrong",
    [{"token": "guess"}, {"token": None}, {"job_id": OTHER_JOB}, {"node": 7}, {"node": "1"}, {}],
)
async def test_only_nodes_of_the_job_may_join_it_and_once(running, wrong):
    async with running() as (own, address), Submitter(address) as submitter:
        await submitter.order("can_commit", **QUESTION)
        facts = assignment(address, workers=2)
        facts["addresses"].append([1, "127.0.0.1:9"])
        await submitter.order("prepare", **facts)
        right = greeting(role="peer", job_id=JOB, node=1, token="secret")
        if not wrong:
            link = await introduce(address, right)
            assert list(own.part.mesh.peers) == [1]
            with pytest.raises(ClusterError, match="no node of this node's job"):
                await introduce(address, right)
            link.close()
            return
        with pytest.raises(ClusterError, match="no node of this node's job"):
            await introduce(address, {**right, **wrong})
        assert not own.part.mesh.peers


@pytest.mark.parametrize("words", [b"", FIRST[:20], FIRST])
async def test_a_caller_that_does_not_go_on_is_sent_away(running, monkeypatch, caplog, words):
    monkeypatch.setattr(node, "HELLO_TIMEOUT", 0.01)
    async with running() as (own, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            assert b"error" not in await reader.read()
        writer.close()
        assert not own._pending
    assert "it did not say who it is within 0.01 s" in caplog.text


async def test_a_refused_caller_that_stays_is_sent_away_without_another_word(
    running, monkeypatch, caplog
):
    monkeypatch.setattr(node, "HELLO_TIMEOUT", 0.01)
    async with running() as (own, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(FIRST + FIRST)
        assert b"no node of this node's job" in await reader.readuntil(b"job")
        while own._pending:
            await asyncio.sleep(0)
        writer.close()
    assert "did not say" not in caplog.text


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_caller_that_does_not_go_on_with_tls_is_sent_away(
    running, monkeypatch, caplog, tmp_path, words
):
    monkeypatch.setattr(node, "HELLO_TIMEOUT", 0.05)
    tls = load_tls(**Authority(tmp_path).issue("node"))
    async with running(security=Security(None, tls)) as (own, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        assert not own._pending
    assert "it did not say who it is within 0.05 s" in caplog.text


async def test_what_speaks_tls_to_a_plain_node_is_named_in_the_log(running, caplog):
    async with running() as (_, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"\x16\x03\x01" + bytes(100))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    assert "that is how TLS begins, which this node does not speak" in caplog.text


@pytest.mark.parametrize("words", [b"", FIRST, FIRST + FIRST])  # silent, slow, and refused
async def test_the_oldest_callers_without_a_name_make_room_for_new_ones(
    running, monkeypatch, words
):
    monkeypatch.setattr(node, "PENDING_LIMIT", 3)
    async with running() as (own, address), contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            stack.callback(writer.close)
            writer.write(words)
            readers.append(reader)
        for reader in readers[:5]:
            with contextlib.suppress(ConnectionError):
                await reader.read()
        assert len(own._pending) == 3
        async with Submitter(address) as submitter:
            assert (await submitter.order("can_commit", **QUESTION))["report"] == "vote"


async def test_an_address_that_is_taken_is_the_users_mistake(running, tmp_path):
    async with running() as (_, address):
        other = Node(Settings(port=address.port, run_dir=tmp_path, data_dir=tmp_path))
        with pytest.raises(ConfigError, match=f"{address}: .*in use"):
            await other.serve(print)


async def test_a_flood_from_one_address_crowds_out_its_own(running, monkeypatch):
    monkeypatch.setattr(node, "PENDING_LIMIT", 4)
    async with running(host="127.0.0.1") as (own, address), contextlib.AsyncExitStack() as stack:

        async def call(source):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, local_addr=(source, 0)
            )
            stack.callback(writer.close)
            return reader

        honest = await call("127.0.0.2")  # slow, and before all others
        flood = [await call("127.0.0.3") for _ in range(12)]
        for reader in flood[:9]:
            await reader.read()
        assert len(own._pending) == 4
        assert sum("127.0.0.2" in link.address for link in own._pending) == 1
        assert not honest.at_eof()
