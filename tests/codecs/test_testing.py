import asyncio
import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import pytest

from aiosgd.codecs import testing
from aiosgd.codecs.base import SERVER, WORKERS, Codec, Envelope
from aiosgd.codecs.local import Local
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster, Sent, wire_copy
from aiosgd.errors import CodecError, ConfigError, JobFailedError


class Recorder(Codec):
    """Sends its value to all and is done when it has heard from all."""

    accepts_late = False

    def start(self):
        self.events = []
        self.heard = {}

    async def update(self, block):
        self.events.append(("block", block.id, block.step, self.ctx.step))
        self.hear(block.step, self.ctx.node)
        return Envelope(WORKERS, block.step)

    async def receive(self, message):
        self.events.append(("message", message.sender, message.step, self.ctx.step))
        self.hear(message.step, message.sender)

    def hear(self, step, node):
        heard = self.heard.setdefault(step, set())
        heard.add(node)
        if heard == set(self.ctx.workers):
            self.set_result([np.float32(step)])


# a ring that passes values on: the acceptance test of what a hook may do


class ReturningRing(Codec):
    """All-gather on a ring: every message is kept, and passed on until it has been everywhere."""

    def start(self):
        self.values = {}

    @property
    def next(self):
        return (self.ctx.node + 1) % self.ctx.worker_count

    async def update(self, block):
        self.keep(block.id, block.value)
        return Envelope(self.next, (block.id, block.value))

    async def receive(self, message):
        origin, value = message.content
        self.keep(origin, value)
        return None if origin == self.next else Envelope(self.next, message.content)

    def keep(self, origin, value):
        self.values[origin] = value
        if len(self.values) == self.ctx.worker_count:
            self.set_result(sum(self.values[i] for i in sorted(self.values)) / len(self.values))
            self.values = {}


class YieldingRing(ReturningRing):
    async def update(self, block):
        yield Envelope(self.next, (block.id, block.value))
        self.keep(block.id, block.value)

    async def receive(self, message):
        origin, value = message.content
        if origin != self.next:
            yield Envelope(self.next, (origin, value))
        self.keep(origin, value)


class LateRing(ReturningRing):
    """Ends its step before it has passed everything on, as a relay may that accepts late ones.

    What it still gets of steps that it has left behind it passes on all the same.
    """

    accepts_late = True

    def start(self):
        self.steps = {}

    async def update(self, block):
        self.keep_in(block.step, block.id, block.value)
        return Envelope(self.next, (block.id, block.value))

    async def receive(self, message):
        origin, value = message.content
        self.keep_in(message.step, origin, value)
        return None if origin == self.next else Envelope(self.next, message.content)

    def keep_in(self, step, origin, value):
        values = self.steps.setdefault(step, {})
        values[origin] = value
        if step == self.ctx.step and self.ctx.node in values and len(values) >= 2:
            self.set_result(value)  # its own and one more: the rest is for others


@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("ring", [ReturningRing, YieldingRing])
@pytest.mark.parametrize("seed", range(15))
async def test_a_ring_that_passes_values_on_reaches_the_mean(ring, seed, fifo):
    cluster = LocalCluster(ring, workers=4, seed=seed, fifo=fifo)
    results = await cluster.run(lambda step, block: [block + 10 * step, 1.0], steps=3)
    for step, by_worker in enumerate(results):
        for worker in range(4):
            assert by_worker[worker].tolist() == [1.5 + 10 * step, 1.0]
    assert len(cluster.sent) == 3 * 4 * 3


@pytest.mark.parametrize("seed", range(10))
async def test_a_relay_that_accepts_late_messages_gets_all_of_them(seed):
    cluster = LocalCluster(LateRing, workers=4, seed=seed)
    await cluster.run(lambda step, block: [float(step)], steps=3)
    while cluster.pending:
        await cluster.deliver(*cluster.pending[0])
    assert cluster.late == 0
    for codec in cluster.codecs.values():
        assert {step: len(values) for step, values in codec.steps.items()} == {0: 4, 1: 4, 2: 4}


# order ----------------------------------------------------------------------------------------


