"""What the nodes of a cluster are like, measured, as a network that jobs can be simulated on.

Links are measured from here to each node; those between nodes are taken to be like them: as slow
as the slower of their two ends. Everything else comes from short jobs: how long a block takes on
nodes that have a core each, and what an exchange takes beyond what links and processors explain.

`measure` speaks to the nodes, `fit` turns what it found into a network.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiosgd.bench.jobs import STEP_JOB, WARM_UP, Site, blank_job
from aiosgd.bench.rows import Note, machine
from aiosgd.bench.wire import (
    Target,
    cpu_s,
    payload,
    round_trips,
    send_arrays,
    send_messages,
    targets_of,
)
from aiosgd.errors import ClusterError
from aiosgd.runtime.config import Cluster, make_job
from aiosgd.runtime.executor import INLINE_LIMIT
from aiosgd.runtime.probe import Prober, probing
from aiosgd.runtime.simulation.compare import figures, predict
from aiosgd.runtime.simulation.network import NetworkModel, Override
from aiosgd.runtime.simulation.network import Path as LinkPath
from aiosgd.runtime.simulation.world import FLOPS_PER_WEIGHT
from aiosgd.runtime.workload import load

SMALL, LARGE = 1_000_000, 10_000_000
"""Bytes of the arrays that tell a link's speed: what the difference takes, nothing else does."""
ROUND_TRIPS, PIPELINED = 1_000, 20_000
SMALL_TRANSFERS, LARGE_TRANSFERS = 20, 8
ALIKE = 1.25
"""Nodes that differ by less than this factor are taken to be alike: so much is noise."""
LEAST_JITTER = 1e-3
"""Seconds; a round trip that varies by less does so for reasons that are no network's."""
PATIENCE = 120.0
"""Seconds within which a probe must be over."""
BLOCK_STEPS = 300


# What is measured ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """A link from here to a node; medians, in seconds.

    Attributes:
        over: `tcp` or `unix`.
        round_trip_s: of an empty message and its answer.
        jitter_s: by how much the slowest round trips but one in ten are above the fastest such.
        trip_cpu_s: processor time of both ends for it.
        small_s, large_s: of an array of 1 and 10 MB until the node says that it has it.
        small_cpu_s, large_cpu_s: processor time of both ends for it.
        row_s: of a message among many in a row.
        row_cpu_s: processor time of both ends for it.
    """

    node: int
    over: str
    round_trip_s: float
    trip_cpu_s: float
    jitter_s: float
    small_s: float
    large_s: float
    small_cpu_s: float
    large_cpu_s: float
    row_s: float
    row_cpu_s: float


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """A job that exchanges nothing; medians, in seconds.

    Attributes:
        size: parameters of its model.
        samples: of a block.
        compute_s: worker -> its time of a block.
        step_s: between two steps.
        epoch_s: between two steps with an evaluation between; NaN if there was none.
    """

    size: int
    samples: int
    compute_s: Mapping[int, float]
    step_s: float
    epoch_s: float

    @property
    def typical_s(self) -> float:
        """The time of a block on a typical worker."""
        return statistics.median(self.compute_s.values())

    @property
    def is_threaded(self) -> bool:
        """Whether its blocks are too long for the event loop."""
        return self.typical_s > INLINE_LIMIT


@dataclass(frozen=True, kw_only=True)
class ExchangeFigures:
    """A job of two workers that exchange all they compute.

    Attributes:
        options: of the job.
        messages: that each worker sends to the other in a step.
        step_s: median time between two steps.
    """

    options: Mapping[str, Any]
    messages: int
    step_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was measured.

    Attributes:
        cores: that all nodes share, being on this machine; None if they are on others.
        blocks: `digits`, `whole`, `part`, `large` and `thread`, see `_BLOCKS`.
        exchanges: `whole`, with one message to each worker and step, `parts` with several, and
            a `large` one, which is a test; none if there is but one worker.
    """

    links: Sequence[LinkFigures]
    cores: int | None
    blocks: Mapping[str, BlockFigures]
    exchanges: Mapping[str, ExchangeFigures]


