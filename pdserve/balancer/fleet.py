"""Who can serve a request now: membership, readiness, blame, reservations.

    bootstrap watch / static flags ─► apply() ─► workers x pairs ─► keepers (ping, poll, probe)
                                                      │ ready           │ Verdicts
    reserve() ◄── WaitLine ◄── Rotation + Policy ◄────┴────◄────────────┘

A pair takes traffic once a real token has come through it. A worker whose leg
fails becomes suspect: all its pairs leave the rotation until it answers a
ping and a probe passes again. Everything runs on one event loop; the tasks
are owned here and awaited in ``stop``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.balancer.keeper import PairKeeper, ProbeGate, WorkerKeeper
from pdserve.balancer.load import LoadTable
from pdserve.balancer.member import PairKey, PairRecord, PairState, Worker, WorkerState
from pdserve.balancer.policy import make_policy
from pdserve.balancer.probe import Fetcher, ProbePassed, ProbeResult
from pdserve.balancer.reservation import Reservation, WaitLine
from pdserve.balancer.rotation import Rotation
from pdserve.balancer.sample import Sample
from pdserve.balancer.shortage import explain_shortage
from pdserve.balancer.static import static_workers
from pdserve.bootstrap.client import FleetWatcher
from pdserve.bootstrap.messages import FleetView
from pdserve.config import BalancerConfig
from pdserve.errors import NoWorkerError, WorkerError, WorkerTimeout, WorkerUnreachable
from pdserve.types import InstanceId, RequestShape, Role, WorkerInfo

logger = logging.getLogger(__name__)

NUM_EVENTS = 64
NO_EXCLUDE: frozenset[PairKey] = frozenset()


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """One change an operator cares about; ``time_s`` is wall clock."""

    time_s: float
    event: str
    worker: str
    detail: str


class Membership(Protocol):
    """Where members come from; ``bootstrap.client.FleetWatcher`` is the one in production."""

    @property
    def is_connected(self) -> bool:
        """True while the bootstrap service answers."""
        ...

    @property
    def epoch(self) -> str:
        """The service's present start; empty before the first answer."""
        ...

    def watch(self) -> AsyncIterator[FleetView]:
        """Each view as it changes; outlives restarts of the service."""
        ...


