"""Telling workers to drop a request whose other leg has ended; in the background, best effort.

A closed socket makes an SGLang server abort by itself; the abort request is for
the one that does not notice yet, because it waits for its twin.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from pdserve.balancer.rooms import RequestIds
from pdserve.balancer.tracing import JSON_LINE
from pdserve.balancer.upstream import UpstreamPool
from pdserve.errors import WorkerError
from pdserve.types import Pair

logger = logging.getLogger(__name__)

ABORT_S = 5.0
"""Limit per worker and request."""


class AbortDesk:
    """Sends aborts and owns their tasks; ``await close()`` waits for those under way.

    ``key`` is what workers' control routes ask for; without one the client's own is used.
    """

    def __init__(self, pool: UpstreamPool, key: str = "") -> None:
        self._pool = pool
        self._lines = JSON_LINE + b"authorization: Bearer %b\r\n" % key.encode() if key else b""
        self._tasks: set[asyncio.Task[None]] = set()

    def abort(self, pair: Pair, ids: RequestIds, lines: bytes) -> None:
        """Have both workers drop every rid; ``lines`` are the client's headers. Returns at once."""
        for worker in (pair.prefill, pair.decode):
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
