"""A case in memory: all nodes in one LocalCluster, in any order of delivery, in virtual time."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from aiosgd.check.case import Case
from aiosgd.check.story import Moment, Story, described, waits
from aiosgd.check.subject import Subject
from aiosgd.codecs.base import Array, Codec, Context, Vector, mean
from aiosgd.codecs.testing import Happening, LocalCluster, Sent
from aiosgd.errors import JobFailedError
from aiosgd.plugins.registry import error_text
from aiosgd.runtime.simulation.loop import LimitError, run_virtually

Values: TypeAlias = Callable[[Case, int, int], Vector]  # case, step, block -> value

# more messages per node, block and step than any exchange needs: what goes on has no end
MESSAGES = 40
ENDLESS = "and no end"
# callbacks of the loop per message, in a simulation with all its actors and links
CALLBACKS = 20
FEW = 1000
"""Elements of a vector that is cheap to keep: drawing it takes the time of setting up a generator."""
_VALUES, _INITIAL = 1, 2  # purposes of random numbers


@dataclass
class Run:
    """How a case went.

    Attributes:
        case: what was played.
        results: per step, worker -> result; what there is of them after an error.
        error: why it did not end well; empty if it did.
        stuck: whether nothing could happen any more.
        sent: everything that was sent.
        initial: the weights that all nodes started with.
        held: server -> the weights that it keeps, if it keeps any.
        owners: for each block the workers that compute it.
        context: worker 0's.
    """

    case: Case
    results: list[dict[int, Any]] = field(default_factory=list)
    error: str = ""
    stuck: bool = False
    sent: list[Sent] = field(default_factory=list)
    initial: Vector = field(default_factory=lambda: np.empty(0, np.float32))
    held: dict[int, Vector] = field(default_factory=dict)
    owners: tuple[tuple[int, ...], ...] = ()
    context: Context | None = None
    happened: list[Happening] = field(default_factory=list, repr=False)

    @functools.cached_property
    def story(self) -> Story:
        """Everything that happened, and at the end of what is stuck who waits for what."""
        moments = [_moment(time, one) for time, one in enumerate(self.happened)]
        if self.stuck:
            moments += waits(moments, self.case, len(moments))
        elif self.error:
            moments.append(_failure(self.error, moments))
        return moments

    @property
    def bits(self) -> list[dict[int, bytes]]:
        """The results' bits."""
        return [
            {worker: b"" if one is None else one.tobytes() for worker, one in step.items()}
            for step in self.results
        ]


def _moment(time: int, one: Happening) -> Moment:
    match one.kind:
        case "drop":
            assert one.peer is not None
            return Moment(time, "drop", one.peer, one.node, one.step, "came too late", one.number)
        case "update":
            label = f"block {one.what.id}: {described(one.what.value)}"
        case _:
            label = described(one.what)
    return Moment(time, one.kind, one.node, one.peer, one.step, label, one.number)


def _failure(error: str, moments: Story) -> Moment:
    last = moments[-1] if moments else None
    node, step = (last.node, last.step) if last else (0, 0)
    return Moment(len(moments), "fail", node, None, step, error)


def random_values(case: Case, step: int, block: int) -> Vector:
    """Return the value of a block: random numbers."""
    return _normal(case.size, case.seed, _VALUES, step, block)


def _normal(size: int, *key: int) -> Vector:
    return _few(size, key) if size <= FEW else _drawn(size, key)


def _drawn(size: int, key: tuple[int, ...]) -> Vector:
    values = np.random.default_rng(key).standard_normal(size, np.float32)
    values.setflags(write=False)
    return values


# a case's values are asked for again by each owner of a block, by its law, and by the next case
_few = functools.lru_cache(maxsize=4096)(_drawn)


def initial_weights(case: Case) -> Vector:
    """Return the weights that a case starts with: random numbers."""
    return _normal(case.size, case.seed, _INITIAL)


def play(subject: Subject, case: Case, values: Values = random_values) -> Run:
    """Let a case happen.

    Whatever goes wrong is in the run's `error`.
    """

    async def steps(cluster: LocalCluster) -> None:
        await cluster.run(lambda step, block: values(case, step, block), case.steps)

    return play_with(subject, case, steps)


