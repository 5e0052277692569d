"""The handshake over real links: who is let in, over which road, and what is said if not."""

import asyncio
import contextlib
import functools

import numpy as np
import pytest

from aiosgd.errors import ClusterError, RemoteProtocolError
from aiosgd.runtime import hello as hello_module
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import UnixLink, listen, listen_unix
from aiosgd.runtime.frame import DEFAULT_LIMITS, Kind, encode
from aiosgd.runtime.hello import STRANGER, accept, greet, greeting, introduce, receive, refuse
from aiosgd.runtime.security import OPEN, Security

pytestmark = pytest.mark.both_loops

SECRET = Security(b"k" * 32)
FACTS = {"role": "peer", "node": 1}


class Door:
    """A node's end: lets callers in, and keeps who they are, their links, and why others failed."""

    def __init__(self, security=OPEN, welcome=accept):
        self.security, self.welcome = security, welcome
        self.links, self.callers, self.refused = [], [], []
        self.closed = asyncio.Queue()
        self.unix = ""

    def make(self, kind=Link):
        answerer = greet(self.security, self.unix if kind is Link else "")
        on_frame = functools.partial(self._hear, answerer)
        self.links.append(kind(on_frame, lambda *gone: self.closed.put_nowait(gone), STRANGER))
        return self.links[-1]

    def _hear(self, answerer, link, kind, number, content, size):
        try:
            caller = receive(link, answerer, kind, content)
            if caller is not None:
                self.callers.append((caller, link.over))
                self.welcome(link)
        except RemoteProtocolError as error:
            self.refused.append(str(error))
            refuse(link, str(error))


@contextlib.asynccontextmanager
async def listening(make, door=None):
    """Listen; give the address; with a door, also on a unix socket that it tells of."""
    links, servers = [], []
    if door is not None:
        server, door.unix = await listen_unix(functools.partial(door.make, UnixLink))
        servers.append(server)

    def kept():
        links.append(make())
        return links[-1]

    servers.append(await listen("127.0.0.1", 0, kept))
    try:
        async with asyncio.timeout(10):
            yield Address("127.0.0.1", servers[-1].sockets[0].getsockname()[1])
    finally:
        for server in servers:
            server.close()
        for link in links + (door.links if door else []):
            link.abort()


def saying(answer):
    """Return a maker of links that call `answer(link, kind, content)` for each frame."""

    def on_frame(link, kind, number, content, size):
        answer(link, kind, content)

    return lambda: Link(on_frame, lambda *_: None)


@pytest.mark.parametrize("security", [OPEN, SECRET])
async def test_who_says_and_proves_who_it_is_is_let_in(security):
    door = Door(security)
    async with listening(door.make) as address:
        link = await introduce(address, greeting(**FACTS), security=security)
        ((caller, over),) = door.callers
        assert {name: caller[name] for name in FACTS} == FACTS
        assert over == link.over == "tcp"
        assert link.limits == door.links[0].limits == DEFAULT_LIMITS
        link.abort()


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (OPEN, SECRET, "the node has a secret and the caller has none"),
        (SECRET, OPEN, "the caller has a secret and the node has none"),
        (SECRET, Security(b"K" * 32), "node and caller have different secrets"),
    ],
)
async def test_two_ends_that_do_not_agree_both_know_why(ours, theirs, reason):
    door = Door(theirs)
    async with listening(door.make) as address:
        with pytest.raises(ClusterError, match=f"{address}: no link: {reason}"):
            await introduce(address, FACTS, security=ours)
        await door.closed.get()
        assert door.callers == []
        assert [text.partition(":")[0] for text in door.refused] == [reason]


async def test_a_recorded_handshake_opens_no_link():
    door, heard = Door(SECRET), []

    class Tapped(Link):
        def buffer_updated(self, count):
            heard.append(bytes(self.get_buffer(0)[:count]))
            super().buffer_updated(count)

    async with listening(functools.partial(door.make, Tapped)) as address:
        link = await introduce(address, FACTS, security=SECRET)
        link.abort()
        first, third = heard
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(first)
        assert await reader.readexactly(16)
        writer.write(third)
        assert b"different secrets" in await reader.read()
        writer.close()
        assert len(door.callers) == 1


