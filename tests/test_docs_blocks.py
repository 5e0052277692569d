"""Every code block of README.md and of the pages in docs/ runs, or says why it does not."""

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "studies"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def _load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", STUDIES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks = _load("blocks")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def runnable(page):
    found = [block for block in blocks.blocks_of(page) if block.language in blocks.RUNNABLE]
    return [block for block in found if "not run" not in block.marks]


def missing(extra):
    """Return what an extra needs and is not installed."""
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in EXTRAS[extra]]
    return [name for name in names if not _is_installed(name)]


def _is_installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(page, folder, extras):
    with blocks.Workspace(folder) as workspace:
        for block in runnable(page):
            if "extra" not in block.marks or extras:
                workspace.run(block)


PLAIN = [page for page in PAGES if any("extra" not in block.marks for block in runnable(page))]
WITH_EXTRAS = [page for page in PAGES if any("extra" in block.marks for block in runnable(page))]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.stem)
def test_every_block_that_can_run_does(page, tmp_path):
    run(page, tmp_path, extras=False)


@pytest.mark.extra
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", WITH_EXTRAS, ids=lambda page: page.stem)
def test_every_block_that_needs_an_extra_runs_too(page, tmp_path):
    extras = {block.marks["extra"] for block in runnable(page) if "extra" in block.marks}
    if lacking := [name for extra in extras for name in missing(extra)]:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    run(page, tmp_path, extras=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_known_kind_and_every_reason_is_given(page):
    for block in blocks.blocks_of(page):
        assert block.language in blocks.RUNNABLE + blocks.SHOWN, block.place
        assert block.marks.get("not run") != "", block.place
        assert block.marks.get("extra", "dev") in EXTRAS, block.place


# The runner itself ----------------------------------------------------------------------------


def page_of(folder, text):
    path = folder / "page.md"
    path.write_text(text)
    return path


def attempt(folder, text):
    run(page_of(folder, text), folder, extras=False)


GOOD = """
```python title="said.py"
print("said 12.5 s")
```

<!-- not run: it cannot -->
```console
$ false
```

```python
import said
```

<!-- continued -->
```python
said.x = 1
```

```console
$ python said.py
said 3 s
$ python said.py; echo two; exit 3
said …
…
exit code 3
$ ls /nowhere
ls: cannot access '/elsewhere': …
exit code 2
```

```toml
x = 1
```
"""


def test_a_good_page_runs(tmp_path):
    attempt(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```console\n$ echo one\ntwo\n```", "page.md:1: `echo one` prints something else"),
        ("\n```console\n$ false\n```", "page.md:2: `false` ended with exit code 1, not 0"),
        ("```console\n$ true\nexit code 1\n```", "`true` ended with exit code 0, not 1"),
        ("```console\necho\n```", "begins with `\\$ `"),
        ("```python\nraise ValueError('no')\n```", "ValueError: no"),
        ("```python\ndef test_it():\n    assert 1 == 2\n```", "assert 1 == 2"),
        ("```python title='x.py'\nx\n```", "NameError"),
        ("```sh\ntrue\nfalse  # really\n```", "`false  # really` ended with exit code 1"),
        ("```sh\ntrue\n", "without an end"),
    ],
)
def test_a_page_that_says_something_else_is_found(tmp_path, text, message):
    with pytest.raises(blocks.BlockError, match=message):
        attempt(tmp_path, text)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 0.5, 12 s", "loss 0.25, 1,234 s", True),
        ("loss 0.5", "accuracy 0.5", False),
        ("in runs/20261123-071524-a-b-7c2e", "in runs/20270101-000000-plain-0000", True),
        ("reads /a/b/c.py", "reads /d", True),
        ("samples/s", "samples/m", False),
        ("a\n…\nb", "a\n1\n2\nb", True),
        ("a\n…\nb", "a\nb", True),
        ("a\n…\nb", "a\nb\nc", False),
        ("x: … ok", "x: whatever ok", True),
        ("-1.5  2", "1   2", True),
    ],
)
def test_numbers_ids_and_paths_are_masked_and_nothing_else(shown, printed, same):
    assert blocks.agrees(shown, printed) is same


def test_ports_are_free_ones_and_what_is_started_beside_is_stopped(tmp_path):
    stay = '```python title="stay.py"\nimport time\nprint("up")\ntime.sleep(1000)\n```\n\n'
    text = stay + "```console\n$ echo 9001 9002 > ports\n$ python stay.py &\n```"
    with blocks.Workspace(tmp_path) as workspace:
        for block in blocks.blocks_of(page_of(tmp_path, text)):
            workspace.run(block)
        first, second = (workspace.folder / "ports").read_text().split()
        (process,) = workspace._background
    assert len({"9001", "9002", first, second}) == 4
    assert process.returncode == -15


def test_what_is_shown_can_be_mended(tmp_path):
    page = page_of(tmp_path, "```console\n$ echo one; echo 'epoch 3, step 1/2: x'\ntwo\n```\n")
    (tmp_path / "space").mkdir()
    with blocks.Workspace(tmp_path / "space", differs=lambda *told: found.append(told)) as space:
        found = []
        space.run(blocks.blocks_of(page)[0])
    ((_, command, printed),) = found
    blocks.mend(page, command, printed)
    assert page.read_text() == "```console\n$ echo one; echo 'epoch 3, step 1/2: x'\none\n```\n"


def test_progress_is_left_out_of_what_is_shown():
    printed = "job a: running\nworker 0: epoch 1, x\nepoch 2, step 3/4: x\njob a: done\n"
    assert blocks.abridged(printed) == "job a: running\n…\njob a: done\n"
