"""What a job leaves: what its nodes send back, checked, and the run folder that is made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aiosgd.codecs.base import Array, Vector
from aiosgd.errors import RemoteProtocolError
from aiosgd.plugins.registry import check_value, error_text, make_dataclass
from aiosgd.plugins.trackers import Csv
from aiosgd.runtime import archive, results
from aiosgd.runtime.job import node_name
from aiosgd.runtime.learner import SKETCH, Sketch
from aiosgd.runtime.results import CONSENSUS, EVAL, RECORD, TRAIN, Rows, Summary
from aiosgd.runtime.workload import Workload

TRACEBACK_LINES = 40
"""Of a traceback that came from a node, its last lines: those say what went wrong."""
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", re.ASCII)
"""How a line of a node's log begins, unless it goes on with the one before."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One node's figures of a job.

    Attributes:
        train_s: seconds from the first step to the end of the last.
        compute_s, wait_s: seconds of these that a worker computed, and waited for the exchange.
        late: messages that came too late for their step.
        bytes_sent, bytes_received: on the wire.
        skipped: blocks and results that were not finite and were left out.
    """

    samples: int
    train_s: float
    late: int
    bytes_sent: int
    bytes_received: int
    skipped: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < archive.MOST:
                raise ValueError(f"{name} is {value!r}; expected 0 to {archive.MOST:g}")


@dataclass(frozen=True)
class Collected:
    """What came back from one node; of one that never trained, the log alone."""

    train: Rows
    evaluations: Rows
    log: bytes
    weights: Vector | None
    sketches: Sketch
    figures: Figures | None
    record: Rows | None
    state: Mapping[str, Array]


@dataclass
class Outcome:
    """A job that was run: its folder and what is in it.

    Attributes:
        train, eval, consensus: the rows of train.csv, eval.csv and consensus.csv.
        parameters: name -> array, in the model's order, and then what else the model remembers;
            model.safetensors has the same.
        tracker_errors: tracker -> what went wrong with it; the job is done all the same.
    """

    folder: Path
    summary: Summary
    train: np.recarray[Any, Any]
    eval: np.recarray[Any, Any]
    consensus: np.recarray[Any, Any]
    parameters: dict[str, Vector]
    tracker_errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The final `loss` and `accuracy` on the test set."""
        return self.summary.metrics


@dataclass(frozen=True, kw_only=True)
class End:
    """How a job ended: its state and the reason, how long it took, its last checkpoint, on what."""

    state: Literal["done", "failed", "cancelled"]
    error: str
    wall_s: float
    checkpoint: int | None = None
    simulated: dict[str, Any] | None = None


