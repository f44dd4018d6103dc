"""FlowKV's segment allocator: free pages kept as maximal runs, requests served from the best-fitting one.

A transfer costs a descriptor per run that is consecutive on both sides, so the
fewer runs a request's pages form, the quicker it travels. A free list in order
of release scatters them after some churn; here

* a request takes the smallest free segment that holds it whole, else as few
  segments as possible, largest first;
* freed pages merge with their free neighbours at once;
* a growing request takes the page after its last one when that is free, and
  otherwise one from the smallest segment, so that large ones stay large.

Host memory only, no tensors; page 0 is SGLang's padding page and never given out.
Source: FlowKV (arXiv 2504.03775), section on the KV cache allocator.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int64]


class SegmentAllocator:
    """Allocates pages 1..``num_pages``. Not thread-safe: the scheduler owns it."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a pool cannot have {num_pages} pages")
        self.num_pages = num_pages
        self.clear()

    def clear(self) -> None:
        """Every page is free again."""
        self._by_size: list[tuple[int, int]] = []
        self._length_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._is_free = np.zeros(self.num_pages + 2, dtype=bool)
        self.num_free = 0
        if self.num_pages:
            self._is_free[1 : self.num_pages + 1] = True
            self.num_free = self.num_pages
            self._insert(1, self.num_pages)

    @property
    def num_segments(self) -> int:
        """Maximal runs of free pages."""
        return len(self._by_size)

    def free_pages(self) -> Pages:
        """All free pages in order, ``[num_free]``."""
        return np.flatnonzero(self._is_free).astype(np.int64)

    def alloc(self, num_pages: int, *, slack_pages: int = 0) -> Pages | None:
        """``[num_pages]`` pages in as few runs as possible; None, and nothing taken, when too few are free.

        Args:
            slack_pages: try to keep so many free pages before and behind the run, for its
                neighbour and itself to grow into. Only a wish: a later request may take them.
        """
        if num_pages > self.num_free:
            return None
        if num_pages <= 0:
            return np.empty(0, dtype=np.int64)
        if slack_pages and (place := self._roomy_place(num_pages, slack_pages)):
            return self._take(place[0], num_pages, skip=place[1])
        parts = []
        while num_pages:
            start, length = self._best_fit(num_pages)
            parts.append(self._take(start, min(num_pages, length)))
            num_pages -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def alloc_each(
        self, counts: Sequence[int], last_pages: Sequence[int], *, slack_pages: int = 0
    ) -> list[Pages] | None:
        """``counts[i]`` pages for each request of a batch; None, and nothing taken, when too few are free.

        Requests that go on get the pages right after their last one before anybody else
        can; the remaining wishes are served longest first, while long segments are whole.

        Args:
            last_pages: the page each request ends on so far; 0 or less when it is new or not known.
            slack_pages: as for ``alloc``.
        """
        if sum(counts) > self.num_free:
            return None
        found = [self._take_behind(last, count) for count, last in zip(counts, last_pages, strict=True)]
        missing = [count - len(pages) for count, pages in zip(counts, found, strict=True)]
        for index in sorted(range(len(counts)), key=missing.__getitem__, reverse=True):
            if missing[index] > 0:
                rest = self.alloc(missing[index], slack_pages=slack_pages)
                assert rest is not None
                found[index] = np.concatenate((found[index], rest)) if len(found[index]) else rest
        return found

    def extend(self, last_pages: Sequence[int]) -> Pages | None:
        """One more page for each request; None, and nothing taken, when too few are free.

        Args:
            last_pages: each request's last page; 0 when it is not known.
        """
        if len(last_pages) > self.num_free:
            return None
        found = np.empty(len(last_pages), dtype=np.int64)
        # First all that can grow in place: another request's odd page must not take their room.
        homeless = []
        for index, last in enumerate(last_pages):
            page = int(last) + 1
            if last > 0 and page in self._length_at:
                self._take(page, 1)
                found[index] = page
            else:
                homeless.append(index)
        for index in homeless:
            _, start = self._by_size[0]
            self._take(start, 1)
            found[index] = start
        return found

    def free(self, pages: npt.NDArray[np.integer]) -> None:
        """Give pages back, in any order.

        Raises:
            ValueError: naming the first page that is not held; nothing is freed then.
        """
        if len(pages) == 0:
            return
        ordered = np.sort(np.asarray(pages, dtype=np.int64))
        if ordered[0] < 1 or ordered[-1] > self.num_pages:
            wrong = ordered[0] if ordered[0] < 1 else ordered[-1]
            raise ValueError(f"page {wrong} is not one of the pool's 1..{self.num_pages}")
        steps = np.diff(ordered)
        if (steps == 0).any():
            raise ValueError(f"page {ordered[1:][steps == 0][0]} is freed twice at once")
        if (already := self._is_free[ordered]).any():
            raise ValueError(f"page {ordered[already][0]} is free already")
        self._is_free[ordered] = True
        self.num_free += len(ordered)
        breaks = np.flatnonzero(steps != 1) + 1
        starts = np.concatenate(([0], breaks))
        ends = np.concatenate((breaks, [len(ordered)]))
        for begin, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self._merge(int(ordered[begin]), end - begin)

    def _best_fit(self, wanted: int) -> tuple[int, int]:
        position = bisect_left(self._by_size, (wanted, 0))
        length, start = self._by_size[min(position, len(self._by_size) - 1)]
        return start, length

    def _roomy_place(self, wanted: int, slack_pages: int) -> tuple[int, int] | None:
        """A segment with room on both sides of the run, and the pages to skip; page 1 has no neighbour."""
        position = bisect_left(self._by_size, (wanted + 2 * slack_pages, 0))
        if position == len(self._by_size):
            return None
        start = self._by_size[position][1]
        return start, 0 if start == 1 else slack_pages

    def _take_behind(self, last_page: int, wanted: int) -> Pages:
        free = self._length_at.get(last_page + 1, 0) if last_page > 0 and wanted > 0 else 0
        return self._take(last_page + 1, min(wanted, free)) if free else np.empty(0, dtype=np.int64)

    def _take(self, start: int, count: int, *, skip: int = 0) -> Pages:
        """Cut ``count`` pages out of the segment at ``start``, ``skip`` pages behind its front."""
        end = start + self._remove(start)
        first = start + skip
        self._is_free[first : first + count] = False
        self.num_free -= count
        if skip:
            self._insert(start, skip)
        if end > first + count:
            self._insert(first + count, end - first - count)
        return np.arange(first, first + count, dtype=np.int64)

    def _merge(self, start: int, length: int) -> None:
        before = self._start_of_end.get(start)
        if before is not None:
            length += self._remove(before)
            start = before
        if start + length in self._length_at:
            length += self._remove(start + length)
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_of_end[start + length] = start
        insort(self._by_size, (length, start))

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_of_end[start + length]
        del self._by_size[bisect_left(self._by_size, (length, start))]
        return length
