"""Work of known size sent to an idle service, and what its servers counted of it.

    prefill   prompts of growing length, alone; then each again with new tokens behind it
    decode    batches of equal requests on all decode servers at once, short and long contexts

A row holds how often each cost was paid and the server's own count of busy time: no HTTP and no queue is
in it. The plan is repeated while the budget lasts; prefill servers take turns.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise

from pdserve.errors import ConfigError
from pdserve.sim.fits import Row
from pdserve.sim.live import LiveService, LiveWorker
from pdserve.types import WorkerLoad

PREFILL_TERMS = ("pass", "token", "pair", "reread")
"""A pass over the model, a new token in it, a new token attending to one other, and half a square of
tokens already known: some attention kernels compute those again (SGLang's torch_native)."""
DECODE_TERMS = ("step", "request", "token")
"""A step, a request in it, a token of context in it."""
SETTLE_S = 1.5
"""SGLang publishes its counters at intervals; what does not come within this time does not come."""
SHORT_TOKENS = 48
"""A prompt whose context costs next to nothing."""
OUT_TOKENS = 48
"""Answers of a decode row: enough steps at the full batch beside those in which it fills and empties."""
SLOW_SHARE = 1 / 12
"""Of the budget: a prompt length that takes more is the longest."""


@dataclass(frozen=True, slots=True)
class MeasureLimits:
    """Sizes that the servers themselves tell."""

    chunk_tokens: int
    page_tokens: int
    prefill_pool_tokens: int
    decode_pool_tokens: int
    max_running_requests: int
    has_decode_cache: bool
    device: str
    model: str


@dataclass(slots=True)
class Measured:
    """Everything the fits need."""

    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)
    reply_s: list[float] = field(default_factory=list)
    """Time to first token of prompts of one pass, less that pass."""
    cached_tokens: int = 0
    """Prompt tokens found in a prefill server's cache, all together."""


