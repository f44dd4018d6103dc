"""The background loops of the fleet: one keeper per worker, one per pair.

A worker's keeper polls its load and, when the worker is not believed to
answer, pings it until it does. A pair's keeper probes the pair whenever it is
not ready and both workers answer. Keepers decide nothing: they tell
``Verdicts`` (the Fleet) what they saw.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec

from pdserve.balancer.member import Backoff, PairRecord, PairState, Worker, WorkerState
from pdserve.balancer.probe import Fetcher, ProbePassed, ProbeResult, probe_pair
from pdserve.balancer.sample import LOADS_PATH, Sample, parse_loads
from pdserve.config import BalancerConfig
from pdserve.errors import ProtocolMismatch, WorkerError, WorkerUnreachable
from pdserve.types import WorkerInfo

logger = logging.getLogger(__name__)

PING_S = 5.0
HEALTH_S = 25.0
"""SGLang's ``/health`` generates a token: at least 1 s, gives up after 20 s."""
LOADS_S = 2.0
UNREACHABLE_POLLS = 2
"""Polls in a row without a connection that make a worker suspect; one may be a closing keep-alive."""
IDLE_FACTOR = 4
"""An idle worker is polled this many times more slowly; a dispatch ends the pause."""
POLL_BACKOFF_S = 2.0
REVIVE_BACKOFF_S = (0.2, 5.0)
JOIN_BACKOFF_S = (0.5, 10.0)
MAX_PROBES = 8
MAX_PROBES_PER_WORKER = 2
"""One probe may hang for ``probe_s`` on a broken peer; the second place lets other pairs be tested."""


class Verdicts(Protocol):
    """What keepers report to."""

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        """The worker described itself."""
        ...

    def worker_answers(self, worker: Worker) -> None:
        """A worker that was not believed to answer does."""
        ...

    def worker_silent(self, worker: Worker, why: str) -> None:
        """A worker does not answer."""
        ...

    def worker_sampled(self, worker: Worker, sample: Sample) -> None:
        """A load sample arrived."""
        ...

    def pair_probed(self, record: PairRecord, result: ProbeResult) -> None:
        """A probe ended."""
        ...


