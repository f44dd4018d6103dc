"""Seconds of prefill work: of one prompt, and of all that waits on a worker.

A rate in tokens per second misjudges long prompts, because attention reads all that came
before: ``seconds = b * new + c * new * (past + new / 2)``. The worker's own fitted rate
(rates.py) stays the measure; the curve only says how many *plain tokens* a prompt counts as:

    work(new, past) = new * (1 + (past + new / 2) / knee),     knee = b / c
    seconds         = work / (rate * mean work per token of the recent mix)

so with an unknown knee (endless) this is ``new / rate``. The knee is learned from the
policy's own legs: of a worker with a queue, the time between two ends is the work of the
second. Pure: times are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.linear_fit import LinearFit
from pdserve.scheduling.policy.score import REQUEST_TOKENS
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import InstanceId, RequestShape

ENDLESS_KNEE = float("inf")
MIN_KNEE_TOKENS = 2048.0
"""Attention of no model in use costs as much as all the rest at a shorter context: 8B models at
some 30k (4 * 32 * 4096 * context against 16 G operations a token), 70B ones at some 53k."""
GROUP_LEGS = 4
"""Legs whose times are added up to one observation: SGLang prefills short prompts in one batch and
ends them all at once, so a single interval may be anything."""
MIN_GROUPS = 12
"""Observations before the curve is believed."""
MAX_GROUPS = 400.0
"""Older ones fade."""
MIN_SPREAD = 0.02
"""One minus the squared correlation of both terms. Prompts all of one length tell nothing of a curve."""
MIX_TOKENS = 2.0e6
"""Tokens over which the mean work per token is taken: some 10 s of a fast worker."""
BUSY_DECISIONS = 64
"""Over so many decisions the share of busy prefill workers is taken: some seconds of a busy fleet."""
CHUNK_S = 0.25
"""Progress that a worker may have made beyond the prompt at its head: prompts run in batches."""


@dataclass(slots=True, eq=False)
class PrefillCurve:
    """How prefill work grows with context; one for workers of one model.

    ``knee_tokens``: the context at which a token costs twice what it costs at the start.
    """

    knee_tokens: float = ENDLESS_KNEE
    _groups: float = 0.0
    _terms: LinearFit = field(default_factory=LinearFit)
    _mix_tokens: float = 0.0
    _mix_cross: float = 0.0

    @property
    def mix(self) -> float:
        """Mean work per token of the recent prompts: what a worker's fitted rate is a rate of."""
        if self._mix_tokens <= 0.0:
            return 1.0
        return 1.0 + self._mix_cross / self._mix_tokens / self.knee_tokens

    def work(self, new: float, past: float) -> float:
        """Plain tokens that ``new`` tokens after ``past`` cached ones count as."""
        return new * (1.0 + (past + 0.5 * new) / self.knee_tokens)

    def count(self, leg: PrefillLeg) -> None:
        """A prompt was computed: it is part of the mix that the workers' rates were measured with."""
        self._mix_tokens += leg.new
        self._mix_cross += leg.cross
        if self._mix_tokens > MIX_TOKENS:
            self._mix_tokens *= 0.5
            self._mix_cross *= 0.5

    def observe(self, new: float, cross: float, took_s: float) -> None:
        """A few prompts, one after the other: ``new`` tokens, the sum of new * (past + new / 2), seconds."""
        if new <= 0.0 or took_s <= 0.0:
            return
        keep = min(1.0, MAX_GROUPS / (self._groups + 1.0))
        # errors grow with the size of what was measured
        self._terms.add(new, cross, took_s, 1.0 / new)
        self._terms.fade(keep)
        self._groups = (self._groups + 1.0) * keep
        if self._groups >= MIN_GROUPS:
            self._refit()

    def _refit(self) -> None:
        if self._terms.spread <= MIN_SPREAD:
            return
        linear, square = self._terms.solve()
        self.knee_tokens = max(MIN_KNEE_TOKENS, linear / square) if square > 0.0 else ENDLESS_KNEE


@dataclass(slots=True, eq=False)
class PrefillLeg:
    """One prompt on a prefill worker. ``past`` tokens of it were cached."""

    work_s: float
    new: float
    past: float

    @property
    def cross(self) -> float:
        """Token pairs that attention looks at."""
        return self.new * (self.past + 0.5 * self.new)


