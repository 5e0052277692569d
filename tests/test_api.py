"""The Python calls: synchronous, in a notebook, and as coroutines."""

import asyncio
import functools
import importlib
import inspect
import os
import signal
import sys
import threading

import numpy as np
import pytest

import aiosgd
from aiosgd import aio, api
from aiosgd.codecs.fedavg import FedAvg, FedAvgServer
from aiosgd.errors import ClusterError, ConfigError, JobCancelledError
from aiosgd.runtime import results
from aiosgd.runtime.config import make_job

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


# Codecs as classes ----------------------------------------------------------------------------

SOURCE = (
    "from aiosgd import Codec\n\nclass Mine(Codec):\n    async def update(self, block):\n"
    "        self.set_result(block.value * np.float32(self.ctx.rng.random()))\n\nimport numpy as np\n"
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine_for_test").Mine
    del sys.modules["mine_for_test"]


def test_a_class_of_a_file_is_a_codec(mine, cluster, runs, tmp_path):
    named = f"{tmp_path}/mine_for_test.py:Mine"
    for call in (aiosgd.run, functools.partial(aiosgd.submit, cluster)):
        result = call(codec=mine, workers=2, max_steps=4, output=runs)
        check(result)
        assert results.read_job(result.folder).codec == named


def test_a_class_of_a_plugin_is_that_plugin(cluster, runs):
    options = {"codec": FedAvg, "server_codec": FedAvgServer, "max_steps": 1, "output": runs}
    with pytest.raises(ConfigError, match=r"codec\.turn is 'x'"):
        aiosgd.run(**options, codec_params={"turn": "x"})
    result = aiosgd.submit(cluster, codec=FedAvg, max_steps=1, output=runs)
    assert results.read_job(result.folder).codec == "fedavg"


def test_a_class_that_nodes_cannot_find_is_refused(runs):
    class Here(aiosgd.Codec):
        async def update(self, block):
            return None

    names = {"__name__": "nowhere"}
    exec(SOURCE, names)
    for codec, name in ((Here, "Here"), (names["Mine"], "Mine")):
        with pytest.raises(ConfigError, match=rf"^codec .*{name}.*put the class into a file or a"):
            aiosgd.run(codec=codec, output=runs)
    with pytest.raises(ConfigError, match="server_codec is <class 'int'>; expected a name or a"):
        aiosgd.run(server_codec=int, output=runs)
    assert not runs.exists()


# Once more from job.toml ----------------------------------------------------------------------


def same(first, second):
    assert first.parameters.keys() == second.parameters.keys()
    for name, value in first.parameters.items():
        assert np.array_equal(value, second.parameters[name])


def test_a_run_is_repeated_from_its_job_file(mine, runs, tmp_path):
    options = {"workers": 3, "max_steps": 3, "seed": 5, "learning_rate": 0.3, "batch_size": 8}
    model = {"model_params": {"hidden": [7]}, "output": runs}
    first = aiosgd.run(codec=f"{tmp_path}/mine_for_test.py:Mine", **options, **model)
    (tmp_path / "mine_for_test.py").unlink()
    second = aiosgd.run(job_file=first.folder / "job.toml")
    assert second.folder != first.folder
    assert second.folder.parent == runs
    same(first, second)
    assert results.read_job(second.folder).codec == f"{first.folder}/code/mine_for_test.py:Mine"
    third = aiosgd.run(job_file=str(second.folder / "job.toml"), seed=6, output=tmp_path / "other")
    assert third.folder.parent == tmp_path / "other"
    assert any((third.parameters[n] != first.parameters[n]).any() for n in first.parameters)


def test_a_job_on_a_whole_cluster_is_repeated_on_as_many_nodes(cluster, write_cluster, runs):
    first = aiosgd.submit(cluster, codec="fedavg", max_steps=4, output=runs)
    other = write_cluster(cluster, "[job]\nepochs = 3\nmax_steps = 1\n")
    second = aiosgd.submit(other, job_file=first.folder / "job.toml")
    assert second.summary.nodes == first.summary.nodes == 5
    assert second.summary.steps == 4
    same(first, second)


def job_of(job_file, sets=(), **options):
    return aio._make_job(options, sets, job_file, workers=2)


def test_what_belongs_to_a_replaced_plugin_is_not_taken_from_a_job_file(tmp_path):
    earlier = make_job(
        {
            "codec": "fedavg",
            "workers": 4,
            "servers": 1,
            "codec_params": {"turn": 3},
            "model_params": {"hidden": [7], "activation": "relu"},
            "compute": {"slow": {"0": 2.0}},
        }
    )
    results.write_job(tmp_path, earlier, {})
    path = tmp_path / "job.toml"
    assert job_of(path) == earlier
    assert job_of(path, codec="fedavg", workers=None) == earlier
    other = job_of(path, codec="plain")
    assert (other.codec_params, other.servers, other.workers) == ({}, None, 4)
    assert job_of(path, sets=("codec=plain",)) == other
    assert job_of(path, sets=(" job.codec = plain",)) == other
    assert other.model_params == earlier.model_params
    merged = job_of(path, ("model.activation=tanh",), compute={"slow": {"1": 3.0}}, workers=3)
    assert merged.model_params == {"hidden": [7], "activation": "tanh"}
    assert merged.compute.slow == {"0": 2.0, "1": 3.0}
    assert merged.workers == 3


def test_a_job_file_that_is_none_is_refused(tmp_path, cluster):
    path = tmp_path / "job.toml"
    for text, reason in (
        (None, "cannot be read"),
        ("workers = []\n", r"has no \[job\]"),
        ("[job]\nepochs = 0\n", r"job\.toml: job\.epochs is 0"),
        ("[job]\nepoch = 1\n", "epoch"),
        ("[job]\nworkers = 9\n", "workers is 9; expected at most 4"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            aiosgd.submit(cluster, job_file=path)


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


def test_local_nodes_keep_data_where_they_are_told(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.random((200, 4), np.float32), y=np.arange(200) % 2)
    aiosgd.run(
        dataset="npz",
        dataset_params={"path": str(tmp_path / "own.npz")},
        workers=1,
        max_steps=1,
        data_dir=tmp_path / "data",
        output=tmp_path / "runs",
    )
    assert len(list((tmp_path / "data/sha256").iterdir())) == 1
