"""What the two ends of a transfer tell each other.

``PeerOffer`` travels once, decode to prefill, with SGLang's registration.
``Arrival`` rides on a write, prefill to decode. ``Credit`` goes back over the
control connection when slab space is free again; ``Void`` asks for space whose
arrival was never acted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from pdserve.errors import ProtocolMismatch
from pdserve.kv.coalesce import Piece
from pdserve.kv.layout import PagedRegions
from pdserve.transfer.engine import MemoryKind

_T = TypeVar("_T")

PROTOCOL_VERSION = 1
"""1: first. Both sides must be equal: a prefill treats another version as a stock decode server."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the slab that one prefill rank writes to."""

    number: int
    address: int
    nbytes: int


class PeerOffer(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A decode rank's pool and slab window, as one prefill rank may write to them."""

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
    window: int
    """Number of the window, to be given back in every ``Arrival``."""
    window_address: int
    window_bytes: int
    """0: no window was left; only direct writes."""
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
    """Where in a window a piece lies, and which part of the room's pages it is."""

    window: int
    generation: int
    offset: int
    """Bytes from the start of the window."""
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
    """These pieces of the window are free again."""

    agent: str
    """The decode rank's transport name."""
    window: int
    generations: list[int]
    scatter_s: float = 0.0
    """Time the decode rank spent on them."""


class Void(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The prefill asks for these pieces back: their arrivals must not be acted on any more."""

    window: int
    generations: list[int]


Control = Credit | Void
"""What travels over the control connection."""

_ARRIVAL = msgspec.msgpack.Decoder(Arrival)
_OFFER = msgspec.msgpack.Decoder(PeerOffer)
_CONTROL: msgspec.msgpack.Decoder[Credit | Void] = msgspec.msgpack.Decoder(Credit | Void)


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
    offer = _decode(_OFFER, raw)
    if offer.version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"peer speaks data-plane version {offer.version}, this pdserve {PROTOCOL_VERSION}"
        )
    return offer


def _decode(decoder: msgspec.msgpack.Decoder[_T], raw: bytes) -> _T:
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError as exc:
        raise ProtocolMismatch(f"not a data-plane message ({len(raw)} bytes): {exc}") from exc
