"""Probes of pairs: one keeper per pair, and the gate that bounds how many probes run at once.

A pair's keeper probes it whenever it is not ready, both workers answer and
neither is draining. It decides nothing: it tells ``PairVerdicts`` what came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pdserve.balancer.member import Backoff, PairRecord, PairState, WorkerState
from pdserve.balancer.probe import ProbePassed, ProbeResult, WorkerKeys, WorkerPool, probe_pair
from pdserve.config import BalancerConfig

SUSPECT_BACKOFF_S = (0.2, 10.0)
JOIN_BACKOFF_S = (0.5, 10.0)
"""Between two probes of a pair that fails: a busy partner of a broken worker hardly notices that."""
MAX_PROBES = 8
MAX_PROBES_PER_WORKER = 2
"""One probe may hang for ``probe_s`` on a broken peer; the second place lets other pairs be tested."""


class PairVerdicts(Protocol):
    """What a pair's keeper reports to."""

    def pair_probed(self, record: PairRecord, result: ProbeResult) -> None:
        """A probe ended."""
        ...


class ProbeGate:
    """Bounds how many probes run at once, in all and per worker."""

    def __init__(self) -> None:
        self._active = 0
        self._changed = asyncio.Event()

    async def enter(self, record: PairRecord) -> None:
        """Wait until this pair may be probed. Follow with ``turn``, without an await between."""
        while not self._has_room(record):
            await self._changed.wait()

    @contextmanager
    def turn(self, record: PairRecord) -> Iterator[None]:
        """Hold the place that ``enter`` waited for."""
        self._count(record, 1)
        try:
            yield
        finally:
            self._count(record, -1)
            self._changed.set()
            self._changed = asyncio.Event()

    def _has_room(self, record: PairRecord) -> bool:
        busiest = max(record.prefill.num_probes, record.decode.num_probes)
        return self._active < MAX_PROBES and busiest < MAX_PROBES_PER_WORKER

    def _count(self, record: PairRecord, step: int) -> None:
        self._active += step
        record.prefill.num_probes += step
        record.decode.num_probes += step


class PairKeeper:
    """Probes one pair until it is ready, and again each time it is called into question."""

    def __init__(
        self,
        record: PairRecord,
        config: BalancerConfig,
        pool: WorkerPool,
        gate: ProbeGate,
        verdicts: PairVerdicts,
    ) -> None:
        self._record = record
        self._config = config
        self._pool = pool
        self._gate = gate
        self._verdicts = verdicts
        self._keys = WorkerKeys.of(config)

    async def run(self) -> None:
        """Until cancelled."""
        backoff: Backoff | None = None
        while True:
            result = await self._probe()
            if isinstance(result, ProbePassed):
                backoff = None
                await self._record.retest.wait()
            else:
                backoff = backoff or Backoff(*self._backoff_bounds())
                await asyncio.sleep(backoff.next_s())

    async def _probe(self) -> ProbeResult:
        record = self._record
        while not record.can_be_probed:
            for worker in (record.prefill, record.decode):
                await worker.answers.wait()
                await worker.serves.wait()
            if record.can_be_probed:
                await self._gate.enter(record)
        with self._gate.turn(record):
            record.retest.clear()
            record.state = PairState.PROBING
            result = await probe_pair(self._pool, record.pair, self._config.probe_s, self._keys)
        self._verdicts.pair_probed(record, result)
        return result

    def _backoff_bounds(self) -> tuple[float, float]:
        is_suspect = WorkerState.SUSPECT in (self._record.prefill.state, self._record.decode.state)
        return SUSPECT_BACKOFF_S if is_suspect else JOIN_BACKOFF_S
