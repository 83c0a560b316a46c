"""One request for pictures to a running server: send the form, follow the stream, return the pictures.

Closing the connection cancels the job: the server then stops at the next denoising step.
"""

from __future__ import annotations

import binascii
import contextlib
import http.client
import json
import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ovserve.client.events import EventParser

__all__ = ["File", "ImageServer", "NoServer", "Picture", "Progress", "Refused", "parse_progress"]

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 660.0  # the server sends a line every 15 s, or answers within its own deadline of 600 s
MAX_LINE_BYTES = 512 << 20  # a picture of 4096x4096 pixels in base64 takes at most 90 MB
_READ_BYTES = 1 << 16
_MAX_ERROR_BYTES = 1 << 20


class NoServer(Exception):
    """No server answers at the URL; the message is one line."""


class Refused(Exception):
    """The server answered with an error.

    Attributes:
        status: the status code; 0 for an error within a stream.
        param: the field at fault, or None.
    """

    def __init__(self, message: str, status: int = 0, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class File:
    """One file of the form: field name, file name, content."""

    field: str
    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture: the file's bytes, and the fields of the server's event without them."""

    content: bytes
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a job does: a step of a picture, or a text about what it waits for.

    Attributes:
        picture, step, steps: numbers from 1; 0 while it waits.
        text: what it waits for; empty during the steps.
    """

    picture: int = 0
    step: int = 0
    steps: int = 0
    text: str = ""


def parse_progress(comment: str) -> Progress:
    """Return what a comment line of the stream says; unknown lines become text."""
    words = comment.split()
    if len(words) == 4 and words[0] == "picture" and words[2] == "step":  # `picture 1: step 3/12`
        picture, (step, slash, steps) = words[1].rstrip(":"), words[3].partition("/")
        if slash and all(number.isascii() and number.isdigit() for number in (picture, step, steps)):
            return Progress(int(picture), int(step), int(steps))
    return Progress(text=comment)


class ImageServer:
    """A server at a URL.

    Args:
        url: its base URL, with or without `/v1`.
        key: the API key; empty for none.

    Raises:
        ValueError: `url` is no http or https URL.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url[:100]!r} is not a URL such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._parts = parts
        self._prefix = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/v3")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def models(self) -> list[dict[str, Any]]:
        """Return the server's list of models. Raises NoServer and Refused."""
        with _Exchange(self._connect(), "GET", f"{self._prefix}/v1/models", self._headers) as reply:
            document = json.loads(reply.read(_MAX_ERROR_BYTES))
        return [model for model in document.get("data", []) if isinstance(model, dict)]

    def run(
        self,
        endpoint: str,
        fields: Mapping[str, str],
        files: Sequence[File],
        on_progress: Callable[[Progress], None],
    ) -> list[Picture]:
        """Make pictures; return them in the order of their numbers.

        Args:
            endpoint: edits, generations or variations.
            fields: the fields of the form, as text.
            files: its files.
            on_progress: called for each line of progress.

        Raises:
            NoServer: the server cannot be reached, or the connection ended early.
            Refused: the server answered with an error.
        """
        streams = endpoint != "variations"  # which have no streams
        sent = {**fields, "response_format": "b64_json", **({"stream": "true"} if streams else {})}
        boundary = secrets.token_hex(16)
        headers = {**self._headers, "content-type": f"multipart/form-data; boundary={boundary}"}
        body = b"".join(_form(sent, files, boundary))
        path = f"{self._prefix}/v1/images/{endpoint}"
        with _Exchange(self._connect(), "POST", path, headers, body) as reply:
            try:
                if not streams:
                    return _listed(json.loads(reply.read()))
                return sorted(_streamed(reply, on_progress), key=_index)  # each comes when it is finished
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise NoServer(f"the connection to {self.url} ended: {error or type(error).__name__}") from None

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except OSError as error:
            raise NoServer(f"no server at {self.url}: {error.strerror or error}") from None
        connection.sock.settimeout(SILENCE_TIMEOUT_S)
        return connection


class _Exchange:
    """One request on its own connection; `with` yields the 200 response and closes the connection at the end."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
    ) -> None:
        self._connection = connection
        self._request = (method, path, body, dict(headers))

    def __enter__(self) -> http.client.HTTPResponse:
        method, path, body, headers = self._request
        try:
            # After an early refusal the body cannot be written, but the response can be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            refusal = None if response.status == http.client.OK else _refused(response)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise NoServer(f"the server did not answer: {error or type(error).__name__}") from None
        except BaseException:
            self._connection.close()
            raise
        if refusal is not None:
            self._connection.close()
            raise refusal
        return response

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _refused(response: http.client.HTTPResponse) -> Refused:
    try:
        error = json.loads(response.read(_MAX_ERROR_BYTES))["error"]
        return Refused(str(error["message"]), response.status, error.get("param"))
    except (ValueError, TypeError, LookupError, AttributeError):
        return Refused(f"the server answered {response.status} {response.reason}", response.status)


def _form(fields: Mapping[str, str], files: Sequence[File], boundary: str) -> Iterator[bytes]:
    """Yield the parts of a multipart form (RFC 7578)."""
    for name, value in fields.items():
        yield f'--{boundary}\r\ncontent-disposition: form-data; name="{_quoted(name)}"\r\n\r\n{value}\r\n'.encode()
    for file in files:
        head = f'content-disposition: form-data; name="{_quoted(file.field)}"; filename="{_quoted(file.name)}"'
        yield f"--{boundary}\r\n{head}\r\ncontent-type: application/octet-stream\r\n\r\n".encode()
        yield file.content
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def _quoted(text: str) -> str:
    """Return a name for a quoted string, escaped as browsers do (HTML standard, section 4.10.21.8)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode(errors="replace").decode()


def _streamed(response: http.client.HTTPResponse, on_progress: Callable[[Progress], None]) -> Iterator[Picture]:
    parser, count = EventParser(MAX_LINE_BYTES), 0
    while data := response.read1(_READ_BYTES):
        for event in parser.feed(data):
            for comment in event.comments:
                on_progress(parse_progress(comment))
            if not event.data:
                continue
            document = json.loads(event.data)
            if event.name == "error" or "error" in document:
                error = document.get("error", document)
                raise Refused(str(error.get("message", "the job failed")), param=error.get("param"))
            if event.name.endswith(".completed"):
                count += 1
                yield _picture(document)
    if not count:
        raise ValueError("no picture came")


def _index(picture: Picture) -> int:
    index = picture.fields.get("picture_index", 0)
    return index if isinstance(index, int) else 0


def _listed(document: Mapping[str, Any]) -> list[Picture]:
    shared = {name: value for name, value in document.items() if name != "data"}
    return [_picture({**shared, **entry}) for entry in document["data"]]


def _picture(document: dict[str, Any]) -> Picture:
    content = binascii.a2b_base64(document.pop("b64_json"))
    return Picture(content, document)
