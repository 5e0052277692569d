"""What a node tells Prometheus: counters and gauges as text, and who asks for them.

Everything is read when it is asked for; training does nothing for it. The text has numbers alone:
no job's id, title, options or addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from aiosgd import __version__
from aiosgd.errors import ClusterError, ConfigError
from aiosgd.runtime.archive import STATES
from aiosgd.runtime.config import Address
from aiosgd.runtime.endpoint import Listening, listen

if TYPE_CHECKING:
    from aiosgd.runtime.node import Node
    from aiosgd.runtime.part import Part

# upper ends of the histogram's buckets, in seconds: from a small model on one machine to a large one
# over a slow network
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# who asks gets an answer that is at most so many seconds old
FRESH = 0.05
# what somebody who asks may take: bytes of a request, seconds until the answer is read, and
# connections at a time
REQUEST, WITHIN, CONNECTIONS = 4096, 5.0, 16

Labels: TypeAlias = Mapping[str, str]
Sample: TypeAlias = tuple[str, Labels, float]


# What is counted ---------------------------------------------------------------------------------


@dataclass
class _Mark:
    """What was counted of a part so far."""

    rows: int = 0
    time_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)


class Counts:
    """What a node has done since it was started, over all jobs; nothing in it ever falls.

    Attributes:
        counters: name -> count.
        jobs: state -> jobs that ended so here.
        buckets: steps whose duration is in each of BUCKETS or, the last, above.
        seconds: that steps took; of these `compute_s` and `wait_s`.
    """

    def __init__(self) -> None:
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.jobs = dict.fromkeys(STATES, 0)
        self.buckets = np.zeros(len(BUCKETS) + 1, np.int64)
        self.seconds = self.compute_s = self.wait_s = 0.0
        self._marks: dict[int, _Mark] = {}

    def look(self, part: Part) -> None:
        """Count what a part has done since the last look."""
        session = part.session
        if session is None:
            return
        mark = self._marks.setdefault(id(part), _Mark())
        figures = session.figures()
        for name in ("bytes_sent", "bytes_received", "late", "skipped"):
            now = int(figures[name])
            self.counters[name] += max(0, now - mark.counters.get(name, 0))
            mark.counters[name] = now
        rows = session.train.since(mark.rows)
        if len(rows):
            durations = np.diff(rows.time_s, prepend=mark.time_s)
            self.buckets += np.bincount(
                np.searchsorted(BUCKETS, durations), minlength=len(self.buckets)
            )
            self.seconds += float(durations.sum())
            self.compute_s += float(rows.compute_s.sum())
            self.wait_s += float(rows.wait_s.sum())
            self.counters["steps"] += len(rows)
            self.counters["samples"] += int(rows.samples.sum())
            mark.rows, mark.time_s = mark.rows + len(rows), float(rows.time_s[-1])

    def left(self, part: Part, state: str) -> None:
        """Count a part that is over; its state is the submitter's word, and may be any."""
        self.look(part)
        self._marks.pop(id(part), None)
        self.jobs[state if state in self.jobs else "failed"] += 1


# What is told ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A metric with its samples: suffix of the name, labels and value each."""

    name: str
    kind: str
    words: str
    samples: Sequence[Sample]

    def lines(self) -> Iterator[str]:
        """Yield its lines of the text format, version 0.0.4."""
        yield f"# HELP {self.name} {self.words}"
        yield f"# TYPE {self.name} {self.kind}"
        for suffix, labels, value in self.samples:
            pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
            yield f"{self.name}{suffix}{f'{{{pairs}}}' if pairs else ''} {_number(value)}"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"


def _one(name: str, kind: str, words: str, value: float) -> Family:
    return Family(name, kind, words, [("", {}, value)])


COUNTERS = {
    "steps": ("steps", "Training steps that this node has taken."),
    "samples": ("samples", "Samples that this node has computed."),
    "bytes_sent": ("bytes_sent", "Bytes of messages to nodes of its jobs, headers included."),
    "bytes_received": ("bytes_received", "Bytes of messages from nodes of its jobs, likewise."),
    "late": ("late_messages", "Messages that came too late for their step and were dropped."),
    "skipped": ("skipped", "Blocks and results that were not finite and were left out."),
}
"""A count's name -> its metric's, and what it is."""


def text_of(node: Node) -> str:
    """Return what a node tells."""
    for part in node.under_way:
        node.counts.look(part)
    families = [*_facts(), *_counted(node.counts), *_now(node), *_process()]
    return "".join(f"{line}\n" for family in families for line in family.lines())


def _facts() -> Iterator[Family]:
    labels = {"version": __version__, "python": platform.python_version()}
    words = "Versions; the value is 1."
    yield Family("aiosgd_build_info", "gauge", words, [("", labels, 1)])


def _counted(counts: Counts) -> Iterator[Family]:
    for name, (metric, words) in COUNTERS.items():
        yield _one(f"aiosgd_{metric}_total", "counter", words, counts.counters[name])
    words = "Seconds that blocks took to compute."
    yield _one("aiosgd_compute_seconds_total", "counter", words, counts.compute_s)
    words = "Seconds that steps waited for their results."
    yield _one("aiosgd_wait_seconds_total", "counter", words, counts.wait_s)
    up_to = np.cumsum(counts.buckets).tolist()
    ends = [*map(str, BUCKETS), "+Inf"]
    buckets: list[Sample] = [
        ("_bucket", {"le": end}, n) for end, n in zip(ends, up_to, strict=True)
    ]
    samples = [*buckets, ("_sum", {}, counts.seconds), ("_count", {}, up_to[-1])]
    words = "Seconds from one step's end to the next."
    yield Family("aiosgd_step_seconds", "histogram", words, samples)
    words = "Jobs that this node has left, by how they ended."
    jobs: list[Sample] = [("", {"state": state}, n) for state, n in counts.jobs.items()]
    yield Family("aiosgd_jobs_total", "counter", words, jobs)


