"""`aiosgd launch`: nodes through a launcher, with a job or until Ctrl-C; nothing stays behind."""

import asyncio
import contextlib
import dataclasses
import re
import signal
import sys
import tomllib
from pathlib import Path

import pytest

from aiosgd import cli, cli_launch
from aiosgd.errors import ClusterError, ConfigError
from aiosgd.launch import launch
from aiosgd.plugins.kinds import LAUNCHERS
from aiosgd.plugins.launchers import Launched, Launcher, Local
from aiosgd.runtime.config import load_cluster

pytestmark = pytest.mark.usefixtures("no_process_left")
DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder of this test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def aiosgd(here, monkeypatch, capfd):
    """`aiosgd(*words)`: run a command in this process; returns its code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(cls)`: have the launcher `mine` be that class."""

    def install(cls):
        monkeypatch.setitem(LAUNCHERS._loaded, "mine", cls)

    return install


class Mine(Launcher):
    """What another package's launcher may look like; it starts nothing."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        """One of each."""

        address: str = "127.0.0.1:1"

    def __init__(self, params):
        self.address = params.address

    @contextlib.asynccontextmanager
    async def launch(self, wanted, printed=lambda *_: None):
        printed("mine", f"for {wanted.names}")
        yield Launched.split(wanted, [self.address] * len(wanted.names))


# With a job -------------------------------------------------------------------------------------


def test_a_job_runs_on_nodes_that_are_gone_afterwards(aiosgd, here):
    code, out, err = aiosgd("launch", "local", "--workers", 3, "--", "--max-steps", 3, "--seed", 2)
    assert code == 0, err
    assert re.search(r"test accuracy 0\.\d+, loss .*\n3 steps.*\nresults in runs/", out)
    (run,) = (here / "runs").iterdir()
    job = tomllib.loads((run / "job.toml").read_text())
    assert (job["job"]["seed"], len(job["run"]["nodes"])) == (2, 3)
    assert {path.name for path in here.iterdir()} == {"runs"}


def test_a_server_is_there_if_the_codec_needs_one(aiosgd):
    code, out, err = aiosgd(
        "launch", "local", "--", "--codec", "fedavg", "--max-steps", 2, "--json"
    )  # fmt: skip
    assert code == 0, err
    assert '"-1"' in out


def test_a_codec_file_is_taken_by_nodes_that_are_started_for_it(aiosgd, here):
    (here / "mine.py").write_text("from aiosgd.codecs.plain import Plain as P\nclass Q(P): pass\n")
    code, _, err = aiosgd("launch", "local", "--", "--codec", "mine.py:Q", "--max-steps", 2)
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--", "--epochs", "0"], "--epochs is 0; expected 1 or more"),
        (["--", "--codec", "nonsense"], "no codec is named 'nonsense'"),
        (["--", "--nonsense"], "No such option: --nonsense"),
        (["--", "--detach"], "--detach leaves a job to nodes that end with this command"),
        (["--", "--debug", "stray"], "unexpected extra argument"),
        (["--workers", "0"], "workers is 0; expected 1 or more"),
        (["--servers", "-1"], "servers is -1; expected 0 or more"),
        (["--set", "codec.turn=1"], "is no parameter of the launcher; expected launcher.KEY=VALUE"),
        (["--set", "launcher.x=1"], "launcher.x: Local has no such parameter"),
        (["--set", "launcher"], "--set is 'launcher'; expected key.path=value"),
        (["--params", "none.toml"], "none.toml cannot be read"),
        (["--cluster-file", "none/c.toml"], "none/c.secret cannot be written"),
        (["--cluster-file", "c.secret"], "--cluster-file is 'c.secret', beside which no file"),
        (["--cluster-file", ""], "expected a name such as cluster.toml"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_a_node_starts(aiosgd, here, monkeypatch, words, reason):
    monkeypatch.setattr(Local, "launch", lambda *_: pytest.fail("a node would have started"))
    code, out, err = aiosgd("launch", "local", *words)
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert not list(here.iterdir())


def test_an_unknown_launcher_is_named(aiosgd):
    code, _, err = aiosgd("launch", "slrm")
    assert code == 2
    assert "did you mean 'slurm'?" in err


@pytest.mark.parametrize("name", ["cluster.toml", "cluster.secret"])
def test_no_file_is_overwritten(aiosgd, here, name):
    (here / name).write_text("mine")
    code, _, err = aiosgd("launch", "local")
    assert code == 2
    assert f"{name} exists already; nothing is ever overwritten" in err
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [(name, "mine")]


def test_a_job_that_fails_leaves_no_node(aiosgd, here):
    code, _, err = aiosgd("launch", "local", "--", "--learning-rate", "1e30", "--max-steps", 9)
    assert code == 1, err
    assert not list(here.glob("cluster*"))


def test_parameters_come_from_a_file_and_set_wins(aiosgd, here, launcher):
    launcher(Mine)
    (here / "p.toml").write_text('[launcher]\naddress = "127.0.0.1:2"\n')
    code, _, err = aiosgd("launch", "mine", "--params", "p.toml", "--workers", 1)
    assert code == 3
    assert "127.0.0.1:2" in err
    words = ("--params", "p.toml", "--set", "launcher.address=127.0.0.1:3", "--workers", 1)
    _, _, err = aiosgd("launch", "mine", *words)
    assert "127.0.0.1:3" in err
    (here / "p.toml").write_text("[lnchr]\n")
    code, _, err = aiosgd("launch", "mine", "--params", "p.toml")
    assert code == 2
    assert "launcher" in err


# Without a job ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nodes_stay_until_told_to_end_and_take_jobs_meanwhile(start_command, tmp_path, number):
    nodes = start_command("launch", "local", "--cluster-file", "my cluster.toml")
    nodes.wait_for("2 workers up; submit jobs from another terminal:")
    nodes.wait_for("aiosgd submit 'my cluster.toml' --epochs 5")
    cluster = load_cluster(tmp_path / "my cluster.toml")
    assert cluster.security.secret_file.stat().st_mode & 0o777 == 0o600
    job = start_command("submit", "my cluster.toml", "--max-steps", 2)
    assert job.end() == 0, job.err
    nodes.signal(number)
    assert nodes.end() == 0, nodes.err
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_an_interrupt_while_a_job_runs_is_its_end(start_command, tmp_path):
    job = start_command("launch", "local", "--", "--epochs", 100_000)
    job.wait_for("running")
    job.signal(signal.SIGINT)
    assert job.end() == 130
    assert not list(tmp_path.glob("cluster*"))


def test_a_launcher_that_is_killed_takes_its_nodes_with_it(start_command):
    nodes = start_command("launch", "local")
    nodes.wait_for("up; submit")
    nodes.signal(signal.SIGKILL)
    assert nodes.end() == -signal.SIGKILL
    # the fixture no_process_left waits for the nodes


async def test_the_end_of_the_last_node_is_the_end(here):
    class Display:
        def __init__(self):
            self.notes = []

        def noted(self, text):
            self.notes.append(text)

        note = noted

    display = Display()
    over = asyncio.get_running_loop().create_future()
    nodes = Launched(("a:1",), ("b:1", "c:1"), over=over)
    over.set_result("slurm job 7 ended: TIMEOUT")
    with pytest.raises(ClusterError, match="slurm job 7 ended: TIMEOUT; see what they said above"):
        await cli_launch._stay(nodes, Path("c.toml"), display)
    assert display.notes[0].startswith("1 worker and 2 servers up")
    staying = asyncio.create_task(
        cli_launch._stay(dataclasses.replace(nodes, over=None), Path("c.toml"), display)
    )
    await asyncio.sleep(0)
    staying.cancel()
    await staying
    assert display.notes[-1] == "taking the nodes down"


def test_a_launcher_that_only_writes_says_what_is_next(aiosgd, here):
    code, out, err = aiosgd("launch", "kubernetes", "--workers", 2)
    assert code == 0, err
    assert "kubectl --namespace default apply -f kubernetes\n" in out
    assert {path.name for path in here.iterdir()} == {
        "cluster.toml", "cluster.secret", "kubernetes",
    }  # fmt: skip
    words = ("--cluster-file", "b.toml", "--set", "launcher.folder=b", "--", "--epochs", 1)
    code, out, err = aiosgd("launch", "kubernetes", *words)
    assert code == 2
    assert "does not start nodes itself" in err


def test_a_node_without_the_secret_that_it_was_promised_does_not_start(start_command):
    node = start_command("node", "--port", 0, "--secret-stdin")
    assert node.end() == 2
    assert "standard input has 0 bytes; a secret has 16 to 4096" in node.err


# From Python ------------------------------------------------------------------------------------


async def test_nodes_are_up_for_the_time_of_a_context(here):
    async with launch("local", workers=1, servers=1, cluster_file="c.toml") as nodes:
        cluster = load_cluster("c.toml")
        assert [str(address) for address in cluster.workers] == list(nodes.workers)
        assert [str(address) for address in cluster.servers] == list(nodes.servers)
    assert not list(here.iterdir())


async def test_nodes_that_this_machine_does_not_reach_are_told_of(here, launcher):
    launcher(Mine)
    with pytest.raises(ClusterError, match=r"the nodes listen, but this machine does not reach"):
        async with launch("mine", workers=1):
            raise AssertionError("never gets here")
    assert not list(here.iterdir())


async def test_one_node_that_is_not_reached_is_named(here, launcher):
    class Half(Local):
        @contextlib.asynccontextmanager
        async def launch(self, wanted, printed=lambda *_: None):
            async with super().launch(wanted, printed) as nodes:
                yield dataclasses.replace(nodes, workers=(nodes.workers[0], "127.0.0.1:1"))

    launcher(Half)
    with pytest.raises(ClusterError, match=r"workers\[1\] listens on 127\.0\.0\.1:1, but this"):
        async with launch("mine", workers=2):
            raise AssertionError("never gets here")


async def test_a_cluster_file_that_appears_meanwhile_stays(here, launcher):
    class Late(Mine):
        @contextlib.asynccontextmanager
        async def launch(self, wanted, printed=lambda *_: None):
            Path("cluster.toml").write_text("somebody else's")
            async with super().launch(wanted, printed) as nodes:
                yield nodes

    launcher(Late)
    with pytest.raises(ConfigError, match=r"cluster\.toml cannot be written: File exists"):
        async with launch("mine", workers=1):
            raise AssertionError("never gets here")
    assert (here / "cluster.toml").read_text() == "somebody else's"


# Containers -------------------------------------------------------------------------------------


def test_the_image_runs_a_command_that_there_is(aiosgd):
    text = (DEPLOY / "Dockerfile").read_text()
    (line,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    words = tomllib.loads(f"words = {line}")["words"]
    assert words[:2] == ["aiosgd", "node"]
    command = cli.typer.main.get_command(cli.app).commands["node"]
    with command.make_context("node", words[2:]) as context:
        assert context.params["secret_file"] == Path("/run/aiosgd/secret")
    copied = re.search(r"^COPY (.*) \./$", text, re.MULTILINE)[1].split()
    assert all((DEPLOY.parent / name).exists() for name in copied)


@pytest.mark.extra
def test_the_compose_file_fits_its_cluster_file():
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    cluster = load_cluster(DEPLOY / "cluster.toml")
    hosts = {address.host for address in (*cluster.workers, *cluster.servers)}
    assert hosts == set(compose["services"]) - {"secret", "submit"}
    for service in compose["services"].values():
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        named = [v.partition(":")[0] for v in service["volumes"] if not v.startswith(".")]
        assert set(named) <= set(compose["volumes"])
        assert set(service.get("depends_on", {})) <= set(compose["services"])
    words = compose["services"]["submit"]["entrypoint"]
    command = cli.typer.main.get_command(cli.app).commands["submit"]
    with command.make_context("submit", [*words[2:], "--codec", "fedavg"]) as context:
        assert context.params["cluster"] == Path("/work/cluster.toml")
