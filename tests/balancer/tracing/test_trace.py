"""Traces as a collector gets them: one for each request, its legs under the ids that workers were sent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.balancer.app import Balancer
from pdserve.balancer.request.headers import TraceParent, parse_parent
from pdserve.balancer.tracing.export import open_tracing
from pdserve.balancer.tracing.trace import cached_tokens, traces_url
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from tests.support.balancer_client import running_site
from tests.support.otlp_collector import Collector, Span, running_collector
from tests.support.resumable import Break
from tests.support.sglang_server import until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
LEGS = ("prefill leg", "decode leg")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


def _sent(fake: Any, index: int = 0) -> list[str]:
    """The four parts of the traceparent that a worker got."""
    return list(fake.headers[index]["traceparent"].split("-"))


def _names(spans: list[Span]) -> list[str]:
    return sorted(span.name for span in spans)


async def test_one_trace_per_request_with_the_ids_that_the_workers_were_sent(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        site.prefill.behaviour.finish = {"type": "length", "length": 1, "cached_tokens": 2}
        before = time.time_ns()
        await site.generate({"text": "hi", "stream": True}, x_request_id="mine")
        after = time.time_ns()
        row = site.last
        prefill, decode = _sent(site.prefill), _sent(site.decode)
    assert collector.paths == ["/v1/traces"]
    (spans,) = collector.traces.values()
    assert _names(spans) == ["POST /generate", "decode leg", "kv transfer", "prefill leg", "queue"]
    server = collector.server
    assert server.parent_id == ""
    assert {span.parent_id for span in spans if span is not server} == {server.span_id}
    assert len({span.span_id for span in spans}) == 5
    for name, sent in zip(LEGS, (prefill, decode), strict=True):
        (leg,) = collector.named(name)
        assert sent == ["00", leg.trace_id, leg.span_id, "01"]
        assert leg.kind == "client"
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "pdserve.cached_tokens": 2,
        "pdserve.route": "/generate",
        "pdserve.rid": row["rid"],
        "pdserve.request_id": "mine",
        "pdserve.room": row["room"],
        "pdserve.pair": row["pair"],
        "pdserve.reason": row["reason"],
        "pdserve.retries": 0,
        "pdserve.stream": True,
        "pdserve.outcome": "completed",
        "pdserve.finish": "length",
    }
    assert server.resource["service.name"] == "pdserve-balancer"
    assert not any(span.is_error for span in spans)
    assert all(before <= span.start <= span.end <= after + 10**9 for span in spans)


async def test_stages_follow_each_other_on_the_clock(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        site.decode.behaviour.gate = asyncio.Event()
        asking = asyncio.create_task(site.generate({"text": "hi", "stream": True}))
        await until(lambda: site.prefill.requests and not site.prefill.num_exchanges, "prefill answered")
        site.decode.behaviour.gate.set()
        await asking
    (queue,), (prefill,), (transfer,) = (
        collector.named(name) for name in ("queue", "prefill leg", "kv transfer")
    )
    (decode,) = collector.named("decode leg")
    server = collector.server
    assert server.start == queue.start <= queue.end == prefill.start == decode.start
    assert prefill.end == transfer.start <= transfer.end == server.events["first token"]
    assert transfer.end <= decode.end <= server.end


async def test_a_whole_answer_has_no_first_token_and_no_transfer(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        await site.generate({"text": "hi"})
    assert _names(collector.spans) == ["POST /generate", "decode leg", "prefill leg", "queue"]
    assert collector.server.events == {}


async def test_a_clients_context_is_honoured(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url, otlp_sample=0.0) as site:
        await site.generate(
            {"text": "hi"}, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=1,b=2", baggage="k=v"
        )
        headers = site.decode.headers[0]
        sent = _sent(site.decode)
    server = collector.server
    assert (server.trace_id, server.parent_id, server.state) == (TRACE, PARENT, "a=1,b=2")
    (leg,) = collector.named("decode leg")
    assert sent == ["00", TRACE, leg.span_id, "01"]
    assert headers["tracestate"] == "a=1,b=2"
    assert headers["baggage"] == "k=v"


async def test_a_client_that_is_not_sampled_is_not_traced(collector: Collector) -> None:
    parent = f"00-{TRACE}-{PARENT}-00"
    async with running_site(otlp_endpoint=collector.url) as site:
        await site.generate({"text": "hi"}, traceparent=parent, tracestate="a=1")
        got = [(fake.headers[0]["traceparent"], fake.headers[0]["tracestate"]) for fake in site.fakes]
    assert got == [(parent, "a=1")] * 2
    assert collector.spans == []


async def test_what_is_left_out_by_share_is_left_out_by_the_workers_too(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url, otlp_sample=0.0) as site:
        await site.generate({"text": "hi"})
        sent = [_sent(fake) for fake in site.fakes]
    assert sent[0] == sent[1]
    assert sent[0][3] == "00"
    assert collector.spans == []


@pytest.mark.parametrize(
    "wrong",
    [
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        "nonsense",
    ],
)
async def test_a_context_that_is_none_begins_a_trace_of_its_own(collector: Collector, wrong: str) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        await site.generate({"text": "hi"}, traceparent=wrong, tracestate="a=1")
        headers = site.prefill.headers[0]
    server = collector.server
    assert server.parent_id == ""
    assert server.trace_id != TRACE
    assert "tracestate" not in headers
    assert headers["traceparent"].split("-")[1] == server.trace_id


async def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        await site.generate({"text": "hi"}, traceparent=f"01-{TRACE}-{PARENT}-01-what-comes")
    assert collector.server.parent_id == PARENT


async def test_an_answer_that_goes_on_has_legs_of_its_own(collector: Collector) -> None:
    async with running_site(decode=2, resumes=True, otlp_endpoint=collector.url) as site:
        site.decode.breaks.append(Break(2))
        await site.generate({"text": "hi", "stream": True})
    assert collector.server.attributes["pdserve.resumes"] == 1
    broken, whole = collector.named("decode leg")
    assert broken.why and "pdserve.resumed" not in broken.attributes
    assert whole.attributes["pdserve.resumed"] is True
    assert whole.start >= broken.start


async def test_an_answer_that_is_moved_says_so_and_has_no_error(collector: Collector) -> None:
    async with running_site(decode=2, resumes=True, otlp_endpoint=collector.url) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        body = {"text": "hi", "stream": True}
        async with site.exchange("POST", "/generate", body) as exchange:
            await exchange.read_until(b"\n\n")
            (server,) = [fake for fake in site.decodes if fake.requests]
            await site.ask("PUT", f"/workers/{server.name}", {"draining": True, "move": True})
            await exchange.read_until(b"0\r\n\r\n")
    assert collector.server.attributes["pdserve.moves"] == 1
    assert "pdserve.resumes" not in collector.server.attributes
    left, whole = collector.named("decode leg")
    assert left.attributes["pdserve.ended"] == "moved" and not left.why
    assert whole.attributes["pdserve.resumed"] is True and not whole.why


async def test_a_retry_has_legs_of_its_own_and_the_failed_ones_an_error(collector: Collector) -> None:
    async with running_site(prefill=2, otlp_endpoint=collector.url, policy="round_robin") as site:
        site.prefill.behaviour.status = 500
        replies = []
        while not site.counts["retried"]:
            replies.append(await site.generate({"text": "hi"}))
        sent = [headers["traceparent"].split("-")[2] for headers in site.decode.headers][-2:]
    assert [reply.status for reply in replies] == [200] * len(replies)
    (server,) = (span for span in collector.spans if span.attributes.get("pdserve.retries") == 1)
    assert not server.is_error
    collector.spans = collector.traces[server.trace_id]
    first, second = collector.named("prefill leg")
    assert first.is_error and "500" in first.why
    assert first.attributes["http.response.status_code"] == 500
    assert not second.is_error
    assert [span.attributes["pdserve.attempt"] for span in (first, second)] == [0, 1]
    assert first.attributes["pdserve.worker"] != second.attributes["pdserve.worker"]
    given_up, served = collector.named("decode leg")
    assert [given_up.span_id, served.span_id] == sent
    assert given_up.attributes["pdserve.ended"] == "other leg failed"
    assert not given_up.is_error
    assert len(collector.named("queue")) == 2
    assert collector.named("queue")[1].start >= first.end


async def test_a_request_that_fails_for_good_is_an_error(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url, max_retries=0) as site:
        site.decode.behaviour.status = 500
        reply = await site.generate({"text": "hi"})
    assert reply.status >= 500
    server = collector.server
    assert server.is_error
    assert server.attributes["pdserve.outcome"] == "failed"
    assert server.attributes["http.response.status_code"] == reply.status
    assert collector.named("decode leg")[0].is_error


async def test_a_prefill_lost_after_decode_began_is_its_legs_error_alone(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        site.prefill.behaviour.gate = asyncio.Event()
        site.decode.behaviour.token_delay_s = 0.05
        async with site.exchange("POST", "/generate", {"text": "hi", "stream": True}) as exchange:
            await exchange.read_until(b"data: ")
            site.prefill.kill()
            await exchange.read_until(b"[DONE]")
    (prefill,), (decode,) = (collector.named(name) for name in LEGS)
    assert prefill.is_error and prefill.why
    assert (decode.is_error, decode.attributes["http.response.status_code"]) == (False, 200)
    assert not collector.server.is_error
    assert collector.named("kv transfer") == []


async def test_a_clients_own_mistake_is_no_error_of_the_server(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        reply = await site.generate(b"{")
    assert reply.status == 400
    assert [span.name for span in collector.spans] == ["POST /generate"]
    assert not collector.server.is_error
    assert collector.server.attributes["pdserve.error"]


async def test_a_shed_request_shows_its_wait(collector: Collector) -> None:
    settings: dict[str, Any] = dict(max_concurrent_requests=1, queue_timeout_s=0.05)
    async with running_site(otlp_endpoint=collector.url, **settings) as site:
        site.decode.behaviour.gate = asyncio.Event()
        first = asyncio.create_task(site.generate({"text": "hi"}))
        await until(lambda: site.decode.requests, "the first one runs")
        reply = await site.generate({"text": "hi"})
        site.decode.behaviour.gate.set()
        await first
    assert reply.status == 503
    assert len(collector.traces) == 2
    (shed,) = (span for span in collector.spans if span.attributes.get("pdserve.outcome") == "shed")
    assert shed.is_error
    (queue,) = (span for span in collector.traces[shed.trace_id] if span is not shed)
    assert queue.name == "queue" and queue.is_error
    assert queue.end - queue.start >= 40_000_000


async def test_a_client_that_leaves_ends_its_trace(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        site.decode.behaviour.hang_after = 1
        async with site.exchange("POST", "/generate", {"text": "hi", "stream": True}) as exchange:
            await exchange.read_until(b"data: ")
            exchange.leave()
        await until(lambda: site.counts["aborted"] == 1, "aborted")
    server = collector.server
    assert server.is_error and server.why.startswith("aborted")
    assert server.attributes["http.response.status_code"] == 499
    (decode,) = collector.named("decode leg")
    assert decode.attributes["pdserve.ended"] == "aborted"
    assert "first token" in server.events


async def test_each_sample_of_a_chat_has_legs_in_the_one_trace(collector: Collector) -> None:
    async with running_site(prefill=2, decode=2, otlp_endpoint=collector.url) as site:
        body = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "stream": True}
        reply = await site.ask("POST", "/v1/chat/completions", body)
        sent = [fake.headers[i]["traceparent"] for fake in site.decodes for i in range(len(fake.headers))]
    assert reply.status == 200
    (spans,) = collector.traces.values()
    assert len(spans) == 1 + 3 * 4
    legs = collector.named("decode leg")
    assert sorted(sent) == sorted(f"00-{leg.trace_id}-{leg.span_id}-01" for leg in legs)
    assert sorted(leg.attributes["pdserve.sample"] for leg in legs) == [0, 1, 2]
    assert collector.server.attributes["pdserve.samples"] == 3
    assert collector.server.attributes["gen_ai.usage.output_tokens"] == 9


async def test_a_whole_chat_of_samples_and_one_that_fails(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url, max_retries=0) as site:
        body = {"messages": [{"role": "user", "content": "hi"}], "n": 2}
        await site.ask("POST", "/v1/chat/completions", body)
        site.decode.behaviour.status = 500
        await site.ask("POST", "/v1/chat/completions", body)
    served, failed = sorted(collector.traces.values(), key=lambda spans: min(span.start for span in spans))
    assert _names(served).count("decode leg") == 2
    assert not any(span.is_error for span in served)
    assert any(span.is_error and span.name == "decode leg" for span in failed)
    assert all(span.end >= span.start for span in failed)


async def test_what_a_client_says_cannot_break_a_batch(collector: Collector) -> None:
    async with running_site(otlp_endpoint=collector.url) as site:
        site.decode.behaviour.finish = {"type": "length", "length": 3}
        await site.generate({"text": "hi"}, x_request_id="é" * 2000, traceparent="00-é")
        await site.generate({"text": "hi"}, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="é=;,,=")
    assert len(collector.traces) == 2


async def test_off_changes_no_header() -> None:
    async with running_site() as site:
        await site.generate({"text": "hi"}, traceparent="anything", tracestate="a=1")
        got = [(fake.headers[0]["traceparent"], fake.headers[0]["tracestate"]) for fake in site.fakes]
        await site.generate({"text": "hi"})
        assert all("traceparent" not in fake.headers[1] for fake in site.fakes)
    assert got == [("anything", "a=1")] * 2


OFF = """
import asyncio, sys
from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
async def main():
    balancer = Balancer(BalancerConfig(port=0, otlp_endpoint=sys.argv[1]))
    await balancer.start()
    await balancer.stop()
