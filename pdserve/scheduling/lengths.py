"""An online predictor of the length of answers (TetriInfer §3.3, as a table).

    forecast(shape) ─► histories of: all · route, limit · prompt length · user · application · conversation
                       from the common to the rare, each shrunk towards those before it, by evidence
    learn(shape, tokens) ─► the same histories (histograms over log-spaced buckets)

TetriInfer asks a small classifier model; the balancer has none, so it remembers how long like
requests were. Answers that ended by a limit or an abort are right-censored and weighed by the
Kaplan-Meier estimate. The interval's two tails are kept at a tenth each by what came true.
Reads no clock: histories grow old by requests.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from operator import attrgetter
from typing import Protocol
from zlib import crc32

from pdserve.scheduling.length_history import History, LengthScore, bucket_of
from pdserve.types import Forecast, RequestShape

UNKNOWN_TOKENS = 343
"""Expected of an answer of which nothing is known: the mean of Mooncake's conversation trace."""
MIN_LEARNED = 8
"""Before so many requests have finished a forecast is the limit alone."""
HALF_LIFE = 256
"""Requests of one key after which one of its observations counts half."""
MAX_KEYS = 4096
"""Histories remembered; the one longest without a new answer goes. About 1 kB each, 4 kB when long in use."""
PRIOR = 6.0
"""A key's own history counts as much as those of the commoner ones once it has so many answers."""
APPLICATION_BYTES = 512
"""The beginning of a prompt that shows the application: its system prompt. 128 tokens, eight SGLang pages."""
CONVERSATION_BYTES = 4096
"""What the prompts of one conversation, or of one document, have in common beyond the application."""
TAIL = 0.1
"""Share of answers shorter than ``low``, and of those longer than ``high``."""
STEP = 0.02
"""How far one miss moves an end of the interval, as a logarithm; a hit moves it back by TAIL of that.
After a shift that every answer misses, 50 answers widen it by 2.5 times."""
MAX_WIDENING = 2.0
"""As a logarithm: beyond 7 times, an interval says nothing."""

_NUM = attrgetter("num")


class Lengths(Protocol):
    """Predicts the length of answers; the simulator has bounds to compare with."""

    def forecast(self, shape: RequestShape) -> Forecast | None:
        """Tokens of one answer, at most ``shape.max_new_tokens``; None: no forecast."""
        ...

    def learn(self, shape: RequestShape, output_tokens: int, is_cut: bool) -> None:
        """An answer is over (of a batch: the mean of its answers).

        ``is_cut``: by the limit or an abort; left to itself it would have been longer.
        """
        ...

    def snapshot(self) -> dict[str, object]:
        """What came true, for the state document."""
        ...


class LengthPredictor:
    """Learns from finished requests; deterministic given its calls.

    A forecast and a lesson cost a few microseconds each: summaries of histories are made anew
    only when these have grown by a quarter, or by some dozens of answers.
    """

    def __init__(self, max_keys: int = MAX_KEYS, half_life: int = HALF_LIFE) -> None:
        self.num_learned = 0
        self._max_keys = max_keys
        self._keep = 0.5 ** (1.0 / half_life)
        self._histories: OrderedDict[Hashable, History] = OrderedDict()
        self._score = LengthScore()
        self._widen_low = self._widen_high = 0.0  # logarithms

    def forecast(self, shape: RequestShape) -> Forecast:
        """Mean and the interval of four in five answers like this one."""
        limit = shape.max_new_tokens
        if self.num_learned < MIN_LEARNED:
            return unlearned(limit)
        mean = low = high = 0.0
        known = map(self._histories.get, _keys(shape))
        # The rarer a key, the more it says: an application that everybody uses must not outweigh the
        # prompt's length.
        for history in sorted([each for each in known if each is not None], key=_NUM, reverse=True):
            summary = history.summary
            if summary is None:
                continue
            own = summary.mean
            if limit < summary.longest:
                own = summary.mean_below(limit)
            if not mean:
                mean, low, high = own, summary.log_low, summary.log_high
                continue
            share = summary.evidence / (summary.evidence + PRIOR)
            mean += share * (own - mean)
            low += share * (summary.log_low - low)
            high += share * (summary.log_high - high)
        if not mean:
            return unlearned(limit)
        shortest, longest = math.exp(low - self._widen_low), math.exp(high + self._widen_high)
        longest = min(float(limit), longest)
        mean = min(float(limit), mean)
        return Forecast(mean, min(shortest, mean), max(longest, mean), True)

    def learn(self, shape: RequestShape, output_tokens: int, is_cut: bool) -> None:
        """An answer of ``output_tokens`` is over. Scores ``shape.forecast`` by it, if that was learned."""
        if output_tokens < 0 or (is_cut and output_tokens == 0):
            return
        self._rate(shape, output_tokens, is_cut)
        self.num_learned += 1
        histories, keep, bucket = self._histories, self._keep, bucket_of(output_tokens)
        for key in _keys(shape):
            history = histories.get(key)
            if history is None:
                history = histories[key] = History()
                if len(histories) > self._max_keys:
                    histories.popitem(last=False)
            else:
                histories.move_to_end(key)
            history.add(bucket, is_cut, keep)

    def snapshot(self) -> dict[str, object]:
        """Number learned, share of answers inside their interval, accuracy by bucket of length."""
        return {
            "num_learned": self.num_learned,
            "num_keys": len(self._histories),
            "widened": [math.exp(self._widen_low), math.exp(self._widen_high)],
            **self._score.snapshot(),
        }

    def _rate(self, shape: RequestShape, output_tokens: int, is_cut: bool) -> None:
        forecast = shape.forecast or self.forecast(shape)
        if not forecast.is_learned:
            return
        is_aborted = is_cut and output_tokens < shape.max_new_tokens
        if is_aborted and output_tokens <= forecast.high:
            return  # nobody knows how long it would have become
        is_short, is_long = output_tokens < forecast.low - 0.5, output_tokens > forecast.high + 0.5
        if is_short or self._widen_low:
            self._widen_low = _moved(self._widen_low, is_short)
        if is_long or self._widen_high:
            self._widen_high = _moved(self._widen_high, is_long)
        self._score.count(forecast, output_tokens)


def unlearned(limit: int) -> Forecast:
    """The forecast while nothing was learned: UNKNOWN_TOKENS, at most the limit."""
    return Forecast(float(min(limit, UNKNOWN_TOKENS)), float(min(limit, 1)), float(limit), False)


def _moved(widening: float, is_missed: bool) -> float:
    moved = widening + STEP * (1.0 - TAIL) if is_missed else widening - STEP * TAIL
    return min(MAX_WIDENING, max(0.0, moved))


def _keys(shape: RequestShape) -> tuple[Hashable, ...]:
    """What like requests have in common."""
    route, prompt = shape.route, shape.prompt
    limit = shape.max_new_tokens.bit_length()
    # half octaves: the two leading bits and the length
    tokens = shape.prompt_tokens // shape.num_prompts
    octave = tokens.bit_length()
    size = 2 * octave + (tokens >> (octave - 2) & 1) if octave > 1 else octave
    keys: tuple[Hashable, ...] = (0, (route, limit), (route, limit, size))
    if shape.user:
        keys += ((route, shape.user),)
    if prompt:
        application = crc32(prompt[:APPLICATION_BYTES])
        keys += ((1, route, application),)
        if len(prompt) >= CONVERSATION_BYTES:
            keys += ((2, route, crc32(prompt[APPLICATION_BYTES:CONVERSATION_BYTES], application)),)
    return keys
