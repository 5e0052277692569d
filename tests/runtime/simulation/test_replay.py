"""What was recorded plays again to the same bits, and what is no record of the run says so."""

import asyncio
import io
import shutil
import sys
from pdb import Pdb

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import aiosgd
from aiosgd.aio import default_data_dir
from aiosgd.codecs.base import Block, Codec, Envelope, Message
from aiosgd.errors import CodecError, ConfigError, JobCancelledError, JobFailedError
from aiosgd.runtime import results
from aiosgd.runtime.actor import Kept, Rescue
from aiosgd.runtime.record import Kind, Recorder, row_of
from aiosgd.runtime.session import Place
from aiosgd.runtime.simulation.replay import TIMES, ReplayError, Stage, replay
from aiosgd.runtime.simulation.stepping import stepped
from tests.runtime import memory_transport

ARRIVAL = '''
import numpy as np
from aiosgd import Codec, Envelope

class Arrival(Codec):
    """Adds what comes in the order in which it comes, some of it in a thread."""

    exchange = "updates"

    def start(self):
        self.total = np.zeros_like(self.ctx.initial)

    async def update(self, block):
        self.add(block.value)
        return Envelope(self.ctx.neighbours, block.value)

    async def receive(self, message):
        self.add(await self.ctx.run(np.multiply, message.content, np.float32(0.3)))

    def add(self, value):
        factor = np.float32(0.9 + 0.01 * (self.ctx.step % 3))
        self.total = self.total * factor + value
        self.set_result(self.total * np.float32(0.1), lambda old, new: old * factor + new)
'''
scope: dict[str, type[Codec]] = {}
exec(ARRIVAL, scope)  # the same class as the nodes get as a file
Arrival = scope["Arrival"]


class Backup(Codec):
    """Goes on after the first two blocks, whoever computed them."""

    def start(self):
        self.values = []

    async def update(self, block):
        yield Envelope(self.ctx.neighbours, block.value)
        self.add(await self.ctx.run(np.positive, block.value))

    async def receive(self, message):
        self.add(message.content)

    def add(self, value):
        self.values.append(value)
        if len(self.values) == 2:
            self.set_result(self.values[0] * np.float32(0.7) + self.values[1])
            self.values.clear()


class Asking(Codec):
    """One block is not sent in step 3; who misses it asks for it when the step times out."""

    accepts_late = True

    def start(self):
        self.values, self.rescues = {}, []

    async def update(self, block):
        self.add(block.id, block.value)
        self.own = (block.id, block.value)
        is_sent = (self.ctx.node, block.step) != (1, 3)
        return Envelope(self.ctx.neighbours, self.own) if is_sent else None

    async def receive(self, message):
        if message.content == "please":
            return Envelope(message.sender, self.own)
        if message.step == self.ctx.step:
            self.add(*message.content)
        return None

    async def rescue(self):
        self.rescues.append(self.ctx.step)
        return Envelope(self.ctx.neighbours, "please")

    def add(self, block_id, value):
        self.values[block_id] = value
        if len(self.values) == self.ctx.block_count:
            self.set_result(sum(self.values.values()))
            self.values = {}


# sessions in memory, whose messages take a while that a seed decides ---------------------------


@pytest.fixture
def record(monkeypatch):
    """`record(options, workers, servers, **how)`: how such a job went, and its records."""

    def run(options, workers=3, servers=0, **how):
        recorders = {}

        def place(**facts):
            recorders[facts["node"]] = Recorder(threads=1)
            return Place(journal=recorders[facts["node"]], **facts)

        monkeypatch.setattr(memory_transport, "Place", place)
        outcome = memory_transport.run_sessions(options, workers, servers, **how)
        return outcome, {node: one.rows.array() for node, one in recorders.items()}

    return run


def play(records, options, workers=3, codec=None, whole=True):
    load = memory_transport.load_small(options, workers, codec)
    stage = Stage(load, records, whole, None, lambda _: None)
    stage.play()
    return stage


def assert_same_rows(left, right):
    assert len(left) == len(right) > 0
    for name in set(left.dtype.names) - TIMES:
        np.testing.assert_array_equal(left[name], right[name], name)


