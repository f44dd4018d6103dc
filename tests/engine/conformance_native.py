"""Requests of /generate and /vertex_generate for the conformance test: every parameter family.

Each case has a prompt of its own, so that no answer depends on what a prefix cache
holds from another; where the cache itself is the subject, ``first`` fills it.
"""

from __future__ import annotations

import random
import string
from typing import Any

from tests.engine.conformance import Case

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8}
LETTERS = list(string.ascii_lowercase)
JSON_SCHEMA = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'


def words(name: str, length: int = 24) -> str:
    """Printable text for the case ``name``: always the same, unlike any other's from its first letters."""
    rng = random.Random(name)
    return "".join(rng.choice(string.ascii_letters + "  ") for _ in range(length))


def ids(name: str, length: int = 24) -> list[int]:
    """The same text as token ids: the tiny model's tokens are bytes."""
    return list(words(name, length).encode())


def _text(name: str, sampling: dict[str, Any] | None = None, **fields: Any) -> Case:
    sampling = {**GREEDY, **(sampling or {})}
    return Case(f"generate {name}", "/generate", {"text": words(name), "sampling_params": sampling, **fields})


def _batch(name: str, size: int = 3, sampling: dict[str, Any] | None = None, **fields: Any) -> Case:
    prompts = [words(f"{name} {index}", 10 + 9 * index) for index in range(size)]
    sampling = {**GREEDY, **(sampling or {})}
    return Case(f"generate {name}", "/generate", {"text": prompts, "sampling_params": sampling, **fields})


def _raw(name: str, body: Any, **how: Any) -> Case:
    return Case(f"generate {name}", "/generate", body, **how)


_LP = {"return_logprob": True}
_FLAT = {"return_flat_raw_top_logprobs": True}
_FLAT_OUTPUT = {"return_flat_raw_output_top_logprobs": True}

PLAIN = [
    _text("text"),
    _raw("input_ids", {"input_ids": ids("input_ids"), "sampling_params": GREEDY}),
    _raw("input_ids of several chunks", {"input_ids": ids("chunks", 300), "sampling_params": GREEDY}),
    _raw("one token", {"input_ids": [77], "sampling_params": GREEDY}),
    _raw("by PUT", {"text": words("put"), "sampling_params": GREEDY}, method="PUT"),
    _raw("no sampling params at all", {"text": words("defaults"), "sampling_params": {"top_k": 1}}),
    _raw("unicode", {"text": "Grüße, 世界 🙂" + words("unicode"), "sampling_params": GREEDY}),
    _raw("a prompt full of braces and quotes", {"text": '{"}]\\" ' * 5, "sampling_params": GREEDY}),
    _text("both text and input_ids", input_ids=[1, 2, 3]),
    _text("rid", rid="my own request"),
    _text("rid, streamed", rid="my own stream", stream=True),
    _text("priority", priority=3),
    _text("fields that it does not know", no_such_field=1, nor_this={"a": [1]}),
    _text("extra_key", extra_key="tenant"),
    _text("return_prompt_token_ids", return_prompt_token_ids=True),
    _text("stream false", stream=False),
    _text("custom labels", custom_labels={"a": "b"}),
    _text("no_logs", no_logs=True),
    _text("return_sampling_mask", return_sampling_mask=True),
    _raw(
        "a prompt that is cached",
        {"input_ids": ids("cached", 80) + ids("cached tail", 9), "sampling_params": GREEDY},
        first={"input_ids": ids("cached", 80), "sampling_params": GREEDY},
    ),
    _raw(
        "the very same prompt again",
        {"input_ids": ids("again", 64), "sampling_params": GREEDY},
        first={"input_ids": ids("again", 64), "sampling_params": GREEDY},
    ),
]

