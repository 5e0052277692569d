"""Networks by name and as files: what a simulation's links and machines are like.

A file has these tables and keys, all of them optional; whatever it leaves out is as in `lan`:

    name = "attic"

    [link]                      # of all links
    latency_ms = 0.1            # from the last byte's leaving to its arrival
    jitter_ms = 0.02            # at most so much more
    mbit_per_s = 1000           # of each node's network card, each way
    loss = 0.0                  # share of messages that are lost, and sent again
    retry_ms = 200              # after so long; it doubles each time

    [[links]]                   # links that are not like the others, both ways; the last that fits
    between = [0, 1]
    others = [2, 3]
    latency_ms = 20             # latency_ms, jitter_ms, loss, retry_ms; the rest is as in [link]

    [nodes]                     # nodes whose card is not like the others': node = Mbit/s
    3 = 100

    [processor]
    message_us = 30             # per message and per byte of it, at either end
    byte_ns = 0.2
    codec_message_us = 0        # besides, for what the receiver's codec makes of it
    codec_byte_ns = 0
    cores = 2                   # that all nodes share; without it each has its own

    [compute]
    gflops = 20                 # or block_ms, the time of any block
    least_us = 0                # of a block besides, whatever its size
    weight_ns = 0               # of a block besides, per parameter
    step_us = 0                 # of a block, but no computing
    wake_us = 0                 # until a worker that has waited goes on
    evaluation_us = 0           # of an evaluation besides
    hop_us = 0                  # to a thread and back
    noise = 0.1                 # how far a block's time varies, as a share of it
    stragglers = {3 = 4.0}      # workers that are so many times slower
    replay = "runs/<job id>"    # block times of a real run; relative to the file
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import check_value, nearest
from aiosgd.runtime import results
from aiosgd.runtime.simulation.network import NetworkModel, Override
from aiosgd.runtime.simulation.network import Path as LinkPath
from aiosgd.runtime.toml_source import TomlSource, unknown_key

MBIT = 1e6 / 8
"""Bytes per second."""
MAX_CORES = 1 << 20

BUILT_IN: Mapping[str, NetworkModel] = {
    model.name: model
    for model in (
        NetworkModel(
            name="lan", bytes_per_s=1000 * MBIT, path=LinkPath(latency_s=1e-4, jitter_s=2e-5)
        ),
        NetworkModel(
            name="wan",
            bytes_per_s=100 * MBIT,
            path=LinkPath(latency_s=0.045, jitter_s=0.01, loss=0.001),
        ),
        NetworkModel(
            name="mobile",
            bytes_per_s=20 * MBIT,
            path=LinkPath(latency_s=0.03, jitter_s=0.06, loss=0.01),
            message_s=1e-4,
            byte_s=1e-9,
            flops=2e9,
        ),
    )
}
"""Cable in one room; 50 ± 5 ms between sites; telephones, 60 ± 30 ms and slow processors."""


# Keys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key of a table: the field that it sets, its unit in the field's, and its range.

    Attributes:
        positive: whether 0 is out of range.
        most: the largest value.
    """

    field: str
    unit: float = 1.0
    kind: Any = float
    positive: bool = False
    most: float = math.inf

    def read(self, value: Any, place: str) -> Any:
        """Return a value of the file as the field has it; raise ConfigError."""
        checked = check_value(value, self.kind, place)
        if isinstance(checked, int | float):
            self._check_range(checked, place)
            return checked * self.unit if self.kind is float else checked
        return checked

    def _check_range(self, value: float, place: str) -> None:
        low = value > 0 if self.positive else value >= 0
        if low and value <= self.most:  # NaN is neither
            return
        lowest = "more than 0" if self.positive else "0 or more"
        highest = f" and at most {self.most:g}" if self.most < math.inf else ""
        raise ConfigError(f"{place} is {value!r}; expected {lowest}{highest}")

    def written(self, value: Any) -> Any:
        """Return a field's value as the file has it."""
        return value / self.unit if self.kind is float else value


PATH_KEYS: Mapping[str, Key] = {
    "latency_ms": Key("latency_s", 1e-3, most=1e9),
    "jitter_ms": Key("jitter_s", 1e-3, most=1e9),
    "loss": Key("loss", most=0.99),
    "retry_ms": Key("retry_s", 1e-3, most=1e9),
}
SPEED = Key("bytes_per_s", MBIT, positive=True)
FACTOR = Key("slow", positive=True, most=1e9)
PROCESSOR_KEYS: Mapping[str, Key] = {
    "message_us": Key("message_s", 1e-6, most=1e9),
    "byte_ns": Key("byte_s", 1e-9, most=1e9),
    "codec_message_us": Key("codec_message_s", 1e-6, most=1e9),
    "codec_byte_ns": Key("codec_byte_s", 1e-9, most=1e9),
    "cores": Key("cores", kind=int, positive=True, most=MAX_CORES),
}
COMPUTE_KEYS: Mapping[str, Key] = {
    "gflops": Key("flops", 1e9, positive=True),
    "block_ms": Key("block_s", 1e-3, most=1e9),
    "least_us": Key("least_s", 1e-6, most=1e9),
    "weight_ns": Key("weight_s", 1e-9, most=1e9),
    "step_us": Key("step_s", 1e-6, most=1e9),
    "wake_us": Key("wake_s", 1e-6, most=1e9),
    "evaluation_us": Key("evaluation_s", 1e-6, most=1e9),
    "hop_us": Key("hop_s", 1e-6, most=1e9),
    "noise": Key("noise", most=1),
}
_TABLES = ("name", "link", "links", "nodes", "processor", "compute")
_NODE = re.compile("0|-?[1-9][0-9]{0,5}")


