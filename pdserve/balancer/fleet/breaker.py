"""One worker's circuit breaker: closed → open → half-open → closed. Pure.

Blamed only for its own leg's failures; a client's 4xx never reaches it. Open
means the worker is *suspect* and takes no traffic. It half-opens when the
worker answers a ping, and closes when a real token has come through a pair.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class BreakerState(enum.StrEnum):
    """Closed lets traffic through, half-open only a probe, open nothing."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Failure(enum.Enum):
    """How bad it was: a broken connection or silence, an error answer, or "I am full" (503)."""

    HARD = "hard"
    SOFT = "soft"
    OVERLOAD = "overload"


@dataclass(slots=True)
class Breaker:
    """State and counts; ``opened`` counts how often it went from closed to open.

    ``limit`` failures in a row open it; any good answer between them resets the
    count. An overloaded worker does right to say so: that counts as a failure only
    from the ``limit``-th time in a row. ``causes`` are those of the failures in a row: one request
    that is sent again and again may be at fault itself, and counts once.
    """

    limit: int = 3
    state: BreakerState = BreakerState.CLOSED
    causes: set[object] = field(default_factory=set)
    overloads: int = 0
    errors: int = 0
    opened: int = 0

    @property
    def is_closed(self) -> bool:
        """True while requests may be sent."""
        return self.state is BreakerState.CLOSED

    @property
    def consecutive(self) -> int:
        """Failures in a row."""
        return len(self.causes)

    def succeed(self) -> None:
        """A request's leg ended well. Does not close an open breaker: that takes a probe."""
        self.causes.clear()
        self.overloads = 0

    def fail(self, failure: Failure, cause: object = None) -> bool:
        """Count one failure; a hard one opens at once. Equal ``cause``s count once; None is like no other.

        Returns:
            True if this failure opened a closed breaker.
        """
        self.errors += 1
        if failure is Failure.OVERLOAD:
            self.overloads += 1
            if self.overloads < self.limit:
                return False
        self.causes.add(object() if cause is None else cause)
        return self._opens(is_hard=failure is Failure.HARD)

    def forgive(self, cause: object) -> None:
        """That failure was the request's own fault."""
        self.causes.discard(cause)

    def convict(self, cause: object) -> bool:
        """That failure was the worker's fault, so the next one of the same request counts again.

        Returns:
            True if this opened a closed breaker.
        """
        self.causes.discard(cause)
        self.causes.add(object())
        return self._opens(is_hard=False)

    def _opens(self, *, is_hard: bool) -> bool:
        if not self.is_closed or (not is_hard and self.consecutive < self.limit):
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
        self.succeed()
