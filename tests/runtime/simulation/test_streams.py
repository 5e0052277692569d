"""Simulated connections: what programs see of them, beside the system's own."""

import asyncio
import contextlib
import errno
import functools
import gc
import inspect
import socket
import ssl
import threading
import weakref

import pytest

from aiosgd.errors import ClusterError
from aiosgd.runtime import endpoint
from aiosgd.runtime.connection import Link
from aiosgd.runtime.frame import encode
from aiosgd.runtime.simulation import network, streams
from aiosgd.runtime.simulation.loop import EscapeError, run_virtually
from aiosgd.runtime.simulation.network import Network, NetworkModel
from aiosgd.runtime.simulation.streams import SEGMENT, WINDOW, Internet, StreamLoop
from aiosgd.runtime.simulation.trace import Trace

LATENCY = 0.01
PORT = 7000


class World:
    """Two machines, a and b."""

    def __init__(self, **model):
        loop = asyncio.get_running_loop()
        model = {"bytes_per_s": float("inf"), "message_s": 0, "byte_s": 0, **model}
        model.setdefault("path", network.Path(latency_s=LATENCY))
        self.loop = loop
        self.trace = Trace(keep=True)
        self.network = Network(loop, NetworkModel(**model), 0, self.trace)
        self.internet = Internet(loop, self.network)
        self.a, self.b = self.internet.add(0, "a"), self.internet.add(1, "b")


