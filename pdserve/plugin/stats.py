"""Transfer counters that the scheduler ranks write and the HTTP process reads and exports.

One anonymous memory file per server, opened by the children through
``/proc/<pid>/fd/<n>``: nothing is left behind however the server ends. Each
rank owns a row, so no lock is needed between ranks; a row is one 8-byte counter
per name in ``COUNTERS``. With ``--enable-metrics`` the HTTP process adds their growth to
Prometheus counters beside SGLang's own (``GET /metrics`` of a worker).
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any

from pdserve.config.worker_env import publish_stats_path, stats_path

MAX_RANKS = 128

COUNTERS = (
    "kv_bytes",  # payload that prefill ranks wrote for finished requests
    "transfers",  # requests whose transfer succeeded
    "latency_us",  # SGLang's own figure: first chunk handed over to transfer a success, summed over transfers
    "failures",  # requests whose transfer failed on this side
    "direct_chunks",  # chunk shares sent page to page
    "packed_chunks",  # chunk shares sent through slabs
    "descriptors",  # spans handed to the transport, neighbours merged
    "writes",  # transport requests posted
    "plan_us",
    "gather_us",
    "post_us",
    "wait_us",  # from a share's last post to its completion
    "messages",  # arrivals a decode rank has taken
    "scattered_bytes",
    "scatter_us",
)
"""What is counted, in the order of a row; cumulative since the start of the server."""

_ROW = struct.Struct(f"={len(COUNTERS)}Q")
_INDEX = {name: position for position, name in enumerate(COUNTERS)}


class TransferStats:
    """Counters of one server since its start."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._lock = threading.Lock()

    @classmethod
    def create(cls) -> TransferStats:
        """Make the memory file in the HTTP process and tell the children, by environment, where it is."""
        descriptor = os.memfd_create("pdserve-transfer-stats")
        os.ftruncate(descriptor, _ROW.size * MAX_RANKS)
        publish_stats_path(f"/proc/{os.getpid()}/fd/{descriptor}")
        return cls(mmap.mmap(descriptor, _ROW.size * MAX_RANKS))

    @classmethod
    def open(cls) -> TransferStats | None:
        """The parent's counters, or None when this server was started without them."""
        path = stats_path()
        if not path:
            return None
        with Path(path).open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), _ROW.size * MAX_RANKS))

    def add(self, rank: int, **amounts: int) -> None:
        """Count in this rank's own row. Threads of the rank may call it at the same time."""
        with self._lock:
            row = list(_ROW.unpack_from(self._buffer, self._offset(rank)))
            for name, amount in amounts.items():
                row[_INDEX[name]] += amount
            _ROW.pack_into(self._buffer, self._offset(rank), *row)

    def set(self, rank: int, **values: int) -> None:
        """Overwrite values of this rank's row: counters that are kept elsewhere."""
        with self._lock:
            row = list(_ROW.unpack_from(self._buffer, self._offset(rank)))
            for name, value in values.items():
                row[_INDEX[name]] = value
            _ROW.pack_into(self._buffer, self._offset(rank), *row)

    def total(self) -> dict[str, int]:
        """Sums over all ranks, by name; see ``COUNTERS``."""
        rows = [_ROW.unpack_from(self._buffer, rank * _ROW.size) for rank in range(MAX_RANKS)]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        return dict(zip(COUNTERS, sums, strict=True))

    @staticmethod
    def _offset(rank: int) -> int:
        return (rank % MAX_RANKS) * _ROW.size


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
