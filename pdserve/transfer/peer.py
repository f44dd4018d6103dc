"""One decode rank as a prefill rank sees it: where it may write, and what that costs.

What a chunk needs at the peer becomes *steps*; every step is one posted write::

    direct:  pool pages ─────────────────────────────► pool pages      1 step, many descriptors
    packed:  pool pages ─gather► own slab ─► slot ─scatter► pages      1 step per piece, 1 descriptor
    aux:     metadata row ───────────────────────────► metadata row    1 step, last chunk only
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdserve.errors import KVLayoutMismatch
from pdserve.kv.coalesce import Piece
from pdserve.kv.layout import (
    HeadSlice,
    PagedRegions,
    PageIds,
    head_slice,
    heads_of_rank,
    is_first_replica,
    num_runs,
)
from pdserve.transfer.engine import DescriptorList, MemoryKind, PeerName, StridedSpans, TransferEngine
from pdserve.transfer.messages import PROTOCOL_VERSION, PeerOffer
from pdserve.transfer.plan import GPU_COPY_S, HOST_COPY_S, Path, PathCosts, split_pieces
from pdserve.transfer.slots import GrantedSlots, SlotLender

Indices = npt.NDArray[np.int32]

PART_BYTES = 4 << 20
"""Layers that are sent while later ones compute travel together up to so much: a post costs CPU time."""


@dataclass(frozen=True, slots=True)
class RankPool:
    """One rank's KV pool: its geometry, its place in attention TP, its memory."""

    regions: PagedRegions
    total_kv_heads: int
    tp_size: int
    tp_rank: int
    kind: MemoryKind
    device: int
    model_dtype: str = ""

    def offer(
        self, lender: SlotLender, endpoint: str, instance_id: str, *, wants_slots: bool = True
    ) -> PeerOffer:
        """What a decode rank with this pool tells the prefill rank at ``endpoint``.

        A rank that sends no KV wants no slots.
        """
        holder, grants = lender.enter(endpoint) if wants_slots else (0, ())
        return PeerOffer(
            version=PROTOCOL_VERSION,
            instance_id=instance_id,
            bases=self.regions.bases,
            num_pages=self.regions.num_pages,
            page_size=self.regions.page_size,
            row_bytes=self.regions.row_bytes,
            token_stride=self.regions.token_stride,
            num_kv_heads=self.regions.num_kv_heads,
            total_kv_heads=self.total_kv_heads,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            memory=str(self.kind),
            device=self.device,
            holder=holder,
            slab_address=lender.slab_address,
            slot_bytes=lender.slot_bytes if wants_slots else 0,
            grants=grants,
            model_dtype=self.model_dtype,
            num_draft_regions=self.regions.num_draft_regions,
        )


