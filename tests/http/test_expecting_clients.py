"""``Expect: 100-continue`` is answered when it is the request's turn, and only in HTTP/1.1."""

from __future__ import annotations

from tests.http.test_server import CLOSE, GET, post, running, talk
from tests.support.sglang_server import until
from tests.support.wire import Wire

EXPECT = b"expect: 100-continue"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_an_interim_answer_does_not_stand_in_the_middle_of_another() -> None:
    async with running() as (echo, _, port), Wire.open(f"http://127.0.0.1:{port}") as wire:
        expecting = post(b"hello", CLOSE, EXPECT)
        wire.send(GET.replace(b"/echo", b"/big") + expecting[:-5])
        await wire.until(lambda: len(wire.seen) > 100_000, "a part of the answer")
        assert CONTINUE not in wire.seen
        echo.gate.set()
        await wire.until_sight_of(b"0\r\n\r\n" + CONTINUE)
        wire.send(expecting[-5:])
        first, second = await wire.ended()
        assert first.is_complete and second.json["body"] == "hello"


async def test_a_large_body_that_did_not_wait_gets_one_answer() -> None:
    async with running(max_body_bytes=10**6) as (echo, _, port):
        hold = GET.replace(b"/echo", b"/hold")
        async with Wire.open(f"http://127.0.0.1:{port}") as wire:
            wire.send(hold + post(b"x" * 10**6, CLOSE, EXPECT))
            await until(lambda: echo.seen)
            echo.gate.set()
            first, second = await wire.ended()
        assert len(second.json["body"]) == 10**6 and first.status == 200


async def test_http_1_0_knows_no_interim_answer() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, post(b"hello", EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.startswith(b"HTTP/1.1 200") and b'"body":"hello"' in answer


async def test_a_refused_body_is_not_asked_for() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, post(b"x" * 2000, EXPECT)[:-2000])
    assert answer.startswith(b"HTTP/1.1 413") and CONTINUE not in answer
