"""Thousands of small jobs, each with a codec, a shape, a network and faults drawn from its seed.

    python tests/runtime/simulation/test_swarm.py --seeds 0:20000    # from the folder of the checkout

Whatever is drawn: the job ends in bounded virtual time; it is done only if every living worker took
every step and, in sync mode, has the bits of the same job on a network without any fault; if it
failed, a fault had befallen it, and its error names a node; nothing escapes to the loop or is a
codec's own error. What breaks a rule is made small before it is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from aiosgd.codecs import plain
from aiosgd.errors import PeerLostError
from aiosgd.plugins.kinds import CODECS
from aiosgd.plugins.registry import params_class
from aiosgd.runtime import workload
from aiosgd.runtime.actor import Actor
from aiosgd.runtime.config import JobConfig
from aiosgd.runtime.job import Job, server_ids
from aiosgd.runtime.mesh import DEAD_AFTER
from aiosgd.runtime.simulation.faults import Crash, Cut, Fault
from aiosgd.runtime.simulation.loop import run_virtually
from aiosgd.runtime.simulation.network import NetworkModel
from aiosgd.runtime.simulation.network import Path as Road
from aiosgd.runtime.simulation.trace import Trace
from aiosgd.runtime.simulation.world import Ending, Scenario, VirtualTransport, World
from aiosgd.runtime.workload import Workload

STEPS = 4
BLOCK_S, LATENCY_S = 2e-3, 1e-4
LIMIT_S = 60.0
"""Virtual seconds for milliseconds of work: silence counts after 6 s, and a step times out after
10 s and again after 10 s for its rescue, the last of them begun when the longest cut has healed."""
EVENTS = 200_000
LONGEST_CUT_S = 20.0
OWN_ERROR = "failed on node"  # a hook raised something, or gave no sensible result
NAMED = re.compile(r"\b(worker|server|node) -?\d+\b")

# what has no default, and randomness that a simulation knows
GIVEN = {
    "robust": {"hostile": 0},
    "dp": {"clip": 1.0, "noise": 1e-4, "entropy": "seed"},
    "secure_sum": {"entropy": "seed"},
}
SHORT = {"turn": 2, "period": 2, "buffer": 2}  # or a job of four steps exchanges nothing


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One job and what befalls it.

    Attributes:
        loses: whether the job goes on without a worker (`on_loss`), with at least `min_workers`.
        slow: worker -> factor.
        schedule: of the network's draws.
    """

    codec: str
    mode: str = "sync"
    workers: int = 2
    servers: int = 0
    compressor: str = "none"
    topology: str = "full"
    overlap: bool = False
    loses: bool = False
    min_workers: int = 1
    jitter: float = 0.0
    slow: tuple[tuple[int, float], ...] = ()
    schedule: int = 0
    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        """Return the trial as Python code, without what has its default."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        defaults = {one.name: one.default for one in fields(self)}
        words = [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
        return f"Trial({', '.join(words)})"

    @property
    def calm(self) -> Trial:
        """The same job without faults, stragglers or jitter."""
        return replace(self.job, loses=False, min_workers=1)

    @property
    def job(self) -> Trial:
        """What is to be done, whatever befalls it."""
        return replace(self, jitter=0.0, slow=(), schedule=0, faults=())


@dataclass
class Played:
    """How a trial went.

    Attributes:
        error: why the job did not end well; `endless` if it did not end at all.
        steps: worker -> how many it took; of the living ones only.
        problems: what reached the loop's exception handler, or was raised.
    """

    state: str = ""
    error: str = ""
    endless: bool = False
    cause: BaseException | None = None
    time_s: float = 0.0
    steps: dict[int, int] = field(default_factory=dict)
    weights: dict[int, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


# Drawing --------------------------------------------------------------------------------------


@functools.cache
def names() -> list[str]:
    return [entry.name for entry in CODECS.entries() if entry.distribution == "aiosgd"]


def draw(seed: int) -> Trial:
    """Return the trial of a seed."""
    rng = np.random.default_rng([seed, 17])
    trial = draw_job(rng)
    if rng.random() < 0.5:
        trial = replace(trial, jitter=float(rng.choice([1e-4, 5e-3])))
    if rng.random() < 0.4:
        slow = ((int(rng.integers(trial.workers)), float(rng.choice([2.0, 8.0]))),)
        trial = replace(trial, slow=slow)
    if play(trial.calm).state != "done":  # the codec does not take such a compressor or topology
        trial = replace(trial, compressor="none", topology="full")
    span = play(trial.calm).time_s * 1.2 * max([1.0, *(factor for _, factor in trial.slow)])
    count = int(rng.integers(1, 4))
    faults = tuple(draw_fault(rng, trial, span) for _ in range(count))
    return replace(trial, schedule=int(rng.integers(1 << 30)), faults=faults)


def draw_job(rng: np.random.Generator) -> Trial:
    name = str(rng.choice(names()))
    codec = CODECS.load(name)
    halves = [codec, *([codec.server] if codec.server else [])]
    modes = [mode for mode in ("sync", "async") if all(mode in half.modes for half in halves)]
    mode = str(rng.choice(modes))
    workers = int(rng.integers(1, 6))
    job = Trial(
        codec=name,
        mode=mode,
        workers=workers,
        servers=int(rng.integers(1, 3)) if codec.server else 0,
        overlap=mode == "sync" and codec.exchange != "weights" and rng.random() < 0.25,
        loses=mode == "async" and codec.bears_loss and rng.random() < 0.6,
    )
    if any(half.compresses for half in halves) and rng.random() < 0.4:
        job = replace(job, compressor=str(rng.choice(["int8", "ef(topk)", "fp16"])))
    if codec.uses_topology and rng.random() < 0.5 and workers > 2:
        job = replace(job, topology=str(rng.choice(["ring", "exponential"])))
    if job.loses:
        job = replace(job, min_workers=int(rng.integers(1, workers + 1)))
    return job


def draw_fault(rng: np.random.Generator, trial: Trial, span: float) -> Fault:
    nodes = nodes_of(trial)
    when = round(float(rng.uniform(0, span)), 9)
    kind = rng.choice(["crash", "host", "cut", "cut", "cut", "cut"])
    if kind != "cut" or len(nodes) == 1:
        return Crash(when, int(rng.choice(nodes)), kind == "host")
    order = [int(node) for node in rng.permutation(nodes)]
    middle = int(rng.integers(1, len(order)))
    some, others = tuple(order[:middle]), tuple(order[middle:])
    if rng.random() < 0.3:  # from one other node only
        some, others = some[:1], others[:1]
    most = rng.choice([span, span, 3.0, LONGEST_CUT_S])
    return Cut(when, some, others, round(float(rng.uniform(0, most)), 6) + 1e-6)


def nodes_of(trial: Trial) -> tuple[int, ...]:
    return (*range(trial.workers), *server_ids(trial.servers))


# Playing --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def load(trial: Trial) -> Workload:
    """Return what a trial's `job` needs."""
    codec = CODECS.load(trial.codec)
    known = {one.name for one in fields(params_class(codec))}
    params = {key: value for key, value in SHORT.items() if key in known}
    job = JobConfig(
        codec=trial.codec,
        codec_params={**params, **GIVEN.get(trial.codec, {})},
        mode=trial.mode,
        compressor="none",
        topology=trial.topology,
        overlap=trial.overlap,
        on_loss="continue" if trial.loses else "stop",
        min_workers=trial.min_workers,
        granularity="tensor" if trial.servers > 1 else "model",
        dataset="synthetic",
        dataset_params={"samples": 60, "features": 3, "classes": 2},
        model="softmax",
        batch_size=4,
        epochs=STEPS,
        max_steps=STEPS,
    )
    link, inner = re.fullmatch(r"(\w+)(?:\((\w+)\))?", trial.compressor).groups()
    job = replace(job, compressor=f"{link}({inner})" if inner else link)
    return workload.load(job, trial.workers, Path("no data here"))


