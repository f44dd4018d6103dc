"""A chunk on its way: jobs, their shares per peer, and the steps that post and reap them.

Only the outbox thread touches these after ``submit``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pdserve.errors import PeerLost, RegistrationFailed
from pdserve.kv.coalesce import Completion, PageCopier
from pdserve.kv.layout import PageIds
from pdserve.kv.staging import StagingRing, StagingSlab
from pdserve.transfer.engine import (
    MemoryKind,
    PeerName,
    Spans,
    TransferEngine,
    TransferHandle,
    TransferState,
)
from pdserve.transfer.messages import Arrival, Credit, SlabPiece, encode
from pdserve.transfer.peer import PeerLink, SharePlan
from pdserve.transfer.plan import Path


@dataclass(frozen=True, slots=True)
class Target:
    """Where one peer wants a chunk."""

    peer: PeerName
    pages: PageIds
    """All pages the peer gave for the room."""
    aux: Spans | None = None
    """``[n, 3]`` spans of the peer's metadata row, last chunk only; same lengths as the job's."""


@dataclass(slots=True)
class TransferRecord:
    """What moving one chunk to all its peers took. Times in seconds, summed over peers."""

    nbytes: int = 0
    num_descriptors: int = 0
    num_writes: int = 0
    num_direct: int = 0
    """Chunk shares that went direct; ``num_packed`` those that were packed."""
    num_packed: int = 0
    plan_s: float = 0.0
    gather_s: float = 0.0
    post_s: float = 0.0
    wait_s: float = 0.0
    """From the last post of a share to its last completion."""

    def add(self, other: TransferRecord) -> None:
        """Sum up, chunk after chunk."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def counters(self) -> dict[str, int]:
        """As whole numbers, times in microseconds, under the names of plugin/stats.py."""
        return {
            "kv_bytes": self.nbytes,
            "direct_chunks": self.num_direct,
            "packed_chunks": self.num_packed,
            "descriptors": self.num_descriptors,
            "writes": self.num_writes,
            "plan_us": round(self.plan_s * 1e6),
            "gather_us": round(self.gather_s * 1e6),
            "post_us": round(self.post_s * 1e6),
            "wait_us": round(self.wait_s * 1e6),
        }


@dataclass(slots=True, eq=False)
class ChunkJob:
    """One chunk of a room, to be written to every target."""

    room: int
    pages: PageIds
    first_token: int
    is_last: bool
    targets: Sequence[Target]
    aux: Spans | None = None
    """The own metadata row, last chunk only."""
    is_ready: Callable[[], bool] = lambda: True
    """False while the forward pass that fills the pages still runs."""
    forced_path: Path | None = None
    shares: list[Share] = field(default_factory=list)
    record: TransferRecord = field(default_factory=TransferRecord)
    failure: str | None = None
    failed_at_s: float = 0.0
    is_silent: bool = False
    """The room was closed by its owner: no news for it."""
    may_have_written: bool = False
    """A refused post may still land: the pages can never be proven quiet."""
    is_entered: bool = False
    is_over: bool = False

    def fail(self, reason: str, *, is_silent: bool = False) -> None:
        """Give the chunk up; the first reason stays."""
        if self.failure is None:
            self.failure, self.failed_at_s, self.is_silent = reason, time.monotonic(), is_silent


class RoomGate(Protocol):
    """The owner of rooms and pages. Called from the outbox thread."""

    def enter(self, room: int) -> bool:
        """Count a chunk as being written, unless the room is closed: then False and nothing is counted."""

    def is_open(self, room: int) -> bool:
        """False once the room failed or was aborted."""

    def finished(self, job: ChunkJob) -> None:
        """All writes of the chunk are done; uncount it if it was entered."""

    def failed(self, job: ChunkJob, *, settled: bool) -> None:
        """The chunk failed. ``settled``: none of its writes can land any more; uncount it only then."""


@dataclass(slots=True, eq=False)
class Step:
    """One write: waiting for its gather (``handle`` None) or posted."""

    message: Arrival
    handle: TransferHandle | None = None
    gathered: Completion | None = None
    source: StagingSlab | None = None
    window: StagingSlab | None = None
    is_direct: bool = False


