"""Error feedback repairs what biased compressors break, in published counterexamples.

Signs: Karimireddy, Rebjock, Stich and Jaggi, Error Feedback Fixes SignSGD and other Gradient
Compression Schemes, ICML 2019, section 3. Top-1: Beznosikov, Horvath, Richtarik and Safaryan, On
Biased Compression for Distributed Learning, JMLR 2023, the example of three quadratics. As a
script, it prints the figures.
"""

import numpy as np
import pytest

from aiosgd.plugins.compressors.feedback import ErrorFeedback
from aiosgd.plugins.compressors.signs import ScaledSign, Sign
from aiosgd.plugins.compressors.sparse import TopK


def bare(kind, **params):
    return kind(kind.Params(**params), np.random.default_rng(0))


def ef(kind, **params):
    return ErrorFeedback(None, np.random.default_rng(0), bare(kind, **params))


def through(compressor, array, stream="s"):
    """Return what a receiver gets; the array itself without a compressor."""
    if compressor is None:
        return array
    return compressor.decompress(compressor.compress(array, stream)).astype(float)


# 1: the gradient's mean and its sign's mean point to opposite sides -----------------------------


def skewed_noise(compressor, scale=1.0, seeds=20, steps=2000):
    """Minimise x/4 on [-1, 1] from 0 for each seed; the gradient is 4, or -1 three times of four.

    Args:
        compressor: of single numbers, for all seeds in turn if there are streams for them.
        scale: what is multiplied with what it gives.

    Returns:
        x in each step, a row per step and a column per seed.
    """
    rng = np.random.default_rng(0)
    x, path = np.zeros(seeds), []
    for _ in range(steps):
        updates = 0.01 * np.where(rng.random(seeds) < 0.25, 4.0, -1.0)
        if isinstance(compressor, ErrorFeedback):
            parts = np.split(updates, seeds)
            sent = np.concatenate([through(compressor, u, f"{i}") for i, u in enumerate(parts)])
        else:
            sent = scale * through(compressor, updates)
        x = np.clip(x - sent, -1, 1)
        path.append(x)
    return np.array(path)


def settled(path):
    """Return the mean over the last half of the steps."""
    return float(path[len(path) // 2 :].mean())


def test_the_sign_climbs_where_sgd_descends():
    assert settled(skewed_noise(None)) == pytest.approx(-0.89, abs=0.03)
    climb = skewed_noise(bare(Sign), scale=0.01)
    assert settled(climb) == pytest.approx(0.99, abs=0.01)
    assert climb[99].mean() / 4 == pytest.approx(100 * 0.01 / 8, rel=0.15)  # f, from 0


def test_feedback_around_the_scaled_sign_does_as_sgd():
    paths = [skewed_noise(compressor, seeds=2) for compressor in (None, ef(ScaledSign))]
    np.testing.assert_allclose(paths[0], paths[1], atol=1e-5)


# 2: a non-smooth function whose subgradients all have one sign pattern --------------------------


def valley(compressor, scale=False, steps=2000):
    """Minimise |x1 + x2|/2 + |x1 - x2| from (1, 1); return the least value that was reached."""
    x, least = np.ones(2), 1.0
    for t in range(steps):
        lr = 0.1 / np.sqrt(t + 1)
        a, b = (1.0 if x[0] + x[1] >= 0 else -1.0), (1.0 if x[0] - x[1] >= 0 else -1.0)
        step = lr * np.array([0.5 * a + b, 0.5 * a - b])
        x = x - (lr if scale else 1.0) * through(compressor, step)
        least = min(least, 0.5 * abs(x[0] + x[1]) + abs(x[0] - x[1]))
    return least


def test_the_sign_stays_where_it_is_in_a_valley_and_feedback_goes_down():
    assert valley(bare(Sign), scale=True) == pytest.approx(1.0)
    assert valley(bare(ScaledSign)) == pytest.approx(1.0)
    assert valley(ef(ScaledSign)) < 0.005


# 3: two stochastic quadratics whose gradients have one sign pattern -----------------------------


def two_quadratics(compressor, seed, steps=1500):
    """Minimise (<a, x>² + <b, x>²) / 2, one of them drawn in each step; return the value."""
    rng = np.random.default_rng(seed)
    signs = np.array([1.0, -1.0])
    rows = signs * np.array([[1.0, 0.3], [0.4, 1.0]]) * rng.uniform(0.9, 1.1, (2, 2))
    x = np.array([1.0, 2.0])
    for _ in range(steps):
        row = rows[rng.integers(2)]
        x = x - through(compressor, 0.1 * 2 * (row @ x) * row)
    return float(np.sum((rows @ x) ** 2) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_two_quadratics_that_signs_cannot_solve(seed):
    assert two_quadratics(None, seed) < 1e-20
    assert two_quadratics(ef(ScaledSign), seed) < 1e-20
    assert two_quadratics(bare(ScaledSign), seed) > 1e-3


# top-1 of three workers -------------------------------------------------------------------------

ROWS = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])


def three_workers(make, steps, lr=0.01):
    """Minimise the mean of <a, x>² + |x|²/4 over three a, one per worker, from (1, 1, 1)."""
    compressors = [make() for _ in ROWS]
    x = np.ones(3)
    for _ in range(steps):
        gradients = [2 * (row @ x) * row + x / 2 for row in ROWS]
        x = x - lr * np.mean(
            [through(c, g) for c, g in zip(compressors, gradients, strict=True)], axis=0
        )
    return x


def test_top_1_diverges_as_the_closed_form_says():
    x = three_workers(lambda: bare(TopK, k=1), 40)
    np.testing.assert_allclose(x, (1 + 11 * 0.01 / 6) ** 40, rtol=1e-12)
    assert x[0] == pytest.approx(2.068228, abs=1e-6)


def test_top_1_with_feedback_converges():
    assert np.linalg.norm(three_workers(lambda: ef(TopK, k=1), 40)) < np.linalg.norm(np.ones(3))
    assert np.linalg.norm(three_workers(lambda: ef(TopK, k=1), 800)) < 0.01


if __name__ == "__main__":
    kinds = {"sgd": None, "ef(scaled_sign)": ef(ScaledSign), "scaled_sign": bare(ScaledSign)}
    print("x/4: sgd", settled(skewed_noise(None)), end=" ")
    print("ef(scaled_sign)", settled(skewed_noise(ef(ScaledSign))), end=" ")
    print("sign", settled(skewed_noise(bare(Sign), scale=0.01)))
    print("valley: ef(scaled_sign)", valley(ef(ScaledSign), steps=20_000), end=" ")
    print("sign", valley(bare(Sign), scale=True, steps=20_000))
    for name, compressor in kinds.items():
        print("two quadratics:", name, two_quadratics(compressor, 0))
    for name, make in {"topk": lambda: bare(TopK, k=1), "ef": lambda: ef(TopK, k=1)}.items():
        print("three workers:", name, three_workers(make, 40), three_workers(make, 400))
