"""A client of a running service and of each of its workers.

    LiveService.find(url)         ─► its workers, from the balancer's state document
         .over_pair(...)          ─► both legs of one request, sent to this very pair
         .generate(url, body)     ─► one streamed request
         .load(worker), wait_idle ─► what the worker itself counted so far

Times are taken when bytes arrive; counters are the workers' own and know nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pdserve.errors import ConfigError, WorkerError, WorkerRejected
from pdserve.http.client import HttpClient
from pdserve.http.sse import EventSplitter, event_data, split_events
from pdserve.scheduling.load_sample import LOADS_PATH, parse_loads
from pdserve.types import Role, WorkerLoad

ASK_S = 15.0
ANSWER_S = 120.0
"""Longest silence inside one request: a calibration that is slower than this has gone wrong."""


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """One server of the service. The bootstrap address is a prefill server's."""

    role: Role
    url: str
    name: str
    bootstrap_host: str = ""
    bootstrap_port: int | None = None


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """One request as its client saw it. Seconds of the monotonic clock; ``cached_tokens`` as the
    server reports them."""

    sent_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """From sending to the first event that carries a token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first; 0 for a single one."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class LiveService:
    """Workers and a way to ask them. ``async with`` closes the connections at the end."""

    def __init__(self, workers: Sequence[LiveWorker] = (), key: str = "") -> None:
        self.prefills = [worker for worker in workers if worker.role is Role.PREFILL]
        self.decodes = [worker for worker in workers if worker.role is Role.DECODE]
        self._pool = HttpClient()
        self._headers = [(b"content-type", b"application/json")]
        if key:
            self._headers.append((b"authorization", f"Bearer {key}".encode()))
        self._rooms = random.SystemRandom()

    async def __aenter__(self) -> LiveService:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._pool.close()

    async def find(self, url: str) -> None:
        """Take the workers from the state document of the balancer at ``url``.

        Raises:
            ConfigError: if there is no such document, or it names no worker that takes traffic.
        """
        document = await self.ask(url, "/pdserve/state")
        if not isinstance(document, dict) or "workers" not in document:
            raise ConfigError(
                f"{url} has no /pdserve/state, so it is no pdserve service; name the servers "
                "themselves by --prefill URL PORT and --decode URL"
            )
        found = [_worker_of(row) for row in document["workers"] if row.get("state") == "ready"]
        self.prefills = [worker for worker in found if worker.role is Role.PREFILL]
        self.decodes = [worker for worker in found if worker.role is Role.DECODE]
        if not self.prefills or not self.decodes:
            raise ConfigError(
                f"{url} has {len(self.prefills)} prefill and {len(self.decodes)} decode servers that "
                "are ready; calibrating takes at least one of each"
            )

    # -- questions ---------------------------------------------------------------------------

    async def ask(self, url: str, path: str) -> Any:
        """A JSON document; None where the server has no such route or answers no JSON."""
        try:
            reply = await self._pool.fetch(url, "GET", path, headers=self._headers, timeout_s=ASK_S)
        except WorkerError as exc:
            raise ConfigError(f"cannot calibrate: {exc}") from exc
        if reply.status in (401, 403):
            raise ConfigError(f"{url} refuses {path} with status {reply.status}: give --api-key")
        if reply.status != 200:
            return None
        try:
            return json.loads(reply.body)
        except ValueError:
            return None

    async def load(self, worker: LiveWorker) -> WorkerLoad:
        """Its own load figures and counters.

        Raises:
            ConfigError: if it has none.
        """
        asked_s = time.monotonic()
        reply = await self._pool.fetch(worker.url, "GET", LOADS_PATH, headers=self._headers, timeout_s=ASK_S)
        if reply.status != 200:
            raise ConfigError(
                f"{worker.name} at {worker.url} answers /v1/loads with status {reply.status}: "
                "calibrating needs SGLang 0.5.23's counters"
            )
        return parse_loads(reply.body, sent_s=asked_s, received_s=time.monotonic()).load

    async def wait_idle(self, worker: LiveWorker) -> WorkerLoad:
        """Its figures once nothing runs or waits there; counters are complete then.

        Raises:
            ConfigError: if others keep it busy.
        """
        deadline_s = time.monotonic() + ASK_S
        while True:
            load = await self.load(worker)
            if load.is_idle:
                return load
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"{worker.name} does not become idle ({load.num_running_reqs} requests run, "
                    f"{load.queued_reqs} wait): calibrate a service that nobody else uses"
                )
            await asyncio.sleep(0.02)

    # -- requests ----------------------------------------------------------------------------

    async def over_pair(
        self, prefill: LiveWorker, decode: LiveWorker, input_ids: Sequence[int], max_new_tokens: int
    ) -> LiveAnswer:
        """One greedy request over this pair, never ended by a token.

        Raises:
            WorkerError: if either leg fails.
        """
        body = generate_body(input_ids, max_new_tokens)
        body |= {
            "bootstrap_host": prefill.bootstrap_host,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": self._rooms.getrandbits(62) + 1,
        }
        legs = [asyncio.ensure_future(self.generate(worker.url, body)) for worker in (prefill, decode)]
        try:
            _, answer = await asyncio.gather(*legs)
        finally:
            for leg in legs:
                leg.cancel()
        return answer

    async def generate(self, url: str, body: dict[str, Any]) -> LiveAnswer:
        """One streamed request of ``generate_body``.

        Raises:
            WorkerError: if it fails or ends early.
        """
        content, sent_s = json.dumps(body).encode(), time.monotonic()
        limits = {"first_byte_s": ANSWER_S, "silence_s": ANSWER_S}
        response = await self._pool.open(url, "POST", "/generate", content, headers=self._headers, **limits)
        try:
            if response.status != 200:
                raise WorkerRejected(url, response.status, await response.read())
            first_s = last_s = 0.0
            last, events = b"", EventSplitter()
            async for chunk in response:
                for event in split_events(events.feed(chunk)):
                    if (data := event_data(event)).startswith(b"{"):
                        last, last_s = data, time.monotonic()
                        first_s = first_s or last_s
        finally:
            response.close()
        meta = json.loads(last).get("meta_info", {}) if last else {}
        finish = meta.get("finish_reason") or {}
        if not meta or finish.get("type") == "abort":
            raise WorkerError(url, f"ended a stream badly: {finish.get('message', 'no event with a token')}")
        cached, made = int(meta.get("cached_tokens") or 0), int(meta.get("completion_tokens") or 1)
        return LiveAnswer(sent_s, first_s, last_s, len(body["input_ids"]), cached, made)


def generate_body(input_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """A native request, streamed, greedy, of exactly this many output tokens."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": list(input_ids), "stream": True, "sampling_params": sampling}


def named_workers(prefill: Sequence[tuple[str, int | None]], decode: Sequence[str]) -> list[LiveWorker]:
    """Servers given by address. A prefill server's bootstrap service is on its own host, as in SGLang."""
    workers = [
        LiveWorker(Role.PREFILL, url, f"prefill-{index}", urlsplit(url).hostname or "", port)
        for index, (url, port) in enumerate(prefill)
    ]
    return workers + [LiveWorker(Role.DECODE, url, f"decode-{index}") for index, url in enumerate(decode)]


def _worker_of(row: dict[str, Any]) -> LiveWorker:
    return LiveWorker(
        Role(row["role"]), row["url"], row["worker_id"], row.get("bootstrap_host", ""),
        row.get("bootstrap_port"),
    )  # fmt: skip
