"""SGLang's KV events: where they are published, what they say, and gaps; the feed without sockets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.balancer.fleet.kv_events import (
    EventsAddress,
    OddEvents,
    RankFeed,
    WorkerFeed,
    events_address,
    keeps_prefixes,
)

# -- where ---------------------------------------------------------------------------------------


def server_info(outer: dict[str, Any] | None = None, **section: object) -> bytes:
    """As SGLang renders it, with fields around it that nobody here reads."""
    described = {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": 5557,
        "replay_endpoint_port_base": 5600,
        "topic": "",
        "block_size": 16,
        "dp_size": 1,
        **section,
    }
    return json.dumps({"model_path": "m", "kv_events": described, **(outer or {})}).encode()


def test_address_has_the_workers_own_host_and_a_port_for_each_rank() -> None:
    assert events_address(server_info(dp_size=2, topic="kv"), "http://10.0.0.7:30000") == EventsAddress(
        ("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558"),
        ("tcp://10.0.0.7:5600", "tcp://10.0.0.7:5601"),
        b"kv",
        16,
    )


def test_address_without_replay_has_none() -> None:
    address = events_address(server_info(replay_endpoint_port_base=None), "http://[::1]:30000")
    assert address == EventsAddress(("tcp://[::1]:5557",), (), b"", 16)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"kv_events": null}',
        b'{"kv_events": 5}',
        server_info(publisher="null"),
        server_info(endpoint_port_base=None),
        server_info(endpoint_port_base=65535, dp_size=2),
        server_info(block_size=0),
        server_info(dp_size=10**9),
    ],
)
def test_server_that_publishes_no_events_has_no_address(info: bytes) -> None:
    assert events_address(info, "http://127.0.0.1:30000") is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"disaggregation_mode": "prefill", "disable_radix_cache": False}, True),
        ({"disaggregation_mode": "prefill", "disable_radix_cache": True}, False),
        ({"disaggregation_mode": "decode", "disable_radix_cache": False}, False),
        (
            {
                "disaggregation_mode": "decode",
                "disable_radix_cache": False,
                "disaggregation_decode_enable_radix_cache": True,
            },
            True,
        ),
        ({}, None),
    ],
)
def test_prefix_cache_of_a_decode_worker_is_off_unless_asked_for(
    fields: dict[str, Any], expected: bool | None
) -> None:
    assert keeps_prefixes(server_info(fields)) is expected


# -- what ----------------------------------------------------------------------------------------


class Pages:
    """What a sink was told, as a set."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.is_exact = False
        self.num_starts = 0
        self.num_clears = 0

    def start(self, *, is_exact: bool) -> None:
        self.held.clear()
        self.is_exact = is_exact
        self.num_starts += 1

    def store(self, pages: Sequence[int]) -> None:
        self.held.update(pages)

    def remove(self, pages: Sequence[int]) -> None:
        self.held.difference_update(pages)

    def clear(self) -> None:
        self.held.clear()
        self.is_exact = True
        self.num_clears += 1


def stored(*pages: int, medium: str | None = "GPU") -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(pages),
        "parent_block_hash": None,
        "token_ids": list(range(16 * len(pages))),
        "block_size": 16,
        "lora_id": None,
        "medium": medium,
        "a_later_field": {"x": [1]},
    }


def removed(*pages: int, medium: str | None = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(pages), "medium": medium}


CLEARED: dict[str, Any] = {"type": "AllBlocksCleared"}


def payload(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def feed_of(ranks: int = 1, *, has_replay: bool = True) -> tuple[Pages, list[RankFeed]]:
    pages = Pages()
    worker = WorkerFeed(ranks, pages)
    feeds = [RankFeed(rank, worker, "test", has_replay=has_replay) for rank in range(ranks)]
    for feed in feeds:
        feed.begin()
        feed.ask_from = None
        feed.replay_ended()
    return pages, feeds


def test_events_name_the_pages_that_are_there() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1, 2, -3), stored(4)))
    feed.live(1, payload(removed(2)))
    assert pages.held == {1, -3, 4}
    assert pages.is_exact
    feed.live(2, payload(CLEARED, stored(9)))
    assert pages.held == {9}
    assert pages.num_clears == 1


def test_copies_in_host_memory_do_not_count() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1, medium=None), stored(2, medium="CPU_PINNED")))
    feed.live(1, payload(removed(1, medium="CPU_PINNED")))
    assert pages.held == {1}


@pytest.mark.parametrize(
    "odd", [b"", b"\xc1", payload({"type": "New"}), msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}]])]
)
def test_message_that_is_not_understood_is_refused(odd: bytes) -> None:
    _, [feed] = feed_of()
    with pytest.raises(OddEvents):
        feed.live(0, odd)


def test_page_counts_when_every_rank_has_it() -> None:
    pages, [first, second] = feed_of(2)
    first.live(0, payload(stored(1, 2)))
    assert pages.held == set()
    second.live(0, payload(stored(2, 3)))
    assert pages.held == {2}
    first.live(1, payload(removed(2)))
    assert pages.held == set()
    first.live(2, payload(stored(2, 3)))
    assert pages.held == {2, 3}
    second.live(1, payload(CLEARED))
    assert pages.held == set()


def test_rank_that_starts_over_leaves_the_others_what_they_told() -> None:
    pages, [first, second] = feed_of(2, has_replay=False)
    first.live(0, payload(stored(1, 2)))
    second.live(0, payload(stored(1)))
    second.live(5, payload(stored(2)))
    assert pages.held == {2}
    assert not pages.is_exact


