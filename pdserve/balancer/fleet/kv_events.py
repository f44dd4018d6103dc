"""SGLang's KV events: which token pages one worker's prefix cache holds, told as it happens.

A server started with a zmq ``--kv-events-config`` publishes, one PUB socket for each DP rank, ``[topic, seq
as 8 bytes big-endian, msgpack [ts, events, rank]]`` after each batch that changed its cache, and repeats
its last 10 000 messages on a ROUTER socket (sglang/srt/disaggregation/kv_events.py).

    seq  0 1 2 ── gap ── 6 7 8 ...       RankFeed: 6, 7, 8 wait; ask replay for 3; 3 4 5 6 7 8
    cannot be filled: drop all that is known of the worker, go on from 6, and say so (not exact)

Nothing here opens a socket (kv_event_channel.py) or reads a clock. Pages count that are in device memory;
copies in host memory or storage do not. With several DP ranks a page counts when every rank has it,
because nobody knows to which one a request will go. A worker without a radix cache publishes nothing.
A prefill server publishes after each batch, a decode server every 40th step and when it idles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

logger = logging.getLogger(__name__)

MAX_RANKS = 1024
MAX_WAITING = 10_000
"""Messages that may wait for a gap to be filled; SGLang keeps as many for replay."""
_MEDIA = (None, "GPU")


@dataclass(frozen=True, slots=True)
class EventsAddress:
    """Where one worker publishes: an endpoint for each DP rank; ``replay`` is empty if it has none."""

    endpoints: tuple[str, ...]
    replay: tuple[str, ...]
    topic: bytes
    page_tokens: int


class _Section(msgspec.Struct):
    publisher: str | None = None
    endpoint_port_base: int | None = None
    replay_endpoint_port_base: int | None = None
    topic: str | None = ""
    block_size: int | None = None
    dp_size: int | None = 1


class _ServerInfo(msgspec.Struct):
    kv_events: _Section | None = None
    disaggregation_mode: str | None = None
    disable_radix_cache: bool | None = None
    disaggregation_decode_enable_radix_cache: bool | None = None


def events_address(server_info: bytes, worker_url: str) -> EventsAddress | None:
    """Read an answer of ``GET /server_info``; None if this worker publishes no KV events.

    The host is the worker's own: the advertised one is what its sockets were bound to, as a rule ``*``.
    """
    info = _decode(server_info)
    section = info.kv_events if info else None
    if section is None or section.publisher != "zmq" or not section.endpoint_port_base:
        return None
    ranks, page_tokens = section.dp_size or 1, section.block_size or 0
    host = urlsplit(worker_url).hostname or ""
    if not host or not 0 < ranks <= MAX_RANKS or page_tokens < 1:
        return None
    endpoints = _endpoints(host, section.endpoint_port_base, ranks)
    replay = _endpoints(host, section.replay_endpoint_port_base or 0, ranks)
    if not endpoints:
        return None
    return EventsAddress(endpoints, replay, (section.topic or "").encode(), page_tokens)


def keeps_prefixes(server_info: bytes) -> bool | None:
    """True if the worker's prefix cache is on, which in a decode worker it is only on request.

    None if ``/server_info`` does not tell.
    """
    info = _decode(server_info)
    if info is None or info.disable_radix_cache is None:
        return None
    if info.disaggregation_mode == "decode":
        return bool(info.disaggregation_decode_enable_radix_cache)
    return not info.disable_radix_cache


def _decode(server_info: bytes) -> _ServerInfo | None:
    try:
        return msgspec.json.decode(server_info, type=_ServerInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _endpoints(host: str, base: int, ranks: int) -> tuple[str, ...]:
    if not 0 < base <= 65536 - ranks:
        return ()
    name = f"[{host}]" if ":" in host else host
    return tuple(f"tcp://{name}:{base + rank}" for rank in range(ranks))


# -- messages --------------------------------------------------------------------------------------


class _Stored(msgspec.Struct, tag="BlockStored"):
    """Token ids come along and are not decoded."""

    block_hashes: list[int]
    medium: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_BATCHES = msgspec.msgpack.Decoder(_Batch)


class OddEvents(Exception):
    """A message that is not as this SGLang's: the worker cannot be followed."""


# -- one worker ------------------------------------------------------------------------------------


class PageSink(Protocol):
    """Who hears which pages one worker holds (fleet/kv_event_follower.py: the prompt tree)."""

    def start(self, *, is_exact: bool) -> None:
        """Forget all that is known of the worker. ``is_exact``: all that it holds will be told."""
        ...

    def store(self, pages: Sequence[int]) -> None:
        """It holds these pages now."""
        ...

    def remove(self, pages: Sequence[int]) -> None:
        """It holds these no more."""
        ...

    def clear(self) -> None:
        """It was flushed and holds nothing; all that it will hold will be told."""
        ...


