"""Posts and reaps the single writes of a chunk: gathers into the own slab, NIXL writes, credits.

Only the outbox thread calls a ``StepRunner``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pdserve.errors import PeerLost, RegistrationFailed
from pdserve.kv.coalesce import PageCopier
from pdserve.kv.staging import StagingRing
from pdserve.transfer.engine import MemoryKind, PeerName, TransferEngine, TransferState
from pdserve.transfer.jobs import RankWrites, Step, WriteStage
from pdserve.transfer.messages import Arrival, Credit, SlabPiece, encode
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.plan import Path


@dataclass(slots=True)
class _Due:
    """A piece of a peer's window whose credit has not come."""

    writes: RankWrites
    settled_s: float | None = None
    """Since when (monotonic) its write is over; None while its bytes may still land."""


class StepRunner:
    """Posts and reaps single writes. Knows slabs and costs, not queues."""

    def __init__(
        self, engine: TransferEngine, copier: PageCopier, *, rank: int, kind: MemoryKind, device: int,
        slab_address: int, slab_bytes: int,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._copier = copier
        self._rank = rank
        self._kind, self._device = kind, device
        self._slab_address = slab_address
        self._ring = StagingRing(slab_bytes)
        self._num_sent: dict[tuple[int, PeerName], int] = defaultdict(int)
        self._credits_due: dict[tuple[PeerName, int], _Due] = {}

    def post_next(self, peer: PeerLink, writes: RankWrites) -> bool:
        """Post the next write; False if it must wait for slab space."""
        if writes.plan is None:
            self._plan(peer, writes)
        assert writes.plan is not None
        if writes.stage is WriteStage.AUX:
            self._post_aux(writes)
        elif writes.plan.path is Path.PACKED:
            if not self._start_piece(peer, writes):
                return False
        elif writes.plan.nbytes:
            self._post_direct(peer, writes)
        writes.advance()
        writes.posted_s = time.perf_counter()
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
        now_s = time.perf_counter()
        if step.is_direct and peer is not None and writes.plan is not None and not writes.is_mixed:
            peer.costs.observe(Path.DIRECT, writes.num_planned, writes.plan.nbytes, now_s - writes.started_s)
        if not writes.in_flight and writes.is_posted:
            writes.job.record.wait_s += now_s - writes.posted_s
        return True

    def take_credit(self, peer: PeerLink, credit: Credit, now_s: float) -> None:
        """Free the pieces, and learn what the packed path took when they were the chunk's last.

        Args:
            now_s: when the credit came (perf_counter).
        """
        if credit.window != peer.offer.window:
            return  # of a window that this rank held before: its generations are others
        for generation in credit.generations:
            if not peer.window.free_generation(generation):
                continue
            due = self._credits_due.pop((peer.name, generation), None)
            if due is None:
                continue
            writes = due.writes
            writes.num_credits_due -= 1
            if writes.num_credits_due or writes.stage is WriteStage.PAYLOAD or writes.is_mixed:
                continue
            if writes.plan is not None:
                seconds = now_s - writes.started_s
                peer.costs.observe(Path.PACKED, writes.num_planned, writes.plan.nbytes, seconds)

    def overdue(self, peer: PeerLink, before_s: float) -> list[int]:
        """Uncredited generations of this peer's window whose write was over at ``before_s`` (monotonic).

        A write in flight may still land, so its piece is never among them. Each is
        reported again only after as long again.
        """
        found = []
        for (name, generation), due in self._credits_due.items():
            if name == peer.name and due.settled_s is not None and due.settled_s < before_s:
                due.settled_s = time.monotonic()
                found.append(generation)
        return found

    def give_up(self, peer: PeerLink | None, writes: RankWrites, step: Step) -> None:
        """Nothing more is done for a step: its gather or its write is over, or its post was refused."""
        self._release(writes, step)
        if step.window is None or step.handle is not None:
            return
        key = (writes.target.peer, step.window.generation)
        if key in self._credits_due and writes.job.may_have_written:
            self._settle(writes, step)  # bytes of a refused post may still land: asked back, much later
        elif peer is not None:
            peer.window.free_generation(step.window.generation)
            if self._credits_due.pop(key, None) is not None:
                writes.num_credits_due -= 1

    def _release(self, writes: RankWrites, step: Step) -> None:
        if step in writes.in_flight:
            writes.in_flight.remove(step)
        # While a post's outcome is unknown the transport may still read the source.
        if step.source is not None and (step.handle is None or step.is_settled):
            self._ring.free(step.source)
            step.source = None

    def _settle(self, writes: RankWrites, step: Step) -> None:
        step.is_settled = True
        if step.window is None:
            return
        due = self._credits_due.get((writes.target.peer, step.window.generation))
        if due is not None:  # its credit may have come before the write was polled
            due.settled_s = time.monotonic()

    def forget(self, writes: RankWrites) -> None:
        """The writes are over: drop the room's message count after its last chunk or its failure."""
        if writes.job.is_last or writes.job.has_failed:
            self._num_sent.pop((writes.job.room, writes.target.peer), None)

    def _plan(self, peer: PeerLink, writes: RankWrites) -> None:
        begin = time.perf_counter()
        job = writes.job
        plan = peer.plan(job.pages, writes.target.pages, job.first_token, job.forced_path)
        if plan.path is Path.PACKED and peer.piece_bytes > self._ring.capacity:
            raise RegistrationFailed(f"a piece of {peer.piece_bytes} bytes does not fit the own slab")
        writes.plan, writes.started_s = plan, begin
        writes.num_planned = plan.num_descriptors if plan.path is Path.DIRECT else len(plan.pieces)
        record = job.record
        record.nbytes += plan.nbytes
        if plan.nbytes:
            record.num_direct += plan.path is Path.DIRECT
            record.num_packed += plan.path is Path.PACKED
        record.plan_s += time.perf_counter() - begin

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

    def _post_direct(self, peer: PeerLink, writes: RankWrites) -> None:
        assert peer.blocks is not None and writes.plan is not None
        begin = time.perf_counter()
        source, target = peer.direct_indices(writes.plan)
        job = writes.job
        step = Step(self._message(writes, is_final=job.is_last and job.aux is None), is_direct=True)
        step.handle = self._engine.write(
            (peer.blocks[0], source), (peer.blocks[1], target), encode(step.message)
        )
        writes.in_flight.append(step)
        writes.plan.pieces.clear()
        self._count(writes, post_s=time.perf_counter() - begin, num_descriptors=writes.plan.num_descriptors)

    def _post_aux(self, writes: RankWrites) -> None:
        assert writes.job.aux is not None and writes.target.aux is not None
        begin = time.perf_counter()
        step = Step(self._message(writes, is_final=writes.job.is_last))
        step.handle = self._engine.write_spans(
            writes.target.peer, writes.job.aux, writes.target.aux, (MemoryKind.DRAM, MemoryKind.DRAM),
            encode(step.message),
        )  # fmt: skip
        writes.in_flight.append(step)
        self._count(writes, post_s=time.perf_counter() - begin, num_descriptors=len(writes.job.aux))

    def _start_piece(self, peer: PeerLink, writes: RankWrites) -> bool:
        assert writes.plan is not None
        piece = writes.plan.pieces[0]
        window = peer.window.alloc(piece.nbytes)
        source = self._ring.alloc(piece.nbytes) if window is not None else None
        if window is None or source is None:
            if window is not None:
                peer.window.free(window)
            return self._go_direct_if_quicker(peer, writes)
        writes.blocked_since_s = None
        writes.plan.pieces.popleft()
        begin = time.perf_counter()
        try:
            gathered = self._copier.gather_pages(writes.job.pages, piece, self._slab_address + source.offset)
        except Exception:
            peer.window.free(window)
            self._ring.free(source)
            raise
        writes.job.record.gather_s += time.perf_counter() - begin
        assert peer.slice is not None
        slab = SlabPiece(
            window=peer.offer.window,
            generation=window.generation,
            offset=window.offset,
            region_begin=piece.region_begin,
            num_regions=piece.num_regions,
            first_token=writes.job.first_token + piece.first_token,
            num_tokens=piece.num_tokens,
            slice_offset=peer.slice.target_offset,
            slice_bytes=piece.slice_bytes,
        )
        is_final = writes.job.is_last and writes.job.aux is None and not writes.plan.pieces
        step = Step(self._message(writes, slab, is_final=is_final), None, gathered, source, window)
        writes.in_flight.append(step)
        if gathered.is_done():
            self._post_piece(peer, writes, step)
        return True

    def _post_piece(self, peer: PeerLink, writes: RankWrites, step: Step) -> None:
        assert step.source is not None and step.window is not None and step.message.slab is not None
        slab = step.message.slab
        nbytes = slab.num_regions * slab.num_tokens * slab.slice_bytes
        begin = time.perf_counter()
        source = np.array([[self._slab_address + step.source.offset, nbytes, self._device]], dtype=np.uint64)
        address = peer.offer.window_address + step.window.offset
        target = np.array([[address, nbytes, peer.offer.device]], dtype=np.uint64)
        self._credits_due[peer.name, step.window.generation] = _Due(writes)
        writes.num_credits_due += 1
        step.handle = self._engine.write_spans(
            peer.name, source, target, (self._kind, peer.offer.kind), encode(step.message)
        )
        self._count(writes, post_s=time.perf_counter() - begin, num_descriptors=1)

    def _go_direct_if_quicker(self, peer: PeerLink, writes: RankWrites) -> bool:
        """A full window: wait for credits no longer than writing the rest directly would take."""
        assert writes.plan is not None
        now_s = time.perf_counter()
        if writes.blocked_since_s is None:
            writes.blocked_since_s = now_s
        if not peer.can_direct:
            return False
        rest = sum(piece.nbytes for piece in writes.plan.pieces)
        descriptors = writes.plan.num_descriptors * rest // max(1, writes.plan.nbytes)
        if now_s - writes.blocked_since_s < peer.costs.direct.predict_s(descriptors, rest):
            return False
        writes.is_mixed = True
        self._post_direct(peer, writes)
        return True

    @staticmethod
    def _count(writes: RankWrites, *, post_s: float, num_descriptors: int) -> None:
        record = writes.job.record
        record.post_s += post_s
        record.num_descriptors += num_descriptors
        record.num_writes += 1
