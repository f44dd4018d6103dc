"""The upstream client over real sockets: framing, reuse, time limits, back pressure, closing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from pdserve.errors import ConfigError, WorkerTimeout, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.http.client_response import HIGH_WATER_BYTES, Wakeup
from tests.support.sglang_server import FakeSGLang, until

LIMITS: Any = {"first_byte_s": 5.0, "silence_s": 5.0}
STREAM = json.dumps({"stream": True, "rid": "r"}).encode()


LOOPS = {"asyncio": asyncio.DefaultEventLoopPolicy, "uvloop": uvloop.EventLoopPolicy}


@pytest.fixture(scope="module", params=LOOPS)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The balancer runs on uvloop, whose transports differ in what a closed one forgives."""
    policy: asyncio.AbstractEventLoopPolicy = LOOPS[request.param]()
    return policy


@pytest.fixture
async def pool() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


@pytest.fixture
async def worker() -> AsyncIterator[FakeSGLang]:
    async with FakeSGLang() as fake:
        yield fake


@asynccontextmanager
async def raw_server(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> AsyncIterator[str]:
    """A server that treats each connection as the test says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def says(*parts: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """Read one request head, write each part as its own segment, end the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return answer


# -- framing ---------------------------------------------------------------------------------


async def test_fetch_returns_status_headers_and_body(pool: HttpClient, worker: FakeSGLang) -> None:
    answer = await pool.fetch(worker.url, "GET", "/v1/models", timeout_s=5)
    assert answer.status == 200
    assert json.loads(answer.body)["data"][0]["id"] == "fake-model"
    assert (b"content-type", b"application/json") in answer.headers


async def test_an_error_status_is_an_answer(pool: HttpClient, worker: FakeSGLang) -> None:
    assert (await pool.fetch(worker.url, "GET", "/nothing", timeout_s=5)).status == 404


async def test_request_carries_body_host_and_headers(pool: HttpClient, worker: FakeSGLang) -> None:
    body = json.dumps({"text": "x" * 200_000}).encode()  # longer than one write
    answer = await pool.fetch(
        worker.url, "POST", "/generate", body, headers=((b"authorization", b"Bearer k"),), timeout_s=5
    )
    assert answer.status == 200
    assert worker.requests == [json.loads(body)]
    assert worker.headers[0]["host"] == worker.url.removeprefix("http://")
    assert worker.headers[0]["authorization"] == "Bearer k"


async def test_a_stream_arrives_chunk_by_chunk(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.token_delay_s = 0.01
    response = await pool.open(worker.url, "POST", "/generate", STREAM, **LIMITS)
    chunks = [chunk async for chunk in response]
    assert response.status == 200
    assert response.header(b"content-type").startswith(b"text/event-stream")
    assert len(chunks) == 4
    assert chunks[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",),
        (b"HTTP/1.1 200 O", b"K\r\nContent-Le", b"ngth: 5\r\n\r\nhe", b"llo"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"),
        (b"HTTP/1.0 200 OK\r\nconnection: close\r\n\r\nhello",),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ],
    ids=["length", "split", "chunked", "until-close", "http-1.0", "interim"],
)
async def test_every_framing_gives_the_same_body(pool: HttpClient, parts: tuple[bytes, ...]) -> None:
    async with raw_server(says(*parts)) as url:
        answer = await pool.fetch(url, "GET", "/", timeout_s=5)
    assert (answer.status, answer.body) == (200, b"hello")


@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello",),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",),
        (b"HTTP/1.1 200 OK\r\ncontent-le",),
    ],
    ids=["length", "chunked", "head"],
)
async def test_a_truncated_answer_is_an_error_not_an_end(pool: HttpClient, parts: tuple[bytes, ...]) -> None:
    async with raw_server(says(*parts)) as url:
        with pytest.raises(WorkerUnreachable, match="in the middle of its answer"):
            await pool.fetch(url, "GET", "/", timeout_s=5)


