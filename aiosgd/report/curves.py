"""Tables of many rows -> the few numbers that a chart draws; nothing that sticks out is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from aiosgd.report.run import Run, Table

Floats: TypeAlias = npt.NDArray[np.float64]
By: TypeAlias = Literal["step", "time", "bytes"]

BYS: tuple[By, ...] = ("step", "time", "bytes")
POINTS = 400
FAR = 8
_HUGE = 1e300


@dataclass(frozen=True)
class Curve:
    """A line and the band around it: mean, smallest and largest of the rows at each x."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def reduce(x: Floats, y: Floats, most: int = POINTS) -> Curve:
    """Gather rows at so many places at most; values that are not finite count as absent.

    Where there are more, rows fall into intervals of the same width: a spike in one of them is an
    end of the band there.
    """
    finite = np.isfinite(x) & _can_be_drawn(y)
    order = np.argsort(x[finite], kind="stable")
    x, y = x[finite][order], y[finite][order]
    if not len(x):
        return Curve(x, y, y, y)
    starts = np.flatnonzero(np.diff(_places(x, most), prepend=-1))
    counts = np.diff(starts, append=len(x))
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    # of the halves, so that their sum is finite, too; rounding never leaves the band
    mean = np.clip(np.add.reduceat(y / counts.repeat(counts), starts), low, high)
    return Curve(np.add.reduceat(x / counts.repeat(counts), starts), mean, low, high)


def _can_be_drawn(values: Floats) -> npt.NDArray[np.bool_]:
    """Tell which values are numbers, and so small that an axis of them has ends."""
    return np.abs(values) < _HUGE


def _places(x: Floats, most: int) -> npt.NDArray[np.int64]:
    """Return for each of ascending values the place that it goes to, ascending from 0."""
    values, places = np.unique(x, return_inverse=True)
    if len(values) <= most:
        return np.asarray(places, np.int64)
    share = (x - x[0]) / (x[-1] - x[0])
    return np.asarray(np.minimum(share * most, most - 1), np.int64)


def training(run: Run, column: Literal["loss", "accuracy"], by: By, most: int = POINTS) -> Curve:
    """Return a column of train.csv over all workers.

    By step: of each worker's own. By time and by bytes there are as many places as by step, so
    that each has a row of most workers.
    """
    steps = len(np.unique(run.train.step))
    return reduce(_positions(run, by), run.train[column], min(most, max(steps, 1)))


def _positions(run: Run, by: By) -> Floats:
    train = run.train
    if by == "step":
        return np.asarray(train.step + 1.0)
    if by == "time":
        return np.asarray(train.time_s, float)
    return sent_by(run, train.time_s)


def sent_by(run: Run, times: Floats) -> Floats:
    """Return how many bytes all workers together had sent by some times, as train.csv has it."""
    train = run.train[np.isfinite(run.train.time_s)]
    order = np.argsort(train.time_s, kind="stable")
    sent = np.concatenate([[0.0], np.cumsum(train.bytes_sent[order], dtype=float)])
    return np.asarray(sent[np.searchsorted(train.time_s[order], times, side="right")])


def testing(run: Run, column: Literal["loss", "accuracy"], by: By) -> Curve:
    """Return a column of eval.csv over all workers; places are epochs, whatever it is by."""
    rows = run.eval
    return _moved(run, reduce(rows.epoch + 1.0, rows[column]), rows, by)


def apart(run: Run, by: By) -> Curve:
    """Return the consensus distance: its mean, and the largest as the band's end.

    Epochs that a single worker has ended say nothing, and are left out.
    """
    rows = run.consensus[run.consensus.workers > 1]
    mean, most = (reduce(rows.epoch + 1.0, np.asarray(rows[n], float)) for n in ("mean", "max"))
    if len(mean.x) != len(most.x):
        most = mean
    return _moved(run, Curve(mean.x, mean.mean, mean.low, most.high), run.eval, by)


def _moved(run: Run, curve: Curve, rows: Table, by: By) -> Curve:
    """Return a curve over epochs as one over the mean time, or the bytes, of their ends."""
    if by == "step" or not len(rows):
        return curve
    times = reduce(rows.epoch + 1.0, np.asarray(rows.time_s, float), len(rows))
    # workers that end early leave the mean of the others, which may be earlier
    x = np.maximum.accumulate(np.interp(curve.x, times.x, times.mean))
    if by == "bytes":
        x = sent_by(run, x)
    return Curve(x, curve.mean, curve.low, curve.high)


