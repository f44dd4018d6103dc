"""The data plane over real sockets: what the client gets, what both workers see, who is blamed."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from pdserve.balancer.proxy import relay
from pdserve.balancer.request.ids import RoomAllocator
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import RequestRefused, Route
from pdserve.balancer.request.usage import usage_of_body
from pdserve.types import RequestShape
from tests.support.balancer_client import Site, running_site
from tests.support.fleet_network import release, reserve
from tests.support.sglang_server import Behaviour, FakeSGLang, until

STREAM = {"text": "hi", "stream": True}
PLAIN = {"text": "hi"}
OURS = ("rid", "bootstrap_room", "bootstrap_host", "bootstrap_port")
RESET_CASES = [{"reset_before_head": True}, {"reset_after": 0}]


def behave(fake: FakeSGLang, **settings: Any) -> None:
    for name, value in settings.items():
        assert hasattr(fake.behaviour, name)
        setattr(fake.behaviour, name, value)


async def until_both_aborted(site: Site) -> None:
    rid = site.prefill.requests[-1]["rid"]
    await until(lambda: rid in site.prefill.aborts and rid in site.decode.aborts, "abort on both workers")


# -- a good pair ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_answer_is_decodes_and_both_legs_got_the_same_request(path: str) -> None:
    async with running_site() as site:
        reply = await site.ask("POST", path, {"prompt": "hi", "text": "hi", "temperature": 0.5})
        sent = site.decode.requests[0]
        rid = sent["rid"]
        expected = site.decode._event(path, rid, 3, site.decode.behaviour)
        assert (reply.status, reply.json) == (200, expected)
        assert site.prefill.requests == [sent]
        assert site.prefill.paths == site.decode.paths == [path]
        assert sent["temperature"] == 0.5
        assert (sent["bootstrap_host"], sent["bootstrap_port"]) == ("127.0.0.1", 8998)
        assert 1 <= sent["bootstrap_room"] < 2**63
        assert len(rid) == 32
        assert reply.headers["x-request-id"] == rid
        assert site.prefill.aborts == site.decode.aborts == []


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_stream_reaches_the_client_byte_for_byte(path: str) -> None:
    async with running_site() as site:
        reply = await site.ask("POST", path, STREAM)
        rid = site.decode.requests[0]["rid"]
        fake = site.decode
        events = [fake._event(path, rid, n, fake.behaviour, "delta") for n in (1, 2, 3)]
        wanted = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        assert reply.body == wanted + b"data: [DONE]\n\n"
        assert reply.headers["content-type"].startswith("text/event-stream")
        last = site.last
        assert (last["status"], last["completion_tokens"], last["prompt_tokens"]) == (200, 3, 4)
        assert 0 < last["ttft_s"] <= last["e2e_s"]
        assert site.counts["completed"] == 1
        assert site.prefill.aborts == site.decode.aborts == []


async def test_put_generate_is_served() -> None:
    async with running_site() as site:
        assert (await site.ask("PUT", "/generate", PLAIN)).status == 200


async def test_authorization_and_request_id_travel() -> None:
    async with running_site() as site:
        reply = await site.generate(PLAIN, authorization="Bearer k", x_request_id="mine")
        assert reply.headers["x-request-id"] == "mine"
        for fake in site.fakes:
            assert fake.headers[-1]["authorization"] == "Bearer k"


async def test_batch_gets_one_room_and_rid_per_prompt() -> None:
    async with running_site() as site:
        reply = await site.generate({"input_ids": [[1, 2], [3]]})
        sent = site.prefill.requests[0]
        assert sent == site.decode.requests[0]
        assert sent["bootstrap_host"] == ["127.0.0.1"] * 2
        assert sent["bootstrap_port"] == [8998] * 2
        assert len(set(sent["bootstrap_room"])) == len(set(sent["rid"])) == 2
        assert [item["meta_info"]["id"] for item in reply.json] == sent["rid"]


async def test_prompt_logprobs_come_from_prefill() -> None:
    async with running_site() as site:
        reply = await site.generate({"text": "hi", "return_logprob": True, "logprob_start_len": 0})
        meta = reply.json["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 5, None], [-0.5, 6, None]]
        assert len(meta["output_token_logprobs"]) == 3


async def test_completions_prompt_array_goes_to_one_pair_with_a_room_each() -> None:
    async with running_site() as site:
        assert (await site.ask("POST", "/v1/completions", {"prompt": ["hi", "there"]})).status == 200
        sent = site.decode.requests[0]
        assert sent["prompt"] == ["hi", "there"]
        assert len(set(sent["bootstrap_room"])) == len(set(sent["rid"])) == 2
        assert sent == site.prefill.requests[0]


async def test_a_prefill_lost_after_decodes_first_byte_is_blamed_and_the_answer_goes_on() -> None:
    async with running_site() as site:
        site.prefill.behaviour.gate = asyncio.Event()
        site.decode.behaviour.token_delay_s = 0.02
        async with site.exchange("POST", "/generate", STREAM) as exchange:
            await exchange.read_until(b"\n\n")
            await site.prefill.stop()
            reply = await exchange.read_until(b"[DONE]")
        assert reply.count(b"data: ") >= 3
        await until(lambda: site.state("prefill-0") == "suspect")


async def test_a_prefill_that_never_ends_does_not_delay_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "PREFILL_GRACE_S", 0.05)
    async with running_site() as site:
        behave(site.prefill, hang=True)
        for body in (PLAIN, STREAM):
            assert (await site.generate(body)).status == 200
            rid = site.decode.requests[-1]["rid"]
            await until(lambda rid=rid: rid in site.prefill.disconnects and rid in site.prefill.aborts)
        assert site.counts["completed"] == 2
        assert site.state("prefill-0") == "ready"


# -- refused requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"text": ', 400, "not valid JSON"),
        (b"\xff", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        ([PLAIN], 400, "JSON object, got an array"),
        ({"text": []}, 400, "prompt is empty"),
        ({"text": "a", "sampling_params": {"n": 2000}}, 400, "1024 at most"),
    ],
)
async def test_unservable_generate_body_is_refused(body: object, status: int, words: str) -> None:
    async with running_site() as site:
        reply = await site.generate(body)
        assert reply.status == status
        assert words in reply.json.get("error", reply.json)["message"]
        assert site.prefill.requests == site.decode.requests == []
        assert (site.counts["failed"], site.counts["inflight"]) == (1, 0)


async def test_openai_refusals_have_openais_shape() -> None:
    async with running_site() as site:
        samples = await site.ask("POST", "/v1/chat/completions", {"messages": [], "n": 1025})
        broken = await site.ask("POST", "/v1/completions", b"{")
        assert (samples.status, broken.status) == (400, 400)
        assert "1024" in samples.json["message"]
        assert broken.json.keys() == {"object", "message", "type", "param", "code"}
        assert (broken.json["type"], broken.json["code"]) == ("Bad Request", 400)


@pytest.mark.parametrize("refuser", ["prefill", "decode"])
async def test_a_4xx_is_relayed_and_ends_the_other_leg_without_blame(refuser: str) -> None:
    async with running_site() as site:
        bad, other = (site.prefill, site.decode) if refuser == "prefill" else (site.decode, site.prefill)
        behave(bad, status=400, error_body=b'{"error":{"message":"too long"}}')
        behave(other, hang=True)
        reply = await site.generate(PLAIN)
        assert (reply.status, reply.body) == (400, bad.behaviour.error_body)
        await until(lambda: other.disconnects, "the other leg's socket closed")
        await until_both_aborted(site)
        assert len(bad.requests) == 1
        assert site.state(f"{refuser}-0") == "ready"
        assert all(worker.breaker.errors == 0 for worker in site.balancer.fleet.workers())


# -- failing workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [PLAIN, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("fault", [{"status": 500}, *RESET_CASES], ids=str)
async def test_failed_prefill_is_retried_on_another_pair(body: object, fault: dict[str, Any]) -> None:
    async with running_site(prefill=2) as site:
        behave(site.decode, delay_s=0.05)
        bad, good = site.prefills
        behave(bad, **fault)
        for _ in range(4):
            reply = await site.generate(body)
            assert reply.status == 200
            if bad.requests:
                break
        first, second = bad.requests[0], good.requests[-1]
        assert first["bootstrap_room"] != second["bootstrap_room"]
        assert first["rid"] != second["rid"]
        assert reply.headers["x-request-id"] == second["rid"]
        assert site.counts["retried"] == 1
        assert site.counts["completed"] == site.counts["total"]
        await until(lambda: first["rid"] in site.decode.aborts and first["rid"] in bad.aborts)
        assert second["rid"] not in site.decode.aborts


@pytest.mark.parametrize("body", [PLAIN, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("fault", RESET_CASES, ids=str)
async def test_decode_reset_before_the_first_byte_is_retried(body: object, fault: dict[str, Any]) -> None:
    async with running_site(decode=2) as site:
        bad, good = site.decodes
        await forget_connections(bad)
        behave(bad, **fault)
        for _ in range(4):
            assert (await site.generate(body)).status == 200
            if bad.requests:
                break
        assert bad.requests and good.requests
        assert site.counts["retried"] == 1
        await until(lambda: site.state("decode-0") == "suspect")


async def test_another_content_type_is_refused_and_none_is_taken_for_json() -> None:
    async with running_site() as site:
        assert (await site.generate(PLAIN)).status == 200
        assert (await site.generate(PLAIN, content_type="application/json; charset=utf-8")).status == 200
        refused = await site.ask("POST", "/v1/completions", {"prompt": "a"}, content_type="text/plain")
        assert (refused.status, refused.json["type"]) == (400, "Bad Request")
        assert "application/json" in refused.json["message"]


async def test_a_stumble_over_the_request_blames_nobody_and_is_not_retried() -> None:
    async with running_site(prefill=2) as site:
        for fake in site.fakes:
            behave(fake, status=500, error_body=b"Internal Server Error")
        reply = await site.ask(
            "POST", "/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"x": 1}}
        )
        assert (reply.status, reply.body) == (500, b"Internal Server Error")
        assert [worker.breaker.errors for worker in site.balancer.fleet.workers()] == [0, 0, 0]
        assert site.counts["retried"] == 0


async def test_a_refusal_that_repeats_the_request_does_not_repeat_our_fields() -> None:
    async with running_site() as site:
        said = b"{'loc': ['body'], 'input': {'model': 'm', 'bootstrap_host': '10.0.0.1', "
        said += b"'bootstrap_port': 8998, 'bootstrap_room': 1, 'rid': '0123456789abcdef0123456789abcdef'}}"
        for fake in site.fakes:
            behave(fake, status=400, error_body=said)
        reply = await site.generate(PLAIN)
        assert reply.body == b"{'loc': ['body'], 'input': {'model': 'm'}}"


async def forget_connections(fake: FakeSGLang) -> None:
    """From here on each connection to it is a fresh one: a break cannot be a stale connection's."""
    fake.drop_idle()
    await until(lambda: fake.num_connections == 0)


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_kept_connection_that_breaks_costs_a_new_room_and_nobodys_reputation(leg: str) -> None:
    async with running_site() as site:
        await site.generate(PLAIN)
        fake = getattr(site, leg)
        fake.behaviour.mute_connections = 1
        assert (await site.generate(PLAIN)).status == 200
        assert len(set(fake.rooms)) == len(fake.rooms), "no room may be used twice"
        assert [worker.breaker.errors for worker in site.balancer.fleet.workers()] == [0, 0]
        assert site.counts["retried"] == 1


