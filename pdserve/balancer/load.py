"""What the balancer knows of each worker's load, exact between polls.

            poll /v1/loads ──► record() ─┐
    dispatch() ─► open legs ─► credit ───┼──► view(): one immutable WorkerView
            finish() ◄── leg ended ──────┘

A sample is stale as soon as it is taken. The balancer is the one that sends
the requests, so it knows what the sample cannot contain: the *in-flight
credit*, every leg dispatched after the sample's cover time and not finished.
Without it a plain argmin sends a whole poll interval's arrivals to one worker.

Holds no socket and reads no clock: times come in as arguments.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from pdserve.balancer.policy.view import WorkerView
from pdserve.balancer.rates import DEFAULT_DECODE, DEFAULT_PREFILL_TOKENS_S, DecodeFit, RateFit
from pdserve.balancer.sample import Sample
from pdserve.types import InstanceId, Role, WorkerInfo, WorkerLoad


@dataclass(frozen=True, slots=True)
class OpenLeg:
    """One unfinished leg of a request of ours on one worker."""

    prompt_tokens: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class Credit:
    """Open legs that the last sample cannot contain."""

    reqs: int = 0
    prompt_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    info: WorkerInfo
    load: WorkerLoad | None = None
    covered_s: float = float("-inf")
    fit: RateFit = field(default_factory=RateFit)
    open_legs: dict[int, OpenLeg] = field(default_factory=dict)
    open_tokens: int = 0
    credit_reqs: int = 0
    credit_tokens: int = 0
    last_turn: int = 0
    view: WorkerView | None = None

    def recount(self) -> None:
        fresh = [leg.prompt_tokens for leg in self.open_legs.values() if leg.sent_s >= self.covered_s]
        self.credit_reqs, self.credit_tokens = len(fresh), sum(fresh)


class LoadTable:
    """Samples, in-flight legs and fitted rates of every worker, by instance."""

    def __init__(self) -> None:
        self._entries: dict[InstanceId, _Entry] = {}
        self._turn = 0
        self._prefill_tokens_s = DEFAULT_PREFILL_TOKENS_S
        self._decode = DEFAULT_DECODE

    def add(self, info: WorkerInfo) -> None:
        """Know a worker, or its changed description; legs and samples of a known one stay."""
        entry = self._entries.get(info.instance_id)
        if entry is None:
            self._entries[info.instance_id] = _Entry(info)
        else:
            entry.info, entry.view = info, None

    def remove(self, instance_id: InstanceId) -> None:
        """Forget a worker; finishing its legs afterwards is allowed and does nothing."""
        self._entries.pop(instance_id, None)

    def dispatch(self, instance_id: InstanceId, prompt_tokens: int, now_s: float) -> int:
        """Count a new leg on a worker; returns the number by which ``finish`` ends it."""
        self._turn += 1
        entry = self._entries[instance_id]
        entry.open_legs[self._turn] = OpenLeg(prompt_tokens, now_s)
        entry.open_tokens += prompt_tokens
        if now_s >= entry.covered_s:
            entry.credit_reqs += 1
            entry.credit_tokens += prompt_tokens
        entry.last_turn, entry.view = self._turn, None
        return self._turn

    def finish(self, instance_id: InstanceId, leg: int) -> None:
        """End a leg. Unknown workers and legs that have ended are ignored."""
        entry = self._entries.get(instance_id)
        ended = entry.open_legs.pop(leg, None) if entry else None
        if entry is None or ended is None:
            return
        entry.open_tokens -= ended.prompt_tokens
        if ended.sent_s >= entry.covered_s:
            entry.credit_reqs -= 1
            entry.credit_tokens -= ended.prompt_tokens
        entry.view = None

    def record(self, instance_id: InstanceId, sample: Sample) -> None:
        """Take a sample; legs it covers stop being credit. Unknown workers are ignored."""
        entry = self._entries.get(instance_id)
        if entry is None:
            return
        entry.load, entry.covered_s, entry.view = sample.load, sample.covered_s, None
        entry.recount()
        entry.fit.update(sample.load)
        self._refresh_defaults()

    def inflight(self, instance_id: InstanceId) -> int:
        """Open legs of ours on this worker; 0 if unknown."""
        entry = self._entries.get(instance_id)
        return len(entry.open_legs) if entry else 0

    def load(self, instance_id: InstanceId) -> WorkerLoad | None:
        """The last sample as the worker gave it, or None before the first."""
        entry = self._entries.get(instance_id)
        return entry.load if entry else None

    def credit(self, instance_id: InstanceId) -> Credit:
        """What we dispatched to this worker that its last sample cannot contain."""
        entry = self._entries.get(instance_id)
        return Credit(entry.credit_reqs, entry.credit_tokens) if entry else Credit()

    def view(self, instance_id: InstanceId) -> WorkerView:
        """The worker as policies see it now; the same object until something changes.

        Raises:
            KeyError: if the worker is not known.
        """
        entry = self._entries[instance_id]
        if entry.view is None:
            entry.view = self._build_view(entry)
        return entry.view

    def snapshot(self) -> dict[InstanceId, WorkerView]:
        """Every known worker's view."""
        return {instance_id: self.view(instance_id) for instance_id in self._entries}

    def _build_view(self, entry: _Entry) -> WorkerView:
        load, info = entry.load, entry.info
        decode = entry.fit.decode_near(self._decode)
        return WorkerView(
            info=info,
            load=load,
            inflight=len(entry.open_legs),
            queued_tokens=_queued_tokens(entry),
            num_reqs=_num_reqs(entry),
            kv_tokens=_kv_tokens(entry),
            kv_capacity=(load.max_total_num_tokens if load else 0) or info.max_total_num_tokens,
            max_running_requests=load.max_running_requests if load else 0,
            prefill_tokens_s=entry.fit.prefill_tokens_s_near(self._prefill_tokens_s),
            step_base_s=decode.base_s,
            step_slope_s=decode.slope_s,
            last_turn=entry.last_turn,
        )

    def _refresh_defaults(self) -> None:
        """An unmeasured worker is taken to be like the measured ones of its role, not like a guess:
        a guess far off would send a whole burst to it, or nothing."""
        prefill = [e.fit.prefill_tokens_s for e in self._entries.values() if e.info.role is Role.PREFILL]
        decode = [e.fit.decode for e in self._entries.values() if e.info.role is Role.DECODE]
        rates = [rate for rate in prefill if rate is not None]
        fits = [fit for fit in decode if fit is not None]
        if rates:
            self._prefill_tokens_s = statistics.median(rates)
        if fits:
            self._decode = DecodeFit(
                statistics.median(fit.base_s for fit in fits), statistics.median(fit.slope_s for fit in fits)
            )
        for entry in self._entries.values():
            entry.view = None