SAMPLING = [
    _text("max_new_tokens 0", {"max_new_tokens": 0}),
    _text("max_new_tokens 1", {"max_new_tokens": 1}),
    _text("max_new_tokens 2", {"max_new_tokens": 2}),
    _text("max_new_tokens 40", {"max_new_tokens": 40}),
    _text("max_new_tokens 0, streamed", {"max_new_tokens": 0}, stream=True),
    _text("max_new_tokens 1, streamed", {"max_new_tokens": 1}, stream=True),
    _text("ignore_eos", {"ignore_eos": True}),
    _text("stop", {"stop": LETTERS, "max_new_tokens": 40}),
    _text("stop, a string", {"stop": "e", "max_new_tokens": 40}),
    _text("stop, untrimmed", {"stop": LETTERS, "no_stop_trim": True, "max_new_tokens": 40}),
    _text("stop at the first token", {"stop_token_ids": list(range(32, 127))}),
    _text("stop_token_ids", {"stop_token_ids": list(range(32, 64)), "max_new_tokens": 40}),
    _text("stop_regex", {"stop_regex": "[A-Z]", "max_new_tokens": 40}),
    _text("stop, streamed", {"stop": LETTERS, "max_new_tokens": 40}, stream=True),
    _text("stop of two letters, streamed", {"stop": ["zz", "ab"], "max_new_tokens": 20}, stream=True),
    _text("min_new_tokens", {"min_new_tokens": 6, "stop_token_ids": list(range(32, 64))}),
    _text("top_p", {"top_p": 0.5}),
    _text("top_k 1", {"temperature": 1.0, "top_k": 1}),
    _text("min_p", {"min_p": 0.9}),
    _text("presence_penalty", {"presence_penalty": 1.5, "max_new_tokens": 20}),
    _text("frequency_penalty", {"frequency_penalty": 1.9, "max_new_tokens": 20}),
    _text("repetition_penalty", {"repetition_penalty": 1.8, "max_new_tokens": 20}),
    _text("logit_bias", {"logit_bias": {"65": 50.0, "66": 49.0}}),
    _text("skip_special_tokens false", {"skip_special_tokens": False, "logit_bias": {"256": 60.0}}),
    _text("skip_special_tokens", {"logit_bias": {"256": 60.0}}),
    _text("spaces_between_special_tokens", {"spaces_between_special_tokens": False}),
    _text("the end token", {"logit_bias": {"258": 60.0}}),
    _text("the end token, ignored", {"logit_bias": {"258": 60.0}, "ignore_eos": True}),
    _text("sampling_seed", {"sampling_seed": 7}),
    _text("json_schema", {"json_schema": JSON_SCHEMA, "max_new_tokens": 30}),
    _text("regex", {"regex": "(yes|no), [0-9]{3}", "max_new_tokens": 20}),
    _text("ebnf", {"ebnf": 'root ::= "a" | "bb"', "max_new_tokens": 20}),
    _text("structural_tag", {"structural_tag": "not json"}),
    _text("regex, streamed", {"regex": "[a-c]{12}", "max_new_tokens": 20}, stream=True),
    _text("regex and logprobs", {"regex": "[a-c]{4}"}, **_LP, top_logprobs_num=2),
    _text("stream_interval", {"stream_interval": 4, "max_new_tokens": 17}, stream=True),
    _text("custom_params", {"custom_params": {"a": 1}}),
]

LOGPROBS = [
    _text("logprobs", **_LP),
    _text("logprobs from 0", **_LP, logprob_start_len=0),
    _text("logprobs from 5, top 3", **_LP, logprob_start_len=5, top_logprobs_num=3),
    _text("logprobs from the last", **_LP, logprob_start_len=23),
    _text("logprobs from the end", **_LP, logprob_start_len=24),
    _text("logprobs from -1", **_LP, logprob_start_len=-1, top_logprobs_num=2),
    _text("logprobs from beyond", **_LP, logprob_start_len=25),
    _text("logprobs of chosen ids", **_LP, token_ids_logprob=[65, 101]),
    _text("logprobs of chosen ids from 3", **_LP, token_ids_logprob=[65], logprob_start_len=3),
    _text("logprobs with text", **_LP, logprob_start_len=4, return_text_in_logprobs=True, top_logprobs_num=2),
    _text("logprobs, all of it", **_LP, logprob_start_len=0, top_logprobs_num=2, token_ids_logprob=[66, 67]),
    _text("logprobs, flat", **_LP, logprob_start_len=0, top_logprobs_num=2, **_FLAT),
    _text(
        "logprobs, flat both", **_LP, logprob_start_len=2, top_logprobs_num=2,
        **_FLAT, **_FLAT_OUTPUT, return_flat_raw_top_logprobs_b64=True,
    ),
    _text("logprobs of no token", {"max_new_tokens": 0}, **_LP, logprob_start_len=0, top_logprobs_num=2),
    _text("logprobs of no token, chosen", {"max_new_tokens": 0}, **_LP, token_ids_logprob=[65, 66]),
    _text(
        "logprobs of no token, flat", {"max_new_tokens": 0}, **_LP, logprob_start_len=0, top_logprobs_num=2,
        **_FLAT, **_FLAT_OUTPUT,
    ),
    _text("logprobs of one token", {"max_new_tokens": 1}, **_LP, logprob_start_len=0, token_ids_logprob=[65]),
    _text("logprobs and a stop", {"stop": LETTERS, "max_new_tokens": 40}, **_LP, logprob_start_len=0),
    _text("logprobs, 128 of the top", **_LP, top_logprobs_num=128),
    _text("logprobs, streamed", **_LP, stream=True),
    _text("logprobs from 0, streamed", **_LP, logprob_start_len=0, top_logprobs_num=2, stream=True),
    _text("logprobs, all, streamed", **_LP, logprob_start_len=9, token_ids_logprob=[65, 66], stream=True),
    _text("logprobs of no token, streamed", {"max_new_tokens": 0}, **_LP, logprob_start_len=0, stream=True),
    _raw(
        "logprobs over chunks",
        {"input_ids": ids("lp chunks", 200), "sampling_params": GREEDY, **_LP, "logprob_start_len": 10},
    ),
    _raw(
        "logprobs of a cached prompt",
        {"input_ids": ids("lp again", 64), "sampling_params": GREEDY, **_LP, "logprob_start_len": 20},
        first={"input_ids": ids("lp again", 64), "sampling_params": GREEDY},
    ),
    _text("top_logprobs_num without return_logprob", top_logprobs_num=2),
    _text("return_hidden_states, not enabled", return_hidden_states=True),
    _text("return_routed_experts, no experts", return_routed_experts=True),
]  # fmt: skip

