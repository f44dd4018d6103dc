"""Two prefill and three decode ranks in one thread, where a test decides what happens next.

Nothing happens by itself: a forward pass fills its pages, a copy moves its bytes, a
write lands, a control message arrives, time passes only when a method here is called,
in any order. ``World`` checks all along that

* a room reported complete holds the bytes that its forward pass computed, and keeps them;
* pages are given away only when no write or copy into them is pending;
* decode ranks that do not hang get all their rooms, whatever others do;

and ``rest`` that in the end nothing is held. Pages are handled as SGLang does: an aborted
room's are kept until prefill's count of its chunks is zero and no scatter runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pdserve.kv.coalesce import Completion, HostPageCopier, PageCopier, Piece
from pdserve.kv.layout import PagedRegions, PageIds
from pdserve.transfer.engine import PeerName, TransferState
from pdserve.transfer.jobs import Target
from pdserve.transfer.messages import Credit
from pdserve.transfer.plan import Path
from tests.support.kv_rig import DecodeRank, Geometry, PrefillRank
from tests.support.loopback import LoopbackFabric

SOURCE = Geometry(num_regions=2, num_pages=120, page_size=4, num_kv_heads=1, total_kv_heads=1, head_bytes=8)
TARGETS = (
    Geometry(num_regions=2, num_pages=60, page_size=8, num_kv_heads=1, total_kv_heads=1, head_bytes=8),
    Geometry(num_regions=2, num_pages=240, page_size=2, num_kv_heads=1, total_kv_heads=1, head_bytes=8),
    SOURCE,
)
PIECE_BYTES = 256
DEAD_WRITES_S = 100.0
"""A dead process's writes land at most so long after it: less than the quarantine."""


class _GatedCopy:
    def __init__(self, copy: Callable[[], object], slab: tuple[int, int]) -> None:
        self.copy, self.slab = copy, slab
        self.is_over = False

    def is_done(self) -> bool:
        return self.is_over


class GatedCopier:
    """Copies when ``World.copy`` says so; refuses nothing."""

    def __init__(self, regions: PagedRegions, pending: list[_GatedCopy]) -> None:
        self._inner = HostPageCopier(regions)
        self._pending = pending

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        return self._start(lambda: self._inner.gather_pages(pages, piece, slab_address), slab_address, piece)

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        return self._start(lambda: self._inner.scatter_pages(pages, piece, slab_address), slab_address, piece)

    def _start(self, copy: Callable[[], object], address: int, piece: Piece) -> _GatedCopy:
        made = _GatedCopy(copy, (address, piece.nbytes))
        self._pending.append(made)
        return made


@dataclass(eq=False)
class Room:
    """A request's KV on its way."""

    number: int
    prefill: PrefillRank
    decode: DecodeRank
    source: PageIds
    target: PageIds
    num_tokens: int
    expected: list[np.ndarray] | None = None
    """Bytes per region, once the forward pass has run."""
    num_filled: int = 0
    """Regions that it has filled."""
    is_complete: bool = False
    is_closed: bool = False
    """Aborted, or failed on either side."""
    holds_source: bool = True
    num_chunks: int = 0


