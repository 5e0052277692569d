"""Ways of exchanging, each with its codec and a formula for the seconds of one exchange."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exchange import HEADER

from aiosgd.codecs.allreduce import AllReduce, AllReduceParams, Hierarchical
from aiosgd.codecs.base import Codec, Graph
from aiosgd.codecs.gossip import DPsgd
from aiosgd.codecs.parameter_server import ParameterServer, ParameterServerParams
from aiosgd.plugins.registry import NoParams
from aiosgd.plugins.topologies import Exponential, OnePeer, Topology
from aiosgd.runtime.simulation.network import NetworkModel


def wire(size: float, model: NetworkModel) -> float:
    """Return how long bytes take through a card."""
    return size / model.bytes_per_s


def slowest(count: float, model: NetworkModel) -> float:
    """Return the expected delay of the slowest of so many messages, processors included."""
    path = model.path
    losses = (1 - math.exp(-count * path.loss**k) for k in range(1, 5))
    again = sum(share * path.retry_s * 2**k for k, share in enumerate(losses))
    jitter = path.jitter_s * count / (count + 1)
    return path.latency_s + jitter + again + 2 * model.message_s


def parts(size: float, least: int, most: float) -> tuple[int, float]:
    """Return how many parts a vector travels in, a multiple of `least`, and the bytes of each."""
    count = least * max(1, math.ceil(size / (least * most)))
    return count, size / count + HEADER


def hops(count: int, size: float, rounds: int, chains: int, model: NetworkModel) -> float:
    """Return how long messages take one after the other, `rounds` of them overlapping.

    A message that is lost holds up those behind it, which come one hop's time apart. The last of
    the `chains` has had more bad luck than the average one.
    """
    path = model.path
    even = wire(size, model) + path.latency_s + path.jitter_s / 2 + 2 * model.message_s
    held = path.retry_s * (1 + max(0.0, path.retry_s / even - 1) / 2)
    wait = even + path.loss * held
    spread = count * (path.jitter_s**2 / 12 + path.loss * held * path.retry_s)
    luck = math.sqrt(2 * math.log(chains) * spread)
    busy = rounds * wire(size, model)  # then waiting is hidden, but for the first
    return max(count * wait + luck, (count - 1) * busy + wait) + busy - wire(size, model)


def ring(size: int, n: int, model: NetworkModel) -> float:
    """Return the seconds of a ring: 2 (n - 1) hops, each part at its own pace."""
    count, part = parts(size, n, AllReduceParams.part)
    return hops(2 * (n - 1), part, count // n, count, model)


def doubling(size: int, n: int, model: NetworkModel) -> float:
    """Return the seconds of recursive doubling; once more, and two hops, if n is no power of two."""
    count, part = parts(size, 1, AllReduceParams.part)
    rounds = n.bit_length() - 1
    if n.bit_count() == 1:
        return hops(rounds, part, count, n, model)
    return hops(rounds + 1, part, count, n, model) + 2 * wire(part, model) + slowest(n, model)


def hierarchical(size: int, n: int, model: NetworkModel) -> float:
    """Return the seconds of √n groups.

    What comes in at a leader is taken in the order of arrival, and its members are first: all of
    their values are there before the leaders' ring gets on.
    """
    group = math.isqrt(n)
    leaders = math.ceil(n / group)
    count, part = parts(size, leaders, AllReduceParams.part)
    inside = wire((group - 1) * size, model) + slowest(n, model)
    return 2 * inside + hops(2 * (leaders - 1), part, count // leaders, leaders, model)


def parameter_server(size: int, n: int, model: NetworkModel, servers: int) -> float:
    """Return the seconds of servers that share a model.

    The last part comes in when all others are, and then leaves to all workers.
    """
    count, part = parts(size / servers, 1, ParameterServerParams.part)
    each = n * max(wire(part, model), model.message_s + part * model.byte_s)
    return count * each + each + 2 * slowest(n * servers, model)


def gossip(size: int, n: int, model: NetworkModel, neighbours: int) -> float:
    """Return the seconds of sending to so many neighbours at once, and of hearing from as many."""
    processor = (neighbours - 1) * size * model.byte_s
    return wire(neighbours * size, model) + processor + slowest(n * neighbours, model)


@dataclass(frozen=True, eq=False)
class Way:
    """A way of exchanging.

    Attributes:
        name, style: in the picture.
        codec, params, servers: what is simulated; servers by the number of workers.
        most: workers up to which the two sizes are simulated.
        seconds: the formula.
        models: how many models the busiest node sends, by the number of workers.
        thin: whether its messages get small where workers are many.
        topology: who exchanges with whom.
    """

    name: str
    style: dict[str, Any]
    codec: type[Codec]
    params: dict[str, Any]
    servers: Callable[[int], int]
    most: tuple[int, int]
    seconds: Callable[[int, int, NetworkModel], float]
    models: Callable[[int], float]
    thin: bool = False
    topology: type[Topology] | None = None

    @property
    def is_served(self) -> bool:
        """Whether it has servers."""
        return self.servers is not nobody

    def graph(self, n: int) -> Graph | None:
        """Return the links between so many workers; None is everybody with everybody."""
        return self.topology(NoParams()).graph(n, seed=0) if self.topology else None


def nobody(_n: int) -> int:
    """Return the servers of a codec without."""
    return 0


def eighth(n: int) -> int:
    """Return one server for eight workers."""
    return max(1, n // 8)


def rounds(n: int) -> int:
    """Return ⌈log2 n⌉."""
    return (n - 1).bit_length()


WAYS = (
    Way("all-reduce, ring", {"color": "C0"}, AllReduce, {"small": 0}, nobody, (256, 64), ring,
        lambda n: 2 * (n - 1) / n, thin=True),
    Way("all-reduce, doubling", {"color": "C9", "linewidth": 5, "alpha": 0.4}, AllReduce, {"small": 1 << 40}, nobody, (256, 64), doubling,
        lambda n: n.bit_length() - 1 + (n.bit_count() > 1)),
    Way("hierarchical, √N groups", {"color": "C2"}, Hierarchical, {}, nobody, (256, 64), hierarchical,
        lambda n: math.isqrt(n) + 1 - 2 / math.isqrt(n)),
    Way("parameter server, 1", {"color": "C3"}, ParameterServer, {}, lambda _n: 1, (1024, 64),
        lambda size, n, model: parameter_server(size, n, model, 1), lambda n: n),
    Way("parameter servers, N/8", {"color": "C1"}, ParameterServer, {}, eighth, (256, 64),
        lambda size, n, model: parameter_server(size, n, model, eighth(n)),
        lambda n: n / eighth(n), thin=True),
    Way("gossip, exponential", {"color": "C4", "linestyle": "--"}, DPsgd, {}, nobody, (10_000, 1024),
        lambda size, n, model: gossip(size, n, model, rounds(n)), rounds, topology=Exponential),
    Way("gossip, one peer", {"color": "C6", "linestyle": "--"}, DPsgd, {}, nobody, (10_000, 10_000),
        lambda size, n, model: gossip(size, n, model, 1), lambda _n: 1, topology=OnePeer),
)  # fmt: skip
