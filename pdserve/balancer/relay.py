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
import time
from dataclasses import dataclass, field, replace

from pdserve.balancer.exchange import UpstreamResponse, Wakeup
from pdserve.balancer.http_errors import Answer, Headers
from pdserve.balancer.proxy import Client
from pdserve.balancer.request import ParsedRequest
from pdserve.balancer.reservation import Reservation
from pdserve.balancer.stream import (
    StreamTally,
    Usage,
    merge_prompt_logprobs,
    stream_failure,
    usage_of_body,
)
from pdserve.balancer.upstream import UpstreamPool
from pdserve.errors import PdserveError, WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.telemetry import RequestTimeline
from pdserve.types import Role

PREFILL_GRACE_S = 5.0
"""How long after decode's end prefill may take to end its own answer."""

_NOT_RELAYED = frozenset(
    b"connection content-length date keep-alive server transfer-encoding x-request-id".split()
)


class Rejected(WorkerRejected):
    """An error status with the headers it came with, so that it can be relayed as it is."""

    def __init__(self, response: UpstreamResponse, body: bytes) -> None:
        super().__init__(response.url, response.status, body)
        self.headers = relayed_headers(response)


def relayed_headers(response: UpstreamResponse) -> Headers:
    """A worker's headers but for those that belong to its connection or that we set."""
    return tuple(header for header in response.headers if header[0].lower() not in _NOT_RELAYED)


class LegFailed(PdserveError):
    """One leg failed. ``role`` is the one that failed first, None if both were silent.

    ``is_prefill_done`` tells whether the prefill leg had ended well before.
    """

    def __init__(self, role: Role | None, error: WorkerError, *, is_prefill_done: bool = False) -> None:
        super().__init__(str(error))
        self.role = role
        self.error = error
        self.is_prefill_done = is_prefill_done

    @property
    def is_client_fault(self) -> bool:
        """True if the worker refused the request itself: no other pair would take it either."""
        return isinstance(self.error, WorkerRejected) and self.error.status < 500


@dataclass(frozen=True, slots=True)
class Relayed:
    """Decode has ended well and all its bytes are here: sent, or waiting in ``whole``.

    ``prefill_error`` is None if the prefill leg ended well too.
    """

    status: int
    usage: Usage
    whole: Answer | None
    prefill_error: WorkerError | None = None

    async def finish(self, client: Client) -> None:
        """Send the end of the answer, unless it is out already."""
        if client.has_finished:
            return
        if self.whole is None:
            await client.finish()
        else:
            await client.answer(self.whole)


@dataclass(slots=True, eq=False)
class _Leg:
    """One worker's part. ``error`` and ``is_done`` exclude each other; both follow what ``advance`` saw."""

    role: Role
    response: UpstreamResponse
    parts: list[bytes] = field(default_factory=list)
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
        self.parts += response.take()
        if response.error is not None:
            self.error = response.error
        elif response.is_complete and self.is_accepted:
            self.is_done = True
        elif response.is_complete:
            self.error = Rejected(response, self.body())
        return self.is_done or self.error is not None

    def body(self) -> bytes:
        """What has been taken in."""
        if len(self.parts) > 1:
            self.parts = [b"".join(self.parts)]
        return self.parts[0] if self.parts else b""

    def check_stream(self) -> None:
        """A 200 stream whose first event says that the server failed is a failed leg."""
        failure = stream_failure(self.parts[0]) if self.parts else None
        if failure is not None and failure[0] >= 500:
            self.error, self.is_done = WorkerRejected(self.response.url, failure[0], self.body()), False