# Reading -------------------------------------------------------------------------------------


def load_network(name_or_path: str | Path) -> NetworkModel:
    """Return a network by name, or from a file.

    Args:
        name_or_path: `lan`, `wan`, `mobile`, or the path of a TOML file.

    Raises:
        ConfigError: there is none of that name; the file cannot be read, has an unknown key, a
            wrong type, or a value out of range. The message names file, line and key.
    """
    text = str(name_or_path)
    if text in BUILT_IN:
        return BUILT_IN[text]
    path = Path(text)
    if not path.suffix and not path.exists():
        raise ConfigError(
            f"no network is named {text!r}{nearest(text, list(BUILT_IN))}; expected one of "
            f"{', '.join(BUILT_IN)}, or a TOML file"
        )
    return _Reader(path).model()


class _Reader:
    """A network's file."""

    def __init__(self, path: Path) -> None:
        self._source = TomlSource(path)
        self._source.check_keys((), _TABLES)
        self._headers = _headers(path)

    def model(self) -> NetworkModel:
        """Return what the file describes."""
        data, source = self._source.data, self._source
        link = dict(source.table("link"))
        speed = {"mbit_per_s": link.pop("mbit_per_s")} if "mbit_per_s" in link else {}
        path = self._path(link, ("link",), LinkPath(), ("mbit_per_s",))
        compute = dict(source.table("compute"))
        stragglers, replay = compute.pop("stragglers", {}), compute.pop("replay", None)
        if "gflops" in compute and "block_ms" in compute:
            place = source.place("compute", "block_ms")
            raise ConfigError(f"{place} stands beside gflops; expected one of them")
        return NetworkModel(
            name=check_value(data.get("name", source.path.stem), str, source.place("name")),
            path=path,
            overrides=self._overrides(path),
            nodes_bytes_per_s=self._by_node(source.table("nodes"), ("nodes",), SPEED),
            slow=self._by_node(stragglers, ("compute", "stragglers"), FACTOR),
            replayed_s={} if replay is None else self._replayed(replay),
            **self._values(speed, ("link",), {"mbit_per_s": SPEED}),
            **self._values(source.table("processor"), ("processor",), PROCESSOR_KEYS),
            **self._values(compute, ("compute",), COMPUTE_KEYS, ("stragglers", "replay")),
        )

    def _values(
        self,
        table: Mapping[str, Any],
        at: tuple[str | int, ...],
        keys: Mapping[str, Key],
        others: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Read a table's keys; `others` are known, too."""
        values = {}
        for name, value in table.items():
            place = self._place(*at, name)
            if name not in keys:
                raise ConfigError(unknown_key(place, name, [*keys, *others]))
            values[keys[name].field] = keys[name].read(value, place)
        return values

    def _path(
        self,
        table: Mapping[str, Any],
        at: tuple[str | int, ...],
        base: LinkPath,
        others: Sequence[str],
    ) -> LinkPath:
        return replace(base, **self._values(table, at, PATH_KEYS, others))

    def _by_node(self, given: Any, at: tuple[str, ...], key: Key) -> dict[int, float]:
        table = check_value(given, dict[str, Any], self._source.place(*at))
        values = {}
        for node, value in table.items():
            place = self._source.place(*at, node)
            if not _NODE.fullmatch(node):
                raise ConfigError(f"{place} is no node; expected 0, 1, …, of a server -1, -2, …")
            values[int(node)] = key.read(value, place)
        return values

    def _overrides(self, base: LinkPath) -> tuple[Override, ...]:
        source = self._source
        tables = check_value(source.data.get("links", []), list[Any], source.place("links"))
        return tuple(self._override(i, table, base) for i, table in enumerate(tables))

    def _override(self, i: int, given: Any, base: LinkPath) -> Override:
        table = dict(check_value(given, dict[str, Any], self._place("links", i)))
        sides = {}
        for name in ("between", "others"):
            place = self._place("links", i, name)
            if name not in table:
                raise ConfigError(f"{place} is missing; expected a list of nodes")
            sides[name] = tuple(check_value(table.pop(name), list[int], place))
        path = self._path(table, ("links", i), base, tuple(sides))
        return Override(path=path, **sides)

    def _place(self, *keys: str | int) -> str:
        """Return `file:line: key`, also for tables in a list of tables."""
        if keys[0] != "links" or ("links", keys[1]) in self._source.lines:
            return self._source.place(*keys)
        index = int(keys[1])
        written = ".".join((f"links[{index}]", *map(str, keys[2:])))
        line = f":{self._headers[index]}" if index < len(self._headers) else ""
        return f"{self._source.path}{line}: {written}"

    def _replayed(self, given: Any) -> dict[int, Sequence[float]]:
        place = self._source.place("compute", "replay")
        name = check_value(given, str, place)
        folder = self._source.path.parent / Path(name).expanduser()
        if not name or not folder.is_dir():
            raise ConfigError(f"{place} is {name!r}; expected the folder of a run")
        return replayed(folder)


def _headers(path: Path) -> list[int]:
    """Return the lines of the headers `[[links]]`."""
    lines = path.read_bytes().decode("utf-8-sig").splitlines()
    return [i + 1 for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*links\s*\]\]", line)]


