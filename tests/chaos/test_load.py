"""The load of ``pdserve chaos`` against a balancer over fakes: what counts as failed, broken, different."""

from __future__ import annotations

import random
import time

import pytest

from pdserve.chaos.load import ChaosLoad, Tally, questions
from pdserve.errors import ConfigError
from pdserve.http.client import HttpClient
from tests.support.balancer_client import Site, running_site
from tests.support.resumable import Break


async def run(site: Site, *, seconds: float = 0.1, is_worse: bool = False, breaks: int = 0) -> Tally:
    pool = HttpClient()
    asked = questions(1, 8, 50, "tiny")
    load = ChaosLoad(site.balancer.url, asked, concurrency=4, headers=[])
    try:
        await load.record(pool)
        assert load.is_comparable
        for fake in site.decodes:
            fake.behaviour.tokens += is_worse
        site.decode.breaks.extend([Break(4)] * breaks)
        await load.run(pool, random.Random(3), time.monotonic() + seconds)
    finally:
        await pool.close()
    return load.tally


def test_questions_are_the_same_for_one_seed() -> None:
    assert questions(1, 8, 50, "tiny") == questions(1, 8, 50, "tiny") != questions(2, 8, 50, "tiny")
    assert {question.path for question in questions(1, 4, 50, "tiny")} == {
        "/generate", "/v1/chat/completions", "/v1/completions",
    }  # fmt: skip


async def test_undisturbed_answers_are_equal() -> None:
    async with running_site(decode=2, resumes=True) as site:
        tally = await run(site)
    assert tally.requests >= 4
    assert (tally.failed, tally.broken, tally.differing) == (0, 0, 0), tally.errors
    assert tally.silences


async def test_streams_that_go_on_elsewhere_are_equal() -> None:
    async with running_site(decode=2, resumes=True) as site:
        tally = await run(site, breaks=2)
        assert site.counts["resumed"] == 2
    assert (tally.failed, tally.broken, tally.differing) == (0, 0, 0), tally.errors


async def test_other_tokens_differ() -> None:
    async with running_site(decode=2, resumes=True) as site:
        tally = await run(site, is_worse=True)
    assert tally.differing == tally.requests


async def test_streams_that_break_off_are_broken_and_error_statuses_failed() -> None:
    async with running_site(decode=2, resumes=True, max_resumes=0, queue_timeout_s=0.1) as site:
        pool = HttpClient()
        load = ChaosLoad(site.balancer.url, questions(1, 8, 50, "tiny"), concurrency=4, headers=[])
        await load.record(pool)
        for fake in site.decodes:
            fake.behaviour.reset_after = 2
        await load.run(pool, random.Random(3), time.monotonic() + 0.1)
        broken = load.tally.broken
        for fake in site.decodes:
            fake.behaviour.reset_after, fake.behaviour.status = None, 400
        await load.run(pool, random.Random(3), time.monotonic() + 0.1)
        await pool.close()
    assert broken and load.tally.failed and load.tally.differing == 0
    assert load.tally.requests == load.tally.broken + load.tally.failed


async def test_a_fleet_that_fails_undisturbed_is_not_broken_further() -> None:
    async with running_site() as site:
        site.decode.behaviour.status = 400
        pool = HttpClient()
        load = ChaosLoad(site.balancer.url, questions(1, 2, 50, "tiny"), concurrency=1, headers=[])
        with pytest.raises(ConfigError, match="before anything was broken"):
            await load.record(pool)
        await pool.close()
