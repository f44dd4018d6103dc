"""What the kernels must do, in numpy: slow, obvious, and the health of every build.

Same arguments as CopyParams and Fp8Params (pdserve/kv/kernels.py), with arrays in place of addresses. Pools
and slabs are flat uint8 arrays per region, so that strides and offsets are as free as in the kernels.

    page, slot = divmod(first_token + t, page_size)
    slab[r][t] = pools[region_begin + r][page_ids[page]][slot][slice_offset : slice_offset + slice_bytes]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
E4M3_MAX = np.float32(448.0)
SMALLEST_SCALE = np.float32(2.0**-120)


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


def e4m3_values() -> NDArray[np.float32]:
    """``[256]`` what each e4m3 byte stands for (OCP FP8: bias 7, no infinity, 0x7f and 0xff are NaN)."""
    values = np.empty(256, np.float32)
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values[byte] = np.nan if byte & 0x7F == 0x7F else -magnitude if byte & 0x80 else magnitude
    return values


def to_e4m3(x: NDArray[np.float32]) -> Bytes:
    """Round to nearest, ties to the even byte; beyond 448 saturates; any NaN becomes 0x7f."""
    grid = e4m3_values()[:127].astype(np.float64)
    magnitude = np.minimum(np.where(np.isnan(x), np.float32(0), np.abs(x)).astype(np.float64), 448.0)
    above = np.searchsorted(grid, magnitude).clip(1, 126)
    low, high = magnitude - grid[above - 1], grid[above] - magnitude
    up = (high < low) | ((high == low) & (above % 2 == 0))
    byte = np.where(up, above, above - 1).astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)
    return np.where(np.isnan(x), np.uint8(0x7F), byte)


def half_to_float(half: NDArray[np.uint16], *, is_bf16: bool) -> NDArray[np.float32]:
    """Bits of float16 or bfloat16 as float32; exact."""
    if is_bf16:
        return (half.astype(np.uint32) << 16).view(np.float32)
    return half.view(np.float16).astype(np.float32)


def float_to_half(x: NDArray[np.float32], *, is_bf16: bool) -> NDArray[np.uint16]:
    """Round to nearest, ties to even. Every NaN becomes the positive quiet one."""
    bits = x.view(np.uint32)
    if is_bf16:
        rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7E00), rounded)


@dataclass(frozen=True, slots=True)
class ScaleGeometry:
    """The numbers of Fp8Params beyond the copy."""

    head_dim: int
    is_bf16: bool
    scale_page_size: int
    scale_first_token: int


def scales_of(s: ScaleGeometry, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[pages, heads]`` scales of ``x`` ``[tokens, heads, head_dim]``: largest finite magnitude / 448."""
    page = (np.arange(len(x)) + s.scale_first_token) // s.scale_page_size
    largest = np.where(np.isfinite(x), np.abs(x), np.float32(0)).max(axis=2)
    scales = np.zeros((page[-1] + 1, x.shape[1]), np.float32)
    np.maximum.at(scales, page, largest)
    scaled = (scales / E4M3_MAX).astype(np.float32)
    return np.where(scales > 0, np.maximum(scaled, SMALLEST_SCALE), np.float32(0)).astype(np.float32)


def quantise(s: ScaleGeometry, rows: Bytes) -> tuple[Bytes, NDArray[np.float32]]:
    """e4m3 bytes ``[tokens, heads * head_dim]`` and scales ``[pages, heads]`` of packed 16-bit rows."""
    x = half_to_float(np.ascontiguousarray(rows).view(np.uint16), is_bf16=s.is_bf16)
    x = x.reshape(len(rows), -1, s.head_dim)
    scales = scales_of(s, x)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0)).astype(np.float32)
        page = (np.arange(len(x)) + s.scale_first_token) // s.scale_page_size
        return to_e4m3(x * inverse[page][:, :, None]).reshape(len(rows), -1), scales


def dequantise(s: ScaleGeometry, rows: Bytes, scales: NDArray[np.float32]) -> Bytes:
    """The inverse: packed half-precision rows, as bytes ``[tokens, 2 * heads * head_dim]``."""
    page = (np.arange(len(rows)) + s.scale_first_token) // s.scale_page_size
    x = e4m3_values()[rows].reshape(len(rows), -1, s.head_dim) * scales[page][:, :, None]
    return float_to_half(x.astype(np.float32), is_bf16=s.is_bf16).view(np.uint8).reshape(len(rows), -1)


def fp8_round_trip(
    g: Geometry,
    s: ScaleGeometry,
    pools: Sequence[Bytes],
    page_ids: NDArray[np.int32],
    slab: Bytes,
    guard: int,
) -> tuple[Bytes, list[Bytes], NDArray[np.float32]]:
    """Slab after gather_fp8, pools after scatter_fp8, scales. Buffers carry ``guard`` bytes on each side."""
    slab, pools = slab.copy(), [pool.copy() for pool in pools]
    inner = [pool[guard : len(pool) - guard] for pool in pools]
    rows = np.zeros((g.num_tokens, g.slice_bytes), np.uint8)
    scales = []
    for region in range(g.num_regions):
        one = replace(g, region_begin=g.region_begin + region, num_regions=1)
        gather(one, inner, page_ids, rows.reshape(-1))
        packed, scale = quantise(s, rows)
        at = guard + region * g.slab_region_stride
        slab[at : at + packed.size] = packed.reshape(-1)
        scatter(one, inner, page_ids, dequantise(s, packed, scale).reshape(-1))
        scales.append(scale)
    return slab, pools, np.stack(scales)
