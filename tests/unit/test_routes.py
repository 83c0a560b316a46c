"""Routes: which handler serves which method and path."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ovserve.api.api import ImagesApi
from ovserve.api.exchange import FileReply, JsonReply, Reply, ServerEvent, StreamReply, windows_of
from ovserve.api.record import End, Record
from ovserve.api.reloads import ModelReload, ReloadStatus
from ovserve.api.routes import ROUTES, Match, Route, match_route
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job
from ovserve.errors import (
    ApiError,
    BadRequest,
    ClientGone,
    DeadlineExceeded,
    InternalError,
    InvalidValue,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RangeNotSatisfiable,
    ReloadFailed,
    SettingsError,
)
from ovserve.settings.options import ModelSettings, Settings
from ovserve.usage import UsageLog
from ovserve.wire.local.spool import Spool
from ovserve.wire.request import ImageRequest
from tests.forms import FakeForm, catalog


class FakeExchange:
    """A request without a socket."""

    id = "r1"
    address = network = "127.0.0.1"
    is_verified = False
    key_name = ""
    key = ""
    holding = None
    is_secure = False
    query: Mapping[str, str] = {}

    def __init__(self, method: str, path: str, **headers: str) -> None:
        self.method, self.path, self.headers = method, path, headers
        self.notes: dict[str, str] = {}
        self.record = Record()

    def header(self, name: str) -> str | None:
        return self.headers.get(name.replace("-", "_"))

    def take_pictures(self, model: str, count: int, aliases: object = ()) -> None:
        self.notes["taken"] = f"{count} of {model}"

    def read_form(self) -> FakeForm:
        return FakeForm([("prompt", "a star")])

    def note(self, name: str, value: str) -> None:
        self.notes[name] = value

    def release_form(self) -> None:
        pass

    def offer_form(self, on_release: object) -> None:
        pass

    def wait(self, descriptor: int, deadline: object) -> bool:
        raise AssertionError("no handler in these tests waits")


def answer(api: ImagesApi, exchange: FakeExchange) -> Reply:
    return api.answer(exchange, api.match(exchange.method, exchange.path))


@pytest.fixture
def api(tmp_path: Path) -> Any:
    spool = Spool(tmp_path, 10_000_000)
    dispatcher = Dispatcher(spool, Settings())
    dispatcher.add_model("m", 4)
    reloads: list[int] = []

    def reload() -> None:
        reloads.append(1)
        if len(reloads) > 1:
            raise SettingsError("port=x: not a number")

    api = ImagesApi(Settings(store_dir=tmp_path / "kept"), catalog(), dispatcher, reload)
    yield api
    api.store.close()
    dispatcher.close()
    spool.close()


def test_without_traces_none_of_their_code_runs(api: ImagesApi) -> None:
    names, files = [], set()

    class Watched(FakeExchange):
        def header(self, name: str) -> str | None:
            names.append(name)
            return super().header(name)

    exchange = Watched("POST", "/v1/images/generations", traceparent=f"00-{'a' * 32}-{'b' * 16}-01", content_type="x")
    match = api.match(exchange.method, exchange.path)
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    try:
        with pytest.raises(ApiError):
            api.answer(exchange, match)  # type: ignore[arg-type]
        api.note_end(exchange, match, End(503, 0, 10, None, 0.1, 0.2))  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
    assert any(name.endswith("api/api.py") for name in files)
    assert [name for name in files if name.endswith("api/traces.py") or "opentelemetry" in name] == []
    assert "traceparent" not in names
    assert exchange.record.trace is None


@pytest.mark.parametrize(
    "path",
    [
        "/v3/models",
        "/v1/models",
        "/v3/v1/models",
        "/openai/v1/models",
        "/api/v1/models",
        "/engines/v1/models",
        "/openai/models",
        "/openai/models/m",
        "/v1//models",
        "//v1/models//",
        "/models",
        "/v3/models/",
        "/v3/models/m",
        "/v2",
        "/v2/health/live",
        "/livez",
        "/ping",
        "/metrics",
        "/openapi.json",
        "/v1/config",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_documents_are_served(api: ImagesApi, path: str, method: str) -> None:
    reply = answer(api, FakeExchange(method, path))
    assert isinstance(reply, JsonReply | FileReply)
    assert reply.status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v3/images/edits",
        "/images/edits",
        "/v1/images/generations",
        "/v3/some/model/images/edits",
        "/openai/deployments/m/images/edits",
        "/openai/images/edits",
        "/v1//images/edits",
        "/engines/v1/images/edits",
        "/api/v1/images/edits",
    ],
)
def test_other_method_is_405_with_allow(api: ImagesApi, path: str) -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        answer(api, FakeExchange("GET", path))
    assert caught.value.headers["allow"] == "OPTIONS, POST"


@pytest.mark.parametrize("path", ["/v3", "/v2/images", "/v1/v3/chat/completions", "/v2/metrics", "/v3/images/edit"])
def test_unknown_path_is_404(api: ImagesApi, path: str) -> None:
    with pytest.raises(NotFound):
        answer(api, FakeExchange("GET", path))


@pytest.mark.parametrize("path", ["/api/v2/models", "/sdapi/txt2img", "/openai", "/openai/files", "/api/health"])
def test_error_for_an_unknown_path_contains_the_base_url(api: ImagesApi, path: str) -> None:
    with pytest.raises(NotFound, match=r"the base URL is http://a\.test:8000/v1, and"):
        answer(api, FakeExchange("POST", path, host="a.test:8000"))


def test_error_for_an_unknown_path_of_the_other_api_has_its_form(api: ImagesApi) -> None:
    exchange = FakeExchange("GET", "//sdapi/v1/memory", host="h")
    with pytest.raises(NotFound, match=r"does not exist; /openapi\.json lists") as caught:
        answer(api, exchange)
    assert "detail" in api.match("GET", "//sdapi/v1/memory").error_document(caught.value)
    assert "detail" not in api.match("GET", "/v1/memory").error_document(caught.value)


@pytest.mark.parametrize("path", ["/api/images/edits", "/v1/openai/v2/images/edits"])
def test_path_that_begins_with_no_model_is_404_with_the_base_url(api: ImagesApi, path: str) -> None:
    exchange = FakeExchange("POST", path, host="a.test", x_forwarded_proto="https")
    exchange.read_form = lambda: pytest.fail("the body is not read")  # type: ignore[method-assign]
    with pytest.raises(ModelNotFound, match=r"is not a model; the base URL is https://a\.test/v1"):
        answer(api, exchange)


def test_unknown_deployment_is_404_that_lists_the_models(api: ImagesApi) -> None:
    with pytest.raises(ModelNotFound, match="The model 'ghost' does not exist; available: 'm'"):
        answer(api, FakeExchange("POST", "/openai/deployments/ghost/images/generations"))


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/v2/health/ready"])
def test_readiness_paths_are_503_with_the_reason_and_need_no_key(api: ImagesApi, path: str) -> None:
    match = match_route("GET", path)
    assert (match.is_open, match.is_health) == (True, True)
    reply = answer(api, FakeExchange("GET", path))
    assert isinstance(reply, JsonReply)
    assert reply.status == 503
    assert b'"reason":"' in b"".join(map(bytes, reply.chunks))  # type: ignore[arg-type]


def ready_status(api: ImagesApi, which: str, default: str, *ready: str) -> int:
    api.dispatcher.remove_model("m")
    api.catalog = catalog(ModelSettings(name="a"), ModelSettings(name="b"), default=default)
    api.settings = dataclasses.replace(api.settings, ready_models=which)
    for name in "ab":
        api.dispatcher.add_model(name, 4, is_on_demand=name in ready)  # without workers, one on demand is ready
    reply = answer(api, FakeExchange("GET", "/v2/health/ready"))
    assert isinstance(reply, JsonReply)
    return reply.status


@pytest.mark.parametrize(
    ("which", "default", "ready", "status"),
    [
        ("default", "a", "a", 200),
        ("default", "a", "b", 503),
        ("default", "", "b", 200),
        ("default", "", "", 503),
        ("any", "a", "b", 200),
        ("any", "a", "", 503),
        ("all", "a", "a", 503),
        ("all", "a", "ab", 200),
    ],
)
def test_readiness_waits_for_the_configured_models(
    api: ImagesApi, which: str, default: str, ready: str, status: int
) -> None:
    assert ready_status(api, which, default, *ready) == status


def test_response_format_url_needs_a_host_field(api: ImagesApi) -> None:
    exchange = FakeExchange("POST", "/v1/images/generations")
    exchange.read_form = lambda: FakeForm([("prompt", "a star"), ("response_format", "url")])  # type: ignore[method-assign]
    with pytest.raises(BadRequest) as caught:
        answer(api, exchange)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "store_full"), (errno.EROFS, "store_unusable")])
def test_store_that_cannot_be_written_is_reported_before_the_work(
    api: ImagesApi, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def check() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(api.store, "check", check)
    monkeypatch.setattr(api.dispatcher, "admit", lambda _: pytest.fail("the job was admitted"))
    exchange = FakeExchange("POST", "/v1/images/generations", host="a")
    exchange.read_form = lambda: FakeForm([("prompt", "a star"), ("response_format", "url")])  # type: ignore[method-assign]
    with pytest.raises(ApiError, match=os.strerror(number)) as caught:
        answer(api, exchange)
    assert (caught.value.status, caught.value.code) == (503, code)


def test_model_that_is_not_ready_is_503(api: ImagesApi) -> None:
    with pytest.raises(ApiError) as caught:
        answer(api, FakeExchange("POST", "/v1/images/generations"))
    assert caught.value.status == 503
    reply = answer(api, FakeExchange("GET", "/v2/health/ready"))
    assert isinstance(reply, JsonReply)
    assert reply.status == 503


@pytest.mark.parametrize(("path", "status"), [("/v3/models", 200), ("/v2/health/ready", 503), ("/v1/config", 200)])
def test_status_pages_list_a_model_that_a_reload_is_removing(api: ImagesApi, path: str, status: int) -> None:
    api.dispatcher.remove_model("m")  # the catalog still has it
    assert api.dispatcher.models() == []
    reply = answer(api, FakeExchange("GET", path))
    assert isinstance(reply, JsonReply)
    assert reply.status == status
    assert b'"m"' in b"".join(reply.chunks)


def test_unknown_model_is_404(api: ImagesApi) -> None:
    with pytest.raises(ModelNotFound):
        answer(api, FakeExchange("GET", "/v1/models/me/ghost"))
    with pytest.raises(ModelNotFound):
        answer(api, FakeExchange("POST", "/v1/ghost/images/generations"))


def test_draining_is_503_before_the_body_is_read(api: ImagesApi) -> None:
    api.dispatcher.drain()
    with pytest.raises(ApiError) as caught:
        answer(api, FakeExchange("POST", "/v1/images/edits"))
    assert (caught.value.status, caught.value.code) == (503, "draining")
    assert caught.value.retry_after_s


def test_reload_reports_a_wrong_configuration(api: ImagesApi) -> None:
    assert isinstance(answer(api, FakeExchange("POST", "/v1/config/reload")), JsonReply)
    with pytest.raises(BadRequest, match="port=x"):
        answer(api, FakeExchange("POST", "/v1/config/reload"))


def reload_document(api: ImagesApi, **query: str) -> tuple[int, dict[str, Any]]:
    exchange = FakeExchange("POST", "/v1/config/reload")
    exchange.query = query
    exchange.wait = lambda *_: False  # type: ignore[method-assign]
    reply = answer(api, exchange)
    assert isinstance(reply, JsonReply)
    assert reply.headers == ({"location": "/v1/config/reload/status"} if reply.status == 202 else {})
    return reply.status, json.loads(b"".join(map(bytes, windows_of(reply.chunks))))


def test_reload_answers_200_when_the_workers_serve(api: ImagesApi) -> None:
    statuses = [
        ReloadStatus(1, models={"m": ModelReload("loading")}),
        ReloadStatus(1, models={"m": ModelReload("done")}),
    ]
    api.reload_status = lambda: statuses.pop(0)
    status, document = reload_document(api)
    assert (status, document["reloaded"], document["reload"]["state"]) == (200, True, "done")


def test_reload_answers_202_with_the_status_to_ask_while_workers_load(api: ImagesApi) -> None:
    api.reload_status = lambda: ReloadStatus(1, models={"m": ModelReload("loading")})
    status, document = reload_document(api, wait_s="0.05")
    assert (status, document["reloaded"], document["reload"]["state"]) == (202, False, "loading")


def test_reload_whose_workers_fail_is_500_with_the_reason_and_in_the_metrics(api: ImagesApi) -> None:
    api.reload_status = lambda: ReloadStatus(3, models={"m": ModelReload("failed", "no weights")})
    with pytest.raises(ReloadFailed, match="model m: no weights") as caught:
        reload_document(api)
    assert (caught.value.status, caught.value.code) == (500, "reload_failed")
    page = api.metrics.page()[0]
    assert b"ovserve_reload_failed 1.0" in page
    assert b"ovserve_reloads_total 3.0" in page


@pytest.mark.parametrize("wait_s", ["", "soon", "-1", "nan", "inf", "3601"])
def test_reload_with_an_invalid_wait_is_rejected_before_the_reload(api: ImagesApi, wait_s: str) -> None:
    for _ in range(2):  # the fixture's second reload would fail
        with pytest.raises(InvalidValue, match="wait_s"):
            reload_document(api, wait_s=wait_s)


@pytest.mark.parametrize(
    ("reload", "shown"),
    [
        (ReloadStatus(), None),
        (ReloadStatus(2, is_reading=True), {"number": 2, "state": "loading", "reason": ""}),
        (ReloadStatus(2, error="port=x"), {"number": 2, "state": "failed", "reason": "port=x"}),
        (
            ReloadStatus(2, models={"m": ModelReload("failed", "no weights")}),
            {"number": 2, "state": "failed", "reason": "no weights"},
        ),
    ],
)
def test_config_shows_the_newest_reload(api: ImagesApi, reload: ReloadStatus, shown: object) -> None:
    api.reload_status = lambda: reload
    reply = answer(api, FakeExchange("GET", "/v1/config"))
    assert isinstance(reply, JsonReply)
    document = json.loads(b"".join(map(bytes, windows_of(reply.chunks))))
    assert document["m"].get("reload") == shown
    reply = answer(api, FakeExchange("GET", "/v1/config/reload/status"))
    assert isinstance(reply, JsonReply)
    assert json.loads(b"".join(map(bytes, windows_of(reply.chunks))))["state"] == reload.state


@pytest.mark.parametrize(
    ("method", "path", "kinds"),
    [
        ("POST", "/v1/config/reload", {"is_admin"}),
        ("GET", "/v1/config/reload", set()),
        ("GET", "/metrics", {"is_operator"}),
        ("HEAD", "/v1/config", {"is_operator"}),
        ("GET", "/", {"is_open", "is_public"}),
        ("POST", "/", set()),
        ("HEAD", "/v1/images/files/x", {"is_open", "is_public"}),
        ("GET", "/v2/health/live", {"is_open", "is_public"}),
        ("OPTIONS", "/v2/health/live", {"is_open"}),
        ("GET", "/openapi.json", set()),
        ("GET", "/v1/models", set()),
        ("POST", "/v1/images/edits", set()),
        ("GET", "/nowhere", set()),
    ],
)
def test_access_that_each_route_needs(method: str, path: str, kinds: set[str]) -> None:
    match = match_route(method, path)
    assert {kind for kind in ("is_open", "is_admin", "is_operator", "is_public") if getattr(match, kind)} == kinds


def test_prefix_counts_only_at_the_start_of_the_path() -> None:
    assert match_route("POST", "/v1/images/edits").params == {}
    assert match_route("POST", "/team/v1/images/edits").params == {"model": "team/v1"}
    for path in ("/x/v1/models", "/x/v3/images/files/a.png", "/v2/v1/models"):
        assert match_route("GET", path).of_path == (), path


def test_preflight_names_the_allowed_header_fields(api: ImagesApi) -> None:
    reply = answer(api, FakeExchange("OPTIONS", "/v1/images/edits", access_control_request_headers="authorization"))
    assert reply.headers["access-control-allow-headers"] == "authorization"
    invalid = answer(api, FakeExchange("OPTIONS", "/v1/images/edits", access_control_request_headers="a\r\nb: c"))
    assert "access-control-allow-headers" not in invalid.headers


def open_pictures() -> list[str]:
    """Return the targets of this process's descriptors that are stored pictures."""
    targets = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            targets.append(os.readlink(path))
    return [target for target in targets if "/kept/" in target]


