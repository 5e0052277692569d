"""PowerSGD: matrices of low rank, warm starts, and what a peer may send."""

import numpy as np
import pytest

from aiosgd.plugins.compressors.lowrank import PowerSgd, matrix_shape

RNG = np.random.default_rng(0)
SHAPES = [(0,), (), (1,), (2,), (1000,), (3, 4, 5), (2, 0), (7, 9), (9, 1)]


def make(seed=0, **params):
    return PowerSgd(PowerSgd.Params(**params), np.random.default_rng(seed))


def back(compressor, array, stream="s"):
    return compressor.decompress(compressor.compress(array, stream))


def of_rank(rank, rows, columns, dtype=np.float64):
    rng = np.random.default_rng(rank)
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    return (left @ right).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_has_room_for_all_and_little_more(shape):
    rows, columns = matrix_shape(shape)
    size = int(np.prod(shape))
    assert size <= rows * columns < size + max(1, rows)
    if len(shape) == 2:
        assert (rows, columns) == shape
    else:
        assert abs(rows - columns) <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_rank_gives_everything_back_in_its_shape(shape, dtype):
    array = np.asarray(RNG.standard_normal(shape)).astype(dtype)
    array.setflags(write=False)
    for stream in ("s", "s", None):
        restored = back(make(rank=1000), array, stream)
        assert restored.dtype == dtype
        np.testing.assert_allclose(restored, array, atol=1e-5)
        assert restored.shape == shape


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("stream", ["s", None])
def test_a_matrix_of_rank_r_is_exact_from_the_first_step(rank, stream):
    matrix = of_rank(rank, 30, 20)
    powersgd = make(rank=rank)
    for _ in range(3):
        np.testing.assert_allclose(back(powersgd, matrix, stream), matrix, atol=1e-10)
    flat = matrix.reshape(-1)[:576]  # 24 by 24, of whatever rank: not exact
    assert np.abs(back(make(rank=rank), flat) - flat).max() > 0.1


@pytest.mark.parametrize(("rank", "rows", "columns"), [(4, 50, 40), (1, 7, 100), (9, 5, 8)])
def test_what_is_sent_is_two_thin_matrices(rank, rows, columns):
    payload = make(rank=rank).compress(np.ones((rows, columns), "f4"), "s")
    kept = min(rank, rows, columns)
    assert payload["p"].nbytes + payload["q"].nbytes == 4 * kept * (rows + columns)
    np.testing.assert_allclose(payload["p"].T @ payload["p"], np.eye(kept), atol=1e-6)


def test_with_feedback_nothing_is_lost():
    arrays = RNG.standard_normal((20, 12, 9))
    powersgd = make(rank=2)
    sent = sum(back(powersgd, array) for array in arrays)
    np.testing.assert_allclose(sent + powersgd.state["error/s"], arrays.sum(axis=0), atol=1e-12)
    assert "error/s" in powersgd.state
    bare = make(rank=2, feedback=False)
    back(bare, arrays[0])
    assert set(bare.state) == {"q/s"}


def test_feedback_also_reaches_what_a_vector_is_padded_with():
    arrays = RNG.standard_normal((40, 11))
    powersgd = make(rank=1)
    sent = sum(back(powersgd, array) for array in arrays)
    error = powersgd.state["error/s"].reshape(-1)[:11]
    np.testing.assert_allclose(sent + error, arrays.sum(axis=0), atol=1e-12)


def test_the_next_step_begins_with_the_last_q():
    matrix = RNG.standard_normal((20, 15))
    powersgd = make(rank=3, feedback=False)
    first = powersgd.compress(matrix, "s")
    p = np.linalg.qr(matrix @ first["q"])[0]
    np.testing.assert_array_equal(powersgd.compress(matrix, "s")["p"], p)
    errors = [np.linalg.norm(matrix - back(powersgd, matrix)) for _ in range(10)]
    assert errors == sorted(errors, reverse=True)


def test_without_a_stream_q_is_another_one_each_time_and_nothing_is_kept():
    matrix = RNG.standard_normal((20, 15))
    powersgd = make(rank=3)
    rest = matrix.copy()
    for _ in range(12):  # a codec with a mirror sends what is still missing
        rest -= back(powersgd, rest, None)
    assert np.linalg.norm(rest) < 1e-6 * np.linalg.norm(matrix)
    assert powersgd.state == {}