async def test_the_same_seed_plays_the_same_order_and_others_play_others():
    async def play(seed):
        cluster = LocalCluster(Recorder, workers=3, seed=seed)
        await cluster.run(lambda step, block: 0.0, steps=3)
        return tuple(tuple(codec.events) for codec in cluster.codecs.values())

    assert await play(1) == await play(1)
    assert len({await play(seed) for seed in range(10)}) > 5


@pytest.mark.parametrize("seed", range(10))
async def test_messages_meet_a_worker_in_the_step_they_belong_to(seed):
    cluster = LocalCluster(Recorder, workers=4, seed=seed)
    await cluster.run(lambda step, block: 0.0, steps=4)
    for codec in cluster.codecs.values():
        assert len(codec.events) == 4 * 4
        assert all(step == now for *_, step, now in codec.events)


async def test_some_worker_runs_ahead_and_its_messages_are_kept_back():
    cluster = LocalCluster(Recorder, workers=2)
    cluster._extend(lambda worker, step: {worker: 0.0}, 2)
    await cluster.deliver(None, 0)
    await cluster.deliver(None, 1)
    await cluster.deliver(1, 0)
    await cluster.deliver(None, 0)  # step 1, while node 1 is in step 0
    assert [(one.sender, one.step) for one in cluster.sent] == [(0, 0), (1, 0), (0, 1)]
    assert cluster.pending == [(0, 1)]
    await cluster.deliver(0, 1)
    assert cluster.codecs[1].events[-1] == ("message", 0, 0, 0)
    assert set(cluster.pending) == {(None, 1), (0, 1)}
    await cluster.deliver(0, 1)
    assert cluster.codecs[1].events[-1] == ("message", 0, 1, 1)


@pytest.mark.parametrize("seed", range(10))
async def test_links_keep_their_order_unless_told_otherwise(seed):
    class Counting(Codec):
        def start(self):
            self.got = []

        async def update(self, block):
            if self.ctx.node == 0:
                return [Envelope(1, i) for i in range(6)]
            return None

        async def receive(self, message):
            self.got.append(message.content)

    async def play(fifo):
        cluster = LocalCluster(Counting, mode="async", seed=seed, fifo=fifo)
        await cluster.step({0: 0.0, 1: 0.0})
        return cluster.codecs[1].got

    assert await play(fifo=True) == list(range(6))
    assert await play(fifo=False) != list(range(6))


async def test_a_step_can_be_played_by_hand():
    cluster = LocalCluster(Plain, workers=2)
    cluster.begin({0: [1.0], 1: [3.0]})
    assert cluster.pending == [(None, 0), (None, 1)]
    await cluster.deliver(None, 1)
    assert cluster.pending == [(None, 0), (1, 0)]
    assert cluster.sent == [Sent(1, 0, 0, {"block": 1, "value": [3.0]})]
    await cluster.deliver(1, 0)
    await cluster.deliver(None, 0)
    assert cluster.results == [{0: [2.0]}]
    with pytest.raises(LookupError, match=r"\(1, 0\) is not pending; pending are \[\(0, 1\)\]"):
        await cluster.deliver(1, 0)
    with pytest.raises(LookupError, match=r"nodes \[1\] have not finished"):
        cluster.begin({0: [1.0], 1: [3.0]})
    await cluster.finish()
    assert cluster.results == [{0: [2.0], 1: [2.0]}]
    assert cluster.pending == []


async def test_values_are_given_per_worker_or_per_block():
    cluster = LocalCluster(Local, owners=[(0,), (1,), (0,)])
    assert await cluster.step({0: {2: 3.0, 0: 1.0}, 1: 5.0}) == {0: [2.0], 1: [5.0]}
    assert await cluster.step({0: {0: 2.0, 2: 4.0}, 1: {1: 6.0}}) == {0: [3.0], 1: [6.0]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: {0: 1.0, 2: 1.0}}, r"worker 1 has values for blocks \[\]; expected \[1\], or None"),
        ({0: {0: 1.0}, 1: 1.0}, r"worker 0 has values for blocks \[0\]; expected \[0, 2\]"),
        ({0: {0: 1.0, 1: 1.0, 2: 1.0}, 1: 1.0}, r"worker 0 has .* \[0, 1, 2\]; expected \[0, 2\]"),
        ({0: 1.0, 1: 1.0}, r"one value for worker 0, which computes blocks \[0, 2\]; expected {b"),
        ({0: None, 1: 1.0, 2: 1.0}, r"values for workers \[2\]; expected \[0, 1\]"),
        ({0: None, 1: 1.0, -1: 1.0}, r"values for workers \[-1\]; expected \[0, 1\]"),
    ],
)
async def test_unknown_and_missing_workers_and_blocks_are_refused(values, message):
    cluster = LocalCluster(Local, owners=[(0,), (1,), (0,)])
    with pytest.raises(ValueError, match=f"^{message}"):
        await cluster.step(values)
    assert cluster.results == []


