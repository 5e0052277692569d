import numpy as np
import pytest

from aiosgd.codecs.local_sgd import DiLoCo, LocalSgd, StreamingDiLoCo
from aiosgd.codecs.plain import Plain
from aiosgd.codecs.testing import LocalCluster
from aiosgd.errors import ConfigError

SIZE = 10
INITIAL = np.linspace(-1, 1, SIZE, dtype=np.float32)


def models(step, block):
    return np.random.default_rng([step, block]).normal(size=SIZE) * 10.0 ** (block % 3)


def cluster_of(codec, workers, steps, params, **facts):
    facts = {"initial": INITIAL, "steps": steps, **facts}
    return LocalCluster(codec, workers=workers, params=params, **facts)


def bits(results):
    return [{worker: one.tobytes() for worker, one in step.items()} for step in results]


def own(step, worker):
    return np.float32(models(step, worker)).tobytes()


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_local_sgd_with_period_one_equals_sync_averaging_of_weights(seed, redundancy):
    facts = {"seed": seed, "owners": [(0,), (1,), (2,)] if redundancy == 1 else [(0, 1, 2)]}
    ours = await cluster_of(LocalSgd, 3, 4, {"period": 1}, **facts).run(models, steps=4)
    plain = await LocalCluster(Plain, workers=3, owners=facts["owners"]).run(models, steps=4)
    if redundancy == 1:
        assert bits(ours) == bits(plain)
    for step in range(4):
        np.testing.assert_allclose(ours[step][0], plain[step][0], rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "together"),
    [
        ({"period": 3}, [2, 5, 7]),
        ({"period": 4, "warmup_steps": 2}, [0, 1, 3, 7]),
        ({"period": 50}, [7]),
    ],
)
async def test_local_sgd_averages_in_the_warm_up_after_each_period_and_at_the_end(params, together):
    cluster = cluster_of(LocalSgd, 4, 8, params)
    results = bits(await cluster.run(models, steps=8))
    assert [step for step, one in enumerate(results) if len(set(one.values())) == 1] == together
    for step in set(range(8)) - set(together):
        assert results[step] == {worker: own(step, worker) for worker in range(4)}
    assert sorted({one.step for one in cluster.sent}) == together
    assert len(cluster.sent) == 4 * 3 * len(together)


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("seed", range(5))
async def test_diloco_with_outer_rate_one_and_no_momentum_is_local_sgd(seed, period):
    params = {"period": period, "learning_rate": 1.0, "momentum": 0.0}
    ours = await cluster_of(DiLoCo, 3, 7, params, seed=seed).run(models, steps=7)
    local = await cluster_of(LocalSgd, 3, 7, {"period": period}).run(models, steps=7)
    for step in range(7):
        for worker in range(3):
            np.testing.assert_allclose(
                ours[step][worker], local[step][worker], rtol=1e-5, atol=1e-4
            )


async def test_diloco_takes_nesterov_s_steps_on_what_the_workers_did():
    params = {"period": 2, "learning_rate": 0.7, "momentum": 0.9}
    results = await cluster_of(DiLoCo, 2, 6, params).run(models, steps=6)
    outer, momentum = INITIAL.astype("f8"), np.zeros(SIZE)
    for step in (1, 3, 5):
        gradient = outer - (models(step, 0) + models(step, 1)) / 2
        momentum = 0.9 * momentum + gradient
        outer = outer - 0.7 * (gradient + 0.9 * momentum)
        np.testing.assert_allclose(results[step][0], outer, rtol=1e-4, atol=1e-4)
    assert bits(results)[2] == {worker: own(2, worker) for worker in (0, 1)}


@pytest.mark.parametrize("codec", [DiLoCo, StreamingDiLoCo])
@pytest.mark.parametrize("seed", range(5))
async def test_diloco_s_workers_have_the_same_bits_at_the_end_whatever_the_order(codec, seed):
    params = {"period": 4}
    first = bits(await cluster_of(codec, 4, 7, params).run(models, steps=7))
    other = bits(await cluster_of(codec, 4, 7, params, seed=seed, fifo=False).run(models, steps=7))
    assert first == other
    assert len(set(first[-1].values())) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_streaming_with_one_fragment_is_diloco(seed):
    ours = cluster_of(StreamingDiLoCo, 3, 7, {"period": 3, "fragments": 1}, seed=seed)
    whole = cluster_of(DiLoCo, 3, 7, {"period": 3}, seed=seed)
    assert bits(await ours.run(models, steps=7)) == bits(await whole.run(models, steps=7))


async def test_streaming_fragments_take_turns_and_their_outer_steps_are_diloco_s():
    fragments = [slice(0, 3), slice(3, 6), slice(6, 10)]
    params = {"period": 6, "fragments": 3}
    cluster = cluster_of(StreamingDiLoCo, 2, 99, params)
    results = await cluster.run(models, steps=13)
    outer, momentum = INITIAL.astype("f8"), np.zeros(SIZE)
    for step in range(13):
        expected = {worker: models(step, worker) for worker in (0, 1)}
        if step % 2:
            part = fragments[step // 2 % 3]
            gradient = (outer - (expected[0] + expected[1]) / 2)[part]
            momentum[part] = 0.9 * momentum[part] + gradient
            outer[part] -= 0.7 * (gradient + 0.9 * momentum[part])
            for worker in (0, 1):
                expected[worker][part] = outer[part]
        for worker in (0, 1):
            np.testing.assert_allclose(
                results[step][worker], expected[worker], rtol=1e-4, atol=1e-4
            )
    sizes = [(one.step, one.content.size) for one in cluster.sent if one.sender == 0]
    assert sizes == [(1, 3), (3, 3), (5, 4), (7, 3), (9, 3), (11, 4)]


@pytest.mark.parametrize(
    ("codec", "params", "message"),
    [
        (LocalSgd, {"period": 0}, "period is 0; expected 1 or more"),
        (LocalSgd, {"warmup_steps": -1}, "warmup_steps is -1; expected 0 or more"),
        (DiLoCo, {"period": 0}, "period is 0; expected 1 or more"),
        (DiLoCo, {"learning_rate": 0.0}, "learning_rate is 0.0; expected"),
        (DiLoCo, {"momentum": 1.0}, "momentum is 1.0; expected"),
        (StreamingDiLoCo, {"fragments": 0}, "fragments is 0; expected 1 or more"),
        (StreamingDiLoCo, {"period": 10, "fragments": 4}, "10 with 4 fragments; expected a mul"),
    ],
)
def test_parameters_out_of_range_are_refused(codec, params, message):
    with pytest.raises(ConfigError, match=message):
        cluster_of(codec, 2, 1, params)
