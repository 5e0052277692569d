"""Chains of compressors as users write them: `topk`, `topk(ratio=0.01)`, `ef(topk(ratio=0.01))`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aiosgd.errors import ConfigError
from aiosgd.plugins.compressors.base import Compressor, Wrapper
from aiosgd.plugins.registry import Registry, make_params

EXPECTED = "a name, name(key=value, ...) or wrapper(inner, key=value, ...)"
_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*")


@dataclass(frozen=True)
class Link:
    """One compressor of a chain.

    Attributes:
        name: as it is registered.
        values: its parameters.
        inner: what it is wrapped around, if anything.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    inner: Link | None = None

    def __iter__(self) -> Iterator[Link]:
        """Go from the outermost link to the innermost."""
        yield self
        if self.inner is not None:
            yield from self.inner


def parse(text: str, place: str = "compressor") -> Link:
    """Read a chain.

    Raises:
        ConfigError: it is none.
    """
    link, rest = _link(text, text, place)
    if rest.strip():
        raise _wrong(text, place)
    return link


def _link(text: str, whole: str, place: str) -> tuple[Link, str]:
    """Read one link from the beginning of a text; return it and what is left."""
    match = _NAME.match(text)
    if match is None:
        raise _wrong(whole, place)
    name, rest = match[1], text[match.end() :]
    if not rest.startswith("("):
        return Link(name), rest
    values: dict[str, Any] = {}
    inner, rest = None, rest[1:]
    while not rest.lstrip().startswith(")"):
        key = _NAME.match(rest)
        if key is not None and rest[key.end() : key.end() + 1] == "=":
            values[key[1]], rest = _value(rest[key.end() + 1 :], whole, place)
        elif inner is None and not values:
            inner, rest = _link(rest, whole, place)
        else:
            raise _wrong(whole, place)
        rest = rest.lstrip()
        if rest.startswith(","):
            rest = rest[1:]
        elif not rest.startswith(")"):
            raise _wrong(whole, place)
    return Link(name, values, inner), rest.lstrip()[1:]


def _value(text: str, whole: str, place: str) -> tuple[Any, str]:
    """Read a TOML value up to the comma or bracket that ends it; the shortest that is one."""
    for end in (match.start() for match in re.finditer(r"[,)]", text)):
        try:
            return tomllib.loads(f"value = {text[:end]}")["value"], text[end:]
        except tomllib.TOMLDecodeError:
            continue
    raise _wrong(whole, place)


def _wrong(text: str, place: str) -> ConfigError:
    return ConfigError(f"{place} is {text!r}; expected {EXPECTED}")


def factory(
    registry: Registry[Compressor], text: str, values: Mapping[str, Any], place: str = "compressor"
) -> Callable[[np.random.Generator], Compressor]:
    """Return what makes a chain's compressors, one each per call.

    Args:
        registry: where names are looked up.
        text: the chain.
        values: more parameters of its innermost compressor, as `--set compressor.ratio=0.01` gives
            them.
        place: where the text stands, for messages.

    Raises:
        ConfigError: it is no chain, a wrapper has nothing to wrap or the other way round, or a
            parameter is wrong.
        PluginError: a plugin is missing or broken.
    """
    links = [*parse(text, place)]
    made: list[tuple[type[Compressor], Any]] = []
    for link in links:
        kind = registry.load(link.name)
        if issubclass(kind, Wrapper) != (link.inner is not None):
            needs = "needs another one inside" if link.inner is None else "takes none inside"
            raise ConfigError(f"{place} is {text!r}; {link.name} {needs}: {EXPECTED}")
        own = {**link.values, **(values if link is links[-1] else {})}
        made.append((kind, make_params(kind, own, place)))

    def make(rng: np.random.Generator) -> Compressor:
        kind, params = made[-1]
        whole = kind(params, rng)
        for kind, params in reversed(made[:-1]):
            assert issubclass(kind, Wrapper)
            whole = kind(params, rng, whole)
        return whole

    return make
