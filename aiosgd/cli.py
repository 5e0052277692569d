"""The command line: the only place that prints.

Whatever costs time to import is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from aiosgd import cli_dashboard, cli_jobs, cli_launch
from aiosgd.errors import AiosgdError, ConfigError, JobCancelledError, JobFailedError
from aiosgd.runtime.config import JobConfig

if TYPE_CHECKING:
    from aiosgd.bench.rows import Report
    from aiosgd.bench.wire import Target
    from aiosgd.runtime.config import Address, Cluster
    from aiosgd.runtime.harvest import Outcome
    from aiosgd.runtime.simulation.simulate import Simulated

T = TypeVar("T")
AnyOutcome = TypeVar("AnyOutcome", bound="Outcome")

app = typer.Typer(
    name="aiosgd",
    help="Distributed SGD in which one small plugin, the codec, decides all communication.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# seconds in which nodes hear of a cancelled job, when its submitter leaves at once
PARTING = 0.1
# a node finishes what it must within this time after SIGTERM
STOP_WITHIN = 8.0

# click's class, wherever typer has its click from
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class _Debug:
    on = False


def _version(value: bool) -> None:
    if value:
        from aiosgd import __version__

        print(f"aiosgd {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
OutputFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--format", help="json is the same as --json.", show_default=False),
]


@app.callback(invoke_without_command=True)
def _globals(
    context: typer.Context,
    debug: Debug = False,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _Debug.on = debug
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn deliberate errors into one line on stderr and the right exit code; add `--debug`.

    A command that has `--json` also takes `--format json`.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    more: dict[str, tuple[object, Any]] = {"debug": (False, Debug)}
    if any(parameter.name == "as_json" for parameter in own):
        more["output_format"] = ("text", OutputFormat)

    @functools.wraps(command)
    def wrapped(*, debug: bool, **kwargs: Any) -> None:
        _Debug.on = _Debug.on or debug
        try:
            if kwargs.pop("output_format", "text") == "json":
                kwargs["as_json"] = True
            command(**kwargs)
        except AiosgdError as error:
            if _Debug.on:
                traceback.print_exc()
            print(f"aiosgd: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("aiosgd: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    added = [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (default, annotation) in more.items()
    ]
    _set_signature(wrapped, [*own, *added])
    return wrapped


def _set_signature(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Make a command's parameters what typer shall see."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


# Job options: one table for `run` and `submit` ------------------------------------------------

JOB_OPTIONS = {
    "codec": "Codec: a name (see `aiosgd plugins codec`) or FILE.py:CLASS.",
    "server_codec": "Codec of the servers; default: the codec's own server half.",
    "mode": "sync: a barrier per step; async: never wait.",
    "exchange": "gradients, updates or weights; default: the codec's own choice.",
    "compressor": "Compressor for what the codec sends.",
    "model": "Model.",
    "dataset": "Data set.",
    "partition": "Which samples each worker sees.",
    "assignment": "Which worker computes which block.",
    "redundancy": "How many workers compute each block.",
    "topology": "Which workers exchange with which, for codecs such as dpsgd.",
    "optimizer": "Optimizer.",
    "learning_rate": "Learning rate.",
    "batch_size": "Samples per block.",
    "epochs": "Passes over the data.",
    "max_steps": "Stop after so many steps.",
    "workers": "Number of workers; run: 2, simulate: 100, submit: all of them unless given.",
    "servers": "Number of servers, where the codec uses any.",
    "overlap": "Compute a step while the one before is exchanged.",
    "granularity": "One codec per 'model', per 'tensor', or per bucket of so many bytes.",
    "seed": "Seed of everything that is random.",
    "step_timeout": "Seconds without a step's result before the job fails.",
    "nan": "stop, or skip values that are not finite: those of a block, and results.",
    "target_accuracy": "Stop after the epoch that reaches this mean test accuracy.",
    "on_loss": "stop, or continue when a worker is lost; sync: from the last checkpoint.",
    "min_workers": "With fewer, an async job does not go on.",
    "checkpoint_every": "All nodes write a checkpoint after so many steps.",
    "resume": "Go on from the last checkpoint of an earlier job: its id.",
    "record": "Keep the order in which things reach the codecs, for `simulate --replay`.",
    "title": "Part of the job id.",
    "output": "Folder for results.",
    "tracker": "Record the job elsewhere, too: tensorboard, mlflow, wandb, jsonl; several with commas.",
}


def _with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add JOB_OPTIONS to a command that takes them as its keyword `options`."""

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        options = {name: _number(name, kwargs.pop(name)) for name in JOB_OPTIONS}
        command(options=options, **kwargs)

    own = inspect.signature(command, eval_str=True).parameters.values()
    _set_signature(
        wrapped,
        [p for p in own if p.name != "options"] + [_parameter(name) for name in JOB_OPTIONS],
    )
    return wrapped


