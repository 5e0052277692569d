"""What a run leaves: its folder, tables, summary, parameters, job file and logs.

Every file is written once and appears whole: a temporary file in the same folder is written,
synced and renamed. Nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import struct
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import tomli_w

from aiosgd import __version__
from aiosgd.codecs.base import Array, Vector
from aiosgd.errors import ConfigError, RemoteProtocolError
from aiosgd.plugins.registry import check_value, describe, make_dataclass
from aiosgd.runtime.config import JobConfig, from_dict, to_dict

# Job ids and folders -----------------------------------------------------------------------

# ids to draw for a job at most: of the 65,536 of one second most are free
DRAWS = 20
_JOB_ID = re.compile(r"\d{8}-\d{6}-(?!\.)[A-Za-z0-9_.-]{1,40}-[0-9a-f]{4}", re.ASCII)


def new_job_id(now: datetime, title: str, token: str) -> str:
    """Return `YYYYmmdd-HHMMSS-<title>-<token>`.

    Args:
        now: when the job was submitted.
        title: the job's title or, where it has none, the codec's name; of a path only the last
            part is kept, and what is unsafe in a folder's name becomes `-`.
        token: 4 random hex digits, which keep jobs of the same second apart.

    Raises:
        ConfigError: the token is not 4 lower-case hex digits.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", title.rpartition("/")[2]).lstrip(".")[:40]
    return check_job_id(f"{now:%Y%m%d-%H%M%S}-{name or 'job'}-{token}")


def draw_job_id(job: JobConfig) -> str:
    """Return an id for a job that is submitted now."""
    title = job.title or Path(job.codec.rpartition(":")[2]).name
    return new_job_id(datetime.now(), title, secrets.token_hex(2))


def is_job_id(text: str) -> bool:
    """Tell whether a text is a job id, safe as a folder's name."""
    return _JOB_ID.fullmatch(text) is not None


def check_job_id(text: str) -> str:
    """Return a job id that is safe as a folder's name, or raise ConfigError."""
    if not is_job_id(text):
        raise ConfigError(f"job id is {text!r}; expected YYYYmmdd-HHMMSS-<title>-<4 hex digits>")
    return text


def meant(text: str, job_ids: Iterable[str], place: object) -> str | None:
    """Return the one job that a text names: its id, how that begins, or how it ends.

    Args:
        text: what somebody typed: `20261123-182405-plain-68c5`, `68c5`, `plain-68c5`, `20261123-18`.
        job_ids: to choose from.
        place: where they are, for the message.

    Returns:
        The job's id; None if there is none like it.

    Raises:
        ConfigError: there are several.
    """
    known = set(job_ids)
    if text in known:
        return text
    like = sorted(
        one for one in known if one.endswith(f"-{text}") or (text and one.startswith(text))
    )
    if len(like) > 1:
        names = ", ".join(like[-3:]) + (f" and {len(like) - 3} more" if len(like) > 3 else "")
        raise ConfigError(f"{text!r} may be any of {names} in {place}; expected more letters of it")
    return like[0] if like else None


def find_run(name: str | Path, output: str | Path = "runs") -> Path:
    """Return a run's folder, given its path or what `meant` takes for a run in `output`.

    Raises:
        ConfigError: several runs are meant.
    """
    folder, known = Path(name), Path(output)
    if folder.is_dir() or folder.name != str(name) or not known.is_dir():
        return folder
    found = meant(str(name), filter(is_job_id, (path.name for path in known.iterdir())), known)
    return known / found if found else folder


def create_folder(output: Path, job_id: str) -> Path:
    """Make the folder `<output>/<job id>` and return it.

    Raises:
        ConfigError: the job id is none, the folder exists, or it cannot be made.
    """
    folder = output / check_job_id(job_id)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be made a folder: {error.strerror}") from error
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise ConfigError(f"{folder} exists already; nothing is ever overwritten") from error
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def new_folder(job: JobConfig, job_id: str) -> tuple[str, Path]:
    """Make a job's run folder; where another job of this second drew the same id, draw again.

    Args:
        job: whose folder it is.
        job_id: the first id to try.

    Returns:
        The id that the job has now, and its folder.

    Raises:
        ConfigError: it cannot be made.
    """
    for _ in range(DRAWS):
        try:
            return job_id, create_folder(Path(job.output), job_id)
        except ConfigError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        job_id = draw_job_id(job)
    return job_id, create_folder(Path(job.output), job_id)


def _ignore(record: logging.LogRecord) -> None:
    """Go on without a line that finds no room: a full disk is no reason to stop a job."""


