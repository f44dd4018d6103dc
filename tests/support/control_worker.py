"""A small real server that records each control request and answers as told, and a balancer over some.

It passes probes, so its pairs become ready; apart from that it knows nothing of SGLang.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
from tests.support.balancer_client import Exchange, Reply
from tests.support.sglang_server import until

JSON = "application/json"
TOKEN = {"text": " a b", "output_ids": [1, 2], "meta_info": {"finish_reason": {"type": "length"}}}
OWN_QUESTIONS = ("/ping", "/v1/loads?", "/generate", "/model_info", "/ready", "/server_info")
"""What a balancer asks by itself; not recorded unless the test has told an answer for it."""


@dataclass
class Seen:
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's document."""
        return json.loads(self.body)


@dataclass
class Told:
    """One answer."""

    status: int = 200
    body: bytes = b"{}"
    content_type: str = JSON


@dataclass
class ControlWorker:
    """One server on a free port. ``answers`` is by path; anything else gets ``{}``."""

    answers: dict[str, Told] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    gate: asyncio.Event | None = None
    """If set, wait for it before any answer to a recorded request."""

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def targets(self) -> list[str]:
        """Method and target of each recorded request."""
        return [f"{seen.method} {seen.target}" for seen in self.seen]

    def tell(self, path: str, document: object = None, status: int = 200, **more: Any) -> None:
        """Answer ``path`` so from now on."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers[path] = Told(status, body, **more)

    async def stop(self) -> None:
        """Close the port and every connection."""
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # one may not have begun

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                await self._exchange(reader, writer)
        writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = first.split(" ")
        told = await self._answer(Seen(method, target, headers, body))
        answer = f"HTTP/1.1 {told.status} X\r\ncontent-type: {told.content_type}\r\n"
        writer.write(f"{answer}content-length: {len(told.body)}\r\n\r\n".encode() + told.body)
        if headers.get("connection", "").lower() == "close":
            await writer.drain()
            writer.close()

    async def _answer(self, seen: Seen) -> Told:
        path = urlsplit(seen.target).path
        if path not in self.answers and seen.target.startswith(OWN_QUESTIONS):
            return Told(body=json.dumps(TOKEN).encode()) if path == "/generate" else Told()
        self.seen.append(seen)
        if self.gate is not None:
            await self.gate.wait()
        return self.answers.get(path, Told())


@dataclass
class ControlSite:
    """A balancer and the servers behind it."""

    balancer: Balancer
    prefills: list[ControlWorker]
    decodes: list[ControlWorker]

    @property
    def workers(self) -> list[ControlWorker]:
        """Prefill first, as the fleet orders them."""
        return self.prefills + self.decodes

    def forget(self) -> None:
        """Drop what was recorded."""
        for worker in self.workers:
            worker.seen.clear()

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """A request and its whole reply."""
        async with Exchange(self.balancer.url, method, path, body, **headers) as exchange:
            return await exchange.reply()


@asynccontextmanager
async def control_site(
    prefill: int = 1, decode: int = 1, *, is_ready: bool = False, **settings: Any
) -> AsyncIterator[ControlSite]:
    """A balancer over that many; ``is_ready`` waits until a token came through every pair."""
    async with AsyncExitStack() as stack:
        prefills = [await stack.enter_async_context(ControlWorker()) for _ in range(prefill)]
        decodes = [await stack.enter_async_context(ControlWorker()) for _ in range(decode)]
        config = BalancerConfig(
            port=0,
            prefill=tuple((worker.url, 8998 + i) for i, worker in enumerate(prefills)),
            decode=tuple(worker.url for worker in decodes),
            **{"load_poll_s": 60.0, **settings},
        )
        balancer = Balancer(config)
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        if is_ready:
            pairs = balancer.fleet.pairs
            await until(lambda: pairs() and all(str(pair.state) == "ready" for pair in pairs()), "all ready")
        members = balancer.fleet.workers()
        await until(lambda: all(worker.answers.is_set() for worker in members), "all introduced")
        site = ControlSite(balancer, prefills, decodes)
        site.forget()
        yield site