@dataclass(slots=True, eq=False)
class Share:
    """One peer's part of a chunk."""

    job: ChunkJob
    target: Target
    plan: SharePlan | None = None
    in_flight: list[Step] = field(default_factory=list)
    is_payload_posted: bool = False
    is_posted: bool = False
    started_s: float = 0.0
    posted_s: float = 0.0
    blocked_since_s: float | None = None
    num_credits_due: int = 0
    num_planned: int = 0
    """Descriptors (direct) or pieces (packed): the items of the cost law."""
    is_mixed: bool = False
    """Started packed and ended direct: neither law can learn from it."""


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
        self._credits_due: dict[tuple[PeerName, int], tuple[Share, float]] = {}

    @property
    def held_source_bytes(self) -> int:
        """Bytes of the own slab that gathers or writes still use."""
        return self._ring.held_bytes

    def post_next(self, peer: PeerLink, share: Share) -> bool:
        """Post the share's next write; False if it must wait for slab space."""
        if share.plan is None:
            self._plan(peer, share)
        assert share.plan is not None
        if not share.is_payload_posted:
            if share.plan.path is Path.PACKED:
                if not self._start_piece(peer, share):
                    return False
            elif share.plan.nbytes:
                self._post_direct(peer, share)
            share.is_payload_posted = share.plan.path is Path.DIRECT or not share.plan.pieces
        elif share.job.aux is not None:
            self._post_aux(share)
            share.is_posted = True
        share.is_posted = share.is_posted or (share.is_payload_posted and share.job.aux is None)
        share.posted_s = time.perf_counter()
        return True

    def reap(self, peer: PeerLink | None, share: Share, step: Step) -> bool:
        """Post a gathered piece, or collect a finished write. True if something moved."""
        if step.handle is None:
            assert step.gathered is not None
            if not step.gathered.is_done():
                return False
            if peer is None or share.job.failure is not None:
                self._abandon(peer, share, step)
            else:
                self._post_piece(peer, share, step)
            return True
        state = self._engine.poll(step.handle)
        if state is TransferState.PENDING:
            return False
        share.in_flight.remove(step)
        if step.source is not None:
            self._ring.free(step.source)
        if state is TransferState.FAILED:
            raise PeerLost(f"a write to decode rank {share.target.peer} failed")
        now_s = time.perf_counter()
        if step.is_direct and peer is not None and share.plan is not None and not share.is_mixed:
            peer.costs.observe(Path.DIRECT, share.num_planned, share.plan.nbytes, now_s - share.started_s)
        if not share.in_flight and share.is_posted:
            share.job.record.wait_s += now_s - share.posted_s
        return True

    def take_credit(self, peer: PeerLink, credit: Credit, now_s: float) -> None:
        """Free the pieces, and learn what the packed path took when they were a share's last.

        Args:
            now_s: when the credit came (perf_counter).
        """
        for generation in credit.generations:
            if not peer.window.free_generation(generation):
                continue
            share, _ = self._credits_due.pop((peer.name, generation), (None, 0.0))
            if share is None:
                continue
            share.num_credits_due -= 1
            if share.num_credits_due or not share.is_payload_posted or share.is_mixed:
                continue
            if share.plan is not None:
                seconds = now_s - share.started_s
                peer.costs.observe(Path.PACKED, share.num_planned, share.plan.nbytes, seconds)

    def overdue(self, peer: PeerLink, before_s: float) -> list[int]:
        """Generations of this peer's window posted before ``before_s`` (monotonic) and not credited yet.

        Each is reported again only after as long again.
        """
        found = [
            generation
            for (name, generation), (_, since_s) in self._credits_due.items()
            if name == peer.name and since_s < before_s
        ]
        for generation in found:
            share, _ = self._credits_due[peer.name, generation]
            self._credits_due[peer.name, generation] = (share, time.monotonic())
        return found

    def forget(self, share: Share) -> None:
        """A share is over: drop the room's message count after its last chunk or its failure."""
        if share.job.is_last or share.job.failure is not None:
            self._num_sent.pop((share.job.room, share.target.peer), None)

    def _plan(self, peer: PeerLink, share: Share) -> None:
        begin = time.perf_counter()
        job = share.job
        plan = peer.plan(job.pages, share.target.pages, job.first_token, job.forced_path)
        if plan.path is Path.PACKED and peer.piece_bytes > self._ring.capacity:
            raise RegistrationFailed(f"a piece of {peer.piece_bytes} bytes does not fit the own slab")
        share.plan, share.started_s = plan, begin
        share.num_planned = plan.num_descriptors if plan.path is Path.DIRECT else len(plan.pieces)
        record = job.record
        record.nbytes += plan.nbytes
        if plan.nbytes:
            record.num_direct += plan.path is Path.DIRECT
            record.num_packed += plan.path is Path.PACKED
        record.plan_s += time.perf_counter() - begin

    def _message(self, share: Share, slab: SlabPiece | None = None, *, is_final: bool = False) -> Arrival:
        """The next message of the room to this peer; the final one tells how many there were."""
        key = (share.job.room, share.target.peer)
        seq = self._num_sent[key]
        self._num_sent[key] = seq + 1
        return Arrival(
            room=share.job.room, rank=self._rank, seq=seq, total=seq + 1 if is_final else 0, slab=slab
        )

    def _post_direct(self, peer: PeerLink, share: Share) -> None:
        assert peer.blocks is not None and share.plan is not None
        begin = time.perf_counter()
        source, target = peer.direct_indices(share.plan)
        job = share.job
        step = Step(self._message(share, is_final=job.is_last and job.aux is None), is_direct=True)
        step.handle = self._engine.write(
            (peer.blocks[0], source), (peer.blocks[1], target), encode(step.message)
        )
        share.in_flight.append(step)
        share.plan.pieces.clear()
        self._count(share, post_s=time.perf_counter() - begin, num_descriptors=share.plan.num_descriptors)

    def _post_aux(self, share: Share) -> None:
        assert share.job.aux is not None and share.target.aux is not None
        begin = time.perf_counter()
        step = Step(self._message(share, is_final=share.job.is_last))
        step.handle = self._engine.write_spans(
            share.target.peer, share.job.aux, share.target.aux, (MemoryKind.DRAM, MemoryKind.DRAM),
            encode(step.message),
        )  # fmt: skip
        share.in_flight.append(step)
        self._count(share, post_s=time.perf_counter() - begin, num_descriptors=len(share.job.aux))

    def _start_piece(self, peer: PeerLink, share: Share) -> bool:
        assert share.plan is not None
        piece = share.plan.pieces[0]
        window = peer.window.alloc(piece.nbytes)
        source = self._ring.alloc(piece.nbytes) if window is not None else None
        if window is None or source is None:
            if window is not None:
                peer.window.free(window)
            return self._go_direct_if_quicker(peer, share)
        share.blocked_since_s = None
        share.plan.pieces.popleft()
        begin = time.perf_counter()
        try:
            gathered = self._copier.gather_pages(share.job.pages, piece, self._slab_address + source.offset)
        except Exception:
            peer.window.free(window)
            self._ring.free(source)
            raise
        share.job.record.gather_s += time.perf_counter() - begin
        assert peer.slice is not None
        slab = SlabPiece(
            window=peer.offer.window,
            generation=window.generation,
            offset=window.offset,
            region_begin=piece.region_begin,
            num_regions=piece.num_regions,
            first_token=share.job.first_token + piece.first_token,
            num_tokens=piece.num_tokens,
            slice_offset=peer.slice.target_offset,
            slice_bytes=piece.slice_bytes,
        )
        is_final = share.job.is_last and share.job.aux is None and not share.plan.pieces
        step = Step(self._message(share, slab, is_final=is_final), None, gathered, source, window)
        share.in_flight.append(step)
        if gathered.is_done():
            self._post_piece(peer, share, step)
        return True

    def _post_piece(self, peer: PeerLink, share: Share, step: Step) -> None:
        assert step.source is not None and step.window is not None and step.message.slab is not None
        slab = step.message.slab
        nbytes = slab.num_regions * slab.num_tokens * slab.slice_bytes
        begin = time.perf_counter()
        source = np.array([[self._slab_address + step.source.offset, nbytes, self._device]], dtype=np.uint64)
        address = peer.offer.window_address + step.window.offset
        target = np.array([[address, nbytes, peer.offer.device]], dtype=np.uint64)
        self._credits_due[peer.name, step.window.generation] = (share, time.monotonic())
        share.num_credits_due += 1
        step.handle = self._engine.write_spans(
            peer.name, source, target, (self._kind, peer.offer.kind), encode(step.message)
        )
        self._count(share, post_s=time.perf_counter() - begin, num_descriptors=1)

    def _go_direct_if_quicker(self, peer: PeerLink, share: Share) -> bool:
        """A full window: wait for credits no longer than writing the rest directly would take."""
        assert share.plan is not None
        now_s = time.perf_counter()
        if share.blocked_since_s is None:
            share.blocked_since_s = now_s
        if not peer.can_direct:
            return False
        rest = sum(piece.nbytes for piece in share.plan.pieces)
        descriptors = share.plan.num_descriptors * rest // max(1, share.plan.nbytes)
        if now_s - share.blocked_since_s < peer.costs.direct.predict_s(descriptors, rest):
            return False
        share.is_mixed = True
        self._post_direct(peer, share)
        share.is_payload_posted = True
        return True

    def _abandon(self, peer: PeerLink | None, share: Share, step: Step) -> None:
        """A piece that was gathered but must not be posted any more."""
        share.in_flight.remove(step)
        if step.source is not None:
            self._ring.free(step.source)
        # After a refused post bytes may still land in the window: leave the piece to ``overdue``.
        if peer is not None and step.window is not None and not share.job.may_have_written:
            peer.window.free_generation(step.window.generation)
            self._credits_due.pop((peer.name, step.window.generation), None)

    @staticmethod
    def _count(share: Share, *, post_s: float, num_descriptors: int) -> None:
        record = share.job.record
        record.post_s += post_s
        record.num_descriptors += num_descriptors
        record.num_writes += 1
