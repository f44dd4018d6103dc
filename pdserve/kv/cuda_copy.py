"""gather_pages / scatter_pages on a GPU: launches of the kernels in ``cuda/`` on a stream of their own.

The page ids of a chunk go to the device once, through pinned memory on the same
stream, so a launch waits for nothing on the host; an event tells when a piece
may be written to the network, or counted as scattered. Order against the model's
own streams is the caller's: a chunk is handed over only when its pages are final.

What is asked of CUDA is a ``DeviceRuntime``; tests run the copier over one whose
stream runs late and whose freed memory is overwritten (tests/support/late_device.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pdserve.kv.coalesce import Completion, HostPageCopier, PageCopier, Piece, check_piece
from pdserve.kv.kernels import CopyParams, KernelLibrary
from pdserve.kv.layout import PagedRegions, PageIds

REGION_ALIGN = 256
"""cudaMalloc's alignment; a smaller one of the pools is found from their addresses."""

MAX_PAGE_TABLES = 64
"""Chunks whose page ids stay on the device between their pieces; 4 bytes a page."""


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """Bytes on the device, valid behind what the stream has been given, and while this object lives."""

    address: int
    owner: Any


class DeviceRuntime(Protocol):
    """One stream of a GPU, and what a copier asks of it. Used from one thread."""

    @property
    def stream(self) -> int:
        """``cudaStream_t`` as an integer."""

    def upload(self, values: npt.NDArray[np.generic]) -> DeviceArray:
        """Copy to the device behind the stream's work so far. ``values`` may change afterwards."""

    def record(self) -> Callable[[], bool]:
        """Whether the stream has done its work so far, to be asked later."""


class TorchRuntime:
    """A stream of torch's high-priority pool, or one that is given.

    SGLang's streams come from the normal pool of 32, round robin; one of those could be
    the very stream that forwards run on. With priority a copy also starts between two
    kernels of a forward, not behind the whole of it.
    """

    def __init__(self, device: int, stream: Any = None) -> None:
        """``stream``: ``torch.cuda.Stream`` of whoever else works there."""
        import torch

        self._torch = torch
        self._device = torch.device("cuda", device)
        self._stream: Any = stream or torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """``cudaStream_t`` as an integer."""
        return int(self._stream.cuda_stream)

    def upload(self, values: npt.NDArray[np.generic]) -> DeviceArray:
        """Through pinned memory, so that the host waits for nothing."""
        with self._torch.cuda.stream(self._stream):
            pinned = self._torch.from_numpy(values).pin_memory()
            on_device = pinned.to(self._device, non_blocking=True)
        return DeviceArray(int(on_device.data_ptr()), (pinned, on_device))

    def record(self) -> Callable[[], bool]:
        """The query of a CUDA event."""
        with self._torch.cuda.device(self._device):
            event: Any = self._torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return lambda: bool(event.query())


class _EventDone:
    """Done when the event has been reached. Holds what the launch still reads."""

    def __init__(self, has_passed: Callable[[], bool], held: DeviceArray) -> None:
        self._has_passed = has_passed
        self._held = held

    def is_done(self) -> bool:
        """True once the copy is over on the device."""
        return self._has_passed()


class CudaPageCopier:
    """``PageCopier`` over device memory. Asynchronous; used from one thread.

    Args:
        regions: the pool, device addresses.
        library: the kernels.
        runtime: the stream they run on.
    """

    def __init__(self, regions: PagedRegions, library: KernelLibrary, runtime: DeviceRuntime) -> None:
        self.regions = regions
        self._library = library
        self._runtime = runtime
        self._bases = runtime.upload(np.array(regions.bases, dtype=np.uint64).view(np.int64))
        self._align = _common_alignment(regions.bases)
        self._tables: deque[tuple[PageIds, DeviceArray]] = deque(maxlen=MAX_PAGE_TABLES)

    def gather_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Pack; returns at once."""
        return self._launch(self._library.gather, pages, piece, slab_address)

    def scatter_pages(self, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        """Unpack; returns at once."""
        return self._launch(self._library.scatter, pages, piece, slab_address)

    def _launch(self, kernel: Any, pages: PageIds, piece: Piece, slab_address: int) -> Completion:
        check_piece(self.regions, pages, piece)
        size = self.regions.page_size
        first_page, last_page = piece.first_token // size, -(-(piece.first_token + piece.num_tokens) // size)
        table = self._table(pages)
        kernel(
            CopyParams(
                region_ptrs=self._bases.address,
                page_ids=table.address + 4 * first_page,
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
                num_page_ids=last_page - first_page,
                region_align=self._align,
            ),
            self._runtime.stream,
        )
        return _EventDone(self._runtime.record(), table)

    def _table(self, pages: PageIds) -> DeviceArray:
        """The chunk's page ids on the device. The same array is the same chunk: nobody changes one."""
        for known, table in self._tables:
            if known is pages:
                return table
        table = self._runtime.upload(np.ascontiguousarray(pages, dtype=np.int32))
        self._tables.append((pages, table))
        return table


def make_copier(regions: PagedRegions, *, is_gpu: bool, device: int, cache_dir: str) -> PageCopier:
    """The copier for a pool in host memory or on GPU ``device``.

    Raises:
        ConfigError: on a GPU, when the kernels can neither be loaded nor built; says what is missing.
    """
    if not is_gpu:
        return HostPageCopier(regions)
    return CudaPageCopier(regions, KernelLibrary.for_device(Path(cache_dir), device), TorchRuntime(device))


def _common_alignment(addresses: tuple[int, ...]) -> int:
    """The largest power of two up to ``REGION_ALIGN`` that divides every address."""
    align = REGION_ALIGN
    while any(address % align for address in addresses):
        align //= 2
    return align