@pytest.mark.parametrize(
    ("method", "headers", "status", "content"),
    [
        ("GET", {}, 200, b"0123456789"),
        ("HEAD", {"range": "bytes=2-4"}, 200, b"0123456789"),  # the front end sends no content
        ("GET", {"range": "bytes=2-4"}, 206, b"234"),
        ("GET", {"range": "bytes=-1"}, 206, b"9"),
        ("GET", {"if_none_match": "*"}, 304, b""),
    ],
)
def test_stored_picture_is_open_until_the_reply_is_closed(
    api: ImagesApi, method: str, headers: dict[str, str], status: int, content: bytes
) -> None:
    name = api.store.keep(memoryview(b"0123456789"), "png")
    reply = answer(api, FakeExchange(method, f"/v1/images/files/{name}", **headers))
    assert isinstance(reply, FileReply)
    assert reply.status == status
    assert len(reply.content) == len(content)
    assert b"".join(windows_of([reply.content])) == content
    assert open_pictures()
    reply.close()
    assert open_pictures() == []


def test_range_outside_a_stored_picture_is_416(api: ImagesApi) -> None:
    name = api.store.keep(memoryview(b"0123456789"), "png")
    with pytest.raises(RangeNotSatisfiable):
        answer(api, FakeExchange("GET", f"/v1/images/files/{name}", range="bytes=10-"))
    assert open_pictures() == []


