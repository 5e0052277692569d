"""Predicted against measured: what a calibrated simulation says of real jobs on this machine.

    python tests/bench/prediction.py [--rounds 5] [--unix] [--save FILE.toml] [--quick] [--json]

Nodes are started and calibrated, as `aiosgd simulate --calibrate` does it; then the same jobs run on
them, over TCP on loopback (`--unix`: over unix sockets), and in the simulation. The calibration
itself uses codec `local`, and `plain` with 4 B and 10 MB on two workers; all else is prediction.

    codecs      plain, allreduce, parameter_server (with one server), on 2 and on 3 workers
    digits      the default model and data set, 4,810 parameters, batch 64
    mlp         784-128-128-10, 118,282 parameters, batch 64, synthetic data
    blank       10 MB of parameters and nothing to compute

A time is the median between two steps of a job, the rounds' medians thereof are compared; bytes per
step have to be the same. The last lines are the median and the largest error.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from contest import duration, machine, parser, rounds_of, say

from aiosgd.aio import default_data_dir
from aiosgd.bench import calibrate, jobs
from aiosgd.runtime.config import make_job
from aiosgd.runtime.pool import keep_heap_warm
from aiosgd.runtime.simulation.compare import Figures, error, figures, predict
from aiosgd.runtime.simulation.networks import write_network
from aiosgd.runtime.workload import load

CODECS = ("plain", "allreduce", "parameter_server")
WORKERS = (2, 3)
LARGE = 10_000_000


@dataclass
class Case:
    """A job, what it takes on nodes, round by round, and what it is predicted to take."""

    name: str
    options: Mapping[str, Any]
    measured: list[Figures] = field(default_factory=list)
    predicted: Figures | None = None

    @property
    def workers(self) -> int:
        return int(self.options["workers"])

    @property
    def servers(self) -> int:
        return int(self.options["servers"])

    def row(self) -> dict[str, Any]:
        """Return the case as a row of the table."""
        assert self.predicted is not None
        row: dict[str, Any] = {"work": self.name, "n": len(self.measured)}
        for name in ("step_s", "wait_s", "train_s"):
            times = [getattr(one, name) for one in self.measured]
            middle, guess = statistics.median(times), getattr(self.predicted, name)
            row[name] = {
                "predicted": guess,
                "measured": middle,
                "range": [min(times), max(times)],
                "error": error(guess, middle),
            }
        sent = {one.bytes_per_step for one in self.measured}
        row["bytes_per_step"] = self.predicted.bytes_per_step
        row["bytes_are_equal"] = sent == {self.predicted.bytes_per_step}
        return row


def cases(*, quick: bool, unix: bool) -> list[Case]:
    """Return all jobs."""
    steps = 100 if quick else 400
    models = {
        "digits": {"epochs": 100, "max_steps": steps},
        "mlp": {**jobs.STEP_JOB, "compute": {}, "epochs": 100, "max_steps": steps},
        "blank": jobs.blank_job(LARGE, max(WORKERS), 12 if quick else 30),
    }
    return [
        Case(
            f"{codec}, {model}, {workers} workers",
            {
                **options,
                "codec": codec,
                "workers": workers,
                "servers": int(codec == "parameter_server"),
                "wire": {"unix": unix},
                "seed": 1,
            },
        )
        for workers in WORKERS
        for model, options in models.items()
        for codec in CODECS
    ]


async def measure(
    work: list[Case], rounds: int, *, unix: bool
) -> tuple[calibrate.Measured, list[str]]:
    """Calibrate, then run all jobs in turn, round by round."""
    async with jobs.site(max(WORKERS), 1) as place:
        found = await calibrate.measure(place, say, unix=unix, rounds=rounds)
        for number in range(1, rounds + 1):
            for case in work:
                say(f"{case.name}, round {number} of {rounds}")
                outcome = await place.run(**case.options)
                summary = outcome.summary
                case.measured.append(figures(outcome.train, summary.bytes_sent, summary.train_s))
        return found, calibrate.addresses(place.cluster)


def report(rows: list[dict[str, Any]], model: Any, as_json: bool) -> None:
    """Print the table, or one JSON object."""
    say("")
    command = " ".join(["python", *sys.argv])
    if as_json:
        print(json.dumps({"command": command, "machine": machine(), "rows": rows}))
        return
    print(f"{command}\n{machine()}; {rows[0]['n']} rounds\n{model}\n")
    print(
        f"{'':36}{'a step':>18}{'':10}{'error':>7}{'a wait':>20}{'error':>7}{'train':>17}{'error':>7}"
    )
    both = f"{'predicted':>10}{'measured':>10}"
    print(f"{'':36}{both}{'':15}{both}{'':7}{both}")
    for row in rows:
        cells = "".join(
            f"{duration(row[name]['predicted']):>10}{duration(row[name]['measured']):>10}"
            + (f"{_span(row[name]['range']):>8}" if name == "step_s" else "")
            + f"{row[name]['error']:>+7.0%}"
            for name in ("step_s", "wait_s", "train_s")
        )
        print(f"{row['work']:36}{cells}{'' if row['bytes_are_equal'] else '  BYTES DIFFER'}")
    for name in ("step_s", "wait_s", "train_s"):
        errors = [abs(row[name]["error"]) for row in rows]
        print(f"{name}: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")


def _span(span: list[float]) -> str:
    """Return how far the rounds are apart, as a share of the fastest."""
    return f"±{(span[1] - span[0]) / 2 / span[0]:.0%}"


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--unix", action="store_true", help="over unix sockets")
    words.add_argument("--save", type=Path, metavar="FILE.toml", help="keep the calibration")
    options = words.parse_args()
    work = cases(quick=options.quick, unix=options.unix)
    keep_heap_warm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found, names = runner.run(measure(work, rounds_of(options), unix=options.unix))
    model = calibrate.fit(found)
    if options.save:
        write_network(model, options.save, calibrate.comments(found, names))
    for case in work:
        say(f"{case.name}, simulated")
        job = make_job(case.options)
        loaded = load(job, case.workers, default_data_dir())
        case.predicted = predict(loaded, case.workers, case.servers, model)
    report([case.row() for case in work], model, options.json)


if __name__ == "__main__":
    main()
