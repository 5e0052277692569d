"""cluster.toml and job options -> checked values, before anything else starts.

Every value that a user gives becomes a `Setting`: a path into `JobConfig`, the value, and the place
where it was written, so that each message can say where to look. Types are read from the
annotations of `JobConfig` and its tables, ranges from a table.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import ipaddress
import json
import math
import numbers
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import check_value
from aiosgd.runtime.security import SecurityFiles
from aiosgd.runtime.toml_source import TomlSource, unknown_key, written_key

KINDS = (
    "codec",
    "server_codec",
    "compressor",
    "model",
    "dataset",
    "partition",
    "assignment",
    "topology",
    "optimizer",
)
"""The options that name a plugin; `<kind>_params` holds that plugin's own parameters."""

# The values --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How each node computes.

    Attributes:
        policy: where training compute runs: in a `thread`, `inline` on the event loop, or as the
            first steps suggest (`auto`).
        threads: BLAS threads per node; None is the host's cores divided by its nodes.
        slow: a test option: worker id -> factor by which its compute is slowed down.
    """

    policy: Literal["auto", "thread", "inline"] = "auto"
    threads: int | None = None
    slow: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fields(self, ("compute",))


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How nodes talk to each other.

    Attributes:
        unix: whether links within one machine go over unix sockets, which are faster than TCP.
    """

    unix: bool = True

    def __post_init__(self) -> None:
        _check_fields(self, ("wire",))


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One job's options, complete and checked; see the list of job options for each.

    Attributes:
        server_codec: None is the codec's own server half.
        exchange: None is the codec's own choice.
        batch_size: samples per block.
        max_steps: None is as many as the epochs have.
        workers: how many of the cluster's workers take part; None is all.
        servers: how many of the cluster's servers take part; None is all.
        granularity: one codec per `model`, per `tensor` or per bucket of so many bytes.
        step_timeout: how long a step may take before its codec is asked for a rescue.
        nan: what becomes of a job when a block's value or a result is not finite: it stops before
            anything is sent, or goes on without it.
        target_accuracy: the job ends when it is reached.
        on_loss: what becomes of a job that loses a worker: it stops, or goes on. In async mode the
            others train on; in sync mode all begin again at the last checkpoint, once the lost
            node is back.
        min_workers: with fewer, an async job does not go on.
        checkpoint_every: after how many steps all nodes write a checkpoint; None is never.
        resume: the id of a job whose checkpoints this one goes on from; empty: from the start.
        record: whether nodes keep the order in which things reach their codecs, for a replay.
        output: the folder that the run's folder is made in.
        tracker: where its tables and news go besides the CSV files, which are always written.
        tracker_params: the parameters of each tracker, by its name.
    """

    codec: str = "plain"
    server_codec: str | None = None
    mode: Literal["sync", "async"] = "sync"
    exchange: Literal["gradients", "updates", "weights"] | None = None
    compressor: str = "none"
    model: str = "mlp"
    dataset: str = "digits"
    partition: str = "shared"
    assignment: str = "iid"
    redundancy: int = 1
    topology: str = "full"
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    batch_size: int = 64
    epochs: int = 1
    max_steps: int | None = None
    workers: int | None = None
    servers: int | None = None
    overlap: bool = False
    granularity: Literal["model", "tensor"] | int = "model"
    seed: int = 0
    step_timeout: float = 10.0
    nan: Literal["stop", "skip"] = "stop"
    target_accuracy: float | None = None
    on_loss: Literal["stop", "continue"] = "stop"
    min_workers: int = 1
    checkpoint_every: int | None = None
    resume: str = ""
    record: bool = False
    title: str = ""
    output: str = "runs"
    tracker: tuple[str, ...] = ()
    codec_params: dict[str, Any] = field(default_factory=dict)
    server_codec_params: dict[str, Any] = field(default_factory=dict)
    compressor_params: dict[str, Any] = field(default_factory=dict)
    model_params: dict[str, Any] = field(default_factory=dict)
    dataset_params: dict[str, Any] = field(default_factory=dict)
    partition_params: dict[str, Any] = field(default_factory=dict)
    assignment_params: dict[str, Any] = field(default_factory=dict)
    topology_params: dict[str, Any] = field(default_factory=dict)
    optimizer_params: dict[str, Any] = field(default_factory=dict)
    tracker_params: dict[str, dict[str, Any]] = field(default_factory=dict)
    compute: Compute = field(default_factory=Compute)
    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        _check_fields(self, ())

    @property
    def bears_loss(self) -> bool:
        """Whether the others train on when a worker is lost."""
        return self.mode == "async" and self.on_loss == "continue"


# Ranges ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A condition on an option's value, and the words for it after `expected`."""

    text: str
    holds: Callable[[Any], bool]


