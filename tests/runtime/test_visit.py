"""Visitor links: what a node answers, whom it answers, and how a job is cancelled."""

import asyncio
import contextlib
import math

import numpy as np
import pytest

from aiosgd import __version__, aio
from aiosgd.errors import ClusterError, ConfigError, JobFailedError
from aiosgd.runtime import archive, node, part, results, survey, visit
from aiosgd.runtime.config import Cluster
from aiosgd.runtime.frame import Kind, encode
from aiosgd.runtime.harvest import unpack
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.job import Phase, Seat
from aiosgd.runtime.results import EVAL, TRAIN, Rows
from aiosgd.runtime.security import Security
from aiosgd.runtime.visit import visiting

pytestmark = pytest.mark.both_loops

UNKNOWN = "20250102-030405-test-0123"
FOR_EVER = {"epochs": 1_000_000, "step_timeout": 60.0}

HANGS = """
import asyncio

from aiosgd import Codec, Envelope


class Hook(Codec):
    async def update(self, block):
        await asyncio.Event().wait()  # line 9


class Generator(Codec):
    async def update(self, block):
        yield Envelope([], None)
        await self.inner()  # line 15

    async def inner(self):
        await asyncio.Event().wait()  # line 18


class Nothing(Codec):
    async def update(self, block):
        pass
"""


class Watch(aio.Silent):
    """An observer of whom it can be awaited that a job trains."""

    def __init__(self):
        self.running = asyncio.Event()
        self.job_id = ""

    def entered(self, phase, job_id):
        self.job_id = job_id
        if phase is Phase.RUNNING:
            self.running.set()