async def test_a_worker_without_blocks_may_be_left_out():
    cluster = LocalCluster(FirstWins, owners=[(0,)])
    assert await cluster.step({0: [1.0]}) == {0: [1.0], 1: [1.0]}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("seed", range(5))
async def test_results_come_in_the_order_of_the_workers(seed, mode):
    cluster = LocalCluster(FirstWins, workers=4, seed=seed, mode=mode)
    for results in await cluster.run(lambda step, block: [1.0], steps=3):
        assert list(results) == [0, 1, 2, 3]


def test_the_exchange_is_the_codec_s_unless_given():
    class Weights(Local):
        exchange = "weights"

    exchanges = [
        LocalCluster(codec, servers=1, **facts).codecs[node].ctx.exchange
        for codec, facts in ((Weights, {}), (Local, {}), (Weights, {"exchange": "updates"}))
        for node in (0, -1)
    ]
    assert exchanges == ["weights"] * 2 + ["gradients"] * 2 + ["updates"] * 2


async def test_owners_say_who_computes_what():
    cluster = LocalCluster(Local, workers=2, owners=[(1,), (0, 1), (1,)])
    assert cluster.codecs[1].ctx.blocks == (0, 1, 2)
    assert cluster.codecs[0].ctx.blocks == (1,)


# late, skipped, stuck -------------------------------------------------------------------------


class FirstWins(Codec):
    """Done with whatever comes first."""

    def start(self):
        self.updates = 0

    async def update(self, block):
        self.updates += 1
        self.set_result(block.value)
        return Envelope(WORKERS, block.value)

    async def receive(self, message):
        self.set_result(message.content)


async def test_what_comes_late_is_counted_and_own_blocks_of_a_finished_step_are_skipped():
    cluster = LocalCluster(FirstWins, workers=2)
    cluster.begin({0: [1.0], 1: [2.0]})
    await cluster.deliver(None, 0)
    await cluster.deliver(0, 1)
    assert cluster.results == [{0: [1.0], 1: [1.0]}]
    assert cluster.pending == []  # the block of worker 1 is skipped
    assert cluster.codecs[1].updates == 0
    cluster.begin({0: [3.0], 1: [4.0]})
    await cluster.deliver(None, 0)
    await cluster.deliver(None, 1)
    await cluster.deliver(0, 1)
    await cluster.deliver(1, 0)
    assert cluster.results[1] == {0: [3.0], 1: [4.0]}
    assert cluster.late == 2


class Needy(Codec):
    """Forgets to send until it is rescued."""

    def start(self):
        self.rescues = 0

    async def update(self, block):
        self.value = block.value
        if self.ctx.node == 0:
            self.set_result(block.value)

    async def receive(self, message):
        if message.content == "help":
            return Envelope(message.sender, self.value)
        self.set_result(message.content)
        return None

    async def rescue(self):
        self.rescues += 1
        return Envelope(0, "help")


class Answering(Needy):
    accepts_late = True


class Hopeless(Needy):
    async def rescue(self):
        self.rescues += 1


async def test_a_stuck_step_is_rescued_once_per_waiting_node():
    cluster = LocalCluster(Answering, workers=3)
    for _ in range(2):
        results = await cluster.step({0: [1.0], 1: [2.0], 2: [3.0]})
        assert results == {0: [1.0], 1: [1.0], 2: [1.0]}
    assert [codec.rescues for codec in cluster.codecs.values()] == [0, 2, 2]
    assert Sent(2, 0, 1, "help") in cluster.sent


