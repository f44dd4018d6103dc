"""The transfer counters beside SGLang's own metrics: ``GET /metrics`` of a worker with ``--enable-metrics``.

SGLang serves what any of its processes writes below PROMETHEUS_MULTIPROC_DIR. The HTTP
process reads the ranks' counters (stats.py) now and then and writes their growth there.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from pdserve.plugin.stats import COUNTERS, TransferStats

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
_HELP = {
    "kv_bytes": "Payload that prefill ranks wrote for finished requests",
    "transfers": "Requests whose transfer succeeded",
    "failures": "Requests whose transfer failed on this side",
    "direct_chunks": "Chunk shares sent page to page",
    "packed_chunks": "Chunk shares sent through slabs",
    "descriptors": "Spans handed to the transport, neighbours merged",
    "writes": "Transport requests posted",
    "messages": "Arrivals a decode rank has taken",
    "scattered_bytes": "Payload scattered from slabs into pages",
}
_SECONDS = {
    "latency_us": "From the first chunk handed over to the end, summed over transfers",
    "plan_us": "Planning",
    "gather_us": "Gathering pages into a slab",
    "post_us": "Posting writes",
    "wait_us": "From a share's last post to its completion",
    "scatter_us": "Scattering from a slab",
}


class TransferMetrics:
    """``pdserve:transfer_*_total`` counters; create it once SGLang has set its metrics up."""

    def __init__(self, stats: TransferStats) -> None:
        import prometheus_client

        self._stats = stats
        self._told = dict.fromkeys(COUNTERS, 0)
        self._counters: dict[str, tuple[Any, float]] = {}
        for name, text in _HELP.items():
            self._counters[name] = prometheus_client.Counter(f"pdserve:transfer_{name}", text), 1.0
        for name, text in _SECONDS.items():
            title = f"pdserve:transfer_{name.removesuffix('_us')}_seconds"
            self._counters[name] = prometheus_client.Counter(title, text), 1e-6

    def refresh(self) -> None:
        """Add what the counters grew by since the last time."""
        for name, value in self._stats.total().items():
            counter, unit = self._counters[name]
            grown, self._told[name] = value - self._told[name], value
            if grown > 0:
                counter.inc(grown * unit)


def publish(stats: TransferStats, stopped: threading.Event) -> threading.Thread:
    """Keep them fresh in a thread of this process until ``stopped`` is set."""
    metrics = TransferMetrics(stats)

    def run() -> None:
        while not stopped.wait(PERIOD_S):
            metrics.refresh()

    thread = threading.Thread(target=run, name="pdserve-transfer-metrics", daemon=True)
    thread.start()
    return thread
