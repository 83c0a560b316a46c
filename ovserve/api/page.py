"""The page at `/` with a form to try the server: one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from ovserve.api.exchange import FileReply

__all__ = ["front_page"]


@cache
def front_page() -> FileReply:
    """Return the page with a policy that allows only its own script and style, and requests to this server.

    The policy names the hashes of both (Content Security Policy Level 3, section 6.7.2.3).
    """
    content = (files("ovserve.web") / "page.html").read_bytes()
    script, style = (_hash_of(content, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return FileReply(content, "text/html; charset=utf-8", headers=headers)


def _hash_of(content: bytes, tag: bytes) -> str:
    found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    if found is None:
        raise ValueError(f"page.html has no {tag.decode()}")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"
