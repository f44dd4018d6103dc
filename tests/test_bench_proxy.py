"""bench/proxy: mock workers and load, in C++ and in Python, and the arithmetic on what they counted."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdserve.config.worker_env import cache_dir

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from proxy import cores, py_load
from proxy.contenders import Contender, Programs, Unavailable
from proxy.mock_fleet import MockFleet, ask
from proxy.parts import DIRECT, MemoryReport, Plan
from proxy.processes import Child, free_port
from proxy.prompts import Prompt
from proxy.rounds import Bench, Offer, Round, RoundFailed, Row, summarize
from proxy.tables import format_rows
from proxy.targets import health, judge_memory
from proxy.tools import Tools, prepare_tools

pytestmark = pytest.mark.process

PROGRAMS = Programs(Path("python"), "", "")
CORE = min(os.sched_getaffinity(0))
STAMP = re.compile(r"@\d{16}")


def tools_of(kind: str) -> Tools:
    if kind == "C++" and shutil.which("g++") is None:
        pytest.skip("no g++ here")
    return prepare_tools(cache_dir() / "bench", use_python=kind == "Python")


def start_fleet(kind: str, folder: Path) -> MockFleet:
    return MockFleet.start(tools_of(kind).mock, 1, 2, CORE, folder / f"{kind}.log")


@pytest.fixture(params=["C++", "Python"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MockFleet]:
    found = start_fleet(request.param, tmp_path)
    with found.child:
        yield found


@pytest.fixture(params=["C++", "Python"])
def bench(request: pytest.FixtureRequest, fleet: MockFleet, tmp_path: Path) -> Bench:
    return Bench(cores.Cores(CORE, CORE), tools_of(request.param).load, fleet, tmp_path)


def stats_once(fleet: MockFleet, counted: str) -> dict[str, int]:
    """What the workers say as soon as there is one of these."""
    deadline_s = time.monotonic() + 5
    while not (stats := fleet.stats())[counted]:
        assert time.monotonic() < deadline_s, f"none {counted}: {stats}"
    return stats


def with_room(prompt: Prompt, room: int) -> bytes:
    head, _, body = prompt.render().partition(b"\r\n\r\n")
    body = body[:-1] + b', "bootstrap_room": %d}' % room
    return re.sub(rb"(?<=Content-Length: )\d+", str(len(body)).encode(), head) + b"\r\n\r\n" + body


# -- mock workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["generate", "chat"])
def test_a_worker_alone_answers_with_as_many_tokens_as_asked(fleet: MockFleet, route: str) -> None:
    status, body = ask(fleet.decode[0], Prompt(route, 7).render())
    assert status == 200
    assert Prompt(route, 7).expected in body
    stream = Prompt(route, 7, is_stream=True)
    status, body = ask(fleet.decode[0], stream.render())
    assert status == 200
    assert body.count("\n\n") == stream.num_events
    assert body.endswith("data: [DONE]\n\n")
    assert len(STAMP.findall(body)) == 7


def test_decode_answers_once_prefill_has_seen_the_room(fleet: MockFleet) -> None:
    with closing(socket.create_connection(("127.0.0.1", fleet.decode[0]), timeout=10)) as waiting:
        waiting.sendall(with_room(Prompt(tokens=3), 42))
        counted = stats_once(fleet, "parked")
        assert counted["matched"] == 0
        status, body = ask(fleet.prefill[0], with_room(Prompt(tokens=3), 42))
        assert status == 200
        assert '"completion_tokens":1' in body
        assert b'"completion_tokens":3' in waiting.recv(65536)
    counted = fleet.stats()
    assert (counted["matched"], counted["mismatched"], counted["lonely"], counted["parked"]) == (1, 0, 0, 0)


def test_rooms_that_one_side_alone_has_seen_are_counted(fleet: MockFleet) -> None:
    for _ in range(2):
        ask(fleet.prefill[0], with_room(Prompt(), 5))
    counted = fleet.stats()
    assert (counted["lonely"], counted["mismatched"]) == (1, 1)
    assert ask(fleet.decode[1], with_room(Prompt(), 5))[0] == 200
    assert fleet.stats()["lonely"] == 0
    assert fleet.stats(reset=True)["mismatched"] == 0


def test_a_client_that_leaves_is_counted_and_its_room_given_up(fleet: MockFleet) -> None:
    with closing(socket.create_connection(("127.0.0.1", fleet.decode[0]), timeout=10)) as leaving:
        leaving.sendall(with_room(Prompt(), 9))
        stats_once(fleet, "parked")
    assert stats_once(fleet, "broken")["parked"] == 0


def test_both_kinds_of_worker_answer_the_same_bytes(tmp_path: Path) -> None:
    answers: dict[str, list[str]] = {}
    for kind in ("C++", "Python"):
        found = start_fleet(kind, tmp_path)
        with found.child:
            prompts = [Prompt(route, 5, stream) for route in ("generate", "chat") for stream in (False, True)]
            answers[kind] = [STAMP.sub("@", ask(found.decode[0], one.render())[1]) for one in prompts]
            for path in ("/v1/loads", "/server_info", "/model_info", "/v1/models", "/health", "/nothing"):
                request = f"GET {path} HTTP/1.1\r\nHost: t\r\n\r\n".encode()
                answers[kind].append(repr(ask(found.prefill[0], request)))
    assert answers["C++"] == answers["Python"]


# -- load --------------------------------------------------------------------------------------------


def test_closed_loop_counts_every_answer(bench: Bench, fleet: MockFleet) -> None:
    found = bench.run(Offer(Prompt(), connections=4, requests=200), fleet.decode, (fleet.child.pid,))
    assert found.latency_us["n"] == 200
    assert found.num_wrong == 0
    assert 0 < found.latency_us["p50"] <= found.latency_us["p99"] <= found.latency_us["max"]
    assert fleet.stats()["decodes"] == 200


def test_streams_are_counted_by_event(bench: Bench, fleet: MockFleet) -> None:
    prompt = Prompt("chat", 9, is_stream=True)
    found = bench.run(Offer(prompt, connections=3, requests=30), fleet.decode, (fleet.child.pid,))
    assert found.num_wrong == 0
    assert found.delay_us["n"] == 30 * 9
    assert found.first_us["n"] == 30
    assert found.events_s == pytest.approx(found.requests_s * prompt.num_events)


def test_paced_streams_overlap(bench: Bench, fleet: MockFleet) -> None:
    prompt = Prompt("generate", 3, is_stream=True, pace_ms=100)
    found = bench.run(Offer(prompt, connections=20, requests=20), fleet.decode, (fleet.child.pid,))
    assert found.num_wrong == 0
    assert found.latency_us["p50"] >= 2 * 100_000
    assert fleet.stats()["streams_peak"] == 20


def test_a_fixed_rate_is_kept(bench: Bench, fleet: MockFleet) -> None:
    offer = Offer(Prompt(), connections=4, seconds=0.4, warmup_s=0.1, rate=500)
    found = bench.run(offer, fleet.decode, (fleet.child.pid,))
    assert found.num_wrong == 0
    assert 0 < found.latency_us["n"] < 1000  # 200 on average; a closed loop makes thousands


def test_wrong_answers_are_counted_and_shown(bench: Bench, fleet: MockFleet) -> None:
    found = bench.run(Offer(Prompt(tokens=2), connections=2, requests=6), fleet.prefill, (fleet.child.pid,))
    assert found.num_wrong == 6  # prefill gives one token
    assert found.example.startswith("200")


def test_a_balancer_that_is_gone_fails_its_round_and_no_more(bench: Bench, fleet: MockFleet) -> None:
    with pytest.raises(RoundFailed):
        bench.run(Offer(Prompt(), connections=2, requests=6), (free_port(),), (fleet.child.pid,))
    assert bench.run(Offer(Prompt(), connections=2, requests=6), fleet.decode, ()).num_wrong == 0
    row = Row("smg", 2, failure="gone")
    assert row.as_dict()["failure"] == "gone"
    text = format_rows(
        "throughput generate", [Row(DIRECT, 2, [round_of()]), Row("pdserve", 2, [round_of()]), row]
    )
    assert "smg at 2 failed: gone" in text
    assert health({"throughput generate": [row]}) == []


# -- arithmetic --------------------------------------------------------------------------------------


def usage(at_s: float, *, busy_s: float = 0.0, waited_s: float = 0.0, core_s: float = 0.0) -> cores.Usage:
    threads = {1: (int(busy_s * 1e9), int(waited_s * 1e9))}
    ours = cores.ProcessTimes({2: (int(at_s * 0.5e9), 0)}, at_s * 0.5)
    return cores.Usage(at_s, cores.ProcessTimes(threads, busy_s), ours, core_s, at_s * 0.9)


def report(**changes: Any) -> dict[str, Any]:
    sample = {"n": 1, "mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    counts = {"requests": 1000, "events": 0, "done": 1500, "wrong": 0, "broken": 0, "unfinished": 0}
    figures = dict.fromkeys(("latency_us", "first_us", "delay_us"), sample)
    return {"seconds": 2.0, "example": "", **counts, **figures, **changes}


def round_of(requests_s: float = 500.0, p50_us: float = 100.0, **changes: Any) -> Round:
    sample = {"p50": p50_us, "p99": 2 * p50_us}
    made = Round(requests_s, 0.0, 100.0, 10.0, sample, sample, sample, 0.5, 0.5, 0.5, 0.5, 0.0, 0)
    return replace(made, **changes)


def test_a_round_is_what_lies_between_its_two_moments() -> None:
    before, after = usage(10.0, busy_s=1.0, core_s=5.0), usage(12.0, busy_s=2.5, waited_s=0.2, core_s=7.0)
    found = summarize(before, after, report(wrong=2, broken=3), Prompt())
    assert found.requests_s == 500.0
    assert found.cpu_us_request == pytest.approx(1500.0)
    assert found.balancer_share == pytest.approx(0.75)
    assert found.balancer_core_share == pytest.approx(1.0)
    assert found.ours_share == pytest.approx(0.5)
    assert found.num_wrong == 5
    assert found.is_disturbed
    assert found.is_crowded
    assert not found.is_load_saturated


def test_requests_of_streams_follow_from_their_events() -> None:
    prompt = Prompt(tokens=64, is_stream=True)
    found = summarize(usage(0.0), usage(2.0, busy_s=1.0), report(requests=0, events=6500), prompt)
    assert found.requests_s == 50.0
    assert found.cpu_us_event == pytest.approx(1e6 / 6500)
    assert found.cpu_us_request == pytest.approx(1e6 / 100)


def test_cpu_time_of_ended_threads_comes_from_clock_ticks() -> None:
    first = cores.ProcessTimes({1: (0, 0), 2: (5_000_000_000, 0)}, 5.0)
    later = cores.ProcessTimes({1: (1_000_000_000, 0), 3: (250_000_000, 0)}, 6.25)
    assert first.cpu_s_until(later) == pytest.approx(1.25)
    assert first.cpu_s_until(replace(later, ticks_s=7.0)) == pytest.approx(2.0)


def test_idle_time_of_a_core_is_not_busy_time() -> None:
    text = "cpu  9 9 9 9\ncpu0 100 20 30 4000 500 6 7 8 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 5\n"
    busy = cores.parse_core_busy(text)
    assert busy[0] == pytest.approx(171 / cores.TICKS_PER_S)
    assert set(busy) == {0, 1}


def test_medians_and_marks_over_rounds() -> None:
    rounds = [round_of(100), round_of(900, ours_share=0.95), round_of(200, ours_share=0.99)]
    row = Row("pdserve", 16, rounds)
    assert row.middle("requests_s") == 200
    assert row.middle("latency_us", "p99") == 200
    assert row.marks == "L"
    assert row.as_dict()["requests_s_rounds"] == [100, 900, 200]


def test_pdserve_is_judged_against_the_faster_smg() -> None:
    rows = [
        Row(DIRECT, 16, [round_of(p50_us=50)]), Row("pdserve", 16, [round_of(1000, p50_us=400)]),
        Row("smg:round_robin", 16, [round_of(400, cpu_us_request=300)]),
        Row("smg:default", 16, [round_of(600, cpu_us_request=180)]),
    ]  # fmt: skip
    requests, cpu = health({"throughput generate": rows})
    assert (requests.is_met, requests.found) == (False, "1.67 x")
    assert (cpu.is_met, cpu.found) == (False, "0.56 x")
    (added,) = health({"latency generate": rows})
    assert (added.is_met, added.found) == (True, "0.350 ms")


def test_wrong_answers_are_a_missed_target() -> None:
    rows = [Row(DIRECT, 1, [round_of()]), Row("pdserve", 1, [round_of(num_wrong=1)])]
    assert [verdict.is_met for verdict in health({"streaming chat": rows})] == [False]


@pytest.mark.parametrize(
    ("requests", "last_mib", "wrong", "is_met"),
    [(10**6, 100.5, 0, True), (10**6, 103.0, 0, False), (20_000, 103.0, 0, True), (20_000, 100.0, 1, False)],
)
def test_memory_is_judged_from_a_fifth_of_the_way(
    requests: int, last_mib: float, wrong: int, is_met: bool
) -> None:
    rss = [50.0, 80.0, 90.0, 95.0, *[100.0] * 16, last_mib]
    assert judge_memory(MemoryReport(requests, 1.0, wrong, rss)).is_met is is_met


def test_percentiles_are_nearest_rank() -> None:
    found = py_load.figures([float(value) for value in range(101, 0, -1)])
    assert (found["p50"], found["p90"], found["p99"], found["max"], found["mean"]) == (51, 91, 100, 101, 51)
    assert py_load.figures([])["p99"] == 0


def test_chunks_may_be_cut_anywhere() -> None:
    message = b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n"
    reader = py_load.ChunkReader()
    assert b"".join(reader.feed(message[i : i + 1]) for i in range(len(message))) == b"hello!"
    assert reader.is_done


# -- plan and processes ------------------------------------------------------------------------------


def test_offers_cover_every_route_and_number_of_connections() -> None:
    plan = Plan(connections=(1, 8), routes=("generate", "chat"))
    assert [offer.connections for offer in plan.offers("throughput")["throughput chat"]] == [1, 8]
    paced = plan.offers("paced")["paced generate"]
    assert {offer.prompt.pace_ms for offer in paced} == {10}
    assert [(offer.connections, offer.rate > 0) for offer in plan.offers("latency")["latency generate"]] == [
        (1, False), (16, True),
    ]  # fmt: skip


def test_names_of_balancers() -> None:
    assert Contender.parse("smg").label == "smg:round_robin"
    assert Contender.parse("smg:default").label == "smg:default"
    assert Contender.parse("pdserve").label == "pdserve"
    with pytest.raises(ValueError, match="unknown balancer"):
        Contender.parse("nginx")


def test_command_lines_name_every_worker(fleet: MockFleet) -> None:
    command = Contender.parse("sglang-router:default").command(PROGRAMS, fleet, 30000)
    assert "--policy" not in command
    assert command.count("--prefill") == 1
    assert command.count("--decode") == 2
    with pytest.raises(Unavailable, match="no C"):
        Contender.parse("floor").command(PROGRAMS, fleet, 30000)
    assert "random" in Contender.parse("mini_lb").command(PROGRAMS, fleet, 30000)


def test_stopping_a_child_ends_what_it_has_started(tmp_path: Path) -> None:
    script = "sh -c 'trap \"\" TERM; echo up; while :; do sleep 1; done' & wait"
    with Child(["sh", "-c", script], CORE, tmp_path / "log", reads_stdout=True) as child:
        assert child.read_line() == "up"
        pids = child.pids
        assert len(pids) >= 2
    assert not [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """False for a zombie too: one without a parent waits for its reaper."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
