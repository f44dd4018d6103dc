"""Arrivals and lengths that no trace has: Poisson or burstier, shared prefixes, sessions of several turns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import log, sqrt

from pdserve.errors import ConfigError
from pdserve.workload.change import from_zero
from pdserve.workload.request import BLOCK_TOKENS, TracedRequest


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A distribution of lengths in tokens: ``fixed`` (mean), ``uniform`` (low..high) or ``lognormal``
    (mean, and ``cv``, the standard deviation over the mean), cut to low..high."""

    kind: str = "fixed"
    mean: float = 1024.0
    cv: float = 1.0
    low: int = 1
    high: int = 131_072

    def draw(self, draw: random.Random) -> int:
        """One length.

        Raises:
            ConfigError: for an unknown kind.
        """
        if self.kind == "fixed":
            value = self.mean
        elif self.kind == "uniform":
            return draw.randint(self.low, self.high)
        elif self.kind == "lognormal":
            variance = log(1 + self.cv * self.cv)
            value = draw.lognormvariate(log(self.mean) - variance / 2, sqrt(variance))
        else:
            raise ConfigError(f"lengths: expected fixed, uniform or lognormal, got {self.kind!r}")
        return min(self.high, max(self.low, round(value)))


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Arrivals that no trace has. ``cv`` of the gaps: 1 is Poisson. ``num_prefixes`` > 0: each session begins
    with one of so many shared prefixes of ``prefix_tokens``. ``turns``: requests per session, each with the
    conversation so far in front, ``think_s`` after the last on average."""

    rate: float
    requests: int
    inputs: LengthDistribution = LengthDistribution()
    outputs: LengthDistribution = LengthDistribution(mean=256)
    cv: float = 1.0
    num_prefixes: int = 0
    prefix_tokens: int = 0
    turns: int = 1
    think_s: float = 30.0
    max_new_tokens: int = 0


def synthetic(plan: Synthetic, seed: int) -> list[TracedRequest]:
    """Draw a workload; equal seeds give equal ones.

    Raises:
        ConfigError: for a rate, count or number of turns that is not positive.
    """
    if plan.rate <= 0 or plan.requests < 1 or plan.turns < 1 or plan.cv <= 0:
        raise ConfigError(
            f"synthetic: expected positive rate, requests, turns and cv, got {plan.rate}, {plan.requests}, "
            f"{plan.turns}, {plan.cv}"
        )
    draw = random.Random(seed)
    gap = 1.0 / (plan.cv * plan.cv)
    mean_s = plan.turns / plan.rate
    requests: list[TracedRequest] = []
    at_s, session = 0.0, 0
    while len(requests) < plan.requests:
        session += 1
        requests.extend(_session(plan, draw, at_s, session))
        at_s += draw.gammavariate(gap, mean_s / gap)
    return from_zero(requests[: plan.requests])


def _session(plan: Synthetic, draw: random.Random, at_s: float, session: int) -> list[TracedRequest]:
    size = BLOCK_TOKENS
    prefix = draw.randrange(plan.num_prefixes) if plan.num_prefixes else -1
    shared = plan.prefix_tokens // size if plan.num_prefixes else 0
    ids = [-(prefix * 10_000 + block) - 1 for block in range(shared)]
    tokens, turns = shared * size, []
    for turn in range(plan.turns):
        tokens += plan.inputs.draw(draw)
        answer = plan.outputs.draw(draw)
        whole = tokens // size
        ids += [(session << 20) + block for block in range(len(ids), whole)]
        tail = [(session << 20) + (turn + 1) * 32_768] if tokens % size else []
        turns.append(
            TracedRequest(
                at_s,
                tokens,
                answer,
                tuple(ids + tail) if plan.num_prefixes or plan.turns > 1 else None,
                max_new_tokens=plan.max_new_tokens,
                user=f"session-{session}" if plan.turns > 1 else "",
                serial=(session << 10) + turn,
            )
        )
        tokens += answer
        at_s += draw.expovariate(1.0 / plan.think_s) if plan.think_s > 0 else 0.0
    return turns
