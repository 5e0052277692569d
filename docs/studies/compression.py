"""What compressors cost and save: docs/compression.md's table and docs/compression.png.

Trains digits with every registered compressor, with and without error feedback, in simulations.

    pip install -e '.[plots]' && python docs/studies/compression.py --cache rows.jsonl

Rows that the cache has are not computed again: delete it when a compressor has changed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from threadpoolctl import threadpool_limits

import aiosgd
from aiosgd.errors import AiosgdError, ConfigError
from aiosgd.plugins.compressors.base import Compressor, Wrapper
from aiosgd.plugins.compressors.chain import factory, parse
from aiosgd.plugins.kinds import COMPRESSORS

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "compression.md"
PICTURE = DOCS / "compression.png"

STEPS = 150
RATE = 0.4
WORKERS = 8
SEEDS = range(5)
SHAPES = {"weight0": (64, 64), "bias0": (64,), "weight1": (64, 10), "bias1": (10,)}
LARGE = 1 << 20
PARTITIONS: Mapping[str, Mapping[str, Any]] = {"shared": {}, "shards": {"per_worker": 1}}
"""Of the training samples: everybody has all, or each worker an eighth of them, sorted by label."""

VARIANTS: Mapping[str, Sequence[str]] = {
    "topk": ["topk(ratio=0.01)"],
    "randk": ["randk(ratio=0.01)"],
    "dgc": ["dgc(ratio=0.01)"],
    "qsgd": ["qsgd(bits=2)", "qsgd(bits=4)", "qsgd(bits=8)"],
    "sgq": ["sgq(bits=2)", "sgq(bits=4)"],
    "eden": ["eden(bits=1)", "eden(bits=2)", "eden(bits=3)", "eden(bits=4)"],
    "powersgd": ["powersgd(rank=2)", "powersgd(rank=4)"],
}
"""Compressor -> the chains to try. One that is not here is tried with its defaults."""

RATES = {"sign": 0.01, "dgc": 0.1, "randk": 0.05, "ef(randk)": 0.1}
"""Chain without parameters -> learning rate, where `RATE` is far off.

`sign` sends ones, `dgc` brings a momentum of 0.9, and `randk` hundredfold values or, with error
feedback, values that are a hundred steps old.
"""


# What is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A training run, or with `seed` -1 the timing of its compressor."""

    chain: str
    partition: str
    seed: int
    rate: float
    steps: int = STEPS


Row: TypeAlias = dict[str, Any]


def train(job: Job) -> Row:
    """Run a job; of one that fails, return why."""
    options = {
        "codec": "plain",
        "workers": WORKERS,
        "compressor": job.chain,
        "partition": job.partition,
        "partition_params": dict(PARTITIONS[job.partition]),
        "model_params": {"hidden": [64]},
        "learning_rate": job.rate,
        "batch_size": 16,
        "epochs": job.steps,
        "max_steps": job.steps,
        "seed": job.seed,
    }
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = aiosgd.simulate(**options, output=folder)
        except AiosgdError as error:
            sys.stdout.write(f"{error}\n")
            return {"error": str(error)}
    return {
        "accuracy": outcome.metrics["accuracy"],
        "bytes": float(outcome.train["bytes_sent"].sum()) / (WORKERS * job.steps),
        "cpu_s": time.process_time() - started,
    }


def clock(job: Job) -> Row:
    """Return the seconds of compressing and decompressing the job's vector and a large one."""
    make = factory(COMPRESSORS, job.chain, {})
    small = sum(int(np.prod(shape)) for shape in SHAPES.values())
    row: Row = {}
    for label, size, count in (("small", small, 50), ("large", LARGE, 3)):
        compressor = make(np.random.default_rng(0))
        compressor.shapes = SHAPES if label == "small" else {}
        row[label] = _seconds(compressor, size, count)
    return row


