"""The first output of a resumed request, cut where the first server's outputs were."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.plugin.resume.log import Step, output_word, parse_log
from pdserve.plugin.resume.replay import Replay


def _output(
    ids: list[int], text: str, *, finish: str = "", run: int | None = None, start: int = 0
) -> dict[str, Any]:
    """Token i of the answer has log probability -i; ``start``: an incremental output's first token."""
    rows = [(-float(start + i), token, None) for i, token in enumerate(ids)]
    meta: dict[str, Any] = {"id": "r", "finish_reason": {"type": finish} if finish else None}
    meta |= {"completion_tokens": start + len(ids), "output_token_logprobs": rows}
    meta["output_token_logprobs_length"] = start + len(ids)
    output = {"text": text, "output_ids": ids, "meta_info": meta}
    return output if run is None else {**output, "index": run}


def _log(*steps: tuple[int, int, list[int], str, bool]) -> str:
    return " ".join(
        output_word(Step(run, number, len(text), is_end), ids) for run, number, ids, text, is_end in steps
    )


def _step(ids: list[int], text: str, *, run: int = 0, is_end: bool = False) -> str:
    return output_word(Step(run, len(ids), len(text), is_end), ids)


def _fed(replay: Replay, *outputs: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    return [each for output in outputs for each in replay.feed(output)]


def _replay(words: list[str], **switches: bool) -> Replay:
    return Replay(parse_log(" ".join(words)), **{"is_incremental": False, "is_repeating": False, **switches})


def test_cumulative_output_is_made_again_in_its_portions() -> None:
    replay = _replay([_step([1, 2], "ab"), _step([3], "c"), _step([4], "d")])
    outputs = _fed(replay, _output([1, 2, 3, 4, 5], "abcde"), _output([1, 2, 3, 4, 5, 6], "abcdef"))
    assert [(o["output_ids"], o["text"], known) for o, known in outputs] == [
        ([1, 2], "ab", True),
        ([1, 2, 3], "abc", True),
        ([1, 2, 3, 4], "abcd", True),
        ([1, 2, 3, 4, 5], "abcde", False),
        ([1, 2, 3, 4, 5, 6], "abcdef", False),
    ]
    assert [o["meta_info"]["completion_tokens"] for o, _ in outputs] == [2, 3, 4, 5, 6]
    assert all(len(o["meta_info"]["output_token_logprobs"]) == len(o["output_ids"]) for o, _ in outputs)
    assert [o["meta_info"]["output_token_logprobs_length"] for o, _ in outputs] == [2, 3, 4, 5, 6]


def test_incremental_output_is_made_again_in_its_portions() -> None:
    replay = _replay([_step([1, 2], "ab"), _step([3], "c")], is_incremental=True)
    outputs = _fed(replay, _output([1, 2, 3, 4], "abcd"), _output([5], "e", start=4))
    assert [(o["output_ids"], o["text"], known) for o, known in outputs] == [
        ([1, 2], "ab", True),
        ([3], "c", True),
        ([4], "d", False),
        ([5], "e", False),
    ]
    rows = [[row[0] for row in o["meta_info"]["output_token_logprobs"]] for o, _ in outputs]
    assert rows == [[0.0, -1.0], [-2.0], [-3.0], [-4.0]]


@pytest.mark.parametrize("is_incremental", [False, True])
def test_output_with_nothing_new_leaves_no_rest(is_incremental: bool) -> None:
    replay = _replay([_step([1, 2], "ab"), _step([3], "c")], is_incremental=is_incremental)
    assert [known for _, known in _fed(replay, _output([1, 2, 3], "abc"))] == [True, True]


@pytest.mark.parametrize("is_incremental", [False, True])
def test_answer_that_ended_in_the_log_ends_in_its_last_portion(is_incremental: bool) -> None:
    """The first server had said the end, but its frame for usage, or ``[DONE]``, was lost."""
    words = [_step([1, 2], "ab"), _step([3], "c", is_end=True)]
    outputs = _fed(_replay(words, is_incremental=is_incremental), _output([1, 2, 3], "abc", finish="length"))
    assert [known for _, known in outputs] == [True, True]
    assert outputs[0][0]["meta_info"]["finish_reason"] is None
    assert outputs[-1][0]["meta_info"]["finish_reason"] == {"type": "length"}


@pytest.mark.parametrize("is_incremental", [False, True])
def test_end_in_the_first_output_comes_after_all_portions(is_incremental: bool) -> None:
    words = [_step([1, 2], "ab"), _step([3], "c")]
    outputs = _fed(_replay(words, is_incremental=is_incremental), _output([1, 2, 3], "abc", finish="stop"))
    assert [(o["meta_info"]["finish_reason"] or {}).get("type") for o, _ in outputs] == [None, None, "stop"]
    assert [known for _, known in outputs] == [True, True, False]


def test_runs_of_a_batch_are_interleaved_as_they_were() -> None:
    words = [_step([1], "a"), _step([7], "x", run=1), _step([2], "b"), _step([8], "y", run=1, is_end=True)]
    replay = _replay(words)
    early = replay.feed(_output([30], "?", run=2))
    assert early == [], "its frame would be dropped in place of another's"
    assert replay.feed(_output([7, 8], "xy", run=1, finish="stop")) == []
    outputs = replay.feed(_output([1, 2, 3], "abc", run=0))
    assert [(o["index"], o["output_ids"], known) for o, known in outputs] == [
        (0, [1], True),
        (1, [7], True),
        (0, [1, 2], True),
        (1, [7, 8], True),
        (0, [1, 2, 3], False),
        (2, [30], False),
    ]
    assert replay.feed(_output([30, 31], "?!", run=2)) == [(_output([30, 31], "?!", run=2), False)]


def test_frames_that_repeat_the_whole_text_are_only_left_out() -> None:
    words = [_step([1, 2], "ab"), _step([7], "x", run=1, is_end=True)]
    replay = _replay(words, is_repeating=True)
    assert replay.feed(_output([1, 2], "ab", run=0)) == []
    assert replay.feed(_output([7], "x", run=1, finish="stop")) == []
    assert [known for _, known in replay.feed(_output([1, 2, 3], "abc", run=0))] == [False]
    ended = _output([1, 2], "ab", run=0, finish="stop")
    assert replay.feed(ended) == [(ended, False)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(0, 3),
    st.booleans(),
)
def test_portions_and_rest_are_the_whole(
    sizes: list[tuple[int, int]], more: int, is_incremental: bool
) -> None:
    num_ids, num_chars = sum(n for n, _ in sizes), sum(c for _, c in sizes)
    ids, text = list(range(num_ids + more)), "x" * (num_chars + more)
    words, at = [], 0
    for number, chars in sizes:
        words.append(_step(ids[at : at + number], "x" * chars))
        at += number
    outputs = _fed(_replay(words, is_incremental=is_incremental), _output(ids, text))
    known = [output for output, is_known in outputs if is_known]
    assert len(known) == len(sizes)
    if is_incremental:
        assert [token for output, _ in outputs for token in output["output_ids"]] == ids
        assert "".join(output["text"] for output, _ in outputs) == text
    else:
        assert (outputs[-1][0]["output_ids"], outputs[-1][0]["text"]) == (ids, text)
    assert (len(outputs) > len(known)) == bool(more)
