"""The command that brings nodes up through a launcher: `aiosgd launch`."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiosgd.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from aiosgd.display import Display
    from aiosgd.plugins.launchers import Launched
    from aiosgd.runtime.harvest import Outcome

Command = Callable[..., None]
Submit = tuple[dict[str, Any], bool]
"""What `submit` would be called with, and whether it would print JSON."""

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A launcher: see `aiosgd plugins launcher`.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- SUBMIT-OPTIONS]", help="Submit a job with these, then end."),
]


def register(
    app: typer.Typer,
    reported: Callable[[Command], Command],
    shown: Callable[..., Any],
    print_outcome: Callable[[Outcome, bool], None],
    read_submit: Callable[[str, list[str]], Submit],
) -> None:
    """Add the command to the command line.

    Args:
        app: the command line.
        reported: turns errors into exit codes.
        shown: runs what takes a while, with a display.
        print_outcome: prints what a job has left, or its JSON.
        read_submit: reads the options of `submit` for a cluster file.
    """

    @reported
    def launch(
        name: Name,
        words: Words = None,
        *,
        workers: Annotated[
            int | None, typer.Option(metavar="N", help="How many workers; default: 2.")
        ] = None,
        servers: Annotated[
            int | None,
            typer.Option(metavar="N", help="How many servers; default: 1 if the job uses any."),
        ] = None,
        sets: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="launcher.KEY=VALUE",
                help="A launcher's parameter: see `aiosgd plugins show launcher NAME`.",
            ),
        ] = None,
        params: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE", help="A TOML file with the parameters in a table named launcher."
            ),
        ] = None,
        cluster_file: Annotated[
            Path, typer.Option(metavar="FILE", help="The cluster file to write.")
        ] = Path("cluster.toml"),
        allow_code: Annotated[
            bool, typer.Option("--allow-code", help="Let the nodes run code that jobs name.")
        ] = False,
    ) -> None:
        """Bring up nodes with a launcher; submit a job to them, or keep them until Ctrl-C.

        Everything after `--` is for `submit`: the job runs, its results are collected, and the
        nodes are taken down. Without it, the nodes stay up.
        """
        submit = read_submit(str(cluster_file), words) if words else None
        options: dict[str, Any] = {
            "workers": 2 if workers is None else workers,
            "servers": servers or 0,
            "params": _params(sets or [], params),
            "cluster_file": cluster_file,
            "allow_code": allow_code,
        }
        if submit is not None:
            options |= _needed(submit[0], workers, servers, allow_code)
        outcome = shown(
            lambda display: _launched(name, options, submit, display),
            f"starting nodes with {name}",
        )
        if outcome is not None and submit is not None:
            print_outcome(outcome, submit[1])

    app.command()(launch)


def _params(sets: list[str], file: Path | None) -> dict[str, Any]:
    """Return a launcher's parameters, of a file and of `--set`, which wins."""
    from aiosgd.runtime.config import read_set
    from aiosgd.runtime.toml_source import TomlSource

    params: dict[str, Any] = {}
    if file is not None:
        source = TomlSource(file)
        source.check_keys((), ("launcher",))
        params |= source.table("launcher")
    for text in sets:
        keys, value = read_set(text)
        if len(keys) != 2 or keys[0] != "launcher":
            raise ConfigError(
                f"--set {text!r} is no parameter of the launcher; expected launcher.KEY=VALUE, "
                "and what is for the job after `--`"
            )
        params[keys[1]] = value
    return params


def _needed(
    job: Mapping[str, Any], workers: int | None, servers: int | None, allow_code: bool
) -> dict[str, Any]:
    """Return which nodes a job needs where the user does not say; raises what is wrong with it."""
    from aiosgd import aio

    needs = aio.needs(**job)
    return {
        "workers": needs.workers if workers is None else workers,
        "servers": needs.servers if servers is None else servers,
        "allow_code": allow_code or needs.code,
    }


async def _launched(
    name: str, options: Mapping[str, Any], submit: Submit | None, display: Display
) -> Outcome | None:
    """Run the job on nodes that are up for it; without one, keep them up until told to stop."""
    from aiosgd import aio
    from aiosgd.launch import launch

    path = options["cluster_file"]
    async with launch(name, **options, printed=display.printed) as nodes:
        if nodes.next_steps:
            _tell_next_steps(name, nodes, submit)
        elif submit is not None:
            return await aio.submit(path, observer=display, **submit[0])
        else:
            await _stay(nodes, path, display)
    return None


def _tell_next_steps(name: str, nodes: Launched, submit: Submit | None) -> None:
    print(*nodes.next_steps, sep="\n")
    if submit is not None:
        raise ConfigError(
            f"the launcher {name!r} does not start nodes itself: submit the job after the steps "
            "above"
        )


async def _stay(nodes: Launched, path: Path, display: Display) -> None:
    """Say that the nodes are up, and wait for Ctrl-C or for the last node's end."""
    count = f"{_many(len(nodes.workers), 'worker')}"
    servers = f" and {_many(len(nodes.servers), 'server')}" if nodes.servers else ""
    display.noted(f"{count}{servers} up; submit jobs from another terminal:")
    display.noted(f"  aiosgd submit {shlex.quote(str(path))} --epochs 5")
    display.note("Ctrl-C takes them down")
    over: asyncio.Future[str] = nodes.over or asyncio.get_running_loop().create_future()
    try:
        reason = await asyncio.shield(over)
    except asyncio.CancelledError:
        display.note("taking the nodes down")
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # as asked: this is how the command ends
        return
    raise ClusterError(f"{reason}; see what they said above")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
