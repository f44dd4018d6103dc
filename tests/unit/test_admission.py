"""Admission: who gets a pair, who waits, who is refused, over an in-memory network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve.balancer.admission import MAX_OVERTAKEN
from pdserve.balancer.fleet import Fleet
from pdserve.balancer.reservation import Reservation
from pdserve.errors import NoWorkerError, WorkerRejected, WorkerUnreachable
from pdserve.types import RequestShape, WorkerInfo
from tests.unit.fleet_network import (
    D0,
    D1,
    P0,
    P1,
    SHAPE,
    Network,
    all_ready,
    loads,
    running_fleet,
    sampled,
    until,
    worker_states,
)

LARGE = RequestShape(prompt_tokens=800, max_new_tokens=16)
FREE = 0.01
"""Longest wait of a request that should not have to wait, or that cannot be served."""


@asynccontextmanager
async def known_fleet(network: Network, *members: WorkerInfo, **settings: object) -> AsyncIterator[Fleet]:
    """A fleet whose members are ready and have told their load; polls go on, quickly."""
    async with running_fleet(network, **settings) as fleet:
        fleet.apply(members)
        await all_ready(fleet)
        await sampled(fleet)
        yield fleet


async def take(fleet: Fleet, shape: RequestShape = SHAPE) -> Reservation:
    """Reserve what should be had at once."""
    return await fleet.reserve(shape, timeout_s=FREE)


def give(reservation: Reservation) -> None:
    """End a request well."""
    reservation.release(prefill_ok=True, decode_ok=True)


class Line:
    """Clients that wait; ``served`` has their names in the order in which they got a pair,
    ``refused`` what the others were told."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.served: list[str] = []
        self.refused: dict[str, str] = {}
        self.held: dict[str, Reservation] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, name: str, shape: RequestShape = SHAPE, **how: object) -> None:
        """Stand in line; returns when the client does."""
        length = self.fleet.num_waiting
        self.tasks[name] = asyncio.create_task(self._client(name, shape, how))
        await until(lambda: self.fleet.num_waiting == length + 1 or name in self.served)

    async def _client(self, name: str, shape: RequestShape, how: dict[str, object]) -> None:
        try:
            self.held[name] = await self.fleet.reserve(shape, **{"timeout_s": 5, **how})  # type: ignore[arg-type]
        except NoWorkerError as exc:
            self.refused[name] = str(exc)
        else:
            self.served.append(name)

    async def until_served(self, *names: str) -> None:
        """Wait until these, and in this order, have been served; nobody else."""
        await until(lambda: len(self.served) >= len(names))
        assert self.served == list(names)


# -- room on decode --------------------------------------------------------------------------


async def test_a_decode_worker_gets_no_more_requests_than_it_runs_at_once() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=2)
    async with known_fleet(network, P0, D0) as fleet:
        first, _ = await take(fleet), await take(fleet)
        with pytest.raises(
            NoWorkerError, match=r"all 1 usable decode servers are full: decode-0: 2 of 2 req"
        ):
            await take(fleet)
        give(first)
        await take(fleet)


async def test_other_users_requests_take_slots_too() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=4, num_running_reqs=3)
    async with known_fleet(network, P0, D0) as fleet:
        await take(fleet)
        with pytest.raises(NoWorkerError, match="4 of 4 requests"):
            await take(fleet)


async def test_only_workers_with_room_are_chosen_whatever_the_policy_likes() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=1)
    network[D1].loads = loads(max_running_requests=9)
    async with known_fleet(network, P0, D0, D1, policy="round_robin") as fleet:
        held = [await take(fleet) for _ in range(10)]
        assert [r.pair.decode.worker_id for r in held].count(D0.worker_id) == 1


async def test_the_kv_of_a_decode_worker_is_promised_only_once() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    shape = RequestShape(prompt_tokens=200, max_new_tokens=10_000)
    async with known_fleet(network, P0, D0, load_poll_s=60.0) as fleet:
        await take(fleet, shape)  # 200 and SGLang's reserve of 512
        assert fleet.workers()[1].promised_tokens == 712
        with pytest.raises(NoWorkerError, match="712 of 1000 KV tokens promised"):
            await take(fleet, shape)
        await take(fleet, RequestShape(prompt_tokens=200, max_new_tokens=16))


