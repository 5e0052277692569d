"""Bytes <-> frames: what two nodes say to each other. No I/O.

A frame is a 16-byte header, metadata and a body:

    magic u8 | kind u8 | number u16 | metadata length u32 | body length u64      little-endian
    metadata   msgpack, at most 64 KiB; an array is an extension (dtype, shape, offset)
    body       the bytes of the arrays, each at an offset that is a multiple of 64

Arrays travel by reference: `encode` copies no large array, and `decode` returns views of the body.
Small arrays and scalars stay inside the metadata, in the form that msgpack-numpy gives them.

The number of a MESSAGE is its channel. A body of more than 1 MiB does not follow its metadata: it
comes in CHUNK frames of the same number, so that other channels and urgent frames get their turns
in between. An INBAND frame is a message without metadata, whose body is just what
`msgpack_numpy.packb` gives, for peers that have nothing else; it comes whole.

Decoding trusts nothing: dtypes come from a table, sizes are checked before memory is taken, and
whatever is wrong is a RemoteProtocolError. msgpack-numpy's own decoder is never used: it unpickles.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import msgpack  # type: ignore[import-untyped]
import msgpack_numpy
import numpy as np
import numpy.typing as npt

from aiosgd.errors import LocalProtocolError, RemoteProtocolError

Buffer: TypeAlias = bytes | memoryview
Bytes: TypeAlias = npt.NDArray[np.uint8]

WIRE_VERSION = 1
"""Two nodes talk only if they agree on it; tests/frames keeps samples of every version."""

HEADER = struct.Struct("<BBHIQ")
HEADER_SIZE = HEADER.size
MAGIC = 0xA5

MAX_METADATA = 64 << 10
MAX_BODY = 4 << 30
MAX_ITEMS = 4096
"""Items of one list, tuple or dict; without it, 16 MiB of empty maps become 1.2 GB of objects."""
MAX_INBAND_ITEMS = 16 * MAX_ITEMS
"""Items of an INBAND frame in all, several for each array."""
MAX_DEPTH = 32
MAX_DIMENSIONS = 32
MAX_EXTENT = 1 << 40
"""Bytes of an array whose empty dimensions count as 1: an empty array may not hide a huge one."""

ALIGNMENT = 64
ALIGNED_FROM = 4 << 10
"""Smaller memory is aligned as numpy aligns it, to 16: finding a better place takes 1 µs."""
INLINE_BELOW = 512
"""Below this many bytes, an own place in the body costs more than a copy."""
JOIN_UP_TO = 16 << 10
"""Up to this many bytes of body, one copied buffer is cheaper than several by reference."""
CHUNK = 1 << 20
"""Bytes of a body that travel in one go. Pieces of 256 KiB to 2 MiB all reach the speed of a bare
socket; larger ones are copied by the transport, and hold up heartbeats."""

_ARRAY, _SCALAR, _TUPLE = 0x4E, 0x53, 0x54  # extension types: N, S, T
_PADDING = bytes(ALIGNMENT)
_ND_KEY = b"\xc4\x02nd"  # b"nd", which makes a map the form of a small array or scalar


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 0
    MESSAGE = 1
    INBAND = 2
    CHUNK = 3
    CREDIT = 4
    PING = 5
    PONG = 6


_KINDS = {int(kind): kind for kind in Kind}
_WITHOUT_METADATA = (Kind.INBAND, Kind.CHUNK)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver takes at most, in bytes; `max_metadata` is at most 64 KiB."""

    max_metadata: int = MAX_METADATA
    max_body: int = MAX_BODY

    def __post_init__(self) -> None:
        if self.max_metadata > MAX_METADATA:
            raise LocalProtocolError(
                f"Limits: max_metadata is {self.max_metadata}; at most {MAX_METADATA}"
            )


DEFAULT_LIMITS = Limits()


