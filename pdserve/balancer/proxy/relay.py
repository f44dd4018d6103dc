"""One attempt at one request: the same bytes to both workers of a pair, decode's answer to the client.

    body ─┬─► prefill  its answer is read to the end and watched: closing it would abort the request
          └─► decode ──first byte──► head and bytes to the client

Nothing reaches the client before decode's first byte. Until then any failed leg
raises ``LegFailed`` and the attempt may be repeated elsewhere. Decode's first
byte proves that it holds the whole KV, so a prefill server lost later is
blamed, and the answer goes on. ``run`` closes both sockets before it returns.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import msgspec
from msgspec import structs

from pdserve.balancer.request.merge import merge_whole, stream_merger
from pdserve.balancer.request.request import ParsedRequest
from pdserve.balancer.request.transforms import Renaming, ResponseSink
from pdserve.balancer.request.usage import StreamTally, Usage, stream_failure, usage_of_body
from pdserve.errors import PdserveError, WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.http.answer import Answer, Headers
from pdserve.http.client import HttpClient
from pdserve.http.client_response import ClientResponse, Wakeup
from pdserve.http.sse import EVENT_END, EventSplitter
from pdserve.telemetry import RequestTimeline
from pdserve.types import Pair, Role

PREFILL_GRACE_S = 5.0
"""How long after decode's end prefill may take to end its own answer."""

STUMBLED = b"Internal Server Error"
"""starlette's whole body for an exception that no handler knows."""
ABORTED = re.compile(rb'"finish_reason":\s*(?:\{"type":\s*)?"abort"')
TRANSFER_FAILED = re.compile(rb"(transfer|bootstrap|handshake) failed for request|KVTransferError")
"""What SGLang's legs say of each other (disaggregation/prefill.py, decode.py, common/conn.py)."""

_NOT_RELAYED = frozenset(
    b"connection content-length date keep-alive server transfer-encoding x-request-id".split()
)


class Rejected(WorkerRejected):
    """An error status with the headers it came with, so that it can be relayed as it is."""

    def __init__(self, response: ClientResponse, body: bytes) -> None:
        super().__init__(response.url, response.status, body)
        self.headers = relayed_headers(response)


def relayed_headers(response: ClientResponse) -> Headers:
    """A worker's headers but for those that belong to its connection or that we set."""
    return tuple([header for header in response.headers if header[0].lower() not in _NOT_RELAYED])


class LegFailed(PdserveError):
    """One leg failed. ``role`` is the one that failed first, None if both were silent.

    ``is_prefill_done`` tells whether the prefill leg had ended well before, ``is_request_fault`` whether
    another worker has rejected the request too.
    """

    is_request_fault = False

    def __init__(self, role: Role | None, error: WorkerError, *, is_prefill_done: bool = False) -> None:
        super().__init__(str(error))
        self.role = role
        self.error = error
        self.is_prefill_done = is_prefill_done

    @property
    def is_stale(self) -> bool:
        """True if only a kept connection had been closed: nobody's fault, and no attempt really."""
        return isinstance(self.error, WorkerUnreachable) and self.error.is_stale

    @property
    def is_client_fault(self) -> bool:
        """True if the worker refused the request itself: no other pair would take it either.

        A 500 in the web framework's own words is that: its handler stumbled over the
        request (an unknown parameter of /vertex_generate), the engine never saw it.
        """
        error = self.error
        return isinstance(error, WorkerRejected) and (error.status < 500 or error.body == STUMBLED)


class Relayed(msgspec.Struct, frozen=True):
    """Decode has ended well and all its bytes are here: sent, or waiting in ``whole``.

    ``prefill_error`` is None if the prefill leg ended well too. ``is_aborted``: somebody
    had prefill drop the request; its answer says so, and decode is still to be told.
    """

    status: int
    usage: Usage
    whole: Answer | None
    prefill_error: WorkerError | None = None
    is_aborted: bool = False

    async def finish(self, sink: ResponseSink) -> None:
        """Send the end of the answer, unless it is out already."""
        if sink.has_finished:
            return
        if self.whole is None:
            await sink.finish()
        else:
            await sink.answer(self.whole)


