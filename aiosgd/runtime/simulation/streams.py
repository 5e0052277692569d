"""Machines in virtual time, and the connections between them: what real nodes run on.

A machine runs one process: a coroutine, and all that it starts. Its `create_server` and
`create_connection` give transports like those of asyncio, whose bytes go through the simulated
network. Two ways to die: a process is killed, and its machine's system ends its connections; or
the machine fails, and is silent. What a dead process had begun stands still where it was, as if it
had been killed there: nothing of it runs, cleans up or sends.

TCP as far as programs can tell: bytes in order and in pieces, half-closed connections, resets by
an end that is gone, a window that fills while the other end does not read. It never gives up on a
silent machine: whoever runs here has to notice by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeAlias, TypeVar

from aiosgd.runtime.simulation.loop import EscapeError, VirtualLoop, _Handle
from aiosgd.runtime.simulation.network import Network

T = TypeVar("T")

SEGMENT = 64 << 10
"""Bytes that leave at once, at most: what a large TCP segment offload carries."""
WINDOW = 256 << 10
"""Bytes under way that the other end's program has not read, at most."""
FIRST_PORT = 49152
"""Ports from here on are picked for who does not ask for one (RFC 6335, section 6)."""

Factory: TypeAlias = "Callable[[], asyncio.BaseProtocol]"
Arrival: TypeAlias = "Callable[[], None]"
_Item: TypeAlias = "memoryview | OSError | None"  # bytes, a reset, or the end

_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)

# in the place of what a dead process would have done
_NOTHING = _Handle(print, (), None)
_NOTHING.cancel()


class StreamLoop(VirtualLoop):
    """A virtual loop with machines on it; see `Internet`."""

    def __init__(self) -> None:
        super().__init__()
        self.internet: Internet | None = None
        self._held: list[_Handle] = []
        self._kept: set[asyncio.Task[Any]] = set()  # what stands still, nobody may refer to
        self._holds = False

    def hold(self) -> None:
        """Keep what processes that are dead by now would do from happening, until `let_go`."""
        self._holds = True
        self._kept |= asyncio.all_tasks(self)
        self._sweep()

    def let_go(self) -> None:
        """Let what was held happen after all, so that it can be cancelled in order."""
        self._holds = False
        self._queue.extend(self._held)
        self._held.clear()
        self._kept.clear()

    def _run_once(self) -> None:
        if self._holds:
            self._sweep()
        super()._run_once()

    def _leap(self) -> None:
        super()._leap()
        if self._holds:
            self._sweep()

    def _sweep(self) -> None:
        """Take what belongs to dead processes out of what is ready."""
        for i, handle in enumerate(tuple(self._queue)):
            process = None if handle.context is None else handle.context.get(_process)
            if process is not None and not process.is_alive:
                self._held.append(handle)
                self._queue[i] = _NOTHING  # it keeps its place: this turn's length is counted

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Factory, host: str | None = None, port: int = 0, **options: Any
    ) -> Listener:
        """Listen on the machine of the caller."""
        internet, process = self._here(options)
        return internet.listen(process, protocol_factory, host, port)

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Factory, host: str, port: int, **options: Any
    ) -> tuple[Connection, asyncio.BaseProtocol]:
        """Connect from the machine of the caller to another."""
        internet, process = self._here(options)
        return await internet.connect(process, protocol_factory, host, port)

    def _here(self, options: dict[str, Any]) -> tuple[Internet, Process]:
        process = _process.get()
        if self.internet is None or process is None:
            raise EscapeError("a connection in a simulation begins and ends on a simulated machine")
        if given := [name for name, value in options.items() if value is not None]:
            raise EscapeError(f"a simulated connection has no {', '.join(given)}")
        return self.internet, process


