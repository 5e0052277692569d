"""What is installed, for `aiosgd plugins`: listing imports no plugin, showing imports one."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from aiosgd.codecs.base import Codec
from aiosgd.errors import ConfigError
from aiosgd.plugins.kinds import KINDS
from aiosgd.plugins.registry import Registry, nearest, params_class, type_name


def list_plugins(kind: str | None = None) -> list[dict[str, str]]:
    """Return kind, name, distribution, version and target of what is installed."""
    registries = [_registry(kind)] if kind else list(KINDS.values())
    return [dataclasses.asdict(entry) for registry in registries for entry in registry.entries()]


def describe_plugin(kind: str, name: str) -> dict[str, Any]:
    """Return what `plugins show` prints of one plugin.

    Raises:
        ConfigError: there is no such kind.
        PluginError: there is no such plugin, or it is broken.
    """
    registry = _registry(kind)
    entry, plugin = registry.entry(name), registry.load(name)
    return {
        **dataclasses.asdict(entry),
        "description": inspect.getdoc(plugin) or "",
        **(_codec_facts(plugin) if kind == "codec" else {}),
        "parameters": _parameters(params_class(plugin)),
        "about_parameters": _about(params_class(plugin)),
    }


def _about(params: type) -> str:
    """Return what the author wrote of the parameters; a dataclass has a docstring by itself."""
    text = inspect.getdoc(params) or ""
    return "" if text.startswith(f"{params.__name__}(") else text


def _codec_facts(codec: type[Codec]) -> dict[str, Any]:
    """Return what a codec is made for and what it promises."""
    return {
        "modes": list(codec.modes),
        "exchange": codec.exchange,
        "exchanges": list(codec.exchanges),
        "laws": sorted(codec.laws),
        "compresses": codec.compresses,
        "server": codec.server.__name__ if codec.server else None,
    }


def _registry(kind: str) -> Registry[Any]:
    if kind not in KINDS:
        raise ConfigError(
            f"there is no kind of plugin {kind!r}{nearest(kind, list(KINDS))}; "
            f"kinds: {', '.join(KINDS)}"
        )
    return KINDS[kind]


def _parameters(params: type) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(params)
    return [
        {"name": field.name, "type": type_name(hints[field.name]), **_default(field)}
        for field in dataclasses.fields(params)
        if field.init
    ]


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {"required": False, "default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"required": False, "default": field.default_factory()}
    return {"required": True, "default": None}


def table(rows: list[dict[str, str]]) -> str:
    """Return plugins as aligned columns."""
    columns = ("kind", "name", "distribution", "version", "target")
    lines = [columns, *(tuple(row[column] for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def page(facts: dict[str, Any]) -> str:
    """Return one plugin's page as text."""
    head = f"{facts['kind']} {facts['name']}  ({facts['target']})"
    origin = f"from {facts['distribution']} {facts['version']}"
    rows = [f"  {_usage(parameter)}" for parameter in facts["parameters"]]
    parameters = ["parameters:", *rows] if rows else ["parameters: none"]
    about = ["", facts["about_parameters"]] if rows and facts["about_parameters"] else []
    made_for = _made_for(facts) if facts["kind"] == "codec" else []
    return "\n".join([head, origin, "", facts["description"], "", *made_for, *parameters, *about])


def _made_for(facts: dict[str, Any]) -> list[str]:
    """Return a codec's facts, a line each."""
    others = [name for name in facts["exchanges"] if name != facts["exchange"]]
    instead = f" (or {', '.join(others)})" if others else ""
    return [
        f"modes: {', '.join(facts['modes'])}",
        f"exchanges: {facts['exchange']}{instead}",
        f"compressor: {'used' if facts['compresses'] else 'not used'}",
        f"server half: {facts['server'] or 'none'}",
        f"laws: {', '.join(facts['laws']) or 'none declared'}; `aiosgd check` tests them",
    ]


def _usage(parameter: dict[str, Any]) -> str:
    if parameter["required"]:
        return f"{parameter['name']}  ({parameter['type']}; required)"
    return f"{parameter['name']} = {parameter['default']!r}  ({parameter['type']})"
