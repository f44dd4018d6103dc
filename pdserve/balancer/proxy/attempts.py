"""One request over pairs until one works: reserve, relay, retry elsewhere, and end both legs together.

    reserve ─► PairRelay ─► sink
       ▲          │ LegFailed: new pair, new room, new rid; no byte at the sink yet: the whole again,
       └──────────┘            else the rest, if it can be resumed (resume.py)
any other end than a normal one ─► POST /abort_request to both workers, in the background
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.worker import PairState
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.proxy.answer import LegFailed, Relayed
from pdserve.balancer.proxy.pairs import Reservations
from pdserve.balancer.proxy.relay import PairRelay
from pdserve.balancer.proxy.resume import Resumes
from pdserve.balancer.proxy.retry import FailureJudge, History, RetryBudget
from pdserve.balancer.proxy.run import Run
from pdserve.balancer.request.aborted import aborted_answer
from pdserve.balancer.request.headers import JSON_LINE
from pdserve.balancer.request.ids import RequestIds, RoomAllocator
from pdserve.balancer.request.request import RequestRefused
from pdserve.balancer.request.transforms import renaming_of
from pdserve.balancer.request.usage import Usage
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError, RequestAborted, WorkerError
from pdserve.http.client import HttpClient
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.workers import PairKey
from pdserve.telemetry import RequestTimeline
from pdserve.types import LOCAL_HOST, Pair, Role

if TYPE_CHECKING:
    from pdserve.balancer.tracing.trace import AttemptTrace, RunTrace

logger = logging.getLogger(__name__)

ABORT_S = 5.0
"""Limit per worker and request."""


class Aborter:
    """Sends aborts and owns their tasks; ``await close()`` waits for those under way.

    ``key`` is what workers' control routes ask for; without one the client's own is used.
    """

    def __init__(self, pool: HttpClient, key: str = "") -> None:
        self._pool = pool
        self._lines = JSON_LINE + b"authorization: Bearer %b\r\n" % key.encode() if key else b""
        self._tasks: set[asyncio.Task[None]] = set()

    def abort(self, pair: Pair, ids: RequestIds, lines: bytes) -> None:
        """Have both workers drop every rid; ``lines`` are the client's headers. Returns at once."""
        for worker in (pair.decode,) if pair.is_alone else (pair.prefill, pair.decode):
            task = asyncio.create_task(self._tell(worker.url, ids, self._lines or lines))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for the aborts under way; at most ``ABORT_S``."""
        await asyncio.gather(*self._tasks)

    async def _tell(self, url: str, ids: RequestIds, lines: bytes) -> None:
        try:
            async with asyncio.timeout(ABORT_S):
                for rid in ids.rids:
                    body = msgspec.json.encode({"rid": rid})
                    await self._pool.fetch(
                        url, "POST", "/abort_request", body, headers=lines, timeout_s=ABORT_S
                    )
        except (WorkerError, TimeoutError) as exc:
            logger.info("could not abort rid=%s worker=%s: %s", ids.rids[0], url, exc or "timed out")


MAX_STALE = 2
"""Attempts that may be lost to kept connections that were closed meanwhile, one of each leg."""


class Attempts:
    """Carries runs to their end; shared by all requests of the balancer."""

    def __init__(
        self, config: BalancerConfig, fleet: WorkerFleet, pool: HttpClient, ledger: RequestLedger
    ) -> None:
        self.rooms = RoomAllocator()
        self.aborts = Aborter(pool, config.worker_control_key)
        self.budget = RetryBudget(config.retry_ratio)
        self._judge = FailureJudge(fleet, pool)
        self._config = config
        self._scheduler = fleet.scheduler
        self._reservations = Reservations(fleet.scheduler, fleet)
        self._fleet = fleet
        self._pool = pool
        self._ledger = ledger
        self.resumes = Resumes(config, fleet, ledger)

    async def run(self, run: Run) -> Relayed:
        """Serve ``run`` over some pair, all but the end of its answer, which ``Relayed.finish`` sends.

        Raises:
            NoWorkerError: if no pair had room in time.
            LegFailed: if every attempt failed, or one did after the first byte and no other can go on.
            RequestRefused: if two servers died under it, or it was aborted between two of them.
        """
        try:
            return await self._serve(run)
        finally:
            if run.answer is not None:
                run.answer.forget()

    async def _serve(self, run: Run) -> Relayed:
        failure: LegFailed | None = None
        retries, num_stale = self._config.max_retries, 0
        trace = None if run.trace is None else run.trace.begin_run(run.record.timeline)
        while not run.is_aborted:
            if (reservation := await self._reserve(run, failure, trace)) is None:
                break
            try:
                relayed = await self._attempt(run, reservation, trace)
                if run.history is not None:
                    self._judge.served(run.history)
                return relayed
            except LegFailed as exc:
                if exc.is_moved:
                    continue
                if (final := self._final(run, exc, failure)) is not None:
                    raise final from None
                if run.is_unwanted:
                    break
                failure = exc.with_traceback(None)  # its frames hold it, as a cycle
            await self._judge_failure(run, reservation, failure)
            if failure.is_unable or (failure.is_stale and num_stale < MAX_STALE):
                num_stale += 1
                self._ledger.retried += 1
                continue
            self._avoid(run, reservation.key, failure.role)
            if run.has_begun and self.resumes.begin(run):
                continue
            if run.has_begun or retries <= 0 or not self._may_retry(run):
                raise failure
            retries -= 1
        return _aborted(run)

    def move(self, run: Run, exclude: frozenset[PairKey] = frozenset()) -> bool:
        """Have another pair, none of ``exclude``, go on with its answer; False if that cannot be now."""
        answer, resumes = run.answer, self.resumes
        if answer is None or not answer.is_running or run.held is not None or not resumes.may_resume(run):
            return False
        unable = exclude | resumes.unable() | resumes.standing_still() | run.exclude
        run.held = self._reservations.take_now(resumes.rest_of(run), unable)
        if run.held is None:
            return False
        run.leaves_its_pair()
        answer.move()
        return True

    def _final(self, run: Run, failure: LegFailed, former: LegFailed | None) -> LegFailed | None:
        """What to tell the client if nobody else can help: the request is at fault, or a part of an answer is
        out that cannot be resumed. What a server said of a resume is none of the client's business."""
        if failure.is_client_fault:
            return (former or failure) if run.has_begun else failure
        is_stuck = run.sink.has_begun and not (run.has_begun and self.resumes.may_resume(run))
        return failure if is_stuck else None

    async def _judge_failure(self, run: Run, reservation: Reservation, failure: LegFailed) -> None:
        logger.warning("attempt failed rid=%s: %s", run.record.rid, failure)
        assert run.history is not None
        if run.has_begun:
            num_tokens = self.resumes.num_tokens(run)
            self._judge.went_on(run.history, num_tokens - run.num_tokens)
            run.num_tokens = num_tokens
        name = str(run.request.client_rid or run.record.rid)
        await self._judge.check_deaths(run.history, reservation.pair, failure, name)

    def _learn(self, run: Run, relayed: Relayed) -> None:
        shape, usage = run.whole_shape, relayed.usage
        if shape is not None and usage.completion_tokens:
            mean = round(usage.completion_tokens / shape.num_prompts)
            is_cut = usage.is_cut or mean >= shape.max_new_tokens
            self._scheduler.learn(shape, mean, is_cut=is_cut)

    def _may_retry(self, run: Run) -> bool:
        """Some pair is left that serves or may soon, and the budget allows it."""
        records, alone = self._fleet.pairs(), self._scheduler.alone
        if alone <= run.exclude and all(
            record.key in run.exclude or record.state is PairState.FAILED for record in records
        ):
            return False
        if not self.budget.withdraw(time.monotonic()):
            logger.warning("no retry rid=%s: the retry budget is used up", run.record.rid)
            return False
        self._ledger.retried += 1
        return True

    async def _reserve(
        self, run: Run, failure: LegFailed | None, trace: RunTrace | None
    ) -> Reservation | None:
        """A pair not tried yet; after a failed attempt no pair means that failure. None if it was aborted."""
        if trace is not None:
            trace.waits()
        if run.held is not None:
            reservation, run.held = run.held, None
            return reservation
        exclude, wait_s = frozenset(run.exclude), self._config.queue_timeout_s
        shape = run.shape = run.whole_shape = run.whole_shape or self._scheduler.foresee(run.request.shape)
        if run.has_begun:
            shape = run.shape = self.resumes.rest_of(run)
            exclude |= self.resumes.unable()
        try:
            reservation = await self._reservations.take(shape, exclude=exclude, timeout_s=wait_s)
        except RequestAborted:
            return None
        except NoWorkerError:
            if failure is not None and not failure.is_unable:
                raise failure from None
            raise
        if run.is_aborted:  # in the moment in which it got its pair
            self._reservations.release(reservation)
            return None
        if failure is not None and run.has_begun and not self.resumes.has_its_weights(run):
            self._reservations.release(reservation)  # an update came while it waited
            raise failure
        return reservation

    def _avoid(self, run: Run, tried: PairKey, blamed: Role | None) -> None:
        """Not that pair again, and where others are ready none with the worker that failed: a worker that
        fails fast looks idle, and would be chosen with one partner after the other."""
        run.exclude.add(tried)
        if blamed is None:
            return
        worker = tried[blamed is Role.DECODE]
        ready = {record.key for record in self._fleet.pairs() if record.state is PairState.READY}
        its_pairs = {key for key in ready if worker in key}
        if ready - its_pairs - run.exclude:
            run.exclude |= its_pairs

    async def _attempt(self, run: Run, reservation: Reservation, trace: RunTrace | None) -> Relayed:
        request, pair = run.request, reservation.pair
        ids = run.ids = self.rooms.take(request.num_prompts, request.route.rid_prefix)
        is_over = is_moved = False
        try:
            relay, body, timeline = self._prepare(run, reservation, ids)
            lines = self.resumes.lines(run, pair)
            if trace is None:
                relayed = await relay.run(body, lines, run.sink)
            else:
                relayed = await _traced(run, relay, body, lines, trace.begin_attempt(run.record, timeline))
            self._ended(run, reservation, relayed)
            is_over = relayed.prefill_error is None and not relayed.is_aborted
            return relayed
        except LegFailed as exc:
            run.is_moved = is_moved = exc.is_moved and not run.is_unwanted
            if exc.is_moved and not is_moved:
                raise RequestRefused("the request was aborted", 500) from None
            run.history = run.history or History(request)
            if pair.is_alone and exc.is_refusal and run.whole_shape is not None:
                exc.is_unable = True
                run.whole_shape = msgspec.structs.replace(run.whole_shape, needs_prefill_worker=True)
            elif not run.is_unwanted:
                self._judge.rejected(run.history, pair, exc)
                self._reservations.release_failed(reservation, exc)
            raise
        finally:
            if run.held is not None and not is_moved:
                self._reservations.release(run.held)
                run.held = None
            self._reservations.release(reservation)
            self.rooms.give_back(ids)
            if not is_over and request.route.rid_field:
                self.aborts.abort(pair, ids, run.lines)

    def _prepare(
        self, run: Run, reservation: Reservation, ids: RequestIds
    ) -> tuple[PairRelay, bytes, RequestTimeline]:
        """The attempt on that pair, the body for both, and the times of the attempt: of one that goes on with
        an answer they are not the request's."""
        request, record, pair = run.request, run.record, reservation.pair
        run.key = reservation.key
        record.rid, record.room, record.pair = ids.rids[0], ids.rooms[0], pair
        record.reason = reservation.why
        timeline, now_s = record.timeline, time.monotonic()
        body = request.render_body(*self._bootstrap(pair), ids)
        if run.answer is not None and run.answer.has_begun:
            timeline = RequestTimeline(received_s=run.answer.heard_s)
            body = run.answer.resumed_body(body)
        else:
            run.sink.identify(ids.rids[0])
            renaming = renaming_of(request, ids) if request.client_rid else None
            run.answer = self.resumes.answer_of(run, pair, renaming)
        timeline.paired_s = now_s
        if run.answer.log is not None:
            self.resumes.prepare(run.answer, reservation)
        relay = PairRelay(
            self._pool, pair, request, timeline, answer=run.answer,
            silence_s=self._config.request_s, on_prefilled=lambda: self._prefilled(run, reservation),
        )  # fmt: skip
        return relay, body, timeline

    def _bootstrap(self, pair: Pair) -> tuple[str, int | None]:
        """Host and port in the body: where decode finds the prefill worker, or that it needs none."""
        deflection = self._scheduler.admission.deflection
        if pair.is_alone and deflection is not None:
            self._ledger.deflected += 1
            return LOCAL_HOST, round(1000 * deflection.budget_s)
        return pair.prefill.bootstrap_host, pair.prefill.bootstrap_port

    def _ended(self, run: Run, reservation: Reservation, relayed: Relayed) -> None:
        if run.is_unwanted:  # what came of it is nobody's fault
            self._reservations.release(reservation)
        elif why := self._reservations.release_ended(reservation, relayed):
            run.record.error = why
            logger.warning("a leg did not end well rid=%s: %s", run.record.rid, why)
        self._learn(run, relayed)

    def _prefilled(self, run: Run, reservation: Reservation) -> None:
        self._reservations.prefill_finished(reservation)
        if run.is_unwanted and run.ids is not None and run.request.route.rid_field:
            # Both workers know the request by now; an abort may have overtaken it.
            ids = run.ids if run.is_aborted else run.ids.only(run.aborted_prompts)
            self.aborts.abort(reservation.pair, ids, run.lines)
        if run.on_prefilled is not None:
            run.on_prefilled()


def _aborted(run: Run) -> Relayed:
    """The end of a request that no worker has, or has finished."""
    if run.has_begun:
        raise RequestRefused("the request was aborted", 500)
    answer = aborted_answer(run.request, run.record.rid)
    if not run.request.is_stream:
        return Relayed(200, Usage("abort"), answer, is_aborted=True)
    run.sink.begin(200, answer.headers)
    run.sink.push(answer.body)
    return Relayed(200, Usage("abort"), None, is_aborted=True)


async def _traced(
    run: Run, relay: PairRelay, body: bytes, lines: tuple[bytes, bytes], attempt: AttemptTrace
) -> Relayed:
    """Run the relay under a span for each leg."""
    try:
        relayed = await relay.run(body, attempt.leg_lines(lines), run.sink)
        attempt.answered(relayed.status, relayed.prefill_error, relay.prefill_answer)
        if relayed.decode_error is not None:
            attempt.failed(Role.DECODE, relayed.decode_error, is_prefill_done=True)
        return relayed
    except LegFailed as exc:
        attempt.is_moved = exc.is_moved
        if not exc.is_moved:
            attempt.failed(exc.role, exc.error, is_prefill_done=exc.is_prefill_done)
        raise
    finally:
        attempt.end()
