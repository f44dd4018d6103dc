"""Requests of /v1/completions, /v1/chat/completions and /invocations for the conformance test."""

from __future__ import annotations

from typing import Any

from tests.engine.conformance import Case
from tests.engine.conformance_native import JSON_SCHEMA, LETTERS, ids, words

MODEL = "tiny"
USAGE = {"stream_options": {"include_usage": True}}
EVERY_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _completion(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "prompt": words(f"c {name}"), "temperature": 0, "max_tokens": 8, **fields}
    return Case(f"completion {name}", "/v1/completions", body)


def _prompts(name: str, count: int = 2) -> list[str]:
    return [words(f"c {name} {index}", 10 + 8 * index) for index in range(count)]


def _raw(name: str, path: str, body: Any, **how: Any) -> Case:
    return Case(name, path, body, **how)


COMPLETIONS = [
    _completion("text"),
    _completion("ids", prompt=ids("c ids")),
    _completion("texts", prompt=_prompts("texts", 3)),
    _completion("one text in a list", prompt=_prompts("one", 1)),
    _completion("lists of ids", prompt=[ids("c l0", 9), ids("c l1", 70)]),
    _completion("another model", model="no-such-model"),
    _completion("echo", echo=True),
    _completion("echo of ids", prompt=ids("c echo ids"), echo=True),
    _completion("echo of texts", prompt=_prompts("echo"), echo=True),
    _completion("logprobs 2", logprobs=2),
    _completion("logprobs 0", logprobs=0),
    _completion("logprobs of texts", prompt=_prompts("lp"), logprobs=1),
    _completion("echo and logprobs 2", echo=True, logprobs=2),
    _completion("echo and logprobs 0", echo=True, logprobs=0),
    _completion("echo and logprobs, one token", echo=True, logprobs=1, max_tokens=1),
    _completion("echo and logprobs of ids", prompt=ids("c e l"), echo=True, logprobs=1),
    _completion("echo and logprobs of lists", prompt=[ids("cx0", 9), ids("cx1", 70)], echo=True, logprobs=3),
    _completion("echo and logprobs, streamed", echo=True, logprobs=2, stream=True),
    _completion("echo, logprobs, texts, streamed", prompt=_prompts("e"), echo=True, logprobs=1, stream=True),
    _completion("logprobs, streamed", logprobs=2, stream=True),
    _completion("n 2", n=2),
    _completion("n 3 of texts", prompt=_prompts("n3"), n=3),
    _completion("n 2, echo and logprobs", n=2, echo=True, logprobs=1),
    _completion("n 2, echo and logprobs, streamed", n=2, echo=True, logprobs=1, stream=True, **USAGE),
    _completion("n 2, streamed with usage", n=2, stream=True, **USAGE),
    _completion("n 2 of texts, streamed with usage", prompt=_prompts("n2s"), n=2, stream=True, **USAGE),
    _completion("n 2, streamed with every usage", n=2, stream=True, **EVERY_USAGE),
    _completion("n 1", n=1),
    _completion("best_of", best_of=2),
    _completion("suffix", suffix=" the end"),
    _completion("streamed", stream=True),
    _completion("streamed with usage", stream=True, **USAGE),
    _completion("streamed with every usage", stream=True, **EVERY_USAGE),
    _completion("texts, streamed with usage", prompt=_prompts("ts"), stream=True, **USAGE),
    _completion("stop", stop=LETTERS, max_tokens=40),
    _completion("stop, streamed", stop=LETTERS, max_tokens=40, stream=True, **USAGE),
    _completion("stop, a string", stop="e", max_tokens=30),
    _completion("stop_token_ids", stop_token_ids=list(range(32, 64)), max_tokens=30),
    _completion("max_tokens 1", max_tokens=1),
    _completion("max_tokens 1, streamed", max_tokens=1, stream=True, **USAGE),
    _completion("user and seed", user="me", seed=3),
    _completion("penalties", presence_penalty=1.0, frequency_penalty=0.5, max_tokens=20),
    _completion("repetition_penalty", repetition_penalty=1.5, max_tokens=20),
    _completion("logit_bias", logit_bias={"65": 50}),
    _completion("ignore_eos and the end token", logit_bias={"258": 60}, ignore_eos=True),
    _completion("the end token", logit_bias={"258": 60}),
    _completion("return_token_ids", return_token_ids=True),
    _completion("return_token_ids, streamed", return_token_ids=True, stream=True),
    _completion("return_cached_tokens_details", return_cached_tokens_details=True),
    _completion("regex", regex="[0-9]{3}"),
    _completion("json_schema", json_schema=JSON_SCHEMA, max_tokens=30),
    _completion("response_format", response_format=SCHEMA, max_tokens=10),
    _completion("min_tokens", min_tokens=5, stop_token_ids=list(range(32, 64))),
    _completion("rid", rid="a completion of mine"),
    _completion("rids of texts", prompt=_prompts("rids"), rid=["left", "right"]),
    _completion("priority", priority=1),
    _completion("top_p and top_k", top_p=0.9, top_k=5),
    Case(
        "completion, cached with details",
        "/v1/completions",
        {"model": MODEL, "prompt": ids("c c", 70), "temperature": 0, "return_cached_tokens_details": True},
        first={"model": MODEL, "prompt": ids("c c", 70), "temperature": 0},
    ),
]  # fmt: skip

