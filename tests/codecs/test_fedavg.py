import numpy as np
import pytest

from aiosgd.codecs.fedavg import FedAvg, participants
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import ConfigError


def models(step, block):
    return np.random.default_rng([step, block]).normal(size=20) * 10.0 ** (block % 5)


def federation(turn, **facts):
    return LocalCluster(FedAvg, params={"turn": turn}, **facts)


def bits(results):
    return [{worker: one.tobytes() for worker, one in step.items()} for step in results]


@pytest.mark.parametrize("seed", range(5))
async def test_with_turn_one_all_models_are_the_mean_after_each_step(seed):
    averaged = await federation(1, workers=5, seed=seed).run(models, steps=4)
    plain = await LocalCluster(Plain, workers=5).run(models, steps=4)
    assert bits(averaged) == bits(plain)


@pytest.mark.parametrize("seed", range(5))
async def test_models_meet_at_each_turn_and_at_the_last_step(seed):
    cluster = federation(3, workers=4, seed=seed, steps=8)
    results = bits(await cluster.run(models, steps=8))
    together = [step for step, one in enumerate(results) if len(set(one.values())) == 1]
    assert together == [2, 5, 7]
    for step in (0, 1, 3, 4, 6):
        own = {worker: np.float32(models(step, worker)).tobytes() for worker in range(4)}
        assert results[step] == own


async def test_a_round_costs_one_model_up_and_one_down_per_worker():
    cluster = federation(3, workers=4, steps=6)
    await cluster.run(models, steps=6)
    up = sorted((one.step, one.sender) for one in cluster.sent if one.to == -1)
    down = sorted((one.step, one.to) for one in cluster.sent if one.sender == -1)
    assert up == down == [(step, worker) for step in (2, 5) for worker in range(4)]


@pytest.mark.parametrize("seed", range(5))
async def test_a_worker_with_several_blocks_trains_on_all_of_them(seed):
    cluster = federation(2, workers=3, redundancy=2, seed=seed)  # blocks 01, 02, 12
    results = await cluster.run(lambda step, block: [10.0 * step + 2 * block], steps=4)
    assert results[0] == {0: [1.0], 1: [2.0], 2: [3.0]}
    assert results[2] == {0: [21.0], 1: [22.0], 2: [23.0]}
    assert results[3] == {worker: [32.0] for worker in range(3)}


async def test_one_worker_alone_keeps_its_own_model():
    results = await federation(2, workers=1).run(lambda step, block: [step / 3], steps=3)
    assert [one[0] for one in results] == [np.float32(step / 3) for step in range(3)]


def test_a_turn_is_150_steps_by_default():
    assert LocalCluster(FedAvg).codecs[0].ctx.params.turn == 150


@pytest.mark.parametrize("turn", [0, -1])
def test_a_round_has_at_least_one_step(turn):
    with pytest.raises(ConfigError, match=rf"codec: turn is {turn}; expected 1 or more"):
        federation(turn)


def test_it_is_made_for_sync_mode_and_weights():
    assert FedAvg.exchange == "weights"
    with pytest.raises(ConfigError, match="mode is 'async'"):
        federation(2, mode="async")


# who takes part, and with what weight


async def test_with_turn_one_plain_sgd_is_the_sync_sgd_of_the_mean_loss():
    rate, slopes, optima = 0.1, np.array([1.0, 4.0, 2.0]), np.array([3.0, -1.0, 0.5])
    cluster = federation(1, workers=3, initial=[5.0])

    def feed(worker, step):
        own = cluster.results[step - 1][worker] if step else np.array([5.0])
        return {worker: own - rate * slopes[worker] * (own - optima[worker])}

    results = await cluster.train(feed, steps=30)
    single = 5.0
    for one in results:
        single -= rate * np.mean(slopes * (single - optima))
        np.testing.assert_allclose(np.concatenate(list(one.values())), single, rtol=1e-5)


