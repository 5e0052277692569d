"""Meshes: credits, heartbeats, and what happens when a peer is lost."""

import asyncio
import math

import numpy as np
import pytest

from aiosgd.errors import LocalProtocolError, PeerLostError, RemoteProtocolError
from aiosgd.runtime import mesh
from aiosgd.runtime.frame import Encoded, Kind, Limits, encode
from aiosgd.runtime.mesh import Mesh
from tests.runtime.links import (
    end_and_socket,
    is_closed_with,
    joined,
    on_both_loops,
    pair,
    turns,
)


class Node:
    """A mesh that keeps what it is told; `consume=True` consumes at once."""

    def __init__(self, node, consume=False, eager=True):
        self.messages = asyncio.Queue()
        self.losses = asyncio.Queue()
        self.consume = consume
        self.mesh = Mesh(node, self.deliver, self.lost, eager)

    def deliver(self, sender, content, size):
        self.messages.put_nowait((sender, content, size))
        if self.consume:
            self.mesh.consumed(sender)

    def lost(self, peer, reason):
        self.losses.put_nowait((peer, reason))

    def link(self, peer):
        return self.mesh._peers[peer].link

    def outstanding(self, peer):
        return self.mesh._peers[peer].outstanding


async def nodes(count, **options):
    """Return `count` nodes with a link between any two."""
    all_nodes = [Node(i, **options) for i in range(count)]
    for i, a in enumerate(all_nodes):
        for j, b in enumerate(all_nodes[:i]):
            x, y = await pair()
            a.mesh.add(j, x.link)
            b.mesh.add(i, y.link)
    return all_nodes


async def node_and_end(**options):
    """Return node 0 and the bare end of its link to peer 1."""
    node = Node(0, **options)
    a, b = await pair()
    node.mesh.add(1, a.link)
    return node, b


@on_both_loops
async def test_one_encoding_serves_many_receivers(monkeypatch):
    sender_node, *receivers = await nodes(4)
    count = []
    monkeypatch.setattr(
        mesh, "encode", lambda *args, **options: count.append(1) or encode(*args, **options)
    )
    content = {"x": (1, np.ones(100_000))}
    size = encode(content).size
    assert sender_node.mesh.send([1, 2, 3], content) == 3 * size
    for node in receivers:
        sender, received, received_size = await node.messages.get()
        assert (sender, received_size) == (0, size)
        assert received["x"][1].sum() == 100_000
        assert node.mesh.bytes_received == size
    assert len(count) == 1
    assert sender_node.mesh.bytes_sent == 3 * size
    assert set(sender_node.mesh.peers) == {1, 2, 3}


@on_both_loops
async def test_what_a_node_sends_to_itself_arrives_as_at_others():
    (node,) = await nodes(1)
    array = np.arange(1000.0)
    assert node.mesh.send([0], ("to myself", array)) == 0
    assert node.messages.empty()  # never from within send
    array[:] = 0
    sender, (text, received), size = await node.messages.get()
    assert (sender, text, size) == (0, "to myself", encode(("to myself", array)).size)
    assert np.array_equal(received, np.arange(1000.0))
    assert not received.flags.writeable
    assert (node.mesh.bytes_sent, node.mesh.bytes_received) == (0, 0)
    node.mesh.consumed(0)
    await node.mesh.quiet()


@on_both_loops
async def test_a_mesh_counts_messages_with_those_to_itself():
    a, b = await nodes(2, consume=True)
    for i in range(3):
        a.mesh.send([0, 1], i)
    for node in (a, b):
        for _ in range(3):
            await node.messages.get()
    assert (a.mesh.messages_sent, a.mesh.messages_consumed) == (6, 3)
    assert (b.mesh.messages_sent, b.mesh.messages_consumed) == (0, 3)


@on_both_loops
async def test_a_refused_send_sends_nothing():
    a, b = await nodes(2)
    with pytest.raises(LocalProtocolError, match="node 7"):
        a.mesh.send([1, 7], 1)
    with pytest.raises(LocalProtocolError, match="object"):
        a.mesh.send([1, 0], np.array([None]))
    assert a.mesh.send([], 1) == 0
    await turns()
    assert b.messages.empty()
    assert a.messages.empty()
    assert a.outstanding(1) == 0


