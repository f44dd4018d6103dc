"""Clients that are slow, endless or not HTTP at all; and those that stay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.bootstrap import web
from pdserve.bootstrap.service import BootstrapService
from pdserve.bootstrap.web import MAX_HEAD_BYTES
from tests.support.bootstrap_parts import TIMEOUT_S, service


@pytest.fixture
async def impatient(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BootstrapService]:
    monkeypatch.setattr(web, "REQUEST_S", 0.2)
    async with service() as running:
        yield running


async def send(port: int, *pieces: bytes) -> tuple[int, Any]:
    """Status and JSON of what comes back until the service closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(TIMEOUT_S):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


async def test_clients_that_do_not_finish_their_request_are_let_go(impatient: BootstrapService) -> None:
    pieces = (
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHo",
        b"POST /fleet/heartbeat HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    )
    for status, answer in await asyncio.gather(*[send(impatient.port, piece) for piece in pieces]):
        assert (status, answer["code"]) == (408, "request_timeout")


async def test_a_client_that_says_nothing_is_closed_without_an_answer(impatient: BootstrapService) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    async with asyncio.timeout(TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()


async def test_a_body_that_trickles_in_is_late_as_a_whole(impatient: BootstrapService) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    writer.write(b"POST /fleet/heartbeat HTTP/1.1\r\nContent-Length: 999999\r\n\r\n")
    answer = asyncio.create_task(reader.read())
    async with asyncio.timeout(TIMEOUT_S):
        while not answer.done():
            writer.write(b" ")  # never silent for REQUEST_S
            await asyncio.sleep(0.02)
    assert b" 408 " in await answer
    writer.close()


async def test_long_poll_and_idle_keep_alive_are_not_slow_clients(impatient: BootstrapService) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    epoch, version = impatient.fleet.epoch, impatient.fleet.version
    path = f"/fleet/view?epoch={epoch}&after={version}&wait_s=0.5"
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(2):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["epoch"] == epoch
    with pytest.raises(TimeoutError):  # idle for longer than REQUEST_S: still open
        await asyncio.wait_for(reader.read(1), 0.4)
    writer.close()


async def test_head_without_end_is_refused() -> None:
    async with service() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /health HTTP/1.1\r\nX: ")
        answer = asyncio.create_task(reader.read())
        sent = 0
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not answer.done() and sent < 100 * MAX_HEAD_BYTES:
                    writer.write(b"x" * 8192)
                    sent += 8192
                    await writer.drain()
                    await asyncio.sleep(0)
                got = await answer
        except ConnectionError:
            got = b""  # closed while we were still sending: the answer may be lost
        assert sent < 100 * MAX_HEAD_BYTES
        assert got == b"" or b" 431 " in got
        writer.close()


async def test_head_just_over_the_limit_is_told_so() -> None:
    async with service() as running:
        status, answer = await send(running.port, b"GET /" + b"x" * MAX_HEAD_BYTES)
        assert (status, answer["code"]) == (431, "request_header_fields_too_large")


async def test_bytes_that_are_not_http_are_answered_in_json() -> None:
    async with service() as running:
        status, answer = await send(running.port, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert (status, answer["code"]) == (400, "bad_request")