class Internet:
    """All machines of a simulation.

    Args:
        loop: on which everything runs.
        network: what lies between the machines.

    Attributes:
        machines: by name.
        observer: called with a machine, a point and whether it is before it or after it. A point
            is the number of a packet among those that the machine's processes send, or that reach
            them. The observer may kill the machine's process, or let the machine fail.
    """

    def __init__(self, loop: StreamLoop, network: Network) -> None:
        self.machines: dict[str, Machine] = {}
        self.observer: Callable[[Machine, int, bool], None] | None = None
        self.loop = loop
        self._network = network
        loop.internet = self

    def add(self, node: int, name: str) -> Machine:
        """Add a machine: its id in the network, and the host name that others know it by."""
        self.machines[name] = machine = Machine(self, node, name)
        return machine

    def close(self) -> None:
        """End the simulation: the dead may clean up now, for nothing is carried any more."""
        for machine in self.machines.values():
            machine.fail()
        self.loop.let_go()

    def listen(self, process: Process, factory: Factory, host: str | None, port: int) -> Listener:
        """Accept connections on a process's machine; see `loop.create_server`."""
        machine = process.machine
        if host not in (machine.name, "0.0.0.0", "", None):  # noqa: S104 - all of its interfaces
            raise _os_error(errno.EADDRNOTAVAIL)
        port = port or machine.pick_port()
        if port in process.listeners:
            raise _os_error(errno.EADDRINUSE)
        process.listeners[port] = listener = Listener(process, factory, port)
        return listener

    async def connect(
        self, process: Process, factory: Factory, host: str, port: int
    ) -> tuple[Connection, asyncio.BaseProtocol]:
        """Connect a process to a machine; see `loop.create_connection`."""
        there = self.machines.get(host)
        if there is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        here = process.machine
        connection = Connection(self, process, (here.name, here.pick_port()), (host, port))
        answer = self.loop.create_future()
        self.send(here, there, 0, functools.partial(self._ask, connection, there, port, answer))
        try:
            await answer
        except BaseException:
            connection.abandon()
            raise
        return connection, connection.begin(factory)

    def _ask(
        self, caller: Connection, there: Machine, port: int, answer: asyncio.Future[None]
    ) -> None:
        """A caller's first packet is there: accept or refuse the connection."""
        process, back = there.process, caller.process.machine
        listener = process.listeners.get(port) if process is not None else None
        answered = functools.partial(caller.answered, answer)
        if process is None or not process.is_alive or listener is None:
            self.carry(there, back, 0, answered)
            return
        connection = Connection(self, process, (there.name, port), caller.name)
        connection.peer, caller.peer = caller, connection
        connection.call_soon(connection.begin, listener.factory)
        self.send(there, back, 0, answered, anyway=True)

    def send(
        self, here: Machine, there: Machine, size: int, arrive: Arrival, *, anyway: bool = False
    ) -> None:
        """Send a packet of a process; `anyway`: even if it is killed just before."""
        point = self._before(here)
        if anyway or (here.process is not None and here.process.is_alive):
            self.carry(here, there, size, arrive)
            self._after(here, point)

    def carry(self, here: Machine, there: Machine, size: int, arrive: Arrival) -> None:
        """Send a packet as a machine's system does, whatever its process is at."""
        if here.is_up:
            arrival = functools.partial(self._arrive, there, arrive)
            self._network.send(here.node, there.node, size, arrival)

    def _arrive(self, machine: Machine, arrive: Arrival) -> None:
        if machine.is_up:
            point = self._before(machine)
            if machine.is_up:  # still
                arrive()
                self._after(machine, point)

    def _before(self, machine: Machine) -> int:
        point = machine.points
        if machine.process is not None and machine.process.is_alive:
            machine.points += 1
            if self.observer is not None:
                self.observer(machine, point, True)
        return point

    def _after(self, machine: Machine, point: int) -> None:
        process = machine.process
        if self.observer is not None and process is not None and process.is_alive:
            self.observer(machine, point, False)


