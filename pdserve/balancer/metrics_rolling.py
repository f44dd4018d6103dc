"""What happened to requests lately: rates of the last minute, latencies and series of five. Pure.

Time is cut into steps of five seconds, numbered by the clock, so that series of other parts of the
balancer (metrics_fleet.py) line up with these. Steps close when somebody looks at the clock: an
arrival, an end, a reader. Memory is fixed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

import msgspec

from pdserve.balancer.metrics_window import NUM_STEPS, STEP_S, Latency, LatencyWindow

RATE_STEPS = 12
"""Rates are those of the last minute: the live step and the eleven before."""
NAMES = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s", "prefill_s", "transfer_s")
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


class RollingFigures:
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

    def rates(self, now_s: float) -> dict[str, float]:
        """Per second, over the last minute or the time since the start if that is shorter."""
        self.advance(now_s)
        oldest = self._number - RATE_STEPS + 1
        rows = [step.amounts for step in self._steps if step.number >= oldest]
        rows.append(self.live)
        span_s = max(now_s - max(oldest * STEP_S, self._started_s), 1e-9)
        names = Amounts.__struct_fields__
        rates = {f"{name}_s": sum(getattr(row, name) for row in rows) / span_s for name in names}
        return {"window_s": RATE_STEPS * STEP_S, **rates}

    def latency(self, now_s: float) -> dict[str, object]:
        """``latency`` of the state document."""
        self.advance(now_s)
        figures = {name: asdict(window.recent()) for name, window in self.latencies.items()}
        return {"window_s": NUM_STEPS * STEP_S, **figures}

    def series(self, now_s: float) -> dict[str, object]:
        """``series`` of the state document: closed steps, oldest first; None where nothing happened."""
        self.advance(now_s)
        by_number = {step.number: step for step in self._steps}
        rows = [by_number.get(number) for number in step_numbers(now_s)]
        return {
            "step_s": STEP_S,
            "requests_s": [None if row is None else row.amounts.requests / STEP_S for row in rows],
            "output_tokens_s": [None if row is None else row.amounts.output_tokens / STEP_S for row in rows],
            "ttft_p50_s": [None if row is None else row.ttft.p50 for row in rows],
            "ttft_p99_s": [None if row is None else row.ttft.p99 for row in rows],
            "tpot_p50_s": [None if row is None else row.tpot.p50 for row in rows],
            "itl_p50_s": [None if row is None else row.itl.p50 for row in rows],
        }

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
