"""Order of the line and what objectives make of it, on a virtual clock: aging, regimes, early refusals."""

from __future__ import annotations

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.admission import MAX_OVERTAKEN
from pdserve.scheduling.queue import AGING, QueueOrder
from pdserve.scheduling.regime import Regime
from pdserve.scheduling.slo import MIN_QUEUE_S, ORDERED_QUEUE_S, QUEUE_SHARE
from tests.support.examples import n_examples
from tests.support.virtual_admission import Asked, Desk, shape

PATIENCE_S = 60.0


def one_at_a_time(**config: object) -> tuple[Desk, Asked]:
    """A fleet that serves one request at a time, and that one."""
    desk = Desk(max_concurrent_requests=1, queue_timeout_s=PATIENCE_S, queue_size=10**6, **config)
    return desk, desk.ask("current", shape(10, 1))


def serve_all(desk: Desk, first: Asked, waiting: list[Asked]) -> list[str]:
    """End what runs, again and again; the names in the order in which they were served."""
    desk.served.clear()
    desk.end(first)
    while not all(each.outcomes for each in waiting):
        desk.end(next(each for each in waiting if each.name == desk.served[-1]))
    return desk.served


# -- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "expected"), [("fcfs", "abcd"), ("shortest", "cdab"), ("auto", "abcd")])
def test_who_is_served_first(order: str, expected: str) -> None:
    desk, current = one_at_a_time(queue_order=order)
    sizes = {"a": (20_000, 10), "b": (20_000, 500), "c": (100, 10), "d": (100, 50)}
    waiting = [desk.ask(name, shape(*size)) for name, size in sizes.items()]
    assert "".join(serve_all(desk, current, waiting)) == expected


def test_priority_goes_before_least_work() -> None:
    desk, current = one_at_a_time(queue_order="shortest")
    waiting = [desk.ask("short", shape(10, 1)), desk.ask("long", shape(50_000, 4000, priority=1))]
    assert serve_all(desk, current, waiting) == ["long", "short"]


def test_a_long_request_goes_before_short_ones_that_come_much_later() -> None:
    desk, current = one_at_a_time(queue_order="shortest")
    long = desk.ask("long", shape(10_000, 1))  # a second of work
    desk.now_s += AGING * 1.5
    short = desk.ask("short", shape(10, 1))
    assert serve_all(desk, current, [long, short]) == ["long", "short"]


def test_nobody_yields_for_more_than_half_of_its_patience() -> None:
    desk, current = one_at_a_time(queue_order="shortest")
    huge = desk.ask("huge", shape(10**6, 8000))
    desk.now_s += PATIENCE_S / 2 - 1
    early = desk.ask("early", shape(10, 1))
    desk.now_s += 2
    late = desk.ask("late", shape(10, 1))
    assert serve_all(desk, current, [huge, early, late]) == ["early", "huge", "late"]


arrivals = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 200_000), st.integers(1, 8000)), min_size=1, max_size=60
)


@settings(max_examples=n_examples(80))
@given(arrivals)
def test_nobody_is_overtaken_by_those_that_come_later_than_its_aging_allows(
    rows: list[tuple[float, int, int]],
) -> None:
    """Whoever is served before an earlier one came within ``AGING`` times its work, and half its patience."""
    desk, current = one_at_a_time(queue_order="shortest")
    waiting = []
    for index, (gap_s, prompt, answer) in enumerate(rows):
        desk.now_s += gap_s
        waiting.append(desk.ask(str(index), shape(prompt, answer)))
    work = {each.name: desk.admission.work.of(each.shape).total_s for each in waiting}
    came = {each.name: each.at_s for each in waiting}
    served = serve_all(desk, current, waiting)
    for place, name in enumerate(served):
        for earlier in served[:place]:
            if came[earlier] > came[name]:
                bound_s = min(AGING * work[name], PATIENCE_S / 2)
                assert came[earlier] - came[name] <= bound_s + 1e-6


