"""What an installation takes on disk, and how many distributions it brings.

    python tests/bench/install_size.py [--peer flwr] [--json]

Each gets a new virtual environment of its own, in a temporary folder; what is already in an empty
one (pip, setuptools) is the first row, and part of the megabytes of all others, but is not counted
as a distribution. Megabytes are blocks on disk, as `du -sm` counts them. Needs an index, such as
PyPI.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from contest import machine, say

ROOT = Path(__file__).parents[2]
LIST = "import importlib.metadata as m; print(*sorted({d.name for d in m.distributions()}))"


def megabytes(folder: Path) -> float:
    """Return what a folder takes on disk."""
    files = [path.lstat() for path in (folder, *folder.rglob("*"))]
    blocks = {(one.st_dev, one.st_ino): one.st_blocks for one in files}  # a hard link counts once
    return sum(blocks.values()) * 512 / 2**20


def distributions(python: Path) -> set[str]:
    """Return the names of what is installed."""
    command = [python, "-I", "-c", LIST]
    return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}


def installed(folder: Path, *what: str) -> dict[str, Any]:
    """Install into a new environment, and return a row on it."""
    words = ("pip", "install", *what) if what else ("python", "-m", "venv")
    say(" ".join(words))
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    before, started = distributions(python), time.perf_counter()
    if what:
        pip = [python, "-m", *words, "--quiet", "--disable-pip-version-check"]
        subprocess.run(pip, check=True, cwd=ROOT, stdout=sys.stderr)
    return {
        "command": " ".join(words),
        "MB": round(megabytes(folder), 1),
        "distributions": len(distributions(python) - before),
        "seconds": round(time.perf_counter() - started, 1),
        "names": sorted(distributions(python) - before),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default="flwr", help="what else to install (default: flwr)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            installed(Path(folder, "nothing")),
            installed(Path(folder, "ours"), "."),
            installed(Path(folder, "peer"), options.peer),
        ]
    say("")
    command = " ".join(["python", *sys.argv])
    if options.json:
        print(json.dumps({"command": command, "machine": machine(), "rows": rows}))
        return
    print(f"{command}\n{machine()}\n{'':28}{'MB':>8}{'distributions':>15}{'seconds':>9}")
    for row in rows:
        figures = f"{row['MB']:8.0f}{row['distributions']:15}{row['seconds']:9.0f}"
        print(f"{row['command']:28}{figures}")


if __name__ == "__main__":
    main()
