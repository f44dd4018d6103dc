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
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pdserve.balancer.exchange import UpstreamResponse
from pdserve.balancer.http_errors import Headers
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
from pdserve.types import Role, WorkerInfo

PREFILL_GRACE_S = 5.0
"""How long after decode's end prefill may take to end its own answer."""

_NOT_RELAYED = frozenset(
    b"connection content-length date keep-alive server transfer-encoding x-request-id".split()
)


class Rejected(WorkerRejected):
    """An error status with the headers it came with, so that it can be relayed as it is."""

    def __init__(self, url: str, response: UpstreamResponse, body: bytes) -> None:
        super().__init__(url, response.status, body)
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
    """The client has the whole answer. ``prefill_error`` is None if the prefill leg ended well too."""

    status: int
    usage: Usage
    prefill_error: WorkerError | None = None


@dataclass(slots=True)
class _Opening:
    """The decode leg at its first byte; ``first`` is the whole body unless the request streams."""

    response: UpstreamResponse
    chunks: AsyncIterator[bytes]
    first: bytes


class PairRelay:
    """Runs one attempt, once."""

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
        self._silence_s = silence_s
        self._responses: list[UpstreamResponse] = []

    async def run(self, body: bytes, headers: Headers, client: Client) -> Relayed:
        """Send ``body`` to both workers and the answer to ``client``.

        Raises:
            LegFailed: ``client.has_begun`` tells whether the client has bytes already.
        """
        prefill = asyncio.create_task(self._prefill_leg(body, headers))
        decode = asyncio.create_task(self._decode_opening(body, headers))
        try:
            opening = await self._first_byte(prefill, decode)
            usage = await self._to_client(opening, prefill, client)
            return Relayed(opening.response.status, usage, await self._settled(prefill))
        finally:
            for leg in (prefill, decode):
                leg.cancel()
            await asyncio.gather(prefill, decode, return_exceptions=True)
            for response in self._responses:
                response.close()

    # -- legs --------------------------------------------------------------------------------

    async def _open(self, worker: WorkerInfo, body: bytes, headers: Headers) -> UpstreamResponse:
        response = await self._pool.open(
            worker.url,
            "POST",
            self._request.route,
            body,
            headers=headers,
            first_byte_s=self._silence_s,
            silence_s=self._silence_s,
        )
        self._responses.append(response)
        if not 200 <= response.status < 300:
            raise Rejected(worker.url, response, await response.read())
        return response

    async def _prefill_leg(self, body: bytes, headers: Headers) -> bytes:
        worker = self._reservation.pair.prefill
        response = await self._open(worker, body, headers)
        answer = await response.read()
        self._check(worker, answer)
        self._timeline.prefill_done_s = time.monotonic()
        self._reservation.prefill_finished()
        return answer

    async def _decode_opening(self, body: bytes, headers: Headers) -> _Opening:
        worker = self._reservation.pair.decode
        response = await self._open(worker, body, headers)
        chunks = aiter(response)
        if not self._request.is_stream:
            return _Opening(response, chunks, await response.read())
        first = await anext(chunks, b"")
        if not first:
            raise WorkerUnreachable(worker.url, "its stream ended without a byte")
        self._check(worker, first)
        return _Opening(response, chunks, first)

    def _check(self, worker: WorkerInfo, start: bytes) -> None:
        """Raise if a 200 stream says that the request failed on the worker's side."""
        failure = stream_failure(start) if self._request.is_stream else None
        if failure is not None and failure[0] >= 500:
            raise WorkerRejected(worker.url, failure[0], start)

    # -- the exchange ------------------------------------------------------------------------

    async def _first_byte(self, prefill: asyncio.Task[bytes], decode: asyncio.Task[_Opening]) -> _Opening:
        legs = {Role.PREFILL: prefill, Role.DECODE: decode}
        while True:
            await asyncio.wait(
                [leg for leg in legs.values() if not leg.done()], return_when=asyncio.FIRST_COMPLETED
            )
            for role, leg in legs.items():
                if leg.done() and (error := leg.exception()) is not None:
                    raise self._failure(role, error, prefill, decode)
            if decode.done() and (prefill.done() or not self._request.return_logprob):
                return decode.result()

    def _failure(
        self,
        role: Role,
        error: BaseException,
        prefill: asyncio.Task[bytes],
        decode: asyncio.Task[_Opening],
    ) -> BaseException:
        if not isinstance(error, WorkerError):
            return error
        other = decode if role is Role.PREFILL else prefill
        # Each leg waits for the other's handshake: if both are silent, either may be the cause.
        blamed = None if isinstance(error, WorkerTimeout) and not other.done() else role
        is_prefill_done = prefill.done() and prefill.exception() is None
        return LegFailed(blamed, error, is_prefill_done=is_prefill_done)

    async def _to_client(self, opening: _Opening, prefill: asyncio.Task[bytes], client: Client) -> Usage:
        response, first = opening.response, opening.first
        headers = relayed_headers(response)
        if not self._request.is_stream:
            if self._request.return_logprob:
                first = merge_prompt_logprobs(first, prefill.result())
            await client.begin(response.status, (*headers, (b"content-length", b"%d" % len(first))))
            await client.finish(first)
            return usage_of_body(first)
        self._timeline.first_token_s = time.monotonic()
        tally = StreamTally()
        tally.add(first)
        await client.begin(response.status, headers)
        await client.write(first)
        try:
            async for chunk in opening.chunks:
                tally.add(chunk)
                await client.write(chunk)
        except WorkerError as exc:
            is_done = prefill.done() and prefill.exception() is None
            raise LegFailed(Role.DECODE, exc, is_prefill_done=is_done) from exc
        await client.finish()
        return tally.usage()

    async def _settled(self, prefill: asyncio.Task[bytes]) -> WorkerError | None:
        """Why the prefill leg did not end well, after decode's did."""
        await asyncio.wait([prefill], timeout=PREFILL_GRACE_S)
        if not prefill.done():
            url = self._reservation.pair.prefill.url
            return WorkerTimeout(url, f"no end of its answer {PREFILL_GRACE_S:g} s after decode's")
        error = prefill.exception()
        if error is None or isinstance(error, WorkerError):
            return error
        raise error
