"""The parent of a node: which ends it mends, what it keeps, and that nothing outlives it."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiosgd.runtime import supervisor
from aiosgd.runtime.supervisor import Death, Tail

# a node in miniature: it takes its orders from a file, one part for each of its lives
CHILD = """
import ctypes, faulthandler, os, signal, sys, time
from pathlib import Path
from aiosgd.runtime import supervisor

folder = Path(sys.argv[1])
supervisor.KILL_AFTER = float(sys.argv[2])
supervisor.FIRST_PAUSE = float(sys.argv[3])
life = supervisor.split(folder, 0)
faulthandler.enable()
count = len(list(folder.glob("life-*")))
(folder / f"life-{count}").write_text(f"{os.getpid()} {life.port} {life.is_first}")
order = (folder / "orders").read_text().split("---")[count]
silent = order.startswith("mute ")
if not silent:
    life.listening(life.port or 4321)
exec(order.removeprefix("mute "))
"""


class Lives:
    """A supervised process that plays what is in its orders."""

    def __init__(self, folder, orders, kill_after=9.0, pause=0.1):
        (folder / "orders").write_text("---".join(orders))
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, folder, str(kill_after), str(pause)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self):
        """Return exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def wait_for(self, text):
        """Wait until the child has printed a line; return its pid."""
        ready = select.select([self.process.stdout], [], [], 30)[0]
        assert ready
        assert self.process.stdout.readline() == f"{text}\n"
        return self.pids()[-1]

    def pids(self):
        paths = sorted(self.folder.glob("life-*"))
        return [int(path.read_text().split()[0]) for path in paths]

    def words(self):
        return [path.read_text() for path in sorted(self.folder.glob("node-crash-*.log"))]