async def test_a_step_that_stays_stuck_names_the_nodes_that_wait():
    cluster = LocalCluster(Hopeless, workers=3)
    with pytest.raises(JobFailedError, match=r"missing: node 1 in step 0, node 2 in step 0$"):
        await cluster.step({0: [1.0], 1: [2.0], 2: [3.0]})
    assert [codec.rescues for codec in cluster.codecs.values()] == [0, 1, 1]


async def test_a_rescue_may_set_the_result_itself():
    class Giving(Needy):
        async def rescue(self):
            self.set_result(self.value)

    assert await LocalCluster(Giving).step({0: [1.0], 1: [2.0]}) == {0: [1.0], 1: [2.0]}


# async ----------------------------------------------------------------------------------------


class Pushes(Codec):
    """Tells the other worker its value and takes what it gets."""

    async def update(self, block):
        return Envelope(1 - self.ctx.node, block.value)

    async def receive(self, message):
        self.set_result(message.content)


@pytest.mark.parametrize("seed", range(10))
async def test_async_workers_never_wait_and_nothing_gets_lost(seed):
    cluster = LocalCluster(Pushes, mode="async", seed=seed)
    results = await cluster.run(lambda step, block: [2.0**step * 100**block], steps=6)
    totals = [sum(one[worker] for one in results if one[worker] is not None) for worker in (0, 1)]
    assert totals == [[63 * 100], [63]]
    assert all(set(one) == {0, 1} for one in results)


async def test_an_async_step_without_news_has_no_result():
    cluster = LocalCluster(Pushes, mode="async")
    cluster._extend(lambda worker, step: {worker: [step + 1.0]}, 3)
    await cluster.deliver(None, 0)
    await cluster.deliver(None, 1)
    await cluster.deliver(1, 0)
    await cluster.deliver(None, 0)
    assert cluster.results[:2] == [{0: None, 1: None}, {0: [1.0]}]
    await cluster.finish()
    assert cluster.results[1:] == [{0: [1.0], 1: cluster.results[1][1]}, cluster.results[2]]
    assert not cluster.pending


async def test_async_step_of_a_worker_without_blocks():
    assert await LocalCluster(Pushes, mode="async").step({0: [1.0], 1: None}) == {
        0: None,
        1: [1.0],
    }


# servers --------------------------------------------------------------------------------------


class Doubling(Codec):
    async def receive(self, message):
        yield Envelope(message.sender, (self.ctx.step, 2 * message.content))


class Asks(Codec):
    server = Doubling

    async def update(self, block):
        return Envelope(SERVER, block.value)

    async def receive(self, message):
        step, value = message.content
        assert step == message.step == self.ctx.step
        self.set_result(value)


@pytest.mark.parametrize("seed", range(5))
async def test_a_server_is_in_the_step_of_the_message_it_handles(seed):
    cluster = LocalCluster(Asks, workers=3, seed=seed)
    results = await cluster.run(lambda step, block: [step + block / 8], steps=3)
    assert results[2] == {0: [4.0], 1: [4.25], 2: [4.5]}
    assert cluster.servers == (-1,)


async def test_there_may_be_more_servers_or_another_server_codec():
    class Tripling(Codec):
        async def receive(self, message):
            yield Envelope(message.sender, (message.step, 3 * message.content))

    cluster = LocalCluster(Asks, servers=2, server_codec=Tripling)
    assert set(cluster.codecs) == {0, 1, -1, -2}
    assert await cluster.step({0: [1.0], 1: [2.0]}) == {0: [3.0], 1: [6.0]}


@dataclass(frozen=True)
class Turn:
    turn: int = 3


def test_parameters_reach_both_halves():
    class Half(Codec):
        pass

    class OwnHalf(Codec):
        Params = Turn

    class Whole(Codec):
        Params = Turn

        async def update(self, block):
            pass

    shared = LocalCluster(Whole, server_codec=Half, params={"turn": 5})
    assert shared.codecs[0].ctx.params == shared.codecs[-1].ctx.params == Turn(5)
    apart = LocalCluster(Whole, server_codec=OwnHalf, params={"turn": 5}, server_params={"turn": 7})
    assert [apart.codecs[i].ctx.params.turn for i in (0, -1)] == [5, 7]
    with pytest.raises(ConfigError, match=r"codec\.trun"):
        LocalCluster(Whole, params={"trun": 1})
    with pytest.raises(ConfigError, match=r"server_codec\.turn"):
        LocalCluster(Whole, server_codec=OwnHalf, server_params={"turn": "x"})


