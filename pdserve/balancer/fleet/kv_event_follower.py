"""The background loops that keep the prompt tree true where workers publish KV events.

    /server_info ─► EventsAddress ─► KvEventChannels.listen ─► TreePages ─► PromptTree     one for each worker
    PromptTree.wishes ─► /tokenize of some worker ─► token pages ─► PromptTree.tie         one for the fleet

Nothing waits for them: a worker that publishes nothing, or text that is not tied to token pages, is known
from our own dispatches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from pdserve.balancer.fleet.kv_event_channel import KvEventChannels
from pdserve.balancer.fleet.kv_events import EventsAddress, events_address, keeps_prefixes
from pdserve.balancer.fleet.probe import JSON, Fetcher, Headers, Response
from pdserve.errors import WorkerError
from pdserve.scheduling.prefix.token_pages import CHUNK_TOKENS, page_hashes, tokens_of_ids, tokens_of_text
from pdserve.scheduling.prefix.tree import Prefix, PromptTree
from pdserve.scheduling.workers import Worker
from pdserve.types import InstanceId, WorkerInfo

logger = logging.getLogger(__name__)

SERVER_INFO_S = 20.0
"""/server_info asks the scheduler, which may be in a long step."""
AGAIN_S = 300.0
"""A server that was restarted under its old address may publish elsewhere, or begin to."""
TIE_GAP_S = 0.2
"""Prompts are tokenized for us no more often than this, ..."""
TIE_BYTES_S = 500_000
"""... and no faster than this: 5 % of what a tokenizer process does in a second on one core."""
TOKENIZE_S = 20.0


class Learner(Protocol):
    """Who is told what more is known of a worker; ``verdicts.Judge`` in production."""

    def worker_learned(self, worker: Worker, info: WorkerInfo) -> None:
        """Its description has changed."""
        ...


class TreePages:
    """One worker's pages, told to the prompt tree (``kv_events.PageSink``)."""

    def __init__(self, tree: PromptTree, instance_id: InstanceId, page_tokens: int) -> None:
        self._tree = tree
        self._instance_id = instance_id
        self._page_tokens = page_tokens
        self._bit = 0

    def start(self, *, is_exact: bool) -> None:
        """Forget all that is known of the worker, from dispatches too."""
        self._tree.flush(self._instance_id)
        self._bit = self._tree.bit(self._instance_id)
        if not self._tree.pages.follow(self._bit, self._page_tokens, is_exact=is_exact):
            logger.warning(
                "kv events of instance=%s not followed: pages of %d tokens, others have %d",
                self._instance_id, self._page_tokens, self._tree.pages.page_tokens,
            )  # fmt: skip

    def store(self, pages: Sequence[int]) -> None:
        """It holds these."""
        self._tree.pages.store(self._bit, pages)

    def remove(self, pages: Sequence[int]) -> None:
        """It holds these no more."""
        self._tree.pages.remove(self._bit, pages)

    def clear(self) -> None:
        """It was flushed."""
        self._tree.flush(self._instance_id)
        self._tree.pages.complete(self._bit)

    def stop(self) -> None:
        """Nobody listens any more."""
        if self._instance_id in self._tree:
            self._tree.pages.unfollow(self._bit)