def _parameter(name: str) -> inspect.Parameter:
    """Return one job option as typer reads it; its default and its words are those of JobConfig.

    typer gets all values as text: what is wrong with one is then said in the same words as for a
    value in a file.
    """
    default, hint = getattr(JobConfig, name), _hints()[name]
    option = typer.Option(
        "--" + name.replace("_", "-"),
        help=JOB_OPTIONS[name] + (f" Default: {default}." if default else ""),
        metavar=None if hint is bool else _metavar(hint),
        rich_help_panel="Job options",
        show_default=False,
    )
    # repeated, it names several
    kind: Any = bool if hint is bool else list[str] if get_origin(hint) is tuple else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _number(name: str, value: Any) -> Any:
    """Return an option's text as the number that it is meant to be, if it is one."""
    if value == []:
        return None  # not given, as typer has it for what may be repeated
    hint = _hints()[name]
    for kind in (int, float):
        if isinstance(value, str) and (hint is kind or kind in get_args(hint)):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _metavar(hint: Any) -> str:
    """Return what help shows in the place of an option's value."""
    words = {int: "N", float: "X", str: "NAME"}
    if hint in words:
        return words[hint]
    parts = [arg if isinstance(arg, str) else _metavar(arg) for arg in get_args(hint)]
    choices = "|".join(part for part in parts if part)
    return choices if len(choices) <= 16 else "NAME"


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(JobConfig)


Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="A plugin's parameter: codec.turn=150, model.hidden=[128,128], optimizer.momentum=0.9",
    ),
]
JobFile = Annotated[
    Path | None,
    typer.Option("--job", help="Options of an earlier run as defaults: its job.toml."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder for data sets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


# Commands -------------------------------------------------------------------------------------


@app.command()
@_reported
@_with_job_options
def run(
    *,
    sets: Sets = None,
    job_file: JobFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    options: dict[str, Any],
) -> None:
    """Run a job on this machine; without options: the default model on the embedded data set."""
    from aiosgd import aio

    _run_to_end(
        lambda observer: aio.run(
            sets=tuple(sets or ()),
            job_file=job_file,
            data_dir=data_dir,
            observer=observer,
            **options,
        ),
        as_json,
        "starting nodes on this machine",
    )


@app.command()
@_reported
@_with_job_options
def submit(
    cluster: Annotated[Path, typer.Argument(help="The cluster's nodes: cluster.toml.")],
    *,
    sets: Sets = None,
    job_file: JobFile = None,
    data_dir: DataDir = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the job to its nodes once it trains.")
    ] = False,
    as_json: AsJson = False,
    options: dict[str, Any],
) -> None:
    """Run a job on a cluster of nodes and collect its results."""
    from aiosgd import aio

    options |= {"sets": tuple(sets or ()), "job_file": job_file, "data_dir": data_dir}
    if detach:
        _start(cluster, options)
        return
    _run_to_end(
        lambda observer: aio.submit(cluster, observer=observer, **options),
        as_json,
        f"connecting to the nodes of {cluster}",
    )


def _start(cluster: Path, options: dict[str, Any]) -> None:
    """Have a cluster begin with a job, and say how to find it again."""
    from aiosgd import aio

    folder = _shown(
        lambda observer: aio.start(cluster, observer=observer, **options),
        f"connecting to the nodes of {cluster}",
        _loop_factory(),
    )
    print(f"job {folder.name} trains on the nodes of {cluster} without this submitter")
    print(f"aiosgd status {cluster} shows it; aiosgd fetch {cluster} {folder.name} collects it")


@app.command()
@_reported
@_with_job_options
def simulate(
    *,
    network: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="lan, wan, mobile, or a file that says it.")
    ] = "lan",
    stragglers: Annotated[
        str, typer.Option(metavar="WHO", help="Slow workers: 10%:5 (a tenth, five times), 3:2.")
    ] = "",
    faults: Annotated[
        str,
        typer.Option(metavar="WHAT", help="crash:2@3.5; host:2@3.5; cut:0,1|2,3@1-4 (seconds)."),
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every event to a new file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run twice, and tell where the second run differs.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="CLUSTER", help="Measure a cluster.toml's nodes; write a file for --network."
        ),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Predict a run, and show how far it is off.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Play a run that was made with --record again."),
    ] = None,
    node: Annotated[
        int | None, typer.Option(metavar="N", help="Of a replay: the node for --pdb.")
    ] = None,
    pdb: Annotated[
        bool, typer.Option("--pdb", help="Debug the hooks of that node's codec.")
    ] = False,
    sets: Sets = None,
    job_file: JobFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    options: dict[str, Any],
) -> None:
    """Run a job on virtual nodes in virtual time: the same results for the same options."""
    from aiosgd import aio

    if calibrate is not None:
        _calibrate(calibrate, options["output"])
        return
    if replay is not None:
        _replay(replay, node, data_dir, as_json, pdb=pdb)
        return
    if compare is not None:
        _compare(compare, network, data_dir, as_json)
        return
    if trace is not None and trace.exists():
        raise ConfigError(f"--trace {trace} exists already; nothing is ever overwritten")
    outcome = _run_to_end(
        lambda observer: aio.simulate(
            network=network,
            stragglers=stragglers,
            faults=faults,
            keep_trace=trace is not None or check,
            sets=tuple(sets or ()),
            job_file=job_file,
            data_dir=data_dir,
            observer=observer,
            **options,
        ),
        as_json,
        "preparing the simulation",
    )
    if trace is not None:
        _write_trace(trace, outcome)
    if check:
        _check_again(outcome)