BATCHES = [
    _batch("batch of text"),
    _raw("batch of ids", {"input_ids": [ids("b0", 5), ids("b1", 65)], "sampling_params": GREEDY}),
    _batch("batch of one", 1),
    _batch("batch, streamed", stream=True),
    _batch("batch of 12, streamed", 12, stream=True),
    _batch("batch with sampling each", rid=["r one", "r two", "r three"]),
    _raw(
        "batch, params of each",
        {
            "text": [words("bp0"), words("bp1")],
            "sampling_params": [{**GREEDY, "max_new_tokens": 3}, {**GREEDY, "stop": LETTERS}],
        },
    ),
    _batch("batch with one rid", rid="mine"),
    _batch("batch with one rid, streamed", rid="mine too", stream=True),
    _batch("batch, logprobs", **_LP, logprob_start_len=0, top_logprobs_num=1),
    _batch(
        "batch, logprobs of each", 2, return_logprob=[True, False], logprob_start_len=[2, -1],
        top_logprobs_num=[2, 0], token_ids_logprob=[[65, 66], [67]],
    ),
    _batch("batch, logprobs, streamed", **_LP, logprob_start_len=3, token_ids_logprob=[70], stream=True),
    _batch("n 2", 1, {"n": 2}),
    _text("n 2 of one", {"n": 2}),
    _text("n 3 of one, streamed", {"n": 3}, stream=True),
    _text("n 2, logprobs", {"n": 2}, **_LP, logprob_start_len=0, top_logprobs_num=2),
    _text("n 2, logprobs, streamed", {"n": 2}, **_LP, logprob_start_len=0, stream=True),
    _text("n 1", {"n": 1}),
    _text("n 2 with a rid", {"n": 2}, rid="twice"),
    _batch("n 2 of a batch", 2, {"n": 2}),
    _batch("n 2 of a batch, streamed", 2, {"n": 2}, stream=True),
    _batch("n 2 of a batch, lists of logprobs", 2, {"n": 2}, return_logprob=[True, False]),
    _text("n 2 of no token", {"n": 2, "max_new_tokens": 0}),
]  # fmt: skip

