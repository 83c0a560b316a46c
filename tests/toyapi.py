"""A small API for tests of the front end; the path selects the behaviour."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.api.exchange import Exchange, FileReply, JsonReply, Reply, ServerEvent, StreamReply
from ovserve.api.record import End
from ovserve.deadline import Deadline
from ovserve.errors import ApiError, ClientGone, InvalidValue, MethodNotAllowed, NotFound, QueueFull, WorkerCrashed
from ovserve.front.listener import Listener
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool

__all__ = ["ToyApi", "serving"]

WAIT_S = 30.0


class ToyWindows:
    """A chunk of `count` windows of `size` bytes; after `fail` windows its source fails."""

    def __init__(self, produced: list[int], query: Mapping[str, str]) -> None:
        self._produced = produced
        self._size = int(query["size"])
        self._count = int(query["count"])
        self._fail = int(query.get("fail", self._count))

    def __len__(self) -> int:
        return self._size * self._count

    def windows(self) -> Iterator[bytes]:
        """Yield the windows and record the size of each."""
        for number in range(self._count):
            if number == self._fail:
                raise OSError("the toy's source has failed")
            self._produced.append(self._size)
            yield bytes([65 + number % 26]) * self._size


@dataclass(frozen=True)
class ToyMatch:
    """The route of a request: only its properties."""

    is_health: bool
    is_open: bool
    is_admin: bool = False
    is_operator: bool = False
    is_public: bool = False
    is_exempt: bool = False
    challenge: str = "Bearer"

    def error_document(self, error: ApiError) -> Mapping[str, Any]:
        """Return OpenAI's error object."""
        return error.body()


