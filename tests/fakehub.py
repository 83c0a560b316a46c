"""A fake hub on loopback: repositories from a directory, with faults that a test chooses."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

__all__ = ["FakeHub", "Seen", "blob_id"]

COMMIT = "a" * 40
LARGE_BYTES = 1024  # files from this size are in large-file storage, as on the hub


def blob_id(content: bytes) -> str:
    """Return git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Seen:
    """One request that arrived."""

    path: str
    headers: Mapping[str, str]


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        drop_after: close the connection after this many bytes of the content, as often as `drops` says.
        corrupt: path of a file whose content is changed, as often as `corruptions` says.
        rate_limited: number of requests answered with 429.
        broken: number of requests answered with 500.
        redirect_to: base URL that large files are redirected to.
        gated: token that is needed; "": none.
        no_ranges: ignore Range.
        hold: an event that the content of a large file waits for after its first half.
        commit: name of the current commit.
        listed: replaces the listing.
    """

    drop_after: int = 0
    drops: int = 0
    corrupt: str = ""
    corruptions: int = 0
    rate_limited: int = 0
    broken: int = 0
    redirect_to: str = ""
    gated: str = ""
    no_ranges: bool = False
    hold: threading.Event | None = None
    commit: str = COMMIT
    listed: Any = None


class FakeHub:
    """A hub that serves the directories OWNER/NAME below `root`: `with FakeHub(root) as hub:`.

    Attributes:
        url: its base URL.
        seen: the requests.
        faults: what goes wrong.
        holding: set when a content waits for `faults.hold`.
    """

    def __init__(self, root: Path, host: str = "127.0.0.1") -> None:
        self.root = root
        self.seen: list[Seen] = []
        self.faults = Faults()
        self.holding = threading.Event()
        self._lock = threading.Lock()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # a client that ends its pull

        self._server = Server((host, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.faults.hold:
            self.faults.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def downloads(self) -> Counter[str]:
        """Return how often the content of each file was asked for."""
        return Counter(
            seen.path.rpartition("/resolve/")[2].partition("/")[2] for seen in self.seen if "/resolve/" in seen.path
        )

    def _takes(self, name: str) -> bool:
        """Use up one of a number of faults."""
        with self._lock:
            left = getattr(self.faults, name)
            if left:
                setattr(self.faults, name, left - 1)
            return bool(left)

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        target = request.path
        if "://" in target:  # a request to a proxy
            target = "/" + target.split("/", 3)[3]
        path = unquote(target.partition("?")[0])
        with self._lock:
            self.seen.append(Seen(path, {name.lower(): value for name, value in request.headers.items()}))
        if self._takes("rate_limited"):
            return _reply(request, 429, {"error": "slow down"}, {"retry-after": "0"})
        if self._takes("broken"):
            return _reply(request, 500, {"error": "oops"})
        parts = path.strip("/").split("/")
        if self.faults.gated and request.headers.get("authorization") != f"Bearer {self.faults.gated}":
            return _reply(request, 401, {"error": "gated"}, {"x-error-code": "GatedRepo"})
        if parts[:2] == ["api", "models"]:
            return self._list(request, parts[2:])
        if "resolve" in parts:
            at = parts.index("resolve")
            return self._send_file(request, "/".join(parts[:at]), "/".join(parts[at + 2 :]))
        if parts[0] == "storage":
            return self._send_file(request, "/".join(parts[1:3]), "/".join(parts[3:]), is_storage=True)
        return _reply(request, 404, {"error": "?"})

    def _list(self, request: http.server.BaseHTTPRequestHandler, parts: list[str]) -> None:
        at = parts.index("revision")
        repository, revision = "/".join(parts[:at]), "/".join(parts[at + 1 :])
        folder = self.root / repository
        if not folder.is_dir():
            return _reply(request, 404, {"error": "?"}, {"x-error-code": "RepoNotFound"})
        if revision not in ("main", self.faults.commit):
            return _reply(request, 404, {"error": "?"}, {"x-error-code": "RevisionNotFound"})
        if self.faults.listed is not None:
            return _reply(request, 200, self.faults.listed)
        siblings = []
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                entry: dict[str, Any] = {
                    "rfilename": str(file.relative_to(folder)),
                    "size": len(content),
                    "blobId": blob_id(content),
                }
                if len(content) >= LARGE_BYTES:
                    entry["blobId"] = "f" * 40  # of the pointer
                    entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                siblings.append(entry)
        return _reply(request, 200, {"id": repository, "sha": self.faults.commit, "siblings": siblings, "gated": False})

    def _send_file(
        self, request: http.server.BaseHTTPRequestHandler, repository: str, path: str, *, is_storage: bool = False
    ) -> None:
        faults, file = self.faults, self.root / repository / path
        if not file.is_file():
            return _reply(request, 404, {"error": "?"}, {"x-error-code": "EntryNotFound"})
        content = file.read_bytes()
        is_large = len(content) >= LARGE_BYTES
        tag = f'"{hashlib.sha256(content).hexdigest() if is_large else blob_id(content)}"'
        linked = {"x-linked-etag": tag, "x-linked-size": str(len(content)), "x-repo-commit": faults.commit}
        if is_large and faults.redirect_to and not is_storage:
            target = f"{faults.redirect_to}/storage/{repository}/{path}"
            return _reply(request, 302, {}, {"location": target, **linked})
        begin = 0
        asked = request.headers.get("range")
        if asked and not faults.no_ranges and request.headers.get("if-range") in (None, tag):
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
        if path == faults.corrupt and self._takes("corruptions"):
            content = bytes([content[0] ^ 1]) + content[1:]
        body = content[begin:]
        request.send_response(206 if begin else 200)
        for name, value in {"etag": tag, **({} if is_storage else linked)}.items():
            request.send_header(name, value)
        if begin:
            request.send_header("content-range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        try:
            if faults.hold and is_large:
                request.wfile.write(body[: len(body) // 2])
                request.wfile.flush()
                self.holding.set()
                faults.hold.wait(60)
                body = body[len(body) // 2 :]
            if faults.drop_after and len(body) > faults.drop_after and self._takes("drops"):
                request.wfile.write(body[: faults.drop_after])
                request.wfile.flush()
                request.close_connection = True
                return None
            request.wfile.write(body)
        except OSError:
            request.close_connection = True
        return None


def _reply(
    request: http.server.BaseHTTPRequestHandler, status: int, document: Any, headers: Mapping[str, str] | None = None
) -> None:
    content = json.dumps(document).encode()
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("content-length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)
