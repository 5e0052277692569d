"""What is installed is what pyproject.toml says."""

import importlib
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from aiosgd.plugins.kinds import KINDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = PROJECT["entry-points"]


def test_every_kind_has_a_group_and_every_group_a_kind():
    assert {registry.group for registry in KINDS.values()} == set(GROUPS) - {"pytest11"}


@pytest.mark.parametrize("group", GROUPS)
def test_installed_entry_points_are_those_of_pyproject(group):
    points = metadata.distribution("aiosgd").entry_points.select(group=group)
    assert {point.name: point.value for point in points} == GROUPS[group]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, r in KINDS.items() for name in GROUPS[r.group]],
)
def test_every_built_in_loads_and_explains_itself(kind, name):
    plugin = KINDS[kind].load(name)
    assert plugin.__doc__


def test_the_version_is_the_same_everywhere():
    assert metadata.version("aiosgd") == importlib.import_module("aiosgd").__version__


def test_public_names_resolve():
    package = importlib.import_module("aiosgd")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_dev_tools_are_an_extra():
    assert "dev" in PROJECT["optional-dependencies"]
    assert not any("pytest" in requirement for requirement in PROJECT["dependencies"])
