"""Draw docs/actor.svg: one step of the codec in docs/actor.md that has two halves, as it happens.

python docs/studies/sequence.py
"""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from blocks import blocks_of

from aiosgd.check.drawing import svg
from aiosgd.check.story import Moment
from aiosgd.codecs.testing import Happening, LocalCluster

DOCS = Path(__file__).parents[1]
SEED = 5
"""An order in which worker 1 hands in its block before worker 0."""


def codec() -> Any:
    """Return the class that the page has."""
    page = DOCS / "actor.md"
    source = next(block for block in blocks_of(page) if block.title == "average.py")
    namespace: dict[str, Any] = {}
    exec(source.text, namespace)  # noqa: S102 - the page's own code
    return namespace["Average"]


async def story() -> list[Moment]:
    """Return what happens in one step of two workers and a server."""
    clock, moments = count(1), []

    def witness(happening: Happening) -> None:
        kind, node, peer, step, what, number = happening
        sender = peer if kind == "deliver" else node
        label = f"block {what.id}" if kind == "update" else "the mean"
        if kind in ("send", "deliver") and sender is not None and sender >= 0:
            label = "its block"
        moments.append(Moment(float(next(clock)), kind, node, peer, step, label, number))

    cluster = LocalCluster(codec(), workers=2, seed=SEED, witness=witness)
    await cluster.step({worker: np.zeros(1, "f4") for worker in range(2)})
    return moments


def main() -> None:
    """Write the picture."""
    (DOCS / "actor.svg").write_text(svg(asyncio.run(story())), encoding="utf-8")


if __name__ == "__main__":
    main()
