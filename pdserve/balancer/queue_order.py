"""Who goes first among requests of equal priority: arrival, or least expected work with aging. Pure.

    fcfs:     key = arrival
    shortest: key = arrival + min(AGING · expected work, half of the longest wait)

Keys do not change while a request waits, so the line stays sorted by insertion. Nobody starves: a
request with key offset ``d`` is passed only by those that arrive less than ``d`` after it, and ``d`` is at
most half of ``queue_timeout_s``: for the second half of its patience it only moves up.
"""

from __future__ import annotations

from pdserve.balancer.regime import Regime

FCFS, SHORTEST, AUTO = "fcfs", "shortest", "auto"
AGING = 8.0
"""A request lets shorter ones pass that arrive within so many times its own work. At load ρ these bring at
most ρ · 8 times its work, so that it is slowed down by no more than that beyond fcfs; with a smaller
factor the short ones gain little, as a line under overload is longer than any one request's work."""


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
