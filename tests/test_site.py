"""The site builds without a warning, and its pages load nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("material")
pytestmark = pytest.mark.extra

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs/studies/pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_there(site):
    built = {path.stem for path in site.glob("*.html")} - {"404"}
    assert built == {path.stem for path in (ROOT / "docs").glob("*.md")}


def test_nothing_is_loaded_from_elsewhere(site, pages):
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 10
    assert {path.name: found for path in files if (found := pages.loads(path))} == {}


def test_public_names_are_in_the_reference(site):
    text = (site / "reference.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="(aiosgd[\w.]*)"', text))
    for name in ("Codec.update", "Context.neighbours", "Envelope", "aio.submit", "Result"):
        assert f"aiosgd.{name}" in anchors


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://a/b.js"></script>', ["https://a/b.js"]),
        ("a.html", "<link href=//fonts/x>", ["//fonts/x"]),
        ("a.html", "<IMG SRC='HTTP://a/b'>", ["HTTP://a/b"]),
        ("a.html", '<a href="https://a/">read</a><img src="b.png">', []),
        ("a.css", "@import 'https://a/b.css'; x { background: url(//c/d) }", 2),
        ("a.css", "x { background: url(data:image/png;base64,/) }", []),
        ("a.js", 'import "https://a/b.js"', []),
    ],
)
def test_what_a_page_loads_is_seen(pages, tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    loads = pages.loads(tmp_path / name)
    assert loads == found or len(loads) == found


def test_links_to_the_code_become_text_but_not_in_code(pages):
    text = (
        "[a](../x.py) [b](studies/b.py) [c](c.md)\n```text\n[a](../x.py)\n```\n[d](../README.md#e)"
    )
    assert pages.on_page_markdown(text) == "a b [c](c.md)\n```text\n[a](../x.py)\n```\nd"
