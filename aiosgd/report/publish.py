"""Run folders -> a new file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from aiosgd.errors import ConfigError
from aiosgd.report.page import page
from aiosgd.report.picture import picture
from aiosgd.report.run import read
from aiosgd.report.sections import LETTERS

Format: TypeAlias = Literal["html", "png"]


def publish(
    folders: Sequence[Path], output: Path | None = None, form: Format | None = None
) -> Path:
    """Write a report of one run or several, and return where it is.

    Args:
        folders: of runs.
        output: the new file; default: `report.html` in the run's folder or, of several runs, in
            the current one, and `report-2.html`, `report-3.html`, … where there is one already.
        form: default: as the output's name says, `html` if it has none.

    Raises:
        ConfigError: a folder is no run, or damaged; the output exists or cannot be written;
            matplotlib, which a png needs, is missing.
    """
    if len(folders) > len(LETTERS):
        raise ConfigError(f"{len(folders)} runs are too many; expected {len(LETTERS)} at most")
    form = form or ("png" if output and output.suffix == ".png" else "html")
    runs = [read(folder) for folder in folders]
    content = picture(runs) if form == "png" else page(runs).encode("utf-8")
    place = folders[0] if len(folders) == 1 else Path()
    for path in [output] if output else _names(place, form):
        if publish_to(path, content):
            return path
    raise ConfigError(f"{output} exists already; nothing is ever overwritten")


def _names(folder: Path, form: Format) -> Iterator[Path]:
    yield folder / f"report.{form}"
    for number in itertools.count(2):
        yield folder / f"report-{number}.{form}"


def publish_to(path: Path, content: bytes) -> bool:
    """Write a new file, whole or not at all; tell whether there was none."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with file:
            file.write(content)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return True
