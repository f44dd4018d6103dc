"""Which request gets which pair, and when: slots and KV tokens promised, the queue for the rest.

    reserve ─► try_now ── room ──► policy ─► Reservation ─► legs end ─► released ─┐
                  └─ none ─► WaitLine ◄── serve ◄── sample, readiness, leg ended ◄┘

Everything here happens between two awaits, so what was promised is never promised twice.
A request that does not fit lets smaller ones pass it ``MAX_OVERTAKEN`` times; then the pair it
needs least of is held for it, and the others go on with the rest of the fleet.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from pdserve.balancer.completions import CompletionRate
from pdserve.balancer.load import LoadTable
from pdserve.balancer.member import PairKey, PairRecord, Worker
from pdserve.balancer.policy import Candidates, Choice, Policy
from pdserve.balancer.reservation import Reservation
from pdserve.balancer.room import (
    CLOSED,
    DECODE_RESERVE_TOKENS,
    ENDLESS,
    easy_tokens,
    free_tokens,
    has_room,
    is_calm,
    is_tight,
    set_calm,
)
from pdserve.balancer.rotation import Rotation
from pdserve.balancer.verdicts import Judge
from pdserve.balancer.wait_line import LineFull, Waiter, WaitLine
from pdserve.config import BalancerConfig
from pdserve.errors import NoWorkerError, WorkerError
from pdserve.types import RequestShape, Role

MAX_OVERTAKEN = 16
"""Requests that may be served before an earlier one that needs more room than there is. A pair held
too early stands half empty; too late and a burst of small requests keeps a large one waiting."""

Explain = Callable[[frozenset[PairKey], RequestShape], str]


class Admission:
    """Hands out reservations and takes them back.

    Args:
        explain: why no pair can be had, for the client.
        on_drained: called when the last leg on a draining worker has ended.
    """

    def __init__(
        self,
        config: BalancerConfig,
        table: LoadTable,
        policy: Policy,
        judge: Judge,
        explain: Explain,
        on_drained: Callable[[Worker], None],
    ) -> None:
        self.rotation = Rotation()
        self.line = WaitLine(config.queue_size)
        self.shed: Counter[str] = Counter()
        self.completions = CompletionRate()
        self.num_open = 0
        self._max_open = config.max_concurrent_requests or ENDLESS
        self._prefill_queue_s = config.prefill_queue_s
        self._table = table
        self._policy = policy
        self._judge = judge
        self._explain = explain
        self._on_drained = on_drained
        self._tight: set[Worker] = set()
        self._easy_tokens = ENDLESS
        self._largest_tokens = ENDLESS
        self._least_waiting = (0, 0)  # nobody in line needs less; on prefill, on decode
        self._favoured: Waiter | None = None
        self._held: PairRecord | None = None

    # -- getting a pair ----------------------------------------------------------------------

    def try_now(self, shape: RequestShape, exclude: frozenset[PairKey]) -> Reservation | None:
        """A pair at once, without waiting; None if others wait already or there is no room."""
        if self.line or self.num_open >= self._max_open:
            return None
        return self._place(shape, exclude, None)

    async def wait(self, shape: RequestShape, exclude: frozenset[PairKey], timeout_s: float) -> Reservation:
        """Stand in line for a pair.

        Raises:
            NoWorkerError: if the line is full or no pair could be had in time.
        """
        waiter = self._join(shape, exclude)
        self.serve()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(waiter.future)
        except TimeoutError:
            if waiter.future.done() and waiter.future.exception() is None:
                return waiter.future.result()  # served in the last moment
            raise self._refusal(
                "timeout", f"no pair within {timeout_s:g} s: {self._explain(exclude, shape)}"
            ) from None
        except asyncio.CancelledError:
            _give_back(waiter.future)
            raise
        finally:
            self.line.leave(waiter)
            if waiter is self._favoured:
                self._favour(None)
                self.serve()

    def serve(self) -> None:
        """Give every waiter that can have one a pair, in order. The pair is held from here on."""
        front: Waiter | None = None
        free, least = self._most_free(), (ENDLESS, ENDLESS)
        for waiter in self.line:
            if self._fits_nobody(free):
                return
            if waiter.future.done():
                continue
            tokens = self._tokens_needed(waiter.shape)
            reservation = None
            if waiter is self._favoured or (tokens[0] <= free[0] and tokens[1] <= free[1]):
                reservation = self._place(waiter.shape, waiter.exclude, waiter)
            if reservation is None:
                if front is None and len(self.rotation.without(waiter.exclude)):
                    front = waiter
                least = min(least[0], tokens[0]), min(least[1], tokens[1])
                continue
            self.line.leave(waiter)
            waiter.future.set_result(reservation)
            if waiter is self._favoured:
                self._favour(None)
            if front is not None:
                self._overtaken(front)
            free = self._most_free()
        self._least_waiting = least

    def _fits_nobody(self, free: tuple[int, int]) -> bool:
        if self.num_open >= self._max_open:
            return True
        least = self._least_waiting
        return self._favoured is None and (free[0] < least[0] or free[1] < least[1])

    def stop(self) -> None:
        """End every wait."""
        self.shed["stopping"] += len(self.line)
        self.line.dismiss(lambda: NoWorkerError("the balancer is stopping"))

    def lacks_room(self, worker: Worker, shape: RequestShape | None = None) -> bool:
        """True if a worker in the rotation has no room for such a request; None: for any at all."""
        if shape is None:
            return free_tokens(worker, self._prefill_queue_s) <= 0
        return not self._fits(worker, self._tokens_needed(shape), None)

    # -- what changes the room ---------------------------------------------------------------

    def readiness_changed(self, records: list[PairRecord]) -> None:
        """Only the ready ones of ``records`` take traffic from now on."""
        self.rotation = Rotation.of(records)
        self._tight = {worker for record in records for worker in (record.prefill, record.decode)}
        self._measure()
        if self._favoured is not None:
            self._favour(None)
        self.serve()

    def sampled(self, worker: Worker) -> None:
        """A sample of that worker has come."""
        self.completions.mark(time.monotonic())
        size = worker.calm_tokens
        set_calm(worker, self._prefill_queue_s)
        if worker.calm_tokens != size:
            self._measure()
        self._tight.add(worker)
        if self.line:
            self.serve()

    def prefill_finished(self, reservation: Reservation) -> None:
        """Called by a reservation: its prefill leg no longer loads the worker."""
        self._end_prefill(reservation)
        if self.line:
            self.serve()

    def released(
        self,
        reservation: Reservation,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """Called by a reservation, once: end both legs, then judge each worker by its own."""
        self.num_open -= 1
        self.completions.total += 1
        if reservation.is_prefilling:
            reservation.is_prefilling = False
            self._end_prefill(reservation)
        decode, tokens = reservation.record.decode, reservation.tokens
        self._table.finish(decode.info.instance_id, reservation.legs[1])
        decode.promised_tokens -= tokens[1]
        decode.reserved_tokens -= tokens[1] - tokens[0]
        decode.num_inflight -= 1
        if decode.is_draining and not decode.num_inflight:
            self._on_drained(decode)
        if prefill_ok and decode_ok:
            reservation.record.prefill.breaker.succeed()
            decode.breaker.succeed()
        else:
            self._judge.pair_ended(reservation.record, prefill_ok, decode_ok, error)
            self._tight |= {reservation.record.prefill, decode}  # one may have said that it is full
        if self.line:
            self.serve()

    def _end_prefill(self, reservation: Reservation) -> None:
        prefill = reservation.record.prefill
        self._table.finish(prefill.info.instance_id, reservation.legs[0])
        prefill.promised_tokens -= reservation.tokens[0]
        prefill.num_inflight -= 1
        if prefill.is_draining and not prefill.num_inflight:
            self._on_drained(prefill)

    # -- room --------------------------------------------------------------------------------

    def _place(
        self, shape: RequestShape, exclude: frozenset[PairKey], waiter: Waiter | None
    ) -> Reservation | None:
        """Hold the pair the policy picks among those with room, if there is one."""
        rotation = self.rotation.without(exclude) if exclude else self.rotation
        if not rotation.records:
            return None
        tokens = self._tokens_needed(shape)
        candidates: Candidates | None = rotation.candidates
        if waiter is not None or not self._is_easy(tokens[1]):
            candidates = self._with_room(rotation, tokens, waiter)
        if candidates is None:
            return None
        return self._hold(shape, tokens, self._policy.choose(shape, candidates))

    def _tokens_needed(self, shape: RequestShape) -> tuple[int, int]:
        """KV on prefill and decode; nothing if no worker is large enough: SGLang will refuse it at once."""
        prompt_tokens = shape.prompt_tokens
        if prompt_tokens > self._largest_tokens:
            return 0, 0
        return prompt_tokens, prompt_tokens + min(shape.max_new_tokens, DECODE_RESERVE_TOKENS)

    def _is_easy(self, tokens: int) -> bool:
        """True if such a request fits anywhere."""
        if self._tight:
            self._tight = {worker for worker in self._tight if is_tight(worker, self._prefill_queue_s)}
        return not self._tight and tokens <= self._easy_tokens

    def _with_room(
        self, rotation: Rotation, tokens: tuple[int, int], waiter: Waiter | None
    ) -> Candidates | None:
        return rotation.where(lambda worker: self._fits(worker, tokens, waiter))

    def _fits(self, worker: Worker, tokens: tuple[int, int], waiter: Waiter | None) -> bool:
        if worker.held_for is not None and worker.held_for is not waiter:
            return False
        needed = tokens[worker.role is Role.DECODE]
        return has_room(worker, needed, tokens[0], self._prefill_queue_s)

    def _hold(self, shape: RequestShape, tokens: tuple[int, int], choice: Choice) -> Reservation:
        prefill_id = choice.pair.prefill.info.instance_id
        decode_id = choice.pair.decode.info.instance_id
        record = self.rotation.records[prefill_id, decode_id]
        record.requests += 1
        self.num_open += 1
        prefill, decode, prompt_tokens = record.prefill, record.decode, shape.prompt_tokens
        now_s = time.monotonic()
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
        if not is_calm(decode):
            self._tight.add(decode)
        return Reservation(record.pair, choice.why, record, legs, tokens, self)

    def _measure(self) -> None:
        workers = (*self.rotation.prefills, *self.rotation.decodes)
        for worker in workers:
            set_calm(worker, self._prefill_queue_s)
        self._easy_tokens = min((easy_tokens(worker) for worker in workers), default=ENDLESS)
        self._least_waiting = (0, 0)
        self._largest_tokens = min(
            max((worker.view.kv_capacity or ENDLESS for worker in row), default=ENDLESS)
            for row in (self.rotation.prefills, self.rotation.decodes)
        )

    def _most_free(self) -> tuple[int, int]:
        """The most that any worker, not held for somebody, could still be promised: prefill, decode."""
        limit_s = self._prefill_queue_s
        prefill, decode = (
            max((free_tokens(w, limit_s) for w in row if w.held_for is None), default=CLOSED)
            for row in (self.rotation.prefills, self.rotation.decodes)
        )
        return prefill, decode

    # -- the line ----------------------------------------------------------------------------

    def _join(self, shape: RequestShape, exclude: frozenset[PairKey]) -> Waiter:
        try:
            waiter, displaced = self.line.join(shape, exclude, time.monotonic())
        except LineFull:
            why = f"{len(self.line)} requests wait already: {self._explain(exclude, shape)}"
            raise self._refusal("queue_full", why) from None
        if displaced is not None:
            why = self._explain(displaced.exclude, displaced.shape)
            why = f"{len(self.line)} requests of no less priority wait: {why}"
            displaced.future.set_exception(self._refusal("displaced", why))
        least, tokens = self._least_waiting, self._tokens_needed(shape)
        self._least_waiting = min(least[0], tokens[0]), min(least[1], tokens[1])
        return waiter

    def _refusal(self, reason: str, message: str) -> NoWorkerError:
        self.shed[reason] += 1
        retry_after_s = self.completions.retry_after_s(len(self.line) + 1, time.monotonic())
        return NoWorkerError(message, retry_after_s)

    def _overtaken(self, front: Waiter) -> None:
        front.num_overtaken += 1
        if front.num_overtaken >= MAX_OVERTAKEN and self._favoured is None:
            self._favour(front)

    def _favour(self, waiter: Waiter | None) -> None:
        """Hold the pair that lacks least for ``waiter``; None: hold nothing any more."""
        if self._held is not None:
            self._held.prefill.held_for = self._held.decode.held_for = None
        self._favoured, self._held = waiter, None
        if waiter is None:
            return
        tokens, limit_s = self._tokens_needed(waiter.shape), self._prefill_queue_s

        def lack(record: PairRecord) -> int:
            free = free_tokens(record.prefill, limit_s), free_tokens(record.decode, limit_s)
            return max(0, tokens[0] - free[0]) + max(0, tokens[1] - free[1])

        record = self._held = min(self.rotation.without(waiter.exclude).records.values(), key=lack)
        record.prefill.held_for = record.decode.held_for = waiter


def _give_back(future: asyncio.Future[Reservation]) -> None:
    """Served and cancelled in the same turn of the loop: nobody else will give it back."""
    if future.done() and not future.cancelled() and future.exception() is None:
        future.result().release(prefill_ok=None, decode_ok=None)
