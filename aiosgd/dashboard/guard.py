"""Who may read the page: browsers on this machine, as long as no other site sends them."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine and reached by nobody else."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def names_this_machine(host: str) -> bool:
    """Tell whether a Host header names this machine, whatever its port.

    A site whose name was made to point here ("DNS rebinding") sends its own name.
    """
    name, colon, port = host.rpartition(":")
    return is_loopback(name if colon and port.isdecimal() else host)


def guarded(app: App) -> App:
    """Return an app that answers what names this machine, reads only, and tells browsers so."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not names_this_machine(hosts[0]):
            await _refuse(send, 421, "This page is for http://127.0.0.1 and localhost alone.\n")
        elif scope["method"] not in ("GET", "HEAD"):
            await _refuse(send, 405, "Nothing can be changed here.\n")
        else:
            await app(scope, receive, _with_headers(send))

    return answer


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            own = [pair for pair in message.get("headers", []) if pair[0].decode() not in HEADERS]
            message = {**message, "headers": [*own, *more]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"allow", b"GET, HEAD")]
    guarded_send = _with_headers(send)
    await guarded_send({"type": "http.response.start", "status": status, "headers": headers})
    await guarded_send({"type": "http.response.body", "body": text.encode()})