def open_log(path: Path) -> tuple[logging.Logger, logging.Handler]:
    """Return a logger of its own that writes to a file, and the handler, for who closes it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = _ignore  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.Logger(f"aiosgd.{path.stem}")
    log.addHandler(handler)
    return log, handler


# Tables ------------------------------------------------------------------------------------

TRAIN = np.dtype(
    [
        ("node", "<i8"),
        ("step", "<i8"),
        ("epoch", "<i8"),
        ("time_s", "<f8"),
        ("loss", "<f8"),
        ("accuracy", "<f8"),
        ("samples", "<i8"),
        ("compute_s", "<f8"),
        ("wait_s", "<f8"),
        ("bytes_sent", "<i8"),
        ("bytes_received", "<i8"),
        ("staleness", "<f8"),
    ]
)
"""One row per node and step; a staleness of NaN is none."""

EVAL = np.dtype(
    [
        ("node", "<i8"),
        ("epoch", "<i8"),
        ("step", "<i8"),
        ("time_s", "<f8"),
        ("loss", "<f8"),
        ("accuracy", "<f8"),
    ]
)
"""One row per node and epoch."""

CONSENSUS = np.dtype([("epoch", "<i8"), ("workers", "<i8"), ("mean", "<f8"), ("max", "<f8")])
"""One row per epoch: over the workers, ‖x_i - x̄‖ for their weights x_i and the mean x̄ of them."""

RECORD = np.dtype([("kind", "|u1"), ("group", "<u4"), ("number", "<i8"), ("step", "<i4")])
"""One row per thing that reached a node's codecs, in their order; see `runtime.record.Kind`."""

_TABLES = {"train": TRAIN, "eval": EVAL}
_FORMATS = {"<i8": "q", "<f8": "d", "<i4": "i", "<u4": "I", "|u1": "B"}


class Rows:
    """A table that grows by rows; each costs its bytes and well under a microsecond.

    Args:
        dtype: the columns: `TRAIN`, `EVAL`, `RECORD`, or any others of their types.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        kinds = [dtype[name].str for name in _names(dtype)]
        self._row = struct.Struct("<" + "".join(_FORMATS[kind] for kind in kinds))
        # a bytearray grows by a share of its size, so that n appends cost O(n)
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // self._row.size

    def __repr__(self) -> str:
        return f"Rows({len(self)} x {', '.join(_names(self.dtype))})"

    def append(self, *values: float) -> None:
        """Add one row, its values in the order of the columns.

        Raises:
            struct.error: the number of values is wrong, or an integer column gets none.
        """
        self._bytes += self._row.pack(*values)

    def extend(self, other: Rows) -> None:
        """Add the rows of another table with the same columns."""
        assert other.dtype == self.dtype
        self._bytes += other._bytes

    def array(self) -> np.recarray[Any, Any]:
        """Return a copy of the table, of shape (rows,)."""
        return np.frombuffer(bytearray(self._bytes), self.dtype).view(np.recarray)

    def since(self, count: int) -> np.recarray[Any, Any]:
        """Return a copy of the rows after the first `count`."""
        return np.frombuffer(self._bytes[count * self._row.size :], self.dtype).view(np.recarray)

    def columns(self, first: int = 0, most: int | None = None) -> dict[str, Array]:
        """Return the table as it goes over the wire: column name -> contiguous array.

        Args:
            first: the first row.
            most: how many rows at most; None: all.
        """
        size = self._row.size
        end = None if most is None else (first + most) * size
        table = np.frombuffer(bytes(self._bytes[first * size : end]), self.dtype)
        return {name: table[name].copy() for name in _names(self.dtype)}

    @classmethod
    def from_columns(cls, dtype: np.dtype[Any], columns: Mapping[str, Any]) -> Rows:
        """Build a table from what a node sent as its `columns`.

        Raises:
            RemoteProtocolError: a column is missing, unknown, of another type or length.
        """
        _check_columns(dtype, columns)
        table = np.empty(len(columns[_names(dtype)[0]]), dtype)
        for name in _names(dtype):
            table[name] = columns[name]
        rows = cls(dtype)
        rows._bytes += table.tobytes()
        return rows


def _names(dtype: np.dtype[Any]) -> tuple[str, ...]:
    return dtype.names or ()


def _check_columns(dtype: np.dtype[Any], columns: Mapping[str, Any]) -> None:
    names = _names(dtype)
    if not isinstance(columns, Mapping) or set(columns) != set(names):
        got = sorted(map(str, columns)) if isinstance(columns, Mapping) else type(columns).__name__
        raise RemoteProtocolError(f"columns are {got}; expected {', '.join(names)}")
    for name in names:
        column = columns[name]
        if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype != dtype[name]:
            shown = f"{column.dtype}{column.shape}" if isinstance(column, np.ndarray) else column
            raise RemoteProtocolError(
                f"column {name} is {shown!r}; expected a vector of {dtype[name]}"
            )
    lengths = {name: len(columns[name]) for name in names}
    if len(set(lengths.values())) > 1:
        raise RemoteProtocolError(f"columns have lengths {lengths}; expected the same length")


def read_table(folder: Path, name: Literal["train", "eval"]) -> np.recarray[Any, Any]:
    """Read `train.csv` or `eval.csv` of a run; an empty cell is NaN.

    Raises:
        ConfigError: the file is missing, or is no such table; the message names the line.
    """
    path, dtype = folder / f"{name}.csv", _TABLES[name]
    names = list(_names(dtype))
    lines = csv.reader(_read(path).decode(errors="replace").splitlines())
    header = next(lines, [])
    if header != names:
        raise ConfigError(f"{path}:1: columns are {','.join(header)}; expected {','.join(names)}")
    rows = [_cells(cells, dtype, f"{path}:{lines.line_num}") for cells in lines]
    return np.array(rows, dtype).view(np.recarray)


def _cells(cells: Sequence[str], dtype: np.dtype[Any], place: str) -> tuple[float, ...]:
    names = _names(dtype)
    if len(cells) != len(names):
        raise ConfigError(f"{place}: the row has {len(cells)} cells; expected {len(names)}")
    return tuple(
        _cell(cell, dtype[name].kind == "i", f"{place}: {name}")
        for name, cell in zip(names, cells, strict=True)
    )


def _cell(text: str, whole: bool, place: str) -> float:
    try:
        if not whole:
            return float(text) if text else math.nan
        value = int(text)
        if -(2**63) <= value < 2**63:
            return value
    except ValueError:
        pass
    expected = "a whole number" if whole else "a number"
    raise ConfigError(f"{place} is {text!r}; expected {expected}")


def write_record(folder: Path, rows: Rows) -> Path:
    """Write `record.npz` of a node: the columns of `RECORD`, compressed."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **rows.columns())
    return _write(folder / "record.npz", file.getvalue())


