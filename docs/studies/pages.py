"""What the site needs besides the pages: `mkdocs build` calls these.

The pages are read in the repository, too, where links lead to the code. On the site there is no
code: such a link becomes its text. And a built page loads nothing from elsewhere, which is checked.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_TO_README = re.compile(r"\[([^\]]+)\]\(\.\./README\.md(?:#[\w-]*)?\)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./|studies/)[^)]*\)")
_PARTS = re.compile(r"(```.*?```)", re.DOTALL)
_ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
_IMPORTED = re.compile(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
_LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take links to what is not on the site away, outside of code."""
    parts = _PARTS.split(markdown)
    parts[::2] = [_OUTSIDE.sub(r"\1", _TO_README.sub(r"\1", part)) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config: Any, **_: Any) -> None:
    """Look through what was built.

    Raises:
        PluginError: something is loaded from elsewhere.
    """
    site = Path(config["site_dir"])
    found = [f"{path.relative_to(site)}: {url}" for path in site.rglob("*") for url in loads(path)]
    if found:
        raise PluginError("pages load from elsewhere:\n" + "\n".join(sorted(found)))


def loads(path: Path) -> list[str]:
    """Return the addresses elsewhere that a built page or style sheet loads."""
    if path.suffix == ".css":
        return _IMPORTED.findall(path.read_text(encoding="utf-8"))
    if path.suffix != ".html":
        return []
    parser = _Loads()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.found


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag loads; links that one has to click load nothing."""
        address = dict(attrs).get(_LOADING.get(tag, ""), None)
        if address and _ELSEWHERE.match(address):
            self.found.append(address)
