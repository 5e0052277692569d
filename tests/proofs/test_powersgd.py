"""PowerSGD's warm start is a power iteration: how fast it finds the best matrix of rank 4.

Vogels, Karimireddy and Jaggi, PowerSGD, NeurIPS 2019, section 4.2. A step multiplies Q by MᵀM, so
the tangent of its angle to the best subspace shrinks by (s5/s4)², and the squared error's
distance from the best one by (s5/s4)⁴. As a script, it prints the steps.
"""

import numpy as np

from aiosgd.plugins.compressors.lowrank import PowerSgd

RANK = 4
SPECTRUM = np.array([10.0, 8.0, 6.0, 5.0, 5 * 0.26**0.25, *1.5 * 0.9 ** np.arange(35)])
RATE = (SPECTRUM[RANK] / SPECTRUM[RANK - 1]) ** 4
BEST = float(np.sum(SPECTRUM[RANK:] ** 2))


def matrix(seed):
    """Return a matrix of 60 rows and 40 columns with the singular values of SPECTRUM."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in (60, 40))
    return left * SPECTRUM @ right.T


def excess(seed, stream, steps=19):
    """Return by how much the squared error exceeds the best one, step by step."""
    powersgd = PowerSgd(PowerSgd.Params(RANK, feedback=False), np.random.default_rng([seed, 1]))
    m = matrix(seed)
    payloads = [powersgd.compress(m, stream) for _ in range(steps)]
    return [float(np.sum((m - powersgd.decompress(p)) ** 2)) - BEST for p in payloads]


def rate(errors):
    """Return the factor per step in the last six, when the smaller values have died out."""
    return (errors[-1] / errors[-7]) ** (1 / 6)


def test_the_warm_start_converges_to_the_best_rank_4_at_the_predicted_rate():
    measured = [rate(excess(seed, "s")) for seed in range(5)]
    np.testing.assert_allclose(measured, RATE, rtol=0.03)


def test_a_cold_start_makes_no_progress():
    for seed in range(5):
        errors = excess(seed, None)
        assert np.mean(errors[-6:]) > 0.5 * np.mean(errors[:6])
        assert min(errors) > 0.05 * BEST
        assert excess(seed, "s")[-1] < 1e-5 * BEST


def test_a_matrix_of_rank_4_is_exact_at_once():
    m = np.linalg.svd(matrix(0))
    low = (m[0][:, :RANK] * m[1][:RANK]) @ m[2][:RANK]
    powersgd = PowerSgd(PowerSgd.Params(RANK), np.random.default_rng(0))
    for _ in range(3):
        restored = powersgd.decompress(powersgd.compress(low, "s"))
        np.testing.assert_allclose(restored, low, atol=1e-11)


if __name__ == "__main__":
    print(f"squared error above the best {BEST:.2f}; predicted factor per step {RATE:.3f}")
    warm, cold = excess(0, "s"), excess(0, None)
    for step, pair in enumerate(zip(warm, cold, strict=True)):
        print(f"step {step:2d}  warm {pair[0]:.3e}  cold {pair[1]:.3e}")
    print(f"measured factor: warm {rate(warm):.3f}, cold {rate(cold):.3f}")
