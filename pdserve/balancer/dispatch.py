"""Each request over some pair: reserve, relay, retry elsewhere, and end both legs together.

body ─ parse ─► reserve ─► PairRelay ─► client
         ▲         │ LegFailed, no byte at the client yet: new pair, new room, new rid
         └─────────┘
any other end than a normal one ─► POST /abort_request to both workers, in the background
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from pdserve.balancer.abort import AbortDesk
from pdserve.balancer.fleet import Fleet
from pdserve.balancer.http_errors import (
    JSON_TYPE,
    Answer,
    Headers,
    error_answer,
    error_event,
    no_worker_answer,
    worker_error_status,
)
from pdserve.balancer.ledger import Outcome, RequestLedger, RequestRecord
from pdserve.balancer.member import PairKey, PairState
from pdserve.balancer.proxy import Client, ClientLeft, Interrupted, Presence
from pdserve.balancer.relay import LegFailed, PairRelay, Rejected, Relayed
from pdserve.balancer.request import (
    ParsedRequest,
    RequestIds,
    RequestRefused,
    RoomBook,
    Route,
    parse_request,
)
from pdserve.balancer.reservation import Reservation
from pdserve.balancer.upstream import UpstreamPool
from pdserve.config import BalancerConfig
from pdserve.errors import NoWorkerError, WorkerTimeout
from pdserve.types import Role

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that closed its connection; only in the state document."""


@dataclass(slots=True, eq=False)
class _Call:
    """One request on its way. ``outcome`` stays ABORTED unless something else is known."""

    client: Client
    record: RequestRecord
    headers: Headers
    presence: Presence
    outcome: Outcome = Outcome.ABORTED
    exclude: set[PairKey] = field(default_factory=set)
    ids: RequestIds | None = None
    client_rid: str = ""


