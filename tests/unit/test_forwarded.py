"""Forwarded fields: whose count, and which address they give."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.front.http1.forwarded import TrustedProxies
from ovserve.settings.options import Settings

PROXIES = TrustedProxies(Settings(trusted_proxies="127.0.0.1, 10.0.0.0/8, 2001:db8:1::/48"))


@pytest.mark.parametrize(
    ("peer", "fields", "address"),
    [
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ("::ffff:127.0.0.1", {"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ("2001:db8:1::5", {"x-forwarded-for": "2001:db8:2::1"}, "2001:db8:2::1"),
        # Each proxy appends its peer: what is left of the first stranger was sent by him.
        ("127.0.0.1", {"x-forwarded-for": "198.51.100.1, 203.0.113.9"}, "203.0.113.9"),
        ("127.0.0.1", {"x-forwarded-for": "198.51.100.1, 203.0.113.9, 10.1.2.3"}, "203.0.113.9"),
        ("127.0.0.1", {"x-forwarded-for": "10.1.2.3"}, "10.1.2.3"),
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9:4711"}, "203.0.113.9"),
        ("127.0.0.1", {"x-forwarded-for": "[2001:db8:2::1]:4711"}, "2001:db8:2::1"),
        ("127.0.0.1", {"forwarded": 'for=192.0.2.43, for="[2001:db8:2::1]:4711";proto=https'}, "2001:db8:2::1"),
        ("127.0.0.1", {"forwarded": "proto=http;For=192.0.2.43"}, "192.0.2.43"),
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9", "forwarded": "for=192.0.2.43"}, "203.0.113.9"),
        # What cannot be parsed ends the chain at the last address that could be.
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9, unknown"}, "127.0.0.1"),
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9, _hidden, 10.1.2.3"}, "10.1.2.3"),
        ("127.0.0.1", {"x-forwarded-for": "999.1.1.1"}, "127.0.0.1"),
        ("127.0.0.1", {"x-forwarded-for": ""}, "127.0.0.1"),
        ("127.0.0.1", {"forwarded": "by=192.0.2.1"}, "127.0.0.1"),
        ("127.0.0.1", {}, "127.0.0.1"),
        # Anybody else's fields are ignored.
        ("203.0.113.5", {"x-forwarded-for": "198.51.100.1", "forwarded": "for=192.0.2.43"}, "203.0.113.5"),
        ("unix", {"x-forwarded-for": "198.51.100.1"}, "unix"),
    ],
)
def test_address_of_the_client(peer: str, fields: dict[str, str], address: str) -> None:
    assert PROXIES.client_address(peer, fields) == address


def test_without_trusted_proxies_no_field_counts() -> None:
    assert TrustedProxies(Settings()).client_address("127.0.0.1", {"x-forwarded-for": "203.0.113.9"}) == "127.0.0.1"


@given(
    st.text(st.sampled_from('for=";,[]0123456789.:abc _'), max_size=80),
    st.sampled_from(["x-forwarded-for", "forwarded"]),
)
def test_any_value_gives_an_address(value: str, name: str) -> None:
    ipaddress.ip_address(PROXIES.client_address("127.0.0.1", {name: value}))
