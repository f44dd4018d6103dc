"""What came of a run: each request's times, and the figures people compare.

Times are what a client sees: TTFT from its arrival at the balancer to the first token of the decode leg,
TPOT the mean gap between tokens after the first. A request that was refused meets no SLO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdserve.errors import ConfigError
from pdserve.sim.engine import SimRequest


class Slo(msgspec.Struct, frozen=True):
    """Limits in seconds: time to the first token, mean time per token after it."""

    ttft_s: float
    tpot_s: float


def parse_slo(text: str) -> Slo:
    """Read ``ttft=2,tpot=0.05`` (seconds).

    Raises:
        ConfigError: for anything else.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"slo: expected ttft=SECONDS,tpot=SECONDS, got {text!r}") from None
    if set(values) != {"ttft", "tpot"} or not all(0 < value < float("inf") for value in values.values()):
        raise ConfigError(f"slo: expected ttft=SECONDS,tpot=SECONDS, both positive, got {text!r}")
    return Slo(values["ttft"], values["tpot"])


class SimulatedRequest(msgspec.Struct, frozen=True):
    """One request's outcome. Seconds since the run's start, or spans; -1 where it did not get that far.

    ``tpot_s`` is 0 for an answer of one token. ``error`` is empty if it was served.
    """

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefill: int
    decode: int
    queue_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    cached_tokens: int
    decode_cached_tokens: int
    transfer_s: float
    retractions: int
    error: str

    @classmethod
    def of(cls, request: SimRequest, response_s: float) -> SimulatedRequest:
        """Of a request that has ended; ``response_s``: from a token's making to the client."""
        first_s, ended_s = request.first_token_s, request.finished_s
        tokens = request.output_tokens - 1
        is_served = not request.error
        ttft_s = first_s + response_s - request.arrival_s if is_served else -1.0
        tpot_s = (ended_s - first_s - response_s) / tokens if is_served and tokens > 0 else 0.0
        paired = request.paired_s >= 0
        return cls(
            request.index,
            request.arrival_s,
            request.prompt_tokens,
            request.output_tokens,
            request.prefill,
            request.decode,
            (request.paired_s if paired else ended_s) - request.arrival_s,
            ttft_s,
            tpot_s,
            ended_s - request.arrival_s,
            request.cached_tokens,
            request.decode_cached_tokens,
            request.kv_ready_s - request.prefill_end_s if is_served else -1.0,
            request.num_retracted,
            request.error,
        )

    def meets(self, slo: Slo) -> bool:
        """True if it was served within both limits."""
        return not self.error and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """Shares of the run a worker and its network were busy; tokens computed (on decode: received) and
    tokens found in its cache."""

    busy: float
    link: float
    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class UseReport:
    """All workers, and how often decode retracted a request. ``gaps``: (seconds, tokens), the gaps between
    tokens, shortest first; the wait of a retracted request is not among them."""

    prefills: list[WorkerUse]
    decodes: list[WorkerUse]
    retractions: int
    gaps: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class SimReport:
    """A run's outcome. ``records`` in order of arrival, one per request."""

    policy: str
    model: str
    records: list[SimulatedRequest]
    use: UseReport
    span_s: float
    num_events: int
    shed: dict[str, int]

    @property
    def served(self) -> list[SimulatedRequest]:
        """Those that were answered."""
        return [record for record in self.records if not record.error]

    def window_s(self) -> float:
        """From the first arrival to the last: the time over which rates are counted."""
        return max(1e-9, self.records[-1].arrival_s - self.records[0].arrival_s)

    def attainment(self, slo: Slo) -> float:
        """Share of all requests that were served within both limits."""
        return sum(record.meets(slo) for record in self.records) / len(self.records)

    def rate(self) -> float:
        """Requests that came per second."""
        return len(self.records) / self.window_s()

    def goodput(self, slo: Slo) -> float:
        """Requests per second that were served within both limits: attainment times the rate they came at."""
        return self.attainment(slo) * self.rate()

    def percentile(self, field: str, share: float) -> float:
        """Of a field of the served requests, such as ``ttft_s``; NaN if none was served."""
        return percentile([getattr(record, field) for record in self.served], share)

    def itl_percentile(self, share: float) -> float:
        """Of the gaps between two tokens of an answer, over all tokens, within 1 %; NaN if there was none."""
        left = share * sum(tokens for _, tokens in self.use.gaps)
        for gap_s, tokens in self.use.gaps:
            left -= tokens
            if left <= 0:
                return gap_s
        return float("nan")

    def cache_hit_rate(self) -> float:
        """Share of prompt tokens that prefill found in its cache."""
        return _share(self.use.prefills)

    def decode_cache_hit_rate(self) -> float:
        """Share of prompt tokens that decode had already."""
        return _share(self.use.decodes)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _share(workers: Sequence[WorkerUse]) -> float:
    cached = sum(worker.cached_tokens for worker in workers)
    new = sum(worker.new_tokens for worker in workers)
    return cached / (cached + new) if cached + new else 0.0
