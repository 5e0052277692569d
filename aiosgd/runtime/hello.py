"""How two ends of a link say who they are, before anything else: `handshake` over real links."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from aiosgd.errors import ClusterError, PeerLostError, RemoteProtocolError
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import connect, connect_unix, this_host
from aiosgd.runtime.frame import DEFAULT_LIMITS, Kind, Limits, encode
from aiosgd.runtime.handshake import NONCE_SIZE, Answerer, Caller, greeting, refusal
from aiosgd.runtime.security import OPEN, Security

__all__ = ["STRANGER", "TIMEOUT", "accept", "greet", "greeting", "introduce", "receive", "refuse"]

# what an end that has not proved who it is may send; its HELLO is a few short words
STRANGER = Limits(max_metadata=1024, max_body=0)
# seconds for a connection, and again for all HELLOs
TIMEOUT = 5.0
# seconds for a link over a unix socket: within one machine; the link over TCP waits meanwhile
UNIX_TIMEOUT = 1.0


# The end that is connected to -----------------------------------------------------------------


def greet(security: Security, unix: str = "") -> Answerer:
    """Return the node's part in a new handshake.

    Args:
        security: what the node was started with.
        unix: the name of the unix socket that the node offers to callers on its own machine.
    """
    offers = {"unix": {"name": unix, "host": this_host()}} if unix and this_host() else {}
    return Answerer(security.key, os.urandom(NONCE_SIZE), offers)


def receive(link: Link, answerer: Answerer, kind: Kind, content: Any) -> dict[str, Any] | None:
    """Take a HELLO that came in; return who is calling once that has been proved.

    Raises:
        RemoteProtocolError: the handshake failed.
    """
    answer = answerer.receive(content if kind is Kind.HELLO else None)
    if answer is not None:
        link.send(encode(answer, Kind.HELLO))
    return answerer.caller


def accept(link: Link) -> None:
    """Welcome a caller; from now on it may send what nodes send."""
    link.limits = DEFAULT_LIMITS
    link.send(encode(greeting(), Kind.HELLO))


def refuse(link: Link, reason: str) -> None:
    """Tell the other end why there is no link, and close it."""
    link.send(encode(refusal(reason), Kind.HELLO))
    link.close()


# The end that connects ------------------------------------------------------------------------


class _Call:
    """A link on its way; what the other end says is kept until it is asked for."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[Any] = asyncio.Queue()

    def on_frame(self, link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        link.on_frame = None  # what follows is kept for whoever takes the link over
        self._heard.put_nowait(content if kind is Kind.HELLO else None)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        self._heard.put_nowait(PeerLostError(str(error or "without a word")))

    async def ask(self, link: Link, hello: Mapping[str, Any]) -> Any:
        """Send a HELLO and return the answer."""
        link.send(encode(dict(hello), Kind.HELLO))
        link.on_frame = self.on_frame
        answer = await self._heard.get()
        if isinstance(answer, PeerLostError):
            raise answer
        return answer


async def introduce(
    address: Address,
    facts: Mapping[str, Any],
    timeout: float = TIMEOUT,
    *,
    security: Security = OPEN,
    unix: bool = False,
) -> Link:
    """Connect and say who we are; return the link once the node has accepted it.

    Args:
        address: of the node.
        facts: who is calling.
        timeout: seconds for the connection, and again for all HELLOs.
        security: what this end was started with.
        unix: whether to go on over a unix socket if the node offers one and is on this machine.

    Raises:
        ClusterError: unreachable, refused, no aiosgd node, or not one that has our secret.
    """
    call = _Call()
    tls = security.tls.client if security.tls is not None else None
    link = await connect(
        address.host,
        address.port,
        None,
        call.on_closed,
        timeout,
        limits=STRANGER,
        tls=tls,
    )
    try:
        async with asyncio.timeout(timeout):
            return await _converse(link, call, facts, security, unix=unix)
    except TimeoutError:
        link.abort()
        raise ClusterError(f"{address} did not answer: is it an aiosgd node?") from None
    except PeerLostError as error:
        hint = "it may not take our tls_cert: its log says more" if tls else str(error)
        raise ClusterError(f"{address} closed the link: {hint}") from None
    except RemoteProtocolError as error:
        raise ClusterError(f"{address}: no link: {error}") from None
    except BaseException:
        link.abort()
        raise


async def _converse(
    link: Link, call: _Call, facts: Mapping[str, Any], security: Security, *, unix: bool
) -> Link:
    """Exchange the HELLOs; return the link, or one over a unix socket in its place."""
    caller = Caller(facts, security.key, os.urandom(NONCE_SIZE))
    try:
        answer = caller.answer(await call.ask(link, caller.hello()))
        if unix and (shortcut := await _shortcut(caller.offers, facts, security)) is not None:
            link.abort()  # nothing is on its way, and nobody waits for the node's goodbye
            return shortcut
        link.limits = DEFAULT_LIMITS  # the node has proved what it must
        caller.check_welcome(await call.ask(link, answer))
    except RemoteProtocolError as error:
        if not link.is_closed:
            refuse(link, str(error))
        raise
    return link


async def _shortcut(
    offers: Mapping[str, Any], facts: Mapping[str, Any], security: Security
) -> Link | None:
    """Return a link over the unix socket that the node offers, if there is a way."""
    match offers.get("unix"):
        case {"name": str(name), "host": str(host)} if host and host == this_host():
            pass
        case _:
            return None
    call, link = _Call(), None
    try:
        async with asyncio.timeout(UNIX_TIMEOUT):
            link = await connect_unix(name, None, call.on_closed, limits=STRANGER)
            return await _converse(link, call, facts, security, unix=False)
    except (OSError, PeerLostError, RemoteProtocolError, ValueError):  # so it goes on over TCP
        if link is not None:
            link.abort()
        return None
    except BaseException:
        if link is not None:
            link.abort()
        raise
