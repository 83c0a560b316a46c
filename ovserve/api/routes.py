"""The table of routes: method, path and handler function.

Paths are served under `/v3`, `/v1`, `/openai/v1`, `/v3/v1` (as the model server does), `/api/v1`, `/engines/v1`,
`/openai` and without a prefix. Doubled slashes count as one: clients join a base URL that ends in a slash with a path
that begins with one. `{model}` and `{id}` may contain slashes: clients send them raw or as %2F, and the front end has
already decoded the path once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from ovserve.api.debugging import change_log_level, jobs, log_level
from ovserve.api.exchange import Exchange, FileReply, Reply
from ovserve.api.handlers import Handler, edits, file, generations, model, models, page, sdapi, variations
from ovserve.api.openapi import openapi_document
from ovserve.api.operators import (
    RELOAD_STATUS_PATH,
    config,
    live,
    load,
    metrics,
    model_ready,
    ready,
    reload,
    reload_status,
    server,
    startup,
    status,
    unload,
)
from ovserve.api.pages import EDITOR_PAGE, STATUS_PAGE
from ovserve.api.sdapi.details import detail_document
from ovserve.api.sdapi.endpoints import SDAPI, SDAPI_PREFIX
from ovserve.api.service import Service
from ovserve.errors import (
    ApiError,
)

__all__ = ["ROUTES", "Match", "Route", "match_route"]

# `/openai` alone is Azure's; a path such as /openai/deployments/... is a row of its own.
_PREFIX = re.compile(r"/(?:(?:v3/v1|openai/v1|api/v1|engines/v1|v3|v1)(?=/)|openai(?=/(?:images|models)(?:/|$)))")
_SLASHES = re.compile("//+")


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


@lru_cache(maxsize=128)  # searching the table takes a twentieth of a small request's time in the front end
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


@cache
def _document() -> bytes:
    return json.dumps(openapi_document(ROUTES), indent=1).encode()


def _openapi(_: Service, __: Exchange, ___: Mapping[str, str]) -> Reply:
    return FileReply(_document(), "application/json")


_CHANGE_LEVEL = (
    "Change it to `level` (query: `debug`, `info`, `warning`, `error`) in all processes, until the next reload."
)

ROUTES = (
    Route("POST", "/images/edits", "Edit a picture. Body: multipart form, or JSON with data URLs.", edits),
    Route(
        "POST", "/images/generations", "Generate a picture from a prompt. Body: JSON or multipart form.", generations
    ),
    Route("POST", "/images/variations", "Generate a variation of a picture. Body: multipart form.", variations),
    Route("POST", "/openai/deployments/{model}/images/edits", "The same, with the path of Azure OpenAI.", edits),
    Route(
        "POST",
        "/openai/deployments/{model}/images/generations",
        "The same, with the path of Azure OpenAI.",
        generations,
    ),
    Route(
        "POST", "/openai/deployments/{model}/images/variations", "The same, with the path of Azure OpenAI.", variations
    ),
    Route("POST", "/{model}/images/edits", "The same, with the model in the path.", edits),
    Route("POST", "/{model}/images/generations", "The same, with the model in the path.", generations),
    Route("POST", "/{model}/images/variations", "The same, with the model in the path.", variations),
    Route(
        "GET",
        "/images/files/{name}",
        "A stored picture (response_format = url). Supports Range and If-None-Match.",
        file,
        is_open=True,  # the unguessable URL serves as a key, and <img> sends no header field
        is_public=True,
    ),
    Route(
        "POST",
        "/models/{id}/load",
        "Load a model. Needs an admin key or the admin listener. Waits at most `wait_s` seconds (query; 10): 200 when "
        "it is ready, 202 while it loads. `keep_alive` (query): seconds for which it stays after its last job, -1 for "
        "ever.",
        load,
        is_admin=True,
    ),
    Route(
        "POST",
        "/models/{id}/unload",
        "Unload a model when its running jobs have ended. Needs an admin key or the admin listener. Waits as above.",
        unload,
        is_admin=True,
    ),
    *(Route(row.method, row.path, row.text, sdapi(row), prefixed=False) for row in SDAPI),
    Route("GET", "/models", "All models.", models),
    Route("GET", "/models/{id}", "One model.", model),
    *(
        Route("GET", path, text, handler, prefixed=False, is_open=True, is_health=True)
        for paths, text, handler in (
            (("/v2/health/live", "/livez", "/ping"), "200 while the process responds.", live),
            (
                ("/v2/health/ready", "/health", "/healthz", "/readyz"),
                "200 when the models of `ready_models`, or of `model` (query), are ready, else 503 with the reasons.",
                ready,
            ),
            (
                ("/v2/health/startup", "/startupz"),
                "200 once the models of `ready_models` have been ready or have failed; 503 while the server starts.",
                startup,
            ),
        )
        for path in paths
    ),
    Route(
        "GET",
        "/v2/models/{model}/ready",
        "200 when this model is ready, else 503 with the reason.",
        model_ready,
        prefixed=False,
        is_open=True,
        is_health=True,
    ),
    Route(
        "GET",
        "/v1/config",
        "State of each model, in the model server's format, and of its newest reload.",
        config,
        prefixed=False,
        is_operator=True,
    ),
    Route(
        "GET",
        "/v1/status",
        "Models, workers and the newest errors, as the page `/status` shows them.",
        status,
        prefixed=False,
        is_operator=True,
    ),
    Route(
        "POST",
        "/v1/config/reload",
        "Reload the configuration. Needs an admin key or the admin listener. Waits for the new workers, at most "
        "`wait_s` seconds (query; 10): 200 when they serve, 202 when they still load, 500 when they failed.",
        reload,
        prefixed=False,
        is_admin=True,
    ),
    *(
        Route(
            method,
            f"{prefix}{path}",
            f"{text} Needs an admin key or the admin listener.",
            handler,
            prefixed=False,
            is_admin=True,
        )
        for prefix in ("/v1", "")
        for method, path, handler, text in (
            (
                "GET",
                "/debug/jobs",
                jobs,
                "Jobs that run and wait: since when, for which client and key, on which worker.",
            ),
            ("GET", "/debug/log", log_level, "Lowest level that is logged."),
            ("POST", "/debug/log", change_log_level, _CHANGE_LEVEL),
        )
    ),
    Route("GET", RELOAD_STATUS_PATH, "State of the newest reload.", reload_status, prefixed=False, is_operator=True),
    Route(
        "GET",
        "/metrics",
        "Metrics in the Prometheus format.",
        metrics,
        prefixed=False,
        is_operator=True,
        is_exempt=True,  # a scrape that fails at the limit would hide the overload
    ),
    Route("GET", "/openapi.json", "OpenAPI 3.1 document of this API.", _openapi, prefixed=False),
    Route("GET", "/v2", "Name and version of the server.", server, prefixed=False),
    # The pages are open; they ask for the key and send it with their requests.
    *(
        Route("GET", path, text, page(name), prefixed=False, is_open=True, is_public=True)
        for path, text, name in (
            ("/", "A page to edit pictures in a browser.", EDITOR_PAGE),
            ("/status", "A page with the state of the server.", STATUS_PAGE),
            ("/web/{file}", "A file of these pages.", ""),
        )
    ),
)


_COMPILED = tuple((route, route.pattern()) for route in ROUTES)
