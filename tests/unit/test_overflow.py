"""Connections beyond the limit: answered at once, never in the way of a health check, whatever they do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ovserve.front.listener import Listener
from tests.rawclient import RawClient
from tests.toyapi import serving

HEALTH = b"GET /health HTTP/1.1\r\nHost: a.test\r\n\r\n"

pytestmark = pytest.mark.usefixtures("leak_guard")


@pytest.fixture
def full() -> Iterator[Listener]:
    """A listener whose only place is taken."""
    limits = {"max_connections": 1, "overflow_connections": 4, "overflow_timeout_s": 0.5}
    with serving(**limits) as (listener, api), RawClient(listener.port) as first:
        first.send(b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert api.seen.get(timeout=10) == "/wait"
        yield listener
        api.release()
        assert first.read_response().status == 200


def test_a_body_that_still_comes_does_not_cost_the_client_its_answer(full: Listener) -> None:
    for _ in range(5):
        with RawClient(full.port) as client:
            client.send(b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3000000\r\n\r\n").send(
                b"x" * 3_000_000
            )
            assert client.read_response().status == 503
            client.half_close()
            assert client.read_rest() == b""


def test_what_is_no_request_is_refused_as_ever(full: Listener) -> None:
    with RawClient(full.port) as client:
        response = client.send(b"GET / HTTP/1.1\nHost: a.test\n\n").read_response()
        assert (response.status, response.code) == (400, "malformed_request")


def test_other_methods_on_a_health_path_find_no_place(full: Listener) -> None:
    for method, status in ((b"POST", 503), (b"GET", 200), (b"HEAD", 200)):
        with RawClient(full.port) as client:
            client.send(method + b" /health HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert client.read_response(method.decode()).status == status


def test_who_says_nothing_is_closed_in_time(full: Listener) -> None:
    with RawClient(full.port) as client:
        started = time.monotonic()
        assert client.read_rest() == b""
        assert time.monotonic() - started < 10


def test_who_says_nothing_does_not_keep_health_out(full: Listener) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(RawClient(full.port))
            silent.send(b"GET /he")
        with RawClient(full.port) as client:
            assert client.send(HEALTH).read_response().status == 200


def test_a_client_that_goes_leaves_nothing_behind(full: Listener) -> None:
    for data in (b"", b"GET /he", HEALTH):
        for leave in ("close", "abandon", "half_close"):
            with RawClient(full.port) as client:
                client.send(data)
                getattr(client, leave)()
    with RawClient(full.port) as client:
        assert client.send(HEALTH).read_response().status == 200


def test_a_health_check_has_no_form_and_no_time_to_wait(full: Listener) -> None:
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


def test_a_long_answer_is_written_as_it_is_read() -> None:
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
