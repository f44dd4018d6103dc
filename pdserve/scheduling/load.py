"""What the balancer knows of each worker's load, exact between polls.

            poll /v1/loads ──► record() ─┐
    dispatch() ─► open legs ─► credit ───┼──► view(): one live WorkerView
            finish() ◄── leg ended ──────┘

A sample is stale as soon as it is taken. The balancer is the one that sends
the requests, so it knows what the sample cannot contain: the *in-flight
credit*, every leg dispatched after the sample's cover time and not finished.
Without it a plain argmin sends a whole poll interval's arrivals to one worker.

Holds no socket and reads no clock: times come in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.policy.view import WorkerView
from pdserve.scheduling.rates import RateFit, SharedRates, pool_decode, pool_prefill
from pdserve.types import InstanceId, Role, WorkerInfo, WorkerLoad

REFIT_S = 0.25
"""Shared rates are fitted anew at most this often, by the samples' own times."""

_Leg = tuple[int, int, float]
"""An unfinished leg: tokens to compute, prompt tokens, when it was sent. A plain tuple: two per request."""

_Kind = tuple[Role, str, int, int]
"""Workers alike in this are taken to be machines alike: role, model, TP and DP size."""


@dataclass(frozen=True, slots=True)
class LoadCredit:
    """Open legs that the last sample cannot contain."""

    reqs: int = 0
    prompt_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    """One worker. The view's sums are ``sampled_*`` plus credit at all times.

    ``sampled_*`` is what the last sample said, less the legs it contained that have ended since.
    """

    view: WorkerView
    load: WorkerLoad | None = None
    covered_s: float = float("-inf")
    fit: RateFit = field(default_factory=RateFit)
    open_legs: dict[int, _Leg] = field(default_factory=dict)
    open_tokens: int = 0
    credit_reqs: int = 0
    credit_tokens: int = 0
    sampled_tokens: int = 0
    sampled_kv: int = 0

    @property
    def kind(self) -> _Kind:
        """What its rates are shared with."""
        info = self.view.info
        return info.role, info.model, info.tp_size, info.dp_size


class LoadTable:
    """Samples, in-flight legs and fitted rates of every worker, by instance."""

    def __init__(self) -> None:
        self._entries: dict[InstanceId, _Entry] = {}
        self._turn = 0
        self._shared: dict[_Kind, SharedRates] = {}
        self._refitted_s: dict[_Kind, float] = {}

    def add(self, info: WorkerInfo) -> None:
        """Know a worker, or its changed description; legs and samples of a known one stay."""
        entry = self._entries.get(info.instance_id)
        if entry is None:
            entry = self._entries[info.instance_id] = _Entry(WorkerView(info))
        entry.view.info = info
        _restate(entry)
        self._apply_rates(entry, self._shared.get(entry.kind) or self._pool(info.role) or SharedRates())

    def remove(self, instance_id: InstanceId) -> None:
        """Forget a worker; finishing its legs afterwards is allowed and does nothing."""
        self._entries.pop(instance_id, None)

    def dispatch(
        self, instance_id: InstanceId, prompt_tokens: int, now_s: float, cached_tokens: int = 0
    ) -> int:
        """Count a new leg on a worker; returns the number by which ``finish`` ends it.

        ``cached_tokens`` of the prompt are expected in its prefix cache. Times may not go backwards.
        """
        self._turn = turn = self._turn + 1
        entry = self._entries[instance_id]
        tokens = prompt_tokens - cached_tokens
        entry.open_legs[turn] = (tokens, prompt_tokens, now_s)
        entry.open_tokens += tokens
        view = entry.view
        view.last_turn = turn
        view.inflight += 1
        if now_s >= entry.covered_s:
            entry.credit_reqs += 1
            entry.credit_tokens += tokens
            view.num_reqs += 1
            view.queued_tokens += tokens
            view.kv_tokens += prompt_tokens
        elif view.num_reqs < view.inflight:
            view.num_reqs = view.inflight
        return turn

    def finish(self, instance_id: InstanceId, leg: int) -> None:
        """End a leg. Unknown workers and legs that have ended are ignored."""
        entry = self._entries.get(instance_id)
        if entry is None:
            return
        ended = entry.open_legs.pop(leg, None)
        if ended is None:
            return
        tokens, prompt_tokens, sent_s = ended
        entry.open_tokens -= tokens
        view = entry.view
        view.inflight -= 1
        view.num_reqs -= 1
        if sent_s >= entry.covered_s:
            entry.credit_reqs -= 1
            entry.credit_tokens -= tokens
        else:
            # Part of the sample, if it was counted at all: what is left of it cannot be less than nothing.
            tokens = min(tokens, entry.sampled_tokens)
            prompt_tokens = min(prompt_tokens, entry.sampled_kv)
            entry.sampled_tokens -= tokens
            entry.sampled_kv -= prompt_tokens
        view.queued_tokens -= tokens
        view.kv_tokens -= prompt_tokens

    def record(self, instance_id: InstanceId, sample: Sample) -> None:
        """Take a poll's sample; legs it covers stop being credit. Unknown workers are ignored."""
        entry = self._entries.get(instance_id)
        if entry is None:
            return
        entry.load, entry.covered_s = sample.load, sample.covered_s
        _restate(entry)
        entry.fit.update(sample.load, self._shared.get(entry.kind))
        self._refit(entry, sample.load.timestamp_s)

    def inflight(self, instance_id: InstanceId) -> int:
        """Open legs of ours on this worker; 0 if unknown."""
        entry = self._entries.get(instance_id)
        return len(entry.open_legs) if entry else 0

    def load(self, instance_id: InstanceId) -> WorkerLoad | None:
        """The last sample as the worker gave it, or None before the first."""
        entry = self._entries.get(instance_id)
        return entry.load if entry else None

    def credit(self, instance_id: InstanceId) -> LoadCredit:
        """What we dispatched to this worker that its last sample cannot contain."""
        entry = self._entries.get(instance_id)
        return LoadCredit(entry.credit_reqs, entry.credit_tokens) if entry else LoadCredit()

    def view(self, instance_id: InstanceId) -> WorkerView:
        """The worker as policies see it: one object from ``add`` to ``remove``, kept right in place.

        Raises:
            KeyError: if the worker is not known.
        """
        return self._entries[instance_id].view

    def snapshot(self) -> dict[InstanceId, WorkerView]:
        """Every known worker's view as it is now; these do not change."""
        return {instance_id: replace(entry.view) for instance_id, entry in self._entries.items()}

    # -- rates -------------------------------------------------------------------------------

    def _refit(self, entry: _Entry, now_s: float) -> None:
        kind = entry.kind
        if now_s - self._refitted_s.get(kind, float("-inf")) < REFIT_S:
            return
        self._refitted_s[kind] = now_s
        shared = self._pool(kind[0], kind)
        if shared is not None:
            self._shared[kind] = shared
        believed = shared or self._shared.get(kind) or self._pool(kind[0]) or SharedRates()
        for other in self._entries.values():
            if other.kind == kind:
                self._apply_rates(other, believed)

    def _pool(self, role: Role, kind: _Kind | None = None) -> SharedRates | None:
        """Rates of the workers of one kind, or of one role; None while too little is known of them.

        A kind nobody has measured is taken to be like the others of its role and not like a
        guess: a guess far off would send a whole burst to it, or nothing.
        """
        entries = (e for e in self._entries.values() if (kind or (role, *e.kind[1:])) == e.kind)
        fits = [entry.fit for entry in entries]
        if role is Role.PREFILL:
            tokens_s = pool_prefill(fits)
            return None if tokens_s is None else SharedRates(prefill_tokens_s=tokens_s)
        line = pool_decode(fits)
        return None if line is None else SharedRates(decode=line)

    @staticmethod
    def _apply_rates(entry: _Entry, shared: SharedRates) -> None:
        view = entry.view
        if view.info.role is Role.PREFILL:
            view.prefill_tokens_s = entry.fit.prefill_tokens_s(shared)
            return
        line = entry.fit.decode(shared)
        view.step_base_s, view.step_slope_s = line.base_s, line.slope_s


