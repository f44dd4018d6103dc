"""What a run comes to: percentiles, throughput, goodput. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pdserve.loadgen.run import RunResult


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds, over all that were measured; NaN of nothing."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one service. Times in seconds, rates per second of ``wall_s``.

    ``goodput``: requests per second that met both limits of the SLO (all whole ones if none was given);
    ``late``: the worst delay between a request's time and its sending, the generator's own fault.
    """

    requests: int
    completed: int
    failed: int
    errors: dict[str, int]
    wall_s: float
    requests_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    input_tokens_s: float
    output_tokens_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    slo_ttft_s: float
    slo_tpot_s: float
    attainment: float
    goodput: float
    late: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation, as numpy's default."""
    if not values:
        return Spread(0, *[math.nan] * 6)
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    mean = sum(ordered) / len(ordered)
    return Spread(len(ordered), mean, at(0.5), at(0.9), at(0.95), at(0.99), ordered[-1])


def summarize(result: RunResult, slo_ttft_s: float = 0.0, slo_tpot_s: float = 0.0) -> Summary:
    """Figures of one run. An SLO of 0 asks for nothing."""
    whole = [outcome for outcome in result.outcomes if outcome.is_ok]
    wall_s = result.wall_s or math.inf
    good = sum(
        (not slo_ttft_s or each.ttft_s <= slo_ttft_s)
        and (not slo_tpot_s or each.tpot_s is None or each.tpot_s <= slo_tpot_s)
        for each in whole
    )
    output_tokens = sum(each.output_tokens for each in whole)
    input_tokens = sum(each.prompt_tokens for each in whole)
    errors = Counter(each.error[:160] for each in result.outcomes if not each.is_ok)
    return Summary(
        requests=len(result.outcomes),
        completed=len(whole),
        failed=len(result.outcomes) - len(whole),
        errors=dict(errors.most_common(5)),
        wall_s=result.wall_s,
        requests_s=len(whole) / wall_s,
        input_tokens=input_tokens,
        cached_tokens=sum(each.cached_tokens for each in whole),
        output_tokens=output_tokens,
        input_tokens_s=input_tokens / wall_s,
        output_tokens_s=output_tokens / wall_s,
        ttft=spread([each.ttft_s for each in whole]),
        tpot=spread([each.tpot_s for each in whole if each.tpot_s is not None]),
        itl=spread([gap for each in whole for gap in each.gaps_s]),
        e2e=spread([each.e2e_s for each in whole]),
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
        attainment=good / len(result.outcomes) if result.outcomes else 0.0,
        goodput=good / wall_s,
        late=max((each.late_s for each in result.outcomes), default=0.0),
    )
