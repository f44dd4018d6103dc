"""The background loop that polls one worker's data-plane counters.

answers ─► GET /pdserve/instance every POLL_S ─► TransferListener.record_transfers

A stock SGLang server has no such route: it is asked once. The answers do not change its health.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

import msgspec

from pdserve.balancer.fleet.probe import Headers
from pdserve.balancer.fleet.worker import Worker
from pdserve.errors import WorkerError
from pdserve.http.client import HttpClient

POLL_S = 5.0
ANSWER_S = 5.0
INSTANCE_PATH = "/pdserve/instance"


class TransferCounters(msgspec.Struct, frozen=True):
    """``transfer`` of ``GET /pdserve/instance``, cumulative since the start of that server."""

    kv_bytes: int = 0
    transfers: int = 0
    latency_us: int = 0
    failures: int = 0
    direct_chunks: int = 0
    packed_chunks: int = 0


class TransferListener(Protocol):
    """Is given the counters of each worker's data plane."""

    def record_transfers(self, worker: Worker, counters: TransferCounters) -> None:
        """Take that worker's counters as they are now."""
        ...


class TransferPoller:
    """Asks one worker. ``poll_s`` is the pause before each question."""

    def __init__(
        self,
        worker: Worker,
        pool: HttpClient,
        headers: Headers,
        listener: TransferListener,
        poll_s: float = POLL_S,
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
            return True  # its monitor sees to that
        if answer.status != 200:
            return answer.status >= 500
        try:
            document = msgspec.json.decode(answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        counters = transfer_counters(document) if isinstance(document, dict) else None
        if counters is not None:
            self._listener.record_transfers(self._worker, counters)
        return counters is not None


def transfer_counters(document: Mapping[str, object]) -> TransferCounters | None:
    """Read ``GET /pdserve/instance``; None if it is not what pdserve's workers tell."""
    try:
        return msgspec.convert(document["transfer"], TransferCounters)
    except (KeyError, msgspec.ValidationError):
        return None
