"""How two ends of a link say who they are: one HELLO each way, before anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiosgd import __version__
from aiosgd.errors import ClusterError, RemoteProtocolError
from aiosgd.runtime.config import Address
from aiosgd.runtime.connection import Link
from aiosgd.runtime.endpoint import connect
from aiosgd.runtime.frame import DEFAULT_LIMITS, WIRE_VERSION, Kind, Limits, encode

# what an end that has not said who it is may send; its HELLO is a few short words
STRANGER = Limits(max_metadata=1024, max_body=0)
# seconds for a connection, and again for the answer to a HELLO
TIMEOUT = 5.0


def greeting(**facts: Any) -> dict[str, Any]:
    """Return a HELLO: versions, and who is calling."""
    return {"wire": WIRE_VERSION, "version": __version__, **facts}


def read_hello(kind: Kind, content: Any) -> dict[str, Any]:
    """Return the first frame of a link if it is a HELLO that we understand.

    Raises:
        RemoteProtocolError: it is none, or of another wire version.
    """
    if kind is not Kind.HELLO or not isinstance(content, dict):
        raise RemoteProtocolError("the first frame is no HELLO")
    if content.get("wire") != WIRE_VERSION:
        raise RemoteProtocolError(
            f"the caller speaks wire version {content.get('wire')!r}, this node {WIRE_VERSION}"
        )
    return content


def accept(link: Link) -> None:
    """Answer a HELLO; from now on the other end may send what nodes send."""
    link.limits = DEFAULT_LIMITS
    link.send(encode(greeting(), Kind.HELLO))


def refuse(link: Link, reason: str) -> None:
    """Answer a HELLO with a reason why not, and close the link."""
    link.send(encode({"error": reason}, Kind.HELLO))
    link.close()


async def introduce(address: Address, hello: Mapping[str, Any], timeout: float = TIMEOUT) -> Link:
    """Connect and say who we are; return the link once the node has accepted it.

    Raises:
        ClusterError: unreachable, refused, or no aiosgd node.
    """
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_frame(link: Link, kind: Kind, number: int, content: Any, size: int) -> None:
        link.on_frame = None  # what follows is kept for whoever takes the link over
        if not answered.done():
            answered.set_result(content if kind is Kind.HELLO else None)

    def on_closed(link: Link, error: Exception | None) -> None:
        if not answered.done():
            reason = f"{address} closed the link: {error or 'without a word'}"
            answered.set_exception(ClusterError(reason))

    link = await connect(address.host, address.port, on_frame, on_closed, timeout)
    link.send(encode(dict(hello), Kind.HELLO))
    try:
        async with asyncio.timeout(timeout):
            answer = await answered
    except TimeoutError:
        link.abort()
        raise ClusterError(f"{address} did not answer: is it an aiosgd node?") from None
    except BaseException:
        link.abort()
        raise
    if not isinstance(answer, dict):
        link.abort()
        raise ClusterError(f"{address} is no aiosgd node: it did not answer with a HELLO")
    if "error" in answer:
        link.abort()
        raise ClusterError(f"{address} refused the link: {answer['error']}")
    return link
