"""Greedy requests over and over, and whether each answer is the undisturbed one.

    prompts of a seed ─► undisturbed answers (alone, then together) ─► load ─► Tally

An answer is compared by its token ids where the route tells them, else by its text.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdserve.errors import ConfigError, WorkerError
from pdserve.http.client import HttpClient
from pdserve.http.sse import EventSplitter, event_data, split_events

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
SILENCE_S = 300.0
"""Longest silence of the service before a request is taken for failed."""
FIRST_ID, LAST_ID = 32, 126
"""Token ids of prompts: printable characters in byte vocabularies, tokens in all others."""
NUM_PROMPT_TOKENS = (40, 400)


@dataclass(frozen=True, slots=True)
class Question:
    """One request, the same every time."""

    path: str
    body: bytes
    is_stream: bool


@dataclass(slots=True)
class Heard:
    """What came of one request. ``said``: its tokens and texts. ``broken`` tells a stream that had begun
    from a request that failed; ``silence_s`` is its longest pause between two events."""

    said: tuple[Any, ...] = ()
    error: str = ""
    is_broken: bool = False
    silence_s: float = 0.0


@dataclass
class Tally:
    """What came of all requests. ``silences``: longest pauses of streams by request id."""

    requests: int = 0
    failed: int = 0
    broken: int = 0
    differing: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    silences: dict[str, float] = field(default_factory=dict)


def questions(seed: int, number: int, output_tokens: int, model: str) -> list[Question]:
    """Greedy requests in turn: generate, chat, completions streamed, generate at once."""
    rng = random.Random(f"questions {seed}")
    found = []
    for index in range(number):
        ids = [rng.randint(FIRST_ID, LAST_ID) for _ in range(rng.randint(*NUM_PROMPT_TOKENS))]
        tokens = rng.randint(max(1, output_tokens // 4), output_tokens)
        kind = (GENERATE, CHAT, COMPLETIONS, GENERATE)[index % 4]
        body: dict[str, Any] = {"stream": index % 4 != 3}
        if kind == GENERATE:
            sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
            body |= {"input_ids": ids, "sampling_params": sampling}
        else:
            body |= {"model": model, "temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
            text = "".join(map(chr, ids))
            body |= {"messages": [{"role": "user", "content": text}]} if kind == CHAT else {"prompt": ids}
        found.append(Question(kind, msgspec.json.encode(body), index % 4 != 3))
    return found


class ChaosLoad:
    """Asks ``questions`` of the service at ``url``, ``concurrency`` at once; ``headers`` go with each."""

    def __init__(
        self, url: str, questions: list[Question], *, concurrency: int, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.tally = Tally()
        self.is_comparable = True
        self._url = url
        self._questions = questions
        self._concurrency = concurrency
        self._headers = [*headers, (b"content-type", b"application/json")]
        self._expected: list[tuple[Any, ...]] = []

    async def record(self, pool: HttpClient) -> None:
        """Learn the undisturbed answers, each alone; then see whether they are the same under load.

        Raises:
            ConfigError: if one fails although nothing is broken.
        """
        alone = [await self._ask(pool, question, "") for question in self._questions]
        gate = asyncio.Semaphore(self._concurrency)

        async def together(question: Question) -> Heard:
            async with gate:
                return await self._ask(pool, question, "")

        beside = await asyncio.gather(*map(together, self._questions))
        for heard in (*alone, *beside):
            if heard.error:
                raise ConfigError(f"a request failed before anything was broken: {heard.error}")
        self._expected = [heard.said for heard in alone]
        self.is_comparable = self._expected == [heard.said for heard in beside]

    async def run(self, pool: HttpClient, rng: random.Random, until_s: float) -> None:
        """Ask until ``until_s`` of the monotonic clock, and let the last answers end."""
        counter = iter(range(1 << 62))

        async def ask_on() -> None:
            while time.monotonic() < until_s:
                index, request_id = rng.randrange(len(self._questions)), f"chaos-{next(counter)}"
                heard = await self._ask(pool, self._questions[index], request_id)
                self._count(index, request_id, heard)

        await asyncio.gather(*(ask_on() for _ in range(self._concurrency)))

    def _count(self, index: int, request_id: str, heard: Heard) -> None:
        tally = self.tally
        tally.requests += 1
        tally.failed += bool(heard.error) and not heard.is_broken
        tally.broken += heard.is_broken
        if heard.error:
            tally.errors[heard.error[:160]] += 1
        elif heard.said != self._expected[index]:
            tally.differing += 1
        if self._questions[index].is_stream:
            tally.silences[request_id] = heard.silence_s

    async def _ask(self, pool: HttpClient, question: Question, request_id: str) -> Heard:
        heard = Heard()
        headers = [*self._headers, (b"x-request-id", request_id.encode())] if request_id else self._headers
        response = pool.start(
            self._url, "POST", question.path, question.body, headers=headers, limits=(SILENCE_S, SILENCE_S)
        )
        reader = _Reader(heard)
        try:
            await response.wait_head()
            if response.status != 200:
                text = (await response.read())[:200].decode(errors="replace")
                heard.error = f"status {response.status}: {text}"
            elif question.is_stream:
                async for chunk in response:
                    reader.feed(chunk)
                reader.end()
            else:
                reader.take(await response.read())
                heard.said = reader.said()
        except WorkerError as exc:
            heard.error, heard.is_broken = str(exc), reader.has_begun
        finally:
            response.close()
        return heard


class _Reader:
    """Puts the events of one answer together."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._splitter = EventSplitter()
        self._is_done = False
        self._last_s = 0.0
        self._texts: dict[int, str] = {}
        self._ids: list[int] = []
        self._finish: Any = None

    @property
    def has_begun(self) -> bool:
        """True once an event was there."""
        return self._last_s > 0

    def feed(self, chunk: bytes) -> None:
        """Bytes of a stream as they come."""
        for event in split_events(self._splitter.feed(chunk)):
            data = event_data(event)
            if data == b"[DONE]":
                self._is_done = True
            elif data:
                now_s = time.monotonic()
                if self.has_begun:
                    self._heard.silence_s = max(self._heard.silence_s, now_s - self._last_s)
                self._last_s = now_s
                self.take(data)

    def take(self, data: bytes) -> None:
        """One event's document, or that of an answer at once."""
        try:
            document = msgspec.json.decode(data)
        except msgspec.DecodeError:
            self._heard.error = self._heard.error or f"no JSON: {data[:100]!r}"
            return
        if "error" in document or document.get("object") == "error":
            self._heard.error = self._heard.error or data[:200].decode(errors="replace")
        elif "meta_info" in document:
            self._texts[0] = document.get("text") or ""
            self._take_ids(document)
        for choice in document.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            self._texts[choice["index"]] = self._texts.get(choice["index"], "") + piece
            self._finish = choice.get("finish_reason") or self._finish

    def _take_ids(self, document: dict[str, Any]) -> None:
        ids, meta = document.get("output_ids") or [], document["meta_info"]
        is_part = len(ids) < meta.get("completion_tokens", 0)  # with --incremental-streaming-output
        self._ids = self._ids + ids if is_part else ids
        self._finish = meta.get("finish_reason")
        if isinstance(self._finish, dict) and self._finish.get("type") == "abort":
            self._heard.error = self._heard.error or f"aborted: {self._finish.get('message')}"

    def end(self) -> None:
        """The connection has closed: a stream without its end was broken off."""
        if not self._is_done and not self._heard.error:
            self._heard.error = "the stream ended without [DONE]"
        self._heard.is_broken = bool(self._heard.error) and self.has_begun
        self._heard.said = self.said()

    def said(self) -> tuple[Any, ...]:
        """What is compared."""
        texts = () if self._ids else tuple(sorted(self._texts.items()))
        return tuple(self._ids), texts, str(self._finish)
