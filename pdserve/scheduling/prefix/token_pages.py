"""A prompt's token pages, hashed as SGLang names them in its KV events. Pure.

    tokens  |--page--|--page--|--page--|--      page hash = SHA-256(hash of the page before ‖ its tokens)

As published: token ids as little-endian uint32, the first 8 bytes of the digest as a signed big-endian
number (sglang/srt/mem_cache/cpp_utils/hash_binding.cpp, mem_cache/utils.py hash_str_to_int64). Requests with
a ``cache_salt`` or an adapter have other hashes; they are simply not found.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

CHUNK_TOKENS = 128
"""Tokens are told in which byte they end, exactly every so many, evenly in between."""


def page_hashes(token_ids: Sequence[int], page_tokens: int) -> list[int]:
    """One for each whole page.

    Raises:
        OverflowError, TypeError: if an id is no number of 32 bits.
    """
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    raw, size, digest, hashes = ids.tobytes(), ids.itemsize * page_tokens, b"", []
    for start in range(0, len(raw) - size + 1, size):
        digest = hashlib.sha256(digest + raw[start : start + size]).digest()
        hashes.append(int.from_bytes(digest[:8], "big", signed=True))
    return hashes


def tokens_of_ids(prompt: bytes, ends: Sequence[int]) -> list[float]:
    """How many token ids of a JSON list begin before each of these bytes: exact."""
    counts, start, commas = [], 0, 0
    for end in ends:
        commas += prompt.count(b",", start, end)
        counts.append(commas + 1.0)
        start = end
    return counts


def tokens_of_text(
    num_bytes: int, num_tokens: int, ends: Sequence[int], chunks: Sequence[str] = ()
) -> list[float]:
    """How many tokens of a text stand before each of these bytes.

    Exact to a few bytes at the seams of ``chunks``, the texts of CHUNK_TOKENS tokens each: they are stretched
    to ``num_bytes``, because canonical text has escapes and no template. Without them, spread evenly.
    """
    seams = [0.0]
    for chunk in chunks:
        seams.append(seams[-1] + len(chunk.encode(errors="replace")))
    if not seams[-1]:
        return [num_tokens * end / num_bytes for end in ends]
    stretch, counts, at = num_bytes / seams[-1], [], 1
    for end in ends:
        while at < len(seams) - 1 and seams[at] * stretch < end:
            at += 1
        width = (seams[at] - seams[at - 1]) * stretch
        inside = (end - seams[at - 1] * stretch) / width if width else 1.0
        first = (at - 1) * CHUNK_TOKENS
        counts.append(first + inside * (min(num_tokens, first + CHUNK_TOKENS) - first))
    return counts
