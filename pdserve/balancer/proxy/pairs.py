"""Pairs for requests: taken from the scheduler, given back to it and then to the fleet's health.

take ─► prefill_finished ─► release | release_ended | release_failed
                                     └─► whom to blame
"""

from __future__ import annotations

import asyncio

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.proxy.answer import LegFailed, Relayed
from pdserve.errors import WorkerError, WorkerRejected, WorkerTimeout
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.scheduler import Scheduler
from pdserve.scheduling.workers import PairKey
from pdserve.types import RequestShape, Role


class Reservations:
    """Takes pairs for requests and gives them back: to the scheduler, then to the fleet's health.

    A request that waits is served after health knows of a failed leg, so that it does not get the
    worker that has just failed.
    """

    def __init__(self, scheduler: Scheduler, fleet: WorkerFleet) -> None:
        self._scheduler = scheduler
        self._fleet = fleet

    async def take(
        self, shape: RequestShape, *, exclude: frozenset[PairKey] = frozenset(), timeout_s: float
    ) -> Reservation:
        """A pair for a request, at once or from the queue.

        Raises:
            NoWorkerError: if the queue is full, or no pair had room within ``timeout_s``.
        """
        reservation = self._scheduler.try_now(shape, exclude)
        if reservation is None:
            try:
                reservation = await self._scheduler.wait(shape, exclude, timeout_s)
            except asyncio.CancelledError:
                self._fleet.notice_drained()  # the scheduler may have taken a pair back
                raise
        self._fleet.pair_reserved(reservation)
        return reservation

    def take_now(self, shape: RequestShape, exclude: frozenset[PairKey]) -> Reservation | None:
        """A pair for a request if one has room; None if none has, or others wait before it."""
        reservation = self._scheduler.try_now(shape, exclude)
        if reservation is not None:
            self._fleet.pair_reserved(reservation)
        return reservation

    def prefill_finished(self, reservation: Reservation) -> None:
        """The prefill leg has ended well."""
        self._scheduler.prefill_finished(reservation)
        self._fleet.notice_drained()

    def release(
        self,
        reservation: Reservation,
        *,
        prefill_ok: bool | None = None,
        decode_ok: bool | None = None,
        error: str | WorkerError = "",
    ) -> None:
        """End both legs; nothing happens if they have ended. Arguments as ``HealthTracker.legs_ended``."""
        if not reservation.is_open:
            return
        if reservation.is_alone:
            prefill_ok = decode_ok
        self._scheduler.end(reservation, prefill_ok=prefill_ok, decode_ok=decode_ok)
        self._fleet.legs_ended(reservation, prefill_ok, decode_ok, error)
        self._scheduler.serve()

    def release_ended(self, reservation: Reservation, relayed: Relayed) -> str:
        """Release after a complete answer; returns what was wrong with either leg, if anything."""
        error = relayed.decode_error or relayed.prefill_error
        if error is None:
            self.release(reservation, prefill_ok=True, decode_ok=True)
            return ""
        if error is relayed.decode_error:
            prefill_ok = True if relayed.prefill_error is None else None
            self.release(reservation, prefill_ok=prefill_ok, decode_ok=False, error=error)
        elif relayed.is_aborted:
            self.release(reservation, prefill_ok=False, error=error)
        elif isinstance(error, WorkerRejected) and error.status < 500:
            self.release(reservation, decode_ok=True)
            return ""
        else:
            # Only a late one: have it pinged, rather than taken for dead.
            reason = str(error) if isinstance(error, WorkerTimeout) else error
            self.release(reservation, prefill_ok=False, decode_ok=True, error=reason)
        return str(error)

    def release_failed(self, reservation: Reservation, failure: LegFailed) -> None:
        """Blame the leg that failed first, by its own error; no worker for the client's fault."""
        if failure.is_moved or failure.is_client_fault or failure.is_request_fault or failure.is_stale:
            self.release(reservation)
        elif failure.role is Role.PREFILL:
            self.release(reservation, prefill_ok=False, error=failure.error)
        elif failure.role is Role.DECODE:
            prefill_ok = True if failure.is_prefill_done else None
            # Only a late one: have it pinged, rather than taken for dead.
            reason = str(failure.error) if failure.is_late else failure.error
            self.release(reservation, prefill_ok=prefill_ok, decode_ok=False, error=reason)
        else:  # both silent: have both pinged
            self.release(reservation, prefill_ok=False, decode_ok=False, error=str(failure.error))