def _seconds(compressor: Compressor, size: int, count: int) -> tuple[float, float]:
    """Return the best of five rounds of `count` calls each."""
    array = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    with threadpool_limits(1):  # threads of BLAS that wait for each other count, too
        payload = compressor.compress(array, "study")
        return (
            _best(lambda: compressor.compress(array, "study"), count),
            _best(lambda: compressor.decompress(payload), count),
        )


def _best(call: Callable[[], object], count: int) -> float:
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(count):
            call()
        rounds.append((time.process_time() - started) / count)
    return min(rounds)


def bare(chain: str) -> str:
    """Return a chain without its parameters."""
    return re.sub(r"\((?!\w+[(),])[^()]*\)", "", chain)


def rate(chain: str) -> float:
    """Return the learning rate of a chain."""
    return RATES.get(bare(chain), RATE)


def chains() -> Iterator[str]:
    """Yield what to try: each registered compressor as it is, and under error feedback."""
    names = [entry.name for entry in COMPRESSORS.entries() if entry.name != "ef"]
    for name in sorted(names, key=lambda name: (name != "none", name)):
        for chain in variants(name):
            yield chain
            if name != "none":
                yield f"ef({chain})"


def variants(name: str) -> Sequence[str]:
    """Return the chains of a compressor; what wraps others is put around two."""
    if name not in VARIANTS and issubclass(COMPRESSORS.load(name), Wrapper):
        return [f"{name}(none)", f"{name}(qsgd(bits=4))"]
    return VARIANTS.get(name, [name])


def refusal(chain: str) -> str:
    """Return why a chain cannot be made; empty if it can.

    Raises:
        PluginError: a compressor of it is missing or broken.
    """
    try:
        factory(COMPRESSORS, chain, {})
    except ConfigError as error:
        return str(error)
    return ""


# The cache -----------------------------------------------------------------------------------


class Cache:
    """Rows of jobs, in a file of JSON lines.

    Args:
        path: None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                job, row = json.loads(line)
                self.rows[json.dumps(job)] = row

    def get(self, job: Job, compute: Callable[[Job], Row]) -> Row:
        """Return a job's row; compute and keep it if it is new."""
        key = json.dumps(asdict(job))
        if key not in self.rows:
            self.rows[key] = row = compute(job)
            if self.path and "error" not in row:  # which may be the computer's fault
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps([asdict(job), row])}\n")
        return self.rows[key]


# What comes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a chain came to.

    Attributes:
        refused: why there is nothing else.
        accuracies: partition -> of each seed; nothing of seeds whose job failed.
        bytes: that a worker sends per step.
        micros: of a processor per worker and step in this job.
        nanos: of compressing and decompressing, per element of a large vector.
    """

    chain: str
    refused: str = ""
    accuracies: Mapping[str, Sequence[float]] | None = None
    bytes: float = np.nan
    micros: float = np.nan
    nanos: float = np.nan

    def mean(self, partition: str) -> float:
        """Return the mean accuracy; NaN unless all runs came to an end."""
        found = (self.accuracies or {}).get(partition, [])
        return float(np.mean(found)) if len(found) == len(SEEDS) else np.nan


def measure(chain: str, cache: Cache) -> Result:
    """Train and time a chain."""
    if reason := refusal(chain):
        return Result(chain, reason)
    job = Job(chain, "", 0, rate(chain))
    rows = {
        partition: [cache.get(replace(job, partition=partition, seed=s), train) for s in SEEDS]
        for partition in PARTITIONS
    }
    done = [row for each in rows.values() for row in each if "accuracy" in row]
    times = cache.get(replace(job, seed=-1), clock)
    # a worker decodes its own block, too, as the others do
    micros = 1e6 * (times["small"][0] + WORKERS * times["small"][1])
    return Result(
        chain,
        accuracies={
            partition: [row["accuracy"] for row in each if "accuracy" in row]
            for partition, each in rows.items()
        },
        bytes=float(np.mean([row["bytes"] for row in done])) if done else np.nan,
        micros=micros,
        nanos=1e9 * sum(times["large"]) / LARGE,
    )


def accuracy(result: Result, partition: str) -> str:
    """Return mean and standard deviation, or that runs failed."""
    found = (result.accuracies or {})[partition]
    if len(found) < len(SEEDS):
        return f"{len(SEEDS) - len(found)} of {len(SEEDS)} failed"
    return f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"


def table(results: Sequence[Result]) -> str:
    """Return the Markdown table; without error feedback and with it below each other."""
    plain = next(result.bytes for result in results if result.chain == "none")
    head = [
        "compressor",
        *(f"accuracy, {partition}" for partition in PARTITIONS),
        "bytes sent",
        "times smaller",
        "µs",
        "ns per element",
    ]
    lines = [head, ["---"] * 3 + ["---:"] * 4]
    for result in results:
        if result.refused:
            lines.append([f"`{result.chain}`", "refused", "refused", "", "", "", ""])
            continue
        cells = [accuracy(result, partition) for partition in PARTITIONS]
        figures = [f"{result.bytes:,.0f}", f"{plain / result.bytes:.3g}"]
        times = [f"{result.micros:,.0f}", f"{result.nanos:.1f}"]
        lines.append([f"`{result.chain}`", *cells, *figures, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: Sequence[Result]) -> None:
    """Put the table between the page's markers; the text around it is written by hand."""
    start, end = "<!-- table: made by studies/compression.py -->\n", "<!-- end of the table -->"
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"{PAGE} has no {start.strip()} or no {end} after it; expected both")
    text = f"{before}{start}\n{table(results)}\n\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def said(result: Result) -> str:
    """Return a result as a line of progress."""
    if result.refused:
        return f"{result.chain}: {result.refused}"
    found = ", ".join(f"{partition} {accuracy(result, partition)}" for partition in PARTITIONS)
    return f"{result.chain}: {found}, {result.bytes:,.0f} bytes, {result.micros:,.0f} µs"


