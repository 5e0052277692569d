"""Where links begin: over TCP, over TLS, and over unix sockets, on both event loops."""

import asyncio
import contextlib
import errno
import functools
import os
import socket
import struct

import pytest

from aiosgd.errors import ClusterError, RemoteProtocolError
from aiosgd.runtime import endpoint
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import (
    TlsLink,
    UnixLink,
    connect,
    connect_unix,
    listen,
    listen_tls,
    listen_unix,
    this_host,
)
from aiosgd.runtime.frame import DEFAULT_LIMITS, Kind, encode
from aiosgd.runtime.hello import greeting
from aiosgd.runtime.security import load_tls
from tests.runtime.certificates import Authority
from tests.runtime.links import (
    End,
    is_closed_with,
    made,
    on_both_loops,
    tcp_pair,
    turns,
)

# TCP ------------------------------------------------------------------------------------------


@on_both_loops
async def test_connect_and_listen():
    a, b = await tcp_pair()
    a.link.send(encode("hello", Kind.HELLO))
    assert await b.frames.get() == (Kind.HELLO, 0, "hello", 22)
    for end in (a, b):
        sock = end.link._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert "127.0.0.1:" in repr(a.link)
    assert "open" in repr(a.link)
    a.link.close()
    assert "closed" in repr(a.link)
    await a.closed
    await b.closed


@on_both_loops
async def test_a_refused_connection_names_address_and_cause():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port}.*Connection refused"):
        await connect("127.0.0.1", port, None, print, 5)


@on_both_loops
async def test_an_impossible_host_is_a_cluster_error():
    host = "x" * 70 + ".invalid"  # a label has at most 63 characters
    with pytest.raises(ClusterError, match=f"{host}:1 cannot be reached: "):
        await connect(host, 1, None, print, 5)
    with pytest.raises(ClusterError, match=f"cannot listen on {host}:1: "):
        await listen(host, 1, End().make)


@pytest.mark.parametrize("port", [-1, 65536])
@on_both_loops
async def test_an_impossible_port_is_a_cluster_error(port):
    with pytest.raises(ClusterError, match=f"x:{port} is no address"):
        await connect("x", port, None, print, 5)
    with pytest.raises(ClusterError, match=f"x:{port} is no address"):
        await listen("x", port, End().make)


@on_both_loops
async def test_an_unknown_host_is_named_with_the_cause(monkeypatch):
    async def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    class Loop:
        create_connection = unknown

    monkeypatch.setattr(asyncio, "get_running_loop", Loop)
    with pytest.raises(ClusterError, match=r"nowhere:1 .*: Name or service not known"):
        await connect("nowhere", 1, None, print, 5)


