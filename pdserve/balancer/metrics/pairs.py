"""Prompt tokens whose KV each pair carried, and the time to decode's first byte. Pure.

Bytes follow from tokens where the prefill worker told its KV layout. Memory is bounded: the pairs
used last are remembered, each with its last requests.
"""

from __future__ import annotations

from collections import deque

import msgspec

from pdserve.scheduling.workers import PairKey
from pdserve.types import KVLayoutDescriptor, Pair

MAX_PAIRS = 8192
NUM_TRANSFERS = 64
"""Requests that a pair's median is over."""
NUM_MARKS = 12
"""Steps of five seconds that a pair's rate is over: a minute."""


class PairFlow(msgspec.Struct, eq=False):
    """One pair since it was first used.

    ``tokens_s``: prompt tokens per second of the last minute; ``transfer_p50_s``: median of its last
    streams' ``transfer_s``, None before the first. Both are computed once a step, not for each reader
    of the state document: there may be thousands of pairs. ``marks`` are (time, prompt tokens until then).
    """

    prompt_tokens: int = 0
    used_s: float = 0.0
    tokens_s: float = 0.0
    transfer_p50_s: float | None = None
    marks: deque[tuple[float, int]] = msgspec.field(default_factory=lambda: deque(maxlen=NUM_MARKS))
    transfers: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=NUM_TRANSFERS))
    is_fresh: bool = True

    def mark(self, now_s: float) -> None:
        """Compute rate and median at the end of a step."""
        if self.marks:
            since_s, tokens = self.marks[0]
            self.tokens_s = (self.prompt_tokens - tokens) / max(now_s - since_s, 1.0)
        self.marks.append((now_s, self.prompt_tokens))
        if not self.is_fresh:
            self.transfer_p50_s, self.is_fresh = sorted(self.transfers)[len(self.transfers) // 2], True


class PairTraffic:
    """All pairs, by their instances."""

    def __init__(self) -> None:
        self._flows: dict[PairKey, PairFlow] = {}

    def carried(self, pair: Pair, prompt_tokens: int, transfer_s: float | None, now_s: float) -> None:
        """A request over ``pair`` ended whose prompt was computed."""
        key = pair.prefill.instance_id, pair.decode.instance_id
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = PairFlow()
            flow.marks.append((now_s, 0))
        flow.used_s = now_s
        flow.prompt_tokens += prompt_tokens
        if transfer_s is not None:
            flow.transfers.append(transfer_s)
            flow.is_fresh = False

    def mark(self, now_s: float) -> None:
        """Remember how far each has come, every step; forget those that nobody used for longest."""
        if (surplus := len(self._flows) - MAX_PAIRS) > 0:
            for key in sorted(self._flows, key=lambda key: self._flows[key].used_s)[:surplus]:
                del self._flows[key]
        for flow in self._flows.values():
            flow.mark(now_s)

    def find(self, key: PairKey) -> PairFlow | None:
        """What that pair carried; None if nothing."""
        return self._flows.get(key)


def kv_bytes_per_token(layout: KVLayoutDescriptor | None) -> int:
    """Bytes of KV that one prompt token takes in all layers; 0 if the layout is not known."""
    return 0 if layout is None else layout.token_bytes * layout.num_layers