@on_both_loops
async def test_a_peer_is_added_once():
    a, _ = await nodes(2)
    extra, _ = await pair()
    for peer in (0, 1):
        with pytest.raises(LocalProtocolError, match=f"peer {peer}"):
            a.mesh.add(peer, extra.link)
    extra.link.abort()
    with pytest.raises(PeerLostError, match="node 5"):
        a.mesh.add(5, extra.link)
    await extra.closed


@on_both_loops
async def test_frames_from_before_the_link_was_added_are_delivered():
    node = Node(0)
    a, b = await pair()
    a.link.on_frame = None
    b.link.send(encode("early"))
    while not a.link.messages_received:
        await turns(1)
    node.mesh.add(1, a.link)
    b.link.send(encode("late"))
    assert [(await node.messages.get())[1] for _ in range(2)] == ["early", "late"]


@pytest.mark.parametrize("eager", [True, False])
@on_both_loops
async def test_room_waits_until_enough_was_consumed(eager):
    a, b = await nodes(2, eager=eager)
    await a.mesh.room(0)
    for i in range(3):
        a.mesh.send([1], i)
    await a.mesh.room(3)
    room, quiet = (asyncio.ensure_future(c) for c in (a.mesh.room(2), a.mesh.quiet()))
    for _ in range(3):
        await b.messages.get()
    await turns(20)
    assert not room.done()
    b.mesh.consumed(0)
    await room
    assert a.outstanding(1) == 2
    assert not quiet.done()
    b.mesh.consumed(0)
    b.mesh.consumed(0)
    await quiet
    assert a.outstanding(1) == 0


@on_both_loops
async def test_room_waits_for_the_slowest_peer():
    a, b, c = await nodes(3)
    a.mesh.send([1, 2], "x")
    waiting = asyncio.ensure_future(a.mesh.quiet())
    await b.messages.get()
    await c.messages.get()
    b.mesh.consumed(0)
    while a.outstanding(1):
        await turns(1)
    await turns()
    assert not waiting.done()
    c.mesh.consumed(0)
    await waiting


@on_both_loops
async def test_a_cancelled_wait_leaves_nothing_behind():
    a, b = await nodes(2, consume=True)
    a.mesh.send([1], "x")
    waiting = asyncio.ensure_future(a.mesh.quiet())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await a.mesh.quiet()
    assert not a.mesh._waiters
    assert (await b.messages.get())[1] == "x"


@on_both_loops
async def test_credits_of_one_turn_travel_together():
    node, peer = await node_and_end()
    for i in range(70):
        peer.link.send(encode(i))
    for _ in range(70):
        await node.messages.get()
    for _ in range(70):
        node.mesh.consumed(1)
    assert await peer.frames.get() == (Kind.CREDIT, 70, None, 16)
    await turns()
    assert peer.frames.empty()


@on_both_loops
async def test_unhurried_credits_wait_for_others_but_not_beyond_8_mib(monkeypatch):
    monkeypatch.setattr(mesh, "CREDIT_DELAY", 3600)
    monkeypatch.setattr(mesh, "OWED_AT_MOST", 1000)
    node, peer = await node_and_end(eager=False, consume=True)
    size = encode(bytes(300)).size
    for _ in range(1000 // size + 1):
        assert peer.frames.empty()
        peer.link.send(encode(bytes(300)))
        await node.messages.get()
    assert (await peer.frames.get())[:2] == (Kind.CREDIT, 1000 // size + 1)
    node.mesh.close()
    await peer.closed


@on_both_loops
async def test_unhurried_credits_travel_alone_in_the_end():
    node, peer = await node_and_end(eager=False)
    loop = asyncio.get_running_loop()
    for _ in range(2):
        peer.link.send(encode(1))
        await node.messages.get()
        began = loop.time()
        node.mesh.consumed(1)
        assert (await peer.frames.get())[:2] == (Kind.CREDIT, 1)
        assert loop.time() - began < 1


@on_both_loops
async def test_many_credits_take_several_frames(monkeypatch):
    monkeypatch.setattr(mesh, "_MAX_NUMBER", 4)
    _, peer = await node_and_end(consume=True)
    empty = encode(None)
    peer.link.send(Encoded(empty.header, [joined(empty) * 9], 16 * 9))
    assert [(await peer.frames.get())[1] for _ in range(3)] == [4, 4, 1]


@on_both_loops
async def test_consuming_what_was_never_received_is_our_error():
    a, b = await nodes(2)
    with pytest.raises(LocalProtocolError, match="node 1"):
        a.mesh.consumed(1)
    with pytest.raises(LocalProtocolError, match="node 9"):
        a.mesh.consumed(9)
    b.mesh.send([0], 1)
    await a.messages.get()
    a.mesh.consumed(1)
    with pytest.raises(LocalProtocolError, match="node 1"):
        a.mesh.consumed(1)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (encode(None, Kind.CREDIT, 2), "2 messages, but 1 are under way"),
        (encode(None, Kind.HELLO), "HELLO"),
    ],
)
@on_both_loops
async def test_a_peer_that_breaks_the_rules_is_lost(frame, words):
    node, peer = await node_and_end()
    node.mesh.send([1], 1)
    peer.link.send(frame)
    number, reason = await node.losses.get()
    assert number == 1
    assert is_closed_with(reason, RemoteProtocolError, words)
    await peer.closed
    assert not node.mesh.peers


