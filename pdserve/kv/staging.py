"""Slab space: who holds which bytes of a staging slab, and since when. Pure.

A ring: space is handed out in order and comes back in any order; the tail moves
on when the oldest piece is back. A prefill uses one ring for its own source slab
and one per decode rank for its window of that rank's slab, where space comes
back as credits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ALIGNMENT = 256
"""Every piece starts at a multiple of this: vector loads, and NIXL's preference for aligned writes."""


@dataclass(slots=True, eq=False)
class StagingSlab:
    """A piece of the ring. ``generation`` is unique for the ring's life and never reused."""

    offset: int
    nbytes: int
    generation: int
    is_free: bool = False


class StagingRing:
    """Hands out ``capacity`` bytes. Not thread-safe: one owner."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"a ring cannot have {capacity} bytes")
        self.capacity = capacity - capacity % ALIGNMENT
        self._held: deque[StagingSlab] = deque()
        self._by_generation: dict[int, StagingSlab] = {}
        self._head = 0
        self._next_generation = 1

    @property
    def held_bytes(self) -> int:
        """Bytes handed out and not yet returned, alignment included."""
        return sum(slab.nbytes for slab in self._held if not slab.is_free)

    @property
    def num_held(self) -> int:
        """Pieces handed out and not yet returned."""
        return len(self._by_generation)

    def alloc(self, nbytes: int) -> StagingSlab | None:
        """A piece of at least ``nbytes``, or None while there is no room for it.

        A piece larger than the ring never fits: ask ``capacity`` first.
        """
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        offset = self._place(size)
        if offset is None:
            return None
        slab = StagingSlab(offset, size, self._next_generation)
        self._next_generation += 1
        self._held.append(slab)
        self._by_generation[slab.generation] = slab
        self._head = offset + size
        return slab

    def free(self, slab: StagingSlab) -> None:
        """Return a piece. Raises ValueError if it is not held (a credit that came twice)."""
        if not self.free_generation(slab.generation):
            raise ValueError(f"slab piece {slab.generation} is not held")

    def free_generation(self, generation: int) -> bool:
        """Return the piece with this generation; False if it is not held."""
        slab = self._by_generation.pop(generation, None)
        if slab is None:
            return False
        slab.is_free = True
        while self._held and self._held[0].is_free:
            self._held.popleft()
        if not self._held:
            self._head = 0
        return True

    def _place(self, size: int) -> int | None:
        if size > self.capacity:
            return None
        if not self._held:
            return 0
        tail = self._held[0].offset
        if self._head > tail:
            if self._head + size <= self.capacity:
                return self._head
            return 0 if size <= tail else None
        return self._head if self._head + size <= tail else None
