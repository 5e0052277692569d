"""A peer that has never heard of aiosgd: struct, socket, msgpack and msgpack-numpy are all it has.

python foreign_peer.py HOST PORT   exchanges arrays with a node, and prints what went which way
"""

import os
import socket
import struct
import sys

import msgpack
import msgpack_numpy
import numpy as np

HEADER = struct.Struct("<BBHIQ")  # magic, kind, number, bytes of metadata, bytes of body
MAGIC, HELLO, INBAND, PING, PONG = 0xA5, 0, 2, 5, 6
WIRE_VERSION = 1


def send(connection, kind, number=0, metadata=b"", body=b""):
    connection.sendall(HEADER.pack(MAGIC, kind, number, len(metadata), len(body)) + metadata + body)


def receive(connection):
    """Return the next frame that is no PING: kind, number, metadata, body."""
    while True:
        magic, kind, number, metadata, body = HEADER.unpack(exactly(connection, HEADER.size))
        assert magic == MAGIC
        frame = kind, number, exactly(connection, metadata), exactly(connection, body)
        if kind != PING:
            return frame


def exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        assert piece, "the node closed the connection"
        data += piece
    return bytes(data)


def say_hello(connection, **facts):
    send(connection, HELLO, metadata=msgpack.packb({"wire": WIRE_VERSION, "version": "-", **facts}))
    kind, _, metadata, _ = receive(connection)
    answer = msgpack.unpackb(metadata)
    assert kind == HELLO, kind
    assert "error" not in answer, answer
    return answer


def ask(connection, content):
    send(connection, INBAND, body=msgpack.packb(content, default=msgpack_numpy.encode))
    kind, _, metadata, body = receive(connection)
    assert (kind, metadata) == (INBAND, b"")
    return msgpack.unpackb(body, object_hook=msgpack_numpy.decode)


def main():
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30) as connection:
        say_hello(connection, nonce=os.urandom(32))
        say_hello(connection, role="probe")
        assert ask(connection, {"about": None})["job"] == ""
        for array in (
            np.arange(12, dtype="f4").reshape(3, 4),
            np.random.default_rng(0).random(2_500_000, "f4"),
            np.array([[True], [False]]),
            np.array([1 + 2j]),
            np.zeros((0, 3), "i8"),
            np.array(5.0),
        ):
            back = ask(connection, {"echo": [array, "x", None]})
            assert back[1:] == ["x", None]
            assert (back[0].dtype, back[0].shape) == (array.dtype, array.shape)
            assert np.array_equal(back[0], array)
            packed = msgpack.packb({"sink": array}, default=msgpack_numpy.encode)
            assert ask(connection, {"sink": array}) == HEADER.size + len(packed)
        given = ask(connection, {"give": 4_000_000})
        assert (given.dtype, given.nbytes) == (np.dtype("f4"), 4_000_000)
        send(connection, PING, number=77)
        assert receive(connection) == (PONG, 77, b"", b"")
        print("6 arrays there and back, 1 given, 1 ping")


if __name__ == "__main__":
    main()