def _now(node: Node) -> Iterator[Family]:
    """What is so only while there is a job has no sample without one."""
    part = node.part
    words = "Whether this node has a job."
    yield _one("aiosgd_busy", "gauge", words, int(bool(node.member.job_id)))
    links = 0 if part is None or part.mesh is None else len(part.mesh.peers)
    yield _one("aiosgd_links", "gauge", "Links to other nodes of its job.", links)
    session = None if part is None else part.session
    rows = session.train.since(len(session.train) - 1) if session and len(session.train) else None
    if session is not None:
        words = "Steps that its job takes at most."
        yield _one("aiosgd_job_steps", "gauge", words, session.steps)
    if rows is not None:
        words = "The newest step of its job, from 0."
        yield _one("aiosgd_job_step", "gauge", words, int(rows.step[0]))
        words = "Mean loss of this worker's newest blocks."
        yield _one("aiosgd_loss", "gauge", words, float(rows.loss[0]))
        words = "Accuracy of this worker's newest blocks."
        yield _one("aiosgd_accuracy", "gauge", words, float(rows.accuracy[0]))


# The process, as Prometheus' own client libraries tell of it -------------------------------------


def _process() -> Iterator[Family]:
    words = "Seconds of processor time, user and system."
    yield _one("process_cpu_seconds_total", "counter", words, time.process_time())
    with contextlib.suppress(OSError, ValueError):  # a system without /proc
        pages = [int(text) for text in Path("/proc/self/statm").read_text().split()[:2]]
        size, resident = (n * resource.getpagesize() for n in pages)
        words = "Bytes of memory in use."
        yield _one("process_resident_memory_bytes", "gauge", words, resident)
        yield _one("process_virtual_memory_bytes", "gauge", "Bytes of address space.", size)
        yield _one("process_open_fds", "gauge", "Open files.", len(os.listdir("/proc/self/fd")) - 1)  # noqa: PTH208
        words = "When the process started, in seconds since 1970."
        yield _one("process_start_time_seconds", "gauge", words, _start_time())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = math.inf if limit == resource.RLIM_INFINITY else limit
    yield _one("process_max_fds", "gauge", "Files that may be open.", most)


@functools.cache
def _start_time() -> float:
    """Return when this process started; raises OSError or ValueError where that is not told."""
    # proc(5): the 22nd field; the second one, in brackets, may have blanks
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    if boot is None:
        raise ValueError("/proc/stat has no btime")
    return int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK")


# Who asks ----------------------------------------------------------------------------------------

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,1024}) HTTP/1\.[01]\r\n")
_OK = "200 OK"


class Exposition:
    """Answers `GET /metrics`, and nothing else.

    Args:
        text: returns what there is to tell.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._server: Listening | None = None
        self._open: dict[_Exchange, None] = {}  # in the order of their arrival
        self._made = (-math.inf, b"")

    async def listen(self, address: Address) -> Address:
        """Listen; return the address with the port that was picked if it is 0.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        try:
            server = await listen(address.host, address.port, lambda: _Exchange(self))
        except ClusterError as error:
            raise ConfigError(f"--metrics-port: {error}") from error
        self._server = server
        return Address(address.host, server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Listen no more, and leave whoever still asks."""
        if self._server is not None:
            self._server.close()
        for exchange in list(self._open):
            exchange.abort()

    def opened(self, exchange: _Exchange) -> None:
        """Take a connection; one too many sends the oldest away."""
        self._open[exchange] = None
        if len(self._open) > CONNECTIONS:
            next(iter(self._open)).abort()

    def closed(self, exchange: _Exchange) -> None:
        """Forget a connection."""
        self._open.pop(exchange, None)

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a request's head."""
        match = _REQUEST_LINE.match(request)
        if match is None:
            return _answer("400 Bad Request", b"this is no HTTP request\n")
        if match[2].partition(b"?")[0] != b"/metrics":
            return _answer("404 Not Found", b"there is /metrics alone\n")
        if match[1] != b"GET":
            return _answer("405 Method Not Allowed", b"GET alone\n", "Allow: GET\r\n")
        return _answer(_OK, self._body())

    def _body(self) -> bytes:
        """Return the text; of many who ask at once, all get the same."""
        now, (made, body) = time.monotonic(), self._made
        if now - made > FRESH:
            body = self._text().encode()
            self._made = (now, body)
        return body


def _answer(status: str, body: bytes, more: str = "") -> bytes:
    version = " version=0.0.4;" if status is _OK else ""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain;{version} charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body


class _Exchange(asyncio.Protocol):
    """One connection: a request, the answer, the end; all within a few seconds."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition
        self._request = b""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; called by the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's derive from none
        self._timer = asyncio.get_running_loop().call_later(WITHIN, self.abort)
        self._exposition.opened(self)

    def data_received(self, data: bytes) -> None:
        """Answer once the request's head is whole; called by the transport."""
        if self._answered:
            return
        self._request += data[: REQUEST + 1]
        if b"\r\n\r\n" in self._request[:REQUEST]:
            self._say(self._exposition.answer(self._request))
        elif len(self._request) > REQUEST:
            self._say(_answer("431 Request Header Fields Too Large", b"too long\n"))

    def _say(self, answer: bytes) -> None:
        self._answered, self._request = True, b""
        self._transport.write(answer)
        self._transport.close()

    def abort(self) -> None:
        """Break the connection off."""
        self._transport.abort()
        self._exposition.closed(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Clean up; called by the transport."""
        self._timer.cancel()
        self._exposition.closed(self)