def _calibrate(path: Path, output: str | None) -> None:
    """Measure a cluster and write what the simulator needs to be like it."""
    from aiosgd.bench import calibrate
    from aiosgd.bench.jobs import site
    from aiosgd.runtime.config import load_cluster, make_job
    from aiosgd.runtime.pool import keep_heap_warm
    from aiosgd.runtime.simulation.networks import write_network

    cluster = load_cluster(path)
    file = Path(output or path.with_suffix(".network.toml"))
    if file.exists():
        raise ConfigError(f"{file} exists already; name another with --output FILE")
    unix = make_job({}, (), cluster).wire.unix
    keep_heap_warm()  # as a node does

    async def work(display: Any) -> calibrate.Measured:
        async with site(len(cluster.workers), len(cluster.servers), cluster) as place:
            return await calibrate.measure(place, display.note, unix=unix)

    measured = _shown(work, f"measuring the nodes of {path}", _loop_factory())
    model = calibrate.fit(measured, file.name.partition(".")[0])
    write_network(model, file, calibrate.comments(measured, calibrate.addresses(cluster)))
    print(f"{file} describes these nodes: aiosgd simulate --network {file}")


def _replay(
    folder: Path, node: int | None, data_dir: Path | None, as_json: bool, *, pdb: bool
) -> None:
    """Play a recorded run again, in this thread, so that a debugger has the terminal."""
    from aiosgd.aio import default_data_dir
    from aiosgd.runtime.results import find_run
    from aiosgd.runtime.simulation.replay import replay

    if pdb != (node is not None):
        raise ConfigError("--node N and --pdb go together: they debug the codec of node N")
    outcome = replay(find_run(folder), data_dir=data_dir or default_data_dir(), node=node, pdb=pdb)
    if as_json:
        print(json.dumps(outcome.summary.to_dict()))
        return
    print(
        f"played {folder.name} again: {len(outcome.train):,} rows of training and "
        f"{sum(array.size for array in outcome.parameters.values()):,} parameters, bit for bit"
    )


