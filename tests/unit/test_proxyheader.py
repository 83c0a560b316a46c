"""The PROXY protocol: its parser, and connections that begin with it."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import MalformedRequest
from ovserve.front.http1.forwarded import TrustedProxies
from ovserve.front.http1.proxyheader import MAX_EXTENSION_BYTES, MAX_LINE_BYTES, SIGNATURE, ProxyHeader, crc32c
from ovserve.front.listener import Listener
from ovserve.settings.options import Settings
from tests.certificates import client_context, make_pair
from tests.rawclient import RawClient
from tests.toyapi import serving

DESCRIBE = b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n"
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"


def v2(address: str, *, extensions: bytes = b"", command: int = 0x21) -> bytes:
    """Return a header of version 2 for a TCP connection of this client."""
    packed = ipaddress.ip_address(address).packed
    addresses = packed + packed + struct.pack(">HH", 1234, 443) + extensions
    family = 0x11 if len(packed) == 4 else 0x21
    return SIGNATURE + bytes([command, family]) + struct.pack(">H", len(addresses)) + addresses


def read(data: bytes, limit: int = 1 << 20) -> tuple[str | None, bytes]:
    """Return the address and the bytes after the header, fed in pieces of at most `limit` bytes."""
    header, taken = ProxyHeader(), 0
    while header.wanted:
        piece = data[taken : taken + min(limit, header.wanted)]
        assert piece, "incomplete"
        header.feed(piece)
        taken += len(piece)
    return header.address, data[taken:]


@pytest.mark.parametrize("limit", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("header", "address"),
    [
        (b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n", "192.0.2.7"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 0 65535\r\n", "2001:db8::7"),
        (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 1\r\n", "192.0.2.7"),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", None),
        (v2("192.0.2.7"), "192.0.2.7"),
        (v2("2001:db8::7", extensions=b"\x04\x00\x05abcde"), "2001:db8::7"),
        (v2("::ffff:192.0.2.7"), "192.0.2.7"),
        (v2("192.0.2.7", command=0x20), None),  # LOCAL: its addresses have no meaning
        (LOCAL, None),
        (SIGNATURE + b"\x21\x00\x00\x03abc", None),
        (SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216), None),
    ],
)
def test_header_gives_the_address_and_no_byte_of_what_follows(header: bytes, address: str | None, limit: int) -> None:
    assert read(header + b"rest", limit) == (address, b"rest")


def with_checksum(change: int = 0) -> bytes:
    """Return a header whose second extension is its checksum, with some bits changed."""
    blank = v2("192.0.2.7", extensions=b"\x04\x00\x02ab" + b"\x03\x00\x04" + bytes(4) + b"\x02\x00\x01a")
    return blank[:-8] + struct.pack(">I", crc32c(blank) ^ change) + blank[-4:]


def test_checksum_of_version_2_is_verified() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    header = with_checksum()
    assert read(header + b"rest") == ("192.0.2.7", b"rest")
    type_at = len(header) - 11  # without its type, the checksum is an unknown extension
    for position in sorted({*range(16, len(header))} - {type_at}):  # one damaged bit of what follows the length
        damaged = bytearray(header)
        damaged[position] ^= 0x10
        with pytest.raises(MalformedRequest):
            read(bytes(damaged))
    with pytest.raises(MalformedRequest, match="checksum"):
        read(with_checksum(change=1))


@pytest.mark.parametrize("extensions", [b"\x04", b"\x04\x00", b"\x04\x00\x03ab", b"\x03\x00\x02ab"])
def test_damaged_extensions_are_refused(extensions: bytes) -> None:
    with pytest.raises(MalformedRequest):
        read(v2("192.0.2.7", extensions=extensions))


@pytest.mark.parametrize(
    "data",
    [
        DESCRIBE,
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 65536\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 056 443\r\n",
        b"PROXY TCP4 192.0.2.007 198.51.100.1 56 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.300 56 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 56 443\r\n",
        b"PROXY  TCP4 192.0.2.7 198.51.100.1 56 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56 443\n\r\n",
        b"PROXY UDP4 192.0.2.7 198.51.100.1 56 443\r\n",
        b"PROXY UNKNOWN " + b"a" * MAX_LINE_BYTES + b"\r\n",
        b"proxy UNKNOWN\r\n",
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
        SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12),
        SIGNATURE + b"\x20\x00" + struct.pack(">H", MAX_EXTENSION_BYTES + 1),
        bytes(16),
    ],
)
def test_malformed_header_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRequest):
        read(data)


@given(st.ip_addresses(), st.binary(max_size=40), st.integers(1, 60))
def test_header_that_was_built_is_parsed(address: object, value: bytes, limit: int) -> None:
    extensions = b"".join(b"\xe0" + struct.pack(">H", len(value)) + value for _ in value[:2])
    found, rest = read(v2(str(address), extensions=extensions) + b"x", limit)
    expected = ipaddress.ip_address(str(address))
    assert found == str(getattr(expected, "ipv4_mapped", None) or expected)
    assert rest == b"x"


# --- connections ------------------------------------------------------------------------------------------------------


def connect(listener: Listener) -> RawClient:
    return RawClient(listener.port)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_requests_have_the_address_of_the_header(pieces: int) -> None:
    with serving(trusted_proxies="127.0.0.1", proxy_protocol=True) as (listener, _):
        with connect(listener) as client:
            data = v2("192.0.2.7") + DESCRIBE
            for at in range(0, len(data), pieces):
                client.send(data[at : at + pieces])
            assert client.read_response().json["address"] == "192.0.2.7"
            assert client.send(DESCRIBE).read_response().json["address"] == "192.0.2.7"
        with connect(listener) as client:
            assert client.send(LOCAL + DESCRIBE).read_response().json["address"] == "127.0.0.1"


def test_forwarded_fields_count_only_if_the_address_of_the_header_is_a_proxy() -> None:
    field = DESCRIBE[:-2] + b"X-Forwarded-For: 203.0.113.9\r\n\r\n"
    with serving(trusted_proxies="127.0.0.1, 10.0.0.0/8", proxy_protocol=True) as (listener, _):
        for header, address in ((v2("10.0.0.1"), "203.0.113.9"), (v2("192.0.2.7"), "192.0.2.7")):
            with connect(listener) as client:
                assert client.send(header + field).read_response().json["address"] == address


def test_header_of_an_untrusted_peer_is_no_request() -> None:
    with serving(trusted_proxies="10.0.0.0/8", proxy_protocol=True) as (listener, _):
        with connect(listener) as client:
            assert client.send(v2("192.0.2.7") + DESCRIBE).read_response().status == 400
        with connect(listener) as client:  # a direct client sends none
            assert client.send(DESCRIBE).read_response().json["address"] == "127.0.0.1"


def test_trusted_peer_without_a_header_is_refused_with_the_reason() -> None:
    with serving(trusted_proxies="127.0.0.1", proxy_protocol=True) as (listener, api), connect(listener) as client:
        reply = client.send(DESCRIBE).read_response()
        assert reply.status == 400
        assert "PROXY protocol" in reply.json["error"]["message"]
        assert api.refused.get(timeout=10)


def test_incomplete_header_ends_with_the_time_for_a_head() -> None:
    options = {"trusted_proxies": "127.0.0.1", "proxy_protocol": True, "head_timeout_s": 0.3}
    with serving(**options) as (listener, _), connect(listener) as client:
        client.send(v2("192.0.2.7")[:20])
        started = time.monotonic()
        assert client.read_rest() == b""
        assert time.monotonic() - started < 20


def test_tls_begins_after_the_header(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "used")
    options = {"trusted_proxies": "127.0.0.1", "proxy_protocol": True}
    with serving(tls_certificate=pair.certificate, tls_key=pair.key, **options) as (listener, _):
        with socket.create_connection(("127.0.0.1", listener.port), 30) as raw:
            raw.sendall(v2("192.0.2.7"))
            with client_context(pair).wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(DESCRIBE)
                assert b'"192.0.2.7"' in client.recv(65536)
        # Without the header, the connection ends: the client could not read an answer before its handshake.
        with socket.create_connection(("127.0.0.1", listener.port), 30) as raw:
            raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00")
            assert raw.recv(100) == b""


def test_health_check_beyond_the_limit_may_have_a_header() -> None:
    options = {"trusted_proxies": "127.0.0.1", "proxy_protocol": True, "max_connections": 1}
    with serving(**options) as (listener, _), connect(listener) as holder:
        holder.send(v2("192.0.2.7") + b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
        while not listener.active_exchanges:
            time.sleep(0.01)
        with connect(listener) as client:
            health = b"GET /health HTTP/1.1\r\nHost: a.test\r\n\r\n"
            assert client.send(LOCAL + health).read_response().status == 200
        with connect(listener) as client:
            assert client.send(v2("192.0.2.8") + DESCRIBE).read_response().status == 503


def test_peers_of_a_unix_socket_can_be_trusted() -> None:
    proxies = TrustedProxies(Settings(trusted_proxies="unix", proxy_protocol=True))
    assert proxies.sends_header("unix")
    assert not proxies.sends_header("127.0.0.1")
    assert proxies.client_address("unix", {"x-forwarded-for": "192.0.2.7"}) == "192.0.2.7"
    others = TrustedProxies(Settings(trusted_proxies="127.0.0.1"))
    assert others.client_address("unix", {"x-forwarded-for": "192.0.2.7"}) == "unix"
