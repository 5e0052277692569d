"""Links and meshes over real sockets, on asyncio's loop and on uvloop."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import weakref

import numpy as np
import pytest

from aiosgd.errors import PeerLostError, RemoteProtocolError
from aiosgd.runtime import connection
from aiosgd.runtime.endpoint import connect, listen
from aiosgd.runtime.frame import CHUNK, HEADER, Kind, Limits, allocate, encode, encode_inband
from aiosgd.runtime.pool import Pool
from tests.runtime.links import (
    End,
    end_and_socket,
    is_closed_with,
    joined,
    made,
    on_both_loops,
    pair,
    tcp_pair,
    turns,
)

# Links: what is sent arrives


@on_both_loops
async def test_frames_arrive_in_order_with_kind_number_and_size():
    a, b = await pair()
    sent = [encode(i, Kind.MESSAGE, i) for i in range(300)] + [encode(None, Kind.PING)]
    for frame in sent:
        a.link.send(frame)
    for i, frame in enumerate(sent[:-1]):
        assert await b.frames.get() == (Kind.MESSAGE, i, i, frame.size)
    assert await b.frames.get() == (Kind.PING, 0, None, 16)


@on_both_loops
async def test_large_and_small_frames_arrive_mixed():
    a, b = await pair()
    arrays = [np.arange(size, dtype="u1") for size in (10, 600, 70_000, 0, 3_000_000, 65_536, 1)]
    for array in arrays:
        a.link.send(encode({"x": [array, (array[: len(array) // 2],)]}))
    for array in arrays:
        received = (await b.content())["x"]
        assert np.array_equal(received[0], array)
        assert np.array_equal(received[1][0], array[: len(array) // 2])
        assert not received[0].flags.writeable
        if array.nbytes >= 4096:
            assert received[0].ctypes.data % 64 == 0


@on_both_loops
async def test_every_size_around_the_staging_buffer_arrives():
    a, b = await pair()
    staging = connection.STAGING_SIZE
    overhead = encode(np.zeros(20_000, "u1")).size - 20_000
    for size in range(staging - overhead - 2, staging - overhead + 3):
        a.link.send(encode(1))
        a.link.send(encode(np.full(size, size % 251, "u1")))
        assert await b.content() == 1
        received = await b.content()
        assert received.shape == (size,)
        assert (received == size % 251).all()


@on_both_loops
async def test_the_largest_metadata_arrives_with_a_body():
    a, b = await pair()
    content = ["x" * 65_400, np.arange(100_000.0)]
    a.link.send(encode(1))
    a.link.send(encode(content))
    assert await b.content() == 1
    received = await b.content()
    assert received[0] == content[0]
    assert np.array_equal(received[1], content[1])


@on_both_loops
async def test_frames_arrive_in_pieces_of_one_byte():
    end, theirs = await end_and_socket()
    loop = asyncio.get_running_loop()
    with theirs:
        data = joined(encode([1, np.arange(100.0)])) + joined(encode(None, Kind.CREDIT, 2))
        for i in range(len(data)):
            await loop.sock_sendall(theirs, data[i : i + 1])
            await turns(1)
        assert np.array_equal((await end.content())[1], np.arange(100.0))
        assert (await end.frames.get())[:2] == (Kind.CREDIT, 2)
        assert end.frames.empty()
        end.link.abort()
    await end.closed


@pytest.mark.parametrize("piece", [7, 4096, 65_537, 500_000])
@on_both_loops
async def test_a_large_frame_arrives_in_pieces_of_any_size(piece):
    end, theirs = await end_and_socket()
    loop = asyncio.get_running_loop()
    array = np.arange(9000 if piece < 100 else 150_000, dtype="f8")
    data = joined(encode(array)) + joined(encode("next"))
    with theirs:
        for i in range(0, len(data), piece):
            await loop.sock_sendall(theirs, data[i : i + piece])
            await turns(1)
        assert np.array_equal(await end.content(), array)
        assert await end.content() == "next"
        end.link.abort()
    await end.closed


@on_both_loops
async def test_both_sides_send_much_at_once():
    """A reader that waits for anything would stand still here for ever."""
    a, b = await pair()
    frame = encode(np.arange(1 << 19, dtype="f8"))
    for _ in range(40):
        a.link.send(frame)
        b.link.send(frame)
    for _ in range(40):
        for end in (a, b):
            assert (await end.content())[-1] == (1 << 19) - 1
    assert a.link.bytes_sent == b.link.bytes_received == 40 * frame.size
    assert a.link.messages_sent == b.link.messages_received == 40


@on_both_loops
async def test_many_small_frames_leave_in_one_write():
    end, theirs = await end_and_socket()
    frames = [encode("x" * i) for i in range(50)]
    for frame in frames:
        end.link.send(frame)
    await turns()
    with theirs:
        assert theirs.recv(1 << 20) == b"".join(map(joined, frames))
        end.link.abort()
    await end.closed


@on_both_loops
async def test_urgent_frames_leave_between_the_chunks_of_a_large_one():
    a, b = await pair()
    large = encode(np.zeros(32 << 20, "u1"))
    a.link.send(large)
    a.link.send(encode("second"))
    await turns()
    assert 0 < a.link.queued < large.size + 100  # the large one has begun
    a.link.send(encode("third"))
    a.link.send(encode(None, Kind.PING), urgent=True)
    a.link.send(encode(None, Kind.CREDIT, 1), urgent=True)
    kinds = [(await b.frames.get()) for _ in range(5)]
    assert [kind for kind, *_ in kinds] == [Kind.PING, Kind.CREDIT, 1, 1, 1]
    assert [content for *_, content, _ in kinds[3:]] == ["second", "third"]


@on_both_loops
async def test_channels_take_turns_and_keep_their_order():
    a, b = await pair()
    large = np.arange(24 << 20, dtype="u1")
    a.link.send(encode(large, number=3))
    a.link.send(encode("after the large one", number=3))
    for i in range(5):
        a.link.send(encode(i, number=i % 2))
    a.link.send(encode(large[: 2 << 20], number=7))
    order = [(await b.frames.get())[1:3] for _ in range(8)]
    assert [content for number, content in order if number == 0] == [0, 2, 4]
    assert [content for number, content in order if number == 1] == [1, 3]
    assert [number for number, _ in order[6:]] == [3, 3]  # the largest is the last
    assert np.array_equal(order[6][1], large)
    assert order[7][1] == "after the large one"
    assert a.link.queue_peak > large.nbytes


@on_both_loops
async def test_messages_of_many_channels_arrive_in_pieces_of_any_size():
    """Chunks of several channels, whole frames between them, cut anywhere."""
    end, theirs = await end_and_socket()
    loop = asyncio.get_running_loop()
    arrays = [np.arange(size, dtype="u1") for size in (3 << 20, (2 << 20) + 17, 70_000, 5)]
    streams = [encode([i, array], number=i).pieces() for i, array in enumerate(arrays)]
    data = b""
    while streams:
        for stream in list(streams):
            piece = next(stream, None)
            if piece is None:
                streams.remove(stream)
            else:
                data += b"".join(piece) + joined(encode(None, Kind.PING))
    with theirs:
        for i in range(0, len(data), 99_991):
            await loop.sock_sendall(theirs, data[i : i + 99_991])
            await turns(1)
        received = {}
        while len(received) < len(arrays):
            kind, number, content, _ = await end.frames.get()
            if kind is Kind.MESSAGE:
                received[number] = content
        for i, array in enumerate(arrays):
            assert received[i][0] == i
            assert np.array_equal(received[i][1], array)
        end.link.abort()
    await end.closed


@on_both_loops
async def test_a_message_of_plain_msgpack_numpy_arrives_whole():
    a, b = await pair()
    content = {"x": np.arange(3 << 20, dtype="f4"), "y": [1, np.float64(2), None]}
    a.link.send(encode_inband(content, 4))
    a.link.send(encode(None, Kind.PING), urgent=True)
    first, second = await b.frames.get(), await b.frames.get()
    if first[0] is Kind.PING:
        first, second = second, first
    assert first[:2] == (Kind.INBAND, 4)
    assert np.array_equal(first[2]["x"], content["x"])
    assert not first[2]["x"].flags.writeable
    assert first[2]["y"] == [1, 2.0, None]
    assert (a.link.messages_sent, b.link.messages_received) == (1, 1)
    assert a.link.bytes_sent == b.link.bytes_received == first[3]


@on_both_loops
async def test_bodies_come_out_of_the_links_memory_and_go_back():
    a, b = await pair()
    pool = Pool()
    b.link.memory = pool.take
    addresses = set()
    for i in range(20):
        a.link.send(encode(np.full(2 << 20, i, "u1")))
        array = await b.content()
        assert (array == i).all()
        addresses.add(array.ctypes.data)
        del array
    assert len(addresses) == 1


@on_both_loops
async def test_only_messages_count():
    a, b = await pair()
    for kind in (Kind.HELLO, Kind.MESSAGE, Kind.CREDIT, Kind.PING):
        a.link.send(encode(None, kind))
    for _ in range(4):
        await b.frames.get()
    assert (a.link.messages_sent, a.link.bytes_sent) == (1, 16)
    assert (b.link.messages_received, b.link.bytes_received) == (1, 16)


class Hungry:
    """A transport that takes everything at once."""

    def __init__(self):
        self.written = []
        self.pieces = []

    def write(self, piece):
        self.writelines([piece])

    def writelines(self, pieces):
        self.written.append(b"".join(pieces))
        self.pieces += pieces

    def is_closing(self):
        return False

    def get_write_buffer_size(self):
        return 0


@on_both_loops
async def test_a_long_frame_leaves_in_chunks_and_lets_the_loop_breathe():
    end = End()
    link = end.make()
    link._transport = hungry = Hungry()
    data = np.arange(40 << 20, dtype="u1")
    frame = encode(data)
    link.send(frame)
    waiting = asyncio.ensure_future(link.flushed())
    assert len(hungry.written) == connection.BURST
    await turns(1)
    assert len(hungry.written) == 2 * connection.BURST
    assert link.queued == frame.size - sum(map(len, hungry.written))
    await waiting
    assert max(map(len, hungry.written)) <= CHUNK + 100
    assert b"".join(hungry.written) == joined(frame)
    by_reference = [p for p in hungry.pieces if np.shares_memory(np.frombuffer(p, "u1"), data)]
    assert sum(map(len, by_reference)) == data.nbytes


@on_both_loops
async def test_short_pieces_leave_together():
    end = End()
    link = end.make()
    link._transport = hungry = Hungry()
    frames = [encode(1), encode([np.ones(300)] * 20), encode(2), encode(np.ones(9000)), encode(3)]
    for frame in frames:
        link.send(frame)
    await link.flushed()
    assert b"".join(hungry.written) == b"".join(map(joined, frames))
    assert len(hungry.written) <= 5


@on_both_loops
async def test_a_cancelled_flush_disturbs_nobody():
    a, b = await pair()
    a.link.send(encode(np.ones(1 << 20)))
    one, other = (asyncio.ensure_future(a.link.flushed()) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    await b.content()
    await other
    assert one.cancelled()


@on_both_loops
async def test_flushed_waits_until_the_kernel_has_every_byte():
    end, theirs = await end_and_socket()
    loop = asyncio.get_running_loop()
    await end.link.flushed()
    frame = encode(np.ones(4 << 20, "u1"))
    end.link.send(frame)
    flushed = asyncio.ensure_future(end.link.flushed())
    await turns()
    assert not flushed.done()
    assert 0 < end.link.queued <= frame.size
    with theirs:
        received = 0
        while not flushed.done():
            received += len(await loop.sock_recv(theirs, 1 << 18))
        assert end.link.queued == 0
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                received += len(theirs.recv(1 << 20))
        assert received == frame.size
        end.link.abort()
    await end.closed


@on_both_loops
async def test_a_sent_array_is_kept_until_it_has_left_and_no_longer():
    a, b = await pair()
    array = np.ones(64 << 20, "u1")
    alive = weakref.ref(array)
    a.link.send(encode(array))
    del array
    await turns()
    assert alive() is not None
    await b.content()
    await a.link.flushed()
    await turns()
    assert alive() is None


@on_both_loops
async def test_a_received_body_is_free_when_its_last_array_is_gone():
    a, b = await pair()
    a.link.send(encode(np.ones(1 << 20)))
    a.link.send(encode(1))
    received = await b.content()
    assert await b.content() == 1
    alive = weakref.ref(received.base)
    del received
    assert alive() is None


# Links: handlers


@on_both_loops
async def test_a_handler_may_be_replaced_between_two_frames_of_one_read():
    a, b = await pair()
    other = End()

    def first(link, kind, number, content, size):
        link.on_frame = other.on_frame

    b.link.on_frame = first
    for i in range(3):
        a.link.send(encode(i))
    assert [await other.content() for _ in range(2)] == [1, 2]


@on_both_loops
async def test_frames_wait_while_there_is_no_handler():
    a, b = await pair()

    def first(link, kind, number, content, size):
        b.on_frame(link, kind, number, content, size)
        link.on_frame = None

    b.link.on_frame = first
    for i in range(1000):
        a.link.send(encode([i, b"x" * 1000]))
    a.link.send(encode(np.ones(1 << 17)))
    assert (await b.content())[0] == 0
    await turns()
    assert b.frames.empty()
    b.link.on_frame = b.on_frame
    assert [(await b.content())[0] for _ in range(999)] == list(range(1, 1000))
    assert (await b.content()).sum() == 1 << 17


@on_both_loops
async def test_reading_rests_while_there_is_no_handler():
    a, b = await pair()
    b.link.on_frame = None
    a.link.send(encode(np.ones(4 << 20, "u1")))
    a.link.send(encode(np.ones(4 << 20, "u1")))
    a.link.send(encode(np.ones(4 << 20, "u1")))
    while not b.link.messages_received:
        await turns(1)
    await turns(50)
    assert b.link.messages_received == 1
    assert a.link.queued > 1 << 20


# Links: the end


@on_both_loops
async def test_close_delivers_what_was_queued_and_both_ends_are_told_once():
    a, b = await pair()
    a.link.send(encode(np.arange(3_000_000)))
    a.link.send(encode("last"))
    a.link.close()
    a.link.close()
    assert a.link.is_closed
    with pytest.raises(PeerLostError, match="closed"):
        a.link.send(encode(1))
    assert len(await b.content()) == 3_000_000
    assert await b.content() == "last"
    assert await a.closed is None
    assert await b.closed is None
    assert a.link._linger.cancelled()
    with pytest.raises(PeerLostError, match="closed"):
        b.link.send(encode(1))


@on_both_loops
async def test_close_loses_nothing_although_the_peer_is_still_talking():
    """Unread bytes turn an immediate close into a reset, which would destroy the last message."""
    a, b = await tcp_pair()
    b.link.send(encode(np.ones(1 << 18)))
    a.link.send(encode(np.ones(1 << 18)))
    a.link.send(encode("last"))
    a.link.close()
    assert (await b.content()).sum() == 1 << 18
    assert await b.content() == "last"
    await a.closed
    await b.closed


@on_both_loops
async def test_nothing_is_delivered_after_close():
    a, b = await pair()

    def last(link, kind, number, content, size):
        b.on_frame(link, kind, number, content, size)
        link.close()

    b.link.on_frame = last
    for i in range(3):
        a.link.send(encode(i))
    assert await b.closed is None
    assert await a.closed is None
    assert await b.content() == 0
    assert b.frames.empty()


@on_both_loops
async def test_close_drops_frames_that_were_kept():
    a, b = await pair()
    b.link.on_frame = None
    a.link.send(encode(1))
    while not b.link.messages_received:
        await turns(1)
    b.link.close()
    b.link.on_frame = b.on_frame
    assert [await a.closed, await b.closed] == [None, None]
    assert b.frames.empty()


@on_both_loops
async def test_both_sides_may_close_at_once():
    a, b = await pair()
    a.link.close()
    b.link.close()
    assert [await a.closed, await b.closed] == [None, None]


@on_both_loops
async def test_a_peer_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr(connection, "LINGER", 0.001)
    end, theirs = await end_and_socket()
    with theirs:
        end.link.close()
        assert await end.closed is None


@on_both_loops
async def test_abort_gives_the_reason_to_us_and_a_loss_to_the_peer():
    a, b = await pair()
    reason = PeerLostError("silent")
    b.link.send(encode(np.ones(1 << 20)))
    waiting = asyncio.ensure_future(b.link.flushed())
    await turns()
    a.link.abort(reason)
    a.link.abort(RuntimeError("too late"))
    assert await a.closed is reason
    assert isinstance(await b.closed, PeerLostError)
    with pytest.raises(PeerLostError):
        await waiting
    with pytest.raises(PeerLostError, match="silent"):
        a.link.send(encode(1))


@on_both_loops
async def test_flushed_of_a_broken_link_raises():
    end, theirs = await end_and_socket()
    with theirs:
        end.link.send(encode(np.ones(1 << 20)))
        await turns()
        end.link.abort()
        with pytest.raises(PeerLostError):
            await end.link.flushed()
        await end.closed
        await end.link.flushed()  # nothing is queued any more


@on_both_loops
async def test_a_link_may_be_aborted_before_it_is_made():
    refused, caller = End(), End()
    reason = RemoteProtocolError("too many")

    def refuse():
        link = refused.make()
        link.abort(reason)
        return link

    server = await listen("127.0.0.1", 0, refuse)
    address = server.sockets[0].getsockname()
    made.append(await connect(*address, caller.on_frame, caller.on_closed, 5))
    assert await refused.closed is reason
    await caller.closed
    server.close()


@pytest.mark.parametrize("cut", [1, 15, 16, 20, 300, 70_000])
@on_both_loops
async def test_a_peer_that_dies_within_a_frame_is_lost(cut):
    end, theirs = await end_and_socket()
    data = joined(encode("x" * 500)) if cut < 500 else joined(encode(np.ones(100_000)))
    theirs.send(data[:cut])
    theirs.close()
    assert is_closed_with(await end.closed, PeerLostError, "middle of a frame")


@on_both_loops
async def test_an_end_while_we_still_send_is_a_loss():
    end, theirs = await end_and_socket()
    with theirs:
        end.link.send(encode(np.ones(1 << 20)))
        await turns()
        theirs.shutdown(socket.SHUT_WR)
        while not end.link.is_closed:
            await turns(1)
        with pytest.raises(PeerLostError, match="frames on their way"):
            end.link.send(encode(1))
    assert is_closed_with(await end.closed, PeerLostError, "frames on their way")


@on_both_loops
async def test_what_waits_stays_out_of_the_transport():
    """A transport copies what it keeps; urgent frames could not overtake it either."""
    end, theirs = await end_and_socket()
    with theirs:
        end.link.send(encode(np.ones(1 << 20)))
        await turns(50)
        assert end.link.queued > 4 * CHUNK
        assert end.link._transport.get_write_buffer_size() <= CHUNK + 100
        end.link.abort()
    await end.closed


@on_both_loops
async def test_a_reset_is_a_lost_peer():
    a, b = await tcp_pair()
    hard = struct.pack("ii", 1, 0)
    b.link._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
    b.link.abort()
    assert is_closed_with(await a.closed, PeerLostError, "Connection reset by peer")


GARBAGE = {
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "0x47"),
    "zeros": (bytes(100), "0x00"),
    "kind": (HEADER.pack(0xA5, 9, 0, 0, 0), "kind 9"),
    "chunk of nothing": (HEADER.pack(0xA5, 3, 5, 0, 9), "channel 5, where nothing is open"),
    "inband": (HEADER.pack(0xA5, 2, 0, 0, 1) + b"\xc1", "type 0xc1"),
    "metadata": (HEADER.pack(0xA5, 1, 0, 1 << 31, 0), "metadata"),
    "body": (HEADER.pack(0xA5, 1, 0, 5, 5000), "at most 4096"),
    "content": (HEADER.pack(0xA5, 1, 0, 1, 0) + b"\xc1", "metadata"),
    "body without arrays": (HEADER.pack(0xA5, 1, 0, 1, 4) + b"\x01abcd", "arrays end at 0"),
}


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("before", [0, 3])
@on_both_loops
async def test_garbage_closes_the_link_with_a_reason(name, before):
    data, words = GARBAGE[name]
    end, theirs = await end_and_socket(Limits(max_body=4096))
    with theirs:
        theirs.send(joined(encode("good")) * before + data + joined(encode("never")))
        assert is_closed_with(await end.closed, RemoteProtocolError, words)
    assert [await end.content() for _ in range(before)] == ["good"] * before
    assert end.frames.empty()


CHUNKED = joined(encode(np.zeros(2 << 20, "u1"), number=5))
FIRST = CHUNKED[: len(CHUNKED) - (1 << 20) - 16]  # the message and its first chunk
BAD_CHUNKS = {
    "a second message": (FIRST + CHUNKED, "two messages at once in channel 5"),
    "an empty chunk": (FIRST + HEADER.pack(0xA5, 3, 5, 0, 0), "a chunk has 0 bytes"),
    "too long a chunk": (FIRST + HEADER.pack(0xA5, 3, 5, 0, (1 << 20) + 1), "its message has less"),
    "metadata": (FIRST + HEADER.pack(0xA5, 3, 5, 3, 10), "CHUNK frame has 3 bytes of metadata"),
    "more than its share": (CHUNKED + HEADER.pack(0xA5, 3, 5, 0, 1) + b"x", "nothing is open"),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
@on_both_loops
async def test_a_wrong_chunk_closes_the_link(name):
    data, words = BAD_CHUNKS[name]
    end, theirs = await end_and_socket()
    with theirs, contextlib.suppress(ConnectionError):
        await asyncio.get_running_loop().sock_sendall(theirs, data)
    assert is_closed_with(await end.closed, RemoteProtocolError, words)


@on_both_loops
async def test_a_peer_may_not_open_any_number_of_channels(monkeypatch):
    monkeypatch.setattr(connection, "OPEN_CHANNELS", 3)
    end, theirs = await end_and_socket()
    large = np.zeros(2 << 20, "u1")
    heads = [encode(large, number=i).buffers[0] for i in range(4)]
    with theirs:
        theirs.send(b"".join(heads))
        assert is_closed_with(await end.closed, RemoteProtocolError, "more than 3 channels")


@on_both_loops
async def test_a_refused_large_body_is_freed_with_the_link():
    """The reason is kept for reports; it must not keep the frame that it complains about."""
    end, theirs = await end_and_socket()
    loop = asyncio.get_running_loop()
    bodies = []
    with theirs:

        def memory(size):
            body = allocate(size)
            bodies.append(weakref.ref(body.base))
            return body

        end.link.memory = memory
        data = HEADER.pack(0xA5, 1, 0, 1, 1 << 20) + b"\x01" + bytes(1 << 20)
        await loop.sock_sendall(theirs, data)
        reason = await end.closed
    assert is_closed_with(reason, RemoteProtocolError, "arrays end at 0")
    made.clear()
    end.link = None
    assert [body() for body in bodies] == [None]


@on_both_loops
async def test_a_body_that_is_half_there_is_freed_when_the_link_breaks():
    end, theirs = await end_and_socket()
    bodies, began = [], asyncio.Event()

    def memory(size):
        body = allocate(size)
        bodies.append(weakref.ref(body.base))
        began.set()
        return body

    end.link.memory = memory
    with theirs:
        await asyncio.get_running_loop().sock_sendall(theirs, joined(encode(np.ones(1 << 17)))[:-1])
        await began.wait()
    await end.closed
    assert end.link is not None
    assert [body() for body in bodies] == [None]


@on_both_loops
async def test_limits_may_be_replaced():
    a, b = await pair(limits=Limits(max_metadata=10, max_body=0))
    b.link.limits = Limits()
    a.link.send(encode("longer than ten bytes"))
    assert await b.content() == "longer than ten bytes"
    b.link.limits = Limits(max_metadata=10)
    a.link.send(encode("longer than ten bytes"))
    assert is_closed_with(await b.closed, RemoteProtocolError, "at most 10")


@on_both_loops
async def test_a_handler_that_refuses_a_frame_closes_the_link():
    a, b = await pair()

    def refuse(*_):
        raise RemoteProtocolError("not now")

    b.link.on_frame = refuse
    a.link.send(encode(1))
    assert is_closed_with(await b.closed, RemoteProtocolError, "not now")


@on_both_loops
async def test_a_late_handler_that_refuses_a_frame_closes_the_link():
    a, b = await pair()

    def refuse(*_):
        raise RemoteProtocolError("not now")

    b.link.on_frame = None
    a.link.send(encode(1))
    while not b.link.messages_received:
        await turns(1)
    b.link.on_frame = refuse
    assert is_closed_with(await b.closed, RemoteProtocolError, "not now")


@on_both_loops
async def test_last_heard_and_last_sent_follow_the_clock():
    loop = asyncio.get_running_loop()
    a, b = await pair()
    a.link.last_sent = b.link.last_heard = 0.0
    a.link.send(encode(None, Kind.PING))
    await b.frames.get()
    assert loop.time() - 5 < a.link.last_sent <= loop.time()
    assert loop.time() - 5 < b.link.last_heard <= loop.time()


@on_both_loops
async def test_tls_carries_frames_of_any_size(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    server_context, client_context = tls_contexts(tmp_path)
    loop = asyncio.get_running_loop()
    a, b = End(), End()
    server = await loop.create_server(b.make, "127.0.0.1", 0, ssl=server_context)
    await loop.create_connection(
        a.make, *server.sockets[0].getsockname(), ssl=client_context, server_hostname="localhost"
    )
    while b.link is None or not b.link._connected:
        await turns(1)
    for size in (1, 1000, 1 << 20, 5 << 20):
        a.link.send(encode(np.ones(size, "u1")))
        b.link.send(encode(np.ones(size, "u1")))
        assert (await b.content()).sum() == size
        assert (await a.content()).sum() == size
    await a.link.flushed()
    a.link.send(encode("last"))
    a.link.close()
    assert await b.content() == "last"
    await a.closed
    await b.closed
    server.close()


def tls_contexts(folder):
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    options = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    )
    subject = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", *options.split(), *subject, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)
