"""Old gradients: where plain asynchronous SGD falls to chance, delay compensation still learns.

Zheng, Meng, Wang, Chen, Yu, Ma, Liu: Asynchronous Stochastic Gradient Descent with Delay
Compensation, ICML 2017, arXiv 1609.08326: DC-ASGD-a with λ0 = 2, on the embedded digits, with 4 and
8 workers in a simulated network, the same in every run. Three ways to train asynchronously: a
parameter server whose workers do not wait for its answers; one whose workers do, with delays of
n - 1 updates, as the paper takes for granted; and DC-ASGD with these very delays. As a script, it
prints the accuracies, those of the paper's own form without a limit to corrections among them.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest

import aiosgd
from aiosgd.codecs import asynchronous

FILE = Path(asynchronous.__file__)
CASES = [(4, 0.5), (4, 0.7), (8, 0.3)]  # workers, learning rate
CHANCE = 0.25  # of ten classes; a model that has not settled on one of them may have some more


def accuracy(codec, workers, rate, seed, output, **params):
    """Return the test accuracy after 40 epochs: 200 steps of 4 workers, or 80 of 8 workers."""
    with np.errstate(all="ignore"):  # what diverges overflows
        outcome = aiosgd.simulate(
            codec=codec,
            mode="async",
            workers=workers,
            learning_rate=rate,
            batch_size=64,
            epochs=40,
            seed=seed,
            codec_params=params,
            network="lan",
            output=str(output),
        )
    return outcome.metrics["accuracy"]


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("workers", "rate"), CASES)
def test_delay_compensation_learns_where_plain_updates_fall_to_chance(workers, rate, tmp_path):
    assert accuracy("parameter_server", workers, rate, 0, tmp_path) < CHANCE
    assert accuracy(f"{FILE}:DcAsgd", workers, rate, 0, tmp_path) > 0.9


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("workers", "rate"), CASES[1:])
def test_and_so_it_does_at_the_same_delay(workers, rate, tmp_path):
    assert accuracy(f"{FILE}:Pull", workers, rate, 0, tmp_path) < CHANCE


if __name__ == "__main__":
    ways = [
        ("parameter_server", {}),
        (f"{FILE}:Pull", {}),
        (f"{FILE}:DcAsgd", {}),
        (f"{FILE}:DcAsgd", {"limit": float("inf")}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for workers, rate in CASES:
            for codec, params in ways:
                each = [accuracy(codec, workers, rate, seed, folder, **params) for seed in range(3)]
                figures = "  ".join(f"{one:.4f}" for one in each)
                print(workers, rate, f"{codec.split(':')[-1]:<16}", figures, params or "")
