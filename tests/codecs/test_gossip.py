from collections import Counter
from math import log2

import numpy as np
import pytest

from aiosgd.codecs.gossip import DPsgd
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import NoParams
from aiosgd.plugins.topologies import (
    Exponential,
    Full,
    OnePeer,
    Ring,
    RingParams,
    Star,
    WeightsParams,
)

MADE = {
    "ring": Ring(RingParams()),
    "star": Star(WeightsParams()),
    "exponential": Exponential(NoParams()),
    "one_peer": OnePeer(NoParams()),
    "full": Full(NoParams()),
}
TOPOLOGIES = list(MADE)
COUNTS = [1, 2, 3, 4, 5, 7, 8, 12]


def models(step, block):
    """Return a vector whose sum in another order has other bits."""
    return np.random.default_rng([step, block]).normal(size=20) * 10.0 ** (block % 5)


def swarm(topology, workers, **facts):
    return LocalCluster(DPsgd, workers=workers, topology=graph(topology, workers), **facts)


def graph(topology, workers):
    return MADE[topology].graph(workers, 0)


def stacked(results):
    return np.stack([results[worker] for worker in sorted(results)]).astype(float)


def bits(results):
    return [{worker: one.tobytes() for worker, one in step.items()} for step in results]


async def mixing_matrices(topology, workers, steps):
    """Return W of each step: what the workers make of the unit vectors."""
    units = np.eye(workers)
    results = await swarm(topology, workers).run(lambda step, block: units[block], steps)
    return [stacked(one) for one in results]


def contraction(matrix):
    """Return the second largest absolute eigenvalue."""
    return sorted(np.abs(np.linalg.eigvals(matrix)))[-2]


@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_the_mixing_matrix_is_that_of_the_topology(topology, workers):
    wanted = graph(topology, workers)
    for step, found in enumerate(await mixing_matrices(topology, workers, steps=4)):
        for worker in range(workers):
            row = np.zeros(workers, np.float32)
            row[[*wanted.weights(worker, step)]] = [*wanted.weights(worker, step).values()]
            np.testing.assert_array_equal(found[worker], row)


async def test_who_averages_with_whom():
    def senders(matrix):
        return [{j for j in range(len(matrix)) if matrix[i, j] and i != j} for i in range(2)]

    (ring,) = await mixing_matrices("ring", 6, 1)
    (pair,) = await mixing_matrices("ring", 2, 1)
    (exponential,) = await mixing_matrices("exponential", 6, 1)
    one_peer = await mixing_matrices("one_peer", 6, 4)
    assert senders(ring) == [{5, 1}, {0, 2}]
    assert senders(pair) == [{1}, {0}]
    assert senders(exponential) == [{5, 4, 2}, {0, 5, 3}]
    assert [senders(one)[0] for one in one_peer] == [{5}, {4}, {2}, {5}]


