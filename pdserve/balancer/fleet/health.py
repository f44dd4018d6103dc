"""Who is to blame, who is ready: what legs, pings and probes say about workers and pairs.

    Admission ── leg ended ──┐
    keepers ── ping, poll, ──┼──► Judge ──► states of workers and pairs ──► on_change (ready pairs, queue)
               probe, wedge ─┘       └──► exchanges of a hung worker end

A worker whose leg fails hard becomes suspect: all its pairs leave the ready pairs
until it answers a ping and a probe passes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pdserve.balancer.fleet.events import EventLog
from pdserve.balancer.fleet.probe import COMMAND, ProbePassed, ProbeResult, WorkerPool
from pdserve.balancer.fleet.roster import Roster
from pdserve.errors import WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.scheduling.breaker import Failure
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.load_sample import PartialLoad, Sample
from pdserve.scheduling.workers import PairRecord, PairState, Worker, WorkerState
from pdserve.types import Role, WorkerInfo

logger = logging.getLogger(__name__)

OVERLOADED = 503


class HealthTracker:
    """Changes the states of workers and pairs. ``on_change`` is called when readiness may have changed,
    ``on_sample`` when there may be room that was not known of."""

    def __init__(self, roster: Roster, table: LoadTable, log: EventLog, pool: WorkerPool) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.on_sample: Callable[[Worker], None] = lambda worker: None
        self.is_paused = False
        self._roster = roster
        self._table = table
        self._log = log
        self._pool = pool

    # -- what requests say -------------------------------------------------------------------

    def pair_ended(
        self, record: PairRecord, prefill_ok: bool | None, decode_ok: bool | None, error: str | WorkerError
    ) -> None:
        """Both legs of a request are over; each worker is judged by its own.

        Where both are blamed because nobody could tell whose fault it was, and one of
        them is known to be suspect, the other is innocent.
        """
        verdicts = [(record.prefill, prefill_ok), (record.decode, decode_ok)]
        if prefill_ok is False and decode_ok is False:
            known = [worker for worker, _ in verdicts if not worker.breaker.is_closed]
            if len(known) == 1:
                verdicts = [(known[0], False)]
        for worker, is_ok in verdicts:
            if is_ok is not None and worker in self._roster:
                self._leg_ended(worker, is_ok, error)

    def _leg_ended(self, worker: Worker, is_ok: bool, error: str | WorkerError) -> None:
        if is_ok:
            worker.breaker.succeed()
            return
        worker.last_error = str(error)
        logger.warning("leg failed worker=%s: %s", worker.worker_id, error)
        worker.failures[_kind(worker, error)] += 1
        failure = _gravity(worker, error)
        if failure is Failure.OVERLOAD:
            if worker.is_overloaded:
                return  # one of the same burst
            worker.is_overloaded = self._table.load(worker.instance_id) is not None
        if worker.breaker.fail(failure):
            self.suspect(worker, worker.last_error)
        elif failure is not Failure.OVERLOAD:
            worker.needs_ping = True
            worker.wake.set()

    # -- what keepers say --------------------------------------------------------------------

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        """Keeper or watch: the worker's description changed."""
        worker.info = info
        self._table.add(info)

    def worker_sampled(self, worker: Worker, sample: Sample) -> None:
        """Keeper: a load sample arrived."""
        if worker not in self._roster:
            return
        self._table.record(worker.instance_id, sample)
        worker.is_overloaded = False
        self.on_sample(worker)

    def worker_silent(self, worker: Worker, why: str) -> None:
        """Keeper: the worker does not answer; as grave as a broken connection of a request."""
        if worker in self._roster:
            worker.last_error = why
            worker.breaker.errors += 1
            worker.breaker.trip()
            self.suspect(worker, why)

    def worker_updated(self, worker: Worker, partial: PartialLoad) -> None:
        """Channel keeper: the worker's load changed between two polls."""
        self._table.update(worker.instance_id, partial)
        self.on_sample(worker)

    def worker_hung(self, worker: Worker, why: str) -> None:
        """Keeper: the worker, which may have left the fleet, has work and shows no sign of life; what is in
        flight there ends now.

        Its requests are failed after it is suspect, so that their retries go elsewhere.
        """
        worker.num_wedged += 1
        self.worker_silent(worker, f"{worker.url}: {why}")
        num_failed = self._pool.fail_worker(worker.url, lambda: WorkerTimeout(worker.url, why))
        if num_failed:
            self._log.note("wedged", worker, f"{why}; {num_failed} exchanges ended")

    def worker_stalled(self, worker: Worker, why: str) -> None:
        """Keeper: the worker answers, but its scheduler gets nowhere. That is no wedge while it was told to
        stop, or to load other weights."""
        if not self.is_paused and not self._pool.is_busy_with(worker.url, COMMAND):
            self.worker_hung(worker, why)

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
        self.on_change()

    # -- states ------------------------------------------------------------------------------

    def suspect(self, worker: Worker, why: str) -> None:
        """Take a worker out of the ready pairs; its keeper pings it, then its pairs are probed anew."""
        worker.answers.clear()
        worker.wake.set()
        self.retest(worker, why)
        if worker.state is WorkerState.READY:
            worker.state = WorkerState.SUSPECT
            self._log.note("suspect", worker, why)
        self.on_change()

    def retest(self, worker: Worker, why: str) -> None:
        """Have every pair of a worker probed before it takes traffic again; follow with ``on_change``."""
        for record in self._roster.pairs_of(worker):
            record.retest.set()
            if record.state is PairState.READY:
                record.state, record.error = PairState.UNTESTED, why


def _gravity(worker: Worker, error: str | WorkerError) -> Failure:
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
