"""What the user sees: the command, its exit code, the report folder."""

import json
import re
import shlex
import sys
from pathlib import Path

import planted
import pytest

from aiosgd import cli
from aiosgd.check.checks import checks_of
from aiosgd.check.laws import LAWS
from aiosgd.check.subject import load_subject, subject_of
from aiosgd.codecs.plain import Plain
from aiosgd.errors import PluginError
from aiosgd.testing import assert_codec

FEW = ("--workers", "3", "--seeds", "20")
BROKEN = f"{Path(planted.__file__)}:WaitsInSomeOrders"


@pytest.fixture
def aiosgd(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def test_a_codec_that_passes(aiosgd):
    code, out, err = aiosgd("check", "local", *FEW)
    assert (code, err) == (0, "")
    assert re.match(r"contract     ok       +\d+ runs +[\d.]+ s  hooks, ", out)
    assert re.search(r"\ncodec local passed; \d+ runs in [\d.]+ s\n$", out)


def test_a_failure_s_command_replays_it(aiosgd):
    code, out, _ = aiosgd("check", BROKEN, *FEW)
    assert code == 1
    error, command = re.search(r"\n    (.*)\n    replay: aiosgd (.*)\n", out).groups()
    assert "results are missing" in error
    assert "waits in step 0; last hook: update(block 0); heard in this step from 1" in out
    code, again, _ = aiosgd(*shlex.split(command))
    assert code == 1
    assert f"    {error}\n" in again
    assert again.count("waits in step 0") == 1


def test_a_case_that_is_right_passes(aiosgd):
    assert aiosgd("check", "fedavg", "--case", "schedules workers=2 servers=1")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ("nowhere",),
        ("plain", "--case", "mean workers=0"),
        ("plain", "--set", "model.hidden=[1]"),
        ("fedavg", "--set", "codec.turn=0"),
        ("plain", "--workers", "0"),
    ],
)
def test_wrong_usage_is_said_in_one_line(aiosgd, words):
    code, out, err = aiosgd("check", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"aiosgd: .*\n", err)


def test_json_and_a_report_folder(aiosgd, tmp_path):
    code, out, _ = aiosgd("check", BROKEN, *FEW, "--json", "--report", str(tmp_path))
    assert code == 1
    (folder,) = tmp_path.iterdir()
    report = json.loads(out)
    assert json.loads((folder / "report.json").read_text()) == report
    assert not report["passed"]
    assert (folder / "mean-sync.svg").read_text().startswith("<svg")


def test_an_unknown_law_is_refused_with_those_that_there_are():
    class Hopeful(Plain):
        laws = frozenset({"means"})

    with pytest.raises(PluginError, match=f"no law 'means'.*laws: {', '.join(LAWS)}$"):
        checks_of(subject_of(Hopeful))


def test_a_wrong_class_is_not_run():
    class Wrong(Plain):
        modes = ("sync", "fast")

    with pytest.raises(AssertionError, match=r"modes is \('sync', 'fast'\)"):
        assert_codec(Wrong)


# the pytest plugin


def test_assert_codec_shows_the_report():
    assert_codec("local", workers=2, seeds=4)
    with pytest.raises(AssertionError, match=r"replay: aiosgd check .*planted.py:SumsInstead"):
        assert_codec(planted.SumsInstead, workers=2, seeds=4)


def test_a_simulated_job_has_an_outcome(sim_cluster):
    job = sim_cluster("parameter_server", workers=3, slow="1:5")
    assert (job.error, len(set(job.bits.values()))) == ("", 1)
    assert set(job.weights) == {0, 1, 2, -1}
    assert job.bytes_sent > 0
    lost = sim_cluster("plain", workers=3, faults="crash:1@0.003")
    assert lost.error == "worker 1 lost: node 1 closed its link"
    assert [moment.node for moment in lost.story if moment.kind == "crash"] == [1]


def test_a_set_parameter_is_in_the_replay_command():
    subject = load_subject("fedavg", ["codec.turn=2"])
    assert subject.command("mean") == "aiosgd check fedavg --set codec.turn=2 --case mean"
    assert subject_of("fedavg", {"turn": 2}).params == {"turn": 2}