COMPLETION_ERRORS = [
    _completion("empty prompt", prompt=""),
    _completion("empty list", prompt=[]),
    _completion("list of empty texts", prompt=["", ""]),
    _completion("prompt is a number", prompt=7),
    _completion("prompt is null", prompt=None),
    _completion("mixed prompts", prompt=["abc", [1, 2]]),
    _completion("too long", prompt=[65] * 5000),
    _completion("too long, streamed", prompt=[65] * 5000, stream=True),
    _completion("max_tokens 0", max_tokens=0),
    _completion("max_tokens is a word", max_tokens="many"),
    _completion("temperature -3", temperature=-3),
    _completion("n 0", n=0),
    _completion("n -1", n=-1),
    _completion("n is a word", n="two"),
    _completion("logprobs is a word", logprobs="all"),
    _completion("logit_bias of no token", logit_bias={"abc": 1}),
    _completion("stream_options is a word", stream=True, stream_options="usage"),
    _completion("response_format unknown", response_format={"type": "poem"}),
    _raw("completion no prompt", "/v1/completions", {"model": MODEL}),
    _raw("completion no fields", "/v1/completions", {}),
    _raw("completion broken JSON", "/v1/completions", b'{"prompt": '),
    _raw("completion array", "/v1/completions", b"[]"),
    _raw("completion no body", "/v1/completions", b""),
    _raw("completion by GET", "/v1/completions", None, method="GET"),
    _raw("completion by PUT", "/v1/completions", {"prompt": "abc"}, method="PUT"),
    _raw("completion as text", "/v1/completions", {"prompt": "abc"}, headers={"Content-Type": "text/plain"}),
    _raw("completion without content type", "/v1/completions", {"prompt": "a"}, headers={"Content-Type": ""}),
    _raw(
        "completion with a charset", "/v1/completions",
        {"model": MODEL, "prompt": words("charset"), "temperature": 0},
        headers={"Content-Type": "application/json; charset=utf-8"},
    ),
]  # fmt: skip


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _chat(name: str, path: str = "/v1/chat/completions", **fields: Any) -> Case:
    body = {
        "model": MODEL,
        "messages": _user(words(f"h {name}")),
        "temperature": 0,
        "max_tokens": 8,
        **fields,
    }
    return Case(f"{'chat' if path.startswith('/v1') else 'invocation'} {name}", path, body)


