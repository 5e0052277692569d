"""What a node tells Prometheus, and whom it answers."""

import asyncio
import contextlib
import itertools
import math
import platform
import re
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aiosgd import __version__
from aiosgd.aio import Silent
from aiosgd.errors import ConfigError
from aiosgd.runtime import metrics
from aiosgd.runtime.config import Address, make_job
from aiosgd.runtime.coordinator import Request, run_job
from aiosgd.runtime.job import Phase
from aiosgd.runtime.metrics import BUCKETS, Counts, Exposition, Family
from aiosgd.runtime.node import Node
from aiosgd.runtime.part import Settings
from aiosgd.runtime.results import TRAIN, Rows

pytestmark = pytest.mark.both_loops

ANY = Address("127.0.0.1", 0)
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def ask(address, request=GET):
    """Return status and body of the answer to some bytes."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ") for line in lines[1:])
    assert int(fields["Content-Length"]) == len(body)
    return lines[0], fields, body.decode()


def values(text):
    """Return name and labels -> value, as Prometheus' own parser has them."""
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram"), family
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def counters(samples):
    """Return what must never fall."""
    suffixes = ("_total", "_bucket", "_sum", "_count")
    return {key: value for key, value in samples.items() if key[0].endswith(suffixes)}


def job_request(tmp_path, address, **options):
    job = make_job({"output": str(tmp_path / "runs"), **options})
    return Request(job=job, workers=[address], data_dir=tmp_path / "data")


# What is told -------------------------------------------------------------------------------------


async def test_a_node_tells_of_its_jobs_and_never_less(tmp_path, running, monkeypatch):
    monkeypatch.setattr(metrics, "FRESH", -1.0)
    seen = []

    class Watch(Silent):
        """Looks at the metrics at each phase."""

        def entered(self, phase, job_id):
            seen.append((phase, values(metrics.text_of(node))))

    async with running(metrics=ANY) as (node, address):
        before = values((await ask(node.metrics))[2])
        assert before[("aiosgd_busy",)] == before[("aiosgd_steps_total",)] == 0
        assert ("aiosgd_loss",) not in before
        outcome = await run_job(job_request(tmp_path, address, max_steps=5), Watch())
        await run_job(job_request(tmp_path, address, max_steps=3), Watch())
        after = values((await ask(node.metrics))[2])
    collecting = dict(seen[:-1])[Phase.COLLECTING]
    assert collecting[("aiosgd_busy",)] == 1
    assert collecting[("aiosgd_job_steps",)] == 3
    assert collecting[("aiosgd_job_step",)] == 2
    first = next(samples for phase, samples in seen if phase is Phase.COLLECTING)
    assert first[("aiosgd_loss",)] == outcome.train.loss[-1]
    assert first[("aiosgd_accuracy",)] == outcome.train.accuracy[-1]
    for one, other in itertools.pairwise([before, *(samples for _, samples in seen), after]):
        assert all(other[key] >= value for key, value in counters(one).items())
    assert after[("aiosgd_steps_total",)] == 8
    assert after[("aiosgd_samples_total",)] == 8 * 64
    assert after[("aiosgd_step_seconds_count",)] == 8
    assert after[("aiosgd_step_seconds_bucket", ("le", "+Inf"))] == 8
    assert first[("aiosgd_step_seconds_sum",)] == pytest.approx(outcome.train.time_s[-1])
    assert first[("aiosgd_compute_seconds_total",)] == pytest.approx(outcome.train.compute_s.sum())
    assert after[("aiosgd_jobs_total", ("state", "done"))] == 2
    assert after[("aiosgd_jobs_total", ("state", "failed"))] == 0
    assert after[("aiosgd_busy",)] == 0
    assert ("aiosgd_job_step",) not in after


async def test_two_nodes_count_their_links_and_bytes(tmp_path, running, monkeypatch):
    monkeypatch.setattr(metrics, "FRESH", -1.0)
    links = []

    class Watch(Silent):
        def entered(self, phase, job_id):
            links.append(values(metrics.text_of(node))[("aiosgd_links",)])

    async with running() as (node, address), running() as (_, other):
        job = make_job({"output": str(tmp_path / "runs"), "max_steps": 3})
        asked = Request(job=job, workers=[address, other], data_dir=tmp_path / "data")
        outcome = await run_job(asked, Watch())
        samples = values(metrics.text_of(node))
    figures = outcome.summary.per_node[0]
    assert max(links) == 1
    assert samples[("aiosgd_bytes_sent_total",)] == figures["bytes_sent"] > 0
    assert samples[("aiosgd_bytes_received_total",)] == figures["bytes_received"] > 0


async def test_the_process_is_told_of_and_no_job_is_named(tmp_path, running):
    async with running(metrics=ANY) as (node, address):
        title = "a-very-secret-title"
        await run_job(job_request(tmp_path, address, max_steps=1, title=title), Silent())
        _, fields, text = await ask(node.metrics)
    samples = values(text)
    build = (("python", platform.python_version()), ("version", __version__))
    assert samples[("aiosgd_build_info", *build)] == 1
    assert samples[("process_cpu_seconds_total",)] > 0
    assert 1e6 < samples[("process_resident_memory_bytes",)] < 1e12
    assert samples[("process_open_fds",)] <= samples[("process_max_fds",)]
    started = samples[("process_start_time_seconds",)]
    assert time.time() - 7 * 86400 < started < time.time()
    assert fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert not re.search(r"secret|plain\"|127\.0|runs", text)