class _Leg(msgspec.Struct, eq=False):
    """One worker's part. ``error`` and ``is_done`` exclude each other; both follow what ``advance`` saw."""

    role: Role
    response: ClientResponse
    parts: list[bytes] = []
    error: WorkerError | None = None
    is_done: bool = False

    @property
    def is_accepted(self) -> bool:
        """True once the worker has answered with a success status."""
        return 200 <= self.response.status < 300

    def advance(self) -> bool:
        """Take in what has arrived; True once the leg has ended, well or not."""
        response = self.response
        if self.is_done or self.error is not None:
            return True
        if response.has_chunks:
            self.parts += response.take()
        if not response.has_ended:
            return False
        if response.error is not None:
            self.error = response.error
        elif response.is_complete and self.is_accepted:
            self.is_done = True
        elif response.is_complete:
            self.error = Rejected(response, self.body())
        return True

    def body(self) -> bytes:
        """What has been taken in."""
        if len(self.parts) > 1:
            self.parts = [b"".join(self.parts)]
        return self.parts[0] if self.parts else b""

    @property
    def has_event(self) -> bool:
        """True once a whole server-sent event is here."""
        return EVENT_END in self.body()

    def check_stream(self) -> None:
        """A 200 stream whose first event says that the server failed is a failed leg."""
        failure = stream_failure(self.parts[0]) if self.parts else None
        if failure is not None and failure[0] >= 500:
            self.error, self.is_done = WorkerRejected(self.response.url, failure[0], self.body()), False


