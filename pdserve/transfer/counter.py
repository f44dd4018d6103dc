"""Order-free completion: counts the messages of a room until all have come. Pure.

TransferEngine's ImmCounter (arXiv 2510.27656) for a transport with messages:
every write carries ``(room, rank, seq)``; the writes of a rank's last chunk also
carry the total. Messages may come in any order and more than once; completion
fires exactly once. Early messages are kept, which ImmCounter does not do: the
total is only known when the last chunk is planned.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Tally:
    seen: set[int] = field(default_factory=set)
    num_counted: int = 0
    total: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.num_counted >= self.total


class ArrivalCounter:
    """Tallies of the rooms that are expected. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self._rooms: dict[int, dict[int, _Tally]] = {}

    def expect(self, room: int) -> None:
        """Start counting a room; what it had before is forgotten."""
        self._rooms[room] = {}

    def forget(self, room: int) -> None:
        """Stop counting; later messages of the room are unknown."""
        self._rooms.pop(room, None)

    def is_expected(self, room: int) -> bool:
        """True between ``expect`` and ``forget``."""
        return room in self._rooms

    def claim(self, room: int, rank: int, seq: int) -> bool:
        """True for the first copy of a message of an expected room: its bytes may be acted on, once."""
        tallies = self._rooms.get(room)
        if tallies is None:
            return False
        tally = tallies.setdefault(rank, _Tally())
        if seq in tally.seen:
            return False
        tally.seen.add(seq)
        return True

    def count(self, room: int, rank: int, total: int) -> bool:
        """Count a claimed message as dealt with; True if it completed the rank's share, which happens once.

        Args:
            total: how many messages the rank sends in all, or 0 when this message does not tell.
        """
        tallies = self._rooms.get(room)
        if tallies is None:
            return False
        tally = tallies.setdefault(rank, _Tally())
        was_complete = tally.is_complete
        tally.num_counted += 1
        if total:
            tally.total = total
        return tally.is_complete and not was_complete

    def missing(self, room: int) -> dict[int, int]:
        """Messages still missing per rank whose total is known."""
        return {
            rank: tally.total - tally.num_counted
            for rank, tally in self._rooms.get(room, {}).items()
            if tally.total is not None and not tally.is_complete
        }