@on_both_loops
async def test_no_answer_in_time_is_named():
    """A listener whose backlog is full does not answer at all."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port} does not answer within 0.02 s"):
            await connect("127.0.0.1", port, None, print, 0.02)


@on_both_loops
async def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port}: Address already in use"):
            await listen("127.0.0.1", port, End().make)


# TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ca")


@pytest.fixture(scope="module")
def authority(folder):
    return Authority(folder)


@pytest.fixture(scope="module")
def tls(authority):
    return load_tls(**authority.issue("node"))


@pytest.fixture(scope="module")
def stranger(folder, authority):
    """What another authority issued, for an end that trusts ours."""
    other = Authority(folder, "other").issue("stranger")
    return load_tls(**{**other, "tls_ca": authority.path})


def end_of(kind):
    """Return a new end, and a factory that makes its link."""
    end = End()

    def make():
        end.link = kind(end.on_frame, end.on_closed)
        made.append(end.link)
        return end.link

    return end, make


@contextlib.asynccontextmanager
async def accepting(context):
    """Listen over TLS; give the end that accepts, and the port."""
    end, make = end_of(TlsLink)
    tasks = set()

    def spawn(work):
        task = asyncio.ensure_future(work)
        tasks.add(task)
        return task

    server = await listen_tls("127.0.0.1", 0, make, context, spawn)
    try:
        yield end, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if end.link is not None:
            end.link.abort()
        await asyncio.wait(tasks) if tasks else None
        assert not any(task.exception() for task in tasks if not task.cancelled())


async def call(port, context, host="127.0.0.1"):
    end = End()
    link = await connect(host, port, end.on_frame, end.on_closed, 5, tls=context)
    end.link = link
    made.append(link)
    return end


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@on_both_loops
async def test_tls_links_carry_frames_both_ways(tls, host):
    async with accepting(tls.server) as (b, port):
        a = await call(port, tls.client, host)
        assert a.link.over == "tls"
        a.link.send(encode("there"))
        assert await b.content() == "there"
        assert b.link.over == "tls"
        b.link.send(encode("back"))
        assert await a.content() == "back"
        a.link.close()
        assert await b.closed is None
        assert await a.closed is None


@on_both_loops
async def test_a_certificate_for_another_name_is_refused(tls, authority):
    elsewhere = load_tls(**authority.issue("elsewhere", "DNS:elsewhere"))
    async with accepting(elsewhere.server) as (b, port):
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port}: no TLS: .*IP address mismatch"):
            await call(port, tls.client)
        assert is_closed_with(await b.closed, RemoteProtocolError, "no TLS: the other end")


@on_both_loops
async def test_a_certificate_of_another_authority_is_refused_by_the_caller(tls, stranger):
    async with accepting(stranger.server) as (b, port):
        with pytest.raises(ClusterError, match=r"no TLS: .* does not hold: .*certificate"):
            await call(port, tls.client)
        assert is_closed_with(await b.closed, RemoteProtocolError, "no TLS: the other end")


@on_both_loops
async def test_a_certificate_of_another_authority_is_refused_by_the_node(tls, stranger):
    async with accepting(tls.server) as (b, port):
        with contextlib.suppress(ClusterError):  # in TLS 1.3 the caller may hear of it later
            a = await call(port, stranger.client)
            a.link.send(encode("let me in"))
            await a.closed
        reason = await b.closed
        assert is_closed_with(reason, RemoteProtocolError, "does not hold: unable to get local")
        assert b.frames.empty()


@on_both_loops
async def test_a_certificate_that_expired_is_refused(tls, authority):
    old = load_tls(**authority.issue("old", days=0))
    async with accepting(old.server) as (_, port):
        with pytest.raises(ClusterError, match=r"does not hold: certificate has expired$"):
            await call(port, tls.client)


@on_both_loops
async def test_a_caller_without_tls_is_told_so(tls):
    async with accepting(tls.server) as (b, port):
        a = await call(port, None)
        a.link.send(encode(greeting(nonce=bytes(32)), Kind.HELLO))
        assert endpoint.NEEDS_TLS in (await a.content())["error"]
        a.link.close()
        assert is_closed_with(await b.closed, RemoteProtocolError, "the caller does not speak it")
        assert b.frames.empty()


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"", b"\x16" * 999])
@on_both_loops
async def test_something_that_is_no_caller_at_all_is_closed_with_a_reason(tls, words):
    async with accepting(tls.server) as (b, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            assert is_closed_with(await b.closed, RemoteProtocolError, "no TLS: ")


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x01", b"\xa5"])
@on_both_loops
async def test_a_caller_that_says_too_little_can_be_aborted(tls, words):
    """Its connection is closed, and whoever accepted it is told why, once."""
    async with accepting(tls.server) as (b, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setblocking(False)
            connection.sendall(words)
            while b.link is None or b.link._shaking is None:
                await turns(1)
            await turns(20)
            b.link.abort(RemoteProtocolError("too slow"))
            assert is_closed_with(await b.closed, RemoteProtocolError, "too slow")
            with contextlib.suppress(ConnectionError):
                while await asyncio.get_running_loop().sock_recv(connection, 1000):
                    pass


@on_both_loops
async def test_a_link_that_is_aborted_before_anything_is_closed(tls):
    end, make = end_of(TlsLink)
    link = make()
    link.abort(RemoteProtocolError("too many"))
    ours, theirs = socket.socketpair()
    with theirs:
        await link.shake_hands(ours, tls.server)
        assert is_closed_with(await end.closed, RemoteProtocolError, "too many")
        assert theirs.recv(1) == b""


@on_both_loops
async def test_a_link_whose_task_never_begins_leaves_no_connection(tls):
    _end, make = end_of(TlsLink)

    def spawn(work):
        work.close()
        task = asyncio.ensure_future(asyncio.sleep(100))
        task.cancel()
        return task

    server = await listen_tls("127.0.0.1", 0, make, tls.server, spawn)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await reader.read() == b""
    writer.close()
    server.close()


@on_both_loops
async def test_a_node_without_tls_is_named(tls):
    end, make = end_of(Link)
    server = await listen("127.0.0.1", 0, make)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port}: no TLS: the other end") as caught:
        await call(port, tls.client)
    assert caught.value.__cause__ is None  # waiting a moment does not help
    assert is_closed_with(await end.closed, RemoteProtocolError, "starts with 0x16")
    server.close()


@on_both_loops
async def test_a_system_without_room_is_given_a_moment(tls, monkeypatch):
    monkeypatch.setattr(endpoint, "ACCEPT_PAUSE", 0.001)
    accept, full = endpoint.TlsServer._accept, [errno.EMFILE, errno.ENFILE]

    class Full:
        """A listening socket that the system has no room for, for a while."""

        def __init__(self, listening):
            self.fileno = listening.fileno
            self.listening = listening

        def accept(self):
            if full:
                raise OSError(full.pop(), "no room")
            return self.listening.accept()

    monkeypatch.setattr(endpoint.TlsServer, "_accept", lambda own, one: accept(own, Full(one)))
    async with accepting(tls.server) as (b, port):
        a = await call(port, tls.client)
        a.link.send(encode("in the end"))
        assert await b.content() == "in the end"
        assert not full


@on_both_loops
async def test_where_tls_cannot_listen_is_named(tls):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port}: Address already in use"):
            await listen_tls("127.0.0.1", port, print, tls.server, print)
    with pytest.raises(ClusterError, match="x:-1 is no address"):
        await listen_tls("x", -1, print, tls.server, print)


# Unix sockets ---------------------------------------------------------------------------------


async def unix_pair():
    b, make = end_of(UnixLink)
    server, name = await listen_unix(make)
    a = End()
    a.link = await connect_unix(name, a.on_frame, a.on_closed, limits=DEFAULT_LIMITS)
    made.append(a.link)
    while b.link is None or not b.link._connected:
        await turns(1)
    server.close()
    return a, b


@on_both_loops
async def test_unix_links_carry_frames_both_ways():
    a, b = await unix_pair()
    for one, other in ((a, b), (b, a)):
        assert one.link.over == "unix"
        one.link.send(encode(b"x" * 3_000))
        assert await other.content() == b"x" * 3_000
    a.link.close()
    assert await b.closed is None
    assert await a.closed is None


@on_both_loops
async def test_a_process_of_another_user_is_sent_away(monkeypatch):
    monkeypatch.setattr(os, "geteuid", functools.partial(int, os.geteuid() + 1))
    a, b = await unix_pair()
    for end in (a, b):
        assert is_closed_with(await end.closed, RemoteProtocolError, f"to user {os.getuid()}")


def test_the_other_ends_user_is_the_kernels_word():
    a, b = socket.socketpair()
    with a, b:
        pid, user, _ = struct.unpack("3i", a.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        assert (pid, endpoint._user_of(a)) == (os.getpid(), os.getuid()) == (pid, user)


@on_both_loops
async def test_no_two_nodes_listen_under_one_name_and_nothing_is_left_in_a_folder():
    found = [await listen_unix(print) for _ in range(5)]
    names = {name for _, name in found}
    assert len(names) == 5
    assert all(len(name) == len("aiosgd-") + 32 for name in names)
    assert all(server.sockets[0].getsockname()[:1] == b"\0" for server, _ in found)
    for server, _ in found:
        server.close()


@on_both_loops
async def test_a_name_that_nobody_listens_under_is_an_error():
    with pytest.raises(OSError, match="refused"):
        await connect_unix("aiosgd-none", None, print, limits=DEFAULT_LIMITS)


def test_this_host_is_one_place_and_says_nothing_about_itself():
    assert this_host() == this_host()
    assert len(this_host()) == 32
    assert "-" not in this_host()


@pytest.mark.parametrize("fact", ["read_text", "readlink"])  # boot id, network namespace
def test_another_boot_or_network_is_another_host(monkeypatch, fact):
    monkeypatch.setattr(endpoint.Path, fact, lambda _: "other")
    assert len(this_host.__wrapped__()) == 32
    assert this_host.__wrapped__() != this_host()


def test_without_proc_no_host_is_like_another(monkeypatch):
    def no(*_):
        raise FileNotFoundError

    monkeypatch.setattr(endpoint.Path, "read_text", no)
    assert this_host.__wrapped__() == ""
