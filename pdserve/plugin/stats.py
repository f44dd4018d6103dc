"""Transfer counters that the scheduler ranks write and the HTTP process reads.

One anonymous memory file per server, opened by the children through
``/proc/<pid>/fd/<n>``: nothing is left behind however the server ends. Each
rank owns a row, so no lock is needed; a row is three 8-byte counters.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from pdserve.config import publish_stats_path, stats_path

MAX_RANKS = 128
_ROW = struct.Struct("=QQQ")


class TransferStats:
    """Cumulative KV bytes, transfers and failures of one server since its start."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer

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

    def add(self, rank: int, *, kv_bytes: int = 0, transfers: int = 0, failures: int = 0) -> None:
        """Count in this rank's own row."""
        offset = (rank % MAX_RANKS) * _ROW.size
        old = _ROW.unpack_from(self._buffer, offset)
        _ROW.pack_into(self._buffer, offset, old[0] + kv_bytes, old[1] + transfers, old[2] + failures)

    def total(self) -> dict[str, int]:
        """Sums over all ranks: ``kv_bytes``, ``transfers``, ``failures``."""
        rows = [_ROW.unpack_from(self._buffer, rank * _ROW.size) for rank in range(MAX_RANKS)]
        sums = [sum(column) for column in zip(*rows, strict=True)]
        return dict(zip(("kv_bytes", "transfers", "failures"), sums, strict=True))
