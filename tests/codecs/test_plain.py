import itertools

import numpy as np
import pytest

from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import JobFailedError


def values(step, block):
    """Return a vector whose sum in another order has other bits."""
    return np.random.default_rng([step, block]).normal(size=20) * 10.0 ** (block % 5)


def exact_mean(step, blocks):
    return np.mean([values(step, block) for block in range(blocks)], axis=0)


def bits(results):
    return [{worker: one.tobytes() for worker, one in step.items()} for step in results]


class Rounding:
    """A lossy compressor: multiples of a grain, and the error is kept for the next time."""

    def __init__(self, rng):
        self.errors = {}

    def compress(self, array, stream):
        wanted = array + self.errors.get(stream, 0)
        units = np.rint(wanted / 0.25).astype(np.int32)
        self.errors[stream] = wanted - self.decompress({"units": units})
        return {"units": units}

    def decompress(self, payload):
        return payload["units"].astype(np.float32) * np.float32(0.25)


@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("seed", range(10))
async def test_every_worker_has_the_same_bits_whatever_the_order(seed, fifo):
    reference = await LocalCluster(Plain, workers=5, seed=1000).run(values, steps=3)
    results = await LocalCluster(Plain, workers=5, seed=seed, fifo=fifo).run(values, steps=3)
    for step, by_worker in enumerate(bits(results)):
        assert len(set(by_worker.values())) == 1
        np.testing.assert_allclose(results[step][0], exact_mean(step, 5), rtol=1e-5, atol=1e-3)
    assert bits(results) == bits(reference)


@pytest.mark.parametrize(("workers", "redundancy"), [(1, 1), (2, 2), (3, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("seed", range(6))
async def test_redundant_copies_count_once(workers, redundancy, seed):
    cluster = LocalCluster(Plain, workers=workers, redundancy=redundancy, seed=seed)
    results = await cluster.run(values, steps=3)
    blocks = cluster.codecs[0].ctx.block_count
    for step, by_worker in enumerate(bits(results)):
        assert len(set(by_worker.values())) == 1
        np.testing.assert_allclose(results[step][0], exact_mean(step, blocks), rtol=1e-5, atol=1e-3)


async def test_with_redundancy_nobody_waits_for_a_worker_that_computes_nothing():
    cluster = LocalCluster(Plain, workers=3, redundancy=2)  # blocks 01, 02, 12
    with pytest.raises(JobFailedError, match="missing: node 2 in step 0"):
        await cluster.step({0: {0: 1.0, 1: 2.0}, 1: {0: 1.0, 2: 6.0}, 2: None})
    assert cluster.results == [{0: [3.0], 1: [3.0]}]


@pytest.mark.parametrize("workers", [1, 2, 5])
async def test_each_block_is_sent_to_the_workers_without_it(workers):
    cluster = LocalCluster(Plain, workers=workers)
    await cluster.run(values, steps=2)
    routes = sorted((one.step, one.sender, one.to) for one in cluster.sent)
    assert routes == [
        (step, *pair) for step in range(2) for pair in itertools.permutations(range(workers), 2)
    ]


async def test_one_worker_gets_its_own_block():
    results = await LocalCluster(Plain, workers=1).step({0: [0.1, 0.2]})
    assert results[0].tolist() == np.array([0.1, 0.2], np.float32).tolist()


@pytest.mark.parametrize("seed", range(10))
async def test_with_a_lossy_compressor_all_workers_still_agree(seed):
    cluster = LocalCluster(Plain, workers=4, seed=seed, compressor=Rounding)
    results = await cluster.run(values, steps=4)
    for step, by_worker in enumerate(bits(results)):
        assert len(set(by_worker.values())) == 1
        off = results[step][0] - exact_mean(step, 4)
        assert 0 < np.abs(off).max() <= 0.25  # the grain, for half of it is from the step before
    total = sum(step[0] for step in results)
    expected = sum(exact_mean(step, 4) for step in range(4))
    assert np.abs(total - expected).max() <= 0.126  # the errors of all steps telescope


async def test_what_is_sent_is_the_compressor_s_payload_one_stream_per_block():
    cluster = LocalCluster(Plain, workers=3, redundancy=2, compressor=Rounding)
    await cluster.run(lambda step, block: [0.3], steps=1)
    assert {one.content["value"]["units"].item() for one in cluster.sent} == {1}
    streams = [set(cluster.codecs[node].ctx.compressor.errors) for node in range(3)]
    assert all(found <= {"block 0", "block 1", "block 2"} for found in streams)
    assert set.union(*streams) == {"block 0", "block 1", "block 2"}


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("seed", range(10))
async def test_async_every_worker_ends_with_the_sum_of_all_means(seed, redundancy):
    cluster = LocalCluster(Plain, workers=3, redundancy=redundancy, mode="async", seed=seed)
    results = await cluster.run(lambda step, block: [4.0**step * (block + 1)], steps=5)
    for worker in range(3):
        total = sum(step[worker] for step in results if step[worker] is not None)
        assert total == [2.0 * sum(4.0**step for step in range(5))]
    assert all(not codec.incomplete for codec in cluster.codecs.values())


@pytest.mark.parametrize("seed", range(10))
async def test_async_every_worker_ends_with_the_newest_mean_of_weights(seed):
    cluster = LocalCluster(Plain, workers=3, mode="async", exchange="weights", seed=seed)
    results = await cluster.run(lambda step, block: [10.0 * step + block], steps=5)
    for worker in range(3):
        taken = [step[worker] for step in results if step[worker] is not None]
        assert taken[-1] == [41.0]
        assert {one.item() for one in taken} <= {1.0, 11.0, 21.0, 31.0, 41.0}


async def test_the_mean_is_in_the_node_s_memory():
    taken = []

    def memory(size):
        taken.append(np.zeros(size, np.uint8))
        return taken[-1]

    results = await LocalCluster(Plain, workers=2, memory=memory).run(values, steps=1)
    assert [np.shares_memory(results[0][i], taken[j]) for i in (0, 1) for j in (0, 1)].count(
        True
    ) == 2


async def test_values_are_not_held_longer_than_their_step():
    cluster = LocalCluster(Plain, workers=3)
    await cluster.run(values, steps=3)
    assert all(not codec.incomplete for codec in cluster.codecs.values())
