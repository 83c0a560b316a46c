"""Test client that sends exact bytes (in pieces, half-closed, abandoned) and parses responses strictly."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["RawClient", "Response", "pieces_of"]

TIMEOUT_S = 30.0  # longer than any answer takes; a test that reaches it fails


@dataclass(frozen=True)
class Response:
    """One response. `fields`: values by lower-case name; of repeated fields the last."""

    status: int
    fields: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The content as JSON."""
        return json.loads(self.content)

    @property
    def code(self) -> str | None:
        """The code of the error object, which must have exactly its four keys."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["code"]


def pieces_of(data: bytes, size: int) -> list[bytes]:
    """Split the data into pieces of `size` bytes."""
    return [data[start : start + size] for start in range(0, len(data), size)]


class RawClient:
    """One connection. The `with` statement closes it."""

    def __init__(
        self, port: int, *, timeout_s: float = TIMEOUT_S, receive_buffer: int | None = None, address: str = "127.0.0.1"
    ) -> None:
        """Connect from a loopback address."""
        self._socket = socket.socket()
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(timeout_s)
        try:
            if address != "127.0.0.1":
                self._socket.bind((address, 0))
            self._socket.connect(("127.0.0.1", port))
        except OSError:
            self._socket.close()
            raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def socket(self) -> socket.socket:
        """The socket, for operations without a method here."""
        return self._socket

    def send(self, data: bytes, size: int | None = None) -> Self:
        """Send the data; with `size`, in pieces of that many bytes, each in its own packet."""
        return self.send_pieces([data] if size is None else pieces_of(data, size))

    def send_pieces(self, pieces: Iterable[bytes]) -> Self:
        """Send piece by piece. Ignores errors of a connection that the server has closed after its answer."""
        try:
            for piece in pieces:
                self._socket.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return self

    def half_close(self) -> Self:
        """Close the writing side only."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def abandon(self) -> None:
        """Close with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Close normally."""
        self._socket.close()

    def has_answer(self, within_s: float) -> bool:
        """Return whether bytes or the end-of-file arrive within the time."""
        return bool(self._received) or bool(select.select([self._socket], [], [], within_s)[0])

    def read_line(self) -> bytes:
        """Read up to and including the next CRLF."""
        while (end := self._received.find(b"\r\n")) < 0:
            self._more()
        return self.read_exactly(end + 2)

    def read_head(self) -> tuple[int, dict[str, str]]:
        """Read the head of the next response; return its status and fields."""
        line = self.read_line().decode("latin-1")
        version, status, _ = line.split(" ", 2)
        assert version == "HTTP/1.1"
        fields: dict[str, str] = {}
        while (line := self.read_line().decode("latin-1")) != "\r\n":
            name, colon, value = line.partition(": ")
            assert colon, line
            assert name.strip() == name, line
            fields[name.lower()] = value.removesuffix("\r\n")
        return int(status), fields

    def read_response(self, method: str = "GET") -> Response:
        """Read the next response. Raises ConnectionError when the connection ends before it is complete."""
        status, fields = self.read_head()
        if method == "HEAD" or status in {204, 304} or status < 200:
            return Response(status, fields, b"")
        if fields.get("transfer-encoding") == "chunked":
            return Response(status, fields, b"".join(iter(self.read_chunk, b"")))
        if "content-length" in fields:
            return Response(status, fields, self.read_exactly(int(fields["content-length"])))
        assert fields["connection"] == "close"
        return Response(status, fields, self.read_rest())

    def read_chunk(self) -> bytes:
        """Read the next chunk; return its content, empty for the last one."""
        size = int(self.read_line(), 16)
        content = self.read_exactly(size)
        assert self.read_exactly(2) == b"\r\n"
        return content

    def read_exactly(self, count: int) -> bytes:
        """Read `count` bytes."""
        while len(self._received) < count:
            self._more()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def read_rest(self) -> bytes:
        """Read everything up to the end of the connection; a reset counts as its end."""
        try:
            while True:
                self._more()
        except ConnectionError:
            return self.read_exactly(len(self._received))

    def _more(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError(
                f"the connection ended; {len(self._received)} bytes left over: {bytes(self._received[:200])!r}"
            )
        self._received += data
