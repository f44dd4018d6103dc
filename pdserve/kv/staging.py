"""Slab space: equal slots, and who holds how many of them. Pure.

Slots come back in any order, so one holder that never gives any back keeps only
its own. It cannot have them all either: a holder may take a slot only while more
are free than it holds already. One holder alone gets half of a slab, two get a
third each, and a newcomer always finds a share free (dynamic thresholds, as
switches share packet buffers: Choudhury and Hahne, 1998).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

ALIGNMENT = 256
"""Every slot starts at a multiple of this: vector loads, and NIXL's preference for aligned writes."""


class SlotPool:
    """Hands out the slots of one slab, last returned first. Not thread-safe: one owner."""

    def __init__(self, nbytes: int, slot_bytes: int) -> None:
        """``nbytes`` of slab, cut into slots of ``slot_bytes``; what is left over is not used."""
        if nbytes < 0 or slot_bytes < 0:
            raise ValueError(f"a slab cannot have {nbytes} bytes in slots of {slot_bytes}")
        self.slot_bytes = slot_bytes - slot_bytes % ALIGNMENT
        self.num_slots = nbytes // self.slot_bytes if self.slot_bytes else 0
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._holders: dict[int, Hashable] = {}
        self._held: Counter[Hashable] = Counter()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Slots handed out and not yet returned."""
        return len(self._holders)

    def held_by(self, holder: Hashable) -> int:
        """Slots of this holder."""
        return self._held[holder]

    def take(self, holder: Hashable) -> int | None:
        """The number of a slot that is ``holder``'s from now on; None while it may have no more."""
        if self._held[holder] >= len(self._free):
            return None
        slot = self._free.pop()
        self._holders[slot] = holder
        self._held[holder] += 1
        return slot

    def give_back(self, slot: int) -> None:
        """Return a slot. Raises ValueError if it is not held."""
        if slot not in self._holders:
            raise ValueError(f"slot {slot} is not held")
        holder = self._holders.pop(slot)
        self._held[holder] -= 1
        if not self._held[holder]:
            del self._held[holder]
        self._free.append(slot)

    def offset(self, slot: int) -> int:
        """Bytes from the start of the slab."""
        return slot * self.slot_bytes
