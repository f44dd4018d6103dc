"""A decode server as SGLang behaves: pages given before prefill, continuous batching, retraction when full.

    leg ─► prealloc queue ─► pages given ─► KV travels ─► joins at the next step ─► … ─► finished
                                retracted ◄── pool full ──┘   (KV waits in host memory, goes first)

Steps between two events are added up in closed form: a batch of b requests and c tokens runs k steps in
k * (a + b * batch + c * context) + c * batch * k * (k - 1) / 2 seconds. What comes in
between takes part from the end of the running step on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import log, sqrt

from pdserve.sim.cost import CostModel
from pdserve.sim.engine import Clock, SimRequest
from pdserve.sim.link import Port
from pdserve.sim.prefix_cache import PrefixCache
from pdserve.types import WorkerLoad

RESERVED_TOKENS = 512
"""SGLang's ``--num-reserved-decode-tokens``: kept free for each request that is there."""


GAP_BINS = 100
"""Gaps between tokens are counted in bins of 1 %."""


class DecodeServer:
    """One decode worker.

    ``on_pages(request)``: prefill may start; ``on_finished(request)``: its last token is out.
    """

    def __init__(
        self,
        index: int,
        model: CostModel,
        clock: Clock,
        on_pages: Callable[[SimRequest], None],
        on_finished: Callable[[SimRequest], None],
    ) -> None:
        self.index = index
        self.port = Port()
        self.cache = PrefixCache()
        self.used_tokens = 0
        """KV given to requests, without what the cache has."""
        self.num_retractions = 0
        self.matched_tokens = 0
        self.received_tokens = 0
        self.busy_s = 0.0
        self._model = model
        self._clock = clock
        self._on_pages = on_pages
        self._on_finished = on_finished
        self._queue: deque[SimRequest] = deque()
        self._queued_tokens = 0
        self._num_travelling = 0
        self._travelling_tokens = 0
        self._ready: list[SimRequest] = []
        self._retracted: deque[SimRequest] = deque()
        self._running: list[tuple[int, int, SimRequest]] = []
        self._context = 0
        """KV tokens the batch attends to."""
        self._step = 0
        self._since_s = 0.0
        self._plan = 0
        self._num_planned = 0
        self.gaps: dict[int, int] = {}
        """Tokens by the gap before them, as ``GAP_BINS`` bins per e-fold of seconds."""
        self._moments = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    # -- requests come and go ----------------------------------------------------------------

    def arrive(self, request: SimRequest) -> None:
        """A leg has come."""
        self._queue.append(request)
        self._queued_tokens += request.prompt_tokens
        self._give_pages()

    def receive(self, request: SimRequest) -> None:
        """All KV of a request is here: it joins the batch at the end of the running step."""
        now_s = self._clock.now_s
        request.kv_ready_s = now_s
        self._num_travelling -= 1
        self._travelling_tokens -= request.prompt_tokens
        self._join_soon(request)

    def boundary_s(self) -> float:
        """When the running step ends, at which the server looks at what has come; now if it is idle."""
        now_s = self._clock.now_s
        if not self._running:
            return now_s
        return self._since_s + self._after(self._steps_by(now_s, is_up=True))

    def load(self, now_s: float) -> WorkerLoad:
        """What ``/v1/loads`` would say."""
        steps = self._steps_by(now_s) if self._running else 0
        batch = len(self._running)
        moments = self._moments
        if steps:
            moments = moments.copy()
            self._count(moments, steps)
        pool = self._model.decode_pool_tokens
        used = self.used_tokens + self.cache.pinned_tokens + steps * batch
        waiting = len(self._queue) + self._num_travelling + len(self._ready) + len(self._retracted)
        return WorkerLoad(
            timestamp_s=now_s,
            num_running_reqs=batch,
            num_waiting_reqs=waiting,
            num_used_tokens=used,
            num_total_tokens=used + self._queued_tokens,
            max_total_num_tokens=pool,
            max_running_requests=self._model.max_running_requests,
            token_usage=used / pool,
            decode_moments=tuple(moments),
            decode_prealloc_queue_reqs=len(self._queue),
            decode_transfer_queue_reqs=self._num_travelling,
            decode_retracted_queue_reqs=len(self._retracted),
        )

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or travels."""
        return not (self._running or self._queue or self._num_travelling or self._ready or self._retracted)

    # -- room --------------------------------------------------------------------------------

    def _num_active(self) -> int:
        return len(self._running) + len(self._ready) + self._num_travelling

    def _free(self) -> int:
        """Tokens that could be given, after evicting what nobody holds."""
        return self._model.decode_pool_tokens - self.used_tokens - self.cache.pinned_tokens

    def _fits(self, tokens: int) -> bool:
        """SGLang's rule: the prompt and 512 beside 512 for each that is there; alone, what fits fits."""
        active = self._num_active()
        if active >= self._model.max_running_requests:
            return False
        free = self._free() - RESERVED_TOKENS * active
        return tokens + (RESERVED_TOKENS if active else 1) <= free

    def _take(self, tokens: int) -> None:
        self.used_tokens += tokens
        over = self.used_tokens + self.cache.tokens - self._model.decode_pool_tokens
        if over > 0:
            self.cache.evict(over)

    def _give_pages(self) -> None:
        while self._queue and not self._retracted:
            request = self._queue[0]
            ids: tuple[int, ...] = ()
            known = 0
            if self._model.has_decode_cache and request.block_ids:
                count, known = self.cache.match(request.block_ids)
                known = min(known, request.prompt_tokens - 1)
                ids = request.block_ids[:count]
                self.cache.pin(ids)
            if not self._fits(request.prompt_tokens - known):
                self.cache.unpin(ids)
                return
            self._queue.popleft()
            self._queued_tokens -= request.prompt_tokens
            request.pins[1] = ids
            request.decode_cached_tokens = known
            self.matched_tokens += known
            self.received_tokens += request.prompt_tokens - known
            self._take(request.prompt_tokens - known)
            self._num_travelling += 1
            self._travelling_tokens += request.prompt_tokens
            self._on_pages(request)

    # -- the batch ---------------------------------------------------------------------------

    def _join_soon(self, request: SimRequest) -> None:
        self._ready.append(request)
        if not self._running:
            self._boundary(0)
        else:
            steps = self._steps_by(self._clock.now_s, is_up=True)
            if steps < self._num_planned:
                self._schedule(steps)

    def _schedule(self, steps: int) -> None:
        self._plan += 1
        self._num_planned = steps
        self._clock.at(self._since_s + self._after(steps), self._planned, self._plan)

    def _planned(self, plan: int) -> None:
        if plan == self._plan:
            self._boundary(self._num_planned)

    def _boundary(self, steps: int) -> None:
        """``steps`` steps are over: who is done goes, who is there joins, the next steps are planned."""
        running = self._running
        if steps:
            grown = steps * len(running)
            self._count(self._moments, steps)
            took_s = self._after(steps)
            self.busy_s += took_s
            place = round(log(took_s / steps) * GAP_BINS)
            self.gaps[place] = self.gaps.get(place, 0) + grown
            self._step += steps
            self._context += grown
            self._take(grown)
        self._since_s = self._clock.now_s
        self._plan += 1
        while running and running[0][0] <= self._step:
            _, _, request = heappop(running)
            self._context -= request.prompt_tokens + request.output_tokens - 1
            self._leave(request)
        if self._ready:
            ready, self._ready = self._ready, []
            for request in ready:
                self._join(request)
        if running and self._free() < len(running):
            self._retract()
        if self._retracted:
            self._resume()
        if self._queue:
            self._give_pages()
        if running:
            self._schedule(max(1, min(running[0][0] - self._step, self._free() // len(running))))

    def _join(self, request: SimRequest) -> None:
        if request.first_token_s < 0:
            request.first_token_s = self._clock.now_s
            request.num_generated = 1
        left = request.output_tokens - request.num_generated
        if left <= 0:
            self._leave(request)
            return
        request.finish_step = self._step + left
        self._context += request.prompt_tokens + request.num_generated - 1
        heappush(self._running, (request.finish_step, request.index, request))

    def _leave(self, request: SimRequest) -> None:
        request.num_generated = request.output_tokens
        self.used_tokens -= request.prompt_tokens - request.decode_cached_tokens + request.output_tokens - 1
        self.cache.unpin(request.pins[1])
        request.pins[1] = ()
        if self._model.has_decode_cache and request.block_ids:
            self.cache.insert(request.block_ids, request.block_tokens, request.prompt_tokens)
            self._take(0)
        self._on_finished(request)

    def _retract(self) -> None:
        """Send back those with fewest tokens generated until each of the others can take a step."""
        running, step = self._running, self._step
        running.sort(key=lambda row: (row[2].output_tokens - (row[0] - step), -row[2].prompt_tokens))
        while len(running) > 1 and self._free() < len(running):
            finish, _, request = running.pop(0)
            request.num_generated = request.output_tokens - (finish - step)
            kept = request.prompt_tokens + request.num_generated - 1
            self._context -= kept
            self.used_tokens -= kept - request.decode_cached_tokens
            request.num_retracted += 1
            self.num_retractions += 1
            self._retracted.append(request)
        heapify(running)

    def _resume(self) -> None:
        """Retracted requests come back in turn, when their KV fits; before that nobody new gets pages."""
        while self._retracted:
            request = self._retracted[0]
            kept = request.prompt_tokens + request.num_generated - 1
            if not self._fits(kept - request.decode_cached_tokens):
                return
            self._retracted.popleft()
            self._take(kept - request.decode_cached_tokens)
            self._num_travelling += 1
            model = self._model
            reload_s = kept * model.kv_bytes_per_token * model.reload_beta_s
            self._clock.at(self._clock.now_s + reload_s, self._reloaded, request)

    def _reloaded(self, request: SimRequest) -> None:
        self._num_travelling -= 1
        self._join_soon(request)

    # -- the time of steps -------------------------------------------------------------------

    def _after(self, steps: int) -> float:
        """Seconds of so many steps of the batch as it is."""
        model, batch = self._model, len(self._running)
        first_s = model.decode_base_s + model.decode_request_s * batch + model.decode_token_s * self._context
        return steps * first_s + model.decode_token_s * batch * steps * (steps - 1) / 2

    def _steps_by(self, now_s: float, *, is_up: bool = False) -> int:
        """Whole steps that have ended by then since the batch changed; ``is_up``: the one that runs too."""
        model, batch = self._model, len(self._running)
        first_s = model.decode_base_s + model.decode_request_s * batch + model.decode_token_s * self._context
        growth_s = model.decode_token_s * batch / 2
        span_s = now_s - self._since_s
        if growth_s > 0:
            linear = first_s - growth_s
            steps = (sqrt(linear * linear + 4 * growth_s * span_s) - linear) / (2 * growth_s)
        else:
            steps = span_s / first_s
        # A share of a step too little for a clock to tell is rounding: the step has just ended.
        whole = int(steps + 1e-6)
        if is_up and steps > whole + 1e-6:
            whole += 1
        return min(whole, self._num_planned)

    def _count(self, moments: list[float], steps: int) -> None:
        batch, took_us = len(self._running), self._after(steps) * 1e6
        moments[0] += steps
        moments[1] += steps * batch
        moments[2] += took_us
        moments[3] += steps * batch * batch
        moments[4] += batch * took_us
        moments[5] += steps * batch
