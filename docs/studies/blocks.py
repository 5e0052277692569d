"""The code blocks of a page: what they are, and how they run, in order, in one folder.

    python docs/studies/blocks.py docs/codec.md             # run them, and say how long each takes
    python docs/studies/blocks.py --write docs/codec.md     # also mend what is shown but not printed

A fence of one of the RUNNABLE languages runs, unless a line `<!-- not run: REASON -->` stands right
before it; `<!-- extra: NAME -->` says that it needs an extra of aiosgd.

    console     `$ command` lines, each followed by what it prints: stdout and stderr as they come.
                Nothing shown: nothing compared, but it must exit with 0. A last line `exit code 3`
                says otherwise. A line `…` stands for any lines, `…` in a line for anything.
                `$ command &` goes on beside the others until the page ends.
    sh          commands, one a line
    python      a script; with `title="x.py"`, or `# x.py` in its first line, a file that the
                following blocks find. With tests in it, it is run by pytest; after a line
                `<!-- continued -->` it goes on from the script before it.
    toml        with a title a file, without one just TOML

What differs from run to run is masked before it is compared: numbers, job ids, absolute paths. Ports
9001 to 9009 are replaced by ports that are free, and `pip install PROJECT` installs into the page's
folder, without a network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeAlias

RUNNABLE = ("console", "sh", "python", "toml")
SHOWN = ("", "text", "json", "csv")
"""Languages of fences that show something and cannot run."""
TIMEOUT = 90.0
"""Seconds for one command; those of the pages take a few."""
PORTS = re.compile(r"\b900([1-9])\b")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)$")
_COMMENT = re.compile(r"^ *<!-- (not run|extra|continued)(?:: (.+?))? -->$")
_TITLE = re.compile(r'title="([^"]+)"')
_FIRST_LINE_TITLE = re.compile(r"# ([\w./-]+\.(?:py|toml))$")


class BlockError(AssertionError):
    """A block did not do what its page says; the message names page, line and command."""


@dataclass(frozen=True)
class Block:
    """A fence of a page.

    Attributes:
        page: the file's name.
        line: where it begins, from 1.
        language: the first word of its info string.
        title: the file that it is, or an empty string.
        text: what is in it, without the indentation of the fence.
        marks: the comments right before it: `not run`, `extra`, `continued` -> their text.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Page and line, as editors understand them."""
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return the fences of a page, in order.

    Raises:
        BlockError: a fence has no end.
    """
    found: list[Block] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    marks: dict[str, str] = {}
    for number, line in lines:
        if comment := _COMMENT.match(line):
            marks[comment[1]] = comment[2] or ""
        elif opening := _FENCE.match(line):
            text = _until(opening, lines, f"{path.name}:{number}")
            found.append(_block(path.name, number, opening["info"].strip(), text, marks))
            marks = {}
        elif line.strip():
            marks = {}
    return found


def _until(opening: re.Match[str], lines: Iterator[tuple[int, str]], place: str) -> str:
    text: list[str] = []
    for _, line in lines:
        if line.strip() == opening["fence"]:
            return textwrap.dedent("".join(f"{each}\n" for each in text))
        text.append(line)
    raise BlockError(f"{place}: a block without an end")


def _block(page: str, line: int, info: str, text: str, marks: dict[str, str]) -> Block:
    language = info.split(" ", maxsplit=1)[0]
    title = _TITLE.search(info)
    first = _FIRST_LINE_TITLE.match(text.partition("\n")[0])
    name = title[1] if title else first[1] if first and language in ("python", "toml") else ""
    return Block(page, line, language, name, text, dict(marks))


# What a command prints ------------------------------------------------------------------------


_MASKS = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b\d{8}-\d{6}-[\w.-]+-[0-9a-f]{4}\b"), "JOB"),
    (re.compile(r"(?<![\w./])/(?:[\w.+-]+/)*[\w.+-]+"), "PATH"),
    (re.compile(r"(?<![\w])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|\d+(?:\.\d+)?"), "N"),
    (re.compile(r"[ \t]+"), " "),
)


def masked(text: str) -> list[str]:
    """Return the lines of what was printed without what differs from run to run."""
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    return [line.strip() for line in text.strip().splitlines()]


def agrees(shown: str, printed: str) -> bool:
    """Tell whether a command has printed what its page shows."""
    pattern = "".join(
        r"(?:[^\n]*\n)*" if line in ("…", "...") else re.escape(line).replace("…", ".*") + r"\n"
        for line in masked(shown)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in masked(printed))) is not None


@dataclass
class Command:
    """A command of a console block, and what the page says that it prints."""

    words: str
    shown: str = ""
    code: int = 0


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a console or sh block.

    Raises:
        BlockError: output before the first command.
    """
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if block.language == "sh" or line.startswith("$ "):
            words = line if block.language == "sh" else line[2:]
            while words.endswith("\\"):
                words = words[:-1] + next(lines).strip()
            if shlex.split(words, comments=True):
                found.append(Command(words))
        elif not found:
            raise BlockError(f"{block.place}: a console block begins with `$ `, not {line!r}")
        elif code := re.fullmatch(r"exit code (\d+)", line):
            found[-1].code = int(code[1])
        else:
            found[-1].shown += f"{line}\n"
    return found


# Running --------------------------------------------------------------------------------------


_PIP = """#!/bin/sh
[ "$1" = install ] && shift
exec {python} -m pip install --disable-pip-version-check --quiet --no-index --no-deps \\
    --no-build-isolation --target {site} "$@"
