"""The command line: what it prints where, and with which exit code it ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiosgd import __version__, cli
from aiosgd.runtime import results

LEGACY = Path(__file__).parent / "legacy_examples.py"

with_processes = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def aiosgd(monkeypatch, capsys, tmp_path):
    """`aiosgd(*words)` in this process, in `tmp_path`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def cluster_toml(tmp_path):
    def write(text):
        (tmp_path / "cluster.toml").write_text(text)
        return "cluster.toml"

    return write


# Help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["run", "submit", "node", "plugins", "new"])
def test_help_has_a_line_for_every_command_and_a_page_of_it(aiosgd, word):
    code, out, err = aiosgd("--help")
    assert (code, err) == (0, "")
    assert re.search(rf"^\W*{word} +[A-Z]", out, re.MULTILINE)
    code, out, err = aiosgd(word, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: aiosgd {word}" in out


def test_every_job_option_has_a_flag(aiosgd):
    for command in ("run", "submit"):
        _, out, _ = aiosgd(command, "--help")
        for option in cli.JOB_OPTIONS:
            assert f"--{option.replace('_', '-')} " in out


def test_without_a_command_there_is_help_and_an_error(aiosgd):
    code, out, _ = aiosgd()
    assert code == 2
    assert "Usage: aiosgd" in out


def test_the_version(aiosgd):
    assert aiosgd("--version") == (0, f"aiosgd {__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from aiosgd.cli import main\n"
        f"sys.argv[1:] = {words}\n"
        "try: main()\n"
        "finally: print(sorted({'numpy', 'msgpack', 'uvloop'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "[]\n"


# Wrong use ------------------------------------------------------------------------------------

NODES = 'workers = ["127.0.0.1:1"]\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], "No such command 'frob'; see aiosgd --help"),
        (["rum"], "Did you mean 'run'?"),
        (["submit"], "Missing argument"),
        (["run", "--epoch", "3"], "No such option: --epoch (Possible options: --epochs)"),
        (["run", "--epochs", "x"], "--epochs is 'x'; expected a whole number"),
        (["run", "--epochs", "0"], "--epochs is 0; expected 1 or more"),
        (["run", "--workers", "0"], "--workers is 0; expected 1 or more"),
        (["run", "--mode", "fast"], "--mode is 'fast'; expected one of 'sync', 'async'"),
        (["run", "--learning-rate", "fast"], "--learning-rate is 'fast'; expected a number"),
        (["run", "--granularity", "3"], "--granularity is 3; expected 'model', 'tensor' or"),
        (["node", "--port", "x"], "Invalid value for '--port'"),
        (["run", "--learning-rate=-1"], "--learning-rate is -1.0; expected more than 0"),
        (["run", "--codec", "plian"], "no codec is named 'plian' (did you mean 'plain'?"),
        (
            ["run", "--model", "transformer"],
            "no model is named 'transformer'; installed: blank, jax, mlp, ",
        ),
        (["run", "--codec", "no.py:No"], "codec 'no.py:No': there is no file no.py"),
        (["run", "--set", "codec.trun=3"], "codec.trun: Plain has no such parameter"),
        (
            ["run", "--codec", "fedavg", "--set", "codec.trun=3"],
            "codec.trun: FedAvg has no such parameter (did you mean 'turn'?",
        ),
        (
            ["run", "--codec", "fedavg", "--set", "codec.turn=often"],
            "codec.turn is 'often'; expected a whole number",
        ),
        (["run", "--codec", "fedavg", "--set", "codec.turn=0"], "turn is 0; expected 1 or more"),
        (["run", "--set", "codek.turn=3"], "--set codek.turn: no such key (did you mean 'codec'?"),
        (["run", "--set", "turn"], "--set is 'turn'; expected key.path=value"),
        (["run", "--servers", "1"], "servers is 1, but codec 'plain' uses no server"),
        (["run", "--codec", "fedavg", "--servers", "0"], "servers is 0, but codec 'fedavg' needs"),
        (["run", "--redundancy", "3"], "--redundancy is 3; expected at most 2"),
        (["run", "--batch-size", "9999"], "use a batch_size of at most "),
        (["run", "--codec", "fedavg", "--mode", "async"], "is not made for mode 'async'"),
        (["run", "--compressor", "fp16", "--codec", "local"], "codec 'local' compresses nothing"),
        (["run", "--dataset", "npz"], "dataset.path: Npz needs this parameter"),
        (["run", "--dataset", "npz", "--set", "dataset.path=no.npz"], "no such file"),
        (["run", "--title", "a/b"], "--title is 'a/b'; expected at most 40 letters"),
        (["submit", "no.toml"], "no.toml cannot be read: No such file or directory"),
        (["plugins", "codecs"], "there is no kind of plugin 'codecs' (did you mean 'codec'?"),
        (["plugins", "show", "codec", "plian"], "did you mean 'plain'?"),
        (["plugins", "show", "codec"], "plugins show takes a kind and a name"),
        (["plugins", "codec", "plain"], "plugins takes one kind, not 'codec plain'"),
        (["node", "--port", "70000"], "--port is 70000; a port is 0..65535"),
        (["run", "--tracker", "jsnol"], "no tracker is named 'jsnol' (did you mean 'jsonl'?"),
        (["run", "--tracker", "jsonl,csv,x"], "no tracker is named 'x'"),
        (["run", "--tracker", "csv", "--tracker", "x"], "no tracker is named 'x'"),
        (
            ["run", "--set", "tracker.jsonl.x=1"],
            "the job has no such tracker; --tracker jsonl adds",
        ),
        (["node", "--metrics-port", "70000"], "--metrics-port is 70000; a port is 0..65535"),
        (
            ["node", "--metrics-port", "0", "--metrics-host", "a b"],
            "--metrics-host is 'a b'; expected a name or an address",
        ),
        (["node", "--host", "0.0.0.0"], "add --insecure if the network is trusted"),
        (["node", "--host", "0.0.0.0"], "add --secret-file (`aiosgd new secret FILE` writes one)"),
        (
            ["node", "--host", "0.0.0.0", "--insecure", "--allow-code"],
            "--allow-code with --host 0.0.0.0 would let anyone who reaches this machine run any code",
        ),
        (["node", "--secret-file", "none"], "secret file none cannot be read: No such file"),
        (["node", "--tls-cert", "c", "--tls-key", "k"], "not given: tls_ca"),
        (["new"], "Missing command; see aiosgd new --help"),
        (["new", "secret"], "Missing argument 'FILE'; see aiosgd new secret --help"),
        (["new", "secret", "/proc/no"], "/proc/no cannot be written: No such file or directory"),
        (["node", "--host", "::"], "add --insecure if the network is trusted"),
        (["node", "--port", "0", "--run-dir", "/proc/no"], "--run-dir /proc/no cannot be made"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(aiosgd, words, message):
    code, out, err = aiosgd(*words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("aiosgd: ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('worker = ["127.0.0.1:1"]', "cluster.toml:1: worker: no such key (did you mean 'workers'"),
        ('workers = ["127.0.0.1:0"]', 'cluster.toml:1: workers[0] is "127.0.0.1:0"; expected'),
        ('workers = ["a:1",\n "a:70000"]', 'cluster.toml:2: workers[1] is "a:70000"; expected'),
        ('workers = ["a:1", "a:1"]', 'workers[1] is "a:1"; expected another address'),
        ("workers = []", "workers is empty"),
        ("workers = [", "cluster.toml:1: "),
        (NODES + "[job]\nepoch = 3", "cluster.toml:3: [job] epoch: no such key (did you mean"),
        (NODES + '[job]\nepochs = "3"', "cluster.toml:3: [job] epochs is '3'; expected a whole"),
        (NODES + '[job]\ncodec = "plian"', "no codec is named 'plian' (did you mean 'plain'?"),
    ],
)
def test_a_wrong_cluster_file_is_named_with_line_and_key(aiosgd, cluster_toml, text, message):
    code, out, err = aiosgd("submit", cluster_toml(text))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "words", [["--debug", "run", "--codec", "no"], ["run", "--codec", "no", "--debug"]]
)
def test_a_traceback_only_with_debug(aiosgd, words):
    code, _, err = aiosgd(*words)
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("aiosgd: no codec is named 'no'")
    code, _, err = aiosgd(*(word for word in words if word != "--debug"))
    assert "Traceback" not in err


def test_an_error_of_many_lines_becomes_one():
    assert cli.one_line(ValueError("a\n  b\tc ")) == "a b c"


# Plugins --------------------------------------------------------------------------------------


def test_plugins_lists_what_is_installed(aiosgd):
    code, out, _ = aiosgd("plugins")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["kind", "name", "distribution", "version", "target"]
    assert any(line.split()[:2] == ["codec", "fedavg"] for line in lines)
    code, out, _ = aiosgd("plugins", "model")
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"model"}


def test_format_json_is_the_same_as_json(aiosgd):
    assert aiosgd("plugins", "codec", "--format", "json") == aiosgd("plugins", "codec", "--json")
    assert aiosgd("plugins", "codec", "--format", "text") == aiosgd("plugins", "codec")
    code, _, err = aiosgd("plugins", "codec", "--format", "yaml")
    assert code == 2
    assert "'yaml' is not one of 'text', 'json'" in err


def test_plugins_as_json(aiosgd):
    rows = json.loads(aiosgd("plugins", "--json")[1])
    assert {"kind", "name", "distribution", "version", "target"} == rows[0].keys()
    (fedavg,) = [
        row
        for row in json.loads(aiosgd("plugins", "codec", "--json")[1])
        if row["name"] == "fedavg"
    ]
    assert fedavg["version"] == __version__


def test_a_plugin_is_shown_with_its_parameters(aiosgd):
    code, out, _ = aiosgd("plugins", "show", "codec", "fedavg")
    assert code == 0
    assert out.startswith("codec fedavg  (aiosgd.codecs.fedavg:FedAvg)\nfrom aiosgd ")
    assert "turn = 150  (a whole number)" in out
    assert "arXiv 1602.05629" in out
    facts = json.loads(aiosgd("plugins", "show", "codec", "fedavg", "--json")[1])
    assert facts["parameters"][0] == {
        "name": "turn",
        "type": "a whole number",
        "required": False,
        "default": 150,
    }
    names = [parameter["name"] for parameter in facts["parameters"]]
    assert names == ["turn", "fraction", "weighted", "proportional"]


def test_a_codec_is_shown_with_what_it_is_made_for_and_promises(aiosgd):
    code, out, _ = aiosgd("plugins", "show", "codec", "parameter_server")
    assert code == 0
    for line in (
        "modes: sync, async",
        "exchanges: updates",
        "compressor: used",
        "server half: Server",
        "laws: consensus, kept, mean; `aiosgd check` tests them",
    ):
        assert line in out.splitlines()
    facts = json.loads(aiosgd("plugins", "show", "codec", "plain", "--json")[1])
    assert (facts["exchange"], facts["server"]) == ("gradients", None)
    assert "modes" not in json.loads(aiosgd("plugins", "show", "model", "mlp", "--json")[1])


def test_a_parameter_without_a_default_is_shown_as_required(aiosgd):
    assert "  path  (a string; required)" in aiosgd("plugins", "show", "dataset", "npz")[1]
    facts = json.loads(aiosgd("plugins", "show", "dataset", "npz", "--json")[1])
    assert {"name": "path", "type": "a string", "required": True, "default": None} in (
        facts["parameters"]
    )
    assert aiosgd("plugins", "show", "codec", "plain")[1].rstrip().endswith("parameters: none")


def test_listing_imports_no_plugin(aiosgd, monkeypatch):
    monkeypatch.delitem(sys.modules, "aiosgd.codecs.fedavg", raising=False)
    aiosgd("plugins")
    assert "aiosgd.codecs.fedavg" not in sys.modules


# Running --------------------------------------------------------------------------------------


@with_processes
def test_run_without_options_trains_and_prints_the_accuracy(command, tmp_path):
    done = command("run")
    assert done.code == 0, done.err
    first, second, third = done.out.splitlines()
    assert re.fullmatch(r"test accuracy 0\.\d{4}, loss \d+\.\d{4}", first)
    assert re.fullmatch(r"\d+ steps, [\d,]+ samples in \d+\.\d\d s \([\d,]+ samples/s\)", second)
    folder = tmp_path / third.removeprefix("results in ")
    assert results.read_summary(folder).nodes == 2
    assert f"job {folder.name}: done" in done.err.splitlines()


@with_processes
def test_the_commands_return_to_their_caller(aiosgd, cluster, write_cluster):
    code, out, err = aiosgd("run", "--max-steps", 2, "--workers", 1)
    assert (code, len(out.splitlines())) == (0, 3)
    assert "done" in err
    words = ("submit", write_cluster(cluster), "--max-steps", 2, "--workers", 1, "--json")
    code, out, _ = aiosgd(*words)
    assert code == 0
    assert json.loads(out)["steps"] == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@with_processes
def test_json_is_the_only_thing_on_stdout(command, tmp_path):
    done = command("run", "--json", "--max-steps", 2, "--workers", 1, "--title", "mine")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    folder = tmp_path / "runs" / summary["job_id"]
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("done", 2)
    assert "-mine-" in summary["job_id"]


@with_processes
def test_a_codec_from_a_file_and_what_it_prints(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "from aiosgd import Codec\n"
        "class Mine(Codec):\n"
        "    async def update(self, block):\n"
        "        print('step', block.step, 'x' * 2000)\n"
        "        print('oh', file=sys.stderr)\n"
        "        self.set_result(block.value)\n"
    )
    done = command("run", "--codec", "mine.py:Mine", "--epochs", 6, "--workers", 2)
    assert done.code == 0, done.err
    assert "-Mine-" in done.out
    lines = done.err.splitlines()
    for worker in (0, 1):  # more than any pipe holds
        own = [line for line in lines if line.startswith(f"worker {worker}: step ")]
        assert own == [f"worker {worker}: step {i} {'x' * 2000}" for i in range(66)]
    assert "worker 1: oh" in lines


@with_processes
@pytest.mark.parametrize("codec", ["FedAvg", "Plain"])
def test_codecs_of_the_first_generation_train(command, codec):
    words = ["--codec", f"{LEGACY}:{codec}"]
    if codec == "FedAvg":
        words = ["--codec", f"{LEGACY}:FedAvgClient", "--server-codec", f"{LEGACY}:FedAvgServer"]
        words += ["--exchange", "weights"]
    done = command("run", *words, "--json", "--epochs", 20, "--learning-rate", 0.2)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["nodes"] == (3 if codec == "FedAvg" else 2)
    assert summary["metrics"]["accuracy"] > 0.8


@with_processes
def test_a_codec_that_raises_fails_the_run(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from aiosgd import Codec\n"
        "class Mine(Codec):\n"
        "    async def update(self, block):\n"
        "        raise ValueError('no good')\n"
    )
    done = command("run", "--codec", "mine.py:Mine")
    assert (done.code, done.out) == (1, "")
    assert "codec Mine: update failed on node" in done.err.splitlines()[-1]
    assert "ValueError: no good" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


STUBBORN = """
import asyncio
from aiosgd import Codec

class Stubborn(Codec):
    async def update(self, block):
        while True:
            try:
                await asyncio.sleep(60)
            except BaseException:
                pass
"""


@pytest.mark.slow
@with_processes
def test_a_hook_that_cannot_be_cancelled_does_not_hold_up_the_run(command, tmp_path):
    (tmp_path / "mine.py").write_text(STUBBORN)
    done = command("run", "--codec", "mine.py:Stubborn", "--step-timeout", 0.5)
    assert done.code == 1
    assert "codec Stubborn on node" in done.err.splitlines()[-1]
    assert "update has not returned" in done.err.splitlines()[-1]
    (folder,) = (tmp_path / "runs").iterdir()
    assert results.read_summary(folder).state == "failed"


@with_processes
def test_a_second_interruption_leaves_at_once(start_command, tmp_path):
    (tmp_path / "mine.py").write_text(STUBBORN)
    running = start_command("run", "--codec", "mine.py:Stubborn", "--step-timeout", 100)
    running.wait_for("running")
    running.signal(signal.SIGINT)
    running.wait_for("stopping")
    running.signal(signal.SIGINT)
    assert running.end() == 130
    assert running.err.splitlines()[-1] == "aiosgd: interrupted; nodes may still be stopping"
    assert "Traceback" not in running.err


@with_processes
def test_a_failed_run_keeps_what_there_was(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from aiosgd import Codec\n"
        "class Mine(Codec):\n"
        "    async def update(self, block):\n"
        "        if block.step == 25 and self.ctx.node == 1: raise ValueError('enough')\n"
        "        self.set_result(block.value)\n"
    )
    done = command("run", "--codec", "mine.py:Mine", "--epochs", 4)
    assert done.code == 1
    assert done.err.splitlines()[-1].count("ValueError: enough (mine.py:4)") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    rows = results.read_table(folder, "train")
    assert list(rows.step[rows.node == 1]) == list(range(25))
    summary = results.read_summary(folder)
    assert summary.state == "failed"
    assert summary.samples == rows.samples.sum() > 0
    assert summary.train_s > 0
    assert results.read_parameters(folder)


@with_processes
def test_a_run_is_repeated_from_its_job_file(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from aiosgd.codecs.plain import Plain\nclass Mine(Plain):\n    pass\n"
    )
    assert command("run", "--codec", "mine.py:Mine", "--seed", 3, "--title", "one").code == 0
    (first,) = (tmp_path / "runs").iterdir()
    (tmp_path / "mine.py").unlink()  # the run folder has its copy
    done = command("run", "--job", first / "job.toml", "--title", "two")
    assert done.code == 0, done.err
    (second,) = (folder for folder in (tmp_path / "runs").iterdir() if folder != first)
    again = results.read_parameters(second)
    for name, values in results.read_parameters(first).items():
        assert values.tobytes() == again[name].tobytes()


@with_processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_node_behind(start_command, tmp_path, number):
    running = start_command("run", "--epochs", 10**6)
    running.wait_for(r"step \d+/")
    running.signal(number)
    code = running.end()
    if number is signal.SIGKILL:
        assert code == -number
        return
    assert code == 130
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"{folder.name} was cancelled" in running.err.splitlines()[-1]
    assert results.read_summary(folder).state == "cancelled"


# A node ---------------------------------------------------------------------------------------


@with_processes
def test_an_address_that_is_not_ours_is_named(command):
    done = command("node", "--host", "192.0.2.1", "--port", 9000, "--insecure", "--run-dir", "here")
    assert done.code == 2
    assert done.err == "aiosgd: cannot listen on 192.0.2.1:9000: Cannot assign requested address\n"


@with_processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_prints_its_address_once_and_ends_quietly(start_nodes, number):
    (node,) = start_nodes(1)
    assert node.stop(number) == 0
    assert node.process.out == f"aiosgd node listening on {node.address}\n"
    assert node.process.err == ""


@with_processes
def test_a_node_ends_with_the_process_that_started_it(start_command):
    node = start_command("node", "--port", 0, "--until-stdin-closes", stdin=subprocess.PIPE)
    node.wait_for("listening")
    node.process.stdin.close()
    assert node.end() == 0


@with_processes
def test_a_nodes_places_follow_the_environment(start_command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    node = start_command("node", "--port", 0)
    node.wait_for("listening")
    (folder,) = (tmp_path / "state/aiosgd").iterdir()
    assert folder.name.endswith("-0")
    node.signal(signal.SIGTERM)
    assert node.end() == 0


# On a terminal --------------------------------------------------------------------------------


@with_processes
def test_on_a_terminal_a_table_is_drawn_and_taken_away(tmp_path):
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiosgd", "run", "--epochs", "40"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
    )
    os.close(terminal)
    drawn = b""
    while select.select([control], [], [], 60)[0]:
        try:
            drawn += os.read(control, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(control)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    screen = drawn.decode()
    assert "starting nodes on this machine" in screen
    assert "test accuracy" in screen
    assert "worker 1" in screen
    assert "\x1b[2K" in screen.rpartition("worker 1")[2]  # lines are cleared at the end
    assert out.decode().startswith("test accuracy ")


@pytest.mark.slow
def test_a_local_node_that_hangs_leaves_its_log(command, tmp_path):
    codec = tmp_path / "hang.py"
    codec.write_text(
        "import time\n"
        "from aiosgd.codecs.plain import Plain\n\n\n"
        "class Hang(Plain):\n"
        "    async def update(self, block):\n"
        "        if self.ctx.node == 1 and block.step == 1:\n"
        "            time.sleep(60)\n"
        "        return await super().update(block)\n"
    )
    found = command("run", "--codec", f"{codec}:Hang", "--max-steps", "5", "--epochs", "2")
    assert found.code == 1
    (log,) = (tmp_path / "runs").glob("*/nodes/1/node.log")
    assert "hang.py" in log.read_text()
    assert "in update" in log.read_text()


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--set", "tracker.jsonl.x=1", "--seed", "1"], ["--seed", "1"]),
        (["--set=tracker.jsonl.x=1", "--set", "codec.turn=1"], ["--set", "codec.turn=1"]),
        (["--title", "tracker.x"], ["--title", "tracker.x"]),
        (["--set"], ["--set"]),
    ],
)
def test_a_second_run_gets_no_parameters_of_trackers(words, kept):
    assert cli._without_tracker_params(words) == kept
