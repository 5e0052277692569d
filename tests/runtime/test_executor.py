import asyncio
import threading
import time

import numpy as np
import pytest

from aiosgd.runtime.executor import INLINE_LIMIT, PROBES, Executor


@pytest.fixture
async def make():
    """Make executors that are closed afterwards; `make.log` is what they said."""
    made = []

    def make(*args, **kwargs):
        made.append(Executor(*args, **kwargs, log=make.log.append))
        return made[-1]

    make.log = []
    yield make
    for executor in made:
        executor.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.work(seconds)` advances."""

    class Clock:
        now = 0.0

        def work(self, seconds):
            self.now += seconds
            return threading.get_ident()

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def is_here(ident):
    return ident == threading.get_ident()


async def places(executor, clock, durations):
    """Return for each computation whether it ran on the loop's own thread."""
    here = []
    for seconds in durations:
        clock.now = 0.0
        here.append(is_here(await executor.compute(clock.work, seconds)))
    return here


@pytest.mark.parametrize(
    ("seconds", "inline", "words"),
    [
        (INLINE_LIMIT / 10, True, "0.15 ms to compute: computing on the event loop"),
        (INLINE_LIMIT, True, "1.50 ms to compute: computing on the event loop"),
        (INLINE_LIMIT * 1.02, False, "1.53 ms to compute: computing in a thread"),
        (10.0, False, "10000.00 ms to compute: computing in a thread"),
    ],
)
async def test_auto_measures_in_a_thread_and_then_decides_once(make, clock, seconds, inline, words):
    executor = make("auto")
    ran_here = await places(executor, clock, [seconds] * (PROBES + 3))
    assert ran_here == [False] * PROBES + [inline] * 3
    assert make.log == [f"a block takes {words} from now on"]
    other = INLINE_LIMIT * 100 if inline else 0.0  # too late to change its mind
    assert await places(executor, clock, [other] * (2 * PROBES)) == [inline] * (2 * PROBES)
    assert len(make.log) == 1


@pytest.mark.parametrize(("slow", "inline"), [(PROBES // 2 - 1, True), (PROBES // 2 + 1, False)])
async def test_auto_forgives_a_minority_of_slow_computations(make, clock, slow, inline):
    durations = [1.0] * slow + [1e-4] * (PROBES - slow)
    executor = make("auto")
    await places(executor, clock, durations)
    assert await places(executor, clock, [0.0]) == [inline]


@pytest.mark.parametrize(("policy", "inline"), [("thread", False), ("inline", True)])
async def test_the_other_policies_do_not_measure(make, clock, policy, inline):
    executor = make(policy)
    assert await places(executor, clock, [0.0, 10.0] * PROBES) == [inline] * (2 * PROBES)
    assert make.log == []


@pytest.mark.parametrize("policy", ["thread", "inline"])
async def test_arguments_and_values_pass_through(make, policy):
    executor = make(policy)
    array = np.ones(3)
    assert await executor.compute(lambda a, b: (a, b), array, 2) == (array, 2)
    assert await executor.assist(lambda a, b: (a, b), array, 2) == (array, 2)


@pytest.mark.parametrize("policy", ["auto", "thread", "inline"])
async def test_errors_pass_through(make, policy):
    def fail():
        raise ZeroDivisionError("by nothing")

    executor = make(policy)
    with pytest.raises(ZeroDivisionError):
        await executor.compute(fail)
    with pytest.raises(ZeroDivisionError):
        await executor.assist(fail)


@pytest.mark.parametrize("policy", ["auto", "thread", "inline"])
async def test_assistance_never_runs_on_the_loop(make, policy):
    assert not is_here(await make(policy).assist(threading.get_ident))


async def test_assistance_runs_beside_a_computation(make):
    executor, met = make("thread"), threading.Barrier(2, timeout=5)
    await asyncio.gather(executor.compute(met.wait), executor.assist(met.wait))


@pytest.mark.parametrize("policy", ["auto", "thread", "inline"])
@pytest.mark.parametrize(("factor", "extra"), [(1.0, None), (1.5, 1.0), (4.0, 6.0)])
async def test_slowdown_adds_a_multiple_of_the_time_it_took(
    make, clock, monkeypatch, policy, factor, extra
):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    executor = make(policy, factor)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await executor.compute(clock.work, 2.0)
    assert slept == ([] if extra is None else [extra])
    await executor.assist(clock.work, 2.0)
    assert len(slept) == (extra is not None)


async def test_a_closed_executor_takes_no_more_work_and_waits_for_nothing(make):
    executor, release = make("thread"), threading.Event()
    running = asyncio.ensure_future(executor.compute(release.wait, 5))
    await asyncio.sleep(0)
    executor.close()
    assert not running.done()
    with pytest.raises(RuntimeError, match="shutdown"):
        await executor.compute(int)
    release.set()
    assert await running
