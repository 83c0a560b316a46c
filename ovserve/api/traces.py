"""Traces for OpenTelemetry: one span for each request, and below it one for each stage of a request for pictures.

    request ┬ receive   the content of the request
            ├ queue     until a worker takes the job
            ├ prepare   in the worker: decoding, masks, tokens
            ├ text, encode, denoise, decode     of each picture, on the device; denoising calls are events
            ├ finish    pasting back and encoding the file
            └ write     the response

The spans are made when the request has ended, from times that were taken anyway or were sent by the worker: of a
request that is not sampled, no worker sends any. `opentelemetry` is imported only with the option `traces`. The
exporter, the sampler and the limits of spans are those of OpenTelemetry's standard environment variables.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ovserve import __version__
from ovserve.api.exchange import Exchange
from ovserve.api.record import End, Record
from ovserve.errors import SettingsError
from ovserve.wire.messages import Span

__all__ = ["RequestTrace", "Traces", "start_traces"]

STOP_S = 5.0  # for the last spans to be exported
PROTOCOL = "http/protobuf"
_DEVICE = "device"  # all of one picture's time on the device: its denoising, if the engine reports no calls
_CALL = "call"


def start_traces() -> Traces:
    """Start the exporter. Raises SettingsError: its packages are missing, or a variable asks for another protocol."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(f"traces needs the packages of the extra `otel`: {error}") from None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (asked := os.environ.get(name, PROTOCOL)) != PROTOCOL:
            raise SettingsError(f"{name} is {asked[:100]!r}; only {PROTOCOL} is supported")
    names = {"service.name": "ovserve", "service.version": __version__}
    if os.environ.get("OTEL_SERVICE_NAME"):
        del names["service.name"]
    provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


class Traces:
    """The tracer of one server. Thread-safe: yes.

    Args:
        provider: OpenTelemetry's TracerProvider.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self._tracer = provider.get_tracer("ovserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, exchange: Exchange, route: str) -> RequestTrace:
        """Begin the span of a request, as a part of the trace that its `traceparent` names (W3C Trace Context)."""
        carrier = {name: exchange.header(name) or "" for name in ("traceparent", "tracestate")}
        parent = self._propagator.extract({name: value for name, value in carrier.items() if value})
        return RequestTrace(self._tracer, parent, f"{exchange.method} {route}")

    def end(self, exchange: Exchange, record: Record, end: End) -> None:
        """End the span of a request, and make those of its stages."""
        if isinstance(record.trace, RequestTrace):
            record.trace.end(exchange, record, end)

    def stop(self) -> None:
        """Export the last spans, for at most STOP_S."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(STOP_S)


class RequestTrace:
    """The span of one request, and those of its stages. Thread-safe: no.

    Attributes:
        is_recorded: whether the sampler has chosen this request.
        trace_id: of its trace, in hexadecimal digits; empty if it is not recorded.
    """

    def __init__(self, tracer: Any, parent: Any, name: str) -> None:
        from opentelemetry import trace  # noqa: PLC0415

        self._tracer, self._api = tracer, trace
        self._span = tracer.start_span(name, context=parent, kind=trace.SpanKind.SERVER)
        self.is_recorded: bool = self._span.is_recording()
        self.trace_id = trace.format_trace_id(self._span.get_span_context().trace_id) if self.is_recorded else ""

    def end(self, exchange: Exchange, record: Record, end: End) -> None:
        """Make the spans of the stages, and end that of the request."""
        if not self.is_recorded:
            return
        ended_at = time.monotonic()
        begun_at = ended_at - end.total_s
        spans = list(_stages(record, end, begun_at, ended_at))
        context = self._api.set_span_in_context(self._span)
        for name, since, until, attributes, events in spans:
            child = self._tracer.start_span(name, context=context, start_time=_wall_ns(since), attributes=attributes)
            for event, at, values in events:
                child.add_event(event, values, _wall_ns(at))
            child.end(_wall_ns(until))
        self._span.set_attributes(
            {
                "http.request.method": exchange.method,
                "http.route": record.route,
                "http.response.status_code": end.status,
                "http.request.body.size": end.received_bytes,
                "http.response.size": end.sent_bytes,
                "ovserve.request_id": exchange.id,
                "ovserve.model": record.model,
                "ovserve.key": exchange.key_name,
                "ovserve.outcome": end.outcome,
                "ovserve.pictures": record.pictures,
                "ovserve.pixels": record.pixels,
                "ovserve.steps": record.steps,
                "ovserve.attempts": record.attempts,
            }
        )
        if end.status >= 500:
            self._span.set_status(self._api.StatusCode.ERROR)
        self._span.end(_wall_ns(ended_at))


_Event = tuple[str, float, dict[str, float]]
_Stage = tuple[str, float, float, dict[str, int], list[_Event]]


def _stages(record: Record, end: End, begun_at: float, ended_at: float) -> Iterable[_Stage]:
    """Yield each stage: name, monotonic begin and end, attributes, events."""
    if end.body_s is not None:
        yield "receive", begun_at + end.body_s[0], begun_at + end.body_s[1], {}, []
    if record.admitted_at:
        yield "queue", record.admitted_at, record.admitted_at + record.queue_s, {}, []
    yield from _worker_stages(record.spans)
    if end.headers_s is not None:
        yield "write", begun_at + end.headers_s, ended_at, {}, []


def _worker_stages(spans: Iterable[Span]) -> Iterable[_Stage]:
    calls: dict[int, list[Span]] = defaultdict(list)
    devices: dict[int, Span] = {}
    for span in spans:
        if span.name == _CALL:
            calls[span.picture].append(span)
        elif span.name == _DEVICE:
            devices[span.picture] = span
        else:
            yield span.name, span.started_at, span.ended_at, _numbered(span.picture), []
    for picture in sorted(calls.keys() | devices.keys()):
        found = calls[picture] or [devices[picture]]
        events: list[_Event] = [
            ("call", call.ended_at, {"seconds": round(call.ended_at - call.started_at, 6), "rows": call.rows})
            for call in calls[picture]
        ]
        since, until = min(each.started_at for each in found), max(each.ended_at for each in found)
        yield "denoise", since, until, _numbered(picture), events


def _numbered(picture: int) -> dict[str, int]:
    return {"ovserve.picture": picture} if picture >= 0 else {}


def _wall_ns(monotonic: float) -> int:
    """Return an instant of the monotonic clock as nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns() + int(monotonic * 1e9)