def play_with(
    subject: Subject, case: Case, go: Callable[[LocalCluster], Coroutine[Any, Any, None]]
) -> Run:
    """Let a case happen whose blocks are given by `go`; see `play`."""
    run, most = Run(case, initial=initial_weights(case)), message_limit(case)
    taken: list[tuple[Any, Any]] = []  # results, and how they were when they were taken

    def witness(one: Happening) -> None:
        run.happened.append(one)
        if one.kind == "result":
            taken.append((one.what, np.array(one.what)))
        if len(run.happened) > most:
            raise LimitError(f"{most} messages, {ENDLESS}; the codec answers its own answers")

    async def main() -> None:
        cluster = _cluster(subject, case, run.initial, witness)
        run.results, run.sent = cluster.results, cluster.sent
        run.context = cluster.codecs[0].ctx
        run.owners = run.context.block_owners
        try:
            await go(cluster)
            await _drain(cluster)
            run.results = _as_arrays(cluster.results)
            run.held = _held(cluster)
        finally:
            cluster.stop()

    try:
        run_virtually(main(), events=CALLBACKS * most)
        run.error = _changed(subject, taken)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a codec may raise anything
        run.stuck = isinstance(error, JobFailedError)
        run.error = error_text(error)
    return run


def message_limit(case: Case) -> int:
    """Return how many messages and blocks a case has at most, if it has an end at all."""
    blocks = math.comb(case.workers, case.redundancy) * case.redundancy * case.steps
    parts = 10 * case.size * case.steps  # a codec may send element by element
    return len(case.nodes) * (MESSAGES * blocks + parts)


def _cluster(
    subject: Subject, case: Case, initial: Vector, witness: Callable[[Happening], None]
) -> LocalCluster:
    cluster = LocalCluster(
        subject.codec,
        workers=case.workers,
        servers=case.servers,
        server_codec=subject.server,
        redundancy=case.redundancy,
        mode=case.mode,
        exchange=case.exchange,
        params=subject.params,
        server_params=subject.server_params,
        initial=initial,
        topology=case.graph,
        compressor=case.make_compressor,
        seed=case.seed,
        schedule=case.schedule,
        witness=witness,
        steps=case.steps,
        shapes={"w": (case.size,)},
    )
    if case.mode == "sync":
        for worker in cluster.workers:
            _publish_once(cluster.codecs[worker])
    return cluster


def refusal(subject: Subject, case: Case) -> str:
    """Return why a codec does not start with a case's topology or compressor; empty if it does."""
    try:
        _cluster(subject, case, initial_weights(case), lambda _: None).stop()
    except ValueError as error:  # whatever else it raises, a check shows
        return str(error) if re.search("topology|compressor", str(error)) else ""
    except (Exception, SystemExit):  # noqa: BLE001 - a codec may raise anything
        return ""
    return ""


def _publish_once(codec: Codec) -> None:
    """Refuse a second result in a step, unless the codec says how it combines with the first."""
    set_result = codec.set_result

    def once(value: Any, operation: Callable[[Any, Any], Any] | None = None) -> None:
        if codec.is_done and operation is None:
            raise ValueError(
                f"set_result was called twice in step {codec.ctx.step}, and the results add up; "
                "give an operation if that is meant"
            )
        set_result(value, operation)

    codec.set_result = once  # type: ignore[method-assign]


async def _drain(cluster: LocalCluster) -> None:
    """Deliver what is still under way: a real job does so before it ends."""
    while pending := cluster.pending:
        await cluster.deliver(*pending[0])


def _as_arrays(results: list[dict[int, Any]]) -> list[dict[int, Any]]:
    return [
        {
            worker: None if result is None else np.asarray(result, np.float32)
            for worker, result in step.items()
        }
        for step in results
    ]


def _held(cluster: LocalCluster) -> dict[int, Vector]:
    """Return what those servers keep that are responsible for the vector."""
    codecs = {node: cluster.codecs[node] for node in cluster.servers}
    kept = {node: codec.weights() for node, codec in codecs.items() if codec.ctx.server == node}
    return {node: weights for node, weights in kept.items() if weights is not None}


def _changed(subject: Subject, taken: list[tuple[Any, Any]]) -> str:
    for result, copy in taken:
        if np.asarray(result).tobytes() != copy.tobytes():
            return f"codec {subject.codec.__name__} changed a result after it was published"
    return ""


def total(run: Run, worker: int) -> Array:
    """Return the sum of a worker's results, in double precision."""
    parts = [step[worker] for step in run.results if step[worker] is not None]
    whole: Array = np.sum([np.zeros(run.case.size), *parts], axis=0)
    return whole


def block_values(run: Run, values: Values, step: int) -> dict[int, Vector]:
    """Return the values of all blocks of a step."""
    return {block: values(run.case, step, block) for block in range(len(run.owners))}


def block_mean(run: Run, values: Values, step: int) -> Array:
    """Return the mean over all blocks of a step, in double precision."""
    blocks = block_values(run, values, step)
    return mean({block: value.astype(np.float64) for block, value in blocks.items()})
