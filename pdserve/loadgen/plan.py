"""From options to requests: when each is due, and its body. Pure, and the same for one seed.

Prompts are token ids where the route takes them, so that lengths are exact without a tokenizer;
chats are made of short common words, about a token each, and the service's own count is reported.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from pdserve.loadgen.options import ROUTES, BenchOptions, lengths
from pdserve.workload import Synthetic, TracedRequest, read_trace, scaled, synthetic
from pdserve.workload import rate_of as trace_rate

FIRST_ID = 10
"""Below it are special tokens in most vocabularies."""
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could people my than first water been call who oil its now find long down day did"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: ``due_s`` after the start, its body, and what it asks for in tokens."""

    due_s: float
    path: str
    body: bytes
    input_tokens: int
    output_tokens: int


def plan_asks(options: BenchOptions, model: str) -> list[Ask]:
    """Every request of a run, in the order of arrival.

    Args:
        model: name for the OpenAI routes.

    Raises:
        ConfigError: for a trace that cannot be read.
    """
    requests = _requests(options)
    encoder = msgspec.json.Encoder()
    asks = []
    for index, request in enumerate(requests):
        due_s = request.arrival_s if options.rate or options.trace else 0.0
        tokens = request.max_new_tokens or request.output_tokens
        prompt = _prompt(options, request, index)
        body = encoder.encode(_body(options, model, prompt, tokens))
        asks.append(Ask(due_s, ROUTES[options.route], body, len(prompt), tokens))
    return asks


def warmup_asks(options: BenchOptions, model: str) -> list[Ask]:
    """A few requests of the same kind with prompts of their own, not counted."""
    plain = TracedRequest(0.0, 32, 4)
    encoder = msgspec.json.Encoder()
    bodies = (
        _body(options, model, _prompt(options, plain, -1 - index), 4) for index in range(options.warmup)
    )
    return [Ask(0.0, ROUTES[options.route], encoder.encode(body), 32, 4) for body in bodies]


def _requests(options: BenchOptions) -> Sequence[TracedRequest]:
    if options.trace:
        trace = read_trace(options.trace)[: options.requests]
        rate = options.rate or trace_rate(trace) * options.speed
        return scaled(trace, rate) if rate > 0 else trace
    plan = Synthetic(
        rate=options.rate or 1.0,
        requests=options.requests,
        inputs=lengths(options.input, "input"),
        outputs=lengths(options.output, "output"),
        cv=options.cv,
    )
    return synthetic(plan, options.seed)


def _prompt(options: BenchOptions, request: TracedRequest, index: int) -> list[int]:
    ids: list[int] = []
    size, last = request.block_tokens, options.vocabulary - 1
    for block in request.block_ids or ():
        ids += _block(options.seed, block, size, last)
    if request.block_ids:
        return ids[: request.input_tokens]
    if options.prefixes and index >= 0:
        which = random.Random(f"{options.seed} {index}").randrange(options.prefixes)
        ids += _block(options.seed, f"prefix {which}", options.prefix_tokens, last)
    return [*ids, *_block(options.seed, f"alone {index}", request.input_tokens, last)]


@lru_cache(maxsize=1 << 12)
def _block(seed: int, name: int | str, size: int, last: int) -> tuple[int, ...]:
    draw = random.Random(f"{seed} {name}")
    return tuple(draw.choices(range(FIRST_ID, last + 1), k=size))


def _body(options: BenchOptions, model: str, prompt: list[int], tokens: int) -> dict[str, object]:
    if options.route == "generate":
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": prompt, "sampling_params": sampling, "stream": options.stream}
    body: dict[str, object] = {
        "model": model,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": options.stream,
    }
    body["max_tokens"] = tokens
    if options.stream:
        body["stream_options"] = {"include_usage": True}
    if options.route == "completions":
        return {**body, "prompt": prompt}
    text = " ".join(_WORDS[token % len(_WORDS)] for token in prompt)
    return {**body, "messages": [{"role": "user", "content": text}]}
