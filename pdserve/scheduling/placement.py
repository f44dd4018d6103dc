"""Where a request fits: slots and KV tokens promised, the policy asked only about workers with room.

    place ─► every worker calm? ─ yes ─► policy over all ready pairs ─► promise both legs
                    └─ no ─► only the workers with room ─┘

A worker is *tight* when some request of at most ``easy_tokens`` might not fit it. While none is, a
decision looks at nobody's room; the few that are get looked at again at each decision.
Everything here happens between two awaits, so what was promised is never promised twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pdserve.scheduling.kv_growth import KvGrowth, expected_answer
from pdserve.scheduling.kv_room import (
    CLOSED,
    DECODE_RESERVE_TOKENS,
    ENDLESS,
    WorkerLimits,
    easy_tokens,
    free_tokens,
    has_room,
    is_calm,
    set_calm,
)
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.policy import Candidates, Choice, Policy
from pdserve.scheduling.ready_pairs import ReadyPairs
from pdserve.scheduling.reservation import Holder, Reservation
from pdserve.scheduling.work import queue_s
from pdserve.scheduling.workers import PairKey, PairRecord, Worker
from pdserve.types import RequestShape, Role


class Placement:
    """Promises pairs, and takes the promises back. ``num_open`` counts requests that hold one.

    ``clock`` gives seconds that never go back; a simulator brings its own. ``predicts``: count answers by
    their forecasts besides by SGLang's rule.
    """

    def __init__(
        self,
        table: LoadTable,
        policy: Policy,
        limits: WorkerLimits,
        clock: Callable[[], float],
        *,
        predicts: bool = True,
    ) -> None:
        self.ready_pairs = ReadyPairs()
        self.num_open = 0
        self._table = table
        self._policy = policy
        self._limits = limits
        self._clock = clock
        self._predicts = predicts
        self._growth: dict[Worker, KvGrowth] = {}
        self._tight: set[Worker] = set()
        self._easy_tokens = ENDLESS
        self._largest_tokens = ENDLESS
        self._kept: PairRecord | None = None

    # -- what changes the room ---------------------------------------------------------------

    def readiness_changed(self, records: list[PairRecord]) -> None:
        """Only the ready ones of ``records`` take traffic from now on; no pair is kept for anybody."""
        self.keep_pair(None)
        self.ready_pairs = ReadyPairs.of(records)
        self._tight = {worker for record in records for worker in (record.prefill, record.decode)}
        self._growth = {worker: growth for worker, growth in self._growth.items() if growth}
        self._measure()

    def limit(self, limits: WorkerLimits) -> None:
        """Fill workers so far from now on."""
        if limits != self._limits:
            self._limits = limits
            self._tight = {*self.ready_pairs.prefills, *self.ready_pairs.decodes}
            self._measure()

    def sampled(self, worker: Worker) -> bool:
        """A sample of that worker has come; True if it told another capacity than before."""
        growth = self._growth.get(worker)
        if growth:
            view = worker.view
            batch = view.num_reqs / view.info.dp_size
            step_s = view.step_base_s + view.step_slope_s * batch
            growth.follow(self._clock(), step_s, worker.calm_tokens)
        size = worker.calm_tokens
        set_calm(worker, self._limits)
        self._tight.add(worker)
        if worker.calm_tokens == size:
            return False
        self._measure()
        return True

    def doubt(self, record: PairRecord) -> None:
        """Its workers may have less room than their figures tell: look at them before the next decision."""
        self._tight |= {record.prefill, record.decode}

    def end_prefill(self, reservation: Reservation, *, is_whole: bool) -> Worker:
        """The prefill leg is over; returns its worker. ``is_whole``: it came to a normal end."""
        if self._policy.needs_ends:
            self._policy.leg_ended(reservation.choice, Role.PREFILL, is_whole=is_whole, now_s=self._clock())
        prefill = reservation.record.prefill
        self._table.finish(prefill.info.instance_id, reservation.legs[0])
        prefill.promised_tokens -= reservation.tokens[0]
        prefill.num_inflight -= 1
        if self._predicts:
            self._growth[reservation.record.decode].begin(reservation.legs[1], self._clock())
        return prefill

    def end_decode(self, reservation: Reservation, *, is_whole: bool) -> Worker:
        """The decode leg is over, and with it the request; returns its worker."""
        if self._policy.needs_ends:
            self._policy.leg_ended(reservation.choice, Role.DECODE, is_whole=is_whole, now_s=self._clock())
        decode, tokens = reservation.record.decode, reservation.tokens
        self.num_open -= 1
        self._table.finish(decode.info.instance_id, reservation.legs[1])
        decode.promised_tokens -= tokens[1]
        decode.reserved_tokens -= tokens[1] - tokens[0]
        decode.num_inflight -= 1
        if self._predicts:
            self._growth[decode].end(reservation.legs[1])
        return decode

    def keep_pair(
        self,
        waiter: object | None,
        shape: RequestShape | None = None,
        exclude: frozenset[PairKey] = frozenset(),
    ) -> None:
        """Keep the pair that lacks least for ``shape`` for that waiter alone; None: keep none any more."""
        if self._kept is not None:
            self._kept.prefill.held_for = self._kept.decode.held_for = None
            self._kept = None
        if waiter is None or shape is None:
            return
        tokens = self.tokens_needed(shape)

        def lack(record: PairRecord) -> int:
            free = self._free(record.prefill), self._free(record.decode)
            return max(0, tokens[0] - free[0]) + max(0, tokens[1] - free[1])

        record = self._kept = min(self.ready_pairs.without(exclude).records.values(), key=lack)
        record.prefill.held_for = record.decode.held_for = waiter

    # -- decisions ---------------------------------------------------------------------------

    def place(
        self, shape: RequestShape, exclude: frozenset[PairKey], holder: Holder, waiter: object | None = None
    ) -> Reservation | None:
        """Hold the pair the policy picks among those with room; None if there is none.

        ``holder`` takes it back. ``waiter`` may have a pair that was kept for it.
        """
        ready_pairs = self.ready_pairs.without(exclude) if exclude else self.ready_pairs
        if not ready_pairs.records:
            return None
        promise = self._promise(shape)
        tokens = self._needed(shape, promise) if self._predicts else promise
        candidates: Candidates | None = ready_pairs.candidates
        if waiter is not None or not self._is_easy(tokens[1]):
            candidates = self._with_room(ready_pairs, shape, tokens, waiter)
        if candidates is None:
            return None
        candidates.now_s = now_s = self._clock()
        choice = self._policy.choose(shape, candidates)
        return self._hold(shape, promise, choice, holder, now_s)

    def tokens_needed(self, shape: RequestShape) -> tuple[int, int]:
        """KV that must be free on prefill and decode; nothing if no worker is large enough: SGLang will
        refuse it at once. On decode room for SGLang's reserve, and for the answer expected."""
        promise = self._promise(shape)
        return self._needed(shape, promise) if self._predicts else promise

    def _needed(self, shape: RequestShape, promise: tuple[int, int]) -> tuple[int, int]:
        told = shape.forecast
        if told is None or told.mean <= DECODE_RESERVE_TOKENS or not promise[1]:
            return promise
        return promise[0], max(promise[1], promise[0] + expected_answer(shape, 0))

    def _promise(self, shape: RequestShape) -> tuple[int, int]:
        prompt_tokens = shape.prompt_tokens
        if prompt_tokens > self._largest_tokens:
            return 0, 0
        answers = shape.num_prompts * min(shape.max_new_tokens, DECODE_RESERVE_TOKENS)
        return prompt_tokens, prompt_tokens + answers

    def least_queue_s(self) -> float:
        """Expected wait in the shortest prefill queue; 0 without prefill workers."""
        return min((queue_s(worker.view) for worker in self.ready_pairs.prefills), default=0.0)

    def _is_easy(self, tokens: int) -> bool:
        """True if such a request fits anywhere."""
        if self._tight:
            self._tight = {worker for worker in self._tight if self._free(worker) < easy_tokens(worker)}
        return not self._tight and tokens <= self._easy_tokens

    def _with_room(
        self, ready_pairs: ReadyPairs, shape: RequestShape, tokens: tuple[int, int], waiter: object | None
    ) -> Candidates | None:
        reach_s = self._reach_s(ready_pairs, shape)
        return ready_pairs.where(lambda worker: self._fits(worker, tokens, waiter, reach_s.get(worker, 0.0)))

    def _reach_s(self, ready_pairs: ReadyPairs, shape: RequestShape) -> dict[Worker, float]:
        """By how much each prefill worker's queue may be longer for this request than for others."""
        reaches_s = self._policy.reach_s(shape, ready_pairs.candidates.prefills, self._clock())
        return dict(zip(ready_pairs.prefills, reaches_s, strict=True)) if reaches_s else {}

    def _fits(
        self, worker: Worker, tokens: tuple[int, int], waiter: object | None, reach_s: float = 0.0
    ) -> bool:
        if worker.held_for is not None and worker.held_for is not waiter:
            return False
        needed = tokens[worker.role is Role.DECODE]
        return has_room(worker, needed, tokens[0], self._free(worker, reach_s))

    def growth_tokens(self, worker: Worker) -> int:
        """KV the worker's open answers are expected to come to; 0 for a prefill worker."""
        growth = self._growth.get(worker)
        return growth.tokens if growth is not None else 0

    def _free(self, worker: Worker, reach_s: float = 0.0) -> int:
        limits = self._limits
        if reach_s > 0.0:
            limits = replace(limits, prefill_queue_s=limits.prefill_queue_s + reach_s)
        return free_tokens(worker, limits, self.growth_tokens(worker))

    def _hold(
        self, shape: RequestShape, tokens: tuple[int, int], choice: Choice, holder: Holder, now_s: float
    ) -> Reservation:
        prefill_id = choice.pair.prefill.info.instance_id
        decode_id = choice.pair.decode.info.instance_id
        record = self.ready_pairs.records[prefill_id, decode_id]
        record.requests += 1
        self.num_open += 1
        prefill, decode, prompt_tokens = record.prefill, record.decode, shape.prompt_tokens
        legs = (
            self._table.dispatch(prefill_id, prompt_tokens, now_s, choice.cached_tokens),
            self._table.dispatch(decode_id, prompt_tokens, now_s),
        )
        prefill.promised_tokens += tokens[0]
        decode.promised_tokens += tokens[1]
        decode.reserved_tokens += tokens[1] - tokens[0]
        prefill.num_inflight += 1
        decode.num_inflight += 1
        if prefill.is_dozing or decode.is_dozing:
            prefill.wake.set()
            decode.wake.set()
        if not is_calm(prefill):
            self._tight.add(prefill)
        if (self._predicts and self._grow(decode, legs[1], shape, tokens)) or not is_calm(decode):
            self._tight.add(decode)
        return Reservation(record.pair, choice, record, legs, tokens, holder)

    def _grow(self, decode: Worker, leg: int, shape: RequestShape, promise: tuple[int, int]) -> bool:
        """Count the answer that is expected; True if that makes the worker tight."""
        growth = self._growth.get(decode)
        if growth is None:
            growth = self._growth[decode] = KvGrowth()
        return growth.add(leg, shape, promise) > decode.calm_tokens

    def _measure(self) -> None:
        workers = (*self.ready_pairs.prefills, *self.ready_pairs.decodes)
        for worker in workers:
            set_calm(worker, self._limits)
        self._easy_tokens = min((easy_tokens(worker) for worker in workers), default=ENDLESS)
        self._largest_tokens = min(
            max((worker.view.kv_capacity or ENDLESS for worker in row), default=ENDLESS)
            for row in (self.ready_pairs.prefills, self.ready_pairs.decodes)
        )

    def most_free(self) -> tuple[int, int]:
        """The most that any worker, not held for somebody, could still be promised: prefill, decode."""
        prefill, decode = (
            max((self._free(w) for w in row if w.held_for is None), default=CLOSED)
            for row in (self.ready_pairs.prefills, self.ready_pairs.decodes)
        )
        return prefill, decode

    def lacks_room(self, worker: Worker, shape: RequestShape | None = None) -> bool:
        """True if a worker in the ready pairs has no room for such a request; None: for any at all."""
        if shape is None:
            return self._free(worker) <= 0
        return not self._fits(worker, self.tokens_needed(shape), None)
