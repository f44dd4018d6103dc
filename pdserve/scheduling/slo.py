"""The objective for the time to the first token (``slo_ttft_s``): which requests can still meet it.

    arrival ├── wait in our queue ──┬── queue on P ──┬── own prefill ──┬── overhead ──┤ first token
                                    └ due_s: sent to an idle server by then, it is still in time

A request that will be late is refused at once, so that it costs the others nothing. A request too long to
be in time even on an idle fleet is hopeless, not late: it is never refused for that, waits behind those that
can be in time (scheduling/queue.py), and is served as far as there is room. Reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pdserve.scheduling.placement import Placement
from pdserve.scheduling.queue import AdmissionQueue, Waiter
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.work import Work, WorkEstimate, queue_s
from pdserve.types import RequestShape

LOOK_S = 0.05
"""The queue is searched for late requests at most this often."""
QUEUE_SHARE = 0.25
"""Part of the objective that a prefill server's own queue may take: what is in it can no longer be put in
order or refused. Little, for the rest must do for the wait here, the prefill itself and the KV transfer."""
MIN_QUEUE_S = 0.2
"""A shorter queue runs dry before our next request arrives: the end of a leg, HTTP, tokenizing and the
bootstrap handshake lie between, 30 to 80 ms each, and a prefill batch is often as long."""
DOUBT_SHARE = 0.05
"""Part of the objective by which a request may seem late and is still served: estimates err both ways. In
simulation on the Azure traces 5 % lost least, 20 % served too many in vain."""
ORDERED_QUEUE_S = 1.0
"""The same where there is no objective but an order of ours: five times MIN_QUEUE_S, as throughput counts."""


class NoObjective:
    """No time to the first token was asked for: every request is in time."""

    slo_s = 0.0
    """Seconds to the first token; 0: any."""

    def queue_s(self, longest_s: float, *, is_ordered: bool) -> float:
        """How long prefill servers' queues may get: ``longest_s``, or less if the rest should wait with us.

        ``is_ordered``: those who wait with us are not served in the order of their arrival.
        """
        return min(longest_s, ORDERED_QUEUE_S) if is_ordered else longest_s

    def due_s(self, since_s: float, work: Work) -> float:
        """When a request that came at ``since_s`` must be sent at the latest; infinite if at any time."""
        return math.inf

    def is_hopeless(self, work: Work) -> bool:
        """True if the request is late even on an idle fleet."""
        return False

    def is_late(self, shape: RequestShape, placement: Placement) -> bool:
        """True if a request that comes now will be late, though none waits before it."""
        return False

    def is_late_behind(self, waiter: Waiter, queue: AdmissionQueue, placement: Placement) -> bool:
        """True if ``waiter`` would be late if it joined the queue now."""
        return False

    def late_waiters(self, queue: AdmissionQueue, placement: Placement) -> list[Waiter]:
        """Those in the queue that will be late when their turn comes."""
        return []

    def sent(self, reservation: Reservation, shape: RequestShape) -> None:
        """A request was given a pair."""

    def prefill_ended(self, reservation: Reservation, *, is_whole: bool) -> None:
        """A prefill leg is over; ``is_whole``: it came to a normal end."""


class FirstTokenObjective(NoObjective):
    """The first token within ``slo_s`` seconds. ``work`` learns from each prefill leg what a leg takes."""

    def __init__(self, slo_s: float, work: WorkEstimate, clock: Callable[[], float]) -> None:
        self.slo_s = slo_s
        self._work = work
        self._clock = clock
        self._look_s = -math.inf

    def queue_s(self, longest_s: float, *, is_ordered: bool) -> float:
        """A share of the objective, whatever the order."""
        return min(longest_s, max(MIN_QUEUE_S, QUEUE_SHARE * self.slo_s))

    def due_s(self, since_s: float, work: Work) -> float:
        """Infinite for a hopeless request."""
        spare_s = self.slo_s - self._work.overhead_s - work.prefill_s
        return since_s + spare_s + DOUBT_SHARE * self.slo_s if spare_s >= 0 else math.inf

    def is_hopeless(self, work: Work) -> bool:
        """True if prefill and overhead alone take longer than the objective."""
        return work.prefill_s + self._work.overhead_s > self.slo_s

    def is_late(self, shape: RequestShape, placement: Placement) -> bool:
        """Counts the shortest prefill queue."""
        now_s = self._clock()
        return self._is_late(now_s, self.due_s(now_s, self._work.of(shape)), 0.0, placement)

    def is_late_behind(self, waiter: Waiter, queue: AdmissionQueue, placement: Placement) -> bool:
        """Counts the shortest prefill queue and the prefills of those before it."""
        return self._is_late(waiter.since_s, waiter.due_s, queue.ahead_s(waiter), placement)

    def _is_late(self, now_s: float, due_s: float, ahead_s: float, placement: Placement) -> bool:
        num_prefills = len(placement.ready_pairs.prefills)
        if due_s == math.inf or not num_prefills:
            return False
        return now_s + placement.least_queue_s() + ahead_s / num_prefills > due_s

    def late_waiters(self, queue: AdmissionQueue, placement: Placement) -> list[Waiter]:
        """None while the queue was searched less than LOOK_S ago."""
        now_s, num_prefills = self._clock(), len(placement.ready_pairs.prefills)
        if not num_prefills or now_s < self._look_s:
            return []
        self._look_s = now_s + LOOK_S
        late: list[Waiter] = []
        sent_s = now_s + placement.least_queue_s()
        for waiter in queue:
            if waiter.grant.done():
                continue
            if sent_s > waiter.due_s:
                late.append(waiter)
            else:
                sent_s += waiter.work.prefill_s / num_prefills
        return late

    def sent(self, reservation: Reservation, shape: RequestShape) -> None:
        """Remember what the leg is expected to take."""
        expected_s = queue_s(reservation.slots.prefill.view)
        self._work.sent(
            reservation.legs[0], shape, reservation.choice.cached_tokens, expected_s, self._clock()
        )

    def prefill_ended(self, reservation: Reservation, *, is_whole: bool) -> None:
        """Learn what it took beyond that."""
        self._work.arrived(reservation.legs[0], self._clock(), is_whole=is_whole)


def make_objective(slo_s: float, work: WorkEstimate, clock: Callable[[], float]) -> NoObjective:
    """The objective of ``slo_s`` seconds; 0: none."""
    return FirstTokenObjective(slo_s, work, clock) if slo_s > 0 else NoObjective()
