"""The KV a worker keeps after a request is over: prompt blocks, least recently used evicted first.

Stands for SGLang's radix tree on trace blocks. An id of a trace stands for its block and all
before it, so a set of ids is a tree already. Blocks in use by a request are pinned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Blocks by id, in order of last use. ``tokens`` is what they hold together."""

    __slots__ = ("_blocks", "_pins", "pinned_tokens", "tokens")

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._pins: dict[int, int] = {}
        self.tokens = 0
        self.pinned_tokens = 0

    def match(self, ids: Sequence[int]) -> tuple[int, int]:
        """Leading blocks that are here, and their tokens. Changes nothing."""
        blocks, count, tokens = self._blocks, 0, 0
        for each in ids:
            size = blocks.get(each)
            if size is None:
                break
            count += 1
            tokens += size
        return count, tokens

    def pin(self, ids: Sequence[int]) -> None:
        """Keep these blocks, which are here, until ``unpin``; they count as just used."""
        blocks, pins = self._blocks, self._pins
        for each in reversed(ids):
            held = pins.get(each, 0)
            pins[each] = held + 1
            blocks.move_to_end(each)
            if not held:
                self.pinned_tokens += blocks[each]

    def unpin(self, ids: Sequence[int]) -> None:
        """Take back one ``pin`` of each."""
        pins = self._pins
        for each in ids:
            held = pins.pop(each)
            if held > 1:
                pins[each] = held - 1
            else:
                self.pinned_tokens -= self._blocks[each]

    def insert(self, ids: Sequence[int], block_tokens: int, length: int) -> int:
        """Keep a prompt of ``length`` tokens; returns how many of them were not here yet.

        The last block used is the first to go: what others share stays longest.
        """
        blocks, added, last = self._blocks, 0, len(ids) - 1
        for place in range(last, -1, -1):
            each = ids[place]
            if each in blocks:
                blocks.move_to_end(each)
                continue
            size = block_tokens if place < last else length - last * block_tokens
            added += size
            blocks[each] = size
        self.tokens += added
        return added

    def evict(self, tokens: int) -> int:
        """Drop longest unused blocks that nobody pinned until ``tokens`` are free; returns tokens freed."""
        freed = 0
        blocks, pins = self._blocks, self._pins
        skipped = []
        while freed < tokens and blocks:
            each, size = blocks.popitem(last=False)
            if each in pins:
                skipped.append((each, size))
            else:
                freed += size
        blocks.update(skipped)
        self.tokens -= freed
        return freed

    @property
    def evictable_tokens(self) -> int:
        """What could be freed now."""
        return self.tokens - self.pinned_tokens

    @property
    def num_pinned(self) -> int:
        """Blocks that some request holds."""
        return len(self._pins)
