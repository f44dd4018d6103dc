"""The kernels on a GPU: cases and a Llama-3.1-8B pool in torch memory, and a fair clock.

Used by tests/gpu and bench/gpu. Needs torch with CUDA; importing this module does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from cases import GUARD, Bytes, Case

from pdserve.kv.kernels import CopyParams

LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE, ELEMENT_BYTES = 32, 8, 128, 16, 2
"""Llama-3.1-8B in bfloat16 with FlashInfer pages of 16 tokens."""
ROW_BYTES = KV_HEADS * HEAD_DIM * ELEMENT_BYTES
REGIONS = 2 * LAYERS
TOKEN_BYTES = REGIONS * ROW_BYTES
"""128 KiB: K and V of one token in every layer."""


class DeviceBuffer:
    """A case's buffer on the device, guards included, at the same address modulo 64."""

    def __init__(self, content: Bytes, shift: int) -> None:
        self.raw = torch.zeros(len(content) + shift + 64, dtype=torch.uint8, device="cuda")
        start = -self.raw.data_ptr() % 64 + shift
        self.view = self.raw[start : start + len(content)]
        self.view.copy_(torch.from_numpy(content))
        self.address = int(self.view.data_ptr()) + GUARD

    def bytes(self) -> Bytes:
        """A copy on the host; waits for the device."""
        return self.view.cpu().numpy()


class DeviceCase:
    """The buffers of one case on the device, and the call for them."""

    def __init__(self, case: Case) -> None:
        self.pools = [DeviceBuffer(pool, case.pool_shift) for pool in case.pools]
        self.slab = DeviceBuffer(case.slab, case.slab_shift)
        self.page_ids = torch.from_numpy(np.append(case.page_ids, np.int32(0))).cuda()
        self.region_ptrs = device_addresses([pool.address for pool in self.pools])
        self.params = case.params(self.region_ptrs.data_ptr(), self.page_ids.data_ptr(), self.slab.address)


def device_addresses(addresses: Sequence[int]) -> torch.Tensor:
    """``uint64 [n]`` on the device, held as int64 bits."""
    return torch.from_numpy(np.array(addresses, np.uint64).view(np.int64)).cuda()


@dataclass(frozen=True, slots=True)
class LlamaCopy:
    """A pool, a slab and a random page table for some tokens; all heads or a range of them."""

    pool: torch.Tensor
    """``[64, num_pages, 16, 8, 128]`` bfloat16: K of 32 layers, then V."""
    slab: torch.Tensor
    """uint8, 1 byte per byte of the slices."""
    page_ids: torch.Tensor
    params: CopyParams
    keeps: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Payload: what is read once and written once."""
        return self.slab.numel()

    def expected(self) -> torch.Tensor:
        """The slab by torch indexing, uint8 ``[num_bytes]``."""
        first = self.params.slice_offset // (HEAD_DIM * ELEMENT_BYTES)
        heads = self.params.slice_bytes // (HEAD_DIM * ELEMENT_BYTES)
        rows = self.pool[:, self.page_ids.long()].reshape(REGIONS, -1, KV_HEADS, HEAD_DIM)
        begin = self.params.first_token
        rows = rows[:, begin : begin + self.params.num_tokens, first : first + heads]
        return rows.contiguous().view(torch.uint8).reshape(-1)


def llama_copy(num_tokens: int, *, seed: int, heads: tuple[int, int] = (0, KV_HEADS)) -> LlamaCopy:
    """Random bytes in a pool a quarter larger than needed, pages in random order, token 0 inside a page."""
    random = torch.Generator().manual_seed(seed)
    first_token = seed % PAGE_SIZE
    num_pages = -(-(first_token + num_tokens) // PAGE_SIZE)
    pool_pages = num_pages * 5 // 4 + 1
    shape = (REGIONS, pool_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    pool = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda").view(torch.bfloat16)
    page_ids = torch.randperm(pool_pages, generator=random)[:num_pages].to(torch.int32).cuda()
    slice_bytes = (heads[1] - heads[0]) * HEAD_DIM * ELEMENT_BYTES
    slab = torch.zeros(REGIONS * num_tokens * slice_bytes, dtype=torch.uint8, device="cuda")
    region_ptrs = device_addresses([pool[r].data_ptr() for r in range(REGIONS)])
    params = CopyParams(
        region_ptrs=region_ptrs.data_ptr(), page_ids=page_ids.data_ptr(), slab=slab.data_ptr(),
        slab_region_stride=num_tokens * slice_bytes, token_stride=ROW_BYTES,
        slice_offset=heads[0] * HEAD_DIM * ELEMENT_BYTES, slice_bytes=slice_bytes, page_size=PAGE_SIZE,
        first_token=first_token, num_tokens=num_tokens, region_begin=0, num_regions=REGIONS,
        num_regions_total=REGIONS, num_page_ids=num_pages, region_align=256,
    )  # fmt: skip
    return LlamaCopy(pool, slab, page_ids, params, (region_ptrs,))


def verify(copy: LlamaCopy, launch: Callable[[int], None], name: str) -> None:
    """Gather must make what torch indexing makes; other bytes, scattered, must be found in the pool.

    ``launch(1)`` gathers, ``launch(0)`` scatters. AssertionError names the one that failed.
    """
    copy.slab.zero_()
    launch(1)
    assert torch.equal(copy.slab, copy.expected()), f"{name}: gather made another slab"
    copy.slab.bitwise_not_()
    launch(0)
    assert torch.equal(copy.expected(), copy.slab), f"{name}: scatter left another pool"


def interleaved_seconds(
    calls: dict[str, Callable[[], Any]], *, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds per call of each name, one value a round, by CUDA events on the current stream.

    The names take turns within each round, so that clocks and neighbours disturb all alike. The first round
    warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            if turn > 0:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / repeats)
    return seconds


def median_gb_s(num_bytes: int, seconds: Sequence[float]) -> float:
    """Payload rate, 1 GB = 10^9 bytes; the memory system moves twice that."""
    return num_bytes / median(seconds) / 1e9
