"""The prefill rank's transfer loop: many writes in flight, round robin over decode ranks, no busy polling.

One thread owns all peers. A submitted chunk becomes one ``RankWrites`` per peer.
A peer's chunks are written in order, peers take turns one write at a time, and
posted writes are polled later, so a slow peer does not delay the others.

``RoomGate`` (SGLang's manager) is asked before the first byte of a chunk moves
and told when the last write has settled: it releases no page before that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from pdserve.errors import PdserveError, PeerLost
from pdserve.transfer.engine import PeerName
from pdserve.transfer.jobs import ChunkJob, RankWrites, RoomGate, Step
from pdserve.transfer.messages import Credit, Void
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.steps import StepRunner

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 32
"""Writes posted to one peer at a time; more only lengthen the list that is polled."""

SETTLE_S = 5.0
"""How long the other writes of a failed chunk may take to settle (as SGLang's NIXL_ERR_SETTLE_TIMEOUT_S)."""

POLL_S = (0.00005, 0.001)
"""Shortest and longest sleep between polls while writes are in flight; doubles while nothing moves."""


class Outbox:
    """Transfers chunks for one prefill rank. ``start`` it, ``submit`` to it, ``close`` it."""

    def __init__(
        self,
        runner: StepRunner,
        gate: RoomGate,
        send_control: Callable[[PeerName, Void], None],
        *,
        credit_timeout_s: float = 30.0,
    ) -> None:
        self._runner = runner
        self._gate = gate
        self._send_control = send_control
        self._credit_timeout_s = credit_timeout_s
        self._sweep_every_s = min(1.0, credit_timeout_s / 4)
        self._peers: dict[PeerName, PeerLink] = {}
        self._queues: dict[PeerName, deque[RankWrites]] = {}
        self._active: list[RankWrites] = []
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

    def submit(self, job: ChunkJob) -> None:
        """Queue a chunk. Chunks of one room must be submitted in token order."""
        self._post(lambda: self._accept(job))

    def credit(self, credit: Credit) -> None:
        """The decode rank is done with pieces of its window."""
        # The clock is read here: the thread may be busy posting, and would blame the packed path for it.
        now_s = time.perf_counter()
        self._post(lambda: self._take_credit(credit, now_s))

    @property
    def is_idle(self) -> bool:
        """Nothing queued and nothing in flight; slab pieces may still be out."""
        return not self._mail and not self._active

    def held_window_bytes(self) -> int:
        """Bytes of all windows whose credits have not come back."""
        return sum(peer.window.held_bytes for peer in list(self._peers.values()))

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(action)
            self._wake.notify()

    def _run(self) -> None:
        pause_s, has_moved = POLL_S[0], False
        next_sweep_s = 0.0
        while True:
            with self._wake:
                if not has_moved and not self._mail and not self._is_closing:
                    self._wake.wait(pause_s if self._active else self._idle_wait_s())
                mail, self._mail = list(self._mail), deque()
                if self._is_closing:
                    return
            has_moved = bool(mail)
            for action in mail:
                self._guarded(action)
            for name in list(self._queues):
                has_moved |= self._advance(name)
            has_moved |= self._reap()
            pause_s = POLL_S[0] if has_moved else min(POLL_S[1], pause_s * 2)
            if time.monotonic() >= next_sweep_s:
                next_sweep_s = time.monotonic() + self._sweep_every_s
                self._guarded(self._sweep)

    def _idle_wait_s(self) -> float | None:
        return self._sweep_every_s if any(peer.window.num_held for peer in self._peers.values()) else None

    @staticmethod
    def _guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            # One bad message must not end the thread that every other room needs.
            logger.exception("transfer loop: unexpected error")

    def _set_peer(self, link: PeerLink) -> None:
        known = self._peers.get(link.name)
        if known is not None:
            link.costs = known.costs
            if known.offer.window == link.offer.window:
                link.window = known.window
        self._peers[link.name] = link
        self._queues.setdefault(link.name, deque())

    def _accept(self, job: ChunkJob) -> None:
        job.per_rank.extend(RankWrites(job, target) for target in job.targets)
        self._active.extend(job.per_rank)
        for writes in job.per_rank:
            queue = self._queues.get(writes.target.peer)
            if queue is None:
                job.fail(f"decode rank {writes.target.peer} is not connected")
            else:
                queue.append(writes)
        if not job.per_rank:
            self._gate.finished(job)

    def _take_credit(self, credit: Credit, now_s: float) -> None:
        peer = self._peers.get(PeerName(credit.agent))
        if peer is not None:
            self._runner.take_credit(peer, credit, now_s)

    def _advance(self, name: PeerName) -> bool:
        """Post at most one write for this peer. True if something moved."""
        peer, queue = self._peers.get(name), self._queues[name]
        if peer is None or not queue:
            return False
        if sum(len(writes.in_flight) for writes in queue) >= MAX_IN_FLIGHT:
            return False
        waiting: set[int] = set()
        for writes in list(queue):
            if writes.is_posted or writes.job.has_failed:
                continue
            if writes.job.room in waiting:
                continue
            try:
                is_ready = writes.job.is_ready()
            except Exception as exc:  # a CUDA event reports errors of earlier kernels here
                logger.exception("room=%s: the forward pass cannot be asked", writes.job.room)
                writes.job.fail(f"the forward pass failed: {exc}")
                return True
            if not is_ready:
                waiting.add(writes.job.room)
                continue
            return self._step(peer, writes)
        return False

    def _step(self, peer: PeerLink, writes: RankWrites) -> bool:
        job = writes.job
        try:
            if not job.is_entered:
                if not self._gate.enter(job.room):
                    job.fail("room is closed", is_silent=True)
                    return True
                job.enter()
            elif not self._gate.is_open(job.room):
                job.fail("room was closed during the transfer", is_silent=True)
                return True
            return self._runner.post_next(peer, writes)
        except PdserveError as exc:
            if isinstance(exc, PeerLost) and exc.may_have_written:
                job.may_have_written = True
            job.fail(str(exc))
        except Exception as exc:
            logger.exception("room=%s: unexpected transfer error", job.room)
            job.fail(f"unexpected transfer error: {exc}")
        return True

    def _reap(self) -> bool:
        has_moved = False
        for writes in self._active:
            peer = self._peers.get(writes.target.peer)
            for step in list(writes.in_flight):
                has_moved |= self._reap_step(peer, writes, step)
        unfinished: set[int] = set()
        for job in dict.fromkeys(writes.job for writes in self._active):
            # A room's last chunk makes it a success: only after the earlier ones, whose pages are then free.
            if (job.room in unfinished and not job.has_failed) or not self._finish_if_over(job):
                unfinished.add(job.room)
            else:
                has_moved = True
        return has_moved

    def _reap_step(self, peer: PeerLink | None, writes: RankWrites, step: Step) -> bool:
        try:
            return self._runner.reap(peer, writes, step)
        except Exception as exc:
            if not isinstance(exc, PdserveError):
                logger.exception("room=%s: unexpected transfer error", writes.job.room)
            if isinstance(exc, PeerLost) and exc.may_have_written:
                writes.job.may_have_written = True
            self._runner.give_up(peer, writes, step)
            writes.job.fail(str(exc))
            return True

    def _finish_if_over(self, job: ChunkJob) -> bool:
        in_flight = any(writes.in_flight for writes in job.per_rank)
        if job.has_failed:
            if in_flight and time.monotonic() < job.failed_at_s + SETTLE_S:
                return False
        elif in_flight or not all(writes.is_posted for writes in job.per_rank):
            return False
        for writes in job.per_rank:
            self._forget(writes, was_settled=not writes.in_flight)
        if job.has_failed:
            self._guarded(lambda: self._gate.failed(job, settled=not in_flight))
        else:
            self._guarded(lambda: self._gate.finished(job))
        return True

    def _forget(self, writes: RankWrites, *, was_settled: bool) -> None:
        self._active.remove(writes)
        with contextlib.suppress(ValueError, KeyError):
            self._queues[writes.target.peer].remove(writes)
        self._runner.forget(writes)
        if not was_settled:
            self._unsettled.append(writes)

    def _sweep(self) -> None:
        """Ask for slab pieces back whose arrival was never acted on: lost message, failed write."""
        for writes in list(self._unsettled):
            for step in list(writes.in_flight):
                self._reap_step(self._peers.get(writes.target.peer), writes, step)
            if not writes.in_flight:
                self._unsettled.remove(writes)
        deadline_s = time.monotonic() - self._credit_timeout_s
        for peer in self._peers.values():
            overdue = self._runner.overdue(peer, deadline_s)
            if overdue:
                logger.warning("%s: %d slab pieces without credit, asking for them", peer.name, len(overdue))
                self._send_control(peer.name, Void(window=peer.offer.window, generations=overdue))
