"""What a live service is made to do so that its costs can be told apart, and what it counted meanwhile.

    prefill   prompts of growing length, alone; then the same prefix again with something new behind it
    decode    so many requests at once on every decode server, short and long contexts
    link      pdserve's transfer counters around prompts of one chunk
    reply     time to first token of short prompts, over a pair and over the balancer

A prefill or decode row holds how often each cost was paid and the server's own
count of busy time: no HTTP and no queue is in it. Servers of a role take turns.
Every stage has its share of the budget and repeats its plan until that is spent.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from pdserve.errors import ConfigError
from pdserve.sim.fits import Row
from pdserve.sim.live import LiveAnswer, LiveService, LiveWorker
from pdserve.types import WorkerLoad

PREFILL_TERMS = ("pass", "token", "pair", "reread")
"""A pass over the model, a new token in it, a new token attending to one other, and half a square of
tokens already known: some attention kernels compute those again (SGLang's torch_native)."""
DECODE_TERMS = ("step", "request", "token")
"""A step, a request in it, a token of context in it."""
WARM_TOKENS = (64, 16)
STRANGER = 1.1
"""Work beyond what we sent by this factor is somebody else's."""
MAX_ROUNDS = 9
SETTLE_S = 1.5
SHORT_TOKENS = 48
"""A prompt whose context costs next to nothing."""


@dataclass(frozen=True, slots=True)
class MeasureLimits:
    """What the servers take: their own words."""

    chunk_tokens: int
    page_tokens: int
    prefill_pool_tokens: int
    decode_pool_tokens: int
    max_running_requests: int
    has_decode_cache: bool
    device: str
    model: str


@dataclass(frozen=True, slots=True)
class Scale:
    """How far to go: longest prompt, largest batch on one decode server."""

    max_tokens: int = 4096
    max_batch: int = 16


@dataclass(slots=True)
class Measured:
    """Everything the fits need. ``link``: counts are (transfers, bytes)."""

    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)
    alone: list[Row] = field(default_factory=list)
    """Decode rows taken while the other decode servers were idle."""
    link: list[Row] = field(default_factory=list)
    bytes_per_token: list[float] = field(default_factory=list)
    over_pair: list[tuple[LiveAnswer, float]] = field(default_factory=list)
    """Short requests and the prefill server's busy seconds for each."""
    through_s: list[float] = field(default_factory=list)
    """TTFT of short requests over the balancer."""
    cached_tokens: int = 0
    """Prompt tokens found in a prefill server's cache, all together."""


class Stopwatch:
    """A stage's share of the budget."""

    def __init__(self, share_s: float) -> None:
        self.share_s = share_s
        self._start_s = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start_s

    @property
    def left_s(self) -> float:
        """Seconds that remain; negative when overdrawn."""
        return self.share_s - self.spent_s


