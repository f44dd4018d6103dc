"""The state document of a real balancer is what docs/state.schema.json says, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from msgspec import structs

from pdserve.balancer.fleet.transfer_poll import TransferCounters
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.state.document import state_schema
from pdserve.types import KVLayoutDescriptor
from tests.support.balancer_client import Site, running_site

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "state.schema.json").read_text())
STREAM = {"text": "hello", "stream": True}
LOAD = {
    "num_running_reqs": 3,
    "num_waiting_reqs": 7,
    "num_used_tokens": 400,
    "max_total_num_tokens": 1600,
    "decode_moments": [1, 2, 3, 4, 5, 6],
    "disaggregation": {"decode_prealloc_queue_reqs": 2, "decode_transfer_queue_reqs": 1},
}


def faults(document: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{'/'.join(map(str, e.path))}: {e.message[:200]}" for e in validator.iter_errors(document)]


def watched(site: Site) -> WorkerMetrics:
    """The fleet's figures, looked at now."""
    metrics, fleet = site.balancer.metrics, site.balancer.fleet
    metrics.look(fleet.workers(), fleet.scheduler.table, fleet.scheduler.num_waiting)
    return metrics


async def state(site: Site) -> dict[str, Any]:
    reply = await site.ask("GET", "/pdserve/state")
    assert isinstance(reply.json, dict)
    return reply.json


async def test_an_idle_balancer_is_described() -> None:
    async with running_site(prefill=0, decode=0) as site:
        document = await state(site)
    assert faults(document) == []
    assert (document["workers"], document["pairs"]) == ([], [])


async def test_a_balancer_under_traffic_is_described() -> None:
    layout = KVLayoutDescriptor(page_size=16, dtype="bf16", num_layers=30, num_kv_heads=3, token_bytes=768)
    async with running_site(prefill=2, decode=2, max_retries=0) as site:
        health, (prefill, *_) = site.balancer.fleet.health, site.balancer.fleet.workers()
        health.worker_learned(prefill, structs.replace(prefill.info, kv_layout=layout))
        for _ in range(4):
            await site.generate(STREAM)
            await site.generate({"text": "hello"})
        figures = watched(site)
        figures.record_transfers(prefill, TransferCounters())
        figures.record_transfers(
            prefill, TransferCounters(kv_bytes=5, transfers=2, latency_us=100, direct_chunks=1)
        )
        for decode in site.decodes:
            decode.behaviour.status = 500
        await site.generate(STREAM)
        document = await state(site)
    assert faults(document) == []
    sent = document["workers"][0]["kv_sent"]
    assert (sent["bytes"], sent["transfers"], sent["path"]) == (5, 2, "direct")
    assert {pair["kv_path"] for pair in document["pairs"] if pair["prompt_tokens"]} <= {"", "direct"}
    assert document["requests"]["failed"] == 1
    assert [row["status"] for row in document["recent"]] == [*[200] * 8, 502]


async def test_stages_of_a_stream_add_up_to_its_first_token() -> None:
    async with running_site() as site:
        site.decode.behaviour.delay_s = 0.02
        await site.generate(STREAM)
        (row,) = (await state(site))["recent"]
    parts = row["queued_s"] + row["prefill_s"] + row["transfer_s"]
    assert row["first_token_s"] == row["ttft_s"] == pytest.approx(parts)
    assert row["transfer_s"] >= 0.01
    assert row["done_s"] == row["e2e_s"] >= row["first_token_s"]


async def test_queues_of_a_worker_are_told_apart() -> None:
    async with running_site(load_poll_s=0.01) as site:
        site.decode.load = LOAD
        workers: list[dict[str, Any]] = []
        while not workers or not workers[1]["kv_usage"]:
            workers = (await state(site))["workers"]
        watched(site)
        worker = (await state(site))["workers"][1]
    assert worker["kv_usage"] == 0.25
    assert worker["queues"] == {
        "bootstrap": 0,
        "waiting": 4,
        "inflight_or_transfer": 1,
        "prealloc": 2,
        "running": 3,
        "retracted": 0,
    }
    assert worker["age_s"] >= 0


async def test_series_have_sixty_places_and_the_queue_beside_them() -> None:
    async with running_site() as site:
        watched(site)
        series = (await state(site))["series"]
    assert {name: len(values) for name, values in series.items() if name != "step_s"} == dict.fromkeys(
        ["requests_s", "output_tokens_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "itl_p50_s", "waiting"],
        60,
    )


async def test_an_unknown_key_is_a_fault() -> None:
    """So that no key can be added without a word on it."""
    async with running_site() as site:
        document = await state(site)
    document["workers"][0]["novelty"] = 1
    document["queue"]["novelty"] = 1
    assert len(faults(document)) == 2


# -- the schema itself -------------------------------------------------------------------------


def _nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    for part in (SCHEMA, *SCHEMA["$defs"].values()):
        yield part["title"], part
        for name, child in part["properties"].items():
            yield f"{part['title']}/{name}", child


def test_the_schema_is_that_of_the_structs() -> None:
    """If it is not: ``python -m pdserve.state.document > docs/state.schema.json``."""
    assert state_schema() == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_has_a_description_and_every_number_a_unit_that_its_name_agrees_with() -> None:
    faults = []
    for path, node in _nodes():
        types = {node.get("type")} | {each.get("type") for each in node.get("anyOf", ())}
        is_table = "additionalProperties" in node and node["additionalProperties"] is not False
        name, unit = path.rpartition("/")[2], node.get("unit", "")
        if not node.get("description"):
            faults.append(f"{path}: no description")
        if (types & {"number", "integer"} or is_table) and not unit:
            faults.append(f"{path}: no unit")
        if "properties" in node and node["additionalProperties"] is not False:
            faults.append(f"{path}: other keys are allowed")
        for ending, wanted in (("_ms", "ms"), ("_us", "us")):
            if name.endswith(ending) and unit != wanted:
                faults.append(f"{path}: {unit}")
        if name.endswith("_s") and unit and unit != "s" and not unit.endswith("/s"):
            faults.append(f"{path}: {unit}")
    assert not faults
