"""The Python calls: synchronous, in a notebook, and as coroutines."""

import asyncio
import inspect
import os
import signal
import threading

import numpy as np
import pytest

import aiosgd
from aiosgd import aio, api
from aiosgd.errors import ClusterError, ConfigError, JobCancelledError
from aiosgd.runtime import results

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def check(result, workers=2, steps=4):
    assert result.metrics.keys() == {"loss", "accuracy"}
    assert isinstance(result.train, np.recarray)
    assert isinstance(result.eval, np.recarray)
    assert len(result.train) == workers * steps
    assert result.train.loss.dtype == np.float64
    assert set(result.eval.node) == set(range(workers))
    assert all(value.dtype == np.float32 for value in result.parameters.values())


def test_run_starts_nodes_trains_and_stops_them(runs):
    result = aiosgd.run(codec="plain", workers=2, max_steps=4, seed=1, output=runs)
    check(result)
    assert isinstance(result, aiosgd.Result)


def test_submit_takes_a_file_or_a_cluster(cluster, write_cluster, runs):
    options = {"workers": 2, "max_steps": 4, "output": runs}
    first = aiosgd.submit(write_cluster(cluster), **options)
    second = aiosgd.submit(str(write_cluster(cluster)), **options)
    third = aiosgd.submit(cluster, **options)
    for result in (first, second, third):
        check(result)
        for name, value in first.parameters.items():
            assert np.array_equal(value, result.parameters[name])


def test_plugin_parameters_come_as_tables_or_as_sets(cluster, runs):
    options = {"workers": 1, "max_steps": 1, "output": runs}
    one = aiosgd.submit(cluster, model_params={"hidden": [7]}, **options)
    other = aiosgd.submit(cluster, sets=("model.hidden=[7]",), **options)
    shapes = [{name: v.shape for name, v in result.parameters.items()} for result in (one, other)]
    assert shapes[0] == shapes[1]
    assert any(7 in shape for shape in shapes[0].values())


async def test_a_call_works_where_a_loop_runs_as_in_a_notebook(cluster, runs):
    check(aiosgd.submit(cluster, workers=2, max_steps=4, output=runs))
    check(await aio.submit(cluster, workers=2, max_steps=4, output=runs))


async def test_run_works_in_a_notebook(runs):
    check(aiosgd.run(max_steps=4, output=runs))


def test_wrong_options_are_refused_before_any_process_starts(monkeypatch, runs):
    monkeypatch.setattr(asyncio, "create_subprocess_exec", None)
    for options, reason in (
        ({"epoch": 1}, "epoch"),
        ({"workers": 0}, "workers is 0; expected 1 or more"),
        ({"codec": "fedavg", "codec_params": {"turn": "x"}}, r"codec\.turn is 'x'"),
        ({"batch_size": 10_000}, "batch_size"),
        ({"dataset": "npz", "dataset_params": {"path": "none.npz"}}, r"none\.npz"),
        ({"servers": 1}, "uses no server"),
        ({"codec": "fedavg", "servers": 0}, "servers is 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            aiosgd.run(output=runs, **options)
    assert not runs.exists()


def test_the_data_dir_may_be_text(cluster, runs, tmp_path):
    y = np.arange(60) % 2
    np.savez(tmp_path / "two.npz", x=np.eye(2, dtype=np.float32)[y], y=y)
    result = aiosgd.submit(
        cluster,
        data_dir=str(tmp_path),
        dataset="npz",
        dataset_params={"path": "two.npz"},
        batch_size=8,
        workers=1,
        output=runs,
    )
    assert result.summary.state == "done"


# Cancelling -----------------------------------------------------------------------------------


class Watch(aio.Silent):
    """Calls back once a phase begins."""

    def __init__(self, phase, then=None):
        self.phase, self.then = phase, then

    def entered(self, phase, job_id):
        if phase == self.phase:
            self.then()


@pytest.mark.parametrize("phase", ["voting", "running"])
async def test_cancelling_a_run_stops_the_job_and_the_nodes(runs, phase):
    watch = Watch(phase)
    task = asyncio.create_task(aio.run(epochs=10**6, output=runs, observer=watch))
    watch.then = task.cancel
    with pytest.raises(asyncio.CancelledError, match="was cancelled; logs in"):
        await task
    (folder,) = runs.iterdir()
    assert results.read_summary(folder).state == "cancelled"


async def test_cancelling_while_the_nodes_start_leaves_none(runs):
    task = asyncio.create_task(aio.run(output=runs))
    ready = asyncio.Event()
    create = asyncio.create_subprocess_exec

    async def create_and_tell(*words, **options):
        process = await create(*words, **options)
        ready.set()
        return process

    asyncio.create_subprocess_exec = create_and_tell
    try:
        await ready.wait()
    finally:
        asyncio.create_subprocess_exec = create
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not runs.exists()


async def test_a_deadline_around_a_run_is_a_timeout(cluster, runs):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await aio.submit(cluster, epochs=10**6, output=runs)
    assert (await aio.submit(cluster, max_steps=1, output=runs)).summary.state == "done"


@pytest.mark.parametrize("notebook", [False, True])
def test_an_interrupt_ends_the_job_first_and_is_raised_then(cluster, runs, notebook):
    watch = Watch("running", lambda: os.kill(os.getpid(), signal.SIGINT))

    def call():
        aiosgd.submit(cluster, epochs=10**6, output=runs, observer=watch)

    async def cell():
        call()

    with pytest.raises(KeyboardInterrupt):
        in_a_loop(cell()) if notebook else call()
    (folder,) = runs.iterdir()
    assert results.read_summary(folder).state == "cancelled"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aiosgd")]


def in_a_loop(work):
    """Run a coroutine on a loop that leaves SIGINT as it is, as a notebook's does."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


def test_waiting_gives_the_value_or_raises_the_error():
    async def value():
        await asyncio.sleep(0)
        return 7

    async def error():
        raise ClusterError("down")

    async def both():
        assert api.wait_for(value()) == 7
        with pytest.raises(ClusterError, match="down"):
            api.wait_for(error())

    assert api.wait_for(value()) == 7
    with pytest.raises(ClusterError, match="down"):
        api.wait_for(error())
    in_a_loop(both())


# Names ----------------------------------------------------------------------------------------


def test_every_call_has_a_twin_that_is_a_coroutine():
    for name in ("run", "submit"):
        assert inspect.iscoroutinefunction(getattr(aio, name))
        assert not inspect.iscoroutinefunction(getattr(aiosgd, name))


def test_an_interrupted_job_has_an_exit_code_of_its_own():
    assert JobCancelledError.exit_code == 130
