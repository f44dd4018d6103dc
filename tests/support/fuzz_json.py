"""Malformed and malicious request bodies by a seeded generator. Pure.

    json_case(seed, number) ─► JsonCase(family, path, body, content_type)

Families: broken text, wrong types for each field that anybody looks at, fields that are ours,
bodies that try to leave their object, sizes and depths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATHS = (
    "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations",
    "/vertex_generate",
)  # fmt: skip
OURS = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "request_id")
FIELDS = (
    *OURS, "text", "input_ids", "input_embeds", "prompt", "messages", "input", "stream", "sampling_params",
    "n",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "priority", "stream_options",
    "return_logprob",
    "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs", "logprobs",
    "top_logprobs",
    "echo", "return_hidden_states", "return_routed_experts", "return_cached_tokens_details",
    "return_prompt_token_ids",
    "instances", "parameters", "model", "image_data", "lora_path", "session_params", "extra_key", "suffix",
    "stop",
    "custom_logit_processor", "previous_response_id", "background", "store", "best_of", "tools",
    "data_parallel_rank",
    "routed_dp_rank", "disagg_prefill_dp_rank", "bootstrap_pair_key", "decode_tp_size", "x", "", "id",
)  # fmt: skip
SAMPLING = (
    "n",
    "max_new_tokens",
    "temperature",
    "stop",
    "ignore_eos",
    "beam_width",
    "json_schema",
    "best_of",
)
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 2.0, 1e308,
    -0.0, "", "a", "2",
    "hi there", "\u0000", "\ud800", "\U0001f600", "null", "true", "a" * 300, '"}', "\\", "}", "\u2028",
    "2.2.2.2", "x\r\ny: z",
)  # fmt: skip


@dataclass(frozen=True)
class JsonCase:
    """One request body."""

    family: str
    path: str
    body: bytes
    content_type: str = "application/json"


def valid(rng: random.Random, path: str) -> dict[str, Any]:
    """A request the path takes."""
    match path:
        case "/generate":
            prompt: dict[str, Any] = rng.choice(
                ({"text": "hi"}, {"input_ids": [1, 2, 3]}, {"text": ["a", "b"]}, {"input_ids": [[1], [2, 3]]})
            )
            sampling = rng.choice(({}, {"n": 2}, {"max_new_tokens": 4}, {"temperature": 0}))
            return {**prompt, "sampling_params": sampling, "stream": rng.random() < 0.3}
        case "/v1/completions":
            prompt = {"prompt": rng.choice(("hi", ["a", "b"], [1, 2], [[1], [2]]))}
            return {
                "model": "m",
                **prompt,
                "max_tokens": 4,
                "n": rng.choice((1, 2)),
                "stream": rng.random() < 0.3,
            }
        case "/v1/responses":
            return {"model": "m", "input": "hi", "max_output_tokens": 4}
        case "/vertex_generate":
            return {"instances": [{"text": "hi"}], "parameters": {"sampling_params": {"max_new_tokens": 4}}}
        case _:
            messages = [{"role": "user", "content": rng.choice(("hi", [{"type": "text", "text": "hi"}]))}]
            return {"model": "m", "messages": messages, "max_tokens": 4, "n": rng.choice((1, 2))}


def _encode(value: Any) -> bytes:
    """As Python does it: lone surrogates as escapes, NaN as a word."""
    return json.dumps(value, ensure_ascii=True).encode()


def _anything(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(10)
    if depth and kind == 0:
        return [_anything(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if depth and kind == 1:
        return {rng.choice(FIELDS): _anything(rng, depth - 1) for _ in range(rng.choice((0, 1, 3)))}
    if kind == 2:
        return rng.choice(
            (
                [],
                {},
                [None],
                [[]],
                [[], []],
                [{}],
                [1, "a"],
                ["a", 1],
                [[1], "a"],
                [1.5],
                [True],
                [[[0.5]]],
                {"n": 2},
            )
        )
    return rng.choice(SCALARS)


def _wrong_types(rng: random.Random, path: str) -> bytes:
    document = valid(rng, path)
    for _ in range(rng.choice((1, 1, 2, 4))):
        target = document
        inner = document.get("parameters" if path == "/vertex_generate" else "sampling_params")
        if isinstance(inner, dict) and rng.random() < 0.3:
            target = inner
            target[rng.choice(SAMPLING)] = _anything(rng)
        else:
            target[rng.choice(FIELDS)] = _anything(rng)
    return _encode(document)


def _nulls(rng: random.Random, path: str) -> bytes:
    document = valid(rng, path)
    for name in [*document, *rng.sample(FIELDS, 4)]:
        if rng.random() < 0.6:
            document[name] = rng.choice((None, [], {}, [None]))
    return _encode(document)


def _truncated(rng: random.Random, path: str) -> bytes:
    body = _encode(valid(rng, path))
    return body[: rng.randrange(len(body))]


def _mutated(rng: random.Random, path: str) -> bytes:
    body = bytearray(_encode(valid(rng, path)))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(body))
        match rng.randrange(3):
            case 0:
                body[at] = rng.randrange(256)
            case 1:
                del body[at]
            case _:
                body.insert(at, rng.choice(b'"\\{}[]:,\x00\xff\xed 0-'))
    return bytes(body)


def _escaped(name: str, rng: random.Random) -> str:
    """Another spelling of a key that a JSON parser takes for the same."""
    at = rng.randrange(len(name))
    return name[:at] + f"\\u{ord(name[at]):04x}" + name[at + 1 :]


def _injected(rng: random.Random, path: str) -> bytes:
    """The client gives what is ours, once or twice, plainly or in disguise, in front or behind."""
    text = _encode(valid(rng, path)).decode()
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(OURS)
        key = _escaped(name, rng) if rng.random() < 0.5 else name
        value = _encode(
            rng.choice((0, 1, 42, "evil", "2.2.2.2", None, [1, 2], ["evil"], {"a": 1}, -1, 2**63, "\ud800"))
        ).decode()
        item = f'"{key}":{value}'
        text = f"{{{item},{text[1:]}" if rng.random() < 0.5 else f"{text[:-1]},{item}}}"
    if path == "/vertex_generate" and rng.random() < 0.5:
        text = text.replace('"parameters": {', f'"parameters": {{"{rng.choice(OURS)}":1,', 1)
    return text.encode()


def _spliced(rng: random.Random, path: str) -> bytes:
    """A tail or a head that a parser may overlook and a splice must not."""
    body = _encode(valid(rng, path))
    tails = (
        b" ", b"\r\n\t ", b"\x00", b"}", b"]", b",", b"{}", b' {"rid":"evil"}', b"\n" + body, b"// comment",
        b"/* } */", b"#",
        b"\x0c", b"\xc2\xa0", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"null", b'"', b"}" * 5, b" }",
        b"\x1e" + body, b";",
    )  # fmt: skip
    heads = (
        b"",
        b"",
        b"",
        b"\xef\xbb\xbf",
        b" \n",
        b"// x\n",
        b"\x00",
        b")]}',\n",
        b"[",
        b"\xff\xfe",
        b"x=",
        b"\x1f\x8b",
    )
    inner = (b"", b"", b",", b" , ", b"/**/", b"\x00", b',"x"', b',"x":', b',"x":1,', b', "x": "}"')
    head, middle, tail = rng.choice(heads), rng.choice(inner), rng.choice(tails)
    keep = rng.randrange(4)  # one of the three, or all of them
    head, middle, tail = (
        part if keep in (3, index) else b"" for index, part in enumerate((head, middle, tail))
    )
    return head + body[:-1] + middle + b"}" + tail


def _unicode(rng: random.Random, path: str) -> bytes:
    body = _encode(valid(rng, path))
    bad = rng.choice(
        (
            b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x28\xa1", b"\\ud800",
            b"\\udc00\\ud800", b"\\uD83D\\uDE00",
            b"\\u12", b"\\x41", b"\\0", b"\x01", b"\t", b"\n", b"\x7f", b"\xe2\x80\xa8", b"\\u0000",
        )
    )  # fmt: skip
    where = rng.choice((b"hi", b'"a"', b"text", b"model", b"user", b"messages"))
    return body.replace(where, where[:1] + bad + where[1:], 1)


def _numbers(rng: random.Random, path: str) -> bytes:
    number = rng.choice(
        (
            b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1E+99999", b"0e0", b"-0", b"00", b"01",
            b"+1", b".5", b"5.",
            b"1e", b"0x10", b"1_000", b"9" * 400, b"0." + b"1" * 400, b"1e-400", b"4.0", b"4e0",
            b"18446744073709551616", b"nan", b"\xd9\xa1",
        )
    )  # fmt: skip
    name = rng.choice(
        (b"max_tokens", b"n", b"priority", b"stream", b"temperature", b"top_p", b"input_ids", b"text")
    )
    return b'{"%b":%b,' % (name, number) + _encode(valid(rng, path))[1:]


def _deep(rng: random.Random, path: str) -> bytes:
    depth = rng.choice((10, 100, 500, 900, 1000, 1100, 5000, 100_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"text":', b"}]")))
    value = opened * depth + b"1" + closed * (depth if rng.random() < 0.8 else depth - 1)
    name = rng.choice(
        (b"text", b"input_ids", b"messages", b"prompt", b"x", b"sampling_params", b"input", b"instances")
    )
    return b'{"%b":%b,' % (name, value) + _encode(valid(rng, path))[1:]


def _large(rng: random.Random, path: str) -> bytes:
    """Rare: each is megabytes."""
    size = 1_000_000
    if rng.random() > 0.02:
        size = 2000
    field = rng.choice((b"input_ids", b"text", b"prompt", b"messages", b"rid", b"x", b"stop"))
    value = rng.choice(
        (b"[" + b"1," * size + b"1]", b'["a"' + b',"a"' * (size // 4) + b"]", b'"' + b"x" * size + b'"')
    )
    keys = b"".join(b'"k%d":%d,' % (index, index) for index in range(size // 100))
    return b"{" + keys + b'"%b":%b,' % (field, value) + _encode(valid(rng, path))[1:]


def _many_samples(rng: random.Random, path: str) -> bytes:
    document = valid(rng, path)
    n = rng.choice(
        (
            0,
            -1,
            2,
            3,
            1025,
            2**31,
            10**30,
            2.5,
            2.0,
            "2",
            "1000000",
            True,
            None,
            [2],
            {"n": 2},
            "2 ",
            "\u0662",
        )
    )
    if path in ("/generate", "/vertex_generate"):
        holder = document.setdefault("parameters", {}) if path == "/vertex_generate" else document
        holder["sampling_params"] = rng.choice(
            ({"n": n}, [{"n": n}, {"n": 1}], [{"n": n}], {"n": n, "beam_width": n})
        )
    else:
        document["n"] = n
    return _encode(document)


def _scalar(rng: random.Random, path: str) -> bytes:
    return rng.choice(
        (
            b"",
            b" ",
            b"null",
            b"1",
            b'"x"',
            b"[]",
            b"{}",
            b"[{}]",
            b"true",
            b"{",
            b"}",
            b"{} ",
            b'{"":1}',
            b"[1,2",
        )
    )


def _valid(rng: random.Random, path: str) -> bytes:
    return _encode(valid(rng, path))


FAMILIES: tuple[Callable[[random.Random, str], bytes], ...] = (
    _wrong_types, _injected, _spliced, _mutated, _wrong_types, _nulls, _truncated, _injected, _unicode,
    _numbers, _deep,
    _wrong_types, _large, _many_samples, _scalar, _valid,
)  # fmt: skip


def json_case(seed: int, number: int) -> JsonCase:
    """The case of this number; families take turns."""
    rng = random.Random(f"json-{seed}-{number}")
    path = rng.choice(PATHS)
    make = FAMILIES[number % len(FAMILIES)]
    kind = rng.choice(("text/plain", "", "application/xml")) if rng.random() < 0.05 else "application/json"
    return JsonCase(make.__name__.strip("_"), path, make(rng, path), kind)
