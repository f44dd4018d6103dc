"""A stream that breaks after its first token ends with an error as the SDKs of its dialect take one."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.balancer_client import Reply, Site, running_site
from tests.support.dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    deltas,
    preamble,
    request_to,
)  # fmt: skip


def begin(site: Site, path: str) -> bytes:
    """Have decode send the begin of an answer, with two tokens."""
    segments = tuple([*preamble(path), *deltas(path, 2)])
    site.decode.behaviour.segments = segments
    return b"".join(segments)


def check(path: str, last: bytes, status: int, words: str) -> None:
    """``last`` is what the balancer wrote after the worker's bytes."""
    assert last.endswith(b"\n\n") and last.count(b"\n\n") == 1
    lines = last.decode().strip().split("\n")
    document = json.loads(lines[-1].removeprefix("data: "))
    named = path in (MESSAGES, RESPONSES)
    assert lines[:-1] == (["event: error"] if named else [])
    if path == MESSAGES:
        kind = "overloaded_error" if status == 503 else "api_error"
        assert document == {"type": "error", "error": {"type": kind, "message": document["error"]["message"]}}
        assert words in document["error"]["message"]
    elif path == RESPONSES:
        assert words in document.pop("message")
        # created, in_progress, item, part and two deltas came before it: 0 to 5.
        assert document == {"type": "error", "sequence_number": 6, "code": "server_error", "param": None}
    else:
        error = document["error"]
        assert words in error["message"] and error["code"] == status
        fields = {"message", "type", "code"} | (set() if path == GENERATE else {"object", "param"})
        assert (document.keys(), error.keys()) == ({"error"}, fields)
        assert path == GENERATE or (error["object"], error["param"]) == ("error", None)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_reset_after_the_first_token(path: str) -> None:
    async with running_site() as site:
        begun = begin(site, path)
        site.decode.behaviour.reset_after = 0
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.status == 200 and reply.body.startswith(begun)
        check(path, reply.body[len(begun) :], 502, site.decode.url)
        assert (site.counts["failed"], site.last["status"]) == (1, 502)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_cut_event_is_not_relayed_before_the_error(path: str) -> None:
    async with running_site() as site:
        begun = begin(site, path)
        site.decode.behaviour.segments += (b'event: x\ndata: {"type": "cut',)
        site.decode.behaviour.reset_after = 0
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.body.startswith(begun)
        check(path, reply.body[len(begun) :], 502, site.decode.url)


@pytest.mark.parametrize("path", DIALECTS)
async def test_silence_after_the_first_token(path: str) -> None:
    async with running_site(request_s=0.2) as site:
        begun = begin(site, path)
        site.decode.behaviour.segments += (b": never sent\n\n",)
        site.decode.behaviour.hang_after = len(site.decode.behaviour.segments) - 1
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.body.startswith(begun)
        check(path, reply.body[len(begun) :], 504, "silent")


@pytest.mark.parametrize("path", DIALECTS)
async def test_the_balancers_end(path: str) -> None:
    async with running_site() as site:
        begun = begin(site, path)
        site.decode.behaviour.segments += (b": never sent\n\n",)
        site.decode.behaviour.hang_after = len(site.decode.behaviour.segments) - 1
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            head = await exchange.read_until(begun[-40:])
            stopping = asyncio.create_task(site.balancer.stop())
            rest = await exchange.read_until(b"0\r\n\r\n")
            await stopping
        body = Reply.of(head + rest).body
        assert body.startswith(begun)
        check(path, body[len(begun) :], 503, "stopping")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_no_done_follows_an_error(path: str) -> None:
    """SGLang sends ``[DONE]`` after its own: clients that look for that mark alone take it for the end."""
    async with running_site() as site:
        begin(site, path)
        site.decode.behaviour.reset_after = 0
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert b"[DONE]" not in reply.body
