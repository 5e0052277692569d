"""The launcher of nodes as actors on a Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from aiosgd.errors import ClusterError, PluginError
from aiosgd.plugins.launchers.base import (
    Launched,
    Launcher,
    Printed,
    Wanted,
    check_seconds,
    check_words,
    ignore,
    node_words,
    read_secret_line,
)
from aiosgd.plugins.launchers.processes import Command, Process, children

DRIVER = (sys.executable, "-P", "-m", "aiosgd.plugins.launchers.ray_driver")
STOP_TIMEOUT = 15.0
"""Seconds that the driver has to end its actors; then it is killed, and Ray ends them."""


class Ray(Launcher):
    """Nodes as actors of a placement group on a Ray cluster; each actor holds a node process.

    Ray places them, and starts an actor that dies again, on the same host while that has room: then
    its node listens where it did, with the checkpoints that it had, and a job of `--on-loss
    continue` goes on. The actors end with the launcher's own connection to Ray, however that ends.
    The secret goes to the actors as an argument: who may run tasks on the Ray cluster can get at it.
    """

    @dataclass(frozen=True)
    class Params:
        """Which cluster, and what a node takes of it.

        Attributes:
            address: Ray's, as `ray.init` takes it; `auto`: RAY_ADDRESS, or the one that runs on this
                machine.
            cpus, gpus: of each node; fractions are for nodes that share one.
            memory: bytes that Ray sets aside for each; 0: none.
            resources: more of Ray's own: `{tpu=1}`.
            strategy: how hosts are chosen: near each other, apart, or one or the other strictly.
            restarts: how often a lost actor is started again; -1: always.
            python: the command of the Python that has aiosgd there; empty: the actor's.
            run_dir: where nodes keep their copies of jobs; empty: a temporary folder.
            data_dir: where nodes keep data; empty: where nodes usually do.
            timeout: seconds that Ray has to find room, and the nodes to listen.
        """

        address: str = "auto"
        cpus: float = 1.0
        gpus: float = 0.0
        memory: int = 0
        resources: dict[str, float] = field(default_factory=dict)
        strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
        restarts: int = -1
        python: str = ""
        run_dir: str = ""
        data_dir: str = ""
        timeout: float = 120.0

        def __post_init__(self) -> None:
            check_seconds("timeout", self.timeout)
            check_words("python", self.python)
            if self.restarts < -1:
                raise ValueError(f"restarts is {self.restarts}; expected -1 or more")
            for name, value in {"cpus": self.cpus, "gpus": self.gpus, **self.resources}.items():
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} is {value}; expected 0 or more")
            if not (self.cpus or self.gpus or self.memory or any(self.resources.values())):
                raise ValueError("cpus and all else is 0; Ray places nothing that takes nothing")

    def __init__(self, params: Params) -> None:
        self._params = params

    @contextlib.asynccontextmanager
    async def launch(self, wanted: Wanted, printed: Printed = ignore) -> AsyncIterator[Launched]:
        """Start the driver, a process with a connection to Ray; it tells how it goes."""
        if importlib.util.find_spec("ray") is None:
            raise PluginError("the launcher 'ray' needs Ray: pip install 'aiosgd[ray]'")
        with wanted.secret() as secret_file:
            order = {
                **asdict(self._params),
                "names": wanted.names,
                # the actor fills in its own Python and its host's address
                "words": node_words([], wanted, host="{host}", data_dir=self._params.data_dir),
                "secret": read_secret_line(secret_file),
            }
            driver = Command(DRIVER, secret=json.dumps(order))
            async with (
                children({"ray": driver}, STOP_TIMEOUT) as processes,
                _Driver(processes["ray"], printed) as speaker,
            ):
                found = await speaker.addresses(wanted.names)
                addresses = [found[name] for name in wanted.names]
                over = speaker.hear()
                yield Launched.split(wanted, addresses, secret_file=secret_file, over=over)


class _Driver:
    """What the driver says, line by line, for the time of a context; see `ray_driver`."""

    def __init__(self, process: Process, printed: Printed) -> None:
        self._process = process
        self._printed = printed

    async def __aenter__(self) -> Self:
        self._noise = asyncio.ensure_future(self._read_noise())
        self._tasks: list[asyncio.Future[str]] = [self._noise]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def addresses(self, names: list[str]) -> dict[str, str]:
        """Wait until all nodes listen; raises ClusterError with what Ray has against it."""
        found: dict[str, str] = {}
        while found.keys() < set(names):
            said = await self._line()
            if said is None:
                raise ClusterError(f"Ray's driver ended: {await self._noise or 'it said nothing'}")
            if "address" in said:
                found[said["node"]] = said["address"]
            else:
                self._pass_on(said)
        return found

    def hear(self) -> asyncio.Future[str]:
        """Pass on what it says from now on; what is returned is done with its end."""
        self._tasks.append(asyncio.ensure_future(self._hear()))
        return self._tasks[-1]

    async def _hear(self) -> str:
        try:
            while (said := await self._line()) is not None:
                self._pass_on(said)
        except ClusterError as error:
            return str(error)
        return "the connection to Ray has ended"

    def _pass_on(self, said: Mapping[str, Any]) -> None:
        if "error" in said:
            raise ClusterError(str(said["error"]))
        self._printed(said["node"], said["says"])

    async def _line(self) -> dict[str, Any] | None:
        """Return what the driver says next; None once it has ended."""
        assert self._process.stdout is not None
        while True:
            with contextlib.suppress(ValueError):  # Ray itself may print something, at any length
                line = await self._process.stdout.readline()
                if not line:
                    return None
                said = json.loads(line)
                if isinstance(said, dict) and said.keys() & {"says", "error", "address"}:
                    return said

    async def _read_noise(self) -> str:
        """Empty the driver's stderr, where Ray's own log is; return its last line."""
        assert self._process.stderr is not None
        last = b""
        while chunk := await self._process.stderr.read(1 << 16):
            last = (last + chunk)[-4096:]
        lines = last.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