async def test_a_retry_avoids_the_failed_worker_even_if_it_looks_idle() -> None:
    async with running_site(prefill=2, decode=4, max_retries=1) as site:
        long = RequestShape(prompt_tokens=100_000, max_new_tokens=1)
        held = [await reserve(site.balancer.fleet, long, timeout_s=1) for _ in range(4)]
        for reservation in held:
            if reservation.pair.prefill.worker_id == "prefill-0":
                release(site.balancer.fleet, reservation, prefill_ok=None, decode_ok=None)
        behave(site.prefill, status=500)
        assert (await site.generate(PLAIN)).status == 200
        assert (len(site.prefill.requests), len(site.prefills[1].requests)) == (1, 1)


async def test_the_failed_worker_is_used_again_where_there_is_no_other() -> None:
    async with running_site(prefill=1, decode=2) as site:
        behave(site.prefill, status=500)
        assert (await site.generate(PLAIN)).status == 502
        assert len(site.prefill.requests) == 2
        assert [len(decode.requests) for decode in site.decodes] == [1, 1]


async def test_without_another_pair_a_reset_is_502_and_its_worker_suspect() -> None:
    async with running_site() as site:
        await forget_connections(site.decode)
        behave(site.decode, reset_before_head=True)
        reply = await site.generate(PLAIN)
        assert reply.status == 502
        assert site.decode.url in reply.json["error"]["message"]
        assert len({request["bootstrap_room"] for request in site.decode.requests}) == 1
        assert site.state("decode-0") == "suspect"
        assert site.state("prefill-0") == "ready"
        await until(lambda: site.decode.requests[0]["rid"] in site.prefill.aborts)
        assert (site.counts["failed"], site.counts["retried"]) == (1, 0)


