"""A codec under the debugger: it stops at the first line of each hook, and after each await."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from pdb import Pdb
from typing import Any

from aiosgd.codecs.base import Codec

HOOKS = ("update", "receive", "rescue")


def stepped(kind: type[Codec], debugger: Pdb) -> type[Codec]:
    """Return a codec class like `kind`, whose hooks run under a debugger."""
    own = [name for name in HOOKS if getattr(kind, name) is not getattr(Codec, name)]
    hooks = {name: _stepped_hook(getattr(kind, name), debugger) for name in own}
    made: type[Codec] = types.new_class(
        kind.__name__, (kind,), exec_body=lambda ns: ns.update(hooks)
    )
    made.__module__ = kind.__module__
    return made


def _stepped_hook(hook: Callable[..., Any], debugger: Pdb) -> Callable[..., Any]:
    is_async = inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook)

    @functools.wraps(hook)
    def call(*args: Any) -> Any:
        debugger.reset()  # it stops at the next line that runs
        # the call of an `async def` runs nothing of it
        made = hook(*args) if is_async else _run(debugger, functools.partial(hook, *args))
        if isinstance(made, AsyncIterator):
            return _stepped_envelopes(made, debugger)
        return _Stepped(made, debugger) if isinstance(made, Awaitable) else made

    return call


async def _stepped_envelopes(hook: AsyncIterator[Any], debugger: Pdb) -> AsyncIterator[Any]:
    while True:
        try:
            envelope = await _Stepped(anext(hook), debugger)
        except StopAsyncIteration:
            return
        yield envelope


class _Stepped:
    """Awaits something; every piece of it between two waits runs under the debugger."""

    def __init__(self, inner: Awaitable[Any], debugger: Pdb) -> None:
        self._inner = inner
        self._debugger = debugger

    def __await__(self) -> Generator[Any, Any, Any]:
        pieces: Any = self._inner.__await__()
        go_on: Callable[[], Any] = functools.partial(next, pieces)
        while True:
            try:
                waits = _run(self._debugger, go_on)
            except StopIteration as end:
                return end.value
            try:
                yield waits
                go_on = functools.partial(next, pieces)
            except BaseException as error:  # noqa: BLE001 - it is for whoever waits in there
                go_on = functools.partial(pieces.throw, error)


def _run(debugger: Pdb, function: Callable[[], Any]) -> Any:
    """Run something under the debugger, and leave whoever traced before in place."""
    tracer = sys.gettrace()
    sys.settrace(debugger.trace_dispatch)
    try:
        return function()
    finally:
        sys.settrace(tracer)
