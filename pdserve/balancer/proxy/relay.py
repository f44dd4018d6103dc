"""One attempt at one request: the same bytes to both workers of a pair, decode's answer to the client.

    body ─┬─► prefill  its answer is read to the end and watched: closing it would abort the request
          └─► decode ──first byte──► head and bytes to the client

Nothing reaches the client before decode's first byte. Until then any failed leg
raises ``LegFailed`` and the attempt may be repeated elsewhere; after it, resumed elsewhere if
decode has told its tokens (docs/resume.md). Decode's first byte proves that it holds the whole
KV, so a prefill server lost later is blamed, and the answer goes on. ``run`` closes both sockets
before it returns.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import msgspec
from msgspec import structs

from pdserve.balancer.proxy.answer import LegFailed, Rejected, Relayed, relayed_headers
from pdserve.balancer.proxy.answer_log import without_comments
from pdserve.balancer.proxy.client_answer import ClientAnswer
from pdserve.balancer.request.events import Said, first_said
from pdserve.balancer.request.merge import merge_whole
from pdserve.balancer.request.request import ParsedRequest, Route
from pdserve.balancer.request.transforms import ResponseSink
from pdserve.balancer.request.usage import Usage, usage_of_body
from pdserve.errors import WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.http.answer import Answer
from pdserve.http.client import HttpClient
from pdserve.http.client_response import ClientResponse, Wakeup
from pdserve.telemetry import RequestTimeline
from pdserve.types import Pair, Role

PREFILL_GRACE_S = 5.0
"""How long after decode's end prefill may take to end its own answer."""

ABORTED = re.compile(rb'"finish_reason":\s*(?:\{"type":\s*)?"abort"|"status":\s*"failed"')
"""How an answer says that it was dropped; Anthropic's has no word for it."""
TRANSFER_FAILED = re.compile(rb"(transfer|bootstrap|handshake) failed for request|KVTransferError")
"""What SGLang's legs say of each other (disaggregation/prefill.py, decode.py, common/conn.py)."""


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

    def check_stream(self, route: Route) -> Said | None:
        """What a 200 stream says first; None if it has not begun. Of its server's failure: a failed leg."""
        said = first_said(route, self.body(), is_whole=self.is_done)
        if said is not None and said.failure is not None and said.failure.is_servers:
            failed = WorkerRejected(self.response.url, said.failure.status, without_comments(self.body()))
            self.error, self.is_done = failed, False
        return said


