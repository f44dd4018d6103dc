"""When each stage of a request happened, and the latencies that follow from it.

Times are seconds on the balancer's monotonic clock. A stage that did not
happen stays ``None``; a derived figure whose stages are missing is ``None``
rather than a guess.
"""

from __future__ import annotations

import msgspec


class RequestTimeline(msgspec.Struct):
    """Stage times of one request: received → paired → first_token → finished."""

    received_s: float
    paired_s: float | None = None
    prefill_done_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    completion_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """From receipt by the balancer to the first response byte of the decode leg."""
        return None if self.first_token_s is None else self.first_token_s - self.received_s

    @property
    def e2e_s(self) -> float | None:
        """From receipt by the balancer to the end of the response."""
        return None if self.finished_s is None else self.finished_s - self.received_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; needs two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.completion_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.completion_tokens - 1)
