"""Codes of few bits, and random numbers from a table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosgd.plugins.compressors import packing
from aiosgd.plugins.compressors.packing import CHUNK, POINTS, Dither, chunks, pack, unpack

SIZES = [*range(20), 255, 256, 257, 1000]


@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_packed_is_unpacked_and_takes_the_promised_bytes(bits):
    for size in SIZES:
        codes = np.random.default_rng(size).integers(2**bits, size=size, dtype=np.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8
        assert packed.size == packing.packed_size(size, bits) == int(np.ceil(bits * size / 8))
        np.testing.assert_array_equal(unpack(packed, bits, size), codes, strict=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_every_bit_of_what_is_packed_counts(bits, values):
    codes = np.array(values, np.uint8) & np.uint8(2**bits - 1)
    used = len(values) * bits
    packed = pack(codes, bits)
    changed = set()
    for bit in range(packed.size * 8):
        other = packed.copy()
        other[bit // 8] ^= np.uint8(1 << (bit % 8))
        differs = unpack(other, bits, codes.size) != codes
        assert differs.sum() <= 1
        changed |= {bit} if differs.any() else set()
    assert len(changed) == used


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_chunks_cover_the_array_in_order(size):
    cut = list(chunks(size))
    assert [i for where in cut for i in (where.start, where.stop)] == sorted(
        i for where in cut for i in (where.start, where.stop)
    )
    assert sum(where.stop - where.start for where in cut) == size
    assert all(where.start % CHUNK == 0 and where.stop > where.start for where in cut)


def test_over_all_offsets_every_element_gets_every_point_once():
    table = packing._points()
    np.testing.assert_array_equal(np.sort(table[:POINTS]), np.arange(POINTS))
    np.testing.assert_array_equal(table[POINTS:], table[:CHUNK])


def test_points_near_each_other_are_unrelated():
    table = packing._points()[:POINTS] / POINTS - 0.5
    for lag in (1, 2, 3, 8, 256, 1000):
        correlation = 12 * np.mean(table * np.roll(table, lag))
        assert abs(correlation) < 4.5 / np.sqrt(POINTS)


def test_dither_is_uniform_below_one_in_both_forms():
    floats, integers = [], []
    for seed in range(300):
        dither = Dither(np.random.default_rng(seed), 8)
        floats += dither.floats(slice(0, 8)).tolist()
        integers += dither.integers(slice(0, 8)).tolist()
        np.testing.assert_allclose(floats[-8:], np.array(integers[-8:]) / 2**23, atol=2**-23)
    assert min(floats) >= 0
    assert max(floats) < 1
    counts = np.histogram(floats, 10, (0, 1))[0]
    assert ((counts - 240) ** 2 / 240).sum() < 35  # chi-square, 9 degrees: 6e-5 is beyond


def test_dither_has_24_bits():
    rng = np.random.default_rng(0)
    found = np.concatenate([Dither(rng, 8).floats(slice(0, 8)) for _ in range(100)])
    lower = found.astype(float) * 2**24
    np.testing.assert_array_equal(lower, np.rint(lower))
    assert len(np.unique(lower % 256)) > 50


def test_chunks_have_offsets_of_their_own():
    dither = Dither(np.random.default_rng(0), 3 * CHUNK)
    parts = [dither.floats(where) for where in chunks(3 * CHUNK)]
    assert len({part[0] for part in parts}) == 3


def test_dither_is_the_generator_s():
    one, same, other = (
        Dither(np.random.default_rng(seed), 9).floats(slice(0, 9)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
