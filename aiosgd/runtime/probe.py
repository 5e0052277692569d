"""Probe links: what a node answers to whoever wants to measure or to test it, and who asks.

A link whose HELLO has the role "probe" carries requests: messages that are a dict with one of these
keys. Answers come in the order of the requests, in a frame of the kind that the request came in, so
a script that has nothing but msgpack and msgpack-numpy asks in INBAND frames.

    {"about": None}   the node's version, its job (empty if it is free), its CPU seconds so far,
                      its process id and the largest request in bytes
    {"echo": x}       x
    {"sink": x}       the bytes of the request; x is dropped
    {"give": n}       a float32 array of n bytes
    {"count": k}      k, once k more messages have come, which are dropped
    {"raw": n, …}     where a bare blocking socket waits that takes n bytes at a time, see `RawPeer`

A request that cannot be met is answered by {"error": reason}. PINGs are answered by PONGs. A node
that trains answers, too, but neither it nor the measurement is any the faster for it: see `job`.

Memory is bounded: what all probe links of a node hold of large requests has a limit, and a link that
does not read its answers is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosgd import __version__
from aiosgd.errors import ClusterError, LocalProtocolError, PeerLostError, RemoteProtocolError
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import MESSAGES, UNIX_BUFFER, Link
from aiosgd.runtime.frame import (
    Bytes,
    Encoded,
    Kind,
    Limits,
    allocate,
    encode,
    encode_inband,
)
from aiosgd.runtime.hello import greeting, introduce
from aiosgd.runtime.pool import Pool

ROLE = "probe"
MAX_LINKS = 8
"""Probe links at a time: one for each node that is measured at once, and some."""
MAX_BYTES = 256 << 20
"""Bytes of a request's or an answer's arrays: the 100 MB that benchmarks use, and some."""
MAX_HELD = 1 << 30
"""Bytes that the large requests of all links, the answers to them and raw peers take together."""
LARGE = 1 << 20
"""Requests from this size on are counted; of smaller ones, a link holds one at a time."""
MAX_UNREAD = 1 << 16
"""Answers that wait in a row; each takes some hundred bytes however small it is."""
MAX_COUNT = 10_000_000
IDLE = 60.0
"""Seconds without a sign of life after which a probe link or a raw peer is closed."""
TOKEN_SIZE = 16

_LIMITS = Limits(max_body=MAX_BYTES + (1 << 16))


# The node's end -------------------------------------------------------------------------------


class Probes:
    """The probe links of one node.

    Args:
        host: where the node listens; raw peers listen there, too.
        job: returns the job that the node is busy with, or an empty string.
    """

    def __init__(self, host: str, job: Callable[[], str]) -> None:
        self.host = host
        self.job = job
        self._links: set[Probe] = set()
        self._pool = Pool(MAX_BYTES)
        self._held: list[weakref.ref[Any]] = []
        self._given = np.empty(0, np.float32)

    def check(self) -> None:
        """Raise RemoteProtocolError if no further link is taken."""
        if len(self._links) >= MAX_LINKS:
            raise RemoteProtocolError(f"{MAX_LINKS} probe links are open; close one of them")

    def add(self, link: Link) -> None:
        """Answer what comes over an accepted link."""
        self._links.add(Probe(self, link))

    def remove(self, probe: Probe) -> None:
        """Forget a link that is gone; the last one leaves no memory behind."""
        self._links.discard(probe)
        if not self._links:
            self._pool = Pool(MAX_BYTES)
            self._given = self._given[:0].copy()

    def memory(self, size: int) -> Bytes:
        """Return `size` uninitialised bytes, for as long as somebody refers to them.

        Raises:
            RemoteProtocolError: the links hold too much.
        """
        if size < LARGE:
            return allocate(size)
        if self._count_held() + size > MAX_HELD:
            gc.collect()  # what a broken link was in the middle of may still wait for it
        held = self._count_held()
        if held + size > MAX_HELD:
            raise RemoteProtocolError(f"probe links hold {held} bytes; at most {MAX_HELD}")
        body = self._pool.take(size)
        # views of the body refer to the array that it is a view of itself
        self._held.append(weakref.ref(body if body.base is None else body.base))
        return body

    def _count_held(self) -> int:
        arrays = [(reference, reference()) for reference in self._held]
        self._held = [reference for reference, array in arrays if array is not None]
        return sum(array.nbytes for _, array in arrays if array is not None)

    def give(self, size: int) -> npt.NDArray[np.float32]:
        """Return an array of so many bytes; the last one is kept, so that its memory is warm."""
        if self._given.nbytes != size // 4 * 4:
            self._given = np.ones(size // 4, np.float32)
            self._given.flags.writeable = False
        return self._given

    def close(self) -> None:
        """End all links."""
        for probe in list(self._links):
            probe.close()


class Probe:
    """One probe link on the node's side."""

    def __init__(self, probes: Probes, link: Link) -> None:
        self._probes = probes
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._unread = 0
        self._left = self._count = 0  # messages that are only counted: still to come, and in all
        self._raw: RawPeer | None = None
        link.limits = _LIMITS
        link.memory = probes.memory
        link.on_closed = self._closed
        link.on_frame = self._receive
        self._timer = self._loop.call_later(IDLE / 4, self._check_idle)

    def close(self) -> None:
        """End the link and what belongs to it."""
        self._timer.cancel()
        self._end_raw()
        self._link.close()

    def _closed(self, link: Link, reason: Exception | None) -> None:
        self._timer.cancel()
        self._end_raw()
        self._probes.remove(self)

    def _check_idle(self) -> None:
        self._timer = self._loop.call_later(IDLE / 4, self._check_idle)
        if self._raw is not None and time.monotonic() - self._raw.last_heard > IDLE:
            self._end_raw()
        quiet = self._loop.time() - max(self._link.last_heard, self._link.last_sent)
        if quiet > IDLE:
            self._link.abort(RemoteProtocolError(f"a probe link was silent for {quiet:.0f} s"))

    def _receive(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        if kind not in MESSAGES:
            self._control(kind, number)
        elif self._left:
            self._left -= 1
            if not self._left:
                self._answer(kind, self._count)
        else:
            self._answer_request(kind, content, size)

    def _control(self, kind: Kind, number: int) -> None:
        if kind is Kind.PING:
            self._send(encode(None, Kind.PONG, number), urgent=True)
        elif kind not in (Kind.CREDIT, Kind.PONG):
            raise RemoteProtocolError(f"a {kind.name} frame came over a probe link")

    def _answer_request(self, kind: Kind, content: Any, size: int) -> None:
        match content:
            case {"echo": value, **rest} if not rest:
                self._answer(kind, value)
            case {"sink": _, **rest} if not rest:
                self._answer(kind, size)
            case {"count": int(count)} if 0 < count <= MAX_COUNT:
                self._left = self._count = count
            case {"give": int(count)} if 0 <= count <= MAX_BYTES:
                self._answer(kind, self._probes.give(count))
            case {"about": _}:
                self._answer(kind, self._about())
            case {"raw": int(count)} if 0 < count <= MAX_BYTES:
                self._answer(kind, self._open_raw(content))
            case _:
                self._answer(kind, {"error": _refusal(content)})

    def _answer(self, kind: Kind, content: Any) -> None:
        pack = encode_inband if kind is Kind.INBAND else encode
        try:
            frame = pack(content)
        except LocalProtocolError as error:
            frame = pack({"error": str(error)})
        self._send(frame)

    def _send(self, frame: Encoded, *, urgent: bool = False) -> None:
        queued = self._link.queued
        self._unread = self._unread + 1 if queued else 0
        if queued > MAX_BYTES or self._unread > MAX_UNREAD:
            raise RemoteProtocolError("a prober does not read its answers")
        self._link.send(frame, urgent)

    def _about(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "job": self._probes.job(),
            "cpu_s": time.process_time(),
            "pid": os.getpid(),
            "max_bytes": MAX_BYTES,
        }

    def _open_raw(self, content: Mapping[str, Any]) -> dict[str, Any]:
        self._end_raw()
        host = "" if content.get("unix") else self._probes.host
        try:
            buffer = self._probes.memory(content["raw"]).data
            self._raw = RawPeer(host, buffer, _every(content), echo=bool(content.get("echo")))
        except OSError as error:
            return {"error": f"no raw peer: {error.strerror or error}"}
        return {"address": self._raw.address, "token": self._raw.token}

    def _end_raw(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None


def _every(content: Mapping[str, Any]) -> int:
    every = content.get("every", 1)
    return every if type(every) is int and 0 < every <= MAX_COUNT else 1


def _refusal(content: Any) -> str:
    shown = list(content)[:4] if isinstance(content, dict) else type(content).__name__
    return (
        f"no request: {shown!r:.80}; expected one of about, echo, sink, give, count and raw, and "
        f"at most {MAX_BYTES} bytes or {MAX_COUNT} messages"
    )


class RawPeer:
    """A bare blocking socket in a thread of its own: what a link is compared with.

    It takes one connection. Who connects sends the token first, then as many bytes as the buffer
    has, again and again; after each `every` of these there is a byte in return, or with `echo` the
    same bytes. `close` ends it at any time.

    Attributes:
        address: a port, or the name of an abstract unix socket without its leading zero byte.
        token: what proves that who connects was told the address by this node.
        last_heard: when bytes were complete, on the monotonic clock.

    Args:
        host: the address to listen on; empty for an abstract unix socket.
    """

    def __init__(self, host: str, buffer: memoryview, every: int, *, echo: bool) -> None:
        self.token = secrets.token_bytes(TOKEN_SIZE)
        self._buffer, self._every, self._echo = buffer, every, echo
        self._listener = _listen(host)
        self.address: int | str = (
            self._listener.getsockname()[1] if host else self._listener.getsockname()[1:].decode()
        )
        self.last_heard = time.monotonic()
        self._connection: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="aiosgd-raw", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wake the thread, wherever it waits, and let it end."""
        self._closed = True
        for one in (self._listener, self._connection):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._listener:
            connection, _ = self._listener.accept()
            with connection:
                self._connection = connection  # `close` sees it, or we see that it was called
                if not self._closed:
                    self._exchange(connection)

    def _exchange(self, connection: socket.socket) -> None:
        tune(connection)
        token = memoryview(bytearray(TOKEN_SIZE))
        if not receive_into(connection, token) or not secrets.compare_digest(token, self.token):
            return
        view = self._buffer
        answer = view if self._echo else view[:1]
        while True:
            for _ in range(self._every):
                if not receive_into(connection, view):
                    return
            self.last_heard = time.monotonic()
            connection.sendall(answer)


def _listen(host: str) -> socket.socket:
    if not host:
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(f"\0aiosgd-raw-{secrets.token_hex(8)}")
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        return listener
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, 0), family=family, backlog=1)


def tune(connection: socket.socket) -> None:
    """Give a raw socket the options that make it fastest, as far as links have them, too."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER)
    else:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fill a buffer from a blocking socket; tell whether the other end went on for so long."""
    filled = 0
    while filled < len(view):
        count = connection.recv_into(view[filled:])
        if not count:
            return False
        filled += count
    return True


# The asking end -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def probing(address: Address, **options: Any) -> AsyncIterator[Prober]:
    """Open a probe link for the time of the context.

    Args:
        address: the node.
        options: of `introduce`.

    Raises:
        ClusterError: unreachable, or refused.
    """
    prober = Prober(address, await introduce(address, greeting(role=ROLE), **options))
    try:
        yield prober
    finally:
        prober.link.abort()


class Prober:
    """The asking end of a probe link."""

    def __init__(self, address: Address, link: Link) -> None:
        self.address = address
        self.link = link
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._number = 0
        link.memory = Pool(MAX_BYTES).take
        link.on_closed = self._closed
        link.on_frame = self._receive

    def request(self, frame: Encoded) -> asyncio.Future[Any]:
        """Send a request; the future gets its answer.

        Raises:
            ClusterError: the link is closed; the future gets the same if it closes later.
        """
        try:
            self.link.send(frame)
        except PeerLostError as error:
            raise ClusterError(f"{self.address}: {error}") from error
        answer = self._loop.create_future()
        self._waiting.append(answer)
        return answer

    async def ask(self, content: Any) -> Any:
        """Send a request and return its answer.

        Raises:
            ClusterError: the link is closed, or the node cannot do what it is asked for.
        """
        answer = await self.request(encode(content))
        echo = isinstance(content, dict) and content.keys() == {"echo"}
        if isinstance(answer, dict) and answer.keys() == {"error"} and not echo:
            raise ClusterError(f"{self.address} cannot be measured: {answer['error']}")
        return answer

    async def ping(self) -> None:
        """Send a PING and wait for its PONG."""
        self._number = (self._number + 1) & 0xFFFF
        answer = self._pings[self._number] = self._loop.create_future()
        self.link.send(encode(None, Kind.PING, self._number), urgent=True)
        await answer

    def _receive(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        if kind in MESSAGES and self._waiting:
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_result(content)
        elif kind is Kind.PONG and (pong := self._pings.pop(number, None)) is not None:
            if not pong.done():
                pong.set_result(None)
        elif kind not in (Kind.PING, Kind.CREDIT, Kind.PONG):
            raise RemoteProtocolError(
                f"{self.address} sent a {kind.name} frame that answers nothing"
            )

    def _closed(self, link: Link, reason: Exception | None) -> None:
        error = ClusterError(f"{self.address} closed the link: {reason or 'without a word'}")
        for answer in (*self._waiting, *self._pings.values()):
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # whoever awaits it gets it; it may be that nobody does