def test_a_mode_that_the_codec_is_not_made_for_is_refused():
    class SyncOnly(Codec):
        modes = ("sync",)

    with pytest.raises(ConfigError, match=r"mode is 'async'; SyncOnly is made for \('sync',\)"):
        LocalCluster(SyncOnly, mode="async")


def test_contexts_differ_where_they_should():
    cluster = LocalCluster(
        Local, workers=2, servers=2, seed=3, initial=[1.0, 2.0], steps=9, shapes={"w": (2,)}
    )
    contexts = [codec.ctx for codec in cluster.codecs.values()]
    assert len({ctx.rng.random() for ctx in contexts}) == 4
    assert {ctx.node: ctx.role for ctx in contexts} == {
        0: "worker",
        1: "worker",
        -1: "server",
        -2: "server",
    }
    assert all(ctx.server == -1 and ctx.steps == 9 for ctx in contexts)
    assert all(ctx.initial.tolist() == [1, 2] and ctx.shapes == {"w": (2,)} for ctx in contexts)


def test_the_seed_decides_the_nodes_random_numbers():
    def draw(seed):
        return LocalCluster(Local, seed=seed).codecs[1].ctx.rng.random()

    assert draw(3) == draw(3) != draw(4)


def test_stop_reaches_every_codec():
    class Stopping(Local):
        stopped = False

        def stop(self):
            self.stopped = True

    cluster = LocalCluster(Stopping, workers=2, servers=1)
    cluster.stop()
    assert all(codec.stopped for codec in cluster.codecs.values())


def test_the_cluster_says_how_far_it_is():
    cluster = LocalCluster(Plain, workers=2)
    cluster.begin({0: 1.0, 1: 2.0})
    assert repr(cluster) == "LocalCluster(Plain, sync, in steps [0, 0], 2 pending)"


# strictness -----------------------------------------------------------------------------------


class Misbehaving(Codec):
    """Does one thing wrong, in the hook that its class names."""

    async def update(self, block):
        self.value = block.value.copy()
        return Envelope(1 - self.ctx.node, self.value)

    async def receive(self, message):
        self.set_result(message.content)


class ChangesWhatItGot(Misbehaving):
    async def receive(self, message):
        content = message.content
        content += 1


class MakesItWritable(Misbehaving):
    async def receive(self, message):
        message.content.flags.writeable = True


class ChangesItsBlock(Misbehaving):
    async def update(self, block):
        block.value[0] = 0


class ChangesTheInitialWeights(Misbehaving):
    async def update(self, block):
        self.ctx.initial[0] = 0


class SendsASet(Misbehaving):
    async def update(self, block):
        return Envelope(1, {"ids": {1, 2}})


class SendsToNobody(Misbehaving):
    async def update(self, block):
        yield Envelope(7, None)


class SendsRubbish(Misbehaving):
    async def update(self, block):
        return "rubbish"


class IsNotAsync(Misbehaving):
    def update(self, block):
        return None


class Raises(Misbehaving):
    async def receive(self, message):
        raise ZeroDivisionError("what a pity")


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (ChangesWhatItGot, "receive failed on node . in step 0: .*read-only"),
        (MakesItWritable, "receive failed on node . in step 0: .*WRITEABLE"),
        (ChangesItsBlock, "update failed on node . in step 0: .*read-only"),
        (ChangesTheInitialWeights, "update failed on node . in step 0: .*read-only"),
        (SendsASet, r"update failed on node . in step 0: TypeError: {1, 2} \(set\) cannot be"),
        (SendsToNobody, "update failed on node . in step 0: .*node 7, which the job does not"),
        (SendsRubbish, "update failed on node . in step 0: .*gave str; expected an Envelope"),
        (IsNotAsync, "update failed on node . in step 0: .*not `async def`"),
        (Raises, "receive failed on node . in step 0: ZeroDivisionError: what a pity"),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_broken_contract_names_codec_hook_node_and_step(codec, message, mode):
    cluster = LocalCluster(codec, mode=mode, initial=[0.0])
    with pytest.raises(CodecError, match=f"^codec {codec.__name__}: {message}"):
        await cluster.step({0: [1.0], 1: [2.0]})


