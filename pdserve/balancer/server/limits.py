"""What clients may do to the HTTP server: sizes and times. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config import BalancerConfig

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

    @classmethod
    def of(cls, config: BalancerConfig, max_connections: int) -> ServerLimits:
        """The configured ones; ``max_connections`` where the configuration leaves it open."""
        return cls(
            max_body_bytes=config.max_body_bytes,
            max_header_bytes=config.max_header_bytes,
            header_s=config.header_s,
            body_s=config.body_s,
            write_s=config.write_s,
            max_connections=config.max_connections or max_connections,
        )
