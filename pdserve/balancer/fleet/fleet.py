"""Membership of the fleet: which workers and pairs there are, and the tasks that watch them.

    bootstrap watch / static flags / POST /workers ─► Roster ─► WorkerMonitor, PairProber, …
                                                                  │ pings, samples, probes
    Scheduler ◄── ready pairs, samples ◄── HealthTracker ◄────────┘

A pair takes traffic once a real token has come through it. Everything runs on
one event loop; the tasks are owned here and awaited in ``stop``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence

from pdserve.balancer.fleet.breaker import Breaker
from pdserve.balancer.fleet.events import EventLog, FleetEvent
from pdserve.balancer.fleet.health import HealthTracker
from pdserve.balancer.fleet.probe import PairProber, ProbeGate, WorkerKeys
from pdserve.balancer.fleet.roster import Roster, explain_shortage, static_workers
from pdserve.balancer.fleet.transfer_poll import TransferListener, TransferPoller
from pdserve.balancer.fleet.updates import FleetUpdates
from pdserve.balancer.fleet.weights import Weights
from pdserve.balancer.fleet.worker import PairRecord, PairState, Worker, WorkerState
from pdserve.balancer.fleet.worker_monitor import WorkerMonitor
from pdserve.bootstrap.watch import FleetWatcher
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError, WorkerError
from pdserve.http.client import HttpClient
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.scheduler import Scheduler
from pdserve.state.workers import RoleCapacity
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)

MONITOR = "monitor"


class WorkerFleet:
    """The balancer's workers and pairs. Create it, ``await start()``, later ``await stop()``.

    ``scheduler`` is kept informed of workers, loads and ready pairs; ``health`` of leg results.
    ``membership`` replaces the watch of ``config.bootstrap_url``; for tests. ``transfers`` is given the
    counters of the workers' data planes; without it they are not asked for.
    """

    def __init__(
        self,
        config: BalancerConfig,
        pool: HttpClient,
        membership: FleetWatcher | None = None,
        transfers: TransferListener | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, self._why_none_ready)
        self.started_s = time.monotonic()
        self.watcher = membership or (FleetWatcher(config.bootstrap_url) if config.bootstrap_url else None)
        self._static = static_workers(config)
        self._pool = pool
        self._transfers = transfers
        self._gate = ProbeGate()
        self._roster = Roster()
        self._log = EventLog()
        self.health = HealthTracker(self._roster, self.scheduler, self._log, pool)
        self.updates = FleetUpdates(self._roster, self.health, pool, config)
        self.has_moving = asyncio.Event()
        """Set when a worker is to be emptied, by whoever drains it; cleared by whoever empties it."""
        self._draining: set[Worker] = set()
        self._dismissed: set[InstanceId] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to watch and probe; returns at once, with no worker ready yet."""
        for info in self._static:
            self._add(info, is_static=True)
        if self.watcher is not None:
            self._spawn(self._watch(self.watcher), "fleet-watch")

    async def stop(self) -> None:
        """Refuse waiting requests and end every background task; reservations may still be released."""
        self.scheduler.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what others read --------------------------------------------------------------------

    @property
    def events(self) -> deque[FleetEvent]:
        """The last changes, oldest first."""
        return self._log.events

    def workers(self) -> list[Worker]:
        """Every member, prefill first, each role in the order of its names."""
        return self._roster.workers()

    def pairs(self) -> list[PairRecord]:
        """Every prefill x decode pair, in the order of ``workers``."""
        return self._roster.pairs()

    def why_kept_out(self, worker: Worker) -> str:
        """Why a worker that answers gets no requests: its model, role or weights. Empty if it may."""
        return worker.mismatch or self._roster.why_apart(worker)

    def paused(self) -> list[Worker]:
        """The paused workers without which no pair can serve now; none if some pair can."""
        pairs = self._roster.ready_pairs()
        if not all(record.is_paused for record in pairs):
            return []
        return [w for w in self.workers() if w.is_paused and any(w in (r.prefill, r.decode) for r in pairs)]

    def capacity(self) -> list[RoleCapacity]:
        """Each role's workers in numbers."""
        config, members = self.config, self.workers()
        expected = {Role.PREFILL: config.expect_prefill, Role.DECODE: config.expect_decode}
        named = {Role.PREFILL: len(config.prefill), Role.DECODE: len(config.decode)}
        rows = {role: [worker for worker in members if worker.role is role] for role in Role}
        return [
            RoleCapacity(
                role=role._value_,
                expected=expected[role] or named[role],
                present=len(row),
                ready=sum(w.state is WorkerState.READY and not self.why_kept_out(w) for w in row),
            )
            for role, row in rows.items()
        ]

    @property
    def agreed_weights(self) -> Weights:
        """Those of every worker that serves."""
        return self._roster.agreed

    def member(self, instance_id: InstanceId) -> Worker | None:
        """That instance; None if it is no member."""
        return self._roster.members.get(instance_id)

    def find(self, worker_id: WorkerId) -> Worker | None:
        """The member of that name; None if there is none."""
        return self._roster.find(worker_id)

    def _why_none_ready(self) -> str:
        apart = [why for worker in self.workers() if (why := self._roster.why_apart(worker))]
        if apart and any(record.state is PairState.READY for record in self.pairs()):
            return f"weights are being updated: {apart[0]}"
        return explain_shortage(self.workers(), self.pairs(), self._how_to_join())

    def _how_to_join(self) -> str:
        url = self.config.bootstrap_url
        if self.watcher is not None and not self.watcher.is_connected:
            return f"bootstrap service {url} is not reachable"
        register = f"register with the bootstrap service {url}, " if url else ""
        return f"workers {register}are named with --prefill and --decode, or added by POST /workers"

    # -- requests ------------------------------------------------------------------------------

    def pair_reserved(self, reservation: Reservation) -> None:
        """A request was given a pair: a monitor that dozes polls at once."""
        if self.health.dozing:
            members = self._roster.members
            workers = {worker for instance_id in reservation.key if (worker := members.get(instance_id))}
            if workers & self.health.dozing:
                for worker in workers:
                    worker.wake.set()

    def legs_ended(
        self,
        reservation: Reservation,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """A request gave its pair back; arguments as ``HealthTracker.legs_ended`` takes them."""
        self.health.legs_ended(reservation.key, prefill_ok, decode_ok, error)
        self.notice_drained()

    def answer_went_on(self, instance_id: InstanceId, gap_s: float, *, is_moved: bool) -> None:
        """A decode worker has gone on with another's answer: it was moved, or the other had failed it."""
        if worker := self._roster.members.get(instance_id):
            event = "moved" if is_moved else "resumed"
            self._log.count(event, worker, f"answers of other servers go on here; gap {gap_s:.2f} s")

    def notice_drained(self) -> None:
        """Draining workers may have nothing in flight any more."""
        if self._draining:
            for worker in [worker for worker in self._draining if not worker.num_inflight]:
                self._drained(worker)

    # -- membership --------------------------------------------------------------------------

    def apply(self, members: Sequence[WorkerInfo]) -> None:
        """Make these the members that the bootstrap service knows. Static workers stay.

        A new instance under a known name replaces the old one at once.
        """
        named = {info.worker_id: info for info in members}
        wanted = {i.instance_id: i for i in named.values() if i.instance_id not in self._dismissed}
        for worker in list(self._roster.members.values()):
            if not worker.is_static and worker.instance_id not in wanted:
                heir = named.get(worker.worker_id)
                self._remove(worker, f"superseded by {heir.instance_id}" if heir else "left the fleet")
        for info in wanted.values():
            worker = self._roster.members.get(info.instance_id) or self._add(info)
            if worker.info != info:
                has_moved = worker.info.url != info.url or worker.info.bootstrap_port != info.bootstrap_port
                self.health.worker_learned(worker, info)
                if has_moved:
                    self.health.suspect(worker, "its address changed")
            if info.is_leaving:
                self.drain(worker.worker_id, move=True)  # it ends once it has nothing

    def add_worker(self, info: WorkerInfo) -> Worker:
        """Take in a worker that no bootstrap service knows; it takes traffic once a pair of it is proven.

        Raises:
            ConfigError: if a member has its name or its address already.
        """
        for other in self._roster.members.values():
            if other.worker_id == info.worker_id or other.url == info.url:
                raise ConfigError(f"{other.worker_id} at {other.url} is a member already ({other.state})")
        return self._add(info, is_static=True)

    def drain(self, worker_id: WorkerId, *, move: bool = False) -> None:
        """Give a worker no new requests; event ``drained`` when those it has have ended.

        ``move``: the streams of a decode worker that can go on elsewhere do.

        Raises:
            KeyError: if there is no such worker.
        """
        worker = self._member(worker_id)
        if move:
            worker.is_moving = True
            self.has_moving.set()
        if worker.is_draining:
            return
        worker.state = WorkerState.DRAINING
        worker.serves.clear()
        self._log.note("draining", worker, f"{worker.num_inflight} requests in flight")
        self.health.retest(worker, f"{worker_id} is draining")
        self.health.set_ready_pairs()
        self._draining.add(worker)
        self.notice_drained()

    def undrain(self, worker_id: WorkerId) -> None:
        """Let a draining worker serve again, once its pairs are probed again. Calls a removal off.

        Raises:
            KeyError: if there is no such worker.
        """
        worker = self._member(worker_id)
        worker.is_leaving = worker.is_moving = False
        self._draining.discard(worker)
        if worker.is_draining:
            worker.state = WorkerState.JOINING
            worker.serves.set()
            self._log.note("undrained", worker, "its pairs are tested again")

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Drain a worker, then forget it. A member of the bootstrap service stays away until it
        registers as a new instance.

        Raises:
            KeyError: if there is no such worker.
        """
        worker = self._member(worker_id)
        worker.is_leaving = True
        if not worker.is_draining:
            self.drain(worker_id)
        elif not worker.num_inflight:
            self._drained(worker)

    def _member(self, worker_id: WorkerId) -> Worker:
        worker = self._roster.find(worker_id)
        if worker is None:
            raise KeyError(worker_id)
        return worker

    def _drained(self, worker: Worker) -> None:
        self._draining.discard(worker)
        self._log.note("drained", worker, "nothing of ours is in flight there")
        if worker.is_leaving:
            if not worker.is_static:
                self._dismissed.add(worker.instance_id)
            self._remove(worker, "removed by an operator")

    async def _watch(self, watcher: FleetWatcher) -> None:
        async for view in watcher.watch():
            self.apply(view.workers)

    def _add(self, info: WorkerInfo, *, is_static: bool = False) -> Worker:
        slots = self.scheduler.add_worker(info)
        worker = Worker(slots, is_static=is_static, breaker=Breaker(self.config.breaker_failures))
        records = self._roster.add(worker)
        self._log.note("joined", worker, info.url)
        if not is_static and not self.updates.is_behind(worker):
            worker.answers.set()  # it registered after its server was up
        monitor = WorkerMonitor(worker, self.config, self._pool, self.health, self.updates)
        worker.tasks[MONITOR] = self._spawn(monitor.run(), f"keep-{worker.worker_id}")
        if self._transfers is not None:
            poller = TransferPoller(worker, self._pool, WorkerKeys.of(self.config).plain, self._transfers)
            worker.tasks["transfers"] = self._spawn(poller.run(), f"keep-instance-{worker.worker_id}")
        for record in records:
            self._probe(record)
        return worker

    def _probe(self, record: PairRecord) -> None:
        if mismatch := record.mismatch():
            record.state, record.error = PairState.FAILED, mismatch
            self._log.note("pair_failed", record.decode, f"{record.label}: {mismatch}")
            return
        prober = PairProber(record, self.config, self._pool, self._gate, self.health)
        record.prober = self._spawn(prober.run(), f"keep-{record.label}")

    def _remove(self, worker: Worker, why: str) -> None:
        doomed = self._roster.remove(worker)
        self._draining.discard(worker)
        worker.has_left = True
        worker.wake.set()
        # The monitor sees to what is still in flight there.
        tasks = [task for name, task in worker.tasks.items() if name != MONITOR or not worker.num_inflight]
        for task in [*tasks, *(record.prober for record in doomed if record.prober is not None)]:
            task.cancel()
        self._log.note("gone", worker, why)
        self.health.set_ready_pairs()
        self.scheduler.remove_worker(worker.instance_id)

    # -- tasks -------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()):
            logger.error("background task %s failed", task.get_name(), exc_info=exc)
