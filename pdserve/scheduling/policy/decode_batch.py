"""What a request costs on a decode worker: its own time, what it slows the others by, room.

- own time: ``tokens * step_s(batch)``, tokens the forecast's mean, step time ``a + b * batch`` fitted
  from the workers' own ``decode_moments`` (rates.py);
- the others: each of them is ``b`` slower per step while both are there. Answer lengths are about
  exponential, so the rest of a running answer is expected to be as long as a new one, and the shorter
  of two with means L and M is ``L * M / (L + M)`` long: ``batch * b * L * M / (L + M)``;
- admission: a full batch, or a KV pool that the prompt and 512 tokens do not fit
  (SGLang's decode admission), frees room as the batch ends, in ``M * step_s`` for all of it;
- headroom: ``0.15 * k / (1 - k)``, smg's ``least_load`` term, with k the pool use when the answers
  have grown as forecast, this one to its high end: near 1 SGLang retracts and computes twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.scheduling.policy.score import EXPECTED_TOKENS, HEADROOM_S, MAX_HEADROOM_S
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import Forecast, InstanceId, RequestShape

RESERVE_TOKENS = 512
"""SGLang's ``--num-reserved-decode-tokens``."""
GROWN_SHARE = 0.5
"""Of the answers that run now this much is still to come: at any moment they are half done on average."""


def forecast_of(request: RequestShape) -> Forecast:
    """The balancer's forecast; without one, ``max_tokens`` up to the mean of a conversation trace."""
    if request.forecast is not None:
        return request.forecast
    tokens = float(min(request.max_new_tokens, EXPECTED_TOKENS))
    return Forecast(tokens, 0.0, tokens)


class DecodeBatch:
    """Our own unfinished answers on one decode worker, as forecast."""

    __slots__ = ("count", "mean_tokens")

    def __init__(self) -> None:
        self.count = 0
        self.mean_tokens = 0.0

    def send(self, forecast: Forecast) -> None:
        """The worker is sent one more."""
        self.count += 1
        self.mean_tokens += forecast.mean

    def end(self, forecast: Forecast) -> None:
        """One is over."""
        self.count -= 1
        self.mean_tokens -= forecast.mean


Batches = dict[InstanceId, DecodeBatch]


def decode_costs_s(
    request: RequestShape, views: Sequence[WorkerView], batches: Batches, slo_tpot_s: float, miss_s: float
) -> list[float]:
    """Seconds for each worker; ``miss_s`` more where a step of the grown batch takes over ``slo_tpot_s``."""
    forecast = forecast_of(request)
    num = max(1, request.num_prompts)
    tokens = max(1.0, forecast.mean)
    grown = request.prompt_tokens + num * forecast.high
    costs = []
    for view in views:
        batch = batches.get(view.info.instance_id)
        others, slots = view.num_reqs, view.max_running_requests
        mean = batch.mean_tokens / batch.count if batch is not None and batch.count > 0 else tokens
        slope_s = view.step_slope_s / view.info.dp_size
        running = others if slots <= 0 or others < slots else max(0, slots - num)
        step_s = view.step_base_s + slope_s * (running + num)
        cost_s = tokens * step_s + slope_s * num * others * tokens * mean / (tokens + mean)
        if 0 < slots < others + num:
            cost_s += (others + num - slots) / slots * mean * step_s
        capacity = view.kv_capacity
        if capacity > 0:
            growth = GROWN_SHARE * batch.mean_tokens if batch is not None else 0.0
            cost_s += _room_s(view.kv_tokens + growth, grown, capacity, mean * step_s)
            lacking = view.kv_tokens + request.prompt_tokens + RESERVE_TOKENS * (others + num) - capacity
            if lacking > 0:
                cost_s += min(1.0 + others, lacking / (view.kv_tokens + 1.0)) * mean * step_s
        if 0.0 < slo_tpot_s < step_s:
            cost_s += miss_s
        costs.append(cost_s)
    return costs


def _room_s(used: float, tokens: float, capacity: int, turnover_s: float) -> float:
    """Penalty for a pool that would be nearly full; beyond it, the time until enough is free."""
    used += tokens
    free = capacity - used
    if free * 100 > capacity:
        return HEADROOM_S * used / free
    return MAX_HEADROOM_S + max(0.0, -free / capacity) * turnover_s
