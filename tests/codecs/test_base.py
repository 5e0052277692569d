import numpy as np
import pytest

from aiosgd.codecs.base import (
    SERVER,
    WORKERS,
    Block,
    Codec,
    Context,
    Envelope,
    mean,
    mixture,
    pass_on,
)
from aiosgd.errors import CodecError


def context(node=0, **facts):
    facts = {
        "role": "server" if node < 0 else "worker",
        "workers": (0, 1, 2, 3),
        "servers": (-1, -2),
        "server": -2,
        "block_owners": ((0, 1), (0, 2), (2, 3)),
    } | facts
    return Context(node=node, **facts)


# what a codec knows ---------------------------------------------------------------------------


def test_a_block_shows_each_parameter_in_its_shape():
    shapes = {"w": (2, 3), "b": (3,), "scale": ()}
    block = Block(0, 0, np.arange(10, dtype=np.float32), 8, shapes)
    assert block.view("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert block.view("b").tolist() == [6, 7, 8]
    assert block.view("scale") == 9
    assert np.shares_memory(block.view("b"), block.value)
    with pytest.raises(KeyError, match="bias"):
        block.view("bias")


def test_the_context_counts_and_finds_blocks():
    ctx = context(node=2)
    assert (ctx.worker_count, ctx.block_count, ctx.redundancy) == (4, 3, 2)
    assert ctx.blocks == (1, 2)
    assert ctx.blocks_of(3) == (2,)
    assert ctx.blocks_of(-1) == ()
    assert ctx.workers_with(1) == (0, 2)
    assert ctx.workers_without(1) == (1, 3)


def test_workers_with_and_without_a_block_are_all_workers():
    ctx = context()
    for block in range(ctx.block_count):
        owners, others = ctx.workers_with(block), ctx.workers_without(block)
        assert sorted(owners + others) == list(ctx.workers)


@pytest.mark.parametrize("node", [0, 3, -1])
def test_mixing_weights_add_up_to_one_over_the_neighbours_and_the_node_itself(node):
    ctx = context(node)
    assert sum(ctx.weights.values()) == pytest.approx(1)
    assert set(ctx.weights) == {*ctx.neighbours, node} - {-1}
    assert node not in ctx.neighbours


class Turns:
    """A topology of workers 0 … 3: each sends to the next, in odd steps to the one after that."""

    period = 2

    def __init__(self):
        self.asked = 0

    def receivers(self, worker, step=0):
        return ((worker + 1 + step % 2) % 4,)

    def weights(self, worker, step=0):
        self.asked += 1
        return {worker: 0.75, (worker - 1 - step % 2) % 4: 0.25}


def test_a_topology_says_whom_a_worker_sends_to_and_hears_from_in_each_step():
    ctx = context(3, topology=Turns())
    seen = []
    for ctx.step in (0, 1, 2, 5):
        seen.append((ctx.neighbours, dict(ctx.weights)))
    even, odd = ((0,), {3: 0.75, 2: 0.25}), ((1,), {3: 0.75, 1: 0.25})
    assert seen == [even, odd, even, odd]


def test_weights_are_asked_for_once_per_turn():
    topology = Turns()
    ctx = context(topology=topology)
    assert [ctx.weights is ctx.weights for ctx.step in (0, 0, 2, 3, 4)] == [True] * 5
    assert topology.asked == 3


def test_a_topology_is_of_workers_alone_and_does_not_change_who_the_workers_are():
    server, worker = context(-1, topology=Turns()), context(1, topology=Turns())
    assert server.neighbours == (0, 1, 2, 3)
    assert dict(server.weights) == dict.fromkeys(range(4), 0.25)
    assert worker.neighbours == (2,)
    assert worker.resolve(WORKERS) == (0, 2, 3)


@pytest.mark.parametrize(
    ("to", "ids"),
    [
        (1, (1,)),
        (np.int64(3), (3,)),
        (-1, (-1,)),
        ([1, 2], (1, 2)),
        ((i for i in (3, 1)), (3, 1)),
        (np.array([0, 2]), (0, 2)),
        ((), ()),
        (SERVER, (-2,)),
        (WORKERS, (1, 2, 3)),
    ],
)
def test_a_target_stands_for_node_ids(to, ids):
    assert context(node=0).resolve(to) == ids


def test_workers_means_all_of_them_to_a_server():
    assert context(node=-1).resolve(WORKERS) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (4, "node 4, which the job does not have"),
        ([0, -3], "node -3, which the job does not have"),
        ("server", "expected a node id, ids, SERVER or WORKERS"),
        (1.0, "expected a node id"),
        (None, "expected a node id"),
        ([None], "expected a node id"),
    ],
)
def test_what_is_no_target_is_refused(to, message):
    with pytest.raises(ValueError, match=message):
        context().resolve(to)


