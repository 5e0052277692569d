"""Partitions: who sees which samples."""

import numpy as np
import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins.partitions import Dirichlet, Iid, Shards, Shared

SEEDS = range(5)
OWN = [Iid(None), Shards(Shards.Params()), Dirichlet(Dirichlet.Params())]


def name(partition):
    return type(partition).__name__


def labels_of(n, classes=10, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


def split(partition, labels, workers, seed=0):
    return partition.split(labels, workers, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2, 7, 20])
@pytest.mark.parametrize("partition", OWN, ids=name)
def test_each_sample_goes_to_exactly_one_worker(partition, workers, seed):
    parts = split(partition, labels_of(211, seed=seed), workers, seed)
    assert len(parts) == workers
    assert sorted(np.concatenate(parts).tolist()) == list(range(211))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) >= 1
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("partition", OWN, ids=name)
def test_the_generator_decides(partition):
    labels = labels_of(300)
    first, same, other = (split(partition, labels, 4, seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, same))
    assert not all(map(np.array_equal, first, other))


@pytest.mark.parametrize("partition", [*OWN, Shared(None)], ids=name)
def test_the_labels_are_left_alone(partition):
    labels = labels_of(100)
    labels.setflags(write=False)
    split(partition, labels, 3)


def test_shared_gives_everything_to_everyone():
    parts = split(Shared(None), labels_of(10), 3)
    assert [part.tolist() for part in parts] == [list(range(10))] * 3
    assert parts[0].dtype == np.int64
    assert not parts[0].flags.writeable


def test_only_shared_is_shared():
    kinds = (Shared, Iid, Shards, Dirichlet)
    assert [kind.shared for kind in kinds] == [True, False, False, False]


@pytest.mark.parametrize("workers", [1, 3, 10, 100])
def test_iid_sizes_differ_by_one_at_most(workers):
    sizes = [len(part) for part in split(Iid(None), labels_of(100), workers)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_does_not_look_at_labels():
    parts = split(Iid(None), np.repeat(np.arange(10), 1000), 4)
    for part in parts:
        counts = np.bincount(part // 1000, minlength=10)
        assert (np.abs(counts - 250) < 5 * np.sqrt(250)).all()


@pytest.mark.parametrize("per_worker", [1, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_shards_hold_as_many_labels_as_a_worker_has_shards(per_worker, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), 60))
    partition = Shards(Shards.Params(per_worker=per_worker))
    # 10 * per_worker shards of 60 / per_worker samples: each shard lies within one label
    parts = split(partition, labels, 10, seed)
    assert {len(part) for part in parts} == {60}
    assert max(len(np.unique(labels[part])) for part in parts) <= per_worker


def test_shards_are_dealt_at_random():
    labels = np.repeat(np.arange(100), 2)
    seen = {tuple(split(Shards(Shards.Params(1)), labels, 100, seed)[0]) for seed in range(20)}
    assert len(seen) > 10


def largest_class_share(alpha, seed):
    labels = labels_of(4000, seed=seed)
    parts = split(Dirichlet(Dirichlet.Params(alpha=alpha)), labels, 10, seed)
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    return (counts.max(axis=1) / counts.sum(axis=1)).mean()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_small_alpha_gives_few_classes_and_a_large_one_the_mixture(seed):
    skewed, mixed = largest_class_share(0.05, seed), largest_class_share(1e6, seed)
    assert skewed > 0.6
    assert mixed < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_shares_have_the_moments_of_their_distribution(seed):
    """Var of a share is (1/k)(1-1/k)/(k alpha + 1) for k workers."""
    k, alpha, classes = 5, 0.5, 500
    labels = np.repeat(np.arange(classes), 100)
    parts = split(Dirichlet(Dirichlet.Params(alpha=alpha)), labels, k, seed)
    shares = np.array([np.bincount(part // 100, minlength=classes) for part in parts]) / 100
    expected = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    np.testing.assert_allclose(shares.mean(axis=1), 1 / k, atol=5 * np.sqrt(expected / classes))
    np.testing.assert_allclose(shares.var(axis=1), expected, rtol=0.25)


def test_dirichlet_takes_samples_of_a_class_in_random_order():
    parts = split(Dirichlet(Dirichlet.Params(alpha=1e6)), np.zeros(1000, np.int64), 2)
    assert 400 < parts[0].mean() < 600


@pytest.mark.parametrize("minimum", [1, 10, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_dirichlet_gives_everyone_the_minimum(minimum, seed):
    partition = Dirichlet(Dirichlet.Params(alpha=0.3, minimum=minimum))
    assert min(map(len, split(partition, labels_of(1000, seed=seed), 8, seed))) >= minimum


@pytest.mark.parametrize(("workers", "minimum"), [(50, 1), (50, 2), (100, 1)])
def test_dirichlet_gives_everyone_the_minimum_even_where_no_draw_does(workers, minimum):
    partition = Dirichlet(Dirichlet.Params(alpha=1e-3, minimum=minimum))
    parts = split(partition, labels_of(100), workers, 1)
    assert min(map(len, parts)) == minimum
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert [part.tolist() for part in parts] == [
        part.tolist() for part in split(partition, labels_of(100), workers, 1)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_dirichlet_copes_with_extreme_alphas(seed):
    for alpha in (1e-300, 1e-8, 1e12):
        parts = split(Dirichlet(Dirichlet.Params(alpha=alpha)), labels_of(500, 400), 2, seed)
        assert sum(map(len, parts)) == 500


@pytest.mark.parametrize(
    ("partition", "samples", "workers", "least"),
    [
        (Shared(None), 0, 1, 1),
        (Iid(None), 4, 5, 5),
        (Shards(Shards.Params(per_worker=3)), 14, 5, 15),
        (Dirichlet(Dirichlet.Params(minimum=4)), 19, 5, 20),
    ],
    ids=lambda value: name(value) if not isinstance(value, int) else None,
)
def test_too_many_workers_are_refused_and_just_enough_samples_taken(
    partition, samples, workers, least
):
    with pytest.raises(
        ConfigError, match=f"{samples} training samples .*expected at least {least}"
    ):
        split(partition, labels_of(samples, 1), workers)
    if not isinstance(partition, Dirichlet):
        assert len(split(partition, labels_of(least, 1), workers)) == workers


@pytest.mark.parametrize("partition", [*OWN, Shared(None)], ids=name)
def test_no_workers_are_refused(partition):
    with pytest.raises(ConfigError, match="0 workers; expected at least 1"):
        split(partition, labels_of(10), 0)


@pytest.mark.parametrize(
    ("params", "values"),
    [
        (Shards.Params, {"per_worker": 0}),
        (Dirichlet.Params, {"alpha": 0.0}),
        (Dirichlet.Params, {"alpha": float("inf")}),
        (Dirichlet.Params, {"alpha": float("nan")}),
        (Dirichlet.Params, {"minimum": 0}),
    ],
)
def test_impossible_parameters_are_refused(params, values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*; expected"):
        params(**values)
