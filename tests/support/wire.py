"""A strict HTTP client for tests that look at bytes: one connection, and all it received.

    async with Wire.open(url) as wire:
        wire.send(b"GET / HTTP/1.1 ...")
        reply = (await wire.replies())[0]

A response counts only if it is complete: right length, or the last chunk of a chunked body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

DEADLINE_S = 60.0


@dataclass
class WireReply:
    """One response as it came."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    is_complete: bool = False
    """False also where only the connection's end can have ended it."""

    def header(self, name: str) -> str:
        """The one value of a header; empty if absent."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} twice: {values}"
        return values[0] if values else ""

    @property
    def json(self) -> Any:
        """The body's document."""
        return json.loads(self.body)

    @property
    def is_stream(self) -> bool:
        """True for server-sent events."""
        return self.header("content-type").startswith("text/event-stream")

    @property
    def events(self) -> list[bytes]:
        """Data of each event; the last one may be cut off."""
        return [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]


class _Parser:
    """Splits what came into responses; raises where it is not HTTP."""

    def __init__(self, has_no_body: bool) -> None:
        self.replies: list[WireReply] = []
        self._has_no_body = has_no_body
        self._parser = httptools.HttpResponseParser(self)

    def parse(self, data: bytes) -> None:
        if data:
            self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.replies.append(WireReply())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.replies[-1].headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.replies[-1].status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.replies[-1].body += data

    def on_message_complete(self) -> None:
        reply = self.replies[-1]
        reply.is_complete = True
        if reply.status < 200:  # an interim response
            self.replies.pop()


def parse_replies(data: bytes) -> list[WireReply]:
    """Every response in ``data``.

    Raises:
        AssertionError: if it is not HTTP/1.1.
    """
    parser = _Parser(False)
    try:
        parser.parse(data)
    except httptools.HttpParserError as exc:
        raise AssertionError(
            f"the balancer sent something that is not HTTP ({exc}): {data[:300]!r}"
        ) from None
    return parser.replies


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen = b""
        self.is_closed = False
        self.was_reset = False
        self._reader, self._writer = reader, writer
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(), name="wire")

    @classmethod
    async def connect(cls, url: str) -> Wire:
        """Connect; ``close`` it."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Wire]:
        """Connect; closed at the end."""
        wire = await cls.connect(url)
        try:
            yield wire
        finally:
            await wire.close()

    def send(self, data: bytes) -> None:
        """Write."""
        self._writer.write(data)

    def send_json(self, path: str, body: object, *, method: str = "POST", headers: str = "") -> None:
        """A well-formed request; the connection is kept."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: t\r\n{headers}content-length: {len(content)}\r\n\r\n"
        self.send(head.encode() + content)

    def pause(self) -> None:
        """Read nothing from now on."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        """Read on."""
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def forget(self) -> None:
        """What has come is done with; the next ``reply`` is to another request."""
        self.seen = b""

    def end(self) -> None:
        """Send nothing more; still read."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def leave(self) -> None:
        """Break the connection now."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close and stop reading."""
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, return_exceptions=True)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until what has come is enough."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():
                    self._news.clear()
                    if self.is_closed:
                        raise AssertionError(f"the connection ended before {what}: {self.seen[-300:]!r}")
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"{what}: not within {DEADLINE_S:g} s; got {self.seen[-300:]!r}") from None

    async def until_sight_of(self, mark: bytes) -> None:
        """Wait for these bytes."""
        await self.until(lambda: mark in self.seen, f"{mark!r}")

    async def reply(self) -> WireReply:
        """Wait for the first response to be complete."""
        await self.until(lambda: (found := parse_replies(self.seen)) and found[0].is_complete, "a response")
        return parse_replies(self.seen)[0]

    async def ended(self) -> list[WireReply]:
        """Wait until the other side closes; every response that came."""
        await self.until(lambda: self.is_closed, "the connection's end")
        return parse_replies(self.seen)

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(65536):
                self.seen += data
                self._news.set()
        except OSError:
            self.was_reset = True
        finally:
            self.is_closed = True
            self._news.set()
