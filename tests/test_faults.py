"""What docs/faults.md promises, on real processes: what a user sees, and that nodes go on.

Rows of the table that need no process of their own are tested elsewhere; the table names where.
"""

import ast
import asyncio
import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aiosgd import aio
from aiosgd.errors import ClusterError, JobFailedError
from aiosgd.runtime import results
from aiosgd.runtime.config import Address, Cluster
from tests.conftest import descendants, running_nodes, wait_for_end

ROOT = Path(__file__).parents[1]
FOR_EVER = ("--epochs", 10**6)
# from a fault to the submitter's last line, on a machine that is busy with other things
AT_ONCE = 5.0
AFTER_SILENCE = 15.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, test_session):
    """Four nodes with parents, which tests may kill: they come back. In the end all are gone."""
    before = descendants(test_session)
    with running_nodes(tmp_path_factory.mktemp("mended")) as start:
        yield start(4, "--allow-code")
    for pid in descendants(test_session) - before:
        wait_for_end(pid)


def process_of(node):
    """Return the pid of the process that does a node's work."""
    parent = node.process.process.pid
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


@pytest.fixture
def submitted(start_command, write_cluster, cluster_of):
    """`submitted(workers, *words, servers=())`: an `aiosgd submit` that trains."""

    def start(workers, *words, servers=(), waits_for=r"step \d+/"):
        file = write_cluster(cluster_of(workers, servers))
        process = start_command("submit", file, *words)
        process.wait_for(waits_for)
        return process

    return start


def until_done(cluster, tmp_path, **options):
    """Run a job as soon as the nodes take it; they have a moment to come back."""

    async def insist():
        async with asyncio.timeout(40):
            while True:
                with contextlib.suppress(ClusterError):
                    return await aio.submit(cluster, output=str(tmp_path / "after"), **options)
                await asyncio.sleep(0.1)

    return asyncio.run(insist())


def error_of(process, code, within):
    """Check that a command ends in time with a code and one clear line; return the line."""
    begun = time.monotonic()
    assert process.end() == code, process.err
    assert time.monotonic() - begun < within
    assert "Traceback" not in process.err
    line = process.err.splitlines()[-1]
    assert line.startswith("aiosgd: ")
    return line


def summary_of(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return results.read_summary(folder)


# Processes that die ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (("--codec", "plain"), "worker 1"),
        (("--codec", "fedavg"), "worker 1"),
        (("--codec", "parameter_server"), "worker 1"),
        (("--codec", "parameter_server", "--mode", "async"), "worker 1"),
        (("--codec", "parameter_server"), "server -1"),
    ],
    ids=["plain", "fedavg", "server-sync", "server-async", "the-server"],
)
def test_a_killed_node_is_named_at_once_and_comes_back(
    nodes, submitted, cluster_of, tmp_path, words, lost
):
    workers, servers = nodes[:3], () if "plain" in words else nodes[3:]
    running = submitted(workers, *words, *FOR_EVER, servers=servers)
    victim = nodes[1] if lost == "worker 1" else nodes[3]
    os.kill(process_of(victim), signal.SIGKILL)
    line = error_of(running, 1, AT_ONCE)
    assert re.search(rf"failed: (worker \d: |server -1: )?{lost} lost: ", line)
    summary = summary_of(tmp_path)
    assert summary.state == "failed"
    assert f"{lost} lost" in summary.error
    again = until_done(cluster_of(workers, servers), tmp_path, codec=words[1], max_steps=3)
    assert again.summary.state == "done"
    assert victim.process.process.poll() is None


def test_an_async_job_goes_on_without_a_worker_whose_node_crashed(nodes, submitted, tmp_path):
    words = ("--codec", "parameter_server", "--mode", "async", "--on-loss", "continue")
    running = submitted(nodes[:3], *words, "--epochs", 150, servers=nodes[3:])
    os.kill(process_of(nodes[1]), signal.SIGSEGV)
    running.wait_for("worker 1 lost: .*; going on with 2 of 3")
    assert running.end() == 0, running.err
    assert "went on without worker 1" in running.out
    summary = summary_of(tmp_path)
    assert (summary.state, list(summary.lost)) == ("done", [1])
    nodes[1].process.wait_for("node process died of SIGSEGV")


def test_nodes_finish_a_job_whose_submitter_is_killed(start_nodes, submitted, tmp_path):
    nodes = start_nodes(2)
    running = submitted(nodes, "--epochs", 150)
    running.signal(signal.SIGKILL)
    running.end()
    ends = [end_of(node.run_dir) for node in nodes]
    assert [end["state"] for end in ends] == ["done", "done"]
    for node in nodes:
        (table,) = node.run_dir.glob("*/nodes/*/train.csv")
        rows = results.read_table(table.parent, "train")
        assert list(rows.step) == list(range(11 * 150))