async def test_kv_that_others_use_is_not_promised() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=2000, num_total_tokens=1500)
    async with known_fleet(network, P0, D0) as fleet:
        await take(fleet)
        with pytest.raises(NoWorkerError, match="KV tokens promised"):
            await take(fleet, RequestShape(prompt_tokens=400, max_new_tokens=16))
        network[D0].loads = loads(max_total_num_tokens=2000, num_total_tokens=200)
        await fleet.reserve(RequestShape(prompt_tokens=400, max_new_tokens=16), timeout_s=5)


async def test_promises_end_with_their_legs() -> None:
    network = Network()
    network[D0].loads = network[P0].loads = loads(max_total_num_tokens=10_000)
    async with known_fleet(network, P0, D0) as fleet:
        prefill, decode = fleet.workers()
        reservation = await take(fleet)
        assert (prefill.promised_tokens, decode.promised_tokens, decode.reserved_tokens) == (100, 116, 16)
        reservation.prefill_finished()
        assert (prefill.promised_tokens, prefill.num_inflight, decode.num_inflight) == (0, 0, 1)
        give(reservation)
        assert (prefill.num_inflight, decode.num_inflight) == (0, 0)
        assert (decode.promised_tokens, decode.reserved_tokens) == (0, 0)


# -- room on prefill -------------------------------------------------------------------------


async def test_a_prefill_worker_gets_no_longer_a_queue_than_configured() -> None:
    async with known_fleet(Network(), P0, D0, prefill_queue_s=1.0, load_poll_s=60.0) as fleet:
        rate = fleet.workers()[0].view.prefill_tokens_s
        long = RequestShape(prompt_tokens=int(rate * 0.6), max_new_tokens=1)
        first = await take(fleet, long)
        await take(fleet, long)
        with pytest.raises(
            NoWorkerError, match=r"usable prefill servers are full: prefill-0: .* tokens queued"
        ):
            await take(fleet)
        first.prefill_finished()
        await take(fleet)


async def test_a_prefill_worker_is_not_promised_more_kv_than_it_has() -> None:
    network = Network()
    network[P0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        await take(fleet, LARGE)
        with pytest.raises(NoWorkerError, match="800 of 1000 KV tokens promised"):
            await take(fleet, LARGE)


# -- what can never fit ----------------------------------------------------------------------


async def test_a_request_larger_than_every_pool_reaches_sglang_at_once() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        await take(fleet, LARGE)
        giant = await take(fleet, RequestShape(prompt_tokens=5000, max_new_tokens=16))
        assert fleet.workers()[1].promised_tokens == 816
        give(giant)


async def test_a_request_goes_to_the_worker_that_is_large_enough() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=500)
    network[D1].loads = loads(max_total_num_tokens=5000)
    async with known_fleet(network, P0, D0, D1) as fleet:
        held = [await take(fleet, LARGE) for _ in range(4)]
        assert {r.pair.decode.worker_id for r in held} == {D1.worker_id}


async def test_an_empty_worker_takes_a_request_whose_answer_might_not_fit() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=900)
    async with known_fleet(network, P0, D0) as fleet:
        await take(fleet, RequestShape(prompt_tokens=800, max_new_tokens=4096))


# -- the queue -------------------------------------------------------------------------------


async def test_the_queue_is_served_by_priority_then_by_arrival() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await take(fleet), Line(fleet)
        for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]:
            await line.join(name, RequestShape(prompt_tokens=10, max_new_tokens=1, priority=priority))
        for count, name in enumerate("bdace", start=1):
            give(current)
            await until(lambda count=count: len(line.served) == count)  # type: ignore[misc]
            current = line.held[name]
        assert line.served == list("bdace")


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=2) as fleet:
        await take(fleet)
        line = Line(fleet)
        await line.join("a")
        await line.join("b")
        with pytest.raises(
            NoWorkerError, match=r"2 requests wait already: 1 requests are under way"
        ) as caught:
            await fleet.reserve(SHAPE, timeout_s=60)
        assert caught.value.retry_after_s >= 1
        assert fleet.num_waiting == 2
        assert fleet.admission.shed == {"queue_full": 1}


