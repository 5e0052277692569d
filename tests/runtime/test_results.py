import json
import math
import os
import platform
import stat
import struct
import tomllib
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiosgd
from aiosgd.errors import ConfigError, RemoteProtocolError
from aiosgd.runtime import results
from aiosgd.runtime.config import Address, JobConfig, make_job
from aiosgd.runtime.results import EVAL, TRAIN, Rows, Summary, find_run, meant

NOON = datetime(2031, 2, 3, 12, 0, 5)
JOB_ID = "20310203-120005-plain-00af"
NAN = math.nan


def refusal(function, *args, error=ConfigError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Job ids and folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("plain", "plain"),
        ("", "job"),
        ("../..", "job"),
        ("my codecs/ring.py:Ring", "ring.py-Ring"),
        (".hidden", "hidden"),
        ("a" * 41, "a" * 40),
        ("größe", "gr-e"),
    ],
)
def test_job_id_has_time_name_and_token(title, name):
    job_id = results.new_job_id(NOON, title, "00af")
    assert job_id == f"20310203-120005-{name}-00af"
    assert results.check_job_id(job_id) == job_id


@given(st.text(max_size=60))
def test_job_id_is_safe_whatever_the_title(title):
    job_id = results.new_job_id(NOON, title, "00af")
    assert Path(job_id).name == job_id
    assert job_id.isascii()
    assert len(job_id) <= 61


@pytest.mark.parametrize(
    "text",
    [
        *("", "..", "20310203-120005-00af", "20310203-120005-a-00AF", "20310203-120005-a-00a"),
        *("20310203-120005-a/b-00af", "20310203-120005-..-00af", f"{JOB_ID}\n", f"../{JOB_ID}"),
        *("2031020-120005-a-00af", "٢0310203-120005-a-00af"),
    ],
)
def test_bad_job_id_is_refused(text, tmp_path):
    message = f"job id is {text!r}; expected YYYYmmdd-HHMMSS-<title>-<4 hex digits>"
    assert refusal(results.check_job_id, text) == message
    assert refusal(results.create_folder, tmp_path, text) == message
    assert not list(tmp_path.iterdir())


def test_bad_token_is_refused():
    assert refusal(results.new_job_id, NOON, "a", "xyz").startswith("job id is ")


def test_folder_is_made_once(tmp_path):
    output = tmp_path / "deep" / "runs"
    folder = results.create_folder(output, JOB_ID)
    assert folder == output / JOB_ID
    assert folder.is_dir()
    message = refusal(results.create_folder, output, JOB_ID)
    assert message == f"{folder} exists already; nothing is ever overwritten"


def test_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    message = refusal(results.create_folder, file, JOB_ID)
    assert message == f"{file} cannot be made a folder: File exists"
    message = refusal(results.create_folder, file / "runs", JOB_ID)
    assert message == f"{file / 'runs'} cannot be made a folder: Not a directory"

    def deny(self, *args, **kwargs):
        if self.name == JOB_ID:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", deny)
    message = refusal(results.create_folder, tmp_path, JOB_ID)
    assert message == f"{tmp_path / JOB_ID} cannot be made: Permission denied"


# Rows --------------------------------------------------------------------------------------


def test_columns_are_those_of_the_documentation():
    assert TRAIN.names == (
        *("node", "step", "epoch", "time_s", "loss", "accuracy", "samples", "compute_s"),
        *("wait_s", "bytes_sent", "bytes_received", "staleness"),
    )
    assert EVAL.names == ("node", "epoch", "step", "time_s", "loss", "accuracy")
    whole = {"node", "step", "epoch", "samples", "bytes_sent", "bytes_received"}
    for dtype in (TRAIN, EVAL):
        for name in dtype.names:
            assert dtype[name] == (np.int64 if name in whole else np.float64)


