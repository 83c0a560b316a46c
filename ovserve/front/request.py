"""Head of one request as a route sees it, without the body."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from ipaddress import IPv6Address, IPv6Network
from urllib.parse import parse_qsl

from ovserve.accounts import Holding
from ovserve.api.record import Record
from ovserve.errors import InternalError
from ovserve.front.http1.head import Head
from ovserve.grants import Grant

__all__ = ["Request", "escape_for_log", "internal_error", "network_of", "new_request_id"]

LOG_TEXT_CHARS = 200  # of an error message in the log
FINGERPRINT_CHARS = 16
_short_printable = re.compile(r"[!-~]{1,64}")


def new_request_id() -> str:
    """Return an unguessable request id with 128 random bits."""
    return f"req_{os.urandom(16).hex()}"


class Request:
    """The part of `api.exchange.Exchange` that needs no socket. Thread-safe: no.

    Attributes:
        id: request id, generated here, never taken from the client.
        method: request method of the head.
        path: path of the request target, percent-decoded once.
        address: IP address of the peer.
        is_secure: whether it has arrived over TLS.
        is_verified: whether the request has a configured API key; set by `Keys.check`.
        grant: what its named key may do; None without one. Set by `Keys.check`.
        record: what the API notes for the end of the request.
        notes: fields that the API adds to the log line of the request.
    """

    def __init__(self, head: Head, address: str, *, is_secure: bool = False) -> None:
        self.head = head
        self.is_secure = is_secure
        self.id = new_request_id()
        self.method = head.method
        self.path = head.path
        self.address = address
        self.is_verified = False
        self.grant: Grant | None = None
        self.record = Record()
        self.notes: dict[str, str] = {}

    @cached_property
    def query(self) -> Mapping[str, str]:
        """Query parameters; the first value of each name."""
        found: dict[str, str] = {}
        if self.head.query:
            for name, value in parse_qsl(self.head.query, keep_blank_values=True):
                found.setdefault(name, value)
        return found

    @cached_property
    def network(self) -> str:
        """The part of the address that its owner cannot choose."""
        return network_of(self.address)

    @property
    def client(self) -> str:
        """Whose shares the request counts for: its API key if it is verified, else the network."""
        return self.key if self.is_verified else self.network

    @property
    def key_name(self) -> str:
        """Name of the request's named key; empty without one."""
        return self.grant.name if self.grant is not None else ""

    def take_pictures(self, model: str, count: int, aliases: Collection[str] = ()) -> None:
        """Count pictures for the named key. Raises Forbidden and RateLimited."""
        if self.grant is not None:
            self.grant.take_pictures(model, count, aliases)

    @property
    def holding(self) -> Holding | None:
        """None: a request without a body holds nothing in the spool."""
        return None

    def release_form(self) -> None:
        """Do nothing: there is no form."""

    def offer_form(self, on_release: Callable[[], None]) -> None:
        """Do nothing: there is no form."""

    @cached_property
    def api_key(self) -> str:
        """The client's API key from Authorization (Bearer, or Basic as the password) or api-key; "" without one."""
        scheme, _, credentials = (self.header("authorization") or "").partition(" ")
        key = ""
        if scheme.lower() == "bearer":
            key = credentials.strip()
        elif scheme.lower() == "basic":
            key = _password(credentials.strip())
        return key or self.header("api-key") or ""

    @cached_property
    def key(self) -> str:
        """Truncated SHA-256 of the API key, as 16 hex digits; "" without a key."""
        return hashlib.sha256(self.api_key.encode("latin-1")).hexdigest()[:FINGERPRINT_CHARS] if self.api_key else ""

    @property
    def client_request_id(self) -> str | None:
        """The client's X-Client-Request-Id, for the log only; None unless it is short and printable."""
        name = self.header("x-client-request-id")
        return name if name and _short_printable.fullmatch(name) else None

    def note(self, name: str, value: str) -> None:
        """Add a field to the log line of the request."""
        self.notes[name] = value

    def header(self, name: str) -> str | None:
        """Return a request field by its lower-case name."""
        return self.head.fields.get(name)


def network_of(address: str) -> str:
    """Return the part of an address that its owner cannot choose: an IPv4 address, or the /64 of an IPv6 address.

    A host chooses the lower 64 bits of its IPv6 address itself (RFC 4291 section 2.5.1). If they counted, one host
    could appear as a different client on each connection.
    """
    if ":" not in address:
        return address
    parsed = IPv6Address(address)
    return str(parsed.ipv4_mapped or IPv6Network((int(parsed), 64), strict=False))


def _password(credentials: str) -> str:
    """Return the password of Basic credentials (RFC 7617 section 2); "" for malformed ones. The user's name is free."""
    try:
        decoded = base64.b64decode(credentials.encode("latin-1"), validate=True)
    except binascii.Error:
        return ""
    return decoded.partition(b":")[2].decode("latin-1")


def internal_error(request_id: str) -> InternalError:
    """Return the error that a client receives for a bug; the traceback is in the log only."""
    return InternalError(f"Internal server error; the server's log has the details under the request id {request_id}.")


def escape_for_log(text: str) -> str:
    """Return the text for a log line: truncated, on one line, with control and non-ASCII characters escaped.

    Error messages quote the client's own text, which could otherwise forge log lines or move a terminal's cursor.
    """
    shown = text[:LOG_TEXT_CHARS].encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
