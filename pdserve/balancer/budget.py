"""How many retries may be made: a share of recent requests, lest an outage double its load. Pure."""

from __future__ import annotations

RETRIES_PER_MINUTE = 10.0
"""Always allowed, so that a quiet service can retry at all."""
CAPACITY = 100.0
"""Retries that may be saved up."""


class RetryBudget:
    """A bucket filled by requests and by time; each retry takes one."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._saved = RETRIES_PER_MINUTE
        self._updated_s = 0.0

    def deposit(self) -> None:
        """A request arrived."""
        self._saved = min(CAPACITY, self._saved + self._ratio)

    def withdraw(self, now_s: float) -> bool:
        """Take one retry; False if there is none left."""
        if self._updated_s:
            earned = (now_s - self._updated_s) * RETRIES_PER_MINUTE / 60.0
            self._saved = min(CAPACITY, self._saved + earned)
        self._updated_s = now_s
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
