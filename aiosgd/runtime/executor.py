"""Where a node computes: in a thread, or on the loop itself when the work is short.

A hop to a thread and back costs 0.25-0.3 ms (wake-ups, and the interpreter lock changing hands):
more than the exchange of a small model. Work of up to about a millisecond is therefore cheaper on
the loop's own thread; longer work would delay heartbeats there. `auto` measures the first
computations in a thread and then decides.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

T = TypeVar("T")

# `auto` decides after this many computations; the median forgives a first slow one
PROBES = 8
# longest work, in seconds, that may hold up the loop
INLINE_LIMIT = 1.5e-3


class Executor:
    """Runs a node's computations, one at a time, and its codecs' heavy work beside them.

    Args:
        policy: `thread`, `inline`, or `auto`.
        slowdown: factor by which every computation takes longer; 1 is full speed.
        log: told which way `auto` chose.
    """

    def __init__(
        self,
        policy: Literal["auto", "thread", "inline"] = "auto",
        slowdown: float = 1.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._policy = policy
        self._slowdown = slowdown
        self._log = log
        self._probes: list[float] = []
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="aiosgd-compute")

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Run a training computation, where the policy says."""
        started = time.perf_counter()
        if self._policy == "inline":
            value = function(*args)
            elapsed = time.perf_counter() - started
        else:
            value, elapsed = await self._in_thread(_timed, function, *args)
        if self._policy == "auto":
            self._decide(elapsed)
        if self._slowdown > 1:
            await asyncio.sleep((self._slowdown - 1) * elapsed)
        return value

    async def assist(self, function: Callable[..., T], *args: Any) -> T:
        """Run a codec's heavy work or an evaluation in a thread."""
        return await self._in_thread(function, *args)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _decide(self, elapsed: float) -> None:
        self._probes.append(elapsed)
        if len(self._probes) < PROBES:
            return
        median = statistics.median(self._probes)
        self._policy = "inline" if median <= INLINE_LIMIT else "thread"
        where = "on the event loop" if self._policy == "inline" else "in a thread"
        self._log(f"a block takes {median * 1e3:.2f} ms to compute: computing {where} from now on")

    def close(self) -> None:
        """Give the threads back without waiting for what still runs in them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _timed(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    started = time.perf_counter()
    value = function(*args)
    return value, time.perf_counter() - started
