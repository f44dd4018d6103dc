"""Deflection: whether a decode worker should prefill a request itself, with no prefill worker at all.

    by a pair   line + shortest queue on P + own prefill + overhead  ≤ TTFT     decode step ≤ TPOT
    alone       (prompts before it on D + its own) · seconds a token ≤ TTFT     step + chunk ≤ TPOT

On each side time over limit is added up for both limits; a side that takes more than BETA of the TTFT does
not count. The lesser sum wins, so prefill work moves while decode has time per token to spare. What a decode
worker has still to prefill is known from its last sample and what was sent since; each of its passes is
taken to last as long as its budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdserve.config.balancer import DEFLECT_AUTO, BalancerConfig
from pdserve.scheduling.placement import Placement
from pdserve.scheduling.policy import Reason, WorkerView
from pdserve.scheduling.queue import AdmissionQueue, Waiter
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.work import WorkEstimate
from pdserve.scheduling.workers import PairKey, WorkerSlots
from pdserve.types import InstanceId, RequestShape

BETA = 0.9
"""Share of either limit that is planned with: estimates err, and passes are not exact."""
ARRIVAL_S = 0.02
"""What was sent so shortly before a sample is not in it (load_sample.py)."""
KEEP = 0.95
"""Weight of what was known before the latest request: a mean over the last twenty."""
MOST_FACTOR = 4.0
DEFAULT_TPOT_S = 0.1
"""Where no limit is set; requests are then deflected only while no pair takes any."""
LEAST_TOKENS = 64
"""Of a chunk beside running requests, see plugin/local_prefill/queue.py."""


@dataclass(slots=True)
class _Leg:
    tokens: int
    sent_s: float
    expected_s: float


class Deflection:
    """Decides for each request and knows what it sent to which decode worker.

    ``workers``: decode workers that prefill by themselves and take traffic. ``factor``: how much longer first
    tokens took than told. Without limits (0) a request goes alone only while no pair takes any.
    """

    def __init__(
        self,
        slo_ttft_s: float,
        slo_tpot_s: float,
        placement: Placement,
        work: WorkEstimate,
        clock: Callable[[], float],
    ) -> None:
        self.workers: tuple[WorkerSlots, ...] = ()
        self.factor = 1.0
        self._placement = placement
        self._work = work
        self._clock = clock
        self._ttft_s, self._tpot_s = slo_ttft_s or math.inf, slo_tpot_s or DEFAULT_TPOT_S
        self._legs: dict[InstanceId, dict[int, _Leg]] = {}

    @property
    def budget_s(self) -> float:
        """The longest pass that a decode worker may make of chunk and decode step."""
        return BETA * self._tpot_s

    def set_workers(self, instance_ids: Iterable[InstanceId]) -> None:
        """Only these decode workers are given requests from now on."""
        self.workers = self._placement.workers(instance_ids)
        known = {slots.instance_id for slots in self.workers}
        self._legs = {key: legs for key, legs in self._legs.items() if legs or key in known}

    # -- decisions -----------------------------------------------------------------------------

    def place(
        self,
        shape: RequestShape,
        exclude: frozenset[PairKey],
        *,
        pair_s: float = math.inf,
        waited_s: float = 0.0,
    ) -> Reservation | None:
        """Hold a decode worker for all of the request, if that is better than a pair; else None.

        Args:
            exclude: what the request must not get again; a worker alone is a pair with itself.
            pair_s: seconds until the first token over a pair; infinite if there is none.
            waited_s: seconds since the request came.
        """
        if not self.workers or shape.needs_prefill_worker or shape.is_resumed:
            return None
        best, latest_s, first_s = None, BETA * self._ttft_s - waited_s, 0.0
        least = self._pressure_of_pair(pair_s) if pair_s <= latest_s else math.inf
        for slots in self.workers:
            alone_s, pass_s = self.times_s(shape, slots.view)
            pressure = alone_s / self._ttft_s + pass_s / self._tpot_s
            if alone_s > latest_s or pressure >= least:
                continue
            is_barred = (slots.instance_id, slots.instance_id) in exclude
            if not (is_barred or self._placement.lacks_room(slots, shape)):
                best, least, first_s = slots, pressure, alone_s
        if best is None:
            return None
        why = Reason("alone {:.3f}s, a pair {:.3f}s", first_s, pair_s)
        reservation = self._placement.hold_alone(shape, best, why)
        leg = _Leg(shape.prompt_tokens, self._clock(), first_s)
        self._legs.setdefault(best.instance_id, {})[reservation.legs[1]] = leg
        return reservation

    def take(self, waiter: Waiter) -> bool:
        """Serve a waiting request alone if it can still be in time; its grant has the reservation then."""
        waited_s = self._clock() - waiter.since_s
        reservation = self.place(waiter.shape, waiter.exclude, waited_s=waited_s)
        if reservation is not None:
            waiter.grant.set_result(reservation)
        return reservation is not None

    def serve(self, queue: AdmissionQueue) -> None:
        """No pair takes traffic: serve those that wait."""
        for waiter in queue if self.workers else ():
            if not waiter.grant.done() and self.take(waiter):
                queue.leave(waiter)

    def prefilled(self, reservation: Reservation, *, is_whole: bool) -> None:
        """A first token is there, or the request has ended without (not ``is_whole``). Idempotent."""
        legs = self._legs.get(reservation.key[1])
        sent = legs.pop(reservation.legs[1], None) if legs else None
        if sent is not None and is_whole and sent.expected_s > 0.0:
            seen = self.factor * (self._clock() - sent.sent_s) / sent.expected_s
            self.factor = self.factor * KEEP + min(MOST_FACTOR, max(1 / MOST_FACTOR, seen)) * (1 - KEEP)

    # -- estimates -----------------------------------------------------------------------------

    def pair_s(self, shape: RequestShape, queue: AdmissionQueue) -> float:
        """Seconds until the first token over a pair, if the request comes now; infinite without pairs."""
        num_prefills, work = len(self._placement.ready_pairs.prefills), self._work
        if not num_prefills:
            return math.inf
        line_s = sum(waiter.work.prefill_s for waiter in queue) / num_prefills if queue else 0.0
        return self._placement.least_queue_s() + line_s + work.prefill_s(shape) + work.overhead_s

    def _pressure_of_pair(self, pair_s: float) -> float:
        decodes = self._placement.ready_pairs.decodes
        if pair_s == math.inf or not decodes:
            return math.inf
        return pair_s / self._ttft_s + min(_step_s(slots.view) for slots in decodes) / self._tpot_s

    def times_s(self, shape: RequestShape, view: WorkerView) -> tuple[float, float]:
        """Seconds until the first token if the request is sent there now, and of a pass meanwhile."""
        step_s, token_s = _step_s(view), self._work.prefill_token_s
        tokens = self.waiting_tokens(view) + shape.prompt_tokens
        if not view.num_reqs:
            return self.factor * tokens * token_s, step_s
        chunk = self._chunk_tokens(view)
        pass_s = step_s + min(chunk, tokens) * token_s
        return self.factor * (tokens / chunk + 0.5) * pass_s, pass_s

    def waiting_tokens(self, view: WorkerView) -> float:
        """Prompt tokens that the worker has still to compute by itself."""
        legs = self._legs.get(view.info.instance_id)
        sampled_s, told = -math.inf, 0.0
        if view.load is not None:
            sampled_s = view.load.timestamp_s
            passes = (self._clock() - sampled_s) / max(self.budget_s, 1e-6)
            told = max(0.0, view.load.num_waiting_uncached_tokens - passes * self._chunk_tokens(view))
        if not legs:
            return told
        return told + sum(leg.tokens for leg in legs.values() if leg.sent_s >= sampled_s - ARRIVAL_S)

    def _chunk_tokens(self, view: WorkerView) -> float:
        return max(LEAST_TOKENS, (self.budget_s - _step_s(view)) / self._work.prefill_token_s)


def make_deflection(
    config: BalancerConfig, placement: Placement, work: WorkEstimate, clock: Callable[[], float]
) -> Deflection | None:
    """What ``config.deflect`` asks for; None if every request needs a pair."""
    if config.deflect != DEFLECT_AUTO:
        return None
    return Deflection(config.slo_ttft_s, config.slo_tpot_s, placement, work, clock)


def _step_s(view: WorkerView) -> float:
    """Of a decode step with one request more."""
    return view.step_base_s + view.step_slope_s * (view.num_reqs + 1) / view.info.dp_size