@pytest.fixture
def submitted(tmp_path):
    """`async with submitted(*addresses, **options) as (job_id, task)`: a job that trains."""

    @contextlib.asynccontextmanager
    async def submit(*addresses, **options):
        watch = Watch()
        work = aio.submit(
            Cluster(addresses), output=str(tmp_path / "runs"), observer=watch, **options
        )
        task = asyncio.create_task(work)
        try:
            await asyncio.wait(
                [task, asyncio.ensure_future(watch.running.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            yield watch.job_id, task
        finally:
            task.cancel()
            await asyncio.wait([task])

    return submit


async def until(condition):
    """Wait until a condition holds, which other tasks of this loop bring about."""
    async with asyncio.timeout(10):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
    return value


@contextlib.asynccontextmanager
async def bare(address):
    """Open a visitor's link that takes what comes; `(link, closed)`."""
    link = await introduce(address, greeting(role="visitor"))
    closed = asyncio.Event()
    link.on_frame = lambda *_: None
    link.on_closed = lambda *_: closed.set()
    try:
        yield link, closed
    finally:
        link.abort()


# What a node is doing ----------------------------------------------------------------------------


async def test_a_free_node_has_no_job_and_no_history(running):
    async with running() as (_, address), visiting(address) as visitor:
        status = await visitor.status(why=True)
        assert status == visit.Status(version=__version__, job_id="", seat="free", leader="nobody")
        assert await visitor.history() == []


async def test_a_training_node_tells_how_far_it_is_and_who_leads(running, submitted):
    async with (
        running() as (own, address),
        submitted(address, **FOR_EVER) as (job_id, _),
        visiting(address) as visitor,
    ):

        async def moving():
            status = await visitor.status()
            return status if status.loss is not None else None

        status = await until(moving)
        assert (status.job_id, status.seat, status.node) == (job_id, "running", 0)
        assert (status.leader, status.why, status.failure) == ("its submitter", None, "")
        assert 0 < status.step < status.steps
        assert status.samples_per_s > 0
        assert 0 <= status.quiet_s < 5
        [entry] = await visitor.history()
        assert (entry.job_id, entry.node, entry.state) == (job_id, 0, "running")
        assert abs(status.began - entry.began) < 5
        assert own.member.job_id == job_id


@pytest.mark.parametrize(("codec", "line"), [("Hook", 9), ("Generator", 18)])
async def test_why_names_the_line_where_a_hook_waits(running, submitted, tmp_path, codec, line):
    (tmp_path / "hangs.py").write_text(HANGS)
    async with (
        running(allow_code=True) as (_, address),
        submitted(address, codec=f"{tmp_path / 'hangs.py'}:{codec}", **FOR_EVER),
        visiting(address) as visitor,
    ):

        async def stuck():
            status = await visitor.status(why=True)
            waits = status.training == "waits for the step's result"
            return status if waits and status.why[0]["hook"] else None

        status = await until(stuck)
        [one] = status.why
        assert (one["hook"], one["at"]) == ("update", f"hangs.py:{line}")
        assert (one["codec"], one["step"], one["group"]) == (codec, 0, 0)
        assert one["explain"] == f"update has not returned: it waits at hangs.py:{line}"
        assert 0 <= one["since"] < 10
        later = (await visitor.status(why=True)).why[0]
        assert later["since"] >= one["since"]


async def test_why_says_whom_a_codec_waits_for(running, submitted, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    async with (
        running(allow_code=True) as (_, address),
        submitted(
            address,
            codec=f"{tmp_path / 'hangs.py'}:Nothing",
            granularity="tensor",
            **FOR_EVER,
        ),
        visiting(address) as visitor,
    ):

        async def waiting():
            status = await visitor.status(why=True)
            idle = status.why and not any(one["hook"] for one in status.why)
            return status if idle and "result" in status.training else None

        status = await until(waiting)
        assert status.actors == len(status.why) > 1
        assert [one["group"] for one in status.why] == list(range(status.actors))
        for one in status.why:
            assert one["explain"].startswith("set_result was not called")
            assert (one["at"], one["since"], one["waiting"]) == ("", 0.0, 0)


# What is left ------------------------------------------------------------------------------------


async def test_a_copy_is_what_the_submitter_got(running, submitted):
    async with running() as (_, address), submitted(address, epochs=2) as (job_id, task):
        outcome = await task
        async with visiting(address) as visitor:
            entry, copy = await visitor.copy(job_id, 0, weights=True)
            state, log = await visitor.log(job_id, 0, 0)
    weights = np.concatenate([value.ravel() for value in outcome.parameters.values()])
    np.testing.assert_array_equal(copy["weights"], weights)
    for name in outcome.train.dtype.names:
        np.testing.assert_array_equal(copy["train"][name], outcome.train[name])
    assert (entry.state, state) == ("done", "done")
    assert log == bytes(copy["log"])
    assert b"left: the job is done" in log
    assert copy["run"]["job_id"] == job_id


async def test_the_copy_of_a_job_that_runs_is_refused(running, submitted):
    async with (
        running() as (_, address),
        submitted(address, **FOR_EVER) as (job_id, _),
        visiting(address) as visitor,
    ):
        with pytest.raises(ClusterError, match=f"job {job_id} still runs"):
            await visitor.copy(job_id, 0, weights=True)
        with pytest.raises(ClusterError, match=r"still runs.*logs -f.*cancel"):
            await survey.fetch(Cluster((address,)))


@pytest.mark.parametrize("job_id", [UNKNOWN, "../../etc", "", "x" * 200])
async def test_an_unknown_job_is_an_answer_and_no_path(running, job_id):
    async with running() as (_, address), visiting(address) as visitor:
        for work in (
            visitor.log(job_id, 0, 0),
            visitor.copy(job_id, 0, weights=False),
            visitor.job(job_id, 0),
            visitor.rows(job_id, 0, 0, 0),
            visitor.cancel(job_id),
        ):
            said = r"no copy of|job id is|does not run here|job\.toml cannot be read"
            with pytest.raises(ClusterError, match=said):
                await work
        assert (await visitor.status()).seat == "free"


async def test_what_training_has_left_so_far_is_read_in_pieces(running, submitted, monkeypatch):
    monkeypatch.setattr(part, "ROWS", 7)
    async with (
        running() as (_, one),
        running() as (_, two),
        submitted(one, two, **FOR_EVER) as (job_id, _),
        visiting(one) as visitor,
    ):
        job, run = await visitor.job(job_id, 0)
        assert (job["epochs"], run["job_id"], len(run["nodes"])) == (1_000_000, job_id, 2)
        train, evaluations = Rows(TRAIN), Rows(EVAL)
        async with asyncio.timeout(10):
            while len(train) < 30 or not len(evaluations):
                answer = await visitor.rows(job_id, 0, len(train), len(evaluations))
                piece = unpack(0, {"log": np.empty(0, np.uint8), **answer}, 0)
                assert len(piece.sketches) == len(piece.evaluations) <= len(piece.train) + 1 <= 8
                train.extend(piece.train)
                evaluations.extend(piece.evaluations)
        assert train.array().step.tolist() == list(range(len(train)))
        assert evaluations.array().epoch.tolist() == list(range(len(evaluations)))
        assert piece.figures.samples > 0
        [[peer, *counts]] = answer["links"].tolist()
        assert peer == 1
        assert min(counts) > 0
        beyond = await visitor.rows(job_id, 0, 1 << 39, 1 << 39)
        assert not any(len(beyond["train"][name]) for name in TRAIN.names)
        with pytest.raises(ClusterError, match=f"job {job_id} does not run here as node 1"):
            await visitor.rows(job_id, 1, 0, 0)


# Who is answered, and what -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        None,
        5,
        [],
        {},
        {"status": 1},
        {"status": None},
        {"status": True, "more": 1},
        {"history": 1},
        {"history": None, "more": 1},
        {"log": UNKNOWN},
        {"log": UNKNOWN, "node": "0", "from": 0},
        {"log": UNKNOWN, "node": 0, "from": -1},
        {"log": UNKNOWN, "node": 0, "from": 1 << 62},
        {"copy": UNKNOWN, "node": 0},
        {"copy": UNKNOWN, "node": 0, "weights": 1},
        {"job": UNKNOWN},
        {"job": UNKNOWN, "node": "0"},
        {"rows": UNKNOWN, "node": 0},
        {"rows": UNKNOWN, "node": 0, "train": -1, "evaluations": 0},
        {"rows": UNKNOWN, "node": 0, "train": 0, "evaluations": 1 << 40},
        {"cancel": None},
        {"order": "abort", "job_id": UNKNOWN},
        {"status": np.ones(4)},
        {"log": "x" * 2000, "node": 0, "from": 0},
    ],
    ids=lambda value: f"{value!r:.40}",
)
async def test_garbage_closes_that_link_only(running, submitted, request_):
    async with (
        running() as (own, address),
        visiting(address) as other,
        bare(address) as (link, closed),
    ):
        link.send(encode(request_))
        async with asyncio.timeout(5):
            await closed.wait()
        assert (await other.status()).seat == "free"
        assert own.member.seat is Seat.FREE


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.CREDIT, Kind.PING])
async def test_frames_that_are_no_requests_close_the_link(running, kind):
    async with running() as (_, address), bare(address) as (link, closed):
        content = {} if kind is Kind.HELLO else None
        link.send(encode(content, kind, 1))
        async with asyncio.timeout(5):
            await closed.wait()