def test_zeros_stay_zeros_and_are_recovered_from():
    powersgd = make(rank=2)
    for _ in range(2):
        np.testing.assert_array_equal(back(powersgd, np.zeros((6, 5))), np.zeros((6, 5)))
    matrix = of_rank(1, 6, 5)
    sent = [back(powersgd, matrix) for _ in range(3)]
    np.testing.assert_allclose(sum(sent), 3 * matrix, atol=1e-9)


def test_it_says_nothing_about_a_contraction():
    assert make().delta(10) is make().omega(10) is None
    assert not make().unbiased


def test_it_goes_on_from_a_checkpoint_with_the_same_bits():
    arrays = RNG.standard_normal((6, 40)).astype("f4")
    one, other = make(seed=1), make(seed=2)
    for array in arrays[:3]:
        one.compress(array, "a/b")
    other.state = one.state
    for array in arrays[3:]:
        payloads = [compressor.compress(array, "a/b") for compressor in (one, other)]
        for name in ("p", "q"):
            assert payloads[0][name].tobytes() == payloads[1][name].tobytes()


def test_payloads_and_states_are_not_changed_by_what_comes_after():
    powersgd = make()
    payload = powersgd.compress(RNG.standard_normal((6, 8)), "s")
    state = powersgd.state
    before = [array.copy() for array in (payload["p"], payload["q"], *state.values())]
    powersgd.compress(RNG.standard_normal((6, 8)), "s")
    for old, now in zip(before, (payload["p"], payload["q"], *state.values()), strict=True):
        np.testing.assert_array_equal(old, now)


def test_a_stream_keeps_its_shape():
    powersgd = make()
    powersgd.compress(np.ones((6, 8)), "s")
    with pytest.raises(ValueError, match=r"q of stream 's' has shape \(8, 4\); expected \(7, 4\)"):
        powersgd.compress(np.ones((6, 7)), "s")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("stream", ["w", None])
def test_what_is_not_finite_is_refused_and_not_remembered(bad, stream):
    array = np.ones(100, "f4")
    array[50] = bad
    powersgd = make()
    with pytest.raises(ValueError, match="expected finite values"), np.errstate(all="ignore"):
        powersgd.compress(array, stream)
    assert powersgd.state == {}


@pytest.mark.parametrize("dtype", [np.int64, np.float16, complex, object])
def test_floats_only(dtype):
    with pytest.raises(ValueError, match=r"array is .*; expected a float array of 32 or 64 bits"):
        make().compress(np.ones(4, dtype), "s")


@pytest.mark.parametrize("rank", [0, -1])
def test_wrong_parameters_are_refused(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}; expected 1 or more"):
        PowerSgd.Params(rank=rank)


GOOD = {"shape": (3, 4), "p": np.ones((3, 2), "f4"), "q": np.ones((4, 2), "f4")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": None}, "payload's shape is None"),
        ({"shape": (2**20, 2**20)}, "payload's shape is"),
        ({"shape": (4, 3)}, r"payload's p is float32\[3, 2\]; expected float32\[4, 2\]"),
        ({"p": None}, "payload's p is NoneType"),
        ({"p": [[1.0]]}, "payload's p is list"),
        ({"p": np.ones((3, 2), "i4")}, "payload's p is int32"),
        ({"p": np.ones((3, 1), "f4")}, r"payload's p is float32\[3, 1\]"),
        ({"p": np.ones((3, 2))}, r"payload's q is float32\[4, 2\]; expected float64\[4, 2\]"),
        ({"q": np.ones((4, 3), "f4")}, r"payload's q is float32\[4, 3\]"),
        ({"q": np.ones(8, "f4")}, r"payload's q is float32\[8\]"),
        ({"x": 1}, "expected a dict of shape, p, q"),
    ],
)
def test_a_payload_that_is_something_else_is_refused(change, message):
    assert make(rank=2).decompress(GOOD).tolist() == [[2.0] * 4] * 3
    with pytest.raises(ValueError, match=message):
        make(rank=2).decompress({**GOOD, **change})
