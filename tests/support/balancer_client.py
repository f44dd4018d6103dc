"""A balancer over fakes, and a client that shows the bytes on the wire, for the data-plane tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from msgspec import structs

from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
from pdserve.types import Role
from tests.support.sglang_server import FakeSGLang, until

DEADLINE_S = 60.0


@dataclass
class Reply:
    """A whole response; a chunked body is put together."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, raw: bytes) -> Self:
        """The response that these bytes are."""
        head, _, body = raw.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = _unchunk(body)
        return cls(int(status_line.split()[1]), headers, body)

    @property
    def json(self) -> Any:
        """The body's document."""
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of each SSE event."""
        return [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]


class Exchange:
    """One connection with one request on it. Leaving the ``async with`` closes it."""

    def __init__(self, url: str, method: str, path: str, body: object = None, **headers: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = {"host": "test", "content-length": str(len(content)), "connection": "close"}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        self._request = head.encode() + b"\r\n" + content

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        self._writer.write(self._request)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()

    def leave(self) -> None:
        """Break the connection now."""
        self._writer.transport.abort()

    async def read_until(self, mark: bytes) -> bytes:
        """Bytes up to and with ``mark``."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.readuntil(mark)

    async def reply(self) -> Reply:
        """Everything until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            return Reply.of(await self._reader.read())


def _unchunk(data: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = data.find(b"\r\n", at)
        size = int(data[at:end] or b"0", 16) if end > 0 else 0
        if not size:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


@dataclass
class Site:
    """A balancer and the fakes behind it. What the fakes saw of probes is forgotten at the start."""

    balancer: Balancer
    prefills: list[FakeSGLang]
    decodes: list[FakeSGLang]
    fakes: list[FakeSGLang] = field(init=False)

    def __post_init__(self) -> None:
        self.fakes = self.prefills + self.decodes

    @property
    def prefill(self) -> FakeSGLang:
        """The first one."""
        return self.prefills[0]

    @property
    def decode(self) -> FakeSGLang:
        """The first one."""
        return self.decodes[0]

    def exchange(self, method: str, path: str, body: object = None, **headers: str) -> Exchange:
        """A request, to be sent by ``async with``."""
        return Exchange(self.balancer.url, method, path, body, **headers)

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """A request and its whole reply."""
        async with self.exchange(method, path, body, **headers) as exchange:
            return await exchange.reply()

    async def generate(self, body: object, **headers: str) -> Reply:
        """POST /generate."""
        return await self.ask("POST", "/generate", body, **headers)

    def state(self, worker_id: str) -> str:
        """A worker's state in the fleet."""
        return next(str(w.state) for w in self.balancer.fleet.workers() if w.worker_id == worker_id)

    @property
    def counts(self) -> dict[str, int]:
        """``requests`` of the state document."""
        return structs.asdict(self.balancer.dispatcher.ledger.request_counts())

    @property
    def last(self) -> dict[str, Any]:
        """The newest row of ``recent``."""
        return structs.asdict(self.balancer.dispatcher.ledger.recent[-1].render())


@asynccontextmanager
async def running_site(
    prefill: int = 1, decode: int = 1, *, resumes: bool = False, **settings: Any
) -> AsyncIterator[Site]:
    """A balancer over that many fakes, every pair ready; load is not polled, so nothing else is sent.

    ``resumes``: the fakes tell their tokens, and share one line of breaks.
    """
    async with AsyncExitStack() as stack:
        prefills = [await _fake(stack, Role.PREFILL, i, resumes) for i in range(prefill)]
        decodes = [await _fake(stack, Role.DECODE, i, resumes) for i in range(decode)]
        for fake in decodes:
            fake.breaks = decodes[0].breaks
        config = BalancerConfig(
            port=0,
            prefill=tuple((fake.url, 8998 + i) for i, fake in enumerate(prefills)),
            decode=tuple(fake.url for fake in decodes),
            **{"load_poll_s": 60.0, **settings},
        )
        balancer = Balancer(config)
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        pairs = balancer.fleet.pairs
        await until(lambda: all(str(pair.state) == "ready" for pair in pairs()), "every pair ready")
        site = Site(balancer, prefills, decodes)
        for fake in site.fakes:
            fake.requests.clear()
            fake.headers.clear()
            fake.paths.clear()
        yield site


async def _fake(stack: AsyncExitStack, role: Role, index: int, resumes: bool) -> FakeSGLang:
    return await stack.enter_async_context(FakeSGLang(role, name=f"{role}-{index}", resumes=resumes))