class Harvest:
    """What the nodes of one job leave, and the run folder that it goes into.

    Args:
        folder: the run folder; it exists.
        load: the job's plugins.
        nodes: node id -> address of all nodes, as users know it.
        log: the submitter's log.

    Attributes:
        collected: what each node has sent so far.
        source: the worker whose weights are the model: 0, or if that is lost, the next.
        lost: workers that the job went on without, and why.
        unwritten: what could not be written, a sentence each.
    """

    def __init__(
        self, folder: Path, load: Workload, nodes: Mapping[int, object], log: logging.Logger
    ) -> None:
        self.collected: dict[int, Collected] = {}
        self.unwritten: list[str] = []
        self.source = 0
        self.lost: dict[int, str] = {}
        self._folder = folder
        self._load = load
        self._nodes = nodes
        self._log = log

    def keep(self, node: int, content: Mapping[str, Any], *, whole: bool) -> None:
        """Keep what a node left; of one that is aborted after that, only its log is new.

        Args:
            node: who sent it.
            content: its report.
            whole: whether the node has finished, so that nothing may be missing.

        Raises:
            RemoteProtocolError, ConfigError: something is missing, of another type or shape.
        """
        if whole:
            _check_complete(
                node, content, recorded=self._load.job.record, model=node == self.source
            )
        new, old = unpack(node, content, self._load.model.size), self.collected.get(node)
        if not whole and old is not None:
            new = dataclasses.replace(old, log=new.log)
        self.collected[node] = new

    def error(self, reason: str) -> str:
        """Return why the job did not end well, with what could not be written; empty if it did."""
        return "; ".join(text for text in (reason, *self.unwritten) if text)

    def tracebacks(self) -> list[str]:
        """Return where code failed on nodes, as their logs have it; the last lines of each."""
        found = ((node, traceback_in(part.log)) for node, part in sorted(self.collected.items()))
        return [f"traceback of {node_name(node)}:\n{text}" for node, text in found if text]

    def write(self, job_id: str, end: End) -> Outcome:
        """Write everything that came back, the summary last; it is always written.

        Args:
            job_id: the job.
            end: how it ended; it becomes a failure if something cannot be written.
        """
        train = _stack(TRAIN, [part.train for part in self._in_order()])
        evaluations = _stack(EVAL, [part.evaluations for part in self._in_order()])
        own = [part.sketches[: len(part.evaluations)] for part in self._in_order()]
        consensus = distances(evaluations.epoch, own)
        parameters: dict[str, Vector] = {}
        csv = Csv(Csv.Params(), self._folder)
        try:
            with self._collecting_errors("the model"):
                parameters = self._write_model()
            tables = {"train": train, "eval": evaluations, "consensus": consensus}
            for table, rows in tables.items():
                with self._collecting_errors(f"{table}.csv"):
                    csv.write(table, rows)
            for node, part in sorted(self.collected.items()):
                with self._collecting_errors(f"the log of {node_name(node)}"):
                    log = part.log.decode(errors="replace")
                    results.write_node_log(self._folder, node, log)
                with self._collecting_errors(f"the record of {node_name(node)}"):
                    if part.record is not None:
                        results.write_record(self._folder / "nodes" / str(node), part.record)
        finally:
            summary = self._summarise(job_id, end, train, evaluations, consensus)
            with self._collecting_errors("the summary"):
                results.write_summary(self._folder, summary)
        return Outcome(
            folder=self._folder,
            summary=summary,
            train=train,
            eval=evaluations,
            consensus=consensus,
            parameters=parameters,
        )

    @contextlib.contextmanager
    def _collecting_errors(self, what: str) -> Iterator[None]:
        """Note what could not be written, and go on: the rest is worth having."""
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever is wrong, the rest is worth having
            text = f"{what} could not be written: {error_text(error)}"
            self.unwritten.append(text)
            self._log.error(text)

    def _write_model(self) -> dict[str, Vector]:
        """Write the newest weights that were sent, if any, and return them by name."""
        part, shapes = self.collected.get(self.source), self._load.model.shapes
        if part is None or part.weights is None:
            return {}
        results.write_model(self._folder, part.weights, shapes, part.state)
        return {**results.named_parameters(part.weights, shapes), **part.state}

    def _in_order(self) -> list[Collected]:
        return [
            self.collected[node]
            for node in sorted(self._nodes)
            if node >= 0 and node in self.collected
        ]

    def _summarise(
        self, job_id: str, end: End, train: Any, evaluations: Any, consensus: Any
    ) -> Summary:
        figures = {node: part.figures for node, part in self.collected.items() if part.figures}
        samples = sum(one.samples for one in figures.values())
        train_s = max((one.train_s for one in figures.values()), default=0.0)
        return Summary(
            job_id=job_id,
            state="failed" if end.state == "done" and self.unwritten else end.state,
            error=self.error(end.error) or None,
            metrics=_final(evaluations, self.source),
            nodes=len(self._nodes),
            steps=int(train.step.max()) + 1 if len(train) else 0,
            epochs=int(train.epoch.max()) + 1 if len(train) else 0,
            samples=samples,
            wall_s=end.wall_s,
            train_s=train_s,
            samples_per_s=samples / train_s if train_s else 0.0,
            bytes_sent=sum(one.bytes_sent for one in figures.values()),
            bytes_received=sum(one.bytes_received for one in figures.values()),
            consensus_distance=float(consensus["mean"][-1]) if len(consensus) else math.nan,
            staleness_mean=_of_finite(np.mean, np.maximum(train.staleness, 0)),
            staleness_max=_of_finite(np.max, np.maximum(train.staleness, 0)),
            per_node={
                node: {
                    "address": str(self._nodes[node]),
                    **dataclasses.asdict(one),
                    **_final(evaluations, node),
                }
                for node, one in sorted(figures.items())
            },
            checkpoint=end.checkpoint,
            lost=dict(sorted(self.lost.items())),
            simulated=end.simulated,
        )


def traceback_in(log: bytes) -> str:
    """Return the first traceback of a node's log, from its last lines; empty if there is none.

    What a terminal would take for a command is replaced, for the log comes from another machine.
    """
    _, mark, rest = log.decode(errors="replace").partition(" ERROR Traceback ")
    if not mark:
        return ""
    lines = itertools.takewhile(lambda line: not LINE.match(line), rest.splitlines()[1:])
    plain = ["".join(c if c.isprintable() else "�" for c in line) for line in lines]
    return "\n".join(plain[-TRACEBACK_LINES:]).rstrip()