async def test_a_reflected_handshake_opens_no_link():
    """What a node says is sent back to it, byte by byte."""
    door = Door(SECRET)
    async with listening(door.make) as address:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"".join(encode(greeting(nonce=b"n" * 32), Kind.HELLO).buffers))
        second = await reader.read(2000)
        writer.write(second)
        assert b"different secrets" in await reader.read()
        writer.close()
        assert door.callers == []


async def test_a_stranger_may_send_nothing_but_small_hellos():
    door = Door(SECRET)
    async with listening(door.make) as address:
        for frame in (encode(b"x" * 2000, Kind.HELLO), encode(np.ones(100_000, "u1"))):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"".join(frame.buffers))
            _, error = await door.closed.get()
            assert "at most 1024" in str(error) or "at most 0" in str(error)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        assert door.callers == []


@pytest.mark.parametrize("frame", [encode(b"x" * 2000, Kind.HELLO), encode(np.ones(100_000, "u1"))])
async def test_a_node_that_has_proved_nothing_may_send_no_more_either(frame):
    async with listening(saying(lambda link, *_: link.send(frame))) as address:
        with pytest.raises(ClusterError, match=r"at most (1024|0)"):
            await introduce(address, FACTS, security=SECRET)


async def test_what_follows_the_answer_is_kept_for_who_takes_the_link_over():
    def welcome(link):
        accept(link)
        link.send(encode(b"x" * 5_000))
        for number in range(3):
            link.send(encode(number))

    door = Door(SECRET, welcome)
    async with listening(door.make) as address:
        link = await introduce(address, FACTS, security=SECRET)
        got = asyncio.Queue()
        link.on_frame = lambda link, kind, number, content, size: got.put_nowait(content)
        assert [await got.get() for _ in range(4)] == [b"x" * 5_000, 0, 1, 2]
        link.abort()


# Answers that are no welcome ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda link, *_: refuse(link, "not you"), ": no link: not you"),
        (lambda link, *_: link.send(encode("hi")), ": no link: the node sent no HELLO: is it"),
        (lambda link, *_: link.send(encode(greeting(nonce=bytes(32)))), ": no link: the node sent"),
        (lambda link, *_: link.send(encode(7, Kind.HELLO)), ": no link: the node sent no HELLO"),
        (lambda link, *_: accept(link), ": no link: the node's HELLO has no nonce"),
        (lambda link, *_: link.close(), " closed the link: without a word"),
        (lambda link, *_: link.abort(), " closed the link: "),
        (lambda *_: None, " did not answer: is it an aiosgd node"),
    ],
)
async def test_an_answer_that_is_no_second_hello_is_an_error(answer, reason):
    async with listening(saying(answer)) as address:
        with pytest.raises(ClusterError, match=f"{address}{reason}"):
            await introduce(address, FACTS, timeout=0.05 if "did not" in reason else 5)


@pytest.mark.parametrize(
    ("welcome", "reason"),
    [
        (lambda link: refuse(link, "no room"), ": no link: no room"),
        (lambda link: link.send(encode(greeting())), ": no link: the node sent no HELLO"),
        (lambda link: link.close(), " closed the link: "),
        (lambda link: None, " did not answer: is it an aiosgd node"),
    ],
)
async def test_an_answer_that_is_no_welcome_is_an_error(welcome, reason):
    door = Door(SECRET, welcome)
    async with listening(door.make) as address:
        with pytest.raises(ClusterError, match=f"{address}{reason}"):
            await introduce(
                address, FACTS, timeout=0.1 if "did not" in reason else 5, security=SECRET
            )
        assert len(door.callers) == 1


async def test_something_that_is_no_node_at_all():
    async def speak_http(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak_http, "127.0.0.1", 0)
    async with server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(ClusterError, match=f"{address} closed the link: "):
            await introduce(address, FACTS)


