"""Blocks that workers hold and blocks on their way, as far as our own dispatches tell.

A block is a place in some prompt: its hash covers all text before its end. The memory keeps one bit a
worker for each block, and for each worker its blocks in the order of their last use. Three bounds (a
worker's KV pool, all facts together, a time to live) drop the least recently used blocks first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf

from pdserve.scheduling.prefix.blocks import block_ends
from pdserve.types import InstanceId

FIRST_BYTES = 128
"""The first blocks: 32 tokens, two of SGLang's usual pages of 16. bench/prompt_tree.py compares sizes."""
ENDS = block_ends(FIRST_BYTES)
"""Where blocks end, in bytes."""
_SIZES = tuple(end - start for start, end in pairwise((0, *ENDS)))
UNSIZED_BYTES = 2**24
"""Text remembered of a worker whose KV pool is not known: 4 M tokens."""
FIT_SHARE = 64
"""A worker that is over its size is brought up to a 64th below it."""
EVICT_SHARE = 256
"""The bound of all facts is kept by dropping this part of them at a time."""
TICKS = 64
"""What has outlived its TTL is dropped this many times in one TTL, up to 1/64 of it too early, ..."""
SWEEP_BLOCKS = 1024
"""... not more than this at a time: a quarter of a millisecond. While more is left, matches look closer."""


class Block:
    """One block and the workers that hold it, and to which it is on its way."""

    __slots__ = ("coming", "held", "size")

    def __init__(self, size: int) -> None:
        self.held = 0
        self.coming = 0
        self.size = size


class Holder:
    """One worker. ``stamps``: when each block it holds was last used; ``coming``: legs that bring each.

    Invariant: with a block all blocks before it are held, and none of them is older, because a prompt's
    blocks are stamped last to first and the oldest go first.
    """

    __slots__ = ("bit", "coming", "instance_id", "is_gone", "kv_tokens", "max_bytes", "size_bytes", "stamps")

    def __init__(self, instance_id: InstanceId, bit: int, max_bytes: int) -> None:
        self.instance_id = instance_id
        self.bit = bit
        self.stamps: dict[int, float] = {}
        self.coming: dict[int, int] = {}
        self.size_bytes = 0
        self.max_bytes = max_bytes
        self.kv_tokens = 0
        self.is_gone = False


class BlockMemory:
    """The blocks of all workers. ``num_facts``: (worker, block) held or coming; never above ``max_facts``."""

    def __init__(self, max_facts: int, ttl_s: float) -> None:
        self.blocks: dict[int, Block] = {}
        self.num_facts = 0
        self.is_behind = False
        """True while something that has outlived its TTL may be left."""
        self._max_facts = max_facts
        self._ttl_s = ttl_s
        self._sweep_s = inf if ttl_s == inf else -inf

    def expect(
        self, holder: Holder, hashes: Sequence[int], now_s: float, holders: Iterable[Holder]
    ) -> list[int]:
        """A leg brings these blocks; returns those that are counted until ``settle``."""
        self.sweep(now_s, holders)
        deadline_s, stamp_of = now_s - self._ttl_s, holder.stamps.get
        counted = [key for key in hashes if stamp_of(key, -inf) <= deadline_s]
        if not self._make_room(len(counted), holders):
            return []
        counts, blocks, bit = holder.coming, self.blocks, holder.bit
        for size, key in zip(_SIZES[len(hashes) - len(counted) : len(hashes)], counted, strict=True):
            if key in counts:
                counts[key] += 1
                continue
            counts[key] = 1
            block = blocks.get(key)
            if block is None:
                block = blocks[key] = Block(size)
            block.coming |= bit
            self.num_facts += 1
        return counted

    def settle(self, holder: Holder, counted: Iterable[int], *, is_kept: bool = False) -> None:
        """The leg is not under way any more. ``is_kept``: ``hold`` follows, so let the blocks stay."""
        counts, blocks, bit = holder.coming, self.blocks, holder.bit
        for key in counted:
            if count := counts[key] - 1:
                counts[key] = count
                continue
            del counts[key]
            self.num_facts -= 1
            block = blocks[key]
            block.coming &= ~bit
            if not (is_kept or block.held or block.coming):
                del blocks[key]

    def hold(self, holder: Holder, hashes: Sequence[int], now_s: float, holders: Iterable[Holder]) -> None:
        """The worker holds this prompt, and used it just now."""
        stamps, blocks, bit = holder.stamps, self.blocks, holder.bit
        for size, key in zip(reversed(_SIZES[: len(hashes)]), reversed(hashes), strict=True):
            if stamps.pop(key, None) is None:
                block = blocks.get(key)
                if block is None:
                    block = blocks[key] = Block(size)
                block.held |= bit
                holder.size_bytes += size
                self.num_facts += 1
            stamps[key] = now_s
        self.fit(holder, holder.max_bytes)
        self._make_room(0, holders)

    def fit(self, holder: Holder, max_bytes: int) -> None:
        """Drop the worker's least recently used blocks down to so much text; -1: all.

        A part more than need be, in one go: a dict whose first keys were deleted is slow to tell its first.
        """
        excess = holder.size_bytes - max_bytes
        if excess <= 0:
            return
        spare, doomed, blocks = max(0, max_bytes) // FIT_SHARE, [], self.blocks
        for key in holder.stamps:
            size = blocks[key].size
            if excess <= 0 and size - excess > spare and max_bytes >= 0:
                break
            doomed.append(key)
            excess -= size
        for key in doomed:
            self._drop(holder, key)

    def leave(self, holder: Holder) -> None:
        """The worker is gone, with all that it holds and all that is on its way to it."""
        self.fit(holder, -1)
        for key in holder.coming:
            block = self.blocks[key]
            block.coming &= ~holder.bit
            if not (block.held or block.coming):
                del self.blocks[key]
        self.num_facts -= len(holder.coming)
        holder.is_gone = True

    def sweep(self, now_s: float, holders: Iterable[Holder]) -> None:
        """Drop what will have outlived its TTL by the next sweep, so that nobody need look meanwhile."""
        if now_s < self._sweep_s:
            return
        tick_s = self._ttl_s / TICKS
        deadline_s, budget = now_s - self._ttl_s + tick_s, SWEEP_BLOCKS
        for holder in holders:
            doomed: list[int] = []
            for key, stamp_s in holder.stamps.items():
                if stamp_s > deadline_s or len(doomed) == budget:
                    break
                doomed.append(key)
            budget -= len(doomed)
            for key in doomed:
                self._drop(holder, key)
        self.is_behind = not budget
        self._sweep_s = now_s if self.is_behind else now_s + tick_s

    def _drop(self, holder: Holder, key: int) -> None:
        del holder.stamps[key]
        block = self.blocks[key]
        block.held &= ~holder.bit
        holder.size_bytes -= block.size
        self.num_facts -= 1
        if not (block.held or block.coming):
            del self.blocks[key]

    def _make_room(self, num_facts: int, holders: Iterable[Holder]) -> bool:
        """Drop the fleet's least recently used blocks until so many facts fit; those on their way stay."""
        if self.num_facts + num_facts <= self._max_facts:
            return True
        chunk = self._max_facts // EVICT_SHARE + 1
        while (excess := self.num_facts + num_facts + chunk - self._max_facts) > 0:
            full = [holder for holder in holders if holder.stamps]
            if not full:
                break
            oldest = min(full, key=lambda holder: next(iter(holder.stamps.values())))
            for key in list(oldest.stamps)[: min(chunk, excess)]:
                self._drop(oldest, key)
        return self.num_facts + num_facts <= self._max_facts
