import numpy as np
import pytest

from aiosgd.codecs.local import Local
from aiosgd.codecs.testing import LocalCluster


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("seed", range(5))
async def test_every_worker_gets_its_own_values_and_nothing_is_sent(seed, mode):
    cluster = LocalCluster(Local, workers=3, seed=seed, mode=mode)
    results = await cluster.run(lambda step, block: [step + block / 4], steps=4)
    for step, by_worker in enumerate(results):
        assert by_worker == {worker: [step + worker / 4] for worker in range(3)}
    assert cluster.sent == []


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_with_several_blocks_it_is_their_mean_in_every_step(mode):
    cluster = LocalCluster(Local, workers=3, redundancy=2, mode=mode)  # blocks 01, 02, 12
    results = await cluster.run(lambda step, block: [10.0 * step + 2 * block], steps=3)
    assert results[2] == {0: [21.0], 1: [22.0], 2: [23.0]}
    assert all(result.dtype == np.float32 for result in results[2].values())
