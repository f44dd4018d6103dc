"""A prefill server as SGLang behaves: in order of arrival, chunked passes, prefix cache, KV held until sent.

    leg ─► bootstrap (decode gives pages) ─► waiting ─► pass, pass, … ─► sending ─► KV back to the cache

A pass takes up to ``chunk_tokens`` new tokens from the front of the queue; the last of
them may be part of a request, which goes on first in the next pass. Each chunk is sent while the next is
computed, what the cache had before the first. Known differences: a request's blocks can be
matched once all of it is computed (SGLang: after each chunk).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pdserve.sim.cost import CostModel
from pdserve.sim.engine import Clock, SimRequest
from pdserve.sim.link import Port, send
from pdserve.sim.prefix_cache import PrefixCache
from pdserve.types import WorkerLoad


class PrefillServer:
    """One prefill worker. ``on_sent(request)`` is called when the last of its KV has arrived."""

    def __init__(
        self,
        index: int,
        model: CostModel,
        clock: Clock,
        ports: list[Port],
        on_sent: Callable[[SimRequest], None],
    ) -> None:
        self.index = index
        self.cache = PrefixCache()
        self.port = Port()
        self.held_tokens = 0
        """KV of requests, without what the cache has."""
        self.num_bootstrapping = 0
        self.num_sending = 0
        self.busy_s = 0.0
        self.computed_tokens = 0
        self.matched_tokens = 0
        self.last_transfer = (0.0, 0.0)
        """Of the last request: seconds from the end of its prefill until its KV was there, and GiB/s."""
        self._model = model
        self._clock = clock
        self._ports = ports
        self._on_sent = on_sent
        self._waiting: deque[SimRequest] = deque()
        self._waiting_tokens = 0
        self._chunked: SimRequest | None = None
        self._rows: list[tuple[SimRequest, int]] = []
        self._pass_s = 0.0

    def submit(self, request: SimRequest) -> None:
        """Decode has given pages: the request may be computed."""
        self.num_bootstrapping -= 1
        _, known = self.cache.match(request.block_ids)
        request.waiting_tokens = request.prompt_tokens - min(known, request.prompt_tokens - 1)
        self._waiting_tokens += request.waiting_tokens
        self._waiting.append(request)
        if not self._rows:
            self._start()

    def sent(self, request: SimRequest) -> None:
        """All KV of the request has arrived: its blocks belong to the cache alone."""
        self.num_sending -= 1
        took_s = self._clock.now_s - request.prefill_end_s
        sent = (request.prompt_tokens - request.decode_cached_tokens) * self._model.kv_bytes_per_token
        self.last_transfer = took_s, sent / 2**30 / took_s if took_s > 0 else 0.0
        pinned = request.pins[0]
        self.cache.unpin(pinned)
        request.pins[0] = ()
        if not request.block_ids:
            self.held_tokens -= request.prompt_tokens - request.cached_tokens
        self._on_sent(request)
        if not self._rows and self._waiting:
            self._start()

    def load(self, now_s: float) -> WorkerLoad:
        """What ``/v1/loads`` would say."""
        used = self.held_tokens + self.cache.pinned_tokens
        pool = self._model.prefill_pool_tokens
        chunked = self._chunked
        uncached = self._waiting_tokens + (chunked.prompt_tokens - chunked.done_tokens if chunked else 0)
        return WorkerLoad(
            timestamp_s=now_s,
            num_running_reqs=len(self._rows),
            num_waiting_reqs=len(self._waiting) + self.num_bootstrapping,
            num_waiting_uncached_tokens=uncached,
            num_used_tokens=used,
            num_total_tokens=used + self._waiting_tokens,
            max_total_num_tokens=pool,
            max_running_requests=self._model.max_running_requests,
            token_usage=used / pool,
            total_prefill_uncached_tokens=self.computed_tokens,
            total_prefill_busy_us=int(self.busy_s * 1e6),
            prefill_bootstrap_queue_reqs=self.num_bootstrapping,
            prefill_inflight_queue_reqs=self.num_sending,
            kv_transfer_latency_ms=self.last_transfer[0] * 1e3,
            kv_transfer_speed_gb_s=self.last_transfer[1],
        )

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or travels."""
        return not (self._rows or self._waiting or self.num_bootstrapping or self.num_sending)

    def _start(self) -> None:
        now_s, budget = self._clock.now_s, self._model.chunk_tokens
        rows, tokens, pairs, reread = self._rows, 0, 0.0, 0.0
        request = self._chunked
        self._chunked = None
        while budget > 0:
            if request is None:
                if not self._waiting or not self._admit(self._waiting[0]):
                    break
                request = self._waiting.popleft()
            done = request.done_tokens
            new = min(budget, request.prompt_tokens - done)
            rows.append((request, new))
            tokens += new
            pairs += new * (done + new / 2)
            reread += done * done / 2
            budget -= new
            if done + new < request.prompt_tokens:
                self._chunked = request
            request = None
        if not rows:
            return
        model = self._model
        self._pass_s = pass_s = (
            model.prefill_base_s
            + model.prefill_token_s * tokens
            + model.prefill_pair_s * pairs
            + model.prefill_reread_s * reread
        )
        self._clock.at(now_s + pass_s, self._end)

    def _admit(self, request: SimRequest) -> bool:
        """Match its prefix and give it KV for the rest; False if there is no room for that now."""
        ids, cache = request.block_ids, self.cache
        count, known = cache.match(ids)
        known = min(known, request.prompt_tokens - 1)
        new = request.prompt_tokens - known
        free = self._model.prefill_pool_tokens - self.held_tokens - cache.tokens
        cache.pin(ids[:count])
        if free < new and cache.evictable_tokens + free < new:
            cache.unpin(ids[:count])
            return False
        if free < new:
            cache.evict(new - free)
        request.pins[0] = ids[:count]
        self.held_tokens += new
        self.matched_tokens += known
        self._waiting_tokens -= request.waiting_tokens
        request.cached_tokens = request.done_tokens = known
        if known > request.decode_cached_tokens:
            self._send(request)
        return True

    def _end(self, _: object) -> None:
        rows, self._rows = self._rows, []
        self.busy_s += self._pass_s
        for request, new in rows:
            request.done_tokens += new
            self.computed_tokens += new
            arrived_s = self._send(request)
            if request.done_tokens == request.prompt_tokens:
                self._finish(request, arrived_s)
        if self._chunked or self._waiting:
            self._start()

    def _finish(self, request: SimRequest, arrived_s: float) -> None:
        request.prefill_end_s = self._clock.now_s
        ids, cache = request.block_ids, self.cache
        if ids:
            cache.unpin(request.pins[0])
            cache.insert(ids, request.block_tokens, request.prompt_tokens)
            cache.pin(ids)
            request.pins[0] = ids
            # Blocks that another request computed meanwhile are here once, as SGLang frees the duplicates.
            self.held_tokens -= request.prompt_tokens - request.cached_tokens
        self.num_sending += 1
        self._clock.at(arrived_s, self.sent, request)

    def _send(self, request: SimRequest) -> float:
        """Hand what is computed and not sent yet to the link; returns when it will have arrived."""
        start = max(request.sent_tokens, request.decode_cached_tokens)
        tokens = max(0, request.done_tokens - start)
        request.sent_tokens = max(request.sent_tokens, request.done_tokens)
        return send(self._model, self.port, self._ports[request.decode], tokens, self._clock.now_s)