class Header(NamedTuple):
    """The fixed part of a frame; sizes in bytes.

    Attributes:
        number: the channel of a MESSAGE, INBAND or CHUNK, how many messages a CREDIT is for, and
            which PING a PONG answers.
    """

    kind: Kind
    number: int
    metadata_size: int
    body_size: int

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in CHUNK frames."""
        return self.kind is Kind.MESSAGE and self.body_size > CHUNK

    @property
    def size(self) -> int:
        """Bytes on the wire, with the headers of the chunks."""
        chunks = -(-self.body_size // CHUNK) if self.is_chunked else 0
        return HEADER_SIZE * (1 + chunks) + self.metadata_size + self.body_size


class Encoded(NamedTuple):
    """A frame ready to be sent, any number of times.

    Attributes:
        header: its header.
        buffers: header, metadata and body in order; large arrays by reference, so they must not
            change until sent.
        size: bytes on the wire, with the headers of its chunks.
    """

    header: Header
    buffers: Sequence[Buffer]
    size: int

    def pieces(self) -> Iterator[list[Buffer]]:
        """Yield what to send, piece by piece.

        Only the pieces of an INBAND frame must leave in one go; between those of a MESSAGE, frames
        of other channels may.
        """
        if self.header.body_size <= CHUNK:
            yield list(self.buffers)
            return
        head, *bodies = self.buffers
        start: list[Buffer] = [head]
        for parts, size in _cut(bodies):
            if self.header.is_chunked:
                start.append(HEADER.pack(MAGIC, Kind.CHUNK, self.header.number, 0, size))
            yield start + parts
            start = []

    def received(self) -> Any:
        """Return the content as a receiver gets it: copied once, arrays read-only."""
        head, header = memoryview(self.buffers[0]), self.header
        end = HEADER_SIZE + header.metadata_size
        body = allocate(header.body_size)
        place, position = body.data, 0
        for part in (head[end:], *self.buffers[1:]):
            place[position : position + len(part)] = part
            position += len(part)
        return decode(head[HEADER_SIZE:end], body)


def _cut(buffers: Iterable[Buffer]) -> Iterator[tuple[list[Buffer], int]]:
    """Cut buffers, one after the other, into pieces of CHUNK bytes; yield each with its size."""
    parts: list[Buffer] = []
    size = 0
    for buffer in buffers:
        view, position = memoryview(buffer), 0
        while position < len(view):
            part = view[position : position + CHUNK - size]
            parts.append(part)
            position += len(part)
            size += len(part)
            if size == CHUNK:
                yield parts, size
                parts, size = [], 0
    if size:
        yield parts, size


# dtypes ---------------------------------------------------------------------------------------


def _standard_dtypes() -> list[np.dtype[Any]]:
    # by size: np.dtype("q") has the same name as int64, but scalars of another class
    codes = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")
    return [np.dtype(code).newbyteorder("<") for code in codes]


def _extended_dtypes() -> list[np.dtype[Any]]:
    """Return bfloat16 and the float8 family where ml_dtypes is installed."""
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ImportError:
        return []
    names = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    return [np.dtype(getattr(ml_dtypes, name)) for name in names]


# A table, never np.dtype(<the peer's string>): a crafted string crashes the process.
_BY_STRING = {dtype.str: dtype for dtype in _standard_dtypes()}
_BY_NAME = {dtype.name: dtype for dtype in (*_standard_dtypes(), *_extended_dtypes())}
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}
_INLINE = frozenset(_BY_STRING.values())


def _wire_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the little-endian dtype that stands for `dtype` on the wire."""
    if dtype in _NAMES:
        return dtype
    if dtype.kind in "iufc" and (little := dtype.newbyteorder("<")) in _NAMES:
        return little
    raise LocalProtocolError(
        f"an array of dtype {dtype} cannot be sent; expected one of {', '.join(_BY_NAME)}"
    )


# Encoding -------------------------------------------------------------------------------------


def encode(content: Any, kind: Kind = Kind.MESSAGE, number: int = 0) -> Encoded:
    """Build the frame that carries `content`; once per message, however many receive it.

    Args:
        content: None, bool, int, float, str, bytes, list, dict, tuple, numpy arrays and scalars,
            nested at will. None takes no metadata at all.
        number: 0 … 65535.

    Raises:
        LocalProtocolError: a type, dtype or size that cannot travel; the message names it.
    """
    if not 0 <= number <= 0xFFFF:
        raise LocalProtocolError(f"frame: number is {number}; expected 0 to 65535")
    metadata, bodies, body_size = (b"", [], 0) if content is None else _encode_content(content)
    return _frame(Header(kind, number, len(metadata), body_size), metadata, bodies)


def encode_inband(content: Any, number: int = 0) -> Encoded:
    """Build the INBAND frame that carries `content` as `msgpack_numpy.packb` would; it copies.

    Raises:
        LocalProtocolError: a type, dtype or size that cannot travel; a tuple arrives as a list.
    """
    try:
        body = msgpack.packb(content, default=_inband)
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"content cannot be encoded: {error}") from error
    return _frame(Header(Kind.INBAND, number, 0, len(body)), b"", [body])