@dataclass
class World:
    """All ranks and everything that is on its way between them."""

    source_slots: int = 6
    target_slots: int = 10
    now_s: float = 0.0
    rooms: list[Room] = field(default_factory=list)
    copies: list[_GatedCopy] = field(default_factory=list)
    mail: list[Callable[[], None]] = field(default_factory=list)
    num_refused: int = 0
    hung: set[int] = field(default_factory=set)
    died: list[tuple[PrefillRank, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.fabric = LoopbackFabric(pending=[])
        self.fabric.faults.refuses = self._refuses
        self._numbers = itertools.count(1)
        self._names = itertools.count()
        self.decodes = [self._decode(geometry) for geometry in TARGETS]
        self.free_targets = {id(one): list(range(1, one.geometry.num_pages)) for one in self.decodes}
        self.free_sources: dict[int, list[int]] = {}
        self.prefills = [self._prefill(f"host:{number}") for number in range(2)]

    def _clock(self) -> float:
        return self.now_s

    def _decode(self, geometry: Geometry) -> DecodeRank:
        rank = DecodeRank(
            self.fabric.engine(f"d{next(self._names)}"), geometry, self.rng,
            slab_bytes=self.target_slots * PIECE_BYTES, slot_bytes=PIECE_BYTES, clock=self._clock,
        )  # fmt: skip
        rank.inbox._copier = self._copier(rank.pool.regions)
        rank.inbox._send_credit = lambda endpoint, credit: self.mail.append(
            lambda: rank.prefills[endpoint].outbox.credit(credit)
        )
        rank.owner.rank_arrived = lambda room, _: self._complete(room)  # type: ignore[method-assign]
        return rank

    def _copier(self, regions: PagedRegions) -> PageCopier:
        return GatedCopier(regions, self.copies)

    def _prefill(self, endpoint: str) -> PrefillRank:
        rank = PrefillRank(
            self.fabric.engine(f"p{next(self._names)}"), SOURCE, self.rng,
            slab_bytes=self.source_slots * PIECE_BYTES, max_piece_bytes=PIECE_BYTES, clock=self._clock,
        )  # fmt: skip
        rank.endpoint = endpoint
        rank.runner._copier = self._copier(rank.pool.regions)
        rank.outbox._send_control = lambda peer, message: self.mail.append(
            lambda: rank.peers[peer].inbox.take_control(message)
        )
        self.free_sources[id(rank)] = list(range(1, SOURCE.num_pages))
        for decode in self.decodes:
            rank.connect(decode)
        return rank

    # What may happen

    def submit(
        self, prefill: int, decode: int, num_tokens: int, *, num_chunks: int, path: Path | None,
        is_layered: bool = False,
    ) -> None:  # fmt: skip
        """A new room, if both pools have the pages; ``is_layered``: its regions leave one by one."""
        source_rank, target_rank = self.prefills[prefill], self.decodes[decode]
        ours, theirs = self.free_sources[id(source_rank)], self.free_targets[id(target_rank)]
        num_ours = -(-num_tokens // SOURCE.page_size)
        num_theirs = -(-num_tokens // target_rank.geometry.page_size)
        if len(ours) < num_ours or len(theirs) < num_theirs:
            return
        source = np.array([ours.pop() for _ in range(num_ours)], dtype=np.int32)
        target = np.array([theirs.pop() for _ in range(num_theirs)], dtype=np.int32)
        room = Room(next(self._numbers), source_rank, target_rank, source, target, num_tokens)
        self.rooms.append(room)
        target_rank.inbox.expect(room.number, target)
        bounds = sorted({num_ours * part // num_chunks for part in range(num_chunks + 1)})
        name = PeerName(target_rank.engine.name)
        for begin, end in itertools.pairwise(bounds):
            is_last = end == num_ours
            aux = target_rank.pool.aux_span(2) if is_last else None
            room.num_chunks += 1
            source_rank.outbox.submit(
                source_rank.job(
                    room.number, source[begin:end], begin * SOURCE.page_size, is_last,
                    [Target(name, target, aux)], forced_path=path,
                    is_ready=lambda room=room: is_layered or room.expected is not None,
                    num_filled=(lambda room=room: room.num_filled) if is_layered else None,
                )
            )  # fmt: skip

    def forward(self, index: int, num_regions: int = SOURCE.num_regions) -> None:
        """A forward pass computes a room's KV, or only the next ``num_regions`` of it."""
        waiting = [room for room in self.rooms if room.expected is None and room.holds_source]
        if not waiting:
            return
        room = waiting[index % len(waiting)]
        end = min(SOURCE.num_regions, room.num_filled + num_regions)
        for region in range(room.num_filled, end):
            size = SOURCE.page_size
            slots = (room.source[:, None] * size + np.arange(size)).reshape(-1)
            rows = room.prefill.pool.rows(region)
            rows[slots] = self.rng.integers(0, 256, (len(slots), *rows.shape[1:]), dtype=np.uint8)
        room.num_filled, pool = end, room.prefill.pool
        if end == SOURCE.num_regions:
            room.expected = [pool.tokens(region, room.source, room.num_tokens) for region in range(end)]

    def copy(self, index: int) -> None:
        """A gather or scatter moves its bytes."""
        if self.copies:
            copy = self.copies.pop(index % len(self.copies))
            copy.copy()
            copy.is_over = True

    def land(self, index: int, *, fails: bool = False) -> None:
        """A write's bytes and message arrive, or the write fails; not at a rank that hangs."""
        pending = self.fabric.pending
        assert pending is not None
        names = {self.decodes[number].engine.name for number in self.hung}
        ready = [write for write in pending if write.target.name not in names]
        if ready:
            write = ready[index % len(ready)]
            pending.remove(write)
            if fails:
                write.state = TransferState.FAILED
            else:
                write.land(self.fabric.faults)

    def refuse(self, count: int, *, may_have_written: bool = False) -> None:
        """The next ``count`` posts are refused."""
        self.num_refused = count
        self.fabric.faults.refusal_may_have_written = may_have_written

    def _refuses(self, message: bytes) -> bool:
        if not self.num_refused:
            return False
        self.num_refused -= 1
        return True

    def deliver(self, index: int, *, is_lost: bool = False) -> None:
        """A control message arrives, in any order, or never."""
        if self.mail:
            message = self.mail.pop(index % len(self.mail))
            if not is_lost:
                message()

    def turn(self, prefill: int) -> None:
        """A prefill rank's loop comes round."""
        self.prefills[prefill].outbox.turn()
        self._look()

    def poll(self, decode: int) -> None:
        """A decode rank's loop comes round."""
        self.decodes[decode].inbox.poll()
        self._look()

    def abort(self, index: int) -> None:
        """Decode gives a room up."""
        live = [room for room in self.rooms if not room.is_complete and not room.is_closed]
        if live:
            self._close(live[index % len(live)])
            self._look()

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds
        self._look()

    def register_again(self, prefill: int, decode: int) -> None:
        """A decode rank connects anew to a prefill rank that runs on."""
        self.prefills[prefill].connect(self.decodes[decode])

    def restart(self, prefill: int) -> None:
        """A prefill rank dies; another is there at once, at the same address."""
        old = self.prefills[prefill]
        self.died.append((old, self.now_s))
        for room in self.rooms:
            if room.prefill is old and not room.is_complete:
                self._close(room)
        self.prefills[prefill] = self._prefill(old.endpoint)
        self._look()

    # What must hold

    def _complete(self, number: int) -> None:
        room = next(room for room in self.rooms if room.number == number)
        room.is_complete = True
        self._check_bytes(room)

    @staticmethod
    def _check_bytes(room: Room) -> None:
        assert room.expected is not None, "complete before its forward pass"
        for region, expected in enumerate(room.expected):
            found = room.decode.pool.tokens(region, room.target, room.num_tokens)
            assert np.array_equal(found, expected), f"room {room.number} is complete with wrong bytes"

    @staticmethod
    def _close(room: Room) -> None:
        room.is_closed = True
        room.decode.owner.closed.add(room.number)
        room.prefill.gate.closed.add(room.number)

    def _look(self) -> None:
        """Free pages as SGLang would, and check that nothing of theirs is on its way."""
        pending = self.fabric.pending
        assert pending is not None
        for old, since_s in self.died:
            if self.now_s > since_s + DEAD_WRITES_S:
                pending[:] = [write for write in pending if write.writer != old.engine.name]
        for room in list(self.rooms):
            gate = room.prefill.gate
            if room.number in gate.failures and not room.is_closed and not room.is_complete:
                self._close(room)
            if room.number in room.decode.owner.failures and not room.is_closed:
                self._close(room)
            self._free(room)

    def _free(self, room: Room) -> None:
        gate, is_dead = room.prefill.gate, any(old is room.prefill for old, _ in self.died)
        num_ended = sum(job.room == room.number for job in gate.done) + gate.num_failed[room.number]
        is_over = num_ended == room.num_chunks and not gate.outstanding[room.number]
        if room.holds_source and is_over:
            room.holds_source = False
            self.free_sources[id(room.prefill)].extend(room.source.tolist())
        if is_dead and any(write.writer == room.prefill.engine.name for write in self._pending_into(room)):
            return
        is_released = room.is_complete or (room.is_closed and (is_dead or not gate.outstanding[room.number]))
        if not is_released or room.decode.inbox.is_busy(room.number) or (room.holds_source and not is_dead):
            return
        if room.is_complete:
            self._check_bytes(room)
        assert not self._pending_into(room), f"pages of room {room.number} are freed before a write into them"
        room.decode.inbox.forget(room.number)
        self.free_targets[id(room.decode)].extend(room.target.tolist())
        self.rooms.remove(room)

    def _pending_into(self, room: Room) -> list[object]:
        regions, found = room.decode.pool.regions, []
        for write in self.fabric.pending or []:
            if write.target is not room.decode.engine:
                continue
            for base in regions.bases:
                first = (write.target_spans[:, 0].astype(np.int64) - base) // regions.page_bytes
                inside = (first >= 0) & (first < regions.num_pages)
                if np.isin(first[inside], room.target).any():
                    found.append(write)
                    break
        return found

    def run(self, num_rounds: int, step_s: float, decodes: list[int]) -> None:
        """Everything that can go on goes on, but at decode ranks that are not named."""
        for _ in range(num_rounds):
            while any(room.expected is None and room.holds_source for room in self.rooms):
                self.forward(0)
            for prefill in range(len(self.prefills)):
                self.turn(prefill)
            while self.copies:
                self.copy(0)
            for _ in range(len(self.fabric.pending or [])):
                self.land(int(self.rng.integers(1000)))
            for decode in decodes:
                self.poll(decode)
            for _ in range(len(self.mail)):
                self.deliver(0)
            self.tick(step_s)

    def check_progress(self) -> None:
        """Decode ranks that do not hang get all that was sent to them; their prefill ranks have slots."""
        healthy = [number for number in range(len(self.decodes)) if number not in self.hung]
        self.run(5, 0.1, healthy)  # time may have run while nothing could move
        names = {self.decodes[number].engine.name for number in self.hung}
        live = [room for room in self.rooms if not room.is_closed and room.decode.engine.name not in names]
        self.run(120, 0.4, healthy)
        for room in live:
            reason, _ = room.prefill.gate.failures.get(room.number, ("", True))
            assert "no slot of the slab" not in reason, f"room {room.number} is starved: {reason}"
            assert room.is_closed or room.is_complete, f"room {room.number} never arrives"

    def rest(self) -> None:
        """All faults end, all that is on its way arrives: nothing is held any more."""
        self.hung.clear()
        self.num_refused = 0
        self.run(80, 4.0, list(range(len(self.decodes))))
        for prefill in self.prefills:
            assert prefill.outbox.is_idle
            assert prefill.runner.num_due == 0, "a piece is never credited"
            assert prefill.runner.num_source_held == 0, "a source slot is never freed"
        for decode in self.decodes:
            for holder in list(decode.inbox.lender._holders.values()):
                owner = decode.prefills[holder.endpoint]
                recall = Credit(agent=decode.engine.name, holder=holder.number, recall=sorted(holder.leases))
                owner.outbox.credit(recall)
        self.run(3, 0.1, list(range(len(self.decodes))))
        assert all(decode.inbox.lender.num_held == 0 for decode in self.decodes), (
            "a slot is never leased again"
        )
        # A room with a write that took longer than SETTLE_S to end keeps its pages: SGLang has a time-out.
        gates = {room.number: room.prefill.gate for room in self.rooms}
        held = [number for number, gate in gates.items() if gate.failures.get(number, ("", True))[1]]
        assert not held, f"pages of rooms {held} are never freed"
