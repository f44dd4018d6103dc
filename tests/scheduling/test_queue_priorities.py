"""The queue's order of priorities is the workers' own: SGLang's flags say which end goes first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.scheduling.queue import PriorityOrder
from pdserve.types import RequestShape, WorkerInfo
from tests.support.fleet_network import (
    D0,
    P0,
    P1,
    Answer,
    Line,
    Network,
    all_ready,
    known_fleet,
    release,
    reserve,
    running_fleet,
    until,
)


def told(info: WorkerInfo, is_low_first: bool | None, default: int | None = None) -> WorkerInfo:
    """The same worker with these flags."""
    return msgspec.structs.replace(info, low_priority_first=is_low_first, default_priority=default)


def shape(priority: int | None) -> RequestShape:
    return RequestShape(prompt_tokens=10, max_new_tokens=1, priority=priority)


async def served(fleet: WorkerFleet, priorities: Iterable[int | None], *, after: object = None) -> str:
    """In which order these are served, each by its place in the line: 0, 1, 2 ..."""
    current, line = await reserve(fleet), Line(fleet)
    names = []
    for number, priority in enumerate(priorities):
        await line.join(str(number), shape(priority))
        names.append(str(number))
    if callable(after):
        after()
    for count in range(1, len(names) + 1):
        release(fleet, current)
        await until(lambda count=count: len(line.served) == count)  # type: ignore[misc]
        current = line.held[line.served[-1]]
    return "".join(line.served)


@pytest.mark.parametrize(
    ("is_low_first", "default", "order"),
    [
        (None, None, "30214"),
        (False, None, "30214"),
        (True, None, "12034"),
        (True, 0, "12403"),
        (False, 3, "34021"),
        (True, -5, "41203"),
    ],
)
async def test_who_goes_first_is_what_the_workers_say(
    is_low_first: bool | None, default: int | None, order: str
) -> None:
    workers = (told(P0, is_low_first, default), told(D0, is_low_first, default))
    async with known_fleet(Network(), *workers, max_concurrent_requests=1) as fleet:
        # Of SGLang: without a priority comes last, in either order, unless there is a default.
        found = await served(fleet, [2, -2, -1, 7, None])
        assert found == order


@pytest.mark.parametrize("is_low_first", [False, True])
async def test_a_full_queue_gives_up_the_one_that_the_workers_serve_last(is_low_first: bool) -> None:
    workers = told(P0, is_low_first), told(D0, is_low_first)
    async with known_fleet(Network(), *workers, max_concurrent_requests=1, queue_size=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        first, second = (5, 1) if is_low_first else (1, 5)
        await line.join("late", shape(first))
        line.tasks["early"] = asyncio.create_task(line._client("early", shape(second), {}))
        await line.tasks["late"]
        assert "no less priority" in line.refused["late"]
        release(fleet, current)
        await line.until_served("early")


async def test_while_workers_differ_sglangs_default_holds_and_the_line_is_put_in_order_at_once() -> None:
    low, high = told(P0, True), told(P1, False)
    async with known_fleet(Network(), low, high, told(D0, True), max_concurrent_requests=1) as fleet:
        order = fleet.scheduler.admission.queue
        assert order.priorities == PriorityOrder(is_low_first=False)
        found = await served(fleet, [1, 2, 3], after=lambda: fleet.apply([low, told(D0, True)]))
        assert order.priorities == PriorityOrder(is_low_first=True)
        assert found == "012"


async def test_static_workers_are_asked_for_their_flags() -> None:
    network = Network()
    for info in (P0, D0):
        network[info].model_info = Answer(200, b'{"model_path":"tiny"}')
        network[info].server_info = Answer(
            200,
            b'{"startup_time":1,"enable_priority_scheduling":true,"default_priority_value":4,'
            b'"schedule_low_priority_values_first":true}',
        )
    addresses = {"prefill": ((P0.url, 9000),), "decode": (D0.url,)}
    async with running_fleet(network, **addresses) as fleet:
        await all_ready(fleet)
        assert fleet.scheduler.admission.queue.priorities == PriorityOrder(is_low_first=True, default=4)


priorities = st.none() | st.integers(-(2**63), 2**63 - 1)


@given(st.lists(priorities, min_size=2), st.booleans(), priorities)
def test_the_order_is_sglangs(values: list[int | None], is_low_first: bool, default: int | None) -> None:
    """As scheduler.py sets missing priorities and schedule_policy.py sorts."""
    sign = 1 if is_low_first else -1

    def theirs(value: int | None) -> int:
        value = default if value is None else value
        if value is None:
            value = 2**63 - 1 if is_low_first else -(2**63)
        return value * sign

    order = PriorityOrder(is_low_first, default)
    assert [theirs(value) for value in sorted(values, key=order.rank)] == sorted(map(theirs, values))
