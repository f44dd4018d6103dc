"""Size and key of a prompt: all that the chat template renders counts, adapter and salt part it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.balancer.request.parse import parse_plain, parse_request
from pdserve.balancer.request.request import Route
from pdserve.scheduling.policy import PromptTree
from pdserve.types import InstanceId, RequestShape

MESSAGES = [{"role": "user", "content": "hi"}]
NAMES = [f"tool_{index}" for index in range(60)]
TEXT = "does one thing and does it well, as long as it is asked for it. " * 15
TOOLS = [
    {"type": "function", "function": {"name": name, "description": TEXT, "parameters": {"type": "object"}}}
    for name in NAMES
]
ANTHROPIC_TOOLS = [{"name": name, "description": TEXT, "input_schema": {"type": "object"}} for name in NAMES]
RESPONSES_TOOLS = [{"type": "function", "name": name, "description": TEXT} for name in NAMES]
BODIES: dict[Route, dict[str, Any]] = {
    Route.CHAT: {"model": "m", "messages": MESSAGES},
    Route.INVOCATIONS: {"model": "m", "messages": MESSAGES},
    Route.MESSAGES: {"model": "m", "max_tokens": 9, "messages": MESSAGES},
    Route.RESPONSES: {"model": "m", "input": "hi"},
    Route.COMPLETIONS: {"model": "m", "prompt": TEXT},
    Route.GENERATE: {"text": TEXT},
}
HEADS: list[tuple[Route, dict[str, Any]]] = [
    (Route.CHAT, {"tools": TOOLS}),
    (Route.INVOCATIONS, {"tools": TOOLS}),
    (Route.MESSAGES, {"tools": ANTHROPIC_TOOLS}),
    (Route.RESPONSES, {"tools": RESPONSES_TOOLS}),
    (Route.MESSAGES, {"system": TEXT * 60}),
    (Route.MESSAGES, {"system": [{"type": "text", "text": TEXT * 60}]}),
    (Route.RESPONSES, {"instructions": TEXT * 60}),
    (Route.CHAT, {"chat_template_kwargs": {"documents": [TEXT * 60]}}),
]
PARTING = [
    (Route.CHAT, {"cache_salt": "a"}, {"cache_salt": "b"}),
    (Route.CHAT, {"extra_key": "a"}, {"extra_key": "b"}),
    (Route.CHAT, {"lora_path": "a"}, {"lora_path": "b"}),
    (Route.CHAT, {"lora_path": "a"}, {"cache_salt": "a"}),
    (Route.CHAT, {"lora_path": "a"}, {}),
    (Route.CHAT, {"model": "m:a"}, {"model": "m:b"}),
    (Route.MESSAGES, {"model": "m:a"}, {"model": "m:b"}),
    (Route.COMPLETIONS, {"model": "m:a"}, {"model": "m"}),
    (Route.COMPLETIONS, {"cache_salt": "a"}, {"cache_salt": "b"}),
    (Route.RESPONSES, {"cache_salt": "a"}, {}),
    (Route.GENERATE, {"lora_path": "a"}, {"lora_path": "b"}),
    (Route.GENERATE, {"extra_key": "a"}, {}),
    (Route.CHAT, {"reasoning_effort": "low"}, {"reasoning_effort": "high"}),
]
"""Two ways to send the same messages that have no page of KV in common."""


def shape_of(route: Route, **fields: Any) -> RequestShape:
    """The request as policies see it."""
    body = json.dumps({**BODIES[route], **fields}).encode()
    return parse_request(route, body, wants_prompt=True).shape


def shared(first: RequestShape, second: RequestShape) -> float:
    """Which part of ``second`` a worker holds that has served ``first``."""
    tree, worker = PromptTree(), InstanceId("w")
    tree.hold(tree.read(first.prompt, with_tail=True), worker, 0.0)
    return tree.match(tree.read(second.prompt, with_tail=True), [worker], 0.0)[0]


@pytest.mark.parametrize(("route", "head"), HEADS)
def test_what_precedes_the_messages_counts_towards_size_and_prefix(
    route: Route, head: dict[str, Any]
) -> None:
    rendered = len(json.dumps(next(iter(head.values()))))
    assert rendered > 50_000
    other = {"input": "yo"} if route is Route.RESPONSES else {"messages": [{"role": "user", "content": "yo"}]}
    first, second = shape_of(route, **head), shape_of(route, **head, **other)
    assert rendered / 4 <= first.prompt_tokens <= rendered / 4 + 50
    assert first.prompt != second.prompt
    assert shared(first, second) > 0.95
    assert shared(shape_of(route), first) < 0.05


@pytest.mark.parametrize(("route", "head"), HEADS)
def test_a_request_that_is_rewritten_has_the_key_of_one_that_is_not(
    route: Route, head: dict[str, Any]
) -> None:
    body = json.dumps({**BODIES[route], **head}, indent=1).encode()
    assert parse_plain(route, body, wants_prompt=True) is not None
    named = {route.rid_field: "x"} if route.rid_field else {"stream": "true"}
    renamed = json.dumps({**BODIES[route], **head, **named}, indent=1).encode()
    assert parse_plain(route, renamed, wants_prompt=True) is None
    plain, rewritten = (parse_request(route, each, wants_prompt=True).shape for each in (body, renamed))
    assert shared(plain, rewritten) > 0.95
    assert abs(plain.prompt_tokens - rewritten.prompt_tokens) < 50


@pytest.mark.parametrize(("route", "one", "other"), PARTING)
@pytest.mark.parametrize("more", [{}, {"stream": "true"}], ids=["plain", "rewritten"])
def test_adapter_and_salt_part_the_prefix(
    route: Route, one: dict[str, Any], other: dict[str, Any], more: dict[str, Any]
) -> None:
    long = {} if "text" in BODIES[route] or "prompt" in BODIES[route] else {"messages": [
        {"role": "user", "content": TEXT}
    ]}  # fmt: skip
    if route is Route.RESPONSES:
        long = {"input": TEXT}
    first, second = shape_of(route, **long, **one, **more), shape_of(route, **long, **other, **more)
    assert shared(first, first) == 1.0
    assert shared(first, second) == shared(second, first) == 0.0


@pytest.mark.parametrize("name", ["lora_path", "cache_salt", "extra_key", "tools", "chat_template_kwargs"])
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_what_is_empty_parts_nothing(name: str, empty: Any) -> None:
    assert shape_of(Route.CHAT, **{name: empty}).prompt == shape_of(Route.CHAT).prompt


def test_the_models_name_alone_parts_nothing() -> None:
    """SGLang ignores it but for an adapter behind a colon."""
    assert shape_of(Route.CHAT, model="x").prompt == shape_of(Route.CHAT, model="y").prompt
    assert shape_of(Route.GENERATE, model="a:b").prompt == shape_of(Route.GENERATE).prompt


def test_fields_of_other_routes_count_for_nothing() -> None:
    for route, name in (
        (Route.CHAT, "system"), (Route.CHAT, "instructions"), (Route.MESSAGES, "instructions"),
        (Route.RESPONSES, "system"), (Route.COMPLETIONS, "tools"), (Route.GENERATE, "tools"),
    ):  # fmt: skip
        assert shape_of(route, **{name: TEXT}) == shape_of(route)


@pytest.mark.parametrize(
    ("route", "tools", "none", "one"),
    [
        (Route.CHAT, TOOLS, "none", {"type": "function", "function": {"name": "tool_7"}}),
        (Route.MESSAGES, ANTHROPIC_TOOLS, {"type": "none"}, {"type": "tool", "name": "tool_7"}),
        (Route.RESPONSES, RESPONSES_TOOLS, "none", {"type": "function", "name": "tool_7"}),
    ],
)
def test_only_tools_that_may_be_called_are_rendered(route: Route, tools: Any, none: Any, one: Any) -> None:
    size = shape_of(route, tools=tools).prompt_tokens
    bare = shape_of(route).prompt_tokens
    assert shape_of(route, tools=tools, tool_choice=none).prompt_tokens == bare
    assert size / 70 < shape_of(route, tools=tools, tool_choice=one).prompt_tokens - bare < size / 50
    for choice in ("auto", "required", {"type": "auto"}, None):
        assert shape_of(route, tools=tools, tool_choice=choice).prompt_tokens == size


def test_token_ids_of_a_chat_take_the_templates_place() -> None:
    shape = shape_of(Route.CHAT, input_ids=[1, 2, 3], tools=TOOLS)
    assert (shape.prompt_tokens, shape.prompt) == (3, b"[1,2,3]")


def test_tool_calls_and_their_arguments_count() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"text": TEXT})}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for more in ({}, {"rid": "x"}):
        tokens = shape_of(Route.CHAT, messages=messages, **more).prompt_tokens
        assert len(TEXT) / 4 < tokens < len(TEXT) / 4 + 80


@pytest.mark.parametrize("tools", ["x", 5, {"a": 1}, [1, "a", None], [[]]])
def test_odd_tools_never_raise(tools: Any) -> None:
    for choice in ("none", {"type": "tool", "name": "x"}, 7, ["name"], "name"):
        shape_of(Route.CHAT, tools=tools, tool_choice=choice)


def test_marks_for_anthropics_cache_do_not_part_the_turns() -> None:
    """Its clients put them on the last message, which is not the last one in the next turn."""

    def turn(number: int, *, has_mark: bool) -> dict[str, Any]:
        block = {"type": "tool_result", "tool_use_id": f"t{number}", "content": TEXT}
        return {
            "role": "user",
            "content": [{**block, **({"cache_control": {"type": "e"}} if has_mark else {})}],
        }

    first = shape_of(Route.MESSAGES, messages=[turn(0, has_mark=False), turn(1, has_mark=True)])
    second = [turn(0, has_mark=False), turn(1, has_mark=False), turn(2, has_mark=True)]
    assert shared(first, shape_of(Route.MESSAGES, messages=second)) > 0.6
