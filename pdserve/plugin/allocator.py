"""SGLang's paged allocator with pages chosen by the segment allocator.

SGLang's kernels take pages from the head of ``free_pages`` in the order of the
requests. So the pages are chosen here, on the host, and handed to them as
exactly that tensor; between calls ``free_pages`` is empty and the host-side
segments are the truth.

On a GPU frees arrive as device tensors. They are kept until an allocation comes
(SGLang copies page indices to the host at every chunk anyway), and a growing
request is not asked for its last page, which would cost a synchronisation per
decode step: it takes from the smallest segment.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from pdserve.kv.allocator import Pages, SegmentAllocator

SLACK_PAGES = 4
"""Pages tried to be left behind a new request's run, for its output: 64 tokens at pages of 16."""

SLACK_FREE_SHARE = 0.25
"""Only while so much of the pool is free: in a fuller one gaps cost runs (bench/churn.py)."""


class PdservePagedAllocator(PagedTokenToKVPoolAllocator):
    """Same results as SGLang's allocator, in fewer runs of pages."""

    _segments: SegmentAllocator

    def clear(self) -> None:
        """Every page is free again."""
        super().clear()
        self._segments = SegmentAllocator(self.num_pages)
        self._pending: list[torch.Tensor] = []
        self._num_pending = 0
        self._is_host = torch.device(self.device).type == "cpu"
        self.free_pages = self._tensor(None)

    @property
    def num_free_segments(self) -> int:
        """Maximal runs of free pages; staged frees are not in it yet."""
        return self._segments.num_segments

    @property
    def largest_free_segment(self) -> int:
        """Pages of the longest run."""
        return self._segments.largest_segment

    def available_size(self) -> int:
        """Free tokens, staged frees included."""
        return int((self._segments.num_free + self._num_pending) * self.page_size)

    def get_all_free_pages(self) -> torch.Tensor:
        """All free pages in order, on the pool's device."""
        self.merge_and_sort_free()
        return self._tensor(self._segments.free_pages())

    def merge_and_sort_free(self) -> None:
        """Bring staged frees to the host. ``free_pages`` may hold a choice in progress and is left alone."""
        if not self._pending:
            return
        pages = torch.cat(self._pending).cpu().numpy()
        self._pending, self._num_pending = [], 0
        self._segments.free(pages)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token slots of whole pages, in as few runs as possible."""
        pages = self._choose(need_size // self.page_size)
        if pages is None:
            return None
        self.free_pages = self._tensor(pages)
        return self._given_out(super().alloc(need_size), pages)

    def alloc_extend(
        self, prefix_lens: torch.Tensor, prefix_lens_cpu: torch.Tensor, seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor, extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Slots for a batch of prompts; every request gets its own run, after its last page if it goes on."""
        size = self.page_size
        counts = (-(-seq_lens_cpu // size) - -(-prefix_lens_cpu // size)).tolist()
        self.merge_and_sort_free()
        if sum(counts) > self._segments.num_free:
            return None
        lasts = self._last_pages(last_loc, prefix_lens_cpu, counts)
        parts = []
        for count, last in zip(counts, lasts, strict=True):
            part = self._segments.alloc_after(last, count, slack_pages=self._slack(count))
            assert part is not None
            parts.append(part)
        pages = _concatenate(parts)
        self.free_pages = self._tensor(pages)
        slots = super().alloc_extend(
            prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens,
            num_new_pages=sum(counts),
        )  # fmt: skip
        return self._given_out(slots, pages)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One more slot per request; a new page is the one after the request's last if that is free."""
        needs = (
            seq_lens_cpu % self.page_size == 1 if self.page_size > 1 else torch.ones_like(seq_lens_cpu) > 0
        )
        count = int(needs.sum())
        if count > self._segments.num_free:
            self.merge_and_sort_free()
        is_known = self._is_host and count
        lasts = (last_loc[needs] // self.page_size).tolist() if is_known else [0] * count
        pages = self._segments.extend(lasts)
        if pages is None:
            return None
        self.free_pages = self._tensor(pages)
        return self._given_out(super().alloc_decode(seq_lens, seq_lens_cpu, last_loc), pages)

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        if self._is_host:
            for pages in page_ids:
                self._segments.free(pages.numpy())
            return
        self._pending.extend(page_ids)
        self._num_pending += sum(int(pages.numel()) for pages in page_ids)

    def _choose(self, num_pages: int) -> Pages | None:
        if num_pages > self._segments.num_free:
            self.merge_and_sort_free()
        return self._segments.alloc(num_pages, slack_pages=self._slack(num_pages))

    def _slack(self, num_pages: int) -> int:
        is_plentiful = self._segments.num_free - num_pages > SLACK_FREE_SHARE * self.num_pages
        return SLACK_PAGES if is_plentiful else 0

    def _last_pages(self, last_loc: torch.Tensor, prefix_lens: torch.Tensor, counts: list[int]) -> list[int]:
        """Page each request ends on so far; 0 for a new one, and on a GPU."""
        if not self._is_host or not int(prefix_lens.max() if len(prefix_lens) else 0):
            return [0] * len(counts)
        pages = torch.where(prefix_lens > 0, last_loc // self.page_size, 0)
        return [int(page) for page in pages.tolist()]

    def _given_out(self, slots: Any, pages: Pages) -> torch.Tensor | None:
        """The kernels must have used up the choice; give it back when they refused."""
        if slots is None:
            self._segments.free(pages)
        self.free_pages = self._tensor(None)
        return slots  # type: ignore[no-any-return]

    def _tensor(self, pages: Pages | None) -> torch.Tensor:
        if pages is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return torch.from_numpy(pages).to(self.device, non_blocking=True)


def _concatenate(parts: list[Pages]) -> Pages:
    import numpy as np

    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
