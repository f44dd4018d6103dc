"""A prompt as a chain of block hashes.

A prompt is cut into blocks at fixed places and each block's hash covers all
blocks before it, so one set of hashes is a prefix tree:

    prompt  |-128-|-128-| ... 8 kB |---256---| ... 16 kB |-----512-----| ...
    hash     h0 ──► h1 ──► ...

Blocks grow with their place, 32 to each doubling of the length: 100 kB have
some 200, and a match is told to within 3 % of its length. Hashes are Python's
own keyed ones, so nobody outside can make two prompts collide.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice

BLOCKS_PER_DOUBLING = 32
MAX_PREFIX_BYTES = 2**24
"""Prompts that differ only behind this look the same."""


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
