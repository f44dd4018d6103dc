"""SGLang's paged allocator with pages chosen by the segment allocator, and its KV pools on CPU.

Allocator: SGLang's kernels take pages from the head of ``free_pages`` in the order
of the requests. The pages are chosen here, on the host, and handed to them as
exactly that tensor; between calls ``free_pages`` is empty and the host-side
segments are the truth.

On a GPU frees arrive as device tensors, and with overlap scheduling the step in
flight may still write the pages: they *cool*. A copy to the host starts at once;
when it and the forwards launched before the free are over, the pages join the
segments. Nothing is waited for: a request for more than the segments hold takes
cooling pages as they are, oldest first, as SGLang's allocator would, and a prompt's
stream then waits on the device for those forwards, before decode can read the page
ids that it announces to prefill.

    free ──► cooling [device ids, host copy, events] ──events passed──► segments ──► prompts, steps
                                  └──────── segments too small ────────────────────────┘

Pools: on CPU a pool is refused before it is allocated if the machine cannot hold it.
Linux grants the memory and kills a process later; on a GPU the allocator itself
refuses. Servers that start together check and allocate one after the other, so
that the second sees what the first has taken.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from pdserve.kv.allocator import Pages, SegmentAllocator
from pdserve.process.limits import RESERVE_SHARE, free_memory, whole_memory
from pdserve.process.scratch import SHARED_MEMORY

SLACK_PAGES = 8
"""Free pages wished for around a new run, for outputs to grow into: 128 tokens at pages of 16.

