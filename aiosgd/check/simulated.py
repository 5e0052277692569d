"""A case as a whole job in virtual time: sessions, frames and a network between them."""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiosgd.check.case import Case
from aiosgd.check.local import CALLBACKS, message_limit
from aiosgd.check.problem import make_workload
from aiosgd.check.story import Moment, Story, described, waits
from aiosgd.check.subject import Subject
from aiosgd.codecs.base import Vector
from aiosgd.plugins.registry import error_text
from aiosgd.runtime.job import node_name
from aiosgd.runtime.simulation.faults import Crash, parse_faults, parse_stragglers
from aiosgd.runtime.simulation.loop import SECOND, LimitError, run_virtually
from aiosgd.runtime.simulation.network import NetworkModel, Path
from aiosgd.runtime.simulation.trace import Trace, What
from aiosgd.runtime.simulation.world import Ending, Scenario, World
from aiosgd.runtime.workload import Group, Workload

BLOCK_S = 2e-3
"""Virtual seconds of a block: some messages' time, so that exchange and computing overlap."""
LIMIT_S = 120.0
"""Virtual seconds that a small job may take: steps of milliseconds, a step's timeout of 10 s and
again after a rescue, and 5 to 7 s until a silent node is taken for dead."""


@dataclass
class Job:
    """How a simulated case went.

    Attributes:
        case: what was simulated.
        error: why it did not end well; empty if it did.
        endless: whether it did not end at all within `LIMIT_S`.
        time_s: virtual seconds that it took.
        weights: node -> what it holds at the end.
        bytes_sent: of all nodes, headers included.
        times_s: when something happened, ascending, without repetitions.
    """

    case: Case
    error: str = ""
    endless: bool = False
    time_s: float = 0.0
    weights: dict[int, Vector | None] = field(default_factory=dict)
    bytes_sent: int = 0
    times_s: Sequence[float] = ()
    moments: Story = field(default_factory=list, repr=False)

    @functools.cached_property
    def story(self) -> Story:
        """Everything that happened; where no end came, who waits for what."""
        story = sorted(self.moments, key=lambda moment: moment.time)
        if self.error:
            story += waits(story, self.case, self.time_s) if self._is_stuck else []
            story.append(Moment(self.time_s, "fail", self._blamed, None, 0, self.error))
        return story

    @property
    def _blamed(self) -> int:
        """The node that reported the error, or that was lost."""
        named = (node for node in self.case.nodes if self.error.startswith(node_name(node)))
        return next(named, 0)

    @property
    def _is_stuck(self) -> bool:
        return self.endless or "no result within" in self.error

    @property
    def bits(self) -> dict[int, bytes]:
        """The bits of the workers' weights."""
        return {
            node: w.tobytes() for node, w in self.weights.items() if node >= 0 and w is not None
        }


def simulate(subject: Subject, case: Case, *, noise: float = 0.0) -> Job:
    """Simulate a case; whatever goes wrong is in the job's `error`.

    Args:
        noise: of the targets, as in `make_workload`.
    """
    job = Job(case)
    trace = Trace(keep=True)
    worlds: list[World] = []

    async def main() -> Ending:
        load = _workload(subject, case, noise)
        workers, servers = case.nodes[: case.workers], case.nodes[case.workers :]
        worlds.append(World(load, workers, servers, scenario_of(case), trace))
        _record(worlds[0], job.moments)
        return await worlds[0].run()

    try:
        most = CALLBACKS * message_limit(case)
        ending = run_virtually(main(), seconds=LIMIT_S, events=most)
        job.error, job.time_s = ending.error, ending.time_s
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a codec may raise anything
        job.error, job.endless = error_text(error), isinstance(error, LimitError)
        job.time_s = worlds[0].loop.time() if worlds else 0.0
    job.times_s = sorted({event.time_ns / SECOND for event in trace.events})
    for world in worlds:
        _collect(job, world, trace)
    return job


def _workload(subject: Subject, case: Case, noise: float) -> Workload:
    load = make_workload(subject, case, noise=noise)
    if case.granularity == "tensor":
        groups: tuple[Group, ...] = tuple({name: s} for name, s in load.model.shapes.items())
        load = dataclasses.replace(load, groups=groups)
    return dataclasses.replace(
        load,
        topology=case.graph,
        compressor=case.make_compressor or load.compressor,
    )


def scenario_of(case: Case) -> Scenario:
    """Return what a case is simulated on."""
    network = NetworkModel(
        name="check", block_s=BLOCK_S, path=Path(latency_s=1e-4, jitter_s=case.jitter)
    )
    return Scenario(
        network=network,
        slow=parse_stragglers(case.slow, case.workers, case.seed),
        faults=parse_faults(case.faults, case.nodes),
        seed=case.schedule,
    )


def _record(world: World, moments: Story) -> None:
    """Have a world's messages written down at both ends; links keep their order."""
    numbers: list[int] = [0]
    under_way: defaultdict[tuple[int, int], deque[tuple[int, str]]] = defaultdict(deque)

    def wrap(node: int, send: Callable[..., int], deliver: Callable[[int, Any], None]) -> None:
        def sent(to: Sequence[int], content: Any, channel: int) -> int:
            _, step, inner = content
            label = described(inner)
            for peer in to:
                numbers[0] += 1
                under_way[node, peer].append((numbers[0], label))
                moments.append(
                    Moment(world.loop.time(), "send", node, peer, step, label, numbers[0])
                )
            return send(to, content, channel)

        def delivered(sender: int, content: Any) -> None:
            number, label = under_way[sender, node].popleft()
            step = content[1]
            moments.append(Moment(world.loop.time(), "deliver", node, sender, step, label, number))
            deliver(sender, content)

        world.transports[node].send = sent  # type: ignore[method-assign]
        world.transports[node].deliver = delivered

    for node, transport in world.transports.items():
        wrap(node, transport.send, transport.deliver)


def _collect(job: Job, world: World, trace: Trace) -> None:
    """Take what a world leaves."""
    ends: dict[int, list[float]] = {}  # worker -> when each of its steps ended
    for node, session in world.sessions.items():
        job.weights[node] = session.weights
        job.bytes_sent += world.transports[node].bytes_sent
        ends[node] = [float(time) for time in session.train.columns()["time_s"]]
        job.moments += [Moment(t, "result", node, None, i, "") for i, t in enumerate(ends[node])]
    for event in trace.events:
        if event.what is What.COMPUTE:
            time = event.time_ns / SECOND
            step = bisect_right(ends[event.node], time - BLOCK_S)
            label = f"block {event.number}"
            job.moments.append(Moment(time, "update", event.node, None, step, label))
    for fault in parse_faults(job.case.faults, job.case.nodes):
        if isinstance(fault, Crash) and fault.time_s <= job.time_s:
            label = "its host goes" if fault.silent else "its process ends"
            job.moments.append(Moment(fault.time_s, "crash", fault.node, None, 0, label))
    _drop(job.moments, job.time_s)


def _drop(moments: Story, time_s: float) -> None:
    """Say which messages never arrived."""
    arrived = {moment.number for moment in moments if moment.kind == "deliver"}
    moments += [
        moment._replace(time=time_s, kind="drop", label="never arrives")
        for moment in moments
        if moment.kind == "send" and moment.number not in arrived
    ]
