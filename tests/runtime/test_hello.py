"""Who says what first on a link."""

import asyncio
import contextlib

import pytest

from aiosgd import __version__
from aiosgd.errors import ClusterError, RemoteProtocolError
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import listen
from aiosgd.runtime.frame import Kind, encode
from aiosgd.runtime.hello import WIRE_VERSION, accept, greeting, introduce, read_hello, refuse

pytestmark = pytest.mark.both_loops


@contextlib.asynccontextmanager
async def answering(answer):
    """Listen; `answer(link, kind, content)` is called for each frame that comes in."""
    links = []

    def on_frame(link, kind, number, content, size):
        answer(link, kind, content)

    def factory():
        links.append(Link(on_frame, lambda *_: None))
        return links[-1]

    server = await listen("127.0.0.1", 0, factory)
    try:
        async with asyncio.timeout(10):
            yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for link in links:
            link.abort()


async def test_both_ends_say_who_they_are():
    heard = []

    def answer(link, kind, content):
        heard.append(read_hello(kind, content))
        accept(link)

    async with answering(answer) as address:
        link = await introduce(address, greeting(role="submitter"))
        assert heard == [{"wire": WIRE_VERSION, "version": __version__, "role": "submitter"}]
        assert not link.is_closed
        link.abort()


async def test_what_follows_the_answer_is_kept_for_who_takes_the_link_over():
    def answer(link, kind, content):
        accept(link)
        for number in range(3):
            link.send(encode(number))

    async with answering(answer) as address:
        link = await introduce(address, greeting())
        got = asyncio.Queue()
        link.on_frame = lambda link, kind, number, content, size: got.put_nowait(content)
        assert [await got.get() for _ in range(3)] == [0, 1, 2]
        link.abort()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda link, *_: refuse(link, "not you"), "refused the link: not you"),
        (lambda link, *_: link.send(encode("hi")), "is no aiosgd node"),
        (lambda link, *_: link.send(encode(7, Kind.HELLO)), "is no aiosgd node"),
        (lambda link, *_: link.close(), "closed the link: without a word"),
        (lambda link, *_: link.abort(), "closed the link: "),
        (lambda *_: None, "did not answer: is it an aiosgd node"),
    ],
)
async def test_an_answer_that_is_no_welcome_is_an_error(answer, reason):
    async with answering(answer) as address:
        with pytest.raises(ClusterError, match=f"{address} {reason}"):
            await introduce(address, greeting(), timeout=0.05 if "did not" in reason else 5)


async def test_something_that_is_no_node_at_all():
    async def speak_http(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak_http, "127.0.0.1", 0)
    async with server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(ClusterError, match=f"{address} closed the link: "):
            await introduce(address, greeting())


async def test_giving_up_leaves_no_link_behind():
    called, closed = asyncio.Event(), asyncio.Event()
    server = await listen(
        "127.0.0.1", 0, lambda: Link(lambda *_: called.set(), lambda *_: closed.set())
    )
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    calling = asyncio.create_task(introduce(address, greeting()))
    async with asyncio.timeout(10):
        await called.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await closed.wait()
    server.close()


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.HELLO])
async def test_only_a_hello_may_come_first(kind):
    with pytest.raises(RemoteProtocolError, match="the first frame is no HELLO"):
        read_hello(kind, greeting())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no HELLO"),
        ([1], "no HELLO"),
        ({}, "wire version None, this node 1"),
        ({"wire": 2}, "wire version 2, this node 1"),
        ({"wire": "1"}, "wire version '1'"),
    ],
)
async def test_a_hello_of_another_kind_is_refused(content, reason):
    with pytest.raises(RemoteProtocolError, match=reason):
        read_hello(Kind.HELLO, content)
