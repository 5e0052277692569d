"""Golden frames: the bytes of each wire version, decoded for ever.

A file `v<wire version>-<name>.bin` is one frame as it was sent. Files are only ever added: if a
test here fails, a peer that runs an older release would fail too.
"""

from pathlib import Path

import numpy as np
import pytest

from aiosgd.runtime.frame import (
    HEADER_SIZE,
    Kind,
    allocate,
    decode,
    decode_header,
    decode_inband,
    encode,
    encode_inband,
)

FOLDER = Path(__file__).parent
DTYPES = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")


def ramp(dtype, shape):
    """Return the values 0, 1, 2, … in the given shape."""
    return np.arange(np.prod(shape, dtype=int)).astype(np.dtype(dtype)).reshape(shape)


# file name -> kind, number, content
GOLDEN = {
    "v1-hello": (Kind.HELLO, 0, {"wire": 1, "version": "0.1.0", "node": -1}),
    "v1-credit": (Kind.CREDIT, 3, None),
    "v1-ping": (Kind.PING, 0, None),
    "v1-pong": (Kind.PONG, 258, None),
    "v1-plain": (
        Kind.MESSAGE,
        0,
        {
            "none": None,
            "bools": [True, False],
            "ints": [0, -1, 127, -(2**63), 2**64 - 1],
            "floats": [0.1, float("inf")],
            "text": "Grüße",
            "bytes": b"\x00\xff",
            7: {"empty": [[], {}]},
        },
    ),
    "v1-tuples": (Kind.MESSAGE, 65535, ((), (1, [(2, {"x": (3,)})]), [ramp("f4", 2), ("a",)])),
    "v1-small-arrays": (Kind.MESSAGE, 0, {code: ramp(code, (2, 3)) for code in DTYPES}),
    "v1-shapes": (Kind.MESSAGE, 0, [ramp("f4", shape) for shape in ((), (0,), (3, 0, 2), (1, 1))]),
    "v1-scalars": (Kind.MESSAGE, 0, [ramp(code, 2)[1] for code in DTYPES]),
    "v1-large-arrays": (Kind.MESSAGE, 0, {code: ramp(code, (3, 181)) for code in DTYPES}),
    "v1-nested-arrays": (
        Kind.MESSAGE,
        1,
        {"step": 5, "content": {"block": 3, "value": (ramp("f4", 130), [ramp("u1", (2, 257))])}},
    ),
}


INBAND = {"text": "Grüße", "list": [1, -2.5, None, True, b"\xff"], "array": ramp("f4", (2, 130))}
INBAND |= {code: ramp(code, (2, 3)) for code in DTYPES} | {"scalar": np.float32(1.5)}
GOLDEN["v1-inband"] = (Kind.INBAND, 5, INBAND)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.bin")), ids=lambda path: path.stem)
def test_decodes_for_ever(path):
    data = path.read_bytes()
    header = decode_header(data)
    end = HEADER_SIZE + header.metadata_size
    body = allocate(header.body_size)
    body[:] = np.frombuffer(data, np.uint8, offset=end)
    kind, number, content = GOLDEN[path.stem]
    assert (header.kind, header.number) == (kind, number)
    if kind is Kind.INBAND:
        assert_same(decode_inband(body), content)
    else:
        assert_same(decode(data[HEADER_SIZE:end], body), content)


@pytest.mark.parametrize("name", GOLDEN)
def test_is_still_written_in_the_same_bytes(name):
    kind, number, content = GOLDEN[name]
    frame = encode_inband(content, number) if kind is Kind.INBAND else encode(content, kind, number)
    written = b"".join(frame.buffers)
    assert written == (FOLDER / f"{name}.bin").read_bytes()


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
