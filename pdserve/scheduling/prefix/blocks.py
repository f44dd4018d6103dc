"""Which prompts a worker was sent, as far as their prefixes go. Approximate, bounded, no clock.

A prompt is cut into blocks at fixed places and each block's hash covers all
blocks before it, so one set of hashes is a prefix tree:

    prompt  |--64--|--64--| ... 2 kB |---128---| ... 4 kB |-----256-----| ...
    hash      h0 ───► h1 ───► ...

Blocks grow with their place, 32 to each doubling of the length: 100 kB have
some 200, and a match is told to within 3 % of its length. Hashes are Python's
own keyed ones, so nobody outside can make two prompts collide.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import islice

from pdserve.types import InstanceId

BLOCKS_PER_DOUBLING = 32
MAX_PREFIX_BYTES = 2**24
"""Prompts that differ only behind this look the same."""
MIN_CHARGE_BYTES = 128
"""What one remembered block costs us (dict slot and int, with slack); smaller ones are charged this."""
EVICT_SHARE = 64
"""Eviction frees 1/64 at a time: below a millisecond for the default size."""
SPARE_TREES = 8
"""Trees of absent workers, beyond as many as there are present ones, that stay if nobody calls ``forget``."""


def block_ends(first_bytes: int) -> tuple[int, ...]:
    """Where blocks end when the first ones have ``first_bytes``."""
    ends, end, step = [], 0, first_bytes
    while end < MAX_PREFIX_BYTES:
        if end >= 2 * BLOCKS_PER_DOUBLING * step:
            step *= 2
        end += step
        ends.append(end)
    return tuple(ends)


def prefix_hashes(prompt: bytes, ends: Sequence[int], *, with_tail: bool) -> list[int]:
    """One hash for each whole block of the prompt and, if asked, one for what is left behind them."""
    hashes = []
    start = chain = 0
    whole = bisect_right(ends, len(prompt))
    for end in islice(ends, whole):
        chain = hash((chain, prompt[start:end]))
        hashes.append(chain)
        start = end
    if with_tail and start < len(prompt) and whole < len(ends):
        hashes.append(hash((chain, prompt[start:])))
    return hashes


class PrefixMemory:
    """The prefixes one worker was sent most recently.

    Invariant: with a block all blocks before it are remembered, because a prompt's
    blocks are touched last to first and the longest untouched are evicted first.
    """

    __slots__ = ("_charges", "size_bytes")

    def __init__(self) -> None:
        self._charges: dict[int, int] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._charges)

    def match(self, hashes: Sequence[int], at_least: int = 1) -> int:
        """How many leading blocks are remembered; 0 if fewer than ``at_least`` (from 1) are."""
        known = self._charges
        if len(hashes) < at_least or hashes[at_least - 1] not in known:
            return 0
        low, high = at_least, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        return low

    def add(self, hashes: Sequence[int], ends: Sequence[int], max_bytes: int) -> None:
        """Remember a prompt as the most recent, then evict down to ``max_bytes``."""
        charges = self._charges
        for index in range(len(hashes) - 1, -1, -1):
            block = hashes[index]
            charge = charges.pop(block, 0)
            if not charge:
                charge = max(MIN_CHARGE_BYTES, ends[index] - (ends[index - 1] if index else 0))
                self.size_bytes += charge
            charges[block] = charge
        if self.size_bytes > max_bytes:
            self._evict(max_bytes - max_bytes // EVICT_SHARE)

    def _evict(self, max_bytes: int) -> None:
        excess, doomed = self.size_bytes - max_bytes, []
        for block, charge in self._charges.items():
            if excess <= 0:
                break
            doomed.append(block)
            excess -= charge
        for block in doomed:
            self.size_bytes -= self._charges.pop(block)


class PrefixForest:
    """One PrefixMemory for each worker, cut into the same blocks."""

    def __init__(self, first_bytes: int, *, with_tail: bool) -> None:
        self._ends = block_ends(first_bytes)
        self._with_tail = with_tail
        self._trees: dict[InstanceId, PrefixMemory] = {}

    def hashes(self, prompt: bytes) -> list[int]:
        """The prompt's blocks; empty if it is too short for one."""
        return prefix_hashes(prompt, self._ends, with_tail=self._with_tail)

    def match(self, instance_id: InstanceId, hashes: Sequence[int], at_least: int = 1) -> int:
        """Leading blocks that this worker was sent before; 0 if fewer than ``at_least``."""
        tree = self._trees.get(instance_id)
        return tree.match(hashes, at_least) if tree else 0

    def matched_bytes(self, blocks: int, prompt: bytes) -> int:
        """Length of ``blocks`` leading blocks of a prompt."""
        return min(self._ends[blocks - 1], len(prompt)) if blocks else 0

    def size_bytes(self, instance_id: InstanceId) -> int:
        """What is remembered of this worker."""
        tree = self._trees.get(instance_id)
        return tree.size_bytes if tree else 0

    def remember(
        self, instance_id: InstanceId, hashes: Sequence[int], max_bytes: int, present: Collection[InstanceId]
    ) -> None:
        """The worker is being sent this prompt. ``present``: the workers there are now."""
        tree = self._trees.get(instance_id)
        if tree is None:
            self._drop_strays(present)
            tree = self._trees[instance_id] = PrefixMemory()
        tree.add(hashes, self._ends, max_bytes)

    def forget(self, instance_id: InstanceId) -> None:
        """Drop all that is remembered of a worker."""
        self._trees.pop(instance_id, None)

    def __len__(self) -> int:
        return len(self._trees)

    def _drop_strays(self, present: Collection[InstanceId]) -> None:
        """Bound what is kept of workers that nobody told us are gone; the oldest go first."""
        absent = [key for key in self._trees if key not in present]
        for key in absent[: max(0, len(absent) - len(present) - SPARE_TREES)]:
            del self._trees[key]