@on_both_loops
async def test_a_lost_peer_wakes_who_waits_and_is_named():
    a, b, c = await nodes(3)
    a.mesh.send([1, 2], 1)
    waiting = asyncio.ensure_future(a.mesh.quiet())
    await asyncio.sleep(0)
    b.link(0).abort()
    with pytest.raises(PeerLostError, match="node 1"):
        await waiting
    number, reason = await a.losses.get()
    assert (number, type(reason)) == (1, PeerLostError)
    assert set(a.mesh.peers) == {2}
    with pytest.raises(PeerLostError, match="node 1"):
        a.mesh.send([2, 1], 2)
    await c.messages.get()
    a.mesh.consumed(1)  # of a peer that is gone: nobody to tell
    c.mesh.consumed(0)
    await a.mesh.quiet()  # the living peer is enough
    assert c.messages.empty()
    assert a.losses.empty()


@on_both_loops
async def test_a_link_about_to_break_takes_no_message():
    """Between abort and the loop's word about it, nothing may be sent to the others either."""
    a, _, c = await nodes(3)
    a.link(1).abort(PeerLostError("gone"))
    with pytest.raises(PeerLostError, match="node 1"):
        a.mesh.send([2, 1], 1)
    await a.losses.get()
    assert c.messages.empty()


@on_both_loops
async def test_a_lost_peer_may_come_back():
    a, b = await nodes(2)
    b.link(0).abort()
    await a.losses.get()
    x, y = await pair()
    a.mesh.add(1, x.link)
    a.mesh.send([1], "again")
    assert await y.content() == "again"
    y.link.send(encode(1))
    await a.messages.get()
    a.mesh.consumed(1)
    assert (await y.frames.get())[:2] == (Kind.CREDIT, 1)


@on_both_loops
async def test_close_returns_the_credits_that_are_owed(monkeypatch):
    monkeypatch.setattr(mesh, "CREDIT_DELAY", 3600)
    a, b = await nodes(2, eager=False)
    b.mesh.send([0], 1)
    await a.messages.get()
    quiet = asyncio.ensure_future(b.mesh.quiet())
    a.mesh.consumed(1)
    a.mesh.close()
    await quiet
    await b.losses.get()


@on_both_loops
async def test_close_ends_all_links_in_order_and_says_nothing_here():
    a, b, c = await nodes(3)
    a.mesh.send([1, 2], np.ones(1 << 20))
    stuck = asyncio.ensure_future(a.mesh.quiet())
    await asyncio.sleep(0)
    a.mesh.send([0], "never delivered")
    a.mesh.close()
    a.mesh.close()
    with pytest.raises(PeerLostError, match="closed"):
        await stuck
    for node in (b, c):
        assert (await node.messages.get())[1].sum() == 1 << 20
        _, reason = await node.losses.get()
        assert is_closed_with(reason, PeerLostError, "node 0 closed its link")
    with pytest.raises(PeerLostError):
        a.mesh.send([1], 1)
    with pytest.raises(LocalProtocolError):
        a.mesh.add(1, (await pair())[0].link)
    assert a.losses.empty()
    assert a.messages.empty()


# Heartbeats, at times of our choosing


@on_both_loops
async def test_silence_of_more_than_five_seconds_is_a_loss():
    a, b, _ = await nodes(3)
    start = a.mesh._last_beat = 1000.0
    a.link(1).last_heard, a.link(2).last_heard = start, start + 3
    for second in range(1, 6):
        assert a.mesh.silent(start + second) == []
        a.mesh.beat(start + second)
    assert a.mesh.silent(start + 5.1) == [1]
    a.mesh.beat(start + 5.1)
    number, reason = await a.losses.get()
    assert number == 1
    assert is_closed_with(reason, PeerLostError, "node 1 has been silent for 5.1 s")
    assert set(a.mesh.peers) == {2}
    assert (await b.losses.get())[0] == 0
    assert a.losses.empty()


