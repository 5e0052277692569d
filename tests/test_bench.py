"""`aiosgd bench`: what it prints, with tiny sizes; the figures themselves prove nothing here."""

import json
import os
import signal
import statistics
import sys

import pytest

from aiosgd import cli
from aiosgd.bench import jobs, rows
from aiosgd.bench.rows import Report, Samples, read_counts, read_sizes, row
from aiosgd.display import bench_text, duration
from aiosgd.errors import ConfigError
from aiosgd.runtime.config import Address, Cluster

with_processes = pytest.mark.usefixtures("no_process_left")
KEYS = {"bytes", "nodes", "seconds", "peer", "peer_seconds", "ratio", "range"}


# Rows -----------------------------------------------------------------------------------------


def test_a_row_is_the_median_of_the_rounds_medians():
    ours = Samples([[1.0, 100.0, 2.0], [4.0], [3.0, 3.0]])
    theirs = Samples([[6.0], [9.0], [1.0]])
    made = row(8, 2, ours, "other", theirs).to_dict()
    assert made == {
        "bytes": 8,
        "nodes": 2,
        "seconds": 3.0,
        "peer": "other",
        "peer_seconds": 6.0,
        "ratio": 2.0,
        "range": [2.0, 4.0],
    }


def test_a_row_without_a_peer_says_so():
    made = row(8, 2, Samples([[1.0]]), "other", None).to_dict()
    assert (made["peer"], made["peer_seconds"], made["ratio"]) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1MB,10MB, 100 mb", [1_000_000, 10_000_000, 100_000_000]),
        ("0.47MB", [470_000]),
        ("1KB,1KiB", [1000, 1024]),
        ("7,4B", [4, 4]),
        ("1GB", [10**9]),
    ],
)
def test_sizes(text, sizes):
    assert read_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10XB", "--bytes: '10XB' is no size; expected a number of B, kB, MB or GB: 1MB,10MB"),
        ("", "--bytes: '' is no size"),
        ("1MB,", "--bytes: '' is no size"),
        ("-1MB", "--bytes: '-1MB' is no size"),
        ("3", "--bytes: '3' is 0 bytes; expected 4 to 1000"),
        ("2kB", "--bytes: '2kB' is 2000 bytes; expected 4 to 1000"),
    ],
)
def test_what_is_no_size(text, message):
    with pytest.raises(ConfigError) as error:
        read_sizes(text, 1000)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("text", ["0", "2,x", "", "-1", "1.5", "²"])
def test_what_is_no_count(text):
    assert read_counts("2, 4") == [2, 4]
    with pytest.raises(ConfigError, match="is no number from 1"):
        read_counts(text)


