"""How many requests end per second, lately: what a shed client is told to wait. Pure."""

from __future__ import annotations

from collections import deque

MARK_EVERY_S = 1.0
NUM_MARKS = 30
"""The rate is that of the last half minute."""
UNKNOWN_S = 5.0
"""Told while nothing has ended yet: a worker that joins is tested within seconds."""
MIN_S, MAX_S = 1.0, 300.0


class CompletionRate:
    """Counts requests that ended. ``mark`` now and then; adding one costs an increment."""

    def __init__(self) -> None:
        self.total = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=NUM_MARKS)

    def mark(self, now_s: float) -> None:
        """Remember how far the count is; as often as there is occasion."""
        if not self._marks or now_s - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now_s, self.total))

    def per_s(self, now_s: float) -> float:
        """Requests ended per second since the oldest mark of the last half minute; 0 if unknown."""
        since_s, count = next(
            (mark for mark in self._marks if now_s - mark[0] <= NUM_MARKS * MARK_EVERY_S), (now_s, self.total)
        )
        span_s = now_s - since_s
        return (self.total - count) / span_s if span_s > 0 else 0.0

    def retry_after_s(self, num_ahead: int, now_s: float) -> float:
        """When ``num_ahead`` requests will probably have ended."""
        rate = self.per_s(now_s)
        return min(MAX_S, max(MIN_S, num_ahead / rate)) if rate > 0 else UNKNOWN_S