def test_server_needs_a_server():
    with pytest.raises(ValueError, match="no server"):
        context(servers=(), server=None).resolve(SERVER)


def test_log_writes_text_to_the_node_s_log():
    lines = []
    context(logger=lines.append).log({"a": 1})
    context().log("nobody listens")
    assert lines == ["{'a': 1}"]


async def test_run_gives_the_function_s_value_with_and_without_an_executor():
    async def executor(function, *args):
        return ["in the executor", function(*args)]

    assert await context().run(max, 1, 2) == 2
    assert await context(executor=executor).run(max, 1, 2) == ["in the executor", 2]


def test_without_a_compressor_the_array_is_its_own_payload():
    array = np.arange(3.0)
    assert context().compress(array, "s") is array
    assert context().decompress(array) is array


def test_a_compressor_gets_array_and_stream():
    class Tagging:
        def compress(self, array, stream):
            return {"stream": stream, "half": array / 2}

        def decompress(self, payload):
            return payload["half"] * 2

    ctx = context(compressor=Tagging())
    payload = ctx.compress(np.array([4.0]), "block 3")
    assert payload == {"stream": "block 3", "half": [2.0]}
    assert ctx.decompress(payload) == [4.0]


def test_exact_is_what_sends_arrays_as_they_are():
    class Compressor:
        def __init__(self, scale):
            self.scale = scale

        def compress(self, array, stream):
            assert stream is None
            return array if self.scale is None else array * self.scale

    assert context().is_exact
    assert context(compressor=Compressor(None)).is_exact
    assert not context(compressor=Compressor(1)).is_exact


# results --------------------------------------------------------------------------------------


class Silent(Codec):
    async def update(self, block):
        pass


def test_a_result_is_taken_once():
    codec = Silent()
    value = np.ones(2)
    assert not codec.is_done
    codec.set_result(value)
    assert codec.is_done
    assert codec.take_result() is value
    assert not codec.is_done
    with pytest.raises(LookupError, match="Silent has no result"):
        codec.take_result()


def test_results_of_one_step_combine_by_the_operation_addition_by_default():
    codec = Silent.create(context())
    codec.set_result(np.array([1.0]), np.subtract)
    codec.set_result(np.array([5.0]), np.subtract)
    codec.set_result(np.array([2.0]))
    assert codec.take_result() == [1.0 - 5.0 + 2.0]
    codec.set_result(np.array([7.0]))
    assert codec.take_result() == [7.0]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_second_model_in_one_step_needs_an_operation(mode):
    codec = Silent.create(context(mode=mode, exchange="weights"))
    codec.set_result(np.array([1.0]))
    with pytest.raises(ValueError, match="a second result in one step: weights are not added"):
        codec.set_result(np.array([2.0]))
    codec.set_result(np.array([3.0]), lambda old, new: new)
    assert codec.take_result() == [3.0]
    codec.set_result(np.array([4.0]))  # another step
    assert codec.take_result() == [4.0]


def test_instances_do_not_share_results():
    one, other = Silent(), Silent()
    one.set_result(1)
    assert not other.is_done


def test_create_puts_the_context_in_place():
    ctx = context()
    assert Silent.create(ctx).ctx is ctx


def test_only_a_server_s_codec_may_do_without_update():
    class ReceivesOnly(Codec):
        async def receive(self, message):
            pass

    assert isinstance(ReceivesOnly.create(context(-1)), ReceivesOnly)
    with pytest.raises(CodecError, match=r"ReceivesOnly has no update\(block\)"):
        ReceivesOnly.create(context(0))