class Machine:
    """A host with a network card, on which one process runs at a time.

    Attributes:
        node: its id in the network.
        name: the host name that others know it by.
        is_up: whether it answers at all.
        points: how many packets its processes have sent and taken.
        process: the one that runs, or the last one that ran.
    """

    def __init__(self, internet: Internet, node: int, name: str) -> None:
        self.node = node
        self.name = name
        self.is_up = True
        self.points = 0
        self.process: Process | None = None
        self._internet = internet
        self._ports = itertools.count(FIRST_PORT)

    def __repr__(self) -> str:
        return f"<Machine {self.name}, {'up' if self.is_up else 'down'}>"

    def pick_port(self) -> int:
        """Return a port that was never used."""
        return next(self._ports)

    def start(self, program: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a process, on a machine that was down after booting it.

        Args:
            program: the process ends with it, and so do its connections.

        Returns:
            Its first task.
        """
        if self.process is not None and self.process.is_alive:
            raise RuntimeError(f"{self} runs a process already")
        self.is_up = True
        self.process = process = Process(self)
        process.task = task = self._internet.loop.create_task(program, context=process.context())
        task.add_done_callback(lambda _: self._exited(process))
        return task

    def _exited(self, process: Process) -> None:
        if process is self.process:
            self.kill()

    def kill(self) -> None:
        """Kill the process; its connections are ended, what it has sent still arrives."""
        if (process := self._stop()) is not None:
            for connection in list(process.connections):
                connection.abandon()

    def fail(self) -> None:
        """Lose power: no more is heard of the machine, but for what is on its way already."""
        self.is_up = False
        self._stop()

    def _stop(self) -> Process | None:
        process = self.process
        if process is None or not process.is_alive:
            return None
        process.is_alive = False
        self._internet.loop.hold()
        return process


class Process:
    """A program on a machine, with its sockets."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.is_alive = True
        self.task: asyncio.Task[Any] | None = None  # asyncio itself keeps no task alive
        self.listeners: dict[int, Listener] = {}
        self.connections: dict[Connection, None] = {}
        self._context = contextvars.copy_context()
        self._context.run(_process.set, self)

    def context(self) -> contextvars.Context:
        """Return a context for code that belongs to this process."""
        return self._context.copy()


class Socket:
    """What programs ask of a connection's socket."""

    family = socket.AF_INET

    def __init__(self, name: tuple[str, int], peer: tuple[str, int] | None = None) -> None:
        self._name, self._peer = name, peer

    def getsockname(self) -> tuple[str, int]:
        """Return the own address."""
        return self._name

    def getpeername(self) -> tuple[str, int]:
        """Return the other end's address."""
        if self._peer is None:
            raise _os_error(errno.ENOTCONN)
        return self._peer

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Set an option; none makes a difference here."""


class Listener:
    """A listening socket: what `create_server` gives."""

    def __init__(self, process: Process, factory: Factory, port: int) -> None:
        self.factory = factory
        self.sockets = (Socket((process.machine.name, port)),)
        self._process = process
        self._port = port

    def close(self) -> None:
        """Accept no more."""
        self._process.listeners.pop(self._port, None)


class Connection(asyncio.Transport):
    """One end of a connection.

    Attributes:
        process: whose end it is.
        name: its address.
        peer: the other end, once that has heard of it.
    """

    def __init__(
        self, internet: Internet, process: Process, name: tuple[str, int], there: tuple[str, int]
    ) -> None:
        names = {"sockname": name, "peername": there, "socket": Socket(name, there)}
        super().__init__(names)
        self.process = process
        self.name = name
        self.peer: Connection | None = None
        self._internet = internet
        self._context = process.context()
        self._protocol: asyncio.BaseProtocol | None = None
        self._unsent: deque[memoryview] = deque()
        self._unsent_size = 0
        self._under_way = 0  # bytes sent that the other end has not read
        self._high, self._low = 64 << 10, 16 << 10
        self._writing_paused = self._reading_paused = False
        self._inbox: deque[_Item] = deque()
        self._reads = False  # a turn to read in is on its way
        self._broken: OSError | None = None
        self._eof = self._end_sent = False
        self._closing = False  # no more is written or read by the program
        self._ended = False  # the socket is closed
        process.connections[self] = None

    def __repr__(self) -> str:
        return f"<Connection {self.name} to {self.get_extra_info('peername')}>"

    # life

    def answered(self, answer: asyncio.Future[None]) -> None:
        """Take the machine's answer to our first packet; it refuses if there is no other end."""
        if not self.process.is_alive or answer.done():  # nobody waits for it any more
            self._carry(_os_error(errno.ECONNRESET))
        elif self.peer is None:
            answer.set_exception(_os_error(errno.ECONNREFUSED))
        else:
            answer.set_result(None)

    def begin(self, factory: Factory) -> asyncio.BaseProtocol:
        """Hand the connection to the program."""
        protocol = self._protocol = factory()
        protocol.connection_made(self)
        self._read_soon()
        return protocol

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call as the process that has this end."""
        self._internet.loop.call_soon(callback, *args, context=self._context)

    def is_closing(self) -> bool:
        """Tell whether the program has closed this end, or it broke."""
        return self._closing

    def close(self) -> None:
        """Close once everything that was written has left."""
        if not self._closing:
            self._closing = True
            if not self._unsent:
                self._finish(None)

    def abort(self) -> None:
        """Close at once; what has not left is lost."""
        self._break(None)

    def _break(self, error: OSError | None) -> None:
        self._closing = True
        self._unsent.clear()
        self._unsent_size = 0
        self._finish(error)

    def _finish(self, error: OSError | None) -> None:
        if not self._ended:
            self.abandon()
            self.call_soon(self._lose, error)

    def _lose(self, error: OSError | None) -> None:
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def abandon(self) -> None:
        """Close the socket, as the system does for a process that is gone."""
        if self._ended:
            return
        self._ended = self._closing = True
        self.process.connections.pop(self, None)
        if any(isinstance(item, memoryview) for item in self._inbox):
            self._carry(_os_error(errno.ECONNRESET))  # what was not read is not lost in silence
        elif self._broken is None:
            self._send_end()
        self._inbox.clear()

    # sending

    def write(self, data: Any) -> None:
        """Send bytes; what there is no room for waits here, by reference."""
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Send several pieces."""
        if self._eof:
            raise RuntimeError("nothing can be written after write_eof")
        if self._closing:
            return
        if self._broken is not None:
            self._break(self._broken)
            return
        for data in list_of_data:
            view = memoryview(data).cast("B")
            if len(view):
                self._unsent.append(view)
                self._unsent_size += len(view)
        self._pump()

    def write_eof(self) -> None:
        """Tell the other end that no more comes, once everything written has left."""
        self._eof = True
        if not self._unsent:
            self._send_end()

    def can_write_eof(self) -> bool:
        """Tell that a connection can be closed one way."""
        return True

    def get_write_buffer_size(self) -> int:
        """Return how many bytes there was no room for yet."""
        return self._unsent_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return when the program is told to go on writing, and when to pause."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set above how many waiting bytes to pause writing, and down to how many to go on."""
        self._high = (64 << 10 if low is None else 4 * low) if high is None else high
        self._low = self._high // 4 if low is None else low
        self._regulate()

    def _pump(self) -> None:
        """Send what the other end has room for."""
        while self._unsent and self._under_way < WINDOW and self.process.is_alive:
            segment = self._take(min(SEGMENT, WINDOW - self._under_way))
            self._under_way += len(segment)
            self._send(segment)
        if not self._unsent:
            if self._eof:
                self._send_end()
            if self._closing:
                self._finish(None)
        self._regulate()

    def _take(self, size: int) -> memoryview:
        """Copy up to so many of the waiting bytes; from now on the program may change its own."""
        taken = bytearray()
        while self._unsent and len(taken) < size:
            piece = self._unsent.popleft()
            rest = size - len(taken)
            taken += piece[:rest]
            if len(piece) > rest:
                self._unsent.appendleft(piece[rest:])
        self._unsent_size -= len(taken)
        return memoryview(taken)

    def _regulate(self) -> None:
        """Pause or resume the program's writing."""
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BaseProtocol) or self._ended:
            return
        if self._unsent_size > self._high and not self._writing_paused:
            self._writing_paused = True
            protocol.pause_writing()
        elif self._unsent_size <= self._low and self._writing_paused:
            self._writing_paused = False
            protocol.resume_writing()

    def acknowledge(self, size: int) -> None:
        """Take the other end's word that its program has read so many bytes."""
        self._under_way -= size
        if self._unsent:
            here, there = self.process.machine, self._there()
            self._internet.carry(there, here, 0, self._wake)

    def _wake(self) -> None:
        if self.process.is_alive and not self._ended:
            self._context.run(self._pump)

    def _there(self) -> Machine:
        assert self.peer is not None
        return self.peer.process.machine

    def _send(self, item: memoryview | None) -> None:
        """Send bytes or the end, as the program."""
        assert self.peer is not None
        here, there = self.process.machine, self._there()
        arrive = functools.partial(self.peer.arrived, item)
        if item is None:
            self._internet.send(here, there, 0, arrive, anyway=True)
        else:
            self._internet.send(here, there, len(item), arrive)

    def _carry(self, item: OSError | None) -> None:
        """Send a reset or the end, as the system."""
        if self.peer is not None:
            arrive = functools.partial(self.peer.arrived, item)
            self._internet.carry(self.process.machine, self._there(), 0, arrive)

    def _send_end(self) -> None:
        if self._end_sent or self.peer is None:
            return
        self._end_sent = True
        if self.process.is_alive:
            self._send(None)
        else:
            self._carry(None)

    # receiving

    def arrived(self, item: _Item) -> None:
        """Take bytes, a reset, or the end."""
        if self._ended or not self.process.is_alive:
            if isinstance(item, memoryview):
                self._carry(_os_error(errno.ECONNRESET))  # nobody will ever read this
            return
        if isinstance(item, OSError):
            self._broken = item
        self._inbox.append(item)
        if not self._reads:
            self._context.run(self._read)

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        """Go on reading."""
        self._reading_paused = False
        self._read_soon()

    def is_reading(self) -> bool:
        """Tell whether what comes is read."""
        return not (self._reading_paused or self._closing)

    def _read_soon(self) -> None:
        if self._inbox and not self._reads:
            self._reads = True
            self.call_soon(self._read_in_turn)

    def _read_in_turn(self) -> None:
        self._reads = False
        self._read()

    def _read(self) -> None:
        """Let the program read once, as in one turn of its loop."""
        protocol = self._protocol
        if protocol is None or not self._inbox or not self.is_reading():
            return
        item = self._inbox.popleft()
        if isinstance(item, OSError):
            self._break(item)
        elif item is None:
            assert isinstance(protocol, asyncio.BufferedProtocol | asyncio.Protocol)
            if not protocol.eof_received():
                self.close()
        else:
            self._hand_over(protocol, item)
        self._read_soon()

    def _hand_over(self, protocol: asyncio.BaseProtocol, item: memoryview) -> None:
        """Hand over as many bytes as the program has room for."""
        if isinstance(protocol, asyncio.BufferedProtocol):
            room = memoryview(protocol.get_buffer(-1)).cast("B")
            size = min(len(room), len(item))
            room[:size] = item[:size]
        else:
            assert isinstance(protocol, asyncio.Protocol)
            size = len(item)
        if size < len(item):
            self._inbox.appendleft(item[size:])
        if self.peer is not None:
            self.peer.acknowledge(size)
        if isinstance(protocol, asyncio.BufferedProtocol):
            protocol.buffer_updated(size)
        else:
            protocol.data_received(bytes(item))

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return what takes the bytes."""
        assert self._protocol is not None
        return self._protocol


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
