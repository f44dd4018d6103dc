"""What clients may do to the HTTP server: sizes and times."""

from __future__ import annotations

from dataclasses import dataclass

KEEP_ALIVE_S = 75.0
"""nginx's default: longer than clients keep idle connections."""
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes in bytes, times in seconds; named as in BalancerConfig."""

    max_body_bytes: int
    max_header_bytes: int
    header_s: float
    body_s: float
    write_s: float
    max_connections: int