class WorkerKeeper:
    """Polls one worker's load; pings it while it is suspect or, if static, not up yet."""

    def __init__(self, worker: Worker, config: BalancerConfig, pool: Fetcher, verdicts: Verdicts) -> None:
        self._worker = worker
        self._config = config
        self._pool = pool
        self._verdicts = verdicts
        self._unreachable_polls = 0
        self._is_mute = False
        self._backoff = Backoff(config.load_poll_s, max(config.load_poll_s, POLL_BACKOFF_S))

    async def run(self) -> None:
        """Until cancelled."""
        worker = self._worker
        while True:
            worker.wake.clear()
            if not worker.answers.is_set():
                await self._revive()
            elif worker.needs_ping:
                worker.needs_ping = False
                if why := await self._ping():
                    self._verdicts.worker_silent(worker, why)
            else:
                await self._rest(await self._poll())

    async def _revive(self) -> None:
        backoff = Backoff(*REVIVE_BACKOFF_S)
        while why := await self._ping() or await self._introduce():
            self._worker.last_error = why
            await asyncio.sleep(backoff.next_s())
        self._unreachable_polls = 0
        self._worker.needs_ping = False
        self._verdicts.worker_answers(self._worker)

    async def _ping(self) -> str:
        """Why the worker does not answer, or an empty string."""
        for path, timeout_s in (("/ping", PING_S), ("/health", HEALTH_S)):
            try:
                answer = await self._pool.fetch(self._worker.url, "GET", path, timeout_s=timeout_s)
            except WorkerError as exc:
                return str(exc)
            if answer.status == 200:
                return ""
            if answer.status not in (404, 405):
                return f"{self._worker.url}{path}: HTTP {answer.status}"
        return f"{self._worker.url} has neither /ping nor /health"

    async def _introduce(self) -> str:
        """Learn a static worker's model; why it cannot serve its role, or an empty string."""
        worker = self._worker
        if not worker.is_static or worker.info.model:
            return ""
        try:
            answer = await self._pool.fetch(worker.url, "GET", "/model_info", timeout_s=PING_S)
            about = msgspec.json.decode(answer.body, type=_ModelInfo)
        except WorkerError as exc:
            return str(exc)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ""
        if about.disaggregation_mode not in (None, worker.role):
            return (
                f"{worker.url} runs with --disaggregation-mode {about.disaggregation_mode}; "
                f"a {worker.role} server was expected there"
            )
        name = about.served_model_name or about.model_path
        self._verdicts.worker_learned(
            worker, msgspec.structs.replace(worker.info, model=about.model_path, served_model_name=name)
        )
        return ""

    async def _poll(self) -> float:
        """One load sample; the seconds to wait before the next."""
        worker = self._worker
        sent_s = time.monotonic()
        try:
            answer = await self._pool.fetch(worker.url, "GET", LOADS_PATH, timeout_s=LOADS_S)
        except WorkerError as exc:
            return self._missed(exc)
        self._unreachable_polls = 0
        if answer.status != 200:
            return self._unusable(f"/v1/loads: HTTP {answer.status}")
        try:
            sample = parse_loads(answer.body, sent_s=sent_s, received_s=time.monotonic())
        except ProtocolMismatch as exc:
            return self._unusable(str(exc))
        self._is_mute = False
        self._backoff.reset()
        self._verdicts.worker_sampled(worker, sample)
        return self._config.load_poll_s

    def _missed(self, exc: WorkerError) -> float:
        if isinstance(exc, WorkerUnreachable):
            self._unreachable_polls += 1
            if self._unreachable_polls >= UNREACHABLE_POLLS:
                self._verdicts.worker_silent(self._worker, str(exc))
        return self._backoff.next_s()

    def _unusable(self, why: str) -> float:
        """A worker without usable load figures still serves; balanced by in-flight requests alone."""
        if not self._is_mute:
            logger.warning("no load figures worker=%s: %s", self._worker.worker_id, why)
        self._is_mute = True
        return self._backoff.next_s()

    async def _rest(self, delay_s: float) -> None:
        worker = self._worker
        if not worker.answers.is_set() or await _woken(worker, delay_s) or worker.num_inflight:
            return
        worker.is_dozing = True
        await _woken(worker, delay_s * (IDLE_FACTOR - 1))
        worker.is_dozing = False


class _ModelInfo(msgspec.Struct):
    model_path: str = ""
    served_model_name: str | None = None
    disaggregation_mode: str | None = None


async def _woken(worker: Worker, delay_s: float) -> bool:
    """Wait; True if the worker's keeper was woken before the time was up."""
    try:
        async with asyncio.timeout(delay_s):
            await worker.wake.wait()
    except TimeoutError:
        return False
    return True


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
        self, record: PairRecord, config: BalancerConfig, pool: Fetcher, gate: ProbeGate, verdicts: Verdicts
    ) -> None:
        self._record = record
        self._config = config
        self._pool = pool
        self._gate = gate
        self._verdicts = verdicts

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
        while not (record.prefill.answers.is_set() and record.decode.answers.is_set()):
            await record.prefill.answers.wait()
            await record.decode.answers.wait()
        await self._gate.enter(record)
        with self._gate.turn(record):
            record.retest.clear()
            record.state = PairState.PROBING
            result = await probe_pair(self._pool, record.pair, self._config.probe_s)
        self._verdicts.pair_probed(record, result)
        return result

    def _backoff_bounds(self) -> tuple[float, float]:
        is_suspect = WorkerState.SUSPECT in (self._record.prefill.state, self._record.decode.state)
        return REVIVE_BACKOFF_S if is_suspect else JOIN_BACKOFF_S
