"""Which requests can still get their first token in time, where that is asked for (``slo_ttft_s``). Pure.

    arrival ├── wait in our line ──┬── queue on P ──┬── own prefill ──┬── overhead ──┤ first token
                                   └ due_s: sent to an idle server by then, it still makes it

What cannot is refused at once, so that it costs those that can nothing. A request too long to make it
even on an idle fleet is hopeless, not late: it is never shed for that, waits behind those that can make
it (scheduling/queue.py), and is served as far as there is room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pdserve.scheduling.queue import Waiter

LOOK_S = 0.05
"""The line is looked through for late ones at most this often."""
QUEUE_SHARE = 0.25
"""Part of the objective that a prefill server's own queue may take: what is in it can no longer be put in
order or refused. Little, for the rest must do for the wait here, the prefill itself and the KV's way."""
MIN_QUEUE_S = 0.2
"""A shorter queue runs dry before our next request arrives: the end of a leg, HTTP, tokenizing and the
bootstrap handshake lie between, some tens of milliseconds each, and a prefill batch is often as long."""
DOUBT_SHARE = 0.05
"""Part of the objective by which one may seem late and is served yet: what is expected errs both ways. In
simulation on the Azure traces 5 % lost least, 20 % served too many in vain."""
ORDERED_QUEUE_S = 1.0
"""The same where there is no objective but an order of ours: five times MIN_QUEUE_S, as throughput counts."""


def prefill_queue_s(longest_s: float, slo_ttft_s: float, *, is_ordered: bool) -> float:
    """How long prefill servers' queues may get: ``longest_s`` unless what waits there should wait with us."""
    if slo_ttft_s > 0:
        return min(longest_s, max(MIN_QUEUE_S, QUEUE_SHARE * slo_ttft_s))
    return min(longest_s, ORDERED_QUEUE_S) if is_ordered else longest_s


class FirstTokenGate:
    """Tells late requests from others; lets all pass while ``slo_s`` is 0."""

    def __init__(self, slo_s: float) -> None:
        self.slo_s = slo_s
        self._look_s = -math.inf

    def is_hopeless(self, prefill_s: float, overhead_s: float) -> bool:
        """True if a request of that work is late even on an idle fleet."""
        return self.slo_s > 0 and prefill_s + overhead_s > self.slo_s

    def due_s(self, since_s: float, prefill_s: float, overhead_s: float) -> float:
        """When one that has come at ``since_s`` must be sent at the latest; infinite if that is no matter."""
        spare_s = self.slo_s - overhead_s - prefill_s
        return since_s + spare_s + DOUBT_SHARE * self.slo_s if self.slo_s > 0 and spare_s >= 0 else math.inf

    def looks(self, now_s: float) -> bool:
        """True if the line is to be looked through now."""
        if self.slo_s <= 0 or now_s < self._look_s:
            return False
        self._look_s = now_s + LOOK_S
        return True


def late_ones(line: Iterable[Waiter], num_prefills: int, queue_s: float, now_s: float) -> list[Waiter]:
    """Those in the line that will not be sent in time, if their turn comes after the shortest prefill
    queue and those before them."""
    late: list[Waiter] = []
    sent_s = now_s + queue_s
    for waiter in line:
        if waiter.grant.done():
            continue
        if sent_s > waiter.due_s:
            late.append(waiter)
        else:
            sent_s += waiter.work.prefill_s / num_prefills
    return late
