"""What a request would cost on a worker, in seconds. Pure arithmetic over WorkerView.

Each term and where it comes from:

- prefill: ``(tokens ahead + own prompt) / rate``. Tokens ahead = SGLang's
  ``num_waiting_uncached_tokens`` plus exact in-flight credit (load.py); rate fitted
  from the worker's own counters (rates.py). The form of smg's ``least_load``.
- decode: ``tokens * step_s(batch)``, step time ``a + b * batch`` fitted from
  ``decode_moments``; a full batch adds the wait until enough of it has finished.
- both: ``0.15 * k / (1 - k)``, k = KV pool use with this request in it: smg's
  ``least_load`` headroom term. It explodes near a full pool, where SGLang retracts.

The two legs share no term, so the best pair is the best prefill with the best
decode worker; a link cost, if one comes, is the only thing that couples them.
"""

from __future__ import annotations

from pdserve.balancer.policy.view import WorkerView
from pdserve.types import RequestShape

HEADROOM_S = 0.15
MAX_USE = 0.99
"""k is cut here: 0.15 * 99 = 15 s is bad enough for any comparison."""
EXPECTED_TOKENS = 343
"""Mean output of the Mooncake conversation trace; ``max_new_tokens`` is a limit, rarely a forecast."""


def headroom_s(view: WorkerView, tokens: int) -> float:
    """Penalty for a KV pool that would be nearly full with ``tokens`` more; 0 if its size is unknown."""
    if view.kv_capacity <= 0:
        return 0.0
    use = min(MAX_USE, (view.kv_tokens + tokens) / view.kv_capacity)
    return HEADROOM_S * use / (1.0 - use)


def prefill_cost_s(view: WorkerView, request: RequestShape) -> float:
    """Seconds until this worker would have prefilled the request."""
    tokens = view.queued_tokens + request.prompt_tokens
    return tokens / (view.prefill_tokens_s * view.info.dp_size) + headroom_s(view, request.prompt_tokens)


def decode_cost_s(view: WorkerView, request: RequestShape) -> float:
    """Seconds this worker would take to decode the request, waiting for a slot included."""
    tokens = min(request.max_new_tokens, EXPECTED_TOKENS)
    reqs = view.num_reqs + 1
    slots = view.max_running_requests or reqs
    running = min(reqs, slots)
    decode_s = tokens * (view.step_base_s + view.step_slope_s * running / view.info.dp_size)
    # Slots free up at rate slots / decode_s, so each request too many waits decode_s / slots.
    wait_s = decode_s * (reqs - running) / slots
    return decode_s + wait_s + headroom_s(view, request.prompt_tokens + tokens)
