"""Synthetic KV for trials: a pool of any geometry, filled with repeatable bytes, and its checksums."""

from __future__ import annotations

import zlib

import msgspec
import numpy as np
import numpy.typing as npt

from pdserve.kv.layout import PagedRegions, PageIds
from pdserve.kv.memory import Buffer
from pdserve.transfer.engine import MemoryKind


class TrialGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's pool and slab. ``seed`` fills the pool with repeatable bytes."""

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_bytes: int
    total_kv_heads: int = 0
    """0: as many as ``num_kv_heads``."""
    tp_size: int = 1
    tp_rank: int = 0
    gap_bytes: int = 0
    """Bytes between tokens that belong to nobody."""
    slab_bytes: int = 64 << 20
    slot_bytes: int = 2 << 20
    seed: int = 0
    gpu: int = -1
    """CUDA device of pool and slab; -1: host memory."""

    @property
    def kind(self) -> MemoryKind:
        """Where pool and slab lie."""
        return MemoryKind.DRAM if self.gpu < 0 else MemoryKind.VRAM

    @property
    def device(self) -> int:
        """Device id for the transport."""
        return max(0, self.gpu)

    @property
    def row_bytes(self) -> int:
        """One token in one region."""
        return self.num_kv_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.row_bytes

    @property
    def heads(self) -> int:
        """Heads of the whole model."""
        return self.total_kv_heads or self.num_kv_heads


def make_buffer(geometry: TrialGeometry, nbytes: int) -> Buffer:
    """Memory of the geometry's kind."""
    return Buffer(nbytes, is_gpu=geometry.kind is MemoryKind.VRAM, device=geometry.device)


class PoolSums(msgspec.Struct, tag=True, frozen=True):
    """CRC32 of the chosen bytes of every region, and of all other bytes together."""

    regions: list[int]
    untouched: int


class TrialPool:
    """Memory laid out as SGLang's pools."""

    def __init__(self, geometry: TrialGeometry) -> None:
        self.geometry = geometry
        stride = geometry.row_bytes + geometry.gap_bytes
        slots = geometry.num_pages * geometry.page_size
        rng = np.random.default_rng(geometry.seed)
        noise = rng.integers(0, 256, 1 << 20, dtype=np.uint8)
        self._regions: list[Buffer] = []
        for region in range(2 * geometry.num_layers):
            memory = np.empty(slots * stride, dtype=np.uint8)
            # Repeating noise, shifted per region: quick to make, and every page differs.
            for start in range(0, memory.nbytes, noise.nbytes):
                part = memory[start : start + noise.nbytes]
                part[:] = np.roll(noise, region * 4099 + start // noise.nbytes * 17)[: part.nbytes]
            buffer = make_buffer(geometry, memory.nbytes)
            buffer.write(memory)
            self._regions.append(buffer)
        self.regions = PagedRegions(
            bases=tuple(buffer.address for buffer in self._regions),
            num_pages=geometry.num_pages,
            page_size=geometry.page_size,
            row_bytes=geometry.row_bytes,
            token_stride=stride,
            num_kv_heads=geometry.num_kv_heads,
        )

    def spans(self) -> npt.NDArray[np.uint64]:
        """For registration."""
        device = self.geometry.device
        return np.array([(one.address, one.nbytes, device) for one in self._regions], dtype=np.uint64)

    def digest(self, pages: PageIds, num_tokens: int, first_head: int, num_heads: int) -> PoolSums:
        """CRC of the tokens' heads per region, and of every other byte of the pool."""
        size, geometry = self.geometry.page_size, self.geometry
        slots = (pages.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)[:num_tokens]
        sums, rest = [], 0
        for buffer in self._regions:
            tokens = buffer.read().reshape(-1, self.regions.token_stride)
            heads = tokens[slots, : geometry.row_bytes].reshape(num_tokens, -1, geometry.head_bytes)
            part = np.ascontiguousarray(heads[:, first_head : first_head + num_heads])
            sums.append(zlib.crc32(part.tobytes()))
            kept = tokens
            first = first_head * geometry.head_bytes
            kept[slots, first : first + num_heads * geometry.head_bytes] = 0
            rest = zlib.crc32(kept.tobytes(), rest)
        return PoolSums(sums, rest)