@pytest.mark.parametrize("road", ["tcp", "unix"])
async def test_giving_up_leaves_no_link_behind(road):
    called = asyncio.Event()
    door = Door(welcome=lambda link: called.set())
    async with listening(door.make, door) as address:
        calling = asyncio.create_task(introduce(address, FACTS, unix=road == "unix"))
        await called.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        for _ in door.links:
            await door.closed.get()
        assert [over for _, over in door.callers] == [road]


# The shortcut ---------------------------------------------------------------------------------


@pytest.mark.parametrize("security", [OPEN, SECRET])
async def test_within_a_machine_the_link_goes_on_over_a_unix_socket(security):
    door = Door(security)
    async with listening(door.make, door) as address:
        link = await introduce(address, FACTS, security=security, unix=True)
        assert link.over == "unix"
        ((caller, over),) = door.callers
        assert (caller["node"], over) == (1, "unix")
        gone, error = await door.closed.get()  # the link over TCP, in order
        assert (gone.over, error) == ("tcp", None)
        assert door.refused == []
        link.abort()


async def test_a_caller_that_does_not_want_the_shortcut_stays_on_tcp():
    door = Door()
    async with listening(door.make, door) as address:
        link = await introduce(address, FACTS)
        assert [over for _, over in door.callers] == [link.over] == ["tcp"]
        link.abort()


async def test_another_machine_stays_on_tcp(monkeypatch):
    door = Door()
    async with listening(door.make, door) as address:
        greeted = asyncio.Event()
        monkeypatch.setattr(hello_module, "connect_unix", lambda *_, **__: greeted.set())
        hosts = iter(["here", "here", "there", "there"])  # offered, then compared
        monkeypatch.setattr(hello_module, "this_host", lambda: next(hosts))
        link = await introduce(address, FACTS, unix=True)
        assert link.over == "tcp"
        assert not greeted.is_set()
        link.abort()


async def test_a_host_that_does_not_know_itself_offers_nothing(monkeypatch):
    monkeypatch.setattr(hello_module, "this_host", lambda: "")
    door = Door()
    async with listening(door.make, door) as address:
        link = await introduce(address, FACTS, unix=True)
        assert link.over == "tcp"
        link.abort()


@pytest.mark.parametrize("trouble", ["nobody", "silence", "refusal", "garbage", "reset", "name"])
async def test_trouble_with_the_unix_socket_leaves_the_link_on_tcp(trouble, monkeypatch):
    monkeypatch.setattr(hello_module, "UNIX_TIMEOUT", 0.05)
    door = Door(SECRET)

    def disturb(link, *_):
        match trouble:
            case "refusal":
                refuse(link, "no")
            case "garbage":
                link.send(encode("?"))
            case "reset":
                link.abort()

    others, gone = [], asyncio.Queue()

    def other():
        others.append(UnixLink(disturb, lambda *_: gone.put_nowait(None)))
        return others[-1]

    server, name = await listen_unix(other)
    if trouble == "nobody":
        server.close()
    door.unix = "x" * 300 if trouble == "name" else name
    async with listening(door.make) as address:
        link = await introduce(address, FACTS, security=SECRET, unix=True)
        assert link.over == "tcp"
        assert [over for _, over in door.callers] == ["tcp"]
        assert bool(others) == (trouble not in ("nobody", "name"))
        for _ in others:
            await gone.get()  # the caller has let go of it
        link.abort()
    server.close()


@pytest.mark.parametrize("offer", [7, {}, {"name": "x"}, {"name": 1, "host": 2}, [1, 2], None])
async def test_an_offer_that_makes_no_sense_is_left_aside(offer, monkeypatch):
    monkeypatch.setattr(
        hello_module, "greet", lambda *_: hello_module.Answerer(None, bytes(32), {"unix": offer})
    )
    door = Door()
    monkeypatch.setitem(Door.make.__globals__, "greet", hello_module.greet)
    async with listening(door.make) as address:
        link = await introduce(address, FACTS, unix=True)
        assert link.over == "tcp"
        link.abort()
