"""Seeded random copies, awkward on purpose: odd strides, offsets, page sizes, alignments, partial pages.

One case holds the buffers before the copy as bytes; the CPU test copies them in host memory, the GPU test on
the device. Every buffer has guard bytes on both sides, and a test compares whole buffers, so that a byte
written outside its place is seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from reference import Geometry

from pdserve.kv.kernels import CopyParams

Bytes = NDArray[np.uint8]
GUARD = 64
"""Bytes of guard on each side; a multiple of the widest vector, so that it moves no alignment."""


@dataclass(frozen=True, slots=True)
class Case:
    """One copy. Buffers start GUARD + shift bytes into an allocation that is aligned to 64 bytes."""

    geometry: Geometry
    pools: list[Bytes]
    page_ids: NDArray[np.int32]
    slab: Bytes
    pool_shift: int
    slab_shift: int
    max_blocks: int

    @property
    def region_align(self) -> int:
        """What is true of every pool base, at most 64 bytes."""
        return 64 if self.pool_shift == 0 else self.pool_shift & -self.pool_shift

    def params(self, region_ptrs: int, page_ids: int, slab: int) -> CopyParams:
        """The call for these addresses."""
        return CopyParams(
            region_ptrs=region_ptrs, page_ids=page_ids, slab=slab, **asdict(self.geometry),
            num_regions_total=len(self.pools), num_page_ids=len(self.page_ids),
            region_align=self.region_align, max_blocks=self.max_blocks,
        )  # fmt: skip


def aligned_bytes(num_bytes: int, shift: int) -> Bytes:
    """``num_bytes`` zero bytes whose address is ``shift`` modulo 64, with GUARD bytes before and after."""
    raw = np.zeros(num_bytes + 2 * GUARD + shift + 64, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    return raw[start : start + num_bytes + 2 * GUARD]


def _random_bytes(rng: np.random.Generator, num_bytes: int, shift: int) -> Bytes:
    buffer = aligned_bytes(num_bytes, shift)
    buffer[:] = rng.integers(0, 256, len(buffer), np.uint8)
    return buffer


def _page_table(rng: np.random.Generator, num_pages: int) -> tuple[NDArray[np.int32], int]:
    """Distinct pages in random order, and how many pages the pool has."""
    pool_pages = num_pages + int(rng.integers(0, 4))
    return rng.permutation(pool_pages)[:num_pages].astype(np.int32), max(pool_pages, 1)


def _row(rng: np.random.Generator, unit: int) -> tuple[int, int, int]:
    """Token stride, slice offset, slice bytes: heads of ``unit`` bytes, a range of them, maybe padding."""
    heads = int(rng.integers(1, 9))
    if rng.random() < 0.35:
        return heads * unit, 0, heads * unit
    first, last = sorted(int(x) for x in rng.integers(0, heads + 1, 2))
    last = max(last, first + 1)
    heads = max(heads, last)
    padding = int(rng.integers(0, 3)) * (unit if rng.random() < 0.7 else 1)
    return heads * unit + padding, first * unit, (last - first) * unit


def random_case(seed: int) -> Case:
    """Any shape the copy accepts, small enough to run every lane in turn on a CPU."""
    rng = np.random.default_rng(seed)
    unit = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]))
    token_stride, slice_offset, slice_bytes = _row(rng, unit)
    page_size = int(rng.choice([1, 2, 3, 16, 64, rng.integers(1, 65)]))
    num_tokens = int(rng.integers(0, 100)) if rng.random() < 0.95 else 0
    first_token = int(rng.integers(0, page_size))
    total = int(rng.integers(1, 6))
    begin = int(rng.integers(0, total))
    count = int(rng.integers(1, total - begin + 1))
    slack = int(rng.choice([0, 1, 5, 16, 64]))
    geometry = Geometry(
        num_tokens * slice_bytes + slack, token_stride, slice_offset, slice_bytes,
        page_size, first_token, num_tokens, begin, count,
    )  # fmt: skip
    return _with_buffers(rng, geometry, total)


def _with_buffers(rng: np.random.Generator, geometry: Geometry, num_pools: int) -> Case:
    pages = -(-(geometry.first_token + geometry.num_tokens) // geometry.page_size)
    page_ids, pool_pages = _page_table(rng, pages)
    pool_shift = int(rng.choice([0, 0, 16, 8, 4, 2, 1]))
    slab_shift = int(rng.choice([0, 0, 16, 8, 4, 2, 1]))
    pool_bytes = pool_pages * geometry.page_size * geometry.token_stride
    pools = [_random_bytes(rng, pool_bytes, pool_shift) for _ in range(num_pools)]
    slab = _random_bytes(rng, geometry.num_regions * geometry.slab_region_stride, slab_shift)
    return Case(geometry, pools, page_ids, slab, pool_shift, slab_shift, int(rng.choice([0, 0, 1, 3])))


def inner(buffer: Bytes) -> Bytes:
    """The buffer without its guards."""
    return buffer[GUARD:-GUARD]
