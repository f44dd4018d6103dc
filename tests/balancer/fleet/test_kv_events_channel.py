"""KV events over real ZMQ sockets, framed as SGLang frames them, and what the tree makes of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from pdserve.balancer.fleet.kv_event_channel import KvEventChannels
from pdserve.balancer.fleet.kv_event_follower import KvEventFollower, PromptTokenizer, TreePages
from pdserve.balancer.fleet.kv_events import EventsAddress, PageSink
from pdserve.errors import WorkerUnreachable
from pdserve.scheduling.prefix.token_pages import page_hashes
from pdserve.scheduling.prefix.tree import PromptTree
from pdserve.scheduling.workers import Worker
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo
from tests.balancer.fleet.test_kv_events import CLEARED, Pages, payload, removed, server_info, stored

WAIT_S = 20.0
A = InstanceId("a" * 32)


class Publisher:
    """A PUB socket and a ROUTER that repeats the last ``kept`` messages, in a thread as in SGLang."""

    def __init__(self, *, kept: int = 10_000, ports: tuple[str, str] = ("*", "*"), first: int = 0) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        for socket, port in zip((self._pub, self._router), ports, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"tcp://127.0.0.1:{port}")
        self.endpoint, self.replay = (
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self._pub, self._router)
        )
        self._log: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._seq = first
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="replay")
        self._thread.start()

    @property
    def address(self) -> EventsAddress:
        return EventsAddress((self.endpoint,), (self.replay,), b"", 16)

    @property
    def ports(self) -> tuple[str, str]:
        return self.endpoint.rsplit(":", 1)[1], self.replay.rsplit(":", 1)[1]

    def say(self, *events: dict[str, Any], is_lost: bool = False) -> None:
        """Publish; lost ones are only in the log."""
        body = payload(*events)
        self._log.append((self._seq, body))
        if not is_lost:
            self._pub.send_multipart((b"", self._seq.to_bytes(8, "big"), body))
        self._seq += 1

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _answer(self) -> None:
        while not self._is_over.is_set():
            if not self._router.poll(20):
                continue
            client, _, start = self._router.recv_multipart()
            for seq, body in list(self._log):
                if seq >= int.from_bytes(start, "big"):
                    self._router.send_multipart((client, b"", b"", seq.to_bytes(8, "big"), body))
            self._router.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))


@asynccontextmanager
async def listening(address: EventsAddress, sink: PageSink) -> AsyncIterator[asyncio.Task[None]]:
    channels = KvEventChannels()
    task = asyncio.create_task(channels.listen(address, sink))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        channels.close()


async def until(condition: Callable[[], Any], repeat: Callable[[], None] = lambda: None) -> None:
    """Do ``repeat`` again and again until the condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            repeat()
            await asyncio.sleep(0.01)


async def test_listener_learns_what_was_there_before_it_and_what_comes() -> None:
    publisher, pages = Publisher(), Pages()
    publisher.say(stored(1, 2))
    publisher.say(removed(1))
    try:
        async with listening(publisher.address, pages):
            await until(lambda: pages.held == {2})
            await until(lambda: 3 in pages.held, lambda: publisher.say(stored(3)))
            await until(lambda: not pages.held, lambda: publisher.say(CLEARED))
            assert pages.is_exact
            assert pages.num_starts == 1
    finally:
        publisher.close()


async def test_lost_messages_are_replayed() -> None:
    publisher, pages = Publisher(), Pages()
    try:
        async with listening(publisher.address, pages):
            await until(lambda: 1 in pages.held, lambda: publisher.say(stored(1)))
            publisher.say(stored(2), is_lost=True)
            publisher.say(removed(1), is_lost=True)
            publisher.say(stored(3))
            await until(lambda: 3 in pages.held)
            assert pages.held == {2, 3}
            assert pages.is_exact
    finally:
        publisher.close()


async def test_gap_beyond_what_is_kept_starts_over() -> None:
    publisher, pages = Publisher(kept=2), Pages()
    try:
        async with listening(publisher.address, pages):
            await until(lambda: 1 in pages.held, lambda: publisher.say(stored(1)))
            for _ in range(4):
                publisher.say(removed(1), is_lost=True)
            publisher.say(stored(3))
            await until(lambda: 3 in pages.held)
            assert pages.held == {3}
            assert not pages.is_exact
    finally:
        publisher.close()


async def test_restart_of_the_publisher_forgets_what_it_held() -> None:
    publisher, pages = Publisher(), Pages()
    try:
        async with listening(publisher.address, pages):
            await until(lambda: 1 in pages.held, lambda: publisher.say(stored(1)))
            for _ in range(3):
                publisher.say(stored(2))
            await until(lambda: 2 in pages.held)
            publisher.close()
            publisher = Publisher(ports=publisher.ports)
            await until(lambda: pages.held == {7}, lambda: publisher.say(stored(7)))
            assert pages.is_exact
    finally:
        publisher.close()


async def test_more_messages_than_one_answer_holds_are_learned_whole() -> None:
    publisher, pages = Publisher(), Pages()
    for page in range(3000):
        publisher.say(stored(page))
    try:
        async with listening(publisher.address, pages):
            await until(lambda: len(pages.held) == 3000)
            assert pages.is_exact
    finally:
        publisher.close()


async def test_listener_ends_when_it_does_not_understand() -> None:
    publisher, pages = Publisher(), Pages()
    try:
        async with listening(publisher.address, pages) as task:
            await until(task.done, lambda: publisher.say({"type": "BlockMoved"}))
            assert task.exception() is None
    finally:
        publisher.close()


# -- the tree ------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    body: bytes


