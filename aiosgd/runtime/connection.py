"""A link: one connection that carries frames.

What makes a link as fast as a bare socket: the kernel writes a large body straight into the place
where its arrays stay (`BufferedProtocol`), bodies are sent by reference, and they are handed over
in slices while nothing is left unsent, so that no layer in between copies or queues them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

from aiosgd.errors import LocalProtocolError, PeerLostError, RemoteProtocolError
from aiosgd.plugins.registry import describe
from aiosgd.runtime.frame import (
    DEFAULT_LIMITS,
    HEADER_SIZE,
    MAX_METADATA,
    Buffer,
    Bytes,
    Encoded,
    Header,
    Kind,
    Limits,
    allocate,
    decode,
    decode_header,
)

STAGING_SIZE = HEADER_SIZE + MAX_METADATA
"""Frames up to this size are taken from one buffer, many per system call; header and metadata of
every frame fit."""
SLICE = 1 << 20
"""Bytes per write. A transport copies what the kernel does not take, so 100 MB at once go at
0.5 GB/s; slices of 256 KiB to 2 MiB all reach the speed of a bare socket."""
GATHER = 64 << 10
"""A piece below this is joined with what follows: a header that leaves alone wakes the receiver for
nothing, and a message of 0.5 MB then takes twice as long."""
BURST = 16
"""Slices in a row before other callbacks of the loop get their turn: about 5 ms."""
LINGER = 5.0
"""Seconds that a closing link waits for the peer's end: the deadline of every phase."""

_NO_BODY = allocate(0)

FrameHandler: TypeAlias = "Callable[[Link, Kind, int, Any, int], None]"
ClosedHandler: TypeAlias = "Callable[[Link, Exception | None], None]"


# One link ------------------------------------------------------------------------------------


class _Received(NamedTuple):
    header: Header
    metadata: Buffer
    body: Bytes


