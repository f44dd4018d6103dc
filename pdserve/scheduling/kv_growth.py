"""What the open answers of one decode worker may come to, by their forecasts. Pure.

    expected = min(Σ (prompt + mean), most at once) + z · sqrt(Σ variance)

A quantile for each request would add up to far more than they ever need together: their errors cancel, so
the sum gets one margin. *Most at once* is what they need when each answer ends in its turn (as LightLLM's
past-future scheduler reckons, arXiv 2507.10150), looked at with each sample while the sum alone would not
fit; legs that came since count in full. It is the bound that matters for answers of more than about a
thousand tokens: for shorter ones SGLang itself keeps more free (scheduling/kv_room.py).

An answer that outlives its forecast is expected to go on. The first answers to be learned from are short
ones, as long ones are still under way; then many forecasts are too low, and this is what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdserve.types import RequestShape

GROWTH_Z = 2.0
"""Standard deviations: the sum is exceeded one time in forty, were it normal. SGLang retracts then."""
SPREAD = 2.563
"""Standard deviations between the tenth and the ninetieth percentile of a normal distribution."""


FOLLOW_S = 0.1
FAR_BELOW = 4
DOUBT_SHARE = 0.1
"""Part of what answers' different ends save that is not relied on: how far each has come is only reckoned."""
OUTLIVED_FACTOR = 2.0
"""An answer longer than its forecast's ``high`` is taken to be half done: the forecast is disproved, and of
what has lasted so long nothing better is known (the mean remainder of a Pareto tail of exponent two)."""


@dataclass(slots=True)
class _Leg:
    """Tokens of its prompt and answers; ``told`` as forecast, ``mean`` as it looks now."""

    prompt: int
    told: int
    variance: int
    high: int
    limit: int
    mean: int
    done: float = 0.0
    seen_s: float | None = None


def expected_answer(shape: RequestShape, reserve: int) -> int:
    """Tokens to expect of a request's answers together; ``reserve`` if no forecast was learned."""
    forecast = shape.forecast
    return (
        reserve
        if forecast is None or not forecast.is_learned
        else shape.num_prompts * math.ceil(forecast.mean)
    )


MIN_STEP_S = 1e-4
"""No decode step is shorter; a line fitted through zero says so of an empty batch."""


class KvGrowth:
    """Sums over the open legs of a decode worker; exactly nothing when none is open.

    Whole numbers, so that what is added and taken away leaves no rest.
    """

    __slots__ = ("_added", "_followed_s", "_legs", "_mean", "_peak", "_variance")

    def __init__(self) -> None:
        self._legs: dict[int, _Leg] = {}
        self._mean = 0
        self._variance = 0
        self._peak: int | None = None  # of the legs there were when somebody last looked
        self._added = 0  # mean of those that came since
        self._followed_s = -math.inf

    def add(self, leg: int, shape: RequestShape, promise: tuple[int, int]) -> int:
        """A leg with its prompt's tokens and those with SGLang's reserve; returns ``tokens``."""
        prompt, num = promise[0], shape.num_prompts
        forecast = shape.forecast
        if forecast is None or not forecast.is_learned or not promise[1]:
            reserve = promise[1] - prompt
            limit = num * shape.max_new_tokens if reserve else 0
            each = _Leg(prompt, reserve, 0, reserve, limit, reserve)
        else:
            mean, deviation = num * math.ceil(forecast.mean), (forecast.high - forecast.low) / SPREAD
            variance, limit = num * math.ceil(deviation * deviation), num * shape.max_new_tokens
            each = _Leg(prompt, mean, variance, num * math.ceil(forecast.high), limit, mean)
        self._legs[leg] = each
        self._mean += prompt + each.mean
        self._added += prompt + each.mean
        self._variance += each.variance
        return self.tokens

    def begin(self, leg: int, now_s: float) -> None:
        """Its prompt is there: tokens come from now on."""
        each = self._legs.get(leg)
        if each is not None:
            each.seen_s = now_s

    def follow(self, now_s: float, step_s: float, calm_tokens: int) -> None:
        """Look how far answers must have come at ``step_s`` seconds a token.

        Of those that have outlived their forecasts more is expected. If all at their full length exceed
        ``calm_tokens``, it is worked out what they need at once at most. Does nothing far below that, nor
        more often than every FOLLOW_S: it costs 0.3 to 0.5 µs a leg.
        """
        if self._mean * FAR_BELOW < calm_tokens or now_s - self._followed_s < FOLLOW_S:
            return
        self._followed_s = now_s
        for each in self._legs.values():
            if each.seen_s is None:
                continue
            each.done += (now_s - each.seen_s) / max(step_s, MIN_STEP_S)
            each.seen_s, done = now_s, math.ceil(each.done)
            if done <= each.told:
                continue
            mean = (done + each.high) // 2 if done <= each.high else int(OUTLIVED_FACTOR * done)
            mean = min(each.limit, max(each.told, mean))
            self._mean += mean - each.mean
            each.mean = mean
        self._added = 0
        self._peak = self._most_at_once() if self._mean > calm_tokens else None

    def _most_at_once(self) -> int:
        """When an answer ends, those with more to come have all grown by what it still had to come."""
        rows = sorted(
            ((max(0.0, each.mean - each.done), each.prompt + each.done) for each in self._legs.values()),
            reverse=True,
        )
        most = now = 0.0
        for num, (left, present) in enumerate(rows, start=1):
            now += present
            most = max(most, now + num * left)
        return math.ceil(most + DOUBT_SHARE * (self._mean - most))

    def end(self, leg: int) -> None:
        """That leg is over."""
        each = self._legs.pop(leg)
        self._mean -= each.prompt + each.mean
        self._variance -= each.variance

    @property
    def tokens(self) -> int:
        """KV the open legs may come to need together."""
        mean = self._mean
        if self._peak is not None:
            mean = min(mean, self._peak + self._added)
        if not self._variance:
            return mean
        return mean + math.ceil(GROWTH_Z * math.sqrt(self._variance))

    def __bool__(self) -> bool:
        return bool(self._legs)