def _compare(folder: Path, network: str, data_dir: Path | None, as_json: bool) -> None:
    """Simulate a run's job, and print what was predicted beside what was measured."""
    from aiosgd.aio import default_data_dir
    from aiosgd.display import comparison_text
    from aiosgd.runtime.coordinator import code_files
    from aiosgd.runtime.results import find_run, read_job
    from aiosgd.runtime.simulation.compare import compare
    from aiosgd.runtime.simulation.networks import load_network

    folder = find_run(folder)
    copies = code_files(read_job(folder))
    sources = {name: folder / "code" / copy for name, copy in copies.items()}
    model = load_network(network)
    comparison = compare(folder, model, data_dir or default_data_dir(), sources)
    if comparison.warning:
        print(f"aiosgd: {comparison.warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(comparison.to_dict()))
    else:
        print(comparison_text(comparison))


def _write_trace(path: Path, outcome: Simulated) -> None:
    from aiosgd.runtime.config import to_dict
    from aiosgd.runtime.results import read_job
    from aiosgd.runtime.simulation.trace_file import write_trace

    job = read_job(outcome.folder)
    try:
        write_trace(path, outcome.trace, job.seed, to_dict(job))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _check_again(outcome: Simulated) -> None:
    """Run the same command in a process with other hashes, and compare what both did."""
    import os
    import subprocess
    import tempfile

    from aiosgd.runtime.results import read_job
    from aiosgd.runtime.simulation.trace_file import first_difference

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        words = _without(sys.argv[1:], "--check", "--trace")
        if read_job(outcome.folder).tracker:  # the job is recorded once
            words = [*_without_tracker_params(words), "--set", "tracker=[]"]
        done = subprocess.run(  # noqa: S603 - this very command
            [sys.executable, "-m", "aiosgd", *words, "--trace", path, "--output", folder],
            env={**os.environ, "PYTHONHASHSEED": str(hash("aiosgd") % 4_000_000_000)},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise JobFailedError("the second run differs: it failed")
        difference = first_difference(outcome.trace, path)
    if difference is not None:
        raise JobFailedError(f"the second run differs: {difference.sentence}")
    print(f"a second run is the same in all {outcome.trace.count:,} events")


def _without(words: list[str], flag: str, option: str) -> list[str]:
    """Return a command line without a flag, and without an option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != flag and not word.startswith(f"{option}"):
            kept.append(word)
        skip = word == option
    return kept


def _without_tracker_params(words: list[str]) -> list[str]:
    """Return a command line without `--set tracker.…` and `--set=tracker.…`."""
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--set" and word.startswith("tracker."):
            kept.pop()
        elif not word.startswith("--set=tracker."):
            kept.append(word)
    return kept


def _run_to_end(
    work: Callable[[Any], Coroutine[Any, Any, AnyOutcome]], as_json: bool, title: str
) -> AnyOutcome:
    outcome = _shown(work, title)
    _print_end(outcome, as_json)
    return outcome


def _print_end(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(outcome.summary.to_dict()))
    else:
        _print_outcome(outcome)


def _read_submit(cluster: str, words: list[str]) -> tuple[dict[str, Any], bool]:
    """Return what `submit` would call with these words, and whether it would print JSON."""
    command = typer.main.get_command(app).commands["submit"]  # type: ignore[attr-defined]
    with command.make_context("aiosgd submit", [cluster, *words]) as context:
        given = context.params
    if given["detach"]:
        raise ConfigError("--detach leaves a job to nodes that end with this command; leave it out")
    _Debug.on = _Debug.on or given["debug"]
    options = {name: _number(name, given[name]) for name in JOB_OPTIONS}
    for name in ("job_file", "data_dir"):
        options[name] = given[name]
    return options | {"sets": tuple(given["sets"] or ())}, given["as_json"]


def _shown(
    work: Callable[[Any], Coroutine[Any, Any, T]],
    title: str,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run what takes a while, with a display of how far it is; Ctrl-C cancels it."""
    from aiosgd.display import Display

    with Display(title) as display:
        runner = asyncio.Runner(loop_factory=loop_factory)
        try:
            return runner.run(_interruptible(work(display)))
        except KeyboardInterrupt:  # the second one, while the first was cancelling the job
            display.__exit__()
            with contextlib.suppress(Exception, KeyboardInterrupt):
                runner.get_loop().run_until_complete(asyncio.sleep(PARTING))  # the nodes are told
            _leave_now("aiosgd: interrupted; nodes may still be stopping", 130)
        finally:
            runner.close()


def _leave_now(text: str, code: int) -> NoReturn:
    """End this process at once, whatever still runs in it."""
    import os

    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(text, file=sys.stderr, flush=True)
    os._exit(code)


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; SIGINT (by the Runner) and SIGTERM cancel it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work
    except asyncio.CancelledError as error:
        raise JobCancelledError(str(error) or "interrupted") from None


def _print_outcome(outcome: Outcome) -> None:
    summary = outcome.summary
    metrics = summary.metrics
    if metrics:
        own = [f["accuracy"] for f in summary.per_node.values() if "accuracy" in f]
        others = f" (worker 0; all: {min(own):.4f} to {max(own):.4f})" if len(set(own)) > 1 else ""
        print(f"test accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}{others}")
    print(
        f"{summary.steps} steps, {summary.samples:,} samples in {summary.train_s:.2f} s "
        f"({summary.samples_per_s:,.0f} samples/s)"
    )
    if summary.consensus_distance > 1e-6:  # not of NaN, nor of rounding
        print(f"workers' weights differ from their mean by {summary.consensus_distance:.3g}")
    if summary.staleness_max > 0:
        mean, most = summary.staleness_mean, summary.staleness_max
        print(f"results were {mean:.1f} steps old on average, {most:.0f} at most")
    if summary.lost:
        from aiosgd.runtime.job import node_name

        names = ", ".join(f"{node_name(node)} ({why})" for node, why in summary.lost.items())
        print(f"went on without {names}")
    if summary.simulated is not None:
        made = summary.simulated
        print(
            f"simulated on {made['network']['name']} with seed {made['seed']}: "
            f"{summary.wall_s:.3f} s of virtual time, {made['messages']:,} messages, "
            f"in {made['real_s']:.2f} s"
        )
    print(f"results in {outcome.folder}")


@app.command()
@_reported
def node(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 9000,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where this node keeps its copy of each job.")
    ] = None,
    data_dir: DataDir = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that jobs name: codecs, model.factory.")
    ] = False,
    secret_file: Annotated[
        Path | None,
        typer.Option(help="File of the secret that nodes and submitters share; see `new secret`."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="This node's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Who issues the certificates of all others (PEM).")
    ] = None,
    no_unix: Annotated[
        bool, typer.Option("--no-unix", help="Use TCP within this machine, too.")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine, to anyone who can connect."),
    ] = False,
    supervised: Annotated[
        bool | None,
        typer.Option(
            "--supervisor/--no-supervisor",
            help="Start the node again if its process dies, which is the default.",
            show_default=False,
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port for Prometheus, GET /metrics; 0 picks one; default: none."),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Address for that port; who reaches it reads the numbers.")
    ] = "127.0.0.1",
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
    secret_stdin: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run a node until it is interrupted."""
    import faulthandler

    from aiosgd.runtime import supervisor
    from aiosgd.runtime.security import SecurityFiles, key_of

    security = SecurityFiles(secret_file, tls_cert, tls_key, tls_ca).load()
    if secret_stdin:
        security = dataclasses.replace(security, key=key_of(_first_line(), "standard input"))
    _check_listen(host, port, safe=bool(security), insecure=insecure, allow_code=allow_code)
    metrics = _metrics_address(metrics_host, metrics_port)
    run_dir = _writable(run_dir or _default_run_dir(port))
    life = supervisor.Life(port)
    if not until_stdin_closes if supervised is None else supervised:
        life = supervisor.split(run_dir, port)
    faulthandler.enable()

    # what is heavy, and not for the parent
    from aiosgd.runtime.node import Node
    from aiosgd.runtime.part import Settings
    from aiosgd.runtime.pool import keep_heap_warm

    settings = Settings(
        host=host,
        port=life.port,
        run_dir=run_dir,
        data_dir=data_dir or _default_data_dir(),
        allow_code=allow_code,
        security=security,
        unix=not no_unix,
        metrics=metrics,
    )
    the_node = Node(settings)

    def started(address: Address) -> None:
        life.listening(address.port)
        if life.is_first:
            if the_node.metrics is not None:
                print(f"aiosgd node metrics on http://{the_node.metrics}/metrics", flush=True)
            print(f"aiosgd node listening on {address}", flush=True)

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        if until_stdin_closes:
            loop.add_reader(sys.stdin, stop.set)
        serving = asyncio.ensure_future(the_node.serve(started))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        serving.cancel()
        _, stuck = await asyncio.wait([serving], timeout=STOP_WITHIN)
        if stuck:  # a codec's hook does not let itself be cancelled: nothing else would end it
            _leave_now("aiosgd: a codec's hook does not end; leaving without it", 1)
        if not serving.cancelled():
            serving.result()

    _log_to_stderr(quiet=until_stdin_closes)
    keep_heap_warm()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve())


def _first_line() -> bytes:
    """Read the first line of standard input, and nothing of what follows."""
    import os

    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line


def _check_listen(host: str, port: int, *, safe: bool, insecure: bool, allow_code: bool) -> None:
    """Refuse to let strangers run jobs here; `safe` is whether links are authenticated."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; a port is 0..65535")
    if safe or _is_loopback(host):
        return
    if allow_code:
        raise ConfigError(
            f"--allow-code with --host {host} would let anyone who reaches this machine run any "
            "code on it; add --secret-file, or --tls-cert, --tls-key and --tls-ca"
        )
    if not insecure:
        raise ConfigError(
            f"--host {host} would let anyone who reaches this machine run jobs on it; add "
            "--secret-file (`aiosgd new secret FILE` writes one), or --tls-cert, --tls-key and "
            "--tls-ca, or add --insecure if the network is trusted"
        )


