"""Warm memory comes back by itself, exactly when nothing refers to it any more."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from aiosgd.runtime.frame import decode, encode
from aiosgd.runtime.pool import SMALLEST, Pool


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("size", [0, 1, 1000, SMALLEST, SMALLEST + 1, 99_999, 1 << 20, 3_000_001])
def test_memory_has_the_size_that_was_asked_for_aligned_and_writable(size):
    memory = Pool().take(size)
    assert (memory.shape, memory.dtype) == ((size,), np.uint8)
    assert size < 4096 or address(memory) % 64 == 0
    memory[:] = 7
    assert memory.tobytes() == bytes([7]) * size


@pytest.mark.parametrize(
    "derive",
    [
        lambda memory: memory[5:10],
        lambda memory: memory.view("f4").reshape(-1, 4)[::2].T,
        lambda memory: memoryview(memory)[3:4],
        lambda memory: [np.frombuffer(memory, "f8")],
        lambda memory: decode(bytes(HEAD), memory[: len(BODY)]),
    ],
)
def test_memory_is_lent_again_only_when_the_last_view_is_gone(derive):
    pool = Pool()
    memory = pool.take(1 << 20)
    memory[: len(BODY)] = BODY
    place = address(memory)
    view = derive(memory)
    del memory
    other = pool.take(1 << 20)
    assert address(other) != place
    assert pool.idle == 0
    del view
    assert address(pool.take(1 << 20)) == place


FRAME = encode(np.arange(1000.0))
HEAD = FRAME.buffers[0][16 : 16 + FRAME.header.metadata_size]
BODY = np.frombuffer(FRAME.buffers[0], np.uint8)[16 + FRAME.header.metadata_size :]


def test_similar_sizes_share_memory_and_others_do_not():
    pool = Pool()
    place = address(pool.take(1_000_000))
    assert address(pool.take(1_010_000)) == place
    assert address(pool.take(2_000_000)) != place
    assert pool.idle >= 1_000_000


def test_no_more_is_kept_than_allowed_and_the_oldest_size_goes_first():
    pool = Pool(idle_at_most=3 << 20)
    old = [pool.take(1 << 20) for _ in range(3)]
    del old
    new = [pool.take(1 << 19) for _ in range(4)]
    places = {address(memory) for memory in new}
    del new
    again = [pool.take(1 << 19) for _ in range(4)]
    assert {address(memory) for memory in again} == places
    assert pool.idle == 1 << 20


def test_a_pool_that_keeps_nothing_still_lends():
    pool = Pool(idle_at_most=0)
    for _ in range(3):
        pool.take(1 << 20)[:] = 1
    assert pool.idle == 0


def test_arrays_may_outlive_their_pool():
    memory = Pool().take(1 << 20)
    memory[:] = 3
    assert (memory == 3).all()


def test_threads_never_get_the_same_memory():
    pool, clashes = Pool(), []

    def work(number):
        for _ in range(300):
            memory = pool.take(1 << 17)
            memory[:] = number
            if not (memory == number).all():
                clashes.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def test_a_process_keeps_what_it_frees_where_the_c_library_can_be_told():
    script = """
import resource, sys
import numpy as np
from aiosgd.runtime.pool import keep_heap_warm

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        arrays = [np.ones(100_000, np.float32) for _ in range(3)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

sys.exit(0 if not keep_heap_warm() else faults() and faults() > 100)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
