"""What a known load does to the published metrics: read by Prometheus' own parser over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from pdserve.balancer.metrics.catalog import BY_NAME, METRICS, Kind
from pdserve.types import KVLayoutDescriptor, WorkerId
from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import until

PLAIN = {"text": "hello"}
STREAM = {"text": "hello", "stream": True}
CHAT = {"messages": [{"role": "user", "content": "a"}], "stream": True}


class Scrape:
    """Samples of one scrape, by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        """The one sample with these labels among its own; None if there is none."""
        found = [
            sample.value
            for sample in self.samples
            if sample.name == f"pdserve:{name}" and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, f"{name} {labels}: {found}"
        return found[0] if found else None

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples with these labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"pdserve:{name}" and labels.items() <= sample.labels.items()
        )

    def counts(self, *names: str) -> dict[str, float | None]:
        """How much each histogram has seen."""
        return {name: self.value(f"{name}_seconds_count") for name in names}


async def scrape(site: Site, path: str = "/pdserve/metrics") -> Scrape:
    return Scrape((await site.ask("GET", path)).body.decode())


def behave(fakes: list[Any], **how: object) -> None:
    for fake in fakes:
        for name, value in how.items():
            setattr(fake.behaviour, name, value)


async def test_completed_requests_are_counted_once_in_every_figure() -> None:
    async with running_site(prefill=2, decode=2) as site:
        behave(site.decodes, tokens=5)
        for _ in range(3):
            await site.generate(PLAIN)
        for _ in range(4):
            await site.generate(STREAM)
        for _ in range(2):
            await site.ask("POST", "/v1/chat/completions", CHAT)
        seen = await scrape(site)
    assert seen.value("requests_received_total") == 9
    assert seen.total("requests_total") == 9
    assert seen.value("requests_total", route="/generate", outcome="completed", is_streaming="false") == 3
    assert seen.value("requests_total", route="/generate", outcome="completed", is_streaming="true") == 4
    assert seen.value("requests_total", route="/v1/chat/completions", outcome="completed") == 2
    assert seen.counts("e2e_request_latency", "queue_time", "prefill_time") == dict.fromkeys(
        ("e2e_request_latency", "queue_time", "prefill_time"), 9
    )
    streams = ("time_to_first_token", "time_per_output_token", "handover_time")
    assert seen.counts(*streams) == dict.fromkeys(streams, 6)
    assert seen.value("generation_tokens_total") == 9 * 5
    assert seen.value("prompt_tokens_total") == 9 * 4
    assert seen.total("decisions_total", policy="pair_cost") == 9
    assert seen.total("pair_prompt_tokens_total") == 9 * 4
    assert (seen.value("requests_inflight"), seen.value("requests_dispatched")) == (0, 0)
    assert (seen.value("retries_total"), seen.total("leg_errors_total")) == (0, 0)


async def test_a_failed_attempt_is_a_retry_and_an_error_of_its_leg() -> None:
    async with running_site(prefill=1, decode=2) as site:
        site.decodes[0].behaviour.status = 500
        for _ in range(4):
            assert (await site.generate(PLAIN)).status == 200
        seen = await scrape(site)
        failed = [request for request in site.decodes[0].requests if "text" in request]  # no probes
    assert failed
    assert seen.value("requests_total", outcome="completed") == 4
    assert seen.value("retries_total") == len(failed)
    assert seen.value("leg_errors_total", worker_id="decode-0", kind="rejected") == len(failed)
    assert seen.total("leg_errors_total") == len(failed)


async def test_a_request_that_fails_for_good_has_its_stages_but_no_whole_time() -> None:
    async with running_site(max_retries=0) as site:
        site.decode.behaviour.reset_after = 2
        await site.generate(STREAM)
        site.decode.behaviour.reset_after = None
        seen = await scrape(site)
    assert seen.value("requests_total", outcome="failed", is_streaming="true") == 1
    assert seen.counts("time_to_first_token", "queue_time") == {"time_to_first_token": 1, "queue_time": 1}
    assert seen.counts("e2e_request_latency", "time_per_output_token") == {
        "e2e_request_latency": 0,
        "time_per_output_token": 0,
    }
    assert seen.value("leg_errors_total", worker_id="decode-0", kind="unreachable") == 1
    assert seen.value("generation_tokens_total") == 0


async def test_a_broken_connection_opens_the_breaker() -> None:
    async with running_site(max_retries=0) as site:
        behave([site.prefill], reset_before_head=True)
        await site.generate(PLAIN)
        seen = await scrape(site)
    who = {"worker_id": "prefill-0", "worker_role": "prefill"}
    assert seen.value("breaker_opened_total", **who) == 1
    assert seen.value("breaker_state", **who, state="closed") == 0
    assert seen.value("worker_state", **who, state="suspect") == 1
    assert seen.value("pair_ready", prefill="prefill-0", decode="decode-0") == 0
    assert seen.value("worker_state", worker_id="decode-0", state="ready") == 1