def eval_rows(count: int) -> Rows:
    rows = Rows(EVAL)
    for i in range(count):
        rows.append(-i, i, 2**62 + i, i / 3, NAN if i % 2 else -0.5, 1e-300)
    return rows


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_rows_keep_what_was_appended(count):
    rows = eval_rows(count)
    table = rows.array()
    assert len(rows) == len(table) == count
    assert table.dtype.names == EVAL.names
    assert table.step.tolist() == [2**62 + i for i in range(count)]
    assert table.time_s.tolist() == [i / 3 for i in range(count)]
    assert np.isnan(table.loss).tolist() == [i % 2 == 1 for i in range(count)]


def test_table_is_a_copy_and_rows_go_on():
    rows = eval_rows(1)
    table, columns = rows.array(), rows.columns()
    table.node[0] = 7
    columns["node"][0] = 8
    rows.append(1, 1, 1, 1.0, 1.0, 1.0)
    assert len(table) == 1
    assert rows.array().node.tolist() == [0, 1]
    assert repr(rows) == "Rows(2 x node, epoch, step, time_s, loss, accuracy)"


def test_wrong_row_is_refused_and_leaves_nothing():
    rows = Rows(EVAL)
    for values in [
        (),
        (1, 1, 1, 1.0, 1.0),
        (1, 1.5, 1, 1.0, 1.0, 1.0),
        (2**63, 1, 1, 1.0, 1.0, 1.0),
    ]:
        with pytest.raises(struct.error):
            rows.append(*values)
    assert len(rows) == 0


@pytest.mark.parametrize("count", [0, 1, 5])
def test_columns_are_lossless(count):
    rows = eval_rows(count)
    columns = rows.columns()
    assert list(columns) == list(EVAL.names)
    assert all(column.flags.c_contiguous for column in columns.values())
    for column in columns.values():
        column.flags.writeable = False  # as they come from the wire
    copy = Rows.from_columns(EVAL, columns)
    assert copy.array().tobytes() == rows.array().tobytes()
    copy.append(1, 1, 1, 1.0, 1.0, 1.0)
    assert len(copy) == count + 1


def without(columns, name):
    return {key: value for key, value in columns.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: 3, "columns are int; expected node, epoch, step, time_s, loss, accuracy"),
        (
            lambda c: without(c, "step"),
            "columns are ['accuracy', 'epoch', 'loss', 'node', 'time_s']",
        ),
        (lambda c: {**c, 5: c["step"]}, "columns are ['5', 'accuracy', "),
        (lambda c: {**c, "step": [1, 2]}, "column step is [1, 2]; expected a vector of int64"),
        (
            lambda c: {**c, "step": c["step"].astype("i4")},
            "column step is 'int32(2,)'; expected a vector of int64",
        ),
        (
            lambda c: {**c, "loss": c["step"]},
            "column loss is 'int64(2,)'; expected a vector of float64",
        ),
        (
            lambda c: {**c, "loss": c["loss"].reshape(2, 1)},
            "column loss is 'float64(2, 1)'; expected a vector of float64",
        ),
        (
            lambda c: {**c, "loss": c["loss"][:1]},
            "columns have lengths {'node': 2, 'epoch': 2, 'step': 2, 'time_s': 2, 'loss': 1, ",
        ),
    ],
)
def test_columns_that_are_wrong_are_refused(change, message):
    columns = change(eval_rows(2).columns())
    found = refusal(Rows.from_columns, EVAL, columns, error=RemoteProtocolError)
    assert found.startswith(message)


# Tables ------------------------------------------------------------------------------------

EVAL_HEADER = "node,epoch,step,time_s,loss,accuracy\n"


