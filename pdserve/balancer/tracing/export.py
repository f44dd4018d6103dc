"""Sends traces to a collector by OTLP/HTTP, from a thread of its own. Needs the extra ``otel``.

What is queued is a request, not its spans: they are made in that thread. A
collector that is away costs requests nothing; what does not fit the queue is lost.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.util.types import AttributeValue

from pdserve import __version__
from pdserve.balancer.metrics.ledger import Outcome, RequestRecord
from pdserve.balancer.tracing.spans import spans_of
from pdserve.balancer.tracing.trace import RequestTrace

logger = logging.getLogger(__name__)

CLOSE_S = 3.0
"""How long what is left may take at shutdown."""
DELAY_MS = 1000.0
"""Longest wait of a request for its batch."""
BATCH = 64
"""Requests sent at once: each has five spans or more, and encoding holds up the event loop."""
QUEUE = 4096
"""Requests that may wait for a slow collector."""
SWITCH_S = 0.0005
"""How soon the event loop has the interpreter back from the exporter's thread, which takes some 15 ms for a
batch: with Python's own 5 ms a timer was 8 ms late at p99, with this 1.4 ms."""
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OtlpSink:
    """Batches and sends; ``url`` is where spans are posted. Keys for it: OTEL_EXPORTER_OTLP_HEADERS."""

    def __init__(self, url: str) -> None:
        self._resource = _Process(
            {
                "service.name": "pdserve-balancer",
                "service.version": __version__,
                "service.instance.id": f"{socket.gethostname()}:{threading.get_native_id()}",
            }
        )
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._processor = BatchSpanProcessor(
            _Expanding(self._exporter), QUEUE, DELAY_MS, BATCH, export_timeout_millis=CLOSE_S * 1000
        )
        logger.info("traces go to %s", url)

    def put(self, trace: RequestTrace, record: RequestRecord, outcome: Outcome) -> None:
        """A traced request is over."""
        self._processor.on_end(_Ended(trace, record, outcome, self._resource))

    async def close(self) -> None:
        """Send what is left, within ``CLOSE_S``; a collector that does not answer is left alone."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        end: Callable[[], None] = self._processor.shutdown

        def work() -> None:
            end()
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # too late: the loop is closed
                pass

        # A daemon: an executor's thread would hold up the end of the process.
        threading.Thread(target=work, name="pdserve-traces-close", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await done.wait()
        except TimeoutError:
            logger.warning("traces were not all sent within %g s", CLOSE_S)
            give_up: Callable[[], None] = self._exporter.shutdown
            give_up()


class _Process(Resource):
    """What all spans come from. The encoder hashes it for each span: a plain one by rendering it as JSON."""

    def __init__(self, attributes: dict[str, AttributeValue]) -> None:
        super().__init__(Resource.create(attributes).attributes)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class _Ended(ReadableSpan):
    """Stands for all spans of one request until the exporter's thread makes them."""

    def __init__(
        self, trace: RequestTrace, record: RequestRecord, outcome: Outcome, resource: Resource
    ) -> None:
        super().__init__("", SpanContext(trace.trace_id, trace.span_id, False, _SAMPLED), None, resource)
        self._of = (trace, record, outcome, resource)

    def spans(self) -> list[ReadableSpan]:
        """Them."""
        return spans_of(*self._of)


class _Expanding(SpanExporter):
    """Makes the spans of requests on their way to the real exporter."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called in the processor's thread."""
        made = [span for ended in spans if isinstance(ended, _Ended) for span in ended.spans()]
        return self._inner.export(made)

    def shutdown(self) -> None:
        """No more will come."""
        self._inner.shutdown()
