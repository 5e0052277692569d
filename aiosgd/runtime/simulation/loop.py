"""An event loop whose clock is virtual.

Time stands still while anything is ready, and then leaps to the next timer. Nothing waits for the
real world: sockets, processes and other threads are refused, and an executor's work is done at
once. The order of everything that happens is the same in every run: timers of the same time are
first in, first out, and sets of tasks do not depend on memory addresses.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from aiosgd.errors import AiosgdError

T = TypeVar("T")

SECOND = 1_000_000_000
"""Nanoseconds: the clock counts them in an integer, for a float one stops short of tiny sleeps."""
REFUSED = (
    "connect_read_pipe connect_write_pipe create_connection create_datagram_endpoint create_server "
    "create_unix_connection create_unix_server add_reader add_writer sock_accept sock_connect "
    "sock_recv sock_recv_into sock_sendall sock_sendfile start_tls subprocess_exec "
    "subprocess_shell getaddrinfo getnameinfo"
)
"""What an event loop does with the real world."""


class DeadlockError(AiosgdError):
    """Nothing is ready and no timer runs: everybody waits for ever."""


class LimitError(AiosgdError):
    """A simulation went on for too long."""


class EscapeError(AiosgdError):
    """Something in a simulation reached for the real world, which differs from run to run."""


class _Handle:
    """A callback that waits for its turn; `when` is its time in nanoseconds, if it has one."""

    __slots__ = ("args", "callback", "context", "loop", "when_ns")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        loop: VirtualLoop | None = None,
        when_ns: int = 0,
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context
        self.loop = loop  # of a timer
        self.when_ns = when_ns

    def cancel(self) -> None:
        """Do nothing when the turn comes."""
        if self.callback is not None:
            self.callback, self.args, self.context = None, (), None
            if self.loop is not None:
                self.loop.timer_cancelled()

    def cancelled(self) -> bool:
        """Tell whether it was cancelled."""
        return self.callback is None

    def when(self) -> float:
        """Return its time in seconds."""
        return self.when_ns / SECOND


# Tasks and futures are kept in sets by asyncio itself; by default their hash is an address.
_numbers = itertools.count(1)


class _Future(asyncio.Future[Any]):
    def __init__(self, **options: Any) -> None:
        self._number = next(_numbers)
        super().__init__(**options)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    def __init__(self, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = next(_numbers)  # first: a new task puts itself into a set at once
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop in virtual time; use it in `asyncio.Runner(loop_factory=VirtualLoop)`.

    Attributes:
        events: how many callbacks have run.
        event_limit, time_limit_ns: beyond either, LimitError; None is no limit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events = 0
        self.event_limit: int | None = None
        self.time_limit_ns: int | None = None
        self._now = 0
        self._queue: deque[_Handle] = deque()
        self._timers: list[tuple[int, int, int, _Handle]] = []  # when, key, number
        self._timer_count = 0
        self._cancelled = 0
        self._stopping: bool

    # time

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now / SECOND

    def time_ns(self) -> int:
        """Return the virtual time in nanoseconds."""
        return self._now

    # callbacks

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Call in this turn of time, behind what is ready already."""
        handle = _Handle(callback, args, context or contextvars.copy_context())
        self._queue.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # there is one thread; a signal handler may call, too

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Call after `delay` seconds."""
        when = self._now + max(0, round(delay * SECOND))
        return self._call_at(when, 0, callback, args, context or contextvars.copy_context())

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Call at `when` seconds."""
        when_ns = max(self._now, round(when * SECOND))
        return self._call_at(when_ns, 0, callback, args, context or contextvars.copy_context())

    def call_at_ns(
        self, when_ns: int, key: int, callback: Callable[..., object], *args: Any
    ) -> None:
        """Call at a time in nanoseconds; among those of one time, in the order of their keys.

        Timers of asyncio have the key 0. It cannot be cancelled, and has no context of its own:
        the cheap way of the many events of a network.
        """
        self._call_at(when_ns, key, callback, args, None)

    def _call_at(
        self,
        when_ns: int,
        key: int,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> _Handle:
        handle = _Handle(callback, args, context, self, when_ns)
        self._timer_count += 1
        heapq.heappush(self._timers, (when_ns, key, self._timer_count, handle))
        return handle

    def timer_cancelled(self) -> None:
        """Note that a timer was cancelled; once they are most of all, forget them."""
        self._cancelled += 1
        if self._cancelled > 1000 and 2 * self._cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[3].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    # futures and tasks

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future whose hash is its number."""
        return _Future(loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        """Return a task whose hash is its number."""
        if context is not None:
            options["context"] = context
        return _Task(coro, loop=self, name=cast("str | None", name), **options)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Do the work now; it is done in no time."""
        return self.do_work(0, func, *args)

    def do_work(self, cost_ns: int, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do the work now, and have its result after `cost_ns` nanoseconds."""
        future = self.create_future()
        try:
            value, error = func(*args), None
        except Exception as caught:  # noqa: BLE001 - whoever awaits it gets it
            value, error = None, caught
        self.call_at_ns(self._now + cost_ns, 0, _settle, future, value, error)
        return future

    # running

    def _run_once(self) -> None:
        """Run what is ready, or leap to the next timer; called until the loop is stopped."""
        queue = self._queue
        if not queue:
            self._leap()
        count = len(queue)
        for _ in range(count):
            handle = queue.popleft()
            callback = handle.callback
            if callback is None:
                continue
            try:
                if handle.context is None:
                    callback(*handle.args)
                else:
                    handle.context.run(callback, *handle.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as other loops do
                what = getattr(callback, "__qualname__", repr(callback))
                context = {"message": f"a callback failed: {what}", "exception": error}
                self.call_exception_handler(context)
        self.events += count
        if self.event_limit is not None and self.events > self.event_limit:
            raise LimitError(f"more than {self.event_limit} events, at {self.time():.6f} s")

    def _leap(self) -> None:
        """Let time pass until the next timer; all of that time become ready."""
        timers, queue = self._timers, self._queue
        while timers and timers[0][3].callback is None:
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            raise DeadlockError(self._who_waits())
        now = timers[0][0]
        if self.time_limit_ns is not None and now > self.time_limit_ns:
            limit = self.time_limit_ns / SECOND
            raise LimitError(f"not done after {limit:g} s of virtual time; {self._who_waits()}")
        self._now = max(self._now, now)
        while timers and timers[0][0] == now:
            handle = heapq.heappop(timers)[3]
            handle.loop = None  # to cancel it now is to cancel no timer
            self._cancelled -= handle.callback is None
            queue.append(handle)

    def _who_waits(self) -> str:
        """Return what each task waits for, in the order in which they began."""
        tasks = sorted(asyncio.all_tasks(self), key=hash)
        waits = "; ".join(f"{task.get_name()} at {_place(task)}" for task in tasks)
        return f"at {self.time():.6f} s nothing can happen any more: {waits or 'no task is left'}"

    def _process_events(self, event_list: object) -> None:
        """Do nothing: there are no sockets."""

    def _write_to_self(self) -> None:
        """Do nothing: nobody is asleep."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there is none."""


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _place(task: asyncio.Task[Any]) -> str:
    """Return where a task's innermost coroutine waits."""
    coro: Any = task.get_coro()
    while (inner := getattr(coro, "cr_await", None)) is not None and hasattr(inner, "cr_frame"):
        coro = inner
    frame = getattr(coro, "cr_frame", None)
    if frame is None:
        return "?"
    return f"{coro.__qualname__}:{frame.f_lineno}"


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: VirtualLoop, *_: Any, **__: Any) -> Any:
        raise EscapeError(f"loop.{name} in a simulation: there is no real world to talk to")

    return refuse


for _name in REFUSED.split():
    setattr(VirtualLoop, _name, _refuse(_name))


def run_virtually(
    main: Coroutine[Any, Any, T], *, seconds: float | None = None, events: int | None = None
) -> T:
    """Run a coroutine to its end in virtual time.

    Args:
        main: the coroutine.
        seconds: of virtual time that it may take; None is any.
        events: callbacks that it may take; None is any number.

    Raises:
        DeadlockError: nothing can happen any more.
        LimitError: it takes longer, or more callbacks.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = cast("VirtualLoop", runner.get_loop())
        loop.event_limit = events
        loop.time_limit_ns = None if seconds is None else round(seconds * SECOND)
        try:
            return runner.run(main)
        finally:
            loop.event_limit = loop.time_limit_ns = None  # what is left is cancelled in order