def scenario(trial: Trial) -> Scenario:
    road = Road(latency_s=LATENCY_S, jitter_s=trial.jitter)
    model = NetworkModel(name="swarm", block_s=BLOCK_S, path=road)
    return Scenario(network=model, slow=dict(trial.slow), faults=trial.faults, seed=trial.schedule)


def play(trial: Trial) -> Played:
    """Play a trial; one without a fault is remembered."""
    return play_calm(trial) if trial == trial.calm else play_once(trial)


@functools.lru_cache(maxsize=4096)
def play_calm(trial: Trial) -> Played:
    return play_once(trial)


def play_once(trial: Trial) -> Played:
    played, worlds = Played(), []

    async def main() -> Ending:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, about: played.problems.append(escaped(about)))
        workers, servers = range(trial.workers), server_ids(trial.servers)
        worlds.append(World(load(trial.job), workers, servers, scenario(trial), Trace()))
        return await worlds[0].run()

    try:
        ending = run_virtually(main(), seconds=LIMIT_S, events=EVENTS)
        played.state, played.error, played.cause = ending.state, ending.error, ending.cause
        played.time_s = ending.time_s
    except Exception as error:  # noqa: BLE001 - a bug may raise anything
        played.endless, played.error = True, f"{type(error).__name__}: {error}"
        return played
    for node, session in worlds[0].sessions.items():
        if node >= 0 and node not in worlds[0].lost:
            played.steps[node] = len(session.train)
            played.weights[node] = session.weights.tobytes()
    return played


