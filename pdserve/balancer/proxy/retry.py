"""What a failed request means: whose fault it was, and whether it may be tried again.

failure ─► a server died under it?     the second of a role: never again (500)
        ─► rejected by a worker?       counted against that worker, once for equal requests
             └─ by a second one too    the request is at fault: forgiven to both
served elsewhere ─► whoever rejected it was at fault
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import msgspec

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.probe import WorkerKeys
from pdserve.balancer.proxy.answer import LegFailed
from pdserve.balancer.request.request import ParsedRequest, RequestRefused
from pdserve.errors import WorkerError, WorkerRejected, WorkerTimeout, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.types import InstanceId, Pair, Role, WorkerInfo

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""Servers of one role that may die under a request. One that kills prefill servers never comes to decode,
and one that kills decode servers is passed on by prefill: a death in each role has other reasons."""
INNOCENT_TOKENS = 16
"""A streamed answer that has so many more since a server died under it would have killed the next one
sooner: both go on from the same token."""
DIED_STATUS = 500
PING_S = 1.0
OVERLOADED = 503

RETRIES_PER_MINUTE = 10.0
"""Always allowed, so that a quiet service can retry at all."""
CAPACITY = 100.0
"""Retries that may be saved up."""


class RetryBudget:
    """A bucket filled by requests and by time; each retry takes one. It holds at most ``capacity``."""

    def __init__(self, ratio: float, capacity: float = CAPACITY) -> None:
        self._ratio = ratio
        self._capacity = capacity
        self._saved = RETRIES_PER_MINUTE
        self._updated_s = 0.0

    def deposit(self) -> None:
        """A request arrived."""
        self._saved = min(self._capacity, self._saved + self._ratio)

    def has_any(self, now_s: float) -> bool:
        """True if a retry is left."""
        if self._updated_s:
            earned = (now_s - self._updated_s) * RETRIES_PER_MINUTE / 60.0
            self._saved = min(self._capacity, self._saved + earned)
        self._updated_s = now_s
        return self._saved >= 1.0

    def withdraw(self, now_s: float) -> bool:
        """Take one retry; False if there is none left."""
        if not self.has_any(now_s):
            return False
        self._saved -= 1.0
        return True


def _is_own_error(status: int) -> bool:
    return status >= 500 and status != OVERLOADED


class History:
    """What became of one request so far, with all its samples.

    ``exposed``: workers that had it when something broke. ``dead``: those of them that have died.
    ``rejected_by``: workers that answered it with a server error.
    """

    __slots__ = ("cause", "dead", "exposed", "rejected_by")

    def __init__(self, request: ParsedRequest) -> None:
        self.cause = hash(request.raw or msgspec.json.encode(request.fields))
        self.dead: dict[InstanceId, WorkerInfo] = {}
        self.exposed: dict[InstanceId, WorkerInfo] = {}
        self.rejected_by: set[InstanceId] = set()


class FailureJudge:
    """Hears of each failed attempt before and after its workers are blamed, and of what ended well."""

    def __init__(self, fleet: WorkerFleet, pool: HttpClient) -> None:
        self._fleet = fleet
        self._pool = pool
        self._headers = WorkerKeys.of(fleet.config).plain

    def rejected(self, history: History, pair: Pair, failure: LegFailed) -> None:
        """See whether a worker answered with a server error; ``failure`` is told whose fault that is.

        An error that a second worker repeats is the request's. All of them are found guilty if a later
        try succeeds.
        """
        error, role = failure.error, failure.role
        if role is None or not isinstance(error, WorkerRejected) or not _is_own_error(error.status):
            return
        error.cause = history.cause
        history.rejected_by.add((pair.prefill if role is Role.PREFILL else pair.decode).instance_id)
        failure.is_request_fault = len(history.rejected_by) > 1
        if failure.is_request_fault:
            for instance_id in history.rejected_by:
                self._fleet.health.forgive(instance_id, history.cause)

    def went_on(self, history: History, num_tokens: int) -> None:
        """The answer had ``num_tokens`` more, of each prompt, when it failed again."""
        if num_tokens >= INNOCENT_TOKENS:
            history.dead.clear()
            history.exposed.clear()

    def served(self, history: History) -> None:
        """Another pair has served the request."""
        for instance_id in history.rejected_by:
            self._fleet.health.convict(instance_id, history.cause)

    async def check_deaths(self, history: History, pair: Pair, failure: LegFailed, name: str) -> None:
        """See whether servers have died that had the request, which its client knows by ``name``.

        Innocent requests that were on the same two servers are refused with the guilty one: nobody
        can tell them apart.

        Raises:
            RequestRefused: if ``MAX_DEATHS`` of one role have.
        """
        error = failure.error
        is_broken = isinstance(error, WorkerUnreachable) and error.was_sent
        if not is_broken and (failure.role is not None or isinstance(error, WorkerTimeout)):
            return
        exposed = (pair.decode,) if failure.is_prefill_done else (pair.prefill, pair.decode)
        history.exposed |= {worker.instance_id: worker for worker in exposed}
        waiting = [worker for key, worker in history.exposed.items() if key not in history.dead]
        are_dead = await asyncio.gather(*(self._is_dead(worker) for worker in waiting))
        found = [worker for worker, is_dead in zip(waiting, are_dead, strict=True) if is_dead]
        history.dead |= {worker.instance_id: worker for worker in found}
        deaths = Counter(worker.role for worker in history.dead.values())
        if max(deaths.values(), default=0) >= MAX_DEATHS:
            names = ", ".join(worker.worker_id for worker in history.dead.values())
            logger.error("not tried again rid=%s: servers died under it: %s", name, names)
            raise RequestRefused(
                f"request {name} was running on {names} when they died, so it is not tried again", DIED_STATUS
            )

    async def _is_dead(self, worker: WorkerInfo) -> bool:
        """The process is gone: nobody listens there, or another has taken its place."""
        member = self._fleet.find(worker.worker_id)
        if member is None or member.instance_id != worker.instance_id:
            return True
        try:
            await self._pool.fetch(worker.url, "GET", "/ping", headers=self._headers, timeout_s=PING_S)
        except WorkerUnreachable:
            return True
        except WorkerError:
            return False
        return False
