"""How fast a worker is, fitted from SGLang's cumulative counters.

Prefill: tokens per busy second from the growth of ``total_prefill_uncached_tokens``
and ``total_prefill_busy_us``. Decode: step time ``a + b * batch`` by least squares
over the growth of ``decode_moments`` (n, Σb, Σt_us, Σb², Σb·t).

Evidence leaks: it is scaled down to a fixed window after each addition and
halves every HALF_LIFE_S. The less there is, the more a worker is taken to be
like its peers: one slow first step must not starve a worker of the very
traffic that would prove it wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.types import WorkerLoad

PREFILL_WINDOW_S = 10.0
"""Busy seconds remembered: a few dozen batches of a large model."""
MIN_PREFILL_S = 0.005
MIN_PREFILL_TOKENS = 16
"""Less evidence than this (one probe request has 8 tokens) is noise."""
DECODE_WINDOW_STEPS = 2000.0
HALF_LIFE_S = 30.0
PRIOR_STEPS = 256.0
PRIOR_BUSY_S = 1.0
"""Own evidence of this size weighs as much as the peers' median."""
MIN_DECODE_STEPS = 8.0
MIN_BATCH_VARIANCE = 0.25
"""Below it the batch size hardly moved and a line through the cloud means nothing."""
ASSUMED_SLOPE = 0.02
"""One more request costs 2 % of a step, while the batch size never moved. An assumption: reading
the weights dominates a decode step at small batch."""


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Decode step time in seconds: ``base_s + slope_s * batch``; both non-negative."""

    base_s: float
    slope_s: float

    def step_s(self, batch: float) -> float:
        """Seconds of one decode step with ``batch`` requests on one DP rank."""
        return self.base_s + self.slope_s * batch


DEFAULT_PREFILL_TOKENS_S = 10_000.0
"""Used until any worker of the fleet is measured; equal for all, so it orders workers by queue only."""
DEFAULT_DECODE = DecodeFit(base_s=0.02, slope_s=0.02 * ASSUMED_SLOPE)


class RateFit:
    """Fitted rates of one worker; feed it every sample in order of receipt."""

    def __init__(self) -> None:
        self._totals = (0.0, 0.0)
        self._moments: tuple[float, ...] = (0.0,) * 5
        self._tokens = 0.0
        self._busy_s = 0.0
        self._steps = [0.0] * 5
        self._updated_s: float | None = None

    def update(self, load: WorkerLoad) -> None:
        """Add what the counters grew by; a counter that fell means a restart and starts anew."""
        self._fade(load.timestamp_s)
        totals = (float(load.total_prefill_uncached_tokens), float(load.total_prefill_busy_us))
        tokens, busy_us = (new - old for new, old in zip(totals, self._totals, strict=True))
        self._totals = totals
        if tokens > 0 and busy_us > 0:
            self._add_prefill(tokens, busy_us / 1e6)
        moments = load.decode_moments[:5]
        if len(moments) == 5:
            growth = [new - old for new, old in zip(moments, self._moments, strict=True)]
            self._moments = moments
            if min(growth) >= 0 and growth[0] > 0 and growth[2] > 0:
                self._add_steps(growth)

    @property
    def prefill_tokens_s(self) -> float | None:
        """Uncached prompt tokens per busy second; None while there is too little evidence."""
        if self._busy_s < MIN_PREFILL_S or self._tokens < MIN_PREFILL_TOKENS:
            return None
        return self._tokens / self._busy_s

    @property
    def decode(self) -> DecodeFit | None:
        """The step-time line; None while there is too little evidence."""
        return fit_decode(self._steps)

    def prefill_tokens_s_near(self, peers: float) -> float:
        """Own rate, drawn towards ``peers`` (their median) as far as own evidence is thin."""
        own = self.prefill_tokens_s
        if own is None:
            return peers
        weight = self._busy_s / (self._busy_s + PRIOR_BUSY_S)
        # Time per token is what adds up, so that is what is averaged.
        return 1.0 / (weight / own + (1.0 - weight) / peers)

    def decode_near(self, peers: DecodeFit) -> DecodeFit:
        """Own step-time line, drawn towards ``peers`` as far as own evidence is thin."""
        own = self.decode
        if own is None:
            return peers
        weight = self._steps[0] / (self._steps[0] + PRIOR_STEPS)
        return DecodeFit(
            weight * own.base_s + (1.0 - weight) * peers.base_s,
            weight * own.slope_s + (1.0 - weight) * peers.slope_s,
        )

    def _fade(self, now_s: float) -> None:
        if self._updated_s is not None and now_s > self._updated_s:
            keep = 0.5 ** ((now_s - self._updated_s) / HALF_LIFE_S)
            self._tokens *= keep
            self._busy_s *= keep
            self._steps = [value * keep for value in self._steps]
        self._updated_s = now_s

    def _add_prefill(self, tokens: float, busy_s: float) -> None:
        self._tokens += tokens
        self._busy_s += busy_s
        if self._busy_s > PREFILL_WINDOW_S:
            self._tokens *= PREFILL_WINDOW_S / self._busy_s
            self._busy_s = PREFILL_WINDOW_S

    def _add_steps(self, growth: Sequence[float]) -> None:
        self._steps = [old + new for old, new in zip(self._steps, growth, strict=True)]
        if self._steps[0] > DECODE_WINDOW_STEPS:
            scale = DECODE_WINDOW_STEPS / self._steps[0]
            self._steps = [value * scale for value in self._steps]


def fit_decode(sums: Sequence[float]) -> DecodeFit | None:
    """Least squares from moments (n, Σb, Σt_us, Σb², Σb·t_us).

    None below MIN_DECODE_STEPS steps. If the batch size hardly varied, or the
    line would have a negative part, the mean step time is split by ASSUMED_SLOPE.
    """
    steps, batch, time_us, batch_sq, cross = sums
    if steps < MIN_DECODE_STEPS or time_us <= 0:
        return None
    mean_batch, mean_s = batch / steps, time_us / steps / 1e6
    variance = batch_sq / steps - mean_batch * mean_batch
    if variance >= MIN_BATCH_VARIANCE:
        slope_s = (cross / steps / 1e6 - mean_batch * mean_s) / variance
        base_s = mean_s - slope_s * mean_batch
        if slope_s >= 0 and base_s >= 0:
            return DecodeFit(base_s, slope_s)
    base_s = mean_s / (1 + ASSUMED_SLOPE * mean_batch)
    return DecodeFit(base_s, base_s * ASSUMED_SLOPE)
