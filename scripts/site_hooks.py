"""What mkdocs does besides the pages in `docs`: README and changelog are pages, links that leave the site are text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # in the repository and in the site


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside `docs`, and the icon of the server's own pages."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=_moved((ROOT / source).read_text("utf-8"))))
    icon = (ROOT / "ovserve" / "web" / "icon.svg").read_bytes()
    files.append(File.generated(config, "pictures/icon.svg", content=icon))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001 - mkdocs's names
    """Replace links to files that are not part of the site by their text and path."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if files.get_file_from_path(path) is not None:
            return match[0]
        outside = posixpath.normpath(posixpath.join("docs", path))
        moved = PAGES.get(outside)
        if moved:
            return f"[{match['text']}]({posixpath.relpath(moved, folder or '.')}{match['anchor'] or ''})"
        if not (ROOT / outside).exists():
            return match[0]  # a broken link, which mkdocs reports
        return match["text"] if outside in match["text"] else f"{match['text']} (`{outside}`)"

    return LINK.sub(replaced, markdown)


def _moved(markdown: str) -> str:
    """Return a page of the repository's root with links as they are from `docs`."""

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return f"{match['picture']}[{match['text']}]({inside}{match['anchor'] or ''})"

    return LINK.sub(replaced, markdown)
