"""One worker's circuit breaker: closed → open → half-open → closed. Pure.

Blamed only for its own leg's failures; a client's 4xx never reaches it. Open
means the worker is *suspect* and takes no traffic. It half-opens when the
worker answers a ping, and closes when a real token has come through a pair.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

SOFT_LIMIT = 3
"""Consecutive 5xx answers that open the breaker; any good answer between them resets the count."""


class BreakerState(enum.StrEnum):
    """Closed lets traffic through, half-open only a probe, open nothing."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """State and counts; ``opened`` counts how often it went from closed to open."""

    state: BreakerState = BreakerState.CLOSED
    consecutive: int = 0
    errors: int = 0
    opened: int = 0

    @property
    def is_closed(self) -> bool:
        """True while requests may be sent."""
        return self.state is BreakerState.CLOSED

    def succeed(self) -> None:
        """A request's leg ended well. Does not close an open breaker: that takes a probe."""
        self.consecutive = 0

    def fail(self, *, hard: bool) -> bool:
        """Count one failure; a hard one (the connection broke) opens at once.

        Returns:
            True if this failure opened a closed breaker.
        """
        self.errors += 1
        self.consecutive += 1
        if not self.is_closed:
            return False
        if not hard and self.consecutive < SOFT_LIMIT:
            return False
        self.trip()
        return True

    def trip(self) -> None:
        """Open, whatever the counts."""
        if self.state is BreakerState.CLOSED:
            self.opened += 1
        self.state = BreakerState.OPEN

    def half_open(self) -> None:
        """The worker answered a ping: let a probe try it."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def close(self) -> None:
        """A probe passed: back to normal."""
        self.state = BreakerState.CLOSED
        self.consecutive = 0
