"""Workers that hang or stand still with requests in flight: found out, and their requests ended."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pdserve.balancer.fleet import liveness as silence
from pdserve.balancer.fleet import worker_monitor as keeper
from pdserve.balancer.fleet.liveness import HUNG_S, MIN_QUESTIONS, HangDetector, StallDetector, patience_s
from pdserve.errors import WorkerTimeout, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.http.client_response import ClientResponse
from pdserve.scheduling.policy import WorkerView
from pdserve.types import Role, WorkerLoad
from tests.support.balancer_client import Site, running_site
from tests.support.fleet_network import D0, P0
from tests.support.sglang_connection import FakeConnection
from tests.support.sglang_server import FakeSGLang, until

PLAIN = {"text": "hi"}
STREAM = {"text": "hi", "stream": True}
CONTROL = ("/ping", "/health", "/v1/loads", "/model_info")


# -- no progress -----------------------------------------------------------------------------

RUNNING = WorkerLoad(timestamp_s=0.0, num_running_reqs=2, decode_moments=(9.0, 18.0, 5e5, 36.0, 1e6, 18.0))
QUEUED = WorkerLoad(timestamp_s=0.0, num_waiting_reqs=3, prefill_bootstrap_queue_reqs=1)


def stalled_s(role: Role, *loads: WorkerLoad, num_inflight: int = 2, age_s: float = 0.0) -> float:
    """See one sample a second; how long it is stalled in the end."""
    watch = StallDetector(role)
    for second, load in enumerate(loads):
        stamped = replace(load, timestamp_s=float(second))
        watch.see(stamped, min(second - 0.02, second - age_s), 0, num_inflight)
    return watch.stalled_s


def test_a_batch_whose_counters_stand_still_is_stalled() -> None:
    assert stalled_s(Role.DECODE, RUNNING, RUNNING, RUNNING) == 2.0


def test_any_counter_that_moves_is_progress() -> None:
    moved = replace(RUNNING, decode_moments=(10.0, 20.0, 6e5, 40.0, 2e6, 20.0))
    assert stalled_s(Role.DECODE, RUNNING, RUNNING, moved) == 0.0
    assert stalled_s(Role.PREFILL, QUEUED, replace(QUEUED, total_prefill_uncached_tokens=5)) == 0.0


def test_a_byte_for_a_client_is_progress() -> None:
    watch = StallDetector(Role.DECODE)
    for second in range(5):
        watch.see(replace(RUNNING, timestamp_s=float(second)), second - 0.02, second, 2)
    assert watch.stalled_s == 0.0


def test_nothing_of_ours_in_flight_is_no_stall() -> None:
    assert stalled_s(Role.DECODE, RUNNING, RUNNING, RUNNING, num_inflight=0) == 0.0


@pytest.mark.parametrize(
    ("role", "load"),
    [
        (Role.PREFILL, WorkerLoad(0.0, num_waiting_reqs=4, prefill_bootstrap_queue_reqs=4)),
        (Role.PREFILL, replace(QUEUED, prefill_inflight_queue_reqs=1)),
        (Role.DECODE, WorkerLoad(0.0, num_waiting_reqs=4, decode_prealloc_queue_reqs=4)),
        (Role.DECODE, WorkerLoad(0.0, num_waiting_reqs=4, decode_transfer_queue_reqs=4)),
    ],
)
def test_waiting_for_the_other_worker_is_no_stall(role: Role, load: WorkerLoad) -> None:
    assert stalled_s(role, *[load] * 100) < 0.1


def test_prefill_with_requests_that_could_run_is_stalled() -> None:
    assert stalled_s(Role.PREFILL, QUEUED, QUEUED, QUEUED) == 2.0


def test_a_snapshot_that_grows_old_shows_a_scheduler_whose_loop_stands_still() -> None:
    parked = WorkerLoad(0.0, num_waiting_reqs=4, prefill_bootstrap_queue_reqs=4)
    assert stalled_s(Role.PREFILL, *[parked] * 100, age_s=70.0) == 70.0


def test_patience_grows_with_what_a_step_takes() -> None:
    decode = WorkerView(D0, num_reqs=10, step_base_s=0.02, step_slope_s=0.001)
    assert patience_s(decode, 60.0) == 60.0
    decode.step_base_s = 2.0
    assert patience_s(decode, 60.0) == pytest.approx(4 * 15 * 2.01)
    prefill = WorkerView(P0, queued_tokens=8000.0, prefill_tokens_s=200.0)
    assert patience_s(prefill, 60.0) == pytest.approx(160.0)


# -- silence ---------------------------------------------------------------------------------


LATE = WorkerTimeout("u", "silent")


def unanswered(num_questions: int = MIN_QUESTIONS, wedge_s: float = 60.0) -> HangDetector:
    """That many questions, the first asked at 100 s, when 7 pieces had been heard."""
    quiet = HangDetector(wedge_s)
    for index in range(num_questions):
        quiet.unanswered(100.0 + index, 7)
    return quiet


def test_silence_is_over_after_a_while_without_answer_or_byte() -> None:
    assert not unanswered().is_over(LATE, 100.0 + HUNG_S - 0.1, 7)
    assert unanswered().is_over(LATE, 100.0 + HUNG_S, 7)


def test_one_question_that_seems_late_may_be_our_own_standstill() -> None:
    assert not unanswered(MIN_QUESTIONS - 1).is_over(LATE, 1000.0, 7)


def test_an_answer_or_a_byte_begins_it_anew() -> None:
    quiet = unanswered()
    assert not quiet.is_over(LATE, 120.0, 8)
    for _ in range(MIN_QUESTIONS):
        quiet.unanswered(121.0, 8)
    assert not quiet.is_over(LATE, 121.0, 8)
    assert quiet.is_over(LATE, 120.0 + HUNG_S, 8)
    quiet.answered()
    assert not quiet.is_over(LATE, 200.0, 8)


def test_a_server_that_refuses_connections_may_be_finishing_what_it_has() -> None:
    refused = WorkerUnreachable("u", "refused")
    refused.__cause__ = ConnectionRefusedError()
    assert not unanswered().is_over(refused, 159.0, 7)
    assert unanswered().is_over(refused, 160.0, 7)
    assert not unanswered(wedge_s=0.0).is_over(refused, 1e9, 7)


def test_a_machine_without_a_route_to_it_is_silent() -> None:
    gone = WorkerUnreachable("u", "no route")
    gone.__cause__ = OSError(113, "No route to host")
    assert unanswered().is_over(gone, 100.0 + HUNG_S, 7)


# -- over real servers -----------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hang is found out in a fifth of a second."""
    monkeypatch.setattr(keeper, "LOADS_S", 0.05)
    monkeypatch.setattr(keeper, "PING_S", 0.05)
    monkeypatch.setattr(keeper, "HEALTH_S", 0.05)
    monkeypatch.setattr(silence, "HUNG_S", 0.15)


