"""The log of an answer: words written are words read, in any number of legs, and safe in a JSON string."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.plugin.resume.log import (
    Step,
    first_word,
    join_rows,
    logprob_rows,
    output_word,
    parse_log,
)

_tokens = st.lists(st.integers(0, 200_000), max_size=4)
_number = st.floats(allow_nan=False) | st.integers(-5, 5).map(float)
_rows = st.lists(_number, max_size=3).map(lambda values: [values, [[[v, 1]] for v in values], []])
_outputs = st.lists(
    st.tuples(
        st.integers(0, 3), _tokens, st.integers(-9, 50), st.none() | st.integers(0, 99), st.none() | _rows
    ),
    max_size=12,
)


@given(
    _outputs,
    st.lists(st.text("0123456789abcdef", min_size=4, max_size=8), max_size=2),
    st.none() | st.just(17),
)
def test_what_is_written_is_read(outputs: list, rids: list[str], created: int | None) -> None:
    words = [first_word(rids, created)]
    for run, ids, chars, cached, rows in outputs:
        words.append(output_word(Step(run, len(ids), chars), ids, cached, rows))
    text = " ".join(word for word in words if word)
    log = parse_log(text)
    assert (log.rids, log.created) == (tuple(rids), created)
    assert log.steps == [Step(run, len(ids), chars) for run, ids, chars, _, _ in outputs]
    for run in {run for run, *_ in outputs}:
        mine = [output for output in outputs if output[0] == run]
        assert log.runs[run].ids == [token for output in mine for token in output[1]]
        assert log.runs[run].chars == sum(output[2] for output in mine)
        parts = [output[4] for output in mine if output[4] is not None]
        assert join_rows(log.runs[run].logprobs) == join_rows(parts)
    assert json.dumps(text) == f'"{text}"', "spliced into the body as it stands"


def test_words_of_several_legs_are_one_log() -> None:
    first = "=ab@1700000000 5,6;12;c17 7;3"
    log = parse_log(f"{first} 8;2 9;1;e")
    assert log.runs[0].ids == [5, 6, 7, 8, 9]
    assert (log.runs[0].chars, log.runs[0].cached, log.runs[0].is_over) == (18, 17, True)
    assert [step.is_end for step in log.steps] == [False, False, False, True]


def test_runs_of_a_batch_are_told_apart() -> None:
    log = parse_log("=ab,cd 5;1 1:6;1 1:7,8;2;e 9;1")
    assert {run: log.runs[run].ids for run in log.runs} == {0: [5, 9], 1: [6, 7, 8]}
    assert [step.run for step in log.steps] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "text", ["5", "5;x", "a;1", "5;1;z9", "x:5;1", "5,;1", "=a@b", '5;1;l{"', "5;1 !beam", "~500"]
)
def test_what_is_no_log_is_refused_by_its_word(text: str) -> None:
    with pytest.raises(ValueError, match=r"log"):
        parse_log(text)


def test_log_probabilities_are_those_of_the_new_tokens() -> None:
    meta = {
        "output_token_logprobs": [(-0.5, 5, None), (-0.25, 6, "x")],
        "output_top_logprobs": [None, [(-0.25, 6, "x"), (-1.5, 7, "y")]],
    }
    assert logprob_rows(meta, 1) == [[-0.25], [[[-0.25, 6], [-1.5, 7]]], []]
    assert logprob_rows(meta, 0)[1] == [[], [[-0.25, 6], [-1.5, 7]]]


def test_a_log_probability_of_minus_infinity_is_kept() -> None:
    word = output_word(Step(0, 1, 1), [5], None, [[float("-inf")], [], []])
    assert join_rows(parse_log(word).runs[0].logprobs)[0] == [float("-inf")]