def _restate(entry: _Entry) -> None:
    """Derive credit and the view's sums from the last sample and the open legs."""
    reqs = tokens = kv_tokens = 0
    for leg_tokens, prompt_tokens, sent_s in reversed(entry.open_legs.values()):
        if sent_s < entry.covered_s:
            break  # legs are in the order in which they were sent
        reqs, tokens, kv_tokens = reqs + 1, tokens + leg_tokens, kv_tokens + prompt_tokens
    entry.credit_reqs, entry.credit_tokens = reqs, tokens
    load, view = entry.load, entry.view
    entry.sampled_tokens = _sampled_tokens(entry)
    entry.sampled_kv = _sampled_kv(load, view.info.role)
    view.load = load
    view.inflight = len(entry.open_legs)
    view.num_reqs = max(view.inflight, _sampled_reqs(load) + reqs)
    view.queued_tokens = entry.sampled_tokens + tokens
    view.kv_tokens = entry.sampled_kv + kv_tokens
    view.kv_capacity = (load.max_total_num_tokens if load else 0) or view.info.max_total_num_tokens
    view.max_running_requests = load.max_running_requests if load else 0


def _sampled_tokens(entry: _Entry) -> int:
    """Prompt tokens that a prefill worker still had to compute at the sample.

    SGLang's ``num_waiting_uncached_tokens`` leaves out two groups, both known
    from our ledger only: requests in the bootstrap queue (counted in
    ``num_waiting_reqs``) and those of the running batch, which no queue lists.
    """
    load, legs = entry.load, len(entry.open_legs)
    if load is None:
        return 0
    uncached = load.num_waiting_uncached_tokens
    if not legs:
        return uncached
    mean = entry.open_tokens / legs
    covered = legs - entry.credit_reqs
    covered_tokens = entry.open_tokens - entry.credit_tokens
    listed = load.num_waiting_reqs + load.prefill_inflight_queue_reqs
    unlisted_tokens = min(mean * max(0, covered - listed), max(0, covered_tokens - uncached))
    return round(uncached + mean * load.prefill_bootstrap_queue_reqs + unlisted_tokens)


def _sampled_reqs(load: WorkerLoad | None) -> int:
    """Requests that ran, waited or travelled. SGLang's ``num_waiting_reqs`` already contains the
    bootstrap, prealloc, transfer and retracted queues, but not prefill's in-flight (sending) queue."""
    if load is None:
        return 0
    return load.num_running_reqs + load.num_waiting_reqs + load.prefill_inflight_queue_reqs


def _sampled_kv(load: WorkerLoad | None, role: Role) -> int:
    """Pool use at the sample, or soon after. Decode's ``num_total_tokens`` adds requests that wait for
    pages; on a prefill worker the same field adds its queue, which costs time and is counted as time."""
    if load is None:
        return 0
    return load.num_used_tokens if role is Role.PREFILL else load.num_total_tokens
