"""The command without what it needs, and with what cannot be."""

import sys

import pytest

from aiosgd import cli


@pytest.fixture
def aiosgd(monkeypatch, capsys, tmp_path):
    (tmp_path / "cluster.toml").write_text('workers = ["127.0.0.1:9001"]\n')
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["aiosgd", "dashboard", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("name", ["starlette.applications", "uvicorn"])
def test_without_the_extra_the_line_says_what_to_install(aiosgd, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "aiosgd.dashboard.server", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    assert aiosgd("cluster.toml") == (
        2,
        "",
        "aiosgd: the dashboard needs Starlette and uvicorn: pip install 'aiosgd[dashboard]'\n",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.toml"], "nowhere.toml cannot be read"),
        (["cluster.toml", "--host", "0.0.0.0"], "--host is 0.0.0.0; the dashboard is for this"),
        (["cluster.toml", "--host", "example.org"], "ssh -L"),
        (["cluster.toml", "--port", "70000"], "--port is 70000; a port is 0..65535"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(aiosgd, words, said):
    code, out, error = aiosgd(*words)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert said in error
