"""Virtual time: it leaps, it keeps its order, it never hangs, and it never meets the real world."""

import asyncio
import subprocess
import sys

import pytest

from aiosgd.runtime.simulation.loop import (
    DeadlockError,
    EscapeError,
    LimitError,
    VirtualLoop,
    run_virtually,
)


def now():
    return asyncio.get_running_loop().time_ns()


def test_time_leaps_over_sleeps_and_stands_still_meanwhile():
    async def main():
        await asyncio.sleep(1e6)
        assert now() == 10**15
        for _ in range(100):
            await asyncio.sleep(0)
        assert now() == 10**15

    run_virtually(main())


def test_the_smallest_sleep_ends_even_after_a_very_long_time():
    async def main():
        await asyncio.sleep(1e8)
        await asyncio.sleep(5e-9)
        return now()

    assert run_virtually(main()) == 10**17 + 5


def test_timers_of_one_time_are_first_in_first_out():
    async def main():
        loop, order = asyncio.get_running_loop(), []
        for i in range(50):
            loop.call_later(1, order.append, i)
        loop.call_at_ns(10**9, -1, order.append, "first")
        loop.call_at_ns(10**9, 1, order.append, "last")
        await asyncio.sleep(2)
        return order

    assert run_virtually(main()) == ["first", *range(50), "last"]


def test_a_cancelled_timer_does_nothing_and_is_forgotten():
    async def main():
        loop, fired = asyncio.get_running_loop(), []
        for _ in range(5000):
            loop.call_later(1000, fired.append, 1).cancel()
        handle = loop.call_later(1, fired.append, 2)
        assert handle.when() == 1
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        assert len(loop._timers) < 2500
        await asyncio.sleep(2)
        return fired

    assert run_virtually(main()) == []


def test_asyncios_own_tools_work():
    async def main():
        queue, event = asyncio.Queue(), asyncio.Event()

        async def produce():
            for i in range(3):
                await asyncio.sleep(1)
                await queue.put(i)
            event.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            got = [await queue.get() for _ in range(3)]
        assert event.is_set()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(5), 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(asyncio.sleep(i)) for i in (1, 9)], return_when="FIRST_COMPLETED"
        )
        return got, await asyncio.gather(asyncio.sleep(1, "a"), asyncio.sleep(1, "b")), len(done)

    assert run_virtually(main()) == ([0, 1, 2], ["a", "b"], 1)


def test_a_deadlock_is_found_at_once_and_says_who_waits_where():
    async def waiting_for_godot():
        await asyncio.get_running_loop().create_future()

    async def main():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(waiting_for_godot(), name="estragon")

    with pytest.raises(DeadlockError, match=r"estragon at .*waiting_for_godot:\d+"):
        run_virtually(main())


def test_what_takes_too_long_is_stopped():
    async def for_ever():
        while True:
            await asyncio.sleep(1)

    with pytest.raises(LimitError, match="not done after 10 s"):
        run_virtually(for_ever(), seconds=10)


def test_what_never_lets_time_pass_is_stopped():
    async def spin():
        while True:
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().event_limit = 1000
        with pytest.raises(LimitError, match="more than 1000 events"):
            runner.run(spin())
        runner.get_loop().event_limit = None


def test_an_executors_work_is_done_now_and_ready_when_its_time_has_come():
    def fail():
        raise ValueError("no")

    async def main():
        loop = asyncio.get_running_loop()
        work = loop.do_work(3_000, sum, [1, 2])
        assert not work.done()
        assert await work == 3
        assert now() == 3_000
        assert await asyncio.to_thread(len, "four") == 4
        assert now() == 3_000
        with pytest.raises(ValueError, match="no"):
            await loop.do_work(1, fail)
        cancelled = loop.do_work(5, len, "")
        cancelled.cancel()
        await asyncio.sleep(1)

    run_virtually(main())


@pytest.mark.parametrize(
    "reach",
    [
        lambda loop: loop.sock_connect(None, None),
        lambda loop: loop.create_unix_connection(None, "x"),
        lambda loop: loop.subprocess_exec(None, "ls"),
        lambda loop: loop.add_reader(0, print),
        lambda loop: loop.getaddrinfo("localhost", 1),
    ],
)
def test_the_real_world_is_refused(reach):
    async def main():
        reach(asyncio.get_running_loop())

    with pytest.raises(EscapeError, match="no real world"):
        run_virtually(main())


def test_a_failing_callback_is_reported_and_stops_nobody():
    async def main():
        loop, errors = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)
        return errors

    assert isinstance(run_virtually(main())[0], ZeroDivisionError)


def test_unfinished_async_generators_are_closed():
    async def main():
        closed = []

        async def endless():
            try:
                while True:
                    yield 1
            finally:
                closed.append(True)

        async for _ in endless():
            break
        await asyncio.sleep(1)
        return closed

    assert run_virtually(main()) == [True]


ORDER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from aiosgd.runtime.simulation.loop import run_virtually

async def main():
    garbage = [object() for _ in range(int(sys.argv[2]))]
    ends = []

    async def wait(i):
        try:
            await asyncio.sleep(100)
        finally:
            ends.append(i)

    async def fail():
        await asyncio.sleep(1)
        raise ValueError

    try:
        async with asyncio.TaskGroup() as tasks:
            for i in range(30):
                tasks.create_task(wait(i))
            tasks.create_task(fail())
    except* ValueError:
        pass
    pending = {asyncio.ensure_future(asyncio.sleep(1, i)) for i in range(30)}
    done, _ = await asyncio.wait(pending)
    return ends + [task.result() for task in done]

print(run_virtually(main()))
"""


def test_sets_of_tasks_have_the_same_order_in_every_process():
    def order(hash_seed, garbage):
        return subprocess.run(
            [sys.executable, "-c", ORDER, ".", str(garbage)],
            env={"PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout

    assert len({order(1, 0), order(2, 777), order(3, 12345)}) == 1
