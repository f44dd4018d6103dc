"""One request as its client sees it: when the first token came, when each further one, how it ended.

Times are taken when bytes arrive. Times to first token, per token and between tokens are as
``sglang.benchmark.serving`` defines them, so that figures can be laid side by side: an event that
brings several tokens counts as so many equal gaps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from pdserve.errors import WorkerError
from pdserve.http.client import HttpClient
from pdserve.http.sse import EventSplitter, event_data, split_events
from pdserve.loadgen.plan import Ask


@dataclass(slots=True)
class RequestResult:
    """What came of one request; seconds on this machine's monotonic clock.

    ``error`` is empty if it was answered whole. ``late_s``: how long after it was due it was sent.
    """

    sent_s: float
    late_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    status: int = 0
    error: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Answered whole, with a token."""
        return not self.error and self.first_s is not None

    @property
    def ttft_s(self) -> float:
        """From sending to the first token; without streaming to the whole answer."""
        return (self.last_s if self.first_s is None else self.first_s) - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending to the end."""
        return self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first; None for fewer than two."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    cached_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Event(msgspec.Struct):
    meta_info: _Counts | None = None
    usage: _Counts | None = None
    choices: list[_Choice] = []
    error: msgspec.Raw | None = None


_EVENTS = msgspec.json.Decoder(_Event)


class LoadClient:
    """Sends requests to one service. ``headers`` go with each."""

    def __init__(
        self, url: str, pool: HttpClient, headers: list[tuple[bytes, bytes]], timeout_s: float
    ) -> None:
        self.url = url
        self._pool = pool
        self._headers = headers
        self._limits = (timeout_s, timeout_s)

    async def send(self, ask: Ask, due_s: float) -> RequestResult:
        """Send one and read its answer; whatever goes wrong is in the outcome. ``due_s`` on our clock."""
        started_s = time.monotonic()
        outcome = RequestResult(started_s, max(0.0, started_s - due_s))
        response = self._pool.start(
            self.url, "POST", ask.path, ask.body, headers=self._headers, limits=self._limits
        )
        reader = _Reader(outcome)
        try:
            await response.wait_head()
            outcome.status = response.status
            if response.status != 200:
                body = await response.read()
                outcome.error = f"status {response.status}: {body[:200].decode(errors='replace')}"
            elif response.header(b"content-type").startswith(b"text/event-stream"):
                async for chunk in response:
                    reader.feed(chunk)
                reader.check_end()
            else:
                reader.read_whole(await response.read())
        except WorkerError as exc:
            outcome.error = str(exc)
        finally:
            response.close()
            outcome.last_s = outcome.last_s or time.monotonic()
        return outcome


class _Reader:
    """Puts what arrives into an outcome."""

    def __init__(self, outcome: RequestResult) -> None:
        self._outcome = outcome
        self._events = EventSplitter()
        self._is_done = False
        self._num_events = 0

    def feed(self, chunk: bytes) -> None:
        """Bytes of a stream as they come."""
        now_s = time.monotonic()
        for event in split_events(self._events.feed(chunk)):
            data = event_data(event)
            if data == b"[DONE]":
                self._is_done = True
            elif data:
                self._take(data, now_s)

    def check_end(self) -> None:
        """A stream without its end was broken off."""
        if not self._is_done and not self._outcome.error:
            self._outcome.error = "the stream ended without [DONE]"
        if not self._outcome.error and self._outcome.first_s is None:
            self._outcome.error = "the answer had no token"

    def read_whole(self, body: bytes) -> None:
        """An answer that came at once."""
        outcome = self._outcome
        outcome.last_s = outcome.first_s = time.monotonic()
        try:
            event = _EVENTS.decode(body)
        except (msgspec.MsgspecError, ValueError) as exc:
            outcome.error = f"unexpected answer ({exc}): {body[:120]!r}"
            return
        self._count(event.meta_info or event.usage)

    def _take(self, data: bytes, now_s: float) -> None:
        outcome = self._outcome
        try:
            event = _EVENTS.decode(data)
        except (msgspec.MsgspecError, ValueError) as exc:
            outcome.error = outcome.error or f"unexpected event ({exc}): {data[:120]!r}"
            return
        if event.error is not None:
            outcome.error = outcome.error or bytes(event.error)[:200].decode(errors="replace")
            return
        before = outcome.output_tokens
        if event.meta_info is not None:
            self._count(event.meta_info)
            brought = outcome.output_tokens - before
        else:
            brought = int(any(_has_token(choice) for choice in event.choices))
            self._num_events += brought
            outcome.output_tokens = self._num_events
            if event.usage is not None:
                self._count(event.usage)
        if brought <= 0:
            return
        if outcome.first_s is None:
            outcome.first_s = now_s
        else:
            outcome.gaps_s.extend([(now_s - outcome.last_s) / brought] * brought)
        outcome.last_s = now_s

    def _count(self, counts: _Counts | None) -> None:
        if counts is None:
            return
        outcome = self._outcome
        outcome.prompt_tokens = counts.prompt_tokens or outcome.prompt_tokens
        outcome.output_tokens = counts.completion_tokens or outcome.output_tokens
        details = counts.prompt_tokens_details
        outcome.cached_tokens = (
            counts.cached_tokens or (details and details.cached_tokens) or outcome.cached_tokens
        )


def _has_token(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    return bool(delta.content or delta.reasoning_content or delta.tool_calls)
