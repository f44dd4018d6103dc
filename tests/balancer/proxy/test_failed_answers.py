"""An answer that says itself that it failed, or was aborted though nobody asked for that: it reaches the
client as it is, the books call it so, and the worker is blamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.balancer_client import Site, running_site
from tests.support.dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    deltas,
    end,
    event,
    failure,
    preamble,
    request_to,
    whole,
)  # fmt: skip
from tests.support.sglang_server import until

WHY = "the scheduler has lost it"
SAYS_ABORT = [path for path in DIALECTS if path != MESSAGES]
"""Anthropic's dialect has no word for it: SGLang says ``end_turn``."""


def errors(site: Site) -> dict[str, int]:
    return {str(worker.worker_id): worker.breaker.errors for worker in site.balancer.fleet.workers()}


def is_out(site: Site) -> bool:
    """Its breaker has opened; a probe may have brought it back since."""
    decode = next(worker for worker in site.balancer.fleet.workers() if worker.worker_id == "decode-0")
    return decode.breaker.opened == 1


async def check(site: Site, path: str, body: bytes, outcome: str, **more: object) -> None:
    """Three such answers in a row."""
    for number in range(1, 4):
        reply = await site.ask("POST", path, request_to(path, **more))
        assert (reply.status, reply.body) == (200, body)
        assert site.counts[outcome] == site.counts["total"] == number
        assert errors(site) == {"prefill-0": 0, "decode-0": number}
        assert is_out(site) == (number == 3)
    assert site.counts["retried"] == 0


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_that_fails_after_three_tokens(path: str) -> None:
    async with running_site() as site:
        segments = tuple([*preamble(path), *deltas(path, 3), *failure(path, WHY)])
        site.decode.behaviour.segments = segments
        await check(site, path, b"".join(segments), "failed", stream=True)
        assert (site.last["status"], WHY in site.last["error"]) == (500, True)


@pytest.mark.parametrize("path", SAYS_ABORT)
async def test_a_stream_that_is_aborted_after_three_tokens(path: str) -> None:
    async with running_site() as site:
        segments = tuple([*preamble(path), *deltas(path, 3), *end(path, "abort", num_tokens=3)])
        site.decode.behaviour.segments = segments
        await check(site, path, b"".join(segments), "aborted", stream=True)
        assert (site.last["finish"], site.last["completion_tokens"]) == ("abort", 3)


@pytest.mark.parametrize("path", SAYS_ABORT)
async def test_a_whole_answer_that_was_aborted(path: str) -> None:
    async with running_site() as site:
        site.decode.behaviour.body = json.dumps(whole(path, "abort")).encode()
        await check(site, path, site.decode.behaviour.body, "aborted")


async def test_a_whole_response_that_failed() -> None:
    async with running_site() as site:
        document = {**whole(RESPONSES, "abort"), "error": {"code": "server_error", "message": WHY}}
        site.decode.behaviour.body = json.dumps(document).encode()
        await check(site, RESPONSES, site.decode.behaviour.body, "failed")


@pytest.mark.parametrize(("path", "prompts"), [(GENERATE, "text"), (COMPLETIONS, "prompt")])
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_one_prompt_of_a_batch(path: str, prompts: str, is_stream: bool) -> None:
    async with running_site() as site:
        site.decode.behaviour.body = json.dumps(_batch(path)).encode()
        # The aborted one ends first: what follows is far more than is kept of a stream's end.
        aborted, *_ = end(path, "abort", num_tokens=1)
        others = [_numbered(item, 1) for item in [*deltas(path, 40), end(path, "stop")[0]]]
        site.decode.behaviour.segments = (_numbered(aborted, 0), *others, b"data: [DONE]\n\n")
        expected = b"".join(site.decode.behaviour.segments) if is_stream else site.decode.behaviour.body
        await check(site, path, expected, "aborted", **{prompts: ["a", "b"], "stream": is_stream})


def _numbered(item: bytes, index: int) -> bytes:
    document = json.loads(item.removeprefix(b"data: "))
    if "choices" in document:
        document["choices"][0]["index"] = index
    else:
        document["index"] = index
    return event(document)