def _queued_tokens(entry: _Entry) -> float:
    """Prompt tokens a prefill worker still has to compute.

    SGLang's ``num_waiting_uncached_tokens`` leaves out two groups, both known
    from our ledger only: requests in the bootstrap queue (counted in
    ``num_waiting_reqs``) and those of the running batch, which no queue lists.
    """
    load = entry.load
    if load is None or not entry.open_legs:
        return entry.open_tokens + (load.num_waiting_uncached_tokens if load else 0)
    mean = entry.open_tokens / len(entry.open_legs)
    covered = len(entry.open_legs) - entry.credit_reqs
    covered_tokens = entry.open_tokens - entry.credit_tokens
    listed = load.num_waiting_reqs + load.prefill_inflight_queue_reqs
    unlisted_tokens = min(
        mean * max(0, covered - listed), max(0, covered_tokens - load.num_waiting_uncached_tokens)
    )
    return (
        load.num_waiting_uncached_tokens
        + mean * load.prefill_bootstrap_queue_reqs
        + unlisted_tokens
        + entry.credit_tokens
    )


def _num_reqs(entry: _Entry) -> int:
    """Requests that run, wait or travel there. SGLang's ``num_waiting_reqs`` already contains the
    bootstrap, prealloc, transfer and retracted queues, but not prefill's in-flight (sending) queue."""
    load = entry.load
    if load is None:
        return len(entry.open_legs)
    sampled = load.num_running_reqs + load.num_waiting_reqs + load.prefill_inflight_queue_reqs
    return max(len(entry.open_legs), sampled + entry.credit_reqs)


def _kv_tokens(entry: _Entry) -> int:
    """Pool use, now or soon. Decode's ``num_total_tokens`` adds requests that wait for pages; on a
    prefill worker the same field adds its queue, which costs time and is counted as time."""
    load = entry.load
    if load is None:
        return entry.credit_tokens
    sampled = load.num_used_tokens if entry.info.role is Role.PREFILL else load.num_total_tokens
    return sampled + entry.credit_tokens
