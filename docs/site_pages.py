"""A hook of mkdocs: pages from the top folder, and links that lead out of ``docs/``.

README.md, CONTRIBUTING.md and SECURITY.md become pages. A link to any other file outside ``docs/``
leads to the repository that $SURGERY_REPOSITORY names; without that variable its text stays alone.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):(<code[^>]*>~?([\w.]+)</code>)")
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand outside ``docs/``."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page."""
    return turned(markdown, page.file.src_uri, os.environ.get("SURGERY_REPOSITORY", ""))


def on_page_content(html: str, **_: Any) -> str:
    """Turn Sphinx's roles in docstrings into links, where the page has what they name."""

    def link(found: re.Match[str]) -> str:
        code, name = found.groups()
        return f'<a href="#{name}">{code}</a>' if f'id="{name}"' in html else code

    return ROLE.sub(link, html)


def turned(markdown: str, page: str, repository: str) -> str:
    """Return the text with links for the site; what stands in code blocks is left alone."""
    source = SOURCES.get(page, f"docs/{page}")

    def turn(found: re.Match[str]) -> str:
        text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found.group()
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = PAGES.get(path) or (path[len("docs/") :] if path.startswith("docs/") else "")
        if place.endswith(".py") or place.startswith("changelog.d") or not Path(place).suffix:
            place = ""
        if place:
            place = posixpath.relpath(place, posixpath.dirname(page) or ".")
            return f"[{text}]({place}{mark}{anchor})"
        return f"[{text}]({repository}/blob/main/{path}{mark}{anchor})" if repository else text

    pieces = FENCE.split(markdown)
    return "".join(p if FENCE.match(p) else LINK.sub(turn, p) for p in pieces)