def _batch(path: str) -> Any:
    if path == GENERATE:
        return [whole(path, "abort"), whole(path, "stop")]
    one, two = whole(path, "stop"), whole(path, "abort")
    return {**one, "choices": [*one["choices"], {**two["choices"][0], "index": 1}]}


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_samples_of_a_chat(is_stream: bool) -> None:
    """Each is a request of its own, so one request is three failures."""
    async with running_site() as site:
        site.decode.behaviour.segments = tuple([*deltas(CHAT, 3), *end(CHAT, "abort")])
        site.decode.behaviour.body = json.dumps(whole(CHAT, "abort")).encode()
        reply = await site.ask("POST", CHAT, request_to(CHAT, n=3, stream=is_stream))
        assert reply.status == 200
        assert reply.body.count(b'"finish_reason":"abort"') == 3
        assert (site.counts["aborted"], site.last["finish"]) == (1, "abort")
        assert errors(site)["decode-0"] == 3 and is_out(site)


async def test_prefill_that_drops_a_request_by_itself_is_blamed() -> None:
    async with running_site() as site:
        site.decode.behaviour.gate = asyncio.Event()  # it waits for KV that never comes
        site.prefill.behaviour.segments = tuple(end(GENERATE, "abort", num_tokens=0))
        reply = await site.generate({"text": "hi", "stream": True})
        assert reply.body == b"".join(site.prefill.behaviour.segments)
        assert site.counts["aborted"] == 1
        assert errors(site) == {"prefill-0": 1, "decode-0": 0}


ASKS: list[tuple[str, object]] = [
    ("/abort_request", {"rid": "mine"}),
    ("/abort_request", {"abort_all": True}),
    ("/pause_generation", {"mode": "abort"}),
    ("/update_weights_from_disk", {"model_path": "m", "abort_all_requests": True}),
    ("/update_weight_version", {"new_version": "2"}),
]


@pytest.mark.parametrize("ask", ASKS, ids=str)
@pytest.mark.parametrize("path", [GENERATE, CHAT, RESPONSES])
async def test_an_abort_that_was_asked_for_is_nobodys_fault(path: str, ask: tuple[str, object]) -> None:
    async with running_site() as site:
        ends = end(path, "abort", num_tokens=3)
        site.decode.behaviour.segments = tuple([*preamble(path), *deltas(path, 3), *ends])
        site.decode.behaviour.hang_after = len(site.decode.behaviour.segments) - len(ends)
        go_on = site.decode.behaviour.go_on = asyncio.Event()
        body = request_to(path, stream=True)
        async with site.exchange("POST", path, body, x_request_id="mine") as exchange:
            await exchange.read_until(b"\r\n\r\n")
            await site.ask("POST", *ask)
            go_on.set()
            reply = await exchange.read_until(b"0\r\n\r\n")
        assert ends[0].strip() in reply
        await until(lambda: site.counts["aborted"] == 1)
        assert errors(site) == {"prefill-0": 0, "decode-0": 0}


@pytest.mark.parametrize("path", [GENERATE, CHAT, COMPLETIONS, MESSAGES])
async def test_a_failure_that_blames_the_request_blames_no_worker(path: str) -> None:
    async with running_site() as site:
        segments = tuple([*preamble(path), *deltas(path, 3), *failure(path, "bad stop_regex", 400)])
        site.decode.behaviour.segments = segments
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert reply.body == b"".join(segments)
        assert (site.counts["failed"], site.last["status"]) == (1, 400)
        assert errors(site) == {"prefill-0": 0, "decode-0": 0}


async def test_a_good_answer_between_them_keeps_the_worker_in() -> None:
    async with running_site() as site:
        bad = tuple([*deltas(CHAT, 3), *failure(CHAT, WHY)])
        good = tuple([*deltas(CHAT, 3), *end(CHAT, "stop")])
        for segments in (bad, bad, good, bad, bad):
            site.decode.behaviour.segments = segments
            await site.ask("POST", CHAT, request_to(CHAT, stream=True))
        assert (site.counts["failed"], site.counts["completed"]) == (4, 1)
        assert errors(site)["decode-0"] == 4 and not is_out(site)
