"""A request as a route sees it: who sent it, what it is called, what its query says."""

from __future__ import annotations

import re

import pytest

from ovserve.config import Settings
from ovserve.front.http1.head import HeadParser
from ovserve.front.request import Request, new_request_id


def request(fields: str = "", target: str = "/") -> Request:
    head = HeadParser(Settings()).parse(f"GET {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode("latin-1"))
    assert head is not None
    return Request(head, "192.0.2.1")


def test_ids_are_ours_and_never_the_same() -> None:
    ids = {new_request_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("req_[0-9a-f]{32}", one) for one in ids)


def test_a_client_is_its_key_s_fingerprint_or_its_address() -> None:
    bearer = request("Authorization: Bearer sk-one\r\n").client
    assert re.fullmatch("[0-9a-f]{16}", bearer)
    assert request("authorization: bearer  sk-one\r\n").client == bearer
    assert request("api-key: sk-one\r\n").client == bearer
    assert request("Authorization: Bearer sk-two\r\n").client != bearer
    assert request("Authorization: Basic sk-one\r\n").client == "192.0.2.1"
    assert request("Authorization: Bearer\r\n").client == "192.0.2.1"
    assert request("api-key: \xff\r\n").client != "192.0.2.1"
    assert request().client == "192.0.2.1"


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
def test_the_query_is_read_once_decoded(target: str, query: dict[str, str]) -> None:
    assert dict(request(target=target).query) == query


def test_a_client_s_own_id_is_known_only_when_it_can_do_no_harm() -> None:
    assert request("X-Client-Request-Id: abc-1\r\n").client_request_id == "abc-1"
    assert request("X-Client-Request-Id: a b\r\n").client_request_id is None
    assert request(f"X-Client-Request-Id: {'a' * 65}\r\n").client_request_id is None
    assert request("X-Client-Request-Id: \xe9\r\n").client_request_id is None
    assert request().client_request_id is None