async def test_a_codec_that_changes_what_it_sent_is_caught_at_delivery():
    cluster = LocalCluster(Misbehaving)
    cluster.begin({0: [1.0], 1: [2.0]})
    await cluster.deliver(None, 0)
    cluster.codecs[0].value[0] = 5
    with pytest.raises(CodecError, match="Misbehaving on node 0 changed an array after it was"):
        await cluster.deliver(0, 1)


async def test_receivers_do_not_share_what_they_get():
    class Appends(Codec):
        async def update(self, block):
            if self.ctx.node == 0:
                self.set_result([0])
                return Envelope(WORKERS, {"list": []})
            return None

        async def receive(self, message):
            message.content["list"].append(self.ctx.node)
            self.set_result(message.content["list"])

    cluster = LocalCluster(Appends, workers=3)
    assert await cluster.step({0: 0.0, 1: 0.0, 2: 0.0}) == {0: [0], 1: [1], 2: [2]}
    assert {str(one.content) for one in cluster.sent} == {"{'list': []}"}


@pytest.mark.parametrize("result", [np.zeros(3), np.zeros((2, 1)), 0.0])
async def test_a_result_of_another_shape_is_refused(result):
    class WrongShape(Codec):
        async def update(self, block):
            self.set_result(result)

    for initial, value in (([0.0, 0.0], 1.0), ((), [0.0, 0.0])):
        cluster = LocalCluster(WrongShape, initial=initial)
        with pytest.raises(CodecError, match=r"WrongShape on node . in step 0: set_result got sha"):
            await cluster.step({0: value, 1: value})


class NeverReturns(Codec):
    async def update(self, block):
        if self.ctx.node == 1:
            await asyncio.get_running_loop().create_future()


async def test_a_hook_that_never_returns_is_named(monkeypatch):
    monkeypatch.setattr(testing, "HOOK_LIMIT", 0.001)
    cluster = LocalCluster(NeverReturns)
    cluster.begin({0: 1.0, 1: 1.0})
    await cluster.deliver(None, 0)
    with pytest.raises(CodecError) as caught:
        await cluster.deliver(None, 1)
    assert str(caught.value) == (
        "codec NeverReturns: update failed on node 1 in step 0: has not returned within 0.001 s"
    )


@pytest.mark.parametrize("error", [TimeoutError, SystemExit])
async def test_a_hook_s_own_timeout_or_exit_is_told_as_such(error):
    class GivesUp(Local):
        async def update(self, block):
            raise error("mine")

    with pytest.raises(CodecError, match=f"in step 0: {error.__name__}: mine$"):
        await LocalCluster(GivesUp, workers=1).step({0: 1.0})


# the wire -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: int
    b: np.ndarray


class Colour(IntEnum):
    RED = 3


@pytest.mark.parametrize(
    "content",
    [None, True, 0, -(2**63), 2**64 - 1, 1.5, "text", b"bytes", [], (), {}, [1, (2, [3])]],
)
def test_plain_content_arrives_as_it_was_sent(content):
    arrived = wire_copy(content)
    assert arrived == content
    assert type(arrived) is type(content)


@pytest.mark.parametrize(
    ("content", "arrives"),
    [(Colour.RED, 3), (bytearray(b"x"), b"x"), (memoryview(b"x"), b"x"), (Pair(1, 2), (1, 2))],
)
def test_special_content_arrives_as_its_plain_form(content, arrives):
    assert wire_copy(content) == arrives
    assert type(wire_copy(content)) is type(arrives)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1", "?", "c8", "f2"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_arrays_arrive_as_equal_read_only_copies(dtype, shape):
    array = np.ones(shape, dtype)
    arrived = wire_copy({"a": [array]})["a"][0]
    assert arrived.dtype == array.dtype
    assert np.array_equal(arrived, array)
    assert arrived.shape == shape
    assert not arrived.flags.writeable
    assert not np.shares_memory(arrived, array)


