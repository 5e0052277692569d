"""What a node keeps of its jobs, each in `<run dir>/<job id>/nodes/<id>/`, and how it is read back.

    job.toml, codec_0.py, …           what was run; the code that came with it
    node.log, lead.log                the node's log; lead.log of one that led the job
    train.csv, eval.csv, sketches.npy, record.npz, model.safetensors    what training left
    checkpoints/                      a folder per step that may be resumed from
    end.json                          what became of the job; the last file that is written

A folder without end.json is that of a job under way, or its node was killed: "lost".
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiosgd.codecs.base import Array, Vector
from aiosgd.errors import AiosgdError, ConfigError
from aiosgd.plugins.registry import check_value, describe
from aiosgd.runtime import checkpoint, results
from aiosgd.runtime.config import to_dict
from aiosgd.runtime.learner import SKETCH
from aiosgd.runtime.results import EVAL, RECORD, TRAIN
from aiosgd.runtime.toml_source import TomlSource
from aiosgd.runtime.workload import Workload, file_code, plugins_of

END = "end.json"
CHECKPOINTS = "checkpoints"
SKETCHES = "sketches.npy"

RUNNING = "running"
LOST = "lost"
STATES = ("done", "failed", "cancelled")

SPENT = ("samples", "train_s", "compute_s", "wait_s", "bytes_sent", "bytes_received")
"""What adds up over a job's nodes, but for the times."""

LATEST = 1e11
"""Seconds since 1970 that no clock shows: the year 5138."""
MOST = 1e18
"""Of what a job takes, more than there is, seconds or bytes; sums of it are finite."""

# jobs of a node's history at most, newest first: an answer's metadata has a limit
HISTORY = 100
# characters of a reason in the history; the copy itself has all of them
REASON = 200
# bytes of a log at a time
PIECE = 256 << 10

_NODE = re.compile("0|-?[1-9][0-9]{0,8}", re.ASCII)
_DAMAGED = (OSError, ValueError, EOFError, RecursionError, AiosgdError)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One job in a node's history.

    Attributes:
        node: which node of the job it was.
        state: `running`, `done`, `failed`, `cancelled`, or `lost`: the node ended without a word.
        reason: why it ended so.
        began, ended: in seconds since 1970 by the node's clock; None: not yet, or unknown.
        spent: what the job took there, those of SPENT that are known.
    """

    job_id: str
    node: int
    state: str
    reason: str = ""
    began: float | None = None
    ended: float | None = None
    spent: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range({"began": self.began, "ended": self.ended}, LATEST)
        check_range(self.spent, MOST)


def check_range(figures: Mapping[str, float | None], end: float) -> None:
    """Raise ValueError for a figure that is no number, negative, or not below `end`."""
    for name, value in figures.items():
        if value is not None and not 0 <= value < end:
            raise ValueError(f"{name} is {value!r}; expected 0 to {end:g}")


def folder_of(run_dir: Path, job_id: str, node: int) -> Path:
    """Return the folder of a node's copy; both names may come from a peer, and are checked.

    Raises:
        ConfigError: one of them is none.
    """
    if type(node) is not int:
        raise ConfigError(f"node is {node!r}; expected a whole number")
    return run_dir / results.check_job_id(job_id) / "nodes" / str(node)


# Reading back ----------------------------------------------------------------------------------


def history(run_dir: Path, running: Collection[tuple[str, int]] = ()) -> list[Entry]:
    """Return what a node did, newest first.

    Args:
        run_dir: the node's folder.
        running: job id and node id of what is under way.
    """
    entries = []
    for job_id, node in _newest(run_dir):
        entry = entry_of(run_dir, job_id, node, running)
        entries.append(dataclasses.replace(entry, reason=_shortened(entry.reason)))
    return entries


def _newest(run_dir: Path) -> Iterator[tuple[str, int]]:
    """Yield job and node of the newest copies; a job id begins with the time of its submission."""
    left = HISTORY
    for job_id in sorted(filter(results.is_job_id, _names(run_dir)), reverse=True):
        nodes = [int(name) for name in _names(run_dir / job_id / "nodes") if _NODE.fullmatch(name)]
        for node in sorted(nodes)[:left]:
            yield job_id, node
        left -= len(nodes)
        if left <= 0:
            return


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [path.name for path in folder.iterdir() if path.is_dir()]
    return []


def _shortened(reason: str) -> str:
    return reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"


def entry_of(
    run_dir: Path, job_id: str, node: int, running: Collection[tuple[str, int]] = ()
) -> Entry:
    """Return what became of a job.

    Raises:
        ConfigError: there is no copy of it here.
    """
    folder = folder_of(run_dir, job_id, node)
    if not folder.is_dir():
        raise ConfigError(f"there is no copy of job {job_id} as node {node} here")
    if (job_id, node) in running:
        return Entry(job_id=job_id, node=node, state=RUNNING, began=_time_of(folder / "job.toml"))
    try:
        return _ended(job_id, node, read_end(folder))
    except _DAMAGED as error:
        is_there = (folder / END).exists()
        return Entry(
            job_id=job_id,
            node=node,
            state=LOST,
            reason=describe(error) if is_there else "its node ended without a word",
            began=_time_of(folder / "job.toml"),
            ended=_time_of(folder / "node.log"),
        )


def _ended(job_id: str, node: int, end: Mapping[str, Any]) -> Entry:
    return Entry(
        job_id=job_id,
        node=node,
        state=end["state"],
        reason=end["reason"],
        began=end["began"],
        ended=end["ended"],
        spent=spent_of(end.get("figures")),
    )


def spent_of(figures: object) -> dict[str, float]:
    """Return those of SPENT that a node's figures have."""
    table = figures if isinstance(figures, Mapping) else {}
    known = {name: table.get(name) for name in SPENT}
    return {n: v for n, v in known.items() if isinstance(v, int | float) and 0 <= v < MOST}


