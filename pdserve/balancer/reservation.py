"""A pair held for one request, and the line of requests that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.balancer.member import PairKey, PairRecord
from pdserve.errors import WorkerError
from pdserve.types import Pair, RequestShape


class Holder(Protocol):
    """What a reservation gives its pair back to."""

    def prefill_finished(self, reservation: Reservation) -> None:
        """The prefill leg's work is over."""
        ...

    def released(
        self,
        reservation: Reservation,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """Both legs ended."""
        ...


@dataclass(slots=True, eq=False)
class Reservation:
    """Both legs of one request. Release it exactly once; later calls do nothing.

    ``pair`` is as it was described at the time; ``reason`` is the policy's.
    """

    pair: Pair
    reason: str
    record: PairRecord = field(repr=False)
    legs: tuple[int, int] = field(repr=False)
    _holder: Holder | None = field(repr=False)

    @property
    def key(self) -> PairKey:
        """(prefill, decode) instance ids, as ``Fleet.reserve`` takes them in ``exclude``."""
        return self.pair.prefill.instance_id, self.pair.decode.instance_id

    def prefill_finished(self) -> None:
        """Call when the prefill server has answered: its part of the load is over, decode goes on.

        Optional, but without it a long answer counts as prefill work until it ends.
        """
        if self._holder is not None:
            self._holder.prefill_finished(self)

    def release(
        self, *, prefill_ok: bool | None, decode_ok: bool | None, error: str | WorkerError = ""
    ) -> None:
        """End both legs and judge them. Idempotent.

        Args:
            prefill_ok: False blames that worker, True clears it, None says nothing
                (the client left, or the other leg failed first).
            decode_ok: the same for the decode leg.
            error: what went wrong. As WorkerUnreachable or WorkerTimeout of a blamed
                worker it makes that worker suspect at once; anything else counts as
                one of three in a row and has the worker pinged.
        """
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.released(self, prefill_ok, decode_ok, error)


@dataclass(slots=True, eq=False)
class _Waiter:
    shape: RequestShape
    exclude: frozenset[PairKey]
    future: asyncio.Future[Reservation]


class WaitLine:
    """Requests without a pair, served in order of arrival whenever a pair becomes ready.

    ``attempt`` tries to reserve now, and returns None where there is no usable pair.
    """

    def __init__(self, attempt: Callable[[RequestShape, frozenset[PairKey]], Reservation | None]) -> None:
        self._attempt = attempt
        self._waiters: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, shape: RequestShape, exclude: frozenset[PairKey], timeout_s: float) -> Reservation:
        """Stand in line.

        A request whose pairs are all excluded does not hold up those behind it.

        Raises:
            TimeoutError: if no pair came up in time.
        """
        waiter = _Waiter(shape, exclude, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.future
        except BaseException:
            # Served and cancelled in the same turn of the loop: nobody else will give it back.
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release(prefill_ok=None, decode_ok=None)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def serve(self) -> None:
        """Give every waiter that can have one a pair, in order. The pair is held from here on."""
        for waiter in list(self._waiters):
            if waiter.future.done():
                continue
            reservation = self._attempt(waiter.shape, waiter.exclude)
            if reservation is not None:
                self._waiters.remove(waiter)
                waiter.future.set_result(reservation)

    def dismiss(self, make_error: Callable[[], Exception]) -> None:
        """End every wait with an error."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(make_error())
