"""The web pages: static files of `ovserve.web`, which load nothing from other servers.

The pages are `/` and `/status`; what they load is under `/web/`. The policy allows no inline script and no inline
style (Content Security Policy Level 3). Files are read once and kept: there are less than a hundred kilobytes of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ovserve.api.exchange import FileReply
from ovserve.errors import NotFound

__all__ = ["EDITOR_PAGE", "STATUS_PAGE", "page_file"]

EDITOR_PAGE, STATUS_PAGE = "index.html", "status.html"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


@dataclass(frozen=True, slots=True)
class _StaticFile:
    content: bytes
    media_type: str
    headers: Mapping[str, str]


def page_file(name: str, if_none_match: str | None = None) -> FileReply:
    """Return a file of the pages, or 304 without content if the client has it already.

    Args:
        name: the file's name, e.g. `app.js`.
        if_none_match: the request's field of that name.

    Raises:
        NotFound: no page has a file of this name.
    """
    static = _static_files().get(name)
    if static is None:
        raise NotFound(f"The pages have no file {name[:200]!r}.")
    if static.headers["etag"] in (if_none_match or ""):
        return FileReply(b"", "", 304, static.headers)
    return FileReply(static.content, static.media_type, headers=static.headers)


@cache
def _static_files() -> Mapping[str, _StaticFile]:
    found = {}
    for entry in files("ovserve.web").iterdir():
        extension = entry.name[entry.name.rfind(".") :]
        if extension not in _TYPES:
            continue
        content = entry.read_bytes()
        headers = {
            "content-security-policy": _POLICY,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",  # asks each time, so that a new version of the server shows its own page
            "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        }
        found[entry.name] = _StaticFile(content, _TYPES[extension], headers)
    return found
