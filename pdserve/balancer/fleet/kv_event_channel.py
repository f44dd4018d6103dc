"""The ZMQ sockets of one worker's KV events: a SUB for each DP rank, and a DEALER while a gap is filled.

rank 0 PUB    ──► SUB    ──┐ at most every GAP_S, BATCH messages at a time
rank 0 ROUTER ──► DEALER ──┴─► RankFeed ─► WorkerFeed ─► PageSink
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pdserve.balancer.fleet.kv_events import EventsAddress, OddEvents, PageSink, RankFeed, WorkerFeed

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

GAP_S = 0.05
"""Looks at one worker's sockets come no closer: a busy prefill server publishes with every batch."""
BATCH = 64
"""Messages taken before other work of the event loop has its turn: a few milliseconds."""
REPLAY_S = 2.0
"""Longest silence in an answer; the publisher looks for questions every 0.1 s. Of a long answer it drops what
does not fit in its socket's queue of 1000, the end too: what is missing is asked for again."""
BACKLOG = 20_000
"""Messages that may wait unread; those beyond are a gap."""
MAX_MESSAGE_BYTES = 2**26
RECONNECT_MS = (100, 5000)
_END = (-1).to_bytes(8, "big", signed=True)


class KvEventChannels:
    """The sockets' common context. One for the balancer; close it when nobody listens any more."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    async def listen(self, address: EventsAddress, sink: PageSink) -> None:
        """Tell ``sink`` what one worker holds, until cancelled, or until it says what is not understood.

        Connections that fail are tried again for ever, in silence: others health the worker.
        """
        import zmq  # 45 ms that a balancer whose workers publish nothing need not spend

        if self._context is None:
            self._context = zmq.Context()
        feed = WorkerFeed(len(address.endpoints), sink)
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(_Rank(self._context, address, rank, feed))
                for rank in range(len(address.endpoints))
            ]
            try:
                await _pump(ranks)
            except OddEvents as exc:
                logger.warning(
                    "kv events %s: unexpected message, not followed: %s", address.endpoints[0], exc
                )

    def close(self) -> None:
        """End the context. Every ``listen`` must have been cancelled and awaited."""
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None


async def _pump(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        rank.begin()
    while True:
        if any([rank.read() for rank in ranks]):
            await asyncio.sleep(0)
        else:
            await _news(ranks)
            await asyncio.sleep(GAP_S)


async def _news(ranks: Sequence[_Rank]) -> None:
    """Until a message waits on some socket, or an answer has been silent for too long."""
    loop = asyncio.get_running_loop()
    while True:
        news = loop.create_future()
        descriptors = [descriptor for rank in ranks for descriptor in rank.descriptors]
        for descriptor in descriptors:
            # It tells that something happened, not that a message came, and is silent until the socket has
            # been looked at: so look first, then wait.
            loop.add_reader(descriptor, _tell, news)
        try:
            if any([rank.has_news() for rank in ranks]):
                return
            async with asyncio.timeout(REPLAY_S if any(rank.is_asking for rank in ranks) else None):
                await news
        except TimeoutError:
            for rank in ranks:
                rank.fell_silent()
            return
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)


def _tell(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


class _Rank:
    """One rank's sockets."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: EventsAddress, rank: int, feed: WorkerFeed
    ) -> None:
        import zmq

        self._context = context
        self._replay_endpoint = address.replay[rank] if address.replay else ""
        endpoint = address.endpoints[rank]
        self._feed = RankFeed(rank, feed, endpoint, has_replay=bool(self._replay_endpoint))
        self._dealer: zmq.Socket[bytes] | None = None
        self._heard_s = 0.0
        self._sub = self._connected(zmq.SUB, endpoint, BACKLOG)
        self._sub.setsockopt(zmq.SUBSCRIBE, address.topic)

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sub.close(0)
        self._hang_up()

    @property
    def descriptors(self) -> list[int]:
        """What to wait on."""
        return [self._sub.fileno()] if self._dealer is None else [self._sub.fileno(), self._dealer.fileno()]

    @property
    def is_asking(self) -> bool:
        """An answer is awaited."""
        return self._feed.is_asking

    def begin(self) -> None:
        """Ask for what was published before."""
        self._feed.begin()
        self._ask()

    def has_news(self) -> bool:
        """A message waits."""
        import zmq

        sockets = [self._sub] if self._dealer is None else [self._sub, self._dealer]
        return any([bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN) for socket in sockets])

    def read(self) -> bool:
        """Take what waits, up to BATCH messages of each socket; True if there may be more."""
        more = self._read_replay() if self._dealer is not None else False
        more = self._read_live() or more
        if self._feed.is_asking and asyncio.get_running_loop().time() > self._heard_s + REPLAY_S:
            self.fell_silent()
        self._ask()
        return more

    def fell_silent(self) -> None:
        """No answer came for too long; a late one must not be taken for the next one's."""
        if self._feed.is_asking:
            self._hang_up()
            self._feed.replay_ended(is_whole=False)
            self._ask()

    def _read_live(self) -> bool:
        for _ in range(BATCH):
            frames = _receive(self._sub)
            if not frames:
                return False
            if len(frames) != 3:
                raise OddEvents(f"{len(frames)} frames")
            self._feed.live(int.from_bytes(frames[1], "big"), frames[2])
        return True

    def _read_replay(self) -> bool:
        for _ in range(BATCH):
            frames = _receive(self._dealer) if self._dealer is not None else []
            if not frames:
                return False
            self._heard_s = asyncio.get_running_loop().time()
            # ["", topic, seq, payload]; older servers leave out the topic
            if len(frames) < 3 or frames[-2] == _END:
                self._feed.replay_ended()
            else:
                self._feed.replayed(int.from_bytes(frames[-2], "big"), frames[-1])
        return True

    def _ask(self) -> None:
        import zmq

        if self._feed.ask_from is not None:
            if self._dealer is None:
                self._dealer = self._connected(zmq.DEALER, self._replay_endpoint, 0)
            self._dealer.send_multipart((b"", self._feed.ask_from.to_bytes(8, "big")))
            self._feed.ask_from = None
            self._heard_s = asyncio.get_running_loop().time()
        elif not self._feed.is_asking:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._dealer.close(0)
            self._dealer = None

    def _connected(self, kind: int, endpoint: str, backlog: int) -> zmq.Socket[bytes]:
        import zmq

        socket = self._context.socket(kind)
        socket.setsockopt(zmq.RCVHWM, backlog)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(endpoint)
        return socket


def _receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    import zmq

    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return []
