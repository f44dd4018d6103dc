"""A streamed answer goes on on another pair: its client gets exactly the bytes of an undisturbed stream."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.balancer_client import Reply, Site, running_site
from tests.support.dialects import CHAT, COMPLETIONS, DIALECTS, GENERATE, RESPONSES, preamble, request_to
from tests.support.resumable import Break, frames_of, rendered
from tests.support.sglang_server import FakeSGLang, until

RID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
BATCHES: dict[str, dict[str, Any]] = {
    GENERATE: {"text": ["a", "b"], "stream": True},
    COMPLETIONS: {"prompt": ["a", "b"], "stream": True},
    "samples": {"text": "a", "sampling_params": {"n": 2}, "stream": True},
}


def num_frames(path: str) -> int:
    return len(frames_of(path, ["0"], 3))


def undisturbed(path: str, num_tokens: int = 3) -> bytes:
    """The whole stream of so many tokens, the id in it as RID."""
    rid = "RID" if path != RESPONSES else "resp_RID"
    return b"".join(frame for _, frame in frames_of(path, [rid], num_tokens))


async def ask(site: Site, path: str, *breaks: Break, **more: object) -> Reply:
    site.decode.breaks.extend(breaks)
    reply = await site.ask("POST", path, request_to(path, stream=True, **more))
    assert not site.decode.breaks
    return reply


def check_whole(reply: Reply, path: str, num_tokens: int = 3) -> None:
    assert reply.status == 200
    assert len(set(RID.findall(reply.body))) <= 1
    assert RID.sub(b"RID", reply.body) == undisturbed(path, num_tokens)


async def nothing_left(site: Site) -> None:
    living = [fake for fake in site.fakes if not fake.is_dead]
    await until(lambda: not any(fake.held for fake in living), "KV freed")
    await until(lambda: site.balancer.dispatcher.num_rooms == 0)
    assert site.balancer.fleet.scheduler.admission.placement.num_open == 0


def legs(site: Site) -> list[tuple[FakeSGLang, dict[str, Any]]]:
    """What decode servers were asked but by probes, in no order."""
    return [(fake, request) for fake in site.decodes for request in fake.requests if request.get("stream")]


# -- how a leg may end -------------------------------------------------------------------------


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_that_breaks_at_any_event_is_whole(path: str) -> None:
    for cut in range(1, num_frames(path)):
        async with running_site(decode=2, resumes=True) as site:
            reply = await ask(site, path, Break(cut), max_tokens=9)
            check_whole(reply, path)
            has_content = cut > len(preamble(path))  # before that the whole is tried again
            assert (site.counts["resumed"], site.counts["retried"]) == (has_content, not has_content)
            assert (site.counts["completed"], site.last["resumes"]) == (1, has_content)
            await nothing_left(site)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_that_breaks_within_an_event_is_whole(path: str) -> None:
    """The event's comment, a part of its data, and all but its last byte."""
    middle = num_frames(path) - 4
    size = len(rendered(frames_of(path, ["0" * 32], 3)[middle]))
    for num_bytes in (3, 11, size // 2, size - 1):
        async with running_site(decode=2, resumes=True) as site:
            check_whole(await ask(site, path, Break(middle, num_bytes)), path)
            assert site.counts["resumed"] == 1


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("how", ["kill", "0", "500", "503"])
async def test_whatever_ends_the_leg(path: str, how: str) -> None:
    async with running_site(decode=2, resumes=True) as site:
        reply = await ask(site, path, Break(num_frames(path) - 3, how=how))
        check_whole(reply, path)
        assert (site.counts["resumed"], site.counts["failed"]) == (1, 0)
        await nothing_left(site)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_server_that_falls_silent(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_S", 0.05)
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_STEPS", 1)
    async with running_site(decode=2, resumes=True) as site:
        check_whole(await ask(site, path, Break(num_frames(path) - 3, how="hang")), path)
        assert site.counts["resumed"] == 1
        await nothing_left(site)


async def test_the_next_server_fails_too_before_and_after_its_first_frame() -> None:
    async with running_site(decode=4, resumes=True) as site:
        reply = await ask(site, CHAT, Break(2), Break(0), Break(1))
        check_whole(reply, CHAT)
        assert (site.counts["resumed"], site.last["resumes"]) == (2, 2)
        requests = [request for _, request in legs(site)]
        assert len({request["rid"] for request in requests}) == len(requests) == 4
        assert len({request["bootstrap_room"] for request in requests}) == 4
        resumed = [request["pdserve_resume"] for request in requests if "pdserve_resume" in request]
        assert sorted(each["frames"] for each in resumed) == [2, 2, 3]


async def test_a_server_that_is_gone_after_the_last_event_has_served_its_client() -> None:
    async with running_site(decode=2, resumes=True) as site:
        check_whole(await ask(site, CHAT, Break(num_frames(CHAT))), CHAT)
        assert (site.counts["resumed"], site.counts["completed"]) == (0, 1)


# -- every kind of request ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCHES)
async def test_a_batch_is_one_stream(kind: str) -> None:
    path = GENERATE if kind == "samples" else kind
    async with running_site(decode=2, resumes=True) as site:
        whole = await site.ask("POST", path, BATCHES[kind])
        frames = len(whole.events)
        for cut in range(1, frames, 2):
            site.decode.breaks.append(Break(cut, how="503"))
            again = await site.ask("POST", path, BATCHES[kind])
            assert RID.sub(b"", again.body) == RID.sub(b"", whole.body)
            await until(lambda: all(site.state(fake.name) == "ready" for fake in site.fakes))
        assert site.counts["resumed"] == len(range(1, frames, 2))
        await nothing_left(site)


async def test_samples_of_a_chat_go_on_each_by_itself() -> None:
    async with running_site(decode=2, resumes=True) as site:
        whole = await site.ask("POST", CHAT, request_to(CHAT, stream=True, n=2))
        reply = await ask(site, CHAT, Break(2, how="503"), Break(3, how="503"), n=2)
        assert sorted(RID.sub(b"", reply.body).split(b"\n\n")) == sorted(
            RID.sub(b"", whole.body).split(b"\n\n")
        )
        assert len(set(RID.findall(reply.body))) == 1
        assert (site.counts["resumed"], site.last["resumes"]) == (2, 2)


@pytest.mark.parametrize("path", [GENERATE, CHAT, COMPLETIONS])
async def test_a_client_keeps_its_own_id(path: str) -> None:
    async with running_site(decode=2, resumes=True) as site:
        reply = await ask(site, path, Break(2), rid="mine")
        assert reply.body == undisturbed(path).replace(b'"RID"', b'"mine"')


async def test_the_next_pair_is_chosen_by_what_is_left() -> None:
    async with running_site(decode=2, resumes=True) as site:
        seen = []
        take = site.balancer.fleet.scheduler.admission.placement.place
        placement = site.balancer.fleet.scheduler.admission.placement
        placement.place = lambda shape, *args: seen.append(shape) or take(shape, *args)  # type: ignore[method-assign]
        more = {"text": "x" * 40, "sampling_params": {"max_new_tokens": 50}}
        await ask(site, GENERATE, Break(2), **more)
        first, second = seen
        assert (first.is_resumed, second.is_resumed) == (False, True)
        assert second.max_new_tokens == 48
        assert second.prompt_tokens == 7 + 2  # as the worker counted the prompt


# -- the wire ----------------------------------------------------------------------------------


async def test_stock_workers_are_sent_no_header_and_pdserves_only_for_streams() -> None:
    async with running_site(decode=1) as stock:
        await stock.ask("POST", CHAT, request_to(CHAT, stream=True), x_pdserve_ids="forged")
        assert "x-pdserve-ids" not in stock.decode.headers[0]
    async with running_site(resumes=True) as site:
        await site.ask("POST", CHAT, request_to(CHAT))
        await site.ask("POST", CHAT, request_to(CHAT, stream=True), x_pdserve_ids="forged")
        assert "x-pdserve-ids" not in site.decode.headers[0]
        for fake in site.fakes:
            assert fake.headers[1]["x-pdserve-ids"] == fake.instance_id


@pytest.mark.parametrize("path", DIALECTS)
async def test_off_means_stock(path: str) -> None:
    async with running_site(decode=2, resumes=True, max_resumes=0) as site:
        reply = await site.ask("POST", path, request_to(path, stream=True))
        assert b": ids" not in reply.body
        assert not any("x-pdserve-ids" in headers for fake in site.fakes for headers in fake.headers)


async def test_both_legs_of_a_resume_have_their_own_header_and_the_log() -> None:
    async with running_site(prefill=2, decode=2, resumes=True) as site:
        await ask(site, CHAT, Break(3))
        asked = [
            (fake, request, headers)
            for fake in site.fakes
            for request, headers in zip(fake.requests, fake.headers, strict=True)
            if "pdserve_resume" in request
        ]
        assert sorted(str(fake.role) for fake, _, _ in asked) == ["decode", "prefill"]
        for fake, request, headers in asked:
            assert headers["x-pdserve-ids"] == f"{fake.instance_id} resume"
            assert request["pdserve_resume"] == asked[0][1]["pdserve_resume"]


# -- what ends as ever -------------------------------------------------------------------------


def check_broken(site: Site, reply: Reply, frames: int, path: str = CHAT) -> None:
    whole = [frame for _, frame in frames_of(path, ["RID"], 3)]
    body = RID.sub(b"RID", reply.body)
    begun = b"".join(whole[:frames])
    assert body.startswith(begun) and b'"error"' in body[len(begun) :] and b": ids" not in body
    assert site.counts["failed"] == 1


async def test_an_answer_that_cannot_be_resumed() -> None:
    async with running_site(decode=2, resumes=True) as site:
        check_broken(site, await ask(site, CHAT, Break(2, obstacle="beam")), 2)
        await nothing_left(site)


async def test_the_error_of_a_server_that_gives_up_such_an_answer_is_the_clients() -> None:
    async with running_site(decode=2, resumes=True, max_resumes=1) as site:
        reply = await ask(site, CHAT, Break(2, how="503"), Break(1, how="503"))
        check_broken(site, reply, 3)
        assert b"the fake gives up" in reply.body and reply.body.endswith(b"data: [DONE]\n\n")


async def test_a_fault_of_the_request_is_the_clients_too() -> None:
    async with running_site(decode=2, resumes=True) as site:
        reply = await ask(site, CHAT, Break(2, how="400"))
        assert b"the fake gives up" in reply.body and site.counts["resumed"] == 0


async def test_max_resumes() -> None:
    async with running_site(decode=4, resumes=True, max_resumes=2) as site:
        check_broken(site, await ask(site, CHAT, Break(2), Break(1), Break(1)), 4)
        assert site.counts["resumed"] == 2
        await nothing_left(site)


async def test_the_budget() -> None:
    async with running_site(decode=2, resumes=True, resume_ratio=0.0) as site:
        for _ in range(10):
            check_whole(await ask(site, CHAT, Break(2, how="503")), CHAT)
            await until(lambda: all(site.state(fake.name) == "ready" for fake in site.fakes))
        check_broken(site, await ask(site, CHAT, Break(2)), 2)


async def test_there_is_no_other_pair() -> None:
    """It gives the answer up and serves on: nobody else is missing who could come back."""
    async with running_site(decode=1, resumes=True) as site:
        check_broken(site, await ask(site, CHAT, Break(2, how="503")), 2)


async def test_what_the_last_server_says_is_told_without_comments() -> None:
    async with running_site(decode=2, resumes=True) as site:
        reply = await ask(site, CHAT, Break(2, how="503"), Break(0, how="503"))
        check_broken(site, reply, 2)
        assert b"the fake gives up" in reply.body


async def test_the_only_decode_server_comes_back() -> None:
    """Its connection broke, so that it leaves service until a token has come through it again."""
    async with running_site(decode=1, resumes=True) as site:
        check_whole(await ask(site, CHAT, Break(2)), CHAT)
        assert site.counts["resumed"] == 1
        await nothing_left(site)


async def test_the_only_decode_server_does_not_come_back() -> None:
    async with running_site(decode=1, resumes=True, queue_timeout_s=0.1) as site:
        check_broken(site, await ask(site, CHAT, Break(2, how="kill")), 2)
        await nothing_left(site)


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize(("tokens", "is_innocent"), [(16, True), (15, False)])
async def test_two_servers_died(path: str, tokens: int, is_innocent: bool) -> None:
    """What kills one server kills the next at the same token; 16 tokens further it was another reason."""
    async with running_site(decode=4, resumes=True) as site:
        for fake in site.decodes:
            fake.behaviour.tokens = 40
        first = len(preamble(path)) + 3
        reply = await ask(site, path, Break(first, how="kill"), Break(tokens, how="kill"))
        dead = [fake.name for fake in site.fakes if fake.is_dead]
        assert len(dead) == 2
        if is_innocent:
            check_whole(reply, path, 40)
        else:
            assert all(name.encode() in reply.body for name in dead)
            assert site.counts["failed"] == 1
        await nothing_left(site)


async def test_a_prefill_server_that_dies_with_the_decode_server_had_done_its_part() -> None:
    async with running_site(prefill=2, decode=2, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head = await exchange.read_until(b"\n\n")
            pair = [fake for fake in site.fakes if fake.requests]
            assert len(pair) == 2
            for fake in pair:
                fake.kill()
            rest = await exchange.read_until(b"0\r\n\r\n")
        check_whole(Reply.of(head + rest), CHAT)
        await nothing_left(site)


async def test_what_a_server_says_of_a_log_it_cannot_take_is_not_the_clients() -> None:
    async with running_site(decode=2, resumes=True) as site:
        reply = await ask(site, CHAT, Break(2), Break(0, how="refuse"))
        check_broken(site, reply, 2)
        assert b"broke off" in reply.body
        await nothing_left(site)


# -- the gap -----------------------------------------------------------------------------------


async def paused_in_the_gap(site: Site) -> None:
    """The next leg has been sent and does not answer yet."""
    await until(lambda: any("pdserve_resume" in request for _, request in legs(site)))


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_client_that_leaves_in_the_gap_leaves_nothing_running(path: str) -> None:
    async with running_site(decode=2, resumes=True) as site:
        site.decode.breaks.extend([Break(num_frames(path) - 3), Break(0, how="hang")])
        async with site.exchange("POST", path, request_to(path, stream=True)) as exchange:
            await exchange.read_until(b"\n\n")
            await paused_in_the_gap(site)
            exchange.leave()
        await until(lambda: site.counts["aborted"] == 1)
        await nothing_left(site)


async def test_an_abort_in_the_gap_by_the_id_that_the_client_knows() -> None:
    async with running_site(decode=2, resumes=True) as site:
        site.decode.breaks.extend([Break(2), Break(0, how="hang")])
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head = await exchange.read_until(b"\n\n")
            head += await exchange.read_until(b"\n\n")
            await paused_in_the_gap(site)
            rid = RID.search(head.partition(b"\r\n\r\n")[2])
            assert rid is not None
            (asked,) = [request for _, request in legs(site) if "pdserve_resume" in request]
            reply = await site.ask("POST", "/abort_request", {"rid": rid[0].decode()})
            assert reply.status == 200
            await until(lambda: any(asked["rid"] in fake.aborts for fake in site.decodes))


async def test_books() -> None:
    async with running_site(decode=2, resumes=True) as site:
        await ask(site, CHAT, Break(2))
        state = (await site.ask("GET", "/pdserve/state")).json
        assert state["requests"]["resumed"] == 1
        assert state["recent"][-1]["resumes"] == 1
        assert state["latency"]["resume_gap_s"]["count"] == 1
        assert any(event["event"] == "resumed" for event in state["events"])
        metrics = (await site.ask("GET", "/metrics")).body
        assert b'pdserve:resumes_total{cause="failed"} 1' in metrics
        assert b"pdserve:resume_gap_seconds_count 1" in metrics


async def test_a_fleet_of_two_goes_on_as_often_as_its_servers_come_back() -> None:
    async with running_site(decode=2, resumes=True) as site:
        check_whole(await ask(site, CHAT, Break(2), Break(1), Break(1)), CHAT)
        assert site.last["resumes"] == 3


async def test_a_member_that_leaves_the_fleet_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed worker finishes what it has; what it leaves lying goes on elsewhere."""
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_S", 0.05)
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_STEPS", 1)
    async with running_site(decode=2, resumes=True) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head = await exchange.read_until(b"\n\n")
            (victim,) = [fake for fake, _ in legs(site)]
            assert (await site.ask("DELETE", f"/workers/{victim.name}")).status in (200, 202)
            rest = await exchange.read_until(b"0\r\n\r\n")
        check_whole(Reply.of(head + rest), CHAT)
        await until(lambda: victim.name not in [w.worker_id for w in site.balancer.fleet.workers()])


@pytest.mark.parametrize(
    ("num_decodes", "told"), [(1, {}), (2, {"is_paused": True}), (2, {"num_updates": 1})],
    ids=["nobody else is ready", "it is paused", "it loads weights"],
)  # fmt: skip
async def test_silence_with_a_reason_is_waited_for(
    num_decodes: int, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_S", 0.02)
    monkeypatch.setattr("pdserve.balancer.fleet.liveness.STREAM_STEPS", 1)
    async with running_site(decode=num_decodes, resumes=True, request_s=0.4) as site:
        site.decode.breaks.append(Break(2, how="hang"))
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            await exchange.read_until(b"\n\n")
            for worker in site.balancer.fleet.workers():
                for name, value in told.items():
                    setattr(worker, name, value)
            rest = await exchange.read_until(b"0\r\n\r\n")
        # Only after the longest silence of all; then it is resumed, by the same server if it is the only one.
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        latency = (await site.ask("GET", "/pdserve/state")).json["latency"]["resume_gap_s"]
        assert latency["count"] == 1 and latency["mean"] >= 0.4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/invocations", request_to(CHAT, stream=True)),
        ("/vertex_generate", {"instances": [{"text": "hi"}], "parameters": {"stream": True}}),
    ],
)
async def test_the_other_names_of_routes(path: str, body: dict[str, Any]) -> None:
    async with running_site(decode=2, resumes=True) as site:
        whole = await site.ask("POST", path, body)
        site.decode.breaks.append(Break(2))
        broken = await site.ask("POST", path, body)
        assert RID.sub(b"", broken.body) == RID.sub(b"", whole.body) and whole.events[-1] == "[DONE]"
        assert site.counts["resumed"] == 1
        await nothing_left(site)


async def test_heartbeats_fill_the_gap_and_count_for_nothing() -> None:
    async with running_site(decode=3, resumes=True, stream_heartbeat_s=0.02) as site:
        site.decode.breaks.extend([Break(2), Break(0, how="hang")])
        async with site.exchange("POST", CHAT, request_to(CHAT, stream=True)) as exchange:
            head = await exchange.read_until(b": heartbeat\n\n")
            await until(lambda: not site.decode.breaks)
            (hung,) = [fake for fake, request in legs(site) if request.get("pdserve_resume")]
            head += await exchange.read_until(b": heartbeat\n\n")
            hung.kill()
            rest = await exchange.read_until(b"0\r\n\r\n")
        reply = Reply.of(head + rest)
        reply.body = reply.body.replace(b": heartbeat\n\n", b"")
        check_whole(reply, CHAT)
