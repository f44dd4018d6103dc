"""The upstream client where a lesser one hangs or takes a broken answer for a whole one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from pdserve.errors import ConfigError, WorkerError, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.http.client_connection import MAX_IDLE
from tests.http.test_client import LIMITS, raw_server
from tests.support.sglang_server import FakeSGLang, until


@pytest.fixture
async def pool() -> AsyncIterator[HttpClient]:
    client = HttpClient(connect_s=30.0)
    yield client
    await client.close()


@pytest.mark.parametrize("head", [b"204 No Content", b"304 Not Modified\r\ncontent-length: 5"])
async def test_some_statuses_have_no_body(pool: HttpClient, head: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + head + b"\r\n\r\n")
        await reader.read()  # stays open: waiting for its end would time out

    async with raw_server(answer) as url:
        assert (await pool.fetch(url, "GET", "/", timeout_s=5)).body == b""


async def test_a_reset_is_not_the_end_of_a_body_without_length(pool: HttpClient) -> None:
    has_head = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhel")
        await has_head.wait()
        no_linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        writer.transport.abort()

    async with raw_server(answer) as url:
        response = await pool.open(url, "GET", "/", **LIMITS)
        has_head.set()
        with pytest.raises(WorkerUnreachable, match="in the middle of its answer"):
            await response.read()


async def test_a_port_out_of_range_is_refused(pool: HttpClient) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        await pool.fetch("http://127.0.0.1:99999", "GET", "/", timeout_s=5)


async def test_a_host_name_that_cannot_be_is_unreachable(pool: HttpClient) -> None:
    with pytest.raises(WorkerUnreachable, match="cannot connect"):
        await pool.fetch("http://a..b:80", "GET", "/", timeout_s=5)


@pytest.mark.slow
async def test_a_thousand_fetches_at_once(pool: HttpClient) -> None:
    async with FakeSGLang() as worker:
        fetches = [pool.fetch(worker.url, "GET", "/v1/models", timeout_s=30) for _ in range(1000)]
        assert {answer.status for answer in await asyncio.gather(*fetches)} == {200}
        await until(lambda: len(pool.connections) <= MAX_IDLE, "what is too many to keep is closed")


async def test_closing_the_pool_ends_exchanges_that_still_connect(pool: HttpClient) -> None:
    async with FakeSGLang() as worker:
        response = pool.start(worker.url, "POST", "/generate", b"{}", limits=(5, 5))
        await pool.close()
        with pytest.raises(WorkerUnreachable, match="stopping"):
            await asyncio.wait_for(response.wait_head(), 1)
        assert worker.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ndate: x\r\nserver: y\r\ncontent-length: 2\r\ncontent-type: text/html\r\n\r\n{}",
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\ncontent-type: text/plain\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-type: a\r\nx-odd:  spaced value \r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: a\r\nconnection: close\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-type: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\ncontent-type: a\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\ncontent-type: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2x\r\ncontent-type: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 30\r\ncontent-type: a\r\n\r\n{}",
        b"HTTP/9.1 200 OK\r\ncontent-length: 2\r\ncontent-type: a\r\n\r\n{}",
    ],
)
async def test_an_answer_means_the_same_in_one_piece_and_in_many(pool: HttpClient, answer: bytes) -> None:
    """The quick way of reading a whole answer must not read anything that the parser reads otherwise."""

    async def fetch(*pieces: bytes) -> object:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.001)  # a piece of its own for the reader
            writer.close()

        async with raw_server(serve) as url:
            try:
                got = await pool.fetch(url, "GET", "/", timeout_s=5)
            except WorkerError as exc:
                return type(exc)
            return got.status, got.headers, got.body

    cut = answer.index(b"\r\n\r\n") + 2
    assert await fetch(answer) == await fetch(answer[:cut], answer[cut:])