async def test_a_request_of_higher_priority_takes_the_place_of_a_lower_one_in_a_full_queue() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=1) as fleet:
        current, line = await take(fleet), Line(fleet)
        await line.join("low")
        line.tasks["high"] = asyncio.create_task(
            line._client("high", RequestShape(prompt_tokens=10, max_new_tokens=1, priority=1), {})
        )
        await line.tasks["low"]
        assert "no less priority" in line.refused["low"]
        give(current)
        await line.until_served("high")


async def test_without_a_queue_nobody_waits() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=0) as fleet:
        await take(fleet)
        with pytest.raises(NoWorkerError, match="0 requests wait already"):
            await fleet.reserve(SHAPE, timeout_s=60)


async def test_the_advice_to_come_back_follows_the_completion_rate() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=0) as fleet:
        completions = fleet.admission.completions
        completions._marks.clear()
        completions.mark(0.0)
        completions.total += 20
        assert completions.per_s(10.0) == 2.0
        assert completions.retry_after_s(100, 10.0) == 50.0
        assert completions.retry_after_s(1, 10.0) == 1.0
        assert completions.per_s(1000.0) == 0.0


async def test_max_concurrent_requests_bounds_the_whole_fleet() -> None:
    async with known_fleet(Network(), P0, P1, D0, D1, max_concurrent_requests=3) as fleet:
        held = [await take(fleet) for _ in range(3)]
        with pytest.raises(NoWorkerError, match="3 requests are under way, which is the limit"):
            await take(fleet)
        give(held[0])
        await take(fleet)


async def test_a_client_that_leaves_the_queue_is_out_of_it_at_once() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await take(fleet), Line(fleet)
        for name in "abc":
            await line.join(name)
        line.tasks["a"].cancel()
        await asyncio.wait([line.tasks["a"]])
        assert fleet.num_waiting == 2
        give(current)
        await line.until_served("b")


async def test_any_mixture_of_ends_leaves_nothing_promised() -> None:
    network = Network()
    network[D0].loads = loads(max_running_requests=3, max_total_num_tokens=2000)
    async with known_fleet(network, P0, P1, D0, D1, queue_size=50) as fleet:

        async def client(number: int) -> None:
            shape = RequestShape(prompt_tokens=37 * number % 900, max_new_tokens=16, priority=number % 3)
            try:
                reservation = await fleet.reserve(shape, timeout_s=0.001 * (number % 40))
            except NoWorkerError:
                return
            try:
                await asyncio.sleep(0.001 * (number % 7))
                if number % 2:
                    reservation.prefill_finished()
            finally:
                is_ok = None if number % 5 else True
                reservation.release(prefill_ok=is_ok, decode_ok=is_ok)

        tasks = [asyncio.create_task(client(number)) for number in range(300)]
        for number, task in enumerate(tasks):
            if number % 4 == 0:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert fleet.num_waiting == fleet.admission.placement.num_open == 0
        for member in fleet.workers():
            assert (member.num_inflight, member.promised_tokens, member.reserved_tokens) == (0, 0, 0)
            assert member.held_for is None


# -- large and small -------------------------------------------------------------------------


async def test_a_request_that_does_not_fit_lets_smaller_ones_pass_but_not_for_ever() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await take(fleet) for _ in range(8)]  # 116 tokens each
        line = Line(fleet)
        await line.join("large", LARGE)
        passed = 0
        while "large" not in line.served:
            name = f"small{passed}"
            await line.join(name)
            give(small.pop(0))
            await until(lambda name=name: name in line.served or fleet.num_waiting == 2)  # type: ignore[misc]
            if name not in line.served:
                break
            small.append(line.held[name])
            passed += 1
        assert passed == MAX_OVERTAKEN
        while small:
            give(small.pop())
        await until(lambda: "large" in line.served)
        assert line.served[MAX_OVERTAKEN] == "large"
        give(line.held["large"])
        await until(lambda: len(line.served) == MAX_OVERTAKEN + 2)


async def test_a_pair_held_for_a_client_that_leaves_is_given_to_others() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await take(fleet) for _ in range(8)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.admission.line:
            waiter.num_overtaken = MAX_OVERTAKEN - 1
        await line.join("one")
        await line.join("two")
        give(small.pop())
        await line.until_served("one")
        give(small.pop())
        assert fleet.workers()[1].held_for is not None
        line.tasks["large"].cancel()
        await line.until_served("one", "two")