class PairRelay:
    """Runs one attempt, once. Needs no task of its own: both responses wake the same coroutine."""

    def __init__(
        self,
        pool: UpstreamPool,
        reservation: Reservation,
        request: ParsedRequest,
        timeline: RequestTimeline,
        silence_s: float,
    ) -> None:
        self._pool = pool
        self._reservation = reservation
        self._request = request
        self._timeline = timeline
        self._limits = (silence_s, silence_s)
        self._wakeup = Wakeup()

    async def run(self, body: bytes, headers: Headers, client: Client) -> Relayed:
        """Send ``body`` to both workers and decode's answer to ``client``, all but its end.

        The end is the caller's to send, by ``Relayed.finish``, once its books are
        closed; it is out already if prefill lags behind decode.

        Raises:
            LegFailed: ``client.has_begun`` tells whether the client has bytes already.
        """
        pair = self._reservation.pair
        prefill, decode = (
            _Leg(worker.role, self._start(worker.url, body, headers))
            for worker in (pair.prefill, pair.decode)
        )
        try:
            await self._opened(prefill, decode)
            whole: Answer | None = None
            if self._request.is_stream:
                usage = await self._stream(prefill, decode, client)
            else:
                whole = self._whole(prefill, decode)
                usage = usage_of_body(whole.body)
            relayed = Relayed(decode.response.status, usage, whole)
            if self._advance_prefill(prefill):
                return replace(relayed, prefill_error=prefill.error) if prefill.error else relayed
            await relayed.finish(client)
            return replace(relayed, prefill_error=await self._settled(prefill))
        finally:
            prefill.response.close()
            decode.response.close()

    def _start(self, url: str, body: bytes, headers: Headers) -> UpstreamResponse:
        path = str(self._request.route)
        return self._pool.start(
            url, "POST", path, body, headers=headers, limits=self._limits, wakeup=self._wakeup
        )

    async def _opened(self, prefill: _Leg, decode: _Leg) -> None:
        """Wait until the answer may begin: decode's first byte, or its whole body unless it streams."""
        while True:
            self._advance_prefill(prefill)
            has_ended = decode.advance()
            is_open = has_ended
            if self._request.is_stream and decode.is_accepted and (decode.parts or has_ended):
                is_open = True
                decode.check_stream()
                if decode.is_done and not decode.parts:
                    decode.error = WorkerUnreachable(decode.response.url, "its stream ended without a byte")
            if prefill.error is not None or decode.error is not None:
                raise _first_failure(prefill, decode)
            if is_open and (prefill.is_done or not self._request.return_logprob):
                return
            await self._wakeup.wait()

    def _whole(self, prefill: _Leg, decode: _Leg) -> Answer:
        body = decode.body()
        if self._request.return_logprob:
            body = merge_prompt_logprobs(body, prefill.body())
        return Answer(decode.response.status, body, relayed_headers(decode.response))

    async def _stream(self, prefill: _Leg, decode: _Leg, client: Client) -> Usage:
        self._timeline.first_token_s = time.monotonic()
        response, tally, chunks = decode.response, StreamTally(), decode.parts
        await client.begin(response.status, relayed_headers(response))
        while True:
            for chunk in chunks:
                tally.add(chunk)
                await client.write(chunk)
            self._advance_prefill(prefill)
            if not response.has_chunks:
                if response.error is not None:
                    raise LegFailed(Role.DECODE, response.error, is_prefill_done=prefill.is_done)
                if response.is_complete:
                    break
                await self._wakeup.wait()
            chunks = response.take()
        return tally.usage()

    async def _settled(self, prefill: _Leg) -> WorkerError | None:
        """Why the prefill leg did not end well, after decode's did."""
        try:
            async with asyncio.timeout(PREFILL_GRACE_S):
                while not self._advance_prefill(prefill):
                    await self._wakeup.wait()
        except TimeoutError:
            return WorkerTimeout(
                prefill.response.url, f"no end of its answer {PREFILL_GRACE_S:g} s after decode's"
            )
        return prefill.error

    def _advance_prefill(self, prefill: _Leg) -> bool:
        if prefill.is_done or prefill.error is not None:
            return True
        if prefill.advance() and prefill.is_done:
            if self._request.is_stream:
                prefill.check_stream()
            self._timeline.prefill_done_s = time.monotonic()
            self._reservation.prefill_finished()
        return prefill.is_done or prefill.error is not None


def _first_failure(prefill: _Leg, decode: _Leg) -> LegFailed:
    """Which leg to blame: the one that failed first. Both legs wait for each other's handshake,
    so if one ran out of time while the other was silent too, either may be the cause."""
    failed = [leg for leg in (prefill, decode) if leg.error is not None]
    first = min(failed, key=lambda leg: leg.response.ended_s)
    assert first.error is not None
    other = decode if first is prefill else prefill
    is_unclear = isinstance(first.error, WorkerTimeout) and not other.response.status
    role = None if is_unclear else first.role
    return LegFailed(role, first.error, is_prefill_done=prefill.is_done)