def end_of(run_dir):
    """Return what a node wrote at the end of its only job."""
    deadline = time.monotonic() + 40
    while not (found := list(run_dir.glob("*/nodes/*/end.json"))):
        assert time.monotonic() < deadline, list(run_dir.glob("*/nodes/*/*"))
        time.sleep(0.02)
    return json.loads(found[0].read_text())


# Nodes that are stopped -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_frozen_worker_is_named_after_six_seconds_and_is_usable_when_it_thaws(
    nodes, submitted, cluster_of, tmp_path
):
    running = submitted(nodes[:2], *FOR_EVER)
    frozen = process_of(nodes[1])
    os.kill(frozen, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        line = error_of(running, 1, AFTER_SILENCE)
        assert time.monotonic() - begun > 4
        assert re.search(r"worker 1 lost: .*silent for", line)
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert until_done(cluster_of(nodes[:2]), tmp_path, max_steps=3).summary.state == "done"
    assert process_of(nodes[1]) == frozen


def test_a_node_that_is_stopped_in_a_job_tells_the_others(start_nodes, submitted, tmp_path):
    nodes = start_nodes(2)
    running = submitted(nodes, *FOR_EVER)
    begun = time.monotonic()
    assert nodes[1].stop(signal.SIGTERM) == 0
    assert time.monotonic() - begun < 10
    assert re.search(r"worker 1(: the node was stopped| lost)", error_of(running, 1, AT_ONCE))
    assert summary_of(tmp_path).state == "failed"
    (end,) = nodes[1].run_dir.glob("*/nodes/1/end.json")
    assert json.loads(end.read_text())["reason"] == "the node was stopped"


BLOCKS = """
import time
from aiosgd import Codec

class Blocks(Codec):
    async def update(self, block):
        if block.step == 3 and self.ctx.node == 1:
            print("blocked", flush=True)
            time.sleep(1000)
        self.set_result(block.value)
"""


@pytest.mark.slow
def test_a_node_whose_codec_blocks_it_leaves_within_ten_seconds_all_the_same(
    start_nodes, submitted, tmp_path
):
    (tmp_path / "blocks.py").write_text(BLOCKS)
    nodes = start_nodes(2, "--allow-code")
    running = submitted(nodes, "--codec", "blocks.py:Blocks", waits_for="running")
    nodes[1].process.wait_for("blocked")
    begun = time.monotonic()
    assert nodes[1].stop(signal.SIGTERM) == 1
    assert time.monotonic() - begun < 10.5
    assert "did not stop within 9 s; it is killed" in nodes[1].process.err
    assert "worker 1 lost: " in error_of(running, 1, AT_ONCE)


# Links that break -----------------------------------------------------------------------------


class Relay:
    """Passes bytes on between callers and a node; can stop to, or swallow them without a word."""

    def __init__(self, target: Address):
        self.target = target
        self.swallows = False
        self.flows = threading.Event()
        self.flows.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listening.getsockname()[1])
        self._ends, self._end = socket.socketpair()
        self._closed = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.flows.set()
        self._end.close()
        self._thread.join(20)
        self._ends.close()
        assert not self._thread.is_alive()

    def _run(self):
        """Serve until told to end."""
        other = {}
        while True:
            ready = select.select([self._listening, self._ends, *other], [], [])[0]
            self.flows.wait()
            if self._ends in ready:
                break
            for one in ready:
                if one is self._listening:
                    near, far = one.accept()[0], socket.create_connection(self._place(), 20)
                    other |= {near: far, far: near}
                elif one in other:
                    self._pass_on(one, other)
        for one in [self._listening, *other, *self._closed]:
            one.close()

    def _place(self):
        return self.target.host, self.target.port

    def _pass_on(self, one, other):
        try:
            chunk = one.recv(1 << 16)
            if not self.swallows:
                other[one].sendall(chunk)
        except OSError:
            chunk = b""
        if not chunk:
            far = other.pop(one)
            del other[far]
            self._closed.append(one)
            if not self.swallows:  # else the far end never hears of it
                end(one, far)
            self._closed.append(far)


def end(*sockets):
    for one in sockets:
        with contextlib.suppress(OSError):  # the other side was quicker
            one.shutdown(socket.SHUT_RDWR)


OVER_TCP = ("--set", "wire.unix=false")


@pytest.fixture
def relay(nodes):
    with Relay(nodes[0].address) as relay:
        yield relay


@pytest.fixture
def behind(relay, nodes):
    """A cluster whose worker 0 is reached through the relay."""
    return Cluster((relay.address, nodes[1].address))


