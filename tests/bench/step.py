"""Training steps per second: a small MLP over two workers, with and without its exchange.

    python tests/bench/step.py [--peers PYTHON] [--steps 2000] [--rounds 5] [--quick] [--json]

The work is the MLP 784-128-128-10 (118,282 parameters), batch 64 per worker, plain SGD, float32,
one BLAS thread per worker; a time is the median step of a job. Rows, in turn:

    plain            codec plain: 473 kB each way and step
    plain, overlap   the same, computing a step while the one before is exchanged
    allreduce        codec allreduce
    local            codec local: the same compute and machinery, nothing sent
    DDP, gloo        PyTorch DistributedDataParallel over gloo, where torch is installed
    DDP, no exchange its compute alone, without DistributedDataParallel
"""

from __future__ import annotations

import asyncio
import os

from contest import HERE, Case, has, parser, report, rounds_of, run

from aiosgd.bench import jobs

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


async def ddp(python: str, steps: int, *, exchange: bool) -> list[float]:
    """Run the peer in processes of its own and return the seconds of its median step."""
    words = [str(HERE / "ddp_step.py"), str(steps), str(jobs.STEP_BATCH), str(int(exchange))]
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
    return [1 / float(out.split()[-1])]


async def main() -> None:
    words = parser(__doc__)
    words.add_argument("--steps", type=int, default=2000)
    options = words.parse_args()
    steps = 200 if options.quick else options.steps
    async with jobs.site(jobs.STEP_WORKERS, 0) as place:

        async def ours(codec: str, *, overlap: bool = False) -> list[float]:
            return [await jobs.step_s(place, codec, steps, overlap=overlap)]

        contestants = {
            "plain": lambda: ours("plain"),
            "plain, overlap": lambda: ours("plain", overlap=True),
            "allreduce": lambda: ours("allreduce"),
            "local": lambda: ours("local"),
        }
        if has(options.peers, "torch"):
            contestants["DDP, gloo"] = lambda: ddp(options.peers, steps, exchange=True)
            contestants["DDP, no exchange"] = lambda: ddp(options.peers, steps, exchange=False)
        case = await Case(f"a step, {jobs.STEP_WORKERS} workers").run(
            contestants, rounds_of(options), warm_up=False
        )
    for name, seconds in case.times.items():
        case.more[name] = {"steps/s": 1 / sorted(seconds)[len(seconds) // 2]}
    report(case.rows("plain"), options)


if __name__ == "__main__":
    run(main)
