"""A running service, asked questions whose answers take a known amount of work.

    LiveService.find(...)  ─► its workers, from the balancer's state document or as they were named
         .over_pair(...)   ─► both legs of one request sent to this very pair, as a balancer would
         .through(...)     ─► the same request over the balancer
         .counters(worker) ─► what the worker itself counted so far

Times are taken here, at the client, when bytes arrive; the counters are the
workers' own and know nothing of HTTP. Nothing is interpreted here: that is
calibrate.py's part.
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


@dataclass(frozen=True, slots=True)
class Transfers:
    """What a prefill server sent so far: payload bytes, transfers, and SGLang's latency of each, summed."""

    kv_bytes: int = 0
    count: int = 0
    latency_s: float = 0.0


class LiveService:
    """Workers and a way to ask them. ``async with`` closes the connections at the end."""

    def __init__(self, workers: Sequence[LiveWorker], url: str = "", key: str = "") -> None:
        self.url = url
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

    async def find(self) -> None:
        """Take the workers from the balancer's state document.

        Raises:
            ConfigError: if there is no such document, or it names no worker that takes traffic.
        """
        document = await self.ask(self.url, "/pdserve/state")
        if not isinstance(document, dict) or "workers" not in document:
            raise ConfigError(
                f"{self.url} has no /pdserve/state, so it is no pdserve service; name the servers "
                "themselves by --prefill URL PORT and --decode URL"
            )
        found = [_worker_of(row) for row in document["workers"] if row.get("state") == "ready"]
        self.prefills = [worker for worker in found if worker.role is Role.PREFILL]
        self.decodes = [worker for worker in found if worker.role is Role.DECODE]
        if not self.prefills or not self.decodes:
            raise ConfigError(
                f"{self.url} has {len(self.prefills)} prefill and {len(self.decodes)} decode servers that "
                "are ready; calibrating takes at least one of each"
            )

    # -- questions ---------------------------------------------------------------------------

    async def ask(self, url: str, path: str, method: str = "GET") -> Any:
        """A JSON document; None where the server has no such route or answers no JSON."""
        try:
            reply = await self._pool.fetch(url, method, path, headers=self._headers, timeout_s=ASK_S)
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

    async def transfers(self, worker: LiveWorker) -> Transfers | None:
        """What it has sent; None for a server without pdserve's plugin."""
        document = await self.ask(worker.url, "/pdserve/instance")
        counts = document.get("transfer") if isinstance(document, dict) else None
        if not isinstance(counts, dict):
            return None
        return Transfers(
            int(counts.get("kv_bytes", 0)), int(counts.get("transfers", 0)),
            float(counts.get("latency_us", 0)) / 1e6,
        )  # fmt: skip

    async def flush(self) -> None:
        """Empty every prefix cache."""
        for worker in (*self.prefills, *self.decodes):
            await self._pool.fetch(
                worker.url, "POST", "/flush_cache?timeout=20", headers=self._headers, timeout_s=30.0
            )

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
        content = json.dumps(body).encode()
        sender = asyncio.ensure_future(self._stream(prefill.url, content, len(input_ids)))
        receiver = asyncio.ensure_future(self._stream(decode.url, content, len(input_ids)))
        try:
            await asyncio.gather(sender, receiver)
        finally:
            sender.cancel()
            receiver.cancel()
        return receiver.result()

    async def through(self, input_ids: Sequence[int], max_new_tokens: int) -> LiveAnswer:
        """The same over the balancer; it chooses the pair."""
        content = json.dumps(generate_body(input_ids, max_new_tokens)).encode()
        return await self._stream(self.url, content, len(input_ids))

    async def _stream(self, url: str, content: bytes, prompt_tokens: int) -> LiveAnswer:
        sent_s = time.monotonic()
        response = await self._pool.open(
            url,
            "POST",
            "/generate",
            content,
            headers=self._headers,
            first_byte_s=ANSWER_S,
            silence_s=ANSWER_S,
        )
        try:
            if response.status != 200:
                raise WorkerRejected(url, response.status, await response.read())
            first_s = last_s = 0.0
            last, splitter = b"", EventSplitter()
            async for chunk in response:
                events = [event_data(event) for event in split_events(splitter.feed(chunk))]
                tokens = [event for event in events if event.startswith(b"{")]
                if tokens:
                    last, last_s = tokens[-1], time.monotonic()
                    first_s = first_s or last_s
        finally:
            response.close()
        return _answer(url, last, prompt_tokens, (sent_s, first_s, last_s))


def _answer(url: str, event: bytes, prompt_tokens: int, times: tuple[float, float, float]) -> LiveAnswer:
    meta = json.loads(event).get("meta_info", {}) if event else {}
    finish = meta.get("finish_reason") or {}
    if not meta or finish.get("type") == "abort":
        raise WorkerError(url, f"ended a stream badly: {finish.get('message', 'no event with a token')}")
    return LiveAnswer(
        *times, prompt_tokens, int(meta.get("cached_tokens") or 0), int(meta.get("completion_tokens") or 1)
    )


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
