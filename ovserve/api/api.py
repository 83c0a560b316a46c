"""The API of one server as the front end uses it: find the handler of a request, run it, count the outcome."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ovserve.api.exchange import Exchange, FileReply, Reply, ServerEvent, StreamReply
from ovserve.api.handlers import model_statuses
from ovserve.api.images import base_url_hint
from ovserve.api.readiness import awaited_models
from ovserve.api.record import CLIENT_GONE, End, Record
from ovserve.api.routes import Match, Route, match_route
from ovserve.api.service import Service
from ovserve.errors import (
    ApiError,
    ClientGone,
    MethodNotAllowed,
    NotFound,
)
from ovserve.metrics import exemplar_of

__all__ = ["ImagesApi"]


@dataclass(slots=True)
class _Outcome:
    """How a response is counted."""

    status: int = 500  # for an unexpected exception
    is_counted: bool = True


class ImagesApi(Service):
    """The API of one server: finds the handler of each request, runs it, counts the outcome."""

    def awaited_models(self) -> list[str]:
        """Return the models that the start of the server still waits for, by the option `ready_models`."""
        return awaited_models(self.settings, self.catalog, model_statuses(self))

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
        exchange.record.route = route.path
        if self.traces is not None and exchange.record.trace is None and not (route.is_health or route.is_exempt):
            exchange.record.trace = trace = self.traces.begin(exchange, route.path)
            if trace.trace_id:
                exchange.note("trace", trace.trace_id)
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

    def count_refused(self, error: ApiError) -> None:
        """Count a rejected request under the error's code, so that invented paths do not become labels."""
        self.metrics.responses.labels(error.code or "refused", str(error.status)).inc()

    def note_end(self, exchange: Exchange, match: Match, end: End) -> None:
        """Observe the times and sizes of an exchange that has ended, and write its line to the usage log."""
        record, metrics, outcome = exchange.record, self.metrics, end.outcome
        route = match.route.path if match.route is not None else "unmatched"
        labels = (route, record.model, outcome)
        exemplar = exemplar_of(record.trace_id)
        if end.headers_s is not None:
            metrics.headers.labels(*labels).observe(end.headers_s, exemplar)
        metrics.requests.labels(*labels).observe(end.total_s, exemplar)
        if self.traces is not None:
            self.traces.end(exchange, record, end)
        metrics.received_bytes.labels(route).inc(end.received_bytes)
        metrics.sent_bytes.labels(route).inc(end.sent_bytes)
        if not record.model:
            return
        key = metrics.key_label(exchange.key_name, is_verified=exchange.is_verified)
        metrics.key_requests.labels(key, outcome).inc()
        metrics.key_pictures.labels(key).inc(record.pictures)
        metrics.key_pixels.labels(key).inc(record.pixels)
        if self.usage is not None:
            self.usage.write(_usage_entry(exchange, record, end))


def _usage_entry(exchange: Exchange, record: Record, end: End) -> dict[str, object]:
    """Return the fields of a line of the usage log."""
    return {
        "time": round(time.time(), 3),
        "id": exchange.id,
        "key": exchange.key_name,
        "key_hash": exchange.key if exchange.is_verified else "",
        "route": record.route,
        "model": record.model,
        "status": end.status,
        "outcome": end.outcome,
        "job": record.state,
        "pictures": record.pictures,
        "width": record.width,
        "height": record.height,
        "pixels": record.pixels,
        "steps": record.steps,
        "attempts": record.attempts,
        "received_bytes": end.received_bytes,
        "sent_bytes": end.sent_bytes,
        **{f"{stage}_ms": round(seconds * 1000, 1) for stage, seconds in record.stages.items()},
        "total_ms": round(end.total_s * 1000, 1),
    }


def _preflight(exchange: Exchange, allow: str) -> dict[str, str]:
    """Return the header fields that allow a browser's script to send the request (CORS protocol, Fetch standard)."""
    requested = exchange.header("access-control-request-headers")
    headers = {"allow": allow, "access-control-allow-methods": allow, "access-control-max-age": "600"}
    if requested and re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}", requested):
        headers["access-control-allow-headers"] = requested
    return headers