# What nodes send, checked -----------------------------------------------------------------------


def _check_complete(node: int, content: Mapping[str, Any], *, recorded: bool, model: bool) -> None:
    """Refuse a collection that lacks something; the weights come from one worker alone."""
    names = ["train", "evaluations", "figures"]
    names += ["sketches"] if node >= 0 else []
    names += ["weights"] if model else []
    names += ["record"] if recorded else []
    for name in names:
        if content.get(name) is None:
            raise RemoteProtocolError(f"{name} is missing")


def unpack(node: int, content: Mapping[str, Any], size: int) -> Collected:
    """Check what a node leaves; only its log is there in any case.

    Args:
        node: who sent it.
        content: the report.
        size: how many parameters the model has.

    Raises:
        RemoteProtocolError, ConfigError: something is missing, of another type or shape.
    """
    return Collected(
        _rows(TRAIN, content.get("train"), node),
        _rows(EVAL, content.get("evaluations"), node),
        _array(content.get("log"), "log", np.uint8).tobytes(),
        _weights(content.get("weights"), size),
        _sketches(content.get("sketches")),
        _figures(content.get("figures")),
        _record(content.get("record")),
        _state(content.get("model_state")),
    )


def _rows(dtype: np.dtype[Any], columns: Any, node: int) -> Rows:
    rows = Rows(dtype) if columns is None else Rows.from_columns(dtype, columns)
    if not (rows.array().node == node).all():
        raise RemoteProtocolError(f"column node names other nodes; expected {node} alone")
    return rows


def _record(columns: Any) -> Rows | None:
    return None if columns is None else Rows.from_columns(RECORD, columns)


def _weights(value: Any, size: int) -> Vector | None:
    return None if value is None else _array(value, "weights", np.float32, size)


def _state(value: Any) -> dict[str, Array]:
    if value is None:
        return {}
    state: dict[str, Array] = check_value(value, dict[str, Any], "model_state")
    for name, array in state.items():
        if not (type(name) is str and isinstance(array, np.ndarray) and array.dtype.kind in "biuf"):
            raise RemoteProtocolError(f"model_state.{name!s:.80} is no array of numbers")
    return state


def _sketches(value: Any) -> Sketch:
    if value is None:
        return np.empty((0, SKETCH))
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] != SKETCH:
        raise RemoteProtocolError(f"sketches is {value!r:.80}; expected rows of {SKETCH} numbers")
    sketches: Sketch = _array(value.reshape(-1), "sketches", np.float64).reshape(value.shape)
    return sketches


def _array(value: Any, name: str, dtype: type[np.generic], size: int | None = None) -> Any:
    """Return a vector of that type and, if given, size."""
    right = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == 1
    if right and (size is None or value.size == size):
        return value
    shown = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)
    length = "" if size is None else f" with {size} elements"
    raise RemoteProtocolError(f"{name} is {shown}; expected a {dtype.__name__} vector{length}")


def _figures(values: Any) -> Figures | None:
    if values is None:
        return None
    table = {str(key): v for key, v in check_value(values, dict[Any, Any], "figures").items()}
    figures: Figures = make_dataclass(Figures, table, "figures", "a node")
    return figures


# What is written -------------------------------------------------------------------------------


def _stack(dtype: Any, parts: Sequence[Rows]) -> Any:
    arrays = [part.array() for part in parts]
    joined = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    return joined.view(np.recarray)


def distances(epochs: npt.NDArray[np.int64], sketches: Sequence[Sketch]) -> Any:
    """Return the rows of consensus.csv; none if a worker's sketch is missing.

    Args:
        epochs: of each row of eval.csv.
        sketches: each worker's, in the order of these rows.
    """
    joined, rows = np.concatenate([np.empty((0, SKETCH)), *sketches]), Rows(CONSENSUS)
    for epoch in np.unique(epochs) if len(joined) == len(epochs) else ():
        of_epoch = joined[epochs == epoch]
        same = (of_epoch == of_epoch[0]).all()  # whatever their mean is rounded to
        apart = np.linalg.norm(of_epoch - of_epoch.mean(axis=0), axis=1) * (not same)
        rows.append(epoch, len(of_epoch), apart.mean(), apart.max())
    return rows.array()


def _of_finite(function: Callable[..., Any], values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if len(finite) else math.nan


def _final(evaluations: Any, node: int) -> dict[str, float]:
    own = evaluations[evaluations.node == node]
    if not len(own):
        return {}
    return {"loss": float(own.loss[-1]), "accuracy": float(own.accuracy[-1])}