async def test_who_asks_before_the_answer_is_closed(running):
    async with running() as (_, address), bare(address) as (link, closed):
        for _ in range(2):
            link.send(encode({"history": None}))
        async with asyncio.timeout(5):
            await closed.wait()


async def test_questions_of_one_visitor_wait_for_each_other(running):
    async with running() as (_, address), visiting(address) as visitor:
        answers = await asyncio.gather(*(visitor.history() for _ in range(5)))
        assert answers == [[]] * 5


@pytest.mark.parametrize("secret", [b"", b"x" * 32])
async def test_a_visitor_without_the_secret_is_refused(running, secret):
    async with running(security=Security(key=b"k" * 32)) as (_, address):
        with pytest.raises(ClusterError):
            async with visiting(address, security=Security(key=secret)):
                pass
        async with visiting(address, security=Security(key=b"k" * 32)) as visitor:
            assert (await visitor.status()).seat == "free"


async def test_there_is_a_limit_of_links_and_a_silent_one_is_closed(running, monkeypatch):
    monkeypatch.setattr(visit, "MAX_LINKS", 2)
    monkeypatch.setattr(visit, "IDLE", 0.2)
    async with running() as (_, address):
        async with bare(address) as (_, first), bare(address) as (_, second):
            with pytest.raises(ClusterError, match="2 visitor links are open"):
                async with visiting(address):
                    pass
            async with asyncio.timeout(5):
                await first.wait()
                await second.wait()
        async with visiting(address) as visitor:
            assert (await visitor.status()).seat == "free"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"error": 1, "more": 2},
        {"history": 5},
        {"history": [{"job_id": 1}]},
        {"version": "1", "job_id": "", "seat": "free", "leader": "nobody", "step": "x"},
        {"state": "done", "log": "text"},
        {"cancelled": 1},
    ],
    ids=lambda value: f"{value!r:.40}",
)
async def test_nonsense_from_a_node_is_its_error(running, monkeypatch, answer):
    async def lie(self, content):
        return answer

    monkeypatch.setattr(visit.Visits, "answer", lie)
    async with running() as (_, address), visiting(address) as visitor:
        for ask in (
            visitor.status(),
            visitor.history(),
            visitor.log(UNKNOWN, 0, 0),
            visitor.copy(UNKNOWN, 0, weights=False),
            visitor.job(UNKNOWN, 0),
            visitor.cancel(UNKNOWN),
        ):
            with pytest.raises(ClusterError, match=f"{address} answered nonsense"):
                await ask


