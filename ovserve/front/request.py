"""One request as a route sees it: what its head says, without its body."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cached_property
from ipaddress import IPv6Address, IPv6Network
from urllib.parse import parse_qsl

from ovserve.errors import InternalError
from ovserve.front.http1.head import Head

__all__ = ["Request", "failed", "harmless", "new_request_id"]

WHY_CHARS = 200  # of an error's message in the log
FINGERPRINT_CHARS = 16
_short_printable = re.compile(r"[!-~]{1,64}")


def new_request_id() -> str:
    """An unguessable id: 128 random bits."""
    return f"req_{os.urandom(16).hex()}"


class Request:
    """The part of `api.exchange.Exchange` that needs no socket. Thread-safe: no.

    Attributes:
        id: ours, never the client's.
        method, path: of the head; the path percent-decoded once.
        address: the peer's address.
        is_verified: its API key is one of those that are known.
    """

    def __init__(self, head: Head, address: str) -> None:
        self.head = head
        self.id = new_request_id()
        self.method = head.method
        self.path = head.path
        self.address = address
        self.is_verified = False

    @cached_property
    def query(self) -> Mapping[str, str]:
        """The query's fields, the first of each name."""
        found: dict[str, str] = {}
        if self.head.query:
            for name, value in parse_qsl(self.head.query, keep_blank_values=True):
                found.setdefault(name, value)
        return found

    @cached_property
    def network(self) -> str:
        """The part of the address that its owner cannot choose: all of an IPv4 address, half of an IPv6 address.

        A host has the other half to itself (RFC 4291 section 2.5.1), and could else be somebody else at each connection.
        """
        if ":" not in self.address:
            return self.address
        address = IPv6Address(self.address)
        return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))

    @cached_property
    def api_key(self) -> str:
        """The API key that the client sent, as OpenAI's clients do or as Azure's; empty when there is none."""
        scheme, _, key = (self.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            key = ""
        return key.strip() or self.header("api-key") or ""

    @cached_property
    def key(self) -> str:
        """A fingerprint of the API key, from which the key cannot be had; empty without one."""
        return hashlib.sha256(self.api_key.encode("latin-1")).hexdigest()[:FINGERPRINT_CHARS] if self.api_key else ""

    @property
    def client_request_id(self) -> str | None:
        """What the client calls the request, for the log only, and only when it is short and printable."""
        name = self.header("x-client-request-id")
        return name if name and _short_printable.fullmatch(name) else None

    def header(self, name: str) -> str | None:
        """A request field by its lower-case name."""
        return self.head.fields.get(name)


def failed(request_id: str) -> InternalError:
    """What a client is told of a bug, whose traceback stands in the log."""
    return InternalError(f"The server failed on this request. Its log tells why, under {request_id}.")


def harmless(text: str) -> str:
    """What an error tells of a client's own text, for a log: short, on one line, and nothing in it moves a terminal's cursor."""
    shown = text[:WHY_CHARS].encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
