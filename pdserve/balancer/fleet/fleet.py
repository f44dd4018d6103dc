"""Who can serve a request now: the fleet's members, and what others ask and tell of them.

    bootstrap watch / static flags / POST /workers ─► Roster ─► keepers (ping, poll, probe, wedge)
                                                        │ ready        │
    reserve() ◄── Admission ◄── Rotation + Policy ◄─────┴─── Judge ◄───┘

A pair takes traffic once a real token has come through it. Everything runs on
one event loop; the tasks are owned here and awaited in ``stop``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Protocol

import msgspec

from pdserve.balancer.fleet.events import EventLog, FleetEvent
from pdserve.balancer.fleet.health import HealthTracker
from pdserve.balancer.fleet.probe import PairProber, ProbeGate, WorkerKeys, WorkerPool
from pdserve.balancer.fleet.roster import Roster, static_workers
from pdserve.balancer.fleet.transfer_poll import TransferListener, TransferPoller
from pdserve.balancer.fleet.worker_monitor import WorkerMonitor
from pdserve.bootstrap.client import FleetWatcher
from pdserve.bootstrap.messages import FleetView
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError, NoWorkerError
from pdserve.scheduling.admission import Admission
from pdserve.scheduling.breaker import Breaker
from pdserve.scheduling.explain import explain_fullness, explain_shortage
from pdserve.scheduling.lengths import LengthPredictor, Lengths
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.policy import policy_of
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.workers import PairKey, PairRecord, PairState, Worker, WorkerState
from pdserve.types import InstanceId, RequestShape, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)

NO_EXCLUDE: frozenset[PairKey] = frozenset()


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


class WorkerFleet:
    """The balancer's workers and pairs. Create it, ``await start()``, later ``await stop()``.

    ``membership`` replaces the watch of ``config.bootstrap_url``; for tests. ``transfers`` is given the
    counters of the workers' data planes; without it they are not asked for.
    """

    def __init__(
        self,
        config: BalancerConfig,
        pool: WorkerPool,
        membership: Membership | None = None,
        transfers: TransferListener | None = None,
    ) -> None:
        self.config = config
        self.table = LoadTable()
        self.policy = policy_of(config)
        self.lengths: Lengths | None = LengthPredictor() if config.predict_lengths else None
        self.started_s = time.monotonic()
        self.watcher: Membership | None = membership or (
            FleetWatcher(config.bootstrap_url) if config.bootstrap_url else None
        )
        self._static = static_workers(config)
        self._pool = pool
        self._transfers = transfers
        self._gate = ProbeGate()
        self._roster = Roster()
        self._log = EventLog()
        self._health = HealthTracker(self._roster, self.table, self._log, pool)
        self.admission = Admission(config, self.table, self.policy, self._health, self.explain, self._drained)
        self._health.on_change = self._readiness_changed
        self._health.on_sample = self.admission.sampled
        self._dismissed: set[InstanceId] = set()
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
        self.admission.stop()
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

    def find(self, worker_id: WorkerId) -> Worker | None:
        """The member of that name; None if there is none."""
        return self._roster.find(worker_id)

    @property
    def has_ready_pair(self) -> bool:
        """True if some pair takes traffic; it may be full."""
        return len(self.admission.placement.ready_pairs) > 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a pair."""
        return len(self.admission.line)

    @property
    def is_paused(self) -> bool:
        """Set by control while generation is paused on purpose: standing still is no wedge then."""
        return self._health.is_paused

    @is_paused.setter
    def is_paused(self, is_paused: bool) -> None:
        self._health.is_paused = is_paused

    def explain(self, exclude: frozenset[PairKey] = NO_EXCLUDE, shape: RequestShape | None = None) -> str:
        """Why no pair can be reserved now (by this request), in one sentence for client and operator."""
        if self._is_stopping:
            return "the balancer is stopping"
        if usable := list(self.admission.placement.ready_pairs.without(exclude).records.values()):
            placement, limit = self.admission.placement, self.config.max_concurrent_requests
            return explain_fullness(
                usable, lambda worker: placement.lacks_room(worker, shape), placement.num_open, limit
            )
        return explain_shortage(self.workers(), self.pairs(), exclude, self._how_to_join())

    def _how_to_join(self) -> str:
        url = self.config.bootstrap_url
        if self.watcher is not None and not self.watcher.is_connected:
            return f"bootstrap service {url} is not reachable"
        register = f"register with the bootstrap service {url}, " if url else ""
        return f"workers {register}are named with --prefill and --decode, or added by POST /workers"

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
                self._health.worker_learned(worker, info)
                if has_moved:
                    self._health.suspect(worker, "its address changed")

    def add_worker(self, info: WorkerInfo) -> Worker:
        """Take in a worker that no bootstrap service knows; it takes traffic once a pair of it is proven.

        Raises:
            ConfigError: if a member has its name or its address already.
        """
        for other in self._roster.members.values():
            if other.worker_id == info.worker_id or other.url == info.url:
                raise ConfigError(f"{other.worker_id} at {other.url} is a member already ({other.state})")
        return self._add(info, is_static=True)

    def drain(self, worker_id: WorkerId) -> None:
        """Give a worker no new requests; event ``drained`` when those it has have ended.

        Raises:
            KeyError: if there is no such worker.
        """
        worker = self._member(worker_id)
        if worker.is_draining:
            return
        worker.state = WorkerState.DRAINING
        worker.serves.clear()
        self._log.note("draining", worker, f"{worker.num_inflight} requests in flight")
        self._health.retest(worker, f"{worker_id} is draining")
        self._readiness_changed()
        if not worker.num_inflight:
            self._drained(worker)

    def undrain(self, worker_id: WorkerId) -> None:
        """Let a draining worker serve again, once its pairs are proven anew. Calls a removal off.

        Raises:
            KeyError: if there is no such worker.
        """
        worker = self._member(worker_id)
        worker.is_leaving = False
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
        if worker not in self._roster:
            return
        self._log.note("drained", worker, "nothing of ours is in flight there")
        if worker.is_leaving:
            if not worker.is_static:
                self._dismissed.add(worker.instance_id)
            self._remove(worker, "removed by an operator")

    async def _watch(self, watcher: Membership) -> None:
        async for view in watcher.watch():
            self.apply(view.workers)

    def _add(self, info: WorkerInfo, *, is_static: bool = False) -> Worker:
        worker = Worker(info, is_static=is_static, breaker=Breaker(self.config.breaker_failures))
        self.table.add(info)
        worker.view = self.table.view(info.instance_id)
        records = self._roster.add(worker)
        self._log.note("joined", worker, info.url)
        if not is_static:
            worker.answers.set()  # it registered after its server was up
        keeper = WorkerMonitor(worker, self.config, self._pool, self._health)
        worker.tasks.append(self._spawn(keeper.run(), f"keep-{worker.worker_id}"))
        if self._transfers is not None:
            poller = TransferPoller(worker, self._pool, WorkerKeys.of(self.config).plain, self._transfers)
            worker.tasks.append(self._spawn(poller.run(), f"keep-instance-{worker.worker_id}"))
        for record in records:
            self._keep(record)
        return worker

    def flushed(self, instance_id: InstanceId) -> None:
        """That worker's prefix cache was emptied through us."""
        tree = getattr(self.policy, "tree", None)
        if tree is not None:
            tree.flush(instance_id)

    def _keep(self, record: PairRecord) -> None:
        if mismatch := record.mismatch():
            record.state, record.error = PairState.FAILED, mismatch
            self._log.note("pair_failed", record.decode, f"{record.label}: {mismatch}")
            return
        keeper = PairProber(record, self.config, self._pool, self._gate, self._health)
        record.tasks.append(self._spawn(keeper.run(), f"keep-{record.label}"))

    def _remove(self, worker: Worker, why: str) -> None:
        doomed = self._roster.remove(worker)
        self.table.remove(worker.instance_id)
        self.policy.forget(worker.instance_id)
        worker.has_left = True
        worker.wake.set()
        # The first task is its keeper's, which sees to what is still in flight there.
        needless = worker.tasks[1:] if worker.num_inflight else worker.tasks
        for task in [*needless, *(task for record in doomed for task in record.tasks)]:
            task.cancel()
        self._log.note("gone", worker, why)
        self._readiness_changed()

    def _readiness_changed(self) -> None:
        self.admission.readiness_changed(list(self._roster.records.values()))

    # -- reservations ------------------------------------------------------------------------

    def foresee(self, shape: RequestShape) -> RequestShape:
        """The same request with a forecast of its answer's length, if lengths are predicted."""
        if self.lengths is None:
            return shape
        return msgspec.structs.replace(shape, forecast=self.lengths.forecast(shape))

    def learn(self, shape: RequestShape, output_tokens: int, *, is_cut: bool) -> None:
        """An answer (of a batch: the mean of its answers) is over; ``is_cut``: it did not end by itself."""
        if self.lengths is not None:
            self.lengths.learn(shape, output_tokens, is_cut)

    async def reserve(
        self, shape: RequestShape, *, exclude: frozenset[PairKey] = NO_EXCLUDE, timeout_s: float
    ) -> Reservation:
        """Hold the pair the policy picks among those with room, waiting in the queue for one if need be.

        Args:
            shape: what is known of the request.
            exclude: (prefill, decode) instance ids that the request must not get again.
            timeout_s: longest wait.

        Raises:
            NoWorkerError: if the queue is full, or no pair had room in time; the message says why.
        """
        if self._is_stopping:
            raise NoWorkerError(self.explain())
        reservation = self.admission.try_now(shape, exclude)
        if reservation is not None:
            return reservation
        return await self.admission.wait(shape, exclude, timeout_s)

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
