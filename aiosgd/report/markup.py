"""HTML and SVG that is escaped by construction: what is no `Html` is text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

# without an end tag in HTML
_VOID = {"meta", "input", "br", "link"}
# characters that no HTML text may have; a log can have them all the same
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Markup, not to be escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | float | Iterable[Child] | None"


def escape(text: str) -> str:
    """Return a text as it stands in markup, also within quotes; control characters are shown."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: of the element.
        children: markup, text to be escaped, numbers, or iterables of them; None is nothing.
        attributes: `class_` is `class`, `data_x` is `data-x`; None and False are left out, True has
            no value.
    """
    opened = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{opened}>")
    return Html(f"<{name}{opened}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Return children one after the other."""
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return escape(str(child))
    return join(*child)


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
