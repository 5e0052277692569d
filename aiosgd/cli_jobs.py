"""The commands for jobs that somebody else submitted: status, logs, fetch, cancel."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiosgd.display import size, span

if TYPE_CHECKING:
    from aiosgd.runtime.archive import Entry
    from aiosgd.runtime.survey import Fate, Seen
    from aiosgd.runtime.visit import Status

Command = Callable[..., None]

# seconds without a step after which the table says so
QUIET = 3.0
# what a training loop does that needs its codecs
WAITS, HELD = "waits for the step's result", "waits until it may go on"
GAP = "  "
# heads of the columns that say what a job took
SPENT_HEAD = ("computed", "waited", "sent", "received")
NUMBERS = {"step", "loss", "samples/s", "nodes", "took", "samples", *SPENT_HEAD}

ClusterPath = Annotated[Path, typer.Argument(help="The cluster's nodes: cluster.toml.")]
JobId = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB", help="A job id, or its last letters; default: the running or newest job."
    ),
]


def register(
    app: typer.Typer,
    reported: Callable[[Command], Command],
    shown: Callable[..., Any],
    print_outcome: Callable[[Any], None],
) -> None:
    """Add the commands to the command line.

    Args:
        app: the command line.
        reported: turns errors into exit codes.
        shown: runs what takes a while, with a display.
        print_outcome: prints what a job has left.
    """

    @reported
    def fetch(
        cluster: ClusterPath,
        job: JobId = None,
        output: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs"),
        partial: Annotated[
            bool, typer.Option("--partial", help="Take what there is, though worker 0 is gone.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    ) -> None:
        """Collect the results of a job that has ended from its nodes."""
        from aiosgd import aio

        notes: list[str] = []
        outcome = shown(
            lambda _: aio.fetch(cluster, job, output, partial=partial, note=notes.append),
            f"fetching from the nodes of {cluster}",
        )
        for note in notes:
            _warn(note)
        if as_json:
            print(json.dumps(outcome.summary.to_dict()))
            return
        summary = outcome.summary
        print(f"job {summary.job_id}: {_ending(summary.state, summary.error or '')}")
        print_outcome(outcome)

    for command in (status, logs):
        app.command()(reported(command))
    app.command()(fetch)
    app.command()(reported(cancel))


def status(
    cluster: ClusterPath,
    job: JobId = None,
    why: Annotated[
        bool, typer.Option("--why", help="What each codec waits for, and where in its code.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="All jobs that the nodes remember.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the nodes of a cluster are doing, or what became of a job."""
    from aiosgd.runtime import survey

    seen = asyncio.run(_looked(cluster, why=why))
    fates = survey.fates(seen)
    fate = survey.fate_of(seen, job, cluster) if job or fates else None
    if as_json:
        shown = fates if history else []
        print(json.dumps(_plain(_facts(seen, fate, shown, history=history))))
        return
    print("\n".join(status_lines(cluster, seen, fate, by_name=job is not None)))
    if why:
        print("\n".join(why_lines(seen, fate)))
    if history:
        print("\n".join(["", *history_lines(fates)]))


async def _looked(cluster: Path, *, why: bool) -> list[Seen]:
    from aiosgd import aio

    return await aio.status(cluster, why=why)


def _facts(
    seen: Sequence[Seen], fate: Fate | None, fates: Sequence[Fate], *, history: bool
) -> dict[str, Any]:
    from dataclasses import asdict

    def node(one: Seen) -> dict[str, Any]:
        entry = one.entry(fate.job_id) if fate else None
        return {
            "place": one.place,
            "address": str(one.address),
            "error": one.error or None,
            "status": asdict(one.status) if one.status else None,
            "job": asdict(entry) if entry else None,
        }

    facts = {"job": asdict(fate) if fate else None, "nodes": [node(one) for one in seen]}
    return facts | ({"history": [asdict(one) for one in fates]} if history else {})


