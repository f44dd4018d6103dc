"""One HTTP exchange with a server as it happens, and the time limits on its silence.

    ClientConnection ── head, data, end, failure ──► ClientResponse ── on_change ──► consumer
                                                          ▲
                       Deadlines (one timer for all) ─────┘ WorkerTimeout

A response is pushed by its connection and pulled by one consumer. When the
consumer lags by ``HIGH_WATER_BYTES`` the connection stops reading, so TCP
holds the server up instead of our memory filling; the silence limit rests then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve.errors import WorkerError, WorkerTimeout

HIGH_WATER_BYTES = 65536
LOW_WATER_BYTES = 16384
NEVER = float("inf")
Headers = list[tuple[bytes, bytes]]


class Wakeup:
    """Wakes one waiter; a ``set`` before the ``wait`` is not lost. Cheaper than asyncio.Event."""

    __slots__ = ("_future", "_is_set")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self._is_set = False

    def set(self) -> None:
        """Wake the waiter, or the next one."""
        self._is_set = True
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self) -> None:
        """Return after the next ``set``, at once if there was one since the last ``wait``."""
        if not self._is_set:
            self._future = asyncio.get_running_loop().create_future()
            try:
                await self._future
            finally:
                self._future = None
        self._is_set = False


def _tell_nobody() -> None:
    """What a closed response calls."""


class ClientResponse:
    """A request that was sent and what has come back: ``async for chunk in response``.

    ``on_change`` is called at each change, from within the connection's callbacks: it must not
    raise. ``wakeup`` is what our own methods wait on; a caller with an ``on_change`` of its own
    has none and does not wait here.

    With a ``sink`` body bytes go there as they arrive, without a turn of the event
    loop between, and only the end wakes the consumer; a sink that answers False is
    not fed, nor the server read, until ``release``.

    ``status`` is 0 until the head is there. ``error`` is set when the exchange
    failed; iteration raises it after the chunks that had arrived. ``turn`` grows
    with every exchange that ends: the smaller one ended first. ``is_stalled``: it was ended for a
    silence that ``watch_stalls`` had set.
    """

    # Class attributes in place of most of ``__init__``: two of these are made for every request.
    status = 0
    error: WorkerError | None = None
    is_complete = False
    is_closed = False
    can_resend = True
    attempts = 0
    sent_s = 0.0
    turn = 0
    deadline_s = NEVER
    sink: Callable[[bytes], bool] | None = None
    label = ""
    wakeup: Wakeup | None = None
    connection: asyncio.Transport | None = None
    connecting: asyncio.Task[None] | None = None
    _headers: Headers | None = None
    _raw_head = b""
    _buffered = 0
    _is_paused = False
    is_stalled = False
    _may_leave: Callable[[], bool] | None = None
    _longest_s = NEVER
    _silent_since_s = 0.0
    _extended_s = 0.0

    def __init__(
        self,
        url: str,
        head: bytes,
        body: bytes,
        limits: tuple[float, float],
        deadlines: Deadlines,
        on_change: Callable[[], None],
    ) -> None:
        self.url = url
        self.on_change = on_change
        self.head, self.body = head, body
        self.first_byte_s, self.silence_s = limits
        self._chunks: list[bytes] = []
        self._deadlines = deadlines

    # -- for the consumer --------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """True when nothing more will come: complete, failed or closed by us."""
        return self.is_complete or self.error is not None or self.is_closed

    @property
    def headers(self) -> Headers:
        """The response's headers, in order; empty before they are there."""
        if self._headers is None:
            lines = self._raw_head.split(b"\r\n")[1:]
            self._headers = [
                (name, value.lstrip(b" \t")) for name, _, value in (x.partition(b":") for x in lines)
            ]
        return self._headers

    @property
    def has_chunks(self) -> bool:
        """True if ``take`` would return something."""
        return bool(self._chunks)

    @property
    def is_paused(self) -> bool:
        """True while the server is held up because the consumer lags."""
        return self._is_paused

    def take(self) -> list[bytes]:
        """Every body chunk that has arrived and was not taken yet; lets a paused server go on."""
        chunks, self._chunks = self._chunks, []
        self._buffered = 0
        if self._is_paused:
            self._resume()
        return chunks

    def pour_into(self, sink: Callable[[bytes], bool]) -> None:
        """Feed ``sink`` from now on, beginning with what is here."""
        self.sink = sink
        self._feed()

    def release(self) -> None:
        """The sink can take more."""
        if self._is_paused:
            self._feed()
            self._resume()

    def watch_stalls(self, limit_s: float, may_leave: Callable[[], bool]) -> None:
        """From now on end it after ``limit_s`` of silence if ``may_leave`` then says so; if not, it is asked
        again after the same time, until the present limit has passed."""
        if self.has_ended or limit_s >= self.silence_s:
            return
        self._longest_s, self.silence_s, self._may_leave = self.silence_s, limit_s, may_leave
        self._deadlines.touch(self)

    @property
    def heard_s(self) -> float:
        """When bytes came last, by the loop's clock; with the first byte still to come, when it was sent."""
        if not self.status:
            return self.sent_s
        return self._silent_since_s if self._is_extended else self.deadline_s - self.silence_s

    @property
    def _is_extended(self) -> bool:
        """True if its limit was extended and nothing has come since."""
        return self.deadline_s == self._extended_s

    def header(self, name: bytes) -> bytes:
        """Value of a header by its lower-case name; empty if absent."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    async def wait_head(self) -> None:
        """Wait for the status line and headers. Raises WorkerUnreachable or WorkerTimeout."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self._changed()

    async def read(self) -> bytes:
        """The rest of the body."""
        return b"".join([chunk async for chunk in self])

    def __aiter__(self) -> ClientResponse:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self.is_complete or self.is_closed:
                raise StopAsyncIteration
            await self._changed()
        chunk = self._chunks.pop(0)
        self._buffered -= len(chunk)
        if self._is_paused and self._buffered <= LOW_WATER_BYTES:
            self._resume()
        return chunk

    async def _changed(self) -> None:
        assert self.wakeup is not None, "a caller with an on_change of its own does not wait here"
        await self.wakeup.wait()

    def close(self) -> None:
        """Stop here: if the response has not ended, its socket is closed. Idempotent, never blocks.

        Nobody is told of anything any more, so that a consumer is freed although its response refers to it.
        """
        if not self.has_ended:
            self.is_closed = True
            self._end()
            if self.connecting is not None:
                self.connecting.cancel()
            self._abort()
        self.on_change = _tell_nobody

    # -- for the connection ------------------------------------------------------------------

    def on_sent(self, connection: asyncio.Transport, now_s: float) -> None:
        """The request is on its way; the first-byte limit starts."""
        self.connection = connection
        self.attempts += 1
        self.sent_s = now_s
        self.deadline_s = now_s + self.first_byte_s
        self._deadlines.add(self)

    def on_head(self, status: int, headers: Headers) -> None:
        """Status and headers have been parsed."""
        self.status, self._headers = status, headers

    def on_whole(self, status: int, head: bytes, body: bytes) -> None:
        """The whole response came in one piece; its head is parsed when somebody looks at it."""
        self.status, self._raw_head = status, head
        if body:
            self._chunks.append(body)
            self._buffered += len(body)

    def on_chunk(self, data: bytes) -> None:
        """Body bytes."""
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > HIGH_WATER_BYTES and self.sink is None:
            self._pause()

    def on_complete(self) -> None:
        """The last byte has arrived; the connection is not ours any more."""
        self.is_complete = True
        self.connection = None
        self._is_paused = False
        self._end()

    def on_progress(self) -> None:
        """Bytes have arrived and been parsed: tell the consumer, once for all of them."""
        if not self.is_complete:
            self._deadlines.touch(self)
            if self.sink is not None:
                self._feed()
                return
        elif self.sink is not None:
            self._feed()
        self.on_change()

    def fail(self, error: WorkerError) -> None:
        """The exchange is over without a complete response."""
        if self.has_ended:
            return
        self.error = error
        self._end()
        self._abort()
        self.on_change()

    def expire(self) -> None:
        """The silence limit has passed."""
        limit_s = self.silence_s if self.status else self.first_byte_s
        if self._may_leave is not None:
            now_s, since_s = self._deadlines.now(), self.heard_s
            self.is_stalled = now_s < since_s + self._longest_s
            if self.is_stalled and not self._may_leave():
                self.is_stalled, self._silent_since_s = False, since_s
                self.deadline_s = self._extended_s = now_s + limit_s
                return
            limit_s = round(now_s - since_s, 1)
        where = "in the middle of its answer" if self.status else "without a first byte"
        self.fail(WorkerTimeout(self.url, f"silent for {limit_s:g} s {where}"))

    def _feed(self) -> None:
        chunks, self._chunks = self._chunks, []
        self._buffered = 0
        assert self.sink is not None
        if chunks and not self.sink(chunks[0] if len(chunks) == 1 else b"".join(chunks)):
            self._pause()

    def _pause(self) -> None:
        connection = self.connection
        if not self._is_paused and connection is not None:
            self._is_paused = True
            if not connection.is_closing():
                connection.pause_reading()

    def _resume(self) -> None:
        self._is_paused = False
        self._deadlines.touch(self)
        if self.connection is not None and not self.connection.is_closing():
            self.connection.resume_reading()

    def _abort(self) -> None:
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def _end(self) -> None:
        self.turn = self._deadlines.discard(self)


