"""What is asked of nodes while somebody looks: real nodes in this process, real jobs."""

import asyncio
import contextlib
import json

import numpy as np
import pytest

from aiosgd import aio
from aiosgd.dashboard import live, stream, watch
from aiosgd.dashboard.page import PARTS, View
from aiosgd.dashboard.stream import Stream
from aiosgd.dashboard.watch import Watch
from aiosgd.errors import ClusterError
from aiosgd.runtime.config import Cluster
from aiosgd.runtime.visit import Visitor

FOR_EVER = {"epochs": 1_000_000, "step_timeout": 60.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    monkeypatch.setattr(live, "SETTLED", 0.0)
    monkeypatch.setattr(stream, "PACE", 0.01)
    monkeypatch.setattr(stream, "SPARE", 1)


@pytest.fixture
def watching(running):
    """`async with watching(count) as (watch, cluster)`: nodes, and a watch that runs."""

    @contextlib.asynccontextmanager
    async def start(count):
        async with contextlib.AsyncExitStack() as stack:
            addresses = [(await stack.enter_async_context(running()))[1] for _ in range(count)]
            cluster = Cluster(tuple(addresses))
            own = Watch(cluster)
            task = asyncio.create_task(own.run())
            try:
                yield own, cluster
            finally:
                task.cancel()
                await asyncio.wait([task])
            assert task.cancelled(), task.exception()

    return start


async def until(own, condition):
    """Wait until a moment is so, and return it."""
    async with asyncio.timeout(15):
        while True:
            version, now = own.live.version, own.live.moment()
            if condition(now):
                return now
            await own.news(version)


@contextlib.asynccontextmanager
async def submitted(cluster, tmp_path, **options):
    task = asyncio.create_task(aio.submit(cluster, output=str(tmp_path / "out"), **options))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_while_nobody_looks_nothing_is_asked(watching, monkeypatch):
    asked = []
    monkeypatch.setattr(Watch, "ask", lambda *_: asked.append(1) or asyncio.sleep(0))
    async with watching(1) as (own, _):
        for _ in range(20):
            await asyncio.sleep(0)
        assert asked == []
        with own.viewer(), own.viewer():
            assert own.viewers == 2
            async with asyncio.timeout(5):
                while not asked:
                    await asyncio.sleep(0.01)
        assert own.viewers == 0


async def test_a_job_is_followed_from_its_rows_to_its_end(watching, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "ROWS", 1)  # a whole piece: there may be more
    async with watching(2) as (own, cluster):
        with own.viewer():
            await until(own, lambda now: now.all_asked and now.fate is None)
            async with submitted(cluster, tmp_path, **FOR_EVER, learning_rate=0.125):
                now = await until(
                    own, lambda now: now.run and len(now.run.eval) > 4 and now.run.links
                )
                assert now.run.summary.state == "running"
                assert now.run.job.learning_rate == 0.125
                assert set(now.run.train.node.tolist()) == {0, 1}
                for worker in (0, 1):
                    steps = now.run.train.step[now.run.train.node == worker]
                    assert steps.tolist() == list(range(len(steps)))
                assert set(now.run.links) == {(0, 1), (1, 0)}
                await aio.cancel(cluster)
            now = await until(own, lambda now: now.run.summary.state == "cancelled")
            now = await until(own, lambda now: len(now.run.logs) == 2)
            assert all("left" in log for log in now.run.logs.values())
            assert len(now.run.consensus)


async def test_a_job_that_ended_before_anyone_looked_is_read_once(watching, tmp_path, monkeypatch):
    copies, copy = [], Visitor.copy
    monkeypatch.setattr(Visitor, "copy", lambda *w, **more: copies.append(1) or copy(*w, **more))
    async with watching(2) as (own, cluster):
        outcome = await aio.submit(cluster, output=str(tmp_path / "out"), epochs=3)
        with own.viewer():
            now = await until(own, lambda now: now.run and len(now.run.train) == len(outcome.train))
            run, summary = now.run, outcome.summary
            for name in ("loss", "time_s", "bytes_sent"):
                np.testing.assert_array_equal(run.train[name], outcome.train[name])
            for name in ("metrics", "steps", "epochs", "samples", "train_s", "bytes_sent", "nodes"):
                assert getattr(run.summary, name) == getattr(summary, name)
            assert set(run.links) == {(0, 1), (1, 0)}
            for _ in range(5):
                await asyncio.sleep(0.02)
            assert len(copies) == 2


async def test_nodes_that_are_gone_are_told_and_found_again(running, tmp_path):
    async with running() as (_, address):
        own = Watch(Cluster((address,)))
        async with own._asking:
            await own.ask("workers[0]", address)
            assert own.live.moment().answers
        port = address.port
    async with own._asking:
        await own.ask("workers[0]", address)
        assert "cannot be reached" in own.live.moment().seen[0].error
        async with running(port=port):
            await own.ask("workers[0]", address)
            assert own.live.moment().answers


LIES = [
    {"links": 5},
    {"links": np.zeros((2, 4), np.int64)},
    {"links": np.zeros((1, 5), np.int64), "train": {"node": 1}},
    {"links": np.zeros((1, 5), np.int64), "train": "negative"},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_nonsense_from_a_node_is_its_error_and_no_picture(
    watching, tmp_path, monkeypatch, lie
):
    honest = Visitor.rows

    async def rows(self, *words):
        answer = await honest(self, *words)
        if lie.get("train") != "negative":
            return answer | lie
        answer["train"]["time_s"] = answer["train"]["time_s"] - 1e9
        return answer

    monkeypatch.setattr(Visitor, "rows", rows)
    async with watching(1) as (own, cluster), submitted(cluster, tmp_path, **FOR_EVER):
        with own.viewer():
            now = await until(own, lambda now: now.seen[0].error)
            assert "answered nonsense" in now.seen[0].error
            assert now.run is None or len(now.run.train) == 0


@pytest.mark.parametrize(
    "lie", [{"run": None}, {"run": 5}, {"job": 5}, {"job": {"epochs": "x"}}], ids=str
)
async def test_nonsense_about_a_job_that_is_over_is_its_nodes_error(
    watching, tmp_path, monkeypatch, lie
):
    honest = Visitor.copy

    async def copy(self, *words, **more):
        entry, content = await honest(self, *words, **more)
        kept = {name: value for name, value in content.items() if lie.get(name, "") is not None}
        return entry, kept | {name: value for name, value in lie.items() if value is not None}

    monkeypatch.setattr(Visitor, "copy", copy)
    async with watching(1) as (own, cluster):
        await aio.submit(cluster, output=str(tmp_path / "out"), epochs=1)
        with own.viewer():
            now = await until(own, lambda now: now.seen[0].error)
            assert f"node 0 answered nonsense: {next(iter(lie))}" in now.seen[0].error
            assert now.run is None


async def test_a_job_that_no_node_can_tell_is_shown_by_its_nodes_alone(
    watching, tmp_path, monkeypatch
):
    async def refuse(self, *_):
        raise ClusterError("job.toml cannot be read")

    monkeypatch.setattr(Visitor, "job", refuse)
    async with watching(1) as (own, cluster), submitted(cluster, tmp_path, **FOR_EVER):
        with own.viewer():
            now = await until(own, lambda now: now.fate and now.fate.state == "running")
            assert now.run is None
            assert now.seen[0].error == ""


async def test_a_history_is_read_again_when_the_job_changes(watching, tmp_path, monkeypatch):
    read, history = [], Visitor.history

    async def counted(self):
        read.append(1)
        return await history(self)

    monkeypatch.setattr(Visitor, "history", counted)
    monkeypatch.setattr(watch, "REMEMBERED", 1e9)
    async with watching(1) as (own, cluster):
        with own.viewer():
            await until(own, lambda now: now.all_asked)
            for _ in range(5):
                await asyncio.sleep(0.02)
            assert len(read) == 1
            # long enough to be seen while it runs
            await aio.submit(cluster, output=str(tmp_path / "out"), epochs=60)
            await until(own, lambda now: now.fate and now.fate.state == "done")
            assert 2 <= len(read) <= 4


# The stream ---------------------------------------------------------------------------------------


def read_events(text):
    """Return the events of a piece of a stream: name and content."""
    found = []
    for event in text.strip().split("\n\n"):
        name, _, data = event.partition("\ndata: ")
        if data:
            found.append((name.removeprefix("event: "), json.loads(data)))
    return found


async def test_a_stream_has_all_parts_first_and_then_what_changes(watching, tmp_path):
    async with watching(2) as (own, cluster):
        pages = Stream(own, "cluster.toml")
        first, changed = {}, {}
        async with asyncio.timeout(15), contextlib.aclosing(pages.events(View())) as events:
            async for text in events:
                for name, content in read_events(text):
                    if name == "part":
                        first[content["id"]] = content["html"]
                if set(first) == set(PARTS) and "free" in first["nodes"]:
                    break
            assert own.viewers == 1
            async with submitted(cluster, tmp_path, **FOR_EVER):
                async for text in events:
                    for name, content in read_events(text):
                        if name == "part":
                            changed[content["id"]] = content["html"]
                    if "<svg" in changed.get("curves", "") and "running" in changed["head"]:
                        break
        assert "\n" not in json.dumps(changed["curves"])
        assert "shape" not in changed  # it has not changed
        assert own.viewers == 0


async def test_a_stream_pulses_while_nothing_happens_and_ends_when_it_shall(watching, monkeypatch):
    monkeypatch.setattr(stream, "PULSE", 0.02)
    async with watching(1) as (own, _):
        pages = Stream(own, "cluster.toml")
        pulses = 0
        async with asyncio.timeout(15):
            async for text in pages.events(View()):
                pulses += "event: pulse" in text
                if pulses == 5:
                    pages.end()
        assert pulses >= 5


async def test_viewers_of_the_same_view_share_a_drawing(watching, monkeypatch):
    async with watching(1) as (own, _):
        pages = Stream(own, "cluster.toml")
        drawn, honest = [], pages._drawing.parts
        monkeypatch.setattr(pages._drawing, "parts", lambda *w: drawn.append(w[1]) or honest(*w))
        await asyncio.gather(*(pages._parts(View()) for _ in range(5)))
        assert drawn == [View()]
        await pages._parts(View("time"))
        await pages._parts(View())
        assert drawn == [View(), View("time")]


async def test_only_so_many_can_look(watching, monkeypatch):
    monkeypatch.setattr(stream, "VIEWERS", 2)
    async with watching(1) as (own, _):
        pages = Stream(own, "cluster.toml")
        with own.viewer():
            assert not pages.is_full
            with own.viewer():
                assert pages.is_full
