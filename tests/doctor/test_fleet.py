"""Judging a fleet by its state document: trouble is named, a sound fleet is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec

from pdserve import __version__
from pdserve.balancer.app import Balancer
from pdserve.bootstrap.messages import FleetView
from pdserve.config.balancer import BalancerConfig
from pdserve.doctor.finding import Finding, Level
from pdserve.doctor.fleet import fleet_groups, judge_fleet
from pdserve.doctor.runner import run_groups
from pdserve.state.client import read_state
from pdserve.types import KVLayoutDescriptor, Role, WorkerInfo
from tests.support.balancer_client import running_site
from tests.support.monitor_terminal import recorded
from tests.support.sglang_server import FakeSGLang, until

LAYOUT = KVLayoutDescriptor(
    page_size=16, dtype="bfloat16", num_layers=30, num_kv_heads=3, token_bytes=768, converts_pages=True
)


ERROR, WARNING, NOTE = Level.ERROR, Level.WARNING, Level.NOTE


class FixedMembers:
    """A membership that never changes, with KV layouts."""

    is_connected, epoch = True, "epoch"

    def __init__(self, workers: list[WorkerInfo]) -> None:
        self._workers = workers

    async def watch(self) -> AsyncIterator[FleetView]:
        yield FleetView(epoch="epoch", version=1, workers=self._workers)
        await asyncio.Event().wait()


@asynccontextmanager
async def fleet_with_page_sizes(prefill: int, decode: int) -> AsyncIterator[Balancer]:
    """One pair of fakes whose layouts the bootstrap service would have told."""
    async with AsyncExitStack() as stack:
        infos = []
        for role, page_size in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            fake = await stack.enter_async_context(FakeSGLang(role))
            layout = msgspec.structs.replace(LAYOUT, page_size=page_size, converts_pages=False)
            infos.append(msgspec.structs.replace(fake.info, kv_layout=layout))
        balancer = Balancer(BalancerConfig(port=0), FixedMembers(infos))
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        await until(
            lambda: [str(pair.state) in ("ready", "failed") for pair in balancer.fleet.pairs()] == [True]
        )
        yield balancer


def judged(name: str = "healthy", skew_s: float = 0.0, **changes: Any) -> list[Finding]:
    """A recorded state document with other keys in place of its own; ``workers`` are changes by name."""
    state = recorded(name) | {"version": __version__}
    for worker in state["workers"]:
        worker |= changes.get("workers", {}).get(worker["worker_id"], {})
    state |= {key: value for key, value in changes.items() if key != "workers"}
    return judge_fleet(read_state(state), 0.01, skew_s)


def one(**changes: Any) -> dict[str, Any]:
    """One decode worker is different."""
    return {"workers": {"decode-0": changes}}


def bad(findings: list[Finding], level: Level) -> Finding:
    """The only one of that level, with a reason and a remedy."""
    (found,) = [finding for finding in findings if finding.level is level]
    assert found.why
    assert found.what_to_do
    return found


def test_a_sound_fleet_is_fine() -> None:
    findings = judged()
    assert {finding.level for finding in findings} == {Level.OK}
    assert {f.check for f in findings} == {
        "balancer", "bootstrap", "pairs", "prefill-0", "decode-0", "decode-1",
    }  # fmt: skip


def test_an_old_state_document_is_judged_without_what_it_lacks() -> None:
    keys = ("worker_id", "role", "url", "state")
    workers = [{key: worker[key] for key in keys} for worker in recorded("healthy")["workers"]]
    state = read_state({"version": __version__, "workers": workers})
    assert {f.level for f in judge_fleet(state, 0.01, 0.0)} <= {Level.OK, Level.NOTE}


def test_trouble_is_named_where_it_is() -> None:
    """Each change of a sound document, the level and the subject of the finding, and words of it."""
    gone = {"time_s": recorded("healthy")["now_s"] - 10, "event": "gone", "worker": "decode-9"}
    table: list[tuple[dict[str, Any], Level, str, str]] = [
        (one(state="suspect", last_error="refused"), ERROR, "decode-0", "suspect: refused"),
        (one(breaker="open"), ERROR, "decode-0", "breaker open"),
        (one(wedge={"stalled_s": 45.0}), ERROR, "decode-0", "no progress"),
        (one(kv_usage=0.99), WARNING, "decode-0", "KV pool 99% used"),
        (one(queues={"retracted": 3}), WARNING, "decode-0", "3 requests"),
        (one(draining=True, state="draining"), NOTE, "decode-0", "draining"),
        (one(state="joining"), NOTE, "decode-0", "joining"),
        ({"workers": {f"decode-{i}": {"role": "prefill"} for i in (0, 1)}}, ERROR, "workers", "no decode"),
        ({"bootstrap": {"url": "http://h:1", "connected": False}}, ERROR, "bootstrap", "http://h:1 lost"),
        ({"bootstrap": {"url": "", "connected": False}}, NOTE, "bootstrap", "one by one"),
        ({"queue": {"length": 3, "size": 8, "oldest_wait_s": 50.0}}, WARNING, "queue", "50.0 s"),
        ({"queue": {"shed": {"queue_full": 7}}}, NOTE, "queue", "7 queue_full"),
        ({"rates": {"failed_s": 0.5}}, WARNING, "requests", "0.5 a second fail"),
        ({"version": "9.9"}, WARNING, "versions", "9.9 on the balancer"),
        ({"skew_s": 75.0}, WARNING, "clocks", "+75.0 s"),
        ({"events": [gone | {"detail": "left"}]}, WARNING, "decode-9", "left the fleet 10 s ago: left"),
    ]
    wrong = []
    for changes, level, subject, words in table:
        found = [f for f in judged(**changes) if f.level is level]
        if (
            [f.check for f in found] != [subject]
            or words not in found[0].what
            or (level in (ERROR, WARNING) and not (found[0].why and found[0].what_to_do))
        ):
            wrong.append((changes, found))
    assert not wrong


def test_departures_that_need_nobody_are_not_named() -> None:
    now_s = recorded("healthy")["now_s"]
    gone = {"time_s": now_s - 10, "event": "gone", "worker": "decode-9", "detail": "left the fleet"}
    others = [
        gone | {"detail": "removed by an operator"},
        gone | {"time_s": now_s - 1000},
        gone | {"event": "suspect"},
        gone | {"worker": "decode-0"},
    ]
    for event in others:
        assert {f.level for f in judged(events=[event])} == {Level.OK}, event


def test_pairs_of_one_fault_make_one_finding() -> None:
    names = [f"prefill-{i}>decode-{j}".split(">") for i in range(3) for j in range(3)]
    pairs = [{"prefill": p, "decode": d, "state": "failed", "error": "HTTP 500"} for p, d in names]
    ready = {"prefill": "prefill-0", "decode": "decode-3", "state": "ready", "probe_s": 0.1}
    found = judged(pairs=[*pairs, ready])
    assert "and 5 more failed: HTTP 500" in bad(found, Level.ERROR).what
    assert "1 of 10 pairs" in next(f.what for f in found if f.level is Level.NOTE)


async def found_at(url: str, api_key: str = "") -> list[Finding]:
    (section,) = await asyncio.to_thread(run_groups, fleet_groups(url, api_key))
    return list(section.findings)


async def test_a_balancer_is_asked_with_its_key_or_named() -> None:
    async with running_site(admin_api_key="secret") as site:
        url = site.balancer.url
        assert "--api-key" in bad(await found_at(url), Level.ERROR).what
        with_key = {finding.check for finding in await found_at(url, "secret")}
        assert with_key >= {"balancer", "pairs", "prefill-0", "decode-0"}
        other = bad(await found_at(site.prefill.url), Level.ERROR)
        assert "pdserve balancer" in other.what_to_do
    gone = bad(await found_at(url), Level.ERROR)
    assert "pdserve launch" in gone.what_to_do and url in gone.what


async def test_page_sizes_that_nobody_converts_are_named() -> None:
    async with fleet_with_page_sizes(16, 32) as balancer:
        found = bad(await found_at(balancer.url), Level.ERROR)
    assert found.check == "KV layouts"
    assert "page_size: 16 != 32" in found.what
    assert "--page-size" in found.what_to_do