async def test_bytes_before_a_break_are_delivered_first(pool: HttpClient) -> None:
    async with raw_server(says(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello")) as url:
        response = await pool.open(url, "GET", "/", **LIMITS)
        seen = []
        with pytest.raises(WorkerUnreachable):
            async for chunk in response:
                seen.append(chunk)
    assert b"".join(seen) == b"hello"


async def test_not_http_is_unreachable(pool: HttpClient) -> None:
    async with raw_server(says(b"SSH-2.0-OpenSSH_9.6\r\n")) as url:
        with pytest.raises(WorkerUnreachable, match="not HTTP"):
            await pool.fetch(url, "GET", "/", timeout_s=5)


async def test_https_urls_are_spoken_to_in_tls(pool: HttpClient) -> None:
    hello = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hello
        hello = await reader.read(3)

    async with raw_server(answer) as url:
        with pytest.raises(WorkerUnreachable, match="cannot connect"):
            await pool.fetch(url.replace("http://", "https://"), "GET", "/", timeout_s=5)
    assert hello[:2] == b"\x16\x03"  # a TLS handshake record


async def test_an_address_that_is_none_is_refused(pool: HttpClient) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        await pool.fetch("worker-7", "GET", "/", timeout_s=5)


# -- keep-alive ------------------------------------------------------------------------------


async def test_one_connection_serves_requests_in_a_row(pool: HttpClient, worker: FakeSGLang) -> None:
    for _ in range(5):
        await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    assert worker.num_accepted == 1


async def test_concurrent_requests_get_a_connection_each(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.delay_s = 0.02
    one = [pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5) for _ in range(4)]
    await asyncio.gather(*one)
    assert worker.num_accepted == 4
    assert len(worker.requests) == 4


async def test_a_stale_kept_connection_is_replaced_unnoticed(pool: HttpClient, worker: FakeSGLang) -> None:
    await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    worker.behaviour.mute_connections = 1  # it dies at its next request, before any byte
    answer = await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    assert answer.status == 200
    assert worker.num_accepted == 2


async def test_a_request_is_not_sent_a_third_time(pool: HttpClient, worker: FakeSGLang) -> None:
    await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    worker.behaviour.mute_connections = 1
    worker.behaviour.reset_before_head = True
    with pytest.raises(WorkerUnreachable, match="without an answer"):
        await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    assert len(worker.requests) == 2  # the first, and the one that was sent anew


async def test_a_fresh_connection_that_dies_is_not_tried_again(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.reset_before_head = True
    with pytest.raises(WorkerUnreachable, match="without an answer"):
        await pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5)
    assert len(worker.requests) == 1


async def test_a_connection_closed_by_the_worker_leaves_the_pool(
    pool: HttpClient, worker: FakeSGLang
) -> None:
    await pool.fetch(worker.url, "GET", "/ping", timeout_s=5)
    worker.drop_idle()
    await until(lambda: not pool.connections, "the pool forgets the connection")
    assert (await pool.fetch(worker.url, "GET", "/ping", timeout_s=5)).status == 200


async def test_idle_connections_are_closed_after_a_while(
    pool: HttpClient, worker: FakeSGLang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.http.client.IDLE_S", 0.05)
    await pool.fetch(worker.url, "GET", "/ping", timeout_s=5)
    await until(lambda: worker.num_connections == 0, "the idle connection is closed")


async def test_a_worker_that_says_close_is_not_reused(pool: HttpClient) -> None:
    accepted = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        await reader.read()  # stays open: only the header tells

    async with raw_server(answer) as url:
        for _ in range(2):
            await pool.fetch(url, "GET", "/", timeout_s=5)
    assert accepted == 2


# -- time limits -----------------------------------------------------------------------------


async def test_refused_connection_is_unreachable(pool: HttpClient, worker: FakeSGLang) -> None:
    await worker.stop()
    with pytest.raises(WorkerUnreachable, match="cannot connect") as caught:
        await pool.fetch(worker.url, "GET", "/", timeout_s=5)
    assert caught.value.url == worker.url


async def test_no_first_byte_is_a_timeout(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.hang = True
    with pytest.raises(WorkerTimeout, match=r"silent for 0\.05 s without a first byte"):
        await pool.open(worker.url, "POST", "/generate", b"{}", first_byte_s=0.05, silence_s=5)
    await until(lambda: worker.disconnects, "the socket is closed")


async def test_silence_in_the_middle_is_a_timeout(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.hang_after = 1
    response = await pool.open(worker.url, "POST", "/generate", STREAM, first_byte_s=5, silence_s=0.05)
    with pytest.raises(WorkerTimeout, match=r"silent for 0\.05 s in the middle"):
        await response.read()


async def test_a_slow_but_not_silent_worker_is_waited_for(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.tokens, worker.behaviour.token_delay_s = 10, 0.03
    response = await pool.open(worker.url, "POST", "/generate", STREAM, first_byte_s=0.2, silence_s=0.2)
    assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_fetch_limits_the_whole_exchange(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.tokens, worker.behaviour.token_delay_s = 1000, 0.02
    with pytest.raises(WorkerTimeout, match="POST /generate within"):
        await pool.fetch(worker.url, "POST", "/generate", STREAM, timeout_s=0.1)
    await until(lambda: worker.disconnects, "the socket is closed")


# -- closing and holding up ------------------------------------------------------------------


async def test_close_in_the_middle_closes_the_socket(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.hang_after = 1
    response = await pool.open(worker.url, "POST", "/generate", STREAM, **LIMITS)
    response.close()
    await until(lambda: worker.disconnects == ["r"], "the worker sees the connection go")
    assert [chunk async for chunk in response] == [] or response.is_closed
    assert response.error is None


async def test_close_before_the_connection_stands_sends_nothing(pool: HttpClient, worker: FakeSGLang) -> None:
    response = pool.start(worker.url, "POST", "/generate", b"{}", limits=(5, 5))
    response.close()
    await pool.fetch(worker.url, "GET", "/ping", timeout_s=5)
    assert worker.requests == []


async def test_cancelling_a_fetch_closes_its_socket(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.hang = True
    fetch = asyncio.create_task(pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5))
    await until(lambda: worker.requests, "the request arrives")
    fetch.cancel()
    await until(lambda: worker.disconnects, "the socket is closed")


@pytest.mark.slow
async def test_a_lagging_consumer_holds_up_the_worker(pool: HttpClient, worker: FakeSGLang) -> None:
    worker.behaviour.tokens, worker.behaviour.padding_bytes = 2000, 20_000  # 40 MB in all
    response = await pool.open(worker.url, "POST", "/generate", STREAM, first_byte_s=5, silence_s=0.1)
    await until(lambda: response.is_paused and worker.is_write_paused, "the worker's buffer is full")
    await asyncio.sleep(0.15)  # longer than silence_s: being held up is not silence
    assert response.error is None
    held = response.take()
    assert sum(map(len, held)) < 10 * HIGH_WATER_BYTES
    rest = await response.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b"".join(held).count(b"\n\n") + rest.count(b"\n\n") == 2001


async def test_closing_the_pool_ends_exchanges_and_refuses_new_ones(worker: FakeSGLang) -> None:
    pool = HttpClient()
    worker.behaviour.hang = True
    fetch = asyncio.create_task(pool.fetch(worker.url, "POST", "/generate", b"{}", timeout_s=5))
    await until(lambda: worker.requests, "the request arrives")
    await pool.close()
    with pytest.raises(WorkerUnreachable, match="stopping"):
        await fetch
    with pytest.raises(WorkerUnreachable, match="stopping"):
        await pool.fetch(worker.url, "GET", "/ping", timeout_s=5)
    await until(lambda: worker.num_connections == 0, "no connection is left")


async def test_a_wakeup_before_the_wait_is_not_lost() -> None:
    wakeup = Wakeup()
    wakeup.set()
    await asyncio.wait_for(wakeup.wait(), 1)
    waiter = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    wakeup.set()
    wakeup.set()
    await asyncio.wait_for(waiter, 1)
