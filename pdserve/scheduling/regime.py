"""Is the fleet balanced, short of one role, or overloaded? (FlowKV §3.4, made concrete.)

    views of workers ─► signals ─► weighted sum ─► EMA ─► score of each worker ─► mean of its role ─┐
    waiting requests ──────────────────────────────────► EMA ─► on the fuller role, by its share ─┴─► state

FlowKV names signals, smoothing and a weighted sum, and publishes neither weights nor thresholds: those
here are OUR operationalisation. A score of 1 is a role that is full and has requests waiting for it.
Two thresholds for each role and a least stay keep the state from flapping. Pure; times come in.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.scheduling.kv_room import DECODE_RESERVE_TOKENS, max_batch
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import InstanceId, Role

WEIGHTS = {"queue": 0.8, "prefill_kv": 0.2, "slots": 0.4, "decode_kv": 0.6, "line": 0.5}
"""Ours. A prefill server is full when its queue is long, its pool seldom matters; a decode server by its
slots or by its KV, more often the latter. Each role's own weights add up to 1; a line adds to them."""
QUEUE_REFERENCE_S = 2.0
QUEUE_REFERENCE_SHARE = 0.5
"""A prefill queue of so many seconds counts 1; with a TTFT objective half of that objective does; and
one as long as it may get counts 1 at the latest, for the rest waits elsewhere."""
QUEUE_REFERENCE_REQS = 3.0
"""Fewer requests are no long queue however long each takes: one runs, one is next, one comes."""
LINE_REFERENCE = 2.0
"""So many requests waiting for a pair for each worker count 1, and more no more than that."""
MAX_SIGNAL = 2.0
HIGH, LOW = 0.8, 0.6
"""A role is short from HIGH on, until its score is below LOW. Ours: the highest role score without anyone
waiting is reached near 0.8 of its capacity."""
SMOOTHING_S = 2.0
"""Time constant of the mean: eight polls."""
MIN_STAY_S = 5.0
"""A state lasts at least so long: a burst the line can absorb is over sooner."""
NUM_CHANGES = 16


class Regime(enum.StrEnum):
    """Which role is short of capacity. FlowKV's *imbalanced* has two directions; *extreme* is OVERLOAD."""

    NORMAL = "normal"
    PREFILL_SHORT = "prefill_short"
    DECODE_SHORT = "decode_short"
    OVERLOAD = "overload"


_REGIMES = {
    (False, False): Regime.NORMAL,
    (True, False): Regime.PREFILL_SHORT,
    (False, True): Regime.DECODE_SHORT,
    (True, True): Regime.OVERLOAD,
}


@dataclass(frozen=True, slots=True)
class RegimeChange:
    """From one state to another, with the scores that did it. ``at_s`` is on the observer's clock."""

    at_s: float
    before: Regime
    after: Regime
    prefill_score: float
    decode_score: float