def test_tables_are_read(tmp_path):
    text = ",".join(TRAIN.names) + "\r\n-1,3,0,0.1,,1e-300,64,0.5,inf,1099511627776,0,\r\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "eval.csv").write_text(EVAL_HEADER)
    train = results.read_table(tmp_path, "train")
    assert train.dtype.names == TRAIN.names
    assert train.tolist()[0][:4] == (-1, 3, 0, 0.1)
    assert np.isnan(train.loss).tolist() == np.isnan(train.staleness).tolist() == [True]
    assert train.wait_s.tolist() == [math.inf]
    assert train.bytes_sent.tolist() == [2**40]
    assert results.read_table(tmp_path, "eval").shape == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: columns are ; expected node,epoch,step,time_s,loss,accuracy"),
        ("node,step\n", "1: columns are node,step; expected node,epoch,step,time_s,loss,accuracy"),
        (EVAL_HEADER + "0,1,2,3,4,5\n0,1", "3: the row has 2 cells; expected 6"),
        (EVAL_HEADER + "0,1,2,3,4,5,6\n", "2: the row has 7 cells; expected 6"),
        (EVAL_HEADER + "0,1.5,2,3,4,5\n", "2: epoch is '1.5'; expected a whole number"),
        (EVAL_HEADER + "0,,2,3,4,5\n", "2: epoch is ''; expected a whole number"),
        (EVAL_HEADER + f"0,{2**63},2,3,4,5\n", f"2: epoch is '{2**63}'; expected a whole number"),
        (EVAL_HEADER + "0,1,2,x,4,5\n", "2: time_s is 'x'; expected a number"),
    ],
)
def test_damaged_table_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "eval.csv"
    path.write_text(text)
    assert refusal(results.read_table, tmp_path, "eval") == f"{path}:{message}"


# Summary -----------------------------------------------------------------------------------

SUMMARY = Summary(
    job_id=JOB_ID,
    state="failed",
    error="node 1 is gone",
    metrics={"loss": NAN, "accuracy": 0.5},
    nodes=3,
    steps=2,
    epochs=1,
    samples=128,
    wall_s=1.5,
    train_s=1.0,
    samples_per_s=NAN,
    bytes_sent=10,
    bytes_received=11,
    per_node={0: {"steps": np.int64(2), "rate": math.inf, "lost": (np.float32(0.5), None)}, -1: {}},
)


def test_summary_has_the_fields_of_the_documentation():
    assert list(SUMMARY.to_dict()) == [
        *("job_id", "state", "error", "metrics", "nodes", "steps", "epochs", "samples", "wall_s"),
        *("train_s", "samples_per_s", "bytes_sent", "bytes_received", "consensus_distance"),
        *("staleness_mean", "staleness_max", "per_node", "lost", "checkpoint", "simulated"),
    ]


def test_summary_is_plain_json_without_nan(tmp_path):
    path = results.write_summary(tmp_path, SUMMARY)
    assert path == tmp_path / "summary.json"
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values == SUMMARY.to_dict()
    assert values["metrics"] == {"loss": None, "accuracy": 0.5}
    assert values["samples_per_s"] is None
    assert values["per_node"] == {"0": {"steps": 2, "rate": None, "lost": [0.5, None]}, "-1": {}}


def test_summary_is_read_back(tmp_path):
    results.write_summary(tmp_path, SUMMARY)
    summary = results.read_summary(tmp_path)
    assert summary.to_dict() == SUMMARY.to_dict()
    assert math.isnan(summary.metrics["loss"])
    assert math.isnan(summary.samples_per_s)
    assert list(summary.per_node) == [0, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", " is no JSON: JSONDecodeError: "),
        ("[" * 100_000, " is no JSON: RecursionError"),
        ("[]", " is []; expected a table"),
        ("{}", ".job_id: a summary needs this parameter"),
        ('{"metrics": {"loss": "x"}}', ": metrics.loss is 'x'; expected a number"),
        ('{"per_node": {"../x": {}}}', ": per_node names '../x'; expected a node's id"),
        ('{"job_id": "a", "state": "don"}', ".state is 'don'; expected one of 'done', "),
        ('{"job_id": "a", "state": "done", "epoch": 1}', ".epoch: a summary has no such parameter"),
    ],
)
def test_damaged_summary_is_refused(tmp_path, text, message):
    path = tmp_path / "summary.json"
    path.write_text(text)
    assert refusal(results.read_summary, tmp_path).startswith(f"{path}{message}")


# Job file ----------------------------------------------------------------------------------


