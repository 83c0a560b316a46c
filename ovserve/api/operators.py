"""Handlers of the routes for operators: health, state of models, reload, load and unload, metrics."""

from __future__ import annotations

from collections.abc import Mapping

from ovserve import __version__
from ovserve.api.control import load_reply, seconds_of, unload_reply, wait_until
from ovserve.api.exchange import Exchange, FileReply, JsonReply, Reply
from ovserve.api.handlers import model_statuses, unloading_status
from ovserve.api.readiness import awaited_models, is_ready
from ovserve.api.reloads import ReloadStatus
from ovserve.api.replies import json_reply
from ovserve.api.service import Service
from ovserve.api.status import status_document
from ovserve.errors import (
    BadRequest,
    Draining,
    ReloadFailed,
    StartupError,
)

__all__ = [
    "config",
    "live",
    "load",
    "metrics",
    "model_ready",
    "ready",
    "reload",
    "reload_status",
    "server",
    "startup",
    "status",
    "unload",
]

RELOAD_STATUS_PATH = "/v1/config/reload/status"
RELOAD_WAIT_S = 10.0  # for the workers of a reload, if the request does not say; small models are ready by then
MAX_RELOAD_WAIT_S = 3600.0


def load(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Load a model and wait for it."""
    if api.is_stopping or api.dispatcher.is_draining:
        raise Draining("The server is shutting down; the model was not loaded.")
    name = api.catalog.find(params["id"]).name
    return load_reply(exchange, name, api.fleet, lambda: api.dispatcher.status(name))


def unload(api: Service, exchange: Exchange, params: Mapping[str, str]) -> Reply:
    """Unload a model and wait until its workers have ended."""
    name = api.catalog.find(params["id"]).name
    return unload_reply(exchange, name, api.fleet, lambda: api.dispatcher.status(name))


def live(_: Service, __: Exchange, ___: Mapping[str, str]) -> Reply:
    """Answer a liveness check."""
    return json_reply({"live": True})


def startup(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Answer a startup check: 200 once the start is over; it stays so."""
    if api.has_started or api.is_stopping:
        return json_reply({"started": True, "waits_for": []})
    waits_for = awaited_models(api.settings, api.catalog, model_statuses(api))
    return json_reply({"started": False, "waits_for": waits_for}, 503, {"retry-after": "2"})


def ready(api: Service, exchange: Exchange, __: Mapping[str, str]) -> Reply:
    """Answer a readiness check: 200 or 503 with the state of each model; of chosen models with `model`."""
    statuses = model_statuses(api)
    draining = api.is_stopping or api.dispatcher.is_draining
    if chosen := exchange.query.get("model"):
        names = [api.catalog.find(name.strip()).name for name in chosen.split(",")]
        statuses = {name: statuses.get(name) or unloading_status(name) for name in names}
        ready = not draining and all(status.ready for status in statuses.values())
    else:
        ready = not draining and is_ready(api.settings, api.catalog, statuses)
    pending = () if chosen else api.catalog.pending.values()
    document = {
        "ready": ready,
        "draining": draining,
        "models": {
            **{name: {"ready": status.ready, "reason": status.reason} for name, status in statuses.items()},
            **{model.name: {"ready": False, "reason": model.reason} for model in pending},
        },
    }
    return json_reply(document, 200 if ready else 503, {} if ready else {"retry-after": "2"})


def model_ready(api: Service, _: Exchange, params: Mapping[str, str]) -> Reply:
    """Answer the readiness check of one model."""
    status = api.dispatcher.status(api.catalog.find(params["model"]).name)
    ready, reason = status.ready and not api.is_stopping, "draining" if api.is_stopping else status.reason
    return json_reply({"ready": ready, "reason": reason}, 200 if ready else 503)


def config(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Return each model's state in the form of the model server's configuration API, and what the newest reload did."""
    document: dict[str, dict[str, object]] = {}
    for pending in api.catalog.pending.values():
        has_failed = pending.state.has_failed
        error = {"error_code": "UNKNOWN" if has_failed else "OK", "error_message": pending.reason}
        version = {"version": "1", "state": "END" if has_failed else "LOADING", "status": error}
        document[pending.name] = {"model_version_status": [version]}
    reload = api.reload_status()
    for name, status in model_statuses(api).items():
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


def status(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Return what the status page shows."""
    statuses = model_statuses(api)
    draining = api.is_stopping or api.dispatcher.is_draining
    document = status_document(
        statuses,
        api.dispatcher.worker_statuses(),
        api.last_errors,
        counts=api.dispatcher.counts(),
        memory_bytes={name: memory.used_bytes for name, memory in api.fleet.memory().items()},
        started_at=api.started_at,
        is_ready=not draining and is_ready(api.settings, api.catalog, statuses),
        is_draining=draining,
    )
    return json_reply(document)


def await_reload(api: Service, exchange: Exchange, wait_s: float) -> ReloadStatus:
    """Wait until the newest reload is no longer loading, and return its status. Raises ClientGone."""
    status = api.reload_status()

    def is_over() -> bool:
        nonlocal status
        status = api.reload_status()
        return api.is_stopping or status.state != "loading"

    if status.state == "loading":
        wait_until(exchange, is_over, wait_s)
    return status


def reload(api: Service, exchange: Exchange, __: Mapping[str, str]) -> Reply:
    """Reload the configuration and wait for the new workers."""
    if api.is_stopping or api.dispatcher.is_draining:
        raise Draining("The server is shutting down; the configuration was not reloaded.")
    wait_s = seconds_of(exchange, "wait_s", RELOAD_WAIT_S, 0, MAX_RELOAD_WAIT_S)
    try:
        api.reload()
    except StartupError as error:
        raise BadRequest(f"The configuration was not reloaded: {error}") from None
    status = await_reload(api, exchange, wait_s)
    if status.state == "failed":
        raise ReloadFailed(f"The reload failed: {status.failure}. What served before stays.")
    is_done = status.state == "done"
    document = {"reloaded": is_done, "models": list(api.catalog.models), "reload": status.document()}
    return json_reply(document, *((200, {}) if is_done else (202, {"location": RELOAD_STATUS_PATH})))


def reload_status(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """Return the state of the newest reload."""
    return json_reply(api.reload_status().document())


def server(_: Service, __: Exchange, ___: Mapping[str, str]) -> JsonReply:
    """Return the server's name and version."""
    return json_reply({"name": "ovserve", "version": __version__})


def metrics(api: Service, exchange: Exchange, __: Mapping[str, str]) -> Reply:
    """Return the metrics in the Prometheus format, or as OpenMetrics."""
    return FileReply(*api.metrics.page(exchange.header("accept") or ""))
