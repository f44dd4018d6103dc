"""Reading request bodies: the glance and the rewrite must mean the same, and our fields must always win."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.balancer.request.ids import RoomAllocator
from pdserve.balancer.request.parse import parse_plain, parse_request
from pdserve.balancer.request.request import ParsedRequest, RequestRefused, Route
from pdserve.balancer.request.rewrite import rewrite
from tests.support.examples import n_examples

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
prompts = {
    Route.GENERATE: st.fixed_dictionaries({"text": st.text(min_size=1)})
    | st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 50000), min_size=1)}),
    Route.CHAT: st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}), min_size=1
            )
        }
    ),
    Route.COMPLETIONS: st.fixed_dictionaries({"prompt": st.text(min_size=1)}),
    Route.RESPONSES: st.fixed_dictionaries({"input": st.text(min_size=1)}),
    Route.MESSAGES: st.fixed_dictionaries({"messages": st.just([{"role": "user", "content": "x"}])}),
}
OURS = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "request_id")


def sent(request: ParsedRequest, port: int | None = 9) -> dict[str, Any]:
    """The body the workers would get."""
    ids = RoomAllocator().take(request.num_prompts, request.route.rid_prefix)
    body = json.loads(request.render_body("10.0.0.1", port, ids))
    is_one = request.num_prompts is None
    expected = {
        "bootstrap_host": "10.0.0.1" if is_one else ["10.0.0.1"] * request.num_prompts,
        "bootstrap_port": port if is_one else [port] * request.num_prompts,
        "bootstrap_room": ids.rooms[0] if is_one else list(ids.rooms),
    }
    if request.route.rid_field:
        expected[request.route.rid_field] = ids.rids[0] if is_one else list(ids.rids)
    place = body["parameters"] if request.route is Route.VERTEX else body
    assert {name: place.get(name) for name in expected} == expected
    return dict(body)


@given(
    data=st.data(),
    route=st.sampled_from(sorted(prompts)),
    more=st.dictionaries(st.text(max_size=12), json_values, max_size=4),
    space=st.sampled_from(["", " ", "\n\t", "\r\n  "]),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=n_examples(300))
def test_a_spliced_body_is_the_clients_with_ours_added(
    data: st.DataObject, route: Route, more: dict[str, Any], space: str, indent: int | None
) -> None:
    fields = {**{k: v for k, v in more.items() if k not in OURS}, **data.draw(prompts[route])}
    body = (space + json.dumps(fields, ensure_ascii=data.draw(st.booleans()), indent=indent) + space).encode()
    quick = parse_plain(route, body, wants_prompt=True)
    if quick is None:
        return
    slow = rewrite(route, body, wants_prompt=True)
    for request in (quick, slow):
        got = sent(request)
        assert {k: v for k, v in got.items() if k not in OURS} == fields
    assert (quick.is_stream, quick.num_prompts, quick.num_samples) == (slow.is_stream, None, 1)
    assert quick.shape.max_new_tokens == slow.shape.max_new_tokens
    assert quick.shape.priority == slow.shape.priority


@pytest.mark.parametrize(
    "body",
    [
        b'{"text":"a","rid":"mine"}',
        b'{"text":"a","\\u0072id":"mine"}',
        b'{"text":"a","bootstrap_room":7}',
        b'{"text":"a","b\\u006fotstrap_host":"evil"}',
        b'{"bootstrap_room":7,"text":"a","bootstrap_room":8}',
        b'{"text":"a"}  \n',
        b'{"text":"} \\"rid\\":\\"x\\"}"}',
        b'{"text":["a"],"text":"b"}',
    ],
)
def test_no_spelling_gets_a_room_or_name_past_ours(body: bytes) -> None:
    sent(parse_request(Route.GENERATE, body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b'{"text":"a"}x',
        b'{"text":"a"}{"text":"b"}',
        b'\xef\xbb\xbf{"text":"a"}',
        b'{"text":"a",}',
        b"{'text':'a'}",
        b'{"text":"\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"null",
        b'"text"',
        b'{"text":[]}',
        b'{"text":"a","sampling_params":{"n":1000000}}',
        b'{"text":["a","b"],"sampling_params":[{"n":2},{"n":3}]}',
        b'{"text":""}',
        b'{"text":["a",""]}',
        b'{"input_ids":[]}',
        b'{"input_ids":[[1],[]]}',
        b'{"text":"a","return_logprob":true,"top_logprobs_num":129}',
        b'{"text":["a","b"],"return_logprob":true,"top_logprobs_num":[1,200]}',
    ],
)
def test_what_cannot_be_read_is_a_clients_fault(body: bytes) -> None:
    with pytest.raises(RequestRefused) as caught:
        parse_request(Route.GENERATE, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (Route.COMPLETIONS, b'{"prompt":""}'),
        (Route.COMPLETIONS, b'{"prompt":["abc",""]}'),
        (Route.COMPLETIONS, b'{"prompt":"a","logprobs":129}'),
        (Route.CHAT, b'{"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":129}'),
        (Route.VERTEX, b'{"instances":[{"text":"a"},{"text":""}]}'),
    ],
)
def test_what_would_kill_a_server_goes_to_none(route: Route, body: bytes) -> None:
    with pytest.raises(RequestRefused) as caught:
        parse_request(route, body)
    assert caught.value.status == 400


def test_samples_become_copies_prompt_by_prompt() -> None:
    body = (
        b'{"text":["a","b"],"sampling_params":{"n":2,"top_k":5},"image_data":["i","j"],"return_logprob":true}'
    )
    request = parse_request(Route.GENERATE, body)
    got = sent(request)
    assert got["text"] == ["a", "a", "b", "b"]
    assert got["image_data"] == ["i", "i", "j", "j"]
    assert got["sampling_params"] == {"n": 1, "top_k": 5}
    assert got["return_logprob"] is True
    assert (request.num_prompts, request.num_samples) == (4, 2)


def test_samples_of_one_prompt_keep_its_list_of_images_together() -> None:
    request = parse_request(Route.GENERATE, b'{"text":"a","sampling_params":{"n":2},"image_data":["i","j"]}')
    got = sent(request)
    assert (got["text"], got["image_data"]) == (["a", "a"], [["i", "j"], ["i", "j"]])


def test_samples_of_token_ids_are_told_from_a_batch() -> None:
    one = parse_request(Route.GENERATE, b'{"input_ids":[1,2],"sampling_params":{"n":2}}')
    assert sent(one)["input_ids"] == [[1, 2], [1, 2]]
    completion = parse_request(Route.COMPLETIONS, b'{"prompt":[1,2],"n":2}')
    assert sent(completion)["prompt"] == [[1, 2], [1, 2]]
    assert sent(parse_request(Route.COMPLETIONS, b'{"prompt":[[1],[2]]}'))["prompt"] == [[1], [2]]


@pytest.mark.parametrize("n", ["2", '"2"', "2.0"])
def test_n_is_read_as_pydantic_reads_it(n: str) -> None:
    request = parse_request(Route.CHAT, b'{"messages":[{"role":"user","content":"x"}],"n":%b}' % n.encode())
    assert (request.num_samples, request.num_requests, sent(request)["n"]) == (2, 2, 1)


def test_beam_search_is_one_request() -> None:
    request = parse_request(Route.GENERATE, b'{"text":"a","sampling_params":{"n":2,"beam_width":4}}')
    assert (request.num_samples, request.num_prompts) == (1, None)


def test_vertex_carries_our_fields_in_its_parameters() -> None:
    body = b'{"instances":[{"text":"a"},{"text":"b"}],"parameters":{"sampling_params":{"n":2}}}'
    got = sent(parse_request(Route.VERTEX, body))
    assert [item["text"] for item in got["instances"]] == ["a", "a", "b", "b"]
    assert len(set(got["parameters"]["bootstrap_room"])) == 4


def test_a_response_gets_an_id_that_can_be_fetched() -> None:
    got = sent(parse_request(Route.RESPONSES, b'{"input":"hi"}'))
    assert got["request_id"].startswith("resp_") and "rid" not in got


def test_an_earlier_response_cannot_be_continued_and_that_is_said() -> None:
    with pytest.raises(RequestRefused, match="whole conversation") as caught:
        parse_request(Route.RESPONSES, b'{"input":"hi","previous_response_id":"resp_1"}')
    assert caught.value.status == 501


def test_bytes_of_pictures_are_not_tokens() -> None:
    picture = "data:image/png;base64," + "A" * 400_000
    content = [{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {"url": picture}}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    request = parse_request(Route.CHAT, body)
    assert request.shape.prompt_tokens < 100
    assert sent(request)["messages"][0]["content"][1]["image_url"]["url"] == picture


def test_priority_and_limits_are_read() -> None:
    shape = parse_request(Route.CHAT, b'{"messages":[1],"max_completion_tokens":5,"priority":-3}').shape
    assert (shape.max_new_tokens, shape.priority) == (5, -3)
    assert parse_request(Route.CHAT, b'{"messages":[1],"max_tokens":null}').shape.max_new_tokens == 128
    assert (
        parse_request(
            Route.GENERATE, b'{"text":"a","sampling_params":{"max_new_tokens":0}}'
        ).shape.max_new_tokens
        == 0
    )


def test_every_copy_of_a_prompt_needs_room() -> None:
    plain = parse_request(Route.GENERATE, b'{"input_ids":[1,2,3,4]}').shape
    batch = parse_request(Route.GENERATE, b'{"input_ids":[[1,2],[3,4]],"sampling_params":{"n":3}}').shape
    assert (plain.prompt_tokens, plain.num_prompts) == (4, 1)
    assert (batch.prompt_tokens, batch.num_prompts) == (12, 6)


def test_prompt_is_given_to_policies_that_ask() -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
    assert parse_request(Route.CHAT, body).shape.prompt == b""
    assert (
        parse_request(Route.CHAT, body, wants_prompt=True).shape.prompt == b'[{"role":"user","content":"hi"}]'
    )
    named = b'{"rid":"x","messages":[{"role":"user","content":"hi"}]}'
    assert (
        parse_request(Route.CHAT, named, wants_prompt=True).shape.prompt
        == b'[{"role":"user","content":"hi"}]'
    )
