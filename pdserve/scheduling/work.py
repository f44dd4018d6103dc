"""How much work a request is, in seconds, by what the fleet is fitted to. Pure.

    prefill_s = uncached prompt tokens / rate of a prefill server
    decode_s  = expected answer · time of a step / requests that share it

Whose cache would serve how much only the policy knows, and only for one worker: here a prompt's uncached
share is what it was of late over all requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.scheduling.lengths import UNKNOWN_TOKENS
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import RequestShape

KEEP = 0.99
"""Weight of what was known before the latest request: a mean over the last hundred or so."""


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of a prefill server, and a request's share of the seconds of a decode server."""

    prefill_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Both together."""
        return self.prefill_s + self.decode_s


class WorkEstimate:
    """Mean rates of the workers that take traffic, refreshed now and then; overheads learned from legs.

    ``overhead_s`` is what a prefill leg takes beyond queue and computing: HTTP, the handshake, the KV's way.
    """

    def __init__(self) -> None:
        self.overhead_s = 0.0
        self._prefill_token_s = 1e-4
        self._decode_token_s = 0.02
        self._prompt_tokens = 0.0
        self._cached_tokens = 0.0
        self._sent: dict[int, tuple[float, float]] = {}

    def refresh(self, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> None:
        """Take in the workers' rates and batches as they are now."""
        rates = [view.prefill_tokens_s * view.info.dp_size for view in prefills]
        if rates:
            self._prefill_token_s = len(rates) / sum(rates)
        shares = [_token_s(view) for view in decodes]
        if shares:
            self._decode_token_s = sum(shares) / len(shares)

    @property
    def prefill_token_s(self) -> float:
        """Seconds in which a prefill worker computes a token."""
        return self._prefill_token_s

    def of(self, shape: RequestShape) -> Work:
        """What this request will probably take."""
        forecast = shape.forecast
        mean = min(shape.max_new_tokens, UNKNOWN_TOKENS) if forecast is None else forecast.mean
        return Work(self.prefill_s(shape), shape.num_prompts * mean * self._decode_token_s)

    def prefill_s(self, shape: RequestShape) -> float:
        """Seconds in which a prefill server with nothing else to do computes the prompt."""
        return shape.prompt_tokens * self._uncached_share * self._prefill_token_s

    def sent(
        self, leg: int, shape: RequestShape, cached_tokens: int, expected_s: float, now_s: float
    ) -> None:
        """A prefill leg was sent to a server whose queue is ``expected_s`` long with it."""
        self._prompt_tokens = self._prompt_tokens * KEEP + shape.prompt_tokens
        self._cached_tokens = self._cached_tokens * KEEP + cached_tokens
        self._sent[leg] = now_s, expected_s

    def arrived(self, leg: int, now_s: float, *, is_whole: bool) -> None:
        """That leg is over; ``is_whole``: as it should be."""
        sent = self._sent.pop(leg, None)
        if sent is not None and is_whole:
            beyond_s = max(0.0, now_s - sent[0] - sent[1])
            self.overhead_s = self.overhead_s * KEEP + beyond_s * (1.0 - KEEP)

    @property
    def _uncached_share(self) -> float:
        return 1.0 - self._cached_tokens / self._prompt_tokens if self._prompt_tokens > 0.0 else 1.0


def _token_s(view: WorkerView) -> float:
    batch = max(1.0, view.num_reqs / view.info.dp_size)
    return (view.step_base_s / batch + view.step_slope_s) / view.info.dp_size


def queue_s(view: WorkerView) -> float:
    """Expected wait in a prefill server's queue."""
    return view.queued_tokens / (view.prefill_tokens_s * view.info.dp_size)


MARK_EVERY_S = 1.0
NUM_MARKS = 30
"""The rate is that of the last half minute."""
UNKNOWN_S = 5.0
"""The answer while nothing has ended yet: a worker that joins is tested within seconds."""
MIN_S, MAX_S = 1.0, 300.0


class CompletionRate:
    """Counts requests that ended. ``mark`` now and then; adding one costs an increment."""

    def __init__(self) -> None:
        self.total = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=NUM_MARKS)

    def mark(self, now_s: float) -> None:
        """Remember how far the count is; as often as there is occasion."""
        if not self._marks or now_s - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now_s, self.total))

    def per_s(self, now_s: float) -> float:
        """Requests ended per second since the oldest mark of the last half minute; 0 if unknown."""
        since_s, count = next(
            (mark for mark in self._marks if now_s - mark[0] <= NUM_MARKS * MARK_EVERY_S), (now_s, self.total)
        )
        span_s = now_s - since_s
        return (self.total - count) / span_s if span_s > 0 else 0.0

    def retry_after_s(self, num_ahead: int, now_s: float) -> float:
        """When ``num_ahead`` requests will probably have ended."""
        rate = self.per_s(now_s)
        return min(MAX_S, max(MIN_S, num_ahead / rate)) if rate > 0 else UNKNOWN_S