@pytest.mark.parametrize(("workers", "counts"), [(1, [1]), (2, [2]), (3, [2]), (5, [2, 4])])
def test_a_cluster_is_measured_with_the_workers_it_has(workers, counts):
    cluster = Cluster(tuple(Address("h", port) for port in range(1, workers + 1)))
    assert jobs.default_counts(cluster) == counts
    assert jobs.default_counts(None) == [2, 4]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-6, "1.23 us"), (9.996e-4, "1 ms"), (0.05, "50 ms"), (2.0, "2 s"), (125.0, "125 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_table_has_the_figures_and_where_they_come_from():
    first = rows.with_more(
        row(1_000_000, 1, Samples([[0.001]]), "raw", Samples([[0.003]])), gb_per_s=1.0, node="a:1"
    )
    report = Report("wire", [first], 3, ["a:1 is busy"])
    head, line, source, warning = bench_text(report, "this machine").splitlines()
    assert head.split() == (
        "node size nodes median range beside it median ratio GB/s".split()  # noqa: SIM905
    )
    assert line.split("  ")[0] == "a:1"
    assert " ".join(line.split()) == "a:1 1.0 MB 1 1 ms 1 ms - 1 ms raw 3 ms 3.00 1.00"
    assert source == "wire on this machine; medians of 3 rounds"
    assert warning == "warning: a:1 is busy"


# Wrong use ------------------------------------------------------------------------------------


@pytest.fixture
def aiosgd(monkeypatch, capsys, tmp_path):
    """`aiosgd(*words)` in this process, in `tmp_path`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wire", "--bytes", "10XB"], "--bytes: '10XB' is no size"),
        (["wire", "--bytes", "1GB"], "--bytes: '1GB' is 1000000000 bytes; expected 4 to 268435456"),
        (["messages", "--bytes", "1MB"], "--bytes: '1MB' is 1000000 bytes; expected 4 to 64000"),
        (["wire", "--rounds", "0"], "--rounds is 0; expected 1 or more"),
        (["wire", "--transport", "smoke"], "Invalid value for '--transport'"),
        (["messages", "--rounds", "-3"], "--rounds is -3; expected 1 or more"),
        (["allreduce", "--rounds", "0"], "--rounds is 0; expected 1 or more"),
        (["allreduce", "--nodes", "2,x"], "--nodes: 'x' is no number from 1"),
        (["allreduce", "--nodes", "0"], "--nodes: '0' is no number from 1"),
        (["server", "--bytes", "many"], "--bytes: 'many' is no size"),
        (["step", "--steps", "1"], "--steps is 1; expected 2 or more"),
        (["wire", "--cluster", "none.toml"], "none.toml"),
        (["wire", "--cluster", "empty.toml"], "empty.toml"),
        (
            ["server", "--cluster", "two.toml"],
            "1 servers are to be measured, but the cluster has 0",
        ),
        (
            ["allreduce", "--nodes", "3", "--cluster", "two.toml"],
            "3 workers are to be measured, but the cluster has 2",
        ),
        (["fast"], "No such command 'fast'"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_code_2(aiosgd, tmp_path, words, message):
    (tmp_path / "empty.toml").write_text("workers = []\n")
    (tmp_path / "two.toml").write_text('workers = ["127.0.0.1:1", "127.0.0.1:2"]\n')
    code, out, err = aiosgd("bench", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("work", ["wire", "messages", "allreduce"])
def test_a_node_that_is_not_there_is_one_line_and_code_3(aiosgd, tmp_path, work):
    (tmp_path / "c.toml").write_text('workers = ["127.0.0.1:1"]\n')
    code, out, err = aiosgd("bench", work, "--cluster", "c.toml", "--bytes", "1KB")
    assert (code, out) == (3, "")
    last = err.splitlines()[-1]
    assert last.startswith("aiosgd: ")
    assert "127.0.0.1:1" in last
    assert "cannot be reached" in last


@pytest.mark.parametrize("word", ["wire", "messages", "allreduce", "server", "step"])
def test_each_benchmark_has_a_line_of_help_and_a_page(aiosgd, word):
    code, out, err = aiosgd("bench", "--help")
    assert (code, err) == (0, "")
    assert f" {word} " in out
    code, out, err = aiosgd("bench", word, "--help")
    assert (code, err) == (0, "")
    assert "--rounds" in out
    assert "--json" in out


# Real processes -------------------------------------------------------------------------------


@pytest.mark.slow
@with_processes
@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (["wire", "--bytes", "4,40KB"], [(4, 1), (40_000, 1)]),
        (["wire", "--bytes", "1kB", "--transport", "unix"], [(1000, 1)]),
        (["messages", "--bytes", "1kB"], [(1000, 1), (1000, 1)]),
        (
            ["allreduce", "--bytes", "4kB", "--nodes", "2,3", "--codec", "plain"],
            [(4000, 2), (4000, 3)],
        ),
        (["server", "--bytes", "4kB", "--nodes", "2"], [(4000, 2)]),
        (["step", "--steps", "20"], [(473_128, 2), (473_128, 2)]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_json_is_one_object_with_a_row_for_each_case(command, words, shape):
    done = command(
        "bench", *words, "--rounds", "1" if words[0] in ("step", "messages") else "2", "--json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report.keys() == {"work", "rows"}
    assert report["work"] == words[0]
    assert [(row["bytes"], row["nodes"]) for row in report["rows"]] == shape
    for made in report["rows"]:
        assert made.keys() >= KEYS
        low, high = made["range"]
        assert 0 < low <= made["seconds"] <= high
        assert (made["peer"] is None) == (made["peer_seconds"] is None) == (made["ratio"] is None)
        if made["peer"]:
            assert made["ratio"] == pytest.approx(made["peer_seconds"] / made["seconds"])


@pytest.mark.slow
@with_processes
def test_a_cluster_is_measured_where_it_is(command, shared_nodes, cluster_of, write_cluster):
    path = write_cluster(cluster_of(shared_nodes[:2], shared_nodes[4:]))
    for work in ("wire", "server"):
        done = command(
            "bench", work, "--bytes", "4kB", "--rounds", "1", "--cluster", path, "--json"
        )
        assert done.code == 0, done.err
        made = json.loads(done.out)["rows"]
        assert len(made) == (3 if work == "wire" else 1)
    done = command("bench", "wire", "--bytes", "4kB", "--rounds", "1", "--cluster", path)
    assert str(shared_nodes[1].address) in done.out
    assert "wire on " in done.out


@pytest.mark.slow
@with_processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", ["wire", "allreduce"])
def test_an_interrupt_leaves_no_process(start_command, work, number):
    process = start_command("bench", work, "--rounds", "1000", "--bytes", "4kB")
    process.wait_for("warming up" if work == "wire" else "round 1 of")
    process.signal(number)
    assert process.end() == 130
    assert process.err.splitlines()[-1].startswith("aiosgd: interrupted")


@pytest.mark.slow
@with_processes
def test_a_busy_node_is_measured_with_a_warning(
    start_command, command, start_nodes, write_cluster, cluster_of
):
    path = write_cluster(cluster_of(start_nodes(1)))
    job = start_command("submit", path, "--epochs", "100000", "--model", "softmax")
    job.wait_for("running")
    done = command("bench", "wire", "--bytes", "4kB", "--rounds", "1", "--cluster", path)
    assert done.code == 0
    assert "is busy with job" in done.out
    job.signal(signal.SIGINT)
    assert job.end() == 130


# Where processes run --------------------------------------------------------------------------


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.slow
@with_processes
async def test_both_ends_have_a_core_of_their_own_while_they_are_measured():
    from aiosgd.bench import wire

    cores = os.sched_getaffinity(0)
    async with wire.local_node() as target, wire.link_to(target, "tcp") as prober:
        pid = (await prober.ask({"about": None}))["pid"]
        assert len(os.sched_getaffinity(0)) == len(os.sched_getaffinity(pid)) == 1
        assert not os.sched_getaffinity(0) & os.sched_getaffinity(pid)
        times = await wire.send_messages(prober, wire.payload(1000), 200)
        assert statistics.median(times) > 0
    assert os.sched_getaffinity(0) == cores
