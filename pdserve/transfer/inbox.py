"""The decode rank's side: counts what has arrived, scatters slab pieces into pages, returns credits.

One named thread drains the transport's messages, often while something is
expected and not at all otherwise. A room is told complete only when every byte
is in its pages.

Pages may be released only when no scatter into them runs: ``is_busy`` says so,
and a room that its owner has closed is never scattered into again, because the
busy mark is set before the owner is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.errors import PdserveError
from pdserve.kv.coalesce import Completion, PageCopier
from pdserve.kv.layout import PageIds
from pdserve.transfer.engine import TransferEngine
from pdserve.transfer.messages import Arrival, Ask, Credit, Void, decode_arrival
from pdserve.transfer.slots import SlotLender

logger = logging.getLogger(__name__)

BUSY_POLL_S = 0.0002
"""Pause between looks while messages keep coming."""

QUIET_POLL_S = 0.001
"""Pause while rooms are expected and nothing has come for ``BUSY_FOR_S``."""

BUSY_FOR_S = 0.05

CONNECT_S = 5.0
"""The transport's handshake needs both sides to drive it; nobody is expected yet while it runs."""


class RoomOwner(Protocol):
    """Who the pages belong to. Called from the inbox thread."""

    def is_open(self, room: int) -> bool:
        """False once the room failed or was aborted: nothing may be written for it any more."""

    def rank_arrived(self, room: int, rank: int) -> None:
        """All bytes of this prefill rank are in the room's pages."""

    def failed(self, room: int, reason: str) -> None:
        """The room cannot complete."""


@dataclass(slots=True)
class _Room:
    pages: PageIds
    busy: int = 0
    incomplete_since_s: float | None = None


@dataclass(slots=True)
class _Scatter:
    arrival: Arrival
    completion: Completion
    begun_s: float


@dataclass(slots=True)
class InboxStats:
    """Cumulative; times in seconds."""

    num_messages: int = 0
    num_stale: int = 0
    """Second copies of a message, and pieces whose lease was over."""
    num_stray: int = 0
    """Messages of rooms that nobody expects."""
    num_scattered: int = 0
    scattered_bytes: int = 0
    scatter_s: float = 0.0


@dataclass(slots=True)
class _Tally:
    seen: set[int] = field(default_factory=set)
    num_counted: int = 0
    total: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.num_counted >= self.total


class ArrivalCounter:
    """Counts the messages of expected rooms, in any order. Not thread-safe: one owner.

    As TransferEngine's ImmCounter (arXiv 2510.27656), but early messages are kept: the
    total is known only with a rank's last chunk. A message may come more than once.
    """

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


