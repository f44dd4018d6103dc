"""Headers of a worker's answer that concern its connection, or that we set, do not reach the client."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
from pdserve.types import Role
from tests.support.balancer_client import Exchange
from tests.support.sglang_server import FakeSGLang, until

START = re.compile(rb"HTTP/1\.1 200 \w+\r\n")
OF_A_WEB_SERVER = (
    b"upgrade: h2,h2c\r\ntrailer: x-sum\r\nte: trailers\r\nproxy-connection: close\r\n"
    b"access-control-allow-origin: *\r\naccess-control-allow-credentials: false\r\n"
    b"access-control-expose-headers: x-worker\r\nx-worker: 7\r\n"
)


@asynccontextmanager
async def web_server(worker: str) -> AsyncIterator[str]:
    """A web server before a worker that adds headers of its own to each answer."""
    pipes: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, added: bytes) -> None:
        while data := await reader.read(65536):
            writer.write(START.sub(rb"\g<0>" + added, data, count=1))
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(worker)
        from_worker, to_worker = await asyncio.open_connection(parts.hostname, parts.port)
        pipes.add(asyncio.create_task(pipe(reader, to_worker, b"")))
        pipes.add(asyncio.create_task(pipe(from_worker, writer, OF_A_WEB_SERVER)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for each in pipes:
            each.cancel()


@asynccontextmanager
async def balancer_before(decode: str, prefill: str) -> AsyncIterator[Balancer]:
    balancer = Balancer(
        BalancerConfig(port=0, prefill=((prefill, 8998),), decode=(decode,), load_poll_s=60.0)
    )
    await balancer.start()
    try:
        await until(lambda: balancer.fleet.scheduler.has_ready_pair)
        yield balancer
    finally:
        await balancer.stop()


async def test_a_client_sees_one_origin_and_no_upgrade() -> None:
    async with (
        FakeSGLang(Role.PREFILL) as prefill,
        FakeSGLang(Role.DECODE) as decode,
        web_server(decode.url) as url,
        balancer_before(url, prefill.url) as balancer,
    ):
        for body in ({"text": "a"}, {"text": "a", "stream": True}):
            exchange = Exchange(balancer.url, "POST", "/generate", body, origin="http://page")
            async with exchange:
                head = (await exchange.read_until(b"\r\n\r\n")).decode().lower().split("\r\n")
            names = [line.partition(":")[0] for line in head[1:] if line]
            assert "x-worker: 7" in head, "other headers are the client's"
            assert "access-control-allow-origin: http://page" in head
            assert len(names) == len(set(names)), names
            assert not {"upgrade", "trailer", "te", "proxy-connection"} & set(names)
