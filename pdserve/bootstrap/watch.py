"""The balancer's side of membership: a stream of fleet views that survives the service.

service up ──view──► yield        service gone: keep the last view, is_connected = False
service restarted (new epoch): its view is still filling; old members are kept until it is
older than a lease, so that nobody is dropped only because he has not registered again yet
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec

from pdserve.bootstrap.messages import FleetView

logger = logging.getLogger(__name__)

POLL_S = 20.0
MAX_BACKOFF_S = 1.0
MAX_VIEW_BYTES = 64 * 2**20


class FleetWatcher:
    """Long-polls ``GET /fleet/view``. One consumer, one event loop."""

    def __init__(self, url: str, grace_s: float = 10.0) -> None:
        parts = urlsplit(url)
        self.url = url
        self.is_connected = False
        self.epoch = ""
        self._grace_s = grace_s
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._version = -1
        self._last: FleetView | None = None
        self._settled_epoch = ""

    async def watch(self) -> AsyncIterator[FleetView]:
        """Yield the first view and then every changed one, for ever."""
        pause_s = 0.05
        while True:
            try:
                view = await self._fetch()
            except (OSError, EOFError, ValueError, TimeoutError) as exc:
                if self.is_connected:
                    logger.warning("bootstrap service lost url=%s: %s; keeping the last view", self.url, exc)
                self.is_connected = False
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, MAX_BACKOFF_S)
                continue
            pause_s = 0.05
            self.is_connected = True
            merged = self._merge(view)
            if merged is not None:
                yield merged

    def _merge(self, view: FleetView) -> FleetView | None:
        """The view a consumer should act on, or None if nothing changed for it."""
        is_new_epoch = view.epoch != self.epoch
        is_news = is_new_epoch or view.version != self._version
        self.epoch, self._version = view.epoch, view.version
        if self._last is None:
            self._settled_epoch = view.epoch
        elif view.epoch != self._settled_epoch:
            if view.uptime_s < self._grace_s:
                names = {worker.worker_id for worker in view.workers}
                kept = [worker for worker in self._last.workers if worker.worker_id not in names]
                view = msgspec.structs.replace(view, workers=[*view.workers, *kept])
            else:
                self._settled_epoch = view.epoch
                is_news = True
        if not is_news and self._last is not None:
            return None
        self._last = view
        return view

    async def _fetch(self) -> FleetView:
        # While a restarted service fills up, ask often: what matters then is its age.
        wait_s = POLL_S if self._settled_epoch == self.epoch else 0.5
        async with asyncio.timeout(wait_s + 10.0):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                query = f"epoch={self.epoch}&after={self._version}&wait_s={wait_s if self.epoch else 0}"
                writer.write(
                    f"GET /fleet/view?{query} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                body = await reader.read(MAX_VIEW_BYTES) if _length(head) is None else b""
                if (length := _length(head)) is not None:
                    body = await reader.readexactly(length)
            finally:
                writer.close()
        if status != 200:
            raise ValueError(f"HTTP {status}: {body[:200]!r}")
        return msgspec.json.decode(body, type=FleetView)


def _length(head: bytes) -> int | None:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
            if length > MAX_VIEW_BYTES:
                raise ValueError(f"view of {length} bytes is too large")
            return length
    return None
