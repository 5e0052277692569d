"""The example of docs/torch.md: a small CNN on the digits, uncompressed and with one value in 100."""

from pathlib import Path

import pytest

import aiosgd

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.extra

CNN = Path(__file__).parents[1] / "examples/torch_cnn/cnn.py"


@pytest.mark.parametrize("compressor", ["none", "ef(topk(ratio=0.01))"])
def test_a_cnn_reaches_97_percent_on_the_digits(compressor, tmp_path):
    outcome = aiosgd.simulate(
        codec="plain",
        compressor=compressor,
        model="torch",
        model_params={"factory": f"{CNN}:make_cnn"},
        workers=2,
        batch_size=64,
        epochs=40,
        learning_rate=0.1,
        optimizer_params={"momentum": 0.9, "schedule": "cosine"},
        output=str(tmp_path),
    )
    assert outcome.metrics["accuracy"] >= 0.97
