"""A stream is relayed as one, however its client spells ``stream``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.balancer_client import running_site

CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize("stream", [1, 1.0, "true", "Yes"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/messages", {**CHAT, "max_tokens": 5}),
    ],
)
async def test_the_first_event_goes_out_before_the_next_is_made(
    path: str, body: dict[str, Any], stream: Any
) -> None:
    async with running_site() as site:
        site.decode.behaviour.hang_after = 1
        async with site.exchange("POST", path, {**body, "stream": stream}) as exchange:
            head = await exchange.read_until(b"\r\n\r\n")
            assert b" 200 " in head
            assert b"data: {" in await exchange.read_until(b"\n\n")
        assert site.decode.requests[-1]["stream"] == stream