"""


Differs: TypeAlias = Callable[[Block, Command, str], None]


def _refuse(block: Block, command: Command, printed: str) -> None:
    what = f"`{command.words}` prints something else than the page shows"
    raise BlockError(f"{block.place}: {what}:\n--- shown\n{command.shown}--- printed\n{printed}")


class Workspace:
    """A folder in which the blocks of one page run, one after the other.

    Args:
        folder: an empty one.
        python: the interpreter of the environment in which aiosgd is installed.
        differs: told of a command that prints something else than its page shows.
    """

    def __init__(
        self, folder: Path, python: str = sys.executable, differs: Differs = _refuse
    ) -> None:
        self._differs = differs
        self.folder = self._current = folder / "work"
        self._background: list[subprocess.Popen[bytes]] = []
        self._script = ""
        self._ports = _free_ports(9)
        site, commands = folder / "site", folder / "bin"
        for made in (self.folder, site, commands):
            made.mkdir()
        pip = commands / "pip"
        pip.write_text(_PIP.format(python=shlex.quote(python), site=shlex.quote(str(site))))
        pip.chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(commands), str(Path(python).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(site),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._background:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._background:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def run(self, block: Block) -> None:
        """Run a block, or write its file.

        Raises:
            BlockError: it ends or prints otherwise than its page says.
        """
        text = PORTS.sub(lambda port: str(self._ports[int(port[1]) - 1]), block.text)
        if block.title:
            path = self._current / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif block.language == "toml":
            tomllib.loads(text)
        elif block.language == "python":
            self._run_script(block, text)
        else:
            for command in commands_of(block):
                self._run_command(block, command)

    def _run_script(self, block: Block, text: str) -> None:
        self._script = self._script + text if "continued" in block.marks else text
        has_tests = re.search(r"^(async )?def test_", text, re.MULTILINE)
        path = self._current / f"{'test_' if has_tests else ''}line_{block.line}.py"
        path.write_text(self._script, encoding="utf-8")
        how = "python -m pytest -q -p no:cacheprovider" if has_tests else "python"
        self._run_command(block, Command(f"{how} {path.name}"))

    def _run_command(self, block: Block, command: Command) -> None:
        words = PORTS.sub(lambda port: str(self._ports[int(port[1]) - 1]), command.words)
        if moved := re.fullmatch(r"cd (\S+)", words):
            self._current = (self._current / moved[1]).resolve(strict=True)
            return
        if words.endswith("&"):
            self._run_beside(block, words.removesuffix("&"))
            return
        try:
            done = subprocess.run(
                ["bash", "-c", words],
                cwd=self._current,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BlockError(f"{block.place}: `{words}` runs for {TIMEOUT:.0f} s") from error
        printed = done.stdout.decode(errors="replace")
        if done.returncode != command.code:
            what = f"ended with exit code {done.returncode}, not {command.code}"
            raise BlockError(f"{block.place}: `{command.words}` {what}:\n{printed}")
        if command.shown and not agrees(command.shown, printed):
            self._differs(block, command, self._as_shown(printed))

    def _as_shown(self, printed: str) -> str:
        """Return what was printed with the page's ports and folder."""
        for number, port in enumerate(self._ports, 1):
            printed = printed.replace(str(port), f"900{number}")
        return printed.replace(str(self.folder), "/home/me/work")

    def _run_beside(self, block: Block, words: str) -> None:
        """Start a process that stays, and wait for the first line that it prints."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {words}"],
            cwd=self._current,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._background.append(process)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise BlockError(f"{block.place}: `{words}` ended without a word")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in listeners:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in listeners]


_PROGRESS = re.compile(
    r"(?:^(?:(?:worker|server) -?\d+(?:: epoch| waits for) |epoch \d+, step ).*\n)+", re.MULTILINE
)
_RUNNING = re.compile(r"^(job \S+: running\n)", re.MULTILINE)


def abridged(printed: str) -> str:
    """Return what a page shows of it: a job's progress is of other lines each time."""
    return _RUNNING.sub("\\1…\n", _PROGRESS.sub("", printed))


def mend(path: Path, command: Command, printed: str) -> None:
    """Show on a page what a command prints."""
    old, new = (f"$ {command.words}\n{text}" for text in (command.shown, abridged(printed)))
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


def walk(path: Path, differs: Differs) -> Iterator[tuple[Block, str]]:
    """Run a page; yield each block that can run, and what became of it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Workspace(Path(folder), differs=differs) as workspace,
    ):
        for block in blocks_of(path):
            began = time.monotonic()
            if "not run" in block.marks:
                yield block, f"not run: {block.marks['not run']}"
            elif block.language in RUNNABLE:
                workspace.run(block)
                yield block, f"{time.monotonic() - began:.1f} s"


def main() -> None:
    """Run the pages that are named."""
    for path in map(Path, sys.argv[1:]):
        if path.suffix == ".md":
            differs = functools.partial(_mend_here, path) if "--write" in sys.argv else _refuse
            for block, outcome in walk(path, differs):
                print(f"{block.place} {block.language} {block.title}: {outcome}")  # noqa: T201


def _mend_here(path: Path, _: Block, command: Command, printed: str) -> None:
    mend(path, command, printed)


if __name__ == "__main__":
    main()