def _metrics_address(host: str, port: int | None) -> Address | None:
    """Return where a node tells its metrics, if it does."""
    from aiosgd.runtime.config import Address

    if port is None:
        return None
    if not 0 <= port <= 65535:
        raise ConfigError(f"--metrics-port is {port}; a port is 0..65535")
    try:
        name = f"[{host}]" if ":" in host else host
        return Address.parse(f"{name}:{port}", "--metrics-host", allow_zero=True)
    except ConfigError:
        raise ConfigError(f"--metrics-host is {host!r}; expected a name or an address") from None


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _writable(folder: Path) -> Path:
    """Return a folder that exists and can be written to; better now than with the first job."""
    import os

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--run-dir {folder} cannot be written to")
    return folder


def _default_run_dir(port: int) -> Path:
    import os
    import socket

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return state / "aiosgd" / f"{socket.gethostname()}-{port}"


def _default_data_dir() -> Path:
    from aiosgd.aio import default_data_dir

    return default_data_dir()


def _log_to_stderr(*, quiet: bool) -> None:
    """Log to the terminal; a node that `run` started says only what is wrong."""
    import logging

    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory where uvloop is installed, else None: asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


cli_jobs.register(app, _reported, _shown, _print_outcome)
cli_dashboard.register(app, _reported)
cli_launch.register(app, _reported, _shown, _print_end, _read_submit)


