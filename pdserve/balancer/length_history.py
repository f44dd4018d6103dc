"""What one key's answers were like: a histogram over log-spaced buckets, and its summary.

Some answers ended by themselves, others were cut off and would have been longer. The
Kaplan-Meier estimate takes both for what they are: a cut answer says only that its length
exceeds its bucket. Old answers fade with each new one. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right


def _edges() -> tuple[int, ...]:
    """Four buckets an octave, none narrower than a token; the last is open."""
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
REFRESH_SHARE = 8
REFRESH_ANSWERS = 24
"""A summary is made anew when its history has grown by an eighth, at the latest after so many answers."""
MAX_WEIGHT = 1e9
"""Newer answers weigh more instead of older ones less; beyond it all weights are scaled down."""


class Summary:
    """Figures of a history. ``longest`` is the end of its last bucket, ``log_*`` the tenth and the ninth
    decile as logarithms, ``evidence`` the answers it rests on."""

    __slots__ = ("_ends", "_shares", "_sums", "evidence", "log_high", "log_low", "longest", "mean")

    def __init__(self, ended: dict[int, float], cut: dict[int, float], evidence: float) -> None:
        self.evidence = evidence
        self._ends: list[int] = []
        self._shares: list[float] = []
        self._sums: list[float] = []
        left = sum(ended.values()) + sum(cut.values())
        survivors, moment = 1.0, 0.0
        lows = list(QUANTILES)
        logs: list[float] = []
        buckets = sorted(ended.keys() | cut.keys())
        for bucket in buckets:
            start, end = EDGES[bucket], EDGES[bucket + 1]
            finished = ended.get(bucket, 0.0)
            share = survivors * finished / left if left > 0.0 else 0.0
            while lows and share > 0.0 and 1.0 - survivors + share >= lows[0]:
                inside = (lows.pop(0) - (1.0 - survivors)) / share
                logs.append(math.log(max(0.5, start + inside * (end - start) - 0.5)))
            survivors -= share
            moment += share * (start + end - 1) / 2
            left -= finished + cut.get(bucket, 0.0)
            self._ends.append(end)
            self._shares.append(survivors)
            self._sums.append(moment)
        self.longest = EDGES[buckets[-1] + 1]
        if survivors > 1e-6:
            moment += survivors * self.longest * CUT_FACTOR
            self.longest = round(self.longest * CUT_FACTOR)
        logs += [math.log(self.longest)] * len(lows)
        self.mean = max(0.5, moment)
        self.log_low, self.log_high = logs

    def mean_below(self, limit: int) -> float:
        """The mean of these answers if each ended at ``limit`` tokens at the latest."""
        index = bisect_right(self._ends, limit) - 1
        if index < 0:
            return float(limit)
        return max(0.5, self._sums[index] + self._shares[index] * limit)


class History:
    """Answers of one key. ``summary`` is None before MIN_ANSWERS of them."""

    __slots__ = ("_cut", "_due", "_ended", "_evidence", "_weight", "summary")

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self._ended: dict[int, float] = {}
        self._cut: dict[int, float] = {}
        self._weight = 1.0
        self._evidence = 0.0
        self._due = MIN_ANSWERS

    def add(self, tokens: int, is_cut: bool, keep: float) -> None:
        """One answer; all earlier ones weigh ``keep`` times what they did."""
        buckets = self._cut if is_cut else self._ended
        bucket = bisect_right(EDGES, tokens) - 1
        self._weight = weight = self._weight / keep
        buckets[bucket] = buckets.get(bucket, 0.0) + weight
        self._evidence = self._evidence * keep + 1.0
        self._due -= 1
        if self._due <= 0:
            self._refresh()

    def _refresh(self) -> None:
        if self._weight > MAX_WEIGHT:
            for buckets in (self._ended, self._cut):
                for bucket, weight in list(buckets.items()):
                    buckets[bucket] = weight / self._weight
                    if buckets[bucket] < 1e-3:
                        del buckets[bucket]
            self._weight = 1.0
        self.summary = Summary(self._ended, self._cut, self._evidence)
        self._due = min(REFRESH_ANSWERS, 1 + int(self._evidence / REFRESH_SHARE))