def counted(api: ImagesApi, events: Callable[[], Generator[ServerEvent, None, None]], read: int) -> dict[str, float]:
    """Serve a stream, read some of its events and close it; return the counts of its route by status."""
    route = Route("GET", "/stream", "A stream.", lambda *_: StreamReply(events()))
    match = Match(route, {}, (route,), is_open=True, is_health=False)
    reply = api.answer(FakeExchange("GET", "/stream"), match)
    assert isinstance(reply, StreamReply)
    assert b'route="/stream"' not in api.metrics.page()[0]  # it has not ended
    with contextlib.suppress(ApiError, ClientGone, KeyError):
        for _ in itertools.islice(reply.events, read):
            pass
    reply.close()
    found = re.findall(rb'ovserve_http_responses_total\{route="/stream",status="(\d+)"\} (\S+)', api.metrics.page()[0])
    return {status.decode(): float(number) for status, number in found}


@pytest.mark.parametrize(
    ("error", "read", "status"),
    [
        (None, 9, "200"),
        (None, 1, "499"),
        (InternalError("broken"), 9, "500"),
        (DeadlineExceeded("late"), 9, "504"),
        (ClientGone("gone"), 9, "499"),
        (KeyError("bug"), 9, "500"),
    ],
)
def test_stream_is_counted_when_it_ends_and_with_its_outcome(
    api: ImagesApi, error: Exception | None, read: int, status: str
) -> None:
    def events() -> Generator[ServerEvent, None, None]:
        yield ServerEvent("", [b"accepted"])
        yield ServerEvent("piece", [b"{}"])
        if error:
            raise error

    assert counted(api, events, read) == {status: 1.0}


