"""Registry[T]: find plugins without importing them, load one, check it and its parameters.

A plugin is an entry point of the group `aiosgd.<kind>s`. Listing reads metadata only; loading
imports one name and checks that it is a concrete subclass of its kind's base class. A plugin's
parameters are the fields of its nested frozen dataclass `Params`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Generic, Literal, TypeVar, Union

from aiosgd.errors import (
    AiosgdError,
    ConfigError,
    PluginConflictError,
    PluginLoadError,
    PluginNotFoundError,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class NoParams:
    """The parameters of a plugin that has none."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One plugin as its distribution announces it; nothing is imported yet.

    `distribution` and `version` are what nodes compare before they accept a job.
    """

    kind: str
    name: str
    target: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.target}, from {self.distribution} {self.version})"


class Registry(Generic[T]):
    """The installed plugins of one kind.

    Args:
        kind: the kind in the singular, as users write it: `codec`, `model`, ….
        base: the class that every plugin of this kind derives from.
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self.group = group_of(kind)
        self._loaded: dict[str, type[T]] = {}

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {self.base.__name__})"

    def entries(self) -> list[Entry]:
        """List what is installed, sorted by name, clashing names included."""
        found = {
            Entry(self.kind, point.name, point.value, *_distribution(point.dist))
            for point in _entry_points(self.group)
        }
        return sorted(found, key=lambda entry: (entry.name, entry.distribution))

    def entry(self, name: str) -> Entry:
        """Return the one plugin of that name.

        Raises:
            PluginNotFoundError: nobody offers it; the message suggests the nearest name.
            PluginConflictError: two distributions offer it; the message names both.
        """
        entries = self.entries()
        matches = [entry for entry in entries if entry.name == name]
        if not matches:
            known = sorted({entry.name for entry in entries})
            raise PluginNotFoundError(
                f"no {self.kind} is named {name!r}{nearest(name, known)}; "
                f"installed: {', '.join(known) or 'none'}"
            )
        if len(matches) > 1:
            owners = " and ".join(
                f"{entry.distribution} {entry.version} ({entry.target})" for entry in matches
            )
            raise PluginConflictError(
                f"{self.kind} {name!r} is claimed by {owners}; uninstall one of them"
            )
        return matches[0]

    def load(self, name: str) -> type[T]:
        """Import the plugin of that name and check what it is.

        Raises:
            PluginNotFoundError, PluginConflictError: as `entry`.
            PluginLoadError: the import failed, or the object is not a concrete subclass of the
                kind's base class; the message names group, entry, distribution and cause.
        """
        if name not in self._loaded:
            entry = self.entry(name)
            self._loaded[name] = self.check(_import(entry), str(entry))
        return self._loaded[name]

    def check(self, plugin: object, origin: str) -> type[T]:
        """Return `plugin` if it is a usable class of this kind, or raise PluginLoadError."""
        expected = f"{self.base.__module__}.{self.base.__qualname__}"
        if not (isinstance(plugin, type) and issubclass(plugin, self.base)):
            raise PluginLoadError(
                f"{origin} is {_named(plugin)}; expected a subclass of {expected}"
            )
        if inspect.isabstract(plugin):
            missing = ", ".join(sorted(getattr(plugin, "__abstractmethods__", ())))
            raise PluginLoadError(f"{origin} does not implement {missing} of {expected}")
        params = params_class(plugin)
        if not _is_frozen_dataclass(params):
            raise PluginLoadError(
                f"{origin}: Params must be a frozen dataclass, not {_named(params)}"
            )
        return plugin


def _named(thing: object) -> str:
    # the module of a codec from a file has a name that no user has seen
    return thing.__qualname__ if isinstance(thing, type) else repr(thing)


def _is_frozen_dataclass(params: object) -> bool:
    description = getattr(params, "__dataclass_params__", None)
    return isinstance(params, type) and description is not None and description.frozen


@functools.cache
def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    """Read the installed metadata once per process and group."""
    return tuple(metadata.entry_points(group=group))


@functools.cache
def _distribution(found: metadata.Distribution | None) -> tuple[str, str]:
    """Return name and version; each look reads the whole of the metadata, README included."""
    return ("?", "?") if found is None else (found.name, found.version)


def group_of(kind: str) -> str:
    """Return the entry points' group of a kind: its plural."""
    return f"aiosgd.{kind[:-1]}ies" if kind.endswith("y") else f"aiosgd.{kind}s"


