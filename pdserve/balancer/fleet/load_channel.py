"""SGLang's load channel: a worker's load as it changes, between polls of ``/v1/loads``.

A server started with ``--load-publish-endpoint`` and a zmq ``--kv-events-config`` publishes, one
ZMQ PUB socket for each DP rank, ``[b"load", seq as 8 bytes big-endian, msgpack LoadStat]``: on every prefill
batch, every 15th decode step and every 50 ms while requests only wait, if a figure changed; else
once a second. ``/server_info`` tells the ports (sglang/srt/managers/scheduler_components/load_publisher.py).

    rank 0 PUB ──► SUB ─┐ newest of each rank,
    rank 1 PUB ──► SUB ─┴─► summed, at most every GAP_S ──► on_update(PartialLoad)

A message has no time. A gauge needs none but its place: newer ones replace
older ones, gaps do no harm, and a number that fell is a publisher that restarted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from pdserve.scheduling.load_sample import ARRIVAL_S, PartialLoad

if TYPE_CHECKING:
    import zmq
from typing import Protocol

from pdserve.balancer.fleet.probe import Fetcher, Headers
from pdserve.errors import WorkerError
from pdserve.scheduling.workers import Worker

logger = logging.getLogger(__name__)

GAP_S = 0.05
"""Updates of one worker come no closer: a busy server publishes hundreds a second, and polls every 0.25 s
are what they improve on."""
DELIVERY_S = 0.02
"""From the scheduler's reading of its queues to our event loop."""
BACKLOG = 256
"""Messages that may wait unread; with so many the publisher drops new ones, and the last of them is old."""
MAX_MESSAGE_BYTES = 2**16
RECONNECT_MS = (100, 5000)
MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """Where one worker publishes its load: an endpoint for each DP rank."""

    endpoints: tuple[str, ...]
    topic: bytes


class _Section(msgspec.Struct):
    dp_size: int | None = 1
    load_endpoint_port_base: int | None = None
    load_topic: str | None = "load"


class _ServerInfo(msgspec.Struct):
    kv_events: _Section | None = None


class _LoadStat(msgspec.Struct, array_like=True, tag="LoadStat"):
    """As published; fields that a newer server appends are ignored, those an older one lacks stay untold."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    attn_dp_rank: int | None = None
    num_waiting_uncached_tokens: int | None = None
    num_total_tokens: int | None = None
    max_running_requests: int | None = None


_DECODER = msgspec.msgpack.Decoder(_LoadStat)


def channel_address(server_info: bytes, worker_url: str) -> ChannelAddress | None:
    """Read an answer of ``GET /server_info``; None if this worker publishes no load.

    The host is the worker's own: the advertised one is what its sockets were bound to, as a rule ``*``.
    """
    try:
        section = msgspec.json.decode(server_info, type=_ServerInfo).kv_events
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if section is None or not section.load_endpoint_port_base:
        return None
    base, ranks = section.load_endpoint_port_base, section.dp_size or 1
    host = urlsplit(worker_url).hostname or ""
    if not host or not 0 < ranks <= MAX_RANKS or not 0 < base <= 65536 - ranks:
        return None
    name = f"[{host}]" if ":" in host else host
    endpoints = tuple(f"tcp://{name}:{base + rank}" for rank in range(ranks))
    return ChannelAddress(endpoints, (section.load_topic or "").encode())


class LoadChannels:
    """The sockets' common context. One for the balancer; close it when nobody listens any more."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    async def listen(self, address: ChannelAddress, on_update: Callable[[PartialLoad], None]) -> None:
        """Call ``on_update`` with what one worker tells, until cancelled.

        Connections that fail are tried again for ever, in silence: polling goes on and judges the worker.
        """
        import zmq  # 45 ms that a balancer whose workers publish nothing need not spend

        if self._context is None:
            self._context = zmq.Context()
        with ExitStack() as stack:
            ranks = []
            for endpoint in address.endpoints:
                socket = stack.enter_context(self._context.socket(zmq.SUB))
                _configure(socket, endpoint, address.topic)
                ranks.append(_Rank(endpoint, socket))
            await _forward(ranks, on_update)

    def close(self) -> None:
        """End the context. Every ``listen`` must have been cancelled and awaited."""
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None


