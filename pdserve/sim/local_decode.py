"""A decode server that also prefills requests itself, as plugin/local_prefill has SGLang do it.

    local prompt ─► line ─► chunk + decode step in one pass, within the budget ─► first token ─► the batch

A chunk shares its pass with the running requests' step: the weights are read once, so its base is not paid
again. Without running requests it is a prefill pass of its own. How large a chunk may be the real server
fits to its passes; here it knows the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop
from math import log

from pdserve.sim.cost import CostModel
from pdserve.sim.decode_server import GAP_BINS, DecodeServer
from pdserve.sim.engine import Clock, SimRequest
from pdserve.types import WorkerLoad

LEAST_TOKENS = 64
MOST_TOKENS = 2048
"""Of a chunk, as plugin/local_prefill/queue.py and a decode server's --chunked-prefill-size have it."""
DUE_PASSES = 32


class LocalDecodeServer(DecodeServer):
    """``budget_s``: the longest pass of chunk and decode step. ``on_prefilled(request)``: its first token."""

    def __init__(
        self,
        index: int,
        model: CostModel,
        clock: Clock,
        callbacks: tuple[Callable[[SimRequest], None], ...],
        budget_s: float,
    ) -> None:
        on_pages, on_finished, self._on_prefilled = callbacks
        super().__init__(index, model, clock, on_pages, on_finished)
        self.computed_tokens = 0
        self._budget_s = budget_s
        self._line: deque[SimRequest] = deque()
        self._at_work: SimRequest | None = None
        self._chunk = 0
        self._chunk_s = 0.0
        self._num_passed = 0

    def arrive_alone(self, request: SimRequest) -> None:
        """A request has come that no prefill server takes part in."""
        self._line.append(request)
        self._look_soon()

    def boundary_s(self) -> float:
        """As the parent's, passes with a chunk counted."""
        is_chunk_alone = self._chunk and not self._running
        return self._since_s + self._chunk_s if is_chunk_alone else super().boundary_s()

    def load(self, now_s: float) -> WorkerLoad:
        """With the prompts that wait and the one at work, as SGLang's loads have them then."""
        told = super().load(now_s)
        work = self._at_work
        tokens = sum(request.prompt_tokens for request in self._line)
        rest = work.prompt_tokens - work.done_tokens if work is not None else 0
        return replace(
            told,
            num_waiting_reqs=told.num_waiting_reqs + len(self._line) + (work is not None),
            num_waiting_uncached_tokens=tokens + rest,
            num_total_tokens=told.num_total_tokens + tokens,
        )

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or travels."""
        return not (self._line or self._at_work) and super().is_idle

    # -- passes --------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        """Something came: it is seen at the end of the running pass."""
        if not (self._running or self._chunk):
            self._boundary(0)
            return
        steps = self._steps_by(self._clock.now_s, is_up=True)
        if steps < self._num_planned:
            self._schedule(steps)

    def _join_soon(self, request: SimRequest) -> None:
        self._ready.append(request)
        self._look_soon()

    def _num_active(self) -> int:
        return super()._num_active() + (self._at_work is not None)

    def _after(self, steps: int) -> float:
        step_s = super()._after(steps) if self._running else 0.0
        return step_s + (self._chunk_s if steps else 0.0)

    def _steps_by(self, now_s: float, *, is_up: bool = False) -> int:
        if not self._chunk:
            return super()._steps_by(now_s, is_up=is_up) if self._running else 0
        return int(is_up or now_s - self._since_s >= self._after(1) * (1 - 1e-6))

    def _boundary(self, steps: int) -> None:
        chunk, chunk_s, self._chunk, self._chunk_s = self._chunk, self._chunk_s, 0, 0.0
        if chunk and steps:
            self._end_pass(chunk, chunk_s)
            steps = 0
        super()._boundary(steps)
        self._begin()
        if self._at_work is not None:
            self._chunk, self._chunk_s = self._next_chunk(self._at_work)
            if self._chunk:
                self._schedule(1)

    def _end_pass(self, chunk: int, chunk_s: float) -> None:
        """A step of the running requests, if any, and a chunk."""
        running, request = self._running, self._at_work
        assert request is not None
        took_s = chunk_s + (self._after(1) if running else 0.0)
        self.busy_s += took_s
        if running:
            place = round(log(took_s) * GAP_BINS)
            self.gaps[place] = self.gaps.get(place, 0) + len(running)
            self._step += 1
            self._context += len(running)
            self._take(len(running))
        self._since_s = self._clock.now_s
        while running and running[0][0] <= self._step:
            _, _, done = heappop(running)
            self._context -= done.prompt_tokens + done.output_tokens - 1
            self._leave(done)
        request.done_tokens += chunk
        self.computed_tokens += chunk
        if request.done_tokens >= request.prompt_tokens:
            self._at_work = None
            request.prefill_end_s = request.kv_ready_s = self._clock.now_s
            self._on_prefilled(request)
            self._ready.append(request)

    def _next_chunk(self, request: SimRequest) -> tuple[int, float]:
        """Tokens and the seconds that they add to a step."""
        model, batch, done = self._model, len(self._running), request.done_tokens
        left = request.prompt_tokens - done
        tokens, base_s = min(left, MOST_TOKENS), 0.0 if batch else model.prefill_base_s
        if batch:
            slack_s = self._budget_s - model.decode_step_s(batch, self._context)
            fits = int(slack_s / (model.prefill_token_s + model.prefill_pair_s * (done + MOST_TOKENS / 2)))
            tokens = min(tokens, max(LEAST_TOKENS, fits))
        pairs = tokens * (done + tokens / 2)
        return tokens, base_s + model.prefill_token_s * tokens + model.prefill_pair_s * pairs

    def _begin(self) -> None:
        """The first in line gets its pages, in turn with requests that wait for theirs."""
        if self._at_work is not None or not self._line or self._retracted:
            return
        request = self._line[0]
        self._num_passed += 1
        if (self._queue and self._num_passed < DUE_PASSES) or not self._fits(request.prompt_tokens):
            return
        self._num_passed = 0
        self._line.popleft()
        self._take(request.prompt_tokens)
        self._at_work = request