# Measuring -----------------------------------------------------------------------------------


async def measure(place: Site, note: Note, *, unix: bool = True, rounds: int = 3) -> Measured:
    """Measure a cluster's links and machines; takes about a minute.

    Args:
        place: the nodes; what the cluster sets for its jobs does not count.
        note: told how far it is.
        unix: whether jobs use unix sockets within a machine, see `[wire] unix`.
        rounds: how often each thing is measured; medians of them count.

    Raises:
        ClusterError: a node cannot be reached or measured.
        JobFailedError: one of the jobs failed.
    """
    # the cluster's own defaults are for other jobs than these
    place = dataclasses.replace(place, cluster=dataclasses.replace(place.cluster, job=()))
    targets, count = targets_of(place.cluster), len(place.cluster.workers)
    nodes = [i if i < count else count - 1 - i for i in range(len(targets))]
    links = []
    for node, target in zip(nodes, targets, strict=True):
        note(f"the link to {target.address}")
        links.append(await _link(node, target, rounds, unix=unix))
    cores = cores_shared(targets)
    alone = count if cores is None else min(count, cores)
    blocks = await _blocks(place, note, alone, rounds, _threads(cores, len(targets)))
    exchanges = await _exchanges(place, note, rounds, unix=unix) if count > 1 else {}
    return Measured(links=links, cores=cores, blocks=blocks, exchanges=exchanges)


def cores_shared(targets: Sequence[Target]) -> int | None:
    """Return the number of cores here if all nodes are on this machine, else None."""
    hosts = {target.address.host for target in targets}
    is_here = all(host in {"localhost", "::1"} or host.startswith("127.") for host in hosts)
    return len(os.sched_getaffinity(0)) if is_here else None


