"""Posts and reaps the single writes of a chunk: gathers into the own slab, NIXL writes, credits.

Only the outbox thread calls a ``StepRunner``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdserve.errors import PeerLost, RegistrationFailed, TransferFailed
from pdserve.kv.coalesce import PageCopier, Piece
from pdserve.kv.staging import SlotPool
from pdserve.transfer.engine import MemoryKind, PeerName, TransferEngine, TransferState
from pdserve.transfer.jobs import DirectSample, RankWrites, Step, WriteStage
from pdserve.transfer.messages import Arrival, Credit, Grant, SlabPiece, encode
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.plan import Path
from pdserve.transfer.slots import Slab

STARVED_S = 60.0
"""A piece that gets no slot for so long fails its room: its peer, or all others together, have hung."""


@dataclass(slots=True)
class _Due:
    """A piece in a peer's slot that the peer has not said it is done with."""

    writes: RankWrites
    settled_s: float | None = None
    """Since when its write is over; None while its bytes may still land."""


class StepRunner:
    """Posts and reaps single writes. Knows slabs and costs, not queues."""

    def __init__(
        self, engine: TransferEngine, copier: PageCopier, slab: Slab, *, rank: int, kind: MemoryKind,
        device: int, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._copier = copier
        self._rank = rank
        self._kind, self._device = kind, device
        self._slab_address = slab.address
        self._source = SlotPool(slab.nbytes, slab.slot_bytes)
        self._clock = clock
        self._num_sent: dict[tuple[int, PeerName], int] = defaultdict(int)
        self._due: dict[tuple[PeerName, int], _Due] = {}

    @property
    def num_due(self) -> int:
        """Pieces in slots of peers that have not said they are done with them."""
        return len(self._due)

    @property
    def num_source_held(self) -> int:
        """Slots of the own slab in use."""
        return self._source.num_held

    def post_next(self, peer: PeerLink, writes: RankWrites) -> bool:
        """Post the next write; False if it must wait, for slab space or for more layers."""
        if writes.plan is None:
            self._plan(peer, writes)
            if not writes.is_filled:
                return False
        assert writes.plan is not None
        if writes.stage is WriteStage.AUX:
            self._post_aux(writes)
        elif writes.plan.path is Path.PACKED:
            if not self._start_piece(peer, writes):
                return False
        elif writes.plan.pieces:
            self._post_direct(peer, writes, [writes.plan.pieces.popleft()])
        writes.advance()
        writes.posted_s = self._clock()
        return True

    def reap(self, peer: PeerLink | None, writes: RankWrites, step: Step) -> bool:
        """Post a gathered piece, or collect a finished write. True if something moved.

        After an error the caller gives the step up (``give_up``).
        """
        if step.handle is None:
            assert step.gathered is not None
            if not step.gathered.is_done():
                return False
            if peer is None or writes.job.has_failed:
                self.give_up(peer, writes, step)
            else:
                self._post_piece(peer, writes, step)
            return True
        state = self._engine.poll(step.handle)
        if state is TransferState.PENDING:
            return False
        self._settle(writes, step)
        if state is TransferState.FAILED:
            raise PeerLost(f"a write to decode rank {writes.target.peer} failed")
        self._release(writes, step)
        now_s = self._clock()
        if step.sample is not None and peer is not None:
            num_descriptors, nbytes, started_s = step.sample
            peer.costs.observe(Path.DIRECT, num_descriptors, nbytes, now_s - started_s)
        if not writes.in_flight and writes.is_posted:
            writes.job.record.wait_s += now_s - writes.posted_s
        return True

    def take_credit(self, peer: PeerLink, credit: Credit, now_s: float) -> list[int]:
        """Take grants, and learn what the packed path took when the pieces that are over were a chunk's last.

        Args:
            now_s: when the credit came.

        Returns:
            Recalled leases that the decode rank may have back.
        """
        for lease in credit.over:
            peer.slots.end(lease)
            due = self._due.pop((peer.name, lease), None)
            if due is not None:
                self._learn_packed(peer, due.writes, now_s)
        if credit.holder != peer.slots.holder:
            return []  # of an earlier registration, which the decode rank takes back by itself
        peer.slots.add(credit.grants)
        return peer.slots.recall(credit.recall)

    def _learn_packed(self, peer: PeerLink, writes: RankWrites, now_s: float) -> None:
        writes.num_credits_due -= 1
        if writes.num_credits_due or writes.stage is WriteStage.PAYLOAD or not writes.teaches_packed:
            return
        if writes.plan is not None:
            peer.costs.observe(Path.PACKED, writes.num_planned, writes.plan.nbytes, now_s - writes.started_s)

    def overdue(self, name: PeerName, before_s: float) -> list[int]:
        """Leases of this peer's slots whose write was over at ``before_s``, and no credit has come.

        A write in flight may still land, so its lease is never among them. Each is
        reported again only after as long again.
        """
        found = []
        for (peer, lease), due in self._due.items():
            if peer == name and due.settled_s is not None and due.settled_s < before_s:
                due.settled_s = self._clock()
                found.append(lease)
        return found

    def give_up(self, peer: PeerLink | None, writes: RankWrites, step: Step) -> None:
        """Nothing more is done for a step: its gather or its write is over, or its post was refused."""
        self._release(writes, step)
        if step.grant is None or step.handle is not None:
            return
        key = (writes.target.peer, step.grant.lease)
        if key in self._due and writes.job.may_have_written:
            self._settle(writes, step)  # bytes of a refused post may still land: asked back, much later
            return
        if self._due.pop(key, None) is not None:
            writes.num_credits_due -= 1
        if peer is not None:
            peer.slots.put_back(step.grant)

    def forget_peer(self, name: PeerName) -> None:
        """The peer is gone: no credit will come."""
        for key in [key for key in self._due if key[0] == name]:
            del self._due[key]

    def _release(self, writes: RankWrites, step: Step) -> None:
        if step in writes.in_flight:
            writes.in_flight.remove(step)
        # While a post's outcome is unknown the transport may still read the source.
        if step.source is not None and (step.handle is None or step.is_settled):
            self._source.give_back(step.source)
            step.source = None

    def _settle(self, writes: RankWrites, step: Step) -> None:
        step.is_settled = True
        due = None if step.grant is None else self._due.get((writes.target.peer, step.grant.lease))
        if due is not None:  # its credit may have come before the write was polled
            due.settled_s = self._clock()

    def forget(self, writes: RankWrites) -> None:
        """The writes are over: drop the room's message count after its last chunk or its failure."""
        if writes.job.is_last or writes.job.has_failed:
            self._num_sent.pop((writes.job.room, writes.target.peer), None)

    def _plan(self, peer: PeerLink, writes: RankWrites) -> None:
        begin = self._clock()
        job = writes.job
        is_layered = job.num_filled is not None
        plan = peer.plan(
            job.pages, writes.target.pages, job.first_token, job.forced_path, is_layered=is_layered
        )
        if plan.path is Path.PACKED and peer.piece_bytes > self._source.slot_bytes:
            raise RegistrationFailed(
                f"pieces of {peer.piece_bytes} bytes do not fit the own slots of {self._source.slot_bytes}"
            )
        writes.plan, writes.started_s = plan, begin
        writes.num_planned, writes.teaches_packed = len(plan.pieces), not is_layered
        record = job.record
        record.nbytes += plan.nbytes
        if plan.nbytes:
            record.num_direct += plan.path is Path.DIRECT
            record.num_packed += plan.path is Path.PACKED
        record.plan_s += self._clock() - begin

    def _message(
        self, writes: RankWrites, slab: SlabPiece | None = None, *, is_final: bool = False
    ) -> Arrival:
        """The next message of the room to this peer; the final one tells how many there were."""
        key = (writes.job.room, writes.target.peer)
        seq = self._num_sent[key]
        self._num_sent[key] = seq + 1
        return Arrival(
            room=writes.job.room, rank=self._rank, seq=seq, total=seq + 1 if is_final else 0, slab=slab
        )

    def _post_direct(self, peer: PeerLink, writes: RankWrites, pieces: list[Piece]) -> None:
        """Write ``pieces``, which are no longer in the plan, without the slab."""
        assert peer.blocks is not None and writes.plan is not None
        begin, job, plan = self._clock(), writes.job, writes.plan
        source, target = peer.direct_indices(plan.pages, pieces)
        nbytes = sum(piece.nbytes for piece in pieces)
        num_descriptors = plan.num_descriptors * nbytes // max(1, plan.nbytes)
        is_final = job.is_last and job.aux is None and not plan.pieces
        step = Step(self._message(writes, is_final=is_final))
        if plan.path is Path.DIRECT:
            started_s = writes.started_s if job.num_filled is None else begin
            step.sample = DirectSample(num_descriptors, nbytes, started_s)
        step.handle = self._engine.write(
            (peer.blocks[0], source), (peer.blocks[1], target), encode(step.message)
        )
        writes.in_flight.append(step)
        self._count(writes, post_s=self._clock() - begin, num_descriptors=num_descriptors)

    def _post_aux(self, writes: RankWrites) -> None:
        assert writes.job.aux is not None and writes.target.aux is not None
        begin = self._clock()
        step = Step(self._message(writes, is_final=writes.job.is_last))
        step.handle = self._engine.write_spans(
            writes.target.peer, writes.job.aux, writes.target.aux, (MemoryKind.DRAM, MemoryKind.DRAM),
            encode(step.message),
        )  # fmt: skip
        writes.in_flight.append(step)
        self._count(writes, post_s=self._clock() - begin, num_descriptors=len(writes.job.aux))

    def _start_piece(self, peer: PeerLink, writes: RankWrites) -> bool:
        assert writes.plan is not None
        source, grant = self._take_slots(peer)
        if source is None or grant is None:
            return self._go_direct_if_quicker(peer, writes)
        peer.starved_since_s = writes.blocked_since_s = None
        piece = writes.plan.pieces.popleft()
        begin = self._clock()
        try:
            address = self._slab_address + self._source.offset(source)
            gathered = self._copier.gather_pages(writes.job.pages, piece, address)
        except Exception:
            peer.slots.put_back(grant)
            self._source.give_back(source)
            raise
        writes.job.record.gather_s += self._clock() - begin
        assert peer.slice is not None
        slab = SlabPiece(
            lease=grant.lease,
            region_begin=piece.region_begin,
            num_regions=piece.num_regions,
            first_token=writes.job.first_token + piece.first_token,
            num_tokens=piece.num_tokens,
            slice_offset=peer.slice.target_offset,
            slice_bytes=piece.slice_bytes,
        )
        is_final = writes.job.is_last and writes.job.aux is None and not writes.plan.pieces
        step = Step(self._message(writes, slab, is_final=is_final), None, gathered, source, grant)
        writes.in_flight.append(step)
        if gathered.is_done():
            self._post_piece(peer, writes, step)
        return True

    def _post_piece(self, peer: PeerLink, writes: RankWrites, step: Step) -> None:
        assert step.source is not None and step.grant is not None and step.message.slab is not None
        slab = step.message.slab
        nbytes = slab.num_regions * slab.num_tokens * slab.slice_bytes
        begin = self._clock()
        address = self._slab_address + self._source.offset(step.source)
        source = np.array([[address, nbytes, self._device]], dtype=np.uint64)
        target = np.array([[peer.slots.address(step.grant), nbytes, peer.offer.device]], dtype=np.uint64)
        self._due[peer.name, step.grant.lease] = _Due(writes)
        writes.num_credits_due += 1
        step.handle = self._engine.write_spans(
            peer.name, source, target, (self._kind, peer.offer.kind), encode(step.message)
        )
        self._count(writes, post_s=self._clock() - begin, num_descriptors=1)

    def _take_slots(self, peer: PeerLink) -> tuple[int | None, Grant | None]:
        """A slot of either slab, or neither."""
        grant = peer.slots.take()
        source = None if grant is None else self._source.take(peer.name)
        if grant is not None and source is None:
            peer.slots.put_back(grant)
            grant = None
        return source, grant

    def _go_direct_if_quicker(self, peer: PeerLink, writes: RankWrites) -> bool:
        """No slot is free: wait for one no longer than writing the rest directly would take.

        Raises:
            TransferFailed: when the peer's pieces have waited for ``STARVED_S``.
        """
        assert writes.plan is not None
        now_s = self._clock()
        if writes.blocked_since_s is None:
            writes.blocked_since_s = now_s
        if peer.starved_since_s is None:
            peer.starved_since_s = now_s
        if not peer.can_direct:
            if now_s - peer.starved_since_s > STARVED_S:
                lacking = "of this prefill rank" if peer.slots.num_unused else f"of decode rank {peer.name}"
                raise TransferFailed(
                    writes.job.room, f"no slot of the slab {lacking} became free within {STARVED_S:.0f} s"
                )
            return False
        pieces, num_filled = writes.plan.pieces, writes.job.num_filled
        end = pieces[-1].region_end if num_filled is None else num_filled()
        filled = [piece for piece in pieces if piece.region_end <= end]
        rest = sum(piece.nbytes for piece in filled)
        descriptors = writes.plan.num_descriptors * rest // max(1, writes.plan.nbytes)
        if now_s - writes.blocked_since_s < peer.costs.direct.predict_s(descriptors, rest):
            return False
        writes.teaches_packed = False
        for _ in filled:
            pieces.popleft()
        self._post_direct(peer, writes, filled)
        return True

    @staticmethod
    def _count(writes: RankWrites, *, post_s: float, num_descriptors: int) -> None:
        record = writes.job.record
        record.post_s += post_s
        record.num_descriptors += num_descriptors
        record.num_writes += 1