def simulated(test):
    """Run a test as the program that looks on from outside; what it starts must end with it."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def main():
            world = World()
            errors = []
            world.loop.set_exception_handler(lambda _, context: errors.append(context))
            try:
                async with asyncio.timeout(1000):
                    await test(world, *args, **kwargs)
            finally:
                world.internet.close()
            assert not errors

        with asyncio.Runner(loop_factory=StreamLoop) as runner:
            runner.run(main())

    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return run


class Recorder(asyncio.BufferedProtocol):
    """Notes all that happens to its end; has room for so many bytes at a time."""

    def __init__(self, room=1 << 16, keep_open=False):
        self.calls, self.data, self.room, self.keep_open = [], b"", room, keep_open
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.calls.append("made")

    def get_buffer(self, sizehint):
        self.buffer = bytearray(self.room)
        return self.buffer

    def buffer_updated(self, count):
        self.data += self.buffer[:count]

    def eof_received(self):
        self.calls.append("eof")
        return self.keep_open

    def pause_writing(self):
        self.calls.append("pause")

    def resume_writing(self):
        self.calls.append("resume")
        self.left = self.transport.get_write_buffer_size()

    def connection_lost(self, error):
        self.calls.append(type(error).__name__ if error else "lost")
        self.lost.set_result(None)


async def forever():
    await asyncio.get_running_loop().create_future()


async def connected(world, **options):
    """Return the protocols of a connection from a to b, both processes living on."""
    ends = {}

    async def serve():
        def accept():
            ends["b"] = Recorder(**options)
            return ends["b"]

        await asyncio.get_running_loop().create_server(accept, "b", PORT)
        await forever()

    async def call():
        loop = asyncio.get_running_loop()
        _, ends["a"] = await loop.create_connection(Recorder, "b", PORT)
        await forever()

    world.b.start(serve())
    world.a.start(call())
    await asyncio.sleep(5 * LATENCY)
    return ends["a"], ends["b"]


# What goes over a connection --------------------------------------------------------------------


@simulated
async def test_bytes_arrive_whole_and_in_order_however_they_are_cut(world):
    a, b = await connected(world, room=7)
    pieces = [bytes([i % 251]) * (i * 97 % 1000) for i in range(100)]
    for i in range(0, 100, 2):
        a.transport.write(pieces[i])
        a.transport.writelines([pieces[i + 1], b""])
    await asyncio.sleep(1)
    assert b.data == b"".join(pieces)
    assert b.calls == ["made"]


@simulated
async def test_each_end_has_both_addresses_and_a_socket(world):
    a, b = await connected(world)
    for end, other in ((a, b), (b, a)):
        info = end.transport.get_extra_info
        assert info("sockname") == other.transport.get_extra_info("peername")
        assert info("socket").getsockname() == info("sockname")
        assert info("socket").getpeername() == info("peername")
        assert info("socket").family == socket.AF_INET
        assert info("sslcontext") is None
        assert end.transport.get_protocol() is end
    assert a.transport.get_extra_info("peername") == ("b", PORT)


@simulated
async def test_what_was_sent_may_change_only_once_it_has_left(world):
    a, b = await connected(world)
    first, later = bytearray(b"x" * WINDOW), bytearray(b"y" * 10)
    a.transport.writelines([first, later])
    first[:] = bytes(WINDOW)
    later[:] = b"z" * 10
    await asyncio.sleep(1)
    assert b.data == b"x" * WINDOW + b"z" * 10


@simulated
async def test_who_does_not_read_stops_the_sender_and_starts_it_again(world):
    a, b = await connected(world)
    a.transport.set_write_buffer_limits(high=0, low=0)
    b.transport.pause_reading()
    assert not b.transport.is_reading()
    a.transport.write(bytes(WINDOW))
    assert (a.transport.get_write_buffer_size(), a.calls) == (0, ["made"])
    a.transport.write(bytes(3 * WINDOW))
    await asyncio.sleep(10)
    assert (a.transport.get_write_buffer_size(), a.calls) == (3 * WINDOW, ["made", "pause"])
    assert b.data == b""
    b.transport.resume_reading()
    await asyncio.sleep(10)
    assert len(b.data) == 4 * WINDOW
    assert a.calls == ["made", "pause", "resume"]
    assert a.transport.get_write_buffer_limits() == (0, 0)


@simulated
async def test_writing_goes_on_once_no_more_than_the_low_mark_waits(world):
    a, b = await connected(world)
    a.transport.set_write_buffer_limits(high=2 * WINDOW, low=WINDOW // 2)
    a.transport.write(bytes(3 * WINDOW))
    assert a.calls == ["made"]  # one window has left
    a.transport.write(b"x")
    assert a.calls == ["made", "pause"]
    await asyncio.sleep(1)
    assert a.calls == ["made", "pause", "resume"]
    assert 0 < a.left <= WINDOW // 2
    assert len(b.data) == 3 * WINDOW + 1


@simulated
async def test_a_long_write_takes_as_long_as_its_window_allows(world):
    a, b = await connected(world)
    began = world.loop.time()
    a.transport.write(bytes(10 * WINDOW))
    while len(b.data) < 10 * WINDOW:
        await asyncio.sleep(LATENCY / 100)
    # the last of ten windows arrives after nine round trips and one way
    assert world.loop.time() - began == pytest.approx(19 * LATENCY, rel=0.1)
    sizes = [event.size for event in world.trace.events if event.node == 0 and event.size]
    assert max(sizes) == SEGMENT


@simulated
async def test_links_carry_frames_both_ways(world):
    got, links = [], []

    def take(link, kind, number, content, size):
        got.append(content)
        if len(got) < 6:
            link.send(encode([*content, len(got)]))

    async def serve():
        await endpoint.listen("b", PORT, lambda: Link(take, lambda *_: None))
        await forever()

    async def call():
        link = await endpoint.connect("b", PORT, take, lambda *_: None, 5.0)
        links.append(link)
        link.send(encode(["begin"]))
        await forever()

    world.b.start(serve())
    world.a.start(call())
    await asyncio.sleep(1)
    assert got[-1] == ["begin", 1, 2, 3, 4, 5]
    assert (links[0].over, links[0].address) == ("tcp", f"b:{PORT}")


# The beginning of a connection ------------------------------------------------------------------


async def error_of(awaitable):
    try:
        await awaitable
    except (OSError, ClusterError, EscapeError) as error:
        return error
    return None


def call_from(machine, host, port, **options):
    async def call():
        loop = asyncio.get_running_loop()
        return await error_of(loop.create_connection(Recorder, host, port, **options))

    return machine.start(call())


@simulated
async def test_a_port_where_nobody_listens_refuses(world):
    error = await call_from(world.a, "b", PORT)
    assert (type(error), error.errno) == (ConnectionRefusedError, errno.ECONNREFUSED)
    assert world.loop.time() == pytest.approx(2 * LATENCY)


@simulated
async def test_a_listener_that_was_closed_refuses(world):
    async def serve():
        listener = await asyncio.get_running_loop().create_server(Recorder, "b", PORT)
        listener.close()
        await forever()

    world.b.start(serve())
    assert isinstance(await call_from(world.a, "b", PORT), ConnectionRefusedError)


@simulated
async def test_an_unknown_host_is_unknown(world):
    assert isinstance(await call_from(world.a, "c", PORT), socket.gaierror)


@simulated
async def test_a_silent_machine_lets_callers_wait(world):
    async def call():
        return await error_of(endpoint.connect("b", PORT, None, lambda *_: None, 3.0))

    world.b.fail()
    error = await world.a.start(call())
    assert isinstance(error, ClusterError)
    assert "b:7000 does not answer within 3 s" in str(error)
    assert world.loop.time() == pytest.approx(3.0)


@pytest.mark.parametrize("patience", [0.5 * LATENCY, 1.5 * LATENCY])
@simulated
async def test_a_caller_that_gives_up_breaks_the_connection_that_came_about_meanwhile(
    world, patience
):
    accepted = []

    async def serve():
        def accept():
            accepted.append(Recorder())
            return accepted[-1]

        await asyncio.get_running_loop().create_server(accept, "b", PORT)
        await forever()

    async def call():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await asyncio.get_running_loop().create_connection(Recorder, "b", PORT)
        await forever()

    world.b.start(serve())
    await asyncio.sleep(0)
    world.a.start(call())
    await asyncio.sleep(1)
    assert len(accepted) == 1
    assert accepted[0].calls[-1] in ("lost", "ConnectionResetError")
    assert not world.a.process.connections
    assert not world.b.process.connections


@simulated
async def test_an_address_is_taken_once_and_only_by_its_own_machine(world):
    async def serve():
        loop = asyncio.get_running_loop()
        first = await loop.create_server(Recorder, "b", 0)
        port = first.sockets[0].getsockname()[1]
        taken = await error_of(loop.create_server(Recorder, "b", port))
        foreign = await error_of(loop.create_server(Recorder, "a", 0))
        first.close()
        again = await loop.create_server(Recorder, "0.0.0.0", port)
        return taken.errno, foreign.errno, again.sockets[0].getsockname()

    taken, foreign, name = await world.b.start(serve())
    assert (taken, foreign) == (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
    assert name[1] >= streams.FIRST_PORT


@simulated
async def test_there_is_no_way_out_of_the_simulation(world):
    for call in (world.loop.create_server, world.loop.create_connection):
        with pytest.raises(EscapeError, match="on a simulated machine"):
            await call(Recorder, "b", PORT)
    error = await call_from(world.a, "b", PORT, ssl=ssl.create_default_context())
    assert isinstance(error, EscapeError)
    assert "has no ssl" in str(error)


@pytest.mark.parametrize("name", ["create_server", "create_connection"])
def test_a_loop_without_machines_refuses_connections(name):
    async def call():
        await getattr(asyncio.get_running_loop(), name)(Recorder, "127.0.0.1", 0)

    with pytest.raises(EscapeError, match=name):
        run_virtually(call())


# Its end ----------------------------------------------------------------------------------------


@simulated
async def test_close_ends_both_sides_after_what_was_written(world):
    a, b = await connected(world)
    a.transport.write(bytes(3 * WINDOW))
    a.transport.close()
    a.transport.write(b"too late")
    assert a.transport.is_closing()
    await asyncio.sleep(1)
    assert len(b.data) == 3 * WINDOW
    assert (a.calls[-1], b.calls) == ("lost", ["made", "eof", "lost"])
    assert not world.a.process.connections
    assert not world.b.process.connections


@simulated
async def test_half_a_connection_can_be_closed(world):
    a, b = await connected(world, keep_open=True)
    assert a.transport.can_write_eof()
    a.transport.write(bytes(2 * WINDOW))
    a.transport.write_eof()
    with pytest.raises(RuntimeError, match="after write_eof"):
        a.transport.write(b"more")
    await asyncio.sleep(1)
    assert (len(b.data), b.calls) == (2 * WINDOW, ["made", "eof"])
    b.transport.write(b"answer")
    b.transport.close()
    await asyncio.sleep(1)
    assert a.data == b"answer"
    assert (a.calls[-2:], b.calls) == (["eof", "lost"], ["made", "eof", "lost"])


@simulated
async def test_abort_drops_what_has_not_left(world):
    a, b = await connected(world)
    a.transport.write(bytes(5 * WINDOW))
    a.transport.abort()
    a.transport.abort()
    assert a.transport.get_write_buffer_size() == 0
    await asyncio.sleep(1)
    assert len(b.data) == WINDOW
    assert (a.calls[-1], b.calls) == ("lost", ["made", "eof", "lost"])


@simulated
async def test_bytes_that_nobody_read_reset_the_connection(world):
    a, b = await connected(world)
    b.transport.pause_reading()
    a.transport.write(b"unread")
    await asyncio.sleep(1)
    b.transport.close()
    await asyncio.sleep(1)
    assert (a.calls, b.calls) == (["made", "ConnectionResetError"], ["made", "lost"])


@simulated
async def test_who_does_not_read_hears_of_a_reset_when_it_writes(world):
    a, b = await connected(world)
    a.transport.pause_reading()
    b.transport.pause_reading()
    a.transport.write(b"unread")
    await asyncio.sleep(1)
    b.transport.abort()
    await asyncio.sleep(1)
    assert a.calls == ["made"]
    a.transport.write(b"more")
    assert a.transport.is_closing()
    await asyncio.sleep(1)
    assert a.calls == ["made", "ConnectionResetError"]


@simulated
async def test_bytes_to_a_closed_end_reset_the_connection(world):
    a, b = await connected(world)
    b.transport.close()
    a.transport.write(b"on their way meanwhile")
    await asyncio.sleep(1)
    assert (a.calls[-1], b.calls[-1]) == ("lost", "lost")
    a, b = (end for end in await reconnected(world, keep_open=True))
    b.transport.close()
    await asyncio.sleep(1)
    assert a.calls == ["made", "eof"]
    a.transport.write(b"nobody reads this")
    await asyncio.sleep(1)
    assert a.calls == ["made", "eof", "ConnectionResetError"]


async def reconnected(world, **options):
    """As `connected`, with a caller that keeps its end open after the other's."""
    for machine in (world.a, world.b):
        machine.kill()
    ends = {}

    async def serve():
        def accept():
            ends["b"] = Recorder()
            return ends["b"]

        await asyncio.get_running_loop().create_server(accept, "b", PORT)
        await forever()

    async def call():
        loop = asyncio.get_running_loop()
        _, ends["a"] = await loop.create_connection(lambda: Recorder(**options), "b", PORT)
        await forever()

    world.b.start(serve())
    world.a.start(call())
    await asyncio.sleep(5 * LATENCY)
    return ends["a"], ends["b"]