@dataclass(slots=True, eq=False)
class PeerLink:
    """State of one peer; owned by the outbox thread after ``connect``."""

    name: PeerName
    offer: PeerOffer
    own: RankPool
    slice: HeadSlice | None
    """Part of each token row that this rank has to send; None when that is nothing."""
    blocks: tuple[DescriptorList, DescriptorList] | None
    """Prepared pages of both pools; None when the geometries differ, so that only packed works."""
    slots: GrantedSlots
    piece_bytes: int
    """Longest piece; fits a slot of either side."""
    starved_since_s: float | None = None
    """Since when no piece could be started for want of a slot."""
    costs: PathCosts = field(default_factory=PathCosts)

    @property
    def can_direct(self) -> bool:
        """Pages of both sides are the same bytes."""
        return self.blocks is not None

    def plan(
        self, source: PageIds, target: PageIds, first_token: int, forced: Path | None,
        *, is_layered: bool = False,
    ) -> WritePlan:  # fmt: skip
        """Decide how ``source`` pages reach the room's ``target`` pages from token ``first_token`` on.

        Args:
            source: ``[n]`` page ids of this rank's pool, in token order.
            target: ``[m]`` all page ids the peer gave for the room.
            first_token: token position, counted from the first target page.
            forced: take this path where the geometry allows it.
            is_layered: the layers are filled one after another, so that they do not travel as one write.

        Raises:
            KVLayoutMismatch: if there is no way to write there.
        """
        regions, target_size = self.own.regions, self.offer.page_size
        room_left = len(target) * target_size - first_token
        num_tokens = min(len(source) * regions.page_size, room_left)
        if self.slice is None or num_tokens <= 0:
            return WritePlan(Path.DIRECT, nbytes=0)
        nbytes = num_tokens * self.slice.nbytes * regions.num_regions
        pieces = self._pieces(self.slice, num_tokens)
        if not self.can_direct:
            if not pieces:
                raise KVLayoutMismatch(
                    f"{self.name}: pages of {regions.page_size} and {target_size} tokens, "
                    f"{regions.row_bytes} and {self.offer.row_bytes} bytes a token need slab space, "
                    f"and slots of {self.piece_bytes} bytes hold no token; raise PDSERVE_SLAB_MB"
                )
            return WritePlan(Path.PACKED, nbytes=nbytes, pieces=pieces)
        first = first_token // target_size
        count = num_tokens // regions.page_size
        pages = (source[:count], target[first : first + count])
        num_descriptors = num_runs(*pages) * regions.num_regions
        path = forced or self.costs.choose(nbytes, num_descriptors, len(pieces)) if pieces else Path.DIRECT
        if path is Path.DIRECT:
            pieces = self._parts(self.slice, num_tokens, PART_BYTES if is_layered else nbytes)
        return WritePlan(path, nbytes=nbytes, pages=pages, num_descriptors=num_descriptors, pieces=pieces)

    def _pieces(self, part: HeadSlice, num_tokens: int) -> deque[Piece]:
        """The chunk cut to fit the slots; empty if they hold no token."""
        if self.piece_bytes < part.nbytes:
            return deque()
        regions = self.own.regions
        return deque(
            split_pieces(
                num_regions=regions.num_regions, layer_regions=regions.regions_per_layer,
                num_tokens=num_tokens,
                slice_offset=part.source_offset, slice_bytes=part.nbytes,
                piece_bytes=self.piece_bytes, token_unit=max(regions.page_size, self.offer.page_size),
            )
        )  # fmt: skip

    def _parts(self, part: HeadSlice, num_tokens: int, nbytes: int) -> deque[Piece]:
        """The chunk cut into groups of layers for direct writes of about ``nbytes``."""
        regions = self.own.regions
        layer_bytes = num_tokens * part.nbytes * regions.regions_per_layer
        step = -(-nbytes // layer_bytes) * regions.regions_per_layer
        return deque(
            Piece(
                begin, min(step, regions.num_regions - begin), 0, num_tokens, part.source_offset, part.nbytes
            )
            for begin in range(0, regions.num_regions, step)
        )

    def direct_indices(
        self, pages: tuple[PageIds, PageIds], pieces: Iterable[Piece]
    ) -> tuple[Indices, Indices]:
        """Block numbers of the ``pages`` of ``pieces`` on both sides."""
        source, target = pages
        here, there = self.own.regions.num_pages, self.offer.num_pages
        size = self.own.regions.page_size
        ours, theirs = [], []
        for piece in pieces:
            regions = np.arange(piece.region_begin, piece.region_end, dtype=np.int32)
            # Slots smaller than a page cut pieces inside pages: such a page goes whole, the same bytes again.
            part = slice(piece.first_token // size, -(-(piece.first_token + piece.num_tokens) // size))
            ours.append(_blocks(regions, source[part], here))
            theirs.append(_blocks(regions, target[part], there))
        return np.concatenate(ours), np.concatenate(theirs)


@dataclass(slots=True)
class WritePlan:
    """What is to be written for one chunk to one peer."""

    path: Path
    nbytes: int
    pages: tuple[PageIds, PageIds] = field(
        default_factory=lambda: (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
    )
    num_descriptors: int = 0
    pieces: deque[Piece] = field(default_factory=deque)
    """What is left to post, a write each, in the order of layers; a direct chunk that is there is one."""


def connect_peer(
    engine: TransferEngine,
    name: PeerName,
    offer: PeerOffer,
    own: RankPool,
    *,
    source_blocks: DescriptorList,
    max_piece_bytes: int,
) -> PeerLink:
    """Check the peer's geometry against the own and prepare its pages.

    Raises:
        KVLayoutMismatch: when no conversion leads from one pool to the other.
        PeerLost: when the transport cannot reach the memory.
    """
    theirs, ours = offer.regions.filled_by(own.regions), own.regions
    if theirs.num_regions != ours.num_regions or theirs.head_bytes != ours.head_bytes:
        raise KVLayoutMismatch(
            f"decode rank {name}: {theirs.num_regions} regions of {theirs.head_bytes} bytes a head, "
            f"this prefill has {ours.num_regions} of {ours.head_bytes}; serve the same model and KV dtype"
        )
    if own.model_dtype != offer.model_dtype:
        raise KVLayoutMismatch(
            f"decode rank {name} keeps KV as {offer.model_dtype}, this prefill as {own.model_dtype}; "
            "give both the same --kv-cache-dtype and --dtype"
        )
    part = _part_to_send(own, offer)
    whole = HeadSlice(0, 0, ours.row_bytes)
    is_same = part == whole and theirs.row_bytes == ours.row_bytes and theirs.page_size == ours.page_size
    blocks = None
    if is_same and theirs.is_dense and ours.is_dense:
        target = engine.prepare(name, page_blocks(theirs, offer.device), offer.kind)
        blocks = (source_blocks, target)
    piece_bytes = min(max_piece_bytes, offer.slot_bytes)
    copy_s = GPU_COPY_S if own.kind is MemoryKind.VRAM else HOST_COPY_S
    costs = PathCosts(copy_s_per_byte=copy_s)
    return PeerLink(name, offer, own, part, blocks, GrantedSlots(offer), piece_bytes, costs=costs)


def _part_to_send(own: RankPool, offer: PeerOffer) -> HeadSlice | None:
    """The heads that both ranks hold; None if there are none or another prefill rank sends the same."""
    if not is_first_replica(own.total_kv_heads, own.tp_size, own.tp_rank, offer.tp_size, offer.tp_rank):
        return None
    return head_slice(
        heads_of_rank(own.total_kv_heads, own.tp_size, own.tp_rank),
        heads_of_rank(offer.total_kv_heads, offer.tp_size, offer.tp_rank),
        own.regions.head_bytes,
    )


def page_blocks(regions: PagedRegions, device: int) -> StridedSpans:
    """Every page of every region as one strided span: block ``region * num_pages + page``."""
    rows = [
        (base, regions.page_size * regions.row_bytes, device, regions.page_bytes, regions.num_pages)
        for base in regions.bases
    ]
    return np.array(rows, dtype=np.uint64).reshape(-1, 5)


def _blocks(regions: Indices, pages: PageIds, num_pages: int) -> Indices:
    return (regions[:, None] * np.int32(num_pages) + pages[None, :]).reshape(-1).astype(np.int32, copy=False)
