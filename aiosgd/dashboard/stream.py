"""The events of the live page: the parts that have changed, as a browser's EventSource reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiosgd.dashboard.page import Drawing, View
from aiosgd.dashboard.watch import Watch
from aiosgd.report.markup import Html

PULSE = 5.0
"""Seconds without news after which a browser hears that the page is alive."""
PACE = 1.0
"""Seconds between two versions of the page at least, and `SPARE` times what drawing one took."""
SPARE = 9
VIEWERS = 16
"""Browsers at a time."""


class Stream:
    """Sends the page's parts to whoever looks, each version drawn once for all of the same view.

    Args:
        watch: what asks the nodes.
        title: of the cluster.
    """

    def __init__(self, watch: Watch, title: str) -> None:
        self._watch = watch
        self._drawing = Drawing(title)
        self._drawn: dict[View, tuple[int, dict[str, Html]]] = {}
        self._turn = asyncio.Lock()
        self._took = 0.0
        self._over = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether so many look that no more can."""
        return self._watch.viewers >= VIEWERS

    def end(self) -> None:
        """Have all streams end."""
        self._over.set()

    async def events(self, view: View) -> AsyncIterator[str]:
        """Yield events until `end`: all parts first, then those that change."""
        shown: dict[str, Html] = {}
        with self._watch.viewer():
            yield "retry: 1000\n\n"
            while not self._over.is_set():
                version, parts = await self._parts(view)
                for name, html in parts.items():
                    if shown.get(name) != html:
                        yield _event("part", {"id": name, "html": html})
                shown = parts
                yield _event("pulse", {})
                await self._pause(max(PACE, SPARE * self._took))
                await self._pause(PULSE, version)

    async def _pause(self, seconds: float, version: int | None = None) -> None:
        """Wait that long, until the end, or until there is something newer than a version."""
        waiting: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._over.wait())]
        if version is not None:
            waiting.append(asyncio.ensure_future(self._watch.news(version)))
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    async def _parts(self, view: View) -> tuple[int, dict[str, Html]]:
        """Return the newest parts, drawn beside the loop."""
        async with self._turn:
            version = self._watch.live.version
            if self._drawn.get(view, (-1,))[0] != version:
                loop = asyncio.get_running_loop()
                began, moment = loop.time(), self._watch.live.moment()
                parts = await asyncio.to_thread(self._drawing.parts, moment, view)
                self._took = loop.time() - began
                self._drawn = {v: one for v, one in self._drawn.items() if one[0] == version}
                self._drawn[view] = version, parts
            return version, self._drawn[view][1]


def _event(name: str, content: dict[str, str]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"