ASYNC = {"mode": "async", "learning_rate": 0.02}
JOBS = [
    ({"codec": "plain"}, 0, None),
    ({"codec": "plain", "overlap": True}, 0, None),
    ({"codec": "plain", "redundancy": 2, "assignment": "duplicate", "batch_size": 2}, 0, None),
    ({"codec": "plain", **ASYNC}, 0, None),
    ({"codec": "allreduce", "granularity": "tensor"}, 0, None),
    ({"codec": "parameter_server", **ASYNC}, 1, None),
    ({"codec": "parameter_server", "granularity": "tensor", **ASYNC}, 2, None),
    ({"codec": "fedavg"}, 1, None),
    (ASYNC, 0, Arrival),
    ({"granularity": "tensor", **ASYNC}, 0, Arrival),
    ({}, 0, Arrival),
    ({}, 0, Backup),
    ({"granularity": "tensor"}, 0, Backup),
    ({"step_timeout": 1.0, "learning_rate": 0.01}, 0, Asking),
]


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "servers", "codec"), JOBS)
def test_a_recorded_job_plays_again_bit_for_bit(record, options, servers, codec, seed):
    workers = 4 if "redundancy" in options else 3
    outcome, records = record(options, workers, servers, codec=codec, seed=seed)
    stage = play(records, options, workers, codec)
    for node, session in outcome.sessions.items():
        again = stage.sessions[node]
        if session.weights is not None:
            assert session.weights.tobytes() == again.weights.tobytes()
        if node >= 0:
            assert_same_rows(session.train.array(), again.train.array())
            assert_same_rows(session.evaluations.array(), again.evaluations.array())
        assert again.samples == session.samples
        assert again.late == session.late


def test_each_item_has_a_row_of_its_own():
    message, value = Message(-1, 7, "content"), np.ones(1, np.float32)
    assert row_of(2, message) == (Kind.MESSAGE, 2, -1, 7)
    assert row_of(2, Kept(message)) == (Kind.KEPT, 2, -1, 7)
    assert row_of(2, Block(4, 7, value, 1)) == (Kind.BLOCK, 2, 4, 7)
    assert row_of(2, Rescue(7, None)) == (Kind.RESCUE, 2, 0, 7)


@pytest.mark.parametrize("codec", [Arrival, Backup])
def test_the_order_makes_a_difference_that_a_replay_must_get_right(record, codec):
    options = ASYNC if codec is Arrival else {}
    ends = {record(options, codec=codec, seed=i)[0].weights[0].tobytes() for i in range(4)}
    assert len(ends) > 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_ends_after_the_same_epoch(record, mode):
    options = {"mode": mode, "epochs": 6, "target_accuracy": 0.9}
    outcome, records = record(options, stop_after=1)
    stage = play(records, options)
    steps = {node: len(outcome.train(node)) for node in outcome.workers}
    assert max(steps.values()) < stage.load.steps
    assert {node: len(stage.sessions[node].train) for node in outcome.workers} == steps
    assert stage.sessions[0].weights.tobytes() == outcome.weights[0].tobytes()


def test_a_rescue_is_played_where_it_was_and_only_there(record):
    outcome, records = record({"step_timeout": 1.0}, codec=Asking)
    rescues = {node: outcome.codecs(node)[0].rescues for node in outcome.workers}
    assert 3 in rescues[0]
    assert 3 not in rescues[1]
    stage = play(records, {}, codec=Asking)
    for node, session in stage.sessions.items():
        assert session._actors[0].codec.rescues == rescues[node]
        assert session.weights.tobytes() == outcome.weights[node].tobytes()


def blas_threads():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


class Threads(Arrival):
    def start(self):
        super().start()
        self.seen = set()

    async def receive(self, message):
        self.seen |= blas_threads()
        await super().receive(message)
        self.seen |= blas_threads()


def test_each_node_computes_with_as_many_blas_threads_as_it_had(record):
    _, records = record(ASYNC, codec=Threads)
    for node, threads in ((0, 2), (1, 3), (2, 2)):
        records[node].number[0] = threads
    with threadpool_limits(1, user_api="blas"):
        stage = play(records, ASYNC, codec=Threads)
        assert blas_threads() == {1}
    seen = {node: one._actors[0].codec.seen for node, one in stage.sessions.items()}
    assert seen == {0: {2}, 1: {3}, 2: {2}}


class Raising(Arrival):
    async def receive(self, message):
        if self.ctx.node == 1 and message.step == 4:
            await asyncio.sleep(0.5)
            raise ValueError("enough")
        await super().receive(message)


