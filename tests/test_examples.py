"""The examples run, say what they show, and show it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiosgd.testing import assert_codec

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py"))


def run(name, folder, *options):
    """Run an example in an empty folder and return what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(printed):
    """Return the rows of a printed table: what is before the numbers -> the numbers."""
    rows = re.findall(r"^(\S.*?) +((?:[\d.]+ +)*[\d.]+)$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_its_header_has_the_command_that_runs_it(path):
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    commands = re.findall(r"^    (?:python|aiosgd) .*", header, re.MULTILINE)
    assert any(f"examples/{path.name}" in command for command in commands)


def statements(source):
    """Return code without its docstrings, as far as it matters to Python."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(ast.Constant(str())), *others]:
                node.body = others
    return ast.unparse(tree)


def test_the_codec_in_one_file_is_that_of_the_page():
    page = (EXAMPLES.parent / "docs" / "codec.md").read_text(encoding="utf-8")
    *_, final = re.findall(r'```python title="my_codec.py"\n(.*?)```', page, re.DOTALL)
    assert statements(final) == statements((EXAMPLES / "dpsgd.py").read_text(encoding="utf-8"))


def test_the_codec_in_one_file_passes_its_check():
    assert_codec(f"{EXAMPLES / 'dpsgd.py'}:DPsgd", workers=3, seeds=20)


def test_scaffold_is_ahead_where_clients_have_a_few_digits_only(tmp_path):
    printed = run("federated.py", tmp_path, "--epochs", "20")
    found = dict(re.findall(r"^(\w+) +accuracy ([\d.]+)", printed, re.MULTILINE))
    assert list(found) == ["fedavg", "fedprox", "scaffold"]
    assert float(found["scaffold"]) > float(found["fedavg"])


def test_a_job_survives_a_kill_with_the_same_bits(tmp_path):
    printed = run("survive_a_kill.py", tmp_path)
    assert "killed the worker at 127.0.0.1:" in printed
    assert printed.endswith("the same bits as without the kill\n")


def test_compression_saves_bytes_and_one_page_compares(tmp_path):
    printed = run("compression_sweep.py", tmp_path, "--epochs", "10")
    rows = table(printed)
    sent = [megabytes for _, megabytes, _ in rows.values()]
    assert len(sent) == 5
    assert sent[0] > 1.9 * sent[1] > 3 * sent[2] > 3 * sent[3]
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert all(run.name in page for run in (tmp_path / "runs").iterdir())


def test_stragglers_cost_sync_training_more(tmp_path):
    rows = table(run("stragglers.py", tmp_path))
    fast, slow, asynchronous = (seconds for seconds, *_ in rows.values())
    assert slow > 5 * fast
    assert asynchronous < slow / 2


@pytest.mark.extra
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_ALLOW_INSECURE_WRITES", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources=resources
    ).execute()
    (outcome,) = notebook.cells[-1]["outputs"]
    assert "accuracy" in outcome["data"]["text/plain"]
