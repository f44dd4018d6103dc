"""The queue: who waits, who is served when, who is refused, over an in-memory network."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.errors import NoWorkerError, WorkerUnreachable
from pdserve.scheduling.admission import MAX_OVERTAKEN
from pdserve.types import RequestShape
from tests.support.fleet_network import (
    D0,
    D1,
    LARGE,
    P0,
    P1,
    SHAPE,
    Line,
    Network,
    known_fleet,
    loads,
    prefill_finished,
    release,
    reserve,
    until,
    worker_states,
)

# -- the queue -------------------------------------------------------------------------------


async def test_the_queue_is_served_by_priority_then_by_arrival() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
            await line.join(name, RequestShape(prompt_tokens=10, max_new_tokens=1, priority=priority))
        for count, name in enumerate("bdace", start=1):
            release(fleet, current)
            await until(lambda count=count: len(line.served) == count)  # type: ignore[misc]
            current = line.held[name]
        assert line.served == list("bdace")


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=2) as fleet:
        await reserve(fleet)
        line = Line(fleet)
        await line.join("a")
        await line.join("b")
        with pytest.raises(
            NoWorkerError, match=r"2 requests wait already: 1 requests are under way"
        ) as caught:
            await reserve(fleet, SHAPE, timeout_s=60)
        assert caught.value.retry_after_s >= 1
        assert fleet.scheduler.num_waiting == 2
        assert fleet.scheduler.admission.shed == {"queue_full": 1}


async def test_a_request_of_higher_priority_takes_the_place_of_a_lower_one_in_a_full_queue() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        await line.join("low")
        line.tasks["high"] = asyncio.create_task(
            line._client("high", RequestShape(prompt_tokens=10, max_new_tokens=1, priority=1), {})
        )
        await line.tasks["low"]
        assert "no less priority" in line.refused["low"]
        release(fleet, current)
        await line.until_served("high")


async def test_without_a_queue_nobody_waits() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=0) as fleet:
        await reserve(fleet)
        with pytest.raises(NoWorkerError, match="0 requests wait already"):
            await reserve(fleet, SHAPE, timeout_s=60)


async def test_the_advice_to_come_back_follows_the_completion_rate() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=0) as fleet:
        completions = fleet.scheduler.admission.completions
        completions._marks.clear()
        completions.mark(0.0)
        completions.total += 20
        assert completions.per_s(10.0) == 2.0
        assert completions.retry_after_s(100, 10.0) == 50.0
        assert completions.retry_after_s(1, 10.0) == 1.0
        assert completions.per_s(1000.0) == 0.0


async def test_max_concurrent_requests_bounds_the_whole_fleet() -> None:
    async with known_fleet(Network(), P0, P1, D0, D1, max_concurrent_requests=3) as fleet:
        held = [await reserve(fleet) for _ in range(3)]
        with pytest.raises(NoWorkerError, match="3 requests are under way, which is the limit"):
            await reserve(fleet)
        release(fleet, held[0])
        await reserve(fleet)


async def test_a_client_that_leaves_the_queue_is_out_of_it_at_once() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        for name in "abc":
            await line.join(name)
        line.tasks["a"].cancel()
        await asyncio.wait([line.tasks["a"]])
        assert fleet.scheduler.num_waiting == 2
        release(fleet, current)
        await line.until_served("b")


async def test_any_mixture_of_ends_leaves_nothing_promised() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=3, max_total_num_tokens=2000)
    async with known_fleet(network, P0, P1, D0, D1, queue_size=50) as fleet:

        async def client(number: int) -> None:
            shape = RequestShape(prompt_tokens=37 * number % 900, max_new_tokens=16, priority=number % 3)
            try:
                reservation = await reserve(fleet, shape, timeout_s=0.001 * (number % 40))
            except NoWorkerError:
                return
            try:
                await asyncio.sleep(0.001 * (number % 7))
                if number % 2:
                    prefill_finished(fleet, reservation)
            finally:
                is_ok = None if number % 5 else True
                release(fleet, reservation, prefill_ok=is_ok, decode_ok=is_ok)

        tasks = [asyncio.create_task(client(number)) for number in range(300)]
        for number, task in enumerate(tasks):
            if number % 4 == 0:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert fleet.scheduler.num_waiting == fleet.scheduler.admission.placement.num_open == 0
        for member in fleet.workers():
            assert (member.num_inflight, member.slots.promised_tokens, member.slots.reserved_tokens) == (
                0,
                0,
                0,
            )
            assert member.slots.held_for is None


# -- large and small -------------------------------------------------------------------------


async def test_a_request_that_does_not_fit_lets_smaller_ones_pass_but_not_for_ever() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await reserve(fleet) for _ in range(8)]  # 116 tokens each
        line = Line(fleet)
        await line.join("large", LARGE)
        passed = 0
        while "large" not in line.served:
            name = f"small{passed}"
            await line.join(name)
            release(fleet, small.pop(0))
            await until(lambda name=name: name in line.served or fleet.scheduler.num_waiting == 2)  # type: ignore[misc]
            if name not in line.served:
                break
            small.append(line.held[name])
            passed += 1
        assert passed == MAX_OVERTAKEN
        while small:
            release(fleet, small.pop())
        await until(lambda: "large" in line.served)
        assert line.served[MAX_OVERTAKEN] == "large"
        release(fleet, line.held["large"])
        await until(lambda: len(line.served) == MAX_OVERTAKEN + 2)


async def test_a_pair_held_for_a_client_that_leaves_is_given_to_others() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await reserve(fleet) for _ in range(8)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.scheduler.admission.queue:
            waiter.num_overtaken = MAX_OVERTAKEN - 1
        await line.join("one")
        await line.join("two")
        release(fleet, small.pop())
        await line.until_served("one")
        release(fleet, small.pop())
        assert fleet.workers()[1].slots.held_for is not None
        line.tasks["large"].cancel()
        await line.until_served("one", "two")


async def test_while_one_pair_is_held_the_rest_of_the_fleet_goes_on() -> None:
    network = Network()
    for info in (D0, D1):
        network[info].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, P1, D0, D1) as fleet:
        small = [await reserve(fleet) for _ in range(16)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.scheduler.admission.queue:
            waiter.num_overtaken = MAX_OVERTAKEN - 1
        await line.join("one")
        release(fleet, small.pop())
        await line.until_served("one")
        held = [member.worker_id for member in fleet.workers() if member.slots.held_for]
        assert len(held) == 2
        await line.join("two")
        release(fleet, next(r for r in small if r.pair.decode.worker_id not in held))
        await line.until_served("one", "two")


async def test_a_request_whose_pairs_are_excluded_holds_nobody_up() -> None:
    async with known_fleet(Network(), P0, P1, D0) as fleet:
        line = Line(fleet)
        every = frozenset(record.key for record in fleet.pairs())
        await line.join("retried", exclude=every)
        await line.join("other")
        await line.until_served("other")
        assert fleet.scheduler.num_waiting == 1


async def test_a_lost_pair_is_held_no_longer() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await reserve(fleet) for _ in range(8)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.scheduler.admission.queue:
            waiter.num_overtaken = MAX_OVERTAKEN
        await line.join("one")
        release(fleet, small.pop())
        await line.until_served("one")
        network[D0].is_down = True
        release(fleet, small.pop(), decode_ok=False, error=WorkerUnreachable(D0.url, "reset"))
        assert worker_states(fleet)["decode-0"] == "suspect"
        assert [member.slots.held_for for member in fleet.workers()] == [None, None]
        for each in [*small, line.held["one"]]:
            release(fleet, each, prefill_ok=None, decode_ok=None)
        network[D0].is_down = False
        await until(lambda: "large" in line.served)


async def test_a_request_that_would_be_late_is_refused_at_once_and_told_when_to_come_back() -> None:
    async with known_fleet(Network(), P0, D0, slo_ttft_s=1.0, load_poll_s=60.0) as fleet:
        rate = fleet.workers()[0].view.prefill_tokens_s
        shape = RequestShape(prompt_tokens=int(rate * 0.6), max_new_tokens=1)
        current = await reserve(fleet, shape, timeout_s=60)
        with pytest.raises(NoWorkerError, match=r"no first token within 1 s: .*prefill-0") as caught:
            await reserve(fleet, shape, timeout_s=60)
        assert caught.value.retry_after_s >= 1
        assert (fleet.scheduler.num_waiting, fleet.scheduler.admission.shed) == (0, {"slo": 1})
        prefill_finished(fleet, current)
        await reserve(fleet, shape, timeout_s=60)


async def test_stop_ends_every_wait() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        await line.join("a")
        await fleet.stop()
        await line.tasks["a"]
        assert line.refused == {"a": "the balancer is stopping"}
        release(fleet, current)
