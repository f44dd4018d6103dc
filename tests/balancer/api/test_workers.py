"""Workers that come and go by HTTP: sglang-router's /workers, and the names of its older releases."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.control_worker import TOKEN, ControlSite, ControlWorker, control_site
from tests.support.sglang_server import until


async def add(site: ControlSite, worker: ControlWorker, role: str, **more: Any) -> Any:
    """POST /workers; its whole reply."""
    return await site.ask("POST", "/workers", {"url": worker.url, "worker_type": role, **more})


def ids(site: ControlSite) -> list[str]:
    """The members, as the fleet orders them."""
    return [worker.worker_id for worker in site.balancer.fleet.workers()]


# -- coming ------------------------------------------------------------------------------------


async def test_an_empty_balancer_serves_once_a_pair_was_added() -> None:
    async with control_site(0, 0) as site, ControlWorker() as prefill, ControlWorker() as decode:
        reply = await add(site, prefill, "prefill", bootstrap_port=8998)
        name = f"prefill-127.0.0.1:{prefill.port}"
        assert reply.status == 202
        told = reply.json
        assert (told["status"], told["worker_id"], told["url"]) == ("accepted", name, prefill.url)
        assert told["location"] == reply.headers["location"] == f"/workers/{quote(name, safe='')}"
        assert (await add(site, decode, "decode")).status == 202
        await until(lambda: site.balancer.fleet.scheduler.has_ready_pair, "the pair is ready")
        assert (await site.ask("POST", "/generate", {"text": "a"})).status == 200
        row = (await site.ask("GET", told["location"])).json
        assert (row["worker_type"], row["bootstrap_host"], row["bootstrap_port"]) == (
            "prefill",
            "127.0.0.1",
            8998,
        )
        assert (await site.ask("GET", "/readiness")).status == 200


async def test_fields_without_meaning_are_named_and_an_api_key_is_never_shown() -> None:
    async with control_site(0, 0, worker_api_key="hush") as site, ControlWorker() as one:
        more = {
            "model_id": "m",
            "priority": 50,
            "cost": 1.0,
            "labels": {},
            "runtime": "sglang",
            "api_key": "hush",
        }
        reply = await add(site, one, "decode", **more)
        assert reply.status == 202
        assert reply.json["message"].endswith("without meaning here: cost, model_id, priority")
        assert b"hush" not in reply.body + (await site.ask("GET", "/workers")).body
        assert b"hush" not in (await site.ask("GET", "/pdserve/state")).body


async def test_a_key_of_its_own_is_refused_without_being_shown() -> None:
    async with control_site(0, 0) as site, ControlWorker() as one:
        reply = await add(site, one, "decode", api_key="hush")
        assert (reply.status, b"hush" in reply.body, ids(site)) == (400, False, [])
        assert "PDSERVE_WORKER_API_KEY" in reply.json["error"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "BAD_REQUEST"),
        (b"[]", 400, "BAD_REQUEST"),
        ({}, 400, "BAD_REQUEST"),
        ({"url": 5, "worker_type": "decode"}, 400, "BAD_REQUEST"),
        ({"url": "http://127.0.0.1:1"}, 400, "BAD_REQUEST"),
        ({"url": "http://127.0.0.1:1", "worker_type": "regular"}, 400, "BAD_REQUEST"),
        ({"url": "http://127.0.0.1:1", "worker_type": "decode", "bootstrap_port": 8998}, 400, "BAD_REQUEST"),
        ({"url": "http://127.0.0.1:1", "worker_type": "prefill", "bootstrap_port": 0}, 400, "BAD_REQUEST"),
        ({"url": "http://127.0.0.1:1", "worker_type": "prefill", "bootstrap_port": "x"}, 400, "BAD_REQUEST"),
        ({"url": "127.0.0.1:1", "worker_type": "decode"}, 400, "INVALID_URL"),
        ({"url": "http://u:p@127.0.0.1:1", "worker_type": "decode"}, 400, "INVALID_URL"),
        ({"url": "http://[::ffff:10.0.0.1]:1", "worker_type": "decode"}, 400, "INVALID_URL"),
        ({"url": "http://169.254.169.254:80", "worker_type": "decode"}, 403, "HOST_NOT_ALLOWED"),
        ({"url": "http://internal.example:80", "worker_type": "decode"}, 403, "HOST_NOT_ALLOWED"),
    ],
)
async def test_what_cannot_be_added_is_refused_and_says_why(body: object, status: int, code: str) -> None:
    async with control_site(0, 0) as site:
        reply = await site.ask("POST", "/workers", body)
        assert (reply.status, reply.json["code"], ids(site)) == (status, code, [])
        assert reply.json["error"]


async def test_a_regular_worker_is_refused_with_a_reason() -> None:
    async with control_site(0, 0) as site, ControlWorker() as one:
        reply = await add(site, one, "regular")
        assert reply.json["error"].startswith("worker_type must be prefill or decode")


async def test_hosts_that_were_configured_can_be_added() -> None:
    async with control_site(0, 0, worker_hosts=("192.0.2.0/24", "node-1")) as site:
        for host in ("192.0.2.9", "node-1"):
            body = {"url": f"http://{host}:1", "worker_type": "decode"}
            assert (await site.ask("POST", "/workers", body)).status == 202


async def test_an_address_can_be_a_member_once() -> None:
    async with control_site() as site:
        for role in ("prefill", "decode"):
            reply = await add(site, site.decodes[0], role)
            assert (reply.status, reply.json["code"]) == (409, "WORKER_EXISTS")
        assert ids(site) == ["prefill-0", "decode-0"]


# -- looking -----------------------------------------------------------------------------------


async def test_a_worker_is_found_by_id_and_by_url() -> None:
    async with control_site(1, 2) as site:
        url = site.decodes[1].url
        for name in ("decode-1", quote(url, safe=""), quote(url + "/", safe=""), url):
            reply = await site.ask("GET", f"/workers/{name}")
            assert (reply.status, reply.json["id"], reply.json["url"]) == (200, "decode-1", url)
        for method, body in (("GET", None), ("PUT", {"draining": True}), ("DELETE", None)):
            reply = await site.ask(method, "/workers/decode-7", body)
            assert (reply.status, reply.json["code"]) == (404, "WORKER_NOT_FOUND")
            assert "decode-7" in reply.json["error"]


# -- draining and going ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_a_worker_drains_and_comes_back(method: str) -> None:
    async with control_site(1, 1, is_ready=True) as site:
        reply = await site.ask(method, "/workers/decode-0", {"draining": True})
        assert (reply.status, reply.json["worker_id"]) == (202, "decode-0")
        row = (await site.ask("GET", "/workers/decode-0")).json
        assert (row["state"], row["is_healthy"]) == ("draining", False)
        assert (await site.ask("GET", "/readiness")).status == 503
        assert (await site.ask(method, "/workers/decode-0", {"draining": False})).status == 202
        await until(lambda: site.balancer.fleet.scheduler.has_ready_pair, "it serves again")


@pytest.mark.parametrize("body", [{}, {"priority": 3}, {"draining": "yes"}, b"{", b"3"])
async def test_a_change_that_changes_nothing_is_400(body: object) -> None:
    async with control_site() as site:
        assert (await site.ask("PUT", "/workers/decode-0", body)).status == 400


async def test_a_removed_worker_ends_its_requests_first() -> None:
    async with control_site(1, 2, is_ready=True) as site:
        gate = asyncio.Event()
        for worker in site.decodes:
            worker.tell("/generate", TOKEN)  # told, it is recorded and waits for the gate
            worker.gate = gate
        asking = asyncio.create_task(site.ask("POST", "/generate", {"text": "a"}))
        await until(lambda: any(worker.seen for worker in site.decodes), "one has it")
        index = next(i for i, worker in enumerate(site.decodes) if worker.seen)
        path = f"/workers/decode-{index}"
        assert (await site.ask("DELETE", path)).status == 202
        assert (await site.ask("GET", path)).json["state"] == "draining"
        gate.set()
        assert (await asking).status == 200
        await until(lambda: ids(site) == ["prefill-0", f"decode-{1 - index}"], "it is forgotten")
        assert (await site.ask("GET", path)).status == 404
        assert (await site.ask("POST", "/generate", {"text": "a"})).status == 200
        assert len(site.decodes[index].seen) == 1


# -- older names -------------------------------------------------------------------------------


async def test_the_older_names() -> None:
    async with control_site(0, 0) as site, ControlWorker() as prefill, ControlWorker() as decode:
        target = f"/add_worker?url={quote(prefill.url)}&role=prefill&bootstrap_port=8998"
        assert (await site.ask("POST", target)).status == 202
        assert (await site.ask("POST", f"/add_worker?url={decode.url}&worker_type=decode")).status == 202
        assert (await site.ask("GET", "/list_workers")).json == {"urls": [prefill.url, decode.url]}
        assert (await site.ask("GET", "/list_workers?role=decode")).json == {"urls": [decode.url]}
        assert site.balancer.fleet.workers()[0].info.bootstrap_port == 8998
        assert (await site.ask("POST", f"/remove_worker?url={prefill.url}")).status == 202
        await until(lambda: len(ids(site)) == 1, "it is forgotten")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/add_worker?url=http://127.0.0.1:1", 400),
        ("/add_worker?role=decode", 400),
        ("/add_worker?url=http://127.0.0.1:1&role=prefill&bootstrap_port=x", 400),
        ("/add_worker?url=http://127.0.0.1:1&role=decode&api_key=hush", 400),
        ("/add_worker?url=http://10.0.0.1:1&role=decode", 403),
        ("/remove_worker?url=http://127.0.0.1:1", 404),
        ("/remove_worker", 404),
    ],
)
async def test_wrong_older_requests(target: str, status: int) -> None:
    async with control_site(0, 0) as site:
        reply = await site.ask("POST", target)
        assert (reply.status, b"hush" in reply.body) == (status, False)
        assert json.loads(reply.body)["error"]
