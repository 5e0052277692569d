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

EXPECTED = "a chain is name, name(key=value, ...) or wrapper(chain, key=value, ...)"
MAX_LENGTH = 1000  # characters; nodes read what a submitter sends
MAX_DEPTH = 8
_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*")
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=")
_OPEN, _CLOSE, _COMMA = (re.compile(rf"\s*([{mark}])\s*") for mark in "(),")
_END = re.compile(r"[,)]")


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
    return _Reader(text, place).chain()


class _Reader:
    """Goes through a chain's text once, from left to right."""

    def __init__(self, text: str, place: str) -> None:
        self.text, self.place = text, place
        self.at = 0

    def chain(self) -> Link:
        """Read all of it."""
        if len(self.text) > MAX_LENGTH:
            raise ConfigError(
                f"{self.place} has {len(self.text)} characters; expected {MAX_LENGTH} at most"
            )
        link = self.link(MAX_DEPTH)
        if self.at < len(self.text):
            raise self.wrong("the end")
        return link

    def link(self, depth: int) -> Link:
        """Read a name and what stands in brackets after it."""
        name = self.match(_NAME)
        if not name:
            raise self.wrong("a name")
        if not self.match(_OPEN):
            return Link(name)
        if not depth:
            raise self.wrong(f"{MAX_DEPTH} brackets within each other at most")
        inner, values = None, {}
        while not self.match(_CLOSE):
            if self.at == len(self.text):
                raise self.wrong("a closing bracket")
            key = self.match(_KEY)
            if key in values:
                raise ConfigError(f"{self.place} is {self.text!r}; {name} has {key} twice")
            if key:
                values[key] = self.value(key)
            elif inner is None and not values:
                inner = self.link(depth - 1)
            else:
                raise self.wrong("key=value" if _NAME.match(self.text, self.at) else "a bracket")
            if not self.match(_COMMA) and not _CLOSE.match(self.text, self.at):
                raise self.wrong("a comma or a bracket")
        return Link(name, values, inner)

    def match(self, pattern: re.Pattern[str]) -> str:
        """Go past what matches here, and return it; nothing if it does not."""
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[1]

    def value(self, key: str) -> Any:
        """Read a TOML value up to the comma or bracket that ends it; the shortest that is one."""
        for end in (match.start() for match in _END.finditer(self.text, self.at)):
            try:  # as a list, which neither a comment nor a second key gets out of unnoticed
                table = tomllib.loads(f"value = [{self.text[self.at : end]}]")
            except (tomllib.TOMLDecodeError, RecursionError):
                continue
            if len(table) == 1 and len(table["value"]) == 1:
                self.at = end
                return table["value"][0]
        raise self.wrong(f"a TOML value of {key} (strings in quotes), then a comma or a bracket")

    def wrong(self, wanted: str) -> ConfigError:
        """Return the error that says what was expected here."""
        rest = self.text[self.at :]
        where = f"{wanted} before {rest!r}" if self.at and rest else wanted
        where = where if rest or not self.at else f"{wanted} after it"
        return ConfigError(f"{self.place} is {self.text!r}; expected {where}: {EXPECTED}")


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
        ConfigError: it is no chain, a wrapper has nothing to wrap or the other way round, it
            refuses what it is around, or a parameter is wrong.
        PluginError: a plugin is missing or broken.
    """
    links = [*parse(text, place)]
    made: list[tuple[type[Compressor], Any]] = []
    for link in links:
        kind = registry.load(link.name)
        if issubclass(kind, Wrapper) != (link.inner is not None):
            raise ConfigError(f"{place} is {text!r}; {_misfit(link)}")
        own = {**link.values, **(values if link is links[-1] else {})}
        made.append((kind, make_params(kind, own, place)))

    def make(rng: np.random.Generator) -> Compressor:
        kind, params = made[-1]
        whole = kind(params, rng)
        for kind, params in reversed(made[:-1]):
            assert issubclass(kind, Wrapper)
            whole = kind(params, rng, whole)
        return whole

    make(np.random.default_rng(0))  # a wrapper may refuse what it is put around
    return make


def _misfit(link: Link) -> str:
    if link.inner is None:
        return f"{link.name} wraps another compressor: {link.name}(topk(ratio=0.01))"
    return f"{link.name} is no wrapper, but has {link.inner.name} inside"
