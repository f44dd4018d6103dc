"""What one key's answers were like: a histogram over log-spaced buckets, and its summary.

Some answers ended by themselves, others were cut off and would have been longer. The
Kaplan-Meier estimate takes both for what they are: a cut answer says only that its length
exceeds its bucket. Old answers fade with each new one. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from pdserve.types import Forecast


def bucket_of(tokens: int) -> int:
    """The bucket of EDGES that holds an answer of so many tokens; the last holds all that are longer."""
    return min(bisect_right(EDGES, tokens), len(EDGES) - 1) - 1


def _edges() -> tuple[int, ...]:
    """Four buckets an octave, none narrower than a token."""
    edges, octave = [0, 1], 4
    while edges[-1] < 2**20:
        edges.append(
            max(edges[-1] + 1, round(2.0 ** ((math.floor(math.log2(edges[-1]) * 4 + 0.5) + 1) / octave)))
        )
    return tuple(edges)


EDGES = _edges()
"""Bucket ``i`` holds lengths from ``EDGES[i]`` to below ``EDGES[i + 1]`` tokens."""
QUANTILES = (0.1, 0.9)
"""Four in five answers lie between."""
CUT_FACTOR = 2.0
"""Answers of which only a lower bound is known, none having ended beyond it, are taken to be this many
times as long: the mean of what is left of a Pareto tail of exponent two. An assumption."""
MIN_ANSWERS = 2
REFRESH_SHARE = 4
REFRESH_ANSWERS = 32
"""A summary is made anew when its history has grown by a quarter, at the latest after so many answers."""
FORGOTTEN = 1e-3
ROUNDING = 1e-6
MAX_WEIGHT = 1e9
"""Newer answers weigh more instead of older ones less; beyond it all weights are scaled down."""


class Summary:
    """Figures of a history. ``longest`` is the end of its last bucket, ``log_*`` the tenth and the ninth
    decile as logarithms, ``evidence`` the answers it rests on."""

    __slots__ = ("_ends", "_shares", "_sums", "evidence", "log_high", "log_low", "longest", "mean")

    def __init__(self, ended: dict[int, float], cut: dict[int, float] | None, weight: float) -> None:
        """``weight`` is that of the newest answer."""
        ends: list[int] = []
        shares: list[float] = []
        sums: list[float] = []
        self._ends, self._shares, self._sums = ends, shares, sums
        left = sum(ended.values())
        buckets = sorted(ended)
        if cut:
            left += sum(cut.values())
            buckets = sorted(ended.keys() | cut.keys())
        self.evidence = left / weight
        survivors, moment = 1.0, 0.0
        low, high = QUANTILES
        ends_at = {low: 0.0, high: 0.0}
        for bucket in buckets:
            start, end = EDGES[bucket], EDGES[bucket + 1]
            finished = ended.get(bucket, 0.0)
            share = survivors * finished / left
            rest = survivors - share
            if rest <= 1.0 - low and not ends_at[low]:
                ends_at[low] = _inside(start, end, (low - 1.0 + survivors) / share)
            if rest <= 1.0 - high and not ends_at[high]:
                ends_at[high] = _inside(start, end, (high - 1.0 + survivors) / share)
            survivors = rest
            moment += share * (start + end - 1) / 2
            left -= finished + cut.get(bucket, 0.0) if cut else finished
            ends.append(end)
            shares.append(survivors)
            sums.append(moment)
        self.longest = EDGES[buckets[-1] + 1]
        if survivors > ROUNDING:
            moment += survivors * self.longest * CUT_FACTOR
            self.longest = round(self.longest * CUT_FACTOR)
        self.mean = max(0.5, moment)
        self.log_low = math.log(ends_at[low] or self.longest)
        self.log_high = math.log(ends_at[high] or self.longest)

    def mean_below(self, limit: int) -> float:
        """The mean of these answers if each ended at ``limit`` tokens at the latest."""
        index = bisect_right(self._ends, limit) - 1
        if index < 0:
            return float(limit)
        mean = self._sums[index] + self._shares[index] * limit
        return mean if mean > 0.5 else 0.5


def _inside(start: int, end: int, part: float) -> float:
    return max(0.5, start + part * (end - start) - 0.5)


class History:
    """Answers of one key, ``num`` in all. ``summary`` is None before MIN_ANSWERS of them."""

    __slots__ = ("_cut", "_due", "_ended", "_weight", "num", "summary")

    def __init__(self) -> None:
        self.num = 0
        self.summary: Summary | None = None
        self._ended: dict[int, float] = {}
        self._cut: dict[int, float] | None = None
        self._weight = 1.0
        self._due = MIN_ANSWERS

    def add(self, bucket: int, is_cut: bool, keep: float) -> None:
        """One answer of that bucket of EDGES; all earlier ones weigh ``keep`` times what they did."""
        buckets = self._ended
        if is_cut:
            if self._cut is None:
                self._cut = {}
            buckets = self._cut
        self._weight = weight = self._weight / keep
        buckets[bucket] = buckets.get(bucket, 0.0) + weight
        self.num = num = self.num + 1
        if num >= self._due:
            self._refresh()

    def _refresh(self) -> None:
        if self._weight > MAX_WEIGHT:
            self._ended = self._scaled(self._ended)
            self._cut = self._scaled(self._cut) if self._cut else None
            self._weight = 1.0
        self.summary = Summary(self._ended, self._cut, self._weight)
        self._due = self.num + min(REFRESH_ANSWERS, 1 + int(self.summary.evidence / REFRESH_SHARE))

    def _scaled(self, buckets: dict[int, float]) -> dict[int, float]:
        """Weights as parts of the newest answer's; what is next to nothing is forgotten."""
        least = self._weight * FORGOTTEN
        return {bucket: weight / self._weight for bucket, weight in buckets.items() if weight > least}


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