_TALK = [
    {"role": "system", "content": words("h system")},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
_IDS = {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
_PARTS = [{"type": "text", "text": words("h parts")}, {"type": "text", "text": "and more"}]
_CALLED = [
    {"role": "user", "content": words("h tool")},
    {
        "role": "assistant", "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]  # fmt: skip

CHAT = [
    _chat("user"),
    _chat("talk", messages=_TALK),
    _chat("content parts", messages=[{"role": "user", "content": _PARTS}]),
    _chat("developer", messages=[{"role": "developer", "content": "be brief"}, *_user(words("h dev"))]),
    _chat("tool answer", messages=_CALLED),
    _chat("assistant last", messages=[*_user(words("h al")), {"role": "assistant", "content": "Well"}],
          continue_final_message=True),
    _chat("name", messages=[{"role": "user", "name": "me", "content": words("h name")}]),
    _chat("unicode", messages=_user("Grüße, 世界 🙂 " + words("h uni"))),
    _chat("logprobs", logprobs=True),
    _chat("logprobs, top 3", logprobs=True, top_logprobs=3),
    _chat("top_logprobs alone", top_logprobs=3),
    _chat("logprobs, streamed", logprobs=True, top_logprobs=1, stream=True),
    _chat("n 2", n=2),
    _chat("n 3, logprobs", n=3, logprobs=True, top_logprobs=1),
    _chat("n 2, streamed", n=2, stream=True),
    _chat("n 3, streamed with usage", n=3, stream=True, **USAGE),
    _chat("n 2, streamed with every usage", n=2, stream=True, **EVERY_USAGE),
    _chat("n 2, return_output_ids_in_sglext", n=2, return_output_ids_in_sglext=True),
    _chat("n 2, ids in sglext, streamed", n=2, return_output_ids_in_sglext=True, stream=True),
    _chat("n 2, return_meta_info", n=2, return_meta_info=True),
    _chat("n 2 with a stop", n=2, stop=LETTERS, max_tokens=30),
    _chat("streamed", stream=True),
    _chat("streamed with usage", stream=True, **USAGE),
    _chat("streamed with every usage", stream=True, **EVERY_USAGE),
    _chat("max_completion_tokens", max_tokens=None, max_completion_tokens=5),
    _chat("both limits", max_tokens=3, max_completion_tokens=6),
    _chat("max_tokens 1, streamed", max_tokens=1, stream=True, **USAGE),
    _chat("stop", stop=LETTERS, max_tokens=40),
    _chat("stop, streamed", stop=LETTERS, max_tokens=40, stream=True),
    _chat("stop_token_ids", stop_token_ids=list(range(32, 64)), max_tokens=40),
    _chat("the end token", logit_bias={"258": 60}),
    _chat("the end token, streamed", logit_bias={"258": 60}, stream=True),
    _chat("input_ids", input_ids=ids("h input_ids", 40)),
    _chat("response_format json_object", response_format={"type": "json_object"}, max_tokens=6),
    _chat("response_format json_schema", response_format=SCHEMA, max_tokens=12),
    _chat("response_format text", response_format={"type": "text"}),
    _chat("regex", regex="(left|right)", max_tokens=12),
    _chat("tools", tools=[WEATHER]),
    _chat("tools, streamed", tools=[WEATHER], stream=True),
    _chat("tool_choice none", tools=[WEATHER], tool_choice="none"),
    _chat("tool_choice required", tools=[WEATHER], tool_choice="required", max_tokens=40),
    _chat("tool_choice of one", tools=[WEATHER], max_tokens=40,
          tool_choice={"type": "function", "function": {"name": "weather"}}),
    _chat("tool_choice required, streamed", tools=[WEATHER], tool_choice="required", stream=True),
    _chat("seed, user, penalties", seed=1, user="me", presence_penalty=0.5, frequency_penalty=0.1),
    _chat("logit_bias", logit_bias={"65": 50}),
    _chat("return_token_ids", return_token_ids=True),
    _chat("return_prompt_token_ids", return_prompt_token_ids=True),
    _chat("return_meta_info", return_meta_info=True, logprobs=True, top_logprobs=1),
    _chat("ids in sglext", **_IDS),
    _chat("ids in sglext, streamed", **_IDS, stream=True),
    _chat("rid", rid="a chat of mine"),
    _chat("chat_template_kwargs", chat_template_kwargs={"enable_thinking": False}),
    _chat("separate_reasoning", separate_reasoning=True, reasoning_effort="low"),
    _chat("service_tier and store", service_tier="auto", store=True, metadata={"a": "b"}),
    Case(
        "chat with framed ids", "/v1/chat/completions",
        {
            "model": MODEL, "messages": _user(words("h framed")), "temperature": 0, "max_tokens": 6,
            "stream": True,
        },
        headers={f"x-sglext-{name}": "1" for name in ("ids-framed", "return-output-ids", "return-input-ids")},
    ),
    Case(
        "chat, cached with details", "/v1/chat/completions",
        {"model": MODEL, "messages": _user(words("h c", 60)), "temperature": 0, "max_tokens": 4,
         "return_cached_tokens_details": True},
        first={"model": MODEL, "messages": _user(words("h c", 60)), "temperature": 0, "max_tokens": 4},
    ),
]  # fmt: skip

CHAT_ERRORS = [
    _chat("no messages", messages=[]),
    _chat("messages is a word", messages="hello"),
    _chat("unknown role", messages=[{"role": "wizard", "content": "hi"}]),
    _chat("no content", messages=[{"role": "user"}]),
    _chat("content is a number", messages=[{"role": "user", "content": 5}]),
    _chat("unknown part", messages=[{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}]),
    _chat("an image for a text model",
          messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]),
    _chat("too long", messages=_user("a" * 5000)),
    _chat("too long, streamed", messages=_user("a" * 5000), stream=True),
    _chat("max_tokens too large", max_tokens=100000),
    _chat("max_tokens -1", max_tokens=-1),
    _chat("temperature is a word", temperature="hot"),
    _chat("temperature is negative", temperature=-1),
    _chat("top_p 2", top_p=2),
    _chat("n 0", n=0),
    _chat("n is a word", n="two"),
    _chat("top_logprobs is a word", logprobs=True, top_logprobs="all"),
    _chat("tool_choice required, no tools", tool_choice="required"),
    _chat("tool_choice of an unknown tool", tools=[WEATHER],
          tool_choice={"type": "function", "function": {"name": "tides"}}),
    _chat("tools is a word", tools="hammer"),
    _chat("response_format unknown", response_format={"type": "poem"}),
    _chat("return_token_ids, streamed", return_token_ids=True, stream=True),
    _chat("return_sampling_mask alone", return_sampling_mask=True),
    _raw("chat no fields", "/v1/chat/completions", {}),
    _raw("chat broken JSON", "/v1/chat/completions", b'{"messages": ['),
    _raw("chat no body", "/v1/chat/completions", b""),
    _raw("chat by GET", "/v1/chat/completions", None, method="GET"),
    _raw("chat as text", "/v1/chat/completions", {"messages": []}, headers={"Content-Type": "text/plain"}),
]  # fmt: skip

_SAGEMAKER = "/invocations"
INVOCATIONS = [
    _chat("user", _SAGEMAKER),
    _chat("streamed with usage", _SAGEMAKER, stream=True, **USAGE),
    _chat("n 2", _SAGEMAKER, n=2),
    _chat("logprobs", _SAGEMAKER, logprobs=True, top_logprobs=2),
    _chat("no messages", _SAGEMAKER, messages=[]),
    _raw("invocation no fields", _SAGEMAKER, {}),
    _raw("invocation broken JSON", _SAGEMAKER, b"{"),
    _raw("invocation by GET", _SAGEMAKER, None, method="GET"),
]

CASES = [*COMPLETIONS, *COMPLETION_ERRORS, *CHAT, *CHAT_ERRORS, *INVOCATIONS]