class PrefillQueue:
    """What one prefill worker still has to compute for us, in the order in which it was sent."""

    __slots__ = ("_cross", "_curve", "_ended", "_head_s", "_is_fresh", "_legs", "_new", "_took_s", "total_s")

    def __init__(self, curve: PrefillCurve) -> None:
        self._curve = curve
        self._legs: dict[int, PrefillLeg] = {}
        self.total_s = 0.0
        self._head_s = 0.0  # since when the worker has been at the first leg
        self._is_fresh = True
        self._new = self._cross = self._took_s = 0.0
        self._ended = 0

    def __len__(self) -> int:
        return len(self._legs)

    def wait_s(self, now_s: float) -> float:
        """Seconds until it has computed what it was sent so far."""
        if not self._legs:
            return 0.0
        head = next(iter(self._legs.values()))
        done_s = min(now_s - self._head_s, max(head.work_s, CHUNK_S))
        return max(0.0, self.total_s - done_s)

    def send(self, leg: PrefillLeg, now_s: float) -> None:
        """The worker is sent one more."""
        if not self._legs:
            self._head_s, self.total_s, self._is_fresh = now_s, 0.0, True
            self._forget_group()
        self._legs[id(leg)] = leg
        self.total_s += leg.work_s

    def end(self, leg: PrefillLeg, now_s: float, *, is_whole: bool) -> None:
        """A leg is over; one that ended badly says nothing of the worker's speed."""
        if self._legs.pop(id(leg), None) is None:
            return
        self.total_s = max(0.0, self.total_s - leg.work_s)
        took_s, self._head_s = now_s - self._head_s, now_s
        if not is_whole:
            self._forget_group()
            return
        self._curve.count(leg)
        if self._is_fresh:
            self._is_fresh = False  # its time had the way there and back in it
            return
        self._new += leg.new
        self._cross += leg.cross
        self._took_s += took_s
        self._ended += 1
        if self._ended >= GROUP_LEGS:
            self._curve.observe(self._new, self._cross, self._took_s)
            self._forget_group()

    def _forget_group(self) -> None:
        self._new = self._cross = self._took_s = 0.0
        self._ended = 0


class PrefillQueues:
    """Our legs on all prefill workers, the curve learned from them, and how busy the workers are."""

    def __init__(self) -> None:
        self.curve = PrefillCurve()
        self._queues: dict[InstanceId, PrefillQueue] = {}
        self._busy = 0.0  # share of the time

    def times_s(
        self, request: RequestShape, views: Sequence[WorkerView], cached: Sequence[int], now_s: float
    ) -> tuple[list[float], list[float]]:
        """Seconds each worker is busy before this prompt, and with it.

        ``cached``: prompt tokens that each worker need not compute; empty: none.
        """
        tokens, queues, curve = request.prompt_tokens, self._queues, self.curve
        mix = curve.mix
        whole = max(REQUEST_TOKENS, curve.work(tokens, 0.0) / mix)
        waits_s, works_s = [], []
        for index, view in enumerate(views):
            rate = view.prefill_tokens_s * view.info.dp_size
            queue = queues.get(view.info.instance_id)
            if queue is None or view.num_reqs > view.inflight:
                # Others than us use this worker, or nobody: it knows best.
                wait_s = view.queued_tokens / rate
                if queue is not None:
                    wait_s = max(wait_s, queue.wait_s(now_s))
            else:
                wait_s = queue.wait_s(now_s)
            waits_s.append(wait_s)
            past = cached[index] if cached else 0
            work = max(REQUEST_TOKENS, curve.work(tokens - past, past) / mix) if past else whole
            works_s.append(work / rate)
        return waits_s, works_s

    def saved_s(self, tokens: int, past: int, view: WorkerView) -> float:
        """Seconds of work that ``past`` cached tokens of a prompt save on this worker."""
        curve = self.curve
        saved = (curve.work(tokens, 0.0) - curve.work(tokens - past, past)) / curve.mix
        return saved / (view.prefill_tokens_s * view.info.dp_size)

    def watch(self, waits_s: Sequence[float]) -> None:
        """A request came and found these queues. A worker that is not among them, without room, is busy."""
        idle = sum(1 for wait_s in waits_s if wait_s <= 0.0)
        self._busy += (1.0 - idle / max(len(waits_s), len(self._queues)) - self._busy) / BUSY_DECISIONS

    def num_delayed(self, most: float) -> float:
        """Requests that will stand behind one request's work, at most ``most``: of a queue that is busy for a
        share r of the time, each second of work delays r / (1 - r) later ones until it is empty again."""
        busy = self._busy
        return min(most, busy / (1.0 - busy)) if busy < 1.0 else most

    def of(self, instance_id: InstanceId) -> PrefillQueue:
        """The worker's queue, new if it has none."""
        queue = self._queues.get(instance_id)
        if queue is None:
            queue = self._queues[instance_id] = PrefillQueue(self.curve)
        return queue

    def forget(self, instance_id: InstanceId) -> None:
        """The worker is gone."""
        self._queues.pop(instance_id, None)
