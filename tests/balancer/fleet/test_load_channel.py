"""SGLang's load channel, spoken by real ZMQ publishers on the loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import zmq

from pdserve.balancer.fleet.load_channel import ChannelAddress, LoadChannels, channel_address
from pdserve.scheduling.load_sample import PartialLoad

WAIT_S = 20.0


class Publisher:
    """One rank's PUB socket, framed as SGLang frames it. What it says before somebody listens is lost."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._seq = itertools.count()
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(self.endpoint.rsplit(":", 1)[1])

    def say(self, *fields: int | None, topic: bytes = b"load", tag: str = "LoadStat") -> None:
        payload = msgspec.msgpack.encode([tag, *fields])
        self._socket.send_multipart((topic, next(self._seq).to_bytes(8, "big"), payload))

    def say_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def close(self) -> None:
        self._context.destroy(linger=0)


def stat(running: int, waiting: int = 0, rank: int = 0) -> tuple[int, ...]:
    """Running, waiting, used, capacity, rank, waiting uncached, total, max running, prefill tokens and µs."""
    return running, waiting, 100 * running, 5000, rank, 7 * waiting, 110 * running, 48, 12345, 67890


@asynccontextmanager
async def listening(
    *publishers: Publisher, endpoints: tuple[str, ...] = ()
) -> AsyncIterator[list[PartialLoad]]:
    """The updates of a listener, while it listens."""
    channels, updates = LoadChannels(), list[PartialLoad]()
    address = ChannelAddress(endpoints or tuple(each.endpoint for each in publishers), b"load")
    task = asyncio.create_task(channels.listen(address, updates.append))
    try:
        yield updates
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        channels.close()
        for publisher in publishers:
            publisher.close()


