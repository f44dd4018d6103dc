"""A pair held for one request."""

from __future__ import annotations

import msgspec

from pdserve.scheduling.policy import Choice, Reason
from pdserve.scheduling.workers import PairKey, PairSlots
from pdserve.types import Pair


class Reservation(msgspec.Struct, eq=False):
    """Both legs of one request; whoever holds it gives it back to the scheduler that made it.

    ``key`` is as ``Scheduler.try_now`` takes it in ``exclude``; ``pair`` as it was described at the
    time; ``choice`` is the policy's. ``legs`` are the load table's numbers, ``tokens`` what was
    promised of each worker's KV.
    ``is_open`` until the legs have ended. Not a dataclass: one is made for each request, in C.

    A decode worker that prefills the request itself stands on both sides, and both legs are one.
    """

    key: PairKey
    pair: Pair
    choice: Choice
    slots: PairSlots
    legs: tuple[int, int]
    tokens: tuple[int, int]
    is_prefilling: bool = True
    is_open: bool = True

    @property
    def is_alone(self) -> bool:
        """True if a decode worker does all of it."""
        return self.key[0] == self.key[1]

    @property
    def why(self) -> Reason:
        """Why the policy chose this pair."""
        return self.choice.why
