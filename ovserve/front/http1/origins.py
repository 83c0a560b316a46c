"""Host and Origin fields: their grammar, and the rules that keep foreign web pages out.

Two attacks come through the browser of a user who can reach the server:

- DNS rebinding: a page of evil.example makes its own name mean 127.0.0.1. The browser then treats the server as a part
  of evil.example, and sends `Host: evil.example`. `HostRule` accepts only names that no stranger controls.
- Cross-site requests: a page of evil.example sends requests to the server's address. Browsers add `Origin` to every
  request that can change something or that a script can read (Fetch standard, section 3.2), and `Sec-Fetch-Site` to all
  (W3C Fetch Metadata). `OriginRule` accepts only the server's own pages, loopback pages and configured origins.
"""

from __future__ import annotations

import contextlib
import re
import socket
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from ovserve.settings.access import parse_hosts, parse_origins
from ovserve.settings.options import Settings

__all__ = ["Authority", "HostRule", "OriginRule", "is_loopback_host", "parse_host", "parse_origin"]

# Names that container engines give to the machine that runs the container.
MACHINE_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
MAX_CHARS = 512  # of a Host or Origin field; a longer one is foreign: host names have at most 253 characters
CACHED_VALUES = 256  # most clients of a server send the same few
_DEFAULT_PORTS = {"http": 80, "https": 443}
_authority = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[^\]]*)?\]|[A-Za-z0-9\-._~%]*)(?::([0-9]{0,5}))?")
_origin = re.compile(r"([a-z][a-z0-9+.\-]*)://([^/?#@\s]*)", re.IGNORECASE)
_numeric_host = re.compile(r"[0-9a-fx.]*")


class Authority(NamedTuple):
    """Host and port of a Host field or of an origin; the port is None where it is not given.

    `host` is in lower case, without a dot at the end; an IP address is in its shortest form, without brackets and zone.
    """

    host: str
    port: int | None


class Origin(NamedTuple):
    """A parsed Origin field (RFC 6454 section 7)."""

    scheme: str
    authority: Authority


def parse_host(text: str) -> Authority | None:
    """Parse a Host field or the authority of an origin; None if it is malformed."""
    match = _authority.fullmatch(text)
    if match is None:
        return None
    port = int(match[2]) if match[2] else None
    if port is not None and port > 65535:
        return None
    host = match[1].lower().removesuffix(".")
    address = _address_of(host)
    if address is None and host.startswith("["):
        return None
    return Authority(str(address) if address else host, port)


def parse_origin(text: str) -> Origin | None:
    """Parse an Origin field; None for `null`, for a list of origins and for everything else that is malformed."""
    match = _origin.fullmatch(text) if len(text) <= MAX_CHARS else None
    authority = parse_host(match[2]) if match else None
    return Origin(match[1].lower(), authority) if match and authority else None


def _address_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that a host in a URL denotes, or None for a name."""
    if host.startswith("["):
        try:
            return IPv6Address(host[1:-1].partition("%")[0])
        except ValueError:
            return None
    # Browsers and resolvers read these as addresses too: 127.1, 0x7f000001 (WHATWG URL, IPv4 parser).
    if not host or not _numeric_host.fullmatch(host):
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def is_loopback_host(host: str) -> bool:
    """Return whether a host, as in `Authority`, always means the machine itself (RFC 6761 section 6.3)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class HostRule:
    """Which values of Host are accepted. Thread-safe: immutable, except for a cache.

    Args:
        settings: `allowed_hosts` and `public_url`.
        is_needed: whether names are checked although `allowed_hosts` is not set.
    """

    def __init__(self, settings: Settings, *, is_needed: bool) -> None:
        given = parse_hosts(settings.allowed_hosts)
        self.is_active = given != ("*",) and (is_needed or bool(given))
        names = {*MACHINE_NAMES, socket.gethostname().lower().removesuffix("."), *given}
        with contextlib.suppress(ValueError):  # a malformed address adds no name
            names.add((urlsplit(settings.public_url).hostname or "").removesuffix("."))
        self._names = frozenset(name for name in names if name and not name.startswith("*"))
        self._suffixes = (".localhost", *(name[1:] for name in given if name.startswith("*.")))
        self._is_known = lru_cache(maxsize=CACHED_VALUES)(self._find)

    def allows(self, host: str | None) -> bool:
        """Return whether a request with this Host field is served. One without a host is not from a browser."""
        if not self.is_active or not host:
            return True
        return len(host) <= MAX_CHARS and self._is_known(host)

    def _find(self, host: str) -> bool:
        authority = parse_host(host)
        if authority is None:
            return False
        name = authority.host
        return name in self._names or name.endswith(self._suffixes) or _is_address(name)


class OriginRule:
    """Which origins may use the API. Thread-safe: immutable, except for a cache.

    Attributes:
        allows_all: whether every origin may, `null` included.
    """

    def __init__(self, settings: Settings) -> None:
        given = parse_origins(settings.allowed_origins)
        self.allows_all = given == ("*",)
        self._origins = frozenset(given)
        self._is_known = lru_cache(maxsize=CACHED_VALUES)(self._find)

    def is_listed(self, origin: str) -> bool:
        """Return whether an origin is configured or loopback, so that its scripts may read responses (CORS)."""
        return self.allows_all or (len(origin) <= MAX_CHARS and self._is_known(origin))

    def _find(self, origin: str) -> bool:
        text = origin.lower()
        if text in self._origins:
            return True
        parsed = parse_origin(text)
        if parsed is None:
            scheme, separator, rest = text.partition("://")  # some apps send their scheme alone, `file://`
            return bool(separator) and not rest and f"{scheme}://" in self._origins
        if f"{parsed.scheme}://" in self._origins:
            return True
        return parsed.scheme in _DEFAULT_PORTS and is_loopback_host(parsed.authority.host)

    def allows(self, origin: str, host: str | None) -> bool:
        """Return whether a request with these Origin and Host fields is served."""
        return self.is_listed(origin) or _is_own(origin, host)

    def allows_site(self, site: str | None, host: str | None) -> bool:
        """Return whether a request without Origin is served, by its Sec-Fetch-Site and Host fields.

        A page on the same site may be a stranger's (another subdomain), except on loopback, where all pages are local.
        An unknown value is ignored (W3C Fetch Metadata, section 2.3).
        """
        if self.allows_all or site not in ("cross-site", "same-site"):
            return True
        authority = parse_host(host or "")
        return site == "same-site" and authority is not None and is_loopback_host(authority.host)


def _is_own(origin: str, host: str | None) -> bool:
    """Return whether the origin has the host and port of the request, whatever its scheme.

    Behind a proxy with TLS, the page's scheme is https and the request's is http. A port that is not given is the
    default of the origin's scheme.
    """
    parsed, own = parse_origin(origin), parse_host(host or "")
    if parsed is None or own is None or not own.host:
        return False
    default = _DEFAULT_PORTS.get(parsed.scheme)
    return parsed.authority.host == own.host and (parsed.authority.port or default) == (own.port or default)
