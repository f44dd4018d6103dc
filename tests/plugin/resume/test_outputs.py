"""What the HTTP process notes of outputs, gives to a resumed request, and refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.plugin.resume import sse
from pdserve.plugin.resume.log import parse_log
from pdserve.plugin.resume.outputs import (
    FIELD,
    LOGPROBS_FIELD,
    name_item,
    name_response,
    not_resumable,
    note_ids,
)

PLAIN: dict[str, Any] = {"rid": "aa", "stream": True, "return_logprob": False}


class Request:
    """Of Starlette's what is read."""

    def __init__(self, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self._body = body
        self.scope = {"path": path}

    async def json(self) -> dict[str, Any]:
        return self._body


def _manager(mode: str = "decode", *, incremental: bool = False, speculative: str | None = None) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(disaggregation_mode=mode, speculative_algorithm=speculative),
        model_config=SimpleNamespace(vocab_size=300),
        incremental_streaming_output=incremental,
    )


def _obj(**fields: Any) -> Any:
    return SimpleNamespace(**{"sampling_params": {}, **PLAIN, **fields})


def _out(ids: list[int], text: str, finish: Any = None, **meta: Any) -> dict[str, Any]:
    return {
        "output_ids": ids,
        "text": text,
        "meta_info": {"finish_reason": finish, "cached_tokens": 16, **meta},
    }


async def _run(
    outputs: list[dict[str, Any]], *,
    obj: Any = None, body: dict[str, Any] | None = None, manager: Any = None, path: str = "/v1/completions",
) -> tuple[sse.Stream, list[dict[str, Any]]]:  # fmt: skip
    async def original(manager: Any, obj: Any, request: Any) -> AsyncIterator[dict[str, Any]]:
        for output in outputs:
            yield output

    stream = sse.Stream(is_resumed=body is not None)
    token = sse._stream.set(stream)
    try:
        source = note_ids(original, manager or _manager(), obj or _obj(), Request(body or {}, path))
        return stream, [output async for output in source]
    finally:
        sse._stream.reset(token)


@pytest.mark.parametrize(
    ("incremental", "outputs"),
    [
        (False, [_out([5], "a"), _out([5, 6, 7], "abc"), _out([5, 6, 7], "abc", {"type": "stop"})]),
        (True, [_out([5], "a"), _out([6, 7], "bc"), _out([], "", {"type": "stop"})]),
    ],
)
async def test_words_say_what_is_new_in_either_form(incremental: bool, outputs: list[Any]) -> None:
    stream, got = await _run(outputs, manager=_manager(incremental=incremental))
    assert stream.words == ["5;1;c16", "6,7;2", ";0;e"]
    assert got == outputs
    assert stream.rids == ("aa",)


async def test_an_answer_that_nobody_resumes_is_handed_through() -> None:
    def original(manager: Any, obj: Any, request: Any) -> str:
        return "as it is"

    assert note_ids(original, _manager(), _obj(), Request({FIELD: {}})) == "as it is"


async def test_prefill_and_whole_answers_make_no_words() -> None:
    for stream, _ in (
        await _run([_out([5], "a")], manager=_manager("prefill")),
        await _run([_out([5], "a")], manager=_manager("prefill"), body={FIELD: {"log": "5;1", "frames": 1}}),
        await _run([_out([5], "a")], obj=_obj(stream=False)),
    ):
        assert stream.words == []
        frame = b'data: {"created":17}\n\n'
        assert stream.pass_on(frame) == frame, "not dropped, not named"


async def test_an_abort_is_told_with_its_status() -> None:
    stream, _ = await _run([_out([5], "a"), _out([5], "a", {"type": "abort", "status_code": 500})])
    assert stream.words == ["5;1;c16", "~500"]
    stream, _ = await _run([_out([5], "a", {"type": "abort"})])
    assert stream.words == ["~0"]


async def test_log_probabilities_are_in_the_log() -> None:
    first = _out([5], "a", output_token_logprobs=[(-0.5, 5, None)])
    second = _out([5, 6], "ab", output_token_logprobs=[(-0.5, 5, None), (-1.5, 6, None)])
    stream, _ = await _run([first, second], obj=_obj(return_logprob=True), path="/generate")
    assert [run.logprobs for run in parse_log(" ".join(stream.words)).runs.values()] == [
        [[[-0.5], [], []], [[-1.5], [], []]]
    ]