def test_a_hook_that_failed_fails_again(record):
    outcome, records = record(ASYNC, codec=Raising, fails=True)
    assert set(outcome.errors) == {1}
    with pytest.raises(CodecError, match=r"Raising: receive failed on node 1 .*enough") as caught:
        play(records, ASYNC, codec=Raising, whole=False)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_records_of_a_run_that_did_not_end_play_as_far_as_they_go(record, part):
    outcome, records = record(ASYNC, codec=Arrival)
    short = {node: rows[: int(part * len(rows))] for node, rows in records.items()}
    stage = play(short, ASYNC, codec=Arrival, whole=False)
    taken = len(stage.sessions[0].train)
    assert 0 < taken < len(outcome.train(0))
    assert_same_rows(outcome.train(0)[:taken], stage.sessions[0].train.array())


# what is no record of the run -------------------------------------------------------------------


def tampered(records, node, change):
    return {**records, node: change(records[node].copy())}


def places(rows, kind):
    return np.flatnonzero(rows.kind == kind)


def without_last_message(rows):
    return np.delete(rows, places(rows, Kind.MESSAGE)[-1]).view(np.recarray)


def with_another_sender(rows):
    rows.number[places(rows, Kind.MESSAGE)[5]] = 7
    return rows


def with_another_step(rows):
    rows.step[places(rows, Kind.MESSAGE)[5]] += 3
    return rows


def with_another_group(rows):
    rows.group[places(rows, Kind.MESSAGE)[5]] = 3
    return rows


def with_another_kind(rows):
    rows.kind[places(rows, Kind.MESSAGE)[5]] = 77
    return rows


def with_another_block(rows):
    rows.number[places(rows, Kind.BLOCK)[2]] = 9
    return rows


def with_a_later_take(rows):
    rows.step[places(rows, Kind.TAKE)[4]] += 1
    return rows


def with_a_kept_message(rows):
    rows.kind[places(rows, Kind.MESSAGE)[5]] = Kind.KEPT
    return rows


def with_a_call_too_many(rows):
    row = rows[places(rows, Kind.RAN)[3]].copy()
    row.number = 10_000
    return np.insert(rows, 20, row).view(np.recarray)


