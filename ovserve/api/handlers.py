"""Handlers of the routes for clients: pictures, models, kept files, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ovserve.api.exchange import Exchange, FileReply, Reply
from ovserve.api.pages import page_file
from ovserve.api.parameters.fields import EDIT, GENERATION, VARIATION
from ovserve.api.replies import json_reply, model_object, models_object, pending_object
from ovserve.api.sdapi.endpoints import Endpoint
from ovserve.api.service import Service
from ovserve.api.store import parse_range
from ovserve.dispatch.dispatcher import ModelStatus
from ovserve.errors import (
    NotFound,
    RangeNotSatisfiable,
)

__all__ = [
    "edits",
    "file",
    "generations",
    "model",
    "model_statuses",
    "models",
    "page",
    "sdapi",
    "unloading_status",
    "variations",
]

Handler = Callable[["Service", Exchange, Mapping[str, str]], Reply]


def edits(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Serve an edit."""
    return api.images.serve(exchange, EDIT, params.get("model"))


def generations(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Serve a generation."""
    return api.images.serve(exchange, GENERATION, params.get("model"))


def variations(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Serve a variation."""
    return api.images.serve(exchange, VARIATION, params.get("model"))


def sdapi(endpoint: Endpoint) -> Handler:
    """Return the handler of one endpoint of AUTOMATIC1111's API."""
    return lambda api, exchange, _: api.sdapi.serve(endpoint, exchange)


def model_statuses(api: Service) -> dict[str, ModelStatus]:
    """Return the status of each model in the catalog.

    During a reload, a removed model can still be in the catalog but no longer in the dispatcher: it counts as
    unloading.
    """
    known = {status.name: status for status in api.dispatcher.statuses()}
    return {name: known.get(name) or unloading_status(name) for name in api.catalog.models}


def unloading_status(name: str) -> ModelStatus:
    """Return the status of a model that the dispatcher no longer knows."""
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


def status_fields(api: Service, status: ModelStatus) -> dict[str, object]:
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
        **memory_fields(api, status.name),
    }


def memory_fields(api: Service, name: str) -> dict[str, int]:
    found = api.fleet.memory().get(name)
    return {"memory_bytes": found.used_bytes, "expected_worker_bytes": found.worker_bytes} if found else {}


def models(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """List the models and aliases."""
    statuses = {name: status_fields(api, status) for name, status in model_statuses(api).items()}
    return json_reply(models_object(api.catalog, statuses))


def model(api: Service, _: Exchange, params: Mapping[str, str]) -> Reply:
    """Describe one model."""
    if pending := api.catalog.pending.get(params["id"]):
        return json_reply(pending_object(pending, params["id"], api.catalog.created))
    model = api.catalog.find(params["id"])
    status = status_fields(api, api.dispatcher.status(model.name))
    return json_reply(model_object(model, params["id"], api.catalog.created, status))


def page(name: str) -> Handler:
    """Return the handler of a page, or of the files of the pages if `name` is empty. 404 with web_pages = false."""

    def handle(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
        if not api.settings.web_pages:
            raise NotFound("The web pages are switched off on this server (option web_pages).")
        return page_file(name or params["file"], exchange.header("if-none-match"))

    return handle


def is_known(if_none_match: str | None, etag: str) -> bool:
    """Return whether If-None-Match lists the tag (RFC 9110 section 13.1.2).

    Tags are compared weakly, because a proxy that compresses a reply makes its tag weak.
    """
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return "*" in tags or etag in tags


def file(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Serve a stored picture, or a range of it (RFC 9110 sections 13 and 14)."""
    picture = api.store.find(params["name"])
    headers = {
        "etag": picture.etag,
        "accept-ranges": "bytes",
        "cache-control": f"private, max-age={int(picture.expires_in_s)}, immutable",
    }
    if is_known(exchange.header("if-none-match"), picture.etag):
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
