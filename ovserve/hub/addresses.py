"""Which addresses may be connected to: a hub must not send this machine to its own services or to a private network."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from ovserve.errors import HubError

__all__ = ["Resolve", "connect", "is_private_host"]

Resolve = Callable[..., list[Any]]  # socket.getaddrinfo
_MAX_TRIED = 4


def _addresses(host: str, port: int, resolve: Resolve) -> list[str]:
    """Return the numeric addresses of a host. Raises OSError."""
    found = resolve(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_global(address: str) -> bool:
    """Return whether an address is of the public Internet; an IPv4 address inside an IPv6 one counts as itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is not None:
            parsed = inner
    return parsed.is_global and not parsed.is_multicast


def is_private_host(host: str, port: int, resolve: Resolve = socket.getaddrinfo) -> bool:
    """Return whether one of a host's addresses is not public. Raises OSError."""
    return not all(map(_is_global, _addresses(host, port, resolve)))


def connect(
    host: str, port: int, timeout_s: float, *, may_be_private: bool, resolve: Resolve = socket.getaddrinfo
) -> socket.socket:
    """Connect to a host.

    The connection goes to an address that was checked: a second look-up of the name could give another one.

    Raises:
        HubError: the host has an address that is not public, and `may_be_private` is false.
        OSError: no address can be connected to.
    """
    addresses = _addresses(host, port, resolve)
    if not may_be_private and (private := next((each for each in addresses if not _is_global(each)), None)):
        raise HubError(
            f"the hub sends to {host}, which is {private}: not a public address; this is allowed only if HF_ENDPOINT "
            "itself is such an address"
        )
    failure: OSError = OSError(f"{host} has no address")
    for address in addresses[:_MAX_TRIED]:
        try:
            return socket.create_connection((address, port), timeout_s)
        except OSError as error:
            failure = error
    raise failure