async def test_while_one_pair_is_held_the_rest_of_the_fleet_goes_on() -> None:
    network = Network()
    for info in (D0, D1):
        network[info].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, P1, D0, D1) as fleet:
        small = [await take(fleet) for _ in range(16)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.admission.line:
            waiter.num_overtaken = MAX_OVERTAKEN - 1
        await line.join("one")
        give(small.pop())
        await line.until_served("one")
        held = [member.worker_id for member in fleet.workers() if member.held_for]
        assert len(held) == 2
        await line.join("two")
        give(next(r for r in small if r.pair.decode.worker_id not in held))
        await line.until_served("one", "two")


async def test_a_request_whose_pairs_are_excluded_holds_nobody_up() -> None:
    async with known_fleet(Network(), P0, P1, D0) as fleet:
        line = Line(fleet)
        every = frozenset(record.key for record in fleet.pairs())
        await line.join("retried", exclude=every)
        await line.join("other")
        await line.until_served("other")
        assert fleet.num_waiting == 1


async def test_a_lost_pair_is_held_no_longer() -> None:
    network = Network()
    network[D0].loads = loads(max_total_num_tokens=1000)
    async with known_fleet(network, P0, D0) as fleet:
        small = [await take(fleet) for _ in range(8)]
        line = Line(fleet)
        await line.join("large", LARGE)
        for waiter in fleet.admission.line:
            waiter.num_overtaken = MAX_OVERTAKEN
        await line.join("one")
        give(small.pop())
        await line.until_served("one")
        network[D0].is_down = True
        small.pop().release(prefill_ok=None, decode_ok=False, error=WorkerUnreachable(D0.url, "reset"))
        assert worker_states(fleet)["decode-0"] == "suspect"
        assert [member.held_for for member in fleet.workers()] == [None, None]
        for each in [*small, line.held["one"]]:
            each.release(prefill_ok=None, decode_ok=None)
        network[D0].is_down = False
        await until(lambda: "large" in line.served)


# -- overloaded ------------------------------------------------------------------------------


async def test_a_worker_that_says_it_is_full_rests_until_its_next_sample_and_is_not_blamed() -> None:
    async with known_fleet(Network(), P0, D0, D1, load_poll_s=60.0) as fleet:
        full = WorkerRejected(D0.url, 503, b"The request queue is full.")
        held = [await take(fleet) for _ in range(8)]
        on_d0 = [r for r in held if r.pair.decode == D0]
        for reservation in on_d0[:3]:
            reservation.release(prefill_ok=None, decode_ok=False, error=full)
        assert worker_states(fleet)["decode-0"] == "ready"
        assert {(await take(fleet)).pair.decode for _ in range(4)} == {D1}
        fleet.workers()[1].wake.set()  # a poll
        await sampled_one(fleet, D0)
        assert D0 in {(await take(fleet)).pair.decode for _ in range(4)}


async def sampled_one(fleet: Fleet, info: WorkerInfo) -> None:
    """Wait until that worker is not overloaded any more."""
    member = fleet.find(info.worker_id)
    assert member is not None
    await until(lambda: not member.is_overloaded)


async def test_a_worker_that_is_full_again_and_again_is_taken_out() -> None:
    async with known_fleet(Network(), P0, D0) as fleet:
        full = WorkerRejected(D0.url, 503)
        rounds = 0
        while not fleet.workers()[1].breaker.opened:
            reservation = await fleet.reserve(SHAPE, timeout_s=5)
            reservation.release(prefill_ok=None, decode_ok=False, error=full)
            await until(lambda: not fleet.workers()[1].is_overloaded)
            rounds += 1
        assert rounds == 2 * fleet.config.breaker_failures - 1


# -- why not ---------------------------------------------------------------------------------


async def test_a_fleet_without_members_says_how_to_add_some() -> None:
    async with running_fleet(Network()) as fleet:
        with pytest.raises(
            NoWorkerError, match=r"no prefill and no decode .*--prefill and --decode.*POST /work"
        ):
            await fleet.reserve(SHAPE, timeout_s=FREE)


async def test_stop_ends_every_wait() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await take(fleet), Line(fleet)
        await line.join("a")
        await fleet.stop()
        await line.tasks["a"]
        assert line.refused == {"a": "the balancer is stopping"}
        give(current)