@pytest.mark.parametrize(
    ("method", "path", "is_health"),
    [
        ("GET", "/v2/health/live", True),
        ("HEAD", "/v2/health/ready", True),
        ("GET", "/v2/models/me/shapes/ready", True),
        ("POST", "/v2/health/live", False),
        ("OPTIONS", "/v2/health/live", False),
        ("POST", "/v2/health/live/images/edits", False),
        ("GET", "/v2/health/nowhere", False),
        ("GET", "/v1/models", False),
    ],
)
def test_only_health_checks_are_exempt_from_the_connection_limit(method: str, path: str, is_health: bool) -> None:
    match = match_route(method, path)
    assert (match.is_health, match.is_exempt) == (is_health, is_health)


def test_metrics_are_exempt_from_the_connection_limit_but_need_a_key() -> None:
    match = match_route("GET", "/metrics")
    assert (match.is_exempt, match.is_health, match.is_open) == (True, False, False)


def test_match_has_the_row_its_placeholders_and_the_rows_of_the_path() -> None:
    edit = match_route("POST", "/v1/some/model/images/edits")
    assert edit.route is not None
    assert (edit.route.path, edit.params) == ("/{model}/images/edits", {"model": "some/model"})
    other = match_route("GET", "/v1/some/model/images/edits")
    assert (other.route, other.of_path) == (None, (edit.route,))
    assert match_route("GET", "/nowhere").of_path == ()