new = typer.Typer(
    help="Write something new: a secret, or a project with a plugin of your own.",
    pretty_exceptions_enable=False,
)
app.add_typer(new, name="new")


@new.command("secret")
@_reported
def new_secret(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
) -> None:
    """Write a file with a random secret, for the nodes and submitters of a cluster to share."""
    from aiosgd.runtime.security import write_secret

    write_secret(file)
    print(f"{file}: a new secret; give a copy (mode 0600) to each node and submitter")


def _new_plugin(kind: str, words: str) -> None:
    """Add the command that writes a project for a plugin of this kind."""

    @new.command(kind, help=f"Write a project that pip installs, with {words} of your own.")
    @_reported
    def command(
        name: Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name: my_name.")],
        *,
        output: Annotated[
            Path, typer.Option(metavar="DIR", help="The folder that aiosgd-NAME/ is made in.")
        ] = Path(),
    ) -> None:
        from aiosgd.scaffold.project import Project

        project = Project(kind, name, output)
        project.write()
        print(f"{project.folder}: {words} that works, its tests and its README; next:")
        print(*(f"  {line}" for line in project.next_commands()), sep="\n")


_new_plugin("codec", "a codec")
_new_plugin("compressor", "a compressor")
_new_plugin("model", "a model")
_new_plugin("dataset", "a data set")


@app.command()
@_reported
def plugins(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND] | show KIND NAME", help="What to list.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed plugins, or show one with its parameters."""
    from aiosgd import catalogue

    match words or []:
        case ["show", kind, name]:
            facts = catalogue.describe_plugin(kind, name)
            print(json.dumps(facts, indent=2) if as_json else catalogue.page(facts))
        case ["show", *_]:
            raise ConfigError(
                "plugins show takes a kind and a name: aiosgd plugins show codec plain"
            )
        case [] | [_]:
            rows = catalogue.list_plugins(*(words or []))
            print(json.dumps(rows, indent=2) if as_json else catalogue.table(rows))
        case _:
            raise ConfigError(f"plugins takes one kind, not {' '.join(words or [])!r}")


@app.command()
@_reported
def check(
    codec: Annotated[str, typer.Argument(help="A codec: a name or FILE.py:CLASS.")],
    *,
    sets: Sets = None,
    server_codec: Annotated[
        str | None, typer.Option(help="What servers run; default: the codec's own server half.")
    ] = None,
    topology: Annotated[
        str | None, typer.Option(help="The only one tried; default: a few, if the codec uses any.")
    ] = None,
    compressor: Annotated[
        str | None,
        typer.Option(metavar="CHAIN", help="The only one tried; default: none and a few."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=16, help="At most so many workers.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Orders of delivery for each mode.")] = 200,
    case: Annotated[
        str | None, typer.Option(help="Play this case alone, as a failure names it.")
    ] = None,
    report_dir: Annotated[
        Path | None,
        typer.Option("--report", help="Write check-…/ into this folder: report.json, charts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check a codec: its contract and its laws, in many orders of delivery, with faults.

    What fails is made smaller, and shown with a command that replays it.
    """
    from aiosgd.check import report as reports
    from aiosgd.check import runner
    from aiosgd.check.case import given
    from aiosgd.check.checks import Options
    from aiosgd.check.subject import load_subject

    def told(outcome: runner.Outcome) -> None:
        if not as_json:
            print(*reports.outcome_lines(outcome), sep="\n", flush=True)

    fixed = given(topology, compressor, sets or ())
    subject = load_subject(codec, fixed.sets, server_codec)
    if case is None:
        only = {"topology": fixed.topology, "compressor": fixed.compressor}
        done = runner.check(subject, Options(workers=workers, seeds=seeds, **only), told)
    elif fixed.topology or fixed.compressor:
        raise ConfigError("--case has a topology and a compressor of its own; leave the others out")
    else:
        done = runner.replay(subject, case, told)
    folder = reports.write(done, report_dir) if report_dir else None
    if as_json:
        print(json.dumps(done.to_dict()))
    else:
        print(*reports.last_lines(done), *([f"report in {folder}"] if folder else []), sep="\n")
    if not done.passed:
        raise typer.Exit(1)