def _plain(value: Any) -> Any:
    """Return what JSON carries: None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What `status` shows -----------------------------------------------------------------------------


def status_lines(
    cluster: object, seen: Sequence[Seen], fate: Fate | None, *, by_name: bool
) -> list[str]:
    """Return the screen of `status`.

    Args:
        cluster: the file that names the nodes.
        seen: the nodes.
        fate: of the job that it is about, if there ever was any.
        by_name: whether the user named that job.
    """
    if fate is not None and by_name and fate.state != "running":
        return [
            *_headline(fate),
            *_table(_ended_rows(seen, fate)),
            *_silent(seen),
            _hint(cluster, fate),
        ]
    lines = _table(_rows(seen))
    jobs = {one.status.job_id for one in seen if one.status and one.status.job_id}
    for job_id in sorted(jobs):
        lines += [f"job {job_id}: {_led(seen, job_id)}"]
    if not jobs and fate is None:
        lines += ["no job runs, and there was none yet"]
    elif not jobs and fate is not None:
        lines += [f"no job runs; the newest is {_sentence(fate)}", _hint(cluster, fate)]
    return [*lines, *_silent(seen)]


def _rows(seen: Sequence[Seen]) -> list[list[str]]:
    several = len({one.status.job_id for one in seen if one.status and one.status.job_id}) > 1
    head = ["node", "address", "state", *(["job"] if several else [])]
    rows = [[*head, "step", "loss", "samples/s", "since", *SPENT_HEAD]]
    for one in seen:
        node = one.status
        if node is None:
            state = ["-", str(one.address), "no answer"]
        else:
            state = [_name(node.node), str(one.address), _state(node)]
        job = [node.job_id if node else ""] if several else []
        rows.append([*state, *job, *(_progress(node) if node else [])])
    return rows


def _name(node: int | None) -> str:
    from aiosgd.runtime.job import node_name

    return "-" if node is None else node_name(node)


def _state(node: Status) -> str:
    if node.failure:
        return "failing"
    if node.seat == "running" and node.node is not None:
        return "trains" if node.node >= 0 else "serves"
    return {"quiet": "has trained", "collected": "has trained"}.get(node.seat, node.seat)


def _progress(node: Status) -> list[str]:
    step = "" if node.step is None else str(node.step)
    if step and node.node is not None and node.node >= 0:
        step = f"{step}/{node.steps}"
    return [
        step,
        "" if node.loss is None else f"{node.loss:.4f}",
        "" if node.samples_per_s is None else f"{node.samples_per_s:,.0f}",
        _clock(node.began) if node.job_id else "",
        *_spent_cells(node.spent),
    ]


def _spent_cells(spent: Mapping[str, float]) -> list[str]:
    """Return what a job took: computing, waiting, and bytes both ways; empty where unknown."""
    shows = {"compute_s": span, "wait_s": span, "bytes_sent": size, "bytes_received": size}
    return [show(spent[name]) if name in spent else "" for name, show in shows.items()]


def _led(seen: Sequence[Seen], job_id: str) -> str:
    """Return who leads a job, and what else there is to say about it."""
    nodes = [one.status for one in seen if one.status and one.status.job_id == job_id]
    leaders = {node.leader for node in nodes if node.seat != "leaving"}
    leader = next(iter(leaders)) if len(leaders) == 1 else ""
    words = {
        "nobody": "nobody leads it: its submitter is gone",
        "its submitter": "its submitter leads it",
        "": "it is about to end" if not leaders else "its leader changes",
    }.get(leader, f"{leader} leads it, for its submitter is gone")
    saved = {node.checkpoint for node in nodes}
    if len(saved) == 1 and None not in saved:
        words += f"; checkpoint after step {saved.pop()}"
    quiet = [n.quiet_s for n in nodes if n.quiet_s is not None and n.seat == "running"]
    if quiet and min(quiet) > QUIET:
        words += f"; no step for {min(quiet):.0f} s (--why says what it waits for)"
    failures = [f"{_name(node.node)}: {node.failure}" for node in nodes if node.failure]
    return "; ".join([words, *failures])


def _headline(fate: Fate) -> list[str]:
    """Return what became of a job, when it did what, and what it took in all."""
    return [f"job {_sentence(fate)}", *_timeline(fate)]


def _timeline(fate: Fate) -> list[str]:
    spent, times = fate.spent, []
    if fate.began is not None:
        times.append(f"prepared {_clock(fate.began)}")
    if "train_s" in spent:
        times.append(f"trained for {span(spent['train_s'])}")
    if fate.began is not None and fate.took is not None:
        times.append(f"ended {_clock(fate.began + fate.took)}")
    if "samples" in spent:
        times.append(f"{spent['samples']:,.0f} samples")
    shares = zip(SPENT_HEAD, _spent_cells(spent), strict=True)
    times += [f"{name} {cell}" for name, cell in shares if cell]
    return [", ".join(times)] if times else []


def _sentence(fate: Fate) -> str:
    took = f" after {span(fate.took)}" if fate.took is not None else ""
    began = f", began {_clock(fate.began)}" if fate.began is not None else ""
    return f"{fate.job_id}{began}: {_ending(fate.state + took, fate.reason)}"


def _ending(state: str, reason: str) -> str:
    """Return a state and its reason, which may begin with the same word."""
    if reason.startswith(f"{state} "):
        return reason
    return f"{state}: {reason}" if reason else state


def _ended_rows(seen: Sequence[Seen], fate: Fate) -> list[list[str]]:
    rows = [["node", "address", "state", "began", "took", *SPENT_HEAD, "reason"]]
    for one in seen:
        entry = one.entry(fate.job_id)
        if entry is None:
            rows.append(["-", str(one.address), "no answer" if one.error else "no copy"])
        else:
            rows.append([_name(entry.node), str(one.address), *_fate_cells(entry)])
    return rows


def _fate_cells(entry: Entry) -> list[str]:
    ended, began = entry.ended, entry.began
    took = span(ended - began) if ended is not None and began is not None else ""
    reason = "" if entry.state == "done" else entry.reason
    return [entry.state, _clock(began), took, *_spent_cells(entry.spent), reason]


def _silent(seen: Sequence[Seen]) -> list[str]:
    return [f"{one.place}: {one.error}" for one in seen if one.error]


def _hint(cluster: object, fate: Fate) -> str:
    return f"aiosgd fetch {cluster} {fate.job_id} collects what it left"


def why_lines(seen: Sequence[Seen], fate: Fate | None) -> list[str]:
    """Return what the codecs of each node wait for."""
    lines = []
    for one in seen:
        node = one.status
        if node is None or node.why is None or (fate and node.job_id != fate.job_id):
            continue
        loop = f"; {node.training}" if node.training else ""
        lines += ["", f"{_name(node.node)} ({one.address}), {node.seat}{loop}"]
        lines += [f"{GAP}{_cause(actor, node.training)}" for actor in node.why]
        if node.actors > len(node.why):
            lines.append(f"{GAP}… {node.actors - len(node.why)} more")
    return lines or ["", "no node trains: there is nothing to wait for"]


def _cause(actor: Mapping[str, Any], training: str) -> str:
    """Return what a codec waits for, unless its worker needs nothing of it now."""
    needed = actor["hook"] or training in ("", WAITS, HELD)
    hook = f"in {actor['hook']} for {span(actor['since'])}" if actor["hook"] else "idle"
    early = f", {actor['early']} early" if actor["early"] else ""
    return (
        f"{actor['codec']} (group {actor['group']}, step {actor['step']}): {hook}; "
        f"{actor['explain'] + '; ' if needed else ''}mailbox {actor['waiting']}{early}"
    )


def history_lines(fates: Sequence[Fate]) -> list[str]:
    """Return a table of jobs, newest first."""
    if not fates:
        return ["no job yet"]
    rows = [["job", "state", "nodes", "began", "took", *SPENT_HEAD, "reason"]]
    for fate in fates:
        took = "" if fate.took is None else span(fate.took)
        count = str(len(fate.nodes))
        spent = _spent_cells(fate.spent)
        rows.append([fate.job_id, fate.state, count, _clock(fate.began), took, *spent, fate.reason])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, their columns as wide as they must be; numbers stand to the right.

    A column that no row has anything in is left out.
    """
    count = max(map(len, rows))
    padded = [[*row, *[""] * (count - len(row))] for row in rows]
    used = [any(row[i] for row in padded[1:]) for i in range(count)]
    whole = [list(itertools.compress(row, used)) for row in padded]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    right = [name in NUMBERS for name in whole[0]]
    return [
        GAP.join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in whole
    ]


