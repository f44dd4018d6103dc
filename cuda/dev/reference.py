"""What the kernels must do, in numpy: slow, obvious, and the health of every build.

Same arguments as CopyParams (pdserve/kv/kernels.py), with arrays in place of addresses. Pools
and slabs are flat uint8 arrays per region, so that strides and offsets are as free as in the kernels.

    page, slot = divmod(first_token + t, page_size)
    slab[r][t] = pools[region_begin + r][page_ids[page]][slot][slice_offset : slice_offset + slice_bytes]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers of CopyParams that describe where bytes are."""

    slab_region_stride: int
    token_stride: int
    slice_offset: int
    slice_bytes: int
    page_size: int
    first_token: int
    num_tokens: int
    region_begin: int
    num_regions: int


def token_rows(g: Geometry, page_ids: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Each token with the byte offset of its slice in a pool region."""
    for token in range(g.num_tokens):
        place = g.first_token + token
        slot = int(page_ids[place // g.page_size]) * g.page_size + place % g.page_size
        yield token, slot * g.token_stride + g.slice_offset


def gather(g: Geometry, pools: Sequence[Bytes], page_ids: NDArray[np.int32], slab: Bytes) -> None:
    """Copy token slices of the pools into ``slab``, packed; bytes outside them keep their value."""
    for region in range(g.num_regions):
        for token, row in token_rows(g, page_ids):
            at = region * g.slab_region_stride + token * g.slice_bytes
            slab[at : at + g.slice_bytes] = pools[g.region_begin + region][row : row + g.slice_bytes]


def scatter(g: Geometry, pools: Sequence[Bytes], page_ids: NDArray[np.int32], slab: Bytes) -> None:
    """The inverse: copy packed slices of ``slab`` into the pools."""
    for region in range(g.num_regions):
        for token, row in token_rows(g, page_ids):
            at = region * g.slab_region_stride + token * g.slice_bytes
            pools[g.region_begin + region][row : row + g.slice_bytes] = slab[at : at + g.slice_bytes]
