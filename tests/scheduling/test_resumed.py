"""An answer that its client waits for goes before every new request."""

from __future__ import annotations

from msgspec import structs

from pdserve.types import RequestShape
from tests.support.fleet_network import D0, P0, SHAPE, Line, Network, known_fleet, release, reserve, until

RESUMED = structs.replace(SHAPE, is_resumed=True)


async def test_it_is_first_in_line_whatever_the_priorities() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        current, line = await reserve(fleet), Line(fleet)
        await line.join("urgent", RequestShape(prompt_tokens=10, max_new_tokens=1, priority=9))
        admission = fleet.scheduler.admission
        waiter = admission._join(RESUMED, frozenset(), Unanswered())
        assert next(iter(admission.queue)) is waiter
        admission.leave(waiter)
        release(fleet, current)
        await until(lambda: line.served == ["urgent"])


async def test_it_has_its_place_though_others_wait_and_the_limit_is_reached() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1) as fleet:
        await reserve(fleet)
        await Line(fleet).join("new")
        assert fleet.scheduler.try_now(SHAPE) is None
        assert fleet.scheduler.try_now(RESUMED) is not None


async def test_it_takes_the_place_of_the_last_in_a_full_queue() -> None:
    async with known_fleet(Network(), P0, D0, max_concurrent_requests=1, queue_size=1) as fleet:
        await reserve(fleet)
        await Line(fleet).join("new")
        admission, grant = fleet.scheduler.admission, Unanswered()
        admission._join(RESUMED, frozenset(), grant)
        assert [waiter.grant for waiter in admission.queue] == [grant]


async def test_it_is_not_late_for_its_first_token() -> None:
    async with known_fleet(Network(), P0, D0, slo_ttft_s=1e-6) as fleet:
        waiter = fleet.scheduler.admission._join(RESUMED, frozenset(), Unanswered())
        assert waiter.due_s == float("inf") and not waiter.is_hopeless


class Unanswered:
    """A grant that nobody waits for yet."""

    def done(self) -> bool:
        return False

    def set_result(self, result: object) -> None:
        raise AssertionError(result)

    def set_exception(self, exception: Exception) -> None:
        """The fleet stops at the end of the test."""
