"""A small receiver of OTLP over HTTP: keeps the spans that a server exports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Receiver", "receiving"]

PATIENCE_S = 30.0


class Receiver:
    """The spans so far.

    Attributes:
        url: what `OTEL_EXPORTER_OTLP_ENDPOINT` has to be.
        spans: spans of OTLP, in the order of their arrival.
        resources: attributes of their resources.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def receive(self, body: bytes) -> None:
        """Keep the spans of one request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({each.key: each.value.string_value for each in resource.resource.attributes})
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def await_spans(self, is_so: Callable[[list[Any]], bool]) -> list[Any]:
        """Wait until the spans so far fulfil a condition, and return them."""
        until = time.monotonic() + PATIENCE_S
        while not is_so(found := list(self.spans)):
            assert time.monotonic() < until, [span.name for span in found]
            time.sleep(0.02)
        return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path == "/v1/traces":
                receiver.receive(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
