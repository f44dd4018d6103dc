"""Fits the speed of each worker from SGLang's cumulative counters.

Prefill: tokens per busy second from the growth of ``total_prefill_uncached_tokens``
and ``total_prefill_busy_us``. Decode: step time ``a + b * batch`` by least squares
over the growth of ``decode_moments`` (n, Σb, Σt_us, Σb², Σb·t).

A worker alone is a poor witness: it saw only the batch sizes it was given, and a
line through those says little of others; its first steps are slow; a burst
is over before there is much evidence. So workers of one kind share one line,
fitted to all their counters, and a worker's own speed is a factor to it: the time
its steps took over the time the line gives to those very steps.

    counters ─► growth ─► Evidence of each worker ─┬─► shared line    (pool)
                                                   └─► its factor, as far as proven

A factor counts only as far as it is proven; equal until proven different, or one slow
start would keep from a worker the very traffic that would prove it wrong. Evidence leaks: it
is held to a fixed window and halves every HALF_LIFE_S.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pdserve.linear_fit import LinearFit
from pdserve.types import WorkerLoad

HALF_LIFE_S = 20.0
WINDOW_STEPS = 2000.0
WINDOW_BUSY_S = 10.0
"""Decode steps and prefill seconds remembered at most."""
COLD_STEPS = 32
COLD_TOKENS = 512
"""What a process did first is no measure of it: kernels are loaded and compiled then. On a CPU a first
step takes up to two seconds, a hundred times its usual time."""
MIN_STEPS = 8.0
MIN_TOKENS = 64.0
"""A pool with less has no line yet."""
MIN_BATCH_VARIANCE = 0.25
"""Below it the batch size hardly moved and a line through the cloud means nothing."""
ASSUMED_SLOPE = 0.02
"""One more request costs 2 % of a step, while the batch size never moved. An assumption: reading
the weights dominates a decode step at small batch."""
POOL_ROUNDS = 3
"""Rounds of line, then factors, then line: the third changes nothing any more by even 1 %."""

MAX_LOG_RATIO = math.log(4.0)
"""An observation further off than four times says that something else happened."""
OBSERVATION_S = 0.25
OBSERVATION_STEPS = 2
"""So many seconds of work, and steps, are one observation: steps of one moment err alike."""
PRIOR_OBSERVATIONS = 4.0
PRIOR_DEVIATION = 0.3
"""What is believed of an unseen worker: it is like the others, give or take 30 %, on so much evidence."""
CORRELATION = 2.0
"""Observations that follow each other err alike; their mean is this much less certain (its variance)."""
SIGNIFICANCE = 2.0
"""Standard errors."""
EQUAL_SHARE = 0.08
"""Machines of one kind differ by this much and nobody should care."""


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Decode step time in seconds: ``base_s + slope_s * batch``; both non-negative."""

    base_s: float
    slope_s: float

    def step_s(self, batch: float) -> float:
        """Seconds of one decode step with ``batch`` requests on one DP rank."""
        return self.base_s + self.slope_s * batch

    def seconds(self, steps: float, batches: float) -> float:
        """Seconds of ``steps`` steps whose batch sizes add up to ``batches``."""
        return self.base_s * steps + self.slope_s * batches


@dataclass(frozen=True, slots=True)
class SharedRates:
    """What workers of one kind have in common. The defaults are equal for all: they order by queue only."""

    prefill_tokens_s: float = 10_000.0
    decode: DecodeFit = DecodeFit(base_s=0.02, slope_s=0.02 * ASSUMED_SLOPE)


@dataclass(slots=True)
class Deviation:
    """Spread of a worker's observed log ratios, observed over expected time."""

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, log_ratio: float, weight: float) -> None:
        """One observation; ``weight`` below 1 if it is but a part of one."""
        self.weight += weight
        self.total += weight * log_ratio
        self.squares += weight * log_ratio * log_ratio

    def fade(self, keep: float) -> None:
        """Evidence grows old."""
        self.weight *= keep
        self.total *= keep
        self.squares *= keep

    def proven(self, log_ratio: float) -> float:
        """How much of a measured mean log ratio to act upon: none of it while it may be chance or of no
        account, all of it once it is twice what may be."""
        weight = self.weight
        if weight <= 0.0:
            return 0.0
        mean = self.total / weight
        trust = weight + PRIOR_OBSERVATIONS
        spread = max(0.0, self.squares - weight * mean * mean) + PRIOR_OBSERVATIONS * PRIOR_DEVIATION**2
        error = math.sqrt(spread / trust * CORRELATION / trust)
        shrunk = log_ratio * weight / trust
        doubt = EQUAL_SHARE + SIGNIFICANCE * error
        return shrunk * min(1.0, max(0.0, abs(shrunk) / doubt - 1.0))


