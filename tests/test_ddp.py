"""DistributedDataParallel through aiosgd's compressors: two ranks over gloo on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.extra

RANK = Path(__file__).parent / "ddp_rank.py"
STEPS, RATE = 12, 0.1


TOPK = "ef(topk(ratio=0.05))"
COMPRESSORS = ("", "none", TOPK)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each of two ranks has after some steps, with each compressor and in plain DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    processes = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), "2", folder, *COMPRESSORS],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {
        compressor: [dict(np.load(folder / f"{i}-{rank}.npz")) for rank in range(2)]
        for i, compressor in enumerate(COMPRESSORS)
    }


def test_uncompressed_the_hook_does_what_ddp_does(ranks):
    for ours, plain in zip(ranks["none"], ranks[""], strict=True):
        np.testing.assert_allclose(ours["end"], plain["end"], rtol=1e-5, atol=1e-7)
        assert not np.array_equal(ours["end"], ours["start"])


@pytest.mark.parametrize("compressor", ["none", TOPK])
def test_all_ranks_have_the_same_bits_and_buckets_that_were_made_anew(ranks, compressor):
    first, second = ranks[compressor]
    assert first["end"].tobytes() == second["end"].tobytes()
    layouts = first["layouts"].tolist()
    assert layouts[:1] == [6]
    assert sum(layouts[1:3]) == 6  # two buckets from the second step on
    assert layouts == second["layouts"].tolist()


def test_what_is_kept_back_is_made_up_for(ranks):
    """Σ applied + mean error = Σ mean gradients, though buckets change: nothing gets lost."""
    both = ranks[TOPK]
    applied = (both[0]["start"] - both[0]["end"]) / RATE
    errors = np.mean([one["errors"] for one in both], axis=0)
    gradients = np.mean([one["gradients"] for one in both], axis=0)
    assert np.linalg.norm(errors) > 0.1 * np.linalg.norm(gradients)  # much is kept back
    np.testing.assert_allclose(applied + errors, gradients, atol=1e-5)


def test_payloads_of_different_sizes_and_few_bytes(ranks):
    sizes = [int(one["bytes_sent"]) for one in ranks[TOPK]]
    assert sizes[0] != sizes[1]  # indices are packed into as few bits as they take
    whole = [int(one["bytes_sent"]) for one in ranks["none"]]
    # the first two of twelve steps are sent whole, the others as 5 % of the values
    assert max(sizes) < whole[0] * (2 + 0.15 * (STEPS - 2)) / STEPS