def escaped(about: dict[str, Any]) -> str:
    return f"{about['message']}: {about.get('exception')!r}"


# Judging --------------------------------------------------------------------------------------


def judge(trial: Trial, played: Played) -> Iterator[str]:
    """Yield what is wrong with how a trial went."""
    yield from played.problems
    if played.endless:
        yield f"it does not end: {played.error}"
    elif played.state == "done":
        yield from judge_done(trial, played)
    else:
        yield from judge_failed(trial, played)


def judge_done(trial: Trial, played: Played) -> Iterator[str]:
    for node, steps in played.steps.items():
        if steps != STEPS:
            yield f"done, but worker {node} took {steps} of {STEPS} steps"
    if len(played.steps) < (trial.min_workers if trial.loses else trial.workers):
        yield f"done, but only the workers {list(played.steps)} live"
    if trial.mode == "sync" and played.weights != play(trial.calm).weights:
        yield "done, but the weights are not those of the job without a fault"


def judge_failed(trial: Trial, played: Played) -> Iterator[str]:
    if not NAMED.search(played.error) or ": " not in played.error:
        yield f"it failed without a node and a reason: {played.error!r}"
    if OWN_ERROR in played.error:
        yield f"a codec's own error: {played.error}"
    if not any(fault.time_s <= played.time_s for fault in trial.faults):
        yield f"it failed before any fault: {played.error}"
    if reason := must_be_done(trial):
        yield f"it failed though {reason}: {played.error}"


def must_be_done(trial: Trial) -> str:
    """Return why a job has to survive its faults; empty if it need not."""
    cuts = [fault for fault in trial.faults if isinstance(fault, Cut)]
    ended = {fault.node for fault in trial.faults if isinstance(fault, Crash)}
    if not ended and sum(cut.lasts_s for cut in cuts) < DEAD_AFTER - 0.5:
        return "every cut healed in time"
    few = trial.workers - len(ended) < trial.min_workers
    if trial.loses and not cuts and not few and min(ended) >= 0:
        return f"it may go on with {trial.min_workers} workers"
    return ""


def smaller(trial: Trial) -> Iterator[Trial]:
    """Yield simpler trials."""
    for i in range(len(trial.faults)):
        yield replace(trial, faults=trial.faults[:i] + trial.faults[i + 1 :])
    for name in ("jitter", "slow", "compressor", "topology", "overlap", "schedule"):
        default = next(one.default for one in fields(trial) if one.name == name)
        if getattr(trial, name) != default:
            yield replace(trial, **{name: default})
    if trial.servers > 1 and -2 not in named(trial):
        yield replace(trial, servers=1)
    last = trial.workers - 1
    if last and last not in named(trial) and trial.min_workers <= last:
        yield replace(trial, workers=last)
    for i, fault in enumerate(trial.faults):
        rounded = replace(fault, time_s=float(f"{fault.time_s:.2g}"))
        if rounded != fault:
            yield replace(trial, faults=(*trial.faults[:i], rounded, *trial.faults[i + 1 :]))


def named(trial: Trial) -> set[int]:
    """Return the nodes that faults and stragglers name."""
    sides = [
        (one.node,) if isinstance(one, Crash) else (*one.some, *one.others) for one in trial.faults
    ]
    return {*itertools.chain(*sides), *(worker for worker, _ in trial.slow)}


def shrink(trial: Trial) -> Trial:
    """Return the simplest trial that still breaks a rule."""
    for simpler in smaller(trial):
        if list(judge(simpler, play(simpler))):
            return shrink(simpler)
    return trial


@dataclass
class Swarm:
    """What a swarm has found.

    Attributes:
        wrong: (seed, what is wrong) with the simplest trial that shows it.
        ends: (mode, state) -> how many.
        codecs: which were drawn.
        longest_s: the most virtual seconds that a job took.
    """

    wrong: list[tuple[int, list[str], Trial]] = field(default_factory=list)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    per_s: float = 0.0


