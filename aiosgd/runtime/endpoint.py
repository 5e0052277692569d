"""Where links begin: connecting to a node, and listening for those who connect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiosgd.errors import ClusterError
from aiosgd.runtime.connection import ClosedHandler, FrameHandler, Link, cause
from aiosgd.runtime.frame import DEFAULT_LIMITS, Limits


async def connect(
    host: str,
    port: int,
    on_frame: FrameHandler | None,
    on_closed: ClosedHandler,
    timeout: float,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Link:
    """Open a link.

    Raises:
        ClusterError: refused, unknown host, or no answer within `timeout` seconds; the message
            names address and cause.
    """
    loop = asyncio.get_running_loop()
    _check_port(host, port)
    try:
        async with asyncio.timeout(timeout):
            _, link = await loop.create_connection(
                lambda: Link(on_frame, on_closed, limits), host, port
            )
    except TimeoutError as error:
        raise ClusterError(f"{host}:{port} does not answer within {timeout:g} s") from error
    except (OSError, UnicodeError) as error:
        raise ClusterError(f"{host}:{port} cannot be reached: {cause(error)}") from error
    return link


async def listen(host: str, port: int, factory: Callable[[], Link]) -> asyncio.Server:
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
