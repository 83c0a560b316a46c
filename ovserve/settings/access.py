"""Parsers of the options for access: origins, host names, addresses of proxies, the admin listener."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple

__all__ = [
    "UNIX_PEER",
    "ListenAddress",
    "parse_hosts",
    "parse_listen",
    "parse_networks",
    "parse_origins",
    "trusts_unix",
]

UNIX_PEER = "unix"  # the peers of a Unix socket, which have no address

# `app://`, `app://*`: every origin with this scheme. Not for http and https, where an origin means one site.
_SCHEME = re.compile(r"(?!https?:)([a-z][a-z0-9+.\-]*://)\*?")
_ORIGIN = re.compile(
    r"null|[a-z][a-z0-9+.\-]*://[A-Za-z0-9._~\-]+(?::[0-9]{1,5})?|[a-z]+://\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?"
)
_HOST_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_.\-]{0,251}[a-z0-9_])?")
_LISTEN = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:]*)):([0-9]{1,5})")


class ListenAddress(NamedTuple):
    """Where to listen: a Unix socket if `path` is not empty, else an IP address and a port.

    `scheme` is `http` (without TLS even if there is a certificate), `https` (only with one), or empty.
    """

    host: str
    port: int
    path: str = ""
    scheme: str = ""


def _members(text: str | None) -> list[str]:
    return [member for part in (text or "").split(",") if (member := part.strip(" "))]


def parse_origins(text: str | None) -> tuple[str, ...]:
    """Parse a comma-separated list of origins; `("*",)` means all of them. Raises ValueError.

    Origins are returned in lower case, as browsers send them: RFC 6454 sections 4 and 6.2. A scheme alone, such as
    `app://` or `app://*`, is returned as `app://` and means every origin with that scheme.
    """
    origins = tuple(member.lower() for member in _members(text))
    if origins == ("*",):
        return origins
    found = []
    for origin in origins:
        if scheme := _SCHEME.fullmatch(origin):
            found.append(scheme[1])
        elif _ORIGIN.fullmatch(origin):
            found.append(origin)
        else:
            raise ValueError(
                f"{origin!r} is not an origin; expected a form such as https://a.example, http://192.0.2.1:3000 or app://"
            )
    return tuple(dict.fromkeys(found))


def parse_hosts(text: str | None) -> tuple[str, ...]:
    """Parse a comma-separated list of host names without ports; `("*",)` means all of them. Raises ValueError.

    Names are returned in lower case, without a dot at the end. `*.a.example` means every name below a.example.
    """
    hosts = tuple(member.lower().removesuffix(".") for member in _members(text))
    for host in hosts:
        if not (_HOST_NAME.fullmatch(host) or hosts == ("*",)):
            raise ValueError(f"{host!r} is not a host name; expected a form such as a.example or *.a.example, no port")
    return tuple(dict.fromkeys(hosts))


def parse_networks(text: str | None) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse a comma-separated list of IP addresses and networks (`192.0.2.0/24`). Raises ValueError.

    The member `unix` is left out: `trusts_unix`.
    """
    try:
        return tuple(ip_network(member) for member in _members(text) if member != UNIX_PEER)
    except ValueError as error:
        raise ValueError(f"expected IP addresses or networks such as 192.0.2.1 or 192.0.2.0/24: {error}") from None


def trusts_unix(text: str | None) -> bool:
    """Return whether a list of networks has the member `unix`."""
    return UNIX_PEER in _members(text)


def parse_listen(text: str | None) -> ListenAddress | None:
    """Parse where to listen; None stays. Raises ValueError.

    The forms are `ADDRESS:PORT`, `[ADDRESS]:PORT`, both also after `http://` or `https://`, and the absolute path of a
    Unix socket, also after `unix:`.
    """
    if text is None:
        return None
    path = text.removeprefix("unix:")
    if path.startswith("/"):
        return ListenAddress("", 0, path)
    scheme, _, rest = text.rpartition("://")
    match = _LISTEN.fullmatch(rest)
    if match is None or int(match[3]) > 65535 or scheme not in ("", "http", "https"):
        raise ValueError("expected an address with a port, such as 127.0.0.1:8001, or the path of a Unix socket")
    host = match[1] or match[2]
    if host == "localhost":
        host = "127.0.0.1"
    try:
        return ListenAddress(str(ip_address(host)), int(match[3]), scheme=scheme)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address; the name of a host may mean several addresses") from None
