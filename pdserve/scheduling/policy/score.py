"""What a request would cost on a worker, in seconds. Pure arithmetic over WorkerView.

Each term and where it comes from:

- prefill, the expected wait for the first token: ``(tokens ahead + own uncached tokens) / rate``.
  Tokens ahead = SGLang's ``num_waiting_uncached_tokens`` plus exact in-flight credit (load.py); rate
  fitted from the workers' own counters (rates.py). The form of smg's ``least_load``, with the prefix
  credit of Dynamo's KV router.
- decode: ``tokens * step_s(batch)`` for the request itself, and for each of the others what one more
  request in the batch slows them by; step time ``a + b * batch`` fitted from ``decode_moments``. A full
  batch adds the wait until enough of it has finished.
- both: ``0.15 * k / (1 - k)``, k = KV pool use with this request in it: smg's
  ``least_load`` headroom term. It explodes near a full pool, where SGLang retracts.

The two legs share no term but ``Candidates.link_s``, the time the KV travels: while links count as
alike, the best pair is the best prefill with the best decode worker.
"""

from __future__ import annotations

from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import RequestShape

HEADROOM_S = 0.15
MAX_HEADROOM_S = HEADROOM_S * 99
"""k is cut at 0.99: 15 s is bad enough for any comparison."""
EXPECTED_TOKENS = 343
"""Mean output of the Mooncake conversation trace; ``max_new_tokens`` is a limit, rarely a forecast."""
REQUEST_TOKENS = 64
"""A request that is all cached still costs about as much as this many tokens: a batch of its own."""


def headroom_s(view: WorkerView, tokens: int) -> float:
    """Penalty for a KV pool that would be nearly full with ``tokens`` more; 0 if its size is unknown."""
    capacity = view.kv_capacity
    if capacity <= 0:
        return 0.0
    used = view.kv_tokens + tokens
    free = capacity - used
    return HEADROOM_S * used / free if free * 100 > capacity else MAX_HEADROOM_S


def prefill_cost_s(view: WorkerView, request: RequestShape, cached_tokens: int = 0) -> float:
    """Seconds until this worker, with so much of the prompt in its cache, would have prefilled it."""
    tokens = request.prompt_tokens
    wait_s = (view.queued_tokens + tokens - cached_tokens) / (view.prefill_tokens_s * view.info.dp_size)
    return wait_s + headroom_s(view, tokens) if view.kv_capacity else wait_s


def decode_cost_s(view: WorkerView, request: RequestShape) -> float:
    """Seconds this worker would take to decode the request, waiting for a slot and what the others
    of its batch lose included."""
    tokens = request.max_new_tokens
    if tokens > EXPECTED_TOKENS:
        tokens = EXPECTED_TOKENS
    others, slots = view.num_reqs, view.max_running_requests
    slope_s = view.step_slope_s / view.info.dp_size
    if slots <= 0 or others < slots:
        busy_s = tokens * (view.step_base_s + slope_s * (2 * others + 1))
    else:
        decode_s = tokens * (view.step_base_s + slope_s * slots)
        # Slots free up at rate slots / decode_s, so each request too many waits decode_s / slots.
        busy_s = decode_s * (1.0 + (others + 1 - slots) / slots) + tokens * slope_s * (slots - 1)
    return busy_s + headroom_s(view, request.prompt_tokens + tokens) if view.kv_capacity else busy_s


def most_cached(request: RequestShape, share: float) -> int:
    """Tokens to count as cached of a prompt of which a worker was sent ``share`` before."""
    tokens = request.prompt_tokens
    return min(int(tokens * share), max(0, tokens - REQUEST_TOKENS))