@on_both_loops
async def test_a_node_that_slept_itself_blames_nobody():
    a, _ = await nodes(2)
    a.mesh._last_beat = a.link(1).last_heard = 1000.0
    a.mesh.beat(1060.0)
    assert set(a.mesh.peers) == {1}
    a.mesh.beat(1061.0)
    assert not a.mesh.peers


@on_both_loops
async def test_every_beat_asks_for_the_round_trip():
    a, b = await nodes(2)
    assert math.isnan(a.mesh.statistics()["round_trip_s"][0])
    a.mesh.beat(a.mesh._last_beat + 1)
    while math.isnan(trip := a.mesh.statistics()["round_trip_s"][0]):
        await turns(1)
    assert 0 < trip < 5
    assert b.messages.empty()


@on_both_loops
async def test_an_answer_to_another_ping_says_nothing():
    node, peer = await node_and_end()
    node.mesh.beat(node.mesh._last_beat + 1)
    kind, number, *_ = await peer.frames.get()
    assert kind is Kind.PING
    peer.link.send(encode(None, Kind.PONG, number + 1))
    peer.link.send(encode("done"))
    await node.messages.get()
    assert math.isnan(node.mesh.statistics()["round_trip_s"][0])
    peer.link.send(encode(None, Kind.PONG, number))
    peer.link.send(encode("done"))
    await node.messages.get()
    assert node.mesh.statistics()["round_trip_s"][0] > 0


