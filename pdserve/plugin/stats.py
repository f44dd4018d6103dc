"""Transfer counters that the scheduler ranks write and the HTTP process reads.

One anonymous memory file per server, opened by the children through
``/proc/<pid>/fd/<n>``: nothing is left behind however the server ends. Each
rank owns a row, so no lock is needed between ranks; a row is one 8-byte counter
per name in ``COUNTERS``.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from pathlib import Path

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
