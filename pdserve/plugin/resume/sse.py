"""The frames of an answer on their way out: a comment before each, and none that the client has already.

    app ── data: {…} ──► Stream ── : ids 5;3 / data: {…} ──► balancer

A frame is what ends with an empty line. The comment is a line of its frame, so that whoever
has the whole frame knows exactly the tokens in it. Without the header nothing is changed.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pdserve.plugin.resume.log import first_word

HEADER = b"x-pdserve-ids"
"""Its value is the worker's instance id, which the balancer knows; a resumed leg's also says ``RESUME``."""
RESUME = b" resume"
FRAME_END = b"\n\n"
_CREATED = re.compile(rb'"created(_at)?":(\d+)')
"""As a field only: within a JSON string the quotes would be escaped."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class FrameDropper:
    """Takes whole frames from the front of a stream, however it is cut."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """Return what of ``data`` lies behind the dropped frames."""
        if not self.num_frames:
            return data
        data = self._tail + data
        start = 0
        while self.num_frames:
            end = data.find(FRAME_END, start)
            if end < 0:
                # A frame's end may lie across two pieces: keep what could be its first byte.
                self._tail = data[start:][-1:]
                return b""
            self.num_frames -= 1
            start = end + len(FRAME_END)
        self._tail = b""
        return data[start:]


class Stream:
    """One answer of this server: the words that wait for a frame, and what its frames are changed to.

    ``rids`` are this leg's ids, ``client_rids`` those that the client has seen in a former leg.
    """

    def __init__(self, *, is_resumed: bool = False) -> None:
        self.is_resumed = is_resumed
        self.words: list[str] = []
        self.dropper = FrameDropper(0)
        self.rids: tuple[str, ...] = ()
        self.client_rids: tuple[str, ...] = ()
        self.created: int | None = None
        self.has_begun = False
        """True once SGLang was asked for the answer; a second time is another answer."""
        self.num_item_ids = 0
        self._is_named = True
        self._is_mid_frame = False
        self._has_frames = False
        self._held = b""

    def hear(self) -> None:
        """Drop nothing any more: what comes is an error, or not what the first server said."""
        self.dropper = FrameDropper(0)

    def name(self, rids: tuple[str, ...]) -> None:
        """Know this leg's ids; its first frame, if it is still to come, tells them."""
        if not self._has_frames:
            self._is_named = False
        self.rids = rids

    def resume(self, frames: int, rids: tuple[str, ...], created: int | None) -> None:
        """Go on with an answer whose client has ``frames`` and knows it under these names."""
        self.dropper = FrameDropper(frames)
        self.client_rids, self.created, self._is_named = rids, created, bool(rids)

    def pass_on(self, body: bytes) -> bytes:
        """Return what of ``body`` goes out.

        /v1/responses has frames before it asks for the answer: on a resumed leg they wait, for
        only then it is known what they are called and how many are dropped.
        """
        if self.is_resumed:
            if not self.has_begun:
                self._held += body
                return b""
            body, self._held = self.dropper.feed(self._held + body), b""
            if not body:
                return body
            body = self._renamed(body)
        self._has_frames = True
        if not self._is_named:
            self._is_named = True
            found = _CREATED.search(body)
            if word := first_word(self.rids, int(found[2]) if found else None):
                self.words.insert(0, word)
        is_at_start, self._is_mid_frame = not self._is_mid_frame, not body.endswith(FRAME_END)
        if self.words and is_at_start:
            body = f": ids {' '.join(self.words)}\n".encode() + body
            self.words.clear()
        return body

    def _renamed(self, body: bytes) -> bytes:
        if self.created is not None:
            body = _CREATED.sub(rb'"created\g<1>":%d' % self.created, body)
        for ours, theirs in zip(self.rids, self.client_rids, strict=False):
            body = body.replace(ours.encode(), theirs.encode())
        return body

    def end(self) -> bytes:
        """Return what still waits when the answer ends."""
        return self._held


_stream: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("pdserve_stream", default=None)


def current_stream() -> Stream | None:
    """The answer that this task makes; None unless the balancer has asked for its ids."""
    return _stream.get()


class IdComments:
    """ASGI middleware: gives requests of the balancer a ``Stream``, and sends through it if they stream."""

    def __init__(self, app: Any, instance_id: str) -> None:
        self._app = app
        own = instance_id.encode()
        self._headers = {(HEADER, own): False, (HEADER, own + RESUME): True}

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Serve one request."""
        found = None
        if scope["type"] == "http":
            found = next(
                (self._headers[tuple(h)] for h in scope["headers"] if tuple(h) in self._headers), None
            )
        if found is None:
            await self._app(scope, receive, send)
            return
        stream = Stream(is_resumed=found)
        is_events = False

        async def send_through(message: Message) -> None:
            nonlocal is_events
            if message["type"] == "http.response.start":
                is_events = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
            elif is_events and message["type"] == "http.response.body":
                body = stream.pass_on(message["body"]) if message.get("body") else b""
                if not message.get("more_body"):
                    body += stream.end()
                elif not body:
                    return
                message = {**message, "body": body}
            await send(message)

        token = _stream.set(stream)
        try:
            await self._app(scope, receive, send_through)
        finally:
            _stream.reset(token)
