"""What the balancer learns of answers' lengths from the requests it served, over real small servers."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.scheduling.lengths import MIN_LEARNED
from pdserve.types import RequestShape
from tests.support.balancer_client import Site, running_site

STOPPED = {"type": "stop", "matched": 2}
TOKENS = 7


def foresee(site: Site, shape: RequestShape) -> RequestShape:
    return site.balancer.fleet.scheduler.foresee(shape)


async def serve(site: Site, number: int, body: dict[str, Any]) -> None:
    for _ in range(number):
        assert (await site.generate(body)).status == 200


@pytest.mark.parametrize("is_stream", [False, True])
async def test_answers_that_ended_by_themselves_are_forecast(is_stream: bool) -> None:
    async with running_site() as site:
        for fake in (site.prefill, site.decode):
            fake.behaviour.tokens, fake.behaviour.finish = TOKENS, STOPPED
        body = {"text": "tell me", "stream": is_stream, "sampling_params": {"max_new_tokens": 500}}
        await serve(site, MIN_LEARNED, body)
        forecast = foresee(site, RequestShape(2, 500, b'"tell me"', route="/generate")).forecast
        assert forecast is not None and forecast.is_learned
        assert forecast.low <= TOKENS <= forecast.high and forecast.mean == pytest.approx(TOKENS, abs=1)


async def test_answers_cut_by_their_limit_may_be_longer_than_it() -> None:
    async with running_site() as site:
        for fake in (site.prefill, site.decode):
            fake.behaviour.tokens, fake.behaviour.finish = TOKENS, {"type": "length", "length": TOKENS}
        await serve(site, 3 * MIN_LEARNED, {"text": "on", "sampling_params": {"max_new_tokens": TOKENS}})
        forecast = foresee(site, RequestShape(2, 500, b'"on"', route="/generate")).forecast
        assert forecast is not None and forecast.high > TOKENS


async def test_no_forecast_if_nobody_wants_one() -> None:
    async with running_site(predict_lengths=False) as site:
        await serve(site, MIN_LEARNED, {"text": "a"})
        assert foresee(site, RequestShape(2, 500)).forecast is None