class ToyApi:
    """The API, with a record of its requests.

    Attributes:
        matched: method and path of each call of `match`.
        seen: paths of requests in the order of arrival.
        gone: paths of requests whose clients disconnected while the handler waited.
        closed: one entry for each closed event stream, and for each closed reply of `/windows` and `/windowed-file`.
        refused: codes of the errors with which requests were rejected before `answer`.
        ends: how the exchanges have ended.
        windows: sizes of the windows that have been produced for `/windows`.
    """

    def __init__(self) -> None:
        self.matched: queue.Queue[tuple[str, str]] = queue.Queue()
        self.seen: queue.Queue[str] = queue.Queue()
        self.gone: queue.Queue[str] = queue.Queue()
        self.closed: queue.Queue[str] = queue.Queue()
        self.windows: list[int] = []
        self.refused: queue.Queue[str] = queue.Queue()
        self.ends: queue.Queue[End] = queue.Queue()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    def release(self, count: int = 1) -> None:
        """Release this many waiting handlers."""
        os.eventfd_write(self._wakeup, count)

    def close(self) -> None:
        """Close the event descriptor."""
        os.close(self._wakeup)

    def match(self, method: str, path: str) -> ToyMatch:
        """Return the properties of the route, which its path names: `/health`, `/file`, `/admin`, `/operator`."""
        self.matched.put((method, path))
        is_read = method in ("GET", "HEAD")
        is_health = path == "/health" and is_read
        return ToyMatch(
            is_health,
            is_open=path == "/health" or method == "OPTIONS",
            is_admin=path == "/admin",
            is_operator=path == "/operator",
            is_public=is_health or (path == "/file" and is_read),
            is_exempt=is_health or path == "/operator",
        )

    def count_refused(self, error: ApiError) -> None:
        """Record the error's code."""
        self.refused.put(str(error.code))

    def note_end(self, exchange: Exchange, match: ToyMatch, end: End) -> None:
        """Record how the exchange has ended."""
        self.ends.put(end)

    def answer(self, exchange: Exchange, match: ToyMatch) -> Reply:
        """Run the handler that the path names."""
        self.seen.put(exchange.path)
        name = exchange.path.strip("/").partition("/")[0].replace("-", "_")
        route = getattr(self, "_" + name, None)
        if route is None:
            raise NotFound(f"no {exchange.path}")
        return route(exchange)

    def _health(self, exchange: Exchange) -> Reply:
        match exchange.query.get("do"):
            case "bug":
                raise KeyError("bug in a health check")
            case "error":
                raise InvalidValue("no", param="do")
            case "form":
                exchange.read_form()
            case "wait":
                exchange.wait(self._wakeup, Deadline.after(WAIT_S))
            case "stream":
                return self._stream(exchange)
            case "file":
                return FileReply(b"ok", "text/plain")
            case "large":
                return JsonReply([b"x" * 1_000_000] * 10)
        return _json({"live": True})

    def _describe(self, exchange: Exchange) -> Reply:
        names = ("host", "content-type", "x-a", "connection")
        return _json(
            {
                "method": exchange.method,
                "path": exchange.path,
                "query": dict(exchange.query),
                "key": exchange.key,
                "address": exchange.address,
                "fields": {name: exchange.header(name) for name in names},
            }
        )

    def _echo(self, exchange: Exchange) -> Reply:
        form = exchange.read_form()
        assert exchange.read_form() is form
        uploads = []
        for upload in form.uploads:
            with upload.view() as view:
                uploads.append([upload.name, upload.size, hashlib.sha256(view).hexdigest()])
        return _json({"fields": [list(pair) for pair in form.fields], "uploads": uploads})

    def _admin(self, _: Exchange) -> Reply:
        return _json({"done": True})

    _operator = _admin

    def _ignore(self, _: Exchange) -> Reply:
        return _json({"ignored": True})

    def _large(self, exchange: Exchange) -> Reply:
        size, count = int(exchange.query["size"]), int(exchange.query.get("count", "1"))
        return JsonReply([memoryview(bytes([65 + index % 26]) * size) for index in range(count)])

    def _windows(self, exchange: Exchange) -> Reply:
        chunks = [b"<", ToyWindows(self.windows, exchange.query), b">"]
        return JsonReply(chunks, close=lambda: self.closed.put(exchange.path))

    def _windowed_file(self, exchange: Exchange) -> Reply:
        content = ToyWindows(self.windows, exchange.query)
        return FileReply(content, "image/png", close=lambda: self.closed.put(exchange.path))

    def _file(self, _: Exchange) -> Reply:
        return FileReply(memoryview(b"\x89PNG"), "image/png", headers={"Cache-Control": "private"})

    def _nothing(self, _: Exchange) -> Reply:
        return FileReply(b"", "", 204)

    def _wait(self, exchange: Exchange) -> Reply:
        self._await_release(exchange)
        return _json({"waited": True})

    def _tick(self, exchange: Exchange) -> Reply:
        own = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            return _json({"woken": exchange.wait(own, Deadline.after(0.05))})
        finally:
            os.close(own)

    def _stream(self, exchange: Exchange) -> Reply:
        return StreamReply(self._events(exchange), {"x-toy": "1"})

    def _events(self, exchange: Exchange) -> Generator[ServerEvent, None, None]:
        try:
            for word in exchange.query.get("do", "").split("."):
                match word:
                    case "wait":
                        self._await_release(exchange)
                    case "comment":
                        yield ServerEvent("", [b"step 1/2"])
                    case "error":
                        raise InvalidValue("no such thing", param="x")
                    case "bug":
                        raise KeyError("bug in a stream")
                    case "":
                        return
                    case "windows":
                        yield ServerEvent("piece", [b"<", ToyWindows(self.windows, exchange.query), b">"])
                    case size:
                        yield ServerEvent("piece", [b"x" * int(size)])
        finally:
            self.closed.put(exchange.path)

    def _raise(self, exchange: Exchange) -> Reply:
        match exchange.query["kind"]:
            case "bug":
                raise KeyError("bug in a route")
            case "queue_full":
                raise QueueFull("full", retry_after_s=7)
            case "method":
                raise MethodNotAllowed("only POST", headers={"Allow": "POST"})
            case "crash":
                raise WorkerCrashed("twice")
            case "injection":
                return JsonReply([b"{}"], headers={"x-a": "b\r\nSet-Cookie: c"})
            case other:
                raise InvalidValue(f"no {other}", param="kind")

    def _await_release(self, exchange: Exchange) -> None:
        try:
            assert exchange.wait(self._wakeup, Deadline.after(WAIT_S))
        except ClientGone:
            self.gone.put(exchange.path)
            raise
        os.eventfd_read(self._wakeup)


def _json(document: Any) -> JsonReply:
    return JsonReply([json.dumps(document).encode()])


@contextmanager
def serving(*, spool_bytes: int = 256 * 1024 * 1024, **settings: Any) -> Iterator[tuple[Listener, ToyApi]]:
    """Run a listener on a free loopback port; yield it and its API. Both are closed at the end of the block.

    `spool_bytes` is the size of its spool. Host is not checked unless `allowed_hosts` is given: the requests of these
    tests name hosts of their own.
    """
    settings.setdefault("allowed_hosts", "*")
    with tempfile.TemporaryDirectory() as folder:
        api, spool = ToyApi(), Spool(Path(folder), spool_bytes)
        listener = Listener(Settings(port=0, **settings), api, spool)
        listener.start()
        try:
            yield listener, api
        finally:
            listener.stop(0)
            api.close()
            assert spool.used_bytes == 0, "an exchange did not release its segments"
            spool.close()