@dataclass(slots=True, eq=False)
class RateFit:
    """Evidence of one worker's speed; feed it every sample in order of receipt."""

    tokens: float = 0.0
    busy_s: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0] * 5)
    _prefill: Deviation = field(default_factory=Deviation)
    _decode: Deviation = field(default_factory=Deviation)
    _last: WorkerLoad | None = None

    def update(self, load: WorkerLoad, shared: SharedRates | None) -> None:
        """Add what the counters grew by since the last sample; a counter that fell starts anew.

        ``shared``: what the worker's kind was fitted to so far, if at all.
        """
        last, self._last = self._last, load
        if last is None:  # of unknown age
            return
        elapsed_s = load.timestamp_s - last.timestamp_s
        if elapsed_s > 0:
            self._fade(0.5 ** (elapsed_s / HALF_LIFE_S))
        tokens = load.total_prefill_uncached_tokens - last.total_prefill_uncached_tokens
        busy_us = load.total_prefill_busy_us - last.total_prefill_busy_us
        if tokens > 0 and busy_us > 0 and last.total_prefill_uncached_tokens >= COLD_TOKENS:
            self._add_prefill(tokens, busy_us / 1e6, shared)
        if len(load.decode_moments) >= 5:
            before = last.decode_moments[:5] or (0.0,) * 5
            growth = [new - old for new, old in zip(load.decode_moments, before, strict=False)]
            if before[0] >= COLD_STEPS and min(growth) >= 0 and growth[0] > 0 and growth[2] > 0:
                self._add_steps(growth, shared)

    def prefill_tokens_s(self, shared: SharedRates) -> float:
        """This worker's tokens per busy second, as far as it is proven to differ from its kind."""
        if self.tokens <= 0:
            return shared.prefill_tokens_s
        log_ratio = _log_ratio(self.busy_s, self.tokens / shared.prefill_tokens_s)
        return shared.prefill_tokens_s / math.exp(self._prefill.proven(log_ratio))

    def decode(self, shared: SharedRates) -> DecodeFit:
        """This worker's step times, as far as they are proven to differ from its kind."""
        line, (steps, batches, time_us, *_) = shared.decode, self.moments
        if steps <= 0:
            return line
        factor = math.exp(self._decode.proven(_log_ratio(time_us / 1e6, line.seconds(steps, batches))))
        return DecodeFit(line.base_s * factor, line.slope_s * factor)

    def _fade(self, keep: float) -> None:
        self.tokens *= keep
        self.busy_s *= keep
        self.moments = [value * keep for value in self.moments]
        self._prefill.fade(keep)
        self._decode.fade(keep)

    def _add_prefill(self, tokens: float, busy_s: float, shared: SharedRates | None) -> None:
        if shared is not None:
            expected_s = tokens / shared.prefill_tokens_s
            log_ratio = _log_ratio(busy_s, expected_s)
            self._prefill.add(log_ratio, min(1.0, busy_s / OBSERVATION_S))
            busy_s = expected_s * math.exp(log_ratio)
        keep = min(1.0, WINDOW_BUSY_S / (self.busy_s + busy_s))
        self.tokens = (self.tokens + tokens) * keep
        self.busy_s = (self.busy_s + busy_s) * keep

    def _add_steps(self, growth: Sequence[float], shared: SharedRates | None) -> None:
        steps, batches, time_us, squares, cross = growth
        if shared is not None:
            took_s, expected_s = time_us / 1e6, shared.decode.seconds(steps, batches)
            log_ratio = _log_ratio(took_s, expected_s)
            weight = min(1.0, took_s / OBSERVATION_S, steps / OBSERVATION_STEPS)
            self._decode.add(log_ratio, weight)
            believed = expected_s * math.exp(log_ratio) / took_s
            time_us, cross = time_us * believed, cross * believed
        keep = min(1.0, WINDOW_STEPS / (self.moments[0] + steps))
        added = (steps, batches, time_us, squares, cross)
        self.moments = [(old + new) * keep for old, new in zip(self.moments, added, strict=True)]


def _log_ratio(took_s: float, expected_s: float) -> float:
    if took_s <= 0.0 or expected_s <= 0.0:
        return 0.0
    return max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, math.log(took_s / expected_s)))


def pool_prefill(fits: Iterable[RateFit]) -> float | None:
    """Tokens per busy second of all these workers; None while there is too little evidence."""
    tokens = busy_s = 0.0
    for fit in fits:
        tokens += fit.tokens
        busy_s += fit.busy_s
    return tokens / busy_s if tokens >= MIN_TOKENS and busy_s > 0 else None


def pool_decode(fits: Iterable[RateFit]) -> DecodeFit | None:
    """One step-time line for all these workers; None while there is too little evidence.

    Each worker's times are first divided by its own factor, or a slow worker
    with small batches beside a fast one with large ones would tilt the line.
    """
    rows = [fit.moments for fit in fits if fit.moments[0] > 0]
    factors = [1.0] * len(rows)
    line: DecodeFit | None = None
    for _ in range(POOL_ROUNDS):
        sums = [0.0] * 5
        for (steps, batches, time_us, squares, cross), factor in zip(rows, factors, strict=True):
            added = (steps, batches, time_us / factor, squares, cross / factor)
            sums = [old + new for old, new in zip(sums, added, strict=True)]
        line = fit_decode(sums)
        if line is None or len(rows) < 2:
            break
        factors = [math.exp(_log_ratio(row[2] / 1e6, line.seconds(row[0], row[1]))) for row in rows]
    return line


def fit_decode(sums: Sequence[float]) -> DecodeFit | None:
    """Least squares from moments (n, Σb, Σt_us, Σb², Σb·t_us).

    None below MIN_STEPS steps. If the batch size hardly varied, or steps seem to get
    shorter with it, the mean step time is split by ASSUMED_SLOPE; a line that would
    start below zero goes through zero.
    """
    steps, batch, time_us, batch_sq, cross = sums
    if steps < MIN_STEPS or time_us <= 0:
        return None
    mean_batch = batch / steps
    if batch_sq / steps - mean_batch * mean_batch >= MIN_BATCH_VARIANCE:
        base_s, slope_s = LinearFit(steps, batch, batch_sq, time_us / 1e6, cross / 1e6).solve()
        if slope_s >= 0:
            return DecodeFit(base_s, slope_s) if base_s >= 0 else DecodeFit(0.0, cross / batch_sq / 1e6)
    base_s = time_us / steps / 1e6 / (1 + ASSUMED_SLOPE * mean_batch)
    return DecodeFit(base_s, base_s * ASSUMED_SLOPE)
