"""The web server of the live page: loopback alone, reading alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from aiosgd.dashboard.guard import guarded
from aiosgd.dashboard.page import View, files, shell
from aiosgd.dashboard.stream import Stream
from aiosgd.dashboard.watch import Watch
from aiosgd.errors import ClusterError
from aiosgd.runtime.config import Cluster

LEAVE_WITHIN = 2
"""Seconds that open pages get at the end; they hear of it at once."""
NICENESS = 10
"""What the page costs shall not slow nodes on this machine."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises ClusterError."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(kind, socket.SOCK_STREAM)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((host, port))
        own.listen()
    except OSError as error:
        own.close()
        hint = "; --port 0 picks a free one" if port else ""
        raise ClusterError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    return own


def routes(stream: Stream, title: str) -> list[Route]:
    """Return what there is to read."""
    page = shell(title)

    async def show(_: Request) -> Response:
        return Response(page, media_type="text/html")

    async def events(request: Request) -> Response:
        if request.method == "HEAD":  # it takes no place: nobody reads on
            return Response(media_type="text/event-stream")
        if stream.is_full:
            return PlainTextResponse("too many look already\n", 503)
        view = View.of(request.query_params)
        return StreamingResponse(stream.events(view), media_type="text/event-stream")

    def asset(text: str, kind: str) -> Callable[[Request], Response]:
        def send(_: Request) -> Response:
            return Response(text, media_type=kind)

        return send

    found = [Route("/", show, methods=["GET"]), Route("/events", events, methods=["GET"])]
    return found + [
        Route(f"/{name}", asset(text, kind), methods=["GET"])
        for name, (text, kind) in files().items()
    ]


async def serve(cluster: Cluster, own: socket.socket, started: Callable[[], None]) -> None:
    """Serve the page of a cluster until SIGINT or SIGTERM.

    Args:
        cluster: the nodes.
        own: listens; closed at the end.
        started: called once the page can be read.

    Raises:
        ConfigError: the cluster's secret or certificates cannot be read.
    """
    os.nice(NICENESS)
    loop, title = asyncio.get_running_loop(), str(cluster)
    watch = Watch(cluster)
    stream = Stream(watch, title)
    watching = asyncio.ensure_future(watch.run())

    def stop() -> None:
        stream.end()
        server.should_exit = True

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):  # instead of uvicorn's own
            loop.add_signal_handler(number, stop)
        watching.add_done_callback(lambda _: stop())
        started()
        yield

    options = uvicorn.Config(
        guarded(Starlette(routes=routes(stream, title), lifespan=life)),
        log_level="critical",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=LEAVE_WITHIN,
    )
    server = uvicorn.Server(options)
    await server.serve([own])
    watching.cancel()
    await asyncio.wait([watching])
    if not watching.cancelled():
        watching.result()
