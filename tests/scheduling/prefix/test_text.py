"""Canonical text of prompts: one text for every dress of a conversation, growing only at its end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.prefix.text import canonical_text
from tests.support.examples import n_examples

SYSTEM = {"role": "system", "content": 'Be "kind".\nAnd brief: é — 漢'}
USER = {"role": "user", "content": "What is a tree?"}
ANSWER = {"role": "assistant", "content": "A plant."}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "7"}
PICTURE = {
    "role": "user",
    "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "u1"}}],
}


def encode(messages: Any, **dress: Any) -> bytes:
    return json.dumps(messages, **dress).encode()


def parts(message: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": message["content"]}], "role": message["role"]}


@pytest.mark.parametrize(
    "dressed",
    [
        encode([SYSTEM, USER], ensure_ascii=False),
        encode([SYSTEM, USER], indent=2),
        encode([SYSTEM, USER], separators=(",", ":")),
        encode([SYSTEM, USER], sort_keys=True),
        encode([parts(SYSTEM), USER]),
        encode([SYSTEM, parts(USER)]),
        b"  " + encode([{**SYSTEM, "cache_control": {"type": "ephemeral"}}, USER]),
    ],
)
def test_equal_conversations_in_other_dress_have_equal_text(dressed: bytes) -> None:
    assert canonical_text(dressed) == canonical_text(encode([SYSTEM, USER]))


def test_what_stands_before_the_messages_stays_as_it_is() -> None:
    head, plain = b'[{"name": "a tool"}]\0', encode([SYSTEM, USER])
    assert canonical_text(head + plain) == head + canonical_text(plain)
    assert canonical_text(head + encode([SYSTEM, USER], indent=2)) == head + canonical_text(plain)
    assert canonical_text(head + b'"text"') == head + b'"text"'


@pytest.mark.parametrize(
    "other",
    [
        [SYSTEM, {**USER, "role": "assistant"}],
        [USER, SYSTEM],
        [SYSTEM, {**USER, "content": "What is a bee?"}],
        [SYSTEM, {**USER, "name": "Ann"}],
        [SYSTEM],
    ],
)
def test_other_conversations_have_another_text(other: Any) -> None:
    assert canonical_text(encode(other)) != canonical_text(encode([SYSTEM, USER]))


def test_pictures_are_told_apart() -> None:
    other = {**PICTURE, "content": [PICTURE["content"][0], {"type": "image_url", "image_url": {"url": "u2"}}]}
    assert canonical_text(encode([PICTURE])) != canonical_text(encode([other]))


@pytest.mark.parametrize("later", [ANSWER, CALL, PICTURE, RESULT, 7, None, {"content": 3}])
def test_turn_is_the_beginning_of_the_next_whatever_comes(later: Any) -> None:
    first = canonical_text(encode([SYSTEM, USER]))
    assert canonical_text(encode([SYSTEM, USER, later])).startswith(first)


def test_tool_calls_stay_where_they_were_in_later_turns() -> None:
    first = canonical_text(encode([USER, CALL, RESULT]))
    assert canonical_text(encode([USER, CALL, RESULT, ANSWER, PICTURE], sort_keys=True)).startswith(first)


@pytest.mark.parametrize("prompt", [b'"a text"', b"[1, 2, 3]", b'["a", "b"]', b"", b"[", b"[{", b"[{]", b"7"])
def test_what_is_no_conversation_is_left_as_it_is(prompt: bytes) -> None:
    assert canonical_text(prompt) == prompt


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
messages = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "text", "type"]), json_values
)


@settings(max_examples=n_examples(100))
@given(st.lists(messages, min_size=1, max_size=4), st.lists(messages, max_size=2))
def test_odd_messages_never_raise_and_never_spoil_the_prefix(
    first: list[dict[str, Any]], later: list[dict[str, Any]]
) -> None:
    early, late = canonical_text(encode(first)), canonical_text(encode(first + later))
    is_left_alone = early.startswith(b"[")
    assert is_left_alone or late.startswith(early)


@settings(max_examples=n_examples(100))
@given(st.binary(max_size=60))
def test_bytes_of_any_kind_never_raise(rest: bytes) -> None:
    canonical_text(b"[{" + rest)
    canonical_text(b'[{"role":"user","content":"' + rest + b'"}]')


def test_deep_nesting_never_raises() -> None:
    canonical_text(b'[{"role":' + b"[" * 100_000)


def test_lone_surrogates_never_raise() -> None:
    canonical_text(b'[{"role":"user","content":"\\ud800"}]')