class Server:
    """What a worker answers to the balancer's own questions; one token a byte of text."""

    def __init__(self, info: bytes = b"{}", *, prefix: str = "") -> None:
        self.info = info
        self.prefix = prefix
        self.asked: list[str] = []

    async def fetch(
        self, url: str, method: str, path: str, body: bytes = b"", *, headers: Any = (), timeout_s: float
    ) -> Answer:
        self.asked.append(path)
        if path == "/server_info":
            return Answer(200, self.info)
        question = msgspec.json.decode(body)
        if path == "/tokenize":
            text = question.get("prompt") or "".join(
                f"{message['role']}:{message['content']};" for message in question["messages"]
            )
            return Answer(200, json.dumps({"tokens": list((self.prefix + text).encode())}).encode())
        if path == "/detokenize":
            texts = [bytes(chunk).decode(errors="replace") for chunk in question["tokens"]]
            return Answer(200, json.dumps({"text": texts}).encode())
        raise WorkerUnreachable(url)


def sent_twice(tree: PromptTree, prompt: bytes) -> None:
    for _ in range(2):
        tree.arrive(tree.send(tree.read(prompt), A, 0.0), 0.0)


def followed_tree() -> tuple[PromptTree, TreePages]:
    tree = PromptTree()
    pages = TreePages(tree, A, 16)
    pages.start(is_exact=True)
    return tree, pages


class Learned:
    """Hears what a keeper learns of a worker's cache."""

    def __init__(self) -> None:
        self.told: list[bool | None] = []

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        self.told.append(info.keeps_prefixes)
        worker.info = info


async def test_worker_is_followed_and_let_go_with_its_keeper() -> None:
    publisher, tree, channels = Publisher(), PromptTree(), KvEventChannels()
    port, replay = (int(port) for port in publisher.ports)
    keeps = {"disable_radix_cache": False}
    server = Server(server_info(keeps, endpoint_port_base=port, replay_endpoint_port_base=replay))
    info = WorkerInfo(
        worker_id=WorkerId("prefill-0"), instance_id=A, role=Role.PREFILL, url="http://127.0.0.1:1", model="m"
    )
    worker = Worker(info)
    worker.answers.set()
    learner = Learned()
    keeper = asyncio.create_task(KvEventFollower(worker, server, channels, (), tree, learner).run())
    try:
        await until(lambda: len(tree.pages) == 2, lambda: publisher.say(stored(1, 2)))
        assert tree.pages.exact == tree.bit(A)
        assert learner.told == [True]
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        channels.close()
        publisher.close()
    assert not tree.pages.followed
    assert len(tree.pages) == 0


async def test_eviction_on_the_worker_is_known_at_once_for_text_that_is_tied() -> None:
    tree, events = followed_tree()
    text = "0123456789abcdef" * 200
    prompt = json.dumps(text).encode()
    sent_twice(tree, prompt)
    pages = page_hashes(list(text.encode()), 16)
    events.store(pages)
    assert await PromptTokenizer(tree, Server(), (), lambda: "http://w").tie(tree.wishes.pop()) > 20
    prefix = tree.read(prompt)
    assert tree.match(prefix, [A], 0.0)[0] > 0.95
    events.remove(pages[100:])
    assert 0.4 < tree.match(prefix, [A], 0.0)[0] <= 0.5
    events.remove(pages)
    assert tree.match(prefix, [A], 0.0) == [0.0]


async def test_messages_are_tied_by_the_tokens_of_their_chat() -> None:
    tree, events = followed_tree()
    messages = [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y" * 3000}]
    prompt = json.dumps(messages, indent=1).encode()
    sent_twice(tree, prompt)
    tokens = list(("user:" + "x" * 3000 + ";assistant:" + "y" * 3000 + ";").encode())
    events.store(page_hashes(tokens, 16)[:200])
    server = Server()
    assert await PromptTokenizer(tree, server, (), lambda: "http://w").tie(tree.wishes.pop()) > 20
    share = tree.match(tree.read(json.dumps(messages).encode()), [A], 0.0)[0]
    assert share * len(tokens) <= 200 * 16
    assert share > 0.45


async def test_token_ids_are_tied_without_a_tokenizer() -> None:
    tree, events = followed_tree()
    ids = list(range(50_000, 51_600))
    prompt = json.dumps(ids).encode()
    sent_twice(tree, prompt)
    events.store(page_hashes(ids, 16)[:60])
    server = Server()
    assert await PromptTokenizer(tree, server, (), lambda: "http://w").tie(tree.wishes.pop()) > 20
    assert not server.asked
    assert 0.55 < tree.match(tree.read(prompt), [A], 0.0)[0] <= 0.6


async def test_tokens_that_no_worker_knows_tie_nothing() -> None:
    tree, events = followed_tree()
    text = "0123456789abcdef" * 200
    prompt = json.dumps(text).encode()
    sent_twice(tree, prompt)
    events.store(page_hashes(list(text.encode()), 16))
    assert await PromptTokenizer(tree, Server(prefix="?"), (), lambda: "http://w").tie(tree.wishes.pop()) == 0
    assert tree.match(tree.read(prompt), [A], 0.0)[0] > 0.95


async def test_worker_that_cannot_be_asked_ties_nothing() -> None:
    tree, _ = followed_tree()
    sent_twice(tree, json.dumps("z" * 5000).encode())
    prefix = tree.wishes.pop()
    assert await PromptTokenizer(tree, Server(), (), lambda: None).tie(prefix) == 0


def test_prompts_are_wished_for_when_they_repeat_and_are_long() -> None:
    tree, _ = followed_tree()
    long, short = json.dumps("l" * 5000).encode(), json.dumps("s" * 500).encode()
    tree.send(tree.read(long), A, 0.0)
    sent_twice(tree, short)
    assert not tree.wishes
    tree.send(tree.read(long), A, 0.0)
    assert [wish.source for wish in tree.wishes] == [long]