_COUNT = Rule("1 or more", lambda n: n >= 1)
_POSITIVE = Rule("more than 0", lambda x: x > 0)
_NAME = Rule("a name", lambda s: s.strip() != "")
# a title becomes part of a folder's name
_TITLE = re.compile(r"(?!\.)[A-Za-z0-9_.-]{0,40}")
_JOB_ID = re.compile(r"\d{8}-\d{6}-[A-Za-z0-9_.-]{1,40}-[0-9a-f]{4}", re.ASCII)
_WORKER_ID = re.compile("0|[1-9][0-9]{0,8}")
# msgpack and TOML carry integers of 64 bits
_INT_LIMIT = 2**63
# what Python makes of bytes that are no UTF-8; neither TOML nor msgpack carries it
_SURROGATE = re.compile("[\ud800-\udfff]")

_COUNTS = (
    *("redundancy", "batch_size", "epochs", "max_steps", "workers"),
    *("checkpoint_every", "min_workers"),
)

_RULES: dict[tuple[str, ...], Rule] = {
    **{(kind,): _NAME for kind in KINDS},
    **{(name,): _COUNT for name in _COUNTS},
    ("servers",): Rule("0 or more", lambda n: n >= 0),
    ("seed",): Rule("0 or more", lambda n: n >= 0),
    ("learning_rate",): _POSITIVE,
    ("step_timeout",): _POSITIVE,
    ("target_accuracy",): Rule("more than 0 and at most 1", lambda x: 0 < x <= 1),
    ("granularity",): Rule(
        "'model', 'tensor' or a bucket of 4 bytes or more", lambda g: isinstance(g, str) or g >= 4
    ),
    ("title",): Rule(
        "at most 40 letters, digits, '-', '_' and '.', not starting with '.'",
        lambda s: _TITLE.fullmatch(s) is not None,
    ),
    ("resume",): Rule("a job's id", lambda s: s == "" or _JOB_ID.fullmatch(s) is not None),
    ("output",): Rule("a folder", lambda s: s != "" and "\0" not in s),
    ("tracker",): Rule("names", lambda names: all(map(_NAME.holds, names))),
    ("compute", "threads"): _COUNT,
    ("compute", "slow"): Rule("a factor of 1 or more", lambda x: x >= 1),
}


# Addresses -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, place: str, allow_zero: bool = False) -> Address:
        """Read `host:port`, or `[host]:port` for an IPv6 address.

        Hosts are lower-cased and IPv6 addresses shortened, so that equal ones compare equal.

        Args:
            text: what the user wrote.
            place: where it stands, for the message.
            allow_zero: whether port 0 (the system picks one) is allowed.

        Raises:
            ConfigError: it is no address.
        """
        lowest = 0 if allow_zero else 1
        host, _, port = text.rpartition(":")
        name = _host(host)
        if name and re.fullmatch("[0-9]{1,5}", port) and lowest <= int(port) <= 65535:
            return cls(name, int(port))
        shown = json.dumps(text, ensure_ascii=False)
        raise ConfigError(f"{place} is {shown}; expected host:port with a port of {lowest}..65535")


def _host(text: str) -> str:
    """Return the host in its normal form, or an empty string if it is none."""
    try:
        if text.startswith("[") and text.endswith("]"):
            return str(ipaddress.IPv6Address(text[1:-1]))
        if re.fullmatch("[0-9.]+", text):
            return str(ipaddress.IPv4Address(text))
    except ValueError:
        return ""
    return text.lower() if re.fullmatch(r"[\w.-]+", text) else ""


@dataclass(frozen=True)
class Setting:
    """One value that a user gave, checked.

    Attributes:
        path: the option it sets: `("epochs",)`, `("codec_params", "turn")`.
        value: of the option's type.
        place: where the user gave it: `--epochs`, `cluster.toml:12: [job] epochs`.
    """

    path: tuple[str, ...]
    value: Any
    place: str


