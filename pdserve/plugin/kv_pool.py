"""SGLang's paged allocator with pages chosen by the segment allocator, and its KV pools on CPU.

Allocator: SGLang's kernels take pages from the head of ``free_pages`` in the order
of the requests. The pages are chosen here, on the host, and handed to them as
exactly that tensor; between calls ``free_pages`` is empty and the host-side
segments are the truth. On a GPU frees arrive as device tensors. They stay staged
until the host's own count is too small or the next prompt comes; its copy to the
host brings the requests' last pages too. A decode step reads nothing back: a
growing request takes from the smallest segment there, not the page after its last one.

Pools: on CPU a pool is refused before it is allocated if the machine cannot hold it.
Linux grants the memory and kills a process later; on a GPU the allocator itself
refuses. Servers that start together check and allocate one after the other, so
that the second sees what the first has taken.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from pdserve.kv.allocator import Pages, SegmentAllocator
from pdserve.process.scratch import SHARED_MEMORY

SLACK_PAGES = 8
"""Free pages wished for around a new run, for outputs to grow into: 128 tokens at pages of 16.

With them grown requests end in a third of the runs in a roomy pool (bench/churn.py, ``whole``)."""

SLACK_FREE_SHARE = 0.5
"""Only while so much of the pool stays free: in a fuller one the gaps cost new requests more runs."""


class PdservePagedAllocator(PagedTokenToKVPoolAllocator):
    """Same results as SGLang's allocator, in fewer runs of pages."""

    _segments: SegmentAllocator

    def clear(self) -> None:
        """Every page is free again."""
        super().clear()
        self._segments = SegmentAllocator(self.num_pages)
        self._staged: list[torch.Tensor] = []
        self._num_staged = 0
        self._no_pages = torch.empty(0, dtype=torch.int64, device=self.device)
        self.free_pages = self._no_pages

    def available_size(self) -> int:
        """Free tokens, staged frees included."""
        return int((self._segments.num_free + self._num_staged) * self.page_size)

    def get_all_free_pages(self) -> torch.Tensor:
        """All free pages, staged ones last. Changes nothing: SGLang's watchdog thread calls it too."""
        return torch.cat((self._upload(self._segments.free_pages()), *self._staged))

    def merge_and_sort_free(self) -> None:
        """Nothing. SGLang calls it inside an allocation, when the pages are chosen already.

        Reading staged frees back at that point would synchronise decode steps for no gain.
        """

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token slots of whole pages, in as few runs as possible."""
        count = need_size // self.page_size
        if count > self._segments.num_free:
            self._settle()
        pages = self._segments.alloc(count, slack_pages=self._slack(count))
        return self._hand_out(pages, lambda: super(PdservePagedAllocator, self).alloc(need_size))

    def alloc_extend(
        self, prefix_lens: torch.Tensor, prefix_lens_cpu: torch.Tensor, seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor, extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Slots for a batch of prompts; every request gets its own run, after its last page if it goes on."""
        size = self.page_size
        counts = (-(-seq_lens_cpu // size) - -(-prefix_lens_cpu // size)).tolist()
        prefixes = prefix_lens_cpu.tolist()
        goes_on = [bool(count and prefix) for count, prefix in zip(counts, prefixes, strict=True)]
        slots = self._settle(last_loc if any(goes_on) else None) or [0] * len(counts)
        lasts = [slot // size if goes else 0 for slot, goes in zip(slots, goes_on, strict=True)]
        wanted = sum(counts)
        parts = self._segments.alloc_each(counts, lasts, slack_pages=self._slack(wanted))
        pages = None if parts is None else np.concatenate([np.empty(0, dtype=np.int64), *parts])
        return self._hand_out(
            pages,
            lambda: super(PdservePagedAllocator, self).alloc_extend(
                prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens,
                num_new_pages=wanted,
            ),
        )  # fmt: skip

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One more slot per request; a new page is the one after the request's last if that is free."""
        needs = seq_lens_cpu.numpy() % self.page_size == 1
        count = int(np.count_nonzero(needs))
        if count > self._segments.num_free:
            self._settle()
        is_known = self._is_host and count
        lasts = (last_loc.numpy()[needs] // self.page_size).tolist() if is_known else [0] * count
        pages = self._segments.extend(lasts)
        return self._hand_out(
            pages, lambda: super(PdservePagedAllocator, self).alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        )

    @property
    def _is_host(self) -> bool:
        """Whether reading the pool's index tensors costs no synchronisation."""
        return torch.device(self.device).type == "cpu"

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        if self._is_host:
            for pages in page_ids:
                self._segments.free(pages.numpy())
            return
        self._staged.extend(page_ids)
        self._num_staged += sum(int(pages.numel()) for pages in page_ids)

    def _settle(self, last_loc: torch.Tensor | None = None) -> list[int]:
        """Free what is staged, and read ``last_loc``, both in one copy to the host."""
        wanted = [] if last_loc is None else [last_loc]
        if not wanted and not self._staged:
            return []
        values = self._to_host(torch.cat((*wanted, *self._staged)))
        self._staged, self._num_staged = [], 0
        num_slots = sum(len(slots) for slots in wanted)
        self._segments.free(values[num_slots:])
        return [int(slot) for slot in values[:num_slots].tolist()]

    def _slack(self, num_pages: int) -> int:
        """Room to leave around a new run; none on a GPU, whose growing requests do not use it."""
        is_plentiful = self._segments.num_free - num_pages > SLACK_FREE_SHARE * self.num_pages
        return SLACK_PAGES if is_plentiful and self._is_host else 0

    def _hand_out(self, pages: Pages | None, take: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Let SGLang's method use up exactly ``pages``; they are free again if it refuses or raises."""
        if pages is None:
            return None
        self.free_pages = self._upload(pages)
        slots = None
        try:
            slots = take()
            assert slots is None or not len(self.free_pages), f"{len(self.free_pages)} chosen pages unused"
            return slots
        finally:
            self.free_pages = self._no_pages
            if slots is None:
                self._segments.free(pages)

    def _to_host(self, values: torch.Tensor) -> Pages:
        return np.asarray(values.cpu().numpy(), dtype=np.int64)

    def _upload(self, pages: Pages) -> torch.Tensor:
        if len(pages) == 0:
            return self._no_pages
        host = torch.from_numpy(pages)
        # A copy from pageable memory synchronises the stream; one from pinned memory does not.
        return host if self._is_host else host.pin_memory().to(self.device, non_blocking=True)


RESERVE_SHARE = 0.05
"""Part of the machine's memory that no pool may take: weights' temporaries, page tables, the kernel."""


class PdserveMHAPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.head_num * (self.head_dim + self.v_head_dim) * self.store_dtype.itemsize)
        with _one_server_at_a_time():
            _check_this_machine(slots * row * int(self.layer_num), slots)
            super()._create_buffers()


class PdserveMLAPool(MLATokenToKVPool):
    """``MLATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.kv_cache_dim * self.store_dtype.itemsize)
        with _one_server_at_a_time():
            _check_this_machine(slots * row * int(self.layer_num), slots)
            super()._create_buffers()


def check_fits(pool_bytes: int, num_tokens: int, free_bytes: int) -> None:
    """Raise RuntimeError, in the words the launcher looks for, if the pool is larger than what is free."""
    if pool_bytes > free_bytes:
        raise RuntimeError(
            f"Not enough memory: a KV pool of {num_tokens} tokens needs {pool_bytes / 1e9:.1f} GB, "
            f"this machine has {free_bytes / 1e9:.1f} GB to give; use a lower --max-total-tokens"
        )


def _check_this_machine(pool_bytes: int, num_tokens: int) -> None:
    memory = psutil.virtual_memory()
    check_fits(pool_bytes, num_tokens, int(memory.available - RESERVE_SHARE * memory.total))


@contextlib.contextmanager
def _one_server_at_a_time() -> Iterator[None]:
    # The kernel lets go of the lock when the holder dies, however it dies.
    with (SHARED_MEMORY / "pdserve-pools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