def read_record(folder: Path) -> np.recarray[Any, Any]:
    """Read `record.npz` of a node.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = folder / "record.npz"
    try:
        with np.load(io.BytesIO(_read(path)), allow_pickle=False) as file:
            return Rows.from_columns(RECORD, dict(file)).array()
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RemoteProtocolError) as error:
        raise ConfigError(f"{path} is no record of a run: {describe(error)}") from error


# Summary -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a job ended.

    Attributes:
        error: why it failed; None where it did not.
        metrics: final `loss` and `accuracy`; NaN where there is no value.
        nodes: how many took part, servers included.
        steps: how many steps the job took.
        samples: how many samples the workers' blocks had, redundant ones included.
        wall_s: from submission to the end.
        train_s: from the first step to the end of the last.
        consensus_distance: mean over the workers of ‖x_i - x̄‖ at their last evaluation, x_i being
            worker i's weights and x̄ the mean of all; known up to a few percent, 0 is exact.
        staleness_mean, staleness_max: over all results that workers took, in steps; one that is
            ahead counts as 0.
        per_node: node id -> its own figures.
        lost: workers that the job went on without, and why.
        checkpoint: the step after which all nodes wrote their last checkpoint; None without any.
        simulated: what it was simulated with; None of a real run. Times are virtual then.
    """

    job_id: str
    state: Literal["done", "failed", "cancelled"]
    error: str | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    nodes: int = 0
    steps: int = 0
    epochs: int = 0
    samples: int = 0
    wall_s: float = 0.0
    train_s: float = 0.0
    samples_per_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    consensus_distance: float = math.nan
    staleness_mean: float = math.nan
    staleness_max: float = math.nan
    per_node: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    lost: dict[int, str] = dataclasses.field(default_factory=dict)
    checkpoint: int | None = None
    simulated: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as summary.json has it: plain values, None for NaN and infinity."""
        values: dict[str, Any] = _json_value(dataclasses.asdict(self))
        return values


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_json_value(item) for item in value]
    if isinstance(value, np.generic):
        return _json_value(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_MAY_BE_NAN = (
    *("wall_s", "train_s", "samples_per_s"),
    *("consensus_distance", "staleness_mean", "staleness_max"),
)


def read_summary(folder: Path) -> Summary:
    """Read `summary.json` of a run.

    Raises:
        ConfigError: the file is missing or no summary.
    """
    path = folder / "summary.json"
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {describe(error)}") from error
    values = check_value(values, dict[str, Any], str(path))
    metrics = check_value(values.get("metrics", {}), dict[str, float | None], f"{path}: metrics")
    per_node = check_value(values.get("per_node", {}), dict[str, Any], f"{path}: per_node")
    lost = check_value(values.get("lost", {}), dict[str, str], f"{path}: lost")
    plain = {
        **_with_nan(values, _MAY_BE_NAN),
        "metrics": _with_nan(metrics, metrics),
        "lost": {_node_id(node, path): why for node, why in lost.items()},
        "per_node": {_node_id(node, path): figures for node, figures in per_node.items()},
    }
    summary: Summary = make_dataclass(Summary, plain, str(path), "a summary")
    return summary


def _with_nan(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the values with NaN again where one of these names has None."""
    lost = {name: math.nan for name in names if name in values and values[name] is None}
    return {**values, **lost}