class _Inbox:
    """Cuts the received bytes into frames.

    Invariant: while a large body is being received, nothing is staged, so that the metadata stays
    where it is.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._staging = memoryview(bytearray(STAGING_SIZE))
        self._start = self._end = 0
        self._large: _Received | None = None
        self._filled = 0

    @property
    def is_empty(self) -> bool:
        """Whether the bytes so far end with a whole frame."""
        return self._large is None and self._start == self._end

    def buffer(self) -> memoryview:
        """Return where the next bytes belong; never empty."""
        if self._large is None:
            return self._staging[self._end :]
        return self._large.body.data[self._filled :]

    def received(self, count: int) -> Iterator[_Received]:
        """Yield the frames that `count` more bytes complete; metadata holds until the next one."""
        if self._large is None:
            self._end += count
        else:
            self._filled += count
            if self._filled == len(self._large.body):
                complete, self._large = self._large, None
                yield complete
        while (frame := self._next_staged()) is not None:
            yield frame
        self._move_to_front()

    def _next_staged(self) -> _Received | None:
        available = self._end - self._start - HEADER_SIZE
        if available < 0:
            return None
        header = decode_header(self._staging, self._start, self.limits)
        size = header.metadata_size + header.body_size
        if HEADER_SIZE + size > STAGING_SIZE:
            if available >= header.metadata_size:
                self._begin_large(header)
            return None
        return self._take(header, header.body_size) if available >= size else None

    def _begin_large(self, header: Header) -> None:
        staged = self._end - self._start - HEADER_SIZE - header.metadata_size
        self._large = self._take(header, staged)
        self._filled = staged

    def _take(self, header: Header, staged: int) -> _Received:
        """Take a frame out of the staging buffer, with the `staged` bytes of body there are."""
        start = self._start + HEADER_SIZE
        middle = start + header.metadata_size
        body = allocate(header.body_size) if header.body_size else _NO_BODY
        body.data[:staged] = self._staging[middle : middle + staged]
        self._start = middle + staged
        return _Received(header, self._staging[start:middle], body)

    def _move_to_front(self) -> None:
        if self._start:
            rest = bytes(self._staging[self._start : self._end])
            self._staging[: len(rest)] = rest
            self._start, self._end = 0, len(rest)


class _Outbox:
    """Frames on their way to the kernel: urgent ones first, but never inside another frame."""

    def __init__(self) -> None:
        self.size = 0
        self._urgent: list[Encoded] = []
        self._frames: deque[Encoded] = deque()
        self._begun: deque[memoryview] = deque()  # what must leave before anything else

    def push(self, frame: Encoded, urgent: bool) -> None:
        """Append a frame to its queue."""
        (self._urgent if urgent else self._frames).append(frame)
        self.size += frame.size

    def next_write(self) -> Buffer | None:
        """Take the bytes to write next, about 1 MiB at most."""
        if not self._begun:
            self._begin()
        if not self._begun:
            return None
        piece = self._begun.popleft()
        if len(piece) > SLICE:
            self._begun.appendleft(piece[SLICE:])
            piece = piece[:SLICE]
        elif len(piece) < GATHER and self._begun:
            piece = self._gather(piece)
        self.size -= len(piece)
        return piece

    def _begin(self) -> None:
        """Begin all urgent frames, then small frames, up to a slice or the next large frame."""
        frames, self._urgent = self._urgent, []
        size = 0
        while self._frames and size < SLICE and (not frames or len(frames[-1].buffers) == 1):
            frames.append(self._frames.popleft())
            size += len(frames[-1].buffers[0])
        for frame in frames:
            self._begun.extend(map(memoryview, frame.buffers))

    def _gather(self, piece: memoryview) -> memoryview:
        """Fill a short piece up with what follows it."""
        pieces, room = [piece], GATHER - len(piece)
        while self._begun and room:
            following = self._begun.popleft()
            if len(following) > room:
                self._begun.appendleft(following[room:])
            pieces.append(following[:room])
            room -= len(pieces[-1])
        return memoryview(b"".join(pieces))


class Link(asyncio.BufferedProtocol):
    """One connection that carries frames both ways; reading never waits for whoever handles them.

    Attributes:
        on_frame: called as (link, kind, number, content, size in bytes) for each frame. It may be
            replaced at any time; while it is None, frames are kept and reading rests.
        on_closed: called once as (link, reason) when the link is gone; the reason is None after an
            orderly end by either side.
        limits: what is accepted from the peer; may be replaced at any time.
        last_heard, last_sent: the loop's time of the last bytes from the peer and to the kernel.
        bytes_sent, bytes_received, messages_sent, messages_received: MESSAGE frames only, headers
            included; sent means handed to `send`.
    """

    def __init__(
        self,
        on_frame: FrameHandler | None,
        on_closed: ClosedHandler,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.on_closed = on_closed
        self.address = "?"
        self.last_heard = self.last_sent = 0.0
        self.bytes_sent = self.bytes_received = 0
        self.messages_sent = self.messages_received = 0
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._kept: deque[tuple[Kind, int, Any, int]] = deque()  # non-empty: reading rests
        self._inbox = _Inbox(limits)
        self._outbox = _Outbox()
        self._transport: asyncio.Transport
        self._connected = False
        self._paused = False
        self._scheduled = False
        self._closed = False  # nothing more to send or to deliver; the end itself may come later
        self._reason: Exception | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._flush_waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Link to {self.address}, {state}>"

    @property
    def limits(self) -> Limits:
        """What is accepted from the peer."""
        return self._inbox.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._inbox.limits = limits

    @property
    def on_frame(self) -> FrameHandler | None:
        """What is called for each frame."""
        return self._on_frame

    @on_frame.setter
    def on_frame(self, handler: FrameHandler | None) -> None:
        self._on_frame = handler
        if handler is not None and self._kept:
            self._loop.call_soon(self._deliver_kept)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._outbox.size + self._transport.get_write_buffer_size()

    # Sending

    def send(self, frame: Encoded, urgent: bool = False) -> None:
        """Queue a frame; all that are queued in one turn of the loop leave together.

        Args:
            urgent: ahead of the frames that are queued.

        Raises:
            PeerLostError: the link is closed.
        """
        if self._closed:
            raise self._lost_error()
        self._outbox.push(frame, urgent)
        if frame.kind is Kind.MESSAGE:
            self.bytes_sent += frame.size
            self.messages_sent += 1
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self._paused:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hand bytes to the kernel while it takes them."""
        self._scheduled = False
        for _ in range(BURST):
            if self._paused or self._transport.is_closing():
                return
            piece = self._outbox.next_write()
            if piece is None:
                self._drained()
                return
            self._transport.write(piece)
            self.last_sent = self._loop.time()
        self._schedule()

    def pause_writing(self) -> None:
        """Note that the kernel is full; called by the transport."""
        self._paused = True

    def resume_writing(self) -> None:
        """Go on: the kernel has taken every byte; called by the transport."""
        self._paused = False
        self._pump()

    def _drained(self) -> None:
        waiters, self._flush_waiters = self._flush_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._closed:
            self._end()

    async def flushed(self) -> None:
        """Wait until the kernel has every byte: only then may the arrays that were sent change.

        Raises:
            PeerLostError: the link broke before.
        """
        while self.queued:
            if self._transport.is_closing():
                raise self._lost_error()
            waiter = self._loop.create_future()
            self._flush_waiters.append(waiter)
            await waiter

    # Receiving

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the transport shall put the next bytes."""
        return self._inbox.buffer()

    def buffer_updated(self, count: int) -> None:
        """Handle `count` bytes that the transport has put there."""
        self.last_heard = self._loop.time()
        if self._closed:
            return
        try:
            for frame in self._inbox.received(count):
                self._receive(*frame)
                if self.is_closed:
                    return
        except RemoteProtocolError as error:
            # a new one, because the old one's traceback refers to the frame and its body
            self.abort(RemoteProtocolError(f"link to {self.address}: {error}"))
        except Exception as error:  # noqa: BLE001 - a handler's bug ends its link, nothing else
            self._handler_failed(error)

    def _receive(self, header: Header, metadata: Buffer, body: Bytes) -> None:
        content = decode(metadata, body)
        size = HEADER_SIZE + header.metadata_size + header.body_size
        if header.kind is Kind.MESSAGE:
            self.bytes_received += size
            self.messages_received += 1
        if self._on_frame is not None and not self._kept:
            self._on_frame(self, header.kind, header.number, content, size)
            return
        if not self._kept:
            self._transport.pause_reading()
        self._kept.append((header.kind, header.number, content, size))

    def _deliver_kept(self) -> None:
        try:
            while self._kept and self._on_frame is not None and not self._closed:
                self._on_frame(self, *self._kept.popleft())
        except RemoteProtocolError as error:
            self.abort(RemoteProtocolError(f"link to {self.address}: {error}"))
        except Exception as error:  # noqa: BLE001 - as above
            self._handler_failed(error)
        if not self._kept and not self._closed:
            self._transport.resume_reading()

    def _handler_failed(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": f"handling a frame from {self.address} failed", "exception": error}
        )
        reason = f"link to {self.address}: a frame could not be handled: {describe(error)}"
        self.abort(LocalProtocolError(reason))

    def eof_received(self) -> bool:
        """Close too, when the peer has closed; called by the transport."""
        if not self._closed and (self.queued or not self._inbox.is_empty):
            where = "with frames on their way" if self.queued else "in the middle of a frame"
            self._reason = PeerLostError(f"link to {self.address}: the peer closed {where}")
        self._closed = True
        return False

    # Life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the connection up; called by the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._connected = True
        self.address = _format_address(transport.get_extra_info("peername"))
        self.last_heard = self.last_sent = self._loop.time()
        # Transports pause above the mark on plain sockets but at the mark under TLS, where 0 would
        # mean to pause for ever.
        high = 0 if transport.get_extra_info("sslcontext") is None else 1
        self._transport.set_write_buffer_limits(high=high, low=0)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._closed:
            self._transport.abort()

    def close(self) -> None:
        """End the link in order, once everything queued has left; later frames are ignored."""
        if self._closed:
            return
        self._closed = True
        if self._kept:
            self._kept.clear()
            self._transport.resume_reading()  # to see the peer's end
        if not self.queued:
            self._end()

    def _end(self) -> None:
        """Announce the end and wait for the peer's.

        To close at once would reset the connection if bytes from the peer were still unread, and
        the peer would lose what it has not read yet.
        """
        if self._transport.is_closing() or self._linger is not None:
            return
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._linger = self._loop.call_later(LINGER, self._transport.abort)

    def abort(self, reason: Exception | None = None) -> None:
        """Break the link off, even before it is made; `on_closed` gets the first reason."""
        self._closed = True
        self._reason = self._reason or reason
        if self._connected:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell everybody that the link is gone; called once by the transport."""
        self._closed = True
        if self._linger is not None:
            self._linger.cancel()
        if error is not None and self._reason is None:
            self._reason = PeerLostError(f"link to {self.address} broke: {cause(error)}")
        for waiter in self._flush_waiters:
            if not waiter.done():
                waiter.set_exception(self._lost_error())
        self._flush_waiters.clear()
        self._outbox = _Outbox()
        self.on_closed(self, self._reason)

    def _lost_error(self) -> PeerLostError:
        if isinstance(self._reason, PeerLostError):
            return PeerLostError(str(self._reason))
        error = PeerLostError(f"link to {self.address} is closed")
        error.__cause__ = self._reason
        return error


def cause(error: Exception) -> str:
    """Return the plain reason of an error; event loops wrap it in texts of their own."""
    if isinstance(error, OSError) and error.errno:
        known = not isinstance(error, socket.gaierror)
        return os.strerror(error.errno) if known else str(error.strerror)
    return str(error) or type(error).__name__


def _format_address(name: Any) -> str:
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "a socket pair")
