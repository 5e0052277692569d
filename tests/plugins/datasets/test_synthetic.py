"""Made-up samples."""

import numpy as np
import pytest

from aiosgd.plugins.datasets import Synthetic


def load(tmp_path, **params):
    dataset = Synthetic(Synthetic.Params(**params), tmp_path)
    assert dataset.files() == []
    return dataset.load({})


def nearest_centre_accuracy(data):
    """Classify the test part by the class means of the training part."""
    x, test_x = data.train_x.reshape(len(data.train_x), -1), data.test_x
    means = np.stack([x[data.train_y == label].mean(axis=0) for label in range(data.classes)])
    scores = test_x.reshape(len(test_x), -1) @ means.T - (means**2).sum(axis=1) / 2
    return (scores.argmax(axis=1) == data.test_y).mean()


def test_the_default_has_the_shape_of_mnist():
    params = Synthetic.Params()
    assert (params.samples, params.inputs, params.classes) == (60_000, (784,), 10)


@pytest.mark.parametrize(
    ("samples", "features", "classes", "test"),
    [(600, 7, 10, 100), (5, (2, 3), 5, 5), (10_000, (4,), 2, 1666)],
)
def test_sizes_are_as_asked_for_and_classes_balanced(tmp_path, samples, features, classes, test):
    data = load(tmp_path, samples=samples, features=features, classes=classes)
    shape = (features,) if isinstance(features, int) else features
    assert data.train_x.shape == (samples, *shape)
    assert data.test_x.shape == (test, *shape)
    assert data.classes == classes
    for labels in (data.train_y, data.test_y):
        counts = np.bincount(labels, minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_the_seed_decides_everything(tmp_path):
    first, same, other = (load(tmp_path, samples=5000, features=9, seed=s) for s in (1, 1, 2))
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert np.array_equal(getattr(first, name), getattr(same, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("features", [30, 300])
def test_it_can_be_learned_but_not_perfectly(tmp_path, features):
    accuracy = nearest_centre_accuracy(load(tmp_path, samples=9000, features=features))
    assert 0.96 < accuracy < 1


def test_noise_makes_it_harder(tmp_path):
    accuracies = [
        nearest_centre_accuracy(load(tmp_path, samples=3000, features=50, noise=noise))
        for noise in (0.0, 1.5, 100.0)
    ]
    assert accuracies[0] == 1
    assert 0.6 < accuracies[1] < 0.97
    assert accuracies[2] < 0.2


def test_no_two_samples_share_their_noise(tmp_path):
    data = load(tmp_path, samples=2 * Synthetic.ROWS + 100, features=3, classes=2)
    assert len(np.unique(data.train_x, axis=0)) == len(data.train_x)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"classes": 1}, "classes is 1"),
        ({"samples": 9}, "samples is 9; expected at least one for each of 10"),
        ({"features": 0}, "features is 0"),
        ({"features": (3, -1)}, "features is"),
        ({"features": ()}, "features is"),
        ({"noise": -0.1}, "noise is"),
        ({"noise": float("nan")}, "noise is"),
        ({"noise": float("inf")}, "noise is"),
        ({"seed": -1}, "seed is"),
    ],
)
def test_impossible_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Synthetic.Params(**params)