def test_job_file_is_all_that_a_new_run_needs(tmp_path):
    job = make_job({"epochs": 3, "seed": 7}, ["codec.turn=150", "compute.slow.1=2"])
    extra = {
        "job_id": JOB_ID,
        "plugins": {"codec plain": "aiosgd 0.1"},
        "nodes": {0: Address("::1", 9000), -1: None},
        "started": NOON,
        "list": (1, "a"),
    }
    path = results.write_job(tmp_path, job, extra)
    assert results.read_job(tmp_path) == job
    values = tomllib.loads(path.read_text())
    assert values["job"]["learning_rate"] == JobConfig().learning_rate
    run = values["run"]
    assert run == {
        "seed": 7,
        "aiosgd": aiosgd.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "job_id": JOB_ID,
        "plugins": {"codec plain": "aiosgd 0.1"},
        "nodes": {"0": "[::1]:9000"},
        "started": NOON,
        "list": [1, "a"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a = ", " is no TOML: TOMLDecodeError: "),
        (b"a = '\xff'", " is no TOML: UnicodeDecodeError: "),
        (b"job = 3", ": job is 3; expected a table"),
        (b"job.epoch = 3", ": job.epoch: no such key (did you mean 'epochs'?)"),
    ],
)
def test_damaged_job_file_is_refused(tmp_path, text, message):
    path = tmp_path / "job.toml"
    path.write_bytes(text)
    assert refusal(results.read_job, tmp_path).startswith(f"{path}{message}")


# Parameters --------------------------------------------------------------------------------

SHAPES = {"w": (2, 3), "b": (3,), "scale": (), "none": (0, 4)}


def vector(size: int = 10) -> np.ndarray:
    values = np.arange(size, dtype=np.float32)
    values.flags.writeable = False
    return values


def test_parameters_are_named_views():
    values = vector()
    named = results.named_parameters(values, SHAPES)
    assert {name: array.shape for name, array in named.items()} == SHAPES
    assert np.concatenate([array.ravel() for array in named.values()]).tolist() == values.tolist()
    assert all(np.shares_memory(named[name], values) for name in ("w", "b", "scale"))
    assert results.named_parameters(vector(0), {}) == {}


@pytest.mark.parametrize("make", [vector, lambda: np.arange(20, dtype=np.float32)[::2] / 2])
def test_parameters_are_read_back(tmp_path, make):
    results.write_model(tmp_path, make(), SHAPES)
    found = results.read_parameters(tmp_path)
    assert found.keys() == SHAPES.keys()
    for name, array in results.named_parameters(make(), SHAPES).items():
        assert found[name].dtype == np.float32
        assert found[name].shape == array.shape
        assert found[name].tolist() == array.tolist()


@pytest.mark.parametrize("values", [vector(9), vector(11), vector().reshape(2, 5)])
def test_vector_that_does_not_fit_is_refused(tmp_path, values):
    message = refusal(results.write_model, tmp_path, values, SHAPES, error=RemoteProtocolError)
    assert message.startswith(f"model has shape {values.shape}; expected (10,)")
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("cut", [0, 5, -1])
def test_damaged_parameters_are_refused(tmp_path, cut):
    path = results.write_model(tmp_path, vector(), SHAPES)
    path.write_bytes(path.read_bytes()[:cut])
    message = refusal(results.read_parameters, tmp_path)
    assert message.startswith(f"{path} is no safetensors file: ")


# Logs and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("node", [0, 12, -1])
def test_node_log_has_its_own_folder(tmp_path, node):
    path = results.write_node_log(tmp_path, node, "größe\n\udc80")
    assert files_of(tmp_path) == [f"nodes/{node}/node.log"]
    assert path.read_text(encoding="utf-8") == "größe\n\\udc80"


@pytest.mark.parametrize("node", ["../../x", "1", 1.0, True, None])
def test_node_that_is_no_id_never_becomes_a_path(tmp_path, node):
    message = refusal(results.write_node_log, tmp_path, node, "", error=RemoteProtocolError)
    assert message == f"node id is {node!r}; expected a whole number"
    assert list(tmp_path.iterdir()) == []