ERRORS = [
    _raw("empty ids", {"input_ids": [], "sampling_params": GREEDY}),
    _raw("empty batch", {"text": [], "sampling_params": GREEDY}),
    _raw("no prompt", {"sampling_params": GREEDY}),
    _raw("no fields", {}),
    _raw("too long", {"input_ids": [65] * 5000, "sampling_params": GREEDY}),
    _raw("too long, streamed", {"input_ids": [65] * 5000, "sampling_params": GREEDY, "stream": True}),
    _raw("too many new tokens", {"text": words("many"), "sampling_params": {"max_new_tokens": 9000}}),
    _raw("text is a number", {"text": 5}),
    _raw("text is an object", {"text": {"a": 1}}),
    _raw("ids are words", {"input_ids": ["a", "b"]}),
    _raw("sampling_params is a word", {"text": "abc", "sampling_params": "hot"}),
    _raw("temperature is a word", {"text": "abc", "sampling_params": {"temperature": "hot"}}),
    _raw("temperature is negative", {"text": "abc", "sampling_params": {"temperature": -1}}),
    _raw("top_p 2", {"text": "abc", "sampling_params": {"top_p": 2}}),
    _raw("max_new_tokens -1", {"text": "abc", "sampling_params": {"max_new_tokens": -1}}),
    _raw("unknown sampling parameter", {"text": "abc", "sampling_params": {"no_such": 1}}),
    _raw("unknown sampling parameter, streamed", {"text": "a", "sampling_params": {"x": 1}, "stream": True}),
    _raw("n 0", {"text": words("n0"), "sampling_params": {**GREEDY, "n": 0}}),
    _raw("n is a word", {"text": "abc", "sampling_params": {**GREEDY, "n": "two"}}),
    _raw("stream is a word", {"text": "abc", "sampling_params": GREEDY, "stream": "yes please"}),
    _raw("broken regex", {"text": "abc", "sampling_params": {**GREEDY, "regex": "["}}),
    _raw("rids of a batch, too few", {"text": ["a", "b"], "rid": ["one"], "sampling_params": GREEDY}),
    _raw("rids of a batch, all the same", {"text": ["a", "b"], "rid": ["o", "o"], "sampling_params": GREEDY}),
    _raw("mixed batch", {"text": ["a", 5], "sampling_params": GREEDY}),
    _raw("logprobs is a word", {"text": "abc", "return_logprob": "many"}),
    _raw("image for a text model", {"text": "abc", "image_data": "no such file", "sampling_params": GREEDY}),
    _raw("broken JSON", b'{"text": "abc"'),
    _raw("not JSON", b"hello"),
    _raw("an array", b"[1, 2]"),
    _raw("a string", b'"abc"'),
    _raw("null", b"null"),
    _raw("no body", b""),
    _raw("invalid UTF-8", b'{"text": "\xff\xfe"}'),
    _raw("NaN", b'{"text": "abc", "sampling_params": {"temperature": NaN}}'),
    _raw("a lone surrogate", b'{"text": "\\ud800 abc", "sampling_params": {"top_k": 1}}'),
    _raw("the same key twice", b'{"text": "a", "text": "bcd", "sampling_params": {"top_k": 1}}'),
    _raw("as text", {"text": "abc", "sampling_params": GREEDY}, headers={"Content-Type": "text/plain"}),
    _raw("without content type", {"text": "abc", "sampling_params": GREEDY}, headers={"Content-Type": ""}),
    _raw("+json", {"text": "a", "sampling_params": GREEDY}, headers={"Content-Type": "application/x+json"}),
    _raw("by GET", None, method="GET"),
    _raw("by DELETE", None, method="DELETE"),
]  # fmt: skip


def _vertex(name: str, instances: Any, **parameters: Any) -> Case:
    return Case(f"vertex {name}", "/vertex_generate", {"instances": instances, "parameters": parameters})


VERTEX = [
    _vertex("one", [{"text": words("vertex one")}], sampling_params=GREEDY),
    _vertex("three", [{"text": words(f"vertex {i}")} for i in range(3)], sampling_params=GREEDY),
    _vertex("ids", [{"input_ids": ids("vertex ids")}], sampling_params=GREEDY),
    _vertex("streamed", [{"text": words("vertex s")}], sampling_params=GREEDY, stream=True),
    _vertex("logprobs", [{"text": words("v lp")}], sampling_params=GREEDY, **_LP, logprob_start_len=0),
    _vertex("n 2", [{"text": words("vertex n")}], sampling_params={**GREEDY, "n": 2}),
    _vertex("no instances", []),
    Case("vertex instances is a word", "/vertex_generate", {"instances": "abc"}),
    Case("vertex no fields", "/vertex_generate", {}),
    _vertex("empty instance", [{}], sampling_params=GREEDY),
    _vertex("unknown parameter", [{"text": "abc"}], no_such=1),
    Case("vertex by GET", "/vertex_generate", method="GET"),
]

CASES = [*PLAIN, *SAMPLING, *LOGPROBS, *BATCHES, *ERRORS, *VERTEX]
