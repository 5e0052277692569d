import numpy as np
import pytest

from aiosgd.codecs.fedavg import FedAvg
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