class KvEventFollower:
    """Finds and follows one worker's KV events, if it has any."""

    def __init__(
        self,
        worker: Worker,
        pool: Fetcher,
        channels: KvEventChannels,
        headers: Headers,
        tree: PromptTree,
        learner: Learner | None = None,
    ) -> None:
        self._worker = worker
        self._pool = pool
        self._channels = channels
        self._headers = headers
        self._tree = tree
        self._learner = learner
        self._address: EventsAddress | None = None
        self._listener: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until cancelled. Looks for a change of address now and then, and keeps listening meanwhile."""
        try:
            while True:
                await self._worker.answers.wait()
                await self._look()
                await asyncio.sleep(AGAIN_S)
        finally:
            await self._hush()

    async def _look(self) -> None:
        url = self._worker.url
        try:
            answer = await self._pool.fetch(
                url, "GET", "/server_info", headers=self._headers, timeout_s=SERVER_INFO_S
            )
        except WorkerError:
            return
        self._learn(answer)
        address = events_address(answer.body, url) if answer.status == 200 else None
        if address == self._address and self._listener is not None and not self._listener.done():
            return
        await self._hush()
        self._address = address
        if address is not None:
            self._listener = asyncio.create_task(self._listen(address), name=f"kv-events-{url}")

    def _learn(self, answer: Response) -> None:
        """A worker that pdserve did not start tells here whether it keeps prefixes."""
        info = self._worker.info
        told = keeps_prefixes(answer.body) if answer.status == 200 else None
        if self._learner is not None and told is not None and told is not info.keeps_prefixes:
            self._learner.worker_learned(self._worker, msgspec.structs.replace(info, keeps_prefixes=told))

    async def _listen(self, address: EventsAddress) -> None:
        pages = TreePages(self._tree, self._worker.instance_id, address.page_tokens)
        try:
            await self._channels.listen(address, pages)
        finally:
            pages.stop()

    async def _hush(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            await asyncio.wait([listener])


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Texts(msgspec.Struct):
    text: list[str]


class PromptTokenizer:
    """Ties prompts that repeat to their token pages, with the workers' own tokenizers, at a bounded rate.

    Args:
        ask: the URL of a worker that may be asked now, or None.
    """

    def __init__(
        self, tree: PromptTree, pool: Fetcher, headers: Headers, ask: Callable[[], str | None]
    ) -> None:
        self._tree = tree
        self._pool = pool
        self._headers = JSON + headers
        self._ask = ask

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            gap_s = TIE_GAP_S
            if self._tree.wishes:
                prefix = self._tree.wishes.pop()
                await self.tie(prefix)
                gap_s = max(gap_s, prefix.num_bytes / TIE_BYTES_S)
            await asyncio.sleep(gap_s)

    async def tie(self, prefix: Prefix) -> int:
        """Tie one prompt; returns how many of its blocks are tied now. What a worker does never raises."""
        found = _token_ids(prefix.source)
        if found is not None:
            tokens = tokens_of_ids(prefix.source, prefix.ends)
        else:
            answer = await self._post("/tokenize", _question(prefix.source), _Tokens)
            if answer is None or not answer.tokens:
                return 0
            found = answer.tokens
            tokens = await self._places(prefix, found)
        try:
            pages = page_hashes(found, self._tree.pages.page_tokens or 1)
        except (OverflowError, TypeError):
            return 0
        num_tied = self._tree.tie(prefix, tokens, pages)
        logger.debug("tied %d of %d blocks to %d pages", num_tied, len(prefix.hashes), len(pages))
        return num_tied

    async def _places(self, prefix: Prefix, token_ids: list[int]) -> list[float]:
        chunks = [token_ids[i : i + CHUNK_TOKENS] for i in range(0, len(token_ids), CHUNK_TOKENS)]
        question = {"tokens": chunks, "skip_special_tokens": False}
        texts = await self._post("/detokenize", msgspec.json.encode(question), _Texts)
        is_whole = texts is not None and len(texts.text) == len(chunks)
        return tokens_of_text(
            prefix.num_bytes, len(token_ids), prefix.ends, texts.text if texts and is_whole else ()
        )

    async def _post(self, path: str, body: bytes, kind: type[Any]) -> Any:
        url = self._ask()
        if url is None or not body:
            return None
        with suppress(WorkerError, msgspec.MsgspecError, UnicodeDecodeError):
            answer = await self._pool.fetch(
                url, "POST", path, body, headers=self._headers, timeout_s=TOKENIZE_S
            )
            if answer.status == 200:
                return msgspec.json.decode(answer.body, type=kind)
        return None


def _token_ids(prompt: bytes) -> list[int] | None:
    """The ids, if the prompt was sent as ids."""
    try:
        return msgspec.json.decode(prompt, type=list[int])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _question(prompt: bytes) -> bytes:
    """The body for /tokenize: a string as it is, messages as SGLang would render them for a chat."""
    start = prompt[:64].lstrip()[:1]
    field = {b'"': b"prompt", b"[": b"messages"}.get(start)
    return b'{"%s":%s}' % (field, prompt) if field else b""