class Deadlines:
    """Ends exchanges that are silent for too long, with one timer for all of them.

    The timer stands at the earliest deadline known when it was set. Most
    exchanges end long before, so starting and ending one costs a set entry.
    """

    def __init__(self) -> None:
        self._open: set[ClientResponse] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = NEVER
        self._num_ended = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def now(self) -> float:
        """Seconds on the running loop's clock."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        return loop.time()

    def add(self, response: ClientResponse) -> None:
        """Watch ``response.deadline_s``."""
        self._open.add(response)
        if response.deadline_s < self._due_s:
            self._arm(response.deadline_s)

    def touch(self, response: ClientResponse) -> None:
        """It is not silent: its silence limit starts again."""
        response.deadline_s = self.now() + response.silence_s
        if response.deadline_s < self._due_s:
            self._arm(response.deadline_s)

    def discard(self, response: ClientResponse) -> int:
        """It has ended; returns how many had before, itself included."""
        self._open.discard(response)
        self._num_ended += 1
        return self._num_ended

    def open(self) -> list[ClientResponse]:
        """Exchanges that were sent and have not ended."""
        return list(self._open)

    def close(self) -> list[ClientResponse]:
        """Stop the timer; returns what was still open."""
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = NEVER
        return list(self._open)

    def _arm(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = due_s
        self.now()
        assert self._loop is not None
        self._timer = self._loop.call_at(due_s, self._sweep)

    def _sweep(self) -> None:
        now_s, due_s = self.now(), NEVER
        self._timer, self._due_s = None, NEVER
        for response in list(self._open):
            if response.is_paused:
                continue
            if response.deadline_s <= now_s:
                response.expire()
            if not response.has_ended:
                due_s = min(due_s, response.deadline_s)
        if due_s < self._due_s:
            self._arm(due_s)