def senders(cluster, step):
    return [one.sender for one in sorted(cluster.sent) if one.to == -1 and one.step == step]


@pytest.mark.parametrize("seed", range(5))
async def test_the_average_is_over_those_who_take_part_and_the_others_keep_the_model(seed):
    cluster = LocalCluster(
        FedAvg, workers=5, params={"turn": 3, "fraction": 0.4}, initial=[7.0], seed=seed
    )
    results = await cluster.run(lambda step, block: [100.0 * step + block], steps=12)
    model = 7.0
    for end in (2, 5, 8, 11):
        chosen = senders(cluster, end)
        assert len(chosen) == 2
        for step in (end - 2, end - 1):
            assert results[step] == {
                worker: [100 * step + worker if worker in chosen else model] for worker in range(5)
            }
        model = 100 * end + np.mean(chosen)
        assert results[end] == {worker: [model] for worker in range(5)}


@pytest.mark.parametrize(
    ("workers", "fraction", "count"), [(5, 0.01, 1), (10, 0.34, 3), (10, 0.37, 4), (5, 1.0, 5)]
)
def test_a_share_of_the_workers_takes_part_one_at_least(workers, fraction, count):
    ctx = LocalCluster(FedAvg, workers=workers, params={"fraction": fraction}).codecs[0].ctx
    assert len(participants(ctx, 0)) == count


def test_each_round_draws_anew_from_the_jobs_seed_and_all_workers_have_their_turn():
    ctx = LocalCluster(FedAvg, workers=10, params={"turn": 2, "fraction": 0.3}).codecs[0].ctx
    rounds = [participants(ctx, step) for step in range(0, 200, 2)]
    assert rounds == [participants(ctx, step + 1) for step in range(0, 200, 2)]
    assert len(set(rounds)) > 50
    assert {worker for one in rounds for worker in one} == set(range(10))
    ctx.seed += 1
    assert rounds != [participants(ctx, step) for step in range(0, 200, 2)]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
async def test_a_weighted_mean_counts_each_worker_by_its_samples(fraction):
    counts = np.array([10, 30, 20, 40])
    cluster = LocalCluster(
        FedAvg,
        workers=4,
        params={"turn": 1, "fraction": fraction, "weighted": True},
        sample_counts=tuple(counts),
    )
    for step, one in enumerate(await cluster.run(models, steps=4)):
        chosen = senders(cluster, step)
        assert len(chosen) == 4 * fraction
        own = [models(step, worker) for worker in chosen]
        expected = np.average(own, axis=0, weights=counts[chosen])
        for result in one.values():
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


async def test_in_proportion_to_its_samples_a_worker_takes_fewer_steps_one_at_least():
    params = {"turn": 4, "proportional": True}
    cluster = LocalCluster(FedAvg, workers=3, params=params, sample_counts=(80, 40, 1))
    results = await cluster.run(lambda step, block: [step + 10.0 * block], steps=8)
    assert results[2] == {0: [2.0], 1: [11.0], 2: [20.0]}
    assert results[3] == {worker: [np.float32((3 + 11 + 20) / 3)] for worker in range(3)}
    assert results[6] == {0: [6.0], 1: [15.0], 2: [24.0]}


@pytest.mark.parametrize("steps", [6, 7])
async def test_its_traffic_is_what_is_sent(steps):
    cluster = LocalCluster(
        FedAvg, workers=5, params={"turn": 3, "fraction": 0.6}, initial=np.zeros(20), steps=steps
    )
    await cluster.run(models, steps=steps)
    sent = sum(one.content.nbytes for one in cluster.sent)
    assert sent == pytest.approx(steps * FedAvg.traffic(cluster.codecs[0].ctx, 20))


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_the_fraction_is_a_share(fraction):
    with pytest.raises(ConfigError, match=r"fraction is .*; expected above 0 and at most 1"):
        LocalCluster(FedAvg, params={"fraction": fraction})