def _node_id(text: str, path: Path) -> int:
    if re.fullmatch("0|-?[1-9][0-9]{0,8}", text) is None:
        raise ConfigError(f"{path}: per_node names {text!r}; expected a node's id")
    return int(text)


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write `summary.json`; NaN and infinity, which JSON has not, become null."""
    return write_json(folder / "summary.json", summary.to_dict())


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a new file of plain values; raises ConfigError if it cannot."""
    text = json.dumps(_json_value(values), indent=2, allow_nan=False) + "\n"
    return _write(path, text.encode())


# Job file ----------------------------------------------------------------------------------


def write_job(folder: Path, job: JobConfig, extra: Mapping[str, Any]) -> Path:
    """Write `job.toml`: the resolved options as [job], and what describes the run as [run].

    Args:
        folder: the run's folder.
        job: every option is written, but for those that are None.
        extra: goes into [run] after the seed and the versions of aiosgd, Python and numpy:
            `job_id`, `plugins` (name -> version), `workers`, `servers`, ….
    """
    run = {"seed": job.seed, **versions(), **extra}
    text = tomli_w.dumps({"job": to_dict(job), "run": _toml_value(run)})
    return _write(folder / "job.toml", text.encode())


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    return {
        "aiosgd": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def read_versions(folder: Path) -> dict[str, str]:
    """Read the versions that a run was made with; what `job.toml` does not have is absent."""
    run = _read_toml(folder / "job.toml").get("run", {})
    return {name: str(run[name]) for name in versions() if name in run}


def _toml_value(value: Any) -> Any:
    """Return a value that TOML carries: None left out, and the words for what it does not know."""
    if isinstance(value, Mapping):
        return {str(key): _toml_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_toml_value(item) for item in value]
    return value if isinstance(value, bool | int | float | str | datetime) else str(value)


def read_job(folder: Path) -> JobConfig:
    """Read the options in `job.toml` of a run, so that it can be run again.

    Raises:
        ConfigError: the file is missing, no TOML, or has an unknown or wrong option.
    """
    path = folder / "job.toml"
    return from_dict(_read_toml(path).get("job", {}), f"{path}: job")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {describe(error)}") from error


# Parameters --------------------------------------------------------------------------------


def named_parameters(vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Cut a model's flat vector into its parameters: name -> view in the parameter's shape.

    Raises:
        RemoteProtocolError: the vector has another length than the shapes add up to.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if vector.shape != (sum(sizes),):
        raise RemoteProtocolError(
            f"model has shape {vector.shape}; expected ({sum(sizes)},), as its parameters add up to"
        )
    parts = np.split(vector, np.cumsum(sizes)[:-1]) if sizes else []
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.reshape(shape) for (name, shape), part in named}


def write_model(
    folder: Path,
    vector: Vector,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Array] | None = None,
) -> Path:
    """Write `model.safetensors`: the parameters in a model's flat vector, and its state.

    Raises:
        RemoteProtocolError: as `named_parameters`.
    """
    named = {**(state or {}), **named_parameters(vector, shapes)}
    return _write(folder / "model.safetensors", safetensors.numpy.save(named))


def read_parameters(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read `model.safetensors` of a run, parameters and state: name -> array.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = folder / "model.safetensors"
    try:
        return safetensors.numpy.load(_read(path))
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error


# Logs and files ----------------------------------------------------------------------------


def write_node_log(folder: Path, node: int, text: str) -> Path:
    """Write `nodes/<id>/node.log`.

    Raises:
        RemoteProtocolError: the node is no integer: names from a peer never become paths.
    """
    if type(node) is not int:
        raise RemoteProtocolError(f"node id is {node!r}; expected a whole number")
    path = folder / "nodes" / str(node) / "node.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}") from error
    return _write(path, text.encode(errors="backslashreplace"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, content: bytes) -> Path:
    """Write a new file so that it is there whole or not at all.

    Raises:
        ConfigError: the file exists, or cannot be written; the message has path and cause.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and make the name last."""
    if path.exists():
        raise ConfigError(f"{path} exists already; nothing is ever overwritten")
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
