"""Host and Origin: the grammar of both fields, and which values are accepted."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovserve.front.http1.head import HeadParser
from ovserve.front.http1.origins import Authority, HostRule, OriginRule, is_loopback_host, parse_host, parse_origin
from ovserve.settings.options import Settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A.Test:8000", Authority("a.test", 8000)),
        ("a.test.", Authority("a.test", None)),
        ("a.test:", Authority("a.test", None)),
        ("[::1]:80", Authority("::1", 80)),
        ("[0:0:0:0:0:0:0:1]", Authority("::1", None)),
        ("[fe80::1%25eth0]", Authority("fe80::1", None)),
        ("127.1", Authority("127.0.0.1", None)),
        ("0x7f000001:1", Authority("127.0.0.1", 1)),
        ("127.0.0.1.", Authority("127.0.0.1", None)),
        ("", Authority("", None)),
        (":80", Authority("", 80)),
        ("[::zz]", None),
        ("[1::2::3]", None),
        ("a.test:99999", None),
        ("a.test:8o", None),
        ("a b", None),
        ("user@a.test", None),
        ("a.test/x", None),
    ],
)
def test_host_is_parsed(text: str, expected: Authority | None) -> None:
    assert parse_host(text) == expected


@pytest.mark.parametrize(
    "text", ["null", "", "a.test", "http:/a.test", "http://a.test/", "http://a.test http://b.test", "http://u@a.test",
             "http://a.test, http://b.test", "http://a.test#f", "http://a.test:1:2", "http://" + "a" * 600]
)  # fmt: skip
def test_malformed_origins_are_foreign(text: str) -> None:
    assert parse_origin(text) is None
    assert not OriginRule(Settings()).allows(text, "a.test")


@pytest.mark.parametrize(
    ("host", "is_accepted"),
    [
        (None, True),  # HTTP/1.0; browsers always send one
        ("localhost:8000", True),
        ("LOCALHOST.", True),
        ("app.localhost", True),
        ("127.0.0.1:9", True),
        ("192.0.2.7", True),
        ("127.1", True),
        ("[::1]:8000", True),
        ("[fe80::1%25eth0]:8000", True),
        ("host.docker.internal:8000", True),
        ("host.containers.internal", True),
        (socket.gethostname(), True),
        ("images.example.org", True),  # public_url
        ("box.lan.test", True),
        ("deep.box.wild.test", True),
        ("wild.test", False),
        ("evil.test", False),
        ("evil.test:8000", False),
        ("localhost.evil.test", False),
        ("evillocalhost", False),
        ("127.0.0.1.evil.test", False),
        ("127.0.0.1.nip.test", False),
        ("local%68ost", False),
        ("localhost..", False),
        (":8000", False),
        ("box.lan.test.evil.test", False),
        ("docker.internal", False),
    ],
)
def test_accepted_hosts(host: str | None, is_accepted: bool) -> None:
    settings = Settings(public_url="https://images.example.org/x", allowed_hosts="box.lan.test, *.wild.test")
    assert HostRule(settings, is_needed=True).allows(host) is is_accepted
    assert HostRule(settings, is_needed=False).allows(host) is is_accepted  # the option is a wish of its own


def test_host_is_checked_where_it_is_needed_and_not_with_star() -> None:
    assert not HostRule(Settings(), is_needed=True).allows("evil.test")
    assert HostRule(Settings(), is_needed=False).allows("evil.test")
    assert HostRule(Settings(allowed_hosts="*"), is_needed=True).allows("evil.test")


@pytest.mark.parametrize(
    ("origin", "host", "is_accepted"),
    [
        ("http://images.test", "images.test", True),
        ("https://images.test", "images.test", True),  # a proxy with TLS
        ("https://images.test", "images.test:443", True),
        ("http://images.test:8000", "images.test:8000", True),
        ("HTTP://Images.Test:8000", "images.test:8000", True),
        ("http://[::1]:8000", "[0::1]:8000", True),
        ("http://images.test:8001", "images.test:8000", False),
        ("https://images.test", "images.test:8000", False),
        ("https://images.test", "images.test:80", False),
        ("https://evil.test", "images.test", False),
        ("http://192.0.2.7:3000", "192.0.2.7:8000", False),
        ("http://localhost:3000", "images.test", True),
        ("https://localhost", "images.test", True),
        ("http://app.localhost:1", "images.test", True),
        ("http://tauri.localhost", "images.test", True),
        ("http://127.8.8.8:3000", "images.test", True),
        ("http://[::ffff:127.0.0.1]:3000", "images.test", True),
        ("http://localhost.evil.test", "images.test", False),
        ("http://127.0.0.1.evil.test", "images.test", False),
        ("http://evil.test#localhost", "images.test", False),
        ("http://0.0.0.0:3000", "images.test", False),
        ("tauri://localhost", "127.0.0.1:8000", False),
        ("null", "127.0.0.1:8000", False),
        ("file://", "127.0.0.1:8000", False),
        ("", "", False),
        ("http://", "", False),
        ("https://a.test", None, False),
    ],
)
def test_own_and_loopback_origins_are_accepted_by_default(origin: str, host: str | None, is_accepted: bool) -> None:
    assert OriginRule(Settings()).allows(origin, host) is is_accepted
    assert OriginRule(Settings(allowed_origins="*")).allows(origin, host)


@pytest.mark.parametrize(
    ("origin", "is_accepted"),
    [
        ("https://a.test", True),
        ("https://A.test", True),
        ("https://a.test:444", False),
        ("http://a.test", False),
        ("https://b.a.test", False),
        ("app://obsidian.md", True),
        ("app://other", False),
        ("tauri://localhost", True),
        ("chrome-extension://abcdefghijklmnopabcdefghijklmnop", True),
        ("moz-extension://0b0b0b0b-0000-4000-8000-000000000000", True),
        ("moz-extension://another", False),
        ("vscode-webview://1abc2def", True),
        ("file://", True),
        ("null", False),
        ("http://localhost:3000", True),
    ],
)
def test_configured_origins(origin: str, is_accepted: bool) -> None:
    rule = OriginRule(
        Settings(
            allowed_origins="https://a.test, app://obsidian.md, tauri://localhost, file://, vscode-webview://*, "
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop, moz-extension://0b0b0b0b-0000-4000-8000-000000000000"
        )
    )
    assert rule.allows(origin, "127.0.0.1:8000") is is_accepted
    assert rule.is_listed(origin) is is_accepted


@pytest.mark.parametrize(
    ("site", "host", "is_accepted"),
    [
        (None, "a.test", True),
        ("none", "a.test", True),
        ("same-origin", "a.test", True),
        ("cross-site", "a.test", False),
        ("cross-site", "localhost:8000", False),
        ("same-site", "a.test", False),  # another subdomain may be a stranger's
        ("same-site", "localhost:8000", True),  # another port of this machine
        ("same-site", None, False),
        ("anything", "a.test", True),  # W3C Fetch Metadata: an invalid value is ignored
    ],
)
def test_sec_fetch_site(site: str | None, host: str | None, is_accepted: bool) -> None:
    assert OriginRule(Settings()).allows_site(site, host) is is_accepted
    assert OriginRule(Settings(allowed_origins="*")).allows_site(site, host)


names = st.from_regex(r"[a-z]([a-z0-9\-]{0,8}[a-z0-9])?(\.[a-z]([a-z0-9\-]{0,8}[a-z0-9])?){0,3}", fullmatch=True)
anything = st.text(st.characters(max_codepoint=255), max_size=60) | st.text(
    st.sampled_from("htps:/[]0127.localhost%@#?, \t-x*"), max_size=40
)


@given(anything, anything)
@example("http://[", "[")
@example("http://[]", "[]")
@example("http://1.2.3.4.5", "99999999999999999999")
@example("http://٣", "٣")
def test_any_field_value_has_a_documented_answer(origin: str, host: str) -> None:
    settings = Settings()
    assert parse_host(host) is None or isinstance(parse_host(host), Authority)
    accepted_host = HostRule(settings, is_needed=True).allows(host)
    authority = parse_host(host)
    if accepted_host and host:  # only names that are documented
        assert authority is not None
        name = authority.host
        known = {"localhost", "host.docker.internal", "host.containers.internal", socket.gethostname().lower()}
        assert name in known or name.endswith(".localhost") or ipaddress.ip_address(name)
    if OriginRule(settings).allows(origin, host):
        parsed = parse_origin(origin)
        assert parsed is not None
        assert is_loopback_host(parsed.authority.host) or (authority and parsed.authority.host == authority.host)


@given(names, st.integers(0, 65535), st.sampled_from(["http", "https"]))
def test_other_names_than_the_documented_are_foreign(name: str, port: int, scheme: str) -> None:
    is_known = name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower()
    assert HostRule(Settings(), is_needed=True).allows(f"{name}:{port}") is is_known
    assert OriginRule(Settings()).allows(f"{scheme}://{name}:{port}", "127.0.0.1:8000") is (
        name == "localhost" or name.endswith(".localhost")
    )
    assert OriginRule(Settings()).allows(f"{scheme}://{name}:{port}", f"{name.upper()}:{port}")


@given(st.ip_addresses(), st.none() | st.integers(1, 65535))
def test_every_address_is_an_accepted_host_and_only_loopback_an_accepted_origin(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int | None
) -> None:
    host = f"[{address}]" if address.version == 6 else str(address)
    text = host if port is None else f"{host}:{port}"
    assert HostRule(Settings(), is_needed=True).allows(text)
    is_loopback = (getattr(address, "ipv4_mapped", None) or address).is_loopback
    assert OriginRule(Settings()).allows(f"http://{text}", "a.test") is is_loopback


@given(st.text(st.sampled_from("abc019.-_~%[]:x"), max_size=30))
def test_every_host_that_the_head_parser_accepts_can_be_judged(host: str) -> None:
    try:
        head = HeadParser(Settings()).parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    except Exception:  # noqa: BLE001 - the parser's own tests are about which errors it raises
        return
    assert head is not None
    assert HostRule(Settings(), is_needed=True).allows(head.fields["host"]) in (True, False)
