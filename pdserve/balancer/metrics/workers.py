"""What workers did lately, told from counters that are looked at once a second; the queue over time.

    LoadTable ── samples ──► tokens_s, kv_usage      GET /pdserve/instance ──► KV sent, path, time

Created by the fleet, which also runs ``run``; read by state.py and metrics/export.py. Memory is
fixed: so many marks for each worker that is a member.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from pdserve.balancer.metrics.windows import NUM_STEPS, LatencyWindow, step_numbers, step_of
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.workers import Worker
from pdserve.types import InstanceId, Role, WorkerLoad

LOOK_S = 1.0
NUM_MARKS = 11
"""Looks that a worker's rate is over: ten seconds."""
GENERATED = 5
"""Where SGLang's ``decode_moments`` have the generated tokens."""


class TransferCounters(msgspec.Struct, frozen=True):
    """``transfer`` of ``GET /pdserve/instance``, cumulative since the start of that server."""

    kv_bytes: int = 0
    transfers: int = 0
    latency_us: int = 0
    failures: int = 0
    direct_chunks: int = 0
    packed_chunks: int = 0


@dataclass(slots=True)
class KVSent:
    """What a prefill worker's data plane (a decode worker's: received) says; ``path`` and ``transfer_s``
    are of the last look at which anything had been sent, ``bytes_s`` of the last look."""

    counters: TransferCounters
    told_s: float
    bytes_s: float = 0.0
    path: str = ""
    transfer_s: float | None = None


@dataclass(slots=True)
class WorkerFigures:
    """One instance. ``joined_s``: when it was first seen."""

    joined_s: float
    marks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=NUM_MARKS))
    sent: KVSent | None = None

    @property
    def tokens_s(self) -> float | None:
        """Tokens per second over the marks; None while too little is known."""
        if len(self.marks) < 2:
            return None
        (since_s, first), (until_s, last) = self.marks[0], self.marks[-1]
        return (last - first) / (until_s - since_s) if until_s > since_s else 0.0


class WorkerMetrics:
    """Watches all members. ``run`` it, or ``look`` once a second.

    Args:
        workers: the members now.
        num_waiting: requests that wait for a pair.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        table: LoadTable,
        workers: Callable[[], list[Worker]],
        num_waiting: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv_transfer = LatencyWindow()
        """Seconds of KV transfers as the workers' data planes tell them."""
        self._table = table
        self._workers = workers
        self._num_waiting = num_waiting
        self._clock = clock
        self._figures: dict[InstanceId, WorkerFigures] = {}
        self._step = step_of(clock())
        self._most_waiting = 0
        self._waiting: deque[tuple[int, int]] = deque(maxlen=NUM_STEPS)

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Take the counters as they are now."""
        now_s = self._clock()
        workers = self._workers()
        members = {worker.instance_id for worker in workers}
        for gone in self._figures.keys() - members:
            del self._figures[gone]
        for worker in workers:
            figures = self.of(worker)
            load = self._table.load(worker.instance_id)
            if load is not None:
                _mark(figures.marks, load.timestamp_s, _tokens(worker.role, load))
        self._advance(now_s)
        self._most_waiting = max(self._most_waiting, self._num_waiting())

    def of(self, worker: Worker) -> WorkerFigures:
        """That worker's figures; new ones if it was not seen before."""
        figures = self._figures.get(worker.instance_id)
        if figures is None:
            figures = self._figures[worker.instance_id] = WorkerFigures(self._clock())
        return figures

    def told(self, worker: Worker, counters: TransferCounters) -> None:
        """Its instance keeper: what its data plane has counted so far."""
        figures, now_s = self.of(worker), self._clock()
        before, figures.sent = figures.sent, KVSent(counters, now_s)
        if before is None or counters.kv_bytes < before.counters.kv_bytes:  # the first, or it was restarted
            return
        sent, old = figures.sent, before.counters
        sent.path, sent.transfer_s = before.path, before.transfer_s
        sent.bytes_s = (counters.kv_bytes - old.kv_bytes) / max(now_s - before.told_s, 1e-3)
        chunks = counters.direct_chunks - old.direct_chunks, counters.packed_chunks - old.packed_chunks
        if any(chunks):
            sent.path = "mixed" if all(chunks) else "direct" if chunks[0] else "packed"
        number, latency_us = counters.transfers - old.transfers, counters.latency_us - old.latency_us
        if number > 0 and latency_us >= 0 and worker.role is Role.PREFILL:
            sent.transfer_s = latency_us / number / 1e6
            self.kv_transfer.observe(sent.transfer_s, number)

    def waiting(self) -> list[int | None]:
        """The longest queue of each closed step, oldest first; None where nobody looked."""
        now_s = self._clock()
        self._advance(now_s)
        seen = dict(self._waiting)
        return [seen.get(number) for number in step_numbers(now_s)]

    def _advance(self, now_s: float) -> None:
        number = step_of(now_s)
        if number == self._step:
            return
        self._waiting.append((self._step, self._most_waiting))
        self.kv_transfer.close_step()
        self._step, self._most_waiting = number, self._num_waiting()


def transfer_counters(document: Mapping[str, object]) -> TransferCounters | None:
    """Read ``GET /pdserve/instance``; None if it is not what pdserve's workers tell."""
    try:
        return msgspec.convert(document["transfer"], TransferCounters)
    except (KeyError, msgspec.ValidationError):
        return None


def _tokens(role: Role, load: WorkerLoad) -> float:
    if role is Role.PREFILL:
        return load.total_prefill_uncached_tokens
    return load.decode_moments[GENERATED] if len(load.decode_moments) > GENERATED else 0.0


def _mark(marks: deque[tuple[float, float]], time_s: float, tokens: float) -> None:
    if marks and tokens < marks[-1][1]:  # restarted
        marks.clear()
    if not marks or time_s > marks[-1][0]:
        marks.append((time_s, tokens))
