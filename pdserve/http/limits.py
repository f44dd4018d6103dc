"""What clients may do to the HTTP server: sizes and times."""

from __future__ import annotations

from dataclasses import dataclass

KEEP_ALIVE_S = 75.0
"""nginx's default: longer than clients keep idle connections."""
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes in bytes, times in seconds.

    ``header_s``: for a request's head. ``body_s``: of silence within its body. ``write_s``: of a client that
    reads nothing. ``request_s``: for head and body together.
    """

    max_body_bytes: int
    max_header_bytes: int
    header_s: float
    body_s: float
    write_s: float
    max_connections: int
    request_s: float = NEVER
