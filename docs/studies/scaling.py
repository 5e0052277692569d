"""How the time of an exchange grows with the number of workers: docs/scaling.md and its picture.

Simulates the codecs where that takes seconds, checks formulas against the simulation, and draws
the formulas up to 10,000 workers.

    pip install -e '.[plots]' && python docs/studies/scaling.py
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from exchange import simulate
from matplotlib import pyplot as plt
from ways import WAYS, Way

from aiosgd.codecs.gossip import DPsgd
from aiosgd.runtime.simulation.network import NetworkModel
from aiosgd.runtime.simulation.networks import load_network

DOCS = Path(__file__).parents[1]


SIZES = (25_000_000, 1_000_000_000)
NETWORKS = (load_network("lan"), load_network("wan"))
LARGEST = 10_000
COUNTS = (*(1 << k for k in range(2, 14)), LARGEST)
MARKS = {"min": 60, "hour": 3600, "day": 86400}
SIMULATED = (4, 16, 64, 100, 256, 1024, LARGEST)


@dataclass(frozen=True)
class Point:
    """An exchange that was simulated; `seconds` by the simulator."""

    model: NetworkModel
    size: int
    way: Way
    workers: int
    seconds: float
    models: float

    @property
    def error(self) -> float:
        """How far the formula is off."""
        return self.way.seconds(self.size, self.workers, self.model) / self.seconds - 1


def points() -> Iterator[Point]:
    """Simulate each way up to the number of workers that takes seconds.

    Besides, 256 workers with messages as small as those of 10,000, where hops count more than bytes.
    """
    small = SIZES[0] * 256 // LARGEST
    for model, way in itertools.product(NETWORKS, WAYS):
        work = [
            (size, n)
            for size, most in zip(SIZES, way.most, strict=True)
            for n in SIMULATED
            if n <= most
        ]
        for size, n in [*work, (small, 256)] if way.thin else work:
            found = simulate(way.codec, way.params, size, n, way.servers(n), model, way.graph(n))
            yield Point(model, size, way, n, *found)


def draw(found: list[Point]) -> None:
    """Draw seconds over workers, a panel per network and size."""
    mpl.use("Agg")
    figure, panels = plt.subplots(2, 2, figsize=(11, 9), sharex=True, layout="constrained")
    for (model, size), panel in zip(itertools.product(NETWORKS, SIZES), panels.flat, strict=True):
        lines = {way: [way.seconds(size, n, model) for n in COUNTS] for way in WAYS}
        served = (lines[way] for way in WAYS if way.is_served)
        panel.fill_between(COUNTS, *served, color="C1", alpha=0.08)
        for way, seconds in lines.items():
            dots = [p for p in found if (p.model, p.size, p.way) == (model, size, way)]
            known = bisect_right(COUNTS, max(p.workers for p in dots))
            panel.loglog(COUNTS, seconds, **{"alpha": 0.5, **way.style, "linewidth": 0.9})
            panel.loglog(COUNTS[:known], seconds[:known], **way.style, label=way.name)
            places = [p.workers for p in dots], [p.seconds for p in dots]
            panel.plot(*places, "o", color=way.style["color"], markersize=4.5)
        panel.set_title(f"{name(size)} on {model.name}")
        panel.set_xlabel("workers")
        low, high = panel.set_ylim()
        for mark, seconds in MARKS.items():
            if low < seconds < high:
                panel.axhline(seconds, color="gray", linewidth=0.8, linestyle=":")
                right = panel.get_yaxis_transform()
                panel.text(1.01, seconds, mark, color="gray", va="center", transform=right)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.25)
    figure.supylabel("seconds per exchange")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    title = (
        "dots: simulated; lines: formulas, thin beyond the dots; shaded: 1 to N/8 parameter servers"
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=4, title=title)
    figure.savefig(DOCS / "scaling.png", dpi=100)


def name(size: int) -> str:
    """Return a size as people say it."""
    return f"{size / 1e6:g} MB" if size < 1e9 else f"{size / 1e9:g} GB"


def rounded(number: float) -> str:
    """Return three digits of a number."""
    return f"{float(f'{number:.3g}'):,.10g}"


def fastest(model: NetworkModel, size: int) -> str:
    """Return which exact exchange without servers is the fastest, from how many workers on."""
    exact = [way for way in WAYS if way.codec is not DPsgd and not way.is_served]
    best = [min(exact, key=lambda way: way.seconds(size, n, model)).name for n in COUNTS]
    firsts = {way: COUNTS[best.index(way)] for way in dict.fromkeys(best)}
    return "; ".join(f"from {first:,} workers on {way}" for way, first in firsts.items())


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_row(way: Way, found: list[Point]) -> list[str]:
    """Return how far a formula is off: usually, and at worst on each network."""
    own = sorted((p for p in found if p.way is way), key=lambda p: abs(p.error))
    worst = [[p for p in own if p.model is model][-1] for model in NETWORKS]
    texts = [f"{p.error:+.1%} ({p.workers:,} workers, {name(p.size)})" for p in worst]
    return [way.name, *map("{:,}".format, way.most), f"{abs(own[len(own) // 2].error):.1%}", *texts]


def page(found: list[Point], cpu_s: float) -> str:
    """Return the page: its text with the tables and the figures filled in."""
    places = list(itertools.product(NETWORKS, SIZES))
    heads = [f"{name(size)}, {model.name}" for model, size in places]
    winners = [[head, fastest(*place)] for head, place in zip(heads, places, strict=True)]
    costs = []
    for way in WAYS:
        models = [rounded(way.models(n)) for n in (16, 256, LARGEST)]
        times = [rounded(way.seconds(size, LARGEST, model)) for model, size in places]
        costs.append([way.name, *models, *times])
    return PAGE.format(
        count=len(found),
        minutes=max(1, round(cpu_s / 60)),
        fastest=table(["model, network", "fastest"], winners),
        costs=table(["", "16", "256", f"{LARGEST:,}", *heads], costs),
        errors=table(
            ["", "to, 25 MB", "to, 1 GB", "median", *(model.name for model in NETWORKS)],
            [error_row(way, found) for way in WAYS],
        ),
    )


PAGE = """\
# How an exchange scales

