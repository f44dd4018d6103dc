"""Rates of each worker over the last seconds, from its counters, and the queue length over time.

    look(workers, loads, queue) once a second ──► tokens_s      record_transfers ──► KV sent, path, time

The balancer's app calls ``look``; state.py and export.py read the figures. Memory is bounded: a fixed
number of marks for each member.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdserve.balancer.fleet.transfer_poll import TransferCounters
from pdserve.balancer.fleet.worker import Worker
from pdserve.balancer.metrics.windows import NUM_STEPS, LatencyWindow, step_numbers, step_of
from pdserve.scheduling.load import LoadTable
from pdserve.types import InstanceId, Role, WorkerLoad

NUM_MARKS = 11
"""Looks that a worker's rate is over: ten seconds."""
GENERATED = 5
"""Where SGLang's ``decode_moments`` have the generated tokens."""


@dataclass(slots=True)
class KVSent:
    """KV that a prefill worker has sent (a decode worker: received), by its own counters.

    ``path`` and ``transfer_s`` are of the last interval in which anything was sent, ``bytes_s`` of the last.
    """

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
    """Figures of all members. ``clock`` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.kv_transfer = LatencyWindow()
        """Seconds of KV transfers as the workers' data planes count them."""
        self._clock = clock
        self._figures: dict[InstanceId, WorkerFigures] = {}
        self._step = step_of(clock())
        self._num_waiting = self._most_waiting = 0
        self._waiting: deque[tuple[int, int]] = deque(maxlen=NUM_STEPS)

    def look(self, workers: Iterable[Worker], table: LoadTable, num_waiting: int) -> None:
        """Take the members' counters and the queue's length as they are now; call it once a second."""
        now_s = self._clock()
        members = {worker.instance_id: worker for worker in workers}
        for gone in self._figures.keys() - members.keys():
            del self._figures[gone]
        for worker in members.values():
            figures = self.of(worker)
            load = table.load(worker.instance_id)
            if load is not None:
                _mark(figures.marks, load.timestamp_s, _tokens(worker.role, load))
        self._num_waiting = num_waiting
        self._advance(now_s)
        self._most_waiting = max(self._most_waiting, num_waiting)

    def of(self, worker: Worker) -> WorkerFigures:
        """That worker's figures; new ones if it was not seen before."""
        figures = self._figures.get(worker.instance_id)
        if figures is None:
            figures = self._figures[worker.instance_id] = WorkerFigures(self._clock())
        return figures

    def record_transfers(self, worker: Worker, counters: TransferCounters) -> None:
        """Take what the worker's data plane has counted since its start."""
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
        self._step, self._most_waiting = number, self._num_waiting


def _tokens(role: Role, load: WorkerLoad) -> float:
    if role is Role.PREFILL:
        return load.total_prefill_uncached_tokens
    return load.decode_moments[GENERATED] if len(load.decode_moments) > GENERATED else 0.0


def _mark(marks: deque[tuple[float, float]], time_s: float, tokens: float) -> None:
    if marks and tokens < marks[-1][1]:  # restarted
        marks.clear()
    if not marks or time_s > marks[-1][0]:
        marks.append((time_s, tokens))
