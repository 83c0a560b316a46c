"""The table of routes: method, path and handler function.

Paths are served under `/v3`, `/v1`, `/openai/v1`, `/v3/v1` (as the model server does), `/api/v1`, `/engines/v1`,
`/openai` and without a prefix. Doubled slashes count as one: clients join a base URL that ends in a slash with a path
that begins with one. `{model}` and `{id}` may contain slashes: clients send them raw or as %2F, and the front end has
already decoded the path once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ovserve import __version__
from ovserve.api.control import FleetControl, NoFleet, load_reply, seconds_of, unload_reply, wait_until
from ovserve.api.exchange import Exchange, FileReply, JsonReply, Reply, ServerEvent, StreamReply
from ovserve.api.images import Images, base_url_hint
from ovserve.api.openapi import openapi_document
from ovserve.api.pages import EDITOR_PAGE, STATUS_PAGE, page_file
from ovserve.api.parameters.fields import EDIT, GENERATION, VARIATION
from ovserve.api.readiness import awaited_models, is_ready
from ovserve.api.reloads import ReloadStatus
from ovserve.api.replies import json_reply, model_object, models_object, pending_object
from ovserve.api.sdapi.details import detail_document
from ovserve.api.sdapi.endpoints import SDAPI, SDAPI_PREFIX, Endpoint, SdApi
from ovserve.api.status import LastErrors, status_document
from ovserve.api.store import Store, parse_range
from ovserve.dispatch.dispatcher import Dispatcher, ModelStatus
from ovserve.dispatch.model_queue import MODEL_STATES
from ovserve.errors import (
    ApiError,
    BadRequest,
    ClientGone,
    Draining,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
    ReloadFailed,
    StartupError,
)
from ovserve.metrics import CONTENT_TYPE, Metrics
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings

__all__ = ["ROUTES", "ImagesApi", "Match", "Route", "match_route"]

Handler = Callable[["ImagesApi", Exchange, Mapping[str, str]], Reply]
# `/openai` alone is Azure's; a path such as /openai/deployments/... is a row of its own.
_PREFIX = re.compile(r"/(?:(?:v3/v1|openai/v1|api/v1|engines/v1|v3|v1)(?=/)|openai(?=/(?:images|models)(?:/|$)))")
_SLASHES = re.compile("//+")
CLIENT_GONE = 499  # status in the metrics when the client left before it was answered
RELOAD_STATUS_PATH = "/v1/config/reload/status"
RELOAD_WAIT_S = 10.0  # for the workers of a reload, if the request does not say; small models are ready by then
MAX_RELOAD_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table: method, path pattern, description, handler."""

    method: str
    path: str  # {model} matches anything, slashes included
    text: str
    handle: Handler
    prefixed: bool = True  # served under every prefix and without one; else only as written
    is_open: bool = False  # needs no API key
    is_health: bool = False  # a health check
    is_exempt: bool = False  # served even at the connection limit; health checks always are
    is_admin: bool = False  # needs an admin key or the admin listener
    is_operator: bool = False  # for operators: moves to the admin listener if there is one
    is_public: bool = False  # GET and HEAD are served to web pages of every origin; health checks are too

    def pattern(self) -> re.Pattern[str]:
        """Return the regular expression that the whole path, without its prefix, must match."""
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(self.path)))


@dataclass(frozen=True, slots=True)
class Match:
    """The rows of the table for one request; implements `exchange.RouteMatch`.

    Attributes:
        route: the row that serves the request; None if the path is unknown or does not support the method.
        params: values of the placeholders in that row's path.
        of_path: all rows of the path, whatever their method; empty if the path is unknown.
        is_open: whether the request needs no API key. A CORS preflight needs none: browsers send none (Fetch standard).
        is_health: whether the request is a health check, which is served under every Host.
        is_admin: whether the request needs an admin key or the admin listener.
        is_operator: whether the request is for operators, and belongs on the admin listener if there is one.
        is_public: whether web pages of every origin may send the request.
        is_exempt: whether the request is served even at the connection limit.
        is_sdapi: whether the path belongs to AUTOMATIC1111's API, whose errors have another form.
    """

    route: Route | None
    params: Mapping[str, str]
    of_path: tuple[Route, ...]
    is_open: bool
    is_health: bool
    is_exempt: bool = False
    is_admin: bool = False
    is_operator: bool = False
    is_public: bool = False
    is_sdapi: bool = False

    @property
    def challenge(self) -> str:
        """Value of WWW-Authenticate: clients of AUTOMATIC1111's API send the key as a password."""
        return 'Basic realm="ovserve", charset="UTF-8"' if self.is_sdapi else "Bearer"

    def error_document(self, error: ApiError) -> Mapping[str, Any]:
        """Return the JSON document of an error response."""
        return detail_document(error) if self.is_sdapi else error.body()


