"""Byte geometry of FlashInfer-layout (NHD) paged KV pools, and runs of pages.

A *region* is one layer's K pool or V pool (MLA: the layer's only pool). SGLang
registers K of every layer, then V of every layer; each region is a row of token
slots, ``page_size`` slots to a page, page ``p`` at ``base + p * page_bytes``::

    region r:  | page 0 (padding) | page 1 | page 2 | ...
    page:      | token | token | ... page_size tokens, token_stride bytes apart
    token:     | head 0 | head 1 | ... row_bytes = num_kv_heads * head_bytes

Nothing here touches the memory the numbers describe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pdserve.errors import KVLayoutMismatch

PageIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedRegions:
    """Where one rank's paged KV lies. All lengths in bytes."""

    bases: tuple[int, ...]
    num_pages: int
    """Pages per region, page 0 included: ids are 0..num_pages-1."""
    page_size: int
    row_bytes: int
    """Bytes of one token in one region."""
    token_stride: int
    """Bytes from one token to the next; ``row_bytes`` when dense."""
    num_kv_heads: int = 1
    """KV heads of this rank; 1 for MLA's latent row."""

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.num_pages < 1:
            raise KVLayoutMismatch(
                f"a KV pool needs at least one page of one token, got {self.num_pages} pages "
                f"of {self.page_size} tokens"
            )
        if self.token_stride < self.row_bytes:
            raise KVLayoutMismatch(
                f"token stride {self.token_stride} is smaller than a token's {self.row_bytes} bytes"
            )
        if self.row_bytes % self.num_kv_heads:
            raise KVLayoutMismatch(
                f"{self.row_bytes} bytes a token do not divide into {self.num_kv_heads} KV heads"
            )

    @property
    def num_regions(self) -> int:
        """Two per layer (K, V); one for MLA."""
        return len(self.bases)

    @property
    def page_bytes(self) -> int:
        """From the start of one page to the next, in one region."""
        return self.page_size * self.token_stride

    @property
    def head_bytes(self) -> int:
        """One head of one token in one region."""
        return self.row_bytes // self.num_kv_heads

    @property
    def is_dense(self) -> bool:
        """No gap between tokens, so a run of pages is one span of bytes."""
        return self.token_stride == self.row_bytes


class HeadSlice(NamedTuple):
    """The part of a token row that goes from one rank to another. Offsets in bytes."""

    source_offset: int
    target_offset: int
    nbytes: int


class PageRuns(NamedTuple):
    """Maximal runs consecutive on both sides; each array has one entry per run."""

    source: PageIds
    target: PageIds
    lengths: PageIds


def page_runs(source: PageIds, target: PageIds) -> PageRuns:
    """Bidirectional segment alignment (FlowKV): split where either side stops being consecutive.

    Args:
        source, target: ``[n]`` page ids, pairwise moved.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} source pages but {len(target)} target pages")
    if len(source) == 0:
        empty = np.empty(0, dtype=np.int32)
        return PageRuns(empty, empty, empty)
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source)]))).astype(np.int32)
    return PageRuns(source[starts], target[starts], lengths)


def num_runs(source: PageIds, target: PageIds) -> int:
    """How many runs ``page_runs`` would return, without building them."""
    if len(source) == 0:
        return 0
    return int(np.count_nonzero((np.diff(source) != 1) | (np.diff(target) != 1))) + 1


def heads_of_rank(total_kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """Global KV heads that one attention-TP rank holds.

    With more ranks than heads, consecutive ranks hold the same head
    (grouped-query replication, sglang ModelConfig.get_num_kv_heads).
    """
    rank = tp_rank % tp_size
    if tp_size >= total_kv_heads:
        head = rank * total_kv_heads // tp_size
        return range(head, head + 1)
    held = total_kv_heads // tp_size
    return range(rank * held, (rank + 1) * held)


def head_slice(source: range, target: range, head_bytes: int) -> HeadSlice | None:
    """What ``source`` must send to ``target``; None when they share no head."""
    first, last = max(source.start, target.start), min(source.stop, target.stop)
    if first >= last:
        return None
    return HeadSlice(
        (first - source.start) * head_bytes,
        (first - target.start) * head_bytes,
        (last - first) * head_bytes,
    )
