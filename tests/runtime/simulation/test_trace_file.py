import itertools
import json

import pytest

from aiosgd.errors import ConfigError
from aiosgd.runtime.simulation.trace import Event, Trace, What
from aiosgd.runtime.simulation.trace_file import (
    Recorded,
    first_difference,
    machine,
    read_trace,
    write_trace,
)

EVENTS = [Event(i * 1000, what, i - 2, 3, i, 10 * i) for i, what in enumerate(What)]
JOB = {"codec": "plain", "codec_params": {"turn": 3}}


def trace_of(events, *, keep=True):
    trace = Trace(keep=keep)
    for event in events:
        trace.add(*event)
    return trace


@pytest.fixture
def path(tmp_path):
    write_trace(tmp_path / "a.jsonl", trace_of(EVENTS), 7, JOB)
    return tmp_path / "a.jsonl"


def test_what_was_written_is_read(path):
    recorded = read_trace(path)
    assert recorded.events == EVENTS
    assert all(isinstance(event.what, What) for event in recorded.events)
    assert recorded.header["seed"] == 7
    assert recorded.header["job"] == JOB
    assert recorded.header["sha256"] == trace_of(EVENTS).digest
    assert machine().items() <= recorded.header.items()


def test_a_file_is_one_header_and_one_line_for_each_event(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + len(EVENTS)
    assert lines[1] == {
        "time_ns": 0,
        "what": "SEND",
        "node": -2,
        "peer": 3,
        "number": 0,
        "size": 0,
    }


def test_an_empty_trace_is_a_trace(tmp_path):
    write_trace(tmp_path / "t", trace_of([]), 0, {})
    assert read_trace(tmp_path / "t").events == []
    assert first_difference(tmp_path / "t", trace_of([])) is None


def test_a_trace_without_its_events_is_refused(tmp_path):
    digest_only = trace_of(EVENTS, keep=False)
    with pytest.raises(ValueError, match="kept 0 of 8 events"):
        write_trace(tmp_path / "t", digest_only, 0, {})
    with pytest.raises(ValueError, match="kept 0 of 8 events"):
        first_difference(digest_only, digest_only)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "has 7 events; expected 8"),
        (lambda lines: [], "line 1 is ''; expected a JSON object"),
        (lambda lines: ['{"format": "other"}', *lines[1:]], "is no trace"),
        (lambda lines: [*lines[:3], "nonsense", *lines[4:]], "line 4 is 'nonsense'"),
        (lambda lines: [*lines[:3], "[1, 2]", *lines[4:]], "line 4 is"),
        (lambda lines: [*lines[:2], lines[2].replace("DELIVER", "EAT")], "expected an event: time"),
        (lambda lines: [*lines[:2], lines[2].replace("1000", "1e3")], "expected an event: time"),
        (lambda lines: [*lines[:2], lines[2].replace('"size"', '"mass"')], "expected an event"),
        (lambda lines: [*lines[:2], lines[2].replace('"DELIVER"', '["SEND"]')], "an event"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(path, change, message):
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            read_trace(tmp_path / name)


def test_equal_traces_do_not_differ(path):
    sources = [path, str(path), read_trace(path), trace_of(EVENTS)]
    assert [first_difference(*pair) for pair in itertools.product(sources, sources)] == [None] * 16


@pytest.mark.parametrize("index", range(len(EVENTS)))
@pytest.mark.parametrize("field", ["time_ns", "node", "peer", "number", "size"])
def test_the_first_difference_is_found(index, field):
    changed = EVENTS[index]._replace(**{field: 99})
    others = [*EVENTS[:index], changed, *EVENTS[index + 1 :][::-1]]
    difference = first_difference(trace_of(EVENTS), trace_of(others))
    assert difference[:3] == (index, EVENTS[index], changed)
    assert difference.sentence.startswith(f"event {index + 1} differs: ")


def test_a_difference_is_readable():
    sends = Event(1_500_000, What.SEND, 0, -1, 4, 128)
    gets = sends._replace(what=What.DELIVER)
    assert first_difference(trace_of([sends]), trace_of([gets])).sentence == (
        "event 1 differs: worker 0 sends message 4 (128 bytes) to server -1 at 0.001500000 s in the "
        "first, server -1 gets message 4 (128 bytes) from worker 0 at 0.001500000 s in the second"
    )


def test_a_trace_that_ends_before_the_other_differs():
    longer, shorter = trace_of(EVENTS), trace_of(EVENTS[:4])
    difference = first_difference(shorter, longer)
    assert difference[:3] == (4, None, EVENTS[4])
    assert (
        "event 5 differs: the end in the first, 2 and 3 nodes are cut apart" in difference.sentence
    )
    assert first_difference(longer, shorter)[:3] == (4, EVENTS[4], None)


def test_what_two_traces_were_made_with_is_compared():
    first = Recorded({"numpy": "1", "cpu_flags": "a b", "seed": 1, "events": 1}, EVENTS[:1])
    second = Recorded({"numpy": "2", "cpu_flags": "a", "seed": 1, "events": 2}, EVENTS[1:2])
    assert first_difference(first, second).sentence.endswith(
        "; they were made with different numpy (1 and 2), cpu_flags"
    )
    assert "made with" not in first_difference(first, trace_of([])).sentence


def test_the_processor_is_part_of_the_machine(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Fast 1\nflags\t\t: sse avx\n\nmodel name\t: Slow\nflags\t: x\n")
    facts = machine(info)
    assert (facts["cpu"], facts["cpu_flags"]) == ("Fast 1", "avx sse")
    info.write_text("Features : fp asimd\n")
    assert machine(info)["cpu_flags"] == "asimd fp"
    assert {"python", "numpy", "aiosgd", "machine"} == {*machine(tmp_path / "none")}