class Measurer:
    """Runs the stages against one service, which nobody else may use meanwhile."""

    def __init__(self, service: LiveService, limits: MeasureLimits, scale: Scale, seed: int) -> None:
        self._service = service
        self._limits = limits
        self._scale = scale
        self._rng = random.Random(seed)
        self.result = Measured()

    def _ids(self, count: int) -> list[int]:
        # Printable ASCII: ids every vocabulary has, also the tiny model's alphabet of bytes.
        return [self._rng.randrange(32, 127) for _ in range(count)]

    async def warm_up(self) -> None:
        """Every pair once, also at the largest sizes: first steps load and compile."""
        for prefill in self._service.prefills:
            for decode in self._service.decodes:
                for count in WARM_TOKENS:
                    await self._service.over_pair(prefill, decode, self._ids(count), 4)
        prefill = self._service.prefills[0]
        each = min(self._scale.max_batch, 4)
        await asyncio.gather(
            *(
                self._service.over_pair(prefill, decode, self._ids(SHORT_TOKENS), 12)
                for decode in self._service.decodes
                for _ in range(each)
            )
        )

    # -- prefill and link --------------------------------------------------------------------

    async def measure_prefill(self, budget_s: float) -> None:
        """Rows of prefill, of the link, and what short requests take on the whole."""
        watch, round_s = Stopwatch(budget_s), 0.0
        longest = self._longest_prompt()
        for index in range(MAX_ROUNDS):
            if index and watch.left_s < round_s:
                break
            begin_s = watch.spent_s
            prefill = self._service.prefills[index % len(self._service.prefills)]
            decode = self._service.decodes[index % len(self._service.decodes)]
            longest = await self._prefill_round(prefill, decode, longest, watch)
            round_s = watch.spent_s - begin_s

    async def _prefill_round(
        self, prefill: LiveWorker, decode: LiveWorker, longest: int, watch: Stopwatch
    ) -> int:
        """Growing prompts; returns the longest that the time allows."""
        page, length = self._limits.page_tokens, 32
        while length <= longest:
            begin_s = watch.spent_s
            prompt = self._ids(length // page * page or length)
            await self._prefill_row(prefill, decode, prompt)
            if length >= 128:
                for new in (page, max(page, length // 4)):
                    await self._prefill_row(prefill, decode, prompt + self._ids(new))
            if watch.spent_s - begin_s > watch.share_s / 6:
                return length
            length *= 2
        return longest

    async def _prefill_row(self, prefill: LiveWorker, decode: LiveWorker, prompt: Sequence[int]) -> None:
        before, sent_before = await self._service.wait_idle(prefill), await self._service.transfers(prefill)
        answer = await self._service.over_pair(prefill, decode, prompt, 1)
        expected = before.total_prefill_uncached_tokens + len(prompt) - answer.cached_tokens
        after = await self._settled(prefill, lambda load: load.total_prefill_uncached_tokens >= expected)
        sent_after = await self._service.transfers(prefill)
        new = after.total_prefill_uncached_tokens - before.total_prefill_uncached_tokens
        busy_s = (after.total_prefill_busy_us - before.total_prefill_busy_us) / 1e6
        if new > len(prompt) * STRANGER:
            raise ConfigError(
                f"{prefill.name} computed {new} tokens while we sent {len(prompt)}: calibrate a service that "
                "nobody else uses"
            )
        if new <= 0 or busy_s <= 0:
            raise ConfigError(
                f"{prefill.name} at {prefill.url} counted {new} tokens in {busy_s:g} s for a prompt of "
                f"{len(prompt)}: calibrating needs the counters of SGLang 0.5.23's /v1/loads"
            )
        cached = len(prompt) - new
        self.result.cached_tokens += cached
        self.result.prefill.append(Row(pass_counts(cached, new, self._limits.chunk_tokens), busy_s))
        if new <= self._limits.chunk_tokens and cached == 0:
            self.result.over_pair.append((answer, busy_s))
        if sent_before is not None and sent_after is not None and sent_after.count > sent_before.count:
            sent = sent_after.kv_bytes - sent_before.kv_bytes
            count, latency_s = (
                sent_after.count - sent_before.count,
                sent_after.latency_s - sent_before.latency_s,
            )
            # SGLang's latency runs from the first hand-over: a cached prefix leaves before the pass, and all
            # chunks but the last while others are computed.
            if not cached:
                self.result.bytes_per_token.append(sent / _pages_up(len(prompt), self._limits.page_tokens))
                if new <= self._limits.chunk_tokens:
                    self.result.link.append(Row((count, sent), latency_s))

    async def _settled(self, worker: LiveWorker, is_complete: Callable[[WorkerLoad], bool]) -> WorkerLoad:
        """Its counters after our requests. SGLang publishes them at intervals, so the last answer may be here
        before they are; what does not come within SETTLE_S does not come."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            load = await self._service.wait_idle(worker)
            if is_complete(load) or time.monotonic() > deadline_s:
                return load
            await asyncio.sleep(0.02)

    def _longest_prompt(self) -> int:
        pool = min(self._limits.prefill_pool_tokens, self._limits.decode_pool_tokens)
        return max(64, min(self._scale.max_tokens, pool // 3))

    # -- decode ------------------------------------------------------------------------------

    async def measure_decode(self, budget_s: float) -> None:
        """Rows of decode: all servers at once, and in every second round one server alone."""
        watch = Stopwatch(budget_s)
        step_s = await self._probe_step()
        plan = self._decode_plan()
        decodes = self._service.decodes
        # A row of b requests takes about (1 + b / 4) times the steps of one; time for two rounds of all rows.
        weight = sum(1.0 + batch / 4 for _, batch in plan)
        out = int(min(192.0, max(24.0, budget_s / (step_s * weight * 2.5))))
        round_s = 0.0
        for index in range(MAX_ROUNDS):
            if index >= 2 and watch.left_s < round_s:
                break
            begin_s = watch.spent_s
            is_alone = len(decodes) > 1 and index % 2 == 1
            chosen = [decodes[index // 2 % len(decodes)]] if is_alone else decodes
            for context, batch in plan:
                rows = await self._decode_rows(chosen, context, batch, out)
                (self.result.alone if is_alone else self.result.decode).extend(rows)
                if watch.left_s < -budget_s:
                    return
            round_s = watch.spent_s - begin_s

    async def _probe_step(self) -> float:
        (row,) = await self._decode_rows(self._service.decodes[:1], SHORT_TOKENS, 1, 16)
        return row.seconds / row.counts[0]

    def _decode_plan(self) -> list[tuple[int, int]]:
        """(context, batch) of each row. Long contexts in small batches only: their prefill takes long, and
        until all of a batch has arrived its first ones have finished."""
        pool, longest = self._limits.decode_pool_tokens, self._longest_prompt()
        most = min(self._scale.max_batch, self._limits.max_running_requests)
        batches = [1]
        while batches[-1] * 2 <= most:
            batches.append(batches[-1] * 2)
        plan = [(SHORT_TOKENS, batch) for batch in batches]
        plan += [(longest, 1), (longest // 2, 1), (longest // 2, 2), (longest // 8, min(4, most))]
        return [(context, batch) for context, batch in plan if batch * (context + 512) <= pool]

    async def _decode_rows(
        self, decodes: Sequence[LiveWorker], context: int, batch: int, out: int
    ) -> list[Row]:
        before = [await self._service.wait_idle(decode) for decode in decodes]
        prefills = self._service.prefills
        await asyncio.gather(
            *(
                self._service.over_pair(prefills[index % len(prefills)], decode, self._ids(context), out)
                for index in range(batch)
                for decode in decodes
            )
        )
        # SGLang leaves out the step after a pause, of which a batch that comes in parts has several.
        grown = 0.9 * batch * (out - 1) - batch
        after = [
            await self._settled(decode, partial(_has_decoded, old, grown))
            for decode, old in zip(decodes, before, strict=True)
        ]
        return [
            decode_row(decode.name, old, new, context=context, batch=batch, out=out)
            for decode, old, new in zip(decodes, before, after, strict=True)
        ]

    # -- reply -------------------------------------------------------------------------------

    async def measure_reply(self, budget_s: float) -> None:
        """TTFT of short prompts over the balancer, if there is one."""
        watch = Stopwatch(budget_s)
        count = 0
        while self._service.url and count < 25 and (count < 5 or watch.left_s > 0):
            answer = await self._service.through(self._ids(SHORT_TOKENS), 1)
            self.result.through_s.append(answer.ttft_s)
            count += 1


def pass_counts(context: int, new: int, chunk: int) -> tuple[float, float, float, float]:
    """How often each of PREFILL_TERMS is paid by ``new`` tokens after ``context``, in chunks."""
    bounds = [*range(0, new, chunk), new]
    passes, pairs, reread = 0, 0.0, 0.0
    for begin, end in pairwise(bounds):
        known, now = context + begin, end - begin
        passes, pairs, reread = passes + 1, pairs + now * (known + now / 2), reread + known * known / 2
    return float(passes), float(new), pairs, reread


def decode_row(
    name: str, before: WorkerLoad, after: WorkerLoad, *, context: int, batch: int, out: int
) -> Row:
    """Growth of a server's decode moments while ``batch`` requests of equal size ran to their end.

    A request takes ``out - 1`` steps, its first token came from prefill. SGLang leaves out a step after a
    pause; the context is scaled to the steps that it counted.

    Raises:
        ConfigError: if it counted none, or more than we asked for.
    """
    grown = after.decode_moments[:3] or (0.0, 0.0, 0.0)
    if before.decode_moments:
        grown = tuple(new - old for new, old in zip(grown, before.decode_moments, strict=False))
    steps, batches, time_us = grown
    expected = float(batch * (out - 1))
    if steps <= 0 or time_us <= 0:
        raise ConfigError(
            f"{name} counted no decode steps while {batch} requests of {out} tokens ran: calibrating needs "
            "the decode_moments of SGLang 0.5.23's /v1/loads"
        )
    if batches > expected * STRANGER + 2:
        raise ConfigError(
            f"{name} decoded {batches:.0f} tokens while we asked for {expected:.0f}: calibrate a service "
            "that nobody else uses"
        )
    mean_context = context + out / 2
    return Row((steps, batches, batches * mean_context), time_us / 1e6)


def _has_decoded(before: WorkerLoad, tokens: float, load: WorkerLoad) -> bool:
    made = [moments[1] if moments else 0.0 for moments in (before.decode_moments, load.decode_moments)]
    return made[1] - made[0] >= tokens


def _pages_up(tokens: int, page: int) -> int:
    return -(-tokens // page) * page
