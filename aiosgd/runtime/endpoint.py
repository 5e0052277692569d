"""Where links begin: connecting to a node, and listening for those who connect.

Over TCP, over TLS, or over a unix socket: two processes of one machine and user may talk over a
unix socket, which moves large messages faster than TCP does. Its name is abstract (no file is left
behind) and random, so a node has to be asked for it, see `handshake`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import os
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from aiosgd.errors import ClusterError, RemoteProtocolError
from aiosgd.runtime.connection import ClosedHandler, FrameHandler, Link, cause
from aiosgd.runtime.frame import DEFAULT_LIMITS, MAGIC, Kind, Limits, encode
from aiosgd.runtime.handshake import refusal

BACKLOG = 100
ACCEPT_PAUSE = 1.0
"""Seconds without accepting after the system had no room for another connection."""

NEEDS_TLS = (
    "the node speaks TLS only: give the caller tls_cert, tls_key and tls_ca, in [security] of "
    "cluster.toml"
)

Factory: TypeAlias = "Callable[[type[Link]], Link]"
Spawn: TypeAlias = "Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]"


class Listening(Protocol):
    """Something that accepts links."""

    @property
    def sockets(self) -> Any:
        """The sockets that it listens on."""

    def close(self) -> None:
        """Accept no more."""


# TCP and TLS ----------------------------------------------------------------------------------


async def connect(
    host: str,
    port: int,
    on_frame: FrameHandler | None,
    on_closed: ClosedHandler,
    timeout: float,
    *,
    limits: Limits = DEFAULT_LIMITS,
    tls: ssl.SSLContext | None = None,
) -> Link:
    """Open a link.

    Raises:
        ClusterError: refused, unknown host, no answer within `timeout` seconds, or TLS does not
            come about; the message names address and cause.
    """
    loop = asyncio.get_running_loop()
    _check_port(host, port)
    try:
        async with asyncio.timeout(timeout):
            _, link = await loop.create_connection(
                lambda: Link(on_frame, on_closed, limits), host, port, ssl=tls
            )
    except TimeoutError as error:
        raise ClusterError(f"{host}:{port} does not answer within {timeout:g} s") from error
    except (OSError, UnicodeError) as error:
        if tls is not None and isinstance(error, _NO_TLS):
            raise ClusterError(f"{host}:{port}: no TLS: {tls_cause(error)}") from None
        raise ClusterError(f"{host}:{port} cannot be reached: {cause(error)}") from error
    return link


_NO_TLS = (ssl.SSLError, ConnectionResetError, ConnectionAbortedError)


def tls_cause(error: Exception) -> str:
    """Return in plain words why TLS did not come about."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other end's certificate does not hold: {error.verify_message.rstrip('.')}"
    if isinstance(error, ConnectionError | ssl.SSLEOFError):
        return "the other end broke off: does it speak TLS, and is it given our authority's tls_ca?"
    reason = getattr(error, "reason", None) or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return "the other end does not speak TLS"
    return str(reason).replace("_", " ").lower()


async def listen(
    host: str, port: int, factory: Callable[[], asyncio.BaseProtocol]
) -> asyncio.Server:
    """Accept links, each made by `factory`; port 0 picks a free one.

    Raises:
        ClusterError: the address is in use or not ours; the message names address and cause.
    """
    loop = asyncio.get_running_loop()
    _check_port(host, port)
    try:
        return await loop.create_server(factory, host, port)
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"cannot listen on {host}:{port}: {cause(error)}") from error


def _check_port(host: str, port: int) -> None:
    if not 0 <= port <= 0xFFFF:
        raise ClusterError(f"{host}:{port} is no address: a port is at most 65535")


# Accepting over TLS ---------------------------------------------------------------------------