@settings(max_examples=n_examples(60))
@given(arrivals, st.floats(0.5, 3.0))
def test_the_wait_is_bounded_by_what_came_before_and_what_may_overtake(
    rows: list[tuple[float, int, int]], speed: float
) -> None:
    """Served by one server in ``work / speed`` seconds each, a request waits no longer than it takes to serve
    all that arrived before it or within its aging."""
    desk, current = one_at_a_time(queue_order="shortest")
    desk.end(current)
    start_s, events, asked = desk.now_s, [], {}
    for index, (gap_s, prompt, answer) in enumerate(rows):
        start_s += gap_s
        heapq.heappush(events, (start_s, index, prompt, answer))
    current_name, free_s = "", math.inf
    while events or free_s < math.inf:
        if events and events[0][0] <= free_s:
            desk.now_s, index, prompt, answer = heapq.heappop(events)
            asked[str(index)] = desk.ask(str(index), shape(prompt, answer))
        else:
            desk.now_s = free_s
            desk.end(asked[current_name])
            free_s = math.inf
        if free_s == math.inf and desk.served and desk.served[-1] != current_name:
            current_name = desk.served[-1]
            free_s = desk.now_s + desk.admission.work.of(asked[current_name].shape).total_s / speed
    work = {name: desk.admission.work.of(each.shape).total_s / speed for name, each in asked.items()}
    for name, each in asked.items():
        until_s = each.at_s + min(AGING * work[name] * speed, PATIENCE_S / 2)
        before_s = sum(work[other] for other, o in asked.items() if o.at_s <= until_s and other != name)
        longest_s = max(work.values())
        assert each.served_s - each.at_s <= before_s + longest_s + 1e-6


def test_a_request_that_does_not_fit_is_passed_by_smaller_ones_only_so_often() -> None:
    """Those that go before it by their work are limited by its aging, those behind it by their number."""
    desk = Desk(capacity=4000, queue_order="shortest")
    running = [desk.ask(f"first{n}", shape(100, 10)) for n in range(6)]
    large, small = desk.ask("large", shape(3000, 10)), []
    ages_s = AGING * desk.admission.work.of(large.shape).total_s
    for _ in range(60):
        if large.outcomes:
            break
        desk.now_s += 0.5
        small.append(desk.ask(f"small{len(small)}", shape(100, 10)))
        desk.end(running.pop(0))
        running = [each for each in (*running, *small) if each.outcomes and each.reservation.is_open]
    assert large.reservation
    behind = [
        each for each in small if each.at_s - large.at_s > ages_s and 0 < each.served_s < large.served_s
    ]
    assert 0 < len(behind) <= MAX_OVERTAKEN


# -- the order that follows the fleet's state ------------------------------------------------


def test_auto_turns_to_shortest_while_the_fleet_is_short_and_back() -> None:
    order = QueueOrder("auto", PATIENCE_S)
    assert not order.is_shortest
    assert order.follow(Regime.OVERLOAD) and order.is_shortest
    assert not order.follow(Regime.DECODE_SHORT)
    assert order.follow(Regime.NORMAL) and not order.is_shortest


@pytest.mark.parametrize("mode", ["fcfs", "shortest"])
def test_an_order_that_was_asked_for_stays(mode: str) -> None:
    order = QueueOrder(mode, PATIENCE_S)
    assert not any(order.follow(regime) for regime in Regime)


def overload(desk: Desk) -> None:
    """Long prefill queues and full decode servers, until the state says so."""
    for _ in range(80):
        desk.now_s += 0.25
        for worker in desk.prefills:
            desk.sample(worker, num_waiting_uncached_tokens=100_000, num_waiting_reqs=50)
        for worker in desk.decodes:
            desk.sample(worker, num_running_reqs=100)


def test_the_line_is_sorted_anew_when_the_order_changes() -> None:
    desk = Desk(max_running=100, max_concurrent_requests=1, queue_order="auto", queue_timeout_s=1e4)
    current = desk.ask("current", shape(10, 1))
    waiting = [desk.ask("long", shape(50_000, 10)), desk.ask("short", shape(10, 10))]
    assert [waiter.shape.prompt_tokens for waiter in desk.admission.queue] == [50_000, 10]
    overload(desk)
    assert desk.admission.regime.regime is Regime.OVERLOAD
    assert [waiter.shape.prompt_tokens for waiter in desk.admission.queue] == [10, 50_000]
    assert serve_all(desk, current, waiting) == ["short", "long"]