class Fleet:
    """The balancer's workers and pairs. Create it, ``await start()``, later ``await stop()``.

    ``membership`` replaces the watch of ``config.bootstrap_url``; for tests.
    """

    def __init__(self, config: BalancerConfig, pool: Fetcher, membership: Membership | None = None) -> None:
        self.config = config
        self.table = LoadTable()
        self.policy = make_policy(config.policy)
        self.events: deque[FleetEvent] = deque(maxlen=NUM_EVENTS)
        self.started_s = time.monotonic()
        self.watcher: Membership | None = membership or (
            FleetWatcher(config.bootstrap_url) if config.bootstrap_url else None
        )
        self._static = static_workers(config)
        self._pool = pool
        self._gate = ProbeGate()
        self._workers: dict[InstanceId, Worker] = {}
        self._pairs: dict[PairKey, PairRecord] = {}
        self._rotation = Rotation()
        self._line = WaitLine(self._try_reserve)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to watch and probe; returns at once, with no worker ready yet."""
        for info in self._static:
            self._add(info, is_static=True)
        if self.watcher is not None:
            self._spawn(self._watch(self.watcher), "fleet-watch")

    async def stop(self) -> None:
        """Refuse waiting requests and end every background task; reservations may still be released."""
        self._is_stopping = True
        self._line.dismiss(lambda: NoWorkerError("the balancer is stopping"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what others read --------------------------------------------------------------------

    def workers(self) -> list[Worker]:
        """Every member, prefill first, each role in the order of its names."""
        return sorted(
            self._workers.values(), key=lambda w: (w.role is Role.DECODE, len(w.worker_id), w.worker_id)
        )

    def pairs(self) -> list[PairRecord]:
        """Every prefill x decode pair, in the order of ``workers``."""
        order = {worker.instance_id: index for index, worker in enumerate(self.workers())}
        return sorted(self._pairs.values(), key=lambda r: (order[r.key[0]], order[r.key[1]]))

    @property
    def has_ready_pair(self) -> bool:
        """True if a request could be reserved now."""
        return len(self._rotation) > 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a pair."""
        return len(self._line)

    def explain(self, exclude: frozenset[PairKey] = NO_EXCLUDE) -> str:
        """Why no pair can be reserved now, in one sentence for the client and the operator."""
        if self._is_stopping:
            return "the balancer is stopping"
        lost = self.watcher is not None and not self.watcher.is_connected
        bootstrap = f"bootstrap service {self.config.bootstrap_url} is not reachable" if lost else ""
        return explain_shortage(self.workers(), self.pairs(), exclude, bootstrap)

    # -- membership --------------------------------------------------------------------------

    def apply(self, members: Sequence[WorkerInfo]) -> None:
        """Make these the members that the bootstrap service knows. Static workers stay.

        A new instance under a known name replaces the old one at once.
        """
        named = {info.worker_id: info for info in members}
        wanted = {info.instance_id: info for info in named.values()}
        for worker in list(self._workers.values()):
            if not worker.is_static and worker.instance_id not in wanted:
                heir = named.get(worker.worker_id)
                self._remove(worker, f"superseded by {heir.instance_id}" if heir else "left the fleet")
        for info in wanted.values():
            worker = self._workers.get(info.instance_id) or self._add(info)
            if worker.info != info:
                has_moved = worker.info.url != info.url or worker.info.bootstrap_port != info.bootstrap_port
                self.worker_learned(worker, info)
                if has_moved:
                    self._suspect(worker, "its address changed")

    async def _watch(self, watcher: Membership) -> None:
        async for view in watcher.watch():
            self.apply(view.workers)

    def _add(self, info: WorkerInfo, *, is_static: bool = False) -> Worker:
        worker = Worker(info, is_static=is_static)
        self._workers[info.instance_id] = worker
        self.table.add(info)
        self._note("joined", worker, info.url)
        if not is_static:
            worker.answers.set()  # it registered after its server was up
        keeper = WorkerKeeper(worker, self.config, self._pool, self)
        worker.tasks.append(self._spawn(keeper.run(), f"keep-{worker.worker_id}"))
        for other in list(self._workers.values()):
            if other.role is not worker.role:
                prefill, decode = (worker, other) if worker.role is Role.PREFILL else (other, worker)
                self._add_pair(PairRecord(prefill, decode))
        return worker

    def _add_pair(self, record: PairRecord) -> None:
        self._pairs[record.key] = record
        if mismatch := record.mismatch():
            record.state, record.error = PairState.FAILED, mismatch
            self._note("pair_failed", record.decode, f"{record.label}: {mismatch}")
            return
        keeper = PairKeeper(record, self.config, self._pool, self._gate, self)
        record.tasks.append(self._spawn(keeper.run(), f"keep-{record.label}"))

    def _remove(self, worker: Worker, why: str) -> None:
        del self._workers[worker.instance_id]
        doomed = self._pairs_of(worker)
        for record in doomed:
            del self._pairs[record.key]
        self.table.remove(worker.instance_id)
        for task in [*worker.tasks, *(task for record in doomed for task in record.tasks)]:
            task.cancel()
        self._note("gone", worker, why)
        self._readiness_changed()

    # -- reservations ------------------------------------------------------------------------

    async def reserve(
        self, shape: RequestShape, *, exclude: frozenset[PairKey] = NO_EXCLUDE, timeout_s: float
    ) -> Reservation:
        """Hold the pair the policy picks, waiting in line for one if need be.

        Args:
            shape: what is known of the request.
            exclude: (prefill, decode) instance ids that the request must not get again.
            timeout_s: longest wait.

        Raises:
            NoWorkerError: if no usable pair came up in time; the message says why.
        """
        if self._is_stopping:
            raise NoWorkerError(self.explain())
        reservation = self._try_reserve(shape, exclude)
        if reservation is not None:
            return reservation
        try:
            return await self._line.wait(shape, exclude, timeout_s)
        except TimeoutError:
            raise NoWorkerError(f"no pair within {timeout_s:g} s: {self.explain(exclude)}") from None

    def _try_reserve(self, shape: RequestShape, exclude: frozenset[PairKey]) -> Reservation | None:
        rotation = self._rotation.without(exclude) if exclude else self._rotation
        if not rotation.keys:
            return None
        choice = self.policy.choose(shape, rotation.candidates(self.table))
        prefill_id = choice.pair.prefill.info.instance_id
        decode_id = choice.pair.decode.info.instance_id
        record = self._pairs[prefill_id, decode_id]
        record.requests += 1
        now_s = time.monotonic()
        legs = (
            self.table.dispatch(prefill_id, shape.prompt_tokens, now_s),
            self.table.dispatch(decode_id, shape.prompt_tokens, now_s),
        )
        for worker in (record.prefill, record.decode):
            worker.num_inflight += 1
            if worker.is_dozing:
                worker.wake.set()
        return Reservation(record.pair, choice.reason, record, legs, self)

    def prefill_finished(self, reservation: Reservation) -> None:
        """Called by a reservation: its prefill leg no longer loads the worker."""
        self.table.finish(reservation.record.prefill.instance_id, reservation.legs[0])

    def released(
        self,
        reservation: Reservation,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """Called by a reservation, once: end both legs, then judge each worker by its own."""
        record = reservation.record
        legs = zip((record.prefill, record.decode), reservation.legs, (prefill_ok, decode_ok), strict=True)
        for worker, leg, is_ok in legs:
            self.table.finish(worker.instance_id, leg)
            worker.num_inflight -= 1
            if is_ok is not None and worker.instance_id in self._workers:
                self._judge(worker, is_ok, error)

    # -- verdicts ----------------------------------------------------------------------------

    def _judge(self, worker: Worker, is_ok: bool, error: str | WorkerError) -> None:
        if is_ok:
            worker.breaker.succeed()
            return
        is_hard = isinstance(error, WorkerUnreachable | WorkerTimeout) and error.url.rstrip("/") == worker.url
        worker.last_error = str(error)
        logger.warning("leg failed worker=%s: %s", worker.worker_id, error)
        if worker.breaker.fail(hard=is_hard):
            self._suspect(worker, worker.last_error)
        else:
            worker.needs_ping = True
            worker.wake.set()

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        """Keeper or watch: the worker's description changed."""
        worker.info = info
        self.table.add(info)

    def worker_sampled(self, worker: Worker, sample: Sample) -> None:
        """Keeper: a load sample arrived."""
        self.table.record(worker.instance_id, sample)

    def worker_silent(self, worker: Worker, why: str) -> None:
        """Keeper: the worker does not answer; as grave as a broken connection of a request."""
        if worker.instance_id in self._workers:
            worker.last_error = why
            worker.breaker.errors += 1
            worker.breaker.trip()
            self._suspect(worker, why)

    def worker_answers(self, worker: Worker) -> None:
        """Keeper: the worker answers again (or, static, for the first time): let its pairs be probed."""
        worker.breaker.half_open()
        worker.answers.set()

    def pair_probed(self, record: PairRecord, result: ProbeResult) -> None:
        """Keeper: a probe ended; readiness follows it, unless a worker was lost meanwhile."""
        record.probes += 1
        if isinstance(result, ProbePassed):
            self._pair_passed(record, result)
            return
        is_news = result.message != record.error
        record.state, record.error = PairState.FAILED, result.message
        if is_news:
            self._note("pair_failed", record.decode, f"{record.label}: {result.message}")
        blamed = record.prefill if result.role is Role.PREFILL else record.decode
        if result.unreachable and result.role is not None:
            self.worker_silent(blamed, result.message)

    def _pair_passed(self, record: PairRecord, result: ProbePassed) -> None:
        record.probe_s = result.took_s
        if record.retest.is_set():  # a worker became suspect meanwhile: this proves nothing
            record.state = PairState.UNTESTED
            return
        record.state, record.error = PairState.READY, ""
        for worker in (record.prefill, record.decode):
            worker.breaker.close()
            if worker.state is not WorkerState.READY:
                worker.state, worker.last_error = WorkerState.READY, ""
                self._note("ready", worker, f"a token came through {record.label} in {result.took_s:.2f} s")
        self._readiness_changed()

    def _suspect(self, worker: Worker, why: str) -> None:
        """Take a worker out of rotation; its keeper pings it, then its pairs are probed anew."""
        worker.answers.clear()
        worker.wake.set()
        for record in self._pairs_of(worker):
            record.retest.set()
            if record.state is PairState.READY:
                record.state, record.error = PairState.UNTESTED, why
        if worker.state is WorkerState.READY:
            worker.state = WorkerState.SUSPECT
            self._note("suspect", worker, why)
        self._readiness_changed()

    def _pairs_of(self, worker: Worker) -> list[PairRecord]:
        return [record for record in self._pairs.values() if worker in (record.prefill, record.decode)]

    def _readiness_changed(self) -> None:
        self._rotation = Rotation.of(self._pairs.values())
        self._line.serve()

    # -- events and tasks --------------------------------------------------------------------

    def _note(self, event: str, worker: Worker, detail: str) -> None:
        self.events.append(FleetEvent(time.time(), event, worker.worker_id, detail))
        logger.info("%s worker=%s %s", event, worker.worker_id, detail)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()):
            logger.error("background task %s failed", task.get_name(), exc_info=exc)
