"""The client's connection: one write per answer, JSON for what is not HTTP, slow readers."""

from __future__ import annotations

import asyncio
import json

import pytest
import uvloop

from pdserve.balancer.client_protocol import CoalescedTransport
from tests.fakes import until
from tests.unit.balancer_client import Exchange, running_site

DEADLINE_S = 10.0


LOOPS = {"asyncio": asyncio.DefaultEventLoopPolicy, "uvloop": uvloop.EventLoopPolicy}


@pytest.fixture(scope="module", params=LOOPS)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The balancer runs on uvloop, whose transports differ in what a closed one forgives."""
    policy: asyncio.AbstractEventLoopPolicy = LOOPS[request.param]()
    return policy


class _Recorder(asyncio.Transport):
    """A transport that remembers its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.has_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.has_closed = True

    def is_closing(self) -> bool:
        return self.has_closed


async def test_writes_of_one_turn_leave_together_and_in_order() -> None:
    recorder = _Recorder()
    transport = CoalescedTransport(recorder)
    transport.write(b"a")
    transport.write(b"b")
    assert recorder.writes == []
    await asyncio.sleep(0)
    transport.write(b"c")
    await asyncio.sleep(0)
    assert recorder.writes == [b"ab", b"c"]


async def test_close_sends_what_was_written_first() -> None:
    recorder = _Recorder()
    transport = CoalescedTransport(recorder)
    transport.write(b"last words")
    transport.close()
    await asyncio.sleep(0)
    assert (recorder.writes, recorder.has_closed) == ([b"last words"], True)


async def test_head_and_body_arrive_together() -> None:
    async with running_site() as site, site.exchange("POST", "/generate", {"text": "a"}) as exchange:
        first = await asyncio.wait_for(exchange._reader.read(65536), DEADLINE_S)
        head, _, body = first.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert json.loads(body)["meta_info"]["completion_tokens"] == 3


async def test_what_is_not_http_gets_json_400() -> None:
    async with running_site() as site:
        exchange = Exchange(site.balancer.url, "GET", "/")
        exchange._request = b"\x16\x03\x01 this is not HTTP\r\n\r\n"
        async with exchange:
            reply = await exchange.reply()
        assert (reply.status, reply.headers["content-type"]) == (400, "application/json")
        assert reply.json["error"]["message"]


async def test_a_client_that_reads_slowly_holds_up_decode_and_loses_nothing() -> None:
    async with running_site() as site:
        site.decode.behaviour.tokens, site.decode.behaviour.padding_bytes = 2000, 20_000  # 40 MB
        exchange = Exchange(site.balancer.url, "POST", "/generate", {"text": "a", "stream": True})
        async with exchange:
            transport = exchange._writer.transport
            transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: site.decode.is_write_paused, "the pressure reaches decode")
            transport.resume_reading()  # type: ignore[attr-defined]
            reply = await exchange.reply()
        assert reply.body.count(b"data: {") == 2000
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert site.counts["completed"] == 1


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running_site() as site:
        body = json.dumps({"text": "a"}).encode()
        one = b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        last = b"GET /liveness HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"
        exchange = Exchange(site.balancer.url, "GET", "/")
        exchange._request = one + one + last
        async with exchange:
            raw = await asyncio.wait_for(exchange._reader.read(), DEADLINE_S)
        assert raw.count(b"HTTP/1.1 200") == 3
        assert raw.endswith(b'{"status":"alive"}')
        assert site.counts["completed"] == 2
