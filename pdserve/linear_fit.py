"""Least squares with two terms, ``y = a * u + b * v``, from five sums. Pure.

A line ``y = base + slope * x`` has ``u = 1``. As only sums are kept, old samples can fade and the sums of
several sources can be added up. Whoever fits decides what a negative term means to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinearFit:
    """Sums over weighted samples (u, v, y)."""

    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    uy: float = 0.0
    vy: float = 0.0

    def add(self, u: float, v: float, y: float, weight: float = 1.0) -> None:
        """Count one sample, ``weight`` times."""
        self.uu += weight * u * u
        self.uv += weight * u * v
        self.vv += weight * v * v
        self.uy += weight * u * y
        self.vy += weight * v * y

    def fade(self, keep: float) -> None:
        """Let all samples so far count only ``keep`` times what they did."""
        self.uu *= keep
        self.uv *= keep
        self.vv *= keep
        self.uy *= keep
        self.vy *= keep

    @property
    def spread(self) -> float:
        """One minus the squared correlation of u and v; near 0 the samples do not tell the terms apart."""
        square = self.uu * self.vv
        return 1.0 - self.uv * self.uv / square if square > 0.0 else 0.0

    def solve(self) -> tuple[float, float]:
        """Return (a, b) of the least squares, either may be negative; needs a positive ``spread``."""
        determinant = self.uu * self.vv - self.uv * self.uv
        return (
            (self.uy * self.vv - self.vy * self.uv) / determinant,
            (self.vy * self.uu - self.uy * self.uv) / determinant,
        )
