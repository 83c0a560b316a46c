"""Named keys: limits exact to one request, the file, `ovserve key add`, and the answers of a listener."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.cli import key as key_command
from ovserve.errors import Forbidden, RateLimited, SettingsError
from ovserve.front import keys as keys_module
from ovserve.front.keys import read_keys, read_named_keys
from ovserve.grants import WINDOW_S, Grant, KeyLimits
from ovserve.settings.options import Settings
from tests.rawclient import RawClient, Response
from tests.toyapi import serving


@pytest.fixture(autouse=True)
def fresh_grants() -> Iterator[None]:
    """Forget what keys have used, before and after a test."""
    keys_module._grants.clear()
    yield
    keys_module._grants.clear()


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(limit=st.integers(1, 5), pauses=st.lists(st.floats(0, 40), min_size=1, max_size=60))
def test_no_minute_contains_more_requests_than_the_limit(limit: int, pauses: list[float]) -> None:
    clock = Clock()
    grant = Grant("a", KeyLimits(requests_per_minute=limit), clock)
    served: list[float] = []
    for pause in pauses:
        clock.now += pause
        recent = [at for at in served if at > clock.now - WINDOW_S]
        if len(recent) < limit:  # neither one too many nor one too few
            grant.begin()
            grant.end()
            served.append(clock.now)
            assert grant.fields()["x-ratelimit-remaining-requests"] == str(limit - len(recent) - 1)
        else:
            with pytest.raises(RateLimited) as caught:
                grant.begin()
            assert caught.value.headers["x-ratelimit-remaining-requests"] == "0"
            wait_s = float(caught.value.headers["x-ratelimit-reset-requests"].removesuffix("s"))
            assert wait_s == pytest.approx(recent[-limit] + WINDOW_S - clock.now, abs=0.001)


def test_pictures_models_and_concurrency() -> None:
    clock = Clock()
    grant = Grant("a", KeyLimits(pictures_per_minute=5, concurrent=2, models=("m",)), clock)
    with pytest.raises(Forbidden, match="may not use the model 'x'"):
        grant.take_pictures("x", 1)
    with pytest.raises(Forbidden, match="6 pictures are more"):
        grant.take_pictures("m", 6)
    grant.take_pictures("m", 3)
    clock.now += 30
    grant.take_pictures("m", 2)
    with pytest.raises(RateLimited) as caught:
        grant.take_pictures("m", 4)  # the first three are not enough
    assert caught.value.headers["x-ratelimit-reset-images"] == "60.000s"
    with pytest.raises(RateLimited) as caught:
        grant.take_pictures("m", 1)
    assert caught.value.headers["x-ratelimit-reset-images"] == "30.000s"
    clock.now += 30
    grant.take_pictures("m", 3)
    grant.begin()
    grant.begin()
    with pytest.raises(RateLimited, match="2 requests in progress"):
        grant.begin()
    grant.end()
    grant.begin()


def add(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Add a key and return it."""
    assert key_command.run(["add", *arguments, "--file", str(path)]) == 0
    return capsys.readouterr().out.strip()


def test_key_add_writes_hashes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    first = add(path, capsys, "team-a", "--requests-per-minute", "5", "--models", "m, n", "--expires", "2999-01-01")
    second = add(path, capsys, "ops", "--admin", "--concurrent", "1", "--pictures_per_minute", "7")
    text = path.read_text()
    assert first not in text
    assert second not in text
    assert path.stat().st_mode & 0o777 == 0o600
    one, two = read_named_keys(path)
    assert one.grant.limits == KeyLimits(5, 0, 0, ("m", "n"))
    assert one.expires_at == dt.datetime(2999, 1, 1, tzinfo=dt.UTC).timestamp()
    assert (two.grant.limits, two.is_admin) == (KeyLimits(0, 7, 1), True)
    assert key_command.run(["add", "ops", "--file", str(path)]) == 2
    assert "'ops' is given twice" in capsys.readouterr().err
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"[[key]]\nname = 'a'\nsha256 = '{SHA}'\n[[key]]\nname = 'b'\nsha256 = '{SHA}'",
            r"key 2 \(b\): sha256 is that of the key 'a'",
        ),
        ("", "no key found"),
        ("key = 1", "write each key as a"),
        ("[[key]]\nname = 'a'", "sha256: expected 64"),
        (f"[[key]]\nname = 'a b'\nsha256 = '{SHA}'", "name: expected 1 to 64"),
        (f"[[key]]\nname = 'a'\nsha256 = '{SHA}'\nconcurrent = 0", "concurrent is 0; expected 1 to"),
        (f"[[key]]\nname = 'a'\nsha256 = '{SHA}'\nconcurrent = true", "concurrent has the wrong type"),
        (f"[[key]]\nname = 'a'\nsha256 = '{SHA}'\nlimit = 1", "unknown field 'limit'"),
        (f"[[key]]\nname = 'a'\nsha256 = '{SHA}'\nmodels = [1]", "models: expected a list of names"),
        ("[[key", "keys.toml: "),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_named_keys(path)


def ask(client: RawClient, key: str, path: str = "/describe", method: str = "GET") -> Response:
    """Send one request with a key."""
    head = f"{method} {path} HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\nAuthorization: Bearer {key}\r\n\r\n"
    return client.send(head.encode()).read_response()


def test_answers_of_a_listener(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    limited = add(path, capsys, "limited", "--requests_per_minute", "2")
    admin = add(path, capsys, "root", "--admin")
    single = add(path, capsys, "single", "--concurrent", "1")
    past = add(path, capsys, "past", "--expires", "2020-01-01")
    with serving(named_keys_file=path) as (listener, api), RawClient(listener.port) as client:
        for left in ("1", "0"):
            answer = ask(client, limited)
            assert (answer.status, answer.fields["x-ratelimit-remaining-requests"]) == (200, left)
            assert answer.fields["x-ratelimit-limit-requests"] == "2"
        answer = ask(client, limited)
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        assert 50 <= int(answer.fields["retry-after"]) <= 60
        assert answer.fields["x-should-retry"] == "true"
        assert ask(client, past).status == 401
        assert ask(client, "sk-unknown").status == 401
        assert ask(client, admin, "/admin", "POST").status == 200
        assert ask(client, single, "/admin", "POST").status == 403
        with RawClient(listener.port) as waiting:
            waiting.send(f"GET /wait HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {single}\r\n\r\n".encode())
            while api.seen.get(timeout=10) != "/wait":
                pass
            assert ask(client, single).status == 429
            api.release()
            assert waiting.read_response().status == 200
        until = time.monotonic() + 10
        while ask(client, single).status != 200:  # the thread of the other connection gives it back after its answer
            assert time.monotonic() < until
        # A revoked key is refused after the file was read again; what a key has used stays counted.
        text = path.read_text()
        path.write_text("[[key]]" + text.split("[[key]]")[1])
        settings = Settings(named_keys_file=path, allowed_hosts="*")
        listener.configure(settings, read_keys(settings), listener.access.admin_keys)
        assert ask(client, admin).status == 401
        assert ask(client, limited).status == 429


def test_limit_of_models_may_name_an_alias() -> None:
    grant = Grant("a", KeyLimits(models=("gpt-image-1", "other")))
    grant.take_pictures("shapes", 1, ["gpt-image-1", "default"])
    grant.take_pictures("other", 1)
    with pytest.raises(Forbidden, match="may not use the model 'shapes'"):
        grant.take_pictures("shapes", 1, ["default"])