def freeze(fake: FakeSGLang, paths: tuple[str, ...] = ()) -> asyncio.Event:
    """These paths, or all, are accepted and not answered from now on, as by a stopped process, until the
    event is set."""
    answer, thaw = fake.answer, asyncio.Event()

    async def frozen(connection: FakeConnection, method: str, path: str, body: bytes) -> None:
        if not paths or path in paths:
            await thaw.wait()
        await answer(connection, method, path, body)

    fake.answer = frozen  # type: ignore[method-assign]
    return thaw


async def hold_first(site: Site, role: Role, body: dict[str, Any]) -> tuple[FakeSGLang, asyncio.Task[Any]]:
    """A request held by its decode leg, for prefill by both, and the worker of that role it lies at.
    Later requests are not held."""
    for fake in site.decodes if role is Role.DECODE else site.fakes:
        fake.behaviour.gate = asyncio.Event()
    task = asyncio.create_task(site.generate(body))
    await until(lambda: sum(len(fake.requests) for fake in site.fakes) == 2, "request in flight")
    fakes = site.decodes if role is Role.DECODE else site.prefills
    holder = next(fake for fake in fakes if fake.requests)
    for fake in site.fakes:
        if fake is not holder:
            fake.behaviour.gate = None
    return holder, task


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("body", [PLAIN, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("role", list(Role))
async def test_requests_in_flight_at_a_hung_process_are_served_elsewhere(
    role: Role, body: dict[str, Any]
) -> None:
    count = {"prefill": 2} if role is Role.PREFILL else {"decode": 2}
    async with running_site(**count, load_poll_s=0.02) as site:
        hung, task = await hold_first(site, role, body)
        thaw = freeze(hung)
        reply = await asyncio.wait_for(task, 5)
        thaw.set()
        assert reply.status == 200
        assert site.state(hung.name) == "suspect"
        others = [w for w in site.balancer.fleet.workers() if w.url != hung.url]
        assert {str(w.state) for w in others} == {"ready"}
        assert {w.breaker.errors for w in others} == {0}
        assert [e.event for e in site.balancer.fleet.events].count("wedged") == 1
        assert site.balancer.fleet.scheduler.admission.placement.num_open == 0


@pytest.mark.usefixtures("quick")
async def test_a_stream_from_a_hung_process_ends_with_an_error() -> None:
    async with running_site(load_poll_s=0.02) as site:
        site.decode.behaviour.hang_after = 1
        async with site.exchange("POST", "/generate", STREAM) as exchange:
            await exchange.read_until(b"data: ")
            thaw = freeze(site.decode)
            rest = await exchange.read_until(b"silent for")
        thaw.set()
        assert b"error" in rest
        assert site.state("decode-0") == "suspect"
        await until(lambda: site.prefill.aborts, "abort on the healthy leg")


@pytest.mark.usefixtures("quick")
async def test_a_worker_that_still_sends_bytes_is_not_taken_for_hung() -> None:
    async with running_site(load_poll_s=0.02) as site:
        site.decode.behaviour.tokens, site.decode.behaviour.token_delay_s = 40, 0.02
        task = asyncio.create_task(site.generate(STREAM))
        await until(lambda: site.decode.requests, "request in flight")
        thaw = freeze(site.decode, CONTROL)
        reply = await task
        thaw.set()
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert b"silent for" not in reply.body


@pytest.mark.usefixtures("quick")
async def test_a_server_that_stops_listening_finishes_what_it_has() -> None:
    async with running_site(load_poll_s=0.02) as site:
        decode, task = await hold_first(site, Role.DECODE, PLAIN)
        assert decode._server is not None
        assert decode.behaviour.gate is not None
        decode._server.close()
        for connection in list(decode._connections):
            if connection.is_answered:
                connection.close()
        await until(lambda: site.state("decode-0") == "suspect", "polls are refused")
        decode.behaviour.gate.set()
        assert (await task).status == 200


@pytest.mark.usefixtures("quick")
async def test_a_worker_that_answers_but_stands_still_is_wedged() -> None:
    async with running_site(decode=2, load_poll_s=0.02, wedge_s=0.3) as site:
        stuck, task = await hold_first(site, Role.DECODE, PLAIN)
        view = next(w.view for w in site.balancer.fleet.workers() if w.url == stuck.url)
        view.step_base_s = view.step_slope_s = 0.0  # nothing has been measured: no more patience than asked
        stuck.load = {"num_running_reqs": 1, "decode_moments": [5, 5, 100, 5, 100, 5]}
        assert (await asyncio.wait_for(task, 5)).status == 200
        events = [(e.event, e.detail) for e in site.balancer.fleet.events if e.worker == stuck.name]
        assert "has not moved" in next(detail for event, detail in events if event == "wedged")
        assert site.prefill.requests[-1]["rid"] != stuck.requests[-1]["rid"]


@pytest.mark.usefixtures("quick")
async def test_standing_still_is_no_wedge_if_nobody_asks_for_it() -> None:
    async with running_site(load_poll_s=0.02, wedge_s=0.0) as site:
        fleet = site.balancer.fleet
        holder, task = await hold_first(site, Role.DECODE, PLAIN)
        decode = fleet.workers()[1]
        decode.view.step_base_s = 0.0
        holder.load = {"num_running_reqs": 1}
        await until(lambda: decode.stalled_s > 0.08, "it stands still")
        await until(lambda: decode.stalled_s > 0.3, "and goes on to")
        assert site.state("decode-0") == "ready"
        assert not task.done()
        assert holder.behaviour.gate is not None
        holder.behaviour.gate.set()
        assert (await task).status == 200


@pytest.mark.usefixtures("quick")
async def test_a_hung_process_that_lost_its_membership_keeps_no_request() -> None:
    """Its lease runs out before it is known to hang: that must not hide what is in flight there."""
    async with running_site(decode=2, load_poll_s=0.02) as site:
        fleet = site.balancer.fleet
        hung, task = await hold_first(site, Role.DECODE, PLAIN)
        thaw = freeze(hung)
        worker = next(w for w in fleet.workers() if w.url == hung.url)
        fleet._remove(worker, "left the fleet")
        assert (await asyncio.wait_for(task, 5)).status == 200
        assert len(fleet.workers()) == 2
        thaw.set()
        await until(lambda: worker.tasks["monitor"].done(), "its keeper ended")


async def test_a_worker_that_left_finishes_what_it_has() -> None:
    async with running_site(load_poll_s=0.02) as site:
        fleet = site.balancer.fleet
        holder, task = await hold_first(site, Role.DECODE, PLAIN)
        worker = fleet.workers()[1]
        fleet._remove(worker, "left the fleet")
        assert holder.behaviour.gate is not None
        holder.behaviour.gate.set()
        assert (await task).status == 200
        await until(lambda: worker.tasks["monitor"].done(), "its keeper ended")


@pytest.mark.usefixtures("quick")
async def test_a_thawed_worker_returns_by_a_probe() -> None:
    async with running_site(load_poll_s=0.02) as site:
        decode = site.decode
        thaw = freeze(decode)
        await until(lambda: site.state("decode-0") == "suspect", "idle, and yet found out")
        thaw.set()
        await until(lambda: site.state("decode-0") == "ready", "back in service")
        assert (await site.generate(PLAIN)).status == 200


# -- the pool --------------------------------------------------------------------------------


def start_prompt(pool: HttpClient, url: str) -> ClientResponse:
    """A request that must not be sent twice."""
    response = pool.start(url, "POST", "/generate", b'{"text":"a"}', limits=(9, 9))
    response.can_resend = False
    return response


async def test_fail_worker_ends_what_is_in_flight_there_and_nothing_else() -> None:
    pool = HttpClient()
    async with FakeSGLang() as one, FakeSGLang() as other:
        one.behaviour.hang = other.behaviour.hang = True
        started = [start_prompt(pool, fake.url) for fake in (one, one, other)]
        await until(lambda: len(one.requests) == 2 and len(other.requests) == 1, "in flight")
        unsent = start_prompt(pool, one.url)
        assert pool.fail_worker(one.url, lambda: WorkerTimeout(one.url, "hangs")) == 3
        assert [type(r.error) for r in (*started, unsent)] == [
            WorkerTimeout,
            WorkerTimeout,
            type(None),
            WorkerTimeout,
        ]
        await until(lambda: one.num_connections == 0, "sockets closed")
        assert other.num_connections == 1
        await pool.close()


async def test_the_pool_tells_answers_from_questions_and_commands() -> None:
    pool = HttpClient()
    async with FakeSGLang() as fake:
        await pool.fetch(fake.url, "GET", "/ping", timeout_s=5)
        assert pool.num_heard(fake.url) == 0
        response = start_prompt(pool, fake.url)
        await response.read()
        assert pool.num_heard(fake.url) == 1
        thaw = freeze(fake, ("/update_weights_from_disk",))
        assert not pool.is_busy_with(fake.url, "command")
        command = pool.start(fake.url, "POST", "/update_weights_from_disk", b"{}", limits=(9, 9))
        command.label = "command"
        await until(lambda: pool.is_busy_with(fake.url, "command"), "the command is under way")
        command.close()
        thaw.set()
        assert not pool.is_busy_with(fake.url, "command")
        await pool.close()
