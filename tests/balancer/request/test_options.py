"""Options are read as SGLang's own models read them: a table here, the models themselves where SGLang is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pdserve.balancer.request.options import lax_bool, lax_int
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import ParsedRequest, RequestRefused, Route
from tests.support.balancer_client import running_site
from tests.support.examples import n_examples

TRUE = (True, 1, 1.0, "true", "True", "yes", "YES", "y", "on", "On", "1", "t")
FALSE = (False, 0, 0.0, "false", "no", "n", "off", "0", "f")
REFUSED = (2, -1, 0.5, "", "x", " true", "2", [], {}, [1])
TWO = (2, 2.0, "2", " 2 ", "2.0", "+2", "0_2")

words = st.sampled_from(
    ["true", "on", "yes", "0", "1", "t", "n", "12", "-3", "+2", "2.0", "1_0", " ", ".", "e"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from([2.0**63, -(2.0**63), 2.0**63 - 1024])
    | st.integers(-5, 5).map(float)
    | st.text(max_size=4)
    | st.lists(words, max_size=3).map("".join)
    | words.map(str.upper)
    | st.lists(st.integers(), max_size=1)
    | st.just({})
)
BASE: dict[Route, dict[str, Any]] = {
    Route.CHAT: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    Route.INVOCATIONS: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    Route.COMPLETIONS: {"model": "m", "prompt": "a"},
    Route.RESPONSES: {"model": "m", "input": "a"},
    Route.MESSAGES: {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9},
}


def read(route: Route, **fields: Any) -> ParsedRequest:
    """The request as the balancer reads it."""
    return parse_request(route, json.dumps({**BASE[route], **fields}).encode())


ADAPTERS: dict[type, TypeAdapter[Any]] = {bool: TypeAdapter(bool), int: TypeAdapter(int)}


def _theirs(kind: type, value: Any) -> Any:
    try:
        return ADAPTERS[kind].validate_python(value)
    except ValidationError:
        return None


@given(scalars)
@settings(deadline=None, max_examples=n_examples(200))
def test_a_bool_is_read_as_pydantic_reads_it(value: Any) -> None:
    assert lax_bool(value) is _theirs(bool, value)


@given(scalars)
@settings(deadline=None, max_examples=n_examples(200))
def test_an_int_is_read_as_pydantic_reads_it(value: Any) -> None:
    if isinstance(value, str) and re.match(r"\s*[+-]?0[0_]*[+-]", value):
        return  # pydantic drops leading zeros first, and so takes "0-1" for -1
    ours = lax_int(value)
    assert ours == _theirs(int, value)
    assert type(ours) in (int, type(None))


def test_numbers_too_long_to_convert_are_refused() -> None:
    for digits in ("1" * 4300, "1" * 4301):
        assert lax_int(digits) == _theirs(int, digits)


@pytest.mark.parametrize("route", BASE)
def test_stream_is_what_the_models_make_of_it(route: Route) -> None:
    assert all(read(route, stream=value).is_stream for value in TRUE)
    assert not any(read(route, stream=value).is_stream for value in (*FALSE, *REFUSED, None))


def test_the_body_keeps_what_the_client_wrote() -> None:
    request = read(Route.CHAT, stream="true", n="1", max_tokens="7")
    assert request.fields is not None
    assert (request.fields["stream"], request.fields["n"], request.fields["max_tokens"]) == ("true", "1", "7")


def test_generate_takes_the_types_of_json_only() -> None:
    """SGLang's contract of /generate refuses anything else."""
    for value in ("true", 1):
        request = parse_request(Route.GENERATE, json.dumps({"text": "a", "stream": value}).encode())
        assert not request.is_stream
    for n in ("2", 2.5):
        body = {"text": "a", "sampling_params": {"n": n}}
        request = parse_request(Route.GENERATE, json.dumps(body).encode())
        assert (request.num_samples, request.num_prompts) == (1, None)
        assert request.fields == body


def test_vertex_streams_for_whatever_is_true_in_python() -> None:
    def streams(value: Any) -> bool:
        body = {"instances": [{"text": "a"}], "parameters": {"stream": value}}
        return parse_request(Route.VERTEX, json.dumps(body).encode()).is_stream

    assert all(map(streams, (True, 1, "false", "x", [0])))
    assert not any(map(streams, (False, 0, "", None, [])))


@pytest.mark.parametrize("n", TWO)
def test_samples_are_counted_whatever_n_is_written_as(n: Any) -> None:
    assert read(Route.CHAT, n=n).num_requests == 2
    assert read(Route.COMPLETIONS, n=n).num_prompts == 2


@pytest.mark.parametrize("limit", TWO)
def test_limits_are_read_whatever_they_are_written_as(limit: Any) -> None:
    for route, name in (
        (Route.CHAT, "max_tokens"),
        (Route.CHAT, "max_completion_tokens"),
        (Route.COMPLETIONS, "max_tokens"),
        (Route.MESSAGES, "max_tokens"),
        (Route.RESPONSES, "max_output_tokens"),
    ):
        assert read(route, **{name: limit}).shape.max_new_tokens == 2


