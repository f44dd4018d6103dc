"""The requests that one decode scheduler prefills itself, and when it may begin one.

KV that is short is shared in turns with requests whose KV comes from a prefill server. A local prompt begins
only while none of those waits for pages, until it has been first in line for DUE_PASSES passes; from then on
its pages are kept for it. What has begun keeps the rest of its pages reserved; what was retracted goes
before all. Decisions read only what is the same on all ranks of a server, and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DUE_PASSES = 32
"""Passes after which the first in line is passed by no more: about one or two seconds of decode steps."""
ANSWER_TOKENS = 4096
"""SGLang's prefill admission counts no more of an answer (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""

KEEP = 0.8
"""Weight of what was known before the latest pass: a mean over the last five."""
FIRST_TOKENS = 256
"""Of the first chunk beside running requests, while no chunk was timed."""
LEAST_TOKENS = 64
"""A chunk beside running requests has so many even where the step alone takes the whole budget: who waits
must come to an end, and on a GPU so few cost next to nothing."""
GROWTH = 2.0
"""A chunk has at most so many times the tokens of the one before, until the seconds of a token are proven."""


class ChunkRates:
    """How large the next chunk may be, so that a pass of chunk and decode step stays within its budget.

    tokens = (budget - decode step) / seconds of a chunk's token, both fitted to the passes before. A step
    time that is out of date (chunk follows chunk, no pass is a decode step alone) is made up for by the
    seconds of a token, which are fitted to what the pass took beyond it: the total comes out right.
    """

    def __init__(self) -> None:
        self.step_s = 0.0
        self.token_s = 0.0
        self._largest = FIRST_TOKENS

    def passed(self, seconds: float, num_running: int, chunk_tokens: int) -> None:
        """A pass over so many running requests and a chunk of so many tokens (0: none) took ``seconds``."""
        if not chunk_tokens:
            self.step_s = _mixed(self.step_s, seconds)
        elif num_running:
            self.token_s = _mixed(self.token_s, max(0.0, seconds - self.step_s) / chunk_tokens)
            self._largest = max(self._largest, chunk_tokens)

    def tokens(self, budget_s: float, most: int) -> int:
        """Size of a chunk beside running requests: LEAST_TOKENS to ``most``, which wins."""
        largest = most if self.token_s <= 0.0 else int((budget_s - self.step_s) / self.token_s)
        return min(most, max(LEAST_TOKENS, min(largest, int(GROWTH * self._largest))))


def _mixed(known: float, seen: float) -> float:
    return known * KEEP + seen * (1.0 - KEEP) if known > 0.0 else seen


class LocalQueue:
    """``waiting`` have no KV yet; the one that a chunk was computed of is the scheduler's ``chunked_req``."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.rates = ChunkRates()
        self.steps_since_chunk = 1
        self.last_pass: tuple[int, int] | None = None
        """Running requests and chunk tokens of the pass that was planned last; None: there was none."""
        self.pass_before: tuple[int, int] | None = None
        self.planned_s = 0.0
        self.num_local = 0
        """Requests taken in since the start."""
        self._first: Any = None
        self._num_passed = 0

    def take_out(self, rid_prefix: str, *, is_all: bool) -> list[Any]:
        """Remove and return those that wait and whose id begins so, or all."""
        gone = [req for req in self.waiting if is_all or req.rid.startswith(rid_prefix)]
        self.waiting = [req for req in self.waiting if req not in gone]
        return gone

    def pass_by(self) -> None:
        """One more pass while the same request is first in line."""
        first = self.waiting[0] if self.waiting else None
        self._num_passed = self._num_passed + 1 if first is self._first else 0
        self._first = first

    def may_begin(self, prealloc: Any) -> bool:
        """True if the first in line may have pages now; ``prealloc`` is SGLang's DecodePreallocQueue."""
        if not self.waiting or prealloc.retracted_queue:
            return False
        return self._is_due or not any(request.waiting_for_input for request in prealloc.queue)

    def reserved_tokens(self, prealloc: Any, chunked: Any) -> int:
        """KV tokens that requests from prefill servers must leave free for ours.

        ``chunked``: the request in work, or None.
        """
        tokens = 0
        if chunked is not None:
            tokens += tokens_left(chunked) + prealloc.num_reserved_decode_tokens
        elif self._is_due and self.waiting and not prealloc.retracted_queue:
            tokens += most_tokens(self.waiting[0])
        return tokens

    @property
    def _is_due(self) -> bool:
        return self._num_passed >= DUE_PASSES


def tokens_left(req: Any) -> int:
    """Tokens of a request that are not computed yet, those of its answer so far with them."""
    return int(len(req.origin_input_ids) + len(req.output_ids) - req.prefix_len)


def most_tokens(req: Any) -> int:
    """KV tokens that SGLang wants free before it begins the prompt."""
    left = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
    return int(len(req.origin_input_ids) + len(req.output_ids) + min(left, ANSWER_TOKENS))


def uncached_tokens(waiting: Iterable[Any]) -> int:
    """Prompt tokens of requests of which nothing is computed."""
    return sum(len(req.origin_input_ids) + len(req.output_ids) for req in waiting)
