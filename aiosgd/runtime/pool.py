"""Warm memory: what was used before and is not any more.

New memory costs a page fault for every 4 KiB: 100 MB of it take 7 to 25 ms, twice as long as the
same bytes take to arrive. A pool hands out memory that was touched before. Nobody has to give it
back: it returns by itself when the last array that refers to it is gone.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict, deque

import numpy as np

from aiosgd.runtime.frame import Bytes, allocate

SMALLEST = 512 << 10
"""Below this, the memory of the allocator itself is warm, and costs less to get."""
IDLE_AT_MOST = 1 << 30
"""Bytes that a pool keeps for later; what comes back beyond that is freed."""

HEAP_SETTINGS = {-1: 128 << 20, -2: 4 << 20, -3: 32 << 20}
"""What glibc's `mallopt` gets: bytes of the heap's free end that it keeps (M_TRIM_THRESHOLD), that
it adds at a time (M_TOP_PAD), and from which on an array is memory of its own (M_MMAP_THRESHOLD)."""


def keep_heap_warm() -> bool:
    """Let this process keep what it frees, where its C library is glibc.

    By itself glibc gives arrays of a few 100 KB back to the kernel as soon as they are freed: a
    training step of a small model then spends a third of its time on some 200 page faults.

    Returns:
        Whether the C library took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*each) == 1 for each in HEAP_SETTINGS.items())


class _Lease:
    """What the arrays of one piece of memory refer to; when it goes, the memory goes back."""

    __slots__ = ("__array_interface__", "_memory", "_returned")

    def __init__(self, memory: Bytes, returned: deque[Bytes]) -> None:
        self.__array_interface__ = memory.__array_interface__  # makes numpy take it for its owner
        self._memory = memory
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append(self._memory)


class Pool:
    """Hands out memory, and takes it back by itself.

    Args:
        idle_at_most: bytes that it keeps for later.

    Attributes:
        idle: bytes that it keeps now, but for what came back since the last `take`.
    """

    def __init__(self, idle_at_most: int = IDLE_AT_MOST) -> None:
        self.idle = 0
        self._idle_at_most = idle_at_most
        self._free: defaultdict[int, list[Bytes]] = defaultdict(list)  # by size
        self._returned: deque[Bytes] = deque()  # appended to by any thread, at any time
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes:
        """Return `size` uninitialised bytes whose address is a multiple of 64; from any thread."""
        if size < SMALLEST:
            return allocate(size)
        rounded = _rounded(size)
        with self._lock:
            self._collect()
            free = self._free.get(rounded)
            memory = free.pop() if free else None
            if memory is not None:
                self.idle -= rounded
        if memory is None:
            memory = allocate(rounded)
        return np.asarray(_Lease(memory, self._returned))[:size]

    def _collect(self) -> None:
        """Sort in what came back; the oldest sizes make room for it if there is too much."""
        while self._returned:
            memory = self._returned.popleft()
            free = self._free.pop(len(memory), [])
            free.append(memory)
            self._free[len(memory)] = free  # the newest size is the last
            self.idle += len(memory)
        while self.idle > self._idle_at_most:
            size = next(iter(self._free))
            self._free[size].pop()
            self.idle -= size
            if not self._free[size]:
                del self._free[size]


def _rounded(size: int) -> int:
    """Round up to one of eight sizes per power of two, so that similar sizes share memory."""
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step
