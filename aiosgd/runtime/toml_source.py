"""A TOML file that knows where each of its keys stands, so that messages can name the line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiosgd.errors import ConfigError
from aiosgd.plugins.registry import check_value, nearest


class TomlSource:
    """A TOML file and the line of each of its keys and list items."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason}") from error
        try:
            self.data = tomllib.loads(text)
            self.lines = _Lines(text).found
        except ValueError as error:
            raise ConfigError(f"{path}{_syntax_line(error, text)}: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{path} is nested too deeply") from error

    def place(self, *keys: str | int) -> str:
        """Return `file:line: key` for a key; the line of its table where it has none itself."""
        line = next(
            (self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None
        )
        return f"{self.path}{'' if line is None else f':{line}'}: {written_key(keys)}"

    def table(self, key: str) -> dict[str, Any]:
        """Return a table of the file, empty where there is none."""
        table: dict[str, Any] = check_value(self.data.get(key, {}), dict[str, Any], self.place(key))
        return table

    def check_keys(self, table: tuple[str, ...], known: Sequence[str]) -> None:
        """Refuse the first key of a table that is not in `known`."""
        for key in self.table(*table) if table else self.data:
            if key not in known:
                raise ConfigError(unknown_key(self.place(*table, key), key, known))


def written_key(keys: Sequence[str | int]) -> str:
    """Return how a key reads in a message: `workers[2]`, `[job.codec_params] turn`."""
    *table, last = keys
    if isinstance(last, int):
        return f"{'.'.join(map(str, table))}[{last}]"
    return f"[{'.'.join(map(str, table))}] {last}" if table else last


def _syntax_line(error: ValueError, text: str) -> str:
    """Return `:line` for the line that a parser's message names."""
    match = re.search(r"at line (\d+)", str(error))
    if match:
        return f":{match[1]}"
    return f":{text.count(chr(10)) + 1}" if "at end of document" in str(error) else ""


class _Lines:
    """The line of each key and list item of a valid TOML text; tomllib tells none.

    Tables in a list of tables (`[[key]]`) are found under their key, without an index.
    """

    _TOKEN = re.compile(
        r"""(?P<space>[ \t\r]+|\#[^\n]*)
        | "{3}(?:\\.|[^\\])*?"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\])*" | '[^']*'
        | [\n\[\]{}=,.]
        | [^\s\[\]{}=,."'\#]+""",
        re.DOTALL | re.VERBOSE,
    )

    def __init__(self, text: str) -> None:
        self.found: dict[tuple[str | int, ...], int] = {}
        self._tokens: list[tuple[str, int]] = []
        line = 1
        for match in self._TOKEN.finditer(text):
            if match["space"] is None:
                self._tokens.append((match[0], line))
            line += match[0].count("\n")
        self._tokens.append(("", line))
        self._next = 0
        self._read()

    def _read(self) -> None:
        table: tuple[str | int, ...] = ()
        while self._peek() != "":
            if self._peek() == "[":
                table = self._header()
            elif not self._take("\n"):
                self._pair(table)

    def _header(self) -> tuple[str | int, ...]:
        while self._take("["):
            pass
        table = self._key(())
        while self._take("]"):
            pass
        return table

    def _pair(self, table: tuple[str | int, ...]) -> None:
        path = self._key(table)
        self._take("=")
        self._value(path)

    def _key(self, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        while self._peek() not in {"=", "]", ""}:
            text, line = self._advance()
            if text != ".":
                path = (*path, _unquoted(text))
                self.found.setdefault(path, line)
        return path

    def _value(self, path: tuple[str | int, ...]) -> None:
        if self._take("["):
            self._items(path)
        elif self._take("{"):
            while not self._take("}"):
                if not (self._take(",") or self._take("\n")):
                    self._pair(path)
        else:
            while self._peek() not in {",", "]", "}", "\n", ""}:
                self._advance()

    def _items(self, path: tuple[str | int, ...]) -> None:
        index = 0
        while not self._take("]"):
            if not (self._take(",") or self._take("\n")):
                self.found[*path, index] = self._tokens[self._next][1]
                self._value((*path, index))
                index += 1

    def _peek(self) -> str:
        return self._tokens[self._next][0]

    def _advance(self) -> tuple[str, int]:
        self._next += 1
        return self._tokens[self._next - 1]

    def _take(self, text: str) -> bool:
        if self._peek() == text:
            self._next += 1
            return True
        return False


def _unquoted(key: str) -> str:
    return str(tomllib.loads(f"key = {key}")["key"]) if key[0] in "\"'" else key


def unknown_key(place: str, key: str, known: Sequence[str]) -> str:
    """Return the message about a key that nobody knows, with the nearest right one."""
    hint = nearest(key, known) or f"; known: {', '.join(known)}"
    return f"{place}: no such key{hint}"