async def test_a_dead_worker_is_502_in_openais_shape() -> None:
    async with running_site() as site:
        await site.prefill.stop()
        behave(site.decode, hang=True)
        reply = await site.ask("POST", "/v1/chat/completions", {"messages": [{"content": "hi"}]})
        assert (reply.status, reply.json["code"], reply.json["type"]) == (502, 502, "BadGatewayError")
        await until(lambda: site.decode.disconnects)
        assert site.state("prefill-0") == "suspect"


async def test_a_silent_decode_is_504_and_suspect() -> None:
    async with running_site(request_s=0.1) as site:
        behave(site.decode, hang=True)
        reply = await site.generate(PLAIN)
        assert reply.status == 504
        assert site.state("decode-0") == "suspect"
        assert site.state("prefill-0") == "ready"
        await until_both_aborted(site)
        assert site.decode.disconnects == [site.decode.requests[0]["rid"]]


async def test_if_both_are_silent_both_are_pinged_and_none_is_condemned() -> None:
    async with running_site(request_s=0.1) as site:
        behave(site.prefill, hang=True)
        behave(site.decode, hang=True)
        assert (await site.generate(PLAIN)).status == 504
        assert (site.state("prefill-0"), site.state("decode-0")) == ("ready", "ready")
        assert all(worker.breaker.errors == 1 for worker in site.balancer.fleet.workers())


