"""What the open answers of one decode worker may come to, by their forecasts. Pure.

A quantile for each request would add up to far more than they ever need together: their errors cancel.
So a worker's expected KV is the sum of the means and GROWTH_Z standard deviations of that sum:

    expected = Σ (prompt + mean) + z · sqrt(Σ variance)

That counts every answer at its full length although some end before others get there. We keep that: it
never promises too much when forecasts are exact, however the requests' ages happen to lie, and it costs a
request two additions. It is the bound that matters only for answers of more than about a thousand tokens:
for shorter ones SGLang itself keeps more free (half of an answer is generated on average, and
512 tokens beyond that must be free for each; room.py).
"""

from __future__ import annotations

import math

from pdserve.types import RequestShape

GROWTH_Z = 2.0
"""Standard deviations: the sum is exceeded one time in forty, were it normal. SGLang retracts then."""
SPREAD = 2.563
"""Standard deviations between the tenth and the ninetieth percentile of a normal distribution."""


def expected_answers(shape: RequestShape, unlearned_tokens: int) -> tuple[int, int]:
    """Mean tokens of a request's answers together, and their variance.

    ``unlearned_tokens`` is what to count, as if it were certain, when there is no learned forecast.
    """
    told = shape.forecast
    if told is None or not told.is_learned:
        return unlearned_tokens, 0
    num = shape.num_prompts
    deviation = (told.high - told.low) / SPREAD
    return num * math.ceil(told.mean), num * math.ceil(deviation * deviation)


class Growth:
    """Sums over the open legs of a decode worker; exactly nothing when none is open.

    Whole numbers, so that what is added and taken away leaves no rest.
    """

    __slots__ = ("_legs", "_mean", "_variance")

    def __init__(self) -> None:
        self._legs: dict[int, tuple[int, int]] = {}
        self._mean = 0
        self._variance = 0

    def add(self, leg: int, mean: int, variance: int) -> int:
        """A leg whose prompt and answer are expected to take ``mean`` tokens; returns ``tokens``."""
        self._legs[leg] = mean, variance
        self._mean = mean = self._mean + mean
        self._variance = variance = self._variance + variance
        return mean + math.ceil(GROWTH_Z * math.sqrt(variance)) if variance else mean

    def end(self, leg: int) -> None:
        """That leg is over."""
        mean, variance = self._legs.pop(leg)
        self._mean -= mean
        self._variance -= variance

    @property
    def tokens(self) -> int:
        """KV the open legs may come to need together."""
        if not self._variance:
            return self._mean
        return self._mean + math.ceil(GROWTH_Z * math.sqrt(self._variance))

    def __bool__(self) -> bool:
        return bool(self._legs)