# The picture ---------------------------------------------------------------------------------

COLORS = {
    "casts": "tab:gray",
    "quantisers": "tab:blue",
    "signs": "tab:orange",
    "sparse": "tab:green",
    "low rank": "tab:purple",
    "others": "tab:red",
}
FAMILIES = {"casts": "casts", "quantisers": "quantisers", "signs": "signs", "sparse": "sparse"}
FAMILIES |= {"lowrank": "low rank"}
"""Module of a compressor -> family."""
ERRORS = (0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9)
SPOTS = [(8, 0), (-8, 0), (0, 9), (0, -9)]
SPOTS += [
    (side * far, up) for far in (8, 30, 60) for up in (9, -9, 18, -18, 28, -28) for side in (1, -1)
]
"""Where a label may stand, in points from its marker; the first that is free is taken."""


def color(chain: str) -> str:
    """Return the colour of a chain's innermost compressor."""
    kind = COMPRESSORS.load([*parse(chain)][-1].name)
    return COLORS[FAMILIES.get(kind.__module__.rpartition(".")[2], "others")]


def label(chain: str) -> str:
    """Return a chain as the picture has it: `topk 0.01`; the marker says that it is under ef."""
    inner = chain.removeprefix("ef(").removesuffix(")") if chain.startswith("ef(") else chain
    return " ".join(re.sub(r"\w+=|[(),]", " ", inner).split())


def draw(results: Sequence[Result]) -> None:
    """Draw accuracy over bytes, a panel per partition."""
    mpl.use("Agg")
    figure, panels = plt.subplots(len(PARTITIONS), 1, figsize=(10, 13), layout="constrained")
    titles = {"shared": "every worker sees all samples", "shards": "samples sorted by label"}
    for partition, panel in zip(PARTITIONS, panels, strict=True):
        panel.set_title(titles[partition])
        places = {
            result.chain: (result.bytes, 1 - result.mean(partition))
            for result in results
            if result.mean(partition) > 0
        }
        scale(panel, [x for x, _ in places.values()])
        plain = next(result for result in results if result.chain == "none")
        around, spread = places["none"][1], np.std((plain.accuracies or {})[partition], ddof=1)
        panel.axhspan(around - spread, around + spread, color="tab:gray", alpha=0.12, linewidth=0)
        mark(panel, places)
    figure.legend(handles=legend(results), loc="outside lower center", ncols=4, frameon=False)
    figure.canvas.draw()  # settles where everything is
    for panel in panels:
        place_labels(figure, panel)
    figure.savefig(PICTURE, dpi=100)


