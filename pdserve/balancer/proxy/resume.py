"""An answer goes on on another pair: whether, by which pair, and with what left to do.

    stream breaks ─► may_resume? ─► budget ─► rest of the work ─► a pair that can ─► legs with the log
    its server is to be emptied ─► Mover, until it is ─► a pair with room, held ─► the stream is ended

The wire is docs/resume.md. Workers that do not say that they can resume are asked as ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from msgspec import structs

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.liveness import stream_patience_s
from pdserve.balancer.fleet.weights import Weights
from pdserve.balancer.fleet.worker import PairState
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.proxy.client_answer import ClientAnswer
from pdserve.balancer.proxy.retry import RetryBudget
from pdserve.balancer.proxy.run import Run
from pdserve.balancer.request.transforms import Renaming
from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.workers import PairKey
from pdserve.types import InstanceId, Pair, RequestShape, Role, WorkerInfo

logger = logging.getLogger(__name__)

CAPACITY = 4096.0
"""Resumes that may be saved up: so many streams may be lost with one server."""
MOVE_AGAIN_S = 0.1
"""How soon streams that could not be moved are looked at again, and those that had not begun."""


class Resumes:
    """Decides which answers go on, and keeps count of them; shared by all requests of the balancer."""

    def __init__(self, config: BalancerConfig, fleet: WorkerFleet, ledger: RequestLedger) -> None:
        self.budget = RetryBudget(config.resume_ratio, CAPACITY)
        self._most = config.max_resumes
        self._fleet = fleet
        self._ledger = ledger

    def answer_of(self, run: Run, pair: Pair, renaming: Renaming | None) -> ClientAnswer:
        """What a whole try of ``run`` on ``pair`` gives its client; with a log if it can be resumed."""
        request = run.request
        if not (request.is_stream and self._most > 0 and pair.decode.resume_id):
            return ClientAnswer(request, renaming)
        return ClientAnswer(
            request, renaming, may_resume=partial(self.may_resume, run),
            may_leave=partial(self._may_leave, run), went_on=partial(self._went_on, run),
            weights_now=partial(self._weights_of, pair.decode.instance_id),
        )  # fmt: skip

    def lines(self, run: Run, pair: Pair) -> tuple[bytes, bytes]:
        """The header lines of the prefill and of the decode leg."""
        if run.answer is None or run.answer.log is None:
            return run.lines, run.lines
        word = b" resume" if run.has_begun else b""
        return run.lines + _ids_line(pair.prefill, word), run.lines + _ids_line(pair.decode, word)

    def prepare(self, answer: ClientAnswer, reservation: Reservation) -> None:
        """A leg of ``answer`` begins: tell it how long its decode server may be silent."""
        answer.patience_s = stream_patience_s(reservation.slots.decode.view)

    def may_resume(self, run: Run) -> bool:
        """True if another server may go on with what the client has."""
        log = run.answer.log if run.answer is not None else None
        if log is None or not log.is_resumable or run.is_unwanted or not self.has_its_weights(run):
            return False
        return run.num_resumes < self._most and self.budget.has_any(time.monotonic())

    def _may_leave(self, run: Run) -> bool:
        """True if a silent stream should go on elsewhere: its server was not told to stand still, and another
        is ready."""
        if run.key is None or not self.may_resume(run):
            return False
        records, not_it, decode = self._fleet.pairs(), self.unable() | run.exclude, run.key[1]
        servers = [record.decode for record in records if record.key[1] == decode]
        if any(server.is_paused or server.num_updates for server in servers):
            return False
        ready = [record.key for record in records if record.state is PairState.READY]
        return any(key[1] != decode and key not in not_it for key in ready)

    def begin(self, run: Run) -> bool:
        """Take one resume; False if no pair is left, or none may be resumed now."""
        if not self._has_pair_for(run):
            return False
        if not self.may_resume(run) or not self.budget.withdraw(time.monotonic()):
            logger.warning("not resumed rid=%s: %s", run.record.rid, self._why_not(run))
            return False
        run.leaves_its_pair()
        run.num_resumes += 1
        return True

    def _has_pair_for(self, run: Run) -> bool:
        """True if another pair may go on, now or once a missing worker is back: maybe the very one that has
        failed, after its restart or a probe."""
        records, not_it = self._fleet.pairs(), self.unable() | run.exclude
        if any(record.key not in not_it and record.state is not PairState.FAILED for record in records):
            return True
        if not any(row.missing for row in self._fleet.capacity()):
            return False
        run.exclude &= {record.key for record in records if record.state is PairState.READY}
        return True

    def _why_not(self, run: Run) -> str:
        log = run.answer.log if run.answer is not None else None
        if log is None or not log.is_resumable:
            return (log.obstacle if log is not None else None) or "its server does not tell its tokens"
        if not self.has_its_weights(run):
            return "the fleet has other weights than it was begun with"
        if run.num_resumes >= self._most:
            return f"it was resumed {run.num_resumes} times (max_resumes)"
        return "the budget of resumes is used up"

    def unable(self) -> set[PairKey]:
        """Pairs of which a worker cannot resume."""
        return {
            record.key
            for record in self._fleet.pairs()
            if not (record.prefill.info.resume_id and record.decode.info.resume_id)
        }

    def standing_still(self) -> set[PairKey]:
        """Pairs of which a worker is paused or loads weights: what is moved there would wait."""
        return {
            record.key
            for record in self._fleet.pairs()
            if record.is_paused or record.prefill.num_updates or record.decode.num_updates
        }

    def has_its_weights(self, run: Run) -> bool:
        """True if who serves now has the weights with which the answer was begun."""
        begun_with = run.answer.begun_with if run.answer is not None else None
        return begun_with is None or self._fleet.agreed_weights.continues(begun_with)

    def _weights_of(self, instance_id: InstanceId) -> Weights | None:
        worker = self._fleet.member(instance_id)
        return None if worker is None else worker.weights

    def num_tokens(self, run: Run) -> int:
        """How many tokens of each prompt the client has, on average."""
        assert run.answer is not None, "it has begun"
        return run.answer.usage().completion_tokens // (run.request.num_prompts or 1)

    def rest_of(self, run: Run) -> RequestShape:
        """The work that is left: prefill computes what was emitted too, decode goes on from there."""
        whole, answer = run.whole_shape, run.answer
        assert whole is not None and answer is not None, "it has begun"
        usage, each = answer.usage(), self.num_tokens(run)
        emitted = usage.completion_tokens
        forecast = whole.forecast
        if forecast is not None:
            forecast = structs.replace(
                forecast, mean=max(1.0, forecast.mean - each), low=max(1.0, forecast.low - each),
                high=max(1.0, forecast.high - each),
            )  # fmt: skip
        return structs.replace(
            whole, prompt_tokens=(usage.prompt_tokens or whole.prompt_tokens) + emitted,
            max_new_tokens=max(1, whole.max_new_tokens - each), forecast=forecast, is_resumed=True,
        )  # fmt: skip

    def _went_on(self, run: Run, gap_s: float) -> None:
        if run.is_moved:
            run.record.num_moves += 1
        else:
            run.record.num_resumes += 1
        run.exclude.clear()  # whoever failed it before may have come back until this one fails too
        self._ledger.went_on_after(gap_s, is_moved=run.is_moved)
        if run.record.pair is not None:
            self._fleet.answer_went_on(run.record.pair.decode.instance_id, gap_s, is_moved=run.is_moved)
        how = "moved" if run.is_moved else "resumed"
        logger.info("%s rid=%s pair=%s gap_s=%.3f", how, run.record.rid, run.record.pair, gap_s)


class Mover:
    """Empties workers that drain so: their streams go on elsewhere, what cannot is waited for.

    A stream stays where it is until another pair is held for it, so that nobody waits in a queue for the
    rest of an answer.

    Args:
        move: has one answer go on elsewhere; False if that cannot be now.
        runs: those on their way.
    """

    def __init__(
        self, fleet: WorkerFleet, move: Callable[[Run], bool], runs: Callable[[], Iterable[Run]]
    ) -> None:
        self._fleet = fleet
        self._move = move
        self._runs = runs

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._fleet.has_moving.wait()
            if self.look():
                await asyncio.sleep(MOVE_AGAIN_S)
            else:
                self._fleet.has_moving.clear()

    def look(self) -> bool:
        """Move what can be moved now; False if nothing is left on workers that are to be emptied."""
        workers = {
            worker.instance_id
            for worker in self._fleet.workers()
            if worker.is_moving and worker.role is Role.DECODE and worker.num_inflight
        }
        for run in list(self._runs()) if workers else ():
            if run.key is not None and run.key[1] in workers:
                self._move(run)
        return bool(workers)


def _ids_line(worker: WorkerInfo, word: bytes) -> bytes:
    """By it a worker tells its tokens, and with the word goes on with others'; none for other workers."""
    return b"x-pdserve-ids: %b%b\r\n" % (worker.resume_id.encode(), word) if worker.resume_id else b""