# Crashes ----------------------------------------------------------------------------------------


@simulated
async def test_a_killed_process_ends_its_connections_after_what_it_sent(world):
    a, b = await connected(world)
    a.transport.write(b"last words")
    a.transport.write(bytes(3 * WINDOW))
    world.a.kill()
    await asyncio.sleep(1)
    assert len(b.data) == WINDOW  # what the system had taken
    assert b.data.startswith(b"last words")
    assert (a.calls, b.calls) == (["made", "pause"], ["made", "eof", "lost"])


@simulated
async def test_a_killed_process_that_had_not_read_all_resets_its_connections(world):
    a, b = await connected(world)
    b.transport.pause_reading()
    a.transport.write(b"unread")
    await asyncio.sleep(1)
    world.b.kill()
    await asyncio.sleep(1)
    assert a.calls == ["made", "ConnectionResetError"]


@simulated
async def test_a_machine_that_fails_is_not_heard_of(world):
    a, b = await connected(world)
    a.transport.write(b"last words")
    world.a.fail()
    a.transport.close()
    b.transport.write(b"hello?")
    await asyncio.sleep(500)
    assert (b.data, b.calls, a.data, a.calls) == (b"last words", ["made"], b"", ["made"])


@simulated
async def test_what_a_dead_process_waits_for_is_kept(world):
    task = weakref.ref(world.a.start(forever()))  # for something that nobody knows of
    await asyncio.sleep(1)
    world.a.kill()
    world.a.start(forever())
    gc.collect()
    assert task() is not None


