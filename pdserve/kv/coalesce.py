"""gather_pages / scatter_pages: between scattered KV pages and one contiguous slab piece.

A *piece* is a rectangle of a chunk: some regions by some tokens by one slice of
each token row. In the slab it lies densely::

    slab piece: [num_regions][num_tokens][slice_bytes]

so it does not depend on the page size, token stride or head count of either
side: the receiver scatters the same bytes into whatever its own pool is.

``HostPageCopier`` works on host memory at memory-copy speed; ``CudaPageCopier``
(cuda_copy.py) launches the kernels of ``cuda/``. Both take raw addresses: the
pools belong to SGLang.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pdserve.errors import KVLayoutMismatch
from pdserve.kv.layout import PagedRegions, PageIds

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Piece:
    """What part of a chunk is moved at once. Token positions count from the first page given with it."""

    region_begin: int
    num_regions: int
    first_token: int
    num_tokens: int
    slice_offset: int
    """First byte inside a token row of the pool that is read or written."""
    slice_bytes: int

    @property
    def region_end(self) -> int:
        """The first region behind the piece."""
        return self.region_begin + self.num_regions

    @property
    def nbytes(self) -> int:
        """Bytes of the piece in the slab."""
        return self.num_regions * self.num_tokens * self.slice_bytes


class Completion(Protocol):
    """Tells when an asynchronous copy is over."""

    def is_done(self) -> bool:
        """True once the copied bytes may be read, and the source overwritten."""


class PageCopier(Protocol):
    """Copies between one pool and slab memory of the same kind."""

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Pack ``piece`` of ``pages`` into the slab at ``slab_address``."""

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Unpack the slab at ``slab_address`` into ``piece`` of ``pages``."""


class _Done:
    def is_done(self) -> bool:
        return True


DONE: Completion = _Done()


def check_piece(regions: PagedRegions, pages: PageIds, piece: Piece) -> None:
    """Refuse a piece that would touch bytes outside ``pages`` or outside a token row.

    Raises:
        KVLayoutMismatch: naming the bound that is exceeded.
    """
    if piece.region_begin < 0 or piece.num_regions < 1 or piece.region_end > regions.num_regions:
        raise KVLayoutMismatch(
            f"regions {piece.region_begin}..{piece.region_end} are not within "
            f"the pool's {regions.num_regions}"
        )
    last_token = piece.first_token + piece.num_tokens
    if piece.first_token < 0 or piece.num_tokens < 1 or last_token > len(pages) * regions.page_size:
        raise KVLayoutMismatch(
            f"tokens {piece.first_token}..{last_token} are not within {len(pages)} pages "
            f"of {regions.page_size}"
        )
    last_byte = piece.slice_offset + piece.slice_bytes
    if piece.slice_offset < 0 or piece.slice_bytes < 1 or last_byte > regions.row_bytes:
        raise KVLayoutMismatch(
            f"bytes {piece.slice_offset}..{last_byte} are not within a token's {regions.row_bytes}"
        )
    if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= regions.num_pages):
        raise KVLayoutMismatch(
            f"page ids {int(pages.min())}..{int(pages.max())} are not within the pool's {regions.num_pages}"
        )


def host_bytes(address: int, nbytes: int) -> Bytes:
    """A writable view of host memory that somebody else owns and keeps alive."""
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memoryview(owner), dtype=np.uint8)


class HostPageCopier:
    """Copies in host memory, synchronously, in the widest words that fit.

    Whole dense pages are moved as rows of 8-byte words (byte-wise copies are 5
    times slower); a slice, a stride or a split page falls back to rows of the
    largest unit of tokens that is contiguous on both sides.
    """

    def __init__(self, regions: PagedRegions) -> None:
        self.regions = regions
        nbytes = regions.num_pages * regions.page_bytes
        self._pools = [host_bytes(base, nbytes) for base in regions.bases]
        self._views: dict[tuple[int, int, int, int], list[npt.NDArray[np.generic]]] = {}

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Pack; complete on return."""
        check_piece(self.regions, pages, piece)
        rows, index, slab = self._rows(pages, piece, slab_address)
        for number, pool in enumerate(rows):
            if pool.flags.c_contiguous:
                # take() copies row by row, but would first copy a pool that is not contiguous.
                np.take(pool, index, axis=0, out=slab[number], mode="clip")
            else:
                slab[number] = pool[index]
        return DONE

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Unpack; complete on return."""
        check_piece(self.regions, pages, piece)
        rows, index, slab = self._rows(pages, piece, slab_address)
        for number, pool in enumerate(rows):
            pool[index] = slab[number]
        return DONE

    def _rows(
        self, pages: PageIds, piece: Piece, slab_address: int
    ) -> tuple[list[npt.NDArray[np.generic]], npt.NDArray[np.int64], npt.NDArray[np.generic]]:
        """Pools as rows of one copy unit, the row numbers to touch, and the slab shaped alike."""
        unit = self._unit_tokens(piece)
        unit_bytes = piece.slice_bytes * unit
        word = math.gcd(unit_bytes, piece.slice_offset, self.regions.token_stride, slab_address, 8)
        word = math.gcd(word, *(base for base in self.regions.bases))
        index = _unit_rows(pages, self.regions.page_size, unit, piece.first_token, piece.num_tokens)
        views = self._pool_rows(unit, piece, word)
        slab = host_bytes(slab_address, piece.nbytes).view(f"u{word}")
        shape = (piece.num_regions, piece.num_tokens // unit, unit_bytes // word)
        return views[piece.region_begin : piece.region_end], index, slab.reshape(shape)

    def _unit_tokens(self, piece: Piece) -> int:
        """Tokens that are contiguous in the pool and lie within one page."""
        if piece.slice_bytes != self.regions.token_stride:
            return 1
        return math.gcd(self.regions.page_size, piece.first_token, piece.num_tokens)

    def _pool_rows(self, unit: int, piece: Piece, word: int) -> list[npt.NDArray[np.generic]]:
        key = (unit, piece.slice_bytes, piece.slice_offset, word)
        if key not in self._views:
            stride = unit * self.regions.token_stride
            rows = self.regions.num_pages * self.regions.page_size // unit
            self._views[key] = [
                np.ndarray(
                    (rows, piece.slice_bytes * unit // word),
                    dtype=f"u{word}",
                    buffer=pool,
                    offset=piece.slice_offset,
                    strides=(stride, word),
                )
                for pool in self._pools
            ]
        return self._views[key]


class NoCopier:
    """For a device without kernels: nothing may be packed, so nobody is offered slab space."""

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Refuse."""
        raise KVLayoutMismatch("KV cannot be packed here: there are no kernels for this GPU")

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Refuse."""
        raise KVLayoutMismatch("KV cannot be unpacked here: there are no kernels for this GPU")


def _unit_rows(
    pages: PageIds, page_size: int, unit: int, first_token: int, num_tokens: int
) -> npt.NDArray[np.int64]:
    """Row numbers, in units of ``unit`` tokens, of a token range of ``pages``. ``unit`` divides all three."""
    per_page = page_size // unit
    wide = pages.astype(np.int64)
    if per_page == 1:
        return wide[first_token // unit : (first_token + num_tokens) // unit]
    rows = (wide[:, None] * per_page + np.arange(per_page)).reshape(-1)
    return rows[first_token // unit : (first_token + num_tokens) // unit]
