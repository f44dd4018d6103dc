"""Byte geometry of FlashInfer-layout (NHD) paged KV pools, and runs of pages.

A *region* is one layer's K pool or V pool (MLA: the layer's only pool). Regions are
in the order of layers, K0 V0 K1 V1 ..., a draft model's behind the target's. Each is
a row of token slots, ``page_size`` slots to a page, page ``p`` at ``base + p * page_bytes``::

    region r:  | page 0 (padding) | page 1 | page 2 | ...
    page:      | token | token | ... page_size tokens, token_stride bytes apart
    token:     | head 0 | head 1 | ... row_bytes = num_kv_heads * head_bytes

Nothing here touches the memory the numbers describe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pdserve.errors import KVLayoutMismatch

PageIds = npt.NDArray[np.int32]
T = TypeVar("T")


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
    regions_per_layer: int = 1
    """2 where K and V are pools of their own."""
    num_draft_regions: int = 0
    """How many of the last regions are a draft model's (speculative decoding)."""

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

    def filled_by(self, prefill: PagedRegions) -> PagedRegions:
        """What a prefill fills of this pool: not a draft's regions if only decode runs a draft model."""
        num_target = self.num_regions - self.num_draft_regions
        if prefill.num_draft_regions or not self.num_draft_regions:
            return self
        return replace(self, bases=self.bases[:num_target], num_draft_regions=0)

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


def by_layer(regions: Sequence[T], num_draft_regions: int) -> tuple[T, ...]:
    """Regions in the order of layers. SGLang registers K, then V, of the target; then those of the draft."""
    num_target = len(regions) - num_draft_regions
    ordered: list[T] = []
    for part in (regions[:num_target], regions[num_target:]):
        half = len(part) // 2
        ordered += itertools.chain.from_iterable(zip(part[:half], part[half:], strict=True))
    return tuple(ordered)


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


def is_first_replica(
    total_kv_heads: int, source_tp: int, source_rank: int, target_tp: int, target_rank: int
) -> bool:
    """True if no lower source rank sends the same heads to this target rank.

    With more ranks than heads several hold the same one. SGLang lets a target rank hear from
    ``source_tp / target_tp`` consecutive source ranks (disaggregation/common/conn.py).
    """
    if source_tp <= target_tp or source_tp <= total_kv_heads:
        return True
    num_senders = source_tp // target_tp
    first = target_rank % target_tp * num_senders
    mine = heads_of_rank(total_kv_heads, source_tp, source_rank)
    senders = range(first, source_rank % source_tp)
    return not any(heads_of_rank(total_kv_heads, source_tp, rank) == mine for rank in senders)


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
