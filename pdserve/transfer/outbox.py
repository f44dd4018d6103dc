"""The prefill rank's transfer loop: many writes in flight, round robin over decode ranks, no busy polling.

One thread owns all peers. A submitted chunk becomes one ``RankWrites`` per peer.
A peer's chunks are written in order, peers take turns one write at a time, and
posted writes are polled later, so a slow peer does not delay the others.

``RoomGate`` (SGLang's manager) is asked before the first byte of a chunk moves
and told when the last write has settled: it releases no page before that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.errors import PdserveError, PeerLost
from pdserve.transfer.engine import PeerName
from pdserve.transfer.jobs import ChunkJob, RankWrites, RoomGate, Step
from pdserve.transfer.messages import Ask, Credit, Void
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.plan import Path
from pdserve.transfer.steps import StepRunner

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 32
"""Writes posted to one peer at a time; more only lengthen the list that is polled."""

SETTLE_S = 5.0
"""How long the other writes of a failed chunk may take to settle (as SGLang's NIXL_ERR_SETTLE_TIMEOUT_S)."""

POLL_S = (0.00005, 0.001)
"""Shortest and longest sleep between polls while writes are in flight; doubles while nothing moves."""


@dataclass(slots=True)
class _Lane:
    """One decode rank's chunk shares."""

    link: PeerLink | None
    """None once the decode rank was removed; its writes in flight still settle."""
    queue: deque[RankWrites] = field(default_factory=deque)
    """With something left to post, in order."""
    writing: dict[RankWrites, None] = field(default_factory=dict)
    """With writes in flight; a set that keeps order."""

    @property
    def num_in_flight(self) -> int:
        return sum(len(writes.in_flight) for writes in self.writing)


class Outbox:
    """Transfers chunks for one prefill rank. ``start`` it, ``submit`` to it, ``close`` it."""

    def __init__(
        self,
        runner: StepRunner,
        gate: RoomGate,
        send_control: Callable[[PeerName, Void | Ask], None],
        *,
        credit_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._gate = gate
        self._send_control = send_control
        self._credit_timeout_s = credit_timeout_s
        self._sweep_every_s = min(1.0, credit_timeout_s / 4)
        self._next_sweep_s = 0.0
        self._clock = clock
        self._lanes: dict[PeerName, _Lane] = {}
        self._rooms: dict[int, deque[ChunkJob]] = {}
        self._changed: set[int] = set()
        self._unsettled: list[RankWrites] = []
        self._mail: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="pdserve-outbox", daemon=True)

    def start(self) -> None:
        """Start the transfer thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop posting and end the thread. Writes in flight are left to the transport."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def add_peer(self, link: PeerLink) -> None:
        """Make a peer known, or replace what is known of it after it was lost."""
        self._post(lambda: self._set_peer(link))

    def remove_peer(self, name: PeerName, reason: str) -> None:
        """Forget a peer that is gone: its chunks fail with ``reason``, and no credit is waited for."""
        self._post(lambda: self._drop_peer(name, reason))

    def submit(self, job: ChunkJob) -> None:
        """Queue a chunk. Chunks of one room must be submitted in token order."""
        self._post(lambda: self._accept(job))

    def credit(self, credit: Credit) -> None:
        """A decode rank's news of its slots."""
        # The clock is read here: the thread may be busy posting, and would blame the packed path for it.
        now_s = self._clock()
        self._post(lambda: self._take_credit(credit, now_s))

    @property
    def is_idle(self) -> bool:
        """Nothing queued and nothing in flight; slots may still be out."""
        return not self._mail and not self._rooms

    @property
    def num_due(self) -> int:
        """Pieces in slots of peers whose credit has not come."""
        return self._runner.num_due

    def turn(self) -> bool:
        """Do what can be done now: take mail, post, poll. True if something moved.

        The thread's body; tests without a thread call it themselves.
        """
        with self._wake:
            mail, self._mail = self._mail, deque()
        has_moved = bool(mail)
        for action in mail:
            self._guarded(action)
        for name, lane in list(self._lanes.items()):
            if lane.queue:
                has_moved |= self._advance(lane)
            if lane.writing:
                has_moved |= self._reap(lane)
            elif lane.link is None:
                del self._lanes[name]
        for room in list(self._changed):
            has_moved |= self._conclude(room)
        if self._clock() >= self._next_sweep_s:
            self._next_sweep_s = self._clock() + self._sweep_every_s
            self._guarded(self._sweep)
        return has_moved

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(action)
            self._wake.notify()

    def _run(self) -> None:
        pause_s, has_moved = POLL_S[0], False
        while True:
            with self._wake:
                if not has_moved and not self._mail and not self._is_closing:
                    self._wake.wait(pause_s if self._rooms else self._idle_wait_s())
                if self._is_closing:
                    return
            has_moved = self.turn()
            pause_s = POLL_S[0] if has_moved else min(POLL_S[1], pause_s * 2)

    def _idle_wait_s(self) -> float | None:
        return self._sweep_every_s if self._runner.num_due or self._unsettled else None

    @staticmethod
    def _guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            # One bad message must not end the thread that every other room needs.
            logger.exception("transfer loop: unexpected error")

    def _set_peer(self, link: PeerLink) -> None:
        lane = self._lanes.setdefault(link.name, _Lane(None))
        known, lane.link = lane.link, link
        if known is None:
            return
        link.costs = known.costs
        if known.slots.holder == link.slots.holder:
            link.slots = known.slots  # the same registration, loaded again
        elif leases := known.slots.give_up():
            self._send_control(link.name, Void(holder=known.slots.holder, leases=leases))

    def _drop_peer(self, name: PeerName, reason: str) -> None:
        lane = self._lanes.get(name)
        if lane is None:
            return
        lane.link = None
        for writes in [*lane.queue, *lane.writing]:
            self._fail(writes.job, reason)
        lane.queue.clear()
        self._runner.forget_peer(name)

    def _accept(self, job: ChunkJob) -> None:
        job.per_rank.extend(RankWrites(job, target) for target in job.targets)
        self._rooms.setdefault(job.room, deque()).append(job)
        for writes in job.per_rank:
            lane = self._lanes.get(writes.target.peer)
            if lane is None or lane.link is None:
                self._fail(job, f"decode rank {writes.target.peer} is not connected")
            else:
                lane.queue.append(writes)
        self._changed.add(job.room)

    def _fail(self, job: ChunkJob, reason: str, *, is_silent: bool = False) -> None:
        job.fail(reason, self._clock(), is_silent=is_silent)
        self._changed.add(job.room)

    def _take_credit(self, credit: Credit, now_s: float) -> None:
        name = PeerName(credit.agent)
        lane = self._lanes.get(name)
        if lane is None or lane.link is None:
            return
        leases = self._runner.take_credit(lane.link, credit, now_s)
        if leases:
            self._send_control(name, Void(holder=credit.holder, leases=leases))

    def _advance(self, lane: _Lane) -> bool:
        """Post at most one write for this peer. True if something moved."""
        while lane.queue and lane.queue[0].job.has_failed:
            lane.queue.popleft()
        if lane.link is None or lane.num_in_flight >= MAX_IN_FLIGHT:
            return False
        waiting: set[int] = set()
        for writes in lane.queue:
            job = writes.job
            if job.has_failed or job.room in waiting:
                continue
            try:
                is_ready = (job.is_entered or job.is_ready()) and writes.is_filled
            except Exception as exc:  # a CUDA event reports errors of earlier kernels here
                logger.exception("room=%s: the forward pass cannot be asked", job.room)
                self._fail(job, f"the forward pass failed: {exc}")
                return True
            if is_ready:
                return self._step(lane, lane.link, writes)
            if job.is_entered and not self._gate.is_open(job.room):
                self._fail(job, "room was closed during the transfer", is_silent=True)
                return True
            waiting.add(job.room)
        return False

    def _step(self, lane: _Lane, peer: PeerLink, writes: RankWrites) -> bool:
        job, has_moved = writes.job, True
        try:
            if not job.is_entered:
                if not self._gate.enter(job.room):
                    self._fail(job, "room is closed", is_silent=True)
                    return True
                job.enter()
            elif not self._gate.is_open(job.room):
                self._fail(job, "room was closed during the transfer", is_silent=True)
                return True
            has_moved = self._runner.post_next(peer, writes)
            self._ask(lane, peer, writes)
        except Exception as exc:
            self._blame(writes, exc)
        if writes.in_flight:
            lane.writing[writes] = None
        if writes.is_posted:
            lane.queue.remove(writes)
            self._changed.add(job.room)
        if not lane.queue:
            peer.starved_since_s = None
        return has_moved

    def _ask(self, lane: _Lane, peer: PeerLink, writes: RankWrites) -> None:
        """Ask for slots if more pieces wait than there are grants for."""
        if writes.plan is not None and writes.plan.path is Path.PACKED and writes.plan.pieces:
            pieces = len(writes.plan.pieces)
            number = peer.slots.shortage(max(pieces, len(lane.queue)), self._clock())
            if number:
                self._send_control(peer.name, Ask(holder=peer.slots.holder, num_slots=number))

    def _blame(self, writes: RankWrites, exc: Exception) -> None:
        """The share's job failed by ``exc``."""
        if not isinstance(exc, PdserveError):
            logger.error("room=%s: unexpected transfer error", writes.job.room, exc_info=exc)
        if isinstance(exc, PeerLost) and exc.may_have_written:
            writes.job.may_have_written = True
        kind = "" if isinstance(exc, PdserveError) else "unexpected transfer error: "
        self._fail(writes.job, f"{kind}{exc}")

    def _reap(self, lane: _Lane) -> bool:
        has_moved = False
        for writes in list(lane.writing):
            for step in list(writes.in_flight):
                has_moved |= self._reap_step(lane.link, writes, step)
            if not writes.in_flight:
                del lane.writing[writes]
                self._changed.add(writes.job.room)
        return has_moved

    def _reap_step(self, peer: PeerLink | None, writes: RankWrites, step: Step) -> bool:
        try:
            return self._runner.reap(peer, writes, step)
        except Exception as exc:
            self._blame(writes, exc)
            self._runner.give_up(peer, writes, step)
            return True

    def _conclude(self, room: int) -> bool:
        """Tell the gate of chunks that are over; a room's last, making it a success, after the others."""
        jobs = self._rooms.get(room, deque())
        num_before = len(jobs)
        for job in [one for one in jobs if one.has_failed and self._is_over(one)]:
            jobs.remove(job)
            self._end(job)
        while jobs and not jobs[0].has_failed and self._is_over(jobs[0]):
            self._end(jobs.popleft())
        if not any(job.has_failed for job in jobs):
            self._changed.discard(room)  # else its time to settle runs
        if not jobs:
            self._rooms.pop(room, None)
        return len(jobs) < num_before

    def _is_over(self, job: ChunkJob) -> bool:
        in_flight = any(writes.in_flight for writes in job.per_rank)
        if job.has_failed:
            return not in_flight or self._clock() >= job.failed_at_s + SETTLE_S
        return not in_flight and all(writes.is_posted for writes in job.per_rank)

    def _end(self, job: ChunkJob) -> None:
        is_settled = True
        for writes in job.per_rank:
            lane = self._lanes.get(writes.target.peer)
            if lane is not None and writes in lane.writing:
                del lane.writing[writes]
                self._unsettled.append(writes)
                is_settled = False
            self._runner.forget(writes)
        if job.has_failed:
            self._guarded(lambda: self._gate.failed(job, settled=is_settled))
        else:
            self._guarded(lambda: self._gate.finished(job))

    def _sweep(self) -> None:
        """Ask for slots back whose arrival was never acted on: lost message, failed write."""
        for writes in list(self._unsettled):
            lane = self._lanes.get(writes.target.peer)
            for step in list(writes.in_flight):
                self._reap_step(None if lane is None else lane.link, writes, step)
            if not writes.in_flight:
                self._unsettled.remove(writes)
        deadline_s = self._clock() - self._credit_timeout_s
        for name, lane in list(self._lanes.items()):
            leases = self._runner.overdue(name, deadline_s)
            if leases and lane.link is not None:
                logger.warning("%s: %d slots without credit, asking for them", name, len(leases))
                self._send_control(name, Void(holder=lane.link.slots.holder, leases=leases))