class PairDispatcher:
    """The data plane. ``dispatch`` each request; ``close`` ends what is left."""

    def __init__(self, config: BalancerConfig, fleet: Fleet, pool: UpstreamPool) -> None:
        self._config = config
        self._fleet = fleet
        self._pool = pool
        self._ledger = RequestLedger()
        self._rooms = RoomBook()
        self._calls: set[_Call] = set()
        self._aborts = AbortDesk(pool)
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_closing = False

    def snapshot(self) -> dict[str, object]:
        """``requests`` and ``recent`` of the state document."""
        return self._ledger.snapshot()

    def rids_of(self, name: str) -> list[str]:
        """The workers' rids of a live request that its client knows by ``name``."""
        names = ((call, (call.client_rid, _request_id(call.client))) for call in self._calls)
        return [rid for call, known in names if call.ids and name and name in known for rid in call.ids.rids]

    async def close(self, drain_s: float = 0.0) -> None:
        """Give requests ``drain_s`` to end, then end the rest, and wait for their aborts."""
        try:
            async with asyncio.timeout(drain_s):
                await self._is_idle.wait()
        except TimeoutError:
            logger.warning("ending %d requests that are still in flight", len(self._calls))
        self._is_closing = True
        for call in list(self._calls):
            call.presence.interrupt()
        await self._is_idle.wait()
        await self._aborts.close()

    async def dispatch(self, route: Route, body: bytes, client: Client) -> None:
        """Serve one request whose body has been read. The client gets an answer unless it leaves."""
        authorization = client.headers.get(b"authorization")
        headers = (JSON_TYPE, (b"authorization", authorization)) if authorization else (JSON_TYPE,)
        call = _Call(client, self._ledger.open(route), headers, Presence(client))
        self._calls.add(call)
        self._is_idle.clear()
        try:
            with call.presence:
                await self._serve(route, body, call)
        except ClientLeft as exc:
            call.record.status, call.record.error = CLIENT_LEFT, str(exc)
        except Interrupted as exc:
            call.record.error = str(exc)
            await self._say_failed(call, 503, str(exc))
        finally:
            self._ledger.close(call.record, call.outcome)
            self._calls.discard(call)
            if not self._calls:
                self._is_idle.set()

    # -- one request -------------------------------------------------------------------------

    async def _serve(self, route: Route, body: bytes, call: _Call) -> None:
        record, is_openai = call.record, route.is_openai
        try:
            if self._is_closing:
                raise NoWorkerError("the balancer is stopping")
            request = parse_request(route, body)
            record.is_stream = request.is_stream
            record.prompt_tokens = request.shape.prompt_tokens
            call.client_rid = request.client_rid
            await self._attempts(request, call)
        except RequestRefused as exc:
            record.error = str(exc)
            await self._reply(call, error_answer(exc.status, str(exc), is_openai=is_openai), Outcome.FAILED)
        except NoWorkerError as exc:
            record.error = str(exc)
            logger.warning("request shed route=%s: %s", route, exc)
            await self._reply(call, no_worker_answer(exc, is_openai=is_openai), Outcome.SHED)
        except LegFailed as exc:
            await self._leg_failed(call, exc)
        except Exception as exc:
            logger.exception("request failed rid=%s", record.rid)
            record.error = repr(exc)
            await self._say_failed(call, 500, "internal error of the balancer; its log has the details")

    async def _attempts(self, request: ParsedRequest, call: _Call) -> None:
        failure: LegFailed | None = None
        for attempt in range(self._config.max_retries + 1):
            reservation = await self._reserve(request, call, failure)
            try:
                self._ledger.retried += attempt > 0
                return await self._attempt(request, call, reservation)
            except LegFailed as exc:
                if exc.is_client_fault or call.client.has_begun:
                    raise
                failure = exc
                self._avoid(call, reservation.key, exc.role)
                logger.warning("attempt %d failed rid=%s: %s", attempt + 1, call.record.rid, exc)
        assert failure is not None
        raise failure

    async def _reserve(self, request: ParsedRequest, call: _Call, failure: LegFailed | None) -> Reservation:
        """A pair not tried yet; after a failed attempt no pair means that failure."""
        exclude = frozenset(call.exclude)
        if failure is not None and not self._has_other_pair(exclude):
            raise failure
        wait_s = self._config.queue_timeout_s
        try:
            return await self._fleet.reserve(request.shape, exclude=exclude, timeout_s=wait_s)
        except NoWorkerError:
            if failure is not None:
                raise failure from None
            raise

    def _avoid(self, call: _Call, tried: PairKey, blamed: Role | None) -> None:
        """Not that pair again, and where others are ready none with the worker that failed: a worker that
        fails fast looks idle, and would be chosen with one partner after the other."""
        call.exclude.add(tried)
        if blamed is None:
            return
        worker = tried[blamed is Role.DECODE]
        ready = {record.key for record in self._fleet.pairs() if record.state is PairState.READY}
        its_pairs = {key for key in ready if worker in key}
        if ready - its_pairs - call.exclude:
            call.exclude |= its_pairs

    def _has_other_pair(self, exclude: frozenset[PairKey]) -> bool:
        """True if a pair not tried yet serves, or may soon."""
        return any(
            record.key not in exclude and record.state is not PairState.FAILED
            for record in self._fleet.pairs()
        )

    async def _attempt(self, request: ParsedRequest, call: _Call, reservation: Reservation) -> None:
        record, pair = call.record, reservation.pair
        ids = call.ids = self._rooms.take(request.num_prompts)
        record.rid, record.room, record.pair = ids.rids[0], ids.rooms[0], pair.label
        record.reason = reservation.reason
        record.timeline.paired_s = time.monotonic()
        request_id = _request_id(call.client) or ids.rids[0]
        call.client.extra = ((b"x-request-id", request_id.encode("latin-1")),)
        is_over = False
        try:
            body = request.render_body(pair.prefill.bootstrap_host, pair.prefill.bootstrap_port, ids)
            relay = PairRelay(self._pool, reservation, request, record.timeline, self._config.request_s)
            relayed = await relay.run(body, call.headers, call.client)
            self._completed(call, reservation, relayed)
            is_over = relayed.prefill_error is None
            await relayed.finish(call.client)
        except LegFailed as exc:
            _release_failed(reservation, exc)
            raise
        finally:
            reservation.release(prefill_ok=None, decode_ok=None)
            self._rooms.give_back(ids)
            if not is_over:
                self._aborts.abort(pair, ids, call.headers)

    def _completed(self, call: _Call, reservation: Reservation, relayed: Relayed) -> None:
        record, usage = call.record, relayed.usage
        call.outcome = Outcome.COMPLETED
        record.status, record.finish = relayed.status, usage.finish
        record.timeline.completion_tokens = usage.completion_tokens
        record.prompt_tokens = usage.prompt_tokens or record.prompt_tokens
        self._ledger.close(record, call.outcome)
        if relayed.prefill_error is None:
            reservation.release(prefill_ok=True, decode_ok=True)
            return
        record.error = str(relayed.prefill_error)
        logger.warning("prefill did not end well rid=%s: %s", record.rid, record.error)
        # Only a late one: have it pinged, rather than taken for dead.
        is_late = isinstance(relayed.prefill_error, WorkerTimeout)
        error = record.error if is_late else relayed.prefill_error
        reservation.release(prefill_ok=False, decode_ok=True, error=error)

    # -- what the client is told ---------------------------------------------------------------

    async def _leg_failed(self, call: _Call, failure: LegFailed) -> None:
        call.record.error = str(failure)
        error = failure.error
        if failure.is_client_fault and isinstance(error, Rejected) and not call.client.has_begun:
            await self._reply(call, Answer(error.status, error.body, error.headers), Outcome.FAILED)
            return
        logger.error("request failed rid=%s pair=%s: %s", call.record.rid, call.record.pair, failure)
        await self._say_failed(call, worker_error_status(error), str(failure))

    async def _say_failed(self, call: _Call, status: int, message: str) -> None:
        """By an error answer, or where the head is out already by a last event."""
        client, record = call.client, call.record
        if not client.has_begun:
            answer = error_answer(status, message, is_openai=record.route.is_openai)
            await self._reply(call, answer, Outcome.FAILED)
            return
        call.outcome = Outcome.FAILED
        record.status = status
        self._ledger.close(record, call.outcome)
        if not client.has_finished:
            await client.finish(error_event(status, message) if record.is_stream else b"")

    async def _reply(self, call: _Call, answer: Answer, outcome: Outcome) -> None:
        call.outcome = outcome
        call.record.status = answer.status
        self._ledger.close(call.record, outcome)
        if not call.client.extra and (request_id := _request_id(call.client)):
            call.client.extra = ((b"x-request-id", request_id.encode("latin-1")),)
        await call.client.answer(answer)


def _request_id(client: Client) -> str:
    return client.headers.get(b"x-request-id", b"").decode("latin-1")


def _release_failed(reservation: Reservation, failure: LegFailed) -> None:
    """Blame the leg that failed first, by its own error; nobody for the client's fault."""
    prefill_ok = True if failure.is_prefill_done else None
    if failure.is_client_fault:
        reservation.release(prefill_ok=None, decode_ok=None)
    elif failure.role is Role.PREFILL:
        reservation.release(prefill_ok=False, decode_ok=None, error=failure.error)
    elif failure.role is Role.DECODE:
        reservation.release(prefill_ok=prefill_ok, decode_ok=False, error=failure.error)
    else:  # both silent: have both pinged
        reservation.release(prefill_ok=False, decode_ok=False, error=str(failure.error))