async def test_clients_that_leave_are_aborts_and_one_that_finds_the_queue_full_is_shed() -> None:
    async with running_site(max_concurrent_requests=1, queue_size=1) as site:
        behave(site.fakes, hang=True)
        async with site.exchange("POST", "/generate", STREAM) as first:
            await until(lambda: site.decode.requests)
            async with site.exchange("POST", "/generate", PLAIN) as second:
                await until(lambda: site.balancer.fleet.scheduler.num_waiting == 1)
                waiting = await scrape(site)
                assert (await site.generate(PLAIN)).status == 503
                second.leave()
                await until(lambda: site.balancer.fleet.scheduler.num_waiting == 0)
            first.leave()
            await until(lambda: site.counts["inflight"] == 0)
        seen = await scrape(site)
    assert (waiting.value("queue_length"), waiting.value("queue_size")) == (1, 1)
    assert waiting.value("queue_oldest_seconds") != 0
    assert (waiting.value("requests_inflight"), waiting.value("requests_dispatched")) == (2, 1)
    assert seen.value("requests_total", outcome="aborted", is_streaming="true") == 1
    assert seen.value("requests_total", outcome="aborted", is_streaming="false") == 1
    assert seen.total("requests_total", outcome="shed") == 1
    assert seen.value("requests_shed_total", reason="queue_full") == 1
    assert seen.counts("queue_time", "e2e_request_latency") == {"queue_time": 1, "e2e_request_latency": 0}


async def test_a_request_that_waits_in_vain_is_shed_for_that() -> None:
    async with running_site(max_concurrent_requests=1, queue_timeout_s=0.01) as site:
        behave(site.fakes, hang=True)
        async with site.exchange("POST", "/generate", STREAM):
            await until(lambda: site.decode.requests)
            assert (await site.generate(PLAIN)).status == 503
            seen = await scrape(site)
    assert seen.value("requests_total", outcome="shed", is_streaming="false") == 1
    assert seen.value("requests_shed_total", reason="timeout") == 1


async def test_of_eight_streams_every_gap_is_measured_once() -> None:
    """Which eighth of a stream's gaps is measured goes round from stream to stream."""
    async with running_site() as site:
        behave([site.decode], tokens=6, token_delay_s=0.004, padding_bytes=600)
        for _ in range(8):
            await site.generate(STREAM)
        seen = await scrape(site)
    # Events that came in one read have no gap between them: the fake's pauses may be lost to a busy machine.
    count = seen.value("inter_token_latency_seconds_count")
    assert count is not None
    assert 0 < count <= 8 * 5
    assert (seen.value("inter_token_latency_seconds_sum") or 0) > 0


async def test_every_sample_is_in_the_catalogue_with_its_type_and_labels() -> None:
    async with running_site() as site:
        await site.generate(STREAM)
        behave([site.prefill], status=500)
        await site.generate(PLAIN)
        text = (await site.ask("GET", "/metrics")).body.decode()
    scraped = Scrape(text)
    for family in scraped.families.values():
        name = family.name + ("_total" if family.type == "counter" else "")
        metric = BY_NAME[name]
        assert (family.type, family.documentation) == (str(metric.kind), metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert names == [metric.name for metric in METRICS if metric.name in names]


async def test_histograms_are_cumulative_and_end_in_inf() -> None:
    async with running_site() as site:
        await site.generate(STREAM)
        scraped = await scrape(site)
    for metric in METRICS:
        if metric.kind is not Kind.HISTOGRAM or metric.name not in scraped.families:
            continue
        samples = scraped.families[metric.name].samples
        buckets = [
            (sample.labels["le"], sample.value) for sample in samples if sample.name.endswith("_bucket")
        ]
        assert [float(le) for le, _ in buckets] == [*map(float, metric.bounds), float("inf")]
        counts = [count for _, count in buckets]
        assert counts == sorted(counts)
        assert buckets[-1] == ("+Inf", next(s.value for s in samples if s.name.endswith("_count")))


async def test_kv_bytes_of_a_pair_follow_from_the_layout() -> None:
    layout = KVLayoutDescriptor(page_size=16, dtype="bf16", num_layers=30, num_kv_heads=3, token_bytes=768)
    async with running_site() as site:
        worker = site.balancer.fleet.workers()[0]
        site.balancer.fleet.health.worker_learned(worker, structs.replace(worker.info, kv_layout=layout))
        await site.generate(PLAIN)
        seen = await scrape(site)
        state = (await site.ask("GET", "/pdserve/state")).json
    assert seen.value("pair_kv_bytes_total", prefill="prefill-0", decode="decode-0") == 4 * 30 * 768
    (pair,) = state["pairs"]
    assert (pair["prompt_tokens"], pair["kv_bytes"]) == (4, 4 * 30 * 768)
    assert pair["kv_bytes_s"] >= 0


@pytest.mark.parametrize("odd", ['quo"te', "back\\slash", "new\nline"])
async def test_odd_names_are_escaped(odd: str) -> None:
    async with running_site() as site:
        worker = site.balancer.fleet.workers()[0]
        worker.view.info = structs.replace(worker.info, worker_id=WorkerId(odd))
        seen = await scrape(site)
    assert seen.value("worker_inflight_requests", worker_id=odd) == 0


async def test_scraping_while_requests_run_changes_nothing() -> None:
    async with running_site() as site:
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(site.generate(STREAM))
                group.create_task(scrape(site))
        seen = await scrape(site)
    assert seen.value("requests_total", outcome="completed") == 20
    assert seen.value("time_to_first_token_seconds_count") == 20
