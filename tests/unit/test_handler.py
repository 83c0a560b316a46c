"""One connection: order of exchanges, persistence, Expect, errors, event streams, waits, timeouts, access log."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ovserve.front.listener import Listener
from tests.rawclient import RawClient, Response
from tests.toyapi import ToyApi, serving

JSON_BODY = b'{"a": 1}'
JSON = b"Content-Type: application/json\r\n"


def request(target: str, fields: bytes = b"", body: bytes = b"", method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} {target} HTTP/{version}\r\nHost: a.test\r\n".encode() + fields + b"\r\n" + body


def post(target: str, body: bytes = JSON_BODY, fields: bytes = JSON) -> bytes:
    return request(target, fields + b"Content-Length: %d\r\n" % len(body), body, "POST")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Listener, ToyApi]]:
    with serving(linger_s=0.3) as both:
        yield both


@pytest.fixture
def client(running: tuple[Listener, ToyApi]) -> Iterator[RawClient]:
    with RawClient(running[0].port) as connected:
        yield connected


@pytest.fixture
def api(running: tuple[Listener, ToyApi]) -> ToyApi:
    return running[1]


def test_route_receives_the_request(client: RawClient) -> None:
    fields = b"Authorization: Bearer k\r\nX-A: b\r\nx-a: c\r\n"
    seen = client.send(request("/describe/%C4%8D?x=1&y=%20", fields)).read_response().json
    assert (seen["method"], seen["path"], seen["query"]) == ("GET", "/describe/č", {"x": "1", "y": " "})
    assert (seen["address"], seen["fields"]["x-a"]) == ("127.0.0.1", "b, c")
    assert re.fullmatch("[0-9a-f]{16}", seen["key"])


def test_requests_on_one_connection_are_answered_in_order(client: RawClient) -> None:
    for number in range(3):
        assert client.send(request(f"/describe/{number}")).read_response().json["path"] == f"/describe/{number}"


def test_pipelined_requests_are_answered_in_order(client: RawClient) -> None:
    chunked = request("/echo", JSON + b"Transfer-Encoding: chunked\r\n", b'8\r\n{"a": 3}\r\n0\r\n\r\n', "POST")
    client.send(
        request("/describe/1") + post("/echo", b'{"a": 2}') + chunked + post("/ignore") + request("/describe/5")
    )
    assert client.read_response().json["path"] == "/describe/1"
    assert client.read_response().json["fields"] == [["a", 2]]
    assert client.read_response().json["fields"] == [["a", 3]]
    assert client.read_response().json == {"ignored": True}
    assert client.read_response().json["path"] == "/describe/5"


def test_head_is_answered_without_content(client: RawClient) -> None:
    whole = client.send(request("/describe")).read_response()
    head = client.send(request("/describe", method="HEAD")).read_response("HEAD")
    assert abs(int(head.fields["content-length"]) - len(whole.content)) == len("HEAD") - len("GET")
    stream = client.send(request("/stream?do=3.3", method="HEAD")).read_response("HEAD")
    assert stream.fields["content-type"] == "text/event-stream"
    missing = client.send(request("/nowhere", method="HEAD")).read_response("HEAD")
    assert missing.status == 404
    assert client.send(request("/health")).read_response().json == {"live": True}


def test_upload_is_spooled(client: RawClient) -> None:
    part = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + b"\x00\r\n" * 50_000
        + b"\r\n--b--\r\n"
    )
    echo = client.send(post("/echo", part, b"Content-Type: multipart/form-data; boundary=b\r\n")).read_response().json
    assert echo["uploads"][0][:2] == ["image", 150_000]


def test_response_204_has_no_content_fields(client: RawClient) -> None:
    response = client.send(request("/nothing", method="OPTIONS")).read_response()
    assert response.status == 204
    assert "content-length" not in response.fields
    assert "content-type" not in response.fields
    assert client.send(request("/health")).read_response().status == 200


def test_options_asterisk_lists_the_methods(client: RawClient) -> None:
    response = client.send(request("*", method="OPTIONS")).read_response()
    assert (response.status, response.fields["allow"]) == (204, "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT")


def test_file_reply_has_its_own_type_and_fields(client: RawClient) -> None:
    response = client.send(request("/file")).read_response()
    assert (response.content, response.fields["content-type"]) == (b"\x89PNG", "image/png")
    assert response.fields["cache-control"] == "private"


def test_large_answer_of_many_chunks_arrives_whole(client: RawClient) -> None:
    response = client.send(request("/large?size=20001&count=700")).read_response()
    assert len(response.content) == 20001 * 700
    assert response.content[20001 * 25 : 20001 * 25 + 3] == b"ZZZ"


# --- persistent connections -------------------------------------------------------------------------------------------


def test_connection_close_ends_the_connection(client: RawClient) -> None:
    response = client.send(request("/health", b"Connection: close\r\n")).read_response()
    assert response.fields["connection"] == "close"
    assert client.read_rest() == b""


def test_http_1_0_connection_ends_without_keep_alive(client: RawClient) -> None:
    kept = client.send(request("/health", b"Connection: keep-alive\r\n", version="1.0")).read_response()
    assert kept.fields["connection"] == "keep-alive"
    ended = client.send(request("/health", version="1.0")).read_response()
    assert ended.fields["connection"] == "close"
    assert client.read_rest() == b""


@pytest.mark.parametrize("fields", [b"Content-Length: 1000\r\n", b"Content-Length: 65536\r\n"])
def test_short_unread_body_is_discarded_and_the_connection_persists(client: RawClient, fields: bytes) -> None:
    body = b"x" * int(fields.split()[1])
    client.send(request("/ignore", fields, body, "POST"))
    assert "connection" not in client.read_response().fields
    assert client.send(request("/health")).read_response().status == 200


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 1000000\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nExpect: 100-continue\r\n",
    ],
)
def test_other_unread_bodies_end_the_connection(client: RawClient, fields: bytes) -> None:
    response = client.send(request("/ignore", fields, method="POST")).read_response()
    assert response.fields["connection"] == "close"
    client.half_close()
    assert client.read_rest() == b""


def test_answer_arrives_although_the_client_still_sends_its_upload(running: Any) -> None:
    for _ in range(5):
        with RawClient(running[0].port) as client:
            client.send(request("/nowhere", b"Content-Length: 3000000\r\n", method="POST"))
            client.send(b"x" * 3_000_000)
            assert client.read_response().status == 404
            client.half_close()
            assert client.read_rest() == b""


def test_malformed_head_is_counted(client: RawClient, api: ToyApi) -> None:
    assert client.send(b"GET / HTTP/1.1\nHost: a.test\n\n").read_response().status == 400
    assert api.refused.get(timeout=10) == "malformed_request"


def test_malformed_chunk_is_400_and_ends_the_connection(client: RawClient) -> None:
    data = request("/echo", JSON + b"Transfer-Encoding: chunked\r\n", b'8\r\n{"a": 1}XX', "POST")
    response = client.send(data + b"y" * 100_000).read_response()
    assert (response.status, response.code, response.fields["connection"]) == (400, "malformed_request", "close")
    client.half_close()
    assert client.read_rest() == b""


# --- Expect -----------------------------------------------------------------------------------------------------------


def test_continue_is_sent_when_the_route_reads_the_form(client: RawClient) -> None:
    client.send(request("/echo", JSON + b"Content-Length: 8\r\nExpect: 100-continue\r\n", method="POST"))
    assert client.read_response().status == 100
    assert client.send(JSON_BODY).read_response().json["fields"] == [["a", 1]]
    assert client.send(request("/health")).read_response().status == 200


def test_continue_is_not_sent_when_the_body_has_arrived(client: RawClient) -> None:
    client.send(request("/echo", JSON + b"Content-Length: 8\r\nExpect: 100-continue\r\n", JSON_BODY, "POST"))
    assert client.read_response().status == 200


def test_final_error_is_sent_without_continue(client: RawClient) -> None:
    client.send(request("/nowhere", b"Content-Length: 8\r\nExpect: 100-continue\r\n", method="POST"))
    response = client.read_response()
    assert (response.status, response.fields["connection"]) == (404, "close")


def test_unsupported_media_type_is_415_without_continue(client: RawClient) -> None:
    client.send(
        request("/echo", b"Content-Type: text/plain\r\nContent-Length: 8\r\nExpect: 100-continue\r\n", method="POST")
    )
    assert client.read_response().status == 415


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_error_has_the_error_object_and_its_fields(client: RawClient) -> None:
    missing = client.send(request("/nowhere")).read_response()
    assert (missing.status, missing.code, missing.json["error"]["param"]) == (404, "not_found", None)
    wrong = client.send(request("/raise?kind=other")).read_response()
    assert (wrong.status, wrong.code, wrong.json["error"]["param"]) == (400, "invalid_value", "kind")
    full = client.send(request("/raise?kind=queue_full")).read_response()
    assert (full.status, full.fields["retry-after"], full.fields["x-should-retry"]) == (429, "7", "true")
    method = client.send(request("/raise?kind=method")).read_response()
    assert (method.status, method.fields["allow"]) == (405, "POST")
    crash = client.send(request("/raise?kind=crash")).read_response()
    assert (crash.status, crash.fields["x-should-retry"]) == (500, "false")
    assert len({r.fields["x-request-id"] for r in (missing, wrong, full, method, crash)}) == 5


def test_unexpected_exception_is_500_and_its_traceback_is_logged_with_the_request_id(
    client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.send(request("/raise?kind=bug")).read_response()
    assert (response.status, response.code) == (500, "internal_error")
    assert "bug in a route" not in response.content.decode()
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.__dict__["fields"] == {"id": response.fields["x-request-id"]}
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError
    assert client.send(request("/health")).read_response().status == 200


def test_response_field_with_a_line_end_is_500(client: RawClient) -> None:
    response = client.send(request("/raise?kind=injection")).read_response()
    assert response.status == 500
    assert "set-cookie" not in response.fields


# --- streams ----------------------------------------------------------------------------------------------------------


def chunks(client: RawClient) -> list[bytes]:
    return list(iter(client.read_chunk, b""))


def test_each_event_is_one_chunk_written_at_once(client: RawClient, api: ToyApi) -> None:
    client.send(request("/stream?do=3.wait.comment.5"))
    status, fields = client.read_head()
    assert (status, fields["content-type"], fields["transfer-encoding"]) == (200, "text/event-stream", "chunked")
    assert (fields["x-toy"], fields["cache-control"]) == ("1", "no-cache")
    assert client.read_chunk() == b"event: piece\ndata: xxx\n\n"
    assert not client.has_answer(0.05)
    api.release()
    assert chunks(client) == [b": step 1/2\n\n", b"event: piece\ndata: xxxxx\n\n"]
    assert api.closed.get(timeout=10) == "/stream"
    assert client.send(request("/health")).read_response().status == 200


def test_stream_without_events_is_empty(client: RawClient) -> None:
    assert client.send(request("/stream")).read_response().content == b""


def test_http_1_0_stream_ends_with_the_connection(client: RawClient) -> None:
    response = client.send(request("/stream?do=3.4", version="1.0")).read_response()
    assert response.content == b"event: piece\ndata: xxx\n\nevent: piece\ndata: xxxx\n\n"
    assert "transfer-encoding" not in response.fields


def test_error_before_the_first_event_has_its_own_status(client: RawClient, api: ToyApi) -> None:
    response = client.send(request("/stream?do=error")).read_response()
    assert (response.status, response.code) == (400, "invalid_value")
    assert api.closed.get(timeout=10) == "/stream"
    assert client.send(request("/health")).read_response().status == 200


@pytest.mark.parametrize(("what", "code"), [("error", "invalid_value"), ("bug", "internal_error")])
def test_error_in_a_stream_is_its_last_event(client: RawClient, what: str, code: str) -> None:
    client.send(request(f"/stream?do=3.{what}.4"))
    content = client.read_response().content
    *_, last = content.removesuffix(b"\n\n").split(b"\n\n")
    kind, data = last.split(b"\n")
    document = json.loads(data.removeprefix(b"data: "))
    assert kind == b"event: error"
    assert (document["type"], document["error"]["code"]) == ("error", code)
    assert b"xxxx" not in content
    assert client.send(request("/health")).read_response().status == 200


def test_client_that_leaves_ends_the_stream(running: Any, api: ToyApi) -> None:
    while not api.ends.empty():
        api.ends.get()
    for leave in ("close", "abandon", "half_close"):
        with RawClient(running[0].port) as client:
            client.send(request("/stream?do=3.wait"))
            client.read_head()
            piece = client.read_chunk()
            getattr(client, leave)()
            assert api.gone.get(timeout=10) == "/stream"
            assert api.closed.get(timeout=10) == "/stream"
        while (end := api.ends.get(timeout=10)).outcome != "gone":  # of an earlier test
            pass
        assert len(piece) + 100 < end.sent_bytes < len(piece) + 1000, "the head and one event"


# --- waits ------------------------------------------------------------------------------------------------------------


def test_wait_ends_when_the_descriptor_is_readable(client: RawClient, api: ToyApi) -> None:
    client.send(request("/wait"))
    assert not client.has_answer(0.05)
    api.release()
    assert client.read_response().json == {"waited": True}
    assert client.send(request("/tick")).read_response().json == {"woken": False}


@pytest.mark.parametrize("leave", ["close", "abandon", "half_close"])
def test_wait_ends_when_the_client_leaves(running: Any, api: ToyApi, leave: str) -> None:
    with RawClient(running[0].port) as client:
        client.send(request("/wait/" + leave) + request("/never"))  # pipelined bytes do not hide the end-of-file
        while api.seen.get(timeout=10) != "/wait/" + leave:
            pass
        getattr(client, leave)()
        assert api.gone.get(timeout=10) == "/wait/" + leave


# --- timeouts ---------------------------------------------------------------------------------------------------------


def test_slow_head_is_408() -> None:
    with serving(head_timeout_s=0.2) as (listener, _), RawClient(listener.port) as client:
        client.send(b"GET /health HTTP/1.1\r\nHos")
        response = client.read_response()
        assert (response.status, response.code) == (408, "request_timeout")
        assert client.read_rest() == b""


def test_head_timeout_is_not_extended_by_each_byte() -> None:
    with serving(head_timeout_s=0.3) as (listener, _), RawClient(listener.port) as client:
        started = time.monotonic()
        while not client.has_answer(0.05):
            client.send(b"X")
            assert time.monotonic() - started < 20
        assert client.read_response().status in {400, 408, 414, 431}


def test_idle_connection_is_closed_without_an_answer() -> None:
    with serving(head_timeout_s=0.1, idle_timeout_s=0.1) as (listener, _):
        with RawClient(listener.port) as client:
            assert client.read_rest() == b""
        with RawClient(listener.port) as client:
            client.send(request("/health"))
            assert client.read_response().status == 200
            assert client.read_rest() == b""


def test_slow_body_is_408() -> None:
    with serving(body_grace_s=0.1, linger_s=0.1) as (listener, _), RawClient(listener.port) as client:
        client.send(request("/echo", JSON + b"Content-Length: 8\r\n", b"{", "POST"))
        response = client.read_response()
        assert (response.status, response.code) == (408, "request_timeout")
        assert client.read_rest() == b""


@pytest.mark.parametrize("length", [b"Content-Length: 101\r\n", b"Content-Length: 99999999999999999\r\n"])
def test_client_without_a_key_gets_401_for_a_body_that_is_too_large(length: bytes) -> None:
    with serving(api_key="sk-one", max_body_bytes=100, linger_s=0.1) as (listener, _):
        for key, status in ((b"", 401), (b"api-key: sk-other\r\n", 401), (b"api-key: sk-one\r\n", 413)):
            with RawClient(listener.port) as client:
                response = client.send(request("/echo", key + JSON + length, method="POST")).read_response()
                assert response.status == status


def test_api_key_is_checked_before_the_body_is_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    fields = JSON + b"Content-Length: 2000000\r\nExpect: 100-continue\r\n"
    with serving(api_key="sk-one") as (listener, api):
        with RawClient(listener.port) as client:
            response = client.send(request("/echo", fields, method="POST")).read_response()
            assert (response.status, response.code) == (401, "invalid_api_key")
            assert response.fields["www-authenticate"] == "Bearer"
            assert "x-should-retry" not in response.fields
        with RawClient(listener.port) as client:
            client.send(request("/echo", b"api-key: sk-other\r\n" + JSON + b"Content-Length: 2\r\n", b"{}", "POST"))
            assert client.read_response().status == 401
            assert client.send(request("/health")).read_response().status == 200
            described = client.send(request("/describe", b"Authorization: Bearer sk-one\r\n")).read_response()
            assert described.json["key"] == hashlib.sha256(b"sk-one").hexdigest()[:16]
        assert [api.seen.get(timeout=10) for _ in range(2)] == ["/health", "/describe"]
        assert api.seen.empty()
    assert "sk-" not in str([(record.getMessage(), record.__dict__.get("fields")) for record in caplog.records])


def test_route_of_a_request_is_matched_once() -> None:
    limits = {"max_connections": 1, "overflow_connections": 4, "api_key": "sk-one"}
    with serving(**limits) as (listener, api), RawClient(listener.port) as client:
        for target, fields in (("/describe?x=1", b"api-key: sk-one\r\n"), ("/describe", b""), ("/health", b"")):
            client.send(request(target, fields)).read_response()
        with RawClient(listener.port) as beyond:  # the connection limit
            assert beyond.send(request("/health")).read_response().status == 200
        matched = [api.matched.get(timeout=10) for _ in range(4)]
        assert matched == [("GET", "/describe"), ("GET", "/describe"), ("GET", "/health"), ("GET", "/health")]
        assert api.matched.empty()


def test_every_answer_names_the_allowed_origin() -> None:
    asking = b"Origin: https://b.test\r\n"
    field = "access-control-allow-origin"
    origins = "https://a.test,https://b.test"
    with serving(allowed_origins=origins, max_connections=1) as (listener, _), RawClient(listener.port) as client:
        for path in ("/describe", "/nowhere"):
            assert client.send(request(path, asking)).read_response().fields[field] == "https://b.test"
        assert client.send(request("/stream?do=3", asking)).read_head()[1][field] == "https://b.test"
        client.read_chunk()
        client.read_chunk()
        with RawClient(listener.port) as beyond:  # the connection limit
            answer = beyond.send(request("/describe", asking)).read_response()
            assert (answer.status, answer.fields[field]) == (503, "https://b.test")
        with RawClient(listener.port) as beyond:
            assert beyond.send(request("/health", asking)).read_response().fields[field] == "https://b.test"


@pytest.mark.parametrize("blank", [b"\r\n", b"\r"])
@pytest.mark.parametrize("is_late", [True, False])
def test_line_end_after_a_request_does_not_begin_another(blank: bytes, is_late: bool) -> None:
    with serving(head_timeout_s=0.2, idle_timeout_s=0.6) as (listener, _):
        with RawClient(listener.port) as client:
            client.send(request("/health") + (b"" if is_late else blank)).read_response()
            client.send(blank if is_late else b"")
            assert not client.has_answer(0.4)
            assert client.read_rest() == b""
        with RawClient(listener.port) as client:
            client.send(request("/health") + blank).read_response()
            time.sleep(0.3)  # longer than head_timeout_s
            rest = b"" if blank.endswith(b"\n") else b"\n"
            assert client.send(rest + request("/health")).read_response().status == 200


@pytest.mark.parametrize("is_silent", [True, False])
def test_unfinished_upload_is_503_as_soon_as_the_server_drains(is_silent: bool) -> None:
    with serving() as (listener, api), RawClient(listener.port) as client:
        client.send(request("/echo", JSON + b"Content-Length: 100000\r\n", b"{", "POST"))
        assert api.seen.get(timeout=10) == "/echo"
        started = time.monotonic()
        listener.is_draining = True
        while not is_silent and not client.has_answer(0.01):
            client.send(b" ")
        response = client.read_response()
        assert (response.status, response.code) == (503, "draining")
        assert (response.fields["retry-after"], response.fields["connection"]) == ("5", "close")
        assert time.monotonic() - started < 10  # the body rate would allow a silent client 20 s


def test_client_that_does_not_read_is_disconnected() -> None:
    with serving(write_timeout_s=0.2) as (listener, api), RawClient(listener.port) as client:
        client.send(request("/large?size=1000000&count=30"))
        assert api.seen.get(timeout=10) == "/large"
        until = time.monotonic() + 20
        while listener.open_connections:
            assert time.monotonic() < until
            time.sleep(0.01)  # a client that does not read cannot observe the close
        assert len(client.read_rest()) < 30_000_000


# --- the log ----------------------------------------------------------------------------------------------------------


def line_of(caplog: pytest.LogCaptureFixture, message: str) -> logging.LogRecord:
    """Wait for the record with this message, which is written after the answer."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for record in caplog.records:
            if record.getMessage() == message:
                return record
        time.sleep(0.01)  # a log has no event to wait for
    raise AssertionError([record.getMessage() for record in caplog.records])