@pytest.mark.slow
def test_links_that_swallow_everything_are_noticed_at_both_ends(
    nodes, relay, behind, start_command, write_cluster, cluster_of, tmp_path
):
    running = start_command("submit", write_cluster(behind), *FOR_EVER, *OVER_TCP)
    running.wait_for(r"step \d+/")
    relay.swallows = True
    line = error_of(running, 1, AFTER_SILENCE)
    assert re.search(r"worker 0 lost: .*silent for", line)
    again = until_done(cluster_of(nodes[:2]), tmp_path, max_steps=3)
    assert again.summary.state == "done"


def test_a_partition_that_heals_within_five_seconds_changes_no_bit(
    nodes, relay, behind, cluster_of, tmp_path
):
    options = {"epochs": 60, "wire": {"unix": False}}
    undisturbed = until_done(cluster_of(nodes[:2]), tmp_path, **options)
    moving = threading.Event()

    class Watch(aio.Silent):
        def progressed(self, progress):
            moving.set()

    def disturb():
        moving.wait(20)
        relay.flows.clear()
        time.sleep(2.2)
        relay.flows.set()

    thread = threading.Thread(target=disturb)
    thread.start()
    outcome = until_done(behind, tmp_path, observer=Watch(), **options)
    thread.join(20)
    assert outcome.train.wait_s.max() > 2
    for name, values in undisturbed.parameters.items():
        assert np.array_equal(values, outcome.parameters[name])


# Disks that are full --------------------------------------------------------------------------


def test_a_full_disk_on_a_node_costs_its_copy_and_nothing_else(nodes, cluster_of, tmp_path):
    cluster, options = cluster_of(nodes[:2]), {"epochs": 4, "checkpoint_every": 10}
    healthy = until_done(cluster, tmp_path, **options)
    pid = process_of(nodes[1])
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        outcome = until_done(cluster, tmp_path, **options)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert outcome.summary.state == "done"
    assert outcome.summary.checkpoint is None
    assert healthy.summary.checkpoint is not None
    assert len(outcome.train) == len(healthy.train) == 2 * 44
    for name, values in healthy.parameters.items():
        assert np.array_equal(values, outcome.parameters[name])
    assert (
        "the last checkpoint is not whole: worker 1: "
        in (outcome.folder / "submit.log").read_text()
    )
    assert process_of(nodes[1]) == pid


# Addresses that lead nowhere ------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def customised(tmp_path, monkeypatch):
    """`customised(source)`: what every Python process that starts from now on runs first."""

    def write(source):
        folder = tmp_path / "customised"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(source)
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    return write


NO_DNS = """
import socket
real = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    if host == "nowhere.invalid":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return real(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


def test_a_host_that_nobody_knows_is_named_at_once(customised, start_command, tmp_path):
    customised(NO_DNS)
    (tmp_path / "cluster.toml").write_text('workers = ["nowhere.invalid:9000"]\n')
    line = error_of(start_command("submit", "cluster.toml"), 3, 20)
    assert "worker 0: " in line
    assert "nowhere.invalid" in line
    assert "Name or service not known" in line
    node = start_command("node", "--host", "nowhere.invalid", "--insecure", "--run-dir", "r")
    line = error_of(node, 2, 20)
    assert "nowhere.invalid" in line


def test_a_port_that_nobody_listens_on_is_tried_for_five_seconds(start_command, tmp_path):
    port = free_port()
    (tmp_path / "cluster.toml").write_text(f'workers = ["127.0.0.1:{port}"]\n')
    line = error_of(start_command("submit", "cluster.toml"), 3, 20)
    assert f"worker 0: 127.0.0.1:{port} cannot be reached" in line
    assert "refused" in line


def test_two_nodes_on_one_port_and_none_is_started_again(nodes, start_command, tmp_path):
    port = nodes[0].address.port
    line = error_of(start_command("node", "--port", port, "--run-dir", "r"), 2, 20)
    assert f"127.0.0.1:{port}: Address already in use" in line
    assert list((tmp_path / "r").iterdir()) == []


# Codecs that are wrong ------------------------------------------------------------------------

WRONG = """
from aiosgd import Codec, Envelope

class Wrong(Codec):
    async def update(self, block):
        if block.step == 3 and self.ctx.node == 1:
            {wrong}
        self.set_result(block.value)
        return
        yield