async def test_a_resumed_request_has_its_tokens_and_makes_words_of_the_others_only() -> None:
    obj = _obj(sampling_params={"temperature": 0})
    body = {FIELD: {"log": "=bb@17 5;1;c3 6;1", "frames": 3}}
    stream, got = await _run([_out([5, 6, 7], "abc"), _out([5, 6, 7, 8], "abcd")], obj=obj, body=body)
    assert obj.sampling_params == {"temperature": 0, "custom_params": {FIELD: [5, 6]}}
    assert [output["output_ids"] for output in got] == [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert stream.words == ["7;1", "8;1"]
    assert (stream.dropper.num_frames, stream.client_rids, stream.created) == (3, ("bb",), 17)
    assert {output["meta_info"]["cached_tokens"] for output in got} == {3}, "as the first leg counted"


async def test_log_probabilities_travel_with_the_tokens() -> None:
    obj = _obj(return_logprob=True)
    log = "5;1;l[[-0.5],[[[-0.5,5]]],[]] 6;1;l[[-1.5],[[]],[]]"
    await _run([], obj=obj, body={FIELD: {"log": log, "frames": 2}}, path="/generate")
    assert obj.sampling_params["custom_params"][LOGPROBS_FIELD] == "[[-0.5, -1.5], [[[-0.5, 5]], []], []]"


async def test_each_prompt_of_a_batch_has_its_own_tokens() -> None:
    obj = _obj(rid=["aa", "bb", "cc"], sampling_params={"n": 1})
    await _run([], obj=obj, body={FIELD: {"log": "5;1 2:6;1", "frames": 2}})
    assert [params.get("custom_params") for params in obj.sampling_params] == [
        {FIELD: [5]},
        None,
        {FIELD: [6]},
    ]


async def test_an_abort_of_the_resumed_leg_drops_nothing() -> None:
    body = {FIELD: {"log": "5;1", "frames": 1}}
    stream, got = await _run([_out([], "", {"type": "abort", "status_code": 503})], body=body)
    assert (stream.words, stream.dropper.num_frames, len(got)) == (["~503"], 0, 1)


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ({"log": "300;1", "frames": 0}, "below 300"),
        ({"log": "-1;1", "frames": 0}, "below 300"),
        ({"log": "1:5;1", "frames": 0}, "run 1"),
        ({"log": "=aa 5;1", "frames": 0}, "new rid"),
        ({"log": "5;1 !beam", "frames": 0}, "!beam"),
        ({"log": "nonsense", "frames": 0}, "nonsense"),
        ({"log": "5;1", "frames": -1}, "frames"),
        ({"log": 5, "frames": 0}, "log"),
        ([5], "log"),
        (None, "log"),
    ],
)
async def test_what_cannot_be_a_resumed_leg_is_refused(resume: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        await _run([], body={FIELD: resume})


async def test_an_error_of_the_resumed_leg_is_heard_though_frames_are_dropped() -> None:
    for error, word in ((ValueError("too long"), "~400"), (RuntimeError("bug"), "~500")):

        async def original(*_: Any, error: Exception = error) -> AsyncIterator[dict[str, Any]]:
            raise error
            yield {}

        stream = sse.Stream(is_resumed=True)
        token = sse._stream.set(stream)
        try:
            request = Request({FIELD: {"log": "5;1", "frames": 9}})
            with pytest.raises(type(error)):
                await anext(note_ids(original, _manager(), _obj(), request))
        finally:
            sse._stream.reset(token)
        assert (stream.words, stream.dropper.num_frames) == ([word], 0)


@pytest.mark.parametrize(
    "params", [{"custom_params": {FIELD: [5]}}, [{}, {"custom_params": {LOGPROBS_FIELD: ""}}]]
)
async def test_a_client_cannot_give_tokens_itself(params: Any) -> None:
    source = note_ids(lambda *_: pytest.fail("asked"), _manager(), _obj(sampling_params=params))
    with pytest.raises(ValueError, match="not a client's"):
        await anext(source)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampling_params": {"beam_width": 3}}, "beam"),
        ({"sampling_params": [{"n": 1}, {"n": 2}]}, "samples"),
        ({"image_data": "x"}, "multimodal"),
        ({"session_params": {"id": "s"}}, "session"),
        ({"return_hidden_states": True}, "hidden_states"),
        ({"return_hidden_states": [False, True], "rid": ["aa", "bb"]}, "hidden_states"),
        ({"return_hidden_states": [False, False], "rid": ["aa", "bb"]}, ""),
        ({"rid": 'a"b'}, "rid"),
        ({"sampling_params": {"n": 1}, "image_data": None, "session_id": None}, ""),
        ({"rid": ["aa", "bb"]}, ""),
    ],
)
async def test_what_cannot_be_resumed_is_said_by_name(fields: dict[str, Any], reason: str) -> None:
    assert not_resumable(_manager(), _obj(**fields)) == reason
    stream, _ = await _run([_out([5], "a")], obj=_obj(**fields))
    assert (f"!{reason}" in stream.words) == bool(reason)


async def test_speculation_cannot_be_resumed() -> None:
    assert not_resumable(_manager(speculative="EAGLE"), _obj()) == "speculation"


def test_response_is_named_before_it_has_a_token() -> None:
    stream = sse.Stream()
    token = sse._stream.set(stream)
    try:
        serving = SimpleNamespace(tokenizer_manager=_manager())
        asked = name_response(lambda *given: given, serving, SimpleNamespace(request_id="resp_ab"), "http")
    finally:
        sse._stream.reset(token)
    assert asked[2] == "http"
    first = stream.pass_on(b'event: response.created\ndata: {"created_at":17}\n\n')
    assert first.startswith(b": ids =resp_ab@17\nevent:")


def test_items_have_the_same_ids_on_every_leg() -> None:
    def ids(**names: Any) -> list[str]:
        stream = sse.Stream()
        for name, value in names.items():
            setattr(stream, name, value)
        token = sse._stream.set(stream)
        try:
            return [name_item(lambda: "random") for _ in range(3)]
        finally:
            sse._stream.reset(token)

    first = ids(rids=("r1",))
    assert ids(rids=("r2",), client_rids=("r1",)) == first
    assert len(set(first)) == 3
    assert name_item(lambda: "random") == "random"