class RegimeMonitor:
    """Smoothed load scores and the state that they lead to.

    ``observe`` returns the state and costs about a microsecond a worker; ``changes`` are the last ones.

    Args:
        slo_ttft_s: time to first token asked for; 0: none.
        slo_tpot_s: time per output token asked for; 0: none.
    """

    def __init__(self, slo_ttft_s: float = 0.0, slo_tpot_s: float = 0.0) -> None:
        self.regime = Regime.NORMAL
        self.changes: deque[RegimeChange] = deque(maxlen=NUM_CHANGES)
        self.longest_queue_s = math.inf  # kept right by whoever limits prefill queues
        self.scores: dict[Role, float] = {Role.PREFILL: 0.0, Role.DECODE: 0.0}
        self._queue_reference_s = QUEUE_REFERENCE_SHARE * slo_ttft_s or QUEUE_REFERENCE_S
        self._slo_tpot_s = slo_tpot_s
        self._workers: dict[InstanceId, tuple[str, float]] = {}
        self._line = 0.0
        self._is_short = {Role.PREFILL: False, Role.DECODE: False}
        self._since_s: float | None = None
        self._observed_s = 0.0

    def observe(
        self, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], num_waiting: int, now_s: float
    ) -> Regime:
        """Take in the loads of the workers that take traffic; the state stays while a role has none."""
        if not prefills or not decodes:
            return self.regime
        if self._since_s is None:
            self._since_s, gain = now_s, 1.0
        else:
            gain = 1.0 - math.exp(-max(0.0, now_s - self._observed_s) / SMOOTHING_S)
        self._observed_s = now_s
        known, self._workers = self._workers, {}
        own = {
            Role.PREFILL: self._smooth(prefills, self._prefill_load, known, gain),
            Role.DECODE: self._smooth(decodes, self._decode_load, known, gain),
        }
        waiting = min(1.0, num_waiting / (LINE_REFERENCE * (len(prefills) + len(decodes))))
        self._line += gain * (waiting - self._line)
        fullest = max(own.values())
        for role, score in own.items():
            share = score / fullest if fullest > 0.0 else 1.0
            self.scores[role] = score + WEIGHTS["line"] * self._line * share
        self._decide(now_s)
        return self.regime

    def snapshot(self) -> dict[str, object]:
        """For the state document. ``lasted_s``: up to the last observation."""
        since_s = self._observed_s if self._since_s is None else self._since_s
        return {
            "state": str(self.regime),
            "lasted_s": self._observed_s - since_s,
            "scores": {str(role): round(score, 4) for role, score in self.scores.items()},
            "line": round(self._line, 4),
            "workers": {name: round(score, 4) for name, score in self._workers.values()},
            "thresholds": {"high": HIGH, "low": LOW},
            "weights": dict(WEIGHTS),
            "changes": [
                {
                    "ago_s": self._observed_s - change.at_s,
                    "from": str(change.before),
                    "to": str(change.after),
                    "prefill_score": round(change.prefill_score, 4),
                    "decode_score": round(change.decode_score, 4),
                }
                for change in self.changes
            ],
        }

    def _smooth(
        self,
        views: Sequence[WorkerView],
        load_of: Callable[[WorkerView], float],
        known: dict[InstanceId, tuple[str, float]],
        gain: float,
    ) -> float:
        total = 0.0
        for view in views:
            info, load = view.info, load_of(view)
            before = known.get(info.instance_id)
            score = load if before is None else before[1] + gain * (load - before[1])
            self._workers[info.instance_id] = info.worker_id, score
            total += score
        return total / len(views)

    def _prefill_load(self, view: WorkerView) -> float:
        queue_s = view.queued_tokens / (view.prefill_tokens_s * view.info.dp_size)
        queue = queue_s / min(self._queue_reference_s, self.longest_queue_s)
        queue = min(MAX_SIGNAL, queue, view.num_reqs / QUEUE_REFERENCE_REQS)
        kv = view.kv_tokens / view.kv_capacity if view.kv_capacity > 0 else 0.0
        return WEIGHTS["queue"] * queue + WEIGHTS["prefill_kv"] * min(1.0, kv)

    def _decode_load(self, view: WorkerView) -> float:
        reqs = view.num_reqs
        limit = max_batch(view, self._slo_tpot_s)
        slots = reqs / limit if limit else 0.0
        needed = view.kv_tokens + DECODE_RESERVE_TOKENS * reqs  # as SGLang counts before it takes one more
        kv = needed / view.kv_capacity if view.kv_capacity > 0 else slots
        return WEIGHTS["slots"] * min(1.0, slots) + WEIGHTS["decode_kv"] * min(1.0, kv)

    def _decide(self, now_s: float) -> None:
        for role, score in self.scores.items():
            self._is_short[role] = score >= (LOW if self._is_short[role] else HIGH)
        after = _REGIMES[self._is_short[Role.PREFILL], self._is_short[Role.DECODE]]
        if after is self.regime or now_s - (self._since_s or 0.0) < MIN_STAY_S:
            return
        change = RegimeChange(now_s, self.regime, after, self.scores[Role.PREFILL], self.scores[Role.DECODE])
        self.regime, self._since_s = after, now_s
        self.changes.append(change)