@pytest.mark.parametrize("workers", COUNTS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_mixing_preserves_the_average(topology, workers):
    for step, results in enumerate(await swarm(topology, workers).run(models, steps=3)):
        before = np.mean([models(step, worker) for worker in range(workers)], axis=0)
        np.testing.assert_allclose(stacked(results).mean(axis=0), before, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_one_worker_alone_takes_its_own_step(topology):
    cluster = swarm(topology, 1)
    results = await cluster.run(models, steps=3)
    assert [one[0].tobytes() for one in results] == [
        np.float32(models(step, 0)).tobytes() for step in range(3)
    ]
    assert not cluster.sent


@pytest.mark.parametrize("workers", [2, 3, 5])
async def test_a_full_graph_averages_as_plain_does(workers):
    ours = await LocalCluster(DPsgd, workers=workers).run(models, steps=3)
    assert bits(ours) == bits(await swarm("full", workers).run(models, steps=3))
    assert bits(ours) == bits(await LocalCluster(Plain, workers=workers).run(models, steps=3))


@pytest.mark.parametrize("fifo", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("seed", range(5))
async def test_the_bits_do_not_depend_on_the_order_of_delivery(topology, seed, fifo):
    reference = await swarm(topology, 6, seed=1000).run(models, steps=4)
    cluster = swarm(topology, 6, seed=seed, fifo=fifo)
    assert bits(await cluster.run(models, steps=4)) == bits(reference)
    assert cluster.late == 0


@pytest.mark.parametrize("workers", [5, 8, 12])
@pytest.mark.parametrize("topology", ["ring", "star", "exponential"])
async def test_the_distance_to_consensus_shrinks_by_the_second_eigenvalue(topology, workers):
    (matrix,) = await mixing_matrices(topology, workers, 1)
    values = np.random.default_rng(1).normal(size=(workers, 50)).astype(np.float32)
    cluster, distances = swarm(topology, workers), []
    for _ in range(8):
        distances.append(np.linalg.norm(values - values.mean(axis=0)))
        values = stacked(await cluster.step(dict(enumerate(values))))
    rates = np.divide(distances[1:], distances[:-1])
    assert (rates <= contraction(matrix) + 1e-5).all()  # W is normal: never slower
    assert rates[-1] == pytest.approx(contraction(matrix), rel=0.06)  # and in the end no faster


@pytest.mark.parametrize("workers", [2, 4, 8, 16])
async def test_one_peer_after_another_gives_the_exact_average_of_a_power_of_two(workers):
    rounds = round(log2(workers))
    matrices = await mixing_matrices("one_peer", workers, 2 * rounds)
    for start in (0, rounds, rounds // 2):
        product = np.linalg.multi_dot([np.eye(workers), *matrices[start : start + rounds]])
        np.testing.assert_array_equal(product, 1 / workers)


@pytest.mark.parametrize("topology", ["ring", "star", "exponential"])
async def test_sgd_on_quadratics_follows_the_published_recursion(topology):
    """Worker i has f_i(x) = a_i/2 (x - b_i)^2: D-PSGD is linear, and its fixed point is known."""
    workers, rate = 6, 0.1
    rng = np.random.default_rng(3)
    a, b = rng.uniform(0.5, 2, workers), rng.normal(size=workers)
    (mixing,) = await mixing_matrices(topology, workers, 1)
    cluster, x, expected = swarm(topology, workers), np.zeros(workers), np.zeros(workers)
    for _ in range(150):
        mean = x.mean() - rate * np.mean(a * (x - b))  # the average goes by the average gradient
        x = stacked(await cluster.step(dict(enumerate(x - rate * a * (x - b))))).ravel()
        expected = mixing @ (expected - rate * a * (expected - b))
        np.testing.assert_allclose(x, expected, atol=1e-5)
        assert x.mean() == pytest.approx(mean, abs=1e-6)
    system = np.eye(workers) - mixing @ (np.eye(workers) - rate * np.diag(a))
    fixed = np.linalg.solve(system, mixing @ (rate * a * b))
    np.testing.assert_allclose(x, fixed, atol=1e-5)
    assert np.ptp(fixed) > 0.01  # the workers stay apart, for their optima differ


@pytest.mark.parametrize("seed", range(5))
async def test_a_worker_with_several_blocks_mixes_their_mean(seed):
    cluster = swarm("ring", 4, redundancy=3, seed=seed)  # blocks 012, 013, 023, 123
    results = await cluster.run(lambda step, block: [[0.0, 3.0, 6.0, 12.0][block] + step], 2)
    own = np.array([3.0, 5.0, 6.0, 7.0])  # of workers 0 … 3
    for step in range(2):
        mixed = [(own[i - 1] + own[i] + own[(i + 1) % 4]) / 3 + step for i in range(4)]
        np.testing.assert_allclose(stacked(results[step]).ravel(), mixed, rtol=1e-6)


@pytest.mark.parametrize(
    ("topology", "neighbours"), [("ring", 2), ("exponential", 4), ("one_peer", 1), ("full", 9)]
)
async def test_a_worker_sends_its_model_once_to_each_neighbour(topology, neighbours):
    cluster = swarm(topology, 10)
    await cluster.run(models, steps=2)
    routes = Counter((one.step, one.sender, one.to) for one in cluster.sent)
    assert set(routes.values()) == {1}
    assert Counter((step, sender) for step, sender, _ in routes) == {
        (step, sender): neighbours for step in range(2) for sender in range(10)
    }


async def test_models_are_not_held_longer_than_their_step():
    cluster = swarm("exponential", 5)
    await cluster.run(models, steps=2)
    assert not any(codec.local or codec.heard for codec in cluster.codecs.values())


async def test_what_was_heard_is_mixed_in_the_order_of_the_ids():
    class Listens(DPsgd):
        def mix(self, heard):
            orders.append(list(heard))
            return super().mix(heard)

    orders = []
    for seed in range(3):
        await LocalCluster(Listens, workers=4, seed=seed).run(models, steps=2)
    assert orders == [[0, 1, 2, 3]] * 24


async def test_a_star_sends_as_its_links_lead():
    cluster = swarm("star", 5)
    await cluster.step({worker: [1.0] for worker in range(5)})
    assert {(one.sender, one.to) for one in cluster.sent} == {
        pair for worker in range(1, 5) for pair in ((0, worker), (worker, 0))
    }


def test_what_is_not_made_for_it_is_refused():
    with pytest.raises(ConfigError, match="topology has no effect: Plain does not use it"):
        LocalCluster(Plain, workers=3, topology=graph("ring", 3))
    with pytest.raises(ConfigError, match="async"):
        swarm("ring", 3, mode="async")
