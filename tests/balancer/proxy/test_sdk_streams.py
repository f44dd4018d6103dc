"""The SDKs of both dialects pass over heartbeats, and raise the errors that end a stream; OpenAI's hands the
error of a response to its caller as an event."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import openai
import pytest

from tests.support.balancer_client import Site, running_site
from tests.support.dialects import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    NUM_TOKENS,
    RESPONSES,
    TEXT,
    deltas,
    preamble,
    stream,
)  # fmt: skip
from tests.support.sglang_server import until

pytestmark = pytest.mark.slow  # imports the SDKs

PATHS = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)


async def read_texts(site: Site, path: str, told: list[str]) -> None:
    """Put the pieces of text that an SDK makes of a stream into ``told``; raises what it raises."""
    ask: dict[str, Any] = {"model": "m", "stream": True}
    if path in (CHAT, MESSAGES):
        ask["messages"] = [{"role": "user", "content": "hi"}]
    if path == MESSAGES:
        async with anthropic.AsyncAnthropic(base_url=site.balancer.url, api_key="k", max_retries=0) as claude:
            async for event in await claude.messages.create(max_tokens=99, **ask):
                if event.type == "content_block_delta":
                    told.append(event.delta.text)
        return
    url = f"{site.balancer.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
        if path == RESPONSES:
            async for event in await client.responses.create(input="hi", **ask):
                if event.type == "response.output_text.delta":
                    told.append(event.delta)
                elif event.type == "error":
                    raise openai.OpenAIError(event.message)
        elif path == CHAT:
            async for chunk in await client.chat.completions.create(**ask):
                told += [choice.delta.content or "" for choice in chunk.choices]
        else:
            async for chunk in await client.completions.create(prompt="hi", **ask):
                told += [choice.text for choice in chunk.choices]


@pytest.mark.parametrize("path", PATHS)
async def test_heartbeats_are_passed_over(path: str) -> None:
    async with running_site(stream_heartbeat_s=0.01) as site:
        events = stream(path)
        site.decode.behaviour.segments = tuple(events)
        gate = site.decode.behaviour.gate = asyncio.Event()
        go_on = site.decode.behaviour.go_on = asyncio.Event()
        site.decode.behaviour.hang_after = len(events) - 5
        told: list[str] = []
        reading = asyncio.create_task(read_texts(site, path, told))
        await until(lambda: site.decode.requests)
        await asyncio.sleep(0.05)  # some heartbeats before the first token, and some between two
        gate.set()
        await until(lambda: told)
        await asyncio.sleep(0.05)
        go_on.set()
        await reading
        assert "".join(told) == TEXT * NUM_TOKENS


@pytest.mark.parametrize("has_begun", [False, True], ids=["after a heartbeat", "after two tokens"])
@pytest.mark.parametrize("path", PATHS)
async def test_the_error_that_ends_a_stream_is_raised(path: str, has_begun: bool) -> None:
    settings = {} if has_begun else {"stream_heartbeat_s": 0.01, "max_retries": 0}
    async with running_site(**settings) as site:
        if has_begun:
            site.decode.behaviour.segments = (*preamble(path), *deltas(path, 2))
            site.decode.behaviour.reset_after = 0
        else:
            gate = site.decode.behaviour.gate = asyncio.Event()
            site.decode.behaviour.status = 500
        told: list[str] = []
        reading = asyncio.create_task(read_texts(site, path, told))
        if not has_begun:
            await until(lambda: any(call.client.has_begun for call in site.balancer.dispatcher._calls))
            gate.set()
        with pytest.raises((openai.OpenAIError, anthropic.APIError)) as caught:
            await reading
        assert site.decode.url in str(caught.value)
        assert "".join(told) == (TEXT * 2 if has_begun else "")