Seconds from the moment when all workers have their gradients or weights to the moment when the last one
has the step's result. A step takes that and its computing, which is the same for all ways.

![seconds per exchange over workers](scaling.png)

1. While messages are large, nothing exact beats the ring of `allreduce`: it takes the time of two models
   through one network card, however many workers there are.
2. A ring has 2 (N - 1) hops, so that beyond some number of workers it only waits: `--set codec.small=2e9`
   exchanges in log2 N hops instead, and pays from 128 workers on for 25 MB on `wan`, from 8,192 on `lan`.
3. One parameter server takes N models through one card and is the slowest of all from 16 workers on;
   one for every eight workers takes the time of 8 to 16 models, four to eight times that of a ring that
   need not wait, and an eighth more machines.
4. `hierarchical` never wins here, where all links are equal, for a leader carries 2 (√N - 1) models: it is
   for clusters whose groups are linked by slower lines than those inside them.
5. Gossip with one peer per step costs one model for any number of workers and is the only way that stays
   the same to 10,000, but its workers never quite agree; gossip on the whole exponential graph sends
   log2 N models, for which doubling gives the exact average.

{fastest}

These are exact and need no more machines. N/8 parameter servers overtake the ring as well where it waits,
25 MB on `wan` from 512 workers on and on `lan` at 10,000, but there doubling is faster still. For 1 GB on
`wan` ring and doubling meet at 10,000: which one is ahead there is within the formulas' error.

## Cost

How many models the busiest node sends in one exchange among 16, 256 and 10,000 workers, and the seconds
among 10,000, from the formulas:

{costs}

What gossip buys is less than an average: on the exponential graph the workers' differences shrink to
(⌈log2 N⌉ - 1)/(⌈log2 N⌉ + 1) in a step, 0.87 with 10,000; with one peer they are gone after log2 N steps of
mixing, if N is a power of two and nobody trains meanwhile.

## What is simulated

Dots are simulated: the codecs themselves decide who sends which part when, on the network of
`aiosgd simulate`, with arrays that have a length and no content. {count} exchanges take {minutes} minutes of one
core. Lines are formulas ([ways.py](studies/ways.py)), thin where they are **extrapolated**: to 10,000 workers
from 1,024, 256 or even 64. To make sure that they may be, rings and N/8 servers were simulated with 256
workers and messages as small as those of 10,000, too: these are the points of 0.64 MB. How far the
formulas are off, in the median, and at worst on each network:

{errors}

The points of 0.64 MB on `wan` take few seconds, where one retransmission more or less (0.2 s and longer)
shows; the formulas have the expected number. With 4 workers the levels of `hierarchical`
overlap, which its formula does not know.

The network is ideal in what matters at this size: each worker has a card of its own (`lan` 1 Gbit/s and
0.1 ms, `wan` 100 Mbit/s and 45 to 55 ms, one message in a thousand lost, both 30 µs of a processor per
message at each end) and nothing between the cards is ever short of capacity, nobody is slower than the others, adding takes no time, and nobody fails. A card takes
what comes in the order of its arrival. With real cards, which share, a leader of `hierarchical` could
begin with the other leaders while its members still send.

## Do it again

```sh
pip install -e '.[plots]'
python docs/studies/scaling.py        # {minutes} minutes of one core; writes docs/scaling.md and docs/scaling.png
```
"""


def main() -> None:
    """Simulate, draw and write."""
    started = time.process_time()
    found = list(points())
    draw(found)
    (DOCS / "scaling.md").write_text(page(found, time.process_time() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
