"""Forecasts of answer lengths: calibrated, bounded, never beyond the limit; what they learn from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pdserve.scheduling.length_history import EDGES, History, bucket_of
from pdserve.scheduling.lengths import (
    MIN_LEARNED,
    UNKNOWN_TOKENS,
    LengthPredictor,
    Lengths,
)
from pdserve.sim.forecasts import OracleLengths, UselessLengths
from pdserve.types import RequestShape
from tests.support.examples import n_examples

SHAPE = RequestShape(prompt_tokens=1000, max_new_tokens=4096, route="/v1/chat/completions")


def teach(predictor: Lengths, shape: RequestShape, *lengths: int) -> None:
    """Each answer was forecast, then came; those that reach the limit were cut there."""
    limit = shape.max_new_tokens
    for length in lengths:
        asked = replace(shape, forecast=predictor.forecast(shape))
        predictor.learn(asked, min(length, limit), length >= limit)


def coverage(
    predictor: LengthPredictor, draw: Callable[[], int], num: int, shape: RequestShape = SHAPE
) -> float:
    """Share of ``num`` answers that were within their forecast, each learned after it."""
    covered = 0
    for _ in range(num):
        length = min(draw(), shape.max_new_tokens)
        told = predictor.forecast(shape)
        covered += told.low - 0.5 <= length <= told.high + 0.5
        teach(predictor, shape, length)
    return covered / num


def lognormal(seed: int, median: float, sigma: float) -> Callable[[], int]:
    rng = random.Random(seed)
    return lambda: max(1, round(median * math.exp(rng.gauss(0, sigma))))


# -- before anything is known ----------------------------------------------------------------


def test_nothing_is_claimed_before_answers_have_come() -> None:
    told = LengthPredictor().forecast(SHAPE)
    assert (told.mean, told.low, told.high, told.is_learned) == (UNKNOWN_TOKENS, 1, 4096, False)


def test_a_first_answer_is_no_forecast() -> None:
    predictor = LengthPredictor()
    teach(predictor, SHAPE, *[10] * (MIN_LEARNED - 1))
    assert not predictor.forecast(SHAPE).is_learned
    teach(predictor, SHAPE, 10)
    assert predictor.forecast(SHAPE).is_learned


# -- what is learned -------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.5])
@pytest.mark.parametrize("median", [20, 130, 900])
def test_four_of_five_answers_are_within_the_interval(median: float, sigma: float) -> None:
    predictor, draw = LengthPredictor(), lognormal(7, median, sigma)
    shape = replace(SHAPE, max_new_tokens=2**20)
    teach(predictor, shape, *(draw() for _ in range(500)))
    assert 0.7 < coverage(predictor, draw, 3000, shape) < 0.9
    assert 0.7 < float(str(predictor.snapshot()["coverage"])) < 0.95


def test_the_mean_is_that_of_like_answers() -> None:
    predictor, draw = LengthPredictor(), lognormal(3, 200, 0.5)
    teach(predictor, SHAPE, *(draw() for _ in range(2000)))
    assert predictor.forecast(SHAPE).mean == pytest.approx(200 * math.exp(0.125), rel=0.1)


def test_the_interval_follows_a_shift() -> None:
    predictor = LengthPredictor()
    teach(
        predictor,
        SHAPE,
        *(length for _, length in zip(range(2000), iter(lognormal(1, 50, 0.5), -1), strict=False)),
    )
    after = lognormal(2, 800, 0.5)
    assert coverage(predictor, after, 60) < 0.7
    coverage(predictor, after, 340)
    assert 0.7 < coverage(predictor, after, 1000) < 0.95
    assert predictor.forecast(SHAPE).mean == pytest.approx(800 * math.exp(0.125), rel=0.2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (replace(SHAPE, user="a"), replace(SHAPE, user="b")),
        (replace(SHAPE, prompt=b"You classify." * 50), replace(SHAPE, prompt=b"You write novels." * 50)),
        (replace(SHAPE, prompt_tokens=100), replace(SHAPE, prompt_tokens=20_000)),
        (replace(SHAPE, route="/generate"), replace(SHAPE, route="/v1/completions")),
        (replace(SHAPE, max_new_tokens=256), replace(SHAPE, max_new_tokens=8192)),
    ],
    ids=["user", "application", "prompt", "route", "limit"],
)
def test_what_tells_requests_apart_tells_their_answers_apart(one: RequestShape, other: RequestShape) -> None:
    predictor, rng = LengthPredictor(), random.Random(5)
    for _ in range(300):
        teach(predictor, one, rng.randrange(8, 12))
        teach(predictor, other, rng.randrange(180, 220))
    assert predictor.forecast(one).high < 100 < predictor.forecast(other).low


def test_conversations_of_one_application_are_told_apart_by_what_follows_its_prompt() -> None:
    system = b"You are helpful." * 40
    talks = [replace(SHAPE, prompt=system + name * 2000) for name in (b"one", b"two")]
    predictor = LengthPredictor()
    for _ in range(60):
        teach(predictor, talks[0], 10)
        teach(predictor, talks[1], 1000)
    assert predictor.forecast(talks[0]).mean < 250 < 750 < predictor.forecast(talks[1]).mean


def test_an_application_that_everybody_uses_does_not_hide_what_the_prompts_length_tells() -> None:
    predictor = LengthPredictor()
    short, long = (replace(SHAPE, prompt=b"You help." * 60, prompt_tokens=tokens) for tokens in (100, 20_000))
    for number in range(400):
        teach(predictor, long if number % 4 == 0 else short, 1000 if number % 4 == 0 else 20)
    assert predictor.forecast(short).mean < 40
    assert predictor.forecast(long).mean > 700


def test_a_stranger_is_taken_for_one_of_all() -> None:
    predictor, draw = LengthPredictor(), lognormal(9, 100, 0.3)
    for number in range(400):
        teach(predictor, replace(SHAPE, user=f"user{number}"), draw())
    told = predictor.forecast(replace(SHAPE, user="new"))
    assert told.is_learned
    assert told.low < 100 < told.high < 300


# -- answers that were cut -------------------------------------------------------------------


def test_cut_answers_are_known_to_be_longer() -> None:
    """Half the answers are aborted at 50 tokens; of those that live, the median is 100 and not 50."""
    predictor, rng = LengthPredictor(), random.Random(4)
    for _ in range(1000):
        length = round(100 * math.exp(rng.gauss(0, 0.3)))
        is_aborted = rng.random() < 0.5 and length > 50
        predictor.learn(SHAPE, 50 if is_aborted else length, is_aborted)
    assert predictor.forecast(SHAPE).mean == pytest.approx(105, rel=0.15)


def test_a_lower_limit_cuts_the_mean_and_not_only_its_top() -> None:
    """Of answers of 50 and 1000 tokens with a limit of 100 the mean is 75."""
    predictor = LengthPredictor()
    for _ in range(300):
        teach(predictor, SHAPE, 50, 1000)
    told = predictor.forecast(replace(SHAPE, max_new_tokens=100))
    assert told.mean == pytest.approx(75, rel=0.1)
    assert told.high == 100


def test_answers_that_all_reach_the_limit_are_forecast_at_the_limit() -> None:
    predictor, shape = LengthPredictor(), replace(SHAPE, max_new_tokens=128)
    teach(predictor, shape, *[10_000] * 200)
    assert predictor.forecast(shape).mean == 128
    assert predictor.forecast(replace(shape, max_new_tokens=4096)).mean > 200


# -- bounds ----------------------------------------------------------------------------------


@settings(max_examples=n_examples(80))
@given(
    st.lists(
        st.tuples(
            st.integers(0, 200_000),  # length
            st.integers(1, 100_000),  # limit
            st.integers(1, 300_000),  # prompt
            st.sampled_from(["", "a", "b"]),
            st.sampled_from([b"", b"x" * 100, b"y" * 5000]),
            st.booleans(),
        ),
        max_size=120,
    )
)
def test_a_forecast_is_ordered_and_never_exceeds_the_limit(
    rows: list[tuple[int, int, int, str, bytes, bool]],
) -> None:
    predictor = LengthPredictor(max_keys=10)
    for length, limit, tokens, user, prompt, is_cut in rows:
        shape = RequestShape(tokens, limit, prompt, route="r", user=user)
        told = predictor.forecast(shape)
        assert 0 < told.low <= told.mean <= told.high <= limit
        predictor.learn(replace(shape, forecast=told), min(length, limit), is_cut or length >= limit)
    assert int(str(predictor.snapshot()["num_keys"])) <= 10


def test_equal_lessons_give_equal_forecasts() -> None:
    def told() -> object:
        predictor, draw = LengthPredictor(), lognormal(11, 60, 1.0)
        for number in range(300):
            teach(predictor, replace(SHAPE, user=f"u{number % 7}", prompt=b"p%d" % (number % 5)), draw())
        return predictor.forecast(SHAPE), predictor.snapshot()

    assert told() == told()


def test_weights_of_a_long_history_stay_finite() -> None:
    history = History()
    for _ in range(20_000):
        history.add(bucket_of(100), False, 0.9)
    assert history.summary is not None
    assert history.summary.mean == pytest.approx(100, rel=0.1)


def test_buckets_leave_no_gap() -> None:
    assert all(low < high <= max(low + 1, 1.3 * low) for low, high in pairwise(EDGES[:-1]))


def test_the_bounds_of_an_evaluation() -> None:
    oracle, useless = OracleLengths(), UselessLengths()
    oracle.next_tokens = 77
    assert oracle.forecast(SHAPE).mean == 77
    assert oracle.forecast(replace(SHAPE, max_new_tokens=10)).high == 10
    teach(useless, SHAPE, *[5] * 100)
    assert useless.forecast(SHAPE).mean == UNKNOWN_TOKENS
