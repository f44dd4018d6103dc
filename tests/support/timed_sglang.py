"""A pair of fakes whose work takes a known time: virtual, in their counters, so that tests are quick.

Prefill keeps a prefix cache by pages and computes in chunks; decode runs one batch
of what has arrived, a step at a time. Both count as SGLang's scheduler does.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

from pdserve.types import Role
from tests.support.sglang_answers import event_of
from tests.support.sglang_connection import FakeConnection
from tests.support.sglang_server import FakeSGLang

PAGE = 16


@dataclass
class Costs:
    """What work costs, in seconds, and what the fake does to spoil a measurement."""

    prefill: tuple[float, float, float, float] = (0.02, 2e-4, 2e-7, 0.0)
    """A pass, a token, a pair, a pair known before."""
    decode: tuple[float, float, float] = (0.01, 0.002, 3e-7)
    chunk: int = 512
    pool: int = 65536
    noise: float = 0.0
    """Standard deviation, relative; one row in ten takes three times as long besides."""
    chaos: bool = False
    """Times have nothing to do with the work."""
    has_counters: bool = True
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def spoil(self, seconds: float) -> float:
        """Seconds as they are measured."""
        if self.chaos:
            return self.rng.choice((0.001, 0.01, 0.1, 1.0))
        if not self.noise:
            return seconds
        return seconds * max(0.2, self.rng.gauss(1, self.noise)) * (3 if self.rng.random() < 0.1 else 1)


@dataclass
class _Running:
    connection: FakeConnection
    context: int
    left: int
    cached: int
    made: int = 1


class TimedSGLang(FakeSGLang):
    """A FakeSGLang that does ``/generate`` in virtual time. Fakes of one fleet share ``rooms_met``: the
    cached tokens of each prompt that prefill has computed."""

    def __init__(
        self, role: Role, costs: Costs, rooms_met: dict[int, asyncio.Future[int]], **more: Any
    ) -> None:
        super().__init__(role, **more)
        self.costs = costs
        self.mode = str(role)
        self._rooms_met = rooms_met
        self._prefixes: set[tuple[int, ...]] = set()
        self._running: list[_Running] = []
        self._loop_task: asyncio.Task[None] | None = None
        self.tokens = 0
        self.busy_us = 0.0
        self.moments = [0.0] * 6

    def _document(self, path: str) -> dict[str, Any] | None:
        costs = self.costs
        if path == "/v1/loads":
            load: dict[str, Any] = {"num_running_reqs": len(self._running), "num_waiting_reqs": 0}
            load |= {"max_total_num_tokens": costs.pool, "max_running_requests": 64}
            load["memory"] = {"kv_cache_gb": 0.25, "token_capacity": costs.pool}
            if costs.has_counters:
                load["total_prefill_uncached_tokens"] = self.tokens
                load["total_prefill_busy_us"] = int(self.busy_us)
                load["decode_moments"] = list(self.moments)
            return {"loads": [load]}
        if path == "/server_info":
            info: dict[str, Any] = {"model_path": "timed", "device": "cpu", "page_size": PAGE}
            info |= {"chunked_prefill_size": costs.chunk, "max_total_num_tokens": costs.pool}
            return info | {"disaggregation_mode": self.mode}
        return super()._document(path)

    async def _generate(self, connection: FakeConnection, path: str, body: bytes) -> None:
        request = json.loads(body)
        self.requests.append(request)
        room = request["bootstrap_room"]
        met = self._rooms_met.setdefault(room, asyncio.get_running_loop().create_future())
        if self.role is Role.PREFILL:
            met.set_result(self._compute(request["input_ids"]))
        cached = await met
        if not request.get("stream"):  # the balancer's probe of a pair
            connection.respond(200, json.dumps(event_of("/generate", "", 1)).encode())
            return
        connection.begin_stream()
        self._emit(connection, 1, cached)
        left = int(request["sampling_params"]["max_new_tokens"]) - 1
        if left <= 0 or self.role is Role.PREFILL:
            connection.end_stream()
            return
        self._running.append(_Running(connection, len(request["input_ids"]), left, cached))
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._decode())

    def _emit(self, connection: FakeConnection, tokens: int, cached: int) -> None:
        event = event_of("/generate", "", tokens)
        event["meta_info"]["cached_tokens"] = cached
        connection.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _compute(self, ids: list[int]) -> int:
        """The cost of a prompt; returns how much of it was known."""
        costs = self.costs
        pages = [tuple(ids[: end + PAGE]) for end in range(0, len(ids) - PAGE, PAGE)]
        known = PAGE * next((i for i, page in enumerate(pages) if page not in self._prefixes), len(pages))
        self._prefixes.update(tuple(ids[: end + PAGE]) for end in range(0, len(ids), PAGE))
        a, b, c, d = costs.prefill
        seconds, at = 0.0, known
        while at < len(ids):
            new = min(costs.chunk, len(ids) - at)
            seconds += a + b * new + c * new * (at + new / 2) + d * at * at / 2
            at += new
        self.busy_us += costs.spoil(seconds) * 1e6
        self.tokens += len(ids) - known
        return known

    async def _decode(self) -> None:
        a, b, c = self.costs.decode
        while self._running:
            batch = len(self._running)
            context = sum(each.context + each.made for each in self._running)
            time_us = self.costs.spoil(a + b * batch + c * context) * 1e6
            grown = (1, batch, time_us, batch * batch, batch * time_us, batch)
            self.moments = [old + new for old, new in zip(self.moments, grown, strict=True)]
            for each in self._running:
                each.made += 1
                each.left -= 1
                if not each.left:
                    self._emit(each.connection, each.made, each.cached)
                    each.connection.end_stream()
            self._running = [each for each in self._running if each.left]
            await asyncio.sleep(0.0005)
