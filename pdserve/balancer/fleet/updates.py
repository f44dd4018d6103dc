"""Keeps the fleet's weights together: who has taken part in an update serves, who has not is brought there.

    operator ─► fan-out ─► each worker's 200 ─► Worker.weights ─┐ differ? no request goes there
                  └─ the first of them ──────► Roster.agreed ───┘    └─► its monitor repeats what it missed

Between the first and the last 200 of an update only workers that have it serve. When it is over, those that
failed or joined meanwhile are suspect until they have it too, and what waits there for its first byte is
tried elsewhere: its other leg may have the new weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pdserve.balancer.fleet.health import HealthTracker
from pdserve.balancer.fleet.probe import JSON, WorkerKeys
from pdserve.balancer.fleet.roster import Roster
from pdserve.balancer.fleet.weights import CannotReplay, Change, Weights
from pdserve.balancer.fleet.worker import COMMAND, Worker
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import WorkerError
from pdserve.http.client import HttpClient

logger = logging.getLogger(__name__)


class WeightUpdate:
    """One change on its way to some workers. ``is_whole``: it is meant for all of the fleet."""

    def __init__(self, roster: Roster, health: HealthTracker, change: Change, *, is_whole: bool) -> None:
        self._roster = roster
        self._health = health
        self._change = change
        self._is_whole = is_whole
        self._is_begun = False
        self._failed: list[Worker] = []

    def told(self, worker: Worker, *, is_done: bool) -> None:
        """A worker has answered."""
        worker.num_updates -= 1
        if not is_done:
            self._failed.append(worker)
            return
        roster, change = self._roster, self._change
        worker.weights = worker.weights.after(change)
        worker.is_ahead = not self._is_whole
        if self._is_whole and not self._is_begun:
            self._is_begun = True
            self._agree(roster.agreed.after(change))
        elif not self._is_whole:
            self._agree_if_all_do()
        if change.flushes:
            self._health.cache_flushed(worker)
        self._health.set_ready_pairs()

    def _agree_if_all_do(self) -> None:
        """The workers were told one by one, and now all that serve have the same."""
        found = {worker.weights for worker in self._roster.members.values() if worker.answers.is_set()}
        if len(found) == 1:
            self._agree(found.pop())

    def _agree(self, weights: Weights) -> None:
        """From now on this is what all must have, whatever some were told before."""
        self._roster.agreed = weights
        for worker in self._roster.members.values():
            worker.is_ahead = False

    def ended(self) -> None:
        """All have answered: take out who was to have it and has not."""
        if not self._is_begun:
            return
        for worker in list(self._roster.members.values()):
            if self._roster.is_behind(worker):
                why = self._roster.why_apart(worker)
                self._health.suspect(worker, why)
                worker.last_error = why
                if worker in self._failed:
                    self._health.fail_waiting(worker, why)


class FleetUpdates:
    """Begins updates, and repeats them on workers that missed them."""

    def __init__(
        self, roster: Roster, health: HealthTracker, pool: HttpClient, config: BalancerConfig
    ) -> None:
        self._roster = roster
        self._health = health
        self._pool = pool
        self._headers = JSON + WorkerKeys.of(config).control
        self._request_s = config.request_s

    @contextmanager
    def update(self, change: Change, workers: Sequence[Worker], *, is_whole: bool) -> Iterator[WeightUpdate]:
        """These workers are told now: call ``told`` for each. ``is_whole``: no worker was left out."""
        update = WeightUpdate(self._roster, self._health, change, is_whole=is_whole)
        for worker in workers:
            worker.num_updates += 1
        try:
            yield update
        finally:
            update.ended()

    def is_behind(self, worker: Worker) -> bool:
        """True if the worker has missed something that the fleet has, and is not being told just now."""
        return self._roster.is_behind(worker)

    async def bring(self, worker: Worker) -> str:
        """Repeat on the worker what it has missed; why it stays out, or an empty string."""
        if not self.is_behind(worker):
            return self._roster.why_apart(worker)
        goal, found = self._roster.agreed, worker.weights
        try:
            for change in goal.steps_from(found):
                if why := await self._repeat(worker, change):
                    return f"{self._roster.why_apart(worker)}; {change.path} {why}"
        except CannotReplay as exc:
            return str(exc)
        if worker.weights == found:
            worker.weights = goal  # unless an operator has told it something meanwhile
        return self._roster.why_apart(worker)

    async def _repeat(self, worker: Worker, change: Change) -> str:
        """Why the worker did not do it, or an empty string."""
        try:
            answer = await self._pool.fetch(
                worker.url, "POST", change.path, change.body,
                headers=self._headers, timeout_s=self._request_s, label=COMMAND,
            )  # fmt: skip
        except WorkerError as exc:
            return str(exc)
        if answer.status != 200:
            return f"HTTP {answer.status}: {answer.body[:300].decode(errors='replace')}"
        self._health.note("updated", worker, str(change))
        if change.flushes:
            self._health.cache_flushed(worker)
        return ""
