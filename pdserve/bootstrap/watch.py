"""The balancer's side of membership: a stream of fleet views that survives the service.

service up ──view──► yield        service gone: keep the last view, is_connected = False
service restarted (new epoch): its view is still filling; old members are kept until it is
older than a lease, so that nobody is dropped only because he has not registered again yet
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec

from pdserve.bootstrap.messages import FleetView
from pdserve.errors import WorkerError
from pdserve.http.client import HttpClient
from pdserve.types import WorkerId

logger = logging.getLogger(__name__)

POLL_S = 20.0
FILLING_POLL_S = 0.5
"""While a restarted service fills up, ask often: what matters then is its age."""
ANSWER_S = 10.0
MAX_BACKOFF_S = 1.0


def settled(view: FleetView, lease_s: float) -> bool:
    """True once every live worker has had time to register with this service since it started."""
    return view.uptime_s >= lease_s


class FleetWatcher:
    """Long-polls ``GET /fleet/view``. One consumer, one event loop.

    ``grace_s`` is the service's lease time: how long members of a former epoch
    are kept in the views of a restarted service.
    """

    def __init__(self, url: str, grace_s: float = 10.0) -> None:
        self.url = url
        self.is_connected = False
        self.epoch = ""
        self._grace_s = grace_s
        self._version = -1
        self._last: FleetView | None = None
        self._settled_epoch = ""
        self._returned: set[WorkerId] = set()

    async def watch(self) -> AsyncIterator[FleetView]:
        """Yield the first view and then every changed one, for ever."""
        pool = HttpClient()
        try:
            async for view in self._views(pool):
                yield view
        finally:
            await pool.close()

    async def _views(self, pool: HttpClient) -> AsyncIterator[FleetView]:
        pause_s, is_lost = 0.05, False
        while True:
            try:
                view = await self._fetch(pool)
            except (WorkerError, ValueError) as exc:
                if not is_lost:
                    logger.warning("bootstrap service does not answer url=%s: %r", self.url, exc)
                self.is_connected, is_lost = False, True
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, MAX_BACKOFF_S)
                continue
            if is_lost:
                logger.info("bootstrap service is back url=%s epoch=%s", self.url, view.epoch)
            pause_s, is_lost, self.is_connected = 0.05, False, True
            merged = self._merge(view)
            if merged is not None:
                yield merged

    def _merge(self, view: FleetView) -> FleetView | None:
        """The view a consumer should act on, or None if nothing changed for it."""
        if view.epoch != self.epoch:
            self._returned.clear()
        is_news = view.epoch != self.epoch or view.version != self._version or self._last is None
        self.epoch, self._version = view.epoch, view.version
        if self._last is None:
            self._settled_epoch = view.epoch
        elif view.epoch != self._settled_epoch:
            if settled(view, self._grace_s):
                self._settled_epoch = view.epoch
                is_news = True  # those who did not come back are dropped now
            else:
                # Whoever came back and left again is gone: only those not yet heard of are kept.
                self._returned |= {worker.worker_id for worker in view.workers}
                kept = [w for w in self._last.workers if w.worker_id not in self._returned]
                view = msgspec.structs.replace(view, workers=[*view.workers, *kept])
        if not is_news:
            return None
        self._last = view
        return view

    async def _fetch(self, pool: HttpClient) -> FleetView:
        """One poll. Raises WorkerError or ValueError for whatever is not a view."""
        wait_s = POLL_S if self._settled_epoch == self.epoch else FILLING_POLL_S
        query = f"epoch={self.epoch}&after={self._version}&wait_s={wait_s if self.epoch else 0}"
        answer = await pool.fetch(self.url, "GET", f"/fleet/view?{query}", timeout_s=wait_s + ANSWER_S)
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}: {answer.body[:200]!r}")
        return msgspec.json.decode(answer.body, type=FleetView)
