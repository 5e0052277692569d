"""Nodes as tasks of a Slurm job: through a stand-in of its commands, and through Slurm itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiosgd.errors import ClusterError, ConfigError, PluginError
from aiosgd.plugins.launchers import Wanted
from aiosgd.plugins.launchers import slurm as module
from aiosgd.plugins.launchers.slurm import Slurm
from aiosgd.plugins.registry import make_params
from aiosgd.runtime.config import Address
from aiosgd.runtime.hello import introduce
from aiosgd.runtime.security import SecurityFiles

pytestmark = pytest.mark.usefixtures("no_process_left")

# Slurm's commands on this machine alone: what of them the launcher leans on. The queue is a folder:
# `state` says what squeue shows; a job of the partition `full` waits.
FAKE = {
    "sbatch": """
for word in "$@"; do case $word in
    --partition=nope) echo "sbatch: error: invalid partition specified: nope" >&2; exit 1;;
    --partition=full) state="PENDING|PartitionDown";;
    --chdir=*) cd "${word#*=}";;
    --ntasks=*) SLURM_NTASKS=${word#*=}; export SLURM_NTASKS;;
esac; script=$word; done
printf '%s\\n' "$@" >"$QUEUE/words"
if [ -n "$state" ]; then echo "$state" >"$QUEUE/state"; echo 7; exit; fi
echo "RUNNING|None" >"$QUEUE/state"
setsid sh -c 'echo $$ >"$QUEUE/pid"; exec sh "$1"' sh "$script" >job.out 2>&1 </dev/null &
echo "7;main"
""",
    "srun": """
while [ "$1" != sh ]; do shift; done
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$i SLURMD_NODENAME=localhost "$@" >$i.out 2>$i.err </dev/null &
done
wait
""",
    "squeue": """
case "$*" in *%i*) exit;; esac
[ -f "$QUEUE/broken" ] && { cat "$QUEUE/broken" >&2; exit 1; }
cat "$QUEUE/state"
""",
    "scancel": """
