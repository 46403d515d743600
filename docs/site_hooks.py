"""MkDocs hook: links that leave docs/ become paths, since the site has no such pages; functions that hide a module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A function imported from a module of its own name: the API page would find the module in its place.
HIDDEN = re.compile(r"^from (seqconv_triton\.(\w+)) import (?:.*, )?\2\b", re.MULTILINE)
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file outside docs/ becomes that file's path; one that leads nowhere stays, and is an error."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def as_path(match: re.Match[str]) -> str:
        text, target = match.groups()
        file = (folder / target).resolve()
        if not file.exists() or not file.is_relative_to(ROOT) or file.is_relative_to(ROOT / "docs"):
            return match.group()
        path = file.relative_to(ROOT).as_posix()
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    markdown = OUTSIDE.sub(as_path, markdown)
    if page.file.src_uri == "api.md":
        exports = (ROOT / "seqconv_triton" / "__init__.py").read_text(encoding="utf-8")
        for module, name in HIDDEN.findall(exports):
            markdown += f"\n::: {module}.{name}\n    options:\n      show_root_full_path: false\n"
    return markdown
