"""The table of method and path, with the thin function behind each.

Paths are served under `/v3`, `/v1` (and the reference server's doubled `/v3/v1`), and bare. `{model}` and `{id}` may hold
slashes: clients send them raw or as %2F, and the front end has decoded them once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from ovserve import __version__
from ovserve.api.exchange import Exchange, FileReply, JsonReply, Reply, StreamReply
from ovserve.api.images import Images
from ovserve.api.openapi import openapi_document
from ovserve.api.page import front_page
from ovserve.api.parameters.fields import EDIT, GENERATION, VARIATION
from ovserve.api.replies import json_reply, model_object, models_object
from ovserve.api.store import Store, parse_range
from ovserve.dispatch.dispatcher import Dispatcher, ModelStatus
from ovserve.errors import (
    ApiError,
    BadRequest,
    ClientGone,
    Draining,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    StartupError,
)
from ovserve.metrics import CONTENT_TYPE, Metrics
from ovserve.models.catalog import Catalog
from ovserve.settings.options import Settings

__all__ = ["ROUTES", "ImagesApi", "Route", "is_open"]

Handler = Callable[["ImagesApi", Exchange, Mapping[str, str]], Reply]
_HEALTH = re.compile(r"/v2/health/.*|/v2/models/.+/ready")
_PREFIX = re.compile(r"/(?:v3/v1|openai/v1|v3|v1)(?=/)")


@dataclass(frozen=True, slots=True)
class Route:
    """One row: method, path pattern, what it is for, and the function behind it."""

    method: str
    path: str  # {model} matches anything, slashes included
    text: str
    handle: Handler
    prefixed: bool = True  # served under /v3, /v1, /v3/v1 and bare; else only as written
    is_open: bool = False  # needs no API key

    def pattern(self) -> re.Pattern[str]:
        """The path as an expression over the whole rest."""
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(self.path)))


class ImagesApi:
    """The API of one server. Thread-safe: settings and catalog are replaced as a whole by a reload."""

    def __init__(
        self, settings: Settings, catalog: Catalog, dispatcher: Dispatcher, reload: Callable[[], None]
    ) -> None:
        self.settings = settings
        self.reload = reload
        self.catalog = catalog
        self.dispatcher = dispatcher
        self.store = Store(settings)
        self.metrics = Metrics()
        self.images = Images(settings, catalog, dispatcher, self.store, self.metrics)
        self.metrics.watch("ovserve_queued_jobs", self._queued)
        self.metrics.watch("ovserve_running_jobs", self._running)
        self.metrics.watch("ovserve_ready_workers", self._workers)
        self._openapi: bytes | None = None

    def take(self, settings: Settings, catalog: Catalog) -> None:
        """Serve by these from the next request on."""
        self.settings = self.images.settings = settings
        self.catalog = self.images.catalog = catalog

    def answer(self, exchange: Exchange) -> Reply:
        """Serve one request; HEAD is answered as GET. Raises ApiError and ClientGone."""
        method = "GET" if exchange.method == "HEAD" else exchange.method
        found = list(_matches(exchange.path))
        if not found:
            self.metrics.responses.labels("unmatched", "404").inc()
            raise NotFound(f"Invalid URL ({exchange.method} {exchange.path[:200]}).")
        for route, params in found:
            if route.method == method:
                return self._counted(route, exchange, params)
        allowed = {route.method for route, _ in found}
        allow = ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set()) | {"OPTIONS"}))
        if method == "OPTIONS":
            return FileReply(b"", "", 204, _preflight(exchange, allow))
        self.metrics.responses.labels(found[0][0].path, "405").inc()
        raise MethodNotAllowed(
            f"{exchange.path[:200]} does not take {exchange.method}; it takes {allow}.", headers={"allow": allow}
        )

    def _counted(self, route: Route, exchange: Exchange, params: Mapping[str, str]) -> Reply:
        status = 500  # what nobody foresaw
        try:
            reply = route.handle(self, exchange, params)
            status = 200 if isinstance(reply, StreamReply) else reply.status
        except ApiError as error:
            status = error.status
            raise
        except ClientGone:
            status = 499
            raise
        finally:
            self.metrics.responses.labels(route.path, str(status)).inc()
        return reply

    def openapi(self) -> bytes:
        """The OpenAPI document of this server, made at the first request for it."""
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

    def is_health(self, path: str) -> bool:
        """Whether this path answers even when every connection place is taken."""
        return _HEALTH.fullmatch(path) is not None

    def is_open(self, method: str, path: str) -> bool:
        """Whether this is answered without an API key."""
        return is_open(method, path)

    def count_refused(self, error: ApiError) -> None:
        """Count it under the error's code: no path that a stranger makes up becomes a label."""
        self.metrics.responses.labels(error.code or "refused", str(error.status)).inc()


