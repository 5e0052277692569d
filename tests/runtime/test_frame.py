"""Laws of the wire format: what is sent arrives, and whatever else comes is a RemoteProtocolError."""

import collections
import contextlib
import enum
import gc
import random
import subprocess
import sys
import threading
import weakref
from typing import NamedTuple

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aiosgd.errors import LocalProtocolError, RemoteProtocolError
from aiosgd.runtime import frame
from aiosgd.runtime.frame import (
    CHUNK,
    HEADER,
    HEADER_SIZE,
    Kind,
    Limits,
    allocate,
    decode,
    decode_header,
    decode_inband,
    encode,
    encode_inband,
)

DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]


def joined(encoded):
    return b"".join(encoded.buffers)


def parts(encoded):
    """Split a frame into header, metadata and body, as a receiver does."""
    data = joined(encoded)
    header = decode_header(data)
    end = HEADER_SIZE + header.metadata_size
    body = allocate(header.body_size)
    body[:] = np.frombuffer(data, np.uint8, offset=end)
    return header, data[HEADER_SIZE:end], body


def round_trip(content):
    _, metadata, body = parts(encode(content))
    return decode(metadata, body)


def same(a, b):
    """Whether two contents are equal in type, dtype, shape and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def arrays():
    dtypes = st.sampled_from(DTYPES).map(np.dtype)
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12)
    return dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes, fill=st.nothing()))


def scalars():
    dtypes = st.sampled_from(DTYPES).map(np.dtype)
    return dtypes.flatmap(hnp.from_dtype).filter(lambda value: isinstance(value, np.generic))


def contents():
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=20),
        st.binary(max_size=20),
        arrays(),
        scalars(),
    )
    keys = st.one_of(st.text(max_size=5), st.binary(max_size=1), st.integers(-9, 9))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
        ),
        max_leaves=8,
    )


# Round trips


@settings(max_examples=150, deadline=None)
@given(contents())
def test_what_is_sent_arrives(content):
    assert same(round_trip(content), content)


@settings(max_examples=30, deadline=None)
@given(contents())
def test_received_is_what_a_receiver_gets(content):
    assert same(encode(content).received(), round_trip(content))


@pytest.mark.parametrize("size", [1, 127, 128, 5000])
def test_every_array_is_an_aligned_read_only_view_of_the_body(size):
    content = {"odd": np.arange(700, dtype="u1"), "x": [np.arange(size * 2.0), (np.ones(999),)]}
    _, metadata, body = parts(encode(content))
    decoded = decode(metadata, body)
    for array in (decoded["odd"], decoded["x"][0], decoded["x"][1][0]):
        assert not array.flags.writeable
        if array.nbytes >= 512:
            assert array.ctypes.data % 64 == 0
            assert np.shares_memory(array, body)
    with pytest.raises(ValueError, match="read-only"):
        decoded["x"][0][0] = 1


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,), (2, 2), (600,)])
def test_small_and_large_arrays_are_read_only(shape):
    assert not round_trip(np.zeros(shape)).flags.writeable


def test_large_arrays_are_sent_by_reference():
    array = np.arange(100_000.0)
    encoded = encode([array, array[:5000]])
    shared = [b for b in encoded.buffers if np.shares_memory(np.frombuffer(b, np.uint8), array)]
    assert [len(b) for b in shared] == [800_000, 40_000]
    assert encoded.size == sum(map(len, encoded.buffers))


def test_a_small_frame_is_one_buffer():
    encoded = encode([np.ones(1000), np.ones(1000)])
    assert [type(b) for b in encoded.buffers] == [bytes]
    assert len(encode(np.ones(2048)).buffers) == 1  # a body of 16 KiB, and one above
    assert len(encode(np.ones(2049)).buffers) == 2


@pytest.mark.parametrize("size", [10, 10_000])
def test_arrays_in_any_memory_order_arrive(size):
    base = np.arange(size * 4, dtype=">i4").reshape(size, 4)
    for array in (base, base.T, base[::2], base[:, 1:3], np.asfortranarray(base)):
        received = round_trip(array)
        assert received.dtype == np.dtype("<i4")
        assert received.flags.c_contiguous
        assert np.array_equal(received, array)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("size", [3, 3000])
def test_every_dtype_arrives_as_array_and_scalar(code, size):
    array = np.arange(size).astype(code)
    assert same(round_trip(array), array)
    assert same(round_trip(array[1]), array[1])


def test_bfloat16_and_float8_arrive():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        for shape in ((), (0, 2), (3,), (50, 50)):
            array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
            assert same(round_trip((array, 1)), (array, 1))
        scalar = np.array([1.5]).astype(dtype)[0]
        assert same(round_trip({"x": scalar}), {"x": scalar})


def test_subclasses_arrive_as_their_base():
    class Colour(enum.IntEnum):
        RED = 3

    class Word(str):
        __slots__ = ()

        def __str__(self):
            return "no"

    class Pair(NamedTuple):
        a: int
        b: int

    content = [Colour.RED, Word("yes"), Pair(1, 2), collections.Counter("aab")]
    received = round_trip(content)
    assert same(received, [3, "yes", (1, 2), {"a": 2, "b": 1}])


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (0, 5)])
def test_small_arrays_are_written_as_msgpack_numpy_writes_them(shape):
    for code in DTYPES:
        array = np.ones(shape, code)
        assert parts(encode({"x": array}))[1] == msgpack_numpy.packb({"x": array})


@pytest.mark.parametrize("code", DTYPES)
def test_scalars_are_written_as_msgpack_numpy_writes_them(code):
    scalar = np.ones(1, code)[0]
    assert parts(encode([scalar]))[1] == msgpack.packb([msgpack_numpy.encode(scalar)])


def test_arrays_from_512_bytes_on_have_their_place_in_the_body():
    assert parts(encode(np.zeros(511, "u1")))[0].body_size == 0
    assert parts(encode(np.zeros(512, "u1")))[0].body_size == 512


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("number", [0, 1, 65535])
def test_header_carries_kind_and_number(kind, number):
    assert parts(encode(None, kind, number))[0] == (kind, number, 0, 0)
    assert decode(b"", allocate(0)) is None


def test_header_is_read_at_an_offset():
    data = b"???" + joined(encode(7, number=9))
    assert decode_header(memoryview(data), 3) == (Kind.MESSAGE, 9, 1, 0)


# Refusing to send


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Custom(), "Custom"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (2**64, str(2**64)),
        (-(2**63) - 1, "64 bits"),
        (np.array([None]), "dtype object"),
        (np.zeros(2, "i4,f4"), "dtype"),
        (np.zeros(2, "M8[s]"), "datetime64"),
        (np.array(["x"]), "dtype <U1"),
        (np.str_("x"), "dtype <U1"),
        (np.datetime64(1, "s"), "datetime64"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
        (np.zeros(3, np.longdouble), "float128"),
        ("x" * 65536, "send large data as numpy arrays"),
        (list(range(4097)), "send large data as numpy arrays"),
        (tuple(range(4097)), "send large data as numpy arrays"),
        (dict.fromkeys(range(4097)), "send large data as numpy arrays"),
        (msgpack.ExtType(5, b"x"), "0x05"),
        (msgpack.Timestamp(1), "timestamp"),
        ({b"nd": True}, "b'nd'"),
        (np.zeros((0, 1 << 41), "u1"), "shape"),
        ("\ud800", "surrogates"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [(x,)]}], ids=["bare", "nested"])
def test_what_cannot_travel_is_named(value, words, wrap):
    with pytest.raises(LocalProtocolError) as caught:
        encode(wrap(value))
    assert words in str(caught.value)
    assert same(round_trip((1, np.ones(3))), (1, np.ones(3)))  # the encoder is none the worse


def test_the_largest_containers_arrive():
    for content in (list(range(4096)), tuple(range(4096)), dict.fromkeys(range(4096)), "x" * 65533):
        assert same(round_trip(content), content)


def test_too_large_a_body_is_refused(monkeypatch):
    monkeypatch.setattr(frame, "MAX_BODY", 1023)
    encode(np.zeros(1023, "u1"))
    with pytest.raises(LocalProtocolError, match="1024 bytes of arrays; at most 1023"):
        encode(np.zeros(1024, "u1"))


@pytest.mark.parametrize("number", [-1, 65536])
def test_number_is_16_bits(number):
    with pytest.raises(LocalProtocolError, match=str(number)):
        encode(None, Kind.CREDIT, number)


def test_a_circular_list_is_refused():
    circle = []
    circle.append(circle)
    with pytest.raises(LocalProtocolError):
        encode(circle)
    circle[0] = (circle,)
    with pytest.raises(LocalProtocolError):
        encode(circle)


def test_many_tuples_side_by_side_arrive():
    content = [(i, (i,)) for i in range(100)]
    assert same(round_trip(content), content)


NESTS = [lambda x: [x], lambda x: (x,), lambda x: {"k": x}]


@pytest.mark.parametrize("seed", range(5))
def test_nesting_is_bounded_alike_for_all_containers(seed):
    chance = random.Random(seed)
    content = 1
    for _ in range(32):
        content = chance.choice(NESTS)(content)
    assert same(round_trip(content), content)
    for nest in NESTS:
        with pytest.raises(LocalProtocolError, match="32 levels"):
            encode(nest(content))


# Refusing to receive


def message(metadata, body=b""):
    memory = allocate(len(body))
    memory[:] = np.frombuffer(body, np.uint8)
    return metadata, memory


def described(name="uint8", shape=(4,), offset=0):
    return msgpack.packb(msgpack.ExtType(0x4E, msgpack.packb((name, shape, offset))))


def inline(**changes):
    form = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": b"12345678"}
    form.update({key.encode(): value for key, value in changes.items()})
    return msgpack.packb({k: v for k, v in form.items() if v is not ...})


def nested(depth, innermost=b"\xc0"):
    return b"\x91" * depth + innermost


def nested_tuples(depth):
    packed = b"\xc0"
    for _ in range(depth):
        packed = msgpack.packb(msgpack.ExtType(0x54, b"\x91" + packed))
    return packed


BAD = {
    "nothing but a body": message(b"", b"1234"),
    "no msgpack": message(b"\xc1"),
    "truncated": message(b"\x92\x01"),
    "more than one value": message(b"\x01\x01"),
    "body without arrays": message(b"\x01", b"1234"),
    "bytes after the last array": message(described(), b"12345"),
    "array without body": message(described()),
    "array past the body": message(described(shape=[5]), b"1234"),
    "unknown dtype": message(described("object"), b"1234"),
    "dtype string": message(described("<f4"), b"1234"),
    "dtype no string": message(described(["u1"]), b"1234"),
    "negative dimension": message(described(shape=[-1]), b""),
    "two negative dimensions": message(described(shape=[-2, -2]), b"1234"),
    "dimension no integer": message(described(shape=[4.0]), b"1234"),
    "dimension true": message(described(shape=[4, True]), b"1234"),
    "shape no list": message(described(shape=4), b"1234"),
    "33 dimensions": message(described(shape=[1] * 33), b"1"),
    "huge empty array": message(described(shape=[0, 2**60]), b""),
    "empty array, huge product": message(described(shape=[0, 2**30, 2**30]), b""),
    "offset not aligned": message(described(offset=1), b"12345"),
    "negative offset": message(described(offset=-64), b"1234"),
    "offset no integer": message(described(offset=0.0), b"1234"),
    "descriptor too short": message(msgpack.packb(msgpack.ExtType(0x4E, b"\x91\x01")), b"1234"),
    "overlap": message(b"\x92" + described(shape=[64]) + described(shape=[64]), b"x" * 64),
    "descending": message(
        b"\x92" + described(shape=[64], offset=64) + described(shape=[64]), b"x" * 128
    ),
    "unknown extension": message(msgpack.packb(msgpack.ExtType(1, b""))),
    "timestamp": message(msgpack.packb(msgpack.Timestamp(1))),
    "tuple that is no list": message(msgpack.packb(msgpack.ExtType(0x54, b"\x01"))),
    "scalar of the wrong size": message(
        msgpack.packb(msgpack.ExtType(0x53, msgpack.packb(("float32", b"123"))))
    ),
    "scalar with too much": message(
        msgpack.packb(msgpack.ExtType(0x53, msgpack.packb(("float32", b"12345678"))))
    ),
    "scalar of unknown dtype": message(
        msgpack.packb(msgpack.ExtType(0x53, msgpack.packb(("O", b"12345678"))))
    ),
    "pickled array": message(inline(kind=b"O", type="|O")),
    "object dtype": message(inline(type="|O")),
    "structured dtype": message(inline(type=[["a", "<f4"]], kind=b"V")),
    "crafted dtype": message(inline(type="<f4,<f4")),
    "big-endian": message(inline(type=">f4")),
    "inline too short": message(inline(data=b"1234")),
    "inline too long": message(inline(data=b"123456789")),
    "inline data no bytes": message(inline(data="12345678")),
    "inline with a kind": message(inline(kind=b"V")),
    "inline without shape": message(inline(shape=...)),
    "inline negative shape": message(inline(shape=[-2])),
    "inline huge empty": message(inline(shape=[0, 2**60], data=b"")),
    "inline extra key": message(inline(more=1)),
    "inline nd is 1": message(inline(nd=1)),
    "scalar with a shape": message(inline(nd=False)),
    "complex": message(inline(nd=None)),
    "list as a key": message(b"\x81\x90\x01"),
    "array as a key": message(b"\x81" + inline() + b"\x01"),
    "bad utf-8": message(b"\xa1\xff"),
    "4097 items": message(b"\xdc\x10\x01" + b"\xc0" * 4097),
    "4097 pairs": message(b"\xde\x10\x01" + b"\x01\xc0" * 4097),
    "2**32 items announced": message(b"\xdd\xff\xff\xff\xff"),
    "33 lists deep": message(nested(33)),
    "1000 lists deep": message(nested(1000)),
    "60000 lists deep": message(nested(60000)),
    "33 tuples deep": message(nested_tuples(33)),
    "400 tuples deep": message(nested_tuples(400)),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_a_remote_protocol_error(name):
    with pytest.raises(RemoteProtocolError):
        decode(*BAD[name])


def test_the_samples_of_nonsense_are_one_change_away_from_sense():
    assert decode(*message(described(), b"1234")).tobytes() == b"1234"
    assert decode(*message(inline())).tobytes() == b"12345678"
    assert decode(*message(nested(32))) is not None
    assert decode(*message(nested_tuples(32))) is not None
    assert decode(*message(described(shape=[0, 2**40]), b"")).shape == (0, 2**40)


def test_a_bomb_of_announced_lists_takes_no_memory():
    """64 KiB that announce 20 000 lists of 4096 items each: 700 MB if they were made."""
    level = b"\xdc\x10\x00" * 1000
    packed = level
    while len(packed) < 60_000:
        packed = level + msgpack.packb(msgpack.ExtType(0x54, packed))
    script = (
        "import resource, sys; from aiosgd.runtime.frame import *\n"
        "from aiosgd.errors import RemoteProtocolError\n"
        "packed = sys.stdin.buffer.read(); rss = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = rss()\n"
        "try: decode(packed, allocate(0))\n"
        "except RemoteProtocolError: print(rss() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=packed, capture_output=True, check=True
    )
    assert int(done.stdout) < 8 << 10  # KiB


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (HEADER.pack(0xA4, 1, 0, 0, 0), "0xa4"),
        (HEADER.pack(0xA5, 7, 0, 0, 0), "kind 7"),
        (HEADER.pack(0xA5, 2, 0, 1, 0), "INBAND frame has 1 bytes of metadata"),
        (HEADER.pack(0xA5, 1, 0, 1001, 0), "1001 bytes of metadata; at most 1000"),
        (HEADER.pack(0xA5, 1, 0, 0, 2001), "2001 bytes; at most 2000"),
    ],
)
def test_headers_are_checked_before_memory_is_taken(header, words):
    with pytest.raises(RemoteProtocolError) as caught:
        decode_header(header, limits=Limits(1000, 2000))
    assert words in str(caught.value)


def test_headers_at_the_limits_are_taken():
    header = HEADER.pack(0xA5, 1, 0, 1000, 2000)
    assert decode_header(header, limits=Limits(1000, 2000))[2:] == (1000, 2000)
    assert decode_header(HEADER.pack(0xA5, 1, 0, 65536, 4 << 30)).body_size == 4 << 30
    with pytest.raises(RemoteProtocolError):
        decode_header(HEADER.pack(0xA5, 1, 0, 65537, 0))
    with pytest.raises(RemoteProtocolError):
        decode_header(HEADER.pack(0xA5, 1, 0, 0, (4 << 30) + 1))


def test_metadata_limit_has_a_limit():
    with pytest.raises(LocalProtocolError, match="65537"):
        Limits(max_metadata=65537)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(metadata, body):
    decode_or_refuse(*message(metadata, body))


@settings(max_examples=200, deadline=None)
@given(contents(), st.data())
def test_random_changes_never_raise_anything_else(content, data):
    _, metadata, body = parts(encode(content))
    changed = bytearray(metadata)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        changed[position : position + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2)
        )
    decode_or_refuse(bytes(changed), body)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=16, max_size=16))
def test_random_headers_never_raise_anything_else(data):
    try:
        decode_header(data)
    except RemoteProtocolError:
        return


def decode_or_refuse(metadata, body):
    try:
        decode(metadata, body)
    except RemoteProtocolError:
        return


# Memory


def test_the_body_lives_as_long_as_an_array_of_it_and_no_longer():
    content = {"a": (np.ones(1000), [np.ones(2000)]), "small": np.ones(3)}
    _, metadata, body = parts(encode(content))
    owner = weakref.ref(body.base)
    gc.collect()
    gc.disable()
    try:
        decoded = decode(metadata, body)
        del body
        last = decoded["a"][1][0]
        del decoded
        assert last.sum() == 2000
        assert owner() is not None
        del last
        assert owner() is None
    finally:
        gc.enable()


def test_encoding_keeps_nothing():
    array = np.ones(100_000)
    alive = weakref.ref(array)
    encoded = encode({"x": (array,)})
    del array
    assert alive() is not None
    del encoded
    assert alive() is None


def test_a_failed_encoding_keeps_nothing():
    array = np.ones(100_000)
    alive = weakref.ref(array)
    with contextlib.suppress(LocalProtocolError):
        encode([array, Custom()])
    del array
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, 1 << 20])
def test_allocate_is_aligned(size):
    for _ in range(5):
        memory = allocate(size)
        assert memory.ctypes.data % (64 if size >= 4096 else 16) == 0
        assert memory.shape == (size,)
        assert memory.dtype == np.uint8


def test_threads_do_not_disturb_each_other():
    """Loops in several threads encode at the same time; a hook that switches threads provokes it."""

    class Slow(dict):
        __iter__ = None  # makes dict() ask for the keys

        def keys(self):
            inner.set()
            outer.wait(5)
            return super().keys()

    inner, outer = threading.Event(), threading.Event()
    results = []
    content = {"x": Slow(a=(1, np.ones(300)))}
    thread = threading.Thread(target=lambda: results.append(round_trip(content)))
    thread.start()
    inner.wait(5)
    assert same(round_trip([(2, np.ones(900))]), [(2, np.ones(900))])
    outer.set()
    thread.join(5)
    assert same(results[0], {"x": {"a": (1, np.ones(300))}})


def test_frame_has_no_input_or_output():
    """Everything it needs is handed to it: the simulator runs the same code."""
    script = (
        "import sys, numpy, msgpack, msgpack_numpy; before = set(sys.modules)\n"
        "import aiosgd.runtime.frame; print(set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout
    assert "aiosgd.runtime.frame" in loaded
    assert not any(f"'{name}'" in loaded for name in ("asyncio", "socket", "logging", "random"))


# Pieces: what goes over the wire


@pytest.mark.parametrize("size", [0, 1, 512, 20_000, CHUNK - 1, CHUNK])
def test_a_body_of_up_to_one_mib_leaves_whole(size):
    built = encode({"x": np.zeros(size, "u1")}, number=9)
    (piece,) = built.pieces()
    assert b"".join(piece) == b"".join(built.buffers)
    assert built.size == built.header.size == sum(map(len, piece))


@pytest.mark.parametrize("sizes", [[CHUNK + 1], [3 * CHUNK], [700_000] * 5, [600, CHUNK, 65]])
def test_a_larger_body_leaves_in_chunks_of_the_same_number(sizes):
    content = [np.arange(size, dtype="u1") for size in sizes]
    built = encode(content, number=300)
    data = b"".join(part for piece in built.pieces() for part in piece)
    assert len(data) == built.size == built.header.size
    head = decode_header(data)
    assert head == built.header
    end = HEADER_SIZE + head.metadata_size
    metadata, body, position = data[HEADER_SIZE:end], b"", end
    while position < len(data):
        chunk = decode_header(data, position)
        assert (chunk.kind, chunk.number, chunk.metadata_size) == (Kind.CHUNK, 300, 0)
        position += HEADER_SIZE
        body += data[position : position + chunk.body_size]
        position += chunk.body_size
    memory = allocate(len(body))
    memory[:] = np.frombuffer(body, "u1")
    for sent, received in zip(content, decode(metadata, memory), strict=True):
        assert np.array_equal(sent, received)


def test_chunks_are_views_of_the_sent_array():
    array = np.zeros(5 * CHUNK, "u1")
    parts = [part for piece in encode(array).pieces() for part in piece if len(part) > 1000]
    assert sum(map(len, parts)) == array.nbytes
    assert all(np.shares_memory(np.frombuffer(part, "u1"), array) for part in parts)


# INBAND: content just as msgpack-numpy gives it


def inband(packed):
    return decode_inband(np.frombuffer(packed, "u1"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [1, -1, 2**63, 0.5, "é", b"\x00", True, {"a": {b"b": []}, 3: "x"}],
        np.arange(70_000, dtype="f4").reshape(7, -1),
        {"scalar": np.int16(-3), "empty": np.zeros((0, 5)), "complex": np.ones(3, "c16")},
        ["x" * 40, "x" * 300, "x" * 70_000, b"x" * 300, b"x" * 70_000, list(range(70))],
        {str(i): i for i in range(300)},
    ],
)
def test_inband_content_is_what_msgpack_numpy_gives_and_takes(content):
    built = encode_inband(content, 3)
    packed = b"".join(built.buffers)[HEADER_SIZE:]
    assert packed == msgpack_numpy.packb(content)
    assert decode_header(built.buffers[0])[:2] == (Kind.INBAND, 3)
    assert same(inband(packed), msgpack_numpy.unpackb(packed, strict_map_key=False))


def test_inband_frames_are_never_chunked():
    built = encode_inband(np.zeros(3 * CHUNK, "u1"))
    pieces = list(built.pieces())
    assert len(pieces) == 4
    assert b"".join(b"".join(piece) for piece in pieces) == b"".join(built.buffers)
    assert built.size == sum(map(len, built.buffers))


@pytest.mark.parametrize("value", [np.array([None]), np.array(["x"]), object(), 2**64, 1j])
def test_what_msgpack_numpy_would_pickle_is_not_sent_inband(value):
    with pytest.raises(LocalProtocolError):
        encode_inband([value])


OBJECT = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": (1,), b"data": b"cos\nsystem\n."}


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (b"", "ends in the middle"),
        (b"\x92\x01", "ends in the middle"),
        (b"\xdd\xff\xff\xff\xff\x01", "ends in the middle"),
        (b"\xc6\xff\xff\xff\xff\x01", "ends at 4294967300"),
        (b"\x01\x02", "content ends at 1, the body at 2"),
        (b"\xc1", "type 0xc1"),
        (b"\xd6\xff\x00\x00\x00\x00", "type 0xd6"),
        (b"\xc7\x01\x01\x00", "type 0xc7"),
        (b"\xdd\x00\x02\x00\x00" + b"\x80" * 0x20000, "more than 65536 items"),
        (b"\x91" * 40 + b"\x01", "nested more than 32"),
        (b"\x91" * 60_000 + b"\x01", "cannot be unpacked"),
        (msgpack_numpy.packb(OBJECT), "dtype"),
        (msgpack_numpy.packb({**OBJECT, b"type": "<f4", b"kind": b""}), "does not match"),
        (msgpack_numpy.packb({b"nd": True, b"type": "<f4"}), "no small array"),
        (msgpack_numpy.packb({b"nd": False, b"type": "<f4" * 99, b"data": b""}), "dtype"),
    ],
)
def test_inband_bytes_that_are_wrong_are_refused(packed, words):
    with pytest.raises(RemoteProtocolError, match=words):
        inband(packed)


@given(st.binary(max_size=200))
def test_any_inband_bytes_are_content_or_refused(packed):
    with contextlib.suppress(RemoteProtocolError):
        inband(packed)
