"""Slots of a decode rank's slab, leased one by one to the prefill ranks that write to it.

    decode rank: SlotLender                     prefill rank: GrantedSlots
    registration ──── PeerOffer.grants ───────► may write one piece to each
                 ◄─── Arrival(lease) ────────── used
    scattered    ──── Credit(over, grants) ───► the same slot again, or others have it now
                 ◄─── Ask(num_slots) ────────── more pieces than grants
    somebody asked ── Credit(recall) ─────────►
                 ◄─── Void(leases) ──────────── those that are not in use

A lease is one use of one slot by one prefill rank, and its number is never given
again: nothing said of an older use can be taken for the present one. The side that
may write ends it, by the arrival or by ``Void``; the decode rank alone never does,
but for a prefill rank that is believed dead, after a quarantine. So any message
but an arrival may be lost, repeated or late: asking again is all it takes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdserve.kv.staging import SlotPool
from pdserve.transfer.messages import Grant, PeerOffer

NUM_SLOTS = 32
"""A slab is cut into so many: a few prefill ranks can each gather, write and scatter at once."""

FIRST_GRANTS = 4
"""Slots that a prefill rank gets with its registration, while there are; it asks when it needs more."""

QUARANTINE_S = 120.0
"""Slots of a prefill rank believed dead are given to others only after this long: it may still write."""

ASK_AGAIN_S = 0.5
"""An ask that brought nothing is repeated after this long; the decode rank forgets it after twice that."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Registered slab memory of a rank, in slots of ``slot_bytes``; ``owner`` keeps it alive."""

    address: int
    nbytes: int
    slot_bytes: int
    owner: object = None


@dataclass(slots=True)
class Deal:
    """What one prefill rank is to be told."""

    over: list[int] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    recall: list[int] = field(default_factory=list)
    scatter_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Holder:
    number: int
    endpoint: str
    leases: set[int] = field(default_factory=set)
    num_asked: int = 0
    asked_s: float = 0.0
    dead_since_s: float | None = None


@dataclass(slots=True)
class _Lease:
    slot: int
    holder: _Holder
    is_read: bool = False