def _time_of(path: Path) -> float | None:
    """Return when a file was last written to; None if that cannot be."""
    with contextlib.suppress(OSError):
        moment = path.stat().st_mtime
        return moment if 0 <= moment < LATEST else None
    return None


_END = {"state": str, "reason": str, "began": float, "ended": float}


def read_end(folder: Path) -> dict[str, Any]:
    """Read `end.json`: at least `state`, `reason`, `began` and `ended`.

    Raises:
        OSError, ValueError, ConfigError: it is missing or damaged.
    """
    path = folder / END
    end = check_value(json.loads(path.read_bytes()), dict[str, Any], str(path))
    for name, kind in _END.items():
        check_value(end.get(name), kind, f"{path}: {name}")
    if end["state"] not in STATES:
        raise ConfigError(f"{path}: state is {end['state']!r}; expected one of {STATES}")
    return dict(end)


def read_log(folder: Path, offset: int) -> bytes:
    """Return a piece of a copy's log; empty at its end, and if there is none."""
    with contextlib.suppress(OSError), (folder / "node.log").open("rb") as file:
        file.seek(offset)
        return file.read(PIECE)
    return b""


def read_copy(folder: Path, *, weights: bool) -> dict[str, Any]:
    """Return all that a run left on a node, as far as it can be read.

    Args:
        folder: the copy.
        weights: whether to add the weights.

    Returns:
        What a node sends when a job is collected: `train`, `evaluations`, `sketches`, `figures`,
        `log`, `record`, `weights` and `model_state`; None for what is not there. Beside that: `job`
        and `run`, the tables of job.toml; `sources`, the code; `shapes` of the weights; `lead_log`;
        `checkpoints`, their steps.
    """
    end: Mapping[str, Any] = _readable(read_end, folder) or {}
    shapes = _readable(_shapes, end)
    return {
        "train": _readable(_table, folder, "train"),
        "evaluations": _readable(_table, folder, "eval"),
        "sketches": _readable(_sketches, folder),
        "figures": end.get("figures"),
        "log": _bytes(folder / "node.log"),
        "record": _readable(_record, folder),
        "weights": _readable(_weights, folder, shapes) if weights else None,
        "model_state": _readable(_state, folder, shapes) if weights else None,
        "shapes": shapes,
        "lead_log": _bytes(folder / "lead.log"),
        "checkpoints": checkpoint.steps(folder / CHECKPOINTS),
        **(_readable(_whole_job, folder) or {"job": None, "run": None, "sources": []}),
    }


