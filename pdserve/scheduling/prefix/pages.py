"""Which worker's KV events name which token pages, and which text block ends in which page.

    KV events ─► page hash ─► workers that hold it          text block ─tie─► page hash

A page's hash is SGLang's: it covers all tokens up to the page's end, so one page's presence proves
its whole prefix. A text block is tied to the first page that ends at or behind its own end: if that
page is there, so is the block. What stands behind the last whole page of a prompt stays untied.

``exact`` are workers of which every page is known; of the other ``followed`` ones something was
missed: their pages are there, and others, which only our own dispatches tell of, may be too.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Collection, Container, Iterable, Sequence

logger = logging.getLogger(__name__)

MAX_PAGES = 2**19
"""Pages kept of all workers, about 100 MB when no two hold the same. From three quarters of it on, every
second one is left out: a tie then reaches on to the next page that is kept."""
THIN_RATE = 8
"""Old pages looked through for each new one meanwhile, so that no pause grows with their number."""
MAX_TIES = 2**18
"""Text blocks tied, about 40 MB; those tied least recently go first."""
KEPT_TOKENS = 16
"""Of smaller pages than this, only one in so many tokens is kept, told by its hash."""


class PageIndex:
    """Token pages by worker. Workers are bits; the tree gives them out."""

    def __init__(self, max_pages: int = MAX_PAGES, max_ties: int = MAX_TIES) -> None:
        self.followed = 0
        self.exact = 0
        self.page_tokens = 0
        """Tokens in a page; the same on every followed worker. 0 before the first one."""
        self._max_pages = max_pages
        self._max_ties = max_ties
        self._skip = 0  # a page is kept if none of these bits of its hash is set
        self._pages: dict[int, int] = {}
        self._old: list[int] = []
        self._held: dict[int, set[int]] = {}
        self._ties: dict[int, int] = {}

    def __len__(self) -> int:
        """Pages known of some worker."""
        return len(self._pages)

    @property
    def num_ties(self) -> int:
        """Text blocks tied to a page."""
        return len(self._ties)

    # -- what the events tell ----------------------------------------------------------------------

    def follow(self, bit: int, page_tokens: int, *, is_exact: bool) -> bool:
        """Events of this worker are heard from now on; nothing is known of it yet.

        False, and it is not followed, if its pages have another size than those of the others.
        """
        if not self.followed and page_tokens != self.page_tokens:
            self.page_tokens = page_tokens
            self._ties.clear()
            self._skip = _power_of_two_above(-(-KEPT_TOKENS // page_tokens)) - 1
        if page_tokens != self.page_tokens:
            return False
        self.clear(bit)
        self.followed |= bit
        self.exact = self.exact | bit if is_exact else self.exact & ~bit
        return True

    def unfollow(self, bit: int) -> None:
        """Its events are heard no more."""
        self.clear(bit)
        self._held.pop(bit, None)
        self.followed &= ~bit
        self.exact &= ~bit

    def store(self, bit: int, pages: Iterable[int]) -> None:
        """The worker holds these pages."""
        if not self.followed & bit:
            return
        skip, known, held = self._skip, self._pages, self._held.setdefault(bit, set())
        num_new = -len(known)
        for page in pages:
            if not page & skip:
                held.add(page)
                known[page] = known.get(page, 0) | bit
        num_new += len(known)
        if len(known) > self._max_pages * 3 // 4 or self._old:
            self._thin(THIN_RATE * (num_new + 1))

    def remove(self, bit: int, pages: Iterable[int]) -> None:
        """The worker holds these pages no more."""
        held = self._held.get(bit, set())
        for page in pages:
            if page in held:
                held.discard(page)
                self._drop(bit, page)

    def clear(self, bit: int) -> None:
        """The worker holds no page."""
        for page in self._held.pop(bit, ()):
            self._drop(bit, page)

    def complete(self, bit: int) -> None:
        """From here on every page of the worker is known."""
        self.exact |= self.followed & bit

    def held(self, bit: int) -> Collection[int]:
        """The pages kept of this worker."""
        return self._held.get(bit, frozenset())

    def _drop(self, bit: int, page: int) -> None:
        if rest := self._pages[page] & ~bit:
            self._pages[page] = rest
        else:
            del self._pages[page]

    def _thin(self, budget: int) -> None:
        """Leave out every second page, by one more bit of its hash; a part of the work at each call.

        What is left out and not dropped yet does no harm: no tie names it.
        """
        while True:
            if not self._old and len(self._pages) > self._max_pages * 3 // 4:
                self._skip = 2 * self._skip + 1
                self._old = list(self._pages)
                self._ties.clear()  # they may name pages that are left out; repeated prompts are tied again
                logger.info("kv events: from now on one page in %d is kept", self._skip + 1)
            for page in self._old[-budget:]:
                if page & self._skip:
                    bits = self._pages.pop(page, 0)
                    while bits:
                        bit = bits & -bits
                        self._held[bit].discard(page)
                        bits ^= bit
            del self._old[-budget:]
            if len(self._pages) <= self._max_pages:
                return

    # -- ties --------------------------------------------------------------------------------------

    def tie(self, hashes: Sequence[int], tokens: Sequence[float], pages: Sequence[int]) -> int:
        """Tie a prompt's blocks to its pages; returns how many blocks.

        Args:
            hashes: the prompt's text blocks.
            tokens: for each, how many tokens stand before its end.
            pages: hashes of the prompt's whole pages, in order.
        """
        kept = [i for i, page in enumerate(pages) if not page & self._skip]
        ends = [(i + 1) * self.page_tokens for i in kept]
        found = [(key, bisect_left(ends, count)) for key, count in zip(hashes, tokens, strict=True)]
        tied = [(key, pages[kept[at]]) for key, at in found if at < len(kept)]
        for key, page in reversed(tied):
            self._ties.pop(key, None)
            self._ties[key] = page
        for key in list(self._ties)[: max(0, len(self._ties) - self._max_ties)]:
            del self._ties[key]
        return len(tied)

    def reach(self, pages: Sequence[int]) -> int:
        """How many tokens of a prompt some worker holds, by the pages that are kept."""
        return (
            max((i + 1 for i, page in enumerate(pages) if page in self._pages), default=0) * self.page_tokens
        )

    def num_tied(self, hashes: Sequence[int]) -> int:
        """Leading blocks that are tied: with a block all before it are, as the last of a prompt go first."""
        return num_leading(hashes, self._ties)

    def holders(self, key: int) -> int:
        """The workers that hold the page to which this block is tied; 0 if it is not."""
        return self._pages.get(self._ties.get(key, 1), 0) if key in self._ties else 0


def num_leading(hashes: Sequence[int], known: Container[int]) -> int:
    """How many of a prompt's first blocks are known, where with a block all before it are."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low


def _power_of_two_above(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
