"""Judging a fleet by made-up answers, and asking one of fakes: trouble is named, a sound fleet is not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdserve import SUPPORTED_SGLANG, __version__
from pdserve.balancer.fleet.worker import ProbeFailed, ProbePassed
from pdserve.doctor.finding import Finding, Level
from pdserve.doctor.fleet_checks import (
    judge_balancer,
    judge_clocks,
    judge_load,
    judge_versions,
    judge_workers,
)
from pdserve.doctor.fleet_facts import (
    FleetFacts,
    PairLook,
    StateLook,
    WorkerLook,
    spread,
    worker_info,
)
from pdserve.doctor.pair_checks import judge_layouts, judge_pair_states, judge_pairs, layout_mismatches
from pdserve.types import KVLayoutDescriptor, Role

LAYOUT = KVLayoutDescriptor(
    page_size=16, dtype="bfloat16", num_layers=30, num_kv_heads=3, token_bytes=768, converts_pages=True
)
URL = "http://127.0.0.1:30000"


def row(name: str, **changes: Any) -> dict[str, Any]:
    role = name.partition("-")[0]
    return {
        "worker_id": name, "instance_id": f"{name}-instance", "role": role, "url": f"http://127.0.0.1/{name}",
        "state": "ready", "breaker": "closed", "inflight": 0, "last_error": "", "draining": False,
        "bootstrap_host": "127.0.0.1", "bootstrap_port": 9000 if role == "prefill" else None,
        "wedge": {"stalled_s": 0.0, "wedged": 0}, **changes,
    }  # fmt: skip


def look(name: str, *, changes: dict[str, Any] | None = None, **looks: Any) -> WorkerLook:
    here = row(name, **(changes or {}))
    values: dict[str, Any] = {
        "info": {"version": SUPPORTED_SGLANG, "page_size": 16},
        "instance": {"instance_id": here["instance_id"], "worker_id": name, "version": __version__},
        "loads": {"loads": [{"token_usage": 0.1}]},
        "skew_s": 0.01,
    }
    return WorkerLook(here, **{**values, **looks})


STATE = {
    "version": __version__, "model": "tiny", "policy": "least_load", "now_s": 1000.0,
    "bootstrap": {"url": "http://127.0.0.1:8997", "connected": True},
    "queue": {"length": 0, "size": 1024, "oldest_wait_s": 0.0, "shed": {"queue full": 0}},
    "pairs": [], "events": [],
}  # fmt: skip


def fleet(
    *workers: WorkerLook, layouts: dict[str, KVLayoutDescriptor] | None = None, **state: Any
) -> FleetFacts:
    workers = workers or (look("prefill-0"), look("decode-0"))
    view = {
        str(each.row["instance_id"]): msgspec.structs.replace(
            worker_info(each.row), kv_layout=layouts[each.name], sglang_version=SUPPORTED_SGLANG
        )
        for each in workers
        if layouts and each.name in layouts
    }
    return FleetFacts(URL, StateLook({**STATE, **state}, status=200, took_s=0.01, skew_s=0.0), workers, view)


def bad(findings: list[Finding], level: Level) -> Finding:
    """The only one of that level, with a reason and a remedy."""
    (found,) = [finding for finding in findings if finding.level is level]
    assert found.why
    assert found.what_to_do
    return found


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


JUDGES = (judge_balancer, judge_workers, judge_versions, judge_clocks, judge_load, judge_layouts)


@pytest.mark.parametrize("health", JUDGES)
def test_a_sound_fleet_is_fine(health: Any) -> None:
    facts = fleet(layouts={"prefill-0": LAYOUT, "decode-0": LAYOUT})
    assert levels(health(facts)) == {Level.OK}


@pytest.mark.parametrize("health", JUDGES)
def test_an_old_state_document_is_judged_without_what_it_lacks(health: Any) -> None:
    bare = {"worker_id", "role", "url", "state"}
    workers = [
        WorkerLook({k: v for k, v in row(name).items() if k in bare}) for name in ("prefill-0", "decode-0")
    ]
    facts = FleetFacts(URL, StateLook({"version": __version__, "workers": []}, status=200), tuple(workers))
    assert Level.ERROR not in levels(health(facts))


# -- balancer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look_", "words"),
    [
        (StateLook(trouble=f"{URL}: cannot connect: refused"), "pdserve launch"),
        (StateLook(trouble="HTTP 401", status=401), "--api-key"),
        (StateLook(trouble="HTTP 404", status=404), "pdserve balancer"),
    ],
)
def test_a_balancer_that_does_not_answer_is_an_error_with_the_right_remedy(
    look_: StateLook, words: str
) -> None:
    found = bad(judge_balancer(FleetFacts(URL, look_)), Level.ERROR)
    assert words in found.what_to_do
    assert found.what.count(URL) == 1


def test_a_lost_bootstrap_service_is_an_error() -> None:
    lost = fleet(bootstrap={"url": "http://h:8997", "connected": False})
    static = fleet(bootstrap={"url": "", "connected": False})
    assert "http://h:8997" in bad(judge_balancer(lost), Level.ERROR).what
    assert levels(judge_balancer(static)) == {Level.OK, Level.NOTE}


# -- workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "level", "words"),
    [
        (look("decode-0", health="cannot connect: refused"), Level.ERROR, "does not answer: cannot connect"),
        (look("decode-0", info={}, info_trouble="no answer within 15 s"), Level.ERROR, "scheduler does not"),
        (look("decode-0", info={"disaggregation_mode": "null"}), Level.ERROR, "disaggregation mode null"),
        (
            look("decode-0", changes={"state": "suspect", "last_error": "HTTP 500"}),
            Level.WARNING,
            "suspect, breaker closed, last error: HTTP 500",
        ),
        (look("decode-0", changes={"breaker": "open"}), Level.WARNING, "breaker open"),
        (look("decode-0", changes={"state": "draining", "draining": True}), Level.NOTE, "draining"),
        (look("decode-0", is_hidden=True), Level.NOTE, "cannot be reached from this machine"),
    ],
)
def test_a_worker_in_trouble_is_named(worker: WorkerLook, level: Level, words: str) -> None:
    (found,) = [f for f in judge_workers(fleet(look("prefill-0"), worker)) if f.level is level]
    assert found.check == "decode-0"
    assert words in found.what


def test_another_process_at_the_address_of_a_member_is_named() -> None:
    other = look("decode-0", instance={"instance_id": "other", "worker_id": "decode-9"})
    member = fleet(look("prefill-0"), other, layouts={"decode-0": LAYOUT})
    assert "another server answers" in bad(judge_workers(member), Level.ERROR).what


def test_a_worker_named_by_hand_has_an_instance_of_its_own() -> None:
    stock = look("decode-0", instance={"instance_id": "its own", "worker_id": ""})
    findings = judge_workers(fleet(look("prefill-0"), stock))
    assert levels(findings) == {Level.OK}
    assert "stock SGLang" in findings[1].what


def test_a_fleet_without_a_role_is_an_error() -> None:
    assert "no decode server" in bad(judge_workers(fleet(look("prefill-0"))), Level.ERROR).what


def test_a_worker_that_died_is_told_of_and_one_that_was_removed_is_not() -> None:
    died = {"time_s": 990.0, "event": "gone", "worker": "decode-1", "detail": "left the fleet"}
    others = [
        {**died, "worker": "decode-2", "detail": "removed by an operator"},
        {**died, "worker": "decode-3", "time_s": 10.0},
        {**died, "event": "suspect", "worker": "decode-4"},
    ]
    found = bad(judge_workers(fleet(events=[died, *others])), Level.WARNING)
    assert (found.check, found.what) == ("decode-1", "left the fleet 10 s ago: left the fleet")


def test_a_worker_that_was_restarted_is_noted() -> None:
    event = {"time_s": 993.0, "event": "gone", "worker": "decode-0", "detail": "superseded by x"}
    (found,) = [f for f in judge_workers(fleet(events=[event])) if f.level is not Level.OK]
    assert (found.check, found.level) == ("decode-0", Level.NOTE)
    assert "7 s ago" in found.what


# -- versions, clocks, load --------------------------------------------------------------------


def test_different_sglang_on_two_workers_is_named() -> None:
    old = look("decode-0", info={"version": "0.5.9"})
    found = bad(judge_versions(fleet(look("prefill-0"), old)), Level.WARNING)
    assert "0.5.9 on decode-0" in found.what
    assert f"{SUPPORTED_SGLANG} on prefill-0" in found.what


def test_one_other_sglang_everywhere_is_named() -> None:
    both = [look(name, info={"version": "0.5.9"}) for name in ("prefill-0", "decode-0")]
    assert "0.5.9 on every worker" in bad(judge_versions(fleet(*both)), Level.WARNING).what


def test_another_pdserve_on_balancer_or_worker_is_named() -> None:
    assert "9.9 on the balancer" in bad(judge_versions(fleet(version="9.9")), Level.WARNING).what
    strange = look("decode-0", instance={"instance_id": "decode-0-instance", "version": "8.8"})
    assert "8.8 on decode-0" in bad(judge_versions(fleet(look("prefill-0"), strange)), Level.WARNING).what


def test_clocks_apart_are_named() -> None:
    ahead = look("decode-0", skew_s=75.0)
    found = bad(judge_clocks(fleet(look("prefill-0"), ahead)), Level.WARNING)
    assert "decode-0 +75.0 s" in found.what
    assert "prefill-0" not in found.what


@pytest.mark.parametrize(
    ("worker", "level", "words"),
    [
        (look("decode-0", loads={"loads": [{"token_usage": 0.99}]}), Level.WARNING, "99% of its KV pool"),
        (look("decode-0", loads={"loads": [{"token_usage": 0.9}]}), Level.NOTE, "90% of its KV pool"),
        (look("decode-0", changes={"wedge": {"stalled_s": 45.0}}), Level.ERROR, "no progress"),
        (
            look("decode-0", loads={"loads": [{"disaggregation": {"decode_retracted_queue_reqs": 3}}]}),
            Level.WARNING,
            "3 requests were taken back",
        ),
    ],
)
def test_a_worker_under_pressure_is_named(worker: WorkerLook, level: Level, words: str) -> None:
    (found,) = [f for f in judge_load(fleet(look("prefill-0"), worker)) if f.level is level]
    assert found.check == "decode-0"
    assert words in found.what


def test_a_stuck_queue_and_refusals_are_told() -> None:
    stuck = {"length": 3, "size": 1024, "oldest_wait_s": 50.0, "shed": {}}
    full = {"length": 8, "size": 8, "oldest_wait_s": 1.0, "shed": {"queue full": 7}}
    assert "50.0 s" in bad(judge_load(fleet(queue=stuck)), Level.WARNING).what
    assert levels(judge_load(fleet(queue=full))) == {Level.WARNING, Level.NOTE}


# -- layouts and pairs -------------------------------------------------------------------------


def test_page_sizes_that_nobody_converts_are_an_error_for_that_pair_alone() -> None:
    stiff = msgspec.structs.replace(LAYOUT, converts_pages=False)
    wide = msgspec.structs.replace(stiff, page_size=32)
    workers = look("prefill-0"), look("decode-0"), look("decode-1")
    facts = fleet(*workers, layouts={"prefill-0": stiff, "decode-0": stiff, "decode-1": wide})
    found = bad(judge_layouts(facts), Level.ERROR)
    assert found.what == "page_size: 16 != 32 (prefill != decode) in prefill-0>decode-1"
    assert "--page-size" in found.what_to_do
    assert layout_mismatches(facts) == {"prefill-0>decode-1": "page_size: 16 != 32"}


def test_page_sizes_that_are_converted_are_a_note() -> None:
    wide = msgspec.structs.replace(LAYOUT, page_size=32)
    facts = fleet(layouts={"prefill-0": LAYOUT, "decode-0": wide})
    (found,) = judge_layouts(facts)
    assert found.level is Level.NOTE
    assert "converted" in found.what


def test_workers_that_report_no_layout_are_compared_by_what_they_tell() -> None:
    workers = look("prefill-0", info={"page_size": 1}), look("decode-0", info={"page_size": 16})
    ready = [{"prefill": "prefill-0", "decode": "decode-0", "state": "ready", "error": ""}]
    assert "page_size: 1 != 16" in bad(judge_layouts(fleet(*workers)), Level.ERROR).what
    assert levels(judge_layouts(fleet(*workers, pairs=ready))) == {Level.OK}


def test_many_pairs_of_one_fault_make_one_finding() -> None:
    stiff = msgspec.structs.replace(LAYOUT, converts_pages=False)
    other = msgspec.structs.replace(stiff, dtype="float32")
    workers = [look(f"{role}-{i}") for role in ("prefill", "decode") for i in range(6)]
    layouts = {each.name: stiff if each.role is Role.PREFILL else other for each in workers}
    found = bad(judge_layouts(fleet(*workers, layouts=layouts)), Level.ERROR)
    assert "and 32 more" in found.what
    assert len(found.values["pairs"]) == 36  # type: ignore[arg-type]


def test_pairs_that_the_balancer_keeps_out_are_named_unless_it_was_said_already() -> None:
    pairs = [
        {"prefill": "prefill-0", "decode": "decode-0", "state": "ready", "error": ""},
        {"prefill": "prefill-0", "decode": "decode-1", "state": "failed", "error": "HTTP 500"},
        {"prefill": "prefill-0", "decode": "decode-2", "state": "untested", "error": ""},
        {
            "prefill": "prefill-0",
            "decode": "decode-3",
            "state": "failed",
            "error": "KV layouts differ: a: 1 != 2",
        },
    ]
    workers = [look(name) for name in ("prefill-0", "decode-0", "decode-1", "decode-3")]
    dead = look("decode-2", health="cannot connect")
    found = bad(judge_pair_states(fleet(*workers, dead, pairs=pairs)), Level.WARNING)
    assert "prefill-0>decode-1: failed: HTTP 500" in found.what


def test_pairs_are_judged_by_the_token() -> None:
    passed = PairLook("prefill-0", "decode-0", ProbePassed(0.5))
    failed = PairLook("prefill-0", "decode-1", ProbeFailed(Role.DECODE, "decode http://h: HTTP 500: no"))
    untried = PairLook("prefill-0", "decode-2", untried="decode-2 is draining")
    assert levels(judge_pairs([passed])) == {Level.OK}
    findings = judge_pairs([passed, failed, untried])
    found = bad(findings, Level.ERROR)
    assert "prefill-0>decode-1: decode http://h: HTTP 500" in found.what
    assert "log of decode-1" in found.what_to_do
    assert any("1 of 3 pairs" in f.what for f in findings)
    assert any("prefill-0>decode-2: decode-2 is draining" in f.what for f in findings)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(3, 5), (5, 3), (4, 4), (1, 6), (0, 3)])
def test_the_first_pairs_tried_have_every_worker_in_them(num_prefill: int, num_decode: int) -> None:
    prefills = [look(f"prefill-{i}") for i in range(num_prefill)]
    decodes = [look(f"decode-{i}") for i in range(num_decode)]
    order = [(p.name, d.name) for p, d in spread(prefills, decodes)]
    first = order[: max(num_prefill, num_decode)]
    assert len(set(order)) == len(order) == num_prefill * num_decode
    if order:
        assert {p for p, _ in first} == {p.name for p in prefills}
        assert {d for _, d in first} == {d.name for d in decodes}