@dataclass(frozen=True)
class Cluster:
    """The nodes that a job may use, and the cluster's defaults for jobs."""

    workers: tuple[Address, ...]
    servers: tuple[Address, ...] = ()
    job: tuple[Setting, ...] = ()
    path: Path | None = None
    security: SecurityFiles = field(default_factory=SecurityFiles)

    def __str__(self) -> str:
        return str(self.path or "the cluster")


# cluster.toml ------------------------------------------------------------------------------

_TABLES = ("workers", "servers", "security", "job")


def load_cluster(path: Path | str) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ConfigError: it is missing, unreadable or no TOML; has an unknown key, a wrong type, a bad
            or repeated address or no worker. The message names file, line and key.
    """
    source = TomlSource(Path(path))
    source.check_keys((), _TABLES)
    nodes = _addresses(source, "workers") | _addresses(source, "servers")
    _check_distinct(nodes, source)
    workers = tuple(address for key, address in nodes.items() if key[0] == "workers")
    servers = tuple(address for key, address in nodes.items() if key[0] == "servers")
    if not workers:
        raise ConfigError(f"{source.place('workers')} is empty; expected one host:port or more")
    job = tuple(_settings(source.table("job"), lambda path: source.place("job", *path)))
    return Cluster(workers, servers, job, source.path, _security(source))


def _security(source: TomlSource) -> SecurityFiles:
    """Return the files that [security] names; a relative path starts at the cluster file."""
    names = [option.name for option in dataclasses.fields(SecurityFiles)]
    source.check_keys(("security",), names)
    paths = {}
    for name, text in source.table("security").items():
        place = source.place("security", name)
        if not check_value(text, str, place).strip("\0"):
            raise ConfigError(f"{place} is {text!r}; expected a file")
        paths[name] = source.path.parent / Path(text).expanduser()
    given, missing = (
        [name for name in names if name.startswith("tls_") and (name in paths) is there]
        for there in (True, False)
    )
    if given and missing:
        raise ConfigError(
            f"{source.place('security', given[0])} needs {' and '.join(missing)}, too"
        )
    return SecurityFiles(**paths)


def _addresses(source: TomlSource, key: str) -> dict[tuple[str, int], Address]:
    texts = check_value(source.data.get(key, []), list[Any], source.place(key))
    found = {}
    for i, text in enumerate(texts):
        place = source.place(key, i)
        found[key, i] = Address.parse(check_value(text, str, place), place)
    return found


def _check_distinct(nodes: Mapping[tuple[str, int], Address], source: TomlSource) -> None:
    seen: dict[Address, str] = {}
    for key, address in nodes.items():
        if address in seen:
            raise ConfigError(
                f'{source.place(*key)} is "{address}"; expected another address than '
                f"{seen[address]}'s"
            )
        seen[address] = written_key(key)


# Job options -------------------------------------------------------------------------------


def make_job(
    flags: Mapping[str, Any], sets: Sequence[str] = (), cluster: Cluster | None = None
) -> JobConfig:
    """Combine defaults, the cluster's [job] table, flags and `--set`; each wins over those before.

    The file's parameters of a plugin, and the server half it names for a codec, are left out
    where a flag or `--set` puts another plugin in the place of the file's.

    Args:
        flags: option -> value of the option's type; None is not given.
        sets: `key.path=value` each, the value as TOML; a bare word is a string.
        cluster: the nodes that the job is for; its size is checked too.

    Raises:
        ConfigError: an unknown option, a wrong type or a value out of range; the message names
            the flag, the `--set` or the line of the file.
    """
    given = [*_settings(flags, _flag), *map(_parse_set, sets)]
    defaults = _still_wanted(cluster.job, given) if cluster else []
    settings = [*defaults, *given]
    job = _build(settings)
    _check_size(job, cluster, {setting.path[0]: setting.place for setting in settings})
    return job


def to_dict(job: JobConfig) -> dict[str, Any]:
    """Return a job as plain values that msgpack and TOML carry; options that are None are absent.

    `from_dict` gives an equal job back.
    """
    values: dict[str, Any] = _plain(dataclasses.asdict(job), "job")
    return values


def from_dict(values: Mapping[str, Any], place: str = "job") -> JobConfig:
    """Build a job from what `to_dict` gave; an absent option has its default.

    Raises:
        ConfigError: it is no table, or has an unknown option or a wrong value; `place` says where.
    """
    table = check_value(values, dict[Any, Any], place)
    return _build(_settings(table, lambda path: ".".join((place, *path))))


_TABLE_TYPES: dict[str, type[Compute | Wire]] = {"compute": Compute, "wire": Wire}


def _build(settings: Iterable[Setting]) -> JobConfig:
    values: dict[str, Any] = {}
    for setting in settings:
        _put(values, setting)
    tables = {name: table(**values.get(name, {})) for name, table in _TABLE_TYPES.items()}
    return JobConfig(**values | tables)


def _put(values: dict[str, Any], setting: Setting) -> None:
    *tables, key = setting.path
    for name in tables:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{setting.place} sets a key of {name}, which is {inner!r}")
        values = inner
    values[key] = copy.deepcopy(setting.value)  # a later setting may add to a table


_COMPANIONS = {kind: (f"{kind}_params",) for kind in KINDS} | {
    "codec": ("codec_params", "server_codec", "server_codec_params"),
    "tracker": ("tracker_params",),
}


def _still_wanted(defaults: Sequence[Setting], given: Sequence[Setting]) -> list[Setting]:
    """Return the defaults without those that belong to a plugin that was replaced."""
    old = {setting.path[0]: setting.value for setting in defaults}
    new = {setting.path[0]: setting.value for setting in given}
    dropped = {
        companion
        for kind in (*KINDS, "tracker")
        if kind in old and new.get(kind, old[kind]) != old[kind]
        for companion in _COMPANIONS[kind]
    }
    return [setting for setting in defaults if setting.path[0] not in dropped]


def _check_size(job: JobConfig, cluster: Cluster | None, places: Mapping[str, str]) -> None:
    """Refuse more workers, servers or redundancy than there are nodes."""
    workers = job.workers
    if cluster:
        for key, nodes in (("workers", cluster.workers), ("servers", cluster.servers)):
            wanted = getattr(job, key)
            if wanted is not None and wanted > len(nodes):
                raise ConfigError(
                    f"{places[key]} is {wanted}; expected at most {len(nodes)}, as {cluster} lists"
                )
        workers = workers or len(cluster.workers)
    if workers is not None and job.redundancy > workers:
        raise ConfigError(
            f"{places['redundancy']} is {job.redundancy}; expected at most {workers}, "
            "the number of workers"
        )


# One value ---------------------------------------------------------------------------------


def _settings(
    values: Mapping[Any, Any],
    place_of: Callable[[tuple[str, ...]], str],
    table: tuple[str, ...] = (),
) -> Iterator[Setting]:
    """Take nested values apart into checked settings; None is not given."""
    for key, given in values.items():
        path = (*table, str(key))
        place = place_of(path)
        expected = _type_at(path, place)
        value = dataclasses.asdict(given) if isinstance(given, Compute | Wire) else given
        if isinstance(value, Mapping) and _is_table(expected):
            yield from _settings(value, place_of, path)
        elif value is not None:
            yield Setting(path, _checked(path, value, expected, place), place)


def _flag(path: tuple[str, ...]) -> str:
    return ".".join((f"--{path[0].replace('_', '-')}", *path[1:]))


def _parse_set(text: str) -> Setting:
    """Read one `key.path=value`, as an option of a job."""
    path, value = read_set(text)
    place = f"--set {'.'.join(path)}"
    if path[0] == "job" and len(path) > 1:
        path = path[1:]
    if len(path) > 1:
        path = (_set_table(path[0], place), *path[1:])
    expected = _type_at(path, place)
    if isinstance(value, dict) and _is_table(expected):
        raise ConfigError(f"{place} is a table; set its keys one by one: {place}.KEY=VALUE")
    return Setting(path, _checked(path, value, expected, place), place)


def read_set(text: str) -> tuple[tuple[str, ...], Any]:
    """Read one `key.path=value`: the path, and the value as TOML; a bare word is a string.

    Raises:
        ConfigError: it is none, or its value is no TOML.
    """
    written, equals, raw = text.partition("=")
    path = tuple(part.strip() for part in written.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set is {text!r}; expected key.path=value")
    return path, _toml_value(raw.strip(), f"--set {'.'.join(path)}")


def _set_table(name: str, place: str) -> str:
    """Return the option that `--set name.key=…` sets a key of."""
    if name in (*KINDS, "tracker"):
        return f"{name}_params"
    if name in _hints(JobConfig):
        return name
    raise ConfigError(unknown_key(place, name, (*KINDS, "tracker", *_TABLE_TYPES, "job")))


def _toml_value(text: str, place: str) -> Any:
    """Read a TOML value; what is none and does not start as one is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except (ValueError, RecursionError) as error:
        if text[:1] in set("[{\"'"):
            raise ConfigError(f"{place} is {text!r}, which is no TOML value: {error}") from error
    if not text:
        raise ConfigError(f'{place} has no value; expected key.path=value ("" is an empty string)')
    return text


