"""Requests that share their tools, or their system text, go to the prefill server that has computed them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.balancer_client import running_site
from tests.support.sglang_run import PROBE_IDS

TOOLS = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 900}} for i in range(60)]
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": ("/v1/chat/completions", {"tools": TOOLS}),
    "system": ("/v1/messages", {"max_tokens": 9, "system": "be brief " * 6000}),
    "instructions": ("/v1/responses", {"instructions": "be brief " * 6000}),
}


@pytest.mark.parametrize("name", HEADS)
async def test_requests_with_one_head_gather_on_one_prefill(name: str) -> None:
    path, head = HEADS[name]
    async with running_site(4, 1) as site:
        for number in range(10):
            body = {"messages": [{"role": "user", "content": f"q {number}"}], "input": f"q {number}", **head}
            assert (await site.ask("POST", path, body)).status == 200
        sent = [[r for r in fake.requests if r.get("input_ids") != PROBE_IDS] for fake in site.prefills]
        assert sorted(map(len, sent)) == [0, 0, 0, 10]
        assert site.last["prompt_tokens"] > 0


async def test_requests_with_other_salts_do_not() -> None:
    async with running_site(4, 1) as site:
        text = "be brief " * 6000
        for number in range(8):
            await site.generate({"text": text, "cache_salt": f"tenant {number}"})
        assert [len(fake.requests) for fake in site.prefills] == [2, 2, 2, 2]