def test_node_log_without_room_for_its_folder_is_refused(tmp_path):
    (tmp_path / "nodes").touch()
    message = refusal(results.write_node_log, tmp_path, 0, "")
    assert message == f"{tmp_path / 'nodes' / '0'} cannot be made: Not a directory"


WRITERS = {
    "job.toml": lambda folder: results.write_job(folder, JobConfig(), {}),
    "summary.json": lambda folder: results.write_summary(folder, SUMMARY),
    "model.safetensors": lambda folder: results.write_model(folder, vector(), SHAPES),
    "nodes/-1/node.log": lambda folder: results.write_node_log(folder, -1, "text"),
}
READERS = {
    "job.toml": results.read_job,
    "summary.json": results.read_summary,
    "model.safetensors": results.read_parameters,
    "train.csv": lambda folder: results.read_table(folder, "train"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_written_file_is_never_overwritten(tmp_path, name):
    path = WRITERS[name](tmp_path)
    assert files_of(tmp_path) == [name]
    path.write_bytes(b"first")
    message = refusal(WRITERS[name], tmp_path)
    assert message == f"{path} exists already; nothing is ever overwritten"
    assert files_of(tmp_path) == [name]
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_no_file(tmp_path, name, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(WRITERS[name], tmp_path)
    assert message == f"{tmp_path / name} cannot be written: No space left on device"
    assert files_of(tmp_path) == []


def test_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def note_rename(self, target):
        assert self.parent == target.parent
        assert self.read_bytes() == b"text"
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    results.write_node_log(tmp_path, 0, "text")
    assert events == ["sync file", "rename", "sync folder"]


def test_missing_folder_is_refused(tmp_path):
    message = refusal(results.write_summary, tmp_path / "gone", SUMMARY)
    path = tmp_path / "gone" / "summary.json"
    assert message == f"{path} cannot be written: No such file or directory"


@pytest.mark.parametrize("name", READERS)
def test_missing_file_is_refused(tmp_path, name):
    message = refusal(READERS[name], tmp_path)
    assert message == f"{tmp_path / name} cannot be read: No such file or directory"


# Short names of runs ----------------------------------------------------------------------------

IDS = ("20260101-120000-plain-68c5", "20260101-120001-fedavg-68d5", "20260202-120000-plain-0000")


@pytest.mark.parametrize(
    ("text", "index"),
    [(IDS[0], 0), ("68c5", 0), ("fedavg-68d5", 1), ("20260202", 2), ("20260101-120001", 1)],
)
def test_a_run_is_named_by_its_first_or_last_letters(text, index):
    assert meant(text, IDS, "runs") == IDS[index]


@pytest.mark.parametrize("text", ["", "5", "c5", "plain", "20270101", "68c5-", "../x"])
def test_what_is_like_no_run_names_none(text):
    assert meant(text, IDS, "runs") is None


def test_what_is_like_several_runs_is_refused():
    with pytest.raises(ConfigError, match=f"'20260101' may be any of {IDS[0]}, {IDS[1]} in runs"):
        meant("20260101", IDS, "runs")
    with pytest.raises(ConfigError, match=f"{IDS[2]} and 4 more in runs"):
        meant("2026", [*IDS, *(one.replace("12", "11") for one in IDS), "20260101-0"], "runs")


def test_an_id_that_another_one_begins_with_is_itself():
    assert meant("a-1", ["a-1", "a-1-b-a-1"], "runs") == "a-1"


def test_a_run_is_found_in_its_output(tmp_path):
    for name in (*IDS, "other"):
        (tmp_path / name).mkdir()
    assert find_run("68c5", tmp_path) == tmp_path / IDS[0]
    assert find_run(tmp_path / IDS[1], tmp_path) == tmp_path / IDS[1]
    assert find_run("nothing", tmp_path) == Path("nothing")
    assert find_run("68c5", tmp_path / "nowhere") == Path("68c5")
    assert find_run("x/68c5", tmp_path) == Path("x/68c5")