def test_every_route_has_a_description() -> None:
    for row in ROUTES:
        assert row.text.endswith(".")
        assert row.path.startswith("/")


def test_pages_are_served_unless_they_are_switched_off(api: ImagesApi) -> None:
    for path in ("/", "/status", "/web/app.js"):
        api.settings = dataclasses.replace(api.settings, web_pages=True)
        reply = answer(api, FakeExchange("GET", path))
        assert isinstance(reply, FileReply)
        tag = reply.headers["etag"]
        assert reply.status == 200
        assert answer(api, FakeExchange("GET", path, if_none_match=tag)).status == 304  # type: ignore[union-attr]
        api.settings = dataclasses.replace(api.settings, web_pages=False)
        with pytest.raises(NotFound, match="web_pages"):
            answer(api, FakeExchange("GET", path))


def test_status_route_lists_models_and_keeps_errors_of_the_server(api: ImagesApi) -> None:
    def failing(_: ImagesApi, __: FakeExchange, ___: Mapping[str, str]) -> Reply:
        raise InternalError("broken")

    route = Route("GET", "/x", "X.", failing)  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        api.answer(FakeExchange("GET", "/x"), Match(route, {}, (route,), is_open=True, is_health=False))
    document = json.loads(b"".join(answer(api, FakeExchange("GET", "/v1/status")).chunks))  # type: ignore[union-attr,arg-type]
    assert [model["name"] for model in document["models"]]
    assert document["workers"] == []
    assert document["ready"] is False
    assert [(error["code"], error["message"]) for error in document["errors"]] == [("internal_error", "broken")]