@pytest.mark.parametrize("figure", [math.nan, math.inf, 1e20, -1.0])
async def test_times_and_sums_that_cannot_be_are_nonsense(running, monkeypatch, figure):
    plain = {"version": "1", "job_id": UNKNOWN, "seat": "running", "leader": "nobody"}
    idle = {"group": 0, "codec": "C", "step": 0, "hook": "", "at": "", "explain": ""}
    past = {"job_id": UNKNOWN, "node": 0, "state": "done", "reason": "", "spent": {}}
    lies = [{"began": figure}, {"spent": {"wait_s": figure}}]
    lies += [{"why": [idle | {"waiting": 0, "early": 0, "since": figure}]}]
    answers = [plain | lie for lie in lies]
    entries = [past | lie for lie in [*lies[:2], {"ended": figure}]]
    answers += [{"history": [one]} for one in entries] + entries
    asks = [visit.Visitor.status] * 3 + [visit.Visitor.history] * 3
    asks += [lambda visitor: visitor.copy(UNKNOWN, 0, weights=False)] * 3

    async def lie(self, content):
        return answers.pop(0)

    monkeypatch.setattr(visit.Visits, "answer", lie)
    async with running() as (_, address), visiting(address) as visitor:
        for ask in asks:
            with pytest.raises(ClusterError, match=r"answered nonsense: .* is .*; expected 0 to"):
                await ask(visitor)
    assert answers == []


async def test_a_silent_node_is_an_error(running, monkeypatch):
    async def sleep(self, content):
        await asyncio.Event().wait()

    monkeypatch.setattr(visit.Visits, "answer", sleep)
    monkeypatch.setattr(visit, "PATIENCE", 0.1)
    async with running() as (_, address), visiting(address) as visitor:
        with pytest.raises(ClusterError, match=r"does not answer for 0\.1 s"):
            await visitor._ask({"status": False}, visit.PATIENCE)


async def test_a_node_that_stops_closes_its_visitors_links(running):
    async with running() as (_, address):
        visitor = await contextlib.AsyncExitStack().enter_async_context(visiting(address))
    with pytest.raises(ClusterError, match="closed the link"):
        await visitor.status()


# Cancelling --------------------------------------------------------------------------------------


async def test_a_cancelled_job_is_cancelled_for_its_submitter_and_all_nodes(running, submitted):
    async with (
        running() as (first, address),
        running() as (second, other),
        submitted(address, other, **FOR_EVER) as (job_id, task),
    ):
        fate = await survey.cancel(Cluster((address, other)))
        assert (fate.job_id, fate.state) == (job_id, "cancelled")
        assert fate.reason == "cancelled by request at worker 0"
        words = f"job {job_id} was cancelled by request at worker 0; logs in "
        with pytest.raises(JobFailedError, match=words) as caught:
            await task
        assert caught.value.exit_code == 1
        assert {first.member.seat, second.member.seat} == {Seat.FREE}
        for one in (first, second):
            [entry] = archive.history(one.run_dir)
            assert (entry.state, entry.reason) == ("cancelled", fate.reason)
        with pytest.raises(ConfigError, match=f"job {job_id} does not run any more: cancelled"):
            await survey.cancel(Cluster((address, other)), job_id)


async def test_the_summary_of_a_cancelled_job_says_so(running, submitted, tmp_path):
    async with running() as (_, address), submitted(address, **FOR_EVER) as (job_id, task):
        async with visiting(address) as visitor:
            assert await visitor.cancel(job_id) is True
        await asyncio.wait([task])
    summary = results.read_summary(tmp_path / "runs" / job_id)
    assert (summary.state, summary.error) == ("cancelled", "cancelled by request at worker 0")