def _threads(cores: int | None, nodes: int) -> dict[str, Any]:
    """Return the BLAS threads that a job on all nodes would have, for jobs on fewer."""
    return {} if cores is None else {"threads": max(1, cores // nodes)}


async def _link(node: int, target: Target, rounds: int, *, unix: bool) -> LinkFigures:
    address, security = target.address, target.security
    try:
        async with asyncio.timeout(PATIENCE), probing(address, security=security, unix=unix) as it:
            about = await it.ask({"about": None})
            if about["job"]:
                raise ClusterError(f"{address} is busy with job {about['job']}; wait for its end")
            return await _probe(node, it, rounds)
    except TimeoutError:
        raise ClusterError(f"{address}: to measure its link took over {PATIENCE:g} s") from None


async def _probe(node: int, prober: Prober, rounds: int) -> LinkFigures:
    tiny, small, large = payload(4), payload(SMALL), payload(LARGE)
    await round_trips(prober, tiny, 50)
    await send_arrays(prober, large, 2)
    trips, trip_cpu_s = await _timed(prober, rounds, round_trips, tiny, ROUND_TRIPS)
    smalls, small_cpu_s = await _timed(prober, rounds, send_arrays, small, SMALL_TRANSFERS)
    larges, large_cpu_s = await _timed(prober, rounds, send_arrays, large, LARGE_TRANSFERS)
    row, row_cpu_s = await _timed(prober, rounds, send_messages, tiny, PIPELINED)
    low, high = np.quantile(trips, [0.1, 0.9])
    return LinkFigures(
        node=node,
        over=prober.link.over,
        round_trip_s=statistics.median(trips),
        trip_cpu_s=trip_cpu_s,
        jitter_s=float(high - low),
        small_s=statistics.median(smalls),
        large_s=statistics.median(larges),
        small_cpu_s=small_cpu_s,
        large_cpu_s=large_cpu_s,
        row_s=statistics.median(row),
        row_cpu_s=row_cpu_s,
    )


async def _timed(
    prober: Prober,
    rounds: int,
    send: Callable[[Prober, Any, int], Awaitable[list[float]]],
    array: Any,
    count: int,
) -> tuple[list[float], float]:
    """Return all times of some rounds, and the processor seconds of both ends for each array."""
    times: list[float] = []
    used: list[float] = []
    for _ in range(rounds):
        before = await cpu_s(prober)
        times += await send(prober, array, count)
        used.append((await cpu_s(prober) - before) / count)
    return times, statistics.median(used)


_DIGITS: Mapping[str, Any] = {"epochs": 100}
_LARGE_BLOCK = 2_500_000
_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "digits": {**_DIGITS, "compute": {"policy": "inline"}},
    "thread": {**_DIGITS, "compute": {"policy": "thread"}},
    "whole": {**STEP_JOB, "epochs": 100},
    "part": {**STEP_JOB, "batch_size": 8, "epochs": 100},
    "large": blank_job(4 * _LARGE_BLOCK, 1, BLOCK_STEPS // 5),
}
"""Jobs that exchange nothing: a tiny model on the event loop and in a thread, a larger one with
whole and with small batches, and one that is nothing but large."""


async def _blocks(
    place: Site, note: Note, workers: int, rounds: int, threads: Mapping[str, int]
) -> dict[str, BlockFigures]:
    blocks = {}
    for name, options in _BLOCKS.items():
        note(f"blocks: {name}")
        compute = {**options.get("compute", {}), **threads}
        steps = options.get("max_steps", BLOCK_STEPS)
        job = {**options, "codec": "local", "max_steps": steps, "compute": compute}
        blocks[name] = await _block(place, {**job, "workers": workers}, rounds)
    return blocks


async def _block(place: Site, options: Mapping[str, Any], rounds: int) -> BlockFigures:
    samples = _enough_samples(options)
    outcomes = [await place.run(**{**options, **samples}) for _ in range(rounds)]
    rows = [outcome.train[outcome.train.step >= WARM_UP] for outcome in outcomes]
    workers = np.unique(rows[0].node)
    times = {
        int(node): statistics.median(float(np.median(r.compute_s[r.node == node])) for r in rows)
        for node in workers
    }
    return BlockFigures(
        size=sum(array.size for array in outcomes[0].parameters.values()),
        samples=int(rows[0].samples[0]),
        compute_s=times,
        step_s=statistics.median(figures(r, 0, 0).step_s for r in rows),
        epoch_s=statistics.median(map(_epoch_s, rows)),
    )


def _epoch_s(rows: Any) -> float:
    """Return the median time between the last step of an epoch and the first of the next."""
    own = rows[rows.node == 0]
    pauses = np.diff(own.time_s)[np.diff(own.epoch) > 0]
    return float(np.median(pauses)) if len(pauses) else math.nan


def _enough_samples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a job of `blank`, which has a sample for each step and worker."""
    if options.get("model") != "blank":
        return {}
    samples = options["workers"] * options["max_steps"]
    return {"dataset_params": {**options["dataset_params"], "samples": max(2, samples)}}


_EXCHANGES: Mapping[str, Mapping[str, Any]] = {
    "whole": {**_DIGITS, "max_steps": BLOCK_STEPS},
    "parts": {**_DIGITS, "max_steps": BLOCK_STEPS, "granularity": "tensor"},
    "large": blank_job(LARGE, 2, BLOCK_STEPS // 10),
}


async def _exchanges(
    place: Site, note: Note, rounds: int, *, unix: bool
) -> dict[str, ExchangeFigures]:
    found = {}
    for name, options in _EXCHANGES.items():
        note(f"exchange: {name}")
        job = {**options, "codec": "plain", "workers": 2, "wire": {"unix": unix}}
        outcomes = [await place.run(**job) for _ in range(rounds)]
        rows = [outcome.train[outcome.train.step >= WARM_UP] for outcome in outcomes]
        groups = len(outcomes[0].parameters) if "granularity" in options else 1
        step_s = statistics.median(figures(one, 0, 0).step_s for one in rows)
        found[name] = ExchangeFigures(options=job, messages=groups, step_s=step_s)
    return found


# What follows from it ------------------------------------------------------------------------


def fit(measured: Measured, name: str = "calibrated") -> NetworkModel:
    """Return the network that what was measured speaks for; call it where no event loop runs."""
    links = measured.links
    model = NetworkModel(
        name=name,
        path=_path(links),
        overrides=_overrides(links),
        bytes_per_s=1 / statistics.median(map(_wire_byte_s, links)),
        nodes_bytes_per_s=_slow_cards(links),
        message_s=statistics.median(map(_message_s, links)),
        byte_s=statistics.median(map(_byte_s, links)),
        cores=measured.cores,
        **_computing(measured.blocks),
    )
    return _with_codec(model, measured.exchanges)


def _message_s(link: LinkFigures) -> float:
    """Return the processor time of one end for one message.

    One that comes alone takes longer, for it wakes its receiver: but those that come with it or
    right after it do not again, so the waking counts as latency.
    """
    return min(link.row_cpu_s / 2, link.round_trip_s / 4)


def _wire_byte_s(link: LinkFigures) -> float:
    return max(_slope(link.round_trip_s, link.small_s, link.large_s), 1e-15)


def _byte_s(link: LinkFigures) -> float:
    return max(0.0, _slope(link.trip_cpu_s, link.small_cpu_s, link.large_cpu_s)) / 2


def _slope(empty: float, small: float, large: float) -> float:
    """Return seconds per byte: the mean of below and above 1 MB, for caches end between."""
    return ((small - empty) / SMALL + (large - small) / (LARGE - SMALL)) / 2


def _latency_s(link: LinkFigures) -> float:
    return max(0.0, link.round_trip_s - _jitter_s(link) - 4 * _message_s(link)) / 2


def _jitter_s(link: LinkFigures) -> float:
    """Return the jitter of one way; two ways have it twice, and their sum its range."""
    return link.jitter_s / 2 if link.jitter_s >= LEAST_JITTER else 0.0


def _path(some: Sequence[LinkFigures]) -> LinkPath:
    """Return a path like those to some nodes."""
    return LinkPath(
        latency_s=statistics.median(map(_latency_s, some)),
        jitter_s=statistics.median(map(_jitter_s, some)),
    )


def _overrides(links: Sequence[LinkFigures]) -> tuple[Override, ...]:
    """Return the links of nodes that are further away than most; the furthest last, as it counts."""
    typical = statistics.median(link.round_trip_s for link in links)
    far = [link for link in links if link.round_trip_s > ALIKE * typical + LEAST_JITTER]
    nodes = tuple(link.node for link in links)
    return tuple(
        Override(between=(link.node,), others=nodes, path=_path([link]))
        for link in sorted(far, key=lambda link: link.round_trip_s)
    )


def _slow_cards(links: Sequence[LinkFigures]) -> dict[int, float]:
    typical = statistics.median(map(_wire_byte_s, links))
    return {
        link.node: 1 / _wire_byte_s(link)
        for link in links
        if not 1 / ALIKE <= _wire_byte_s(link) / typical <= ALIKE
    }


def _computing(blocks: Mapping[str, BlockFigures]) -> dict[str, Any]:
    """Return how long a block takes: a + b · size + c · size · samples, fitted to four of them."""
    digits, whole, part, large = (blocks[name] for name in ("digits", "whole", "part", "large"))
    more = FLOPS_PER_WEIGHT * whole.size * (whole.samples - part.samples)
    flop_s = max(whole.typical_s - part.typical_s, 1e-9) / more
    rest, tiny = (
        max(0.0, one.typical_s - FLOPS_PER_WEIGHT * one.size * one.samples * flop_s)
        for one in (large, digits)
    )
    weight_s = max(0.0, rest - tiny) / (large.size - digits.size)
    step_s = max(0.0, digits.step_s - digits.typical_s)
    in_thread = blocks["thread"]
    hop_s = max(0.0, in_thread.step_s - in_thread.typical_s - step_s)
    # codec `local` makes its result of its own block alone; caches end between the two sizes
    codec_byte_s = statistics.mean(
        max(0.0, one.step_s - one.typical_s - step_s - (hop_s if one.is_threaded else 0.0))
        / (4 * one.size)
        for one in (whole, large)
    )
    return {
        "flops": 1 / flop_s,
        "weight_s": weight_s,
        "least_s": max(0.0, tiny - weight_s * digits.size),
        "step_s": step_s,
        "hop_s": hop_s,
        "codec_byte_s": codec_byte_s,
        # the result of the step before is applied in a thread, too
        "evaluation_s": max(0.0, digits.epoch_s - digits.step_s - 2 * hop_s),
        "slow": {
            node: seconds / whole.typical_s
            for node, seconds in whole.compute_s.items()
            if not 1 / ALIKE <= seconds / whole.typical_s <= ALIKE
        },
    }


def _with_codec(model: NetworkModel, exchanges: Mapping[str, ExchangeFigures]) -> NetworkModel:
    """Add what exchanges take longer than links and processors explain.

    Further messages in a step tell what a codec takes for one; the rest is the waking of who waits.
    """
    if not exchanges:
        return model
    whole, parts = exchanges["whole"], exchanges["parts"]
    unexplained = (
        parts.step_s - whole.step_s - simulated_s(model, parts) + simulated_s(model, whole)
    )
    # a worker's codec is handed a further block for each further message
    message_s = max(0.0, unexplained / (parts.messages - whole.messages) / 2)
    model = dataclasses.replace(model, codec_message_s=message_s)
    return dataclasses.replace(model, wake_s=max(0.0, whole.step_s - simulated_s(model, whole)))


def simulated_s(model: NetworkModel, exchange: ExchangeFigures) -> float:
    """Return how long a step of an exchange takes in the simulation."""
    job = make_job(exchange.options)
    return predict(load(job, 2, Path()), 2, 0, model).step_s


# What is written -----------------------------------------------------------------------------


def comments(measured: Measured, names: Sequence[str]) -> list[str]:
    """Return what a network's file says of its origin.

    Args:
        measured: what the network was made from.
        names: the nodes' addresses, in the order of the links.
    """
    lines = [f"measured from {machine()}"]
    lines += [
        f"{name} (node {link.node}), {link.over}: round trip {link.round_trip_s * 1e3:.3g} ms, "
        f"1 MB {link.small_s * 1e3:.3g} ms, 10 MB {link.large_s * 1e3:.3g} ms, "
        f"{1 / link.row_s:,.0f} messages/s in a row"
        for name, link in zip(names, measured.links, strict=True)
    ]
    lines.append("Links between nodes were not measured: they are taken to be like these.")
    if measured.cores is not None:
        lines.append("All nodes are on this machine: they share its cores.")
    lines += [
        f"{name}: a block of {block.samples} samples and {block.size:,} parameters "
        f"{block.typical_s * 1e3:.3g} ms, a step without exchange {block.step_s * 1e3:.3g} ms"
        for name, block in measured.blocks.items()
    ]
    lines += [
        f"exchange {name} between two workers: a step {one.step_s * 1e3:.3g} ms"
        for name, one in measured.exchanges.items()
    ]
    if not measured.exchanges:
        lines.append("One worker: what codecs take was not measured; it counts as nothing.")
    return lines


def addresses(cluster: Cluster) -> list[str]:
    """Return the names of a cluster's nodes as `comments` takes them."""
    return [str(address) for address in (*cluster.workers, *cluster.servers)]
