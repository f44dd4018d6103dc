"""Which requests are traced, and their spans' way to a collector by OTLP/HTTP. Needs the extra ``otel``.

    begin ─► RequestTrace ─► finish ─► spans_of ─► BatchSpanProcessor (a thread) ─► OTLPSpanExporter

A collector that is away costs requests nothing; spans that do not fit the queue are lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from pdserve import __version__
from pdserve.balancer.metrics.record import Outcome, RequestRecord
from pdserve.balancer.request.headers import TraceParent, parse_parent, without_context
from pdserve.balancer.tracing.spans import spans_of
from pdserve.balancer.tracing.trace import RequestTrace, new_id, traces_url
from pdserve.errors import ConfigError

logger = logging.getLogger(__name__)

CLOSE_S = 3.0
"""How long sending the rest may take at shutdown."""
DELAY_MS = 1000.0
"""Longest wait of a span for its batch."""
BATCH = 512
"""Spans sent at once: OpenTelemetry's own default."""
QUEUE = 20_480
"""Spans that may wait for a slow collector: 4096 requests of five."""


class Tracing:
    """The traces of one balancer. ``sample``: the share that is traced of requests without a context."""

    def __init__(self, url: str, sample: float) -> None:
        self._sample = sample
        self._resource = Resource.create(
            {
                "service.name": "pdserve-balancer",
                "service.version": __version__,
                "service.instance.id": f"{socket.gethostname()}:{threading.get_native_id()}",
            }
        )
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._processor = BatchSpanProcessor(
            self._exporter, QUEUE, DELAY_MS, BATCH, export_timeout_millis=CLOSE_S * 1000
        )
        logger.info("traces go to %s", url)

    def begin(self, headers: dict[bytes, bytes]) -> RequestTrace | None:
        """A request came; None if it is not to be traced."""
        parent = parse_parent(headers) if b"traceparent" in headers else None
        if not (random.random() < self._sample if parent is None else parent.is_sampled):
            return None
        trace_id = new_id(128) if parent is None else parent.trace_id
        return RequestTrace(trace_id, new_id(64), parent, time.monotonic(), time.time_ns())

    def forwarded(self, headers: dict[bytes, bytes], trace: RequestTrace | None) -> dict[bytes, bytes]:
        """A client's headers for the workers, without those that each leg adds.

        A request that is not traced is marked so: workers must not begin traces of their own for it.
        """
        if trace is not None:
            return without_context(headers)
        if b"traceparent" in headers and parse_parent(headers) is not None:
            return headers
        unsampled = TraceParent(new_id(128), new_id(64), is_sampled=False)
        return without_context(headers) | {b"traceparent": unsampled.value()}

    def finish(self, trace: RequestTrace, record: RequestRecord, outcome: Outcome) -> None:
        """A traced request is over: queue its spans."""
        for span in spans_of(trace, record, outcome, self._resource):
            self._processor.on_end(span)

    async def close(self) -> None:
        """Send the rest, within ``CLOSE_S``; a collector that does not answer is abandoned."""
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


def open_tracing(endpoint: str, sample: float) -> Tracing:
    """Begin to send traces to ``endpoint``, an address of OTLP/HTTP.

    Raises:
        ConfigError: for a wrong address or share.
    """
    if not 0.0 <= sample <= 1.0:
        raise ConfigError(f"otlp_sample must be between 0 and 1, got {sample:g}")
    return Tracing(traces_url(endpoint), sample)
