"""Keeps the real world out of a simulation: who reads a clock or draws from the machine is told.

Meanwhile the functions of the standard library and of numpy that give something else in every run
raise EscapeError where they are called. They are refused to the code under test: codecs, models,
whatever they import. The standard library's own readings (a log record's time), numpy and this
framework's (which measures how long it computes) go on, and so does every other thread. What a
module does while it is imported is let through, for it happens once per process.

Not caught: `datetime.now()` and `numpy.random.RandomState()`, for their types are C's, and a function
that was kept elsewhere than in a module's globals, such as an argument's default. A second run shows
these.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from aiosgd.runtime.simulation.loop import EscapeError

P = ParamSpec("P")
T = TypeVar("T")

_CLOCK = "count steps (ctx.step), or take asyncio.get_running_loop().time()"
_SLEEP = "await asyncio.sleep()"
_RNG = "draw from ctx.rng"
_SEED = "draw from ctx.rng, or give a seed"
_RUN = "await ctx.run(function)"
_SEND = "return an Envelope"
_NOTHING = "leave it to what runs around the job"

_CLOCKS = (
    "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns "
    "thread_time thread_time_ns clock_gettime clock_gettime_ns"
)
_ACTIONS = ("fork", "forkpty", "system", "posix_spawn")
_SECRETS = "choice randbelow randbits token_bytes token_hex token_urlsafe"


def _global_methods(module: ModuleType, known: Any) -> list[str]:
    """Return a module's functions that are methods of its hidden generator, as `known` is."""
    generator, names = known.__self__, (name for name in dir(module) if not name.startswith("_"))
    return [name for name in names if getattr(getattr(module, name), "__self__", 0) is generator]


_NUMPY = {*_global_methods(np.random, np.random.rand), "seed", "ranf", "sample"}

# These modules of the standard library draw for who calls them.
_DRAWERS = frozenset({"random", "secrets", "uuid"})
# They time what they compile; what they draw, models seed.
_COMPUTE = ("numpy", "torch", "jax", "jaxlib")
_EXEMPT = (*_COMPUTE, "aiosgd.runtime", "aiosgd.plugins")
# It calls what it is given: ctx.run(time.sleep, 1) comes from there.
_SIMULATION = "aiosgd.runtime.simulation"
_IMPORT = "importlib"


def _never(*_: Any, **__: Any) -> bool:
    return False


def _has_seed(seed: object = None) -> bool:
    return seed is not None


def _seeds(_generator: object, a: object = None, _version: int = 2) -> bool:
    return a is not None


class _Door(NamedTuple):
    """A function that leads out of a simulation.

    Attributes:
        owner, name: where it stands.
        what: what users call it.
        instead: what to do.
        skipped: packages whose calls count for who calls them.
        harmless: given the arguments, whether the call may go through.
    """

    owner: Any
    name: str
    what: str
    instead: str
    skipped: frozenset[str] = _DRAWERS
    harmless: Callable[..., bool] = _never


def _doors_of(owner: Any, names: Iterable[str], what: str, instead: str) -> list[_Door]:
    there = [name for name in names if hasattr(owner, name)]
    return [_Door(owner, name, f"{what}.{name}()", instead) for name in there]


_READS = [
    *_doors_of(time, _CLOCKS.split(), "time", _CLOCK),
    *_doors_of(time, ["sleep"], "time", _SLEEP),
    *_doors_of(random, _global_methods(random, random.random), "random", _RNG),
    *_doors_of(random.SystemRandom, ["random", "getrandbits"], "random.SystemRandom()", _RNG),
    _Door(random.Random, "seed", "random.Random() without a seed", _SEED, harmless=_seeds),
    *_doors_of(secrets, _SECRETS.split(), "secrets", _RNG),
    *_doors_of(os, ["urandom"], "os", _RNG),
    *_doors_of(uuid, ["uuid1", "uuid4"], "uuid", _RNG),
    *_doors_of(np.random, sorted(_NUMPY), "numpy.random", _RNG),
    _Door(np.random, "default_rng", "default_rng() without a seed", _SEED, harmless=_has_seed),
]
"""Refused to who calls them."""

