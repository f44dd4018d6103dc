"""What the two ends of a transfer tell each other.

``PeerOffer`` travels once, decode to prefill, with SGLang's registration.
``Arrival`` rides on a write, prefill to decode. The rest goes over the control
connections and is about slots of the decode rank's slab, see slots.py: ``Credit``
to the prefill, ``Void`` and ``Ask`` to the decode rank.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from pdserve.errors import ProtocolMismatch
from pdserve.kv.coalesce import Piece
from pdserve.kv.layout import PagedRegions
from pdserve.transfer.engine import MemoryKind

_T = TypeVar("_T")

PROTOCOL_VERSION = 2
"""Both sides must speak the same.

1: a window of the slab for each prefill rank. 2: slots, leased one by one; regions lie layer by layer.
"""


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """A slot that the prefill rank may write one piece to; a decode rank gives a lease number once."""

    lease: int
    slot: int


class PeerOffer(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A decode rank's pool and slab, as one prefill rank may write to them."""

    version: int
    instance_id: str
    bases: tuple[int, ...]
    num_pages: int
    page_size: int
    row_bytes: int
    token_stride: int
    num_kv_heads: int
    total_kv_heads: int
    tp_size: int
    tp_rank: int
    memory: str
    device: int
    holder: int
    """What the decode rank calls this prefill rank in messages about slots; new with every registration."""
    slab_address: int
    slot_bytes: int
    """0: no slab; only direct writes."""
    grants: tuple[Grant, ...] = ()
    model_dtype: str = ""
    num_draft_regions: int = 0

    @property
    def regions(self) -> PagedRegions:
        """The pool's geometry."""
        return PagedRegions(
            bases=self.bases,
            num_pages=self.num_pages,
            page_size=self.page_size,
            row_bytes=self.row_bytes,
            token_stride=self.token_stride,
            num_kv_heads=self.num_kv_heads,
            num_draft_regions=self.num_draft_regions,
        )

    @property
    def kind(self) -> MemoryKind:
        """Where pool and slab lie."""
        return MemoryKind(self.memory)


class SlabPiece(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """In which slot a piece lies, from its start, and which part of the room's pages it is."""

    lease: int
    region_begin: int
    num_regions: int
    first_token: int
    """Token position counted from the room's first page at the decode rank."""
    num_tokens: int
    slice_offset: int
    slice_bytes: int

    @property
    def piece(self) -> Piece:
        """As the copier takes it."""
        return Piece(
            self.region_begin,
            self.num_regions,
            self.first_token,
            self.num_tokens,
            self.slice_offset,
            self.slice_bytes,
        )


class Arrival(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """One write of a room has landed: in the pages, or in the slab when ``slab`` says where."""

    room: int
    rank: int
    seq: int
    total: int = 0
    """All messages of this rank for the room, once it is known; 0 before."""
    slab: SlabPiece | None = None


class Credit(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """News of a decode rank's slots for one prefill rank."""

    agent: str
    """The decode rank's transport name."""
    holder: int
    over: list[int] = []
    """Leases whose piece is done with; the slots are not the prefill's any more."""
    grants: list[Grant] = []
    recall: list[int] = []
    """Leases to give back by ``Void`` unless they are in use: others need the slots."""
    scatter_s: float = 0.0
    """Time the decode rank spent on the pieces that are over."""


class Void(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Nothing is written under these leases any more, and arrivals of them must not be acted on."""

    holder: int
    leases: list[int]


class Ask(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The prefill has pieces waiting for so many slots more than it holds."""

    holder: int
    num_slots: int


Control = Credit | Void | Ask
"""What travels over the control connections."""


class _OfferVersion(msgspec.Struct, tag="PeerOffer", frozen=True):
    """What an offer of any version has."""

    version: int


_VERSION = msgspec.msgpack.Decoder(_OfferVersion)
_ARRIVAL = msgspec.msgpack.Decoder(Arrival)
_OFFER = msgspec.msgpack.Decoder(PeerOffer)
_CONTROL: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Credit | Void | Ask)


def encode(message: msgspec.Struct) -> bytes:
    """Any message of this module as bytes."""
    return msgspec.msgpack.encode(message)


def decode_arrival(raw: bytes) -> Arrival:
    """Raises ProtocolMismatch for anything else."""
    return _decode(_ARRIVAL, raw)


def decode_control(raw: bytes) -> Control:
    """Raises ProtocolMismatch for anything else."""
    return _decode(_CONTROL, raw)


def decode_offer(raw: bytes) -> PeerOffer:
    """Raises ProtocolMismatch for anything else, and for another version."""
    version = _decode(_VERSION, raw).version
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"it speaks version {version} of pdserve's data plane, this server version {PROTOCOL_VERSION}; "
            "run one version of pdserve on all servers"
        )
    return _decode(_OFFER, raw)


def _decode(decoder: msgspec.msgpack.Decoder[_T], raw: bytes) -> _T:
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError as exc:
        raise ProtocolMismatch(f"not a data-plane message ({len(raw)} bytes): {exc}") from exc
