"""Events are relayed one by one, whichever of the three line ends they have and wherever they are cut."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.balancer_client import running_site
from tests.support.dialects import CHAT, DIALECTS, GENERATE, RESPONSES, deltas, preamble, request_to, stream
from tests.support.sglang_server import until

LINE_ENDS = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}


def with_ends(events: list[bytes], line_end: bytes) -> list[bytes]:
    return [event.replace(b"\n", line_end) for event in events]


@pytest.mark.parametrize("line_end", LINE_ENDS.values(), ids=LINE_ENDS.keys())
@pytest.mark.parametrize("path", DIALECTS)
async def test_each_event_goes_out_when_it_is_there(path: str, line_end: bytes) -> None:
    async with running_site() as site:
        events = with_ends(stream(path), line_end)
        num_first = len(preamble(path)) + 1
        site.decode.behaviour.segments = tuple(events)
        go_on = site.decode.behaviour.go_on = asyncio.Event()
        site.decode.behaviour.hang_after = num_first
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            await exchange.read_until(events[num_first - 1])
            assert site.decode.num_exchanges == 1  # it waits for us
            go_on.set()
            await exchange.read_until(events[-1])
            await exchange.read_until(b"0\r\n\r\n")
        assert (site.last["completion_tokens"], site.last["finish"]) == (40, "length")


@pytest.mark.parametrize("line_end", LINE_ENDS.values(), ids=LINE_ENDS.keys())
async def test_comments_pass_in_order_and_are_no_tokens(line_end: bytes) -> None:
    async with running_site() as site:
        ping = b": ping\n\n"
        first, *others = deltas(CHAT, 3)
        events = [ping, first, ping]
        for event in others:
            events += [event, ping, ping]
        events = with_ends([*events, b"data: [DONE]\n\n", ping], line_end)
        site.decode.behaviour.segments = tuple(events)
        reply = await site.ask("POST", CHAT, request_to(CHAT, stream=True))
        assert reply.body == b"".join(events)
        assert site.last["completion_tokens"] == 1 + 3  # the role has an event of its own


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
async def test_a_stream_that_must_be_rewritten_is_read_with_any_line_end(line_end: bytes) -> None:
    """Samples of a chat are renumbered, names and logprobs put in."""
    async with running_site() as site:
        events = with_ends([b": ping\n\n", *stream(CHAT)], line_end)
        site.decode.behaviour.segments = tuple(events)
        reply = await site.ask("POST", CHAT, request_to(CHAT, stream=True, n=2))
        documents = [json.loads(data) for data in reply.events if data.startswith("{")]
        indices = [document["choices"][0]["index"] for document in documents if document["choices"]]
        assert (indices.count(0), indices.count(1)) == (42, 42)
        assert documents[-1]["usage"]["completion_tokens"] == 80
        assert reply.events.count("[DONE]") == 1


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("line_end", LINE_ENDS.values(), ids=LINE_ENDS.keys())
async def test_a_cut_at_the_end_of_an_event_loses_nothing(line_end: bytes, cut: int) -> None:
    """Also between the two bytes of one line end."""
    async with running_site() as site:
        whole = b"".join(with_ends(stream(GENERATE), line_end))
        at = whole.index(line_end * 2) + cut
        site.decode.behaviour.segments = (whole[:at], whole[at:])
        go_on = site.decode.behaviour.go_on = asyncio.Event()
        site.decode.behaviour.hang_after = 1
        asking = asyncio.create_task(site.ask("POST", GENERATE, request_to(GENERATE, stream=True)))
        await until(lambda: site.decode.requests)
        go_on.set()
        assert (await asking).body == whole


async def test_an_event_of_many_lines_is_one_event() -> None:
    async with running_site() as site:
        events = [
            event.replace(b'"sequence_number"', b'\ndata: "sequence_number"') for event in stream(RESPONSES)
        ]
        site.decode.behaviour.segments = tuple(events)
        reply = await site.ask("POST", RESPONSES, request_to(RESPONSES, stream=True))
        assert reply.body == b"".join(events)
        assert (site.last["completion_tokens"], site.last["finish"]) == (40, "length")
