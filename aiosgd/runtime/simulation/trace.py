"""What happened in a simulation, as a list of events and one digest of all of them."""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import NamedTuple

_EVENT = struct.Struct("<qBqqqq")
_BATCH = 1 << 16


class What(enum.IntEnum):
    """Kinds of events."""

    SEND = 0
    DELIVER = 1
    DROP = 2
    CRASH = 3
    CUT = 4
    HEAL = 5
    COMPUTE = 6
    BREAK = 7


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        time_ns: virtual time.
        what: its kind.
        node: where: the sender, the receiver of a delivery is `peer`.
        peer: the other node; for COMPUTE how many blocks the node has computed.
        number: the message's place among those from `node` to `peer`, from 0 on; for COMPUTE the
            block.
        size: bytes; for COMPUTE the CRC-32 of its value.
    """

    time_ns: int
    what: What
    node: int
    peer: int
    number: int
    size: int


class Trace:
    """Takes events in their order.

    Args:
        keep: whether to keep them, not only their digest.

    Attributes:
        events: all of them, if they are kept.
        count: how many there were.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.events: list[Event] = []
        self.count = 0
        self._keep = keep
        self._hash = hashlib.sha256()
        self._batch = bytearray()

    def add(self, time_ns: int, what: What, node: int, peer: int, number: int, size: int) -> None:
        """Take an event; see `Event`."""
        self.count += 1
        self._batch += _EVENT.pack(time_ns, what, node, peer, number, size)
        if len(self._batch) > _BATCH:
            self._hash.update(self._batch)
            self._batch.clear()
        if self._keep:
            self.events.append(Event(time_ns, what, node, peer, number, size))

    @property
    def digest(self) -> str:
        """The sha256 of all events so far."""
        self._hash.update(self._batch)
        self._batch.clear()
        return self._hash.hexdigest()