@simulated
async def test_nothing_of_a_dead_process_runs(world):
    beats, cleaned = [], []

    async def beat():
        try:
            while True:
                await asyncio.sleep(1)
                beats.append(world.loop.time())
        finally:
            cleaned.append(True)

    async def program():
        asyncio.get_running_loop().call_later(5, beats.append, "timer")
        world.loop.call_soon(beats.append, "soon")
        await beat()

    task = world.a.start(program())
    await asyncio.sleep(3.5)
    world.loop.call_soon(world.a.kill)
    await asyncio.sleep(10)
    assert beats == ["soon", 1, 2, 3]
    assert not cleaned
    assert not task.done()
    world.internet.close()
    task.cancel()
    await asyncio.wait([task])
    assert cleaned


@simulated
async def test_a_process_that_kills_itself_gets_no_further_than_this_callback(world):
    steps = []

    async def program():
        other = asyncio.ensure_future(sibling())
        await asyncio.sleep(1)
        world.a.kill()
        steps.append("the rest of the callback")
        await asyncio.sleep(0)
        steps.append("never")
        await other

    async def sibling():
        await asyncio.sleep(1)
        steps.append("never, too")

    world.a.start(program())
    await asyncio.sleep(5)
    assert steps == ["the rest of the callback"]


@simulated
async def test_a_machine_boots_again_and_knows_nothing_of_before(world):
    a, b = await connected(world)
    world.b.fail()
    await asyncio.sleep(1)

    async def serve():
        await asyncio.get_running_loop().create_server(Recorder, "b", PORT)
        await forever()

    world.b.start(serve())
    a.transport.write(b"are you still there?")
    await asyncio.sleep(1)
    assert a.calls == ["made", "ConnectionResetError"]
    assert b.calls == ["made"]
    world.a.kill()
    assert await call_from(world.a, "b", PORT) is None