"""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("raise ValueError('no good')", "ValueError: no good"),
        ("self.set_result(block.value[:5])", "5"),
        ("self.set_result('a result')", "wrong.py:8"),
        ("yield Envelope(99, block.value)", "99"),
        ("yield 'no envelope'", "str"),
        ("yield Envelope(0, object())", "object"),
    ],
    ids=["raises", "too-short", "no-array", "unknown-target", "no-envelope", "unsendable"],
)
def test_a_wrong_codec_is_named_with_hook_node_and_step(nodes, cluster_of, tmp_path, wrong, words):
    (tmp_path / "wrong.py").write_text(WRONG.format(wrong=wrong))
    cluster = cluster_of(nodes[:2])
    with pytest.raises(JobFailedError) as caught:
        until_done(cluster, tmp_path, codec=f"{tmp_path / 'wrong.py'}:Wrong")
    line = str(caught.value)
    assert "codec Wrong: update failed on node 1 in step 3: " in line
    assert words in line
    assert "\n" not in line
    (folder,) = (tmp_path / "after").iterdir()
    assert "Traceback" in (folder / "nodes/1/node.log").read_text()
    assert until_done(cluster, tmp_path, max_steps=3).summary.state == "done"


# Submitters -----------------------------------------------------------------------------------


def test_a_second_ctrl_c_does_not_wait_for_a_node_that_does_not_answer(
    nodes, submitted, cluster_of, tmp_path
):
    running = submitted(nodes[:2], *FOR_EVER)
    frozen = process_of(nodes[1])
    os.kill(frozen, signal.SIGSTOP)
    try:
        running.signal(signal.SIGINT)
        running.wait_for("stopping")
        time.sleep(0.05)
        running.signal(signal.SIGINT)
        line = error_of(running, 130, 2.0)
        assert line == "aiosgd: interrupted; nodes may still be stopping"
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert until_done(cluster_of(nodes[:2]), tmp_path, max_steps=3).summary.state == "done"


def test_a_second_submitter_is_told_who_is_first(
    nodes, submitted, command, write_cluster, cluster_of
):
    running = submitted(nodes[:2], *FOR_EVER)
    second = command("submit", write_cluster(cluster_of(nodes[:2])))
    assert second.code == 3
    assert re.search(r"worker [01]: busy with job \S+ since \d\d:\d\d:\d\d", second.err)
    assert running.process.poll() is None
    running.signal(signal.SIGINT)
    assert running.end() == 130


# Clocks that jump -----------------------------------------------------------------------------

# a checkpoint takes its time, so that deadlines are looked at meanwhile
JUMPS = """
import itertools, os, time
os.fsync = lambda _: time.sleep(0.4)
real, calls = time.time, itertools.count()
time.time = lambda: real() + (86400 if next(calls) % 2 else -86400)
"""


def test_a_clock_that_jumps_by_days_decides_nothing(
    customised, start_nodes, start_command, write_cluster, cluster_of, nodes, tmp_path
):
    calm = until_done(cluster_of(nodes[:2]), tmp_path, max_steps=20, epochs=2)
    customised(JUMPS)
    file = write_cluster(cluster_of(start_nodes(2)))
    running = start_command(
        "submit", file, "--max-steps", 20, "--epochs", 2, "--checkpoint-every", 15
    )
    assert running.end() == 0, running.err
    (folder,) = (tmp_path / "runs").iterdir()
    summary = results.read_summary(folder)
    assert 0 < summary.wall_s < 40
    assert summary.checkpoint == 14
    parameters = results.read_parameters(folder)
    for name, values in calm.parameters.items():
        assert np.array_equal(values, parameters[name])


# What is never in the sources -----------------------------------------------------------------

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SOURCES = sorted((ROOT / "aiosgd").rglob("*.py"))


def dangers(tree):
    """Yield what in a module could run code out of data."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from {one.name.partition(".")[0] for one in names} & PICKLERS
            case ast.ImportFrom(module=str(module)):
                yield from {module.partition(".")[0]} & PICKLERS
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "unsafe_load"):
                yield "yaml.load"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=False)):
                pass
            case ast.keyword(arg="allow_pickle"):
                yield "allow_pickle"


def test_no_module_runs_code_out_of_data():
    found = {path: list(dangers(ast.parse(path.read_text()))) for path in SOURCES}
    assert len(found) > 50
    assert {str(path): names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as d",
        "from marshal import loads",
        "def f():\n    from shelve import open",
        "eval('1')",
        "exec(text)",
        "builtins.eval(text)",
        "__import__(name)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=trusted)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert len(list(dangers(ast.parse(source)))) == 1


def test_the_search_leaves_words_alone():
    source = (
        "# pickle\n'eval(x), exec(x)'\nself.exec(x)\nre.compile(x)\nnp.load(p, allow_pickle=False)"
    )
    assert list(dangers(ast.parse(source))) == []


# The page -------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/faults.md").read_text(encoding="utf-8")


def names_in(path):
    tree = ast.parse((ROOT / path).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/\S+?\.py)::(test_\w+)`", PAGE)
    assert len(named) > 40
    for path, name in named:
        assert name in names_in(path), f"{path} has no {name}"


def test_every_row_of_the_page_is_tested_or_says_that_it_falls_short():
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 24))
    sections = re.split(r"^### (\d+)\b", PAGE, flags=re.MULTILINE)[1:]
    numbers = [int(number) for number in sections[::2]]
    assert numbers == list(range(1, 24))
    for text in sections[1::2]:
        assert "`tests/" in text or "Falls short:" in text