@pytest.mark.parametrize("fault", [{"reset_after": 2}, {"hang_after": 2}], ids=str)
async def test_a_stream_that_breaks_ends_with_an_error_event(fault: dict[str, Any]) -> None:
    async with running_site(request_s=0.2) as site:
        behave(site.decode, **fault)
        reply = await site.generate(STREAM)
        assert reply.status == 200
        *tokens, last = reply.events
        status = 502 if "reset_after" in fault else 504
        assert len(tokens) == 2
        assert json.loads(last)["error"]["code"] == status
        assert site.decode.url in json.loads(last)["error"]["message"]
        assert site.state("decode-0") == "suspect"
        await until_both_aborted(site)
        assert (site.counts["failed"], site.counts["retried"]) == (1, 0)


# -- clients that leave --------------------------------------------------------------------------------


async def test_client_leaving_before_the_first_byte_ends_both_legs() -> None:
    async with running_site() as site:
        for fake in site.fakes:
            behave(fake, hang=True)
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: site.prefill.requests and site.decode.requests)
            exchange.leave()
            await until_both_aborted(site)
        rid = site.decode.requests[0]["rid"]
        await until(lambda: site.prefill.disconnects == site.decode.disconnects == [rid])
        assert (site.counts["aborted"], site.counts["inflight"]) == (1, 0)
        assert {site.state("prefill-0"), site.state("decode-0")} == {"ready"}
        assert all(worker.num_inflight == 0 for worker in site.balancer.fleet.workers())


async def test_client_leaving_in_mid_stream_ends_both_legs() -> None:
    async with running_site() as site:
        behave(site.prefill, hang=True)
        behave(site.decode, hang_after=2)
        async with site.exchange("POST", "/v1/chat/completions", STREAM) as exchange:
            await exchange.read_until(b"\n\n")
            exchange.leave()
            await until_both_aborted(site)
        rid = site.decode.requests[0]["rid"]
        await until(lambda: site.prefill.disconnects == site.decode.disconnects == [rid])
        assert site.last["error"] == "the client left"


async def test_client_leaving_a_batch_aborts_every_rid() -> None:
    async with running_site() as site:
        for fake in site.fakes:
            behave(fake, hang=True)
        async with site.exchange("POST", "/generate", {"text": ["a", "b"]}) as exchange:
            await until(lambda: site.prefill.requests and site.decode.requests)
            exchange.leave()
            rids = set(site.prefill.requests[0]["rid"])
            await until(lambda: set(site.prefill.aborts) == set(site.decode.aborts) == rids)


async def test_client_leaving_the_wait_for_a_pair_leaves_the_line() -> None:
    async with running_site(prefill=0, queue_timeout_s=60) as site:
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: site.balancer.fleet.scheduler.num_waiting == 1)
            exchange.leave()
            await until(lambda: site.balancer.fleet.scheduler.num_waiting == 0)
        await until(lambda: site.counts["aborted"] == 1)


# -- nobody there, and the end ---------------------------------------------------------------------------


async def test_without_workers_a_request_is_503_with_retry_after() -> None:
    async with running_site(prefill=0, decode=0, queue_timeout_s=0.05) as site:
        reply = await site.generate(PLAIN)
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json["error"]["message"]
        assert site.counts["shed"] == 1


