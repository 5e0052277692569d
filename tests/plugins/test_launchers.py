"""The launcher of local nodes."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

import pytest

from aiosgd.errors import ClusterError
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.launchers import Local, Wanted, base, processes
from aiosgd.plugins.launchers import local as local_module
from aiosgd.runtime.config import Address
from aiosgd.runtime.hello import introduce
from aiosgd.runtime.security import OPEN, Security, SecurityFiles

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def local(tmp_path):
    return Local(Local.Params(run_dir=str(tmp_path)))


def scripted(monkeypatch, text):
    """Have a script run in the place of a node."""
    monkeypatch.setattr(local_module, "_words", lambda *_: [sys.executable, "-c", text])


LISTENS = "print('aiosgd node listening on 127.0.0.1:1'); "


async def test_as_many_nodes_as_asked_for_each_with_a_folder_of_its_own(local):
    async with local.launch(Wanted(workers=2, servers=1)) as nodes:
        assert len(nodes.workers) == 2
        assert len(nodes.servers) == 1
        addresses = {*nodes.workers, *nodes.servers}
        assert len(addresses) == 3
        for text in addresses:
            link = await introduce(
                Address.parse(text, "node"), {"role": "submitter"}, security=secret_of(nodes)
            )
            link.close()


def secret_of(nodes):
    return SecurityFiles(secret_file=nodes.secret_file).load()


async def test_nodes_take_part_only_with_those_who_have_their_secret(local):
    async with local.launch(Wanted(workers=1, servers=0)) as nodes:
        for security in (OPEN, Security(b"k" * 32)):
            with pytest.raises(ClusterError, match="secret"):
                await introduce(
                    Address.parse(nodes.workers[0], "node"),
                    {"role": "submitter"},
                    security=security,
                )
        assert nodes.secret_file.stat().st_mode & 0o777 == 0o600
        assert nodes.secret_file.parent.stat().st_mode & 0o777 == 0o700
    assert not nodes.secret_file.parent.exists()


def test_no_two_launches_have_the_same_secret():
    with base.new_secret() as one, base.new_secret() as other:
        assert one.read_text() != other.read_text()


def test_the_default_launcher_is_registered():
    assert LAUNCHERS.load("local") is Local


async def test_nodes_end_with_the_context_even_on_an_error(local):
    with pytest.raises(ZeroDivisionError):
        async with local.launch(Wanted(workers=1, servers=0)) as nodes:
            _ = 1 / 0
    with pytest.raises(ClusterError):
        await introduce(Address.parse(nodes.workers[0], "node"), {})


async def test_without_a_run_dir_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with Local(Local.Params()).launch(Wanted(workers=1, servers=0)):
        runs, secret = sorted(tmp_path.iterdir(), key=lambda folder: (folder / "secret").exists())
        assert (runs / "worker-0").is_dir()
        assert secret != runs
    assert not list(tmp_path.iterdir())


async def test_only_nodes_that_shall_take_code_are_told_so():
    path = Path("x")
    words = local_module._words
    assert "--allow-code" in words(path, Wanted(workers=1, allow_code=True), path)
    assert "--allow-code" not in words(path, Wanted(workers=1), path)


async def test_a_file_in_the_current_folder_is_not_taken_for_a_module(local, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/random.py").write_text("raise SystemExit('wrong module')\n")
    monkeypatch.chdir(tmp_path / "here")
    async with local.launch(Wanted(workers=1, servers=0)) as nodes:
        assert nodes.workers


async def test_a_node_that_does_not_start_is_reported_with_its_last_words(local, monkeypatch):
    scripted(monkeypatch, "import sys; print('bad luck', file=sys.stderr); sys.exit(2)")
    with pytest.raises(ClusterError, match=r"worker \d did not start: bad luck"):
        async with local.launch(Wanted(workers=2, servers=0)):
            raise AssertionError("never gets here")


async def test_one_node_that_fails_is_not_waited_for_with_the_others(local, monkeypatch):
    scripts = {"worker-0": "import sys; sys.stdin.read()", "worker-1": "raise SystemExit('oh')"}
    monkeypatch.setattr(
        local_module, "_words", lambda path, *_: [sys.executable, "-c", scripts[path.name]]
    )
    async with asyncio.timeout(processes.START_TIMEOUT / 2):
        with pytest.raises(ClusterError, match="did not start: oh"):
            async with local.launch(Wanted(workers=2, servers=0)):
                raise AssertionError("never gets here")


async def test_a_node_that_never_listens_is_given_up(local, monkeypatch):
    monkeypatch.setattr(processes, "START_TIMEOUT", 0.01)
    scripted(monkeypatch, "import sys; sys.stdin.read()")
    with pytest.raises(ClusterError, match=r"did not listen within 0\.01 s"):
        async with local.launch(Wanted(workers=1, servers=0)):
            raise AssertionError("never gets here")


async def test_a_node_that_does_not_stop_is_killed(local, monkeypatch):
    monkeypatch.setattr(base, "STOP_TIMEOUT", 0.01)
    ignores = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    scripted(monkeypatch, f"{ignores}{LISTENS} sys.stdout.flush(); signal.pause()")
    async with asyncio.timeout(20):
        async with local.launch(Wanted(workers=2, servers=0)):
            pass


async def test_what_nodes_print_is_passed_on_by_name(local, monkeypatch):
    scripted(
        monkeypatch,
        f"import sys; {LISTENS} print('hi'); print('oh', file=sys.stderr); sys.stdin.read()",
    )
    heard, complete = set(), asyncio.Event()

    def printed(node, text):
        heard.add((node, text))
        if len(heard) == 4:
            complete.set()

    async with local.launch(Wanted(workers=1, servers=1), printed):
        await complete.wait()
    assert heard == {(n, t) for n in ("worker 0", "server -1") for t in ("hi", "oh")}


async def test_last_words_are_heard(local, monkeypatch):
    scripted(
        monkeypatch,
        f"import sys; {LISTENS} sys.stdout.flush(); sys.stdin.read(); sys.exit('bye')",
    )
    heard = []
    async with local.launch(Wanted(workers=1, servers=0), lambda *line: heard.append(line)):
        pass
    assert heard == [("worker 0", "bye")]


async def test_a_node_that_prints_without_end_is_not_held_up(local, monkeypatch):
    scripted(
        monkeypatch,
        f"import sys; {LISTENS} print('x' * 300_000)\n"
        "for _ in range(1000): print('y' * 1000)\n"
        "print('end'); sys.stdin.read()",
    )
    ended, counts = asyncio.Event(), {}

    def printed(node, text):
        counts[text[:1]] = counts.get(text[:1], 0) + 1
        if text == "end":
            ended.set()

    async with asyncio.timeout(20), local.launch(Wanted(workers=1, servers=0), printed):
        await ended.wait()
    assert counts["y"] == 1000


async def test_an_interrupt_from_the_terminal_is_not_for_the_nodes(local):
    async with local.launch(Wanted(workers=1, servers=0)):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (node,) = (
            child
            for child in map(int, children)
            if "--until-stdin-closes" in Path(f"/proc/{child}/cmdline").read_text()
        )
        assert os.getpgid(node) == node != os.getpgid(0)
