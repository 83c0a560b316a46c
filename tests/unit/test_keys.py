"""API keys: which requests need one, which keys are accepted, and errors of the key file."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
from pathlib import Path

import pytest

from ovserve.api.routes import match_route
from ovserve.errors import SettingsError, Unauthorized
from ovserve.front.http1.head import HeadParser
from ovserve.front.keys import Keys, NamedKey, read_keys
from ovserve.front.request import Request
from ovserve.grants import Grant, KeyLimits
from ovserve.settings.options import Settings
from ovserve.settings.sources import load_settings

KEY = "sk-one"


def request(fields: str = "", path: str = "/v1/models", method: str = "GET") -> Request:
    head = HeadParser(Settings()).parse(f"{method} {path} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode("latin-1"))
    assert head
    return Request(head, "192.0.2.1")


def is_accepted(asked: Request, keys: Keys) -> bool:
    try:
        keys.check(asked, is_open=match_route(asked.method, asked.path).is_open)
    except Unauthorized as error:
        assert (error.status, error.type, error.code) == (401, "invalid_request_error", "invalid_api_key")
        assert KEY not in error.message
        return False
    return True


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        (f"Authorization: Bearer {KEY}\r\n", True),
        (f"authorization: bearer  {KEY}\r\n", True),
        (f"api-key: {KEY}\r\n", True),
        ("Authorization: Bearer sk-two\r\n", True),
        (f"Authorization: Basic {KEY}\r\n", False),
        (f"Authorization: {KEY}\r\n", False),
        (f"Authorization: Bearer {KEY}x\r\n", False),
        ("Authorization: Bearer sk-on\r\n", False),
        ("Authorization: Bearer\r\n", False),
        (f"Authorization: Bearer wrong\r\napi-key: {KEY}\r\n", False),  # the first one found identifies the client
        ("api-key: \xff\r\n", False),
        ("", False),
    ],
)
def test_configured_key_is_accepted_in_each_form(fields: str, known: bool) -> None:
    assert is_accepted(request(fields), Keys([KEY, "sk-two"])) is known
    assert is_accepted(request(fields), Keys())  # no keys are configured


@pytest.mark.parametrize(
    ("method", "path", "needs_none"),
    [
        ("GET", "/v2/health/live", True),
        ("HEAD", "/v2/health/live", True),
        ("POST", "/v2/health/live/images/edits", False),
        ("OPTIONS", "/v1/images/edits", True),
        ("GET", "/", True),
        ("GET", "/v1/images/files/abc.png", True),
        ("GET", "/images/files/abc.png", True),
        ("HEAD", "/v3/v1/images/files/abc.png", True),
        ("GET", "/openai/v1/images/files/abc.png", True),
        ("GET", "/v3/images/files/abc.png/", True),
        ("GET", "/v2/models/a/b/ready", True),
        ("GET", "/v1/models/images/files/abc.png", False),
        ("GET", "/v2/health/nowhere", False),
        ("DELETE", "/images/files/abc.png", False),
        ("POST", "/v1/images/edits", False),
        ("GET", "/metrics", False),
        ("GET", "/nowhere", False),
        ("GET", "/v1/", False),
    ],
)
def test_only_open_paths_need_no_key(method: str, path: str, needs_none: bool) -> None:
    assert is_accepted(request(method=method, path=path), Keys([KEY])) is needs_none


def test_key_file_has_one_key_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"# for the office\r\nsk-one\r\n\n  sk-two \n")
    keys = read_keys(Settings(api_key_file=path, api_key="sk-three"))
    assert len(keys) == 3
    for key in ("sk-one", "sk-two", "sk-three"):
        assert is_accepted(request(f"api-key: {key}\r\n"), keys)
    assert not is_accepted(request("api-key: #\r\n"), keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no key found"),
        (b"# only words\n\n", "no key found"),
        (b"good\nsecret with blanks\n", "line 2"),
        ("kočka\n".encode(), "line 1"),
        (b"x" * 513, "line 1"),
        (b"#" * 2_000_000, "larger than"),
    ],
)
def test_unusable_key_file_is_a_one_line_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as caught:
        read_keys(Settings(api_key_file=path))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_fifo_is_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    for path in (tmp_path / "keys", tmp_path):
        with pytest.raises(SettingsError, match=r"not a regular file|directory"):
            read_keys(Settings(api_key_file=path))


def test_key_that_no_field_can_carry_is_rejected() -> None:
    with pytest.raises(SettingsError, match="api_key") as caught:
        read_keys(Settings(api_key="sk one"))
    assert "sk one" not in str(caught.value)


@pytest.mark.parametrize(("mode", "is_logged"), [(0o600, False), (0o640, False), (0o644, True)])
def test_world_readable_key_file_is_logged_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, is_logged: bool
) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(mode)
    read_keys(Settings(api_key_file=path))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [record.levelno for record in caplog.records] == ([logging.WARNING] if is_logged else [])
    assert KEY not in caplog.text


def test_key_does_not_appear_in_the_settings_or_errors(tmp_path: Path) -> None:
    assert KEY not in repr(load_settings({}, {"OVSERVE_API_KEY": KEY}))
    config = tmp_path / "c.toml"
    config.write_text("api_key = 123456\n")
    with pytest.raises(SettingsError, match="api_key") as caught:
        load_settings({}, {}, config)
    assert "123456" not in str(caught.value)


def test_only_a_configured_key_makes_a_request_verified() -> None:
    known, other = request(f"Authorization: Bearer {KEY}\r\n"), request("Authorization: Bearer sk-other\r\n")
    assert is_accepted(known, Keys([KEY]))
    assert is_accepted(other, Keys())  # no keys are configured
    assert (known.is_verified, other.is_verified) == (True, False)
    assert known.key != other.key != ""


@pytest.mark.parametrize("key", [KEY, "sk-unknown", "sk-7"])
def test_check_makes_as_many_calls_for_thousands_of_keys_as_for_one(key: str) -> None:
    def calls(keys: Keys) -> int:
        count = 0

        def note(*_: object) -> None:
            nonlocal count
            count += 1

        asked = request(f"Authorization: Bearer {key}\r\n")
        sys.setprofile(note)
        try:
            is_accepted(asked, keys)
        finally:
            sys.setprofile(None)
        return count

    def keys_of(count: int) -> Keys:
        plain = [KEY, *(f"sk-plain-{number}" for number in range(count))]
        named = [
            NamedKey(hashlib.sha256(f"sk-{number}".encode()).digest(), Grant(f"k{number}", KeyLimits()))
            for number in range(count)
        ]
        return Keys(plain, named)

    assert calls(keys_of(5000)) == calls(keys_of(10))
