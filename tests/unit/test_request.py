"""Request heads as routes see them: ids, client identity, API key and query."""

from __future__ import annotations

import base64
import re

import pytest

from ovserve.front.http1.head import HeadParser
from ovserve.front.request import Request, escape_for_log, new_request_id
from ovserve.settings.options import Settings


def request(fields: str = "", target: str = "/", address: str = "192.0.2.1") -> Request:
    head = HeadParser(Settings()).parse(f"GET {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode("latin-1"))
    assert head is not None
    return Request(head, address)


def test_request_ids_are_random() -> None:
    ids = {new_request_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("req_[0-9a-f]{32}", one) for one in ids)


def test_key_is_a_fingerprint_of_the_api_key() -> None:
    bearer = request("Authorization: Bearer sk-one\r\n").key
    assert re.fullmatch("[0-9a-f]{16}", bearer)
    assert request("authorization: bearer  sk-one\r\n").key == bearer
    assert request("api-key: sk-one\r\n").key == bearer
    assert request("Authorization: Bearer sk-two\r\n").key != bearer
    for credentials in ("me:sk-one", ":sk-one"):  # RFC 7617: the key is the password
        assert request(f"Authorization: Basic {base64.b64encode(credentials.encode()).decode()}\r\n").key == bearer
    with_colon = base64.b64encode(b"me:a:b").decode()
    assert request(f"Authorization: basic {with_colon}\r\n").api_key == "a:b"
    for malformed in ("sk-one", "!", "c2stb25l", "bWU6", "\xff"):
        assert request(f"Authorization: Basic {malformed}\r\n").key == ""
    assert request("Authorization: Bearer\r\n").key == ""
    assert request("api-key: \xff\r\n").key
    assert request().key == ""


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2::3", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::3", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_network_is_the_ipv4_address_or_the_ipv6_prefix(address: str, network: str) -> None:
    assert request(address=address).network == network


def test_forwarded_address_is_ignored() -> None:
    assert request("X-Forwarded-For: 198.51.100.7\r\nForwarded: for=198.51.100.7\r\n").network == "192.0.2.1"


@pytest.mark.parametrize(
    ("target", "query"),
    [
        ("/", {}),
        ("/?", {}),
        ("/?a=b&a=c&d", {"a": "b", "d": ""}),
        ("/?a%20b=%C4%8D+%25", {"a b": "č %"}),
        ("/?api-version=2025-04-01-preview", {"api-version": "2025-04-01-preview"}),
        ("/?a=%ff", {"a": "\ufffd"}),
    ],
)
def test_query_is_decoded_once(target: str, query: dict[str, str]) -> None:
    assert dict(request(target=target).query) == query


def test_client_request_id_must_be_short_and_printable() -> None:
    assert request("X-Client-Request-Id: abc-1\r\n").client_request_id == "abc-1"
    assert request("X-Client-Request-Id: a b\r\n").client_request_id is None
    assert request(f"X-Client-Request-Id: {'a' * 65}\r\n").client_request_id is None
    assert request("X-Client-Request-Id: \xe9\r\n").client_request_id is None
    assert request().client_request_id is None


def test_escape_for_log_truncates_and_escapes() -> None:
    assert escape_for_log("expected \x1b[2J\x9b\r\nü") == r"expected \x1b[2J\x9b\x0d\x0a\xfc"
    assert len(escape_for_log("x" * 1000)) == 200