def _check_fields(instance: JobConfig | Compute | Wire, table: tuple[str, ...]) -> None:
    """Check every field of a new instance, and store the values in their plain form."""
    fields = {
        option.name: getattr(instance, option.name) for option in dataclasses.fields(instance)
    }
    given = {name: value for name, value in fields.items() if not isinstance(value, Compute | Wire)}
    values: dict[str, Any] = {}
    for setting in _settings(given, ".".join, table):
        _put(values, dataclasses.replace(setting, path=setting.path[len(table) :]))
    for name, value in values.items():
        object.__setattr__(instance, name, value)  # the instance is frozen, but still new


def _type_at(path: tuple[str, ...], place: str) -> Any:
    """Return the type of the option at a path, or refuse the path."""
    expected: Any = JobConfig
    for name in path:
        if isinstance(expected, type) and dataclasses.is_dataclass(expected):
            hints = _hints(expected)
            if name not in hints:
                raise ConfigError(unknown_key(place, name, list(hints)))
            expected = hints[name]
        elif typing.get_origin(expected) is dict:
            expected = typing.get_args(expected)[1]
        elif expected is not Any:
            raise ConfigError(f"{place} sets a key of an option that is no table")
    return expected


def _is_table(expected: Any) -> bool:
    return expected in (Compute, Wire) or typing.get_origin(expected) is dict


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(path: tuple[str, ...], value: Any, expected: Any, place: str) -> Any:
    """Return a value as the option's type, within its range."""
    plain = _plain(value, place)
    if path == ("tracker",):
        plain = _names(plain)
    if expected is Any:
        return plain
    if path[:-1] == ("tracker_params",) and not isinstance(plain, dict):
        raise ConfigError(
            f"{place} is {plain!r}; a tracker's parameter is tracker.NAME.KEY, such as "
            "tracker.mlflow.experiment"
        )
    if expected in (Compute, Wire):
        raise ConfigError(f"{place} is {plain!r}; expected a table")
    checked = check_value(plain, expected, place)
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ConfigError(f"{place} is {plain!r}; expected a finite number")
    if path[:-1] == ("compute", "slow") and not _WORKER_ID.fullmatch(path[-1]):
        raise ConfigError(f"{place} names worker {path[-1]!r}; expected a worker's id: 0, 1, …")
    rule = _RULES.get(path) or _RULES.get(path[:-1])
    if rule and not rule.holds(checked):
        raise ConfigError(f"{place} is {plain!r}; expected {rule.text}")
    return checked


def _names(value: Any) -> Any:
    """Return names that are written with commas between them as a list; each comes once."""
    parts = [value] if isinstance(value, str) else value
    if not (isinstance(parts, list) and all(isinstance(part, str) for part in parts)):
        return value
    return list(dict.fromkeys(name.strip() for part in parts for name in part.split(",")))


def _plain(value: Any, place: str) -> Any:
    """Return a value as bool, int, float, str, or lists and tables of those; all are copies.

    Numbers of other libraries, paths and tuples are converted; a table's None is left out.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and not _SURROGATE.search(value):
        return str(value)
    if isinstance(value, numbers.Integral) and -_INT_LIMIT <= int(value) < _INT_LIMIT:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return _number(float(value), place)
    if isinstance(value, Mapping):
        items = {_plain(str(key), place): item for key, item in value.items() if item is not None}
        return {key: _plain(item, f"{place}.{key}") for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    expected = "an integer of 64 bits" if isinstance(value, numbers.Integral) else "a TOML value"
    raise ConfigError(f"{place} is {value!r}; expected {expected}")


def _number(value: float, place: str) -> float:
    if math.isnan(value):
        raise ConfigError(f"{place} is nan; expected a number")
    return value
