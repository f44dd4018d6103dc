"""The way of one request that takes a prompt, from its body to the end of its answer.

    open ─► parse ─► headers for workers ─► relay (Attempts: reserve, both legs, retry) ─► complete ─► close

``PairDispatcher._handle`` is that list; every error has its own answer there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from pdserve.balancer.api.errors import (
    error_event,
    retry_after,
    route_error,
    scrubbed,
    unreadable_error,
    worker_error_status,
)
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.record import Outcome, RequestRecord
from pdserve.balancer.proxy.answer import LegFailed, Rejected, Relayed
from pdserve.balancer.proxy.attempts import Attempts
from pdserve.balancer.proxy.resume import Mover
from pdserve.balancer.proxy.run import Run
from pdserve.balancer.proxy.samples import run_samples
from pdserve.balancer.request.aborted import aborted_answer
from pdserve.balancer.request.events import said_in
from pdserve.balancer.request.headers import forwarded_headers
from pdserve.balancer.request.parse import check_content_type, parse_request
from pdserve.balancer.request.request import ParsedRequest, RequestRefused, Route
from pdserve.balancer.request.transforms import HeartbeatSink, ResponseSink, names_of
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError
from pdserve.http.answer import Answer
from pdserve.http.client import HttpClient
from pdserve.http.incoming import CancelOnDisconnect, ClientLeft, IncomingRequest, Interrupted

if TYPE_CHECKING:
    from pdserve.balancer.tracing.export import Tracing
    from pdserve.balancer.tracing.trace import RequestTrace

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that closed its connection; only in the state document."""


class _Call(msgspec.Struct, eq=False):
    """One request of a client. ``outcome`` stays ABORTED unless something else is known."""

    client: IncomingRequest
    record: RequestRecord
    presence: CancelOnDisconnect
    outcome: Outcome = Outcome.ABORTED
    runs: list[Run] = msgspec.field(default_factory=list)
    request: ParsedRequest | None = None
    is_aborted: bool = False
    heartbeat: HeartbeatSink | None = None
    trace: RequestTrace | None = None

    @property
    def sink(self) -> ResponseSink:
        """Where its answer goes."""
        return self.heartbeat or self.client

    def prompts_named(self, name: str) -> set[int]:
        """The numbers of its prompts whose name begins so: the client's own for each or for the whole. Or
        whose rid on the workers, which is the answer's id, is that: of random digits nobody means a part.
        Samples of a chat have one name, and end together."""
        request = self.request
        if request is None:
            return set()
        everything = set(range(request.num_prompts or 1))
        if self.client.request_id.startswith(name):
            return everything
        rids = [rid for run in self.runs for rid in run.known_rids]
        named = {number for number, each in enumerate(names_of(request)) if each.startswith(name)}
        if request.num_requests > 1:
            return everything if named or name in rids else set()
        return named | {number for number, rid in enumerate(rids) if rid == name}


