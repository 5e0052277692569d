"""Signs: what one bit per number keeps. What all quantisers owe is in test_quantisers.py."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aiosgd.plugins.compressors.packing import CHUNK, LIMIT
from aiosgd.plugins.compressors.signs import OneBit, ScaledSign, Sign

FLOATS = arrays.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def restored(kind, array):
    compressor = kind(None, np.random.default_rng(0))
    return compressor.decompress(compressor.compress(array, None)).astype(float)


@settings(max_examples=50, deadline=None)
@given(FLOATS)
def test_sign_is_minus_one_below_zero_and_else_one(array):
    np.testing.assert_array_equal(restored(Sign, array), np.where(array >= 0, 1, -1))


@settings(max_examples=50, deadline=None)
@given(FLOATS)
@example(np.float32([1e-20, 1]))
def test_scaled_sign_loses_exactly_what_its_delta_says(array):
    wide = array.astype(float)
    norm = (wide**2).sum()
    lost = ((restored(ScaledSign, array) - wide) ** 2).sum()
    expected = norm - np.abs(wide).sum() ** 2 / array.size
    assert lost == pytest.approx(expected, rel=1e-4, abs=1e-5 * norm)


@settings(max_examples=50, deadline=None)
@given(FLOATS)
def test_onebit_gives_each_side_its_mean(array):
    wide = array.astype(float)
    expected = np.zeros(array.size)
    for side in (array >= 0, array < 0):
        if side.any():
            expected[side] = wide[side].mean()
    np.testing.assert_allclose(restored(OneBit, array), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("size", [1, 9, CHUNK, CHUNK + 3, 2 * CHUNK + 1])
def test_scales_are_of_the_whole_array(size):
    array = np.linspace(-1, 3, size).astype(np.float32)
    assert np.abs(restored(ScaledSign, array)).max() == pytest.approx(
        np.abs(array).mean(), rel=1e-4
    )
    assert restored(OneBit, array).sum() == pytest.approx(array.astype(float).sum(), rel=1e-4)


def test_the_largest_numbers_do_not_overflow():
    array = np.full(CHUNK, LIMIT, np.float32)
    np.testing.assert_allclose(restored(ScaledSign, array), array, rtol=1e-5)
    np.testing.assert_allclose(restored(OneBit, array), array, rtol=1e-5)


def test_zeros_are_kept_by_the_scaled_ones():
    assert not restored(ScaledSign, np.zeros(5)).any()
    assert not restored(OneBit, np.zeros(5)).any()
    assert restored(OneBit, np.float32([-1, -3])).tolist() == [-2, -2]