async def _forward(ranks: Sequence[_Rank], on_update: Callable[[PartialLoad], None]) -> None:
    loop = asyncio.get_running_loop()
    emptied_s = time.monotonic()
    while True:
        news = loop.create_future()
        for rank in ranks:
            # The descriptor says that something happened, not that a message came, and is silent until the
            # socket has been looked at: so look first, then wait. It stays readable through the gap.
            loop.add_reader(rank.descriptor, _tell, news)
        try:
            if not any([rank.has_news() for rank in ranks]):
                await news
                emptied_s = time.monotonic()
        finally:
            for rank in ranks:
                loop.remove_reader(rank.descriptor)
        await asyncio.sleep(GAP_S)
        # Read after the gap, dated before it: every message came after the sockets were last seen empty.
        is_new = any([rank.read(emptied_s - DELIVERY_S - ARRIVAL_S) for rank in ranks])
        emptied_s = time.monotonic()
        if is_new and (update := _sum(ranks)) is not None:
            on_update(update)


def _tell(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


class _Rank:
    """One publisher's newest message."""

    def __init__(self, endpoint: str, socket: zmq.Socket[bytes]) -> None:
        self.stat: _LoadStat | None = None
        self.covered_s = 0.0
        self.descriptor = socket.fileno()
        self._endpoint = endpoint
        self._socket = socket
        self._seq = -1
        self._is_odd = False

    def has_news(self) -> bool:
        """A message waits."""
        import zmq

        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def read(self, covered_s: float) -> bool:
        """Take every waiting message and keep the last; False if there was none of use."""
        import zmq

        frames: list[bytes] = []
        taken = 0
        while taken < BACKLOG:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            taken += 1
        if not taken or taken == BACKLOG:
            return False
        return self._keep(frames, covered_s)

    def _keep(self, frames: Sequence[bytes], covered_s: float) -> bool:
        try:
            _, seq, payload = frames
            stat = _DECODER.decode(payload)
        except (ValueError, msgspec.DecodeError) as exc:
            if not self._is_odd:
                logger.warning("load channel %s: unexpected message, polling only: %s", self._endpoint, exc)
            self._is_odd = True
            return False
        number = int.from_bytes(seq, "big", signed=True)
        if number <= self._seq:
            logger.info("load channel %s: publisher restarted", self._endpoint)
        self._seq, self.stat, self.covered_s, self._is_odd = number, stat, covered_s, False
        return True


def _sum(ranks: Sequence[_Rank]) -> PartialLoad | None:
    """All ranks together, dated by the oldest; None until each has spoken."""
    stats = [rank.stat for rank in ranks if rank.stat is not None]
    if len(stats) < len(ranks):
        return None
    return PartialLoad(
        covered_s=min(rank.covered_s for rank in ranks),
        num_running_reqs=sum(stat.num_running_reqs for stat in stats),
        num_waiting_reqs=sum(stat.num_waiting_reqs for stat in stats),
        num_used_tokens=sum(stat.num_tokens for stat in stats),
        max_total_num_tokens=sum(stat.max_total_num_tokens for stat in stats),
        num_waiting_uncached_tokens=_total(stat.num_waiting_uncached_tokens for stat in stats),
        num_total_tokens=_total(stat.num_total_tokens for stat in stats),
        max_running_requests=_total(stat.max_running_requests for stat in stats),
    )


def _total(values: Iterable[int | None]) -> int | None:
    """The sum, or None if a rank does not tell."""
    told = list(values)
    return None if None in told else sum(value or 0 for value in told)


def _configure(socket: zmq.Socket[bytes], endpoint: str, topic: bytes) -> None:
    import zmq

    socket.setsockopt(zmq.RCVHWM, BACKLOG)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(endpoint)


SERVER_INFO_S = 20.0
"""/server_info asks the scheduler, which may be in a long step."""
AGAIN_S = 300.0
"""A server that was restarted under its old address may publish elsewhere, or begin to."""


class Updates(Protocol):
    """Who hears what the channel tells."""

    def worker_updated(self, worker: Worker, partial: PartialLoad) -> None:
        """The worker's load has changed."""
        ...


class LoadChannelSubscriber:
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
