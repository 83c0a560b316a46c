"""Parser of the header of the PROXY protocol, versions 1 and 2: the client's address, as a proxy reports it.

    START ──12 bytes──▶ signature of version 2 ──4 bytes──▶ length ──▶ addresses and extensions ──▶ done
        └── "PROXY " ──▶ line of version 1, up to CR LF ──▶ done

The caller receives exactly `wanted` bytes, feeds them, and repeats that until `wanted` is 0. So no byte is taken from
what follows the header, which may belong to a TLS handshake.

Source: "The PROXY protocol, versions 1 & 2", HAProxy's documentation, 2020-03-05. A checksum in the extensions of
version 2 is verified (section 2.2.3); all other extensions are skipped.
"""

from __future__ import annotations

import re
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from ovserve.errors import MalformedRequest

__all__ = ["MAX_EXTENSION_BYTES", "ProxyHeader", "crc32c"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
MAX_LINE_BYTES = 107  # of version 1, by its specification
MAX_EXTENSION_BYTES = 4096  # of version 2, addresses included; HAProxy sends some hundred bytes
_HEAD_BYTES = 16
_V1 = re.compile(rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]{2,39}) ([0-9A-Fa-f:.]{2,39}) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})")
_LOCAL, _PROXY = 0x20, 0x21  # version and command
_TCP4, _TCP6 = 0x11, 0x21
_WITHOUT_ADDRESS = frozenset({0x00, 0x31})  # unspecified, and Unix sockets, whose clients have no address
_ADDRESS_BYTES = {_TCP4: 12, _TCP6: 36}
_EXTENSION_HEAD_BYTES = 3  # type, and length in two bytes
_CRC32C, _CRC32C_BYTES = 0x03, 4  # PP2_TYPE_CRC32C
_CASTAGNOLI = 0x82F63B78  # its polynomial, reflected (RFC 3720 appendix B.4)


class ProxyHeader:
    """Reads one header. Thread-safe: no.

    Attributes:
        wanted: how many bytes to feed next; 0: the header is complete.
        address: the client's address; None if the header has none, so that the peer's counts.
    """

    def __init__(self) -> None:
        self.wanted = len(SIGNATURE)
        self.address: str | None = None
        self._data = b""

    def feed(self, data: bytes) -> None:
        """Add received bytes, at most `wanted`.

        Raises:
            MalformedRequest: this is no header of the PROXY protocol, or it is too long.
        """
        self._data += data
        self.wanted -= len(data)
        if self.wanted:
            return
        if self._data.startswith(SIGNATURE):
            self._read_v2()
        elif self._data.startswith(b"PROXY "):
            self._read_v1()
        else:
            raise MalformedRequest("a connection from a trusted proxy has to begin with a header of the PROXY protocol")

    # --- version 1 ---

    def _read_v1(self) -> None:
        if not self._data.endswith(b"\r\n"):
            if len(self._data) >= MAX_LINE_BYTES:
                raise MalformedRequest(f"the line of the PROXY protocol is longer than {MAX_LINE_BYTES} bytes")
            # Never beyond the end of the line: CR LF is missing, or only LF.
            self.wanted = 1 if self._data.endswith(b"\r") else min(2, MAX_LINE_BYTES - len(self._data))
            return
        line = self._data[:-2]
        if b"\n" in line or b"\r" in line:
            raise MalformedRequest("the line of the PROXY protocol has a line break inside")
        if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
            return
        match = _V1.fullmatch(line)
        if match is None or max(int(match[4]), int(match[5])) > 65535:
            raise MalformedRequest("the line of the PROXY protocol is malformed")
        kind = IPv4Address if match[1] == b"TCP4" else IPv6Address
        try:
            kind(match[3].decode())
            self.address = _text(kind(match[2].decode()))
        except ValueError:
            raise MalformedRequest("the line of the PROXY protocol has an invalid address") from None

    # --- version 2 ---

    def _read_v2(self) -> None:
        data = self._data
        if len(data) < _HEAD_BYTES:
            self.wanted = _HEAD_BYTES - len(data)
            return
        command, family, length = data[12], data[13], int.from_bytes(data[14:16], "big")
        if command not in (_LOCAL, _PROXY):
            raise MalformedRequest(f"version and command 0x{command:02x} of the PROXY protocol are not supported")
        if length > MAX_EXTENSION_BYTES:
            raise MalformedRequest(f"the PROXY header has {length} bytes; at most {MAX_EXTENSION_BYTES} are allowed")
        is_known = family in _ADDRESS_BYTES or family in _WITHOUT_ADDRESS
        if command == _PROXY and (not is_known or length < _ADDRESS_BYTES.get(family, 0)):
            raise MalformedRequest(f"the PROXY header has the family 0x{family:02x} and {length} bytes of addresses")
        if len(data) < _HEAD_BYTES + length:
            self.wanted = _HEAD_BYTES + length - len(data)
            return
        if command == _PROXY and family in _ADDRESS_BYTES:
            self._check_extensions(_HEAD_BYTES + _ADDRESS_BYTES[family])
            size = 4 if family == _TCP4 else 16
            self.address = _text(ip_address(data[_HEAD_BYTES : _HEAD_BYTES + size]))

    def _check_extensions(self, offset: int) -> None:
        """Check the form of the extensions, and the checksum if one of them is one. Raises MalformedRequest."""
        data = self._data
        while offset < len(data):
            length = int.from_bytes(data[offset + 1 : offset + _EXTENSION_HEAD_BYTES], "big")
            begin, end = offset + _EXTENSION_HEAD_BYTES, offset + _EXTENSION_HEAD_BYTES + length
            if end > len(data):
                raise MalformedRequest("the extensions of the PROXY header are longer than the header")
            if data[offset] == _CRC32C:
                sent = int.from_bytes(data[begin:end], "big")
                if length != _CRC32C_BYTES or sent != crc32c(data[:begin] + bytes(length) + data[end:]):
                    raise MalformedRequest("the checksum of the PROXY header is wrong")
            offset = end


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)  # noqa: PLW2901 - the remainder of the division
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """Return the checksum CRC-32C of some bytes (RFC 3720 section 12.1)."""
    table, value = _crc_table(), 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _text(address: IPv4Address | IPv6Address) -> str:
    """Return an address as text, an IPv4 address in IPv6 form as the IPv4 address."""
    return str(getattr(address, "ipv4_mapped", None) or address)
