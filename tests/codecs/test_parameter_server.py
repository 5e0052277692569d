import numpy as np
import pytest

from aiosgd.codecs.parameter_server import ParameterServer
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import ConfigError

INITIAL = np.linspace(-1, 1, 20, dtype=np.float32)


def updates(step, block):
    return np.random.default_rng([step, block]).normal(size=20) * 10.0 ** (block % 5 - 4)


def cluster_of(workers, **facts):
    return LocalCluster(ParameterServer, workers=workers, initial=INITIAL, **facts)


def final_weights(results, worker):
    """Return what a worker holds in the end: float32, one addition per result."""
    weights = INITIAL.copy()
    for step in results:
        if step[worker] is not None:
            weights += step[worker]
    return weights


class Coarse:
    """A lossy compressor without memory: the largest quarter of the values, at half precision."""

    def __init__(self, rng):
        pass

    def compress(self, array, stream):
        kept = np.argsort(-np.abs(array), kind="stable")[: array.size // 4]
        return {"size": array.size, "at": kept, "values": array[kept].astype(np.float16)}

    def decompress(self, payload):
        array = np.zeros(payload["size"], np.float32)
        array[payload["at"]] = payload["values"]
        return array


@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("seed", range(10))
async def test_sync_results_have_the_same_bits_whatever_the_order(seed, fifo):
    reference = cluster_of(5, seed=1000)
    expected = await reference.run(updates, steps=4)
    cluster = cluster_of(5, seed=seed, fifo=fifo)
    results = await cluster.run(updates, steps=4)
    for step in range(4):
        found = {one.tobytes() for one in (*results[step].values(), *expected[step].values())}
        assert len(found) == 1
    assert cluster.codecs[-1].weights().tobytes() == reference.codecs[-1].weights().tobytes()


@pytest.mark.parametrize("seed", range(5))
async def test_sync_updates_are_applied_as_plain_s_mean(seed):
    served = await cluster_of(4, seed=seed).run(updates, steps=3)
    plain = await LocalCluster(Plain, workers=4).run(updates, steps=3)
    for step in range(3):
        np.testing.assert_allclose(served[step][0], plain[step][0], atol=1e-6)


@pytest.mark.parametrize("part", [4, 12, 76, 80, 1 << 20])
@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_sync_parts_change_no_bit_of_plain_s_mean(seed, redundancy, part):
    facts = {"workers": 3, "redundancy": redundancy}
    plain = await LocalCluster(Plain, **facts).run(updates, steps=4)
    cluster = cluster_of(**facts, seed=seed, params={"part": part})
    served = await cluster.run(updates, steps=4)
    for ours, theirs in zip(served, plain, strict=True):
        for worker in range(3):
            assert ours[worker].tobytes() == theirs[worker].tobytes()
    assert final_weights(served, 1).tobytes() == cluster.codecs[-1].weights().tobytes()


async def test_sync_a_part_s_answer_leaves_before_the_other_parts_are_there():
    cluster = cluster_of(2, params={"part": 24})  # 6, 6, 6 and 2 elements
    cluster.begin({worker: updates(0, worker) for worker in (0, 1)})
    for worker in (0, 1):
        await cluster.deliver(None, worker)
    assert [one.content["start"] for one in cluster.sent] == [0, 6, 12, 18] * 2
    await cluster.deliver(0, -1)
    await cluster.deliver(0, -1)
    assert (-1, 0) not in cluster.pending
    await cluster.deliver(1, -1)
    answers = [one for one in cluster.sent if one.sender == -1]
    assert [(one.to, one.content["start"]) for one in answers] == [(0, 0), (1, 0)]
    assert list(cluster.codecs[-1].updates[6]) == [0]
    await cluster.finish()
    server, workers = cluster.codecs[-1], (cluster.codecs[0], cluster.codecs[1])
    assert not any(server.updates.values())
    assert not any(hasattr(worker, "result") for worker in workers)


@pytest.mark.parametrize(("part", "parts"), [(4, 20), (7, 20), (24, 4), (76, 2), (80, 1), (84, 1)])
async def test_sync_traffic_is_each_block_once_up_and_once_down_in_parts(part, parts):
    cluster = cluster_of(3, params={"part": part})
    await cluster.run(updates, steps=1)
    for ends in [(0, -1), (1, -1), (-1, 1), (-1, 2)]:
        sent = [one.content for one in cluster.sent if (one.sender, one.to) == ends]
        assert len(sent) == parts
        assert sum(one.get("update", one.get("difference")).size for one in sent) == 20


@pytest.mark.parametrize(("mode", "compressor"), [("async", None), ("sync", Coarse)])
async def test_async_and_compressed_updates_are_never_cut(mode, compressor):
    facts = {"mode": mode, "compressor": compressor, "steps": 2, "params": {"part": 4}}
    cluster = cluster_of(2, **facts)
    await cluster.run(updates, steps=2)
    assert {one.content["start"] for one in cluster.sent} == {0}
    assert len([one for one in cluster.sent if one.to == -1]) == 4


async def test_sync_without_loss_the_weights_are_their_own_mirror():
    for facts, shared in (({}, True), ({"compressor": Coarse}, False), ({"mode": "async"}, False)):
        server = cluster_of(2, **facts).codecs[-1]
        assert {mirror is server.state for mirror in server.mirrors.values()} == {shared}


async def test_all_memory_is_the_node_s():
    taken = []

    def memory(size):
        taken.append(np.zeros(size, np.uint8))
        return taken[-1]

    cluster = cluster_of(2, params={"part": 24}, memory=memory)
    results = await cluster.run(updates, steps=1)
    for result in results[0].values():
        assert sum(np.shares_memory(result, piece) for piece in taken) == 1
    assert sorted(piece.size for piece in taken) == [8, 24, 24, 24, 80, 80]
    taken.clear()
    cluster = cluster_of(2, mode="async", steps=1, memory=memory)
    await cluster.run(updates, steps=1)
    assert {piece.size for piece in taken} == {80}
    assert len(taken) == len([one for one in cluster.sent if one.sender == -1])


async def test_a_vector_without_elements_is_served_too():
    cluster = LocalCluster(ParameterServer, workers=2)
    results = await cluster.step({0: [], 1: []})
    assert [result.size for result in results.values()] == [0, 0]


@pytest.mark.parametrize("part", [3, 0, -4])
def test_a_part_has_an_element(part):
    with pytest.raises(ConfigError, match=f"part is {part}; expected 4 bytes or more"):
        cluster_of(2, params={"part": part})


@pytest.mark.parametrize("compressor", [None, Coarse])
@pytest.mark.parametrize("seed", range(5))
async def test_sync_the_mirror_is_bit_for_bit_what_every_worker_holds(seed, compressor):
    cluster = cluster_of(4, seed=seed, compressor=compressor)
    results = await cluster.run(updates, steps=6)
    (mirror,) = cluster.codecs[-1].mirrors.values()
    for worker in range(4):
        assert final_weights(results, worker).tobytes() == mirror.tobytes()


@pytest.mark.parametrize(("workers", "redundancy"), [(3, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("seed", range(8))
async def test_sync_a_block_s_second_copy_counts_once(workers, redundancy, seed):
    cluster = cluster_of(workers, redundancy=redundancy, seed=seed)
    await cluster.run(updates, steps=4)
    blocks = range(cluster.codecs[0].ctx.block_count)
    means = [np.mean([updates(step, block) for block in blocks], axis=0) for step in range(4)]
    np.testing.assert_allclose(cluster.codecs[-1].weights(), INITIAL + sum(means), atol=1e-5)


async def test_sync_redundancy_makes_up_for_a_worker_that_computes_nothing():
    cluster = LocalCluster(ParameterServer, workers=3, redundancy=2, initial=[1.0])
    results = await cluster.step({0: {0: 1.0, 1: 2.0}, 1: {0: 1.0, 2: 6.0}, 2: None})
    assert results == {worker: [3.0] for worker in range(3)}


async def test_sync_the_first_copy_of_a_block_counts():
    cluster = LocalCluster(ParameterServer, workers=2, redundancy=2, initial=[0.0])
    cluster.begin({0: [1.0], 1: [9.0]})
    cluster.codecs[-1].ctx.block_owners += ((0, 1),)  # so that the step is not complete yet
    for worker in (0, 1):
        await cluster.deliver(None, worker)
        await cluster.deliver(worker, -1)
    assert cluster.codecs[-1].updates == {0: {0: [1.0]}}  # start -> block id -> update


async def test_sync_an_update_is_one_message_up_and_the_difference_one_down():
    cluster = cluster_of(3)
    await cluster.run(updates, steps=2)
    up = sorted((one.step, one.sender) for one in cluster.sent if one.to == -1)
    down = sorted((one.step, one.to) for one in cluster.sent if one.sender == -1)
    assert up == down == [(step, worker) for step in range(2) for worker in range(3)]


async def test_what_compression_loses_comes_with_later_differences():
    cluster = cluster_of(2, compressor=Coarse)
    await cluster.step({0: updates(0, 4), 1: updates(1, 4)})
    server = cluster.codecs[-1]
    gaps = [np.abs(server.weights() - final_weights(cluster.results, 0)).max()]
    for _ in range(4):
        await cluster.step({0: np.zeros(20), 1: np.zeros(20)})
        gaps.append(np.abs(server.weights() - final_weights(cluster.results, 0)).max())
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-6


class Feedback(Coarse):
    """Coarse, with error feedback for each stream."""

    def __init__(self, rng):
        self.errors = {}

    def compress(self, array, stream):
        if stream is None:
            return super().compress(array, stream)
        wanted = array + self.errors.get(stream, 0)
        payload = super().compress(wanted, stream)
        self.errors[stream] = wanted - self.decompress(payload)
        return payload


async def test_the_server_s_mirror_and_the_workers_error_feedback_lead_to_the_optimum():
    cluster = LocalCluster(ParameterServer, initial=np.zeros(40), compressor=Feedback)
    targets = [updates(0, 4)[:, None].repeat(2, 1).reshape(-1), np.ones(40)]
    weights = np.zeros(40, np.float32)
    for _ in range(400):
        results = await cluster.step({i: 0.03 * (targets[i] - weights) for i in (0, 1)})
        weights += results[0]
    np.testing.assert_allclose(weights, np.mean(targets, axis=0), atol=0.06)


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_each_block_is_a_stream_and_the_server_has_none(mode):
    cluster = cluster_of(3, redundancy=2, mode=mode, compressor=Feedback)
    await cluster.run(updates, steps=2)
    streams = [set(cluster.codecs[node].ctx.compressor.errors) for node in (0, 1, 2, -1)]
    assert set().union(*streams) == {"block 0", "block 1", "block 2"}
    assert streams[-1] == set()


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("seed", range(10))
async def test_async_the_server_s_weights_are_the_initial_ones_plus_all_it_got(seed, redundancy):
    cluster = cluster_of(3, mode="async", redundancy=redundancy, seed=seed, steps=5)
    await cluster.run(updates, steps=5)
    total = redundancy * sum(updates(step, block) for step in range(5) for block in range(3))
    np.testing.assert_allclose(cluster.codecs[-1].weights(), INITIAL + total, atol=1e-5)


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("seed", range(10))
async def test_async_every_worker_ends_with_the_server_s_weights(seed, redundancy):
    cluster = cluster_of(4, mode="async", redundancy=redundancy, seed=seed, steps=5)
    results = await cluster.run(updates, steps=5)
    for worker in range(4):
        ends_with = final_weights(results, worker)
        np.testing.assert_allclose(ends_with, cluster.codecs[-1].weights(), atol=1e-5)


async def test_async_the_sender_alone_is_answered_with_all_that_it_lacks():
    cluster = LocalCluster(ParameterServer, workers=2, mode="async", initial=[0.0], steps=9)
    cluster.begin({0: [1.0], 1: [2.0]})
    await cluster.deliver(None, 0)
    await cluster.deliver(0, -1)
    await cluster.deliver(None, 1)
    await cluster.deliver(1, -1)
    answers = [(one.to, one.content["difference"]) for one in cluster.sent if one.sender == -1]
    assert answers == [(0, [1.0]), (1, [3.0])]


async def test_the_server_s_weights_are_given_as_a_copy():
    cluster = cluster_of(2)
    assert cluster.codecs[0].weights() is None
    cluster.codecs[-1].weights()[:] = 0
    assert cluster.codecs[-1].weights().tobytes() == INITIAL.tobytes()
