"""One latency over time: exact counts since the start, percentiles of the last five minutes. Pure.

    observe ─► live step (5 s) ─ close ─► last 60 steps ─► window
                                   └────► totals since the start (Prometheus)

All counts use one fixed row of bounds: a logarithmic grid, for percentiles, and every bound of
the Prometheus histograms, so that these are exact sums of the fine counts. Memory is fixed. An
observation costs one bisection and two additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

STEP_S = 5.0
NUM_STEPS = 60
"""Steps remembered: five minutes."""
SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035,
    0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30,
    40, 60, 80, 100, 200, 300, 400, 600, 1200, 1800, 2400,
)  # fmt: skip
"""All bounds that a Prometheus histogram here may use."""
GROWTH = 1.06
"""A percentile lies in a bucket this wide: it is off by less than 6 %, and by half of that as a rule."""
LEAST_S, MOST_S = 1e-5, 4000.0


def _bounds() -> tuple[float, ...]:
    grid, bound_s = set(map(float, SECONDS)), LEAST_S
    while bound_s < MOST_S:
        grid.add(bound_s)
        bound_s *= GROWTH
    return tuple(sorted(grid))


BOUNDS = _bounds()
"""Upper bounds of the fine buckets, inclusive; one more bucket holds what lies beyond."""
NUM_BUCKETS = len(BOUNDS) + 1
_ZEROS = [0.0] * (NUM_BUCKETS + 1)
_Step = tuple[tuple[tuple[int, float], ...], float]
"""A closed step: its buckets that are not empty, and the sum of its seconds."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Figures of a window; all but ``count`` None where nothing was observed."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None


class LatencyWindow:
    """Observations of one kind. ``close_step`` every ``STEP_S``; the owner keeps the time.

    ``live`` has a count for each bucket and the sum of the seconds last. It is the same list for
    ever, so a hot path may hold on to it.
    """

    __slots__ = ("_past", "_steps", "_window", "live")

    def __init__(self) -> None:
        self.live = list(_ZEROS)
        self._past = list(_ZEROS)  # since the start, but for the live step
        self._window = list(_ZEROS)  # the closed steps that are remembered
        self._steps: deque[_Step] = deque()

    def observe(self, seconds: float, number: int = 1) -> None:
        """Count one, or ``number`` that took as long."""
        live = self.live
        live[bisect_left(BOUNDS, seconds)] += number
        live[-1] += seconds * number

    def close_step(self) -> Latency:
        """Put the live step away; its figures."""
        live, past, window = self.live, self._past, self._window
        filled = tuple((index, count) for index, count in enumerate(live[:-1]) if count)
        closed = _latency(live)
        for index, count in filled:
            past[index] += count
            window[index] += count
        past[-1] += live[-1]
        window[-1] += live[-1]
        self._steps.append((filled, live[-1]))
        live[:] = _ZEROS
        if len(self._steps) > NUM_STEPS:
            self._forget_step()
        return closed

    def recent(self) -> Latency:
        """Of the remembered steps and the live one."""
        if not self._steps:
            return _latency(self.live)
        return _latency(list(map(add, self._window, self.live)))

    def totals(self, bounds: Sequence[float]) -> tuple[list[int], float]:
        """Counts up to each of ``bounds`` (of ``SECONDS``) and of all since the start; sum of all seconds."""
        whole = [past + live for past, live in zip(self._past, self.live, strict=True)]
        up_to = list(accumulate(whole[:-1]))
        counts = [round(up_to[bisect_left(BOUNDS, bound)]) for bound in bounds]
        return [*counts, round(up_to[-1])], whole[-1]

    def _forget_step(self) -> None:
        filled, seconds = self._steps.popleft()
        for index, count in filled:
            self._window[index] -= count
        self._window[-1] = self._window[-1] - seconds if any(step[0] for step in self._steps) else 0.0


def _latency(counts: Sequence[float]) -> Latency:
    if not any(counts):  # as most steps are; quicker than adding them up
        return Latency()
    up_to = list(accumulate(counts[:-1]))
    number = round(up_to[-1])
    if not number:
        return Latency()
    p50, p95, p99 = (_quantile(up_to, share * number) for share in (0.5, 0.95, 0.99))
    return Latency(number, p50, p95, p99, max(0.0, counts[-1] / number))


def _quantile(up_to: Sequence[float], rank: float) -> float:
    """Where the observation of that rank lies, evenly spread within its bucket."""
    index = bisect_left(up_to, rank)
    if index >= len(BOUNDS):
        return BOUNDS[-1]
    before = up_to[index - 1] if index else 0.0
    low = BOUNDS[index - 1] if index else 0.0
    return low + (BOUNDS[index] - low) * (rank - before) / (up_to[index] - before)