async def test_where_nobody_leads_a_cancelled_node_leaves(running, submitted, monkeypatch):
    async def fail(*_):
        raise ClusterError("no leader today")

    monkeypatch.setattr(node, "lead", fail)
    async with running() as (own, address), submitted(address, **FOR_EVER) as (job_id, task):
        for control in own._controls:
            control.link.abort()  # as if the submitter's host were gone

        async with visiting(address) as visitor:

            async def alone():
                return (await visitor.status()).leader == "nobody"

            await until(alone)
            assert (await visitor.status()).job_id == job_id
            fate = await survey.cancel(Cluster((address,)), job_id)
            assert (fate.state, fate.reason) == ("cancelled", "cancelled by request")
            assert own.member.seat is Seat.FREE
        with pytest.raises(JobFailedError):
            await task


async def test_what_is_no_job_of_this_node_is_not_cancelled(running, submitted):
    async with (
        running() as (own, address),
        submitted(address, **FOR_EVER) as (job_id, _),
        visiting(address) as visitor,
    ):
        for other in (UNKNOWN, ""):
            with pytest.raises(ClusterError, match="does not run here"):
                await visitor.cancel(other)
        assert own.member.job_id == job_id


# A cluster ---------------------------------------------------------------------------------------


async def test_nodes_that_do_not_answer_are_told_and_the_others_shown(running):
    async with running() as (_, address), running() as (_, gone):
        pass
    async with running() as (_, address):
        seen = await survey.look(Cluster((address, gone)))
        assert [one.place for one in seen] == ["workers[0]", "workers[1]"]
        assert seen[0].error == ""
        assert f"{gone} cannot be reached" in seen[1].error
        with pytest.raises(ConfigError, match=f"have had no job yet; {gone} did not answer"):
            await survey.cancel(Cluster((address, gone)))
    with pytest.raises(ClusterError, match=r"no node .* answers: workers\[0\]: .*; workers\[1\]"):
        await survey.look(Cluster((address, gone)))


async def test_of_links_that_were_lost_nothing_stays(running, monkeypatch):
    open_links, honest = [], survey.visiting

    @contextlib.asynccontextmanager
    async def counted(*words, **more):
        async with honest(*words, **more) as visitor:
            open_links.append(visitor)
            try:
                yield visitor
            finally:
                open_links.remove(visitor)

    monkeypatch.setattr(survey, "visiting", counted)
    async with running() as (_, address):
        async with survey.Asking(Cluster((address,))) as asking:
            for _ in range(3):
                visitor = await asking.visitor(address)
                assert await asking.visitor(address) is visitor
                assert open_links == [visitor]
                visitor.link.abort()
        assert open_links == []


def entry(job_id, node_id, state, reason="", span=1.0):
    return archive.Entry(
        job_id=job_id, node=node_id, state=state, reason=reason, began=5.0, ended=5.0 + span
    )


def seen_of(*entries):
    return [
        survey.Seen(place=f"workers[{i}]", address=None, history=(one,))
        for i, one in enumerate(entries)
    ]


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["done", "done"], "done"),
        (["lost", "done"], "done"),
        (["failed", "done"], "done"),
        (["failed", "cancelled"], "cancelled"),
        (["lost", "failed"], "failed"),
        (["lost", "lost"], "lost"),
    ],
)
def test_the_fate_of_a_job_is_what_its_leader_said(states, state):
    entries = [entry(UNKNOWN, i, one, f"why {one}", 1.0 + i) for i, one in enumerate(states)]
    [fate] = survey.fates(seen_of(*entries))
    assert fate.state == state
    assert fate.reason == ("" if state == "done" else f"why {state}")
    assert (fate.began, fate.took, fate.nodes) == (5.0, 2.0, (0, 1))


def test_lines_of_a_log_in_pieces_keep_their_time():
    tail = survey.Tail(0, None)
    text = b"2026-01-02 03:04:05,678 INFO one\nTraceback\n2026-01-02 03:04:06,000 INFO tw\xff"
    lines = [line for i in range(0, len(text), 7) for line in tail.take(text[i : i + 7])]
    lines += tail.last()
    assert [line[2] for line in lines] == [
        "2026-01-02 03:04:05,678 INFO one",
        "Traceback",
        "2026-01-02 03:04:06,000 INFO tw\ufffd",
    ]
    assert lines[0][0] == lines[1][0] < lines[2][0]
    assert tail.offset == len(text)