# -- gaps ----------------------------------------------------------------------------------------


def test_beginning_asks_for_what_was_published_before() -> None:
    pages = Pages()
    feed = RankFeed(0, WorkerFeed(1, pages), "test", has_replay=True)
    feed.begin()
    assert feed.ask_from == 0
    feed.live(2, payload(stored(3)))
    for seq in range(3):
        feed.replayed(seq, payload(stored(seq + 1)))
    feed.replay_ended()
    feed.live(3, payload(removed(1)))
    assert pages.held == {2, 3}
    assert pages.is_exact
    assert pages.num_starts == 1


def test_beginning_that_is_not_kept_any_more_is_not_exact() -> None:
    pages = Pages()
    feed = RankFeed(0, WorkerFeed(1, pages), "test", has_replay=True)
    feed.begin()
    feed.replayed(7, payload(stored(8)))
    feed.replay_ended()
    assert pages.held == {8}
    assert not pages.is_exact
    feed.live(8, payload(CLEARED, stored(9)))
    assert pages.held == {9}
    assert pages.is_exact


def test_gap_is_filled_in_order_before_what_came_after_it() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1)))
    feed.live(3, payload(removed(2)))
    assert feed.ask_from == 0
    assert pages.held == {1}
    feed.live(4, payload(stored(5)))
    feed.replayed(0, payload(stored(1)))
    feed.replayed(1, payload(stored(2)))
    feed.replayed(2, payload(stored(3)))
    feed.replayed(3, payload(removed(2)))
    feed.replay_ended()
    assert pages.held == {1, 3, 5}
    assert pages.is_exact
    assert feed.num_gaps == 0


def test_gap_that_cannot_be_filled_drops_everything_known() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1)))
    feed.live(3, payload(stored(4)))
    feed.replay_ended()
    assert pages.held == {4}
    assert not pages.is_exact
    assert feed.num_gaps == 1
    feed.live(4, payload(stored(5)))
    assert pages.held == {4, 5}


def test_hole_in_the_answer_is_asked_for_again() -> None:
    pages, [feed] = feed_of()
    feed.live(5, payload(stored(6)))
    feed.ask_from = None
    feed.replayed(0, payload(stored(1)))
    feed.replayed(2, payload(removed(1)))
    feed.replay_ended()
    assert feed.ask_from == 0
    for seq in range(6):
        feed.replayed(seq, payload(stored(seq + 1)))
    feed.replay_ended()
    assert pages.held == {1, 2, 3, 4, 5, 6}
    assert pages.is_exact


def test_restarted_publisher_starts_from_nothing() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1)))
    feed.live(1, payload(stored(2)))
    feed.live(0, payload(stored(7)))
    assert pages.held == {7}
    assert pages.is_exact


def test_publisher_that_restarted_and_is_ahead_already_is_found_out_at_the_next_gap() -> None:
    pages, [feed] = feed_of()
    feed.live(0, payload(stored(1)))
    feed.live(1, payload(stored(2)))
    feed.live(3, payload(stored(10)))
    for seq in range(1, 4):
        feed.replayed(seq, payload(stored(7 + seq)))
    feed.replay_ended()
    assert pages.held == set()
    assert feed.ask_from == 0
    for seq in range(4):
        feed.replayed(seq, payload(stored(7 + seq)))
    feed.replay_ended()
    assert pages.held == {7, 8, 9, 10}
    assert pages.is_exact


def test_without_replay_a_gap_is_a_loss_at_once() -> None:
    pages, [feed] = feed_of(has_replay=False)
    feed.live(0, payload(stored(1)))
    feed.live(2, payload(stored(3)))
    assert pages.held == {3}
    assert not pages.is_exact
    assert feed.ask_from is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["store", "remove", "clear"]), st.integers(0, 5)), max_size=30),
    st.data(),
)
def test_whatever_is_lost_on_the_way_no_absent_page_is_claimed_at_the_end(
    events: list[tuple[str, int]], data: st.DataObject
) -> None:
    pages, truth, log = Pages(), set[int](), list[bytes]()
    feed = RankFeed(0, WorkerFeed(1, pages), "test", has_replay=True)
    feed.begin()
    for seq, (verb, page) in enumerate([*events, ("store", 99)]):
        match verb:
            case "store":
                truth.add(page)
                log.append(payload(stored(page)))
            case "remove":
                truth.discard(page)
                log.append(payload(removed(page)))
            case _:
                truth.clear()
                log.append(payload(CLEARED))
        if (verb == "store" and page == 99) or data.draw(st.booleans(), "delivered"):
            feed.live(seq, log[seq])
        while feed.ask_from is not None and data.draw(st.booleans(), "answered now"):
            answer(feed, log, data)
    while feed.is_asking:
        answer(feed, log, data)
    assert pages.held <= truth
    if pages.is_exact:
        assert pages.held == truth


def answer(feed: RankFeed, log: Sequence[bytes], data: st.DataObject) -> None:
    """Replay as SGLang does it, from a bounded memory, some messages lost on the way."""
    start, feed.ask_from = feed.ask_from or 0, None
    oldest = data.draw(st.integers(0, len(log)), "oldest kept")
    kept: Iterable[int] = range(max(start, oldest), len(log))
    for seq in kept:
        if data.draw(st.integers(0, 4), "lost in replay"):
            feed.replayed(seq, log[seq])
    feed.replay_ended()
