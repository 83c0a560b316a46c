"""The exception tree: OpenAI's error object, the wire format, and statuses that clients retry."""

from __future__ import annotations

import json

import pytest

from ovserve import errors
from ovserve.errors import ApiError, InternalError, QueueFull, RateLimited, ServerError, clamp_retry_after, from_wire

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ApiError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_crosses_a_link_unchanged(kind: type[ApiError]) -> None:
    error = kind("what is wrong", param="n", retry_after_s=7)
    again = from_wire(json.loads(json.dumps(error.to_wire())))
    assert (type(again), again.message, again.param, again.retry_after_s) == (kind, "what is wrong", "n", 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_the_keys_of_openais_object(kind: type[ApiError]) -> None:
    body = kind("x").body()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not issubclass(kind, ServerError) and kind is not ApiError])
def test_client_mistake_has_no_status_that_clients_retry(kind: type[ApiError]) -> None:
    assert kind.status not in (409, *range(500, 600))
    if kind.status in (408, 429):
        assert kind in (QueueFull, RateLimited) or kind.code == "request_timeout"


def test_unknown_class_from_the_wire_is_an_internal_error() -> None:
    assert isinstance(from_wire({"error": "Exception", "message": "x"}), InternalError)
    assert isinstance(from_wire({"error": ["x"], "message": 5, "param": 5, "retry_after_s": "x"}), InternalError)


@pytest.mark.parametrize(("seconds", "clamped"), [(-5, 1), (0, 1), (1.4, 1), (59.6, 60), (1e9, 60)])
def test_retry_after_is_clamped_to_what_clients_accept(seconds: float, clamped: int) -> None:
    assert clamp_retry_after(seconds) == clamped


def test_message_is_cut_to_fit_a_link() -> None:
    assert len(json.dumps(ApiError("é" * 10_000).to_wire())) < 8192
    assert len(ApiError("x" * 10_000).message) == errors.MESSAGE_LIMIT_CHARS
