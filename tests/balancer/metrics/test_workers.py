"""What the balancer tells of its workers' speed, their KV and the queue; the clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from pdserve.balancer.fleet.transfer_poll import TransferCounters, TransferPoller
from pdserve.balancer.fleet.worker import Worker
from pdserve.balancer.metrics.pairs import MAX_PAIRS, NUM_TRANSFERS, PairTraffic
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.http.client import HttpClient
from pdserve.plugin.stats import COUNTERS
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.policy import WorkerView
from pdserve.scheduling.workers import WorkerSlots
from pdserve.types import InstanceId, Pair, Role, WorkerLoad
from tests.support.control_worker import ControlWorker
from tests.support.fleet_network import D0, P0, until, worker

KEY = (P0.instance_id, D0.instance_id)


def member_of(info: Any) -> Worker:
    return Worker(WorkerSlots(WorkerView(info)))


@dataclass
class Bench:
    """Figures over two workers, without a fleet; ``waiting`` is the queue's length."""

    now_s: float = 1000.0
    waiting: int = 0
    workers: list[Worker] = field(default_factory=lambda: [member_of(P0), member_of(D0)])
    table: LoadTable = field(default_factory=LoadTable)

    def __post_init__(self) -> None:
        for member in self.workers:
            self.table.add(member.info)
        self.figures = WorkerMetrics(lambda: self.now_s)

    def sample(self, member: Worker, **figures: object) -> None:
        load = WorkerLoad(self.now_s, **figures)  # type: ignore[arg-type]
        self.table.record(member.instance_id, Sample(load, self.now_s))

    def tick(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        self.figures.look(self.workers, self.table, self.waiting)


def test_speed_is_that_of_the_counters_over_ten_seconds() -> None:
    bench = Bench()
    prefill, decode = bench.workers
    for second in range(30):
        bench.sample(prefill, total_prefill_uncached_tokens=5000 + 200 * second)
        generated = 70.0 * second if second < 20 else 70.0 * 19 + 10.0 * (second - 19)
        bench.sample(decode, decode_moments=(1, 1, 1, 1, 1, generated))
        bench.tick()
    assert bench.figures.of(prefill).tokens_s == pytest.approx(200)
    assert bench.figures.of(decode).tokens_s == pytest.approx(10)


def test_speed_is_not_known_before_two_samples_nor_across_a_restart() -> None:
    bench = Bench()
    prefill = bench.workers[0]
    bench.tick()
    assert bench.figures.of(prefill).tokens_s is None
    bench.sample(prefill, total_prefill_uncached_tokens=900)
    bench.tick()
    bench.tick()  # the same sample again
    assert bench.figures.of(prefill).tokens_s is None
    bench.sample(prefill, total_prefill_uncached_tokens=1000)
    bench.tick()
    assert bench.figures.of(prefill).tokens_s == pytest.approx(50)
    bench.sample(prefill, total_prefill_uncached_tokens=10)
    bench.tick()
    assert bench.figures.of(prefill).tokens_s is None


def test_a_worker_that_left_is_forgotten() -> None:
    bench = Bench()
    bench.tick()
    bench.tick()
    decode = bench.workers.pop()
    joined_s = bench.figures.of(decode).joined_s
    bench.tick()
    assert bench.figures.of(decode).joined_s == bench.now_s > joined_s


def test_the_queue_is_shown_by_its_longest_in_each_step() -> None:
    bench = Bench()
    for second in range(30):
        bench.waiting = {7: 5, 8: 2, 21: 9}.get(second, 0)
        bench.tick()
    bench.tick()
    assert bench.figures.waiting() == [None] * 54 + [0, 5, 0, 0, 9, 0]


def test_a_pause_of_the_watch_is_unknown_not_zero() -> None:
    bench = Bench()
    bench.tick()
    bench.now_s += 20
    assert bench.figures.waiting()[-4:] == [0, None, None, None]


# -- KV that was sent --------------------------------------------------------------------------


def counters(**values: int) -> TransferCounters:
    return TransferCounters(**values)


def test_what_is_read_is_what_workers_count() -> None:
    assert set(TransferCounters.__struct_fields__) <= set(COUNTERS)


def test_kv_sent_is_told_from_the_growth_of_the_counters() -> None:
    bench = Bench()
    prefill = bench.workers[0]
    tell = bench.figures.record_transfers
    tell(prefill, counters(kv_bytes=1000, transfers=5, latency_us=10**6, packed_chunks=3))
    first = bench.figures.of(prefill).sent
    assert first is not None
    assert (first.bytes_s, first.path, first.transfer_s) == (0.0, "", None)
    bench.now_s += 5
    tell(
        prefill,
        counters(kv_bytes=6000, transfers=9, latency_us=10**6 + 80_000, packed_chunks=3, direct_chunks=4),
    )
    sent = bench.figures.of(prefill).sent
    assert sent is not None
    assert (sent.bytes_s, sent.path, sent.transfer_s) == (pytest.approx(1000), "direct", pytest.approx(0.02))
    counts, seconds = bench.figures.kv_transfer.totals((0.01, 0.02, 0.05))
    assert (counts, seconds) == ([0, 4, 4, 4], pytest.approx(0.08))


def test_an_idle_worker_keeps_its_path_and_a_restarted_one_begins_anew() -> None:
    bench = Bench()
    prefill = bench.workers[0]
    for kv_bytes, packed in ((100, 1), (200, 2), (200, 2)):
        bench.now_s += 5
        bench.figures.record_transfers(
            prefill, counters(kv_bytes=kv_bytes, transfers=packed, packed_chunks=packed)
        )
    sent = bench.figures.of(prefill).sent
    assert sent is not None
    assert (sent.bytes_s, sent.path) == (0.0, "packed")
    bench.figures.record_transfers(prefill, counters(kv_bytes=10, transfers=1, direct_chunks=1))
    sent = bench.figures.of(prefill).sent
    assert sent is not None
    assert (sent.bytes_s, sent.path, sent.counters.kv_bytes) == (0.0, "", 10)


def test_both_ways_at_once_are_mixed() -> None:
    bench = Bench()
    prefill = bench.workers[0]
    bench.figures.record_transfers(prefill, counters())
    bench.figures.record_transfers(prefill, counters(direct_chunks=1, packed_chunks=1))
    sent = bench.figures.of(prefill).sent
    assert sent is not None
    assert sent.path == "mixed"


@dataclass
class Heard:
    """A listener that writes down."""

    told_: list[TransferCounters] = field(default_factory=list)

    def record_transfers(self, worker: Worker, counters: TransferCounters) -> None:
        self.told_.append(counters)


@asynccontextmanager
async def keeper(server: ControlWorker, heard: Heard) -> AsyncIterator[asyncio.Task[None]]:
    from msgspec import structs

    pool = HttpClient(connect_s=1.0)
    member = member_of(structs.replace(P0, url=server.url))
    member.answers.set()
    task = asyncio.create_task(TransferPoller(member, pool, (), heard, poll_s=0.001).run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await pool.close()


async def test_a_pdserve_worker_is_asked_again_and_again() -> None:
    async with ControlWorker() as server:
        heard = Heard()
        server.tell("/pdserve/instance", {"pid": 1, "transfer": {"kv_bytes": 7, "transfers": 1, "new": 3}})
        async with keeper(server, heard):
            await until(lambda: len(heard.told_) >= 3)
    assert heard.told_[0] == TransferCounters(kv_bytes=7, transfers=1)


@pytest.mark.parametrize(
    ("document", "status"), [({"detail": "Not Found"}, 404), ({}, 200), (b"<html>", 200), ([1], 200)]
)
async def test_a_stock_server_is_asked_once(document: object, status: int) -> None:
    async with ControlWorker() as server:
        heard = Heard()
        server.tell("/pdserve/instance", document, status)
        async with keeper(server, heard) as task:
            async with asyncio.timeout(5):
                await task
        assert server.targets == ["GET /pdserve/instance"]
    assert not heard.told_


async def test_a_worker_that_is_down_or_stumbles_is_asked_again() -> None:
    async with ControlWorker() as server:
        heard = Heard()
        server.tell("/pdserve/instance", b"oops", 500)
        async with keeper(server, heard):
            await until(lambda: len(server.targets) >= 2)
            server.tell("/pdserve/instance", {"transfer": {"kv_bytes": 1}})
            await until(lambda: heard.told_)


# -- pairs -------------------------------------------------------------------------------------


def test_a_pairs_rate_is_of_the_last_minute() -> None:
    traffic, pair = PairTraffic(), Pair(P0, D0)
    now_s = 0.0
    for step in range(60):
        for _ in range(5):
            traffic.carried(pair, 100 if step >= 30 else 10_000, 0.1, now_s)
        now_s += 5
        traffic.mark(now_s)
    flow = traffic.find(KEY)
    assert flow is not None
    assert flow.prompt_tokens == 5 * 30 * (100 + 10_000)
    assert flow.tokens_s == pytest.approx(100, rel=0.01)


def test_a_pairs_median_is_of_its_last_streams() -> None:
    traffic, pair = PairTraffic(), Pair(P0, D0)
    traffic.carried(pair, 1, None, 0.0)
    traffic.mark(5.0)
    flow = traffic.find(KEY)
    assert flow is not None
    assert flow.transfer_p50_s is None
    traffic.carried(pair, 1, 3.0, 6.0)
    traffic.mark(10.0)
    assert flow.transfer_p50_s == 3.0
    for _ in range(NUM_TRANSFERS):
        traffic.carried(pair, 1, 0.5, 11.0)
    traffic.mark(15.0)
    assert flow.transfer_p50_s == 0.5
    assert len(flow.transfers) == NUM_TRANSFERS


def test_pairs_of_long_gone_workers_are_forgotten() -> None:
    traffic, busy = PairTraffic(), Pair(P0, D0)
    traffic.carried(busy, 1, None, 0.0)
    for index in range(1, MAX_PAIRS + 10):
        traffic.carried(Pair(worker(Role.PREFILL, index), D0), 1, None, float(index))
    traffic.carried(busy, 1, None, 1e6)
    traffic.mark(1e6)
    assert traffic.find((InstanceId("prefill10"), D0.instance_id)) is None
    assert traffic.find((InstanceId("prefill11"), D0.instance_id)) is not None
    flow = traffic.find(KEY)
    assert flow is not None
    assert flow.prompt_tokens == 2