def test_under_overload_requests_wait_with_us_and_not_in_a_queue_that_cannot_be_ordered() -> None:
    desk = Desk(queue_order="auto", max_running=10_000)
    second = shape(10_000, 1)
    calm = [desk.ask(str(n), second, waits=False) for n in range(10)]
    assert all(each.outcomes for each in calm)
    for each in calm:
        desk.end(each)
    overload(desk)
    desk.sample(desk.prefills[0])
    held = [desk.ask(str(n), second, waits=False) for n in range(10)]
    assert sum(bool(each.outcomes) for each in held) == ORDERED_QUEUE_S + 1


# -- an objective for the first token --------------------------------------------------------


def test_prefill_queues_are_kept_to_a_part_of_the_objective() -> None:
    desk = Desk(slo_ttft_s=8.0)
    asked = [desk.ask(str(n), shape(1000, 1)) for n in range(40)]  # a tenth of a second each
    assert sum(bool(each.outcomes) for each in asked) == 8.0 * QUEUE_SHARE / 0.1 + 1
    assert Desk(slo_ttft_s=0.1).admission._limits().prefill_queue_s == MIN_QUEUE_S


def test_what_cannot_get_its_first_token_in_time_is_refused_at_once() -> None:
    desk = Desk(slo_ttft_s=2.0)
    asked = [desk.ask(str(n), shape(4000, 1)) for n in range(12)]  # 0.4 s each: five make it
    served = [each for each in asked if each.served_s >= 0]
    refused = [each for each in asked if each.outcomes and each.served_s < 0]
    assert len(served) + len(desk.admission.queue) == 5
    assert len(refused) == 7
    assert desk.admission.shed == {"slo": 7}
    assert "no first token within 2 s" in str(refused[0].refusal)
    assert refused[0].refusal.retry_after_s >= 1


def test_a_request_that_is_late_by_waiting_is_refused_then() -> None:
    desk = Desk(slo_ttft_s=2.0, max_concurrent_requests=1)
    current = desk.ask("current", shape(10, 1))
    waiting = desk.ask("waiting", shape(4000, 1))
    desk.tick(1.5)
    assert not waiting.outcomes
    desk.tick(0.2)
    assert desk.admission.shed == {"slo": 1}
    assert waiting.refusal
    desk.end(current)
    assert desk.is_clear


def test_a_refused_one_makes_room_for_those_behind_it() -> None:
    desk = Desk(slo_ttft_s=2.0, max_concurrent_requests=1, queue_order="fcfs")
    current = desk.ask("current", shape(10, 1))
    large = desk.ask("large", shape(15_000, 1))  # can wait half a second
    small = desk.ask("small", shape(100, 1))
    desk.tick(0.6)
    desk.end(current)
    assert large.refusal
    assert small.reservation


def test_what_never_could_make_it_is_served_when_there_is_room() -> None:
    desk = Desk(slo_ttft_s=2.0)
    first = desk.ask("hopeless", shape(100_000, 1))
    assert first.reservation
    second = desk.ask("another", shape(100_000, 1))
    desk.tick(20.0)
    assert not second.outcomes
    desk.end(first)
    assert second.reservation


def test_what_never_could_make_it_makes_way_for_those_that_can() -> None:
    desk = Desk(slo_ttft_s=2.0, max_concurrent_requests=1, queue_order="fcfs")
    current = desk.ask("current", shape(10, 1))
    waiting = [desk.ask("hopeless", shape(100_000, 1)), desk.ask("quick", shape(10, 1))]
    assert serve_all(desk, current, waiting) == ["quick", "hopeless"]


def test_time_beyond_computing_is_learned_and_counted() -> None:
    """Each leg takes a second longer than queue and prefill explain: of two seconds one is left."""
    desk = Desk(slo_ttft_s=2.0)
    for n in range(600):
        asked = desk.ask(str(n), shape(10, 1))
        desk.now_s += 1.001
        desk.end(asked)
    assert desk.admission.work.overhead_s == pytest.approx(1.0, rel=0.05)
    first = desk.ask("first", shape(7000, 1))
    assert first.reservation
    assert desk.ask("second", shape(5000, 1)).refusal


def test_without_an_objective_nobody_is_refused() -> None:
    desk = Desk()
    desk.ask("first", shape(10**6, 1))
    waiting = [desk.ask(str(n), shape(10**6, 1)) for n in range(5)]
    desk.tick(30.0)
    assert not any(each.outcomes and each.served_s < 0 for each in waiting)
    assert not desk.admission.shed