class PairDispatcher:
    """The data plane. ``dispatch`` each request; ``close`` ends what is left."""

    def __init__(
        self, config: BalancerConfig, fleet: WorkerFleet, pool: HttpClient, tracing: Tracing | None = None
    ) -> None:
        self._tracing = tracing
        self._config = config
        self._fleet = fleet
        self._ledger = RequestLedger()
        self._attempts = Attempts(config, fleet, pool, self._ledger)
        self._calls: set[_Call] = set()
        self.mover = Mover(fleet, self._attempts.move, self._runs)
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_closing = False
        self._id_headers = tuple(name.lower().encode() for name in config.request_id_headers)

    @property
    def ledger(self) -> RequestLedger:
        """The books."""
        return self._ledger

    @property
    def num_rooms(self) -> int:
        """Rooms in use; 0 when nothing is on its way."""
        return len(self._attempts.rooms)

    def _runs(self) -> list[Run]:
        return [run for call in self._calls for run in call.runs]

    def rids_of(self, name: str) -> list[str]:
        """The workers' rids of live requests whose clients know them by names that begin so."""
        return [rid for call in self._calls for rid in _rids(call, call.prompts_named(name))]

    def abort(self, name: str) -> list[str]:
        """End the live prompts whose name begins with ``name``; returns the workers' rids of them.

        What waits here ends at once, and nothing is tried again: workers report a transfer that was
        broken off as their failure. What workers have is to be ended there; where they have it under a
        name that nobody knows (/v1/messages), its connections are closed.
        """
        rids: list[str] = []
        for call in list(self._calls) if name else ():
            prompts = call.prompts_named(name)
            rids += _rids(call, prompts)
            if call.request is None or not prompts:
                continue
            if len(prompts) < (call.request.num_prompts or 1):
                for run in call.runs:
                    run.aborted_prompts |= prompts
                continue
            self._give_up([call])
            if not call.request.route.rid_field:
                call.is_aborted = True
                call.presence.interrupt()
        return rids

    def abort_all(self) -> None:
        """The same for every request, which workers are to be told in one word."""
        self._give_up(list(self._calls))

    def _give_up(self, calls: list[_Call]) -> None:
        runs = [run for call in calls for run in call.runs]
        for run in runs:
            run.is_aborted = True
        self._fleet.scheduler.abort([run.shape for run in runs if run.shape is not None])

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
        await self._attempts.aborts.close()

    async def dispatch(self, route: Route, body: bytes, client: IncomingRequest) -> None:
        """Serve one request. The client gets an answer unless it leaves."""
        call = self._open(route, client)
        try:
            with call.presence:
                await self._handle(route, body, call)
        except ClientLeft as exc:
            call.record.status, call.record.error = CLIENT_LEFT, str(exc)
        except Interrupted as exc:
            if call.is_aborted:
                await self._say_aborted(call)
            else:
                call.record.error = str(exc)
                await self._say_failed(call, 503, str(exc))
        finally:
            self._close(call)

    async def _handle(self, route: Route, body: bytes, call: _Call) -> None:
        """One request from top to bottom: each line is a step, each ``except`` an answer of its own."""
        try:
            request = self._parse(route, body, call)
            lines = self._lines_for_workers(call)
            relayed = await self._relay(request, lines, call)
            self._completed(call, relayed)
            await relayed.finish(call.client)
        except RequestRefused as exc:
            await self._refused(call, exc)
        except NoWorkerError as exc:
            await self._shed(call, exc)
        except LegFailed as exc:
            await self._leg_failed(call, exc)
        except Exception as exc:
            logger.exception("request failed rid=%s", call.record.rid)
            call.record.error = repr(exc)
            await self._say_failed(call, 500, "internal error of the balancer; its log has the details")

    # -- the steps ---------------------------------------------------------------------------

    def _open(self, route: Route, client: IncomingRequest) -> _Call:
        """Enter the request in the books, under the client's name for it if it gave one."""
        if request_id := self._request_id(client):
            client.request_id = request_id.decode("latin-1")
            client.extra = ((b"x-request-id", request_id),)
        call = _Call(client, self._ledger.open(route), CancelOnDisconnect(client))
        call.record.request_id = client.request_id
        if self._tracing is not None:
            call.trace = self._tracing.begin(client.headers)
        self._calls.add(call)
        self._is_idle.clear()
        return call

    def _parse(self, route: Route, body: bytes, call: _Call) -> ParsedRequest:
        """Read the body. Raises RequestRefused, or NoWorkerError once the balancer is stopping."""
        if self._is_closing:
            raise NoWorkerError("the balancer is stopping")
        check_content_type(route, call.client.headers)
        request = parse_request(route, body, wants_prompt=self._fleet.scheduler.policy.needs_prompt)
        call.record.is_stream = request.is_stream
        call.record.prompt_tokens = request.shape.prompt_tokens
        call.request = request
        return request

    def _lines_for_workers(self, call: _Call) -> bytes:
        """Choose the header lines that both legs are sent."""
        headers = call.client.headers
        if self._tracing is not None:
            headers = self._tracing.forwarded(headers, call.trace)
        return forwarded_headers(headers, call.client.request_id, self._config.worker_api_key)

    def _relay(self, request: ParsedRequest, lines: bytes, call: _Call) -> Coroutine[Any, Any, Relayed]:
        """Reserve a pair, send both legs, relay decode's answer, retry; for each sample of a chat."""
        self._attempts.budget.deposit()
        self._attempts.resumes.budget.deposit()
        record, trace = call.record, call.trace
        if request.is_stream and self._config.stream_heartbeat_s > 0:
            call.heartbeat = HeartbeatSink(call.client, self._config.stream_heartbeat_s)
        sink = call.sink
        if request.num_requests > 1:
            return run_samples(self._attempts, request, lines, sink, record, call.runs, trace)
        run = Run(request, lines, sink, record, trace=trace)
        call.runs.append(run)
        return self._attempts.run(run)

    def _completed(self, call: _Call, relayed: Relayed) -> None:
        record, usage = call.record, relayed.usage
        is_aborted = relayed.is_aborted or usage.finish == "abort"
        call.outcome = Outcome.ABORTED if is_aborted else Outcome.COMPLETED
        record.status, record.finish = relayed.status, usage.finish
        if usage.failure is not None:  # the worker's own, within its answer
            call.outcome, record.status = Outcome.FAILED, usage.failure.status
            record.error = record.error or usage.failure.message
        record.timeline.completion_tokens = usage.completion_tokens
        record.prompt_tokens = usage.prompt_tokens or record.prompt_tokens
        self._ledger.close(record, call.outcome)

    def _close(self, call: _Call) -> None:
        self._ledger.close(call.record, call.outcome)
        self._calls.discard(call)
        if call.heartbeat is not None:
            call.heartbeat.stop()
        if self._tracing is not None and call.trace is not None:
            self._tracing.finish(call.trace, call.record, call.outcome)
        if self._config.log_requests:
            logger.info("%s", call.record)
        if not self._calls:
            self._is_idle.set()

    # -- error answers -----------------------------------------------------------------------

    async def _refused(self, call: _Call, error: RequestRefused) -> None:
        call.record.error = str(error)
        if call.client.has_begun:  # a sample of a chat was aborted
            await self._say_failed(call, error.status, str(error))
            return
        answer = unreadable_error if error.is_unreadable else route_error
        await self._reply(call, answer(call.record.route, error.status, str(error)), Outcome.FAILED)

    async def _shed(self, call: _Call, error: NoWorkerError) -> None:
        call.record.error = str(error)
        logger.warning("request shed route=%s: %s", call.record.route, error)
        if call.client.has_begun:  # a later sample of a chat found no pair
            await self._say_failed(call, 503, str(error))
        else:
            answer = route_error(call.record.route, 503, str(error))
            await self._reply(call, answer.with_headers(retry_after(error)), Outcome.SHED)

    async def _leg_failed(self, call: _Call, failure: LegFailed) -> None:
        call.record.error = str(failure)
        error = failure.error
        is_its_own = failure.is_client_fault or failure.is_request_fault
        if is_its_own and isinstance(error, Rejected):
            body = scrubbed(error.body)
            if not call.client.has_begun:
                await self._reply(call, Answer(error.status, body, error.headers), Outcome.FAILED)
                return
            said = said_in(body).failure
            words = said.message if said is not None else body.decode("utf-8", "replace")
            await self._say_failed(call, error.status, words)
            return
        logger.error("request failed rid=%s pair=%s: %s", call.record.rid, call.record.pair, failure)
        await self._say_failed(call, worker_error_status(error), str(failure))

    async def _say_failed(self, call: _Call, status: int, message: str) -> None:
        """By an error answer, or where the head is out already by a last event."""
        client, record = call.client, call.record
        if not client.has_begun:
            await self._reply(call, route_error(record.route, status, message), Outcome.FAILED)
            return
        call.outcome = Outcome.FAILED
        record.status = status
        self._ledger.close(record, call.outcome)
        if not client.has_finished:
            answer = call.runs[-1].answer if call.runs else None
            sequence_number = answer.next_sequence_number if answer is not None else 0
            event = error_event(record.route, status, message, sequence_number)
            await client.finish(event if record.is_stream else b"")

    async def _say_aborted(self, call: _Call) -> None:
        """Where the workers could not be told: as if they had been, or by a last event."""
        call.record.error = "aborted"
        if call.sink.has_begun or call.request is None:
            await self._say_failed(call, 500, "the request was aborted")
        else:
            await self._reply(call, aborted_answer(call.request, call.record.rid), Outcome.ABORTED)

    async def _reply(self, call: _Call, answer: Answer, outcome: Outcome) -> None:
        call.outcome = outcome
        call.record.status = answer.status
        self._ledger.close(call.record, outcome)
        await call.sink.answer(answer)

    def _request_id(self, client: IncomingRequest) -> bytes:
        headers = client.headers
        for name in self._id_headers:
            if name in headers:
                return headers[name]
        return b""


def _rids(call: _Call, prompts: set[int]) -> list[str]:
    """What workers call those prompts; where each sample is a request of its own, every sample's."""
    found: list[str] = []
    for run in call.runs if prompts else ():
        if run.ids is not None:
            found += [run.ids.rids[number] for number in sorted(prompts) if number < len(run.ids.rids)]
    return found
