"""What goes to all workers, with a row each, and what may only go to one."""

from __future__ import annotations

import json

import pytest

from tests.support.control_worker import control_site

GROUP = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 3}


# -- to all ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/update_weights_from_disk"),
        ("PUT", "/set_internal_state"),
        ("GET", "/start_profile?a=b%20c&d"),
        ("DELETE", "/hicache/storage-backend"),
        ("POST", "/dumper/dump%20all"),
        ("POST", "/flush_cache?timeout=0.5"),
    ],
)
async def test_method_target_body_and_headers_travel_unchanged(method: str, target: str) -> None:
    body = b'{"model_path": "m"  , "x":1}'
    async with control_site(prefill=2, decode=1) as site:
        reply = await site.ask(
            method, target, body, content_type="application/json; charset=utf-8", traceparent="t"
        )
        assert (reply.status, reply.json["success"]) == (200, True)
        for worker in site.workers:
            (seen,) = worker.seen
            assert (f"{seen.method} {seen.target}", seen.body) == (f"{method} {target}", body)
            assert seen.headers["content-type"] == "application/json; charset=utf-8"
            assert seen.headers["traceparent"] == "t"


async def test_200_only_if_all_said_so_and_a_row_for_each() -> None:
    async with control_site(prefill=1, decode=2) as site:
        site.prefills[0].tell("/freeze_gc", b"Frozen.\n", content_type="text/plain")
        site.decodes[0].tell("/freeze_gc", {"success": False, "error": "busy"}, 400)
        await site.decodes[1].stop()
        reply = await site.ask("POST", "/freeze_gc")
        assert (reply.status, reply.json["success"]) == (400, False)
        assert reply.json["message"] == "1 of 3 workers have done it"
        first, second, third = reply.json["workers"]
        assert first == {
            "worker_id": "prefill-0", "url": site.prefills[0].url, "status": 200, "message": "Frozen."
        }  # fmt: skip
        assert (second["status"], second["message"]) == (400, "busy")
        assert second["answer"] == {"success": False, "error": "busy"}
        assert third["status"] == 502
        assert site.decodes[1].url in third["message"]


async def test_an_empty_fleet_is_503() -> None:
    async with control_site(prefill=0, decode=0) as site:
        assert (await site.ask("POST", "/begin_weight_update", {})).status == 503


async def test_a_fan_out_can_be_narrowed_to_named_workers() -> None:
    async with control_site(prefill=1, decode=2) as site:
        url = site.decodes[1].url
        reply = await site.ask(
            "POST", f"/slow_down?worker=prefill-0&x=1&worker={url}", {"forward_sleep_time": 1}
        )
        assert [row["worker_id"] for row in reply.json["workers"]] == ["prefill-0", "decode-1"]
        assert site.prefills[0].targets == site.decodes[1].targets == ["POST /slow_down?x=1"]
        assert site.decodes[0].seen == []
        reply = await site.ask("POST", "/slow_down?worker=decode-7", {})
        assert reply.status == 404
        assert "decode-7" in reply.json["error"]["message"]
        assert "decode-1" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("settings", "sent", "arrives"),
    [
        ({}, "Bearer mine", "Bearer mine"),
        ({}, None, None),
        ({"worker_api_key": "theirs"}, "Bearer mine", "Bearer theirs"),
        ({"api_key": "both"}, "Bearer both", "Bearer both"),
    ],
)
async def test_which_key_a_worker_gets(
    settings: dict[str, str], sent: str | None, arrives: str | None
) -> None:
    async with control_site(**settings) as site:
        headers = {"authorization": sent} if sent else {}
        assert (await site.ask("POST", "/freeze_gc", **headers)).status == 200
        assert site.decodes[0].seen[0].headers.get("authorization") == arrives


async def test_a_hidden_line_break_in_the_path_stays_hidden() -> None:
    async with control_site() as site:
        await site.ask("POST", "/dumper/x%20HTTP%0D%0Ax-evil:%201%0D%0A", b"{}")
        (seen,) = site.decodes[0].seen
        assert "x-evil" not in seen.headers
        assert "%0D%0A" in seen.target


async def test_a_session_is_opened_under_one_id_everywhere() -> None:
    async with control_site(prefill=1, decode=1) as site:
        reply = await site.ask("POST", "/open_session", {"capacity_of_str_len": 1000})
        ids = {worker.seen[0].json["session_id"] for worker in site.workers}
        assert (reply.status, ids) == (200, {reply.json})
        await site.ask("POST", "/open_session", {"capacity_of_str_len": 1, "session_id": "mine"})
        assert site.decodes[0].seen[1].json == {"capacity_of_str_len": 1, "session_id": "mine"}
        site.decodes[0].tell("/open_session", {"error": {"message": "still open"}}, 400)
        assert (await site.ask("POST", "/open_session", {"session_id": "mine"})).status == 400


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, {}, {"tags": ["kv_cache"]}, {"tags": []}])
async def test_kv_memory_under_nixl_is_not_released(body: object) -> None:
    async with control_site() as site:
        site.prefills[0].tell("/server_info", {"disaggregation_transfer_backend": "mooncake"})
        site.decodes[0].tell("/server_info", {"disaggregation_transfer_backend": "nixl"})
        reply = await site.ask("POST", "/release_memory_occupation", body)
        assert reply.status == 501
        assert "decode-0" in reply.json["error"]["message"]
        assert "prefill-0" not in reply.json["error"]["message"]
        assert "POST /release_memory_occupation" not in [*site.prefills[0].targets, *site.decodes[0].targets]


