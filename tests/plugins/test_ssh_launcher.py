"""Nodes through ssh: through a stand-in that runs the command here, and through a real sshd."""

import asyncio
import contextlib
import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiosgd.errors import ClusterError, ConfigError, PluginError
from aiosgd.plugins.launchers import Wanted, base
from aiosgd.plugins.launchers.ssh import Host, Ssh
from aiosgd.plugins.registry import make_params
from aiosgd.runtime.config import Address
from aiosgd.runtime.hello import introduce
from aiosgd.runtime.security import SecurityFiles

pytestmark = pytest.mark.usefixtures("no_process_left")

# what ssh does, as far as it matters here: the words after the host go to the user's shell
FAKE_SSH = """#!/bin/sh
printf '%s\\n' "$@" >>"$AIOSGD_FAKE_SSH.$$"
while [ "$1" != -- ]; do shift; done
case $2 in
    gone*) echo "ssh: connect to host $2 port 22: No route to host" >&2; exit 255;;
esac
exec env -i PATH="$PATH" HOME="$HOME" MARK="$MARK" sh -c "$3"
"""
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """Put the stand-in on PATH; gives a function that returns what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(FAKE_SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("AIOSGD_FAKE_SSH", str(tmp_path / "called"))
    return lambda: [path.read_text() for path in sorted(tmp_path.glob("called.*"))]


def ssh(**values):
    return Ssh(make_params(Ssh, {"python": sys.executable, **values}, "launcher"))


async def says_hello(address, secret_file):
    link = await introduce(
        Address.parse(address, "node"),
        {"role": "submitter"},
        security=SecurityFiles(secret_file=secret_file).load(),
    )
    link.close()


async def test_nodes_go_to_the_hosts_in_turn_and_answer_with_the_secret(fake_ssh, tmp_path):
    launcher = ssh(hosts=["127.0.0.1", "me@localhost:2222"], run_dir=str(tmp_path / "kept"))
    async with launcher.launch(Wanted(workers=2, servers=1)) as nodes:
        hosts = [text.rpartition(":")[0] for text in (*nodes.workers, *nodes.servers)]
        assert hosts == ["127.0.0.1", "localhost", "127.0.0.1"]
        for text in (*nodes.workers, *nodes.servers):
            await says_hello(text, nodes.secret_file)
        secret = nodes.secret_file.read_text().strip()
    calls = fake_ssh()
    assert len(calls) == 3
    assert not any(secret in call for call in calls)
    (second,) = (call.splitlines() for call in calls if "localhost" in call.splitlines())
    assert second[second.index("-p") + 1] == "2222"
    assert second[second.index("-l") + 1] == "me"
    assert "BatchMode=yes" in second
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "worker-0", "worker-1", "server-1",
    }  # fmt: skip


async def test_without_a_run_dir_the_host_keeps_nothing(fake_ssh, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/there").mkdir(parents=True)
    made = tmp_path / "bin/mktemp"
    made.write_text(f"#!/bin/sh\nmkdir {tmp_path}/made && echo {tmp_path}/made\n")
    made.chmod(0o755)
    launcher = ssh(hosts=[{"host": "localhost", "workdir": str(tmp_path / "home/there")}])
    async with launcher.launch(Wanted(workers=1)):
        assert (tmp_path / "made/worker-0").is_dir()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("nasty", ["a b", "x'; touch BAD; '", "$(touch BAD)", "`touch BAD`", "-rf"])
async def test_no_parameter_is_read_by_a_shell(fake_ssh, tmp_path, monkeypatch, nasty):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / nasty
    folder.mkdir()
    launcher = ssh(hosts=["localhost"], workdir=str(folder), run_dir=nasty, data_dir=nasty)
    async with launcher.launch(Wanted(workers=1)) as nodes:
        await says_hello(nodes.workers[0], nodes.secret_file)
    assert (folder / nasty / "worker-0").is_dir()
    assert not list(tmp_path.rglob("BAD"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, r"launcher: there is no host; give hosts="),
        ({"hosts": ["-oProxyCommand=x"]}, "is none; expected"),
        ({"hosts": ["a b"]}, "is none; expected"),
        ({"hosts": ["a:70000"]}, "a port is 1..65535"),
        ({"hosts": ["a"], "timeout": 0}, "timeout is 0.0; expected seconds"),
        ({"hosts": [{"host": "-x"}]}, "is none; expected letters"),
        ({"hosts": [{"host": "x", "user": "-y"}]}, "is none; expected letters"),
        ({"hosts": [{"name": "x"}]}, "a host has no such parameter"),
        ({"hosts": [{"host": "x", "port": "22"}]}, "launcher.hosts.port is '22'"),
        ({"hosts_file": "/nowhere"}, "hosts_file /nowhere cannot be read"),
        ({"hosts": ["a"], "python": "py 'x"}, 'launcher: python is "py \'x", which has no closing'),
        (
            {"hosts": [{"host": "a", "python": "'"}]},
            'the python of a is "\'", which has no closing',
        ),
    ],
)
def test_what_is_no_host_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        ssh(**values)


def test_hosts_come_from_a_file_too(tmp_path):
    (tmp_path / "hosts").write_text("# mine\nnode1\nalice@node2:2222  # the fast one\n\n")
    params = Ssh.Params(hosts=["[::1]:22"], hosts_file=str(tmp_path / "hosts"))
    assert params.all_hosts == [
        Host("::1", port=22),
        Host("node1"),
        Host("node2", user="alice", port=2222),
    ]
    assert params.all_hosts[0].reached_at == "[::1]"
    assert Host("node1", address="10.0.0.1").reached_at == "10.0.0.1"


def test_a_host_with_an_ipv6_address_is_listened_on_with_ipv6():
    words = ssh(hosts=["[::1]"])._remote(Host("::1"), "worker 0", Wanted(workers=1))
    assert words[list(words).index("--host") + 1] == "::"


async def test_ssh_s_own_words_are_passed_on(fake_ssh):
    with pytest.raises(ClusterError, match=r"worker 1 on gone did not start: ssh: .*No route"):
        async with ssh(hosts=["localhost", "gone"]).launch(Wanted(workers=2)):
            raise AssertionError("never gets here")


async def test_a_python_without_aiosgd_says_so(fake_ssh, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named aiosgd' >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(ClusterError, match="worker 0 on localhost did not start: No module named"):
        async with ssh(hosts=["localhost"], python=str(fake)).launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


async def test_what_says_no_address_is_no_node(fake_ssh, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'listening on nothing'; cat >/dev/null\n")
    fake.chmod(0o755)
    with pytest.raises(ClusterError, match="which is no address"):
        async with ssh(hosts=["localhost"], python=str(fake)).launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


async def test_without_ssh_nothing_is_tried(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PluginError, match="needs ssh, which is not on PATH"):
        async with ssh(hosts=["localhost"]).launch(Wanted(workers=1)):
            raise AssertionError("never gets here")


@pytest.mark.parametrize("text", ["", "one line\nand another"])
def test_a_secret_that_is_not_one_line_cannot_be_handed_over(tmp_path, text):
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match="expected one"):
        base.read_secret_line(tmp_path / "secret")
    with pytest.raises(ConfigError, match="cannot be read"):
        base.read_secret_line(tmp_path / "none")


# A real sshd ------------------------------------------------------------------------------------


@pytest.fixture
def sshd(tmp_path):
    """Run an sshd of this user on a free port with keys of its own; gives Params for it."""
    if SSHD is None:
        pytest.skip("there is no sshd: apt-get install openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root leaves its rights
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    host_key = (tmp_path / "host.pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
    shutil.copy(tmp_path / "user.pub", tmp_path / "allowed")
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "allowed",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
    }
    words = [word for item in options.items() for word in ("-o", "=".join(map(str, item)))]
    with (tmp_path / "sshd.log").open("w") as log:
        daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", "/dev/null", *words], stderr=log)
    try:
        wait_until_it_listens(port, daemon, tmp_path / "sshd.log")
        given = {"IdentityFile": tmp_path / "user", "UserKnownHostsFile": tmp_path / "known"}
        yield {
            "hosts": [f"{getpass.getuser()}@127.0.0.1:{port}"],
            "options": [
                word for item in given.items() for word in ("-o", "=".join(map(str, item)))
            ],
        }
    finally:
        daemon.terminate()
        daemon.wait(20)


def wait_until_it_listens(port, daemon, log):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and daemon.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.mark.extra
async def test_nodes_through_a_real_sshd(sshd, tmp_path):
    launcher = ssh(**sshd, run_dir=str(tmp_path / "it's here"))
    async with launcher.launch(Wanted(workers=2)) as nodes:
        for text in nodes.workers:
            await says_hello(text, nodes.secret_file)
    assert len(list((tmp_path / "it's here").iterdir())) == 2


@pytest.mark.extra
async def test_an_ssh_that_is_killed_takes_its_node_with_it(sshd, tmp_path):
    heard, told = [], asyncio.Event()

    def printed(*line):
        heard.append(line)
        told.set()

    run_dir = shlex.quote(str(tmp_path / "runs"))
    async with ssh(**sshd, run_dir=run_dir).launch(Wanted(workers=1), printed):
        found = subprocess.run(
            ["pgrep", "-f", f"^ssh .*{run_dir}"], capture_output=True, text=True, check=True
        )
        for pid in found.stdout.split():
            os.kill(int(pid), 9)
        await told.wait()
    assert heard[-1] == ("worker 0", "ended of signal 9")
    # the fixture no_process_left waits for the node itself


@pytest.mark.extra
async def test_an_unknown_host_key_is_not_asked_about(sshd, tmp_path):
    sshd["options"][-1] = f"UserKnownHostsFile={tmp_path / 'none'}"
    with pytest.raises(ClusterError, match="Host key verification failed"):
        async with ssh(**sshd).launch(Wanted(workers=1)):
            raise AssertionError("never gets here")