def _inband(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        dtype = _wire_dtype(value.dtype)
        if dtype in _INLINE:
            return msgpack_numpy.encode(np.asarray(value, dtype)[()])
        raise LocalProtocolError(f"an array of dtype {dtype} cannot be sent by msgpack-numpy")
    return _plain(value)


def _frame(header: Header, metadata: bytes, bodies: Sequence[Buffer]) -> Encoded:
    kind, number, metadata_size, body_size = header
    head = HEADER.pack(MAGIC, kind, number, metadata_size, body_size) + metadata
    buffers: list[Buffer] = [head, *bodies]
    if body_size > JOIN_UP_TO:
        return Encoded(header, buffers, header.size)
    joined = b"".join(buffers)
    return Encoded(header, [joined], len(joined))


def _encode_content(content: Any) -> tuple[bytes, list[Buffer], int]:
    encoder = _idle_encoders.pop() if _idle_encoders else _Encoder()
    try:
        encoded = encoder.encode(content)
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"content cannot be encoded: {error}") from error
    _idle_encoders.append(encoder)  # one that failed may be in any state: it is dropped
    return encoded


class _Encoder:
    """Packs one content at a time.

    Packers are kept because a new one costs ten times what it packs, and there is one per nesting
    level of tuples because a Packer that is used from within its own hook mixes up its output.
    """

    def __init__(self) -> None:
        self._packers: list[msgpack.Packer] = []
        self._depth = 0
        self._extensions = 0
        self._bodies: list[Buffer] = []
        self._end = 0

    def encode(self, content: Any) -> tuple[bytes, list[Buffer], int]:
        """Return metadata, the body's buffers and the body's size."""
        self._extensions = 0
        metadata = self._pack(content)
        bodies, size = self._bodies, self._end
        self._bodies, self._end = [], 0
        if size > MAX_BODY or not _is_surely_fine(metadata, self._extensions):
            _check_own(metadata, size)
        return metadata, bodies, size

    def _pack(self, value: Any) -> bytes:
        if self._depth == len(self._packers):
            self._packers.append(_new_packer(self._extend))
        packer = self._packers[self._depth]
        self._depth += 1
        packed: bytes = packer.pack(value)
        self._depth -= 1
        return packed

    def _extend(self, value: Any) -> Any:
        """Return what msgpack takes in place of `value`, which it does not take as it is."""
        if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
            return self._array(value)
        if isinstance(value, np.generic):
            return _scalar(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        return _plain(value)

    def _tuple(self, value: tuple[Any, ...]) -> msgpack.ExtType:
        if self._depth > MAX_DEPTH:
            raise LocalProtocolError(f"content is nested more than {MAX_DEPTH} levels deep")
        return self._extension(_TUPLE, self._pack(list(value)))

    def _array(self, value: npt.NDArray[Any]) -> Any:
        dtype = _wire_dtype(value.dtype)
        array = np.asarray(value, dtype)
        if array.nbytes < INLINE_BELOW and dtype in _INLINE:
            return _inline(array)
        offset = self._append(array)
        descriptor = [_NAMES[dtype], list(array.shape), offset]
        return self._extension(_ARRAY, _pack_descriptor(descriptor))

    def _extension(self, code: int, packed: bytes) -> msgpack.ExtType:
        self._extensions += 1
        return msgpack.ExtType(code, packed)

    def _append(self, array: npt.NDArray[Any]) -> int:
        """Put the array's bytes behind what the body has, and return their offset."""
        padding = -self._end % ALIGNMENT
        if padding:
            self._bodies.append(_PADDING[:padding])
        if array.nbytes:
            self._bodies.append(_bytes_of(array))
        offset = self._end + padding
        self._end = offset + array.nbytes
        return offset


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """Return an array's bytes in C order; what is not contiguous is copied, and only that."""
    try:
        return array.data.cast("B")
    except (ValueError, TypeError):  # not contiguous, or of a dtype that Python does not know
        return array.reshape(-1).view(np.uint8).data


# A list because pop and append are atomic: loops in several threads never share an encoder.
_idle_encoders: list[_Encoder] = []


def _new_packer(default: Any = None) -> msgpack.Packer:
    return msgpack.Packer(default=default, strict_types=True)


_pack_descriptor = _new_packer().pack


def _inline(array: npt.NDArray[Any]) -> dict[bytes, Any]:
    """Return msgpack-numpy's form of a small array; the shape is a list there, not our tuple."""
    form: dict[bytes, Any] = msgpack_numpy.encode(array)
    form[b"shape"] = list(array.shape)
    return form


def _scalar(value: np.generic) -> Any:
    dtype = _wire_dtype(value.dtype)
    if dtype in _INLINE:
        return msgpack_numpy.encode(value)
    return msgpack.ExtType(_SCALAR, _pack_descriptor([_NAMES[dtype], value.tobytes()]))


_PLAIN: dict[type, Callable[[Any], Any]] = {
    dict: dict,
    list: list,
    int: int,
    float: float,
    bytes: bytes,
    str: str.__str__,  # str() of an enumeration's member gives its name
}


def _plain(value: Any) -> Any:
    """Return an instance of a subclass as its msgpack type, as msgpack itself would."""
    if type(value) is int:
        raise LocalProtocolError(f"integer {value} cannot be sent; it needs more than 64 bits")
    for base, plain in _PLAIN.items():
        if isinstance(value, base):
            return plain(value)
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise LocalProtocolError(
        f"a value of type {name} cannot be sent; expected None, bool, int, float, str, bytes, "
        "list, tuple, dict, a numpy array or scalar"
    )


def _is_surely_fine(metadata: bytes, extensions: int) -> bool:
    """Whether every receiver takes it: a glance that spares most messages a full check.

    Args:
        extensions: how many of the extensions in it are ours.
    """
    opening = metadata.translate(None, _NOT_OPENING)
    return (
        len(metadata) <= MAX_ITEMS  # and thus no container has more items
        and len(opening) <= MAX_DEPTH
        and len(opening.translate(None, _NOT_EXTENDING)) == extensions
        and _ND_KEY not in metadata
    )


def _check_own(metadata: bytes, body_size: int) -> None:
    """Refuse to send what no receiver would take: our error must not look like the peer's."""
    if len(metadata) > MAX_METADATA:
        raise LocalProtocolError(
            f"content needs {len(metadata)} bytes without its arrays, at most {MAX_METADATA}; "
            "send large data as numpy arrays"
        )
    if body_size > MAX_BODY:
        raise LocalProtocolError(f"content has {body_size} bytes of arrays; at most {MAX_BODY}")
    try:
        _Reader(None, body_size).read(metadata)
    except RemoteProtocolError as error:
        hint = "; send large data as numpy arrays" if "exceeds max" in str(error) else ""
        raise LocalProtocolError(f"content cannot be sent: {error}{hint}") from error


# Decoding -------------------------------------------------------------------------------------


def decode_header(view: Buffer, offset: int = 0, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read a header; sizes are checked here, before anybody takes memory for them.

    Args:
        view: at least 16 bytes from `offset` on.

    Raises:
        RemoteProtocolError: wrong magic, unknown kind, or more than the limits allow.
    """
    magic, number_of_kind, number, metadata_size, body_size = HEADER.unpack_from(view, offset)
    if magic != MAGIC:
        raise RemoteProtocolError(f"frame starts with {magic:#04x}; expected {MAGIC:#04x}")
    kind = _KINDS.get(number_of_kind)
    if kind is None:
        raise RemoteProtocolError(f"frame is of kind {number_of_kind}; expected {_known_kinds()}")
    if metadata_size > limits.max_metadata:
        raise RemoteProtocolError(
            f"frame has {metadata_size} bytes of metadata; at most {limits.max_metadata}"
        )
    if body_size > limits.max_body:
        raise RemoteProtocolError(
            f"frame has a body of {body_size} bytes; at most {limits.max_body}"
        )
    if metadata_size and kind in _WITHOUT_METADATA:
        raise RemoteProtocolError(f"{kind.name} frame has {metadata_size} bytes of metadata")
    return Header(kind, number, metadata_size, body_size)


def _known_kinds() -> str:
    return ", ".join(f"{kind:d} ({kind.name})" for kind in Kind)


def decode(metadata: Buffer, body: Bytes) -> Any:
    """Return a frame's content.

    Args:
        metadata: as received; nothing refers to it afterwards.
        body: as received, best from `allocate`; the arrays are read-only views of it, and it must
            not change while one of them lives.

    Raises:
        RemoteProtocolError: whatever else the bytes are.
    """
    if not len(metadata) and not len(body):
        return None
    view = body.view()
    view.flags.writeable = False
    return _Reader(view, len(body)).read(bytes(metadata))


def decode_inband(body: Bytes) -> Any:
    """Return the content of an INBAND frame: arrays are read-only, and copies.

    Raises:
        RemoteProtocolError: whatever else the bytes are.
    """
    packed = body.data
    _check_items(packed)
    try:
        content = msgpack.unpackb(packed, object_hook=_map, strict_map_key=False)
        _check_values(content)
    except RemoteProtocolError:
        raise
    except Exception as error:
        raise RemoteProtocolError(
            f"body cannot be unpacked: {str(error) or type(error).__name__}"
        ) from error
    return content


def allocate(size: int) -> Bytes:
    """Return `size` uninitialised bytes; their address is a multiple of 64, from 4 KiB on."""
    if size < ALIGNED_FROM:
        return np.empty(size, np.uint8)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size]


# Every byte that can open a container or extension; more of them than MAX_DEPTH ask for care.
_OPENING = bytes((*range(0x80, 0xA0), 0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9), *range(0xDC, 0xE0)))
_NOT_EXTENDING = bytes(sorted(set(range(256)) - {0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)}))
_NOT_OPENING = bytes(sorted(set(range(256)) - set(_OPENING)))
_TIMESTAMPS = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff")


# What a msgpack item's first byte says: bytes of its own length field, and bytes per unit of it.
_SIZES = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_SIZES |= {0xCC + i: 1 << i for i in range(4)} | {0xD0 + i: 1 << i for i in range(4)}
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin, str
_COUNTS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # array, map


def _check_items(packed: memoryview) -> None:
    """Raise if there are too many items, or not just as many as the bytes say; takes no memory."""
    position = items = 0
    expected = 1
    while items < expected:
        if position >= len(packed):
            raise RemoteProtocolError("body ends in the middle of its content")
        size, children = _item(packed, position)
        position += size
        expected += children
        items += 1
        if items > MAX_INBAND_ITEMS:
            raise RemoteProtocolError(f"body has more than {MAX_INBAND_ITEMS} items")
    if position != len(packed):
        raise RemoteProtocolError(f"content ends at {position}, the body at {len(packed)}")


def _item(packed: memoryview, position: int) -> tuple[int, int]:
    """Return how many bytes an item takes before its children, and how many children it has."""
    first = packed[position]
    if first in _SIZES:
        return 1 + _SIZES[first], 0
    if first < 0x80 or first >= 0xE0:
        return 1, 0
    if first < 0x90:
        return 1, 2 * (first & 0x0F)
    if first < 0xA0:
        return 1, first & 0x0F
    if first < 0xC0:
        return 1 + (first & 0x1F), 0
    width, unit = _COUNTS.get(first, (_LENGTHS.get(first), 0))
    if width is None:
        raise RemoteProtocolError(
            f"body has an item of type {first:#04x}; extensions are not taken"
        )
    number = int.from_bytes(packed[position + 1 : position + 1 + width], "big")
    return (1 + width, number * unit) if unit else (1 + width + number, 0)


class _Reader:
    """Rebuilds the content of one frame.

    Methods, not closures: closures that call each other are a reference cycle, which keeps the
    body of 100 MB alive until the collector happens to run. Without a body, arrays are checked
    but come out as None.
    """

    __slots__ = ("_body", "_careful", "_depth", "_end", "_size")

    def __init__(self, body: Bytes | None, size: int) -> None:
        self._body = body
        self._size = size
        self._end = 0
        self._depth = 0
        self._careful = False

    def read(self, metadata: bytes) -> Any:
        """Return the content, or raise RemoteProtocolError."""
        try:
            self._careful = _needs_care(metadata)
            content = self._unpack(metadata)
            if self._careful:
                _check_values(content)
        except RemoteProtocolError:
            raise
        except Exception as error:
            raise RemoteProtocolError(f"metadata cannot be unpacked: {error}") from error
        if self._end != self._size:
            raise RemoteProtocolError(
                f"frame has a body of {self._size} bytes, but its arrays end at {self._end}"
            )
        return content

    def _unpack(self, packed: bytes) -> Any:
        if self._careful:
            _check_complete(packed)
        return msgpack.unpackb(
            packed,
            ext_hook=self._extension,
            object_hook=_map,
            strict_map_key=False,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )

    def _extension(self, code: int, packed: bytes) -> Any:
        if code == _ARRAY:
            return self._array(packed)
        if code == _TUPLE:
            return self._tuple(packed)
        if code == _SCALAR:
            return _extended_scalar(packed)
        raise RemoteProtocolError(f"metadata has an unknown extension, {code:#04x}")

    def _tuple(self, packed: bytes) -> tuple[Any, ...]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _too_deep()
        items = self._unpack(packed)
        self._depth -= 1
        if not isinstance(items, list):
            raise RemoteProtocolError(f"a tuple is packed as {type(items).__name__}; expected list")
        return tuple(items)

    def _array(self, packed: bytes) -> npt.NDArray[Any] | None:
        name, shape, offset = msgpack.unpackb(packed)
        dtype = _lookup(_BY_NAME, name)
        size = _byte_count(dtype, shape)
        if type(offset) is not int or offset % ALIGNMENT or offset < self._end:
            raise RemoteProtocolError(
                f"an array is at offset {offset!r}; "
                f"expected a multiple of {ALIGNMENT}, {self._end} or more"
            )
        self._end = offset + size
        if self._end > self._size:
            raise RemoteProtocolError(f"an array ends at {self._end}, the body at {self._size}")
        return None if self._body is None else np.ndarray(shape, dtype, self._body.data, offset)


def _map(form: dict[Any, Any]) -> Any:
    """Return the array or scalar that msgpack-numpy's form of it stands for, or the dict itself."""
    if b"nd" not in form:
        return form
    if form[b"nd"] is True and form.keys() == {b"nd", b"type", b"kind", b"shape", b"data"}:
        shape = form[b"shape"]
    elif form[b"nd"] is False and form.keys() == {b"nd", b"type", b"data"}:
        shape = []
    else:
        raise RemoteProtocolError(f"a map with the key b'nd' is no small array: {list(form)}")
    dtype, data = _lookup(_BY_STRING, form[b"type"]), form[b"data"]
    size = _byte_count(dtype, shape)
    if form.get(b"kind", b"") != b"" or type(data) is not bytes or len(data) != size:
        raise RemoteProtocolError(f"a small array of {size} bytes does not match its data")
    array: npt.NDArray[Any] = np.ndarray(shape, dtype, data)
    return array if form[b"nd"] else array[()]


def _extended_scalar(packed: bytes) -> Any:
    name, data = msgpack.unpackb(packed)
    dtype = _lookup(_BY_NAME, name)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise RemoteProtocolError(f"a scalar of dtype {name} does not match its data")
    return np.frombuffer(data, dtype)[0]


def _lookup(table: dict[str, np.dtype[Any]], name: Any) -> np.dtype[Any]:
    dtype = table.get(name) if type(name) is str else None
    if dtype is None:
        raise RemoteProtocolError(f"array of dtype {name!r}; expected one of {', '.join(table)}")
    return dtype


def _byte_count(dtype: np.dtype[Any], shape: Any) -> int:
    """Return the bytes of an array, after a check of its shape."""
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise RemoteProtocolError(f"shape is no list of at most {MAX_DIMENSIONS} dimensions")
    if len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] <= MAX_BODY:
        return dtype.itemsize * shape[0]  # as most are
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise RemoteProtocolError(f"shape {shape} has the dimension {dimension!r}")
    if dtype.itemsize * math.prod(max(dimension, 1) for dimension in shape) > MAX_EXTENT:
        raise RemoteProtocolError(f"shape {shape} is too large for an array of {dtype}")
    return dtype.itemsize * math.prod(shape)


def _needs_care(metadata: bytes) -> bool:
    """Whether the metadata may be nested too deep, be a bomb, or hold a timestamp; cheap."""
    if len(metadata.translate(None, _NOT_OPENING)) > MAX_DEPTH:
        return True
    return b"\xff" in metadata and any(mark in metadata for mark in _TIMESTAMPS)


def _check_complete(packed: bytes) -> None:
    """Raise if items are missing, before unpacking reserves memory for all that are announced."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(packed)
    unpacker.skip()


def _check_values(content: Any) -> None:
    """Refuse what msgpack unpacks by itself but we do not send: timestamps and deep nesting."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise _too_deep()


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, msgpack.Timestamp):
        raise RemoteProtocolError("metadata has a timestamp; send a number")
    return ()


def _too_deep() -> RemoteProtocolError:
    return RemoteProtocolError(f"content is nested more than {MAX_DEPTH} levels deep")