def test_startup_check_is_503_until_the_start_is_over_and_200_from_then_on(api: ImagesApi) -> None:
    reply = answer(api, FakeExchange("GET", "/v2/health/startup"))
    assert isinstance(reply, JsonReply)
    assert (reply.status, document_of(reply)) == (503, {"started": False, "waits_for": ["m"]})
    api.has_started = True
    reply = answer(api, FakeExchange("GET", "/startupz"))
    assert isinstance(reply, JsonReply)
    assert (reply.status, document_of(reply)) == (200, {"started": True, "waits_for": []})


def test_readiness_of_chosen_models(api: ImagesApi) -> None:
    exchange = FakeExchange("GET", "/v2/health/ready")
    exchange.query = {"model": "m"}
    reply = answer(api, exchange)
    assert isinstance(reply, JsonReply)
    assert reply.status == 503
    assert document_of(reply)["models"] == {"m": {"ready": False, "reason": "loading"}}
    exchange.query = {"model": "m, none"}
    with pytest.raises(ModelNotFound):
        answer(api, exchange)


def document_of(reply: JsonReply) -> Any:
    return json.loads(b"".join(windows_of(reply.chunks)))


def test_level_of_the_log_is_shown_and_changed(api: ImagesApi) -> None:
    logger = logging.getLogger("ovserve")
    kept = logger.level
    try:
        logger.setLevel(logging.INFO)
        exchange = FakeExchange("POST", "/v1/debug/log")
        exchange.query = {"level": "debug"}
        reply = answer(api, exchange)
        assert isinstance(reply, JsonReply)
        assert document_of(reply) == {"level": "debug", "before": "info"}
        reply = answer(api, FakeExchange("GET", "/v1/debug/log"))
        assert isinstance(reply, JsonReply)
        assert document_of(reply) == {"level": "debug"}
        exchange.query = {"level": "loud"}
        with pytest.raises(InvalidValue, match="level is 'loud'; expected one of debug"):
            answer(api, exchange)
    finally:
        logger.setLevel(kept)