class PairRelay:
    """Runs one attempt, once, without a task of its own.

    Both responses call ``_on_change``: what arrives is taken in within the
    connection's callback, and the coroutine wakes only when it has something to do.
    ``answer`` is what the client has, or gets, of it: if it has begun, this attempt goes on with it;
    ``silence_s`` is the longest silence of a worker.
    """

    __slots__ = (
        "_answer",
        "_bug",
        "_decode",
        "_first_said",
        "_is_aborted",
        "_is_opening",
        "_is_resumed",
        "_limits",
        "_on_prefilled",
        "_pair",
        "_pool",
        "_prefill",
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
        answer: ClientAnswer,
        silence_s: float,
        on_prefilled: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._pair = pair
        self._request = request
        self._timeline = timeline
        self._answer = answer
        self._is_resumed = answer.has_begun
        self._on_prefilled = on_prefilled
        self._limits = (silence_s, silence_s)
        self._wakeup = Wakeup()
        self._is_opening = False
        self._is_aborted = False
        self._first_said: Said | None = None
        self._bug: Exception | None = None

    async def run(self, body: bytes, lines: tuple[bytes, bytes], sink: ResponseSink) -> Relayed:
        """Send ``body`` under each leg's header ``lines`` to both workers, decode's answer to ``sink``.

        All but its end: that is the caller's to send, by ``Relayed.finish``, once its books are
        closed; it is out already if prefill lags behind decode.

        Raises:
            LegFailed: ``sink.has_begun`` tells whether the client has bytes already.
        """
        prefill, decode = self._begin(body, lines)
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
            said_wrong = _said_wrong(decode, usage) or decode.response.error
            relayed = Relayed(decode.response.status, usage, whole, decode_error=said_wrong)
            if self._advance_prefill(prefill):
                return relayed if prefill.is_done else structs.replace(relayed, prefill_error=prefill.error)
            await relayed.finish(sink)
            return structs.replace(relayed, prefill_error=await self._settled(prefill))
        finally:
            prefill.response.close()
            decode.response.close()

    def _begin(self, body: bytes, lines: tuple[bytes, bytes]) -> tuple[_Leg, _Leg]:
        """Send both legs. Of a decode worker alone there is one: the other counts as done."""
        pair, (to_prefill, to_decode) = self._pair, lines
        if pair.is_alone:
            decode = self._decode = _Leg(Role.DECODE, self._send(pair.decode.url, body, to_decode))
            prefill = self._prefill = _Leg(Role.PREFILL, decode.response, is_done=True)
            return prefill, decode
        prefill = self._prefill = _Leg(Role.PREFILL, self._send(pair.prefill.url, body, to_prefill))
        decode = self._decode = _Leg(Role.DECODE, self._send(pair.decode.url, body, to_decode))
        return prefill, decode

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
        if self._pair.is_alone:  # its answer begins when the prompt is computed
            self._on_prefilled()

    def _advance_legs(self) -> bool:
        """Take in what both legs have received; return True once the answer may begin or a leg has failed."""
        prefill, decode, request = self._prefill, self._decode, self._request
        is_prefill_over = self._advance_prefill(prefill)
        is_open = decode.advance()
        if request.is_stream and decode.is_accepted and decode.error is None:
            if self._first_said is None:
                self._first_said = decode.check_stream(request.route)
            is_open = self._first_said is not None
            if decode.is_done and not is_open:
                decode.error = WorkerUnreachable(decode.response.url, "its stream ended without an answer")
        if decode.error is not None or (is_prefill_over and prefill.error is not None):
            return True
        if is_prefill_over and not is_open and ABORTED.search(prefill.body()):
            self._is_aborted = True
            return True
        needs_prefill_answer = request.needs_prefill_answer and not self._is_resumed
        return is_open and (is_prefill_over or not needs_prefill_answer)

    def _aborted(self, prefill: _Leg, sink: ResponseSink) -> Relayed:
        """Prefill's answer as the client's: SGLang's decode server would wait for KV that never comes."""
        response, body, usage = prefill.response, prefill.body(), Usage("abort")
        if self._is_resumed:
            raise LegFailed(Role.PREFILL, WorkerRejected(response.url, 500, b"it aborted the request"))
        if self._answer.renaming is not None:
            body = self._answer.renaming.apply(body)
        whole: Answer | None = Answer(response.status, body, relayed_headers(response))
        if self._request.is_stream:
            sink.begin(response.status, relayed_headers(response))
            sink.push(body)
            whole = None
        error = _said_wrong(prefill, usage)
        return Relayed(response.status, usage, whole, prefill_error=error, is_aborted=True)

    async def _wait(self) -> None:
        await self._wakeup.wait()
        if self._bug is not None:
            raise self._bug

    def _whole(self, prefill: _Leg, decode: _Leg) -> Answer:
        body, request = decode.body(), self._request
        if request.needs_prefill_answer or request.num_samples > 1:
            body = merge_whole(request, body, prefill.body())
        if self._answer.renaming is not None:
            body = self._answer.renaming.apply(body)
        return Answer(decode.response.status, body, relayed_headers(decode.response))

    async def _stream(self, prefill: _Leg, decode: _Leg, sink: ResponseSink) -> Usage:
        answer, response, now_s = self._answer, decode.response, time.monotonic()
        self._timeline.first_token_s = now_s
        if answer.has_begun:
            answer.go_on(now_s)
        else:
            prompt_tokens = self._first_said.prompt_tokens if self._first_said is not None else None
            answer.begin(self._request, prefill.body(), self._timeline.meter, prompt_tokens)
            sink.begin(response.status, relayed_headers(response))
        sink.on_writable = response.release
        try:
            pour = answer.open_leg(sink.push, self._wakeup.set)
            pour(decode.body())
            response.pour_into(pour)
            if answer.may_leave is not None:
                response.watch_stalls(answer.patience_s, answer.may_leave)
            while not (response.has_ended or answer.is_given_up or answer.is_moving):
                await self._wait()
        finally:
            sink.on_writable = None
            answer.close_leg()
        if (error := self._why_broken(response)) is not None:
            answer.heard_s = response.heard_s
            raise LegFailed(Role.DECODE, error, is_prefill_done=prefill.is_done, is_late=response.is_stalled)
        if not response.has_ended:
            answer.heard_s = response.heard_s
            raise LegFailed.moved(response.url, is_prefill_done=prefill.is_done)
        return answer.end(sink.push)

    def _why_broken(self, response: ClientResponse) -> WorkerError | None:
        """Why decode's stream is not the whole answer. None if it is: one that can be resumed has an end
        even if its connection then broke."""
        answer = self._answer
        if answer.is_given_up:
            assert answer.log is not None
            return WorkerRejected(response.url, answer.log.aborted or 500, b"it gave the answer up")
        if response.error is not None and answer.log is not None and answer.has_end:
            return None
        return response.error

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
                prefill.check_stream(self._request.route)
            self._timeline.prefill_done_s = time.monotonic()
            self._on_prefilled()
        return True


def _said_wrong(leg: _Leg, usage: Usage) -> WorkerError | None:
    """What a leg's complete answer says that its worker did wrong, if it was the worker."""
    if usage.failure is not None:
        is_servers, status, why = usage.failure.is_servers, usage.failure.status, usage.failure.message
        return WorkerRejected(leg.response.url, status, why.encode()) if is_servers else None
    if usage.finish == "abort":
        return WorkerRejected(leg.response.url, 500, b"it aborted the request")
    return None


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
    role = None if is_unclear and other.response is not first.response else first.role
    return LegFailed(role, first.error, is_prefill_done=prefill.is_done)
