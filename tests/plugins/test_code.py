"""Code that a job names: what counts as a name, and who may have it loaded."""

import subprocess
import sys

import pytest

from aiosgd.errors import ConfigError, PluginLoadError
from aiosgd.plugins.code import Code, call, is_file
from aiosgd.plugins.registry import check_value, type_name


@pytest.mark.parametrize(
    "text", ["pkg.nets:make", "nets.py:make", "../a b/nets.py:Make", "a.py:b.py:c"]
)
def test_a_module_or_a_file_and_a_name_are_code(text):
    code = check_value(text, Code, "model.factory")
    assert code == Code(text)
    assert not code.is_allowed
    assert is_file(text) == (".py" in text)


@pytest.mark.parametrize(
    "value", ["", "nets", "nets:", ":make", "nets:make()", "nets:a.b", 3, None, ["a:b"]]
)
def test_whatever_else_is_refused_with_its_place(value):
    with pytest.raises(ConfigError) as caught:
        check_value(value, Code, "model.factory")
    expected = "expected MODULE:NAME or FILE.py:NAME"
    assert str(caught.value) == f"model.factory is {value!r}; {expected}"


def test_users_read_what_it_is():
    assert type_name(Code) == "MODULE:NAME or FILE.py:NAME"


def test_nothing_is_imported_without_leave(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('it ran')")
    for text in (f"{trap}:make", "subprocess:run"):
        with pytest.raises(PluginLoadError, match="may not be run here"):
            Code(text).load("model.factory")


def test_a_module_is_imported_by_its_name():
    assert Code("subprocess:run").allowed().load("model.factory") is subprocess.run


def test_a_file_is_loaded_from_where_it_is_under_the_users_name(tmp_path):
    kept = tmp_path / "codec_0.py"
    kept.write_text("def make():\n    return 1 / 0\n")
    make = Code("mine/nets.py:make").allowed(kept).load("model.factory")
    with pytest.raises(ZeroDivisionError) as caught:
        make()
    assert caught.traceback[-1].frame.code.raw.co_filename == "mine/nets.py"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("no.py:make", ConfigError, "model.factory 'no.py:make': there is no file no.py"),
        (
            "no_such_package.nets:make",
            PluginLoadError,
            (
                "model.factory 'no_such_package.nets:make' cannot be loaded: ModuleNotFoundError: No "
                "module named 'no_such_package'; install it, add its folder to PYTHONPATH, or give "
                "FILE.py:NAME"
            ),
        ),
        (
            "subprocess:walk",
            PluginLoadError,
            "model.factory 'subprocess:walk': subprocess has no 'walk'",
        ),
    ],
)
def test_what_is_missing_is_one_clear_line(text, error, message):
    with pytest.raises(error) as caught:
        Code(text).allowed().load("model.factory")
    assert str(caught.value) == message


def test_only_functions_are_called_and_what_they_raise_is_named():
    assert Code("subprocess:run").allowed().function("model.factory") is subprocess.run
    with pytest.raises(PluginLoadError) as caught:
        Code("subprocess:PIPE").allowed().function("model.factory")
    assert str(caught.value) == "model.factory 'subprocess:PIPE' is -1; expected a function"

    def leave(text):
        raise SystemExit(text)

    assert call("the function", int, "12", base=3) == 5
    with pytest.raises(PluginLoadError, match=r"^the function failed: SystemExit: 3$"):
        call("the function", leave, "3")
    with pytest.raises(ConfigError, match=r"^no such file$"):
        call("the function", _refuse)


def _refuse():
    raise ConfigError("no such file")


def test_a_file_that_fails_is_named_and_leaves_no_module(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("import no_such_library")
    before = set(sys.modules)
    with pytest.raises(
        PluginLoadError, match=r"nets\.py:make' cannot be loaded: ModuleNotFoundError"
    ) as caught:
        Code(f"{path}:make").allowed().load("model.factory")
    assert "PYTHONPATH" not in str(caught.value)  # the file is there; what it imports is not
    assert set(sys.modules) == before
