"""How good forecasts of lengths were: coverage, error, accuracy by bucket; recent ones count more. Pure."""

from __future__ import annotations

from pdserve.types import Forecast

KEEP = 0.5 ** (1 / 500)
"""Half-life of an outcome in the figures: 500 requests."""
NUM_BUCKETS = 21
"""Octaves: 0, 1, 2-3, 4-7, ..., from 2^19."""


class LengthScore:
    """Outcomes of learned forecasts. One ``count`` costs about a microsecond."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._covered = 0.0
        self._exact = 0.0
        self._error = 0.0
        self._tokens = 0.0
        self._buckets = [[0, 0, 0] for _ in range(NUM_BUCKETS)]

    def count(self, told: Forecast, tokens: int) -> None:
        """A request was forecast as ``told`` and got ``tokens``."""
        is_covered = told.low - 0.5 <= tokens <= told.high + 0.5
        octave = tokens.bit_length()
        is_exact = int(told.mean + 0.5).bit_length() == octave
        self._weight = self._weight * KEEP + 1.0
        self._covered = self._covered * KEEP + is_covered
        self._exact = self._exact * KEEP + is_exact
        self._error = self._error * KEEP + abs(told.mean - tokens)
        self._tokens = self._tokens * KEEP + tokens
        row = self._buckets[min(octave, NUM_BUCKETS - 1)]
        row[0] += 1
        row[1] += is_covered
        row[2] += is_exact

    @property
    def coverage(self) -> float:
        """Share of recent answers within their interval; 0 before the first."""
        return self._covered / self._weight if self._weight else 0.0

    def snapshot(self) -> dict[str, object]:
        """Recent outcomes, and those since the start by octave of their length.

        ``accuracy``: the mean was in the answer's octave, as TetriInfer counts buckets.
        ``relative_error``: mean absolute error over mean length.
        """
        weight = self._weight or 1.0
        return {
            "coverage": self.coverage,
            "accuracy": self._exact / weight,
            "mean_error_tokens": self._error / weight,
            "relative_error": self._error / self._tokens if self._tokens else 0.0,
            "buckets": [
                {
                    "from_tokens": 1 << octave >> 1,
                    "num": num,
                    "coverage": covered / num,
                    "accuracy": exact / num,
                }
                for octave, (num, covered, exact) in enumerate(self._buckets)
                if num
            ],
        }