def test_a_process_without_proc_tells_less(monkeypatch):
    def gone(self, *_):
        raise OSError("no /proc")

    monkeypatch.setattr(metrics.Path, "read_text", gone)
    assert {family.name for family in metrics._process()} == {
        "process_cpu_seconds_total",
        "process_max_fds",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.25, "0.25"),
        (1e22, "1e+22"),
        (2**63, "9223372036854775808"),
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
    ],
)
def test_numbers_are_those_of_the_format(value, text):
    lines = list(Family("a", "gauge", "words", [("", {"x": "y"}, value)]).lines())
    assert lines == ["# HELP a words", "# TYPE a gauge", f'a{{x="y"}} {text}']
    (family,) = text_string_to_metric_families("\n".join(lines) + "\n")
    assert family.samples[0].value == value or math.isnan(value)


# What is counted ----------------------------------------------------------------------------------


def part(train, **figures):
    zeros = dict.fromkeys(("bytes_sent", "bytes_received", "late", "skipped"), 0)
    return SimpleNamespace(
        session=SimpleNamespace(train=train, figures=lambda: {**zeros, **figures})
    )


def row(table, time_s):
    table.append(0, len(table), 0, time_s, 1.0, 0.5, 64, 0.25, 0.5, 0, 0, 0)


def test_a_step_is_in_the_bucket_whose_end_it_does_not_pass():
    counts, train = Counts(), Rows(TRAIN)
    for time_s in (0.001, 0.0011, 20.0):  # of 1 ms, 0.1 ms, and more than any bucket
        row(train, time_s)
    counts.look(part(train))
    assert counts.buckets.tolist() == [2] + [0] * (len(BUCKETS) - 1) + [1]
    assert counts.seconds == pytest.approx(20.0)


def test_each_row_counts_once_however_often_it_is_looked_at():
    counts, train = Counts(), Rows(TRAIN)
    one = part(train, bytes_sent=10)
    for i in range(5):
        row(train, 1.0 + i)
        counts.look(one)
        counts.look(one)
    counts.left(one, "done")
    assert counts.counters["steps"] == 5
    assert counts.counters["bytes_sent"] == 10
    assert (counts.compute_s, counts.wait_s, counts.seconds) == (1.25, 2.5, 5.0)


def test_a_part_that_never_trained_is_a_job_all_the_same():
    counts = Counts()
    counts.left(SimpleNamespace(session=None), "a state of the submitter's own")
    assert counts.jobs == {"done": 0, "failed": 1, "cancelled": 0}


# Who asks -----------------------------------------------------------------------------------------


@pytest.fixture
async def exposition():
    one = Exposition(lambda: "a 1\n")
    one.address = await one.listen(ANY)
    yield one
    one.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET, "200 OK"),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /metrics/../x HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405 Method Not Allowed"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 4096, "431 Request Header Fields Too Large"),
        (b"a" * 5000, "431 Request Header Fields Too Large"),
    ],
)
async def test_only_get_metrics_is_answered_with_metrics(exposition, request_, status):
    line, fields, body = await ask(exposition.address, request_)
    assert line == f"HTTP/1.1 {status}"
    assert (body == "a 1\n") == (status == "200 OK")
    assert fields["Connection"] == "close"
    assert ("Allow" in fields) == status.startswith("405")


async def test_a_request_may_come_in_pieces(exposition):
    reader, writer = await asyncio.open_connection(*vars(exposition.address).values())
    for piece in (GET[:3], GET[3:-1], GET[-1:]):
        writer.write(piece)
        await asyncio.sleep(0)
    assert (await reader.read()).endswith(b"a 1\n")
    writer.close()


async def test_who_does_not_go_on_is_sent_away(exposition, monkeypatch):
    monkeypatch.setattr(metrics, "WITHIN", 0.05)
    reader, writer = await asyncio.open_connection(*vars(exposition.address).values())
    writer.write(GET[:-1])
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    assert not exposition._open
    writer.close()


async def test_a_flood_of_slow_ones_has_few_connections_and_keeps_nobody_out(exposition):
    address = vars(exposition.address).values()
    slow = [await asyncio.open_connection(*address) for _ in range(3 * metrics.CONNECTIONS)]
    line, _, _ = await ask(exposition.address)
    assert line == "HTTP/1.1 200 OK"
    assert len(exposition._open) <= metrics.CONNECTIONS
    ended = 0
    for reader, _ in slow[: metrics.CONNECTIONS]:
        try:
            ended += await reader.read() == b""
        except ConnectionResetError:
            ended += 1
    assert ended == metrics.CONNECTIONS  # the oldest ones
    for _, writer in slow:
        writer.close()


async def test_many_who_ask_at_once_cost_one_answer(monkeypatch):
    monkeypatch.setattr(metrics, "FRESH", 1e9)
    made = []
    one = Exposition(lambda: made.append(1) or "a 1\n")
    address = await one.listen(ANY)
    answers = await asyncio.gather(*(ask(address) for _ in range(8)))
    assert {body for _, _, body in answers} == {"a 1\n"}
    assert len(made) == 1
    one.close()


async def test_a_port_in_use_is_one_clear_line(exposition, running):
    text = re.escape(f"--metrics-port: cannot listen on {exposition.address}: ")
    with pytest.raises(ConfigError, match=text):
        await Exposition(str).listen(exposition.address)


async def test_a_node_whose_metrics_port_is_taken_listens_nowhere(exposition, tmp_path):
    settings = Settings(run_dir=tmp_path, data_dir=tmp_path, metrics=exposition.address)
    node = Node(settings)
    with pytest.raises(ConfigError, match="--metrics-port: cannot listen on"):
        await node.serve(lambda _: pytest.fail("it listens"))