async def until(condition: Callable[[], Any], repeat: Callable[[], None] = lambda: None) -> None:
    """Do ``repeat`` again and again until the condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            repeat()
            await asyncio.sleep(0.01)


# -- where ---------------------------------------------------------------------------------------


def server_info(**section: object) -> bytes:
    """As SGLang renders it, with the fields around it that nobody here reads."""
    described = {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": 5557,
        "topic": "",
        "block_size": 1,
        "dp_size": 1,
        **section,
    }
    return json.dumps({"model_path": "m", "kv_events": described, "internal_states": [{}]}).encode()


def test_address_has_the_workers_own_host_and_a_port_for_each_rank() -> None:
    info = server_info(dp_size=3, load_endpoint_port_base=5560, load_topic="load")
    address = channel_address(info, "http://10.0.0.7:30000")
    assert address == ChannelAddress(
        ("tcp://10.0.0.7:5560", "tcp://10.0.0.7:5561", "tcp://10.0.0.7:5562"), b"load"
    )


def test_address_of_an_ipv6_worker_is_bracketed() -> None:
    address = channel_address(server_info(load_endpoint_port_base=5560), "http://[::1]:30000")
    assert address is not None
    assert address.endpoints == ("tcp://[::1]:5560",)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"[]",
        b'{"kv_events": null}',
        b'{"kv_events": 5}',
        server_info(),
        server_info(load_endpoint_port_base=None),
        server_info(load_endpoint_port_base=65535, dp_size=2),
        server_info(load_endpoint_port_base=-1),
        server_info(load_endpoint_port_base=5000, dp_size=10**9),
    ],
)
def test_server_that_publishes_no_load_has_no_address(info: bytes) -> None:
    assert channel_address(info, "http://127.0.0.1:30000") is None


# -- what ----------------------------------------------------------------------------------------


async def test_message_becomes_an_update_with_its_time() -> None:
    publisher = Publisher()
    async with listening(publisher) as updates:
        started_s = time.monotonic()
        await until(lambda: updates, lambda: publisher.say(*stat(4, 2)))
        update = updates[0]
        assert started_s - 1 < update.covered_s < time.monotonic()
        assert update == PartialLoad(
            covered_s=update.covered_s,
            num_running_reqs=4,
            num_waiting_reqs=2,
            num_used_tokens=400,
            max_total_num_tokens=5000,
            num_waiting_uncached_tokens=14,
            num_total_tokens=440,
            max_running_requests=48,
        )


async def test_update_never_covers_what_was_sent_after_its_message() -> None:
    publisher = Publisher()
    async with listening(publisher) as updates:
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
        published_s = time.monotonic()
        publisher.say(*stat(9))
        await until(lambda: updates[-1].num_running_reqs == 9)
        assert updates[-1].covered_s < published_s


async def test_newest_of_a_flood_wins_and_updates_are_few() -> None:
    publisher = Publisher()
    async with listening(publisher) as updates:
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
        before = len(updates)
        for number in range(100):
            publisher.say(*stat(number))
        await until(lambda: updates[-1].num_running_reqs == 99)
        assert len(updates) - before < 20


async def test_ranks_are_summed_once_all_have_spoken_and_dated_by_the_oldest() -> None:
    first, second = Publisher(), Publisher()
    async with listening(first, second) as updates:
        turns = itertools.count()

        def speak() -> None:
            first.say(*stat(1))
            if next(turns) >= 20:
                second.say(*stat(2, rank=1))

        await until(lambda: updates, speak)
        assert (updates[0].num_running_reqs, updates[0].max_total_num_tokens) == (3, 10_000)
        await until(lambda: updates[-1].num_running_reqs == 9, lambda: second.say(*stat(8, rank=1)))
        dated_s = updates[-1].covered_s
        await until(lambda: updates[-1].num_running_reqs == 8, lambda: second.say(*stat(7, rank=1)))
        assert updates[-1].covered_s == dated_s, "the first said nothing new"


async def test_messages_of_older_and_newer_servers_are_understood() -> None:
    publisher = Publisher()
    async with listening(publisher) as updates:
        await until(lambda: updates, lambda: publisher.say(3, 1, 300, 5000, 0))
        assert (updates[-1].num_running_reqs, updates[-1].max_running_requests) == (3, None)
        await until(lambda: updates[-1].num_running_reqs == 6, lambda: publisher.say(*stat(6), 11, None))


@pytest.mark.parametrize(
    "frames",
    [(b"load",), (b"load", b"1234", b"\xc1"), (b"load", b"", msgspec.msgpack.encode(["Other", 1, 2, 3, 4]))],
)
async def test_odd_message_is_skipped_and_named_once(
    frames: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    publisher = Publisher()
    async with listening(publisher) as updates:
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
        await until(lambda: "unexpected message" in caplog.text, lambda: publisher.say_frames(*frames))
        await until(lambda: updates[-1].num_running_reqs == 5, lambda: publisher.say(*stat(5)))
        assert caplog.text.count("unexpected message") == 1


async def test_publisher_that_restarts_is_heard_again() -> None:
    publisher = Publisher()
    async with listening(endpoints=(publisher.endpoint,)) as updates:
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
        publisher.close()
        heir = Publisher(publisher.endpoint)
        await until(lambda: updates[-1].num_running_reqs == 2, lambda: heir.say(*stat(2)))
        heir.close()


async def test_publisher_that_comes_late_is_heard() -> None:
    gone = Publisher()
    gone.close()
    async with listening(endpoints=(gone.endpoint,)) as updates:
        publisher = Publisher(gone.endpoint)
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
        publisher.close()


async def test_cancelled_listener_leaves_no_reader_and_no_socket() -> None:
    publisher = Publisher()
    loop = asyncio.get_running_loop()
    selector: Any = getattr(loop, "_selector")  # noqa: B009
    watched = len(selector.get_map())
    async with listening(publisher) as updates:
        await until(lambda: updates, lambda: publisher.say(*stat(1)))
    assert len(selector.get_map()) == watched