async def test_stop_ends_what_is_in_flight_and_aborts_it() -> None:
    async with running_site() as site:
        for fake in site.fakes:
            behave(fake, hang=True)
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: site.prefill.requests and site.decode.requests)
            await site.balancer.stop()
            reply = await exchange.reply()
        assert reply.status == 503
        assert "stopping" in reply.json["error"]["message"]
        rid = site.prefill.requests[0]["rid"]
        assert site.prefill.aborts == site.decode.aborts == [rid]


async def test_stop_lets_a_request_finish_within_its_drain_time() -> None:
    async with running_site() as site:
        gate = site.decode.behaviour.gate = asyncio.Event()
        async with site.exchange("POST", "/generate", PLAIN) as exchange:
            await until(lambda: site.decode.requests)
            stopping = asyncio.create_task(site.balancer.stop(drain_s=5.0))
            await asyncio.sleep(0)
            gate.set()
            assert (await exchange.reply()).status == 200
            await stopping


@pytest.mark.slow
async def test_after_any_mixture_of_faults_everything_is_given_back() -> None:
    faults: list[dict[str, Any]] = [
        {},
        {},
        {"status": 500},
        {"status": 400},
        {"hang": True},
        {"reset_after": 1},
    ]
    faults += [{"reset_before_head": True}, {"hang_after": 1}, {"token_delay_s": 0.01}]
    chance = random.Random(7)

    async def client(site: Site, number: int) -> None:
        body = {"text": ["a", "b"]} if number % 5 == 0 else {"text": "a", "stream": number % 2 == 0}
        async with site.exchange("POST", "/generate", body) as exchange:
            if number % 3 == 0:
                await asyncio.sleep(chance.random() * 0.05)
                exchange.leave()
            else:
                assert (await exchange.reply()).status in (200, 400, 502, 503, 504)

    async with running_site(prefill=2, decode=2, request_s=0.1, queue_timeout_s=0.5) as site:
        for wave in range(8):
            for fake in site.fakes:
                fake.behaviour = Behaviour(**chance.choice(faults))
            await asyncio.gather(*(client(site, wave * 15 + i) for i in range(15)))
        await until(lambda: site.counts["inflight"] == 0)
        counts = site.counts
        ended = sum(counts[name] for name in ("completed", "failed", "aborted", "shed"))
        assert counts["total"] == ended
        assert all(worker.num_inflight == 0 for worker in site.balancer.fleet.workers())
        assert site.balancer.dispatcher.num_rooms == 0


# -- pure parts ------------------------------------------------------------------------------------------


def test_request_shape_is_read_from_the_body() -> None:
    def shape(route: Route, body: str) -> tuple[int, int]:
        found = parse_request(route, body.encode()).shape
        return found.prompt_tokens, found.max_new_tokens

    assert shape(Route.GENERATE, '{"input_ids":[1,2,3],"sampling_params":{"max_new_tokens":7}}') == (3, 7)
    assert shape(Route.GENERATE, '{"text":"12345678"}') == (2, 128)
    assert shape(Route.COMPLETIONS, '{"prompt":[5,6,7],"max_tokens":9}') == (3, 9)
    chat = '{"messages":[{"role":"user","content":"12345678"},{"role":"user","content":[{"text":"1234"}]}]}'
    assert shape(Route.CHAT, chat) == (20, 128)  # the conversation as it stands in the body


@pytest.mark.parametrize("body", ["null", "3", '"x"', "true", "[]"])
def test_only_objects_are_requests(body: str) -> None:
    with pytest.raises(RequestRefused, match="must be a JSON object"):
        parse_request(Route.GENERATE, body.encode())


def test_our_fields_win_over_the_clients() -> None:
    request = parse_request(Route.GENERATE, b'{"text":"a","rid":"x","bootstrap_room":0,"bootstrap_host":"h"}')
    ids = RoomAllocator().take(request.num_prompts)
    sent = json.loads(request.render_body("p", 1, ids))
    assert [sent[name] for name in OURS] == [ids.rids[0], ids.rooms[0], "p", 1]
    assert request.client_rid == "x"


def test_rooms_are_distinct_while_live() -> None:
    book = RoomAllocator()
    ids = book.take(1000)
    assert len(set(ids.rooms)) == len(set(ids.rids)) == len(book) == 1000
    book.give_back(ids)
    assert len(book) == 0


def test_usage_of_a_batch_is_its_sum() -> None:
    meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 2, "completion_tokens": 3}
    usage = usage_of_body(json.dumps([{"meta_info": meta}] * 2).encode())
    assert (usage.prompt_tokens, usage.completion_tokens, usage.finish) == (4, 6, "stop")
