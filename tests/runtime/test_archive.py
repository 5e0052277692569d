"""What a node keeps of its jobs is read back as it was written, whatever is missing or damaged."""

import json
import math
import os

import numpy as np
import pytest

from aiosgd.errors import ConfigError
from aiosgd.plugins.trackers import Csv
from aiosgd.runtime import archive, config, results, workload
from aiosgd.runtime.archive import entry_of, folder_of, history, read_copy, read_log
from aiosgd.runtime.record import Kind
from aiosgd.runtime.results import EVAL, RECORD, TRAIN, Rows

JOB = "20250102-030405-test-0123"
LATER = "20250102-030406-test-0123"
FIGURES = {"samples": 3, "train_s": 1.5, "late": 0, "bytes_sent": 7, "bytes_received": 8}


@pytest.fixture
def keep(tmp_path):
    """`keep(job_id, node, state)`: a copy with an end, or without one where the state is empty."""

    def make(job_id=JOB, node=0, state="done", **more):
        folder = folder_of(tmp_path, job_id, node)
        folder.mkdir(parents=True)
        (folder / "node.log").write_text("a line\n")
        if state:
            end = {"state": state, "reason": "", "began": 1.0, "ended": 3.0, **more}
            results.write_json(folder / "end.json", end)
        return folder

    return make


def test_the_history_of_a_node_that_had_no_job_is_empty(tmp_path):
    assert history(tmp_path) == history(tmp_path / "nowhere") == []


def test_the_newest_job_comes_first(keep, tmp_path):
    for job_id, node, state in ((JOB, 1, "failed"), (LATER, 0, "done"), (JOB, -1, "cancelled")):
        keep(job_id, node, state, reason=f"why {node}")
    known = [(e.job_id, e.node, e.state, e.reason) for e in history(tmp_path)]
    assert known == [
        (LATER, 0, "done", "why 0"),
        (JOB, -1, "cancelled", "why -1"),
        (JOB, 1, "failed", "why 1"),
    ]
    assert {(e.began, e.ended) for e in history(tmp_path)} == {(1.0, 3.0)}


def test_a_copy_without_an_end_is_of_the_running_job_or_lost(keep, tmp_path):
    keep(state="")
    keep(LATER, state="")
    lost, running = (entry_of(tmp_path, job, 0, {(LATER, 0)}) for job in (JOB, LATER))
    assert (lost.state, lost.reason) == ("lost", "its node ended without a word")
    assert lost.ended is not None
    assert (running.state, running.ended) == ("running", None)


def test_what_runs_is_not_over_though_it_has_an_end(keep, tmp_path):
    keep()
    assert entry_of(tmp_path, JOB, 0, {(JOB, 0)}).state == "running"
    assert entry_of(tmp_path, JOB, 0, {(JOB, 1), (LATER, 0)}).state == "done"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        '{"state": "done"}',
        '{"state": "odd", "reason": "", "began": 1.0, "ended": 2.0}',
        '{"state": "done", "reason": 1, "began": 1.0, "ended": 2.0}',
        '{"state": "done", "reason": "", "began": null, "ended": 2.0}',
        '{"state": "done", "reason": "", "began": NaN, "ended": 2.0}',
        '{"state": "done", "reason": "", "began": 1.0, "ended": Infinity}',
        '{"state": "done", "reason": "", "began": 1.0, "ended": 1e20}',
        '{"state": "done", "reason": "", "began": -1.0, "ended": 2.0}',
    ],
)
def test_a_damaged_end_is_told_and_hides_nothing_else(keep, tmp_path, text):
    (keep(state="") / "end.json").write_text(text)
    keep(LATER)
    assert [entry.state for entry in history(tmp_path)] == ["done", "lost"]
    assert "without a word" not in history(tmp_path)[1].reason


def test_what_a_job_cannot_have_taken_is_left_out(keep, tmp_path):
    keep(figures={"samples": 5, "train_s": math.nan, "wait_s": -1.0, "bytes_sent": 1e300})
    assert entry_of(tmp_path, JOB, 0).spent == {"samples": 5}


def test_a_file_of_no_time_that_a_clock_shows_has_none(keep, tmp_path):
    os.utime(keep(state="") / "node.log", (-5, -5))
    assert entry_of(tmp_path, JOB, 0).ended is None