class Measurer:
    """Runs the plan against one service, which nobody else may use meanwhile.

    ``max_tokens`` and ``max_batch`` bound the longest prompt and the largest batch on a decode server.
    """

    def __init__(
        self, service: LiveService, limits: MeasureLimits, max_tokens: int, max_batch: int, seed: int
    ) -> None:
        self._service = service
        self._limits = limits
        pool = min(limits.prefill_pool_tokens, limits.decode_pool_tokens)
        self._longest = max(64, min(max_tokens, pool // 3))
        self._max_batch = min(max_batch, limits.max_running_requests)
        self._rng = random.Random(seed)
        self._measured = Measured()

    async def measure(self, budget_s: float) -> Measured:
        """Repeat the plan until another round would take more than what is left of ``budget_s``."""
        await self._warm_up()
        end_s = time.monotonic() + budget_s
        for turn in count():
            begin_s = time.monotonic()
            await self._prefill_round(turn, budget_s * SLOW_SHARE)
            for context, batch in self._decode_plan():
                self._measured.decode += await self._decode_rows(context, batch)
            now_s = time.monotonic()
            if now_s + (now_s - begin_s) > end_s:
                break
        return self._measured

    def _ids(self, num_tokens: int) -> list[int]:
        # Printable ASCII: ids every vocabulary has, also the tiny model's alphabet of bytes.
        return [self._rng.randrange(32, 127) for _ in range(num_tokens)]

    async def _warm_up(self) -> None:
        """Send over every pair, then a batch: first steps load and compile."""
        for prefill in self._service.prefills:
            for decode in self._service.decodes:
                await self._service.over_pair(prefill, decode, self._ids(64), 4)
        await self._decode_rows(SHORT_TOKENS, min(self._max_batch, 4))

    # -- prefill -----------------------------------------------------------------------------

    async def _prefill_round(self, turn: int, slow_s: float) -> None:
        prefills, decodes = self._service.prefills, self._service.decodes
        pair = prefills[turn % len(prefills)], decodes[turn % len(decodes)]
        page, length = self._limits.page_tokens, 32
        while length <= self._longest:
            begin_s = time.monotonic()
            prompt = self._ids(length // page * page or length)
            await self._prefill_row(*pair, prompt)
            if length >= 128:
                for new in (page, max(page, length // 4)):
                    await self._prefill_row(*pair, prompt + self._ids(new))
            if time.monotonic() - begin_s > slow_s:
                self._longest = length
            length *= 2

    async def _prefill_row(self, prefill: LiveWorker, decode: LiveWorker, prompt: Sequence[int]) -> None:
        before = await self._service.wait_idle(prefill)
        answer = await self._service.over_pair(prefill, decode, prompt, 1)
        expected = before.total_prefill_uncached_tokens + len(prompt) - answer.cached_tokens
        after = await self._settled(prefill, lambda load: load.total_prefill_uncached_tokens >= expected)
        new = after.total_prefill_uncached_tokens - before.total_prefill_uncached_tokens
        busy_s = (after.total_prefill_busy_us - before.total_prefill_busy_us) / 1e6
        cached = len(prompt) - new
        if new <= 0 or busy_s <= 0 or cached < 0:
            raise ConfigError(
                f"{prefill.name} at {prefill.url} counted {new} tokens in {busy_s:g} s for a prompt of "
                f"{len(prompt)}: calibrating needs the counters of SGLang 0.5.23's /v1/loads, of a service "
                "that nobody else uses"
            )
        self._measured.cached_tokens += cached
        self._measured.prefill.append(Row(pass_counts(cached, new, self._limits.chunk_tokens), busy_s))
        if new <= self._limits.chunk_tokens and not cached:
            self._measured.reply_s.append(max(0.0, answer.ttft_s - busy_s))

    async def _settled(self, worker: LiveWorker, is_complete: Callable[[WorkerLoad], bool]) -> WorkerLoad:
        """Its counters after our requests."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            load = await self._service.wait_idle(worker)
            if is_complete(load) or time.monotonic() > deadline_s:
                return load
            await asyncio.sleep(0.02)

    # -- decode ------------------------------------------------------------------------------

    def _decode_plan(self) -> list[tuple[int, int]]:
        """(context, batch) of each row. Long contexts in small batches only: their prefill takes long, and
        until all of a batch has arrived its first ones have finished."""
        longest, most = self._longest, self._max_batch
        plan = [(SHORT_TOKENS, 2**power) for power in range(most.bit_length())]
        plan += [(longest, 1), (longest // 2, 1), (longest // 2, 2), (longest // 8, min(4, most))]
        pool = self._limits.decode_pool_tokens
        return [(context, batch) for context, batch in plan if batch * (context + 512) <= pool]

    async def _decode_rows(self, context: int, batch: int) -> list[Row]:
        """A row of each decode server."""
        service = self._service
        before = [await service.wait_idle(decode) for decode in service.decodes]
        await asyncio.gather(
            *(
                service.over_pair(
                    service.prefills[index % len(service.prefills)], decode, self._ids(context), OUT_TOKENS
                )
                for index in range(batch)
                for decode in service.decodes
            )
        )
        # SGLang leaves out the step after a pause, of which a batch that comes in parts has several.
        grown = 0.9 * batch * (OUT_TOKENS - 1) - batch
        return [
            decode_row(
                decode.name, old, await self._settled(decode, partial(_has_decoded, old, grown)), context
            )
            for decode, old in zip(service.decodes, before, strict=True)
        ]


def pass_counts(context: int, new: int, chunk: int) -> tuple[float, float, float, float]:
    """How often each of PREFILL_TERMS is paid by ``new`` tokens after ``context``, in chunks."""
    bounds = [*range(0, new, chunk), new]
    passes, pairs, reread = 0, 0.0, 0.0
    for begin, end in pairwise(bounds):
        known, now = context + begin, end - begin
        passes, pairs, reread = passes + 1, pairs + now * (known + now / 2), reread + known * known / 2
    return float(passes), float(new), pairs, reread


def decode_row(name: str, before: WorkerLoad, after: WorkerLoad, context: int) -> Row:
    """Growth of a server's decode moments while requests of that context made OUT_TOKENS tokens each.

    SGLang leaves out a step after a pause; the context is scaled to the steps that it counted.

    Raises:
        ConfigError: if it counted none.
    """
    steps, batches, time_us = (new - old for new, old in zip(_moments(after), _moments(before), strict=True))
    if steps <= 0 or time_us <= 0:
        raise ConfigError(
            f"{name} counted no decode steps while requests ran: calibrating needs the decode_moments of "
            "SGLang 0.5.23's /v1/loads"
        )
    return Row((steps, batches, batches * (context + OUT_TOKENS / 2)), time_us / 1e6)


def _moments(load: WorkerLoad) -> tuple[float, ...]:
    """Steps, requests in them, microseconds: cumulative."""
    return load.decode_moments[:3] or (0.0, 0.0, 0.0)


def _has_decoded(before: WorkerLoad, tokens: float, load: WorkerLoad) -> bool:
    return _moments(load)[1] - _moments(before)[1] >= tokens
