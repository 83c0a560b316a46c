"""Connections beyond the limit: answered at once, and never able to keep a health check out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ovserve.front.listener import Listener
from tests.rawclient import RawClient
from tests.toyapi import ToyApi, serving

HEALTH = b"GET /health HTTP/1.1\r\nHost: a.test\r\n\r\n"

pytestmark = pytest.mark.usefixtures("leak_guard")


@pytest.fixture
def full() -> Iterator[Listener]:
    """Yield a listener at its connection limit."""
    limits = {"max_connections": 1, "overflow_connections": 4, "overflow_timeout_s": 0.5}
    with serving(**limits) as (listener, api), RawClient(listener.port) as first:
        first.send(b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert api.seen.get(timeout=10) == "/wait"
        yield listener
        api.release()
        assert first.read_response().status == 200


def test_client_that_still_sends_its_body_receives_the_503(full: Listener) -> None:
    for _ in range(5):
        with RawClient(full.port) as client:
            client.send(b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3000000\r\n\r\n").send(
                b"x" * 3_000_000
            )
            assert client.read_response().status == 503
            client.half_close()
            assert client.read_rest() == b""


def test_malformed_request_is_400(full: Listener) -> None:
    with RawClient(full.port) as client:
        response = client.send(b"GET / HTTP/1.1\nHost: a.test\n\n").read_response()
        assert (response.status, response.code) == (400, "malformed_request")


def test_rejected_requests_are_counted(full: Listener) -> None:
    for request in (b"GET / HTTP/1.1\nHost: a.test\n\n", b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n", HEALTH):
        with RawClient(full.port) as client:
            client.send(request).read_response()
    api = full.api
    assert isinstance(api, ToyApi)
    assert [api.refused.get_nowait(), api.refused.get_nowait()] == ["malformed_request", "too_many_connections"]
    assert api.refused.empty()  # a health check counts as a request of its route


def test_exempt_request_that_is_no_health_check_is_served_with_a_key() -> None:
    limits = {"max_connections": 1, "api_key": "sk-one"}
    with serving(**limits) as (listener, api), RawClient(listener.port) as first:
        first.send(b"GET /wait HTTP/1.1\r\nHost: a.test\r\nAuthorization: Bearer sk-one\r\n\r\n")
        assert api.seen.get(timeout=10) == "/wait"
        for fields, status in ((b"", 401), (b"Authorization: Bearer sk-one\r\n", 200)):
            with RawClient(listener.port) as client:
                client.send(b"GET /operator HTTP/1.1\r\nHost: a.test\r\n" + fields + b"\r\n")
                assert client.read_response().status == status
        assert api.refused.get_nowait() == "invalid_api_key"
        api.release()
        assert first.read_response().status == 200


def test_only_get_and_head_on_a_health_path_are_served(full: Listener) -> None:
    for method, status in ((b"POST", 503), (b"GET", 200), (b"HEAD", 200)):
        with RawClient(full.port) as client:
            client.send(method + b" /health HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert client.read_response(method.decode()).status == status


def test_silent_connection_is_closed_in_time(full: Listener) -> None:
    with RawClient(full.port) as client:
        started = time.monotonic()
        assert client.read_rest() == b""
        assert time.monotonic() - started < 10


def test_silent_connections_do_not_keep_health_checks_out(full: Listener) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(RawClient(full.port))
            silent.send(b"GET /he")
        with RawClient(full.port) as client:
            assert client.send(HEALTH).read_response().status == 200


def test_clients_that_leave_do_not_leak(full: Listener) -> None:
    for data in (b"", b"GET /he", HEALTH):
        for leave in ("close", "abandon", "half_close"):
            with RawClient(full.port) as client:
                client.send(data)
                getattr(client, leave)()
    with RawClient(full.port) as client:
        assert client.send(HEALTH).read_response().status == 200


def test_health_check_must_not_read_a_form_wait_or_stream(full: Listener) -> None:
    expected = {"form": 503, "wait": 503, "stream": 503, "bug": 500, "error": 400, "file": 200}
    for what, status in expected.items():
        with RawClient(full.port) as client:
            response = client.send(
                b"GET /health?do=%b HTTP/1.1\r\nHost: a.test\r\n\r\n" % what.encode()
            ).read_response()
            assert response.status == status
            if status == 200:
                assert (response.content, response.fields["content-type"]) == (b"ok", "text/plain")
            else:
                assert response.code
            assert client.read_rest() == b""


def test_long_answer_is_written_without_blocking_other_connections() -> None:
    with serving(max_connections=1, overflow_timeout_s=20) as (listener, api), RawClient(listener.port) as first:
        first.send(b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert api.seen.get(timeout=10) == "/wait"
        with RawClient(listener.port) as client:
            client.send(b"GET /health?do=large HTTP/1.1\r\nHost: a.test\r\n\r\n")
            with RawClient(listener.port) as other:
                assert other.send(HEALTH).read_response().status == 200
            assert len(client.read_response().content) == 10_000_000
        api.release()
        assert first.read_response().status == 200


def test_rejected_connections_do_not_flood_the_log(full: Listener, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    for head in [b"GET /x HTTP/1.1\r\nHost: a.test\r\n\r\n"] * 29 + [b"garbage\r\n\r\n"]:
        with RawClient(full.port) as client:
            assert client.send(head).read_response().status in (400, 503)
    full.rejections.report()  # at the end of the interval, or when the server stops
    lines = [record for record in caplog.records if record.getMessage().startswith("rejected ")]
    reports = [record for record in caplog.records if record.getMessage().startswith("log lines suppressed")]
    assert len(lines) == 10
    assert [record.fields["number"] for record in reports] == [20]  # type: ignore[attr-defined]