def test_only_job_and_node_ids_are_copies(keep, tmp_path):
    keep()
    for name in ("x", f"{JOB}/nodes/00", f"{JOB}/nodes/x", f"{JOB}x/nodes/0", ".hidden/nodes/0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / LATER).write_text("no folder")
    assert [(e.job_id, e.node) for e in history(tmp_path)] == [(JOB, 0)]


@pytest.mark.parametrize("job_id", ["../x", "", "..", f"{JOB}/..", f"{JOB}\n", f"/{JOB}"])
def test_a_name_that_is_no_job_id_never_becomes_a_path(tmp_path, job_id):
    with pytest.raises(ConfigError, match="job id is"):
        folder_of(tmp_path, job_id, 0)


@pytest.mark.parametrize("node", ["0", "../..", True, 1.0, None])
def test_a_node_that_is_no_number_never_becomes_a_path(tmp_path, node):
    with pytest.raises(ConfigError, match="expected a whole number"):
        folder_of(tmp_path, JOB, node)


def test_a_job_that_is_not_here_is_an_error(keep, tmp_path):
    keep()
    for job_id, node in ((LATER, 0), (JOB, 1)):
        with pytest.raises(ConfigError, match=f"no copy of job {job_id} as node {node} here"):
            entry_of(tmp_path, job_id, node)


def test_a_long_history_and_long_reasons_fit_an_answer(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "HISTORY", 3)
    for second in range(5):
        keep(f"20250102-03040{second}-test-0123", reason="x" * 5000)
    entries = history(tmp_path)
    assert [entry.job_id[14] for entry in entries] == ["4", "3", "2"]
    assert {len(entry.reason) for entry in entries} == {archive.REASON}
    assert len(entry_of(tmp_path, LATER[:14] + "4" + LATER[15:], 0).reason) == 5000


def test_pieces_of_a_log_are_the_log(keep, monkeypatch):
    monkeypatch.setattr(archive, "PIECE", 3)
    folder = keep()
    pieces, offset = [], 0
    while piece := read_log(folder, offset):
        pieces.append(piece)
        offset += len(piece)
    assert b"".join(pieces) == b"a line\n"
    assert {len(piece) for piece in pieces[:-1]} == {3}
    assert read_log(folder, 100) == read_log(folder / "nowhere", 0) == b""


# All that a run left ----------------------------------------------------------------------------


@pytest.fixture
def whole(keep):
    """A copy of a run with all that there can be, and what it was made of."""
    load = workload.load(config.make_job({"max_steps": 3, "workers": 2}), 2, "unused")
    shapes = load.model.shapes
    weights = np.arange(load.model.size, dtype=np.float32)
    train, evaluations, record = Rows(TRAIN), Rows(EVAL), Rows(RECORD)
    train.append(0, 0, 0, 0.1, 1 / 3, float("nan"), 64, 1e-9, 0.5, 10, 11, float("inf"))
    evaluations.append(0, 0, 0, 0.1, 2 / 3, 0.25)
    record.append(Kind.BEGIN, 0, 2, 0)
    sketches = [np.linspace(0, 1, 64)]
    folder = keep(figures=FIGURES, shapes=list(shapes.items()))
    for name, rows in (("train", train), ("eval", evaluations)):
        Csv(None, folder).write(name, rows.array())
    results.write_record(folder, record)
    results.write_model(folder, weights, shapes)
    archive.write_sketches(folder, sketches)
    nodes = {0: "a:1", 1: "b:2", -1: "c:3"}
    archive.write_job(folder, JOB, load, nodes, [])
    return folder, {
        "train": train.columns(),
        "evaluations": evaluations.columns(),
        "record": record.columns(),
        "sketches": np.array(sketches),
        "weights": weights,
        "figures": FIGURES,
    }


def test_a_copy_is_what_was_collected_bit_for_bit(whole):
    folder, made = whole
    copy = read_copy(folder, weights=True)
    for name, value in made.items():
        np.testing.assert_equal(copy[name], value)
    assert copy["weights"].dtype == np.float32
    assert bytes(copy["log"]) == b"a line\n"
    assert copy["job"]["max_steps"] == 3
    assert copy["run"]["nodes"] == {"0": "a:1", "1": "b:2", "-1": "c:3"}
    assert (copy["job"]["workers"], copy["job"]["servers"]) == (2, 1)
    assert read_copy(folder, weights=False)["weights"] is None


FILES = {
    "train.csv": "train",
    "eval.csv": "evaluations",
    "record.npz": "record",
    "sketches.npy": "sketches",
    "model.safetensors": "weights",
    "end.json": "figures",
    "job.toml": "job",
}


@pytest.mark.parametrize("damage", [b"", b"\x00", b"\xff\xfe{", None], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_or_damaged_costs_only_itself(whole, name, damage):
    folder, made = whole
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    copy = read_copy(folder, weights=True)
    assert copy[FILES[name]] is None
    others = set(made) - {FILES[name]} - ({"weights"} if name == "end.json" else set())
    for other in others:
        np.testing.assert_equal(copy[other], made[other])


def test_shapes_that_do_not_fit_the_model_give_no_weights(whole):
    folder, _ = whole
    end = json.loads((folder / "end.json").read_text())
    for shapes in ([["other", [3]]], [[end["shapes"][0][0], [-5, 7]]], "x", [[1, 2]]):
        (folder / "end.json").write_text(json.dumps({**end, "shapes": shapes}))
        assert read_copy(folder, weights=True)["weights"] is None


def test_a_server_has_no_sketches_but_their_table(keep):
    folder = keep()
    archive.write_sketches(folder, [])
    assert read_copy(folder, weights=False)["sketches"].shape == (0, 64)


def test_the_code_that_came_with_a_job_is_kept_under_its_name(keep, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from aiosgd.codecs.plain import Plain\n\n\nclass Mine(Plain):\n    pass\n")
    job = config.make_job({"codec": f"{path}:Mine"})
    folder = keep()
    archive.write_job(folder, JOB, workload.load(job, 1, "unused"), {0: "a:1"}, [(job.codec, b"x")])
    (folder / "codec_0.py").write_bytes(b"the code")
    [[name, text]] = read_copy(folder, weights=False)["sources"]
    assert (name, bytes(text)) == (f"{path}:Mine", b"the code")
