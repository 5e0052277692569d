"""Training steps of PyTorch models over two workers: aiosgd, and DistributedDataParallel over gloo.

    python tests/bench/torch_step.py [--steps 300] [--rounds 5] [--quick] [--json]

Run it with a Python that has torch. The work, plain SGD in float32, batch 64 per worker, one thread
per worker, all contestants in turn in each round; a time is the median step of a run:

    cnn      examples/torch_cnn on samples of 8 x 8: 38,282 parameters, dropout
    mlp      784-1024-256-10: 1,068,810 parameters

    plain, allreduce     these codecs, between node processes over unix sockets
    plain, overlap       computing a step while the one before is exchanged
    local                the same compute and machinery, nothing sent
    DDP, gloo            DistributedDataParallel over gloo on loopback
    DDP, no exchange     its compute alone, without DistributedDataParallel
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Mapping
from typing import Any

from contest import HERE, Case, has, parser, report, rounds_of, run

from aiosgd.bench import jobs

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FEATURES = {"cnn": 64, "mlp": 784}
BATCH = jobs.STEP_BATCH
# enough that no evaluation falls between most steps
SAMPLES = 20_000


def options_of(work: str) -> dict[str, Any]:
    """Return a job's options for one of the networks, which are in torch_ddp.py."""
    return {
        "model": "torch",
        "model_params": {"factory": f"{HERE / 'torch_ddp.py'}:make_{work}", "device": "cpu"},
        "dataset": "synthetic",
        "dataset_params": {"samples": SAMPLES, "features": FEATURES[work]},
        "batch_size": BATCH,
        "workers": jobs.STEP_WORKERS,
        "learning_rate": 0.01,
        "compute": {"threads": 1},
    }


async def step(place: jobs.Site, work: str, steps: int, **options: Any) -> list[float]:
    """Return the seconds of the median step of a job."""
    outcome = await place.run(
        **options_of(work), **options, epochs=steps, max_steps=steps, step_timeout=60.0
    )
    rows = outcome.train[outcome.train.node == 0]
    # evaluations between epochs are no part of a step, nor what both begin with
    return [float(statistics.median((rows.time_s[1:] - rows.time_s[:-1])[10:]))]


async def ddp(python: str, work: str, steps: int, *, exchange: bool) -> list[float]:
    """Run the peer in processes of its own and return the seconds of its median step."""
    words = [str(HERE / "torch_ddp.py"), work, str(steps), str(BATCH), str(int(exchange))]
    process = await asyncio.create_subprocess_exec(
        python,
        *words,
        env={**os.environ, **ONE_THREAD},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    return [float(out.split()[-1])]


def contestants(place: jobs.Site, work: str, steps: int, python: str | None) -> Mapping[str, Any]:
    """Return who takes part."""
    ours = {
        name: (lambda options=options: step(place, work, steps, **options))
        for name, options in {
            "plain": {"codec": "plain"},
            "allreduce": {"codec": "allreduce"},
            "plain, overlap": {"codec": "plain", "overlap": True},
            "local": {"codec": "local"},
        }.items()
    }
    if python is None:
        return ours
    return {
        "DDP, gloo": lambda: ddp(python, work, steps, exchange=True),
        **ours,
        "DDP, no exchange": lambda: ddp(python, work, steps, exchange=False),
    }


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--steps", type=int, default=300)
    options = words.parse_args()
    steps = 60 if options.quick else options.steps
    python = options.peers if has(options.peers, "torch") else None
    rows = []
    async with jobs.site(jobs.STEP_WORKERS, 0, allow_code=True) as place:
        for work in FEATURES:
            case = await Case(f"a step, {work}, {jobs.STEP_WORKERS} workers").run(
                contestants(place, work, steps, python), rounds_of(options), warm_up=False
            )
            rows += case.rows("DDP, gloo" if python else "plain")
    report(rows, options)


if __name__ == "__main__":
    run(main)
