"""Two ends of a link over a socket pair, and tests that run on both event loops."""

import asyncio
import functools
import inspect
import socket

import pytest
import uvloop

from aiosgd.runtime import connection
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import connect, listen

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def on_both_loops(test):
    """Run a coroutine function as two tests; errors that only reach the loop's log fail it too."""

    def run(loop_name, **arguments):
        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            errors = []
            runner.get_loop().set_exception_handler(lambda _, context: errors.append(context))
            runner.run(finish(test(**arguments)))
            assert not errors

    functools.update_wrapper(run, test)
    del run.__wrapped__
    run.__signature__ = inspect.Signature(
        [
            inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(test).parameters.values(),
        ]
    )
    return pytest.mark.parametrize("loop_name", LOOPS)(run)


async def finish(test):
    """Await a test, for 20 s at most, and break off the links that it leaves."""
    made.clear()
    try:
        await asyncio.wait_for(test, 20)
    finally:
        for link in made:
            link.abort()
        await turns()


made = []


class End:
    """One end of a link: keeps what comes, and can be awaited."""

    def __init__(self):
        self.frames = asyncio.Queue()
        self.closed = asyncio.get_running_loop().create_future()
        self.link = None

    def on_frame(self, link, kind, number, content, size):
        self.frames.put_nowait((kind, number, content, size))

    def on_closed(self, link, reason):
        self.closed.set_result(reason)  # raises if called twice

    def make(self, limits=connection.DEFAULT_LIMITS):
        self.link = Link(self.on_frame, self.on_closed, limits)
        made.append(self.link)
        return self.link

    async def content(self):
        return (await self.frames.get())[2]


async def pair(sockets=None, limits=connection.DEFAULT_LIMITS):
    """Return two ends that are connected, by default over a socket pair."""
    loop = asyncio.get_running_loop()
    ends = End(), End()
    for end, sock in zip(ends, sockets or socket.socketpair(), strict=True):
        await loop.create_connection(functools.partial(end.make, limits), sock=sock)
    return ends


async def tcp_pair():
    """Return two ends that are connected over TCP."""
    a, b = End(), End()
    server = await listen("127.0.0.1", 0, b.make)
    host, port = server.sockets[0].getsockname()
    a.link = await connect(host, port, a.on_frame, a.on_closed, 5)
    made.append(a.link)
    while b.link is None or not b.link._connected:
        await turns(1)
    server.close()
    return a, b


async def end_and_socket(limits=connection.DEFAULT_LIMITS):
    """Return an end and the bare, non-blocking socket that it talks to."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    end = End()
    await asyncio.get_running_loop().create_connection(
        functools.partial(end.make, limits), sock=ours
    )
    return end, theirs


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def joined(frame):
    """Return a frame as it goes over the wire."""
    return b"".join(part for piece in frame.pieces() for part in piece)


def is_closed_with(reason, kind, words):
    return type(reason) is kind and words in str(reason)
