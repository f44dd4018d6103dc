"""Bodies that hypothesis makes up and shrinks: refused by the balancer, or right when they reach a worker."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.site import running_site
from tests.support.examples import n_examples
from tests.support.fuzz_checks import check_answer, check_received
from tests.support.fuzz_json import FIELDS, PATHS, SAMPLING
from tests.support.wire import Wire

NAMES = st.sampled_from(FIELDS + SAMPLING)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers() | FLOATS | st.text()
KEYS = NAMES | st.text(max_size=3)
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
PROMPTS = st.fixed_dictionaries({"text": st.just("a") | VALUES, "prompt": VALUES, "messages": VALUES})
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=5) | PROMPTS


@st.composite
def bodies(draw: Any) -> bytes:
    """A document, perhaps spelled oddly, perhaps cut into."""
    document = draw(DOCUMENTS)
    indent = draw(st.sampled_from((None, None, 1)))
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), indent=indent)
    body = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0 and body:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 2)) :]
    return body


async def play(requests: list[tuple[str, bytes]]) -> None:
    """All of them to a fresh balancer, one after the other."""
    async with running_site() as site:
        for path, body in requests:
            async with Wire.open(site.url) as wire:
                wire.send_json(path, body)
                check_answer(await wire.reply(), path)
        for fake in site.fakes:
            check_received(fake)
        await site.check_clean()


@settings(max_examples=n_examples(60), derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(PATHS), bodies()), min_size=1, max_size=12))
def test_made_up_bodies_are_refused_or_reach_workers_whole(requests: list[tuple[str, bytes]]) -> None:
    asyncio.run(play(requests))
