"""Probe links: every request and its answer, and the limits that keep a node safe."""

import asyncio
import contextlib
import gc
import socket

import numpy as np
import pytest

from aiosgd.errors import ClusterError
from aiosgd.runtime import probe
from aiosgd.runtime.frame import Kind, encode, encode_inband
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.probe import Prober, Probes, probing

pytestmark = pytest.mark.both_loops


@pytest.fixture
def prober(running):
    """`async with prober(**options) as (node, prober)`: a probe link to a node of this process."""

    @contextlib.asynccontextmanager
    async def opened(**options):
        async with running() as (node, address), probing(address, **options) as one:
            yield node, one

    return opened


class Bare:
    """The asking end without any manners: it takes what comes, or does not."""

    def __init__(self, link):
        self.link = link
        self.frames = asyncio.Queue()
        self.closed = asyncio.Event()
        link.on_closed = lambda *_: self.closed.set()
        link.on_frame = lambda _, kind, number, content, size: self.frames.put_nowait(
            (kind, number, content)
        )


@contextlib.asynccontextmanager
async def bare(address):
    link = await introduce(address, greeting(role="probe"))
    try:
        yield Bare(link)
    finally:
        link.abort()


# Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "x",
        [1, {"error": "none of ours"}],
        {"error": "none of ours"},
        np.arange(6, dtype="f4").reshape(2, 3),
        np.ones(700_000, "f8"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_echo_is_what_was_sent(prober, value):
    async with prober() as (_, asking):
        back = await asking.ask({"echo": value})
    np.testing.assert_equal(back, value)


async def test_answers_come_in_the_kind_and_the_order_of_the_requests(running):
    async with running() as (_, address), bare(address) as asking:
        asking.link.send(encode_inband({"echo": [1, np.float32(2)]}))
        asking.link.send(encode({"echo": (3,)}))
        asking.link.send(encode_inband({"no": 1}))
        assert await asking.frames.get() == (Kind.INBAND, 0, [1, 2.0])
        assert await asking.frames.get() == (Kind.MESSAGE, 0, (3,))
        kind, _, answer = await asking.frames.get()
        assert kind is Kind.INBAND
        assert answer["error"].startswith("no request: ['no']; expected one of about, echo")


async def test_a_sink_tells_the_size_of_the_request(prober):
    async with prober() as (_, asking):
        request = encode({"sink": np.ones(3_000_000, "f4")})
        assert await asking.request(request) == request.size > 12_000_000


async def test_arrays_are_given(prober):
    async with prober() as (_, asking):
        for size in (0, 4_000, 4_003, 8_000_000):
            array = await asking.ask({"give": size})
            assert (array.dtype, array.nbytes) == (np.float32, size // 4 * 4)
            assert (array == 1).all()


async def test_counted_messages_get_one_answer(prober):
    async with prober() as (_, asking):
        for count in (1, 300):
            arrived = asking.request(encode({"count": count}))
            for number in range(count):
                assert not arrived.done()
                asking.link.send(encode({"echo": number}))  # no request while it counts
            assert await arrived == count
        assert await asking.ask({"echo": "after"}) == "after"


async def test_a_node_says_what_it_is_busy_with(prober):
    async with prober() as (node, asking):
        about = await asking.ask({"about": None})
        assert about["job"] == ""
        assert about["cpu_s"] > 0
        node.member.job_id = "20250102-030405-test-0123"
        assert (await asking.ask({"about": None}))["job"] == node.member.job_id
        node.member.job_id = ""


async def test_pings_are_answered_with_their_number(running):
    async with running() as (_, address), bare(address) as asking:
        for number in (0, 65535):
            asking.link.send(encode(None, Kind.PING, number))
            assert await asking.frames.get() == (Kind.PONG, number, None)


async def test_a_prober_waits_for_its_own_pong(prober):
    async with prober() as (_, asking):
        await asyncio.gather(*(asking.ping() for _ in range(5)))


@pytest.mark.parametrize(
    "request_",
    [
        5,
        {},
        {"give": -1},
        {"give": probe.MAX_BYTES + 1},
        {"give": "x"},
        {"raw": 0},
        {"raw": probe.MAX_BYTES + 1},
        {"count": 0},
        {"count": probe.MAX_COUNT + 1},
        {"echo": 1, "sink": 2},
        {"dance": 1},
    ],
    ids=str,
)
async def test_what_cannot_be_met_is_said_and_the_link_goes_on(prober, request_):
    async with prober() as (_, asking):
        with pytest.raises(ClusterError, match="cannot be measured: no request"):
            await asking.ask(request_)
        assert await asking.ask({"echo": 1}) == 1


# The raw peer ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def raw_socket(asking, token=None, **request):
    place = await asking.ask(request)
    if isinstance(place["address"], int):
        connection = socket.create_connection((asking.address.host, place["address"]))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect("\0" + place["address"])
    with connection:
        connection.settimeout(10)
        connection.sendall(token or place["token"])
        yield connection


def has_ended(connection):
    """Wait for the other end's; it resets the connection if it had not read all."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("unix", [False, True])
async def test_a_raw_peer_answers_a_byte_for_so_many_bytes(prober, unix):
    request = {"raw": 1000, "every": 3, "unix": unix}
    async with prober() as (_, asking), raw_socket(asking, **request) as connection:
        for _ in range(2):
            connection.sendall(b"x" * 2999)
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            connection.settimeout(10)
            connection.sendall(b"x")
            assert len(connection.recv(10)) == 1


async def test_a_raw_peer_sends_the_same_back(prober):
    async with prober() as (_, asking), raw_socket(asking, raw=4, echo=True) as connection:
        for word in (b"abcd", b"efgh"):
            connection.sendall(word)
            assert connection.recv(10) == word


async def test_a_raw_peer_wants_its_token(prober):
    async with prober() as (_, asking), raw_socket(asking, token=bytes(16), raw=4) as connection:
        assert connection.recv(1) == b""


async def test_raw_peers_end_with_the_next_one_and_with_their_link(prober):
    async with prober() as (_, asking), contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(raw_socket(asking, raw=4))
        second = await stack.enter_async_context(raw_socket(asking, raw=4))
        assert await asyncio.to_thread(has_ended, first)
        asking.link.abort()
        assert await asyncio.to_thread(has_ended, second)


async def test_a_raw_peer_that_nobody_connects_to_ends_with_its_link(running):
    async with running() as (node, address), probing(address) as asking:
        place = await asking.ask({"raw": 4})
        (own,) = node._probes._links
        thread = own._raw._thread
        asking.link.abort()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.host, place["address"]))


async def test_a_host_that_cannot_be_listened_on_is_said(prober):
    async with prober() as (node, asking):
        node._probes.host = "192.0.2.1"
        with pytest.raises(ClusterError, match="no raw peer: "):
            await asking.ask({"raw": 4})


# Limits ---------------------------------------------------------------------------------------


async def test_there_are_only_so_many_links(running):
    async with running() as (_, address), contextlib.AsyncExitStack() as stack:
        for _ in range(probe.MAX_LINKS):
            last = await stack.enter_async_context(probing(address))
        with pytest.raises(ClusterError, match=f"{probe.MAX_LINKS} probe links are open"):
            await introduce(address, greeting(role="probe"))
        last.link.abort()
        async with asyncio.timeout(10):
            while True:  # until the node has seen the end
                with contextlib.suppress(ClusterError):
                    (await introduce(address, greeting(role="probe"))).abort()
                    break


async def test_a_request_that_is_too_large_ends_the_link_before_it_takes_memory(
    running, monkeypatch
):
    monkeypatch.setattr(probe, "_LIMITS", probe.Limits(max_body=1000))
    async with running() as (_, address), probing(address) as asking:
        with pytest.raises(ClusterError, match="closed the link"):
            await asking.ask({"sink": np.ones(1000, "f4")})


async def test_large_requests_that_are_under_way_are_counted_over_all_links(running, monkeypatch):
    monkeypatch.setattr(probe, "MAX_HELD", 5_000_000)
    begun = encode({"sink": np.ones(500_000, "f4")}, number=1)
    async with running() as (_, address), bare(address) as one, bare(address) as other:
        for asking in (one, other):  # the first piece alone: the message stays under way
            asking.link._transport.writelines(next(begun.pieces()))
        async with bare(address) as third:
            third.link.send(encode({"sink": np.ones(500_000, "f4")}))
            await third.closed.wait()


async def test_memory_is_counted_for_as_long_as_it_is_held(monkeypatch):
    monkeypatch.setattr(probe, "MAX_HELD", 5_000_000)
    probes = Probes("127.0.0.1", str)
    first, _second = probes.memory(2_000_000), probes.memory(2_000_000)
    with pytest.raises(probe.RemoteProtocolError, match=r"hold 4\d{6} bytes; at most 5000000"):
        probes.memory(2_000_000)
    view = np.ndarray(3, "f4", first.data)
    del first
    with pytest.raises(probe.RemoteProtocolError):
        probes.memory(2_000_000)
    del view
    gc.collect()
    assert len(probes.memory(2_000_000)) == 2_000_000
    assert len(probes.memory(10)) == 10


async def test_the_last_link_leaves_no_memory_behind(running):
    async with running() as (node, address):
        async with probing(address) as asking:
            await asking.ask({"give": 4_000_000})
            await asking.ask({"echo": np.ones(1_000_000, "f4")})
        while node._probes._links:
            await asyncio.sleep(0)
        assert node._probes._given.nbytes == node._probes._pool.idle == 0


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_UNREAD"])
async def test_who_does_not_read_the_answers_is_closed(running, monkeypatch, limit):
    async with running() as (_, address), bare(address) as asking:
        monkeypatch.setattr(probe, limit, 10)
        asking.link._transport.pause_reading()
        with contextlib.suppress(Exception):
            for _ in range(400):
                asking.link.send(encode({"echo": np.ones(100_000, "f4")}))
                await asyncio.sleep(0)
        asking.link._transport.resume_reading()
        await asking.closed.wait()


async def test_a_silent_link_is_closed_and_a_busy_one_is_not(prober, monkeypatch):
    async with prober() as (node, asking):
        (own,) = node._probes._links
        own._check_idle()
        assert await asking.ask({"echo": 1}) == 1
        monkeypatch.setattr(probe, "IDLE", -1.0)
        own._check_idle()
        with pytest.raises(ClusterError, match="closed the link"):
            await asking.ask({"echo": 1})


async def test_a_silent_raw_peer_is_closed(prober, monkeypatch):
    async with prober() as (node, asking):
        (own,) = node._probes._links
        async with raw_socket(asking, raw=4) as connection:
            own._check_idle()
            connection.sendall(b"abcd")
            assert len(await asyncio.to_thread(connection.recv, 1)) == 1
            own._raw.last_heard -= probe.IDLE + 1
            own._check_idle()
            assert await asyncio.to_thread(connection.recv, 1) == b""
        assert await asking.ask({"echo": 1}) == 1


async def test_frames_that_nobody_asked_for_end_the_link(running):
    async with running() as (_, address), bare(address) as asking:
        asking.link.send(encode({"role": "probe"}, Kind.HELLO))
        await asking.closed.wait()


async def test_a_node_that_stops_ends_its_probe_links(running):
    async with running() as (_, address):
        asking = Prober(address, await introduce(address, greeting(role="probe")))
        waiting = asking.request(encode({"count": 1}))
    with pytest.raises(ClusterError, match="closed the link"):
        await waiting
    with pytest.raises(ClusterError):
        await asking.ask({"echo": 1})
