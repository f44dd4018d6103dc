"""The prompts whose tokens must equal one server's: every length class that takes another path."""

from __future__ import annotations

import random
from dataclasses import dataclass

CHUNK_TOKENS = 64
"""Chunked-prefill size of the test fleet: small, so that a few hundred tokens take many chunks."""

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to send and how many tokens to ask for."""

    name: str
    input_ids: tuple[int, ...]
    max_new_tokens: int = 12


def _ids(rng: random.Random, length: int) -> tuple[int, ...]:
    # Printable ASCII: token id == byte value in the tiny model.
    return tuple(rng.randrange(32, 127) for _ in range(length))


def _make() -> tuple[Prompt, ...]:
    rng = random.Random(20261121)
    prompts: list[Prompt] = []
    edges = [1, 2, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1]
    edges += [CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS + 5, 400]
    for length in edges:
        prompts += [Prompt(f"edge-{length}-{i}", _ids(rng, length)) for i in range(4)]
    for index in range(80):
        prompts.append(Prompt(f"random-{index}", _ids(rng, rng.randrange(1, 200)), rng.randrange(1, 24)))
    for family, length in enumerate((16, 48, 64, 90, 130, 200)):
        prefix = _ids(rng, length)
        for index in range(12):
            suffix = _ids(rng, rng.randrange(1, 40))
            prompts.append(Prompt(f"shared-{family}-{index}", prefix + suffix))
    # The very same prompt again: everything but the last token is a prefix hit.
    prompts += [Prompt(f"again-{i}", prompts[4 * i].input_ids) for i in range(11)]
    return tuple(prompts)


CORPUS = _make()
assert len(CORPUS) >= 200, len(CORPUS)
assert len({prompt.name for prompt in CORPUS}) == len(CORPUS)