async def test_weights_and_other_backends_are_released() -> None:
    async with control_site() as site:
        reply = await site.ask("POST", "/release_memory_occupation", {"tags": ["weights"]})
        assert (reply.status, site.decodes[0].targets) == (200, ["POST /release_memory_occupation"])
        for worker in site.workers:
            worker.tell("/server_info", {"disaggregation_transfer_backend": "mooncake"})
        assert (await site.ask("POST", "/release_memory_occupation", {})).status == 200
        assert (await site.ask("POST", "/resume_memory_occupation", {})).status == 200


# -- to one ------------------------------------------------------------------------------------


async def test_a_role_switch_needs_one_name() -> None:
    async with control_site() as site:
        for target in ("/pd_role_switch", "/pd_role_switch?worker=decode-0&worker=prefill-0"):
            reply = await site.ask("POST", target, {"new_role": "prefill"})
            assert reply.status == 400
            assert "?worker=ID; known: prefill-0, decode-0" in reply.json["error"]["message"]
        assert (await site.ask("POST", "/pd_role_switch", {"worker": "decode-9"})).status == 404
        assert [worker.seen for worker in site.workers] == [[], []]


@pytest.mark.parametrize("by", ["query", "body", "url"])
async def test_a_role_switch_goes_to_the_worker_named_and_its_answer_comes_back(by: str) -> None:
    async with control_site(decode=2) as site:
        site.decodes[1].tell("/pd_role_switch", {"success": False, "message": "not idle"}, 400)
        body = {"new_role": "prefill"}
        target = {"query": "?worker=decode-1", "body": "", "url": f"?worker={site.decodes[1].url}"}[by]
        sent = body | ({"worker": "decode-1"} if by == "body" else {})
        reply = await site.ask("POST", "/pd_role_switch" + target, sent)
        assert (reply.status, reply.json) == (400, {"success": False, "message": "not idle"})
        (seen,) = site.decodes[1].seen
        assert (seen.target, seen.json) == ("/pd_role_switch", body)
        assert site.decodes[0].seen == site.prefills[0].seen == []


async def test_an_unreachable_worker_that_was_named_is_502() -> None:
    async with control_site() as site:
        await site.decodes[0].stop()
        reply = await site.ask("POST", "/send_weights_to_remote_instance?worker=decode-0", {})
        assert (reply.status, site.decodes[0].url in reply.json["error"]["message"]) == (502, True)


# -- weight update groups ----------------------------------------------------------------------


async def test_one_body_for_all_ranks_is_refused() -> None:
    async with control_site() as site:
        reply = await site.ask("POST", "/init_weights_update_group", GROUP)
        assert reply.status == 400
        assert "rank_offset" in reply.json["error"]["message"]
        assert "?worker=ID" in reply.json["error"]["message"]
        assert [worker.seen for worker in site.workers] == [[], []]


async def test_a_group_request_to_one_worker() -> None:
    async with control_site() as site:
        reply = await site.ask("POST", "/init_weights_update_group?worker=decode-0", GROUP)
        assert reply.status == 200
        assert site.decodes[0].seen[0].json == GROUP
        assert site.prefills[0].seen == []


async def test_ranks_per_worker_go_out_together() -> None:
    async with control_site(decode=2) as site:
        body = GROUP | {"rank_offsets": {"prefill-0": 1, "decode-0": 2, "decode-1": 3}}
        reply = await site.ask("POST", "/init_weights_update_group", body)
        assert (reply.status, len(reply.json["workers"])) == (200, 3)
        assert [worker.seen[0].json for worker in site.workers] == [
            GROUP | {"rank_offset": rank} for rank in (1, 2, 3)
        ]


@pytest.mark.parametrize(
    ("offsets", "status"),
    [({"decode-9": 1}, 404), ([1], 400), ({"decode-0": "1"}, 400), ({"decode-0": True}, 400)],
)
async def test_wrong_ranks_are_refused_before_anyone_hears(offsets: object, status: int) -> None:
    async with control_site() as site:
        reply = await site.ask("POST", "/init_weights_update_group", GROUP | {"rank_offsets": offsets})
        assert reply.status == status
        assert [worker.seen for worker in site.workers] == [[], []]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff"])
@pytest.mark.parametrize("path", ["/init_weights_update_group", "/open_session", "/abort_request"])
async def test_a_broken_body_is_400(path: str, body: bytes) -> None:
    async with control_site() as site:
        reply = await site.ask("POST", path, body)
        assert reply.status == 400
        assert json.loads(reply.body)["error"]["message"]