def are_far_apart(found: Sequence[Curve]) -> bool:
    """Tell whether some curves would have no room on an axis that is made for the others."""
    ends = [float(curve.x[-1]) for curve in found if len(curve.x) and curve.x[-1] > 0]
    return bool(ends) and max(ends) > FAR * min(ends)


def behind_zero(curve: Curve) -> Curve:
    """Return what a logarithmic x axis can show of a curve."""
    fits = curve.x > 0
    return Curve(curve.x[fits], curve.mean[fits], curve.low[fits], curve.high[fits])


def lacking(run: Run, column: Literal["loss", "accuracy"]) -> int:
    """Return how many rows of train.csv have no finite value there."""
    return int(np.count_nonzero(~_can_be_drawn(run.train[column])))


# Timelines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """What a worker's time was for, in intervals of the same width; each adds up to 1 at most.

    Attributes:
        name: whose it is.
        compute, wait, rest: shares of each interval.
        totals: shares of the whole time that it trained.
    """

    name: str
    compute: Floats
    wait: Floats
    rest: Floats
    totals: tuple[float, float, float]


def timeline(rows: Table, name: str, end: float, intervals: int) -> Shares:
    """Return what a worker's time was for.

    From the end of one step to the end of the next goes first whatever is neither computing nor
    waiting, then computing, then waiting; what falls into an interval adds up there.

    Args:
        rows: the worker's, of train.csv.
        name: the worker's.
        end: of the last interval, in seconds; the first begins at 0.
        intervals: how many.
    """
    rows = rows[np.isfinite(rows.time_s)]
    order = np.argsort(rows.time_s, kind="stable")
    length = np.diff(rows.time_s[order], prepend=0.0)
    wait = np.clip(np.nan_to_num(rows.wait_s[order]), 0, length)
    compute = np.clip(np.nan_to_num(rows.compute_s[order]), 0, length - wait)
    spent = np.stack([length - wait - compute, compute, wait], axis=1)
    rest, compute, wait = _spread(spent, np.linspace(0, end, intervals + 1))
    totals = spent.sum(axis=0) / max(float(spent.sum()), 1e-300)
    return Shares(name, compute, wait, rest, (float(totals[1]), float(totals[2]), float(totals[0])))


def _spread(spent: Floats, edges: Floats) -> list[Floats]:
    """Spread times, one kind per column and one after the other, over intervals: their shares."""
    knots = np.concatenate([[0.0], np.cumsum(spent.ravel())])
    shares = []
    for column in range(spent.shape[1]):
        own = np.zeros_like(spent)
        own[:, column] = spent[:, column]
        total = np.concatenate([[0.0], np.cumsum(own.ravel())])
        shares.append(np.diff(np.interp(edges, knots, total)) / np.diff(edges))
    return shares


def average(name: str, parts: Sequence[Shares]) -> Shares:
    """Return the mean of several timelines."""

    def mean(of: str) -> Any:
        return np.mean([getattr(part, of) for part in parts], axis=0)

    return Shares(name, mean("compute"), mean("wait"), mean("rest"), tuple(mean("totals")))


# Distributions -------------------------------------------------------------------------------


def staleness(run: Run) -> Floats:
    """Return the staleness of all results; one that is ahead counts as 0."""
    values = run.train.staleness
    return np.asarray(np.maximum(values[np.isfinite(values)], 0))


def bins(largest: float, most: int = 16) -> list[tuple[int, int]]:
    """Return ranges of whole numbers (first, last) from 0 to the largest, of equal widths."""
    width = int(largest) // most + 1
    return [(low, low + width - 1) for low in range(0, int(largest) + 1, width)]


def histogram(values: Floats, ranges: Sequence[tuple[int, int]]) -> Floats:
    """Return the share of values in each range of whole numbers."""
    edges = [low - 0.5 for low, _ in ranges] + [ranges[-1][1] + 0.5]
    counts = np.histogram(np.round(values), edges)[0]
    return np.asarray(counts / max(len(values), 1), float)