@app.command()
@_reported
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders, or ends of job ids in runs: 68c5.")
    ],
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new file; default: report.html.")
    ] = None,
    form: Annotated[
        Literal["html", "png"] | None,
        typer.Option("--format", help="One page, or one picture of the main curves."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it, too.")] = False,
) -> None:
    """Make one file of a run, or of several to compare: curves, time, traffic, options.

    The file of one run is in its folder, that of several in the current one. Nothing is
    overwritten: where there is a report.html, the next is report-2.html.
    """
    from aiosgd.report.publish import publish
    from aiosgd.runtime.results import find_run

    path = publish([find_run(run) for run in runs], output, form)
    print(f"report in {path}")
    if show:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())


# Benchmarks -----------------------------------------------------------------------------------

bench = typer.Typer(
    help="Measure how fast nodes exchange, on this machine or on a cluster.",
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")

Bytes = Annotated[
    str, typer.Option("--bytes", metavar="SIZES", help="Sizes of arrays: 1MB,10MB,100MB.")
]
Nodes = Annotated[
    str | None,
    typer.Option(metavar="COUNTS", help="Numbers of workers: 2,4. Default: those that there are."),
]
Rounds = Annotated[int, typer.Option(help="Rounds; the medians of them are reported.")]
ClusterFile = Annotated[
    Path | None,
    typer.Option(help="Measure these nodes: cluster.toml. Default: new ones on this machine."),
]
BenchJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Over = Annotated[
    Literal["tcp", "unix"], typer.Option(help="What links go over; unix: on one machine only.")
]


@bench.command("wire")
@_reported
def bench_wire(
    sizes: Bytes = "1MB,10MB,100MB",
    rounds: Rounds = 5,
    transport: Over = "tcp",
    cluster: ClusterFile = None,
    as_json: BenchJson = False,
) -> None:
    """Arrays one way and an answer, beside a bare socket.

    Seconds from handing an array to a link to the node's answer that it has it. The raw socket
    blocks, carries the same bytes between the same processes into one reused buffer, and gets
    1 byte back; both are measured in turn, round by round.
    """
    from aiosgd.bench import rows, wire
    from aiosgd.runtime.probe import MAX_BYTES

    counts = rows.read_sizes(sizes, MAX_BYTES)
    _measure_links(
        lambda targets, note: wire.wire(targets, counts, rounds, transport, note),
        rounds,
        cluster,
        as_json,
    )


@bench.command("messages")
@_reported
def bench_messages(
    sizes: Bytes = "1KB",
    rounds: Rounds = 5,
    transport: Over = "tcp",
    cluster: ClusterFile = None,
    as_json: BenchJson = False,
) -> None:
    """Small messages, in a row and there and back.

    In a row: seconds per message, from the first that is sent to the answer that the last has come.
    The raw socket sends a 16-byte header and the array in one call per message.
    """
    from aiosgd.bench import rows, wire

    counts = rows.read_sizes(sizes, wire.SMALL)
    _measure_links(
        lambda targets, note: wire.messages(targets, counts, rounds, transport, note),
        rounds,
        cluster,
        as_json,
    )


def _measure_links(
    work: Callable[[list[Target], Callable[[str], None]], Coroutine[Any, Any, Report]],
    rounds: int,
    cluster: Path | None,
    as_json: bool,
) -> None:
    from aiosgd.bench.rows import check_rounds
    from aiosgd.bench.wire import local_node, targets_of
    from aiosgd.runtime.config import load_cluster
    from aiosgd.runtime.pool import keep_heap_warm

    check_rounds(rounds)
    keep_heap_warm()  # as a node does
    targets = None if cluster is None else targets_of(load_cluster(cluster))

    async def measure(display: Any) -> Report:
        if targets is not None:
            return await work(targets, display.note)
        async with local_node(display.printed) as target:
            return await work([target], display.note)

    _report(_shown(measure, "starting", _loop_factory()), as_json)


@bench.command("allreduce")
@_reported
def bench_allreduce(
    nodes: Nodes = None,
    sizes: Bytes = "0.4MB,10MB,100MB",
    rounds: Rounds = 5,
    codec: Annotated[str, typer.Option(help="A codec without servers.")] = "allreduce",
    cluster: ClusterFile = None,
    as_json: BenchJson = False,
) -> None:
    """The mean over all workers, beside gloo.

    Real jobs whose model computes nothing.
    Seconds from a worker's handing over its block to its having the result (`wait_s`), of the
    worker that waits the longest: the median over the steps of a job, and of the rounds. Where
    torch is installed, gloo's all_reduce is measured beside it.
    """
    from aiosgd.bench import jobs, rows
    from aiosgd.bench.peers import has_torch

    counts = rows.read_sizes(sizes)
    python = sys.executable if cluster is None and has_torch() else None
    _measure_jobs(
        lambda place, numbers, note: jobs.allreduce(
            place, numbers, counts, rounds, note, codec=codec, python=python
        ),
        nodes,
        rounds,
        cluster,
        as_json,
    )


@bench.command("server")
@_reported
def bench_server(
    nodes: Nodes = None,
    sizes: Bytes = "0.47MB,10MB,100MB",
    rounds: Rounds = 5,
    codec: Annotated[str, typer.Option(help="A codec with a server half.")] = "parameter_server",
    cluster: ClusterFile = None,
    as_json: BenchJson = False,
) -> None:
    """A parameter server's round.

    Real jobs whose model computes nothing; seconds are those of `bench allreduce`.
    One server: each worker sends it an update, and gets back what the updates of all have changed.
    """
    from aiosgd.bench import jobs, rows

    counts = rows.read_sizes(sizes)
    _measure_jobs(
        lambda place, numbers, note: jobs.server(place, numbers, counts, rounds, note, codec=codec),
        nodes,
        rounds,
        cluster,
        as_json,
        servers=1,
    )


@bench.command("step")
@_reported
def bench_step(
    steps: Annotated[int, typer.Option(help="Steps of each job.")] = 2000,
    rounds: Rounds = 5,
    codec: Annotated[str, typer.Option(help="A codec without servers.")] = "plain",
    cluster: ClusterFile = None,
    as_json: BenchJson = False,
) -> None:
    """Training steps of a small MLP.

    Two workers, beside the same with nothing exchanged: 784-128-128-10, batch 64 per worker, plain SGD, one BLAS thread per worker; steps are counted
    without the evaluations between epochs.
    """
    from aiosgd.bench import jobs

    if steps < 2:
        raise ConfigError(f"--steps is {steps}; expected 2 or more")
    _measure_jobs(
        lambda place, _, note: jobs.step(place, [codec], steps, rounds, note),
        str(jobs.STEP_WORKERS),
        rounds,
        cluster,
        as_json,
    )


def _measure_jobs(
    work: Callable[[Any, list[int], Callable[[str], None]], Coroutine[Any, Any, Report]],
    nodes: str | None,
    rounds: int,
    cluster: Path | None,
    as_json: bool,
    servers: int = 0,
) -> None:
    from aiosgd.bench.jobs import check_cluster, default_counts, site
    from aiosgd.bench.rows import check_rounds, read_counts
    from aiosgd.runtime.config import load_cluster

    check_rounds(rounds)
    there: Cluster | None = None if cluster is None else load_cluster(cluster)
    numbers = default_counts(there) if nodes is None else read_counts(nodes)
    if there is not None:
        check_cluster(there, max(numbers), servers)

    async def measure(display: Any) -> Report:
        async with site(max(numbers), servers, there, display.printed) as place:
            return await work(place, numbers, display.note)

    _report(_shown(measure, "starting"), as_json)


def _report(report: Report, as_json: bool) -> None:
    from aiosgd.bench.rows import machine
    from aiosgd.display import bench_text

    if as_json:
        print(json.dumps(report.to_dict()))
        for warning in report.warnings:
            print(f"aiosgd: warning: {warning}", file=sys.stderr)
    else:
        print(bench_text(report, machine()))


def main() -> None:
    """Run the command line; what typer itself finds wrong is one line on stderr, too."""
    try:
        code = typer.main.get_command(app).main(prog_name="aiosgd", standalone_mode=False)
    except UsageError as error:
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "aiosgd"
        print(f"aiosgd: {' '.join(message.split())}; see {command} --help", file=sys.stderr)
        code = 2
    sys.exit(code)