@dataclass(slots=True)
class _Outcome:
    """How a response is counted."""

    status: int = 500  # for an unexpected exception
    is_counted: bool = True


class ImagesApi:
    """The API of one server. Thread-safe: yes, a reload replaces settings and catalog as a whole.

    Args:
        settings: the options.
        catalog: the models.
        dispatcher: runs the jobs.
        reload: reads the configuration again, and starts the new workers. Raises StartupError.
        reload_status: returns the state of the newest reload.
        fleet: loads and unloads models.

    Attributes:
        is_stopping: the server has begun to shut down: it is not ready, but still serves requests until it drains.
        started_at: monotonic instant of the server's start.
        last_errors: the newest errors with a status of 500 or more.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        dispatcher: Dispatcher,
        reload: Callable[[], None],
        reload_status: Callable[[], ReloadStatus] = ReloadStatus,
        *,
        fleet: FleetControl | None = None,
    ) -> None:
        self.settings = settings
        self.reload = reload
        self.reload_status = reload_status
        self.fleet = fleet or NoFleet()
        self.is_stopping = False
        self.started_at = time.monotonic()
        self.last_errors = LastErrors()
        self.catalog = catalog
        self.dispatcher = dispatcher
        self.store = Store(settings)
        self.metrics = Metrics()
        self.images = Images(settings, catalog, dispatcher, self.store, self.metrics)
        self.sdapi = SdApi(self.images)
        self.metrics.watch("ovserve_queued_jobs", self._queued)
        self.metrics.watch("ovserve_running_jobs", self._running)
        self.metrics.watch("ovserve_ready_workers", self._workers)
        self.metrics.watch("ovserve_model_state", self._states)
        self.metrics.watch("ovserve_model_loading_seconds", self._loading_s)
        self.metrics.watch("ovserve_reloads_total", lambda: [([], self.reload_status().number)])
        self.metrics.watch("ovserve_reload_failed", lambda: [([], self.reload_status().state == "failed")])
        self._openapi: bytes | None = None

    def configure(self, settings: Settings, catalog: Catalog) -> None:
        """Replace settings and catalog, for all requests from now on."""
        self.settings, self.catalog = settings, catalog
        self.images.configure(settings, catalog)

    def awaited_models(self) -> list[str]:
        """Return the models that the start of the server still waits for, by the option `ready_models`."""
        return awaited_models(self.settings, self.catalog, _model_statuses(self))

    def match(self, method: str, path: str) -> Match:
        """Find the row that serves a request."""
        return match_route(method, path)

    def answer(self, exchange: Exchange, match: Match) -> Reply:
        """Serve one request; HEAD is answered as GET. Raises ApiError and ClientGone."""
        if match.route is not None:
            return self._handle_and_count(match.route, exchange, match.params)
        if not match.of_path:
            self.metrics.responses.labels("unmatched", "404").inc()
            hint = "" if match.is_sdapi else f"{base_url_hint(exchange)}, and "
            raise NotFound(f"Path {exchange.path[:200]} does not exist; {hint}/openapi.json lists the paths.")
        allowed = {route.method for route in match.of_path}
        allow = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set()) | {"OPTIONS"}))
        if exchange.method == "OPTIONS":
            return FileReply(b"", "", 204, _preflight(exchange, allow))
        self.metrics.responses.labels(match.of_path[0].path, "405").inc()
        raise MethodNotAllowed(
            f"Path {exchange.path[:200]} does not support {exchange.method}; use {allow}.", headers={"allow": allow}
        )

    def _handle_and_count(self, route: Route, exchange: Exchange, params: Mapping[str, str]) -> Reply:
        with self._counting(route, exchange) as outcome:
            reply = route.handle(self, exchange, params)
            if isinstance(reply, StreamReply):
                outcome.is_counted = False  # until the stream has ended
                return replace(reply, events=self._count_stream(route, exchange, reply.events))
            outcome.status = reply.status
        return reply

    def _count_stream(
        self, route: Route, exchange: Exchange, events: Generator[ServerEvent, None, None]
    ) -> Generator[ServerEvent, None, None]:
        """Yield the events of a stream, and count it when it has ended: with the status of the error that ended it."""
        with self._counting(route, exchange) as outcome:
            try:
                yield from events
            except GeneratorExit:  # the front end could not write the next event
                outcome.status = CLIENT_GONE
                raise
            outcome.status = 200

    @contextmanager
    def _counting(self, route: Route, exchange: Exchange) -> Iterator[_Outcome]:
        """Count one response of a route when the block ends, with the status that the block or its exception sets."""
        outcome = _Outcome()
        try:
            yield outcome
        except ApiError as error:
            outcome.status = error.status
            if not route.is_health:
                self.last_errors.note(error, request_id=exchange.id, path=route.path)
            raise
        except ClientGone:
            outcome.status = CLIENT_GONE
            raise
        finally:
            if outcome.is_counted:
                self.metrics.responses.labels(route.path, str(outcome.status)).inc()

    def openapi(self) -> bytes:
        """Return the OpenAPI document of this server; it is created at the first call."""
        if self._openapi is None:
            self._openapi = json.dumps(openapi_document(ROUTES), indent=1).encode()
        return self._openapi

    def _statuses(self) -> list[ModelStatus]:
        return self.dispatcher.statuses()

    def _queued(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.queued) for status in self._statuses()]

    def _running(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.running) for status in self._statuses()]

    def _workers(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.workers) for status in self._statuses()]

    def _states(self) -> list[tuple[list[str], float]]:
        return [([status.name, state], status.state == state) for status in self._statuses() for state in MODEL_STATES]

    def _loading_s(self) -> list[tuple[list[str], float]]:
        return [([status.name], status.loading_s) for status in self._statuses()]

    def count_refused(self, error: ApiError) -> None:
        """Count a rejected request under the error's code, so that invented paths do not become labels."""
        self.metrics.responses.labels(error.code or "refused", str(error.status)).inc()