def test_jobs_in_flight_are_shown(api: ImagesApi) -> None:
    api.dispatcher.add_model("lazy", 4, is_on_demand=True)
    request = ImageRequest(task="edit", prompt="a secret", n=3)
    job = Job("req_1", "lazy", Client("192.0.2.1"), request, Deadline.after(60), key_name="design")
    api.dispatcher.admit(job)
    try:
        reply = answer(api, FakeExchange("GET", "/v1/debug/jobs"))
        assert isinstance(reply, JsonReply)
        document = document_of(reply)
        assert document["left_out"] == 0
        (shown,) = document["jobs"]
        assert 0 <= shown.pop("admitted_s_ago") < 30
        assert 30 < shown.pop("deadline_in_s") <= 60
        assert shown == {
            "id": "req_1", "model": "lazy", "state": "queued", "key": "design", "client": "192.0.2.1", "worker": "",
            "attempts": 0, "pictures": 3, "pictures_done": 0, "prepared": False, "dispatched_s_ago": None,
        }  # fmt: skip
    finally:
        api.dispatcher.cancel(job)
        job.close()


def test_end_of_an_exchange_is_counted_and_has_a_line_in_the_usage_log(api: ImagesApi, tmp_path: Path) -> None:
    api.usage = UsageLog(tmp_path / "usage.jsonl", 1 << 20)
    exchange = FakeExchange("POST", "/v1/images/edits")
    exchange.key_name, exchange.is_verified = "design", True
    exchange.record = Record("/images/edits", "m", "done", pictures=2, width=8, height=4, steps=3, denoise_s=0.5)
    api.note_end(exchange, api.match("POST", "/v1/images/edits"), End(200, 10, 20, None, 0.25, 1.5))  # type: ignore[arg-type]
    api.usage.close()
    entry = json.loads((tmp_path / "usage.jsonl").read_text("utf-8"))
    assert (entry["key"], entry["pixels"], entry["denoise_ms"], entry["total_ms"]) == ("design", 64, 500.0, 1500.0)
    page = api.metrics.page()[0]
    assert b'ovserve_key_pixels_total{key="design"} 64.0' in page
    assert b'ovserve_headers_seconds_sum{model="m",outcome="ok",route="/images/edits"} 0.25' in page