class WorkerFeed:
    """Joins the ranks of one worker into one set of pages for its sink."""

    def __init__(self, num_ranks: int, sink: PageSink) -> None:
        self._sink = sink
        self._all = (1 << num_ranks) - 1
        self._inexact = 0
        self._ranks: dict[int, int] = {}
        """With several ranks: which of them hold each page."""

    def start(self, rank: int, *, is_exact: bool) -> None:
        """Nothing is known of this rank, and so of the worker, but what comes from now on."""
        self._inexact = self._inexact & ~(1 << rank) if is_exact else self._inexact | 1 << rank
        self._sink.start(is_exact=not self._inexact)
        self._drop(rank)
        self._sink.store([page for page, ranks in self._ranks.items() if ranks == self._all])

    def apply(self, rank: int, payload: bytes) -> None:
        """One message's events.

        Raises:
            OddEvents: if it is not understood.
        """
        try:
            batch = _BATCHES.decode(payload)
        except msgspec.MsgspecError as exc:
            raise OddEvents(str(exc)) from exc
        for event in batch.events:
            match event:
                case _Cleared():
                    self._inexact &= ~(1 << rank)
                    self._drop(rank)
                    if self._inexact:
                        self._sink.start(is_exact=False)
                    else:
                        self._sink.clear()
                case _Stored() if event.medium in _MEDIA:
                    self._sink.store(self._stored(rank, event.block_hashes))
                case _Removed() if event.medium in _MEDIA:
                    self._sink.remove(self._removed(rank, event.block_hashes))

    def _stored(self, rank: int, pages: list[int]) -> list[int]:
        if self._all == 1:
            return pages
        known, bit = self._ranks, 1 << rank
        for page in pages:
            known[page] = known.get(page, 0) | bit
        return [page for page in pages if known[page] == self._all]

    def _removed(self, rank: int, pages: list[int]) -> list[int]:
        for page in pages if self._all > 1 else ():
            if rest := self._ranks.pop(page, 0) & ~(1 << rank):
                self._ranks[page] = rest
        return pages

    def _drop(self, rank: int) -> None:
        rest = ~(1 << rank)
        self._ranks = {page: ranks & rest for page, ranks in self._ranks.items() if ranks & rest}


class RankFeed:
    """One rank's messages in their order, gaps filled by replay where that can be.

    After each call ``ask_from`` is the number from which replay is to be asked, or None; whoever asks sets
    it to None, and calls ``replay_ended`` when the answer is over or did not come. The question begins with
    the last message taken, again: if that has changed, a publisher has restarted behind our back.
    """

    def __init__(self, rank: int, feed: WorkerFeed, name: str, *, has_replay: bool) -> None:
        self.ask_from: int | None = None
        self.num_gaps = 0
        """Gaps that could not be filled."""
        self._rank = rank
        self._feed = feed
        self._name = name
        self._has_replay = has_replay
        self._next = 0
        self._last_live = -1
        self._is_asking = False
        self._has_answer = False
        self._has_got = False
        self._has_hole = False
        self._is_other = False
        self._last_hash = 0
        self._waiting: list[tuple[int, bytes]] = []

    @property
    def is_asking(self) -> bool:
        """True until ``replay_ended``."""
        return self._is_asking

    def begin(self) -> None:
        """Begin to listen: what the worker has published already is asked for."""
        self._feed.start(self._rank, is_exact=True)
        if self._has_replay:
            self._ask()

    def live(self, seq: int, payload: bytes) -> None:
        """A message of the PUB socket, where numbers only grow."""
        if seq <= self._last_live:
            self._waiting, self._is_asking, self.ask_from = [], False, None
            self._restart()
        self._last_live = seq
        if seq < self._next:
            return  # replayed already
        self._waiting.append((seq, payload))
        if not self._is_asking:
            self._go_on()
        elif len(self._waiting) > MAX_WAITING:
            self._give_up()

    def replayed(self, seq: int, payload: bytes) -> None:
        """A message of the answer to what was asked."""
        if not self._is_asking or self._is_other:
            return
        is_first, self._has_answer = not self._has_answer, True
        if seq < self._next:
            self._is_other = seq == self._next - 1 and hash(payload) != self._last_hash
            return
        if seq > self._next and not is_first:
            self._has_hole = True  # one was dropped on the way
            return
        if is_first and (seq > self._next or self._next):
            self._lose(seq)  # the first is the oldest that the worker still has
        self._take(seq, payload)

    def replay_ended(self, *, is_whole: bool = True) -> None:
        """The answer is over; not whole: only because nothing more came for long."""
        if not self._is_asking:
            return
        self._is_asking = False
        if self._is_other:
            self._restart()
            self._ask()
            return
        if self._has_got and (self._has_hole or not is_whole):
            self._ask()
        else:
            self._go_on(may_ask=self._has_got)

    def _go_on(self, *, may_ask: bool = True) -> None:
        """Take what waits, up to the next gap, and ask for that; or jump it if asking is no use."""
        waiting, self._waiting = self._waiting, []
        for index, (seq, payload) in enumerate(waiting):
            if seq > self._next:
                if may_ask and self._has_replay:
                    self._waiting = waiting[index:]
                    self._ask()
                    return
                self._lose(seq)
            if seq == self._next:
                self._take(seq, payload)

    def _give_up(self) -> None:
        self._is_asking, self.ask_from = False, None
        self._go_on(may_ask=False)

    def _ask(self) -> None:
        self._is_asking = True
        self._has_answer = self._has_got = self._has_hole = self._is_other = False
        self.ask_from = max(0, self._next - 1)

    def _restart(self) -> None:
        logger.info("kv events %s: publisher restarted", self._name)
        self._next = 0
        self._feed.start(self._rank, is_exact=True)

    def _take(self, seq: int, payload: bytes) -> None:
        self._next, self._has_got = seq + 1, True
        self._last_hash = hash(payload)
        self._feed.apply(self._rank, payload)

    def _lose(self, seq: int) -> None:
        logger.info("kv events %s: %d messages lost, starting over", self._name, seq - self._next)
        self.num_gaps += 1
        self._next = seq
        self._feed.start(self._rank, is_exact=False)
