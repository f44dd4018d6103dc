"""How two fakes serve one request together, and how a test ends a leg at a chosen point of it.

    prefill   ADMITTED ─ decode is here? ─► KV sent ─ ANSWERING ─► answer
    decode    ADMITTED ─────────── KV received? ─ RECEIVED ─► first event ─ STREAMING ─► end

As in SGLang: prefill that loses its decode fails; decode is never told that prefill
failed and waits (300 s there, for ever here) until somebody aborts it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable
from typing import Any

from pdserve.types import Role


class Point(enum.Enum):
    """Where a test can stop a request inside a fake."""

    ADMITTED = "admitted"
    """The worker has accepted it and holds KV for it."""
    RECEIVED = "received"
    """Decode has the KV; no byte of its answer is out."""
    ANSWERING = "answering"
    """Prefill has sent the KV; no byte of its answer is out."""
    STREAMING = "streaming"
    """The first event, or half of a whole body, is out."""


class Way(enum.Enum):
    """How a leg ends."""

    STATUS_500 = "500"
    STATUS_503 = "503"
    STATUS_400 = "400"
    RESET_BEFORE_HEAD = "reset-before-head"
    RESET_MID_BODY = "reset-mid-body"
    FIN_BEFORE_HEAD = "fin-before-head"
    FIN_MID_BODY = "fin-mid-body"
    GARBAGE = "garbage"
    SILENCE = "silence"
    ERROR_EVENT = "error-event"
    ABORTED = "aborted"
    """Somebody has told this server to drop the request."""
    KILLED = "killed"


class Hold:
    """Stops the first request that comes to ``point`` on any worker it was given to.

    ``await reached()``, then ``release()`` to let it go on or ``release(way)`` to end it so.
    """

    def __init__(self, point: Point) -> None:
        self.point = point
        self.worker: Any = None
        self._reached = asyncio.Event()
        self._gate = asyncio.Event()
        self._way: Way | None = None

    @property
    def is_reached(self) -> bool:
        """True once a request has come to the point."""
        return self._reached.is_set()

    def release(self, way: Way | None = None) -> None:
        """Let the request go on, or end it. Only the first call counts."""
        if not self._gate.is_set():
            self._way = way
            self._gate.set()

    async def stop(self, worker: Any) -> Way | None:
        """Called by the fake whose request is at the point."""
        self.worker = worker
        self._reached.set()
        await self._gate.wait()
        return self._way


class Meeting:
    """What the two workers of one room know of each other."""

    def __init__(self) -> None:
        self.is_settled = asyncio.Event()
        """Decode has come, or will not."""
        self.is_sent = asyncio.Event()
        self.is_broken = False

    def break_off(self) -> None:
        """Decode is gone: prefill learns it, if it has not sent yet."""
        self.is_broken = True
        self.is_settled.set()


class Rendezvous:
    """Rooms of a fleet of fakes. Notes rooms that a worker was sent twice."""

    def __init__(self) -> None:
        self.reused: list[tuple[str, int]] = []
        self._meetings: dict[int, Meeting] = {}
        self._seen: set[tuple[str, int]] = set()

    def arrive(self, worker: str, role: Role, rooms: Iterable[int]) -> list[Meeting]:
        """A worker was sent a request for these rooms."""
        found = []
        for room in rooms:
            if (worker, room) in self._seen:
                self.reused.append((worker, room))
            self._seen.add((worker, room))
            meeting = self._meetings.setdefault(room, Meeting())
            if role is Role.DECODE:
                meeting.is_settled.set()
            found.append(meeting)
        return found

    def forget(self) -> None:
        """Nothing is on its way: rooms may be forgotten."""
        self._meetings.clear()
        self._seen.clear()

    async def send(self, meetings: list[Meeting]) -> bool:
        """Prefill's part: wait for decode, send; False if decode went away first."""
        for meeting in meetings:
            await meeting.is_settled.wait()
        if any(meeting.is_broken for meeting in meetings):
            return False
        for meeting in meetings:
            meeting.is_sent.set()
        return True

    async def receive(self, meetings: list[Meeting]) -> None:
        """Decode's part: wait for the KV, for ever if need be."""
        for meeting in meetings:
            await meeting.is_sent.wait()
