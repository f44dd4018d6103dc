"""Lines through measurements: least absolute relative error, no negative costs, and how far off it is.

A measurement says how often each term was paid and how long all of it took; a
fit says what each term costs. Every row counts the same relative to its size, or
one long prefill would outvote all short ones; absolute errors, not squares, because
on a shared machine a row now and then is hit by somebody else's work. A
term that would cost less than nothing is left out and the others are fitted again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

ROUNDS = 40
"""Of reweighting; the fit moves by less than a thousandth after twenty."""
FLOOR = 1e-4
"""Relative errors below this weigh the same: a row that is met exactly must not outweigh all others."""
NORMAL = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: ``counts`` of every term, in the order of the fit's names, and ``seconds``."""

    counts: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Cost of each term by name, its standard error (NaN: not seen), and the rows' relative errors."""

    cost: dict[str, float]
    error: dict[str, float]
    median_error: float
    worst_error: float
    num_rows: int

    def seconds(self, counts: Sequence[float]) -> float:
        """What these counts should take."""
        return sum(cost * count for cost, count in zip(self.cost.values(), counts, strict=True))


def fit(names: Sequence[str], rows: Sequence[Row]) -> Fit:
    """Costs that explain ``rows`` best.

    Raises:
        ValueError: with fewer rows than terms that took time.
    """
    usable = [row for row in rows if row.seconds > 0]
    if len(usable) < len(names):
        raise ValueError(f"{len(usable)} measurements for {len(names)} terms ({', '.join(names)})")
    seconds = np.array([row.seconds for row in usable])
    table = np.array([row.counts for row in usable], dtype=float) / seconds[:, None]
    scale = np.abs(table).max(axis=0)
    active = [index for index in range(len(names)) if scale[index] > 0]
    found = np.zeros(0)
    while active:
        found = _least_absolute(table[:, active] / scale[active])
        if found.min() >= 0:
            break
        active.pop(int(found.argmin()))
    costs, errors = np.zeros(len(names)), np.full(len(names), math.nan)
    if active:
        costs[active] = found / scale[active]
    off: list[float] = np.abs(table @ costs - 1.0).tolist()
    if active:
        part = table[:, active] / scale[active]
        spread = NORMAL * median(off)
        errors[active] = spread * np.sqrt(np.diag(np.linalg.pinv(part.T @ part))) / scale[active]
    return Fit(
        dict(zip(names, costs.tolist(), strict=True)),
        dict(zip(names, errors.tolist(), strict=True)),
        median(off),
        max(off),
        len(usable),
    )


def _least_absolute(table: Floats) -> Floats:
    """The x for which ``sum(abs(table @ x - 1))`` is least: least squares, weighted by its own errors."""
    weights = np.ones(len(table))
    found = np.zeros(table.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(table * root[:, None], root, rcond=None)[0]
        weights = 1.0 / np.maximum(np.abs(table @ found - 1.0), FLOOR)
    return found