def swarm(
    seeds: Iterable[int], most: int = 5, told: Callable[[str], None] = lambda _: None
) -> Swarm:
    """Play the trials of some seeds, until so many were wrong."""
    found, started = Swarm(), time.perf_counter()
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for number, seed in enumerate(seeds, 1):
            trial = draw(seed)
            played = play(trial)
            found.ends[trial.mode, "endless" if played.endless else played.state] += 1
            found.codecs[trial.codec] += 1
            found.longest_s = max(found.longest_s, played.time_s)
            if wrong := list(judge(trial, played)):
                found.wrong.append((seed, wrong, shrink(trial)))
                told(f"seed {seed}: {wrong}\n    {found.wrong[-1][2]}")
                if len(found.wrong) >= most:
                    break
            if number % 100 == 0:
                gc.collect()
            found.per_s = number / (time.perf_counter() - started)
    return found


def report(found: Swarm) -> None:
    ends = ", ".join(f"{mode} {state}: {n}" for (mode, state), n in sorted(found.ends.items()))
    print(f"{found.ends.total()} trials, {found.per_s:.0f}/s, {len(found.codecs)} codecs; {ends}; ")
    print(f"longest {found.longest_s:.3f} virtual s; {len(found.wrong)} wrong")


@pytest.fixture
def quick():
    """Collect garbage between trials only."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.proof
def test_a_few_trials_keep_the_rules(quick):
    found = swarm(range(100))
    assert not found.wrong
    assert {("sync", "done"), ("sync", "failed"), ("async", "done"), ("async", "failed")} == set(
        found.ends
    )


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_whatever_befalls_it_a_job_ends_well_or_with_a_reason(quick):
    """1,500 seeds; 20,000 if AIOSGD_EVERY_FAULT is set."""
    found = swarm(range(20_000 if "AIOSGD_EVERY_FAULT" in os.environ else 1500))
    report(found)
    assert not found.wrong
    assert set(found.codecs) == set(names())


def test_a_trial_repeats_itself(quick):
    trial = draw(11)
    first, second = play_once(trial), play_once(trial)
    assert (first.state, first.error, first.time_s) == (second.state, second.error, second.time_s)
    assert first.weights == second.weights


# Planted bugs ---------------------------------------------------------------------------------


def lose_and_forget(self: Job, number: int, reason: str, now: float) -> Any:
    self.lost.add(number)
    self.missing.discard(number)
    return self._advance(now)


def lose_silently(self: VirtualTransport, peer: int, reason: str) -> None:
    self._lost[peer] = reason


def take_what_is_early(self: Actor, message: Any) -> None:
    self._mailbox.append(message)  # as if its step had come
    self.ctx.step = max(self.ctx.step, message.step)


def fail_without_a_name(self: World, node: int, reason: str) -> None:
    self._cause = PeerLostError("lost")
    self._machine.error = "somebody is gone"
    self._over.set()


BUGS = {
    "the job goes on without a worker that it needs": (Job, "_lost", lose_and_forget),
    "who waits for a lost peer's credit waits for ever": (
        *(VirtualTransport, "lose"),
        lose_silently,
    ),
    "a message of a later step changes the step": (Actor, "_keep", take_what_is_early),
    "nobody is named": (World, "_lost", fail_without_a_name),
}


@pytest.mark.proof
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_made_small(quick, monkeypatch, bug):
    seeds = range(400)
    for seed in seeds[:100]:
        draw(seed)  # what a job gives without a fault is remembered from before
    monkeypatch.setattr(*BUGS[bug])
    found = swarm(seeds, most=1)
    assert found.wrong
    assert len(found.wrong[0][2].faults) <= 2
    print(bug, found.ends.total(), *found.wrong[0])


def test_a_sum_in_the_order_of_arrival_is_found(quick, monkeypatch):
    trials = [Trial(codec="plain", workers=5, jitter=5e-3, schedule=i) for i in range(20)]
    assert not [wrong for trial in trials for wrong in judge(trial, play(trial))]
    mean = lambda blocks, out=None: sum(blocks.values()) / np.float32(len(blocks))  # noqa: E731
    monkeypatch.setattr(plain, "mean", mean)
    wrong = [wrong for trial in trials for wrong in judge(trial, play(trial))]
    assert {"done, but the weights are not those of the job without a fault"} == set(wrong)


def main() -> None:
    """Play a range of seeds and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:1500", help="FIRST:END")
    parser.add_argument("--most", type=int, default=50, help="failures until it gives up")
    options = parser.parse_args()
    gc.disable()
    report(
        swarm(
            range(*map(int, options.seeds.split(":"))),
            options.most,
            functools.partial(print, flush=True),
        )
    )


if __name__ == "__main__":
    main()
