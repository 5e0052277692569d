"""Runs -> one picture of the main curves, drawn by matplotlib."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from typing import Any

from aiosgd.errors import ConfigError
from aiosgd.report import curves
from aiosgd.report.curves import BYS, Curve
from aiosgd.report.run import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#595959", "#8c6d1f")
"""Of Okabe and Ito's palette, which colour-blind people tell apart; yellow is too pale on white."""


def picture(runs: Sequence[Run]) -> bytes:
    """Return a png: training loss above, test accuracy below, by steps, time and bytes.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            "--format png needs matplotlib, which is not installed: pip install 'aiosgd[plots]'"
        ) from error
    figure = figures.Figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.subplots(2, len(BYS))
    draw(grid, runs)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def draw(grid: Any, runs: Sequence[Run]) -> None:
    """Draw the curves of runs.

    Args:
        grid: matplotlib's axes: two rows, a column per kind of x axis.
        runs: what to draw.
    """
    names = {"step": ("step", "epoch"), "time": ("seconds",) * 2, "bytes": ("bytes sent",) * 2}
    for column, by in enumerate(BYS):
        losses = [curves.training(run, "loss", by) for run in runs]
        for i, run in enumerate(runs):
            _curve(grid[0][column], losses[i], i, run)
            _curve(grid[1][column], curves.testing(run, "accuracy", by), i, run)
        for axes, title, name in zip(
            (grid[0][column], grid[1][column]),
            ("training loss", "test accuracy"),
            names[by],
            strict=True,
        ):
            axes.set_xlabel(name)
            axes.set_ylabel(title)
            axes.grid(visible=True, alpha=0.3)
            if by == "bytes" and curves.are_far_apart(losses):
                axes.set_xscale("log")
    grid[0][0].legend(fontsize=8)


def _curve(axes: Any, curve: Curve, i: int, run: Run) -> None:
    colour, style = COLOURS[i % len(COLOURS)], "--" if i >= len(COLOURS) else "-"
    axes.plot(curve.x, curve.mean, style, color=colour, label=run.summary.job_id, linewidth=1.2)
    axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
