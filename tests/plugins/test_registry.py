import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, Optional, Union

import pytest

from aiosgd.errors import (
    ConfigError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    PluginNotFoundError,
)
from aiosgd.plugins import registry
from aiosgd.plugins.registry import (
    Entry,
    NoParams,
    Registry,
    check_value,
    describe,
    make_dataclass,
    make_params,
    nearest,
    params_class,
    type_name,
)


class Gadget(ABC):
    """A kind of plugin that only these tests have."""

    @abstractmethod
    def turn(self):
        pass

    @abstractmethod
    def tell(self):
        pass


class Whole(Gadget):
    def turn(self):
        pass

    def tell(self):
        pass


class Half(Gadget):
    def turn(self):
        pass


class Mutable(Whole):
    class Params:
        speed = 1


not_a_class = 3
HERE = __name__


@pytest.fixture
def gadgets():
    return Registry("gadget", Gadget)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with entry points, as pip would."""
    registry._entry_points.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "gadgets_of_the_test", sys.modules[HERE])
    known = set(sys.modules)

    def put(distribution, version, points, group="aiosgd.gadgets", **modules):
        info = tmp_path / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()

    yield put
    registry._entry_points.cache_clear()
    for name in set(sys.modules) - known:
        del sys.modules[name]


TARGET = "gadgets_of_the_test:Whole"


# listing --------------------------------------------------------------------------------------


def test_nothing_installed_is_an_empty_list(gadgets, install):
    assert gadgets.entries() == []
    with pytest.raises(PluginNotFoundError, match=r"^no gadget is named 'x'; installed: none$"):
        gadgets.load("x")


def test_listing_names_what_is_installed_and_imports_nothing(gadgets, install):
    install("zoo", "1.2", {"spinner": "absent_module:Spinner", "anvil": "absent_module:Anvil"})
    install("other", "3.0", {"crank": "absent_module:Crank"}, group="aiosgd.widgets")
    assert gadgets.entries() == [
        Entry("gadget", "anvil", "absent_module:Anvil", "zoo", "1.2"),
        Entry("gadget", "spinner", "absent_module:Spinner", "zoo", "1.2"),
    ]
    assert "absent_module" not in sys.modules
    assert str(gadgets.entries()[0]) == "gadget 'anvil' (absent_module:Anvil, from zoo 1.2)"


def test_clashing_names_are_listed_in_the_order_of_their_distributions(gadgets, install):
    for name in "daceb":
        install(name, "1", {"spinner": TARGET})
    assert [entry.distribution for entry in gadgets.entries()] == list("abcde")


def test_an_entry_point_without_a_distribution_is_listed(gadgets, monkeypatch):
    point = metadata.EntryPoint("lone", TARGET, "aiosgd.gadgets")
    monkeypatch.setattr(registry, "_entry_points", lambda group: (point,))
    assert gadgets.entries() == [Entry("gadget", "lone", TARGET, "?", "?")]


def test_a_distribution_that_is_found_twice_is_one(gadgets, install, tmp_path, monkeypatch):
    install("zoo", "1.2", {"spinner": TARGET})
    monkeypatch.syspath_prepend(str(tmp_path / ".." / tmp_path.name))
    assert gadgets.entry("spinner").distribution == "zoo"


# finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spiner", "Spinner", "spinner2", "pinner"])
def test_a_near_miss_suggests_the_nearest_name(gadgets, install, name):
    install("zoo", "1", {"spinner": TARGET, "anvil": TARGET})
    with pytest.raises(PluginNotFoundError) as caught:
        gadgets.entry(name)
    assert str(caught.value) == (
        f"no gadget is named {name!r} (did you mean 'spinner'?); installed: anvil, spinner"
    )


def test_a_far_miss_suggests_nothing(gadgets, install):
    install("zoo", "1", {"spinner": TARGET})
    with pytest.raises(PluginNotFoundError, match=r"named 'tractor'; installed: spinner$"):
        gadgets.entry("tractor")


@pytest.mark.parametrize("first", ["aaa", "zzz"])
def test_a_name_claimed_twice_names_both_whatever_the_order(gadgets, install, first):
    second = {"aaa": "zzz", "zzz": "aaa"}[first]
    install(first, "1.0", {"spinner": "m:First", "anvil": TARGET})
    install(second, "2.0", {"spinner": "m:Second"})
    targets = {first: "1.0 (m:First)", second: "2.0 (m:Second)"}
    with pytest.raises(PluginConflictError) as caught:
        gadgets.load("spinner")
    assert str(caught.value) == (
        f"gadget 'spinner' is claimed by aaa {targets['aaa']} and zzz {targets['zzz']}; "
        "uninstall one of them"
    )
    assert [entry.name for entry in gadgets.entries()] == ["anvil", "spinner", "spinner"]
    assert gadgets.load("anvil") is Whole


# loading --------------------------------------------------------------------------------------


def test_a_plugin_is_imported_once(gadgets, install):
    code = "from gadgets_of_the_test import Whole\nclass Spinner(Whole):\n    pass\n"
    install("zoo", "1", {"spinner": "spinner_module:Spinner"}, spinner_module=code)
    loaded = gadgets.load("spinner")
    assert loaded.__name__ == "Spinner"
    del sys.modules["spinner_module"]
    assert gadgets.load("spinner") is loaded
    assert "spinner_module" not in sys.modules


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line second line"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("raise SystemExit", "SystemExit"),
        ("import surely_not_installed", "ModuleNotFoundError: No module named 'surely_not_"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("Other = 1", "AttributeError: module 'broken_module' has no attribute 'Spinner'"),
    ],
)
def test_a_broken_plugin_is_named_with_its_cause_and_breaks_no_other(gadgets, install, code, cause):
    install("zoo", "1.2", {"spinner": "broken_module:Spinner"}, broken_module=code)
    install("fine", "1", {"anvil": TARGET})
    with pytest.raises(PluginLoadError) as caught:
        gadgets.load("spinner")
    message = str(caught.value)
    place = "gadget 'spinner' (broken_module:Spinner, from zoo 1.2) cannot be loaded: "
    assert message.startswith(place + cause)
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert gadgets.load("anvil") is Whole


def test_an_interrupt_while_importing_is_no_fault_of_the_plugin(gadgets, install):
    code = "raise KeyboardInterrupt"
    install("zoo", "1", {"spinner": "interrupted_module:Spinner"}, interrupted_module=code)
    with pytest.raises(KeyboardInterrupt):
        gadgets.load("spinner")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("not_a_class", r"is 3; expected a subclass of .*Gadget$"),
        ("HERE", r"is '.*'; expected a subclass of .*Gadget$"),
        ("Entry", r"is Entry; expected a subclass of .*Gadget$"),
        ("Half", r"does not implement tell of .*Gadget$"),
        ("Gadget", r"does not implement tell, turn of .*Gadget$"),
        ("Mutable", r"Params must be a frozen dataclass, not Mutable\.Params$"),
    ],
)
def test_a_plugin_that_is_not_what_it_promises_is_refused(gadgets, install, target, message):
    install("zoo", "1.2", {"spinner": f"gadgets_of_the_test:{target}"})
    place = rf"^gadget 'spinner' \(gadgets_of_the_test:{target}, from zoo 1.2\):? "
    with pytest.raises(PluginLoadError, match=place + message):
        gadgets.load("spinner")


def test_a_class_from_elsewhere_is_checked_alike(gadgets):
    assert gadgets.check(Whole, "mine.py:Whole") is Whole
    with pytest.raises(PluginLoadError, match=r"^mine.py:Half does not implement tell"):
        gadgets.check(Half, "mine.py:Half")


def test_every_fault_of_a_plugin_is_a_plugin_error():
    for error in (PluginNotFoundError, PluginConflictError, PluginLoadError):
        assert issubclass(error, PluginError)


def test_the_registry_shows_its_kind(gadgets):
    assert repr(gadgets) == "Registry('gadget', Gadget)"
    assert gadgets.group == "aiosgd.gadgets"


# parameters -----------------------------------------------------------------------------------


class Tunable:
    @dataclass(frozen=True)
    class Params:
        turn: int = 150
        rate: float = 0.5
        name: str = "x"
        sizes: tuple[int, ...] = (1, 2)
        extra: dict[str, float] = field(default_factory=dict)
        derived: int = field(default=0, init=False)

        def __post_init__(self):
            if self.turn < 1:
                raise ValueError(f"turn is {self.turn}; expected 1 or more")


class Demanding:
    @dataclass(frozen=True)
    class Params:
        path: str
        other: list[str] = field(default_factory=list)


def test_parameters_have_their_defaults():
    assert make_params(Tunable, {}, "codec") == Tunable.Params()


def test_parameters_are_taken_and_converted():
    values = {"turn": 3, "rate": 2, "sizes": [4, 5], "extra": {"a": 1}}
    params = make_params(Tunable, values, "codec")
    assert params == Tunable.Params(3, 2.0, "x", (4, 5), {"a": 1.0})
    assert type(params.rate) is float
    assert type(params.sizes) is tuple


@pytest.mark.parametrize(
    ("plugin", "values", "message"),
    [
        (
            Tunable,
            {"trun": 3},
            "codec.trun: Tunable has no such parameter (did you mean 'turn'?); it has: turn, rate, ",
        ),
        (Tunable, {"derived": 3}, "codec.derived: Tunable has no such parameter; it has: turn,"),
        (Tunable, {"turn": "3"}, "codec.turn is '3'; expected a whole number"),
        (Tunable, {"sizes": [1, "2"]}, "codec.sizes[1] is '2'; expected a whole number"),
        (Tunable, {"extra": {"a": "b"}}, "codec.extra.a is 'b'; expected a number"),
        (Tunable, {"turn": 0}, "codec: turn is 0; expected 1 or more"),
        (Demanding, {}, "codec.path: Demanding needs this parameter; it has no default"),
        (Whole, {"turn": 3}, "codec.turn: Whole has no such parameter; it has: none"),
    ],
)
def test_wrong_parameters_are_told_with_place_value_and_expectation(plugin, values, message):
    with pytest.raises(ConfigError) as caught:
        make_params(plugin, values, "codec")
    assert str(caught.value).startswith(message)


def test_a_plugin_without_parameters_has_none():
    assert params_class(Whole) is NoParams
    assert make_params(Whole, {}, "codec") == NoParams()


def test_any_dataclass_is_made_the_same_way():
    params = make_dataclass(Demanding.Params, {"path": "p", "other": ["q"]}, "job", "the job")
    assert params == Demanding.Params("p", ["q"])
    with pytest.raises(
        ConfigError, match=r"job\.pth: the job has no such parameter \(did you mean"
    ):
        make_dataclass(Demanding.Params, {"pth": "p"}, "job", "the job")


@pytest.mark.parametrize(
    ("value", "expected", "result"),
    [
        (3, int, 3),
        (-1, int, -1),
        (0.5, float, 0.5),
        (3, float, 3.0),
        ("x", str, "x"),
        (True, bool, True),
        (None, type(None), None),
        ([1], Any, [1]),
        (b"x", bytes, b"x"),
        ("a", Literal["a", "b"], "a"),
        (2, Literal[1, 2], 2),
        (True, Literal[True, "auto"], True),
        (None, int | None, None),
        (3, int | None, 3),
        (3, Optional[float], 3.0),  # noqa: UP045 (both spellings must work)
        ("auto", Union[int, Literal["auto"]], "auto"),  # noqa: UP007
        (3, float | str, 3.0),
        ("3", float | str, "3"),
        ([], list[int], []),
        ([1, 2], list[int], [1, 2]),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([[1], [2, 3]], list[tuple[int, ...]], [(1,), (2, 3)]),
        ([1, None], list[int | None], [1, None]),
        ({}, dict[str, int], {}),
        ({"a": [1]}, dict[str, tuple[float, ...]], {"a": (1.0,)}),
    ],
)
def test_a_value_of_the_annotated_type_passes(value, expected, result):
    checked = check_value(value, expected, "p")
    assert checked == result
    assert type(checked) is type(result)
    if isinstance(result, list | tuple):
        assert [type(item) for item in checked] == [type(item) for item in result]


@pytest.mark.parametrize(
    ("value", "expected", "message"),
    [
        (True, int, "p is True; expected a whole number"),
        (1.0, int, "p is 1.0; expected a whole number"),
        (True, float, "p is True; expected a number"),
        ("1", float, "p is '1'; expected a number"),
        (1, str, "p is 1; expected a string"),
        (1, bool, "p is 1; expected true or false"),
        ("none", type(None), "p is 'none'; expected NoneType"),
        ("x", bytes, "p is 'x'; expected bytes"),
        ("sinc", Literal["sync", "async"], "p is 'sinc'; expected one of 'sync', 'async' (did"),
        (1, Literal["sync"], "p is 1; expected one of 'sync'"),
        (True, Literal[1, 2], "p is True; expected one of 1, 2"),
        ("x", int | None, "p is 'x'; expected a whole number"),
        (None, int | str, "p is None; expected a whole number or a string"),
        ([1], int | Literal["a"], "p is [1]; expected a whole number or 'a'"),
        (1, list[int], "p is 1; expected a list"),
        ("ab", tuple[str, ...], "p is 'ab'; expected a list"),
        ([1, 2.5], list[int], "p[1] is 2.5; expected a whole number"),
        ([[1], ["x"]], list[list[int]], "p[1][0] is 'x'; expected a whole number"),
        ([1], dict[str, int], "p is [1]; expected a table"),
        ({"a": 1, "b": "x"}, dict[str, int], "p.b is 'x'; expected a whole number"),
        ({}, list[int], "p is {}; expected a list"),
        ("x", list[int] | float, "p is 'x'; expected a list of whole numbers or a number"),
    ],
)
def test_a_value_of_another_type_is_refused(value, expected, message):
    with pytest.raises(ConfigError) as caught:
        check_value(value, expected, "p")
    assert str(caught.value).startswith(message)


# words ----------------------------------------------------------------------------------------


def test_nearest_needs_a_name_that_is_near():
    assert nearest("plan", ["plain", "fedavg"]) == " (did you mean 'plain'?)"
    assert nearest("plan", []) == ""
    assert nearest("zzz", ["plain"]) == ""


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (list[int], "a list of whole numbers"),
        (tuple[str, ...], "a list of strings"),
        (list[float], "a list of numbers"),
        (list[list[int]], "a list of lists of whole numbers"),
        (list[int | None], "a list of whole numbers"),
        (list[Literal["a", "b"]], "a list of 'a' or 'b'"),
        (tuple[int, str], "a list of 2 values"),
        (Literal["a", 1], "'a' or 1"),
        (float | None, "a number"),
        (int | list[bool], "a whole number or a list of true or false"),
        (bytes, "bytes"),
        (Any, "Any"),
    ],
)
def test_types_are_named_in_words(annotation, words):
    assert type_name(annotation) == words


def test_an_exception_is_described_on_one_line():
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(ValueError()) == "ValueError"


def test_a_tuple_of_different_types_is_checked_one_by_one():
    assert check_value([1, "a"], tuple[int, str], "here") == (1, "a")
    with pytest.raises(ConfigError, match=r"here\[1\] is 2; expected a string"):
        check_value([1, 2], tuple[int, str], "here")
    with pytest.raises(ConfigError, match="expected a list of 2 values"):
        check_value([1], tuple[int, str], "here")


def test_params_that_can_change_are_refused():
    @dataclass
    class Loose:
        turn: int = 1

    plugin = type("Loose", (Whole,), {"Params": Loose})
    with pytest.raises(PluginLoadError, match=r"must be a frozen dataclass, not test_.*\.Loose$"):
        Registry("codec", Gadget).check(plugin, "codec 'loose'")
