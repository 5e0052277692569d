"""docs/wire.md is enough to read the wire: its reader, written from the page alone, reads frames."""

import importlib.util
import io
import itertools
from pathlib import Path

import numpy as np
import pytest

from aiosgd.runtime.frame import Kind, encode, encode_inband

ROOT = Path(__file__).parents[1]


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = load("golden_frames", ROOT / "tests" / "frames" / "test_golden.py")


@pytest.fixture(scope="module")
def page_reader(tmp_path_factory):
    """Return `frames` of the page's wire.py; it imports nothing of aiosgd."""
    text = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    source = text.partition('```python title="wire.py"\n')[2].partition("```")[0]
    assert "aiosgd" not in source
    path = tmp_path_factory.mktemp("page") / "wire.py"
    path.write_text(source, encoding="utf-8")
    return load("wire_page", path).frames


def read(page_reader, data):
    """Return all frames of a stream."""
    stream = io.BytesIO(data)

    def exactly(count):
        got = stream.read(count)
        if len(got) < count:
            raise EOFError
        return got

    found, frames = [], page_reader(exactly)
    try:
        while True:
            found.append(next(frames))
    except EOFError:
        return found


@pytest.mark.parametrize("path", sorted(golden.FOLDER.glob("*.bin")), ids=lambda path: path.stem)
def test_it_reads_every_golden_frame(page_reader, path):
    ((kind, number, content),) = read(page_reader, path.read_bytes())
    expected_kind, expected_number, expected = golden.GOLDEN[path.stem]
    assert (kind, number) == (expected_kind, expected_number)
    golden.assert_same(content, expected)


def test_it_reads_messages_in_chunks_that_take_turns(page_reader):
    contents = [{"a": (np.arange(700_000, dtype="f4") + i, "x", None)} for i in range(2)]
    pieces = [encode(content, number=i).pieces() for i, content in enumerate(contents)]
    ping = encode(None, Kind.PING, 7).buffers
    turns = itertools.chain.from_iterable(
        (piece for piece in turn if piece is not None) for turn in itertools.zip_longest(*pieces)
    )
    data = b"".join(part for piece in turns for part in (*piece, *ping))
    found = read(page_reader, data)
    assert found.count((Kind.PING, 7, None)) == 6
    messages = [frame for frame in found if frame[0] != Kind.PING]
    assert [(kind, number) for kind, number, _ in messages] == [
        (Kind.MESSAGE, 0),
        (Kind.MESSAGE, 1),
    ]
    for (_, _, content), expected in zip(messages, contents, strict=True):
        golden.assert_same(content, expected)


def test_it_reads_a_large_inband_frame_that_comes_whole(page_reader):
    content = [np.arange(500_000, dtype="f8"), "x"]
    ((kind, number, got),) = read(page_reader, b"".join(encode_inband(content, 3).buffers))
    assert (kind, number) == (Kind.INBAND, 3)
    golden.assert_same(got, content)