class SlotLender:
    """The decode rank's side. Thread-safe."""

    def __init__(self, slab: Slab, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = SlotPool(slab.nbytes, slab.slot_bytes)
        self._slab = slab
        self._clock = clock
        self._leases: dict[int, _Lease] = {}
        self._holders: dict[int, _Holder] = {}
        self._numbers = itertools.count(1)
        self._deals: dict[int, Deal] = {}
        self._lock = threading.Lock()

    @property
    def slot_bytes(self) -> int:
        """Every slot has the same size; 0 without a slab."""
        return self._pool.slot_bytes if self._pool.num_slots else 0

    @property
    def slab_address(self) -> int:
        """Where slot 0 begins."""
        return self._slab.address

    @property
    def num_held(self) -> int:
        """Slots that some prefill rank holds."""
        return self._pool.num_held

    def enter(self, endpoint: str, num_slots: int = FIRST_GRANTS) -> tuple[int, tuple[Grant, ...]]:
        """A prefill rank (``ip:port``) registers: its holder number, and its first grants.

        What an earlier registration from there holds comes back by ``Void``, or after the quarantine.
        """
        with self._lock:
            self._bury({endpoint})
            holder = _Holder(next(self._numbers), endpoint)
            self._holders[holder.number] = holder
            grants: list[Grant] = []
            while len(grants) < num_slots and (grant := self._grant(holder)) is not None:
                grants.append(grant)
            return holder.number, tuple(grants)

    def bury(self, endpoints: Iterable[str]) -> None:
        """These prefill ranks are believed dead: no new grants, and the old ones end after the quarantine."""
        with self._lock:
            self._bury(set(endpoints))

    def endpoint(self, holder: int) -> str | None:
        """Where messages for a holder go; None if it is unknown by now."""
        with self._lock:
            found = self._holders.get(holder)
            return None if found is None else found.endpoint

    def read(self, lease: int) -> int | None:
        """The address of a piece that has arrived, to be read until ``end``; None if it must be left alone.

        That is so for a lease that is over, and for the second copy of a message.
        """
        with self._lock:
            found = self._leases.get(lease)
            if found is None or found.is_read:
                return None
            found.is_read = True
            return self._slab.address + self._pool.offset(found.slot)

    def end(self, lease: int, scatter_s: float = 0.0) -> None:
        """The piece of a lease has been read, or nobody wants it."""
        with self._lock:
            found = self._leases.get(lease)
            if found is None:
                return
            holder = found.holder
            self._deal(holder).scatter_s += scatter_s
            self._end(lease, found)
            # A slot stays with its user, so that the next piece needs no message; those who asked come first.
            if self._serve() or holder.dead_since_s is not None:
                return
            if (grant := self._grant(holder)) is not None:
                self._deal(holder).grants.append(grant)

    def void(self, holder: int, leases: Iterable[int]) -> None:
        """As ``Void`` says. A piece that is being read ends when it has been read."""
        with self._lock:
            owner = self._holders.get(holder)
            if owner is None:
                return
            for lease in leases:
                found = self._leases.get(lease)
                if found is None:
                    self._deal(owner).over.append(lease)  # the credit was lost
                elif not found.is_read:
                    self._end(lease, found)

    def ask(self, holder: int, num_slots: int) -> None:
        """As ``Ask`` says."""
        with self._lock:
            owner = self._holders.get(holder)
            if owner is not None and owner.dead_since_s is None:
                owner.num_asked, owner.asked_s = num_slots, self._clock()
                self._recall(owner, num_slots - self._serve())

    def reclaim(self) -> None:
        """End the leases of prefill ranks that have been dead for the quarantine."""
        now_s = self._clock()
        with self._lock:
            for holder in list(self._holders.values()):
                if holder.dead_since_s is None or now_s - holder.dead_since_s <= QUARANTINE_S:
                    continue
                for lease in sorted(holder.leases):
                    if not self._leases[lease].is_read:
                        self._end(lease, self._leases[lease])
                if not holder.leases:
                    self._deals.pop(holder.number, None)
                    del self._holders[holder.number]

    def deals(self) -> list[tuple[int, Deal]]:
        """Who is to be told what since the last call, with what is free by now dealt out."""
        with self._lock:
            self._serve()
            deals, self._deals = self._deals, {}
            return list(deals.items())

    def _deal(self, holder: _Holder) -> Deal:
        return self._deals.setdefault(holder.number, Deal())

    def _bury(self, endpoints: set[str]) -> None:
        for holder in self._holders.values():
            if holder.endpoint in endpoints and holder.dead_since_s is None:
                holder.dead_since_s, holder.num_asked = self._clock(), 0

    def _grant(self, holder: _Holder) -> Grant | None:
        slot = self._pool.take(holder.number)
        if slot is None:
            return None
        lease = next(self._numbers)
        self._leases[lease] = _Lease(slot, holder)
        holder.leases.add(lease)
        return Grant(lease, slot)

    def _end(self, lease: int, found: _Lease) -> None:
        del self._leases[lease]
        found.holder.leases.remove(lease)
        self._pool.give_back(found.slot)
        self._deal(found.holder).over.append(lease)

    def _serve(self) -> int:
        """Grant free slots to those who asked, to the one that holds fewest first. How many were granted."""
        until_s = self._clock() - 2 * ASK_AGAIN_S
        asking = [one for one in self._holders.values() if one.num_asked and one.asked_s >= until_s]
        num_granted = 0
        while asking:
            holder = min(asking, key=lambda one: (len(one.leases), one.asked_s))
            grant = self._grant(holder)
            if grant is None:
                break  # nobody who holds more may have one either
            num_granted += 1
            self._deal(holder).grants.append(grant)
            holder.num_asked -= 1
            if not holder.num_asked:
                asking.remove(holder)
        return num_granted

    def _recall(self, asking: _Holder, num_slots: int) -> None:
        """Ask those who hold more and asked for none to give idle slots back: the newest leases of each."""
        live = [one for one in self._holders.values() if one.dead_since_s is None and not one.num_asked]
        for holder in sorted(live, key=lambda one: -len(one.leases)):
            number = min(num_slots, len(holder.leases) - len(asking.leases))
            if number <= 0:
                return
            self._deal(holder).recall.extend(sorted(holder.leases)[-number:])
            num_slots -= number


class GrantedSlots:
    """The prefill rank's side: slots of one decode rank's slab. Not thread-safe: the outbox thread's."""

    def __init__(self, offer: PeerOffer) -> None:
        self.holder = offer.holder
        self.slot_bytes = offer.slot_bytes
        self._slab_address = offer.slab_address
        self._unused = deque(offer.grants)
        self._used: dict[int, Grant] = {}
        self._unheard: set[int] = set()
        self._num_asked = 0
        self._asked_s = 0.0

    @property
    def num_unused(self) -> int:
        """Pieces that can be written at once."""
        return len(self._unused)

    def address(self, grant: Grant) -> int:
        """Where the slot begins, at the decode rank."""
        return self._slab_address + grant.slot * self.slot_bytes

    def take(self) -> Grant | None:
        """The grant for the next piece, in use until ``end`` or ``put_back``; None while there is none."""
        if not self._unused:
            return None
        grant = self._unused.popleft()
        self._used[grant.lease] = grant
        return grant

    def put_back(self, grant: Grant) -> None:
        """Nothing was or will be written under a grant that was taken; one of an earlier offer is ignored."""
        if self._used.pop(grant.lease, None) is not None:
            self._unused.appendleft(grant)

    def end(self, lease: int) -> None:
        """The decode rank is done with the piece."""
        self._used.pop(lease, None)

    def add(self, grants: Iterable[Grant]) -> None:
        """New grants. One that was given back before it came is not used any more."""
        fresh = [grant for grant in grants if grant.lease not in self._unheard]
        self._unused.extend(fresh)
        self._num_asked = max(0, self._num_asked - len(fresh))

    def recall(self, leases: Iterable[int]) -> list[int]:
        """Which of these the decode rank may have back: the unused, and those whose grant never came."""
        found = [lease for lease in leases if lease not in self._used]
        self._unheard.update(set(found) - {grant.lease for grant in self._unused})
        self._unused = deque(grant for grant in self._unused if grant.lease not in found)
        return found

    def give_up(self) -> list[int]:
        """Forget all unused grants; their leases."""
        leases = [grant.lease for grant in self._unused]
        self._unused.clear()
        return leases

    def shortage(self, num_pieces: int, now_s: float) -> int:
        """How many slots to ask for with so many pieces waiting; 0 when the last ask still stands."""
        missing = num_pieces - len(self._unused)
        if missing <= 0 or (self._num_asked and now_s - self._asked_s < ASK_AGAIN_S):
            return 0
        self._num_asked, self._asked_s = missing, now_s
        return missing