def replayed(folder: Path) -> dict[int, Sequence[float]]:
    """Return how long each worker of a run took for each of its blocks, in seconds.

    A step of several blocks has the time of all of them in train.csv: each gets an even share.

    Raises:
        ConfigError: the run has no train.csv, or no block in it.
    """
    rows, batch = results.read_table(folder, "train"), results.read_job(folder).batch_size
    times: dict[int, list[float]] = {}
    for node, seconds, samples in zip(rows.node, rows.compute_s, rows.samples, strict=True):
        if blocks := math.ceil(samples / batch):
            times.setdefault(int(node), []).extend([float(seconds) / blocks] * blocks)
    if not times:
        raise ConfigError(f"{folder / 'train.csv'} has no block; expected one or more")
    for node, each in times.items():
        if not all(0 <= seconds < math.inf for seconds in each):
            raise ConfigError(f"{folder / 'train.csv'}: compute_s of node {node} is no time")
    return {node: tuple(each) for node, each in times.items()}


# Writing -------------------------------------------------------------------------------------


def write_network(model: NetworkModel, path: Path, comments: Sequence[str] = ()) -> None:
    """Write a network's file; `load_network` gives it back, each number to 12 digits.

    Args:
        model: the network; without replayed times, which belong to a run.
        path: a new file.
        comments: lines that go first.

    Raises:
        ConfigError: the file exists, cannot be written, or would have to hold replayed times.
    """
    if model.replayed_s:
        raise ConfigError(f"{path}: replayed times are not written; expected a network without")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(network_text(model, comments))
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already; nothing is ever overwritten") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def network_text(model: NetworkModel, comments: Sequence[str] = ()) -> str:
    """Return a network as its file has it."""
    compute = _pairs(model, COMPUTE_KEYS)
    if model.block_s is not None:
        compute = [pair for pair in compute if not pair.startswith("gflops ")]
    if model.slow:
        pairs = ", ".join(f"{node} = {_value(factor)}" for node, factor in model.slow.items())
        compute.append(f"stragglers = {{{pairs}}}")
    speed = f"mbit_per_s = {_value(SPEED.written(model.bytes_per_s))}"
    nodes = [f"{node} = {_value(SPEED.written(s))}" for node, s in model.nodes_bytes_per_s.items()]
    parts = [
        *(f"# {line}".rstrip() for line in comments),
        f"name = {json.dumps(model.name, ensure_ascii=False)}",
        *_table("[link]", [*_pairs(model.path, PATH_KEYS), speed]),
        *(line for override in model.overrides for line in _links(override)),
        *(_table("[nodes]", nodes) if nodes else ()),
        *_table("[processor]", _pairs(model, PROCESSOR_KEYS)),
        *_table("[compute]", compute),
    ]
    return "\n".join(parts) + "\n"


def _table(header: str, pairs: Sequence[str]) -> list[str]:
    return ["", header, *pairs]


def _links(override: Override) -> list[str]:
    sides = {"between": override.between, "others": override.others}
    lists = [f"{name} = {sorted(nodes)}" for name, nodes in sides.items()]
    return _table("[[links]]", [*lists, *_pairs(override.path, PATH_KEYS)])


def _pairs(owner: NetworkModel | LinkPath, keys: Mapping[str, Key]) -> list[str]:
    """Return `key = value` for each key whose field is not None."""
    values = {name: getattr(owner, key.field) for name, key in keys.items()}
    return [
        f"{name} = {_value(keys[name].written(value))}"
        for name, value in values.items()
        if value is not None
    ]


def _value(number: float) -> str:
    """Return a number as TOML has it, without digits that only say how it was computed."""
    return f"{number:.12g}" if isinstance(number, float) else str(number)