def _readable(read: Any, *args: Any) -> Any:
    """Return what can be read; None where it is missing or damaged."""
    try:
        return read(*args)
    except (*_DAMAGED, LookupError, TypeError):
        return None


def _bytes(path: Path) -> Array:
    content = b""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
    return as_array(content)


def _table(folder: Path, name: Any) -> dict[str, Any]:
    table = results.read_table(folder, name)
    dtype = {"train": TRAIN, "eval": EVAL}[name]
    return {column: np.ascontiguousarray(table[column]) for column in dtype.names or ()}


def _record(folder: Path) -> dict[str, Any]:
    table = results.read_record(folder)
    return {column: np.ascontiguousarray(table[column]) for column in RECORD.names or ()}


def _sketches(folder: Path) -> Any:
    return np.load(io.BytesIO((folder / SKETCHES).read_bytes()), allow_pickle=False)


def _shapes(end: Mapping[str, Any]) -> list[list[Any]]:
    pairs = check_value(end["shapes"], list[tuple[str, list[int]]], "shapes")
    return [[name, list(shape)] for name, shape in pairs]


def _weights(folder: Path, shapes: Sequence[Sequence[Any]]) -> Vector:
    """Return the model as one vector, in the model's order; the file has an order of its own."""
    named = results.read_parameters(folder)
    parts = [named[name].reshape(shape).ravel() for name, shape in shapes]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _state(folder: Path, shapes: Sequence[Sequence[Any]]) -> dict[str, Array]:
    """Return what a model remembers besides the weights: all else that is in its file."""
    weights = {name for name, _ in shapes}
    named = results.read_parameters(folder)
    return {name: array for name, array in named.items() if name not in weights}


def read_job(folder: Path) -> dict[str, Any]:
    """Return `job` and `run`: what was run, the tables of job.toml.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    job = results.read_job(folder)
    run = TomlSource(folder / "job.toml").table("run")
    if "job_id" not in run:  # an empty file would be a job of defaults alone
        raise ConfigError(f"{folder / 'job.toml'} has no [run] job_id")
    return {"job": to_dict(job), "run": dict(run)}


def _whole_job(folder: Path) -> dict[str, Any]:
    facts, names = read_job(folder), file_code(results.read_job(folder))
    sources = [[name, _bytes(folder / f"codec_{i}.py")] for i, name in enumerate(names)]
    return {**facts, "sources": sources}


def as_array(content: bytes) -> Array:
    """Return bytes as they go over the wire."""
    return np.frombuffer(content, np.uint8)


def as_octets(value: object) -> bytes | None:
    """Return what came over the wire as bytes; None if it is something else."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return value.tobytes()
    return None


# Keeping ---------------------------------------------------------------------------------------


def write_job(
    folder: Path,
    job_id: str,
    load: Workload,
    nodes: Mapping[int, object],
    sources: Sequence[tuple[str, bytes]],
) -> Path:
    """Write job.toml, with as many nodes as take part.

    Args:
        folder: where it goes.
        job_id: the job.
        load: its plugins.
        nodes: node id -> address.
        sources: name and text of the code that came as files.
    """
    workers = sum(node >= 0 for node in nodes)
    job = dataclasses.replace(load.job, workers=workers, servers=len(nodes) - workers or None)
    code = {name: hashlib.sha256(text).hexdigest() for name, text in sources}
    run = {
        "job_id": job_id,
        "code": code or None,
        "plugins": [
            f"{plugin.kind} {plugin.name}: {plugin.distribution} {plugin.version}"
            for plugin in plugins_of(load.job)
        ],
        "nodes": {str(node): str(address) for node, address in nodes.items()},
        "steps": load.steps,
        "spectral_gap": load.topology and load.topology.spectral_gap,
    }
    return results.write_job(folder, job, run)


def write_sketches(folder: Path, sketches: Sequence[Array]) -> Path:
    """Write the sketches of a node's weights, one for each row of eval.csv."""
    path, file = folder / SKETCHES, io.BytesIO()
    np.save(file, np.array(sketches).reshape(-1, SKETCH), allow_pickle=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(file.getvalue())
    return temporary.rename(path)
