"""Capacity of one worker: free KV tokens, request slots, expected wait. Pure.

    promised  = what our open legs may need: the prompt, on decode also up to 512 tokens of the answer
    committed = max(promised, sampled use + credit + what is reserved for answers, expected growth)
                                └ covers others' use, answers longer than forecast    └ kv_growth.py

SGLang admits a request to a decode worker when prompt + 512 fit beside 512 for each request
that is there (disaggregation/decode.py ``_required_admission_tokens``). Until then prefill waits for
its handshake, and its 300 s bootstrap timer runs; so what would not fit waits with us. That alone lets in
more long answers than can grow to their end, and SGLang retracts some; expected growth keeps that rare.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.scheduling.policy.view import WorkerView
from pdserve.scheduling.workers import WorkerSlots
from pdserve.types import Role

DECODE_RESERVE_TOKENS = 512
"""SGLang's ``--num-reserved-decode-tokens``: what it keeps free for each running request."""
ENDLESS = 2**62
"""Free tokens of a worker whose capacity is unknown, or that has nothing of ours."""
CLOSED = -1
"""Free tokens of a worker that takes nothing now."""
EASY_SHARE = 4
"""A request of at most this part of the pool fits wherever less than the rest is committed."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How far workers are filled. ``prefill_queue_s``: longest expected wait in a prefill server's queue;
    ``slo_tpot_s``: time per token that a decode batch must keep, 0: any."""

    prefill_queue_s: float
    slo_tpot_s: float = 0.0


def free_tokens(worker: WorkerSlots, limits: WorkerLimits) -> int:
    """KV tokens that may still be promised of a worker; CLOSED if it takes no request at all now.

    A worker with nothing of ours in flight always has room: a request that can never fit must reach
    SGLang, to get SGLang's own answer.
    """
    if not worker.num_inflight:
        return ENDLESS
    view = worker.view
    if worker.is_overloaded:
        return CLOSED
    if view.info.role is Role.PREFILL:
        if view.queued_tokens > limits.prefill_queue_s * view.prefill_tokens_s * view.info.dp_size:
            return CLOSED
    elif 0 < max_batch(view, limits.slo_tpot_s) <= view.num_reqs:
        return CLOSED
    capacity = view.kv_capacity
    if capacity <= 0:
        return ENDLESS
    return max(CLOSED, capacity - max(worker.growth.tokens, committed_tokens(worker)))


def has_room(worker: WorkerSlots, tokens: int, prompt_tokens: int, free: int) -> bool:
    """True if ``tokens`` may be promised now, where ``free`` is the result of ``free_tokens``.

    A worker too small for the prompt never has room for it; one too small only for the longest possible
    answer has room once it is empty.
    """
    capacity = worker.view.kv_capacity
    if 0 < capacity < tokens:
        if capacity < prompt_tokens:
            return False
        tokens = capacity
    return free >= tokens


def max_batch(view: WorkerView, slo_tpot_s: float) -> int:
    """Requests a decode worker may hold: its own limit, and the batch whose step still takes no longer than
    ``slo_tpot_s`` (0: any), but at least one; 0 if there is no limit."""
    limit = max(0, view.max_running_requests)
    if slo_tpot_s <= 0.0 or view.step_slope_s <= 0.0:
        return limit
    batch = int((slo_tpot_s - view.step_base_s) / view.step_slope_s * view.info.dp_size + 1e-6)
    batch = max(1, batch)
    return min(limit, batch) if limit else batch


def committed_tokens(worker: WorkerSlots) -> int:
    """KV tokens in use or promised by SGLang's own rule."""
    return max(worker.promised_tokens, worker.view.kv_tokens + worker.reserved_tokens)


def easy_tokens(worker: WorkerSlots) -> int:
    """Requests up to this size need no look at a worker that is not tight."""
    capacity = worker.view.kv_capacity
    return capacity // EASY_SHARE if capacity > 0 else ENDLESS


def set_calm(worker: WorkerSlots, limits: WorkerLimits) -> None:
    """Set the limits below which the worker is not tight: plain numbers, compared at each dispatch."""
    view, capacity = worker.view, worker.view.kv_capacity
    worker.calm_tokens = capacity - easy_tokens(worker) if capacity > 0 else ENDLESS
    is_prefill = worker.role is Role.PREFILL
    worker.calm_reqs = ENDLESS if is_prefill else max_batch(view, limits.slo_tpot_s) or ENDLESS
    rate = view.prefill_tokens_s * view.info.dp_size
    worker.calm_queue = limits.prefill_queue_s * rate if is_prefill else ENDLESS


def is_calm(worker: WorkerSlots) -> bool:
    """True if by these numbers the worker is not tight."""
    view = worker.view
    return (
        view.kv_tokens + worker.reserved_tokens <= worker.calm_tokens
        and worker.promised_tokens <= worker.calm_tokens
        and view.num_reqs < worker.calm_reqs
        and view.queued_tokens <= worker.calm_queue
    )