def _clock(moment: float | None) -> str:
    """Return a time of day, and the day unless it is today."""
    if moment is None:
        return ""
    then, now = time.localtime(moment), time.localtime()
    same = then[:3] == now[:3]
    return time.strftime("%H:%M:%S" if same else "%Y-%m-%d %H:%M:%S", then)


# The others --------------------------------------------------------------------------------------


def logs(
    cluster: ClusterPath,
    job: JobId = None,
    node: Annotated[
        int | None, typer.Option(metavar="ID", help="One node's log: 0, 1, …; servers: -1, ….")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Print the logs of a job's nodes, ordered by time."""
    try:
        asyncio.run(_print_logs(cluster, job, node, follow=follow))
    except BrokenPipeError:  # whoever read them has seen enough: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _print_logs(cluster: Path, job: str | None, node: int | None, *, follow: bool) -> None:
    from aiosgd.runtime.config import load_cluster
    from aiosgd.runtime.survey import log_lines

    lines = log_lines(load_cluster(cluster), job, node=node, follow=follow, note=_warn)
    async for who, text in lines:
        print(f"{_name(who):<9} {text}", flush=follow)
    sys.stdout.flush()


def cancel(cluster: ClusterPath, job: JobId = None) -> None:
    """Stop the job that runs on a cluster; what it left stays on the nodes."""
    from aiosgd import aio

    fate = asyncio.run(aio.cancel(cluster, job))
    print(f"job {fate.job_id}: {_ending(fate.state, fate.reason)}")
    print(_hint(cluster, fate))


def _warn(text: str) -> None:
    print(f"aiosgd: {text}", file=sys.stderr, flush=True)
