"""The background loop that finds and follows one worker's load channel, if it has one.

/server_info ─► kv_events section with a load endpoint ─► LoadChannels.listen ─► Updates

Polling goes on beside it and judges the worker: a channel that fails is only missed.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from pdserve.balancer.load_channel import ChannelAddress, LoadChannels, channel_address
from pdserve.balancer.member import Worker
from pdserve.balancer.probe import Fetcher, Headers
from pdserve.balancer.sample import PartialLoad
from pdserve.errors import WorkerError

SERVER_INFO_S = 20.0
"""/server_info asks the scheduler, which may be in a long step."""
AGAIN_S = 300.0
"""A server that was restarted under its old address may publish elsewhere, or begin to."""


class Updates(Protocol):
    """Who hears what the channel tells."""

    def worker_updated(self, worker: Worker, partial: PartialLoad) -> None:
        """The worker's load has changed."""
        ...


class ChannelKeeper:
    """Follows one worker."""

    def __init__(
        self, worker: Worker, pool: Fetcher, channels: LoadChannels, headers: Headers, updates: Updates
    ) -> None:
        self._worker = worker
        self._pool = pool
        self._channels = channels
        self._headers = headers
        self._updates = updates

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._worker.answers.wait()
            address = await self._find()
            try:
                async with asyncio.timeout(AGAIN_S):
                    await self._follow(address)
            except TimeoutError:
                continue

    async def _find(self) -> ChannelAddress | None:
        url = self._worker.url
        try:
            answer = await self._pool.fetch(
                url, "GET", "/server_info", headers=self._headers, timeout_s=SERVER_INFO_S
            )
        except WorkerError:
            return None
        return channel_address(answer.body, url) if answer.status == 200 else None

    async def _follow(self, address: ChannelAddress | None) -> None:
        if address is None:
            await asyncio.Event().wait()
            return
        await self._channels.listen(
            address, lambda partial: self._updates.worker_updated(self._worker, partial)
        )
