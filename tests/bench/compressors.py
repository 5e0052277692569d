"""Compressors: GB/s of float32 that go in (encode) and come out (decode), and bytes per element.

    python tests/bench/compressors.py [CHAIN ...] [--rounds 5] [--quick] [--json]

An array of 5000 x 5000 normal numbers, one thread. A CHAIN is what `--compressor` takes, such as
`topk` or `ef(topk(ratio=0.01))`, or FILE.py:CLASS with or without parameters; without any, all that
are installed, wrappers around `none`. The first row is a copy of the array.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from contest import Case, parser, report, rounds_of, run
from threadpoolctl import threadpool_limits

from aiosgd.plugins.compressors import chain
from aiosgd.plugins.compressors.base import Compressor, Wrapper
from aiosgd.plugins.kinds import COMPRESSORS


class File:
    """What `chain.factory` needs of a registry: the classes of one file."""

    def __init__(self, path: str) -> None:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.module  # dataclasses look their module up
        spec.loader.exec_module(self.module)

    def load(self, name: str) -> type[Compressor]:
        return COMPRESSORS.check(getattr(self.module, name), name)


def made(text: str) -> Compressor:
    """Return the compressor of a chain, of installed ones or of a file's."""
    path, mark, rest = text.partition(".py:")
    registry, text = (File(f"{path}.py"), rest) if mark else (COMPRESSORS, text)
    return chain.factory(registry, text, {})(np.random.default_rng(0))


def installed() -> list[str]:
    """Return a chain for each compressor that is installed."""
    names = [entry.name for entry in COMPRESSORS.entries()]
    return [f"{n}(none)" if issubclass(COMPRESSORS.load(n), Wrapper) else n for n in names]


def timed(work, *args: Any) -> list[float]:
    start = time.perf_counter()
    work(*args)
    return [time.perf_counter() - start]


def payload_size(payload: Any) -> int:
    """Return the bytes of all arrays in a payload."""
    if isinstance(payload, dict):
        return sum(map(payload_size, payload.values()))
    if isinstance(payload, list | tuple):
        return sum(map(payload_size, payload))
    return getattr(payload, "nbytes", 0)


async def measure(text: str, array: np.ndarray, rounds: int) -> Case:
    """Run encode and decode in turns."""
    compressor = made(text)
    payload = compressor.compress(array, "w")
    contestants = {
        "encode": lambda: timed(compressor.compress, array, "w"),
        "decode": lambda: timed(compressor.decompress, payload),
    }
    case = await Case(text.rpartition("/")[2]).run(contestants, rounds)
    size = payload_size(payload) / array.size
    return with_speed(case, array, {"B/element": round(size, 3)})


def with_speed(case: Case, array: np.ndarray, more: dict[str, Any]) -> Case:
    for name, times in case.times.items():
        case.more[name] = {"GB/s": array.nbytes / float(np.median(times)) / 1e9, **more}
    return case


async def main() -> None:
    options = arguments()
    rounds, side = rounds_of(options), 1000 if options.quick else 5000
    array = np.random.default_rng(0).standard_normal((side, side), np.float32)
    target = np.empty_like(array)
    copy = await Case("copy").run({"copy": lambda: timed(np.copyto, target, array)}, rounds)
    cases = [with_speed(copy, array, {})]
    cases += [await measure(text, array, rounds) for text in options.chains or installed()]
    report([row for case in cases for row in case.rows()], options)


def arguments():
    made = parser(__doc__)
    made.add_argument("chains", nargs="*", metavar="CHAIN")
    return made.parse_args()


if __name__ == "__main__":
    with threadpool_limits(1):
        run(main)