class TlsLink(Link):
    """A link that comes in over TLS.

    Unlike one of asyncio's own TLS server, it can be aborted before TLS has come about, `on_closed`
    is told why it did not, and who speaks no TLS is told so.
    """

    _shaking: asyncio.Task[None] | None = None

    async def shake_hands(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Set TLS up on a connection that came in."""
        self._shaking = asyncio.current_task()
        self.address = _peer_of(connection)
        try:
            await self._check_speech(connection)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self, connection, ssl=context
            )
        except (OSError, RemoteProtocolError) as error:
            words = tls_cause(error) if isinstance(error, OSError) else str(error)
            self.abort(RemoteProtocolError(f"link to {self.address}: no TLS: {words}"))
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._shaking = None
            if not self._connected:
                self.on_closed(self, self._reason)

    async def _check_speech(self, connection: socket.socket) -> None:
        """Wait for the first byte; turn a caller away that speaks our frames without TLS."""
        try:
            if self._closed:
                raise RemoteProtocolError("the link was closed before")
            if await _first_byte(connection) == bytes([MAGIC]):
                await _turn_away(connection)
                raise RemoteProtocolError("the caller does not speak it")
        except BaseException:
            connection.close()
            raise

    def let_go(self, connection: socket.socket) -> None:
        """Close a connection that never became this link, such as when its task never began."""
        if not self._connected:
            connection.close()

    def abort(self, reason: Exception | None = None) -> None:
        """Break the link off, even before it is made."""
        super().abort(reason)
        if self._shaking is not None and self._shaking is not asyncio.current_task():
            self._shaking.cancel()


class TlsServer:
    """Accepts links over TLS.

    Args:
        sockets: that listen.
        factory: makes the link for each connection.
        context: for the server's role.
        spawn: runs a coroutine as a child of whoever listens.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        factory: Callable[[], TlsLink],
        context: ssl.SSLContext,
        spawn: Spawn,
    ) -> None:
        self.sockets = sockets
        self._factory = factory
        self._context = context
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._pauses: list[asyncio.TimerHandle] = []
        for listening in sockets:
            self._resume(listening)

    def _resume(self, listening: socket.socket) -> None:
        self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._loop.remove_reader(listening)
                self._pauses = [pause for pause in self._pauses if not pause.cancelled()]
                self._pauses.append(self._loop.call_later(ACCEPT_PAUSE, self._resume, listening))
            return
        connection.setblocking(False)
        link = self._factory()
        task = self._spawn(link.shake_hands(connection, self._context))
        task.add_done_callback(lambda _: link.let_go(connection))

    def close(self) -> None:
        """Accept no more."""
        for pause in self._pauses:
            pause.cancel()
        for listening in self.sockets:
            self._loop.remove_reader(listening)
            listening.close()


async def listen_tls(
    host: str, port: int, factory: Callable[[], TlsLink], context: ssl.SSLContext, spawn: Spawn
) -> TlsServer:
    """Accept links over TLS, each made by `factory`; see `TlsServer` and, for errors, `listen`."""
    _check_port(host, port)
    try:
        return TlsServer(await _listening(host, port), factory, context, spawn)
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"cannot listen on {host}:{port}: {cause(error)}") from error


async def _listening(host: str, port: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((place[0], place[4]) for place in found):
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
            sockets[-1].setblocking(False)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    return sockets


async def _first_byte(connection: socket.socket) -> bytes:
    """Return what comes first on a connection, without taking it."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _turn_away(connection: socket.socket) -> None:
    """Tell somebody who speaks our frames, but no TLS, what is missing."""
    loop = asyncio.get_running_loop()
    words = b"".join(encode(refusal(NEEDS_TLS), Kind.HELLO).buffers)
    await loop.sock_sendall(connection, words)
    connection.shutdown(socket.SHUT_WR)
    while await loop.sock_recv(connection, 1024):  # to close before would take our words back
        pass


def _peer_of(connection: socket.socket) -> str:
    try:
        name = connection.getpeername()
    except OSError:  # it has gone again
        return "?"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "?"


# Unix sockets ---------------------------------------------------------------------------------


class UnixLink(Link):
    """A link over a unix socket; broken off at once if the other end is another user's."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the connection up; called by the transport."""
        super().connection_made(transport)
        user = _user_of(transport.get_extra_info("socket"))
        if user != os.geteuid():
            reason = RemoteProtocolError(f"link to {self.address}: it belongs to user {user}")
            # not at once: uvloop takes the socket over only after this call
            self._loop.call_soon(self.abort, reason)


def _user_of(connection: Any) -> int:
    """Return the user of the process at the other end of a unix socket."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(user)


async def listen_unix(factory: Callable[[], UnixLink]) -> tuple[asyncio.Server, str]:
    """Accept links on an abstract unix socket; return the server and the socket's name.

    Raises:
        OSError: the system has no such sockets.
    """
    name = f"aiosgd-{os.urandom(16).hex()}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(_abstract(name))
        listening.setblocking(False)
        return await asyncio.get_running_loop().create_unix_server(factory, sock=listening), name
    except BaseException:
        listening.close()
        raise


async def connect_unix(
    name: str, on_frame: FrameHandler | None, on_closed: ClosedHandler, *, limits: Limits
) -> Link:
    """Open a link to an abstract unix socket.

    Raises:
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, _abstract(name))
        _, link = await loop.create_unix_connection(
            lambda: UnixLink(on_frame, on_closed, limits), sock=connection
        )
    except BaseException:
        connection.close()
        raise
    return link


def _abstract(name: str) -> bytes:
    return b"\0" + name.encode()


@functools.cache
def this_host() -> str:
    """Return what processes that reach each other's abstract sockets have in common.

    It is a hash of the kernel's boot id and the network namespace; empty where there are none.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/net").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"aiosgd {boot} {namespace}".encode()).hexdigest()[:32]
