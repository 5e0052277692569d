"""Code of the user's own that a job names: MODULE:NAME, or FILE.py:NAME, whose source travels.

A parameter of a plugin that is annotated `Code` names such code. What a job says must not make a
node run anything, so nobody can load it but who was allowed to: the submitter, and nodes that were
started with --allow-code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ClassVar, TypeVar

from aiosgd.errors import AiosgdError, ConfigError, PluginLoadError
from aiosgd.plugins.registry import describe

T = TypeVar("T")


def is_file(name: str) -> bool:
    """Tell whether code is given as FILE.py:NAME."""
    return ".py:" in name


@dataclass(frozen=True)
class Code:
    """The name of an object of the user's own, which is not loaded yet.

    Attributes:
        text: MODULE:NAME or FILE.py:NAME, as the user wrote it.
        path: where the file is on this machine, if not at its name.
        is_allowed: whether this process may run it.
    """

    text: str
    path: Path | None = None
    is_allowed: bool = False

    read_as: ClassVar[str] = "MODULE:NAME or FILE.py:NAME"

    @classmethod
    def from_value(cls, value: object, place: str) -> Code:
        """Read what a job says.

        Raises:
            ConfigError: it names nothing.
        """
        module, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if not module or not name.isidentifier():
            raise ConfigError(f"{place} is {value!r}; expected {cls.read_as}")
        return cls(str(value))

    def allowed(self, path: Path | None = None) -> Code:
        """Return it as this process may run it; `path` is where the file is, if not at its name."""
        return dataclasses.replace(self, path=path, is_allowed=True)

    def load(self, place: str) -> Any:
        """Import the object.

        Args:
            place: what names it, for messages: `codec`, `model.factory`.

        Raises:
            ConfigError: there is no such file.
            PluginLoadError: it may not be run here, cannot be imported, or is not there.
        """
        origin = f"{place} {self.text!r}"
        if not self.is_allowed:
            raise PluginLoadError(f"{origin} may not be run here; start the node with --allow-code")
        where, _, name = self.text.rpartition(":")
        path = (self.path or Path(where)) if is_file(self.text) else None
        if path is not None and not path.is_file():
            raise ConfigError(f"{origin}: there is no file {where}")
        try:
            module = importlib.import_module(where) if path is None else import_file(path, where)
        except (Exception, SystemExit) as error:
            raise PluginLoadError(
                f"{origin} cannot be loaded: {describe(error)}{_hint(error, where)}"
            ) from error
        if not hasattr(module, name):
            raise PluginLoadError(f"{origin}: {path.name if path else where} has no {name!r}")
        return getattr(module, name)

    def function(self, place: str) -> Callable[..., Any]:
        """Import a function; arguments and errors as `load`."""
        found = self.load(place)
        if not callable(found):
            raise PluginLoadError(f"{place} {self.text!r} is {found!r:.80}; expected a function")
        return found  # type: ignore[no-any-return]


def call(origin: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function of the user's own.

    Args:
        origin: what it is, for messages.
        function, args, options: what to call, with what.

    Raises:
        PluginLoadError: whatever it raised.
    """
    try:
        return function(*args, **options)
    except AiosgdError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginLoadError(f"{origin} failed: {describe(error)}") from error


def _hint(error: BaseException, module: str) -> str:
    """Return what to do about a module that is not there."""
    missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
    return "; install it, add its folder to PYTHONPATH, or give FILE.py:NAME" if missing else ""


class _Source(SourceFileLoader):
    """Reads a module from its source, never from a cache: that overlooks a change of a second.

    Tracebacks name the file as the user named it, wherever this machine keeps its copy.
    """

    named = ""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.named)


def import_file(path: Path, named: str) -> ModuleType:
    """Import a file that is no part of a package.

    Args:
        path: where it is.
        named: what the user calls it.
    """
    # dataclasses and annotations look their module up by its name: one name for each content
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    full_name = f"aiosgd_code_{path.stem}_{digest}"
    loader = _Source(full_name, str(path))
    loader.named = named
    spec = spec_from_loader(full_name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module
