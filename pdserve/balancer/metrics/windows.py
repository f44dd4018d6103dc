"""Latencies and rates over time: exact counts since the start, percentiles of five minutes. Pure.

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

import msgspec

from pdserve.state.document import Latencies, Latency, Rates, Series

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


class LatencyWindow:
    """Observations of one kind. ``close_step`` every ``STEP_S``; the owner keeps the time.

    Each list has a count for each bucket and the sum of the seconds last.
    """

    __slots__ = ("_live", "_past", "_steps", "_window")

    def __init__(self) -> None:
        self._live = list(_ZEROS)
        self._past = list(_ZEROS)  # since the start, but for the live step
        self._window = list(_ZEROS)  # the closed steps that are remembered
        self._steps: deque[_Step] = deque()

    def observe(self, seconds: float, number: int = 1) -> None:
        """Count one, or ``number`` that took as long."""
        live = self._live
        live[bisect_left(BOUNDS, seconds)] += number
        live[-1] += seconds * number

    def close_step(self) -> Latency:
        """Put the live step away; its figures."""
        live, past, window = self._live, self._past, self._window
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
            return _latency(self._live)
        return _latency(list(map(add, self._window, self._live)))

    def totals(self, bounds: Sequence[float]) -> tuple[list[int], float]:
        """Counts up to each of ``bounds`` (of ``SECONDS``) and of all since the start; sum of all seconds."""
        whole = [past + live for past, live in zip(self._past, self._live, strict=True)]
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
    mean = max(0.0, counts[-1] / number)
    return Latency(count=number, p50=p50, p95=p95, p99=p99, mean=mean)


def _quantile(up_to: Sequence[float], rank: float) -> float:
    """Where the observation of that rank lies, evenly spread within its bucket."""
    index = bisect_left(up_to, rank)
    if index >= len(BOUNDS):
        return BOUNDS[-1]
    before = up_to[index - 1] if index else 0.0
    low = BOUNDS[index - 1] if index else 0.0
    return low + (BOUNDS[index] - low) * (rank - before) / (up_to[index] - before)


RATE_STEPS = 12
"""Rates are those of the last minute: the live step and the eleven before."""
NAMES = (
    "ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s", "prefill_s", "transfer_s", "resume_gap_s", "move_gap_s",
)  # fmt: skip
"""The latencies, as the state document calls them."""


class Amounts(msgspec.Struct):
    """What is counted in one step."""

    requests: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A closed step; latencies are None where nothing was observed."""

    number: int
    amounts: Amounts
    ttft: Latency
    tpot: Latency
    itl: Latency


class RollingWindow:
    """Counts and latencies of requests. Add to ``live``, observe latencies, ``advance`` the clock.

    ``end_s`` is when the live step ends.
    """

    def __init__(self, now_s: float) -> None:
        self.live = Amounts()
        self.latencies = {name: LatencyWindow() for name in NAMES}
        self._started_s = now_s
        self._number = step_of(now_s)
        self._steps: deque[Step] = deque(maxlen=NUM_STEPS)
        self.end_s = (self._number + 1) * STEP_S

    def advance(self, now_s: float) -> None:
        """Close the steps that are over by ``now_s``."""
        number = step_of(now_s)
        if number <= self._number:
            return
        # Nothing is left of what lies further back than is remembered.
        first = max(self._number, number - NUM_STEPS - 1)
        for closing in range(first, number):
            self._close(closing)
        self._number, self.end_s = number, (number + 1) * STEP_S

    def rates(self, now_s: float) -> Rates:
        """Per second, over the last minute or the time since the start if that is shorter."""
        self.advance(now_s)
        oldest = self._number - RATE_STEPS + 1
        rows = [step.amounts for step in self._steps if step.number >= oldest]
        rows.append(self.live)
        span_s = max(now_s - max(oldest * STEP_S, self._started_s), 1e-9)
        names = Amounts.__struct_fields__
        rates = {f"{name}_s": sum(getattr(row, name) for row in rows) / span_s for name in names}
        return Rates(window_s=RATE_STEPS * STEP_S, **rates)

    def latency(self, now_s: float) -> Latencies:
        """Percentiles of the last five minutes."""
        self.advance(now_s)
        figures = {name: window.recent() for name, window in self.latencies.items()}
        return msgspec.structs.replace(Latencies(window_s=NUM_STEPS * STEP_S), **figures)

    def series(self, now_s: float) -> Series:
        """Closed steps, oldest first; None where nothing happened."""
        self.advance(now_s)
        by_number = {step.number: step for step in self._steps}
        rows = [by_number.get(number) for number in step_numbers(now_s)]
        return Series(
            step_s=STEP_S,
            requests_s=[None if row is None else row.amounts.requests / STEP_S for row in rows],
            output_tokens_s=[None if row is None else row.amounts.output_tokens / STEP_S for row in rows],
            ttft_p50_s=[None if row is None else row.ttft.p50 for row in rows],
            ttft_p99_s=[None if row is None else row.ttft.p99 for row in rows],
            tpot_p50_s=[None if row is None else row.tpot.p50 for row in rows],
            itl_p50_s=[None if row is None else row.itl.p50 for row in rows],
        )

    def _close(self, number: int) -> None:
        closed = {name: window.close_step() for name, window in self.latencies.items()}
        step = Step(number, self.live, closed["ttft_s"], closed["tpot_s"], closed["itl_s"])
        self._steps.append(step)
        self.live = Amounts()


def step_of(now_s: float) -> int:
    """The number of the step that ``now_s`` lies in."""
    return int(now_s // STEP_S)


def step_numbers(now_s: float) -> range:
    """The numbers of the closed steps that series show, oldest first."""
    number = step_of(now_s)
    return range(number - NUM_STEPS, number)
