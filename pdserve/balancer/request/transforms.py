"""Where an attempt's answer goes, and what is done to it on its way. Pure but for the sink itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from pdserve.balancer.request.ids import RequestIds
from pdserve.balancer.request.request import ParsedRequest
from pdserve.http.answer import Answer, Headers

HEARTBEAT = b": heartbeat\n\n"
STREAM_HEAD: Headers = ((b"content-type", b"text/event-stream; charset=utf-8"),)


class ResponseSink(Protocol):
    """The receiving end of one answer: a client, or one sample of what a client gets.

    Either ``answer``, or ``begin``, ``push`` … and ``finish``.
    """

    on_writable: Callable[[], None] | None

    @property
    def has_begun(self) -> bool:
        """True once bytes are out: from here on there is no other try."""
        ...

    @property
    def has_finished(self) -> bool:
        """True once the answer is complete."""
        ...

    def identify(self, rid: str) -> None:
        """The name under which the workers know what is coming."""
        ...

    def begin(self, status: int, headers: Headers) -> None:
        """The head of a stream."""
        ...

    def push(self, data: bytes) -> bool:
        """A piece of a stream; False if the next should wait for ``on_writable``."""
        ...

    async def finish(self, last: bytes = b"") -> None:
        """The end of a stream."""
        ...

    async def answer(self, answer: Answer) -> None:
        """A whole answer."""
        ...


class HeartbeatSink:
    """A client's stream in which no more than ``every_s`` go by without a byte: SSE comments fill the gaps.

    The first of them takes the head along, so an error after it has no status of its own. ``has_begun``
    is False until the answer itself begins: another pair may still be tried. ``stop`` it at the end.
    """

    def __init__(self, client: ResponseSink, every_s: float) -> None:
        self.has_begun = False
        self._client = client
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(every_s, self._beat)

    @property
    def has_finished(self) -> bool:
        """True once the answer is complete."""
        return self._client.has_finished

    @property
    def on_writable(self) -> Callable[[], None] | None:
        """The client's."""
        return self._client.on_writable

    @on_writable.setter
    def on_writable(self, resume: Callable[[], None] | None) -> None:
        self._client.on_writable = resume

    def identify(self, rid: str) -> None:
        """Name the request in its head, if that is not out yet."""
        self._client.identify(rid)

    def begin(self, status: int, headers: Headers) -> None:
        """The answer begins; its head goes out unless one has."""
        self.has_begun = True
        if not self._client.has_begun:
            self._client.begin(status, headers)

    def push(self, data: bytes) -> bool:
        """A piece of the answer."""
        self._last_s = self._loop.time()
        return self._client.push(data)

    async def finish(self, last: bytes = b"") -> None:
        """The end of the answer."""
        await self._client.finish(last)

    async def answer(self, answer: Answer) -> None:
        """A whole answer; without its head if one is out."""
        if not self._client.has_begun:
            await self._client.answer(answer)
        else:
            await self._client.finish(answer.body)

    def stop(self) -> None:
        """Send no more of them."""
        self._timer.cancel()

    def _beat(self) -> None:
        client, now_s = self._client, self._loop.time()
        if client.has_finished:
            return
        if now_s >= self._last_s + self._every_s:
            if not client.has_begun:
                client.begin(200, STREAM_HEAD)
            client.push(HEARTBEAT)
            self._last_s = now_s
        self._timer = self._loop.call_at(self._last_s + self._every_s, self._beat)


class Renaming:
    """Puts the client's own request ids in place of ours, in whole events or in a whole body.

    Ours are 32 random hex digits in quotes: nothing else in an answer can be equal to one.
    """

    def __init__(self, names: Mapping[bytes, bytes]) -> None:
        self._names = names

    def apply(self, body: bytes) -> bytes:
        """Return ``body`` with the client's ids."""
        for ours, theirs in self._names.items():
            body = body.replace(ours, theirs)
        return body


def names_of(request: ParsedRequest) -> list[str]:
    """The client's name for each prompt, samples of one alike; empty if it gave none.

    As in SGLang: a list names each prompt of a batch, one name for a batch is numbered.
    """
    name, count = request.client_rid, request.num_prompts
    if isinstance(name, str) and name:
        return [name] if count is None else [f"{name}_{index}" for index in range(count)]
    if isinstance(name, list) and all(isinstance(item, str) for item in name):
        return [item for item in name for _ in range(request.num_samples)]
    return []


def renaming_of(request: ParsedRequest, ids: RequestIds) -> Renaming | None:
    """What to call the request in its answer; None if its client gave no name.

    As SGLang does: samples get names of their own.
    """
    theirs = names_of(request) if request.num_samples == 1 else []
    if not theirs:
        return None
    pairs = zip(ids.rids, theirs, strict=False)
    return Renaming({b'"%b"' % ours.encode(): msgspec.json.encode(given) for ours, given in pairs})
