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
from pdserve.types import WorkerId

logger = logging.getLogger(__name__)

POLL_S = 20.0
FILLING_POLL_S = 0.5
"""While a restarted service fills up, ask often: what matters then is its age."""
ANSWER_S = 10.0
MAX_BACKOFF_S = 1.0
MAX_VIEW_BYTES = 64 * 2**20


def settled(view: FleetView, lease_s: float) -> bool:
    """True once every live worker has had time to register with this service since it started."""
    return view.uptime_s >= lease_s


class FleetWatcher:
    """Long-polls ``GET /fleet/view``. One consumer, one event loop.

    ``grace_s`` is the service's lease time: how long members of a former epoch
    are kept in the views of a restarted service.
    """

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
        self._returned: set[WorkerId] = set()

    async def watch(self) -> AsyncIterator[FleetView]:
        """Yield the first view and then every changed one, for ever."""
        pause_s, is_lost = 0.05, False
        while True:
            try:
                view = await self._fetch()
            except (OSError, EOFError, ValueError) as exc:
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

    async def _fetch(self) -> FleetView:
        """One poll. Raises OSError, EOFError or ValueError for whatever is not a view."""
        wait_s = POLL_S if self._settled_epoch == self.epoch else FILLING_POLL_S
        async with asyncio.timeout(wait_s + ANSWER_S):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                query = f"epoch={self.epoch}&after={self._version}&wait_s={wait_s if self.epoch else 0}"
                writer.write(
                    f"GET /fleet/view?{query} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                await writer.drain()
                status, length = _parse_head(await reader.readuntil(b"\r\n\r\n"))
                body = await reader.readexactly(length)
            except asyncio.LimitOverrunError as exc:
                raise ValueError(f"answer is not HTTP: {exc}") from exc
            finally:
                writer.close()
        if status != 200:
            raise ValueError(f"HTTP {status}: {body[:200]!r}")
        return msgspec.json.decode(body, type=FleetView)


def _parse_head(head: bytes) -> tuple[int, int]:
    """Status and Content-Length of an answer. Raises ValueError if it is not one of the service's."""
    status_line, *lines = head.split(b"\r\n")
    parts = status_line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1."):
        raise ValueError(f"answer is not HTTP: {status_line[:100]!r}")
    for line in lines:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
            if not 0 <= length <= MAX_VIEW_BYTES:
                raise ValueError(f"a view of {length} bytes is too large")
            return int(parts[1]), length
    raise ValueError("answer has no Content-Length")