_STANDARD = sys.stdlib_module_names
_ACTS = [
    _Door(threading.Thread, "start", "threading.Thread.start()", _RUN, _STANDARD),
    _Door(socket.socket, "__init__", "socket.socket()", _SEND, _STANDARD),
    _Door(socket, "socketpair", "socket.socketpair()", _SEND, _STANDARD),
    _Door(subprocess.Popen, "__init__", "subprocess.Popen()", _NOTHING, _STANDARD),
    *(door._replace(skipped=_STANDARD) for door in _doors_of(os, _ACTIONS, "os", _NOTHING)),
]
"""Refused to who wants them done, whatever part of the standard library does it for them."""


class _Doors:
    """The replaced names of this process, and which threads simulate.

    Attributes:
        count: guards that are active, in all threads.
        changed: what was replaced: owner, name, what it was.
        refusals: id of a replaced function -> what stands in for it.
        here: `depth` is how many guards this thread is in.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.changed: list[tuple[Any, str, Any]] = []
        self.refusals: dict[int, Any] = {}
        self.here = threading.local()

    def close(self, modules: Sequence[ModuleType]) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                for door in (*_READS, *_ACTS):
                    original = door.owner.__dict__[door.name]
                    self.refusals[id(original)] = _refusal(original, door)
                    self._replace(door.owner, door.name, self.refusals[id(original)])
            for module in modules:
                for name, value in list(vars(module).items()):
                    if id(value) in self.refusals:
                        self._replace(module, name, self.refusals[id(value)])

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self.changed.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def open(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                for owner, name, original in reversed(self.changed):
                    setattr(owner, name, original)
                self.changed.clear()
                self.refusals.clear()


_doors = _Doors()


@contextmanager
def guard(modules: Sequence[ModuleType] = ()) -> Iterator[None]:
    """Refuse the real world to this thread's code, but for the framework's.

    Args:
        modules: whose globals are guarded, too, for they may have been imported by name:
            `from time import time`. A codec's and its server's.
    """
    _doors.close(modules)
    here = _doors.here
    here.depth = getattr(here, "depth", 0) + 1
    try:
        yield
    finally:
        here.depth -= 1
        _doors.open()


def unguarded(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function do what it wants even if a simulation calls it: it only looks on."""

    def call(*args: P.args, **options: P.kwargs) -> T:
        here = _doors.here
        depth, here.depth = getattr(here, "depth", 0), 0
        try:
            return function(*args, **options)
        finally:
            here.depth = depth

    return call


def _refusal(original: Callable[..., Any], door: _Door) -> Callable[..., Any]:
    """Return what stands in for a function; it may be kept for ever, and then forwards."""
    here, skipped, harmless = _doors.here, door.skipped, door.harmless

    def call(*args: Any, **options: Any) -> Any:
        if getattr(here, "depth", 0) and not harmless(*args, **options):
            caller = _refused(inspect.currentframe(), skipped)
            if caller is not None:
                where = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
                raise EscapeError(
                    f"{where}: {door.what} differs from run to run, which a simulation must not; "
                    f"{door.instead}"
                )
        return original(*args, **options)

    return call


def _refused(frame: FrameType | None, skipped: frozenset[str]) -> FrameType | None:
    """Return the frame that a call by `frame` counts for, if it is refused."""
    while frame is not None and (_top(frame) in skipped or _name(frame) == __name__):
        frame = frame.f_back
    if frame is None or not _is_guarded(_name(frame)) or _imports(frame):
        return None
    return frame


def _name(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name if isinstance(name, str) else ""


def _top(frame: FrameType) -> str:
    return _name(frame).partition(".")[0]


@functools.cache
def _is_guarded(name: str) -> bool:
    if _is_in(name, _SIMULATION):
        return True
    if any(_is_in(name, exempt) for exempt in _EXEMPT):
        return False
    return name.partition(".")[0] not in sys.stdlib_module_names


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _imports(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported, since the simulation called what called this."""
    while frame is not None and not _is_in(_name(frame), _SIMULATION):
        if _top(frame) == _IMPORT:
            return True
        frame = frame.f_back
    return False


def modules_of(*plugins: type | None) -> list[ModuleType]:
    """Return the modules that plugins and their base classes are written in."""
    classes = [base for plugin in plugins if plugin is not None for base in plugin.__mro__]
    names = dict.fromkeys(base.__module__ for base in classes)
    return [sys.modules[name] for name in names if name in sys.modules]