def match_route(method: str, path: str) -> Match:
    """Return the first row of the table that serves a method and path; HEAD counts as GET."""
    served_as = "GET" if method == "HEAD" else method
    of_path = tuple(_rows_of(path))
    route, params = next(((row, params) for row, params in of_path if row.method == served_as), (None, {}))
    return Match(
        route=route,
        params=params,
        of_path=tuple(row for row, _ in of_path),
        is_open=method == "OPTIONS" or (route is not None and route.is_open),
        is_health=route is not None and route.is_health,
        is_admin=route is not None and route.is_admin,
        is_operator=route is not None and route.is_operator,
        is_exempt=route is not None and (route.is_health or route.is_exempt),
        is_public=served_as == "GET" and route is not None and (route.is_public or route.is_health),
        is_sdapi=_SLASHES.sub("/", path).startswith(SDAPI_PREFIX),
    )


def _rows_of(path: str) -> Iterator[tuple[Route, Mapping[str, str]]]:
    """Yield every route for a path, with the values of its placeholders."""
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    prefix = _PREFIX.match(path)
    bare = path[prefix.end() :] if prefix else path
    for route, pattern in _COMPILED:
        match = pattern.fullmatch(bare if route.prefixed else path)
        if match:
            yield route, match.groupdict()


def _preflight(exchange: Exchange, allow: str) -> dict[str, str]:
    """Return the header fields that allow a browser's script to send the request (CORS protocol, Fetch standard)."""
    requested = exchange.header("access-control-request-headers")
    headers = {"allow": allow, "access-control-allow-methods": allow, "access-control-max-age": "600"}
    if requested and re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}", requested):
        headers["access-control-allow-headers"] = requested
    return headers


# --- handlers ---------------------------------------------------------------------------------------------------------