class Inbox:
    """Receives for one decode rank. ``start`` it; ``expect`` and ``forget`` rooms; ``close`` it."""

    def __init__(
        self, engine: TransferEngine, copier: PageCopier, owner: RoomOwner, lender: SlotLender,
        send_credit: Callable[[str, Credit], None], *, arrival_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Receive for ``owner`` through the slots of ``lender``.

        Args:
            send_credit: sends to a prefill rank, given as it entered the lender's books; never raises.
            arrival_timeout_s: how long messages may stay away after the last one of the room has come.
        """
        self._engine = engine
        self._copier = copier
        self._owner = owner
        self._send_credit = send_credit
        self._arrival_timeout_s = arrival_timeout_s
        self._clock = clock
        self.lender = lender
        self._rooms: dict[int, _Room] = {}
        self._counter = ArrivalCounter()
        self._scatters: list[_Scatter] = []
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._is_closing = False
        self._stir_until_s = 0.0
        self._next_check_s = 0.0
        self.stats = InboxStats()
        self._thread = threading.Thread(target=self._run, name="pdserve-inbox", daemon=True)

    def start(self) -> None:
        """Start the receiving thread."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def expect_connection(self) -> None:
        """A peer is about to connect: look often for ``CONNECT_S``, which drives the handshake."""
        with self._wake:
            self._stir_until_s = self._clock() + CONNECT_S
            self._wake.notify()

    def expect(self, room: int, pages: PageIds) -> None:
        """A room's pages are ready to be written; call before the prefill learns their ids."""
        with self._wake:
            self._rooms[room] = _Room(pages)
            self._counter.expect(room)
            self._wake.notify()

    def forget(self, room: int) -> None:
        """The room is over. Its pages may be released once ``is_busy`` is False."""
        with self._lock:
            room_state = self._rooms.get(room)
            self._counter.forget(room)
            if room_state is not None and not room_state.busy:
                self._rooms.pop(room)

    def is_busy(self, room: int) -> bool:
        """True while a scatter into the room's pages runs."""
        with self._lock:
            state = self._rooms.get(room)
            return state is not None and state.busy > 0

    def take_control(self, message: Void | Ask) -> None:
        """What a prefill rank says of slots."""
        match message:
            case Void(holder=holder, leases=leases):
                self.lender.void(holder, leases)
            case Ask(holder=holder, num_slots=num_slots):
                self.lender.ask(holder, num_slots)
        self._send_credits()

    def _run(self) -> None:
        busy_until_s = 0.0
        while True:
            with self._wake:
                is_quiet = not self._rooms and not self._scatters and self._clock() > self._stir_until_s
                if is_quiet and not self._is_closing:
                    # A message that came for nobody still owns slab space: look once in a while.
                    self._wake.wait(1.0)
                if self._is_closing:
                    return
            now_s = self._clock()
            try:
                if self.poll():
                    busy_until_s = now_s + BUSY_FOR_S
            except Exception:
                # The thread serves every other room too.
                logger.exception("receiving loop: unexpected error")
            time.sleep(BUSY_POLL_S if now_s < busy_until_s or self._scatters else QUIET_POLL_S)

    def poll(self) -> bool:
        """Take what has arrived, finish scatters. The thread's body; tests call it themselves."""
        messages = self._engine.arrivals()
        for peer, raw in messages:
            self.stats.num_messages += 1
            try:
                self._take(decode_arrival(raw))
            except PdserveError as exc:
                logger.warning("message from %s not acted on: %s", peer, exc)
        has_finished = self._finish_scatters()
        now_s = self._clock()
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + min(1.0, self._arrival_timeout_s / 4)
            self._fail_overdue(now_s)
            self.lender.reclaim()
        self._send_credits()
        return bool(messages) or has_finished

    def _send_credits(self) -> None:
        for holder, deal in self.lender.deals():
            endpoint = self.lender.endpoint(holder)
            if endpoint is not None:
                self._send_credit(
                    endpoint,
                    Credit(agent=self._engine.name, holder=holder, over=deal.over, grants=deal.grants,
                           recall=deal.recall, scatter_s=deal.scatter_s),
                )  # fmt: skip

    def _take(self, arrival: Arrival) -> None:
        slab = arrival.slab
        address = 0
        if slab is not None:
            found = self.lender.read(slab.lease)
            if found is None:
                self.stats.num_stale += 1
                return
            address = found
        with self._lock:
            room = self._rooms.get(arrival.room)
            is_known_room = self._counter.is_expected(arrival.room)
            is_new = room is not None and self._counter.claim(arrival.room, arrival.rank, arrival.seq)
            if is_new and room is not None:
                room.busy += 1  # before the owner is asked, see the module's head
        if not is_new or room is None:
            self.stats.num_stale += is_known_room
            self.stats.num_stray += not is_known_room
            self._end_lease(arrival)
        elif not self._owner.is_open(arrival.room):
            self._leave(arrival)
        elif slab is None:
            self._leave(arrival)
            self._count(arrival)
        else:
            self._scatter(arrival, room, address)

    def _scatter(self, arrival: Arrival, room: _Room, address: int) -> None:
        slab = arrival.slab
        assert slab is not None
        begin_s = self._clock()
        try:
            if slab.piece.nbytes > self.lender.slot_bytes:
                raise PdserveError(
                    f"a piece of {slab.piece.nbytes} bytes in a slot of {self.lender.slot_bytes}"
                )
            completion = self._copier.scatter_pages(room.pages, slab.piece, address)
            scatter = _Scatter(arrival, completion, begin_s)
            is_done = completion.is_done()
        except Exception as exc:
            self._fail_scatter(arrival, exc)
            return
        if is_done:
            self._finish(scatter)
        else:
            with self._lock:
                self._scatters.append(scatter)

    def _fail_scatter(self, arrival: Arrival, exc: Exception) -> None:
        """This room only: the messages behind it in the same batch belong to others."""
        if not isinstance(exc, PdserveError):
            logger.error("room=%s: unexpected error while unpacking", arrival.room, exc_info=exc)
        self._leave(arrival)
        self._owner.failed(arrival.room, f"KV could not be unpacked: {exc}")

    def _finish_scatters(self) -> bool:
        has_finished = False
        for scatter in list(self._scatters):
            failure: Exception | None = None
            try:
                if not scatter.completion.is_done():
                    continue
            except Exception as exc:  # a CUDA event reports errors of its kernel here
                failure = exc
            with self._lock:
                self._scatters.remove(scatter)
            has_finished = True
            if failure is None:
                self._finish(scatter)
            else:
                self._fail_scatter(scatter.arrival, failure)
        return has_finished

    def _finish(self, scatter: _Scatter) -> None:
        seconds = self._clock() - scatter.begun_s
        assert scatter.arrival.slab is not None
        self.stats.num_scattered += 1
        self.stats.scattered_bytes += scatter.arrival.slab.piece.nbytes
        self.stats.scatter_s += seconds
        self._leave(scatter.arrival, seconds)
        self._count(scatter.arrival)

    def _end_lease(self, arrival: Arrival, scatter_s: float = 0.0) -> None:
        if arrival.slab is not None:
            self.lender.end(arrival.slab.lease, scatter_s)

    def _leave(self, arrival: Arrival, scatter_s: float = 0.0) -> None:
        """Nothing is read or written for the message any more."""
        self._end_lease(arrival, scatter_s)
        with self._lock:
            state = self._rooms.get(arrival.room)
            if state is None:
                return
            state.busy -= 1
            if not state.busy and not self._counter.is_expected(arrival.room):
                self._rooms.pop(arrival.room)

    def _count(self, arrival: Arrival) -> None:
        with self._lock:
            is_complete = self._counter.count(arrival.room, arrival.rank, arrival.total)
            state = self._rooms.get(arrival.room)
            if state is not None:
                is_missing = bool(self._counter.missing(arrival.room))
                state.incomplete_since_s = self._clock() if is_missing else None
        if is_complete:
            self._owner.rank_arrived(arrival.room, arrival.rank)

    def _fail_overdue(self, now_s: float) -> None:
        with self._lock:
            overdue = {
                room: self._counter.missing(room)
                for room, state in self._rooms.items()
                if state.incomplete_since_s is not None
                and now_s - state.incomplete_since_s > self._arrival_timeout_s
            }
        for room, missing in overdue.items():
            if missing:
                self._owner.failed(
                    room,
                    f"{sum(missing.values())} KV messages of prefill ranks {sorted(missing)} did not arrive "
                    f"within {self._arrival_timeout_s:.0f} s of the last one",
                )
