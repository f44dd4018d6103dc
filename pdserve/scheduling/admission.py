"""Admission control: a request gets a pair at once, waits in the queue, or is refused.

    try_now ── room ──► Placement ─► Reservation ─► prefill_finished, end ─► serve ─┐
       └─ none ─► AdmissionQueue ◄── serve ◄── sample, readiness ◄──────────────────┘

A request that does not fit lets smaller ones pass it ``MAX_OVERTAKEN`` times; then the pair
that lacks least for it is kept for it, and the others go on with the rest of the fleet. The queue's order
follows the fleet's state (regime.py); with an objective for the first token (slo.py) the late are refused.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError, RequestAborted
from pdserve.scheduling.deflection import make_deflection
from pdserve.scheduling.kv_room import ENDLESS, WorkerLimits
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.placement import Placement
from pdserve.scheduling.policy import Policy
from pdserve.scheduling.queue import (
    NOBODY,
    AdmissionQueue,
    Grant,
    PriorityOrder,
    QueueFull,
    QueueOrder,
    Waiter,
)
from pdserve.scheduling.regime import RegimeMonitor
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.slo import make_objective
from pdserve.scheduling.work import CompletionRate, WorkEstimate
from pdserve.scheduling.workers import PairKey, WorkerSlots
from pdserve.types import InstanceId, RequestShape

MAX_OVERTAKEN = 16
"""Requests that may be served before an earlier one that needs more room than there is. A pair kept
too early stands half empty; too late and a burst of small requests keeps a large one waiting."""

OBSERVE_S = 0.25
"""Rates and loads are observed at most this often: they change with samples, not between."""

Explain = Callable[[frozenset[PairKey], RequestShape], str]


class Admission:
    """Hands out reservations and takes them back.

    Args:
        explain: why no pair can be had, for the client.
        clock: seconds that never go back; a simulator brings its own.
    """

    def __init__(
        self,
        config: BalancerConfig,
        table: LoadTable,
        policy: Policy,
        explain: Explain,
        clock: Callable[[], float],
    ) -> None:
        self.regime = RegimeMonitor(config.slo_ttft_s, config.slo_tpot_s)
        self.queue = AdmissionQueue(config.queue_size, QueueOrder(config.queue_order, config.queue_timeout_s))
        self.work = WorkEstimate()
        self.shed: Counter[str] = Counter()
        self.completions = CompletionRate()
        self._config = config
        self._objective = make_objective(config.slo_ttft_s, self.work, clock)
        self.placement = Placement(table, policy, self._limits(), clock, predicts=config.predict_lengths)
        self.deflection = make_deflection(config, self.placement, self.work, clock)
        self._max_open = config.max_concurrent_requests or ENDLESS
        self._clock = clock
        self._explain = explain
        self._favoured: Waiter | None = None
        self._observed_s = float("-inf")
        self._is_stopping = False

    # -- getting a pair ----------------------------------------------------------------------

    def try_now(self, shape: RequestShape, exclude: frozenset[PairKey] = frozenset()) -> Reservation | None:
        """A pair at once, without waiting; None if others wait already or there is no room. What is resumed
        asks for room only: it had its place before.

        ``exclude``: (prefill, decode) instance ids that the request must not get again.
        """
        if shape.is_resumed and not self._is_stopping:
            return self._place(shape, exclude)
        if self._is_stopping or self.placement.num_open >= self._max_open:
            return None
        if self.deflection is not None:
            pair_s = self.deflection.pair_s(shape, self.queue)
            if (reservation := self.deflection.place(shape, exclude, pair_s=pair_s)) is not None:
                return reservation
        if self.queue:
            return None
        if self._objective.is_late(shape, self.placement):
            return None
        return self._place(shape, exclude)

    async def wait(self, shape: RequestShape, exclude: frozenset[PairKey], timeout_s: float) -> Reservation:
        """Wait in the queue for a pair.

        Raises:
            NoWorkerError: if the queue is full, the first token would be late, or no pair came in time.
            RequestAborted: after ``abort``.
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
            if future.done() and not future.cancelled() and future.exception() is None:
                # Served and cancelled in the same turn of the loop: nobody else would give it back.
                self.end(future.result(), prefill_ok=None, decode_ok=None)
                self.serve()
            raise
        finally:
            self.leave(waiter)

    def enqueue(self, shape: RequestShape, exclude: frozenset[PairKey], grant: Grant[Reservation]) -> Waiter:
        """Wait in the queue without awaiting: ``grant`` gets a pair or an error, at once or later.

        Call ``leave`` when the wait is over, however it ended.

        Raises:
            NoWorkerError: if the queue is full, or the first token would be late.
        """
        try:
            waiter = self._join(shape, exclude, grant)
        except NoWorkerError:
            reservation = None
            if self.deflection is not None and not self._is_stopping:
                reservation = self.deflection.place(shape, exclude)
            if reservation is None:
                raise
            grant.set_result(reservation)
            return Waiter(shape, exclude, self._clock(), grant, self.work.of(shape), reservation.tokens)
        self.serve()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Leave the queue, if still in it."""
        self.queue.leave(waiter)
        if waiter is self._favoured:
            self._favour(None)
            self.serve()

    def timed_out(self, waiter: Waiter, timeout_s: float) -> NoWorkerError:
        """The refusal of one that has waited long enough; counts it as shed."""
        why = self._explain(waiter.exclude, waiter.shape)
        return self._refusal("timeout", f"no pair within {timeout_s:g} s: {why}")

    def serve(self) -> None:
        """Give every waiter that can have one a pair, in order. The pair is held from here on."""
        if not self.queue:
            return
        self._shed_late()
        if self.deflection is not None and not self.placement.ready_pairs.prefills:
            self.deflection.serve(self.queue)
        placement, front = self.placement, None
        free, least = placement.most_free(), NOBODY
        for waiter in self.queue:
            if self._fits_nobody(free):
                return
            if waiter.grant.done():
                continue
            tokens, reservation = waiter.tokens, None
            if waiter is self._favoured or (tokens[0] <= free[0] and tokens[1] <= free[1]):
                reservation = self._place(waiter.shape, waiter.exclude, waiter)
            if reservation is None:
                if front is None and placement.ready_pairs.without(waiter.exclude).prefills:
                    front = waiter
                least = min(least[0], tokens[0]), min(least[1], tokens[1])
                continue
            self.queue.leave(waiter)
            waiter.grant.set_result(reservation)
            if waiter is self._favoured:
                self._favour(None)
            if front is not None:
                self._overtaken(front)
            free = placement.most_free()
        self.queue.least_tokens = least

    def abort(self, shapes: Iterable[RequestShape]) -> None:
        """End the waits of these very requests with RequestAborted; the others of them do not wait."""
        doomed = set(map(id, shapes))
        for waiter in self.queue:
            if id(waiter.shape) in doomed and not waiter.grant.done():
                waiter.grant.set_exception(RequestAborted("aborted in the balancer's queue"))

    def stop(self) -> None:
        """End every wait; no request gets a pair any more."""
        self._is_stopping = True
        self.shed["stopping"] += len(self.queue)
        self.queue.dismiss(lambda: NoWorkerError("the balancer is stopping"))

    # -- what may make room --------------------------------------------------------------------

    def set_ready_pairs(self, keys: Iterable[PairKey]) -> None:
        """Only these pairs take traffic from now on."""
        self._favour(None)
        self.placement.set_ready_pairs(keys)
        self._capacity_changed()
        self._observe(self._clock())
        self.serve()

    def sampled(self, worker: WorkerSlots) -> None:
        """A load sample of that worker was recorded."""
        now_s = self._clock()
        self.completions.mark(now_s)
        if now_s - self._observed_s >= OBSERVE_S:
            self._observe(now_s)
        if self.placement.sampled(worker):
            self._capacity_changed()
        if self.queue:
            self.serve()

    def prefill_finished(self, reservation: Reservation) -> None:
        """The prefill server has answered: its part of the load is over, decode goes on. Idempotent.

        Optional, but without it a long answer counts as prefill work until it ends.
        """
        if reservation.is_open and reservation.is_prefilling:
            self._end_prefill(reservation, is_whole=True)
            if self.queue:
                self.serve()

    def end(self, reservation: Reservation, *, prefill_ok: bool | None, decode_ok: bool | None) -> None:
        """Both legs are over, once. True: a leg ended well; False: it failed; None: not known.

        Follow with ``serve`` once the fleet's health knows the results: a request that waits must not
        get a worker that has just failed.
        """
        self.completions.total += 1
        if reservation.is_prefilling:
            self._end_prefill(reservation, is_whole=bool(prefill_ok))
        self.placement.end_decode(reservation, is_whole=bool(decode_ok))

    def _end_prefill(self, reservation: Reservation, *, is_whole: bool) -> None:
        if self.deflection is not None and reservation.is_alone:
            self.deflection.prefilled(reservation, is_whole=is_whole)
        self._objective.prefill_ended(reservation, is_whole=is_whole)
        self.placement.end_prefill(reservation, is_whole=is_whole)

    def _place(
        self, shape: RequestShape, exclude: frozenset[PairKey], waiter: Waiter | None = None
    ) -> Reservation | None:
        reservation = self.placement.place(shape, exclude, waiter)
        if reservation is not None:
            self._objective.sent(reservation, shape)
        return reservation

    def set_alone(self, instance_ids: Iterable[InstanceId]) -> None:
        """These decode workers take traffic and prefill requests themselves where they are told to."""
        if self.deflection is not None:
            self.deflection.set_workers(instance_ids)
            self.serve()

    def set_priorities(self, priorities: PriorityOrder) -> None:
        """Which priorities go first from now on, of those that wait already too."""
        if priorities != self.queue.priorities:
            self.queue.priorities = priorities
            self.queue.reorder()

    # -- the fleet's state -------------------------------------------------------------------

    def _capacity_changed(self) -> None:
        self.queue.measure(self.placement.tokens_needed)

    def _observe(self, now_s: float) -> None:
        self._observed_s = now_s
        views = self.placement.ready_pairs.candidates
        self.work.refresh(views.prefills, views.decodes)
        before = self.regime.regime
        after = self.regime.observe(views.prefills, views.decodes, len(self.queue), now_s)
        if after is not before and self.queue.order.follow(after):
            self.queue.reorder()
            self.placement.limit(self._limits())
            self._capacity_changed()

    def _limits(self) -> WorkerLimits:
        config, is_ordered = self._config, self.queue.order.is_shortest
        longest_s = self._objective.queue_s(config.prefill_queue_s, is_ordered=is_ordered)
        self.regime.longest_queue_s = longest_s
        return WorkerLimits(longest_s, config.slo_tpot_s)

    # -- the queue ---------------------------------------------------------------------------

    def _shed_late(self) -> None:
        for waiter in self._objective.late_waiters(self.queue, self.placement):
            self.queue.leave(waiter)
            if self.deflection is None or not self.deflection.take(waiter):
                waiter.grant.set_exception(self._too_late(waiter))
            if waiter is self._favoured:
                self._favour(None)

    def _too_late(self, waiter: Waiter) -> NoWorkerError:
        why = self._explain(waiter.exclude, waiter.shape)
        return self._refusal("slo", f"no first token within {self._objective.slo_s:g} s: {why}")

    def _join(self, shape: RequestShape, exclude: frozenset[PairKey], grant: Grant[Reservation]) -> Waiter:
        if self._is_stopping:
            raise NoWorkerError(self._explain(exclude, shape))
        now_s, work, objective = self._clock(), self.work.of(shape), self._objective
        tokens = self.placement.tokens_needed(shape)
        due_s, is_hopeless = math.inf, False
        if not shape.is_resumed:  # its client has had the first token
            due_s, is_hopeless = objective.due_s(now_s, work), objective.is_hopeless(work)
        waiter = Waiter(shape, exclude, now_s, grant, work, tokens, due_s, is_hopeless)
        if objective.is_late_behind(waiter, self.queue, self.placement):
            raise self._too_late(waiter)
        try:
            displaced = self.queue.join(waiter)
        except QueueFull:
            why = f"{len(self.queue)} requests wait already: {self._explain(exclude, shape)}"
            raise self._refusal("queue_full", why) from None
        if displaced is not None:
            why = self._explain(displaced.exclude, displaced.shape)
            why = f"{len(self.queue)} requests of no less priority wait: {why}"
            displaced.grant.set_exception(self._refusal("displaced", why))
        return waiter

    def _refusal(self, reason: str, message: str) -> NoWorkerError:
        self.shed[reason] += 1
        retry_after_s = self.completions.retry_after_s(len(self.queue) + 1, self._clock())
        return NoWorkerError(message, retry_after_s)

    def _fits_nobody(self, free: tuple[int, int]) -> bool:
        if self.placement.num_open >= self._max_open:
            return True
        least = self.queue.least_tokens
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
