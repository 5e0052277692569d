import importlib.util
from pathlib import Path

import numpy as np
import pytest

from aiosgd import legacy
from aiosgd.codecs import base
from aiosgd.codecs.base import SERVER, Block, Context, Message
from aiosgd.codecs.testing import LocalCluster, Sent
from aiosgd.errors import CodecError, JobFailedError
from aiosgd.legacy import BlockWeight, GlobalSettings, Parameter_Server, netEncapsulation

_spec = importlib.util.spec_from_file_location(
    "legacy_examples", Path(__file__).with_name("legacy_examples.py")
)
examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(examples)


def context(node=0, **facts):
    facts = {
        "role": "server" if node < 0 else "worker",
        "workers": (0, 1, 2),
        "servers": (-1, -2),
        "server": -1,
        "block_owners": ((0, 1), (0, 2), (1, 2)),
    } | facts
    return Context(node=node, **facts)


async def collect(hook):
    sent = []
    await base.pass_on(hook, sent.append)
    return sent


def block(value=(1.0,), id=0):
    array = np.array(value, np.float32)
    array.flags.writeable = False
    return Block(id, 0, array, 1)


# the published examples -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
async def test_plain_reaches_the_mean(seed):
    cluster = LocalCluster(examples.Plain, workers=4, seed=seed)
    results = await cluster.run(lambda step, block: [step + block, 1.0], steps=3)
    for step, by_worker in enumerate(results):
        assert [one.tolist() for one in by_worker.values()] == [[step + 1.5, 1.0]] * 4
        assert {one.dtype for one in by_worker.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("seed", range(5))
async def test_plain_sends_each_block_to_those_without_it(seed):
    cluster = LocalCluster(examples.Plain, workers=3, redundancy=2, seed=seed)
    results = await cluster.run(lambda step, block: [2.0**block], steps=2)
    for by_worker in results:
        assert all(one == pytest.approx(7 / 3) for one in by_worker.values())
    without = {0: 2, 1: 1, 2: 0}
    assert all(one.to == without[one.content[0]] for one in cluster.sent)


@pytest.mark.parametrize("seed", range(5))
async def test_plain_runs_in_async_mode(seed):
    cluster = LocalCluster(examples.Plain, workers=3, mode="async", seed=seed)
    results = await cluster.run(lambda step, block: [float(block)], steps=4)
    found = [one for step in results for one in step.values() if one is not None]
    assert found
    assert all(one % 1 == 0 for one in found)  # means, or sums of several


@pytest.mark.parametrize("seed", range(3))
async def test_fedavg_goes_alone_for_149_steps_and_meets_in_the_150th(seed):
    cluster = LocalCluster(
        examples.FedAvgClient, server_codec=examples.FedAvgServer, workers=3, seed=seed
    )
    results = await cluster.run(lambda step, block: [step, float(block)], steps=301)
    for step, by_worker in enumerate(results):
        together = step in (149, 299)
        for worker in range(3):
            assert by_worker[worker].tolist() == [step, 1.0 if together else worker]
    assert len(cluster.sent) == 2 * (3 + 3)
    assert {one.to for one in cluster.sent if one.sender >= 0} == {-1}
    assert {one.content[0] for one in cluster.sent if one.sender == -1} == {Parameter_Server}


async def test_fedavg_runs_in_async_mode():
    cluster = LocalCluster(
        examples.FedAvgClient, server_codec=examples.FedAvgServer, workers=2, mode="async"
    )
    await cluster.run(lambda step, block: [1.0], steps=160)
    assert {one.to for one in cluster.sent if one.sender == -1} == {0, 1}


@pytest.mark.parametrize("seed", range(10))
async def test_a_relay_passes_on_what_it_receives(seed):
    cluster = LocalCluster(examples.Relay, workers=4, seed=seed)
    results = await cluster.run(lambda step, block: [step + block / 2], steps=3)
    for step, by_worker in enumerate(results):
        assert by_worker == {worker: [step + 0.75] for worker in range(4)}
    assert len(cluster.sent) == 3 * 4 * 3


@pytest.mark.parametrize("seed", range(5))
async def test_a_relay_in_async_mode_counts_everything(seed):
    cluster = LocalCluster(examples.Relay, workers=4, mode="async", seed=seed)
    results = await cluster.run(lambda step, block: [1.0], steps=5)
    for worker in range(4):
        assert sum(one[worker] for one in results if one[worker] is not None) == [5.0]


# what a codec asks ----------------------------------------------------------------------------


class Asking(legacy.Codec):
    """Keeps what `GlobalSettings` say at every occasion."""

    def __init__(self, node_id):
        super().__init__(node_id)
        self.blocks = [GlobalSettings.get_default().blocks]

    def ask(self):
        self.blocks.append(GlobalSettings.get_default().blocks)

    def update_blocks(self, block_weight):
        self.ask()
        yield netEncapsulation(GlobalSettings.get_default().nodes - {self.node_id}, None)
        self.ask()
        yield None
        self.ask()
        self.set_result(block_weight.content)

    def receive_blocks(self, content):
        self.ask()

    def dispose(self):
        self.ask()


@pytest.mark.parametrize("seed", range(5))
async def test_each_node_of_a_process_sees_its_own_settings(seed):
    cluster = LocalCluster(Asking, workers=3, redundancy=2, mode="async", seed=seed)
    await cluster.run(lambda step, block: 0.0, steps=1)
    cluster.stop()
    for node, own in enumerate([[0, 1], [0, 2], [1, 2]]):
        assert cluster.codecs[node].codec.blocks == [own] * (1 + 2 * 3 + 4 + 1)
    with pytest.raises(LookupError, match="no codec is running"):
        GlobalSettings.get_default()


async def test_two_generators_in_turn_see_their_own_settings():
    one, other = (Asking.create(context(node)) for node in (0, 2))
    hooks = [actor.update(block()) for actor in (one, other)]
    for hook in hooks:
        await anext(hook)
    for hook in hooks:
        assert [envelope async for envelope in hook] == []
    assert one.codec.blocks == [[0, 1]] * 4
    assert other.codec.blocks == [[1, 2]] * 4


def test_the_settings_survive_a_hook_that_raises():
    class Raising(legacy.Codec):
        def dispose(self):
            raise ZeroDivisionError

    actor = Raising.create(context())
    with pytest.raises(ZeroDivisionError):
        actor.stop()
    with pytest.raises(LookupError):
        GlobalSettings.get_default()


def test_the_settings_describe_the_job():
    settings = GlobalSettings(context(1))
    assert settings.node_count == 3
    assert settings.nodes == {0, 1, 2}
    assert settings.block_count == 3
    assert settings.redundancy == 2
    assert settings.blocks == [0, 2]
    assert [settings.get_adversary(i) for i in range(3)] == [{2}, {1}, {0}]
    assert settings.block_assignment.block_2_node == [[0, 1], [0, 2], [1, 2]]
    assert settings.block_assignment.node_2_block == {0: [0, 1], 1: [0, 2], 2: [1, 2]}
    assert settings.block_assignment.block_count == 3


def test_what_a_codec_takes_from_the_settings_is_its_own():
    settings = GlobalSettings(context())
    settings.nodes.remove(0)
    settings.blocks.clear()
    assert settings.nodes == {0, 1, 2}
    assert settings.blocks == [0, 1]


# results --------------------------------------------------------------------------------------


def test_set_result_always_calls_the_operation_on_zero_at_first():
    calls = []

    def operation(old, content):
        calls.append((type(old), old.tolist(), content.tolist()))
        return old - content

    codec = legacy.Codec(0)
    codec.set_result(np.array([1.0]), operation)
    codec.set_result(np.array([2.0]), operation)
    assert calls == [(np.ndarray, 0.0, [1.0]), (np.ndarray, [-1.0], [2.0])]
    assert codec.get_result() == [-3.0]
    codec.set_result(np.array([5.0]), operation)
    assert calls[-1][1] == 0.0


def test_results_add_up_by_default_and_are_taken_once():
    codec = legacy.Codec(0)
    assert codec.is_done() is False
    codec.set_result(np.array([1.0]))
    codec.set_result(np.array([2.5]))
    assert codec.is_done() is True
    assert codec.get_result() == [3.5]
    assert codec.is_done() is False
    with pytest.raises(LookupError, match="Codec has no result"):
        codec.get_result()


def test_the_framework_takes_float32():
    actor = examples.Plain.create(context())
    assert actor.is_done is False
    value = np.array([0.1, -3e38], np.float32)
    actor.codec.set_result(value)
    assert actor.is_done is True
    taken = actor.take_result()
    assert taken.dtype == np.float32
    assert taken.tolist() == value.tolist()
    assert actor.is_done is False


# what is sent ---------------------------------------------------------------------------------


class Sends(legacy.Codec):
    """Sends what it was made with."""

    to: object = ()

    def update_blocks(self, block_weight):
        return netEncapsulation(self.to, "content")


@pytest.mark.parametrize(
    ("to", "ids"),
    [
        (1, (1,)),
        (np.int64(2), (2,)),
        ([0, 1], (0, 1)),
        ((1,), (1,)),
        ({2}, (2,)),
        ((i for i in (1, 2)), (1, 2)),
        ([], ()),
        (Parameter_Server, (-1,)),
        ([1, Parameter_Server], (1, -1)),
        ({Parameter_Server}, (-1,)),
    ],
)
async def test_targets_and_the_parameter_server_among_them(to, ids):
    actor = type("One", (Sends,), {"to": to}).create(context())
    (envelope,) = await collect(actor.update(block()))
    assert actor.ctx.resolve(envelope.to) == ids
    assert envelope.content == "content"


def test_the_parameter_server_is_minus_two():
    assert Parameter_Server == -2
    assert netEncapsulation(Parameter_Server, None).target == [-2]


async def test_the_parameter_server_is_the_group_s_own():
    actor = type("One", (Sends,), {"to": Parameter_Server}).create(context(server=-2))
    (envelope,) = await collect(actor.update(block()))
    assert actor.ctx.resolve(envelope.to) == actor.ctx.resolve(SERVER) == (-2,)


async def test_without_a_server_there_is_no_parameter_server():
    cluster = LocalCluster(examples.FedAvgClient, workers=2)
    with pytest.raises(CodecError, match=r"FedAvgClient: update failed.*job has no server"):
        await cluster.run(lambda step, block: [1.0], steps=150)


@pytest.mark.parametrize(
    ("sends", "message"),
    [("text", "gave str; expected"), (3, "gave int; expected"), ([1], "gave int; expected")],
)
async def test_anything_else_is_refused(sends, message):
    class Wrong(legacy.Codec):
        def update_blocks(self, block_weight):
            return sends

    with pytest.raises(TypeError, match=message):
        await collect(Wrong.create(context()).update(block()))


@pytest.mark.parametrize("hook", ["update", "receive"])
async def test_a_codec_without_a_hook_that_is_needed_says_so(hook):
    class Empty(legacy.Codec):
        pass

    argument = {"update": block(), "receive": Message(1, 0, None)}[hook]
    with pytest.raises(NotImplementedError, match=f"Empty does not implement {hook}_blocks"):
        await collect(getattr(Empty.create(context()), hook)(argument))


async def test_arrays_are_the_codec_s_own_on_the_way_in_and_out():
    class Reuses(legacy.Codec):
        def __init__(self, node_id):
            super().__init__(node_id)
            self.sum = np.zeros(1, np.float32)

        def update_blocks(self, block_weight):
            block_weight.content += 1
            self.sum += block_weight.content
            yield netEncapsulation(0, (1, [self.sum]))
            self.sum += 1
            yield netEncapsulation(0, {"sum": self.sum})
            self.sum += 1

        def receive_blocks(self, content):
            content["deep"][0][0] += 1
            self.set_result(content["deep"][0])

    value = block([1.0])
    actor = Reuses.create(context())
    first, second = await collect(actor.update(value))
    assert first.content == (1, [[2.0]])
    assert second.content == {"sum": [3.0]}
    assert value.value == [1.0]
    await collect(actor.receive(Message(1, 0, {"deep": [value.value]})))
    assert actor.take_result() == [2.0]
    assert value.value == [1.0]


async def test_a_block_says_who_has_it():
    class Keeps(legacy.Codec):
        def update_blocks(self, block_weight):
            self.kept = block_weight

    actor = Keeps.create(context())
    assert await collect(actor.update(block([4.0], id=1))) == []
    kept = actor.codec.kept
    assert isinstance(kept, BlockWeight)
    assert (kept.block_id, kept.content, kept.company, kept.adversary) == (1, [4.0], {0, 2}, {1})


# the frame around it --------------------------------------------------------------------------


def test_nodes_keep_their_id_and_servers_are_called_parameter_server():
    assert Sends.create(context(2)).codec.node_id == 2
    assert Sends.create(context(-1)).codec.node_id == Parameter_Server


def test_an_actor_is_named_like_the_codec_it_runs():
    class Patient(Sends):
        accepts_late = True

    assert type(Patient.create(context())).__name__ == "Patient"
    assert Patient.create(context()).accepts_late
    assert not Sends.create(context()).accepts_late


async def test_a_codec_s_own_names_do_not_get_in_the_way():
    class Collides(legacy.Codec):
        def __init__(self, node_id):
            super().__init__(node_id)
            self.weights = self.ctx = self.start = self.receive = self._result = self._done = 1

        def update(self):
            """Not the framework's hook of this name."""

        def update_blocks(self, block_weight):
            self.set_result(block_weight.content)

    cluster = LocalCluster(Collides)
    assert await cluster.step({0: [1.0], 1: [2.0]}) == {0: [1.0], 1: [2.0]}
    assert cluster.codecs[0].weights() is None


def test_record_writes_to_the_node_s_log():
    lines = []
    actor = examples.Relay.create(context(1, logger=lines.append))
    actor.stop()
    assert lines == ["Codec: Relay, Report: 1 is disposed."]
    actor.codec.record("outside of a job there is no log")
    assert len(lines) == 1


class Stuck(legacy.Codec):
    """Sends only when it is told to save itself."""

    def update_blocks(self, block_weight):
        self.content = block_weight.content

    def receive_blocks(self, content):
        self.set_result(content)

    def do_something_to_save_yourself(self):
        yield netEncapsulation(1 - self.node_id, self.content)


async def test_saving_itself_is_done_once_and_its_envelopes_are_sent():
    cluster = LocalCluster(Stuck)
    assert await cluster.step({0: [1.0], 1: [2.0]}) == {0: [2.0], 1: [1.0]}
    assert sorted(one[:3] for one in cluster.sent) == [(0, 1, 0), (1, 0, 0)]
    assert all(isinstance(one, Sent) for one in cluster.sent)


async def test_by_default_nothing_is_saved():
    class Lost(Stuck):
        do_something_to_save_yourself = legacy.Codec.do_something_to_save_yourself

    with pytest.raises(JobFailedError, match="node 0 in step 0, node 1 in step 0"):
        await LocalCluster(Lost).step({0: [1.0], 1: [2.0]})


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_second_model_is_combined_as_the_codec_says_or_added(mode):
    class Twice(legacy.Codec):
        def update_blocks(self, block_weight):
            self.set_result(block_weight.content)
            self.set_result(block_weight.content, lambda old, new: 10 * old + new)
            self.set_result(block_weight.content)

    cluster = LocalCluster(Twice, mode=mode, exchange="weights")
    assert await cluster.step({0: [1.0], 1: [2.0]}) == {0: [12.0], 1: [24.0]}


def test_the_actor_is_of_the_codec_s_own_module():
    assert type(Stuck.create(context())).__module__ == __name__
