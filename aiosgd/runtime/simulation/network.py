"""What lies between the nodes of a simulation: network cards, links, processors, and their faults.

A message leaves through its sender's network card, which the node's links share evenly, while the
processor works on it; it is under way for the link's latency, comes in through the receiver's card,
and takes a processor's time there. Processors and incoming cards take messages one after the other.
Loss is delay, as in TCP: what is lost is sent again, and a link keeps its order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from aiosgd.runtime.simulation.draws import uniform
from aiosgd.runtime.simulation.loop import SECOND, VirtualLoop
from aiosgd.runtime.simulation.trace import Trace, What

# purposes of draws
_JITTER, _LOSS = 1, 2
# most times that one message is lost; each doubles the pause, up to 64 times the first
_LOSSES = 15
_DOUBLINGS = 6
# node ids go from -2^19 on, so that they are positive in a key
_FIRST = 1 << 19
# how far a fluid share may be off in the float's last places, in nanoseconds
_ROUNDING = 1e-3
# bytes that a socket takes or gives at a time; of larger messages, one end works on the first while
# the other still works on the rest
_PIECE = 1 << 16
# the thread that a node computes in is a lane of its own, beside its event loop
_THREAD = 1 << 20

Arrive = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Path:
    """How a link is.

    Attributes:
        latency_s: seconds from the last byte's leaving to its arrival.
        jitter_s: at most so much more, drawn anew for each message.
        loss: share of messages that are lost once, and of those again, and so on.
        retry_s: pause before what was lost is sent again; it doubles each time.
    """

    latency_s: float = 1e-4
    jitter_s: float = 0.0
    loss: float = 0.0
    retry_s: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Override:
    """Links that are not like the others: those between two sets of nodes, both ways."""

    between: Collection[int]
    others: Collection[int]
    path: Path


@dataclass(frozen=True, kw_only=True)
class NetworkModel:
    """What a simulation's network and machines are like.

    Attributes:
        name: as users know it.
        bytes_per_s: of each node's network card, each way.
        path: of all links but those in `overrides`, of which the last that fits counts.
        message_s, byte_s: processor seconds per message and per byte of it, at either end.
        flops: floating-point operations per second of a worker; a block takes 6 per parameter and
            sample, forward and backward.
        block_s: seconds of a block instead, whatever its size.
        noise: how far a block's time varies: evenly by ± this share.
        nodes_bytes_per_s: node -> its own `bytes_per_s`.
        codec_message_s, codec_byte_s: processor seconds of the receiver besides, for what its
            codec makes of a message: it adds what has come, and the like. A worker's own block
            takes as long for each byte, and for each tensor group but the first.
        least_s: seconds of a block besides, whatever its size.
        weight_s: seconds of a block per parameter besides, whatever its samples: the optimizer.
        step_s: seconds of a block that are no computing: a session's and a codec's own work.
        wake_s: processor seconds until a worker that has waited for others goes on.
        evaluation_s: seconds of an evaluation besides, whatever its size: to report it, and more.
        hop_s: seconds to a thread and back, for blocks that are too long for the event loop, for
            evaluations and for a codec's heavy work.
        cores: that all nodes share, being on one machine; None: nobody waits for another's work.
        slow: worker -> factor by which its computing is slower.
        replayed_s: worker -> seconds of its blocks, one after the other and again from the
            first; those of a real run. Nothing else counts for a worker that is in it.
    """

    name: str = "lan"
    bytes_per_s: float = 125e6
    path: Path = field(default_factory=Path)
    overrides: Sequence[Override] = ()
    message_s: float = 3e-5
    byte_s: float = 2e-10
    flops: float = 2e10
    block_s: float | None = None
    noise: float = 0.0
    nodes_bytes_per_s: Mapping[int, float] = field(default_factory=dict)
    codec_message_s: float = 0.0
    codec_byte_s: float = 0.0
    least_s: float = 0.0
    weight_s: float = 0.0
    step_s: float = 0.0
    wake_s: float = 0.0
    evaluation_s: float = 0.0
    hop_s: float = 0.0
    cores: int | None = None
    slow: Mapping[int, float] = field(default_factory=dict)
    replayed_s: Mapping[int, Sequence[float]] = field(default_factory=dict, repr=False)


class _Parcel:
    """A message on its way."""

    __slots__ = ("arrive", "begun", "number", "ready", "sender", "size", "time", "to", "wave")

    def __init__(
        self, sender: int, to: int, number: int, size: int, wave: tuple[int, int], arrive: Arrive
    ) -> None:
        self.sender, self.to, self.number, self.size = sender, to, number, size
        self.wave = wave  # how often the two nodes had crashed when it was sent
        self.arrive = arrive
        self.time = 0  # nanoseconds that it takes through the sender's card alone
        self.begun = 0  # when its first byte left
        self.ready = 0  # when the sender's processor is done with it


@dataclass(slots=True)
class _Link:
    """One direction between two nodes: how many messages so far, and what was told of the last one.

    Attributes:
        first, last: when its first and its last byte arrive.
        delivered: when its receiver has it.
    """

    path: Path
    count: int = 0
    first: int = 0
    last: int = 0
    delivered: int = 0
    held: list[_Parcel] | None = None  # not None: cut, and what waits for its healing


class _Processors:
    """The nodes' event loops and threads: each does one thing after the other.

    Args:
        cores: that all of them share; None is enough for all.
    """

    def __init__(self, cores: int | None) -> None:
        self._cores = cores
        self._free: dict[int, int] = {}  # lane -> when it is done with what it has

    def take(self, lane: int, earliest: int, cost: int) -> tuple[int, int]:
        """Do work of `cost` nanoseconds; return when it begins and ends.

        Where more lanes are busy than there are cores, the last one to begin takes as much longer:
        then equal work that begins together ends when it would if all had their even share.
        """
        start = max(earliest, self._free.get(lane, 0))
        if self._cores is not None:
            others = sum(free > start for other, free in self._free.items() if other != lane)
            cost = round(cost * max(1.0, (others + 1) / self._cores))
        self._free[lane] = start + cost
        return start, start + cost


class _Card:
    """A node's way out, shared evenly by the links that have something to send, as by TCP.

    Each busy link gets the same share. `given` is how many nanoseconds of sending each of them has
    had so far; the link whose first message needs the least more is the next to finish.
    """

    __slots__ = ("at", "given", "heads", "queues", "version")

    def __init__(self) -> None:
        self.given = 0.0
        self.at = 0
        self.heads: list[tuple[float, int]] = []  # what `given` is when a link's first is out
        self.queues: dict[int, deque[_Parcel]] = {}
        self.version = 0

    def advance(self, now: int) -> None:
        """Let time pass."""
        if self.heads:
            self.given += (now - self.at) / len(self.heads)
        self.at = now

    def push(self, parcel: _Parcel, now: int) -> bool:
        """Append a message; tell whether its link was idle."""
        self.advance(now)
        queue = self.queues.get(parcel.to)
        if queue is not None:
            queue.append(parcel)
            return False
        parcel.begun = max(parcel.begun, now)
        self.queues[parcel.to] = deque((parcel,))
        heapq.heappush(self.heads, (self.given + parcel.time, parcel.to))
        return True

    def pop(self, now: int) -> list[_Parcel]:
        """Take the messages that are out by now."""
        self.advance(now)
        out = []
        while self.heads and self.heads[0][0] <= self.given + _ROUNDING:
            done, to = heapq.heappop(self.heads)
            queue = self.queues[to]
            out.append(queue.popleft())
            if queue:
                queue[0].begun = max(queue[0].begun, now)
                heapq.heappush(self.heads, (done + queue[0].time, to))
            else:
                del self.queues[to]
        return out

    @property
    def next(self) -> int | None:
        """Nanoseconds until the next message is out, if nothing changes; None if there is none."""
        if not self.heads:
            return None
        return max(0, int((self.heads[0][0] - self.given) * len(self.heads)) + 1)


class Network:
    """Carries messages between nodes, in virtual time.

    Args:
        loop: whose time it is.
        model: what it is like.
        seed: of its draws.
        trace: told of every message and fault.

    Attributes:
        messages, bytes: sent so far.
    """

    def __init__(self, loop: VirtualLoop, model: NetworkModel, seed: int, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.messages = self.bytes = 0
        self._loop = loop
        self._seed = seed
        self._links: dict[tuple[int, int], _Link] = {}
        self._cards: dict[int, _Card] = {}
        self._in_free: dict[int, int] = {}  # node -> when its card has taken all that came so far
        self._processors = _Processors(model.cores)
        self._crashes: dict[int, int] = {}  # node -> how often
        self._message_ns = round(model.message_s * SECOND)
        self._byte_ns = model.byte_s * SECOND
        self._codec_message_ns = round(model.codec_message_s * SECOND)
        self._codec_byte_ns = model.codec_byte_s * SECOND
        self._unlimited = model.bytes_per_s == float("inf") and not model.nodes_bytes_per_s

    def send(self, sender: int, to: int, size: int, arrive: Arrive) -> None:
        """Send a message of `size` bytes; `arrive` is called when the receiver has it."""
        link = self._link(sender, to)
        number, link.count = link.count, link.count + 1
        now = self._loop.time_ns()
        self.messages += 1
        self.bytes += size
        self.trace.add(now, What.SEND, sender, to, number, size)
        parcel = _Parcel(sender, to, number, size, self._wave(sender, to), arrive)
        parcel.time = round(size * SECOND / self._speed(sender))
        start, parcel.ready = self._processors.take(sender, now, self._cost(size))
        parcel.begun = start + self._message_ns
        self._leave(parcel)

    def _wave(self, sender: int, to: int) -> tuple[int, int]:
        return self._crashes.get(sender, 0), self._crashes.get(to, 0)

    def _speed(self, node: int) -> float:
        return self.model.nodes_bytes_per_s.get(node, self.model.bytes_per_s)

    def _cost(self, size: int) -> int:
        """Return how long a processor at either end works on a message."""
        return self._message_ns + round(size * self._byte_ns)

    def occupy(self, node: int, cost: int, *, thread: bool) -> int:
        """Let a node compute for `cost` nanoseconds, on its loop or beside it; return the end."""
        lane = node + _THREAD if thread else node
        return self._processors.take(lane, self._loop.time_ns(), cost)[1]

    def _link(self, sender: int, to: int) -> _Link:
        link = self._links.get((sender, to))
        if link is None:
            link = self._links[sender, to] = _Link(self._path(sender, to))
        return link

    def _path(self, sender: int, to: int) -> Path:
        for override in reversed(self.model.overrides):
            sides = override.between, override.others
            if any(sender in a and to in b for a, b in (sides, sides[::-1])):
                return override.path
        return self.model.path

    # through the sender's card, the link and the receiver's card

    def _leave(self, parcel: _Parcel) -> None:
        if self._unlimited:
            self._travel(parcel)
            return
        card = self._cards.get(parcel.sender)
        if card is None:
            card = self._cards[parcel.sender] = _Card()
        if card.push(parcel, self._loop.time_ns()):
            self._arm(parcel.sender, card)

    def _arm(self, node: int, card: _Card) -> None:
        """Come back when the next message is out; what was armed before counts no more."""
        card.version += 1
        left = card.next
        if left is not None:
            when = self._loop.time_ns() + left
            self._loop.call_at_ns(when, _FIRST + node, self._sent, node, card.version)

    def _sent(self, node: int, version: int) -> None:
        card = self._cards.get(node)  # none after a crash
        if card is not None and version == card.version:
            for parcel in card.pop(self._loop.time_ns()):
                self._travel(parcel)
            self._arm(node, card)

    def _travel(self, parcel: _Parcel) -> None:
        """The last byte has left: find out when it arrives."""
        if self._is_gone(parcel):
            self._drop(parcel)
            return
        link, now = self._links[parcel.sender, parcel.to], self._loop.time_ns()
        if link.held is not None:
            link.held.append(parcel)
            return
        left = max(now, parcel.ready)
        last = left + self._delay(parcel, link.path)
        self._arrive_at(parcel, link, last, left - parcel.begun)

    def _arrive_at(self, parcel: _Parcel, link: _Link, last: int, spread: int) -> None:
        """Let the last byte arrive at `last`, the first `spread` nanoseconds before."""
        if last <= link.last:
            last = link.last + 1  # a link keeps its order
        link.last = last
        first = link.first = max(last - spread, link.first)  # it may lie in the past
        key = _key(parcel.to, parcel.sender, parcel.number)
        when = max(self._loop.time_ns(), first)
        self._loop.call_at_ns(when, key, self._come_in, parcel, key, last, first)

    def _delay(self, parcel: _Parcel, path: Path) -> int:
        delay = round(path.latency_s * SECOND)
        key = self._seed, parcel.sender + _FIRST, parcel.to + _FIRST, parcel.number
        if path.jitter_s:
            delay += round(path.jitter_s * SECOND * uniform(*key, _JITTER))
        if path.loss:
            losses = 0
            while losses < _LOSSES and uniform(*key, _LOSS + losses) < path.loss:
                delay += round(path.retry_s * SECOND) << min(losses, _DOUBLINGS)
                losses += 1
        return delay

    def _come_in(self, parcel: _Parcel, key: int, last: int, first: int) -> None:
        """The first byte is there: the card takes what comes in turn, then the processor does."""
        if not self._unlimited:
            takes = round(parcel.size * SECOND / self._speed(parcel.to))
            done = max(self._in_free.get(parcel.to, 0), first) + takes
            self._in_free[parcel.to] = done
            last = max(last, done)
        self._loop.call_at_ns(self._done(parcel, first, last), key, self._deliver, parcel)

    def _done(self, parcel: _Parcel, first: int, last: int) -> int:
        """Let the receiver's processor work on a message as it comes; return when it is done."""
        size, link = parcel.size, self._links[parcel.sender, parcel.to]
        codec = self._codec_message_ns + round(size * self._codec_byte_ns)
        worked = self._processors.take(parcel.to, first, self._cost(size) + codec)[1]
        done = max(worked, last + self._cost(min(size, _PIECE)) + codec, link.delivered + 1)
        link.delivered = done
        return done

    def _deliver(self, parcel: _Parcel) -> None:
        if self._is_gone(parcel):
            self._drop(parcel)
            return
        now, size = self._loop.time_ns(), parcel.size
        self.trace.add(now, What.DELIVER, parcel.sender, parcel.to, parcel.number, size)
        parcel.arrive()

    def _is_gone(self, parcel: _Parcel) -> bool:
        """Tell whether one of the two nodes has crashed since."""
        return parcel.wave != self._wave(parcel.sender, parcel.to)

    def _drop(self, parcel: _Parcel) -> None:
        now = self._loop.time_ns()
        self.trace.add(now, What.DROP, parcel.sender, parcel.to, parcel.number, parcel.size)

    # faults

    def cut(self, some: Collection[int], others: Collection[int]) -> None:
        """Let nothing through between two sets of nodes until `heal`; nothing is lost."""
        self.trace.add(self._loop.time_ns(), What.CUT, len(some), len(others), 0, 0)
        for a in some:
            for b in others:
                for pair in ((a, b), (b, a)):
                    link = self._link(*pair)
                    if link.held is None:
                        link.held = []

    def heal(self) -> None:
        """End all cuts; what was held goes on after half of TCP's first pause."""
        now = self._loop.time_ns()
        self.trace.add(now, What.HEAL, 0, 0, 0, 0)
        for link in self._links.values():
            held, link.held = link.held or [], None
            pause = round((link.path.latency_s + link.path.retry_s / 2) * SECOND)
            for parcel in held:
                self._arrive_at(parcel, link, now + pause, 0)

    def is_cut(self, sender: int, to: int) -> bool:
        """Tell whether a cut separates two nodes."""
        link = self._links.get((sender, to))
        return link is not None and link.held is not None

    def crash(self, node: int) -> None:
        """Drop all that is under way from or to a node; what is sent after this is of its next life."""
        self.trace.add(self._loop.time_ns(), What.CRASH, node, 0, 0, 0)
        self._crashes[node] = self._crashes.get(node, 0) + 1
        card = self._cards.pop(node, None)
        for queue in card.queues.values() if card is not None else ():
            for parcel in queue:
                self._drop(parcel)


def _key(to: int, sender: int, number: int) -> int:
    """Return what orders events of one time: by receiver, sender and number, not by who ran first."""
    return (((to + _FIRST) << 20 | (sender + _FIRST)) << 32) | number
