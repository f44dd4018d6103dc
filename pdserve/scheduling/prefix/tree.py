"""Which worker holds which prefix: one index over the whole fleet (MemServe's global prompt tree).

    prompt ─canonical text─► blocks ─chained hash─► h0 ► h1 ► h2 ...     workers of both roles
                                                    │    │    │
                                  held, coming:    1011 1001 0001        one bit each

The tree answers for any worker; prefill affinity saves computing and decode affinity saves
transfer, so the policy asks twice. A decode worker keeps a prompt only with SGLang's decode radix
cache: for one without, the policy neither sends nor matches. An answer's own tokens are never counted.

Approximate: what a worker holds is known from our own dispatches, which are kept least recently used
within the worker's KV pool and for ``ttl_s``; the worker may have evicted earlier. A share is one of the
text, not of its tokens, and ends with a block (32 tokens, longer far behind). bench/prompt_tree.py measures
what that makes of a hit rate; workers' KV events added nothing to it (bench/results/features.txt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from pdserve.scheduling.prefix.blocks import prefix_hashes
from pdserve.scheduling.prefix.memory import ENDS, UNSIZED_BYTES, BlockMemory, Holder
from pdserve.scheduling.prefix.text import canonical_text
from pdserve.types import InstanceId

MAX_BLOCKS = 2**20
"""Facts (this worker holds this block) in all: some 200 MB when no two workers hold the same."""
BYTES_PER_TOKEN = 4
"""Of English text, and near enough of a list of token ids: how much prompt a KV pool remembers."""
MAX_ROWS = 64

_Look = Callable[[int], int]


class Prefix:
    """A prompt, cut and hashed once for all questions about it."""

    __slots__ = ("hashes", "num_bytes")

    def __init__(self, hashes: list[int], num_bytes: int) -> None:
        self.hashes = hashes
        self.num_bytes = num_bytes

    def share(self, num_blocks: int) -> float:
        """Share (0..1) of the text in so many leading blocks."""
        return min(ENDS[num_blocks - 1], self.num_bytes) / self.num_bytes if num_blocks else 0.0


class Mark:
    """One leg under way; for ``arrive`` or ``lose``, whichever comes first counts."""

    __slots__ = ("counted", "hashes", "holder", "is_over")

    def __init__(self, holder: Holder, hashes: list[int], counted: list[int]) -> None:
        self.holder = holder
        self.hashes = hashes
        self.counted = counted
        self.is_over = False


class PromptTree:
    """Prefixes of the whole fleet's workers. Not thread-safe; reads no clock.

    Args:
        max_blocks: facts remembered of all workers together; the least recently used go first.
        ttl_s: how long a prefix is believed in after its last use; inf: no clock is needed.
        max_worker_bytes: text remembered of a worker until ``resize`` tells its KV pool.
    """

    def __init__(
        self, max_blocks: int = MAX_BLOCKS, ttl_s: float = 600.0, max_worker_bytes: int = UNSIZED_BYTES
    ) -> None:
        self.ttl_s = ttl_s
        self._max_worker_bytes = max_worker_bytes
        self._memory = BlockMemory(max_blocks, ttl_s)
        self._holders: dict[InstanceId, Holder] = {}
        self._slots: list[Holder | None] = []
        self._rows: dict[tuple[InstanceId, ...], tuple[int, dict[int, int]]] = {}

    def __len__(self) -> int:
        """Facts remembered: blocks held and blocks on their way, of all workers; never above the bound."""
        return self._memory.num_facts

    def size_bytes(self, instance_id: InstanceId) -> int:
        """Text that this worker is believed to hold by our own dispatches."""
        holder = self._holders.get(instance_id)
        return holder.size_bytes if holder else 0

    # -- questions -------------------------------------------------------------------------------

    def read(self, prompt: bytes, *, with_tail: bool = False) -> Prefix:
        """Cut a prompt, as it stands in the request's JSON, into blocks.

        ``with_tail``: what is left behind the last whole block is one more, which equal prompts share.
        """
        text = canonical_text(prompt)
        return Prefix(prefix_hashes(text, ENDS, with_tail=with_tail), len(text))

    def match(self, prefix: Prefix, instance_ids: Sequence[InstanceId], now_s: float) -> list[float]:
        """Share (0..1) of the prompt that has arrived at each of these (distinct) workers."""
        return self._shares(prefix, instance_ids, now_s, is_coming=False)

    def match_coming(self, prefix: Prefix, instance_ids: Sequence[InstanceId], now_s: float) -> list[float]:
        """The same with legs that are under way: prefill is first come first served, it will be there."""
        return self._shares(prefix, instance_ids, now_s, is_coming=True)

    def _shares(
        self, prefix: Prefix, instance_ids: Sequence[InstanceId], now_s: float, *, is_coming: bool
    ) -> list[float]:
        shares = [0.0] * len(instance_ids)
        hashes = prefix.hashes
        if not hashes:
            return shares
        self._memory.sweep(now_s, self._holders.values())
        asked, places = self._row(instance_ids)
        for depth, mask in self._groups(hashes, asked, is_coming):
            share = prefix.share(depth)
            while mask:
                low = mask & -mask
                mask ^= low
                slot = low.bit_length() - 1
                if self._memory.is_behind:
                    fresh = self._fresh_depth(slot, hashes, depth, now_s - self.ttl_s)
                    share = prefix.share(fresh)
                shares[places[slot]] = share
        return shares

    def _row(self, instance_ids: Sequence[InstanceId]) -> tuple[int, dict[int, int]]:
        """The workers' bits together, and where each slot stands in the row. Rows change with the fleet."""
        key = tuple(instance_ids)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= MAX_ROWS:
                self._rows.clear()
            bits = {i: self._holders[name].bit for i, name in enumerate(key) if name in self._holders}
            row = (sum(bits.values()), {bit.bit_length() - 1: i for i, bit in bits.items()})
            self._rows[key] = row
        return row

    def _groups(self, hashes: list[int], asked: int, is_coming: bool) -> Sequence[tuple[int, int]]:
        """(depth > 0, workers that hold so many blocks), each worker once at most."""
        find, end = self._memory.blocks.get, len(hashes)

        def holders(index: int) -> int:
            block = find(hashes[index])
            return 0 if block is None else block.held | block.coming if is_coming else block.held

        return _split(holders, 0, end, asked & holders(0))

    def _fresh_depth(self, slot: int, hashes: list[int], depth: int, deadline_s: float) -> int:
        """The part of a match that has not outlived its TTL."""
        holder = self._slots[slot]
        assert holder is not None
        low, high, stamps = 0, depth, holder.stamps
        while low < high:
            middle = (low + high + 1) // 2
            key = hashes[middle - 1]
            is_fresh = stamps.get(key, -inf) > deadline_s
            if is_fresh or key in holder.coming:
                low = middle
            else:
                high = middle - 1
        return low

    # -- legs ------------------------------------------------------------------------------------

    def send(self, prefix: Prefix, instance_id: InstanceId, now_s: float) -> Mark:
        """A leg with this prompt was dispatched to a worker. The mark must come back when it ends."""
        holder = self._holder(instance_id)
        counted = self._memory.expect(holder, prefix.hashes, now_s, self._holders.values())
        return Mark(holder, prefix.hashes, counted)

    def arrive(self, mark: Mark, now_s: float) -> None:
        """The leg came to a whole end: the worker has computed or received all of the prompt's KV."""
        if self._ended(mark, is_kept=True):
            self._memory.hold(mark.holder, mark.hashes, now_s, self._holders.values())

    def lose(self, mark: Mark) -> None:
        """The leg ended badly: what it would have brought does not come."""
        self._ended(mark, is_kept=False)

    def _ended(self, mark: Mark, *, is_kept: bool) -> bool:
        if mark.is_over or mark.holder.is_gone:
            return False
        mark.is_over = True
        self._memory.settle(mark.holder, mark.counted, is_kept=is_kept)
        return True

    def hold(self, prefix: Prefix, instance_id: InstanceId, now_s: float) -> None:
        """Take a worker to hold this prompt from now on: for policies that do not hear of the legs' ends."""
        self._memory.hold(self._holder(instance_id), prefix.hashes, now_s, self._holders.values())

    # -- what workers are and tell -----------------------------------------------------------------

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone: drop all that is known of it; marks of its legs mean nothing any more."""
        holder = self._holders.pop(instance_id, None)
        if holder is None:
            return
        self._memory.leave(holder)
        self._slots[holder.bit.bit_length() - 1] = None
        self._rows.clear()

    def flush(self, instance_id: InstanceId) -> None:
        """Its cache was emptied. Legs under way still come: SGLang flushes only when nothing runs."""
        if holder := self._holders.get(instance_id):
            self._memory.fit(holder, -1)

    def resize(self, instance_id: InstanceId, kv_tokens: int) -> None:
        """The worker's KV pool has so many tokens; more than that it cannot hold. 0: unknown."""
        holder = self._holder(instance_id)
        if kv_tokens != holder.kv_tokens:
            holder.kv_tokens = kv_tokens
            holder.max_bytes = kv_tokens * BYTES_PER_TOKEN if kv_tokens > 0 else self._max_worker_bytes
            self._memory.fit(holder, holder.max_bytes)

    def _holder(self, instance_id: InstanceId) -> Holder:
        holder = self._holders.get(instance_id)
        if holder is None:
            slot = self._slots.index(None) if None in self._slots else len(self._slots)
            holder = self._holders[instance_id] = Holder(instance_id, 1 << slot, self._max_worker_bytes)
            self._slots[slot : slot + 1] = [holder]
            self._rows.clear()
        return holder


def _split(look: _Look, low: int, high: int, mask: int) -> list[tuple[int, int]]:
    """Sort the workers of ``mask``, which hold ``low`` blocks at least, by how many of ``high`` they hold.

    ``look(i)``: the workers that hold block i. Each holds a block only with all before it, so a few
    looks at the right places tell all workers' depths at once. Depth 0 is left out.
    """
    found, todo = [], [(low, high, mask)]
    while todo:
        low, high, mask = todo.pop()
        if not mask:
            continue
        if low == high:
            if low:
                found.append((low, mask))
            continue
        middle = (low + high + 1) // 2
        has = mask & look(middle - 1)
        todo.append((middle, high, has))
        todo.append((low, middle - 1, mask & ~has))
    return found
