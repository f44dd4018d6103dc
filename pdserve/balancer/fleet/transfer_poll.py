"""The background loop that asks one worker of pdserve's own what its data plane has moved.

answers ─► GET /pdserve/instance every POLL_S ─► FleetFigures.told

A stock SGLang server has no such route: it is asked once. Nothing is judged by the answers.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from pdserve.balancer.fleet.probe import Fetcher, Headers
from pdserve.balancer.metrics.workers import TransferCounters, transfer_counters
from pdserve.errors import WorkerError
from pdserve.scheduling.workers import Worker

POLL_S = 5.0
ANSWER_S = 5.0
INSTANCE_PATH = "/pdserve/instance"


class Listener(Protocol):
    """Who hears what a worker's data plane tells."""

    def told(self, worker: Worker, counters: TransferCounters) -> None:
        """Its counters now."""
        ...


class TransferPoller:
    """Asks one worker. ``poll_s`` is the pause before each question."""

    def __init__(
        self, worker: Worker, pool: Fetcher, headers: Headers, listener: Listener, poll_s: float = POLL_S
    ) -> None:
        self._worker = worker
        self._pool = pool
        self._headers = headers
        self._listener = listener
        self._poll_s = poll_s

    async def run(self) -> None:
        """Until cancelled, or the worker turns out not to be pdserve's."""
        is_ours = True
        while is_ours:
            await asyncio.sleep(self._poll_s)
            await self._worker.answers.wait()
            is_ours = await self._ask()

    async def _ask(self) -> bool:
        """False if there is nothing to ask for."""
        try:
            answer = await self._pool.fetch(
                self._worker.url, "GET", INSTANCE_PATH, headers=self._headers, timeout_s=ANSWER_S
            )
        except WorkerError:
            return True  # its other keeper sees to that
        if answer.status != 200:
            return answer.status >= 500
        try:
            document = msgspec.json.decode(answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        counters = transfer_counters(document) if isinstance(document, dict) else None
        if counters is not None:
            self._listener.told(self._worker, counters)
        return counters is not None
