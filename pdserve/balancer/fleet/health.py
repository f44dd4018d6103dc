"""Worker and pair health: turns leg results, pings and probes into state changes.

    proxy ──── leg results ──┐
    monitors ─ ping, poll, ──┼──► HealthTracker ──► states of workers and pairs ──► Scheduler.set_ready_pairs
               probe, hang ──┘         └──► exchanges of a hung worker end

A worker whose leg fails hard becomes suspect: all its pairs leave the ready pairs
until it answers a ping and a probe passes again.
"""

from __future__ import annotations

import logging

from pdserve.balancer.fleet.breaker import Failure
from pdserve.balancer.fleet.events import EventLog
from pdserve.balancer.fleet.roster import Roster
from pdserve.balancer.fleet.weights import Weights
from pdserve.balancer.fleet.worker import (
    COMMAND,
    PairRecord,
    PairState,
    ProbePassed,
    ProbeResult,
    Worker,
    WorkerState,
)
from pdserve.errors import WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.scheduler import Scheduler
from pdserve.scheduling.workers import PairKey
from pdserve.types import InstanceId, Role, WorkerInfo

logger = logging.getLogger(__name__)

OVERLOADED = 503


class HealthTracker:
    """Changes the states of workers and pairs, and sets the scheduler's ready pairs by them."""

    def __init__(self, roster: Roster, scheduler: Scheduler, log: EventLog, pool: HttpClient) -> None:
        self.dozing: set[Worker] = set()
        """Workers whose monitors make a long pause, which a reserved pair ends."""
        self._roster = roster
        self._scheduler = scheduler
        self._log = log
        self._pool = pool

    # -- leg results ---------------------------------------------------------------------------

    def legs_ended(
        self, key: PairKey, prefill_ok: bool | None, decode_ok: bool | None, error: str | WorkerError
    ) -> None:
        """Both legs of a request are over.

        Where both are blamed because nobody can tell which failed, and one of the workers is known to be
        suspect or has left, the other is not blamed.

        Args:
            key: the pair.
            prefill_ok: False blames that worker, True clears it, None says nothing
                (the client left, or the other leg failed first).
            decode_ok: the same for the decode leg.
            error: what went wrong. As WorkerUnreachable or WorkerTimeout of a blamed
                worker it makes that worker suspect at once; anything else counts as
                one of ``breaker_failures`` in a row and has the worker pinged, except a
                503 of its own, which says that it is full.
        """
        members = self._roster.members
        if prefill_ok and decode_ok:
            for instance_id in key:
                if (worker := members.get(instance_id)) is not None:
                    worker.breaker.succeed()
            return
        results = [(members.get(key[0]), prefill_ok), (members.get(key[1]), decode_ok)]
        if key[0] == key[1]:
            del results[0]
        if prefill_ok is False and decode_ok is False:
            known = [each for each in results if each[0] is None or not each[0].breaker.is_closed]
            if len(known) == 1:
                results = known
        for worker, is_ok in results:
            if worker is not None and is_ok is not None:
                self._leg_ended(worker, is_ok, error)

    def _leg_ended(self, worker: Worker, is_ok: bool, error: str | WorkerError) -> None:
        if is_ok:
            worker.breaker.succeed()
            return
        worker.last_error = str(error)
        logger.warning("leg failed worker=%s: %s", worker.worker_id, error)
        worker.failures[_kind(worker, error)] += 1
        failure = _severity(worker, error)
        if failure is Failure.OVERLOAD:
            if worker.slots.is_overloaded:
                return  # one of the same burst
            self._scheduler.set_overloaded(worker.slots)
        if worker.breaker.fail(failure, getattr(error, "cause", None)):
            self.suspect(worker, worker.last_error)
        elif failure is not Failure.OVERLOAD:
            worker.needs_ping = True
            worker.wake.set()

    def forgive(self, instance_id: InstanceId, cause: int) -> None:
        """A worker failed a request that others fail too."""
        if worker := self._roster.members.get(instance_id):
            worker.breaker.forgive(cause)

    def convict(self, instance_id: InstanceId, cause: int) -> None:
        """A worker failed a request that another has served."""
        worker = self._roster.members.get(instance_id)
        if worker is not None and worker.breaker.convict(cause):
            self.suspect(worker, worker.last_error)

    # -- monitors and probers ------------------------------------------------------------------

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        """The worker's description has changed."""
        if worker in self._roster:
            had = worker.info.prefills_locally
            self._scheduler.update_worker(info)
            if info.prefills_locally is not had:
                self.set_ready_pairs()

    def worker_sampled(self, worker: Worker, sample: Sample) -> None:
        """A load sample arrived."""
        if worker in self._roster:
            self._scheduler.sampled(worker.slots, sample)

    def worker_silent(self, worker: Worker, why: str) -> None:
        """The worker does not answer: as severe as a broken connection of a request."""
        if worker in self._roster:
            worker.last_error = why
            worker.breaker.errors += 1
            worker.breaker.trip()
            self.suspect(worker, why)

    def worker_hung(self, worker: Worker, why: str) -> None:
        """The worker, which may have left the fleet, has work and shows no sign of life; what is in
        flight there ends now.

        Its requests are failed after it is suspect, so that their retries go elsewhere.
        """
        worker.num_wedged += 1
        self.worker_silent(worker, f"{worker.url}: {why}")
        num_failed = self._pool.fail_worker(worker.url, lambda: WorkerTimeout(worker.url, why))
        if num_failed:
            self._log.note("wedged", worker, f"{why}; {num_failed} exchanges ended")

    def worker_paused(self, worker: Worker, is_paused: bool) -> None:
        """The worker's engine is paused, or goes on. Its requests wait; it gets others only if nobody else
        can serve them."""
        if worker.is_paused is not is_paused and worker in self._roster:
            worker.is_paused = is_paused
            self._log.note("paused" if is_paused else "continued", worker, f"{worker.num_inflight} in flight")
            self.set_ready_pairs()

    def worker_restarted(self, worker: Worker) -> None:
        """Another process answers at the worker's address: it has the weights of its start, and no prefix."""
        worker.weights, worker.is_ahead, worker.is_paused = Weights(), False, False
        self.cache_flushed(worker)
        self._log.note("restarted", worker, "another process answers at its address, with nothing cached")

    def cache_flushed(self, worker: Worker) -> None:
        """The worker's prefix cache is empty."""
        self._scheduler.cache_flushed(worker.instance_id)

    def still_serving(self, model: str, apart_from: Worker) -> Worker | None:
        """Another worker that answers and has that model."""
        others = (each for each in self._roster.members.values() if each is not apart_from)
        return next((each for each in others if each.answers.is_set() and each.info.model == model), None)

    def note(self, event: str, worker: Worker, detail: str) -> None:
        """Something that an operator cares about has happened to ``worker``."""
        self._log.note(event, worker, detail)

    def fail_waiting(self, worker: Worker, why: str) -> None:
        """End the requests that the worker has not begun to answer: they are tried elsewhere."""
        self._pool.fail_worker(worker.url, lambda: WorkerError(worker.url, why), is_begun=False)

    def worker_stalled(self, worker: Worker, why: str) -> None:
        """The worker answers, but its scheduler makes no progress. That is no hang while it loads other
        weights."""
        if not self._pool.is_busy_with(worker.url, COMMAND):
            self.worker_hung(worker, why)

    def worker_answers(self, worker: Worker) -> None:
        """The worker answers again (or, static, for the first time): let its pairs be probed."""
        worker.breaker.half_open()
        worker.answers.set()

    def pair_probed(self, record: PairRecord, result: ProbeResult) -> None:
        """A probe ended; readiness follows it, unless a worker was lost meanwhile."""
        record.probes += 1
        if isinstance(result, ProbePassed):
            self._pair_passed(record, result)
            return
        is_news = result.message != record.error
        record.state, record.error = PairState.FAILED, result.message
        if is_news:
            self._log.note("pair_failed", record.decode, f"{record.label}: {result.message}")
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
                self._log.note(
                    "ready", worker, f"a token came through {record.label} in {result.took_s:.2f} s"
                )
        self.set_ready_pairs()

    # -- states ------------------------------------------------------------------------------

    def suspect(self, worker: Worker, why: str) -> None:
        """Take a worker out of the ready pairs; it is pinged, then its pairs are probed again."""
        worker.answers.clear()
        worker.wake.set()
        self.retest(worker, why)
        if worker.state is WorkerState.READY:
            worker.state = WorkerState.SUSPECT
            self._log.note("suspect", worker, why)
        self.set_ready_pairs()

    def retest(self, worker: Worker, why: str) -> None:
        """Have a worker's pairs probed again before they take traffic; follow with ``set_ready_pairs``."""
        for record in self._roster.pairs_of(worker):
            record.retest.set()
            if record.state is PairState.READY:
                record.state, record.error = PairState.UNTESTED, why

    def set_ready_pairs(self) -> None:
        """Have the scheduler use the pairs that are ready now, and the decode workers that need none."""
        self._scheduler.set_alone([worker.instance_id for worker in self._roster.alone()])
        self._scheduler.set_ready_pairs([record.key for record in self._roster.ready_pairs()])


def _severity(worker: Worker, error: str | WorkerError) -> Failure:
    if not isinstance(error, WorkerError) or error.url.rstrip("/") != worker.url:
        return Failure.SOFT
    if isinstance(error, WorkerUnreachable | WorkerTimeout):
        return Failure.HARD
    is_full = isinstance(error, WorkerRejected) and error.status == OVERLOADED
    return Failure.OVERLOAD if is_full else Failure.SOFT


def _kind(worker: Worker, error: str | WorkerError) -> str:
    """What metrics call it; ``unclear``: nobody could tell which leg it was."""
    match error:
        case WorkerError() if error.url.rstrip("/") != worker.url:
            return "unclear"
        case WorkerUnreachable():
            return "unreachable"
        case WorkerTimeout():
            return "timeout"
        case WorkerRejected():
            return "overload" if error.status == OVERLOADED else "rejected"
        case _:
            return "unclear"
