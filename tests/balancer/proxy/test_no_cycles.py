"""A request leaves no reference cycle: the collector would stop the loop for what could be freed at once."""

from __future__ import annotations

import gc

import pytest

from pdserve.balancer.proxy.client_answer import ClientAnswer
from pdserve.balancer.proxy.relay import PairRelay
from pdserve.balancer.proxy.run import Run
from tests.support.balancer_client import running_site
from tests.support.dialects import CHAT, request_to
from tests.support.resumable import Break

TYPES = Run, ClientAnswer, PairRelay


def living() -> list[object]:
    return [found for found in gc.get_objects() if type(found) in TYPES]


@pytest.mark.parametrize("kind", ["streamed", "whole", "resumed"])
async def test_a_request_is_freed_when_it_ends(kind: str) -> None:
    async with running_site(decode=2, resumes=True) as site:
        gc.collect()
        before = living()  # of other tests
        gc.disable()
        try:
            for _ in range(5):
                if kind == "resumed":
                    site.decode.breaks.append(Break(3))
                body = request_to(CHAT, stream=kind != "whole")
                assert (await site.ask("POST", CHAT, body)).status == 200
            assert site.counts["resumed"] == (5 if kind == "resumed" else 0)
            left = [found for found in living() if not any(found is each for each in before)]
        finally:
            gc.enable()
    assert left == []