echo "CANCELLED|None" >"$QUEUE/state"
echo "$@" >>"$QUEUE/cancelled"
[ ! -f "$QUEUE/pid" ] || kill -TERM "-$(cat "$QUEUE/pid")"
""",
}
SETUP = Path(__file__).parents[1] / "slurm/cluster.sh"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Put the stand-ins on PATH and ask them often; gives their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setattr(module, "ASK", 0.05)
    monkeypatch.setattr(module, "POLL", 0.02)
    (tmp_path / "queue").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "queue"


def slurm(**values):
    return Slurm(make_params(Slurm, values, "launcher"))


async def says_hello(address, secret_file):
    link = await introduce(
        Address.parse(address, "node"),
        {"role": "submitter"},
        security=SecurityFiles(secret_file=secret_file).load(),
    )
    link.close()


async def never_up(launcher, workers=1, printed=lambda *_: None):
    async with launcher.launch(Wanted(workers=workers), printed):
        raise AssertionError("never gets here")


async def test_tasks_become_nodes_that_share_a_secret(queue, tmp_path):
    launcher = slurm(partition="main", cpus=2, gpus=1, memory="2G", options=["--exclusive"])
    async with launcher.launch(Wanted(workers=2, servers=1)) as nodes:
        assert len({*nodes.workers, *nodes.servers}) == 3
        for text in (*nodes.workers, *nodes.servers):
            assert text.startswith("localhost:")
            await says_hello(text, nodes.secret_file)
        (shared,) = tmp_path.glob("aiosgd-slurm-*")
        assert (shared / "secret").stat().st_mode & 0o777 == 0o600
        assert nodes.secret_file.read_text().strip() not in (shared / "job.sh").read_text()
    words = (queue / "words").read_text().split()
    assert {"--partition=main", "--cpus-per-task=2", "--gpus-per-task=1", "--ntasks=3"} < {*words}
    assert {"--mem-per-cpu=2G", "--exclusive"} < {*words}
    assert (queue / "cancelled").read_text() == "7\n"
    assert not shared.exists()


async def test_a_job_that_waits_says_why_and_not_for_ever(queue):
    heard = []
    with pytest.raises(ClusterError, match=r"job 7 is pending: PartitionDown after 0\.3 s"):
        await never_up(
            slurm(partition="full", timeout=0.3), printed=lambda *line: heard.append(line)
        )
    assert heard[0] == ("slurm", "submitted job 7")
    assert heard[1][1].startswith("job 7 is pending: PartitionDown (")
    assert len(heard) == 2
    assert (queue / "cancelled").read_text() == "7\n"


async def test_sbatch_s_own_words_are_passed_on(queue):
    with pytest.raises(ClusterError, match="refuses the job: invalid partition specified: nope"):
        await never_up(slurm(partition="nope"))
    assert not (queue / "cancelled").exists()


async def test_a_node_that_does_not_start_is_reported_with_its_last_words(queue, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named aiosgd' >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(ClusterError, match=r"worker \d on localhost did not start: No module"):
        await never_up(slurm(python=str(fake)), workers=2)


async def test_nodes_that_never_listen_are_given_up(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "START_TIMEOUT", 0.3)
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    with pytest.raises(ClusterError, match=r"worker 0 did not listen within 0.3 s; is .* shared"):
        await never_up(slurm(python=str(fake)))


async def test_a_slow_shared_folder_does_not_hold_up_the_event_loop(queue, monkeypatch):
    readers = set()
    read_task = module._Job._task

    def seen(job, number):
        readers.add(threading.current_thread())
        return read_task(job, number)

    monkeypatch.setattr(module._Job, "_task", seen)
    async with slurm().launch(Wanted(workers=2)):
        pass
    assert readers
    assert threading.current_thread() not in readers


async def test_a_job_that_ends_while_its_nodes_start_is_noticed(queue, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho 'FAILED|NodeFail' >{queue}/state\nexec sleep 60\n")
    fake.chmod(0o755)
    with pytest.raises(ClusterError, match=r"slurm job 7 ended: FAILED \(NodeFail\)"):
        await never_up(slurm(python=str(fake)))


async def test_a_job_that_slurm_has_forgotten_has_ended(queue):
    (queue / "broken").write_text("slurm_load_jobs error: Invalid job id specified\n")
    with pytest.raises(ClusterError, match="slurm job 7 ended: ENDED"):
        await never_up(slurm(partition="full"))


async def test_a_controller_that_does_not_answer_is_waited_for(queue):
    (queue / "broken").write_text("Unable to contact slurm controller\n")
    with pytest.raises(ClusterError, match=r"job 7 is pending: None after 0\.2 s"):
        await never_up(slurm(partition="full", timeout=0.2))


async def test_tasks_and_jobs_that_end_are_told_of(queue):
    heard, told = [], asyncio.Event()

    def printed(*line):
        heard.append(line)
        if line[0].startswith("worker"):
            told.set()

    async with slurm().launch(Wanted(workers=2), printed) as nodes:
        children = Path("/proc").glob("[0-9]*/cmdline")
        node = next(
            path
            for path in children
            if b"/node-1\0" in read(path)
            and b"--secret-file" in read(path)
            and read(path).startswith(sys.executable.encode())
        )
        os.kill(int(node.parent.name), signal.SIGTERM)
        await told.wait()
        (queue / "state").write_text("TIMEOUT|TimeLimit\n")
        assert await nodes.over == "slurm job 7 ended: TIMEOUT (TimeLimit)"
    assert ("worker 1", "ended with exit code 0") in heard
    assert heard[-1] == ("slurm", "job 7 ended: TIMEOUT (TimeLimit)")


def read(path):
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


async def test_the_job_is_cancelled_when_the_launcher_dies(queue, tmp_path):
    script = (
        "import asyncio, os\n"
        "from aiosgd.plugins.launchers import Wanted\n"
        "from aiosgd.plugins.launchers.slurm import Slurm\n"
        "async def main():\n"
        "    async with Slurm(Slurm.Params()).launch(Wanted(workers=1)):\n"
        "        os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    async with asyncio.timeout(30):
        while not (queue / "cancelled").exists() or list(tmp_path.glob("aiosgd-slurm-*")):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("missing", ["sbatch", "squeue", "scancel"])
async def test_without_slurm_nothing_is_tried(queue, monkeypatch, missing):
    (queue.parent / "bin" / missing).unlink()
    monkeypatch.setenv("PATH", str(queue.parent / "bin"))
    with pytest.raises(PluginError, match=f"needs {missing}, which is not on PATH"):
        await never_up(slurm())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cpus": 0}, "cpus is 0; expected 1 or more"),
        ({"hosts": -1}, "hosts is -1; expected 0 or more"),
        ({"timeout": -1}, "timeout is -1.0; expected seconds"),
        ({"address": "{host}"}, "expected a host with {node} or {fqdn}"),
        ({"python": "'py"}, 'launcher: python is "\'py", which has no closing quotation'),
    ],
)
def test_parameters_are_checked(values, words):
    with pytest.raises(ConfigError, match=words):
        slurm(**values)


async def test_the_shared_folder_must_be_there_and_writable(queue, tmp_path):
    with pytest.raises(ConfigError, match="is no folder; expected a shared one"):
        await never_up(slurm(folder=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"launcher\.folder /proc: "):
        await never_up(slurm(folder="/proc"))


def test_addresses_are_what_the_template_says():
    params = Slurm.Params(address="{node}.ib.example.org")
    assert params.reached_at("n1", "n1.example.org") == "n1.ib.example.org"
    assert Slurm.Params(address="{fqdn}").reached_at("n1", "n1.example.org") == "n1.example.org"


# Slurm itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm_here(tmp_path_factory):
    """Run a Slurm cluster of this host; see tests/slurm/cluster.sh."""
    if os.getuid() or any(shutil.which(tool) is None for tool in ("slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not here, or this is not root: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AIOSGD_TEST_SESSION", raising=False)  # the daemons outlive single tests
        started = subprocess.run(
            [SETUP, "start", folder], capture_output=True, text=True, check=False, timeout=60
        )
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([SETUP, "stop", folder], check=True, timeout=60)


@pytest.mark.extra
def test_a_job_on_slurm(slurm_here, command, tmp_path):
    done = command("launch", "slurm", "--workers", 2, "--", "--max-steps", 5)
    assert done.code == 0, done.err
    assert "test accuracy" in done.out
    assert not list(tmp_path.glob("cluster.*"))
    assert not list(tmp_path.glob("aiosgd-slurm-*"))
    assert not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout


@pytest.mark.extra
def test_slurm_s_reasons_are_told(slurm_here, command):
    refused = command("launch", "slurm", "--set", "launcher.partition=nope")
    assert refused.code == 3
    assert "aiosgd: sbatch refuses the job: invalid partition specified: nope" in refused.err
    words = ("--set", "launcher.partition=full", "--set", "launcher.timeout=1")
    waits = command("launch", "slurm", *words)
    assert waits.code == 3
    assert "is pending: PartitionDown" in waits.err


@pytest.mark.extra
def test_a_node_process_that_dies_on_slurm_is_lost_and_comes_back(slurm_here, start_command):
    words = ("--epochs", 4000, "--checkpoint-every", 50, "--on-loss", "continue")
    job = start_command("launch", "slurm", "--workers", 3, "--", *words)
    job.wait_for(r"step \d{3,}/")
    found = subprocess.run(
        ["pgrep", "-f", r"^\S*python\S* -P -m aiosgd node .*/node-2$"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    os.kill(max(map(int, found.stdout.split())), signal.SIGKILL)  # the child, not its supervisor
    job.wait_for("worker 2 lost")
    job.wait_for("goes on after step")
    job.signal(signal.SIGINT)
    assert job.end() == 130
    assert not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout


@pytest.mark.extra
def test_a_job_that_slurm_ends_is_told_of(slurm_here, start_command):
    job = start_command("launch", "slurm", "--workers", 2, "--", "--epochs", 4000)
    job.wait_for(r"step \d{3,}/")
    subprocess.run(["scancel", "--name=aiosgd"], check=True)
    job.wait_for("slurm: job .* (was ended|ended: )")
    assert job.end() == 1
    assert "the node was stopped" in job.err


def test_the_setup_names_what_is_missing(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "mkdir", "hostname", "pwd"):
        (folder / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [SETUP, "start", tmp_path / "x"],
        capture_output=True, text=True, check=False, env={"PATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "slurm: there is no munged\n"
