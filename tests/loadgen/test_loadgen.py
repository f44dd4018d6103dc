"""``pdserve bench``: the requests it makes, what it counts, and a run against real small servers."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest

from pdserve.errors import ConfigError
from pdserve.http.client import HttpClient
from pdserve.loadgen.client import LoadClient, RequestResult
from pdserve.loadgen.command import _run, run_bench
from pdserve.loadgen.options import BenchOptions, lengths
from pdserve.loadgen.plan import Ask, plan_asks
from pdserve.loadgen.report import render_ratio, render_stages, render_summary
from pdserve.loadgen.run import Progress, RunResult, run_asks
from pdserve.loadgen.summary import spread, summarize
from tests.support.balancer_client import Site, running_site

URL = "http://127.0.0.1:9"


def options(**given: Any) -> BenchOptions:
    return BenchOptions(**{"url": URL, **given})


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"url": "localhost:30000"}, "http://"),
        ({"vs": "other"}, "http://"),
        ({"route": "embeddings"}, "generate"),
        ({"requests": 0}, "requests"),
        ({"rate": -1.0}, "rate"),
        ({"concurrency": 0}, "--rate"),
        ({"prefixes": 2}, "--prefix-tokens"),
        ({"input": "many"}, "128-512"),
        ({"output": "9-3"}, "128-512"),
        ({"input": "0"}, "128-512"),
        ({"trace": "/no/such/file"}, "no such file"),
        ({"speed": 0.0}, "speed"),
    ],
)
def test_wrong_options_say_what_was_expected(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word.replace("-", ".")):
        options(**given)


@pytest.mark.parametrize(
    ("text", "kind", "low", "high"),
    [("256", "fixed", 1, 131_072), ("128-512", "uniform", 128, 512), ("256~0.5", "lognormal", 1, 131_072)],
)
def test_lengths_are_read(text: str, kind: str, low: int, high: int) -> None:
    length = lengths(text, "input")
    assert (length.kind, length.low, length.high) == (kind, low, high)


# -- plans -------------------------------------------------------------------------------------


def bodies(asks: list[Ask]) -> list[dict[str, Any]]:
    return [json.loads(ask.body) for ask in asks]


def test_a_seed_makes_the_same_plan_again_and_another_another() -> None:
    first, again = (plan_asks(options(rate=5.0, input="32-64"), "m") for _ in range(2))
    other = plan_asks(options(rate=5.0, input="32-64", seed=1), "m")
    assert first == again and [ask.body for ask in first] != [ask.body for ask in other]


def test_prompts_have_the_asked_lengths_and_share_nothing_but_their_prefixes() -> None:
    plain = bodies(plan_asks(options(requests=20, input="48", output="7"), "m"))
    assert {len(body["input_ids"]) for body in plain} == {48}
    assert {body["sampling_params"]["max_new_tokens"] for body in plain} == {7}
    assert len({tuple(body["input_ids"][:8]) for body in plain}) == 20
    shared = bodies(plan_asks(options(requests=40, input="16", prefixes=3, prefix_tokens=32), "m"))
    assert {len(body["input_ids"]) for body in shared} == {48}
    assert len(Counter(tuple(body["input_ids"][:32]) for body in shared)) == 3
    assert len({tuple(body["input_ids"][32:]) for body in shared}) == 40


def test_arrivals_come_at_the_asked_rate() -> None:
    asks = plan_asks(options(requests=2000, rate=50.0, input="4"), "m")
    assert asks[-1].due_s == pytest.approx(40.0, rel=0.1)
    gaps = [b.due_s - a.due_s for a, b in pairwise(asks)]
    assert statistics.pstdev(gaps) == pytest.approx(0.02, rel=0.15)
    assert all(ask.due_s == 0 for ask in plan_asks(options(requests=5), "m"))


def test_token_ids_stay_inside_the_vocabulary() -> None:
    ids = {token for body in bodies(plan_asks(options(vocabulary=64), "m")) for token in body["input_ids"]}
    assert min(ids) >= 10 and max(ids) < 64


def test_a_trace_is_replayed_with_its_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 4000, "input_length": 1024, "output_length": 6, "hash_ids": [1, 3]},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    asks = plan_asks(options(trace=str(tmp_path / "t.jsonl"), speed=2.0), "m")
    assert [ask.due_s for ask in asks] == [0.0, 2.0]
    first, second = (body["input_ids"] for body in bodies(asks))
    assert (len(first), len(second)) == (600, 1024) and first[:512] == second[:512]
    assert first[512:] != second[512:600]


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_openai_bodies_ask_for_usage_in_streams(route: str) -> None:
    body = bodies(plan_asks(options(route=route, requests=1, output="9"), "model-x"))[0]
    assert body["model"] == "model-x" and body["max_tokens"] == 9 and body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert ("messages" in body) == (route == "chat")


# -- figures -----------------------------------------------------------------------------------


def outcome(ttft_s: float, gaps_s: tuple[float, ...], error: str = "") -> RequestResult:
    first_s = 100.0 + ttft_s
    return RequestResult(
        sent_s=100.0,
        first_s=first_s,
        last_s=first_s + sum(gaps_s),
        status=200,
        error=error,
        prompt_tokens=10,
        output_tokens=1 + len(gaps_s),
        gaps_s=list(gaps_s),
    )


def test_percentiles_are_numpys() -> None:
    values = [0.5, 0.1, 0.9, 0.3, 0.31, 7.0, 0.2]
    found = spread(values)
    for name, share in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(numpy.percentile(values, share))
    assert spread([]).count == 0


def test_goodput_counts_what_met_both_limits() -> None:
    rows = [
        outcome(0.1, (0.01, 0.01)),
        outcome(0.9, (0.01,)),
        outcome(0.1, (0.5,)),
        outcome(0.1, (), "broke"),
    ]
    summary = summarize(RunResult(2.0, rows), slo_ttft_s=0.5, slo_tpot_s=0.1)
    assert (summary.completed, summary.failed, summary.errors) == (3, 1, {"broke": 1})
    assert summary.goodput == pytest.approx(0.5) and summary.attainment == pytest.approx(0.25)
    assert summary.output_tokens == 7 and summary.output_tokens_s == pytest.approx(3.5)
    assert summary.tpot.p50 == pytest.approx(0.01) and summary.itl.count == 4
    text = render_summary("it", summary)
    assert "TTFT <= 0.5 s, TPOT <= 0.1 s" in text and "failed 1 x broke" in text


def test_nothing_answered_is_no_crash() -> None:
    summary = summarize(RunResult(0.0, []))
    assert "0 whole" in render_summary("it", summary) and render_ratio(summary, summary)


def test_stages_are_the_balancers_own() -> None:
    part = {"count": 3, "mean": 0.001, "p50": 0.001, "p90": 0.002, "p95": 0.002, "p99": 0.003}
    text = render_stages({"latency": {"window_s": 300, "queue_s": part, "prefill_s": {"count": 0}}})
    assert "waiting for a pair" in text and "prefill" not in text.splitlines()[-1]
    assert render_stages({}) == "" and render_stages(None) == ""


# -- against servers ---------------------------------------------------------------------------


def prepare(site: Site, tokens: int) -> None:
    for fake in site.fakes:
        fake.behaviour.tokens = tokens


@pytest.mark.parametrize("route", ["generate", "completions", "chat"])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_every_route_is_counted_right(route: str, is_stream: bool) -> None:
    async with running_site() as site:
        prepare(site, 5)
        pool = HttpClient()
        asks = plan_asks(options(route=route, requests=12, stream=is_stream), "m")
        client = LoadClient(site.balancer.url, pool, [(b"content-type", b"application/json")], 10.0)
        progress = Progress(len(asks))
        result = await run_asks(client, asks, concurrency=4, progress=progress)
        await pool.close()
        assert [each.error for each in result.outcomes] == [""] * 12
        assert {each.output_tokens for each in result.outcomes} == {5}
        assert (progress.sent, progress.ended, progress.inflight, progress.failed) == (12, 12, 0, 0)
        for each in result.outcomes:
            assert each.sent_s <= each.sent_s + each.ttft_s <= each.last_s
            assert len(each.gaps_s) == (4 if is_stream else 0)
        assert site.counts["completed"] == 12


async def test_concurrency_is_never_exceeded() -> None:
    async with running_site() as site:
        pool = HttpClient()
        most = 0

        def look(progress: Progress) -> None:
            nonlocal most
            most = max(most, progress.inflight)

        client = LoadClient(site.balancer.url, pool, [(b"content-type", b"application/json")], 10.0)
        asks = plan_asks(options(requests=40), "m")
        await run_asks(client, asks, concurrency=3, progress=Progress(40), on_change=look)
        await pool.close()
        assert most == 3


@pytest.mark.parametrize(
    ("fault", "word"),
    [({"status": 400}, "status 400"), ({"reset_after": 2}, ""), ({"status": 503}, "status")],
)
async def test_what_failed_is_told_and_not_counted(fault: dict[str, Any], word: str) -> None:
    async with running_site(max_retries=0) as site:
        prepare(site, 5)
        for name, value in fault.items():
            setattr(site.decode.behaviour, name, value)
        pool = HttpClient()
        client = LoadClient(site.balancer.url, pool, [(b"content-type", b"application/json")], 10.0)
        result = await run_asks(
            client, plan_asks(options(requests=1), "m"), concurrency=1, progress=Progress(1)
        )
        await pool.close()
        summary = summarize(result)
        assert (summary.completed, summary.failed) == (0, 1) and word in next(iter(summary.errors))


async def test_two_services_get_the_same_requests_in_turn(tmp_path: Path) -> None:
    async with running_site() as one, running_site() as two:
        for site in (one, two):
            prepare(site, 3)
        said: list[str] = []
        given = options(url=one.balancer.url, vs=two.balancer.url, requests=9, rounds=3, warmup=1)
        services = await _run(given, said.append)
        assert [service.summary.completed for service in services] == [9, 9]
        prompts = [[body["input_ids"] for body in site.decode.requests] for site in (one, two)]
        assert sorted(prompts[0]) == sorted(prompts[1]) and len(prompts[0]) == 10
        assert "first over second: requests/s" in said[-1] and "3 rounds in turn" in said[0]


def test_a_service_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        run_bench(options())


@pytest.mark.slow
def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    from pdserve.loadgen.report import draw

    rows = [outcome(0.1 * i, (0.01, 0.02)) for i in range(1, 9)]
    draw(str(tmp_path / "p.png"), [("a", RunResult(1.0, rows)), ("b", RunResult(1.0, rows[:3]))])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        draw(str(tmp_path / "no" / "p.png"), [("a", RunResult(1.0, rows))])