def is_open(method: str, path: str) -> bool:
    """Whether the row that answers needs no API key. Nor does a preflight, with which a browser sends none (Fetch standard)."""
    if method == "OPTIONS":
        return True
    method = "GET" if method == "HEAD" else method
    return next((route.is_open for route, _ in _matches(path) if route.method == method), False)


def _matches(path: str) -> Iterator[tuple[Route, Mapping[str, str]]]:
    path = path.rstrip("/") or "/"
    bare = _PREFIX.sub("", path, count=1)
    for route, pattern in _COMPILED:
        match = pattern.fullmatch(bare if route.prefixed else path)
        if match:
            yield route, match.groupdict()


def _preflight(exchange: Exchange, allow: str) -> dict[str, str]:
    """Fields that let a browser's script make the request (CORS protocol, Fetch standard)."""
    asked = exchange.header("access-control-request-headers")
    headers = {"allow": allow, "access-control-allow-methods": allow, "access-control-max-age": "600"}
    if asked and re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}", asked):
        headers["access-control-allow-headers"] = asked
    return headers


# --- the functions behind the rows ------------------------------------------------------------------------------------


def _edits(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.make(exchange, EDIT, params.get("model"))


def _generations(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.make(exchange, GENERATION, params.get("model"))


def _variations(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    return api.images.make(exchange, VARIATION, params.get("model"))


def _standing(api: ImagesApi) -> dict[str, ModelStatus]:
    """How each model of the catalogue stands: one that a reload has just removed is in it still, though nobody serves it."""
    known = {status.name: status for status in api.dispatcher.statuses()}
    return {name: known.get(name) or _gone(name) for name in api.catalog.models}


def _gone(name: str) -> ModelStatus:
    return ModelStatus(
        name, ready=False, reason="unloading", failed=False, workers=0, queued=0, running=0, capacity=0, job_s=0.0
    )


def _about(status: ModelStatus) -> dict[str, object]:
    return {
        "ready": status.ready,
        "reason": status.reason,
        "workers": status.workers,
        "queued": status.queued,
        "running": status.running,
    }


def _models(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return json_reply(models_object(api.catalog, {name: _about(status) for name, status in _standing(api).items()}))


def _model(api: ImagesApi, _: Exchange, params: Mapping[str, str]) -> Reply:
    model = api.catalog.find(params["id"])
    return json_reply(model_object(model, api.catalog.created, _about(api.dispatcher.status(model.name))))


def _live(_: ImagesApi, __: Exchange, ___: Mapping[str, str]) -> Reply:
    return json_reply({"live": True})


def _ready(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    about = _standing(api)
    draining = api.dispatcher.is_draining
    ready = not draining and any(status.ready for status in about.values())
    document = {
        "ready": ready,
        "draining": draining,
        "models": {name: {"ready": status.ready, "reason": status.reason} for name, status in about.items()},
    }
    return json_reply(document, 200 if ready else 503, {} if ready else {"retry-after": "2"})


def _model_ready(api: ImagesApi, _: Exchange, params: Mapping[str, str]) -> Reply:
    status = api.dispatcher.status(api.catalog.find(params["model"]).name)
    return json_reply({"ready": status.ready, "reason": status.reason}, 200 if status.ready else 503)


def _config(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Each model's state in the reference server's form."""
    document = {}
    for name, status in _standing(api).items():
        state = "AVAILABLE" if status.ready else "END" if status.failed else "LOADING"
        told = {"error_code": "UNKNOWN" if status.failed else "OK", "error_message": status.reason}
        document[name] = {"model_version_status": [{"version": "1", "state": state, "status": told}]}
    return json_reply(document)


def _is_from_here(exchange: Exchange) -> bool:
    """Whether a program of this machine asks: not a page in its browser, nor somebody behind a proxy on it."""
    foreign = ("origin", "sec-fetch-site", "forwarded", "x-forwarded-for", "x-real-ip", "via")
    address = ip_address(exchange.address)
    mapped = getattr(address, "ipv4_mapped", None)  # how a socket on `::` tells an IPv4 peer
    return (mapped or address).is_loopback and not any(exchange.header(name) for name in foreign)


def _reload(api: ImagesApi, exchange: Exchange, __: Mapping[str, str]) -> Reply:
    if not _is_from_here(exchange):
        raise Forbidden("The configuration is reloaded from the machine itself only.")
    if api.dispatcher.is_draining:
        raise Draining("The server is going down.")
    try:
        api.reload()
    except StartupError as error:
        raise BadRequest(f"Not reloaded: {error}") from None
    return json_reply({"reloaded": True, "models": list(api.catalog.models)})


def _page(_: ImagesApi, __: Exchange, ___: Mapping[str, str]) -> Reply:
    return front_page()


def _server(_: ImagesApi, __: Exchange, ___: Mapping[str, str]) -> JsonReply:
    return json_reply({"name": "ovserve", "version": __version__})


def _is_known(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this picture: RFC 9110 section 13.1.2, a list, compared weakly (a proxy that compresses weakens tags)."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return "*" in tags or etag in tags


def _file(api: ImagesApi, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    picture = api.store.find(params["name"])
    headers = {
        "etag": picture.etag,
        "accept-ranges": "bytes",
        "cache-control": f"private, max-age={int(picture.expires_in_s)}, immutable",
        "x-content-type-options": "nosniff",
    }
    if _is_known(exchange.header("if-none-match"), picture.etag):
        return FileReply(b"", "", 304, headers)
    # RFC 9110 section 14.2: a range is defined for GET alone, and ignored with HEAD.
    is_ranged = exchange.method == "GET" and exchange.header("if-range") in (None, picture.etag)
    wanted = exchange.header("range") if is_ranged else None
    part = parse_range(wanted, len(picture.data))
    if part is None:
        return FileReply(picture.data, picture.media_type, 200, headers)
    start, end = part
    headers["content-range"] = f"bytes {start}-{end - 1}/{len(picture.data)}"
    return FileReply(picture.data[start:end], picture.media_type, 206, headers)


def _metrics(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return FileReply(api.metrics.page(), CONTENT_TYPE)


def _openapi(api: ImagesApi, _: Exchange, __: Mapping[str, str]) -> Reply:
    return FileReply(api.openapi(), "application/json")


ROUTES = (
    Route("POST", "/images/edits", "Edit a picture: multipart form, or JSON with data URLs.", _edits),
    Route("POST", "/images/generations", "Make a picture from a prompt: JSON, or a multipart form.", _generations),
    Route("POST", "/images/variations", "Make a picture like another one: multipart form.", _variations),
    Route("POST", "/openai/deployments/{model}/images/edits", "The same in Azure's path form.", _edits),
    Route("POST", "/openai/deployments/{model}/images/generations", "The same in Azure's path form.", _generations),
    Route("POST", "/openai/deployments/{model}/images/variations", "The same in Azure's path form.", _variations),
    Route("POST", "/{model}/images/edits", "The same with the model named by the path.", _edits),
    Route("POST", "/{model}/images/generations", "The same with the model named by the path.", _generations),
    Route("POST", "/{model}/images/variations", "The same with the model named by the path.", _variations),
    Route(
        "GET",
        "/images/files/{name}",
        "A picture that was answered as an address; takes Range and If-None-Match.",
        _file,
        is_open=True,  # its unguessable address is a key itself, and an <img> fetches it without any field
    ),
    Route("GET", "/models", "The models that are served.", _models),
    Route("GET", "/models/{id}", "One of them.", _model),
    Route("GET", "/v2/health/live", "200 while the process answers at all.", _live, prefixed=False, is_open=True),
    Route(
        "GET",
        "/v2/health/ready",
        "200 when a model has answered its warm-up, else 503 with the reasons.",
        _ready,
        prefixed=False,
        is_open=True,
    ),
    Route("GET", "/v2/models/{model}/ready", "The same for one model.", _model_ready, prefixed=False, is_open=True),
    Route("GET", "/v1/config", "State of each model, in the reference server's form.", _config, prefixed=False),
    Route(
        "POST",
        "/v1/config/reload",
        "Read the configuration again; from the machine itself only.",
        _reload,
        prefixed=False,
    ),
    Route("GET", "/metrics", "Counters for Prometheus.", _metrics, prefixed=False),
    Route("GET", "/openapi.json", "This API as an OpenAPI 3.1 document.", _openapi, prefixed=False),
    Route("GET", "/v2", "Name and version of the server.", _server, prefixed=False),
    Route(
        "GET", "/", "A page to try the server with in a browser.", _page, prefixed=False, is_open=True
    ),  # it asks for the key
)

_COMPILED = tuple((route, route.pattern()) for route in ROUTES)
