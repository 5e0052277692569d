"""The Python calls: `aiosgd.run(...)` and `aiosgd.submit("cluster.toml", ...)`.

They are synchronous and also work where an event loop already runs, as in a notebook.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from aiosgd import aio
from aiosgd.runtime.config import Cluster
from aiosgd.runtime.coordinator import Outcome as Result

T = TypeVar("T")

__all__ = ["Result", "run", "submit"]


def run(**options: Any) -> Result:
    """Run a job on this machine; see `aiosgd.aio.run`."""
    return wait_for(aio.run(**options))


def submit(cluster: str | Path | Cluster, **options: Any) -> Result:
    """Run a job on a cluster; see `aiosgd.aio.submit`."""
    return wait_for(aio.submit(cluster, **options))


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own if this one already has a loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            failure.append(error)

    thread = threading.Thread(target=target, name="aiosgd")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
