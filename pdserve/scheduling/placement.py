"""Where a request fits: reserves KV tokens and request slots on the pair that the policy chooses.

    place ─► every worker calm? ─ yes ─► policy over all ready pairs ─► promise both legs
                    └─ no ─► only the workers with room ─┘

A worker is *tight* when some request of at most ``easy_tokens`` might not fit it. While none is, a
decision checks nobody's room; the few that are get checked again at each decision.
Everything here happens between two awaits, so what was promised is never promised twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from pdserve.scheduling.kv_growth import expected_answer
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
from pdserve.scheduling.policy import Candidates, Choice, PairView, Policy, Reason
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.work import queue_s
from pdserve.scheduling.workers import PairKey, PairSlots, ReadyPairs, WorkerSlots
from pdserve.types import InstanceId, RequestShape, Role, WorkerInfo


class Placement:
    """Promises pairs, and takes the promises back. ``num_open`` counts requests that hold one.

    ``clock`` gives seconds that never go back; a simulator brings its own. ``predicts``: count answers by
    their forecasts in addition to SGLang's rule.
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
        self._workers: dict[InstanceId, WorkerSlots] = {}
        self._pairs: dict[PairKey, PairSlots] = {}
        self._tight: set[WorkerSlots] = set()
        self._easy_tokens = ENDLESS
        self._largest_tokens = ENDLESS
        self._kept: tuple[WorkerSlots, WorkerSlots] | None = None

    # -- workers -----------------------------------------------------------------------------

    def add_worker(self, info: WorkerInfo) -> WorkerSlots:
        """Count a worker that is in the load table; its pairs take traffic once they are set ready."""
        slots = self._workers[info.instance_id] = WorkerSlots(self._table.view(info.instance_id))
        return slots

    def remove_worker(self, instance_id: InstanceId) -> None:
        """Forget a worker and its pairs; open reservations may still end."""
        self._workers.pop(instance_id, None)
        self._pairs = {key: pair for key, pair in self._pairs.items() if instance_id not in key}

    def set_ready_pairs(self, keys: Iterable[PairKey]) -> None:
        """Only these pairs take traffic from now on; no pair is kept for a request any more."""
        self.keep_pair(None)
        workers = self._workers
        self.ready_pairs = ReadyPairs((workers[prefill], workers[decode]) for prefill, decode in keys)
        self._tight = {*self.ready_pairs.prefills, *self.ready_pairs.decodes}
        self._measure()

    def num_requests(self, key: PairKey) -> int:
        """Requests that this pair was given since both its workers joined."""
        pair = self._pairs.get(key)
        return pair.num_requests if pair is not None else 0

    def workers(self, instance_ids: Iterable[InstanceId]) -> tuple[WorkerSlots, ...]:
        """Those of them that are known."""
        return tuple(self._workers[each] for each in instance_ids if each in self._workers)

    # -- what changes the room ---------------------------------------------------------------

    def limit(self, limits: WorkerLimits) -> None:
        """Fill workers so far from now on."""
        if limits != self._limits:
            self._limits = limits
            self._tight = {*self.ready_pairs.prefills, *self.ready_pairs.decodes}
            self._measure()

    def sampled(self, worker: WorkerSlots) -> bool:
        """A sample of that worker was recorded; True if its capacity has changed."""
        growth = worker.growth
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

    def set_overloaded(self, worker: WorkerSlots, is_overloaded: bool) -> None:
        """The worker takes nothing while it is overloaded."""
        worker.is_overloaded = is_overloaded
        self._tight.add(worker)

    def end_prefill(self, reservation: Reservation, *, is_whole: bool) -> None:
        """The prefill leg is over. ``is_whole``: it came to a normal end."""
        reservation.is_prefilling = False
        if not reservation.is_alone:
            if self._policy.needs_ends:
                self._policy.leg_ended(
                    reservation.choice, Role.PREFILL, is_whole=is_whole, now_s=self._clock()
                )
            prefill = reservation.slots.prefill
            self._table.finish(prefill.view.info.instance_id, reservation.legs[0])
            prefill.promised_tokens -= reservation.tokens[0]
            prefill.num_inflight -= 1
        if self._predicts:
            reservation.slots.decode.growth.begin(reservation.legs[1], self._clock())

    def end_decode(self, reservation: Reservation, *, is_whole: bool) -> None:
        """The decode leg is over, and with it the request."""
        reservation.is_open = False
        if self._policy.needs_ends and not reservation.is_alone:
            self._policy.leg_ended(reservation.choice, Role.DECODE, is_whole=is_whole, now_s=self._clock())
        decode, tokens = reservation.slots.decode, reservation.tokens
        self.num_open -= 1
        self._table.finish(decode.view.info.instance_id, reservation.legs[1])
        decode.promised_tokens -= tokens[1]
        decode.reserved_tokens -= tokens[1] - tokens[0]
        decode.num_inflight -= 1
        if self._predicts:
            decode.growth.end(reservation.legs[1])

    def keep_pair(
        self,
        waiter: object | None,
        shape: RequestShape | None = None,
        exclude: frozenset[PairKey] = frozenset(),
    ) -> None:
        """Keep the pair that lacks least for ``shape`` for that waiter alone; None: keep none."""
        if self._kept is not None:
            for worker in self._kept:
                worker.held_for = None
            self._kept = None
        if waiter is None or shape is None:
            return
        pairs = self.ready_pairs.without(exclude)
        lack: dict[WorkerSlots, int] = {}
        for workers, tokens in zip((pairs.prefills, pairs.decodes), self.tokens_needed(shape), strict=True):
            lack.update({worker: max(0, tokens - self._free(worker)) for worker in workers})
        self._kept = min(pairs, key=lambda pair: lack[pair[0]] + lack[pair[1]])
        for worker in self._kept:
            worker.held_for = waiter

    # -- decisions ---------------------------------------------------------------------------

    def place(
        self, shape: RequestShape, exclude: frozenset[PairKey], waiter: object | None = None
    ) -> Reservation | None:
        """Hold the pair the policy picks among those with room; None if there is none.

        ``waiter`` may have a pair that was kept for it.
        """
        ready_pairs = self.ready_pairs.without(exclude) if exclude else self.ready_pairs
        if not ready_pairs.prefills:
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
        return self._hold(shape, promise, choice, now_s)

    def tokens_needed(self, shape: RequestShape) -> tuple[int, int]:
        """KV that must be free on prefill and decode; nothing if no worker is large enough: SGLang then
        refuses the request at once. On decode: SGLang's reserve and the answer expected."""
        promise = self._promise(shape)
        return self._needed(shape, promise) if self._predicts else promise

    def _needed(self, shape: RequestShape, promise: tuple[int, int]) -> tuple[int, int]:
        forecast = shape.forecast
        if forecast is None or forecast.mean <= DECODE_RESERVE_TOKENS or not promise[1]:
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

    def _reach_s(self, ready_pairs: ReadyPairs, shape: RequestShape) -> dict[WorkerSlots, float]:
        """By how much each prefill worker's queue may be longer for this request than for others."""
        reaches_s = self._policy.reach_s(shape, ready_pairs.candidates.prefills, self._clock())
        return dict(zip(ready_pairs.prefills, reaches_s, strict=True)) if reaches_s else {}

    def _fits(
        self, worker: WorkerSlots, tokens: tuple[int, int], waiter: object | None, reach_s: float = 0.0
    ) -> bool:
        if worker.held_for is not None and worker.held_for is not waiter:
            return False
        needed = tokens[worker.role is Role.DECODE]
        return has_room(worker, needed, tokens[0], self._free(worker, reach_s))

    def _free(self, worker: WorkerSlots, reach_s: float = 0.0) -> int:
        limits = self._limits
        if reach_s > 0.0:
            limits = replace(limits, prefill_queue_s=limits.prefill_queue_s + reach_s)
        return free_tokens(worker, limits)

    def _hold(
        self, shape: RequestShape, tokens: tuple[int, int], choice: Choice, now_s: float
    ) -> Reservation:
        key = choice.pair.prefill.info.instance_id, choice.pair.decode.info.instance_id
        slots = self._pairs.get(key)
        if slots is None:
            slots = self._pairs[key] = PairSlots(self._workers[key[0]], self._workers[key[1]])
        slots.num_requests += 1
        self.num_open += 1
        prefill, decode, prompt_tokens = slots.prefill, slots.decode, shape.prompt_tokens
        legs = (
            self._table.dispatch(key[0], prompt_tokens, now_s, choice.cached_tokens),
            self._table.dispatch(key[1], prompt_tokens, now_s),
        )
        prefill.promised_tokens += tokens[0]
        prefill.num_inflight += 1
        if not is_calm(prefill):
            self._tight.add(prefill)
        self._hold_decode(decode, shape, tokens, legs[1])
        return Reservation(key, slots.pair, choice, slots, legs, tokens)

    def _hold_decode(
        self, decode: WorkerSlots, shape: RequestShape, tokens: tuple[int, int], leg: int
    ) -> None:
        decode.promised_tokens += tokens[1]
        decode.reserved_tokens += tokens[1] - tokens[0]
        decode.num_inflight += 1
        grown = decode.growth.add(leg, shape, tokens) if self._predicts else 0
        if grown > decode.calm_tokens or not is_calm(decode):
            self._tight.add(decode)

    def hold_alone(self, shape: RequestShape, decode: WorkerSlots, why: Reason) -> Reservation:
        """Hold a decode worker for all of a request."""
        instance_id, view = decode.instance_id, decode.view
        key = instance_id, instance_id
        slots = self._pairs.get(key)
        if slots is None:
            slots = self._pairs[key] = PairSlots(decode, decode)
        slots.num_requests += 1
        self.num_open += 1
        tokens = self._promise(shape)
        leg = self._table.dispatch(instance_id, shape.prompt_tokens, self._clock())
        self._hold_decode(decode, shape, tokens, leg)
        return Reservation(key, slots.pair, Choice(PairView(view, view), why), slots, (leg, leg), tokens)

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
        """The most that any worker not held for a waiter could still be promised: prefill, decode."""
        prefill, decode = (
            max((self._free(w) for w in row if w.held_for is None), default=CLOSED)
            for row in (self.ready_pairs.prefills, self.ready_pairs.decodes)
        )
        return prefill, decode

    def lacks_room(self, worker: WorkerSlots, shape: RequestShape | None = None) -> bool:
        """True if the worker has no room for such a request; None: for any request at all."""
        if shape is None:
            return self._free(worker) <= 0
        return not self._fits(worker, self.tokens_needed(shape), None)