def scale(panel: Any, widths: Sequence[float]) -> None:
    """Set a panel's axes: bytes, and the error upside down, both logarithmic."""
    panel.set(
        xscale="log", yscale="log", ylim=(1, 0.043), xlabel="bytes that a worker sends per step"
    )
    panel.set(xlim=(min(widths) / 1.6, max(widths) * 1.6), ylabel="test accuracy")
    panel.set_yticks(ERRORS, [f"{1 - error:.2f}" for error in ERRORS])
    ticks = [m * 10**k for k in range(1, 7) for m in (1, 2, 5)]
    low, high = panel.get_xlim()
    panel.set_xticks([tick for tick in ticks if low < tick < high])
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def mark(panel: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Draw a marker per chain, and a line to what error feedback makes of it.

    Names stand on the markers until `place_labels` moves them; one is enough for both.
    """
    for chain, (x, y) in places.items():
        own, is_fed = color(chain), chain.startswith("ef(")
        panel.plot(x, y, "o", color=own, mfc=own if is_fed else "white", ms=6, zorder=3)
        fed = places.get(f"ef({chain})")
        if fed:
            panel.plot(*zip((x, y), fed, strict=True), color=own, linewidth=1, alpha=0.6)
        is_apart = is_fed and abs(np.log(y / places[chain[3:-1]][1])) > 0.25
        if not is_fed or is_apart:
            text = f"ef {label(chain)}" if is_fed else label(chain)
            panel.annotate(text, (x, y), (0, 0), textcoords="offset points", color=own, size=9)


def place_labels(figure: Any, panel: Any) -> None:
    """Move each name to the first spot where it covers no marker and no other name."""
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    transform = panel.transData.transform
    markers = [transform(line.get_xydata()[0]) for line in panel.lines if line.get_marker() == "o"]
    taken = [mpl.transforms.Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in markers]
    for text in sorted(panel.texts, key=lambda text: -text.xy[1]):
        for dx, dy in SPOTS:
            text.set_position((dx, dy))
            text.set_ha("center" if not dx else "left" if dx > 0 else "right")
            text.set_va("center" if not dy else "bottom" if dy > 0 else "top")
            box = text.get_window_extent(renderer)
            inside = panel.bbox.x0 < box.x0 and box.x1 < panel.bbox.x1 and box.y0 > panel.bbox.y0
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if abs(dx) + abs(dy) > 20 * unit:
            line = {"arrowstyle": "-", "color": text.get_color(), "linewidth": 0.5, "alpha": 0.6}
            panel.annotate("", text.xy, (dx, dy), textcoords="offset points", arrowprops=line)


def legend(results: Sequence[Result]) -> list[Any]:
    """Return the legend's markers; families without a compressor are left out."""
    used = {color(result.chain) for result in results if not result.refused}
    kinds = [(name, own, own) for name, own in COLORS.items() if own in used]
    kinds += [("as it is", "black", "white"), ("with error feedback", "black", "black")]
    return [
        mpl.lines.Line2D([], [], marker="o", linestyle="", color=own, mfc=fill, label=name)
        for name, own, fill in kinds
    ]


# Do it ---------------------------------------------------------------------------------------


def main() -> None:
    """Measure, and write unless only some chains were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help="a file of JSON lines, read and added to")
    parser.add_argument("--only", nargs="+", metavar="CHAIN", help="measure these, write nothing")
    options = parser.parse_args()
    cache, results = Cache(options.cache), []
    for chain in options.only or chains():
        results.append(measure(chain, cache))
        sys.stdout.write(f"{said(results[-1])}\n")
        sys.stdout.flush()
    if not options.only:
        write(results)
        draw(results)


if __name__ == "__main__":
    main()
