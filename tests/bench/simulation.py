"""Large simulated jobs, and a federated round of 100 clients beside Flower's simulation engine.

    python tests/bench/simulation.py [--peers PYTHON] [--rounds 3] [--quick] [--json]

Each simulation runs in a process of its own; its time is that of the simulated job, without imports
and files, `MB` the process's peak of resident memory:

    10,000 nodes         codec dpsgd on a ring: 100 parameters, 10 steps
    1,000 workers        the digits in 1,000 shares (dirichlet), mlp, 20 steps: parameter_server with
                         8 servers, and dpsgd on a ring; the accuracy is the mean over all workers
    a federated round    100 clients whose fit does nothing, fedavg, 100 parameters: the time of a
                         round; the peer is Flower (flwr[simulation] on Ray), from its second round on
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from contest import HERE, Case, has, parser, report, rounds_of, run

ROUNDS = 6  # of the federated work
CLIENTS = 100
LIMIT = 200.0  # seconds for one process
TINY: Mapping[str, Any] = {
    "model": "blank",
    "model_params": {"parameters": 100},
    "dataset": "synthetic",
    "dataset_params": {"samples": 10_000, "features": 2},
    "batch_size": 1,
    "epochs": 1000,
}
RING: Mapping[str, Any] = {"codec": "dpsgd", "topology": "ring"}
DIGITS: Mapping[str, Any] = {"partition": "dirichlet", "batch_size": 1, "epochs": 30}


def jobs(options) -> dict[str, dict[str, Any]]:
    """Return the jobs by name."""
    many, some = (200, 50) if options.quick else (10_000, 1000)
    return {
        f"{many:,} nodes, dpsgd on a ring": {
            **TINY,
            **RING,
            "workers": many,
            "max_steps": 10,
        },
        f"{some:,} workers, parameter_server": {
            **DIGITS,
            "codec": "parameter_server",
            "workers": some,
            "servers": 8,
            "max_steps": 20,
        },
        f"{some:,} workers, dpsgd on a ring": {
            **DIGITS,
            **RING,
            "workers": some,
            "max_steps": 20,
        },
    }


SIMULATE = """
import json, resource, sys
from pathlib import Path
from aiosgd.runtime.config import make_job
from aiosgd.runtime.coordinator import load_job
from aiosgd.runtime.simulation.simulate import Simulation, play

options = json.loads(sys.argv[1])
workers, servers = options.pop("workers"), options.pop("servers", 0)
load, _ = load_job(make_job(options), workers, Path("no data here"))
played = play(Simulation(load=load, workers=workers, servers=servers))
assert not played.ending.error, played.ending.error
rows = [session.evaluations.array() for session in played.world.sessions.values()]
accuracies = [float(own.accuracy[-1]) for own in rows if len(own)]
print(json.dumps({
    "seconds": played.real_s,
    "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    "messages": played.world.network.messages,
    "virtual s": played.ending.time_s,
    "accuracy": sum(accuracies) / len(accuracies),
}))
"""


async def child(*words: str) -> dict[str, Any]:
    """Run a process to its end, with all that it starts; return the JSON of its last line."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(LIMIT):
            out, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return json.loads(out.splitlines()[-1])


async def simulated(case: Case, name: str, job: Mapping[str, Any], steps: int = 1) -> list[float]:
    """Simulate a job; note what else there is to say of it."""
    facts = await child(sys.executable, "-c", SIMULATE, json.dumps(job))
    seconds = facts.pop("seconds")
    case.more[name] = facts
    return [seconds / steps]


async def flower(python: str, clients: int) -> list[float]:
    """Run Flower's engine; return the seconds of its rounds after the first."""
    facts = await child(python, str(HERE / "flower_simulation.py"), str(clients), str(ROUNDS))
    return list(facts["rounds"])


async def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    rows = []
    for work, job in jobs(options).items():
        case = Case(work)
        ours = functools.partial(simulated, case, "aiosgd", job)
        rows += (await case.run({"aiosgd": ours}, rounds_of(options), warm_up=False)).rows()
    clients = 10 if options.quick else CLIENTS
    case = Case(f"a round of {clients} clients")
    job = {**TINY, "codec": "fedavg", "workers": clients, "servers": 1, "max_steps": ROUNDS}
    job["codec_params"] = {"turn": 1}
    contestants = {"aiosgd": functools.partial(simulated, case, "aiosgd", job, ROUNDS)}
    if has(options.peers, "flwr") and has(options.peers, "ray"):
        contestants["flower"] = functools.partial(flower, options.peers, clients)
    await case.run(contestants, rounds_of(options), warm_up=False)
    for name, times in case.times.items():
        case.more.setdefault(name, {})["clients/s"] = clients / sorted(times)[len(times) // 2]
    report([*rows, *case.rows()], options)


if __name__ == "__main__":
    run(main)