def test_each_request_is_logged(client: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    fields = b"X-Client-Request-Id: mine-1\r\nAuthorization: Bearer secret\r\n"
    response: Response = client.send(request("/describe/%20?key=secret", fields)).read_response()
    client.send(request("/health")).read_response()
    record = line_of(caplog, "GET /describe/%20 200")
    logged = record.__dict__["fields"]
    assert (logged["id"], logged["client_id"]) == (response.fields["x-request-id"], "mine-1")
    assert logged["bytes"] > len(response.content)
    assert logged["ms"] >= 0
    assert "secret" not in str(logged)


def test_error_is_logged_with_code_and_message(client: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    response = client.send(request("/raise?kind=other")).read_response()
    logged = line_of(caplog, f"GET /raise {response.status}").__dict__["fields"]
    error = json.loads(response.content)["error"]
    assert (logged["code"], logged["why"]) == (
        error["code"],
        error["message"][:200].encode("ascii", "backslashreplace").decode(),
    )


def test_malformed_request_is_logged(client: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    response = client.send(b"nonsense\r\n\r\n").read_response()
    record = line_of(caplog, "rejected 400")
    assert record.__dict__["fields"]["id"] == response.fields["x-request-id"]


def test_client_that_left_is_logged_as_499(running: Any, api: ToyApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    with RawClient(running[0].port) as client:
        client.send(request("/wait"))
        client.socket.shutdown(socket.SHUT_RDWR)
        assert api.gone.get(timeout=10) == "/wait"
    assert line_of(caplog, "GET /wait 499").__dict__["fields"]["bytes"] == 0
