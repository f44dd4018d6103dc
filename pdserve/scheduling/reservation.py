"""A pair held for one request."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pdserve.errors import WorkerError
from pdserve.scheduling.policy import Choice, Reason
from pdserve.scheduling.workers import PairKey, PairRecord
from pdserve.types import Pair


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


class Reservation(msgspec.Struct, eq=False):
    """Both legs of one request. Release it exactly once; later calls do nothing.

    ``pair`` is as it was described at the time; ``choice`` is the policy's. ``legs`` are the
    load table's numbers, ``tokens`` what was promised of each worker's KV, ``holder`` takes both
    back. Not a dataclass: one is made for each request, in C.
    """

    pair: Pair
    choice: Choice
    record: PairRecord
    legs: tuple[int, int]
    tokens: tuple[int, int]
    holder: Holder | None
    is_prefilling: bool = True

    @property
    def why(self) -> Reason:
        """Why the policy chose this pair."""
        return self.choice.why

    @property
    def reason(self) -> str:
        """Why the policy chose this pair; put together at each reading."""
        return str(self.choice.why)

    @property
    def key(self) -> PairKey:
        """(prefill, decode) instance ids, as ``Fleet.reserve`` takes them in ``exclude``."""
        return self.pair.prefill.instance_id, self.pair.decode.instance_id

    def prefill_finished(self) -> None:
        """Call when the prefill server has answered: its part of the load is over, decode goes on.

        Optional, but without it a long answer counts as prefill work until it ends.
        """
        if self.holder is not None and self.is_prefilling:
            self.is_prefilling = False
            self.holder.prefill_finished(self)

    def release(
        self, *, prefill_ok: bool | None, decode_ok: bool | None, error: str | WorkerError = ""
    ) -> None:
        """End both legs and health them. Idempotent.

        Args:
            prefill_ok: False blames that worker, True clears it, None says nothing
                (the client left, or the other leg failed first).
            decode_ok: the same for the decode leg.
            error: what went wrong. As WorkerUnreachable or WorkerTimeout of a blamed
                worker it makes that worker suspect at once; anything else counts as
                one of ``breaker_failures`` in a row and has the worker pinged, but for a
                503 of its own, which says that it is full.
        """
        holder, self.holder = self.holder, None
        if holder is not None:
            holder.released(self, prefill_ok, decode_ok, error)
