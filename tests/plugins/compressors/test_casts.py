"""Compressors: what comes back."""

import numpy as np
import pytest

from aiosgd.plugins.compressors.casts import Fp16, NoCompression

RNG = np.random.default_rng(0)
SHAPES = [(0,), (), (1,), (1000,), (3, 4, 5), (2, 0)]


def fp16(array):
    compressor = Fp16(Fp16.Params(), RNG)
    return compressor.decompress(compressor.compress(array, ""))


def test_no_compression_passes_the_same_object():
    array = np.ones(3, np.float32)
    compressor = NoCompression(NoCompression.Params(), RNG)
    assert compressor.compress(array, "s") is array
    assert compressor.decompress(array) is array


@pytest.mark.parametrize("shape", SHAPES)
def test_fp16_halves_the_bytes_and_keeps_the_shape(shape):
    array = np.ones(shape, np.float32)
    payload = Fp16(Fp16.Params(), RNG).compress(array, "")
    assert 2 * payload.nbytes == array.nbytes
    np.testing.assert_array_equal(fp16(array), array, strict=True)


@pytest.mark.parametrize("seed", range(10))
def test_fp16_errs_by_at_most_half_a_unit_in_the_last_place(seed):
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal(2000) * 10.0 ** rng.uniform(-9, 4, 2000)).astype(np.float32)
    bound = np.maximum(np.abs(array) * 2.0**-11, 2.0**-25)
    assert (np.abs(fp16(array).astype(float) - array) <= bound).all()


@pytest.mark.parametrize("seed", range(3))
def test_fp16_is_exact_for_what_it_has_given_back(seed):
    once = fp16(np.random.default_rng(seed).standard_normal(100).astype(np.float32))
    np.testing.assert_array_equal(fp16(once), once)


def test_fp16_rounds_ties_to_even():
    ulp = 2.0**-10
    ties = np.array([1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 2.5 * ulp], np.float32)
    np.testing.assert_array_equal(fp16(ties), np.float32([1, 1 + 2 * ulp, 1 + 2 * ulp]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_goes_up_to_what_rounds_into_its_range(dtype, sign):
    limit = dtype(65520)
    below = np.nextafter(limit, dtype(0)) * sign
    np.testing.assert_array_equal(fp16(np.array([below, 0], dtype)), np.float32([sign * 65504, 0]))
    with pytest.raises(ValueError, match=f"largest value is {sign * limit} in stream 'w'"):
        Fp16(None, RNG).compress(np.array([1, limit * sign, -2], dtype), "w")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_fp16_refuses_what_is_not_finite(bad, place):
    array = np.ones(1000, np.float32)
    array[place] = bad
    with pytest.raises(ValueError, match=f"largest value is {bad}"):
        Fp16(None, RNG).compress(array, "")


def test_fp16_leaves_the_array_alone_and_takes_read_only_ones():
    array = np.float32([1.1, 2.2])
    array.setflags(write=False)
    Fp16(None, RNG).compress(array, "")
    assert array.tolist() == np.float32([1.1, 2.2]).tolist()


@pytest.mark.parametrize("dtype", [np.int64, bool, complex, object])
def test_fp16_takes_floats_only(dtype):
    with pytest.raises(ValueError, match="expected a float array"):
        Fp16(None, RNG).compress(np.ones(2, dtype), "")


@pytest.mark.parametrize("payload", [None, [1.0], {"a": 1}, 1.5, b"ab"])
@pytest.mark.parametrize("kind", [NoCompression, Fp16])
def test_a_payload_that_is_no_array_is_refused(kind, payload):
    with pytest.raises(ValueError, match=r"payload is .*; expected an array"):
        kind(None, RNG).decompress(payload)


def test_fp16_refuses_payloads_of_another_type():
    with pytest.raises(ValueError, match="payload is float32; expected an array of float16"):
        Fp16(None, RNG).decompress(np.ones(2, np.float32))