@pytest.fixture
def lives(tmp_path):
    started = []

    def start(*orders, **options):
        started.append(Lives(tmp_path, orders, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def gone(pid):
    """Wait until a process that is not our child has ended."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            assert select.select([handle], [], [], 20)[0], f"process {pid} lives on"
        finally:
            os.close(handle)


RAISE = "print('oh', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.{})"
WAIT = "print('here', flush=True); time.sleep(60)"


# Ends that are mended -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_child_that_dies_of_a_signal_is_started_again_on_its_port(lives, name):
    code, out, err = (one := lives(RAISE.format(name), "print(life.port, life.is_first)")).end()
    assert (code, out) == (0, "4321 False\n")
    line = err.splitlines()[-1]
    (words,) = one.folder.glob("node-crash-*.log")
    assert re.fullmatch(
        rf"aiosgd: node process died of {name} after \d+\.\d s; its last words are in "
        rf"{re.escape(str(words))}; restarting on port 4321",
        line,
    )
    assert "oh" in err.splitlines()


def test_the_last_words_are_stderr_and_the_traceback_of_a_crash(lives):
    order = "print('fast ' * 3, file=sys.stderr, flush=True); ctypes.string_at(0)"
    one = lives(order, "pass")
    assert one.end()[0] == 0
    (words,) = one.words()
    head, *rest = words.splitlines()
    assert re.match(r"node process died of SIGSEGV after \d+\.\d s; it had \d+ MiB of memory", head)
    assert rest[0] == "fast fast fast "
    assert "Fatal Python error: Segmentation fault" in rest
    assert any("in string_at" in line for line in rest)


def test_an_error_that_nobody_caught_is_a_crash(lives):
    code, _, err = lives("raise RuntimeError('oh no')", "pass").end()
    assert code == 0
    assert "RuntimeError: oh no" in err.splitlines()
    assert "died with exit code 1 after" in err.splitlines()[-1]


def test_only_the_end_of_a_long_story_is_kept_and_all_of_it_is_passed_on(lives):
    order = "[print('x' * 999, file=sys.stderr) for _ in range(500)]; os.kill(os.getpid(), 9)"
    one = lives(order, "pass")
    _, _, err = one.end()
    assert err.count("x" * 999) == 500
    (words,) = one.words()
    assert supervisor.TAIL <= len(words) < supervisor.TAIL + 300


def test_each_crash_keeps_a_file_of_its_own(lives):
    one = lives(*[RAISE.format("SIGABRT")] * 3, "pass", pause=0.01)
    assert one.end()[0] == 0
    assert len(one.words()) == 3
    assert len(set(one.pids())) == 4


def test_what_cannot_be_written_does_not_keep_a_child_from_its_next_life(tmp_path):
    death = Death(signal.SIGSEGV, 12.0, 1 << 10)
    said = supervisor.keep_last_words(tmp_path / "none", death, b"words")
    assert said.startswith(f"its last words cannot be written to {tmp_path / 'none'}/node-crash-")
    assert said.endswith("No such file or directory")


def test_files_of_last_words_do_not_fill_the_disk(tmp_path):
    for i in range(supervisor.KEPT_FILES + 5):
        (tmp_path / f"node-crash-20200101-00000{i // 10}.{i % 10}.log").touch()
    supervisor.keep_last_words(tmp_path, Death(signal.SIGSEGV, 1.0, 0), b"newest")
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == supervisor.KEPT_FILES
    assert kept[-1].read_bytes().endswith(b"newest")


# Ends that are meant --------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_an_orderly_end_is_the_parents_end(lives, code):
    one = lives(f"sys.exit({code})")
    assert one.end() == (code, "", "")
    assert one.words() == []


def test_a_child_that_never_listened_is_not_started_again(lives):
    code, _, err = (one := lives("mute " + RAISE.format("SIGSEGV"))).end()
    assert code == 1
    assert err.splitlines()[-1].endswith("; it never listened")
    assert len(one.words()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_child_once_and_its_end_is_ours(lives, number):
    order = (
        "got = []; [signal.signal(n, lambda n, f: got.append(n)) for n in (2, 15)]; "
        "print('here', flush=True)\nwhile not got: time.sleep(0.01)\n"
        "time.sleep(0.05); print(got); sys.exit(0)"
    )
    one = lives(order)
    one.wait_for("here")
    os.killpg(one.process.pid, number)  # as a terminal's Ctrl-C does
    assert one.end() == (0, f"[{int(number)}]\n", "")


def test_a_child_that_dies_of_the_stop_signal_takes_its_parent_along(lives):
    one = lives(WAIT)
    one.wait_for("here")
    one.process.terminate()
    assert one.end() == (-signal.SIGTERM, "", "")


def test_a_child_that_does_not_stop_is_killed(lives):
    order = f"signal.signal(15, signal.SIG_IGN); {WAIT}"
    one = lives(order, "print('again')", kill_after=0.2)
    pid = one.wait_for("here")
    one.process.terminate()
    assert one.end() == (
        1,
        "",
        "aiosgd: the node did not stop within 0.2 s; it is killed\n",
    )
    gone(pid)


def test_a_stop_between_two_lives_is_the_end(lives):
    one = lives(RAISE.format("SIGABRT"), "print('again')", pause=60)
    while "restarting" not in one.process.stderr.readline():
        pass
    one.process.terminate()
    assert one.end() == (0, "", "")


# Nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGHUP])
def test_whatever_kills_the_parent_kills_the_child(lives, number):
    one = lives(WAIT)
    pid = one.wait_for("here")
    one.process.send_signal(number)
    gone(pid)
    assert one.end()[0] == -number


def test_no_file_descriptor_is_left_in_the_parent_by_a_life(lives):
    order = (
        "stat, files = (Path(f'/proc/{os.getppid()}/{name}') for name in ('stat', 'fd'))\n"
        "while stat.read_text().rpartition(')')[2].split()[0] != 'S':\n"
        "    pass  # until it waits, it may not have closed this end of the pipes\n"
        "print(len(os.listdir(files)), flush=True); os.kill(os.getpid(), 9)"
    )
    last = order.replace("os.kill(os.getpid(), 9)", "sys.exit(0)")
    _, out, _ = lives(order, order, last, pause=0.01).end()
    first, second, third = map(int, out.split())
    assert first == second == third


def test_a_halt_stops_both_and_both_go_on(lives):
    one = lives(WAIT, kill_after=5)
    pid = one.wait_for("here")
    one.process.send_signal(signal.SIGTSTP)
    until(lambda: state(pid) == "T" == state(one.process.pid))
    one.process.send_signal(signal.SIGCONT)
    until(lambda: state(pid) == "S" == state(one.process.pid))
    one.process.terminate()
    assert one.end()[0] == -signal.SIGTERM


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Parts ----------------------------------------------------------------------------------------


def test_pauses_grow_to_a_bound_and_a_long_life_begins_anew():
    pauses, pause = [], 0.0
    for _ in range(8):
        pause = supervisor.next_pause(pause, age=1.0)
        pauses.append(pause)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert supervisor.next_pause(5.0, age=59.0) == 5.0
    assert supervisor.next_pause(5.0, age=60.0) == 0.1


@pytest.mark.parametrize("sizes", [[], [3], [10], [11], [4, 4, 4], [25], [1] * 30, [9, 2, 30, 1]])
def test_a_tail_is_the_end_of_what_was_added_in_bounded_memory(sizes):
    tail, whole = Tail(10), b""
    for i, size in enumerate(sizes):
        chunk = bytes([i]) * size
        tail.add(chunk)
        whole += chunk
        assert tail.content() == whole[-10:]
        assert sum(map(len, tail._chunks)) <= 10 + max(sizes)


@pytest.mark.parametrize(
    ("status", "words", "is_crash"),
    [
        (11, "died of SIGSEGV after 12.0 s", True),
        (9, "died of SIGKILL after 12.0 s", True),
        (40, "died of signal 40 after 12.0 s", True),
        (1 << 8, "died with exit code 1 after 12.0 s", True),
        (0, "died with exit code 0 after 12.0 s", False),
        (2 << 8, "died with exit code 2 after 12.0 s", False),
    ],
)
def test_a_death_says_how(status, words, is_crash):
    death = Death(status, 12.0, 0)
    assert (death.words, death.is_crash) == (words, is_crash)


# The real node --------------------------------------------------------------------------------

with_processes = pytest.mark.usefixtures("no_process_left")


def child_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@with_processes
def test_the_parent_of_a_node_has_imported_nothing_heavy(start_nodes):
    (node,) = start_nodes(1)
    parent = node.process.process.pid
    heavy = [Path(f"/proc/{pid}/maps").read_text() for pid in (parent, child_of(parent))]
    assert ["numpy" in text for text in heavy] == [False, True]
    assert ["uvloop" in text for text in heavy] == [False, True]


@with_processes
@pytest.mark.parametrize("option", ["--no-supervisor", "--until-stdin-closes"])
def test_a_node_may_be_alone(start_command, option):
    node = start_command("node", "--port", 0, "--run-dir", "r", option, stdin=subprocess.PIPE)
    node.wait_for("listening")
    pid = node.process.pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    assert "numpy" in Path(f"/proc/{pid}/maps").read_text()
    node.signal(signal.SIGTERM)
    assert node.end() == 0


@with_processes
def test_a_node_that_crashed_listens_where_it_was_and_says_its_address_once(start_nodes):
    (node,) = start_nodes(1)
    parent = node.process.process.pid
    os.kill(child_of(parent), signal.SIGSEGV)
    node.process.wait_for(rf"restarting on port {node.address.port}\n")
    until(lambda: listens(node.address))
    assert node.stop() == 0
    assert node.process.out == f"aiosgd node listening on {node.address}\n"
    (words,) = node.run_dir.glob("node-crash-*.log")
    assert "Fatal Python error: Segmentation fault" in words.read_text()


def listens(address):
    import socket

    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((address.host, address.port), 5).close()
        return True
    return False
