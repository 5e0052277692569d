"""Walk through docs/first-run.md as a new user does, and say how long it takes.

    python docs/studies/first_run.py            # prints a table
    python docs/studies/first_run.py --write    # writes it into the page

Everything from a fresh clone on: a virtual environment, the installation by pip as it is set up on
this machine, and each block of the page. Nothing of an earlier run is used but pip's own cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from blocks import RUNNABLE, Workspace, blocks_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-run.md"
_MARK = "<!-- table: made by docs/studies/first_run.py -->\n"


def install(folder: Path) -> Path:
    """Clone the repository, install it, and return the new environment's interpreter."""
    clone = folder / "clone"
    environment = folder / "venv"
    pip = [environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        ["git", "clone", "--quiet", ROOT, clone],
        [sys.executable, "-m", "venv", environment],
        [*pip, clone],
    ):
        subprocess.run(command, check=True)
    return environment / "bin" / "python"


def sections() -> list[tuple[int, str]]:
    """Return the numbered sections of the page, with the line at which each begins."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    titles = ((number, re.match(r"## \d+\. (.*)", line)) for number, line in enumerate(lines, 1))
    return [(number, title[1]) for number, title in titles if title]


def walk(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield each section with the seconds that its commands take."""
    began = time.monotonic()
    python = install(folder)
    (_, first), *others = sections()
    yield first, time.monotonic() - began
    ends = [line for line, _ in others[1:]] + [sys.maxsize]
    blocks = [block for block in blocks_of(PAGE) if block.language in RUNNABLE]
    (folder / "page").mkdir()
    with Workspace(folder / "page", str(python)) as workspace:
        (folder / "page" / "bin" / "pip").unlink()  # a user's pip fetches what it needs
        for (start, title), end in zip(others, ends, strict=True):
            began = time.monotonic()
            for block in blocks:
                if start < block.line < end:
                    workspace.run(block)
            yield title, time.monotonic() - began


def table(rows: list[tuple[str, float]]) -> str:
    """Return the text that the page has of it."""
    where = f"On a machine with {os.cpu_count()} cores, with pip's packages from a mirror near by:"
    lines = "".join(f"| {title} | {seconds:.1f} |\n" for title, seconds in rows)
    total = sum(seconds for _, seconds in rows)
    head = "| | seconds |\n|---|---:|\n"
    return f"{where}\n\n{head}{lines}| all commands | {total:.0f} |\n"


def main() -> None:
    """Measure, and print or write the table."""
    with tempfile.TemporaryDirectory() as folder:
        text = table(list(walk(Path(folder))))
    if sys.argv[1:] != ["--write"]:
        print(text, end="")  # noqa: T201
        return
    before, mark, after = PAGE.read_text(encoding="utf-8").partition(_MARK)
    heading = after.index("\n## ")
    PAGE.write_text(f"{before}{mark}\n{text}{after[heading:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
