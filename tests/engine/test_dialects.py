"""The balancer's reader of answers against what SGLang's own classes write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.balancer.request.events import Failure, Said, first_said, said_in
from pdserve.balancer.request.request import Route
from pdserve.balancer.request.usage import StreamTally, Usage
from tests.support.dialects import DONE, failure

pytestmark = pytest.mark.engine

CHUNK = {"chunk_id": "c", "created": 1, "model": "m", "index": 0}


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}


async def chat_stream(tokens: int, end: str | None) -> AsyncIterator[str]:
    """What SGLang's chat handler hands to that of ``/v1/messages``; ``end`` None: it fails."""
    from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

    for number in range(tokens):
        if number == 0:
            yield build_sse_content(**CHUNK, role="assistant", content="")
        yield build_sse_content(**CHUNK, content=" x", usage=usage(number + 1))
    if end is None:
        yield failure("/v1/chat/completions", "KV transfer failed")[0].decode()
    else:
        yield build_sse_content(**CHUNK, finish_reason=end, usage=usage(tokens))
    yield DONE.decode()


class Chat:
    """The part of SGLang's chat handler that a stream of messages needs."""

    supports_inline_system = True

    def __init__(self, stream: AsyncIterator[str]) -> None:
        self._stream = stream

    def _generate_chat_stream(self, *arguments: Any) -> AsyncIterator[str]:
        return self._stream


async def read(tokens: int, end: str | None) -> tuple[Said | None, Usage]:
    """What the first event of ``/v1/messages`` that matters says, and the whole stream."""
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing

    serving: Any = AnthropicServing(Chat(chat_stream(tokens, end)))  # type: ignore[arg-type]
    asked = AnthropicMessagesRequest(model="m", max_tokens=99, messages=[{"role": "user", "content": "h"}])
    events = [event.encode() async for event in serving._generate_anthropic_stream(None, None, asked, None)]
    first = first_said(Route.MESSAGES, b"".join(events))
    tally = StreamTally(Route.MESSAGES)
    tally.prompt_tokens = first.prompt_tokens if first is not None else None
    for event in events:
        tally.add(event)
    return first, tally.usage()


async def test_messages_streamed() -> None:
    first, whole = await read(40, "length")
    assert first is not None and first.failure is None
    assert whole == Usage("length", 9, 40)
    assert (await read(2, "tool_calls"))[1].finish == "tool_calls"


async def test_messages_that_fail() -> None:
    lost = Failure(500, "KV transfer failed")
    first, whole = await read(0, None)
    assert first is not None and first.failure == whole.failure == lost
    first, whole = await read(3, None)
    assert first is not None and first.failure is None
    assert (whole.failure, whole.completion_tokens) == (lost, 3)


@pytest.mark.parametrize(
    ("status", "error", "finish", "lost"),
    [
        ("completed", "", "stop", None),
        ("incomplete", "", "length", None),
        ("failed", "Aborted", "abort", None),
        ("failed", "KV transfer failed", "abort", Failure(500, "KV transfer failed")),
    ],
)
def test_responses(status: str, error: str, finish: str, lost: Failure | None) -> None:
    import orjson
    from sglang.srt.entrypoints.openai.protocol import ResponsesResponse, UsageInfo
    from sglang.srt.entrypoints.openai.serving_responses import ResponsesLifecycleEvent

    begun = ResponsesResponse(model="m", status="in_progress")
    for kind in ("response.created", "response.in_progress"):
        event = ResponsesLifecycleEvent(type=kind, response=begun)
        assert not said_in(orjson.dumps(event.model_dump())).is_content
    whole = ResponsesResponse(model="m", status=status, usage=UsageInfo(**usage(40)))
    whole.error = {"code": "server_error", "message": error} if error else None
    last = ResponsesLifecycleEvent(type=f"response.{status}", response=whole, sequence_number=9)
    expected = Said(finish, 9, 40, lost)
    assert said_in(orjson.dumps(whole.model_dump())) == expected
    assert said_in(orjson.dumps(last.model_dump())) == expected
