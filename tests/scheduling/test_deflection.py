"""When a decode worker is given a request alone: by waits and passes as samples tell them, and in need."""

from __future__ import annotations

import msgspec
import pytest

from pdserve.scheduling.deflection import Deflection
from pdserve.scheduling.reservation import Reservation
from tests.support.virtual_admission import Asked, Desk, shape

SLO = {"slo_ttft_s": 2.0, "slo_tpot_s": 0.1}
SHORT = shape(1000, 50)
LONG = shape(4000, 50)
"""0.4 s of a prefill worker: others still fit behind it."""
HUGE = shape(17_500, 50)
"""1.75 s: what comes behind it has no time to spare."""


def able(num_prefill: int = 1, num_decode: int = 1, **settings: object) -> Desk:
    """A desk whose decode workers prefill by themselves."""
    desk = Desk(num_prefill, num_decode, **{"deflect": "auto", **SLO, **settings})  # type: ignore[arg-type]
    desk.admission.set_alone(worker.instance_id for worker in desk.decodes)
    return desk


def deflection(desk: Desk) -> Deflection:
    found = desk.admission.deflection
    assert found is not None
    return found


def is_alone(asked: Asked) -> bool:
    return asked.reservation.is_alone


def test_an_idle_pair_is_as_good_and_keeps_the_request() -> None:
    assert not is_alone(able().ask("a", SHORT))


def test_behind_a_long_prompt_decode_alone_is_quicker() -> None:
    desk = able()
    assert not is_alone(desk.ask("a", HUGE))
    reservation = desk.ask("b", SHORT).reservation
    assert reservation.is_alone
    assert str(reservation.pair) == "decode-0"
    assert (desk.prefills[0].num_inflight, desk.decodes[0].num_inflight) == (1, 2)


@pytest.mark.parametrize("settings", [{"deflect": "off"}, {"slo_ttft_s": 0.0, "slo_tpot_s": 0.0}])
def test_without_the_option_or_limits_a_ready_pair_has_every_request(settings: dict[str, object]) -> None:
    desk = able(**settings)
    assert [is_alone(desk.ask(str(i), SHORT)) for i in range(4)] == [False] * 4


def test_the_worker_must_be_one_that_can() -> None:
    desk = able()
    desk.admission.set_alone([])
    desk.ask("a", LONG)
    assert not is_alone(desk.ask("b", SHORT))


def test_what_needs_a_prefill_worker_has_one() -> None:
    desk = able()
    desk.ask("a", LONG)
    assert not is_alone(desk.ask("b", msgspec.structs.replace(SHORT, needs_prefill_worker=True)))


def test_a_worker_that_failed_it_is_not_given_it_alone_again() -> None:
    desk = able()
    desk.ask("a", LONG)
    name = desk.decodes[0].instance_id
    assert not is_alone(desk.ask("b", SHORT, frozenset({(name, name)})))


def test_a_batch_near_the_limit_per_token_takes_no_prompts() -> None:
    """A step of 0.085 s leaves 5 ms of the budget: a thousand tokens would take twenty passes of 0.09 s."""
    desk = able()
    desk.ask("a", LONG)
    desk.decodes[0].view.step_base_s = 0.085
    desk.sample(desk.decodes[0], num_running_reqs=8)
    assert not is_alone(desk.ask("b", shape(3000, 50)))


def test_prompts_that_wait_there_count() -> None:
    """The sample tells of those, what was sent since is known; passes since the sample have done a part."""
    desk = able()
    decide, view = deflection(desk), desk.decodes[0].view
    desk.sample(desk.decodes[0], num_waiting_uncached_tokens=5000)
    assert decide.waiting_tokens(view) == 5000
    decide.place(SHORT, frozenset())
    assert decide.waiting_tokens(view) == 6000
    desk.now_s += decide.budget_s
    assert 5000 < decide.waiting_tokens(view) < 6000
    desk.now_s += 100
    assert decide.waiting_tokens(view) == 1000, "what was sent since is not known to have begun"
    desk.sample(desk.decodes[0], num_waiting_uncached_tokens=200)
    assert decide.waiting_tokens(view) == 200


def test_a_request_too_late_for_a_pair_goes_alone_instead_of_being_refused() -> None:
    desk = able()
    desk.ask("a", HUGE)
    assert is_alone(desk.ask("b", LONG))
    desk.admission.set_alone([])
    assert "no first token within 2 s" in str(desk.ask("c", LONG).refusal)


def test_those_that_got_late_in_line_go_alone() -> None:
    desk = able()
    desk.ask("a", shape(6000, 50))
    waiting = desk.ask("b", SHORT)
    assert not waiting.outcomes, "the prefill worker's queue is long enough, and there is time"
    desk.prefills[0].view.queued_tokens = 19_500
    desk.now_s += 0.1
    desk.scheduler.serve()
    assert is_alone(waiting)


def test_everything_is_given_back() -> None:
    desk = able(capacity=50_000)
    held = [desk.ask(str(i), SHORT if i else HUGE) for i in range(4)]
    ended = [asked for asked in held if asked.outcomes and isinstance(asked.outcomes[0], Reservation)]
    assert {is_alone(asked) for asked in ended} == {True, False}
    for asked in ended:
        desk.end(asked)
    assert desk.is_clear


def test_without_any_pair_decode_serves_alone_those_that_come_and_those_that_wait() -> None:
    desk = able(slo_ttft_s=0.0, slo_tpot_s=0.0)
    desk.admission.set_alone([])
    desk.scheduler.set_ready_pairs([])
    waiting = desk.ask("a", SHORT)
    assert not waiting.outcomes
    assert not desk.scheduler.has_ready_pair
    desk.admission.set_alone([desk.decodes[0].instance_id])
    assert is_alone(waiting)
    assert is_alone(desk.ask("b", LONG))
    assert desk.scheduler.has_ready_pair


def test_a_full_worker_serves_those_that_wait_alone_when_it_has_room() -> None:
    desk = able(slo_ttft_s=0.0, slo_tpot_s=0.0, max_running=1)
    desk.scheduler.set_ready_pairs([])
    first, second = desk.ask("a", SHORT), desk.ask("b", SHORT)
    assert is_alone(first)
    assert not second.outcomes
    desk.end(first)
    assert is_alone(second)


def test_it_learns_how_long_first_tokens_really_take() -> None:
    desk = able()
    decide = deflection(desk)
    for _ in range(60):
        expected_s = decide.times_s(SHORT, desk.decodes[0].view)[0]
        reservation = decide.place(SHORT, frozenset())
        assert reservation is not None
        desk.now_s += 2 * expected_s / decide.factor
        desk.scheduler.prefill_finished(reservation)
        desk.scheduler.end(reservation, prefill_ok=True, decode_ok=True)
    assert decide.factor == pytest.approx(2.0, rel=0.1)
    assert desk.is_clear