@on_both_loops
async def test_the_table_of_links_counts_what_went_over_each():
    a, b, c = await nodes(3, consume=True)
    sizes = [a.mesh.send([1], "x" * 100), a.mesh.send([1, 2], np.ones(9))]
    for node in (b, b, c):
        await node.messages.get()
    table = a.mesh.statistics()
    assert list(table) == list(mesh.STATISTICS)
    assert table["peer"] == [1, 2]
    assert table["over"] == ["unix", "unix"]
    assert table["bytes_sent"] == [sizes[0] + sizes[1] // 2, sizes[1] // 2]
    assert table["messages_sent"] == [2, 1]
    assert min(table["queue_peak"]) >= sizes[1] // 2
    assert b.mesh.statistics()["bytes_received"] == [table["bytes_sent"][0], 0]
    a.mesh.close()
    assert a.mesh.statistics() == {name: [] for name in mesh.STATISTICS}


@on_both_loops
async def test_a_message_beyond_the_jobs_limit_is_refused_at_both_ends():
    a, b = Node(0), Node(1)
    a.mesh, b.mesh = (
        Mesh(i, node.deliver, node.lost, True, limits=Limits(max_body=limit))
        for i, node, limit in ((0, a, 10_000), (1, b, 1_000))
    )
    x, y = await pair()
    a.mesh.add(1, x.link)
    b.mesh.add(0, y.link)
    with pytest.raises(LocalProtocolError, match="10240 bytes of arrays; in this job at most"):
        a.mesh.send([1], np.zeros(10_240, "u1"))
    a.mesh.send([1], np.zeros(1_000, "u1"))
    assert len((await b.messages.get())[1]) == 1_000
    a.mesh.send([1], np.zeros(1_001, "u1"))
    _, reason = await b.losses.get()
    assert is_closed_with(reason, RemoteProtocolError, "1001 bytes; at most 1000")


# What a receiver has no room for stays with the sender


@on_both_loops
async def test_two_large_messages_are_under_way_and_the_others_wait():
    node, peer = await node_and_end()
    large = np.zeros(mesh.WINDOW_BYTES, "u1")
    for i in range(5):
        node.mesh.send([1], [i, large])
    assert [(await peer.content())[0] for _ in range(2)] == [0, 1]
    await turns(20)
    assert peer.frames.empty()
    for i in (2, 3, 4):
        peer.link.send(encode(None, Kind.CREDIT, 1))
        assert (await peer.content())[0] == i
        assert node.outstanding(1) == 6 - i


@on_both_loops
async def test_small_messages_are_under_way_up_to_the_window(monkeypatch):
    monkeypatch.setattr(mesh, "WINDOW_BYTES", 1000)
    node, peer = await node_and_end()
    size = encode(bytes(76)).size
    for i in range(30):
        node.mesh.send([1], bytes([i]) * 76)
    room = 1000 // size
    assert [(await peer.content())[0] for _ in range(room)] == list(range(room))
    await turns(20)
    assert peer.frames.empty()
    peer.link.send(encode(None, Kind.CREDIT, room))
    assert [(await peer.content())[0] for _ in range(room)] == list(range(room, 2 * room))


@on_both_loops
async def test_a_receiver_that_consumes_keeps_the_sender_going():
    a, b = await nodes(2, consume=True, eager=False)
    array = np.zeros(mesh.WINDOW_BYTES // 4, "u1")
    for i in range(40):
        a.mesh.send([1], [i, array])
    assert [(await b.messages.get())[1][0] for i in range(40)] == list(range(40))


@on_both_loops
async def test_a_peer_that_reads_nothing_holds_up_nobody_else():
    node, good = await node_and_end()
    stalled, theirs = await end_and_socket()
    node.mesh.add(2, stalled.link)
    large = np.zeros(mesh.WINDOW_BYTES // 2, "u1")
    with theirs:
        for i in range(9):
            node.mesh.send([1, 2], [i, large])
            assert (await good.content())[0] == i
            good.link.send(encode(None, Kind.CREDIT, 1))
        assert node.outstanding(2) == 9
        assert stalled.link.queued < 1.1 * mesh.WINDOW_BYTES  # the other seven wait elsewhere
        node.mesh._last_beat = 1000.0
        node.link(1).last_heard = 1001.0
        node.link(2).last_heard = 995.9
        node.mesh.beat(1001.0)
        assert (await node.losses.get())[0] == 2
        assert list(node.mesh.peers) == [1]


@on_both_loops
async def test_a_node_serves_two_hundred_links():
    hub = Node(0, consume=True)
    others = [Node(i) for i in range(1, 201)]
    for other in others:
        a, b = await pair()
        hub.mesh.add(other.mesh.node, a.link)
        other.mesh.add(0, b.link)
    array = np.arange(30_000, dtype="f4")
    for other in others:
        other.mesh.send([0], [other.mesh.node, array])
    heard = [await hub.messages.get() for _ in others]
    assert {sender for sender, *_ in heard} == set(range(1, 201))
    assert all(content[0] == sender for sender, content, _ in heard)
    hub.mesh.send(range(1, 201), array)
    for other in others:
        assert np.array_equal((await other.messages.get())[1], array)
    assert hub.mesh.bytes_sent == 200 * encode(array).size


@on_both_loops
async def test_what_waits_for_room_still_leaves_at_the_end():
    node, peer = await node_and_end()
    large = np.zeros(mesh.WINDOW_BYTES, "u1")
    for i in range(4):
        node.mesh.send([1], [i, large])
    node.mesh.close()
    assert [(await peer.content())[0] for _ in range(4)] == [0, 1, 2, 3]
    assert await peer.closed is None


@on_both_loops
async def test_pings_keep_a_link_alive_and_are_no_messages():
    a, b = await nodes(2)
    b.link(0).last_heard = -1e9
    a.mesh._last_beat = 0.0
    a.mesh.beat(1.0)
    while b.link(0).last_heard < 0:
        await turns(1)
    assert b.messages.empty()
    assert (a.mesh.bytes_sent, b.mesh.bytes_received) == (0, 0)


@on_both_loops
async def test_adding_a_link_starts_its_clock():
    a, _ = await pair()
    a.link.last_heard = -1e9
    node = Node(0)
    node.mesh.add(1, a.link)
    assert node.mesh.silent(asyncio.get_running_loop().time() + 1) == []


@on_both_loops
async def test_watch_beats_once_per_heartbeat(monkeypatch):
    monkeypatch.setattr(mesh, "HEARTBEAT", 0.001)
    node, peer = await node_and_end()
    watching = asyncio.ensure_future(node.mesh.watch())
    for _ in range(3):
        assert (await peer.frames.get())[0] is Kind.PING
    watching.cancel()
    await asyncio.wait([watching])
    assert watching.cancelled()


@on_both_loops
async def test_repr_names_node_and_peers():
    a, _ = await nodes(2)
    assert repr(a.mesh) == "<Mesh of node 0, peers [1]>"
