"""Room by forecasts: expected growth of answers, steps within their objective, sums that come to nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.kv_growth import GROWTH_Z, SPREAD, KvGrowth
from pdserve.types import RequestShape
from tests.support.examples import n_examples
from tests.support.virtual_admission import Asked, Desk, shape

# -- the sum -----------------------------------------------------------------------------------


def test_errors_of_many_forecasts_cancel() -> None:
    """A hundred answers of 400 give or take 256: all together need far less than 656 each."""
    growth, deviation = KvGrowth(), 2 * 256 / SPREAD
    for leg in range(100):
        growth.add(leg, shape(0, 400, spread=256), (0, 512))
    assert growth.tokens == pytest.approx(40_000 + GROWTH_Z * 10 * deviation, rel=0.001)
    assert growth.tokens < 100 * (400 + 256) * 0.7


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(1, 1e5), st.floats(0, 1e4), st.booleans()), max_size=60
    ),
    st.randoms(),
)
def test_a_worker_without_open_legs_expects_nothing(
    legs: list[tuple[int, float, float, bool]], rng: random.Random
) -> None:
    growth = KvGrowth()
    for leg, (prompt, answer, spread, begins) in enumerate(legs):
        growth.add(leg, shape(prompt, answer, spread=spread, limit=200_000), (prompt, prompt + 512))
        if begins:
            growth.begin(leg, float(leg))
        growth.follow(leg * 10.0, 0.02, 100_000)
    order = list(range(len(legs)))
    rng.shuffle(order)
    for leg in order:
        assert growth
        growth.end(leg)
    assert not growth
    assert growth.tokens == 0


def test_an_answer_that_outlives_its_forecast_is_expected_to_go_on_up_to_its_limit() -> None:
    growth = KvGrowth()
    growth.add(1, shape(100, 200, spread=100, limit=5000), (100, 612))
    base = growth.tokens
    growth.follow(10.0, 0.02, 1000)
    assert growth.tokens == base  # its prompt is still being computed
    growth.begin(1, 10.0)
    growth.follow(12.0, 0.02, 1000)
    assert growth.tokens == base
    growth.follow(15.0, 0.02, 1000)  # 250 tokens: between mean and high
    assert growth.tokens == base + 75
    growth.follow(30.0, 0.02, 1000)
    assert growth.tokens == base + 2000 - 200
    growth.follow(1000.0, 0.02, 1000)
    assert growth.tokens == base + 5000 - 200


def test_answers_that_end_in_turn_need_less_at_once_than_all_at_their_full_length() -> None:
    """Ten answers of 1000 tokens, begun a hundred tokens apart: the oldest ends before the others grow."""
    growth = KvGrowth()
    for leg in range(10):
        growth.add(leg, shape(100, 1000), (100, 612))
        growth.begin(leg, 2.0 * leg)
        growth.follow(2.0 * leg, 0.02, 0)
    assert 10 * 100 + sum(range(0, 1000, 100)) < growth.tokens < 0.7 * 10 * 1100


# -- admission -----------------------------------------------------------------------------------


def test_long_answers_are_counted_at_their_forecast_and_not_at_sglangs_reserve() -> None:
    desk = Desk(capacity=10_000)
    asked = [desk.ask(str(n), shape(100, 4000), waits=False) for n in range(4)]
    assert [bool(each.outcomes) for each in asked] == [True, True, False, False]


def test_short_answers_are_still_counted_at_sglangs_reserve() -> None:
    """SGLang lets a request in only beside 512 tokens for each other; until then it would wait in D."""
    desk = Desk(capacity=2000)
    asked = [desk.ask(str(n), shape(100, 10), waits=False) for n in range(4)]
    assert [bool(each.outcomes) for each in asked] == [True, True, True, False]


def test_without_prediction_only_sglangs_reserve_counts() -> None:
    desk = Desk(capacity=10_000, predict_lengths=False)
    asked = [desk.ask(str(n), shape(100, 4000), waits=False) for n in range(18)]
    assert sum(bool(each.outcomes) for each in asked) == 10_000 // 612


def test_a_forecast_nobody_has_learned_counts_as_none() -> None:
    desk = Desk(capacity=10_000)
    asked = [desk.ask(str(n), RequestShape(100, 8000), waits=False) for n in range(18)]
    assert sum(bool(each.outcomes) for each in asked) == 10_000 // 612


def test_an_answer_longer_than_foretold_counts_as_long_as_it_is() -> None:
    desk = Desk(capacity=10_000)
    first = desk.ask("first", shape(100, 200))
    desk.now_s += 100
    desk.sample(desk.decodes[0], num_used_tokens=9000, num_total_tokens=9000, num_running_reqs=1,
                max_total_num_tokens=10_000)  # fmt: skip
    assert not desk.ask("second", shape(600, 10), waits=False).outcomes
    desk.end(first)
    assert desk.ask("third", shape(600, 10), waits=False).outcomes


def test_an_answer_expected_to_exceed_the_pool_is_tried_on_an_empty_worker() -> None:
    desk = Desk(capacity=5000)
    assert desk.ask("huge", shape(100, 9000, limit=10_000)).outcomes


def test_a_batch_is_counted_for_each_of_its_answers() -> None:
    desk = Desk(capacity=10_000)
    told = shape(100, 1000).forecast
    desk.ask("batch", RequestShape(100, 8192, num_prompts=9, forecast=told))
    assert not desk.ask("next", shape(100, 1000), waits=False).outcomes


# -- time per token ------------------------------------------------------------------------------


def test_a_decode_batch_is_not_filled_beyond_its_objective() -> None:
    """20 ms and 0.4 ms a request: 25 requests take 30 ms."""
    desk = Desk(num_decode=2, slo_tpot_s=0.03)
    asked = [desk.ask(str(n), shape(), waits=False) for n in range(60)]
    assert sum(bool(each.outcomes) for each in asked) == 50
    desk.end(asked[0])
    assert desk.ask("next", shape(), waits=False).outcomes


def test_an_objective_that_no_batch_meets_still_lets_one_request_run() -> None:
    desk = Desk(slo_tpot_s=0.001)
    first = desk.ask("first", shape())
    assert first.outcomes
    assert not desk.ask("second", shape(), waits=False).outcomes
    desk.end(first)
    assert desk.ask("third", shape(), waits=False).outcomes


# -- no retraction with an exact predictor -------------------------------------------------------


@dataclass(eq=False)
class DecodeModel:
    """A decode server that gives every request a token a step, and retracts when the pool is full.

    As SGLang's does, it takes a request in when prompt + 512 fit beside 512 for each that is there.
    """

    capacity: int
    queue: list[tuple[Asked, int, int]] = field(default_factory=list)
    running: dict[Asked, list[int]] = field(default_factory=dict)
    retracted: int = 0
    longest_queue: int = 0

    @property
    def used(self) -> int:
        return sum(prompt + done for prompt, done, _ in self.running.values())

    def step(self) -> list[Asked]:
        while self.queue:
            asked, prompt, answer = self.queue[0]
            if self.running and self.used + prompt + 512 * (len(self.running) + 1) > self.capacity:
                break
            del self.queue[0]
            self.running[asked] = [prompt, 0, answer]
        self.longest_queue = max(self.longest_queue, len(self.queue))
        while len(self.running) > 1 and self.used + len(self.running) > self.capacity:
            asked, (prompt, _, answer) = self.running.popitem()
            self.queue.append((asked, prompt, answer))
            self.retracted += 1
        for each in self.running.values():
            each[1] += 1
        ended = [asked for asked, (_, done, answer) in self.running.items() if done >= answer]
        for asked in ended:
            del self.running[asked]
        return ended


def decode_all(requests: list[tuple[int, int]], *, predicts: bool, capacity: int = 20_000) -> DecodeModel:
    """Run (prompt, answer) requests through one decode server; exact forecasts, samples every ten steps."""
    desk = Desk(capacity=capacity, predict_lengths=predicts, queue_size=10**6, queue_timeout_s=1e9, rate=1e9)
    desk.decodes[0].view.step_slope_s = 0.0  # the fit is right: 20 ms a step
    model, coming = DecodeModel(capacity), list(requests)
    waiting: list[tuple[Asked, int, int]] = []
    for step in range(200_000):
        if coming and step % 3 == 0:
            prompt, answer = coming.pop()
            waiting.append((desk.ask(str(len(coming)), shape(prompt, answer)), prompt, answer))
        for each in [each for each in waiting if each[0].outcomes]:
            desk.prefilled(each[0])
            model.queue.append(each)
            waiting.remove(each)
        for asked in model.step():
            desk.end(asked)
        desk.now_s += 0.02
        if step % 10 == 0:
            total = model.used + sum(prompt for _, prompt, _ in model.queue)
            desk.sample(desk.decodes[0], num_used_tokens=model.used, num_total_tokens=total,
                        num_running_reqs=len(model.running), max_total_num_tokens=capacity)  # fmt: skip
        if not (coming or waiting or model.queue or model.running):
            assert desk.is_clear
            return model
    raise AssertionError("not all were served")


@pytest.mark.slow
def test_with_an_exact_predictor_nothing_is_retracted() -> None:
    rng = random.Random(2)
    requests = [(rng.randrange(50, 500), rng.choice([20, 300, 3000, 6000])) for _ in range(200)]
    assert decode_all(requests, predicts=True).retracted == 0
    assert decode_all(requests, predicts=False).retracted > 10


@settings(max_examples=n_examples(15))
@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.sampled_from([1, 40, 700, 2500, 8000])), min_size=1, max_size=40
    )
)
def test_whatever_the_lengths_an_exact_predictor_keeps_all_in_the_pool(
    requests: list[tuple[int, int]],
) -> None:
    assert decode_all(requests, predicts=True).retracted == 0


# -- bookkeeping ---------------------------------------------------------------------------------


@settings(max_examples=n_examples(60))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "ask", "end", "leave", "prefilled", "fail", "tick"]),
            st.integers(1, 3000),  # prompt
            st.integers(1, 6000),  # answer
            st.integers(0, 2000),  # spread
            st.integers(0, 2),  # priority
        ),
        max_size=120,
    ),
    st.sampled_from([{}, {"queue_order": "shortest"}, {"slo_ttft_s": 0.4, "slo_tpot_s": 0.025}]),
)
def test_every_request_has_one_outcome_and_nothing_stays_promised(
    rows: list[tuple[str, int, int, int, int]], settings_: dict[str, object]
) -> None:
    desk = Desk(2, 2, capacity=9000, max_running=6, queue_size=8, **settings_)
    asked: list[Asked] = []
    for index, (what, prompt, answer, spread, priority) in enumerate(rows):
        held = [each for each in asked if each.served_s >= 0 and each.reservation.is_open]
        waiting = [each for each in asked if not each.done()]
        if what == "ask":
            asked.append(desk.ask(str(index), shape(prompt, answer, spread=spread, priority=priority)))
        elif what == "end" and held:
            desk.end(held[prompt % len(held)])
        elif what == "prefilled" and held:
            desk.prefilled(held[prompt % len(held)])
        elif what == "fail" and held:
            desk.release(held[prompt % len(held)], decode_ok=False)
        elif what == "leave" and waiting:
            desk.leave(waiting[prompt % len(waiting)])
        elif what == "tick":
            desk.tick()
        for worker in desk.decodes:
            assert worker.num_inflight <= 6
            if worker.num_inflight > 1:
                assert worker.promised_tokens <= 9000
                assert worker.growth.tokens <= 9000 * 1.5
    for each in asked:
        assert len(each.outcomes) <= 1
    for _ in range(len(asked)):
        for each in asked:
            if each.served_s >= 0 and each.reservation.is_open:
                desk.end(each)
    assert all(len(each.outcomes) == (not each.has_left) for each in asked)
    assert desk.is_clear