# hooks ----------------------------------------------------------------------------------------

ONE, TWO = Envelope(1, "one"), Envelope(2, "two")


async def gives(value):
    return value


async def yields(*values):
    for value in values:
        yield value


async def collect(hook):
    sent = []
    assert await pass_on(hook, sent.append) == len(sent)
    return sent


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (lambda: gives(None), []),
        (lambda: gives(ONE), [ONE]),
        (lambda: gives([ONE, TWO]), [ONE, TWO]),
        (lambda: gives(e for e in (ONE, TWO)), [ONE, TWO]),
        (lambda: gives(()), []),
        (yields, []),
        (lambda: yields(ONE, TWO), [ONE, TWO]),
        (lambda: Silent().receive(None), []),
        (lambda: Silent().rescue(), []),
        (lambda: Codec().update(None), []),
    ],
)
async def test_hooks_send_whichever_way_they_are_written(hook, expected):
    assert await collect(hook()) == expected


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda: None, "not `async def`: it returned NoneType"),
        (lambda: [ONE], "not `async def`: it returned list"),
        (lambda: gives(3), "returned int; expected None, Envelope or several"),
        (lambda: gives([ONE, "two"]), "gave str; expected an Envelope"),
        (lambda: yields(ONE, None), "gave NoneType; expected an Envelope"),
    ],
)
async def test_a_hook_that_gives_something_else_is_told_so(hook, message):
    with pytest.raises(TypeError, match=message):
        await collect(hook())


async def test_envelopes_come_one_by_one_as_the_hook_yields_them():
    reached = []

    async def hook():
        reached.append(1)
        yield ONE
        reached.append(2)
        yield TWO

    await pass_on(hook(), reached.append)
    assert reached == [1, ONE, 2, TWO]


# mean -----------------------------------------------------------------------------------------


def test_the_mean_has_the_same_bits_in_any_order_of_arrival():
    rng = np.random.default_rng(0)
    values = {i: (rng.normal(size=50) * 10.0**i).astype(np.float32) for i in range(8)}
    expected = mean(values)
    in_arrival_order = set()
    for _ in range(20):
        shuffled = {int(i): values[int(i)] for i in rng.permutation(8)}
        assert mean(shuffled).tobytes() == expected.tobytes()
        in_arrival_order.add((sum(shuffled.values()) / 8).tobytes())
    assert len(in_arrival_order) > 1  # so the order did matter


def test_the_mean_changes_no_value_and_keeps_float32():
    values = {0: np.array([1, 3], np.float32), 1: np.array([3, 3], np.float32)}
    for value in values.values():
        value.flags.writeable = False
    assert mean(values).tolist() == [2, 3]
    assert mean(values).dtype == np.float32


def test_the_mean_of_one_value_is_a_copy_of_it():
    value = np.array([0.1], np.float32)
    result = mean({5: value})
    assert result == value
    assert not np.shares_memory(result, value)


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="values"):
        mean({})


def test_groups_print_as_they_are_written():
    assert repr(Envelope(SERVER, WORKERS)) == "Envelope(to=SERVER, content=WORKERS)"


def test_a_mixture_is_a_weighted_sum_in_the_order_of_the_ids():
    rng = np.random.default_rng(0)
    values = {key: rng.normal(size=50).astype(np.float32) for key in (2, 0, 1)}
    weights = {1: 0.2, 2: 0.7, 0: 0.1}
    found = mixture(values, weights)
    np.testing.assert_allclose(found, sum(weights[j] * values[j] for j in range(3)), rtol=1e-5)
    backwards = {key: values[key] for key in (1, 0, 2)}
    out = np.empty(50, np.float32)
    assert mixture(backwards, dict(sorted(weights.items())), out) is out
    assert out.tobytes() == found.tobytes()
    assert found.dtype == np.float32


def test_a_mixture_of_equal_weights_is_the_mean():
    values = {
        key: np.random.default_rng(key).normal(size=50).astype(np.float32) for key in range(3)
    }
    found = mixture(values, dict.fromkeys(range(3), 1 / 3))
    assert found.tobytes() == mean(values).tobytes()