def test_views_arrive_in_their_own_shape():
    array = np.arange(6).reshape(2, 3).T[::2]
    assert wire_copy(array).tolist() == array.tolist()


def test_numpy_scalars_stay_numpy_scalars():
    arrived = wire_copy((np.float32(0.1), np.int64(3)))
    assert [type(one) for one in arrived] == [np.float32, np.int64]


@pytest.mark.parametrize(
    "content",
    [{1}, object(), 2**64, -(2**63) - 1, 1j, np.array([None]), np.array(["x"]), [{"a": range(3)}]],
)
def test_what_the_wire_does_not_take_is_refused(content):
    with pytest.raises(TypeError, match="cannot be sent"):
        wire_copy(content)


async def test_without_initial_weights_the_first_value_says_how_many_zeros_they_are():
    cluster = LocalCluster(Plain, workers=2)
    await cluster.step({0: [1.0, 2.0, 3.0], 1: [0.0, 0.0, 0.0]})
    for codec in cluster.codecs.values():
        assert codec.ctx.initial.tolist() == [0, 0, 0]
        assert not codec.ctx.initial.flags.writeable


async def test_every_order_of_four_events_is_reached():
    orders = set()
    for seed in range(300):
        cluster = LocalCluster(Recorder, workers=2, seed=seed)
        await cluster.step({0: 0.0, 1: 0.0})
        orders.add(tuple(tuple(e[0] for e in codec.events) for codec in cluster.codecs.values()))
    two = ("block", "message"), ("message", "block")
    # a message cannot come before the block that it was made of was handed in, on both sides
    assert orders == set(itertools.product(two, two)) - {(two[1], two[1])}


# what a checker of codecs needs ---------------------------------------------------------------


async def test_a_schedule_decides_the_order_and_leaves_the_random_numbers():
    class Draws(Recorder):
        def start(self):
            super().start()
            self.drawn = self.ctx.rng.random()

    async def play(schedule):
        cluster = LocalCluster(Draws, workers=3, seed=5, schedule=schedule)
        await cluster.run(lambda step, block: 0.0, steps=3)
        order = tuple(tuple(codec.events) for codec in cluster.codecs.values())
        return order, [codec.drawn for codec in cluster.codecs.values()]

    plays = [await play(schedule) for schedule in range(10)]
    assert len({order for order, _ in plays}) > 5
    assert all(drawn == plays[0][1] for _, drawn in plays)


async def test_a_witness_sees_both_ends_of_each_message():
    seen = []
    cluster = LocalCluster(Plain, workers=2, witness=seen.append)
    cluster.begin({0: [1.0], 1: [3.0]})
    for place in ((None, 1), (1, 0), (None, 0), (0, 1)):
        await cluster.deliver(*place)
    assert [(one.kind, one.node, one.peer, one.step, one.number) for one in seen] == [
        ("update", 1, None, 0, 0),
        ("send", 1, 0, 0, 1),
        ("deliver", 0, 1, 0, 1),
        ("update", 0, None, 0, 0),
        ("send", 0, 1, 0, 2),
        ("result", 0, None, 0, 0),
        ("deliver", 1, 0, 0, 2),
        ("result", 1, None, 0, 0),
    ]
    assert seen[0].what.id == 1
    assert seen[-1].what == [2.0]


async def test_a_witness_sees_what_comes_too_late():
    seen = []
    cluster = LocalCluster(FirstWins, workers=2, witness=seen.append)
    cluster.begin({0: [1.0], 1: [2.0]})
    for place in ((None, 0), (None, 1), (1, 0)):
        await cluster.deliver(*place)
    assert seen[-1][:4] == ("drop", 0, 1, 0)


@pytest.mark.parametrize("seed", range(5))
async def test_blocks_may_depend_on_the_results_before(seed):
    cluster = LocalCluster(Plain, workers=2, seed=seed)

    def feed(worker, step):
        before = cluster.results[step - 1][worker][0] if step else 0.0
        return {worker: [before + worker]}

    results = await cluster.train(feed, 4)
    assert [one[0].tolist() for one in results] == [[0.5], [1.0], [1.5], [2.0]]