def _import(entry: Entry) -> object:
    point = metadata.EntryPoint(entry.name, entry.target, group_of(entry.kind))
    try:
        return point.load()
    # a plugin's module may raise or exit in any way; it must not take the program with it
    except (Exception, SystemExit) as error:
        raise PluginLoadError(f"{entry} cannot be loaded: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Return an exception's type and message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_text(error: BaseException) -> str:
    """Return what to say of an error: a deliberate one speaks for itself."""
    return str(error) if isinstance(error, AiosgdError) else describe(error)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean 'x'?)` for a near miss, else an empty string."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


# Parameters ---------------------------------------------------------------------------------


def params_class(plugin: type) -> type:
    """Return the plugin's `Params`, or `NoParams`."""
    return typing.cast("type", getattr(plugin, "Params", NoParams))


def make_params(plugin: type, values: Mapping[str, Any], place: str) -> Any:
    """Build the plugin's `Params` from a job's values.

    Args:
        plugin: a plugin class with a nested frozen dataclass `Params`, or without.
        values: parameter name -> value, as TOML gives them.
        place: where the values stand, for messages: `codec`, `model`, ….

    Raises:
        ConfigError: an unknown name, a wrong type, a missing value, or a value that the
            plugin's own `__post_init__` refuses with ValueError.
    """
    return make_dataclass(params_class(plugin), values, place, f"{plugin.__name__}")


def make_dataclass(cls: type, values: Mapping[str, Any], place: str, owner: str) -> Any:
    """Build the dataclass `cls` from plain values, checked field by field; raises ConfigError."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise ConfigError(
                f"{place}.{name}: {owner} has no such parameter"
                f"{nearest(name, list(fields))}; it has: {known}"
            )
        checked[name] = check_value(value, hints[name], f"{place}.{name}")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            raise ConfigError(f"{place}.{name}: {owner} needs this parameter; it has no default")
    try:
        return cls(**checked)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def check_value(value: Any, expected: Any, place: str) -> Any:
    """Return `value` as the annotated type `expected`, or raise ConfigError.

    An int passes for a float; nothing else is converted. Lists become tuples where the
    annotation says tuple.
    """
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return _check_union(value, args, place)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        choices = ", ".join(map(repr, args))
        hint = nearest(value, [str(arg) for arg in args]) if isinstance(value, str) else ""
        raise ConfigError(f"{place} is {value!r}; expected one of {choices}{hint}")
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place} is {value!r}; expected a list")
        kinds = _item_types(origin, args, value, place)
        items = [
            check_value(item, kind, f"{place}[{i}]")
            for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
        ]
        return typing.cast("type", origin)(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} is {value!r}; expected a table")
        return {k: check_value(v, args[1], f"{place}.{k}") for k, v in value.items()}
    if expected is Any:
        return value
    return _check_plain(value, types.NoneType if expected is type(None) else expected, place)


def _check_plain(value: Any, expected: Any, place: str) -> Any:
    if reader := getattr(expected, "from_value", None):  # a type that reads itself
        return reader(value, place)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{place} is {value!r}; expected {type_name(expected)}")
    return value


def _item_types(origin: Any, args: Sequence[Any], value: Sequence[Any], place: str) -> list[Any]:
    if origin is list or args[-1] is Ellipsis:
        return [args[0]] * len(value)
    if len(value) != len(args):
        raise ConfigError(f"{place} is {value!r}; expected a list of {len(args)} values")
    return list(args)


def _check_union(value: Any, members: Sequence[Any], place: str) -> Any:
    for member in members:
        try:
            return check_value(value, member, place)
        except ConfigError:
            continue
    expected = " or ".join(type_name(member) for member in members if member is not types.NoneType)
    raise ConfigError(f"{place} is {value!r}; expected {expected}")


def type_name(annotation: Any) -> str:
    """Return an annotation as users read it: `a number`, `a list of numbers`, `'a' or 'b'`."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple):
        if origin is tuple and args[-1] is not Ellipsis:
            return f"a list of {len(args)} values"
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return "a table"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args if arg is not types.NoneType)
    return str(getattr(annotation, "read_as", getattr(annotation, "__name__", annotation)))


def _plural(annotation: Any) -> str:
    words = type_name(annotation)
    if words.startswith("a list of "):
        return words.replace("a list", "lists", 1)
    singular = words in ("a whole number", "a number", "a string")
    return f"{words.removeprefix('a ')}s" if singular else words