@pytest.mark.parametrize("limit", [10**400, "9" * 400], ids=["number", "text"])
async def test_a_limit_of_hundreds_of_digits_is_for_the_worker_to_refuse(limit: Any) -> None:
    async with running_site() as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**BASE[Route.CHAT], "max_tokens": limit})
        assert reply.status == 200  # of the fake, which looks at no limit


def test_a_limit_of_another_route_is_none() -> None:
    assert read(Route.RESPONSES, max_tokens=5).shape.max_new_tokens == 128
    assert read(Route.COMPLETIONS, max_completion_tokens=5).shape.max_new_tokens == 128
    assert read(Route.CHAT, max_completion_tokens=0, max_tokens=5).shape.max_new_tokens == 5
    assert read(Route.CHAT, max_completion_tokens="0", max_tokens="5").shape.max_new_tokens == 5


def test_echo_with_logprobs_waits_for_prefill_only_where_both_are_on() -> None:
    def waits(echo: Any, logprobs: Any) -> bool:
        return read(Route.COMPLETIONS, echo=echo, logprobs=logprobs).needs_prefill_answer

    assert all(waits(echo, logprobs) for echo in TRUE for logprobs in (*TWO, True))
    assert not any(waits(echo, 2) for echo in (*FALSE, "maybe"))
    assert not any(waits(True, logprobs) for logprobs in (None, 0, "0", 0.0, False))


@pytest.mark.parametrize("number", ["129", 129.0, " 1_000 "])
def test_too_many_logprobs_are_refused_whatever_they_are_written_as(number: Any) -> None:
    for route, name in ((Route.COMPLETIONS, "logprobs"), (Route.CHAT, "top_logprobs")):
        with pytest.raises(RequestRefused, match="128 at most"):
            read(route, **{name: number})


def test_priority_is_read_whatever_it_is_written_as() -> None:
    assert read(Route.CHAT, priority="-3").shape.priority == -3
    assert read(Route.CHAT, priority=2.0, user="u").shape.priority == 2


# -- SGLang's own models -----------------------------------------------------------------------

READINGS = {
    "stream": lambda request: request.is_stream,
    "n": lambda request: request.num_samples,
    "echo": lambda request: request.needs_prefill_answer,
    "return_routed_experts": lambda request: request.needs_prefill_answer,
    "priority": lambda request: request.shape.priority,
    "max_tokens": lambda request: request.shape.max_new_tokens,
    "max_completion_tokens": lambda request: request.shape.max_new_tokens,
    "max_output_tokens": lambda request: request.shape.max_new_tokens,
}
"""What the balancer makes of a field."""
FIELDS = {
    Route.CHAT: (
        "stream", "n", "priority", "max_tokens", "max_completion_tokens", "return_routed_experts"
    ),
    Route.COMPLETIONS: ("stream", "n", "echo", "priority", "max_tokens", "return_routed_experts"),
    Route.RESPONSES: ("stream", "priority", "max_output_tokens"),
    Route.MESSAGES: ("stream", "max_tokens"),
}  # fmt: skip


def _expected(name: str, value: Any) -> Any:
    """What must come of the value that SGLang's model has for a field; the balancer's limits aside."""
    if name in ("stream", "echo", "return_routed_experts"):
        return bool(value)
    if name == "n":
        return max(1, value)
    if name == "priority":
        return value
    return min(value, 2**31) if value and value > 0 else 128  # no limit, or one that leads to an error


@pytest.mark.engine
def test_whatever_sglangs_models_accept_is_read_as_they_read_it() -> None:
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.openai.protocol import (
        ChatCompletionRequest,
        CompletionRequest,
        ResponsesRequest,
    )

    models = {
        Route.CHAT: ChatCompletionRequest,
        Route.COMPLETIONS: CompletionRequest,
        Route.RESPONSES: ResponsesRequest,
        Route.MESSAGES: AnthropicMessagesRequest,
    }
    accepted: set[tuple[Route, str]] = set()

    @given(st.sampled_from([(r, n) for r, names in FIELDS.items() for n in names]), scalars)
    @settings(deadline=None, max_examples=n_examples(3000))
    def compare(place: tuple[Route, str], value: Any) -> None:
        route, name = place
        given_fields = {name: value} | ({"logprobs": 1} if name == "echo" else {})
        body = json.dumps({**BASE[route], **given_fields}).encode()
        if isinstance(value, str) and re.match(r"\s*[+-]?0[0_]*[+-]", value):
            return
        try:
            theirs = getattr(models[route].model_validate(json.loads(body)), name)
        except (ValidationError, ValueError):
            return
        if name == "n" and theirs > 1024:
            return
        accepted.add(place)
        request = parse_request(route, body)
        assert READINGS[name](request) == _expected(name, theirs), (place, value, theirs)

    compare()
    assert len(accepted) == sum(map(len, FIELDS.values()))


@pytest.mark.engine
def test_generate_refuses_what_is_not_jsons_own_type() -> None:
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    for value in (True, False, None):
        assert generate_contract_error({"text": "a", "stream": value}) is None
    for value in (*TRUE[1:], *FALSE[1:], *REFUSED):
        assert generate_contract_error({"text": "a", "stream": value}) is not None
    for n in ("2", 2.0, True):
        assert generate_contract_error({"text": "a", "sampling_params": {"n": n}}) is not None
