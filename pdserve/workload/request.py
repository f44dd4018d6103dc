"""One request of a workload, and the text that stands for its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

BLOCK_TOKENS = 512
"""Tokens of one hash id in Mooncake's traces (its FAST25 release), and in what ``synthetic`` draws."""
BYTES_PER_TOKEN = 4
"""Length of the text that stands for a token: about that of English text."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request: when it comes, tokens in and out, and the ids of its prompt's blocks.

    ``block_ids``: one per ``block_tokens`` tokens, the last may be partly filled; an id stands for its block
    and everything before it. None: the prompt is like no other. ``max_new_tokens`` 0: the
    trace does not tell the limit the client set. ``user``: who asked, if known.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None = None
    block_tokens: int = BLOCK_TOKENS
    max_new_tokens: int = 0
    user: str = ""
    serial: int = 0
    """Tells prompts without block ids apart."""


@lru_cache(maxsize=1 << 13)
def _block_text(block_id: int, block_tokens: int) -> bytes:
    word = b"%016x" % (block_id & (2**64 - 1))
    size = block_tokens * BYTES_PER_TOKEN
    return (word * (size // len(word) + 1))[:size]


def prompt_bytes(request: TracedRequest) -> bytes:
    """Text that stands for the prompt, ``BYTES_PER_TOKEN`` per token: equal leading block ids give equal
    leading text, and nothing else does. About 5 us for 12 000 tokens once the blocks were seen."""
    size = request.block_tokens
    length = request.input_tokens * BYTES_PER_TOKEN
    ids = request.block_ids
    if ids is None:
        return _block_text(-1 - request.serial, size)[: min(length, 256)].ljust(length, b".")
    return b"".join([_block_text(each, size) for each in ids])[:length]
