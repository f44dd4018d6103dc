"""A real server's KV events name what is in its cache, and the tree believes what the server reports."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pdserve.balancer.fleet.kv_event_channel import KvEventChannels
from pdserve.balancer.fleet.kv_event_follower import KvEventFollower, PromptTokenizer
from pdserve.balancer.fleet.kv_events import events_address, keeps_prefixes
from pdserve.http.client import HttpClient
from pdserve.scheduling.prefix.token_pages import page_hashes
from pdserve.scheduling.prefix.tree import PromptTree
from pdserve.scheduling.workers import Worker
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo
from tests.engine.corpus import PAGE_TOKENS
from tests.engine.fleet import _start_server, _wait_listening, call, free_port, kill_tree

pytestmark = pytest.mark.engine
SERVER = InstanceId("5" * 32)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one plain SGLang server that publishes its KV events."""
    port = free_port()
    # "bind" with an address of its own: a wildcard would offer every prompt's tokens to the network.
    events = {"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port + 1}", "bind": True}
    events["replay_endpoint"] = f"tcp://127.0.0.1:{port + 2}"
    process = _start_server(
        tmp_path_factory.mktemp("events") / "server.log", port,
        "--model-path", str(tiny_model), "--kv-events-config", json.dumps(events),
    )  # fmt: skip
    try:
        _wait_listening(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_tree(process)


def cached_tokens(url: str, **prompt: Any) -> int:
    """Send a prompt; how much of it the server found in its cache."""
    body = {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}}
    status, answer = call(url, "POST", "/generate", body)
    assert status == 200, answer
    return int(answer["meta_info"]["cached_tokens"])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


class Followed:
    """A tree that follows the server, and a keeper that ties prompts on request."""

    def __init__(self, url: str) -> None:
        self.tree = PromptTree()
        self.url = url
        self.pool = HttpClient()
        self.ties = PromptTokenizer(self.tree, self.pool, (), lambda: url)

    @property
    def pages(self) -> frozenset[int]:
        return frozenset(self.tree.pages.held(self.tree.bit(SERVER)))

    async def send(self, prompt: Any, **fields: Any) -> int:
        """One request as the balancer would make it: through the tree and to the server."""
        mark = self.tree.send(self.tree.read(json.dumps(prompt).encode()), SERVER, 0.0)
        cached = await asyncio.to_thread(cached_tokens, self.url, **fields)
        self.tree.arrive(mark, 0.0)
        return cached

    async def tied(self, prompt: Any) -> None:
        """The prompt was wished for; tie it."""
        assert await self.ties.tie(self.tree.wishes.pop()) > 0
        assert not self.tree.wishes, prompt[:20]

    def believed(self, prompt: Any, num_tokens: int) -> float:
        """Tokens of it that the server is believed to hold."""
        return self.tree.match(self.tree.read(json.dumps(prompt).encode()), [SERVER], 0.0)[0] * num_tokens


def following(url: str, scene: Callable[[Followed], Awaitable[None]]) -> None:
    """Play a scene while the server's events are followed, from an empty cache."""

    async def play() -> None:
        followed, channels = Followed(url), KvEventChannels()
        worker = Worker(
            WorkerInfo(worker_id=WorkerId("s"), instance_id=SERVER, role=Role.PREFILL, url=url, model="m")
        )
        worker.answers.set()
        keeper = asyncio.create_task(
            KvEventFollower(worker, followed.pool, channels, (), followed.tree).run()
        )
        try:
            # Something must be there to be seen going: the flush is told later than it is done, and a late
            # word of it would drop what the scene has sent.
            await asyncio.to_thread(cached_tokens, url, input_ids=[35] * 40)
            await until(lambda: followed.pages)
            await asyncio.to_thread(call, url, "POST", "/flush_cache?timeout=30")
            await until(lambda: not followed.pages)
            await scene(followed)
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
            channels.close()
            await followed.pool.close()

    asyncio.run(play())


def test_server_tells_where_it_publishes_and_that_it_keeps_prefixes(server: str) -> None:
    info = json.dumps(call(server, "GET", "/server_info")[1]).encode()
    address = events_address(info, server)
    assert address is not None
    assert address.page_tokens == PAGE_TOKENS
    assert address.replay
    assert keeps_prefixes(info) is True


def test_events_name_a_prompts_pages_until_the_cache_is_flushed(server: str) -> None:
    ids = random.Random(5).choices(range(32, 127), k=406)

    async def scene(followed: Followed) -> None:
        await followed.send(ids, input_ids=ids)
        await until(lambda: set(page_hashes(ids, PAGE_TOKENS)) <= followed.pages)
        assert await followed.send(ids, input_ids=ids) == 400
        await asyncio.to_thread(call, server, "POST", "/flush_cache?timeout=30")
        await until(lambda: not followed.pages)
        assert followed.believed(ids, 406) == 0
        assert cached_tokens(server, input_ids=ids) == 0

    following(server, scene)


def test_tree_believes_of_ids_what_the_server_reports(server: str) -> None:
    ids = random.Random(6).choices(range(100, 127), k=1206)

    async def scene(followed: Followed) -> None:
        await followed.send(ids[:800], input_ids=ids[:800])
        await until(lambda: len(followed.pages) >= 50)
        await followed.send(ids, input_ids=ids)
        await until(lambda: len(followed.pages) >= 75)
        await followed.tied(ids)
        other = [*ids[:900], *([127] * 300)]
        believed = followed.believed(other, 1200)
        reported = await followed.send(other, input_ids=other)
        assert believed <= reported == 896
        assert believed > 896 - 64

    following(server, scene)


def test_tree_believes_of_text_what_the_server_reports_and_learns_of_a_flush(server: str) -> None:
    chance = random.Random(7)
    text = " ".join(chance.choice(["one", "two", "three", "four", "five"]) for _ in range(600))

    async def scene(followed: Followed) -> None:
        await followed.send(text, text=text)
        num_pages = len(text) // PAGE_TOKENS
        await until(lambda: len(followed.pages) >= num_pages)
        reported = await followed.send(text, text=text)
        await followed.tied(text)
        believed = followed.believed(text, len(text) + 1)
        assert believed <= reported + 2 * PAGE_TOKENS
        assert believed > reported * 0.95
        await asyncio.to_thread(call, server, "POST", "/flush_cache?timeout=30")
        await until(lambda: not followed.pages)
        assert followed.believed(text, len(text)) == 0

    following(server, scene)


def test_chat_is_tied_by_the_tokens_that_the_server_makes_of_it(server: str) -> None:
    messages = [{"role": "user", "content": "".join(random.Random(8).choices("abc \n", k=2600))}]
    body = {"model": "m", "messages": messages, "max_tokens": 2, "temperature": 0}

    async def scene(followed: Followed) -> None:
        for _ in range(2):
            mark = followed.tree.send(followed.tree.read(json.dumps(messages).encode()), SERVER, 0.0)
            status, answer = await asyncio.to_thread(call, server, "POST", "/v1/chat/completions", body)
            assert status == 200, answer
            await until(lambda: len(followed.pages) >= 2600 // PAGE_TOKENS)
            followed.tree.arrive(mark, 0.0)
        await followed.tied(messages)
        assert followed.believed(messages, 2600) > 2400
        await asyncio.to_thread(call, server, "POST", "/flush_cache?timeout=30")
        await until(lambda: not followed.pages)
        assert followed.believed(messages, 2600) == 0

    following(server, scene)
