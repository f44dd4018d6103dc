"""gather_pages / scatter_pages on a GPU: launches of the kernels in ``cuda/`` on a stream of their own.

The page ids of a piece go to the device through pinned memory on the same
stream, so a launch waits for nothing on the host; an event tells when the piece
may be written to the network, or counted as scattered. Order against the model's
own streams is the caller's: a chunk is handed over only when its pages are final.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pdserve.kv.coalesce import Completion, HostPageCopier, PageCopier, Piece, check_piece
from pdserve.kv.kernels import CopyParams, KernelLibrary
from pdserve.kv.layout import PagedRegions, PageIds

REGION_ALIGN = 256
"""cudaMalloc's alignment; a smaller one of the pools is found from their addresses."""


class _EventDone:
    """Done when the event has been reached. Holds what the launch still reads."""

    def __init__(self, event: Any, held: tuple[Any, ...]) -> None:
        self._event = event
        self._held = held

    def is_done(self) -> bool:
        """True once the copy is over on the device."""
        return bool(self._event.query())


class CudaPageCopier:
    """``PageCopier`` over device memory. Asynchronous; used from one thread.

    Args:
        regions: the pool, device addresses.
        device: CUDA device index.
        cache_dir: where the kernels are kept once built.

    Raises:
        ConfigError: when the kernels can neither be loaded nor built; the message says what is missing.
    """

    def __init__(self, regions: PagedRegions, device: int, *, cache_dir: str) -> None:
        import torch

        self.regions = regions
        self._torch = torch
        self._device = torch.device("cuda", device)
        self._library = KernelLibrary.for_device(Path(cache_dir), device)
        with torch.cuda.device(self._device):
            self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            bases = np.array(regions.bases, dtype=np.uint64).view(np.int64)
            self._bases = torch.from_numpy(bases).to(self._device)
            torch.cuda.synchronize(self._device)
        self._align = _common_alignment(regions.bases)

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Pack; returns at once."""
        return self._launch(self._library.gather, pages, piece, slab_address)

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Unpack; returns at once."""
        return self._launch(self._library.scatter, pages, piece, slab_address)

    def _launch(self, kernel: Any, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        check_piece(self.regions, pages, piece)
        torch, size = self._torch, self.regions.page_size
        first_page, last_page = piece.first_token // size, -(-(piece.first_token + piece.num_tokens) // size)
        ids = np.ascontiguousarray(pages[first_page:last_page], dtype=np.int32)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pinned = torch.from_numpy(ids).pin_memory()
            on_device = pinned.to(self._device, non_blocking=True)
            kernel(
                CopyParams(
                    region_ptrs=int(self._bases.data_ptr()),
                    page_ids=int(on_device.data_ptr()),
                    slab=slab_address,
                    slab_region_stride=piece.num_tokens * piece.slice_bytes,
                    token_stride=self.regions.token_stride,
                    slice_offset=piece.slice_offset,
                    slice_bytes=piece.slice_bytes,
                    page_size=size,
                    first_token=piece.first_token - first_page * size,
                    num_tokens=piece.num_tokens,
                    region_begin=piece.region_begin,
                    num_regions=piece.num_regions,
                    num_regions_total=self.regions.num_regions,
                    num_page_ids=len(ids),
                    region_align=self._align,
                ),
                int(self._stream.cuda_stream),
            )
            event = torch.cuda.Event()
            event.record(self._stream)
        return _EventDone(event, (pinned, on_device))


def make_copier(regions: PagedRegions, *, is_gpu: bool, device: int, cache_dir: str) -> PageCopier:
    """The copier for a pool in host memory or on GPU ``device``. Raises as ``CudaPageCopier``."""
    return CudaPageCopier(regions, device, cache_dir=cache_dir) if is_gpu else HostPageCopier(regions)


def _common_alignment(addresses: tuple[int, ...]) -> int:
    """The largest power of two up to ``REGION_ALIGN`` that divides every address."""
    align = REGION_ALIGN
    while any(address % align for address in addresses):
        align //= 2
    return align