def cut_in_half(rows):
    return rows[: len(rows) // 2]


TAMPERED = [
    (
        without_last_message,
        r"worker 1, entry .*: the record has the end of call \d+ of ctx.run; here",
    ),
    (with_another_sender, "worker 1, entry .*: the record has a message of step . from node 7; "),
    (with_another_step, "worker 1, entry .*: the record has .* from node .; here comes a message"),
    (with_another_group, "worker 1, entry .*for tensor group 3; there is no such tensor group"),
    (with_another_kind, "worker 1, entry .*: the record has kind 77; here "),
    (with_another_block, "worker 1, entry .*: the record has block 9 of step 2; here are "),
    (with_a_later_take, "worker 1, entry .*: the record has .* take .* step 5 .*; here .* step 4"),
    (with_a_kept_message, "worker 1, entry .*: the record has the kept message of step .*; here "),
    (with_a_call_too_many, "worker 1, entry 20 .*: the record has the end of call 10000 of ctx.ru"),
    (cut_in_half, r"worker 1, entry (\d+) of \1: the record has its end; here are the training"),
    (lambda rows: rows[1:], "the record of worker 1 has no beginning"),
    (lambda rows: rows[:0], "the record of worker 1 has no beginning"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED)
def test_a_record_that_is_none_of_this_run_says_where(record, change, message):
    _, records = record(ASYNC, codec=Arrival)
    with pytest.raises(ReplayError, match=message):
        play(tampered(records, 1, change), ASYNC, codec=Arrival)


def test_a_message_that_is_left_over_is_named(record):
    options = {"codec": "plain", **ASYNC}
    _, records = record(options)
    message = r"worker 1, entry (\d+) of \1: the record has its end; here are a message of step 7"
    with pytest.raises(ReplayError, match=message):
        play(tampered(records, 1, without_last_message), options)


class Mute(Arrival):
    async def update(self, block):
        sent = await super().update(block)
        return None if (self.ctx.node, block.step) == (2, 5) else sent


def test_a_message_that_never_comes_is_missed_where_it_should_have_been_handled(record):
    _, records = record(ASYNC, codec=Arrival)
    with pytest.raises(
        ReplayError, match=r"entry .*: the record has a message .* from node 2; her"
    ):
        play(records, ASYNC, codec=Mute)


# runs of real nodes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def submitted(shared_nodes, cluster_of, tmp_path_factory):
    """`submitted(workers, **options)`: the outcome of a recorded job."""
    output = tmp_path_factory.mktemp("runs")
    workers, server = shared_nodes[:3], shared_nodes[4:]

    def submit(**options):
        options = {"record": True, "max_steps": 40, "output": output, **options}
        return aiosgd.submit(cluster_of(workers, server), **options)

    return submit


@pytest.fixture(scope="module")
def server_run(submitted):
    return submitted(codec="parameter_server", workers=2, **ASYNC)


@pytest.fixture(scope="module")
def file_run(submitted, tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "arrival.py"
    file.write_text(ARRIVAL)
    run = submitted(codec=f"{file}:Arrival", workers=3, granularity="tensor", **ASYNC)
    file.write_text("the author went on")
    return run


@pytest.fixture
def copy_of(tmp_path):
    """`copy_of(run)`: a copy of its folder, to be damaged."""
    return lambda run: shutil.copytree(run.folder, tmp_path / run.folder.name)


def again(folder, **options):
    return replay(folder, data_dir=default_data_dir(), **options)


def check_equal(run, outcome):
    saved = results.read_parameters(run.folder)
    assert saved.keys() == outcome.parameters.keys()
    for name, value in saved.items():
        assert value.tobytes() == outcome.parameters[name].tobytes()
    assert_same_rows(run.train, outcome.train)
    assert_same_rows(run.eval, outcome.eval)
    assert outcome.metrics == run.metrics


@pytest.mark.parametrize("time", range(3))
def test_an_async_parameter_server_plays_again(server_run, time):
    check_equal(server_run, again(server_run.folder))


def test_a_sync_run_plays_again(submitted):
    run = submitted(codec="plain", workers=3)
    check_equal(run, again(run.folder))


def test_a_codec_of_a_file_plays_again_as_it_was(file_run):
    check_equal(file_run, again(file_run.folder))


def test_the_record_is_in_the_folder_and_with_each_node(server_run, shared_nodes):
    for node, process in zip((0, 1, -1), (*shared_nodes[:2], shared_nodes[4]), strict=True):
        own = process.run_dir / server_run.folder.name / "nodes" / str(node)
        rows = results.read_record(server_run.folder / "nodes" / str(node))
        assert rows.kind[0] == Kind.BEGIN
        assert rows.tobytes() == results.read_record(own).tobytes()


def test_nothing_is_kept_without_the_option(submitted):
    run = submitted(codec="plain", workers=2, record=False)
    assert {path.name for path in (run.folder / "nodes").glob("*/*")} == {"node.log"}


def test_a_file_that_is_no_record_is_named(server_run, copy_of):
    folder = copy_of(server_run)
    file = folder / "nodes" / "-1" / "record.npz"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK" + whole[2:200], b"\x80\x04K\x01."):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"-1/record\.npz is no record of a run"):
            again(folder)
    with file.open("wb") as out:
        np.savez(out, kind=np.array([{}], object))
    with pytest.raises(ConfigError, match=r"-1/record\.npz is no record of a run"):
        again(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"-1/record\.npz cannot be read"):
        again(folder)


def test_other_code_is_found_at_the_first_step_that_differs(file_run, copy_of):
    folder = copy_of(file_run)
    file = folder / "code" / "arrival.py"
    file.write_text(ARRIVAL.replace("% 3", "% 4"))
    with pytest.raises(
        ReplayError, match=r"worker \d, step \d: loss was .* in the run; here it is"
    ):
        again(folder)


def test_other_parameters_at_the_end_are_found_and_other_versions_named(server_run, copy_of):
    folder = copy_of(server_run)
    model, job = folder / "model.safetensors", folder / "job.toml"
    model.write_bytes(model.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ReplayError, match=r"parameter .* ends with other bits; expected the code"):
        again(folder)
    job.write_text(job.read_text().replace(f'numpy = "{np.__version__}"', 'numpy = "1.0"'))
    with pytest.raises(ReplayError, match=r"other bits; the run was made with numpy 1\.0$"):
        again(folder)


def test_other_evaluations_are_found(server_run, copy_of):
    folder = copy_of(server_run)
    table = folder / "eval.csv"
    table.write_text(table.read_text().rpartition(",")[0] + ",0.25\n")
    with pytest.raises(ReplayError, match=r"accuracy was 0\.25 in the run; here it is 0\."):
        again(folder)


def test_a_run_that_did_not_end_says_so_at_its_end(server_run, copy_of):
    folder = copy_of(server_run)
    summary = folder / "summary.json"
    text = (
        summary.read_text().replace('"done"', '"failed"').replace('"error": null', '"error": "x"')
    )
    summary.write_text(text)
    with pytest.raises(JobFailedError, match="the record ends here, for the run was failed: x"):
        again(folder)


def test_a_job_without_record_is_refused(server_run, copy_of):
    folder = copy_of(server_run)
    job = folder / "job.toml"
    job.write_text(job.read_text().replace("record = true", "record = false"))
    with pytest.raises(ConfigError, match="has no record; run its job again with --record"):
        again(folder)


@pytest.mark.parametrize("options", [{"node": 1}, {"pdb": True}, {"node": 2, "pdb": True}])
def test_the_debugger_needs_a_node_that_there_is(server_run, options):
    with pytest.raises(ConfigError, match=r"neither, or both with a node of 0, 1, -1$"):
        again(server_run.folder, **options)


# the debugger -----------------------------------------------------------------------------------


@pytest.fixture
def debug(monkeypatch, capsys, file_run):
    """`debug(*commands)`: what the debugger prints, with node 2 of the file codec under it."""

    def run(*commands):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join((*commands, ""))))
        outcome = again(file_run.folder, node=2, pdb=True)
        return outcome, capsys.readouterr().out

    return run


def test_the_debugger_stops_at_each_hooks_first_line(debug, file_run):
    rows = results.read_record(file_run.folder / "nodes" / "2")
    outcome, out = debug("p self.ctx.node * 1000 + self.ctx.step", *["c"] * len(rows))
    assert "code/arrival.py(14)update()\n-> self.add(block.value)" in out
    assert "(Pdb) 2000\n" in out
    assert out.count("update()\n") == np.sum(rows.kind == Kind.BLOCK)
    assert out.count("receive()\n") == np.sum(rows.kind == Kind.MESSAGE)
    check_equal(file_run, outcome)


def test_a_codec_under_the_debugger_is_like_itself_and_others_may_trace():
    def tracer(*_):
        return None

    before, commands = sys.gettrace(), io.StringIO("c\n")
    under = stepped(Backup, Pdb(stdin=commands, stdout=io.StringIO(), nosigint=True))
    assert (under.__name__, under.__module__) == ("Backup", Backup.__module__)
    assert under.rescue is Codec.rescue
    codec = under()
    codec.values = []
    sys.settrace(tracer)
    try:
        with pytest.raises(StopIteration):
            codec.receive(Message(1, 0, 5)).__await__().send(None)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert codec.values == [5]
    assert commands.read() == ""


class Waiting(Codec):
    """Waits in the middle of a hook that sends twice."""

    async def update(self, block):
        self.note = 1
        yield Envelope(self.ctx.neighbours, block.value)
        self.note = await self.ctx.run(int, 2)
        yield Envelope(self.ctx.neighbours, block.value)
        self.set_result(block.value)


def test_steps_go_over_sends_and_waits_to_the_next_line(record, monkeypatch, capsys):
    _, records = record({}, codec=Waiting)
    load = memory_transport.load_small({}, 3, Waiting)
    commands = ["n", "p 'note', self.note", "n", "n", "p 'note', self.note", "n", "q", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands)))
    with pytest.raises(JobCancelledError, match="the debugger was quit"):
        Stage(load, records, True, 0, lambda _: None).play()
    out = capsys.readouterr().out
    assert [line[3:] for line in out.splitlines() if line.startswith("-> ")] == [
        "self.note = 1",
        "yield Envelope(self.ctx.neighbours, block.value)",
        "self.note = await self.ctx.run(int, 2)",
        "yield Envelope(self.ctx.neighbours, block.value)",
        "self.set_result(block.value)",
    ]
    assert "('note', 1)" in out
    assert "('note', 2)" in out
