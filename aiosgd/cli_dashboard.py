"""The command of the live page: dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from aiosgd.errors import ConfigError

Command = Callable[..., None]


def register(app: typer.Typer, reported: Callable[[Command], Command]) -> None:
    """Add the command to the command line.

    Args:
        app: the command line.
        reported: turns errors into exit codes.
    """
    app.command()(reported(dashboard))


def dashboard(
    cluster: Annotated[Path, typer.Argument(help="The cluster's nodes: cluster.toml.")],
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8050,
    host: Annotated[str, typer.Option(help="A loopback address.")] = "127.0.0.1",
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser, too.")] = False,
) -> None:
    """Show a cluster's jobs in a browser while they run; read-only, on this machine alone."""
    from aiosgd.dashboard.guard import is_loopback
    from aiosgd.runtime.config import load_cluster

    if not is_loopback(host):
        raise ConfigError(
            f"--host is {host}; the dashboard is for this machine alone: 127.0.0.1, ::1 or "
            "localhost. From another one: ssh -L 8050:127.0.0.1:8050 THIS-MACHINE"
        )
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; a port is 0..65535")
    nodes = load_cluster(cluster)
    nodes.security.load()
    try:
        from aiosgd.dashboard import server
    except ImportError as error:
        raise ConfigError(
            "the dashboard needs Starlette and uvicorn: pip install 'aiosgd[dashboard]'"
        ) from error
    own = server.listen("127.0.0.1" if host == "localhost" else host.strip("[]"), port)
    where = f"[{own.getsockname()[0]}]" if ":" in host else own.getsockname()[0]
    url = f"http://{where}:{own.getsockname()[1]}"

    def started() -> None:
        print(f"dashboard on {url}", flush=True)
        if show:
            import webbrowser

            webbrowser.open(url)

    asyncio.run(server.serve(nodes, own, started))