@simulated
async def test_a_process_ends_with_its_program(world):
    await connected(world)
    world.a.kill()

    async def call():
        await asyncio.get_running_loop().create_connection(Recorder, "b", PORT)

    await world.a.start(call())
    await asyncio.sleep(1)
    assert not world.a.process.is_alive
    assert not world.b.process.connections


@simulated
async def test_a_machine_runs_one_process(world):
    world.a.start(forever())
    idle = forever()
    with pytest.raises(RuntimeError, match="runs a process already"):
        world.a.start(idle)
    idle.close()


@simulated
async def test_a_cut_holds_bytes_and_connections_until_it_heals(world):
    a, b = await connected(world)
    world.network.cut([0], [1])
    a.transport.write(b"held")
    a.transport.close()
    await asyncio.sleep(100)
    assert (b.data, b.calls) == (b"", ["made"])
    world.network.heal()
    await asyncio.sleep(1)
    assert (b.data, b.calls) == (b"held", ["made", "eof", "lost"])


# The observer -----------------------------------------------------------------------------------


def exchange(world):
    """b accepts; a calls, and says one thing."""
    heard = []

    class Ear(Recorder):
        def connection_lost(self, error):
            heard.append((self.data, str(error)))

    async def serve():
        await asyncio.get_running_loop().create_server(Ear, "b", PORT)
        await forever()

    async def call():
        transport, _ = await asyncio.get_running_loop().create_connection(Recorder, "b", PORT)
        transport.write(b"hello")
        await forever()

    world.b.start(serve())
    world.a.start(call())
    return heard


@simulated
async def test_the_observer_sees_each_packet_before_and_after_at_both_ends(world):
    seen = []
    world.internet.observer = lambda machine, *point: seen.append((machine.name, *point))
    exchange(world)
    await asyncio.sleep(1)
    assert seen == [
        ("a", 0, True),  # a calls
        ("a", 0, False),
        ("b", 0, True),
        ("b", 1, True),  # b answers at once
        ("b", 1, False),
        ("b", 0, False),
        ("a", 1, True),
        ("a", 1, False),
        ("a", 2, True),  # a says something
        ("a", 2, False),
        ("b", 2, True),
        ("b", 2, False),
    ]
    assert (world.a.points, world.b.points) == (3, 3)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("before", "heard"), [(True, b""), (False, b"hello")])
def test_a_crash_before_a_packet_leaves_takes_it_along_and_one_after_does_not(
    silent, before, heard
):
    @simulated
    async def test(world):
        def observe(machine, *point):
            if (machine.name, *point) == ("a", 2, before):
                machine.fail() if silent else machine.kill()

        world.internet.observer = observe
        result = exchange(world)
        await asyncio.sleep(1)
        (ear,) = world.b.process.connections if silent else [None]
        if silent:
            assert ear.get_protocol().data == heard
            assert result == []
        else:
            assert result == [(heard, "None")]

    test()


@simulated
async def test_a_process_that_is_killed_before_it_calls_is_never_heard_of(world):
    world.internet.observer = lambda machine, *point: machine.kill()
    exchange(world)
    await asyncio.sleep(1)
    assert (world.a.points, world.b.points) == (1, 0)


# Beside the system's own ------------------------------------------------------------------------


async def conversation(host, port):
    """Talk over asyncio's own streams; return what both ends saw."""
    seen = {"served": []}
    done = asyncio.Event()

    async def serve(reader, writer):
        while line := await reader.readline():
            seen["served"].append(len(line))
            writer.write(line.upper())
            await writer.drain()
        writer.write(b"bye")
        writer.close()
        done.set()

    server = await asyncio.start_server(serve, host, port)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection(host, port)
    for size in (1, 1000, 50_000):
        writer.write(b"a" * size + b"\n")
        seen[size] = await reader.readline() == b"A" * size + b"\n"
    writer.write_eof()
    seen["rest"] = await reader.read()
    writer.close()
    await done.wait()
    server.close()
    refused = await error_of(asyncio.open_connection(host, port))
    seen["refused"] = type(refused), refused.errno
    return seen


@simulated
async def test_a_conversation_goes_as_over_loopback(world):
    def real():
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(conversation("127.0.0.1", 0))

    result = []
    thread = threading.Thread(target=lambda: result.append(real()))
    thread.start()
    thread.join()
    assert await world.a.start(conversation("a", 0)) == result[0]
