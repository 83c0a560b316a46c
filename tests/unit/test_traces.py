"""Spans of one request, made from its record; which requests are recorded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from ovserve.api.record import End, Record
from ovserve.api.traces import Traces, start_traces
from ovserve.errors import SettingsError
from ovserve.wire.messages import Span

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Asked:
    """The part of an exchange that a trace reads."""

    id, method, key_name = "req_1", "POST", "design"

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def header(self, name: str) -> str | None:
        return self._fields.get(name)


def spans_of(record: Record, end: End, *, flags: str = "01", share: float = 1.0) -> dict[str, list[Any]]:
    """Return the spans of one request by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces, exchange = Traces(provider), Asked({"traceparent": f"00-{TRACE}-{PARENT}-{flags}"} if flags else {})
    record.trace = traces.begin(exchange, "/images/edits")  # type: ignore[arg-type]
    traces.end(exchange, record, end)  # type: ignore[arg-type]
    traces.stop()
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def traced_record() -> Record:
    now = time.monotonic()
    spans = [
        Span("j", "prepare", now - 0.9, now - 0.8),
        Span("j", "text", now - 0.8, now - 0.7, 0),
        Span("j", "call", now - 0.7, now - 0.6, 0, 2),
        Span("j", "call", now - 0.6, now - 0.5, 0, 1),
        Span("j", "device", now - 0.8, now - 0.4, 0),
        Span("j", "device", now - 0.5, now - 0.2, 1),
    ]
    return Record(route="/images/edits", model="m", pictures=2, admitted_at=now - 1, queue_s=0.1, spans=spans)


def test_spans_have_the_times_and_the_parent_of_the_request() -> None:
    found = spans_of(traced_record(), End(200, 10, 20, (0.0, 0.2), 1.2, 1.3))
    (root,) = found.pop("POST /images/edits")
    assert root.parent.span_id == int(PARENT, 16)
    assert root.attributes["ovserve.key"] == "design"
    assert {name: len(spans) for name, spans in found.items()} == {
        "receive": 1, "queue": 1, "prepare": 1, "text": 1, "denoise": 2, "write": 1,
    }  # fmt: skip
    assert all(span.parent.span_id == root.context.span_id for spans in found.values() for span in spans)
    first, second = found["denoise"]
    assert [event.attributes["rows"] for event in first.events] == [2, 1]
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(0.2, abs=0.05)
    assert not second.events  # the engine reports no calls: all of its time on the device
    assert (second.end_time - second.start_time) / 1e9 == pytest.approx(0.3, abs=0.05)


def test_error_marks_the_span() -> None:
    (root,) = spans_of(Record(), End(503, 0, 0, None, 0.1, 0.1))["POST /images/edits"]
    assert root.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(("flags", "share", "is_recorded"), [("00", 1.0, False), ("01", 0.0, True), ("", 0.0, False)])
def test_caller_and_sampler_decide_what_is_recorded(flags: str, share: float, is_recorded: bool) -> None:
    record = Record()
    assert bool(spans_of(record, End(200, 0, 0, None, 0.1, 0.1), flags=flags, share=share)) is is_recorded
    assert bool(record.trace_id) is is_recorded


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SettingsError, match="only http/protobuf is supported"):
        start_traces()