def _edits(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.serve(exchange, EDIT, params.get("model"))


def _generations(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.serve(exchange, GENERATION, params.get("model"))


def _variations(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.serve(exchange, VARIATION, params.get("model"))


def _sdapi(endpoint: Endpoint) -> Handler:
    return lambda api, exchange, _: api.sdapi.serve(endpoint, exchange)


def _model_statuses(api: ImagesApi) -> dict[str, ModelStatus]:
    """Return the status of each model in the catalog.

    During a reload, a removed model can still be in the catalog but no longer in the dispatcher: it counts as
    unloading.
    """
    known = {status.name: status for status in api.dispatcher.statuses()}
    return {name: known.get(name) or _unloading_status(name) for name in api.catalog.models}


def _unloading_status(name: str) -> ModelStatus:
    return ModelStatus(
        name,
        ready=False,
        reason="unloading",
        failed=False,
        workers=0,
        queued=0,
        running=0,
        capacity=0,
        job_s=0.0,
        state="unloading",
    )


def _status_fields(api: ImagesApi, status: ModelStatus) -> dict[str, object]:
    """Return the fields of a model's object that change while the server runs."""
    loading: dict[str, object] = {}
    if status.state == "loading":
        loading = {"loading": {"percent": status.loading_percent, "seconds": round(status.loading_s, 1)}}
    if status.waits_for:
        loading = {"waits_for": status.waits_for}
    return {
        "ready": status.ready,
        "reason": status.reason,
        "state": status.state,
        **loading,
        "workers": status.workers,
        "queued": status.queued,
        "running": status.running,
        "engine": status.engine,
        "schedulers": status.schedulers,
        **_memory_fields(api, status.name),
    }


def _memory_fields(api: ImagesApi, name: str) -> dict[str, int]:
    found = api.fleet.memory().get(name)
    return {"memory_bytes": found.used_bytes, "expected_worker_bytes": found.worker_bytes} if found else {}


def _models(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    statuses = {name: _status_fields(api, status) for name, status in _model_statuses(api).items()}
    return json_reply(models_object(api.catalog, statuses))


def _model(api: ImagesApi, _: Exchange, params: Mapping[str, str]) -> Reply:
    if pending := api.catalog.pending.get(params["id"]):
        return json_reply(pending_object(pending, params["id"], api.catalog.created))
    model = api.catalog.find(params["id"])
    status = _status_fields(api, api.dispatcher.status(model.name))
    return json_reply(model_object(model, params["id"], api.catalog.created, status))


def _load(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    if api.is_stopping or api.dispatcher.is_draining:
        raise Draining("The server is shutting down; the model was not loaded.")
    name = api.catalog.find(params["id"]).name
    return load_reply(exchange, name, api.fleet, lambda: api.dispatcher.status(name))


def _unload(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    name = api.catalog.find(params["id"]).name
    return unload_reply(exchange, name, api.fleet, lambda: api.dispatcher.status(name))


def _live(_: ImagesApi, __: Exchange, ___: Mapping[str, str]) -> Reply:
    return json_reply({"live": True})


def _ready(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    statuses = _model_statuses(api)
    draining = api.is_stopping or api.dispatcher.is_draining
    ready = not draining and is_ready(api.settings, api.catalog, statuses)
    document = {
        "ready": ready,
        "draining": draining,
        "models": {
            **{name: {"ready": status.ready, "reason": status.reason} for name, status in statuses.items()},
            **{model.name: {"ready": False, "reason": model.reason} for model in api.catalog.pending.values()},
        },
    }
    return json_reply(document, 200 if ready else 503, {} if ready else {"retry-after": "2"})


def _model_ready(api: ImagesApi, _: Exchange, params: Mapping[str, str]) -> Reply:
    status = api.dispatcher.status(api.catalog.find(params["model"]).name)
    ready, reason = status.ready and not api.is_stopping, "draining" if api.is_stopping else status.reason
    return json_reply({"ready": ready, "reason": reason}, 200 if ready else 503)


def _config(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Return each model's state in the form of the model server's configuration API, and what the newest reload did."""
    document: dict[str, dict[str, object]] = {}
    for pending in api.catalog.pending.values():
        has_failed = pending.state.has_failed
        error = {"error_code": "UNKNOWN" if has_failed else "OK", "error_message": pending.reason}
        version = {"version": "1", "state": "END" if has_failed else "LOADING", "status": error}
        document[pending.name] = {"model_version_status": [version]}
    reload = api.reload_status()
    for name, status in _model_statuses(api).items():
        state = "AVAILABLE" if status.ready else "END" if status.failed else "LOADING"
        error = {"error_code": "UNKNOWN" if status.failed else "OK", "error_message": status.reason}
        document[name] = {"model_version_status": [{"version": "1", "state": state, "status": error}]}
        if reload.number:
            part = reload.models.get(name)
            document[name]["reload"] = {
                "number": reload.number,
                "state": part.state if part else reload.state,
                "reason": part.reason if part else reload.error,
            }
    return json_reply(document)


def _status(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    statuses = _model_statuses(api)
    draining = api.is_stopping or api.dispatcher.is_draining
    document = status_document(
        statuses,
        api.dispatcher.worker_statuses(),
        api.last_errors,
        started_at=api.started_at,
        is_ready=not draining and is_ready(api.settings, api.catalog, statuses),
        is_draining=draining,
    )
    return json_reply(document)


def _await_reload(api: ImagesApi, exchange: Exchange, wait_s: float) -> ReloadStatus:
    """Wait until the newest reload is no longer loading, and return its status. Raises ClientGone."""
    status = api.reload_status()

    def is_over() -> bool:
        nonlocal status
        status = api.reload_status()
        return api.is_stopping or status.state != "loading"

    if status.state == "loading":
        wait_until(exchange, is_over, wait_s)
    return status


def _reload(api: ImagesApi, exchange: Exchange, __: Mapping[str, str]) -> Reply:
    if api.is_stopping or api.dispatcher.is_draining:
        raise Draining("The server is shutting down; the configuration was not reloaded.")
    wait_s = seconds_of(exchange, "wait_s", RELOAD_WAIT_S, 0, MAX_RELOAD_WAIT_S)
    try:
        api.reload()
    except StartupError as error:
        raise BadRequest(f"The configuration was not reloaded: {error}") from None
    status = _await_reload(api, exchange, wait_s)
    if status.state == "failed":
        raise ReloadFailed(f"The reload failed: {status.failure}. What served before stays.")
    is_done = status.state == "done"
    document = {"reloaded": is_done, "models": list(api.catalog.models), "reload": status.document()}
    return json_reply(document, *((200, {}) if is_done else (202, {"location": RELOAD_STATUS_PATH})))


def _reload_status(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return json_reply(api.reload_status().document())


def _page(name: str) -> Handler:
    """Return the handler of a page, or of the files of the pages if `name` is empty. 404 with web_pages = false."""

    def handle(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
        if not api.settings.web_pages:
            raise NotFound("The web pages are switched off on this server (option web_pages).")
        return page_file(name or params["file"], exchange.header("if-none-match"))

    return handle


def _server(_: ImagesApi, __: Exchange, ___: Mapping[str, str]) -> JsonReply:
    return json_reply({"name": "ovserve", "version": __version__})


def _is_known(if_none_match: str | None, etag: str) -> bool:
    """Return whether If-None-Match lists the tag (RFC 9110 section 13.1.2).

    Tags are compared weakly, because a proxy that compresses a reply makes its tag weak.
    """
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return "*" in tags or etag in tags


def _file(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    picture = api.store.find(params["name"])
    headers = {
        "etag": picture.etag,
        "accept-ranges": "bytes",
        "cache-control": f"private, max-age={int(picture.expires_in_s)}, immutable",
    }
    if _is_known(exchange.header("if-none-match"), picture.etag):
        return FileReply(b"", "", 304, headers, picture.close)
    # RFC 9110 section 14.2: Range is defined for GET only and is ignored with HEAD.
    is_ranged = exchange.method == "GET" and exchange.header("if-range") in (None, picture.etag)
    wanted = exchange.header("range") if is_ranged else None
    try:
        part = parse_range(wanted, picture.size)
    except RangeNotSatisfiable:
        picture.close()
        raise
    if part is None:
        return FileReply(picture.part(0, picture.size), picture.media_type, 200, headers, picture.close)
    start, end = part
    headers["content-range"] = f"bytes {start}-{end - 1}/{picture.size}"
    return FileReply(picture.part(start, end), picture.media_type, 206, headers, picture.close)


def _metrics(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return FileReply(api.metrics.page(), CONTENT_TYPE)


def _openapi(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return FileReply(api.openapi(), "application/json")


ROUTES = (
    Route("POST", "/images/edits", "Edit a picture. Body: multipart form, or JSON with data URLs.", _edits),
    Route(
        "POST", "/images/generations", "Generate a picture from a prompt. Body: JSON or multipart form.", _generations
    ),
    Route("POST", "/images/variations", "Generate a variation of a picture. Body: multipart form.", _variations),
    Route("POST", "/openai/deployments/{model}/images/edits", "The same, with the path of Azure OpenAI.", _edits),
    Route(
        "POST",
        "/openai/deployments/{model}/images/generations",
        "The same, with the path of Azure OpenAI.",
        _generations,
    ),
    Route(
        "POST", "/openai/deployments/{model}/images/variations", "The same, with the path of Azure OpenAI.", _variations
    ),
    Route("POST", "/{model}/images/edits", "The same, with the model in the path.", _edits),
    Route("POST", "/{model}/images/generations", "The same, with the model in the path.", _generations),
    Route("POST", "/{model}/images/variations", "The same, with the model in the path.", _variations),
    Route(
        "GET",
        "/images/files/{name}",
        "A stored picture (response_format = url). Supports Range and If-None-Match.",
        _file,
        is_open=True,  # the unguessable URL serves as a key, and <img> sends no header field
        is_public=True,
    ),
    Route(
        "POST",
        "/models/{id}/load",
        "Load a model. Needs an admin key or the admin listener. Waits at most `wait_s` seconds (query; 10): 200 when "
        "it is ready, 202 while it loads. `keep_alive` (query): seconds for which it stays after its last job, -1 for "
        "ever.",
        _load,
        is_admin=True,
    ),
    Route(
        "POST",
        "/models/{id}/unload",
        "Unload a model when its running jobs have ended. Needs an admin key or the admin listener. Waits as above.",
        _unload,
        is_admin=True,
    ),
    *(Route(row.method, row.path, row.text, _sdapi(row), prefixed=False) for row in SDAPI),
    Route("GET", "/models", "All models.", _models),
    Route("GET", "/models/{id}", "One model.", _model),
    *(
        Route("GET", path, text, handler, prefixed=False, is_open=True, is_health=True)
        for paths, text, handler in (
            (("/v2/health/live", "/livez", "/ping"), "200 while the process responds.", _live),
            (
                ("/v2/health/ready", "/health", "/healthz", "/readyz"),
                "200 when the models of `ready_models` are ready, else 503 with the reasons.",
                _ready,
            ),
        )
        for path in paths
    ),
    Route(
        "GET",
        "/v2/models/{model}/ready",
        "200 when this model is ready, else 503 with the reason.",
        _model_ready,
        prefixed=False,
        is_open=True,
        is_health=True,
    ),
    Route(
        "GET",
        "/v1/config",
        "State of each model, in the model server's format, and of its newest reload.",
        _config,
        prefixed=False,
        is_operator=True,
    ),
    Route(
        "GET",
        "/v1/status",
        "Models, workers and the newest errors, as the page `/status` shows them.",
        _status,
        prefixed=False,
        is_operator=True,
    ),
    Route(
        "POST",
        "/v1/config/reload",
        "Reload the configuration. Needs an admin key or the admin listener. Waits for the new workers, at most "
        "`wait_s` seconds (query; 10): 200 when they serve, 202 when they still load, 500 when they failed.",
        _reload,
        prefixed=False,
        is_admin=True,
    ),
    Route("GET", RELOAD_STATUS_PATH, "State of the newest reload.", _reload_status, prefixed=False, is_operator=True),
    Route(
        "GET",
        "/metrics",
        "Metrics in the Prometheus format.",
        _metrics,
        prefixed=False,
        is_operator=True,
        is_exempt=True,  # a scrape that fails at the limit would hide the overload
    ),
    Route("GET", "/openapi.json", "OpenAPI 3.1 document of this API.", _openapi, prefixed=False),
    Route("GET", "/v2", "Name and version of the server.", _server, prefixed=False),
    # The pages are open; they ask for the key and send it with their requests.
    *(
        Route("GET", path, text, _page(name), prefixed=False, is_open=True, is_public=True)
        for path, text, name in (
            ("/", "A page to edit pictures in a browser.", EDITOR_PAGE),
            ("/status", "A page with the state of the server.", STATUS_PAGE),
            ("/web/{file}", "A file of these pages.", ""),
        )
    ),
)

_COMPILED = tuple((route, route.pattern()) for route in ROUTES)
