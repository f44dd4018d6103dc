"""The bounded queue of requests that wait for a pair: by priority, then by arrival or by least work. Answers
that are to be resumed go before all others.

A waiter's place is fixed when it joins, so the queue is sorted by insertion; it is sorted again only
when the order itself changes.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from pdserve.scheduling.regime import Regime
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.work import Work
from pdserve.scheduling.workers import PairKey
from pdserve.types import RequestShape, WorkerInfo

FCFS, SHORTEST, AUTO = "fcfs", "shortest", "auto"
AGING = 8.0
"""A request lets shorter ones pass that arrive within so many times its own work. At load ρ these bring at
most ρ · 8 times its work, so that it is slowed down by no more than that beyond fcfs; with a smaller
factor the short ones gain little, as a queue under overload is longer than any one request's work."""


class QueueOrder:
    """The order that holds now. ``auto``: shortest while the fleet is short of something, else fcfs.

    Args:
        mode: ``fcfs``, ``shortest`` or ``auto``.
        patience_s: the longest wait anybody is granted.
    """

    def __init__(self, mode: str, patience_s: float) -> None:
        self.is_shortest = mode == SHORTEST
        self._is_auto = mode == AUTO
        self._most_s = patience_s / 2

    def follow(self, regime: Regime) -> bool:
        """The fleet's state changed; True if with it the order did."""
        before = self.is_shortest
        if self._is_auto:
            self.is_shortest = regime is not Regime.NORMAL
        return self.is_shortest is not before

    def key(self, since_s: float, work_s: float, *, is_hopeless: bool) -> float:
        """Smaller goes first. ``is_hopeless``: it misses its objective even on an idle fleet, so that it
        makes way, for as long as anybody must, for those that can meet theirs."""
        if is_hopeless:
            return since_s + self._most_s
        if self.is_shortest:
            return since_s + min(AGING * work_s, self._most_s)
        return since_s


class PriorityOrder(msgspec.Struct, frozen=True):
    """Which priorities go first: as SGLang's schedulers order their own queues.

    ``default`` is that of requests without one; None: they come last either way.
    """

    is_low_first: bool = False
    default: int | None = None

    @classmethod
    def of(cls, workers: Iterable[WorkerInfo]) -> PriorityOrder:
        """What the workers are set to; where they differ, SGLang's own defaults: high first, none last."""
        orders = {
            cls(worker.low_priority_first, worker.default_priority)
            for worker in workers
            if worker.low_priority_first is not None
        }
        return orders.pop() if len(orders) == 1 else cls()

    def rank(self, priority: int | None) -> float:
        """Smaller goes first."""
        value = self.default if priority is None else priority
        if value is None:
            return math.inf
        return value if self.is_low_first else -value


_T = TypeVar("_T", contravariant=True)


class Grant(Protocol[_T]):
    """Receives the outcome of a wait. An ``asyncio.Future`` is one; the simulator has its own."""

    def done(self) -> bool:
        """True once it has an outcome, or nobody waits for it any more."""
        ...

    def set_result(self, result: _T, /) -> None:
        """The request has a pair."""
        ...

    def set_exception(self, exception: Exception, /) -> None:
        """The request is refused."""
        ...


NOBODY = (2**62, 2**62)
"""``least_tokens`` of an empty queue."""


class QueueFull(Exception):
    """The queue is full, and nobody in it has less priority."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One waiting request.

    ``number`` counts those that ever joined; ``tokens`` is the KV that must be free on prefill and decode.
    ``due_s`` is when it must be sent at the latest to get its first token in time (slo.py), infinite if it
    need not or cannot. ``num_overtaken`` counts how many behind it were served while it did not fit.
    """

    shape: RequestShape
    exclude: frozenset[PairKey]
    since_s: float
    grant: Grant[Reservation] = field(repr=False)
    work: Work
    tokens: tuple[int, int]
    due_s: float = math.inf
    is_hopeless: bool = False
    number: int = 0
    place: tuple[float, float, int] = (0.0, 0.0, 0)
    num_overtaken: int = 0


def _place(waiter: Waiter) -> tuple[float, float, int]:
    return waiter.place


class AdmissionQueue:
    """Waiters in order; Admission decides who is served.

    ``least_tokens``: no waiter needs less KV, on prefill and on decode. It may be too low once a waiter
    has left; ``measure`` sets it right.
    """

    def __init__(self, size: int, order: QueueOrder) -> None:
        self.size = size
        self.order = order
        self.priorities = PriorityOrder()
        self.least_tokens = NOBODY
        self._waiters: list[Waiter] = []
        self._num_joined = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """In order, as the queue was when the iteration began."""
        return iter(self._waiters.copy())

    @property
    def oldest_s(self) -> float | None:
        """When the one that has waited longest joined; None if nobody waits."""
        return min((waiter.since_s for waiter in self._waiters), default=None)

    def join(self, waiter: Waiter) -> Waiter | None:
        """Take a place; returns the waiter of less priority that lost its place to this one, if any.

        Raises:
            QueueFull: if there is no place.
        """
        self._num_joined += 1
        waiter.number = self._num_joined
        self._put(waiter)
        displaced = None
        if len(self._waiters) >= self.size:
            if not self._waiters or self._waiters[-1].place[0] <= waiter.place[0]:
                raise QueueFull
            displaced = self._waiters.pop()
        insort(self._waiters, waiter, key=_place)
        self._lower(waiter.tokens)
        return displaced

    def measure(self, tokens_of: Callable[[RequestShape], tuple[int, int]]) -> None:
        """What requests need has changed: ask ``tokens_of`` again for each waiter."""
        self.least_tokens = NOBODY
        for waiter in self._waiters:
            waiter.tokens = tokens_of(waiter.shape)
            self._lower(waiter.tokens)

    def _lower(self, tokens: tuple[int, int]) -> None:
        least = self.least_tokens
        self.least_tokens = min(least[0], tokens[0]), min(least[1], tokens[1])

    def reorder(self) -> None:
        """The order has changed: give every waiter its place by the new one."""
        for waiter in self._waiters:
            self._put(waiter)
        self._waiters.sort(key=_place)

    def ahead_s(self, waiter: Waiter) -> float:
        """Prefill seconds of those who would be before ``waiter`` if it joined now."""
        waiter.number = self._num_joined + 1
        self._put(waiter)
        end = bisect_left(self._waiters, waiter.place, key=_place)
        return sum(each.work.prefill_s for each in self._waiters[:end])

    def _put(self, waiter: Waiter) -> None:
        key = self.order.key(waiter.since_s, waiter.work.total_s, is_hopeless=waiter.is_hopeless)
        rank = -math.inf if waiter.shape.is_resumed else self.priorities.rank(waiter.shape.priority)
        waiter.place = rank, key, waiter.number

    def leave(self, waiter: Waiter) -> None:
        """Give up the place; nothing happens if that was done before."""
        index = bisect_left(self._waiters, waiter.place, key=_place)
        if index < len(self._waiters) and self._waiters[index] is waiter:
            del self._waiters[index]

    def dismiss(self, make_error: Callable[[], Exception]) -> None:
        """End every wait with an error."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.grant.done():
                waiter.grant.set_exception(make_error())
