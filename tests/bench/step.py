"""Training steps per second: a small MLP over two workers, with and without its exchange.

    python tests/bench/step.py [--runs 5] [--steps 2000] [--torch PYTHON] [--json]

The work is the MLP 784-128-128-10 (118,282 parameters), batch 64 per worker, plain SGD, float32,
one BLAS thread per worker. Rows, interleaved run by run so that they meet the same machine:

    plain         aiosgd, codec plain: 473 kB each way and step
    plain overlap the same, computing a step while the one before is exchanged
    no exchange   aiosgd, codec local: the same compute and machinery, nothing sent
    DDP gloo      PyTorch DistributedDataParallel over gloo, where torch is installed
    DDP compute   its compute alone, without DistributedDataParallel

`--torch` names a Python that has torch, if this one has not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

WORKERS, BATCH = 2, 64
HERE = Path(__file__).parent


def ours(codec: str, overlap: bool, steps: int) -> float:
    """Run a job and return its steps per second, counted by the slower worker."""
    import aiosgd

    with tempfile.TemporaryDirectory() as output:
        result = aiosgd.run(
            codec=codec,
            overlap=overlap,
            dataset="synthetic",
            dataset_params={"samples": 20_000, "features": 784},
            model_params={"hidden": [128, 128]},
            batch_size=BATCH,
            workers=WORKERS,
            epochs=steps,
            max_steps=steps,
            learning_rate=0.01,
            compute={"threads": 1},
            output=output,
        )
    # evaluations between epochs are no part of a step
    rows = result.train[result.train.node == 0]
    return 1 / statistics.median(rows.time_s[1:] - rows.time_s[:-1])


def ddp(python: str, exchange: bool, steps: int) -> float:
    """Run the peer in processes of its own and return its steps per second."""
    command = [python, str(HERE / "ddp_step.py"), str(steps), str(BATCH), str(int(exchange))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return float(done.stdout.split()[-1])


def has_torch(python: str) -> bool:
    """Tell whether a Python can import torch."""
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> None:
    """Measure, then print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    steps = options.steps
    work: dict[str, Callable[[], float]] = {
        "plain": lambda: ours("plain", overlap=False, steps=steps),
        "plain overlap": lambda: ours("plain", overlap=True, steps=steps),
        "no exchange": lambda: ours("local", overlap=False, steps=steps),
    }
    if has_torch(options.torch):
        work["DDP gloo"] = lambda: ddp(options.torch, exchange=True, steps=steps)
        work["DDP compute"] = lambda: ddp(options.torch, exchange=False, steps=steps)
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.runs):
        for name, measure in work.items():
            rates[name].append(measure())
    report(rates, options)


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians, ranges and the ratio of each row to `plain`, run by run."""
    rows = [
        {
            "work": name,
            "steps_per_s": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "plain_to_this": statistics.median(
                a / b for a, b in zip(rates["plain"], values, strict=True)
            ),
        }
        for name, values in rates.items()
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if options.json:
        print(json.dumps({"machine": machine, "runs": options.runs, "rows": rows}))
        return
    print(f"{' '.join(sys.argv)}\n{machine}; {options.runs} runs of {options.steps} steps; steps/s")
    print(f"{'':15}{'median':>8}{'min':>8}{'max':>8}   plain / this")
    for row in rows:
        print(
            f"{row['work']:15}{row['steps_per_s']:8.0f}{row['min']:8.0f}{row['max']:8.0f}"
            f"   {row['plain_to_this']:.2f}"
        )


if __name__ == "__main__":
    main()
