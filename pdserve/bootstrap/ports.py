"""Which ports to try for a new prefill instance. Pure: binding is the caller's.

A decode server keys all it knows of a prefill server by ``host:port`` and takes
up to two heartbeats to notice an end, so a port must not pass from a dead
instance to another one while its memory is fresh.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pdserve.errors import ConfigError

DEFAULT_PORTS = range(20_000, 30_000)
"""Below the ephemeral range: after a restart no outgoing connection can sit on a member's port."""

QUARANTINE_S = 30.0
"""SGLang drops a prefill after two missed heartbeats 5 s apart, each with up to 5 s of time-out."""

_NUM_TRIES = 64


class PortPlan:
    """Ports in the order to try them. ``(0, 0)`` means: any."""

    def __init__(self, port_range: tuple[int, int]) -> None:
        low, high = port_range
        if (low, high) != (0, 0) and not 1 <= low <= high <= 65535:
            raise ConfigError(f"port_range must be LOW-HIGH within 1-65535, or 0-0 for any, got {low}-{high}")
        self._range = range(low, high + 1) if high else None
        self._released: dict[int, float] = {}  # oldest first

    def __str__(self) -> str:
        return "any" if self._range is None else f"{self._range.start}-{self._range.stop - 1}"

    def candidates(self, former: int | None, now: float) -> Iterator[int]:
        """Its own former port, then fresh ones, then those released longest ago; 0 stands for any."""
        if former is not None and 1 <= former <= 65535:
            yield former
        recent = [port for port in self._released if self.is_recent(port, now)]
        if self._range is None:
            tries = random.sample(DEFAULT_PORTS, _NUM_TRIES)
            yield from (port for port in tries if port not in recent)
            yield 0
            return
        yield from (port for port in self._range if port not in recent)
        yield from (port for port in recent if port in self._range)

    def released(self, port: int, now: float) -> None:
        """An instance's listener on ``port`` was closed."""
        self._released = {p: t for p, t in self._released.items() if p != port and now - t < QUARANTINE_S}
        self._released[port] = now

    def is_recent(self, port: int, now: float) -> bool:
        """True while a decode server may still take ``port`` for the instance that had it."""
        released = self._released.get(port)
        return released is not None and now - released < QUARANTINE_S
