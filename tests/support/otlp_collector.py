"""A collector of OpenTelemetry traces in small: a real OTLP/HTTP server that keeps the spans it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

KINDS = {1: "internal", 2: "server", 3: "client"}


class Span:
    """One span as it was sent; ids as hex, times in unix nanoseconds."""

    def __init__(self, sent: Any, resource: dict[str, Any]) -> None:
        self.name: str = sent.name
        self.kind = KINDS[sent.kind]
        self.trace_id: str = sent.trace_id.hex()
        self.span_id: str = sent.span_id.hex()
        self.parent_id: str = sent.parent_span_id.hex()
        self.state: str = sent.trace_state
        self.start, self.end = int(sent.start_time_unix_nano), int(sent.end_time_unix_nano)
        self.attributes = _values(sent.attributes)
        self.events = {event.name: int(event.time_unix_nano) for event in sent.events}
        self.is_error = sent.status.code == 2
        self.why: str = sent.status.message
        self.resource = resource


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


class Collector:
    """What came, by span. ``status`` is what it answers; ``gate``, if there is one, holds its answers up."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.paths: list[str] = []
        self.status = 200
        self.gate: threading.Event | None = None
        self.url = ""

    def take(self, path: str, body: bytes) -> None:
        """One export."""
        self.paths.append(path)
        if self.gate is not None:
            self.gate.wait(30)
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = _values(group.resource.attributes)
            self.spans += [Span(span, resource) for scope in group.scope_spans for span in scope.spans]

    @property
    def traces(self) -> dict[str, list[Span]]:
        """Spans by trace."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.trace_id, []).append(span)
        return found

    def named(self, name: str) -> list[Span]:
        """Spans of one name, by start."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start)

    @property
    def server(self) -> Span:
        """The only server span."""
        (found,) = (span for span in self.spans if span.kind == "server")
        return found


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port of the loopback, in threads of its own."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """An export."""
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(self.path, body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collector.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        if collector.gate is not None:
            collector.gate.set()
        server.shutdown()
        server.server_close()
