"""Rooms and rids: the names under which a pair knows a request. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from pdserve.types import MAX_ROOM, Rid

TOKEN_BYTES = 24
"""8 for the room, 16 for the rid."""
TOKENS_AT_ONCE = 128
"""The kernel is asked for randomness once for so many: a system call costs more than all the rest here."""


class RequestIds(msgspec.Struct, frozen=True):
    """One room and one rid per prompt: one for a plain request, one each in a batch."""

    rooms: tuple[int, ...]
    rids: tuple[Rid, ...]

    def only(self, prompts: Iterable[int]) -> RequestIds:
        """Those of some prompts, by their numbers."""
        numbers = sorted(prompts)
        return RequestIds(tuple(self.rooms[i] for i in numbers), tuple(self.rids[i] for i in numbers))


class RoomAllocator:
    """Rooms in use. A room names one transfer on a pair, so no two live requests may share one."""

    def __init__(self) -> None:
        self._live: set[int] = set()
        self._noise = b""
        self._at = 0

    def __len__(self) -> int:
        return len(self._live)

    def take(self, num_prompts: int | None, prefix: str = "") -> RequestIds:
        """Fresh rooms and rids, ``prefix`` and 32 hex digits; give them back when both legs have ended."""
        if num_prompts is None:
            room, rid = self._take_one(prefix)
            return RequestIds((room,), (rid,))
        taken = [self._take_one(prefix) for _ in range(num_prompts)]
        return RequestIds(tuple(room for room, _ in taken), tuple(rid for _, rid in taken))

    def give_back(self, ids: RequestIds) -> None:
        """The rooms may be used again."""
        self._live.difference_update(ids.rooms)

    def _take_one(self, prefix: str) -> tuple[int, Rid]:
        while True:
            if self._at >= len(self._noise):
                self._noise, self._at = os.urandom(TOKEN_BYTES * TOKENS_AT_ONCE), 0
            token = self._noise[self._at : self._at + TOKEN_BYTES]
            self._at += TOKEN_BYTES
            room = int.from_bytes(token[:8]) & MAX_ROOM
            if room and room not in self._live:
                self._live.add(room)
                return room, Rid(prefix + token[8:].hex())
