"""Which request gets a pair, and when: at once while there is room, else in its turn, or not at all.

    reserve ─► try_now ── room ──► Placement ─► Reservation ─► legs end ─► released ─┐
                  └─ none ─► WaitLine ◄── serve ◄── sample, readiness, leg ended ◄───┘

A request that does not fit lets smaller ones pass it ``MAX_OVERTAKEN`` times; then the pair
that lacks least for it is kept for it, and the others go on with the rest of the fleet. The line's order
follows the fleet's state (regime.py); with an objective for the first token the late are refused.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError, WorkerError
from pdserve.scheduling.kv_room import ENDLESS, WorkerLimits
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.placement import Placement
from pdserve.scheduling.policy import Policy
from pdserve.scheduling.queue import AdmissionQueue, Grant, QueueFull, QueueOrder, Waiter
from pdserve.scheduling.regime import RegimeChange, RegimeMonitor
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.slo import FirstTokenGate, late_ones, prefill_queue_s
from pdserve.scheduling.work import CompletionRate, Work, WorkEstimate, queue_s
from pdserve.scheduling.workers import PairKey, PairRecord, Worker
from pdserve.types import RequestShape

MAX_OVERTAKEN = 16
"""Requests that may be served before an earlier one that needs more room than there is. A pair kept
too early stands half empty; too late and a burst of small requests keeps a large one waiting."""

OBSERVE_S = 0.25
"""Rates and loads are looked at anew at most this often: they change with samples, not between."""

Explain = Callable[[frozenset[PairKey], RequestShape], str]


class PairJudge(Protocol):
    """Who blames a worker for a leg that ended badly; ``verdicts.Judge`` is the one in production."""

    def pair_ended(
        self,
        record: PairRecord,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """A request on that pair came to another than a normal end."""
        ...


class Admission:
    """Hands out reservations and takes them back.

    Args:
        explain: why no pair can be had, for the client.
        on_drained: called when the last leg on a draining worker has ended.
        clock: seconds that never go back; a simulator brings its own.
    """

    def __init__(
        self,
        config: BalancerConfig,
        table: LoadTable,
        policy: Policy,
        health: PairJudge,
        explain: Explain,
        on_drained: Callable[[Worker], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.regime = RegimeMonitor(config.slo_ttft_s, config.slo_tpot_s)
        self.regime.on_change.append(self._regime_changed)
        self.line = AdmissionQueue(config.queue_size, QueueOrder(config.queue_order, config.queue_timeout_s))
        self.work = WorkEstimate()
        self._config = config
        self.placement = Placement(table, policy, self._limits(), clock, predicts=config.predict_lengths)
        self.shed: Counter[str] = Counter()
        self.completions = CompletionRate()
        self._max_open = config.max_concurrent_requests or ENDLESS
        self._health = health
        self._clock = clock
        self._explain = explain
        self._on_drained = on_drained
        self._least_waiting = (0, 0)  # nobody in line needs less KV; on prefill, on decode
        self._favoured: Waiter | None = None
        self._gate = FirstTokenGate(config.slo_ttft_s)
        self._observed_s = float("-inf")

    # -- getting a pair ----------------------------------------------------------------------

    def try_now(self, shape: RequestShape, exclude: frozenset[PairKey]) -> Reservation | None:
        """A pair at once, without waiting; None if others wait already or there is no room."""
        if self.line or self.placement.num_open >= self._max_open:
            return None
        if self._gate.slo_s > 0 and self._is_late(self._clock(), self.work.of(shape), 0.0):
            return None
        if self._gate.slo_s <= 0:
            return self.placement.place(shape, exclude, self)
        return self._place(shape, exclude)

    async def wait(self, shape: RequestShape, exclude: frozenset[PairKey], timeout_s: float) -> Reservation:
        """Stand in line for a pair.

        Raises:
            NoWorkerError: if the line is full, the first token would be late, or no pair came in time.
        """
        future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        waiter = self.enqueue(shape, exclude, future)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            if future.done() and future.exception() is None:
                return future.result()  # served in the last moment
            raise self.timed_out(waiter, timeout_s) from None
        except asyncio.CancelledError:
            _give_back(future)
            raise
        finally:
            self.leave(waiter)

    def enqueue(self, shape: RequestShape, exclude: frozenset[PairKey], grant: Grant[Reservation]) -> Waiter:
        """Stand in line without awaiting: ``grant`` gets a pair or an error, at once or later.

        Call ``leave`` when the wait is over, however it ended.

        Raises:
            NoWorkerError: if the line is full, or the first token would be late.
        """
        waiter = self._join(shape, exclude, grant)
        self.serve()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Out of the line, if still in it."""
        self.line.leave(waiter)
        if waiter is self._favoured:
            self._favour(None)
            self.serve()

    def timed_out(self, waiter: Waiter, timeout_s: float) -> NoWorkerError:
        """The refusal of one that has waited long enough; counts it as shed."""
        why = self._explain(waiter.exclude, waiter.shape)
        return self._refusal("timeout", f"no pair within {timeout_s:g} s: {why}")

    def serve(self) -> None:
        """Give every waiter that can have one a pair, in order. The pair is held from here on."""
        if self._gate.slo_s > 0:
            self._shed_late()
        placement, front = self.placement, None
        free, least = placement.most_free(), (ENDLESS, ENDLESS)
        for waiter in self.line:
            if self._fits_nobody(free):
                return
            if waiter.grant.done():
                continue
            tokens = placement.tokens_needed(waiter.shape)
            reservation = None
            if waiter is self._favoured or (tokens[0] <= free[0] and tokens[1] <= free[1]):
                reservation = self._place(waiter.shape, waiter.exclude, waiter)
            if reservation is None:
                if front is None and len(placement.ready_pairs.without(waiter.exclude)):
                    front = waiter
                least = min(least[0], tokens[0]), min(least[1], tokens[1])
                continue
            self.line.leave(waiter)
            waiter.grant.set_result(reservation)
            if waiter is self._favoured:
                self._favour(None)
            if front is not None:
                self._overtaken(front)
            free = placement.most_free()
        self._least_waiting = least

    def stop(self) -> None:
        """End every wait."""
        self.shed["stopping"] += len(self.line)
        self.line.dismiss(lambda: NoWorkerError("the balancer is stopping"))

    # -- what may let somebody in ------------------------------------------------------------

    def readiness_changed(self, records: list[PairRecord]) -> None:
        """Only the ready ones of ``records`` take traffic from now on."""
        self._favour(None)
        self.placement.readiness_changed(records)
        self._least_waiting = (0, 0)
        self._observe(self._clock())
        self.serve()

    def sampled(self, worker: Worker) -> None:
        """A sample of that worker has come."""
        now_s = self._clock()
        self.completions.mark(now_s)
        if now_s - self._observed_s >= OBSERVE_S:
            self._observe(now_s)
        if self.placement.sampled(worker):
            self._least_waiting = (0, 0)
        if self.line:
            self.serve()

    def prefill_finished(self, reservation: Reservation) -> None:
        """Called by a reservation: its prefill leg no longer loads the worker."""
        self._end_prefill(reservation, is_whole=True)
        if self.line:
            self.serve()

    def released(
        self,
        reservation: Reservation,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """Called by a reservation, once: end both legs, then health each worker by its own."""
        self.completions.total += 1
        if reservation.is_prefilling:
            reservation.is_prefilling = False
            self._end_prefill(reservation, is_whole=bool(prefill_ok))
        decode = self.placement.end_decode(reservation, is_whole=bool(decode_ok))
        if decode.is_draining and not decode.num_inflight:
            self._on_drained(decode)
        record = reservation.record
        if prefill_ok and decode_ok:
            record.prefill.breaker.succeed()
            decode.breaker.succeed()
        else:
            self._health.pair_ended(record, prefill_ok, decode_ok, error)
            self.placement.doubt(record)  # one may have said that it is full
        if self.line:
            self.serve()

    def _end_prefill(self, reservation: Reservation, *, is_whole: bool) -> None:
        if self._gate.slo_s > 0:
            self.work.arrived(reservation.legs[0], self._clock(), is_whole=is_whole)
        prefill = self.placement.end_prefill(reservation, is_whole=is_whole)
        if prefill.is_draining and not prefill.num_inflight:
            self._on_drained(prefill)

    def _place(
        self, shape: RequestShape, exclude: frozenset[PairKey], waiter: Waiter | None = None
    ) -> Reservation | None:
        reservation = self.placement.place(shape, exclude, self, waiter)
        if reservation is not None and self._gate.slo_s > 0:
            cached_tokens = reservation.choice.cached_tokens
            expected_s = queue_s(reservation.record.prefill.view)
            self.work.sent(reservation.legs[0], shape, cached_tokens, expected_s, self._clock())
        return reservation

    # -- the fleet's state -------------------------------------------------------------------

    def _observe(self, now_s: float) -> None:
        self._observed_s = now_s
        views = self.placement.ready_pairs.candidates
        self.work.refresh(views.prefills, views.decodes)
        self.regime.observe(views.prefills, views.decodes, len(self.line), now_s)

    def _regime_changed(self, change: RegimeChange) -> None:
        if self.line.order.follow(change.after):
            self.line.reorder()
            self.placement.limit(self._limits())
            self._least_waiting = (0, 0)

    def _limits(self) -> WorkerLimits:
        config = self._config
        is_ordered = self.line.order.is_shortest
        longest_s = prefill_queue_s(config.prefill_queue_s, config.slo_ttft_s, is_ordered=is_ordered)
        self.regime.longest_queue_s = longest_s
        return WorkerLimits(longest_s, config.slo_tpot_s)

    # -- the line ----------------------------------------------------------------------------

    def _waiter(self, shape: RequestShape, exclude: frozenset[PairKey], grant: Grant[Reservation]) -> Waiter:
        now_s, work, overhead_s = self._clock(), self.work.of(shape), self.work.overhead_s
        due_s = self._gate.due_s(now_s, work.prefill_s, overhead_s)
        is_hopeless = self._gate.is_hopeless(work.prefill_s, overhead_s)
        return Waiter(shape, exclude, now_s, grant, work, due_s, is_hopeless)

    def _is_late(self, now_s: float, work: Work, ahead_s: float) -> bool:
        """True if a request that comes now will not get its first token in time, others' prefills of
        ``ahead_s`` seconds in all going before it."""
        num_prefills = len(self.placement.ready_pairs.prefills)
        due_s = self._gate.due_s(now_s, work.prefill_s, self.work.overhead_s)
        if due_s == math.inf or not num_prefills:
            return False
        return now_s + self.placement.least_queue_s() + ahead_s / num_prefills > due_s

    def _shed_late(self) -> None:
        now_s, num_prefills = self._clock(), len(self.placement.ready_pairs.prefills)
        if not num_prefills or not self._gate.looks(now_s):
            return
        for waiter in late_ones(self.line, num_prefills, self.placement.least_queue_s(), now_s):
            self.line.leave(waiter)
            waiter.grant.set_exception(self._too_late(waiter))
            if waiter is self._favoured:
                self._favour(None)

    def _too_late(self, waiter: Waiter) -> NoWorkerError:
        why = self._explain(waiter.exclude, waiter.shape)
        return self._refusal("slo", f"no first token within {self._gate.slo_s:g} s: {why}")

    def _join(self, shape: RequestShape, exclude: frozenset[PairKey], grant: Grant[Reservation]) -> Waiter:
        waiter = self._waiter(shape, exclude, grant)
        if self._gate.slo_s > 0 and self._is_late(waiter.since_s, waiter.work, self.line.ahead_s(waiter)):
            raise self._too_late(waiter)
        try:
            displaced = self.line.join(waiter)
        except QueueFull:
            why = f"{len(self.line)} requests wait already: {self._explain(exclude, shape)}"
            raise self._refusal("queue_full", why) from None
        if displaced is not None:
            why = self._explain(displaced.exclude, displaced.shape)
            why = f"{len(self.line)} requests of no less priority wait: {why}"
            displaced.grant.set_exception(self._refusal("displaced", why))
        least, tokens = self._least_waiting, self.placement.tokens_needed(shape)
        self._least_waiting = min(least[0], tokens[0]), min(least[1], tokens[1])
        return waiter

    def _refusal(self, reason: str, message: str) -> NoWorkerError:
        self.shed[reason] += 1
        retry_after_s = self.completions.retry_after_s(len(self.line) + 1, self._clock())
        return NoWorkerError(message, retry_after_s)

    def _fits_nobody(self, free: tuple[int, int]) -> bool:
        if self.placement.num_open >= self._max_open:
            return True
        least = self._least_waiting
        return self._favoured is None and (free[0] < least[0] or free[1] < least[1])

    def _overtaken(self, front: Waiter) -> None:
        front.num_overtaken += 1
        if front.num_overtaken >= MAX_OVERTAKEN and self._favoured is None:
            self._favour(front)

    def _favour(self, waiter: Waiter | None) -> None:
        self._favoured = waiter
        if waiter is None:
            self.placement.keep_pair(None)
        else:
            self.placement.keep_pair(waiter, waiter.shape, waiter.exclude)


def _give_back(future: asyncio.Future[Reservation]) -> None:
    """Served and cancelled in the same turn of the loop: nobody else will give it back."""
    if future.done() and not future.cancelled() and future.exception() is None:
        future.result().release(prefill_ok=None, decode_ok=None)