With them grown requests end in a third of the runs in a roomy pool (bench/churn.py, ``whole``)."""

SLACK_FREE_SHARE = 0.5
"""Only while so much of the pool stays free: in a fuller one the gaps cost new requests more runs."""


@dataclass(slots=True)
class CoolingPages:
    """Pages freed on a GPU that a forward may still write, and whose ids the host cannot read yet."""

    pages: torch.Tensor
    host: torch.Tensor
    """The same ids in host memory; valid once ``is_cool``."""
    copied: Any
    forwards: Any
    """Event behind the forwards that were launched before the free."""

    @property
    def is_cool(self) -> bool:
        """The host copy is there and no forward launched before the free runs any more."""
        return bool(self.copied.query() and self.forwards.query())

    def split(self, count: int) -> CoolingPages:
        """Cut off the first ``count`` pages."""
        head = CoolingPages(self.pages[:count], self.host[:count], self.copied, self.forwards)
        self.pages, self.host = self.pages[count:], self.host[count:]
        return head


class PdservePagedAllocator(PagedTokenToKVPoolAllocator):
    """Same results as SGLang's allocator, in fewer runs of pages."""

    forward_stream: Any = None
    """Stream of the model's forwards (patches.py); None: the current one."""

    _segments: SegmentAllocator

    def clear(self) -> None:
        """Every page is free again."""
        super().clear()
        self._segments = SegmentAllocator(self.num_pages)
        self._cooling: deque[CoolingPages] = deque()
        self._num_cooling = 0
        self._ends: dict[int, int] = {}
        self._no_pages = torch.empty(0, dtype=torch.int64, device=self.device)
        self.free_pages = self._no_pages

    def available_size(self) -> int:
        """Free tokens, cooling pages included."""
        return int((self._segments.num_free + self._num_cooling) * self.page_size)

    def get_all_free_pages(self) -> torch.Tensor:
        """All free pages, cooling ones last. Changes nothing: SGLang's watchdog thread calls it too."""
        cooling = [batch.pages for batch in tuple(self._cooling)]
        return torch.cat((self._upload(self._segments.free_pages()), *cooling))

    def merge_and_sort_free(self) -> None:
        """Nothing. SGLang calls it inside an allocation, when the pages are chosen already."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token slots of whole pages, in as few runs as possible."""
        count = need_size // self.page_size
        self._settle()
        pages = self._segments.alloc(count, slack_pages=self._slack(count))
        return self._hand_out(
            count, pages, lambda: super(PdservePagedAllocator, self).alloc(need_size), is_announced=True
        )

    def alloc_extend(
        self, prefix_lens: torch.Tensor, prefix_lens_cpu: torch.Tensor, seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor, extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Slots for a batch of prompts; every request gets its own run, after its last page if it goes on."""
        size = self.page_size
        counts = (-(-seq_lens_cpu // size) - -(-prefix_lens_cpu // size)).tolist()
        prefixes = prefix_lens_cpu.tolist()
        self._settle()
        lasts = self._last_pages(prefixes, last_loc) if any(prefixes) else [0] * len(counts)
        wanted = sum(counts)
        parts = self._segments.alloc_each(counts, lasts, slack_pages=self._slack(wanted))
        pages = None
        if parts is not None:
            pages = np.concatenate([np.empty(0, dtype=np.int64), *parts])
            if not self._is_host:
                self._remember_ends(seq_lens_cpu.tolist(), parts, lasts)
        return self._hand_out(
            wanted,
            pages,
            lambda: super(PdservePagedAllocator, self).alloc_extend(
                prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens,
                num_new_pages=wanted,
            ),
            is_announced=True,
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
            count,
            pages,
            lambda: super(PdservePagedAllocator, self).alloc_decode(seq_lens, seq_lens_cpu, last_loc),
        )

    @property
    def _is_host(self) -> bool:
        """Whether reading the pool's index tensors costs no synchronisation."""
        return torch.device(self.device).type == "cpu"

    def _last_pages(self, prefixes: Sequence[int], last_loc: torch.Tensor) -> list[int]:
        """The page each request ends on so far; 0 when it is new or not known.

        On a GPU a chunk is taken to go on the request that the last batch left at its
        length. A wrong guess costs a run, nothing else.
        """
        if self._is_host:
            slots = last_loc.tolist()
            return [
                slot // self.page_size if prefix else 0 for slot, prefix in zip(slots, prefixes, strict=True)
            ]
        return [self._ends.get(prefix, 0) for prefix in prefixes]

    def _remember_ends(self, lengths: Sequence[int], parts: Sequence[Pages], lasts: Sequence[int]) -> None:
        self._ends = {
            length: int(part[-1]) if len(part) else last
            for length, part, last in zip(lengths, parts, lasts, strict=True)
        }

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        if self._is_host:
            for pages in page_ids:
                self._segments.free(pages.numpy())
            return
        for pages in page_ids:
            host = self._start_read(pages)
            batch = CoolingPages(
                pages, host, self._record_event(None), self._record_event(self.forward_stream)
            )
            self._cooling.append(batch)
            self._num_cooling += len(pages)

    def _settle(self) -> None:
        """Move the pages that have cooled to the segments. Waits for nothing."""
        while self._cooling and self._cooling[0].is_cool:
            batch = self._cooling.popleft()
            self._num_cooling -= len(batch.host)
            self._segments.free(batch.host.numpy())

    def _take_cooling(self, count: int) -> list[CoolingPages]:
        """The first ``count`` cooling pages, as device tensors."""
        taken = []
        self._num_cooling -= count
        while count:
            batch = self._cooling[0]
            if len(batch.pages) <= count:
                taken.append(self._cooling.popleft())
            else:
                taken.append(batch.split(count))
            count -= len(taken[-1].pages)
        return taken

    def _slack(self, num_pages: int) -> int:
        """Room to leave around a new run; none on a GPU, whose growing requests do not use it."""
        is_plentiful = self._segments.num_free - num_pages > SLACK_FREE_SHARE * self.num_pages
        return SLACK_PAGES if is_plentiful and self._is_host else 0

    def _hand_out(
        self,
        count: int,
        pages: Pages | None,
        take: Callable[[], torch.Tensor | None],
        *,
        is_announced: bool = False,
    ) -> torch.Tensor | None:  # fmt: skip
        """Let SGLang's method use up exactly ``pages``; they are free again if it refuses or raises.

        Args:
            count: pages wanted.
            pages: the chosen ones; None when the segments hold too few, so that cooling ones must help.
            is_announced: a peer may be told of the pages, so that no forward may write them any more.
        """
        taken: list[CoolingPages] = []
        if pages is None:
            missing = count - self._segments.num_free
            if missing > self._num_cooling:
                return None
            pages = self._segments.alloc(self._segments.num_free)
            taken = self._take_cooling(missing)
            assert pages is not None
            if is_announced:
                self._wait_on_device(taken[-1].forwards)
        chosen = self._upload(pages)
        self.free_pages = torch.cat((chosen, *(batch.pages for batch in taken))) if taken else chosen
        slots = None
        try:
            slots = take()
            assert slots is None or not len(self.free_pages), f"{len(self.free_pages)} chosen pages unused"
            return slots
        finally:
            self.free_pages = self._no_pages
            if slots is None:
                self._segments.free(pages)
                self._cooling.extendleft(reversed(taken))
                self._num_cooling += sum(len(batch.pages) for batch in taken)

    def _start_read(self, pages: torch.Tensor) -> torch.Tensor:
        """Start a copy to pinned host memory on the current stream."""
        return pages.to("cpu", non_blocking=True)

    def _record_event(self, stream: Any) -> Any:
        """An event behind what ``stream``, or the current one, has been given so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def _wait_on_device(self, event: Any) -> None:
        """Let the current stream wait; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _upload(self, pages: Pages) -> torch.Tensor:
        if len(pages) == 0:
            return self._no_pages
        host = torch.from_numpy(pages)
        # A copy from pageable memory synchronises the stream; one from pinned memory does not.
        return host if self._is_host else host.pin_memory().to(self.device, non_blocking=True)


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
    check_fits(pool_bytes, num_tokens, int(free_memory() - RESERVE_SHARE * whole_memory()))


@contextlib.contextmanager
def _one_server_at_a_time() -> Iterator[None]:
    # The kernel lets go of the lock when the holder dies, however it dies.
    with (SHARED_MEMORY / "pdserve-pools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
