"""Forwarded fields: the client's address, as the reverse proxies in front of the server report it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from ovserve.settings.access import UNIX_PEER, parse_networks, trusts_unix
from ovserve.settings.options import Settings

__all__ = ["TrustedProxies"]

# RFC 7239 section 6: an IPv4 address, or an IPv6 one in brackets, with or without a port. X-Forwarded-For has no
# standard: proxies write IPv6 addresses without brackets too.
_node = re.compile(r'"?(?:\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+)(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+))"?')
_for = re.compile(r'(?:^|;)[ \t]*for=("[^"]*"|[^;]*)', re.IGNORECASE)


class TrustedProxies:
    """The proxies of `trusted_proxies`. Thread-safe: immutable."""

    def __init__(self, settings: Settings) -> None:
        self._networks = parse_networks(settings.trusted_proxies)
        self._trusts_unix = trusts_unix(settings.trusted_proxies)
        self._sends_header = settings.proxy_protocol

    def sends_header(self, peer: str) -> bool:
        """Return whether the connections of this peer begin with a header of the PROXY protocol."""
        return self._sends_header and self._is_trusted(peer)

    def client_address(self, peer: str, fields: Mapping[str, str]) -> str:
        """Return the address of the client of one request.

        Each proxy appends the address of its own peer. The last address that is not a trusted proxy's is therefore the
        client's; everything before it was sent by the client, and means nothing. Fields of a peer that is not a trusted
        proxy are ignored, as is what cannot be parsed.

        Args:
            peer: the address of the connection's peer.
            fields: the request's fields by lower-case name. X-Forwarded-For is used, and Forwarded without it.
        """
        if not self._is_trusted(peer):
            return peer
        address = peer
        for text in reversed(_addresses(fields)):
            match = _node.fullmatch(text.strip(" \t"))
            if match is None:
                return address
            try:
                address = str(_plain(match[1] or match[2] or match[3]))
            except ValueError:
                return address
            if not self._is_trusted(address):
                return address
        return address

    def _is_trusted(self, text: str) -> bool:
        if text == UNIX_PEER:
            return self._trusts_unix
        if not self._networks:
            return False
        try:
            address = _plain(text)
        except ValueError:
            return False
        return any(
            address in network
            for network in self._networks
            if isinstance(network, IPv6Network) == (address.version == 6)
        )


def _plain(text: str) -> IPv4Address | IPv6Address:
    """Return an address, an IPv4 address in IPv6 form as the IPv4 address. Raises ValueError."""
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _addresses(fields: Mapping[str, str]) -> list[str]:
    """Return what the proxies have reported, in the order in which they appended it."""
    listed = fields.get("x-forwarded-for")
    if listed is not None:
        return listed.split(",")
    found = []
    for element in fields.get("forwarded", "").split(","):
        match = _for.search(element)
        found.append(match[1] if match else "")
    return found