class PairRelay:
    """Runs one attempt, once, without a task of its own.

    Both responses call ``_on_change``: what arrives is taken in within the
    connection's callback, and the coroutine wakes only when it has something to do.
    ``renaming`` is what becomes of our request ids in the answer; ``silence_s`` the
    longest silence of a worker.
    """

    __slots__ = (
        "_bug",
        "_decode",
        "_is_aborted",
        "_is_opening",
        "_limits",
        "_on_prefilled",
        "_pair",
        "_pool",
        "_prefill",
        "_renaming",
        "_request",
        "_timeline",
        "_wakeup",
    )

    def __init__(
        self,
        pool: HttpClient,
        pair: Pair,
        request: ParsedRequest,
        timeline: RequestTimeline,
        *,
        renaming: Renaming | None,
        silence_s: float,
        on_prefilled: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._pair = pair
        self._request = request
        self._timeline = timeline
        self._renaming = renaming
        self._on_prefilled = on_prefilled
        self._limits = (silence_s, silence_s)
        self._wakeup = Wakeup()
        self._is_opening = False
        self._is_aborted = False
        self._bug: Exception | None = None

    async def run(self, body: bytes, lines: tuple[bytes, bytes], sink: ResponseSink) -> Relayed:
        """Send ``body`` under each leg's header ``lines`` to both workers, decode's answer to ``sink``.

        All but its end: that is the caller's to send, by ``Relayed.finish``, once its books are
        closed; it is out already if prefill lags behind decode.

        Raises:
            LegFailed: ``sink.has_begun`` tells whether the client has bytes already.
        """
        pair, (to_prefill, to_decode) = self._pair, lines
        prefill = self._prefill = _Leg(Role.PREFILL, self._send(pair.prefill.url, body, to_prefill))
        decode = self._decode = _Leg(Role.DECODE, self._send(pair.decode.url, body, to_decode))
        try:
            await self._opened(prefill, decode)
            if self._is_aborted:
                return self._aborted(prefill, sink)
            whole: Answer | None = None
            if self._request.is_stream:
                usage = await self._stream(prefill, decode, sink)
            else:
                whole = self._whole(prefill, decode)
                usage = usage_of_body(whole.body)
            relayed = Relayed(decode.response.status, usage, whole)
            if self._advance_prefill(prefill):
                return relayed if prefill.is_done else structs.replace(relayed, prefill_error=prefill.error)
            await relayed.finish(sink)
            return structs.replace(relayed, prefill_error=await self._settled(prefill))
        finally:
            prefill.response.close()
            decode.response.close()

    def _send(self, url: str, body: bytes, lines: bytes) -> ClientResponse:
        response = self._pool.start(
            url, "POST", self._request.route.value, body, headers=lines, limits=self._limits,
            on_change=self._on_change,
        )  # fmt: skip
        response.can_resend = False  # the worker may already have taken the request's room
        return response

    @property
    def prefill_answer(self) -> bytes:
        """The prefill leg's answer as far as it has arrived."""
        return self._prefill.body()

    def _on_change(self) -> None:
        try:
            if not self._is_opening:
                self._advance_prefill(self._prefill)
            elif not self._advance_legs():
                return
        except Exception as exc:
            self._bug = exc
        self._wakeup.set()

    async def _opened(self, prefill: _Leg, decode: _Leg) -> None:
        """Wait until the answer may begin: decode's first byte, or its whole body unless it streams."""
        self._is_opening = True
        has_failed_already = prefill.response.has_ended or decode.response.has_ended
        if not (has_failed_already and self._advance_legs()):
            await self._wait()
        self._is_opening = False
        if prefill.error is not None or decode.error is not None:
            raise _first_failure(prefill, decode)

    def _advance_legs(self) -> bool:
        """Take in what both legs have received; return True once the answer may begin or a leg has failed."""
        prefill, decode, request = self._prefill, self._decode, self._request
        is_prefill_over = self._advance_prefill(prefill)
        is_open = decode.advance()
        if request.is_stream and decode.is_accepted and (is_open or decode.has_event):
            is_open = True
            decode.check_stream()
            if decode.is_done and not decode.parts:
                decode.error = WorkerUnreachable(decode.response.url, "its stream ended without a byte")
        if decode.error is not None or (is_prefill_over and prefill.error is not None):
            return True
        if is_prefill_over and not is_open and ABORTED.search(prefill.body()):
            self._is_aborted = True
            return True
        return is_open and (is_prefill_over or not request.needs_prefill_answer)

    def _aborted(self, prefill: _Leg, sink: ResponseSink) -> Relayed:
        """Prefill's answer as the client's: SGLang's decode server would wait for KV that never comes."""
        response, body = prefill.response, prefill.body()
        if self._renaming is not None:
            body = self._renaming.apply(body)
        whole = Answer(response.status, body, relayed_headers(response))
        if self._request.is_stream:
            sink.begin(response.status, whole.headers)
            sink.push(body)
            return Relayed(response.status, Usage("abort"), None, is_aborted=True)
        return Relayed(response.status, Usage("abort"), whole, is_aborted=True)

    async def _wait(self) -> None:
        await self._wakeup.wait()
        if self._bug is not None:
            raise self._bug

    def _whole(self, prefill: _Leg, decode: _Leg) -> Answer:
        body, request = decode.body(), self._request
        if request.needs_prefill_answer or request.num_samples > 1:
            body = merge_whole(request, body, prefill.body())
        if self._renaming is not None:
            body = self._renaming.apply(body)
        return Answer(decode.response.status, body, relayed_headers(decode.response))

    async def _stream(self, prefill: _Leg, decode: _Leg, sink: ResponseSink) -> Usage:
        self._timeline.first_token_s = time.monotonic()
        is_one_answer = (self._request.num_prompts or 1) == 1 and self._request.num_samples == 1
        response, tally = decode.response, StreamTally(self._timeline.meter if is_one_answer else None)
        rewrite, splitter = self._rewrite(prefill), EventSplitter()

        def pour(data: bytes) -> bool:
            if splitter.tail or not data.endswith(EVENT_END):  # a part of an event waits for its end
                data = splitter.feed(data)
            tally.add(data)
            return sink.push(rewrite(data) if rewrite else data)

        sink.begin(response.status, relayed_headers(response))
        sink.on_writable = response.release
        try:
            pour(decode.body())
            response.pour_into(pour)
            while not response.has_ended:
                await self._wait()
        finally:
            sink.on_writable = None
        if response.error is not None:
            raise LegFailed(Role.DECODE, response.error, is_prefill_done=prefill.is_done)
        sink.push(splitter.tail if self._renaming is None else self._renaming.apply(splitter.tail))
        return tally.usage()

    def _rewrite(self, prefill: _Leg) -> Callable[[bytes], bytes] | None:
        """What whole events of decode's stream must pass through, if anything."""
        request = self._request
        rename = self._renaming.apply if self._renaming is not None else None
        merge = None
        if request.needs_prefill_answer or request.num_samples > 1:
            merge = stream_merger(request, prefill.body())
        if merge is None or rename is None:
            return merge or rename
        return lambda events: rename(merge(events))

    async def _settled(self, prefill: _Leg) -> WorkerError | None:
        """Why the prefill leg did not end well, after decode's did."""
        try:
            async with asyncio.timeout(PREFILL_GRACE_S):
                while not self._advance_prefill(prefill):
                    await self._wait()
        except TimeoutError:
            return WorkerTimeout(
                prefill.response.url, f"no end of its answer {PREFILL_GRACE_S:g} s after decode's"
            )
        return prefill.error

    def _advance_prefill(self, prefill: _Leg) -> bool:
        if prefill.is_done or prefill.error is not None:
            return True
        if not prefill.advance():
            return False
        if prefill.is_done:
            if self._request.is_stream:
                prefill.check_stream()
            self._timeline.prefill_done_s = time.monotonic()
            self._on_prefilled()
        return True


def _first_failure(prefill: _Leg, decode: _Leg) -> LegFailed:
    """Which leg to blame: the one that failed first. Both legs wait for each other's handshake,
    so if one ran out of time while the other was silent too, or reports that the KV did not
    travel, either may be the cause."""
    failed = [leg for leg in (prefill, decode) if leg.error is not None]
    first = min(failed, key=lambda leg: leg.response.turn)
    assert first.error is not None
    other = decode if first is prefill else prefill
    is_unclear = isinstance(first.error, WorkerTimeout) and not other.response.status
    if isinstance(first.error, WorkerRejected):
        is_unclear = first.error.status >= 500 and bool(TRANSFER_FAILED.search(first.error.body))
    role = None if is_unclear else first.role
    return LegFailed(role, first.error, is_prefill_done=prefill.is_done)
