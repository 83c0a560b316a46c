"""Traces with the real program and a small receiver of OTLP; exemplars in the metrics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.live import BUILTIN_NAME, LiveServer
from tests.otlp import Receiver, receiving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def traced(receiver: Receiver) -> Iterator[LiveServer]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with LiveServer("--traces", "true", environment=variables) as server:
        yield server


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def edit(server: LiveServer, data: Path, *, sampled: str = "01", trace: str = TRACE, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/images/edits",
        data={"prompt": "a secret", "size": "128x128", "steps": "3", **fields},
        files={"image": ("a.png", (data / "mask_white.png").read_bytes(), "image/png")},
        headers={"traceparent": f"00-{trace}-{PARENT}-{sampled}"},
        timeout=60,
    )


def test_spans_of_an_edit_are_part_of_the_caller_s_trace(traced: LiveServer, receiver: Receiver, data: Path) -> None:
    assert edit(traced, data, n="2").status_code == 200
    spans = receiver.await_spans(lambda found: any(span.name.startswith("POST") for span in found))
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    root = next(span for span in spans if span.name == "POST /images/edits")
    assert root.parent_span_id.hex() == PARENT
    children = [span for span in spans if span is not root]
    assert {span.parent_span_id for span in children} == {root.span_id}
    names = [span.name for span in children]
    assert set(names) == {"receive", "queue", "prepare", "text", "encode", "denoise", "decode", "finish", "write"}
    assert [names.count(name) for name in ("receive", "queue", "prepare", "write")] == [1, 1, 1, 1]
    assert [names.count(name) for name in ("denoise", "decode", "finish")] == [2, 2, 2]
    slack = 5_000_000  # ns: clocks are compared at different moments
    for span in children:
        assert root.start_time_unix_nano - slack <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano + slack
    for denoise in (span for span in children if span.name == "denoise"):
        assert len(denoise.events) >= 2  # one for each step; the rows of a picture may be in two calls
        assert all(event.attributes[1].value.int_value >= 1 for event in denoise.events)
    found = attributes(root)
    assert (found["ovserve.model"], found["ovserve.pictures"], found["http.route"]) == (
        BUILTIN_NAME,
        2,
        "/images/edits",
    )
    assert found["http.response.status_code"] == 200
    assert "secret" not in str(spans)
    assert receiver.resources[0]["service.name"] == "ovserve"


def test_errors_mark_their_span_and_unsampled_requests_have_none(
    traced: LiveServer, receiver: Receiver, data: Path
) -> None:
    other = "0" * 31 + "1"
    count = len(receiver.spans)
    assert edit(traced, data, sampled="00", trace=other).status_code == 200
    assert edit(traced, data, trace="0" * 31 + "2", timeout_s="0.01", steps="50", n="4").status_code == 504
    spans = receiver.await_spans(lambda found: any(span.name.startswith("POST") for span in found[count:]))[count:]
    assert {span.trace_id.hex() for span in spans} == {"0" * 31 + "2"}
    assert next(span for span in spans if span.name.startswith("POST")).status.code == 2


def test_openmetrics_page_has_exemplars_with_the_trace(traced: LiveServer, data: Path) -> None:
    assert edit(traced, data).status_code == 200
    plain = httpx.get(f"{traced.url}/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert TRACE not in plain.text
    page = httpx.get(f"{traced.url}/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    for name in ("ovserve_stage_seconds", "ovserve_denoise_step_seconds"):
        exemplars = [sample.exemplar for sample in families[name].samples if sample.exemplar]
        assert TRACE in {each.labels["trace_id"] for each in exemplars}


def test_log_line_of_a_request_has_its_trace(traced: LiveServer, data: Path) -> None:
    assert edit(traced, data).status_code == 200
    assert any(f"trace={TRACE}" in line and "POST" in line for line in list(traced.log))


def test_nothing_is_imported_without_traces() -> None:
    code = "import sys, ovserve.server; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_missing_packages_and_other_protocols_are_named() -> None:
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; from ovserve.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--traces", "true", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "traces needs the packages of the extra `otel`" in done.stderr.splitlines()[-1]


def test_collector_that_does_not_answer_changes_nothing(tmp_path: Path, data: Path) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with LiveServer("--traces", "true", "--log_format", "json", environment=variables, spool=tmp_path) as server:
        assert edit(server, data).status_code == 200
        assert edit(server, data).status_code == 200
    assert server.wait() == 0
    assert all(line.startswith("{") for line in server.log), server.log