asyncio.run(main())
light = {'torch', 'sglang', 'pydantic_core', 'orjson', 'tokenizers', 'numpy', 'rpds', 'fastapi'}
print(any(name.startswith('opentelemetry') for name in sys.modules), sorted(light & set(sys.modules)))
print('pdserve.balancer.tracing.trace' in sys.modules)
"""


@pytest.mark.process
@pytest.mark.parametrize(("endpoint", "told"), [("", "False []\nFalse"), ("http://[::1]:9", "True []\nTrue")])
def test_opentelemetry_is_loaded_only_for_traces(endpoint: str, told: str) -> None:
    done = subprocess.run([sys.executable, "-c", OFF, endpoint], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


async def test_a_collector_that_is_away_costs_requests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.balancer.tracing.export.CLOSE_S", 0.2)
    with running_collector() as gone:
        url = gone.url
    async with running_site(otlp_endpoint=url) as site:
        replies = [await site.generate({"text": "hi"}) for _ in range(3)]
        async with asyncio.timeout(10):
            await site.balancer.stop()
    assert [reply.status for reply in replies] == [200] * 3


async def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.balancer.tracing.export.CLOSE_S", 0.2)
    collector.gate = threading.Event()
    async with running_site(otlp_endpoint=collector.url) as site:
        reply = await site.generate({"text": "hi"})
        async with asyncio.timeout(10):
            await site.balancer.stop()
    assert reply.status == 200
    assert collector.spans == []


async def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pdserve.balancer.tracing.export", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[otel\]'"):
        Balancer(BalancerConfig(port=0, otlp_endpoint="http://127.0.0.1:4318"))


@pytest.mark.parametrize(
    ("endpoint", "sample"),
    [
        ("127.0.0.1:4318", 1.0),
        ("ftp://a", 1.0),
        ("http://a:4317", 1.0),
        ("http://a:x", 1.0),
        ("http://a", 1.5),
    ],
)
def test_wrong_settings_are_named(endpoint: str, sample: float) -> None:
    with pytest.raises(ConfigError):
        open_tracing(endpoint, sample)


def test_the_path_of_an_endpoint_is_kept() -> None:
    assert traces_url("https://a:4318/") == "https://a:4318/v1/traces"
    assert traces_url("http://a/otlp/v1/traces") == "http://a/otlp/v1/traces"


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_context_is_read_as_it_was_written(trace_id: int, span_id: int, is_sampled: bool) -> None:
    context = TraceParent(trace_id, span_id, is_sampled, b"a=1")
    lines = (line.split(b": ") for line in context.lines().splitlines())
    assert parse_parent({name: value for name, value in lines}) == context


@given(st.binary(max_size=80))
def test_no_header_is_too_odd_to_be_read(value: bytes) -> None:
    found = parse_parent({b"traceparent": value})
    assert found is None or (found.trace_id and found.span_id)


def test_cached_tokens_of_a_batch_add_up_and_of_a_stream_do_not() -> None:
    assert cached_tokens(b'[{"cached_tokens": 2},{"cached_tokens":3}]') == 5
    assert cached_tokens(b'data: {"cached_tokens": 2}\n\ndata: {"cached_tokens": 2}\n\n') == 2
    assert cached_tokens(b"{}") is None
