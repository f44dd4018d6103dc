"""Documents that one worker tells, or that are put together from all of them."""

from __future__ import annotations

import pytest

from tests.support.control_worker import control_site

ANY = [
    *(
        ("GET", path)
        for path in ("/", "/v1/models", "/v1/models/org/name", "/model_info", "/api/tags", "/docs")
    ),
    *(
        ("POST", path)
        for path in ("/tokenize", "/v1/detokenize", "/parse_function_call", "/separate_reasoning")
    ),
    *(("POST", path) for path in ("/get_weights_by_name", "/v1/messages/count_tokens", "/api/show")),
]


# -- one worker --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ANY)
async def test_one_worker_is_asked_and_its_answer_passed_on(method: str, path: str) -> None:
    async with control_site(decode=2, is_ready=True) as site:
        for worker in site.workers:
            worker.tell(path, b"<p>what it said", 418, content_type="text/html; charset=x")
        body = b'{"prompt":"a"}' if method == "POST" else None
        reply = await site.ask(method, f"{path}?q=1", body)
        assert (reply.status, reply.body) == (418, b"<p>what it said")
        assert reply.headers["content-type"] == "text/html; charset=x"
        assert site.decodes[0].targets == [f"{method} {path}?q=1"]
        assert site.decodes[0].seen[0].body == (body or b"")
        assert site.prefills[0].seen == site.decodes[1].seen == []


async def test_a_worker_that_fails_is_skipped() -> None:
    async with control_site(prefill=1, decode=2, is_ready=True) as site:
        await site.decodes[0].stop()
        site.decodes[1].tell("/tokenize", b"", 500)
        site.prefills[0].tell("/tokenize", {"tokens": [1]})
        reply = await site.ask("POST", "/tokenize", {"prompt": "a"})
        assert (reply.status, reply.json) == (200, {"tokens": [1]})


async def test_a_question_that_no_worker_can_answer_is_sglangs_own_status() -> None:
    async with control_site() as site:
        for worker in site.workers:
            worker.tell("/parse_function_call", b"Internal Server Error", 500, content_type="text/plain")
        reply = await site.ask("POST", "/parse_function_call", {})
        assert (reply.status, "HTTP 500" in reply.json["error"]["message"]) == (500, True)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/tokenize", ("error", "message")),
        ("/v1/tokenize", ("message",)),
        ("/v1/messages/count_tokens", ("error", "message")),
    ],
)
async def test_nobody_to_ask_is_503_in_the_shape_of_the_route(path: str, where: tuple[str, ...]) -> None:
    async with control_site(prefill=0, decode=0) as site:
        reply = await site.ask("POST", path, {})
        found = reply.json
        for key in where:
            found = found[key]
        assert reply.status == 503
        assert "no prefill and no decode server is registered" in found


@pytest.mark.parametrize("path", ["/v1/models/../../flush_cache", "/v1/models/%2e%2e/x", "/v1/models/a/./b"])
async def test_a_path_that_climbs_is_refused(path: str) -> None:
    async with control_site() as site:
        assert (await site.ask("GET", path)).status == 400
        assert (await site.ask("GET", "/v1/models/%252e%252e/a..b")).status == 200
        assert site.decodes[0].targets == ["GET /v1/models/%252e%252e/a..b"]


async def test_old_names_ask_for_the_new() -> None:
    async with control_site() as site:
        site.decodes[0].tell("/model_info", {"model_path": "m"})
        assert (await site.ask("GET", "/get_model_info")).json == {"model_path": "m"}


# -- loads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/loads", "/get_loads"])
async def test_loads_of_all_workers_are_one_list(path: str) -> None:
    async with control_site() as site:
        site.prefills[0].tell(
            "/v1/loads",
            {"timestamp": "t", "version": "0.5.23", "num_accelerators": 4, "loads": [{"dp_rank": 0}]},
        )
        site.decodes[0].tell("/v1/loads", {"num_accelerators": 8, "loads": [{"dp_rank": 0}, {"dp_rank": 1}]})
        document = (await site.ask("GET", f"{path}?include=core")).json
        assert (document["version"], document["timestamp"] != "t") == ("0.5.23", True)
        assert document["loads"] == [
            {"dp_rank": 0, "num_accelerators": 4, "worker_id": "prefill-0", "role": "prefill"},
            {"dp_rank": 0, "num_accelerators": 8, "worker_id": "decode-0", "role": "decode"},
            {"dp_rank": 1, "num_accelerators": 8, "worker_id": "decode-0", "role": "decode"},
        ]
        assert "GET /v1/loads?include=core" in site.decodes[0].targets


async def test_loads_as_prometheus_text() -> None:
    async with control_site() as site:
        for worker in site.workers:
            text = b'# TYPE sglang_num_running_reqs gauge\nsglang_num_running_reqs{dp_rank="0"} 1\n'
            worker.tell("/v1/loads", text, content_type="text/plain")
        reply = await site.ask("GET", "/v1/loads?format=prometheus")
        assert reply.headers["content-type"].startswith("text/plain")
        assert reply.body.decode().splitlines() == [
            "# TYPE sglang_num_running_reqs gauge",
            'sglang_num_running_reqs{worker_id="prefill-0",worker_role="prefill",dp_rank="0"} 1',
            'sglang_num_running_reqs{worker_id="decode-0",worker_role="decode",dp_rank="0"} 1',
        ]


async def test_a_wrong_question_about_loads_is_the_workers_400() -> None:
    async with control_site() as site:
        for worker in site.workers:
            worker.tell("/v1/loads", {"message": "dp_rank=9 out of range"}, 400)
        reply = await site.ask("GET", "/v1/loads?dp_rank=9")
        assert (reply.status, reply.json) == (400, {"message": "dp_rank=9 out of range"})
        site.prefills[0].tell("/v1/loads", {"loads": [{"dp_rank": 9}]})
        assert (await site.ask("GET", "/v1/loads?dp_rank=9")).status == 200


# -- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/metrics", "/engine_metrics"])
async def test_metrics_of_those_who_publish_them(path: str) -> None:
    async with control_site() as site:
        site.prefills[0].tell("/metrics", {"detail": "Not Found"}, 404)
        site.decodes[0].tell("/metrics", b"# HELP x y\n# TYPE x gauge\nx 1.0\n", content_type="text/plain")
        reply = await site.ask("GET", path)
        assert (reply.status, reply.body.decode().splitlines()[-1]) == (
            200,
            'x{worker_id="decode-0",worker_role="decode"} 1.0',
        )
        assert (b"pdserve:requests_received_total 0" in reply.body) == (path == "/metrics")


async def test_the_balancers_own_metrics_need_no_worker() -> None:
    async with control_site(prefill=0, decode=0) as site:
        reply = await site.ask("GET", "/metrics")
        assert (reply.status, reply.headers["content-type"].startswith("text/plain")) == (200, True)
        assert b"pdserve:queue_length 0" in reply.body


async def test_the_balancers_own_metrics_can_be_had_without_asking_workers() -> None:
    async with control_site() as site:
        reply = await site.ask("GET", "/pdserve/metrics")
        assert b'pdserve:worker_state{worker_id="prefill-0"' in reply.body
        assert site.prefills[0].seen == site.decodes[0].seen == []


@pytest.mark.parametrize("path", ["/metrics", "/engine_metrics"])
async def test_workers_are_asked_for_the_form_that_is_merged(path: str) -> None:
    """Prometheus accepts OpenMetrics, and prometheus_client would answer so."""
    async with control_site() as site:
        accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.3"
        await site.ask("GET", path, accept=accept)
        assert [worker.seen[0].headers["accept"] for worker in site.workers] == ["text/plain"] * 2
        await site.ask("GET", "/v1/models", accept=accept)
        assert site.decodes[0].seen[-1].headers["accept"] == accept


async def test_no_engine_metrics_at_all_says_how_to_get_them() -> None:
    async with control_site() as site:
        for worker in site.workers:
            worker.tell("/metrics", {"detail": "Not Found"}, 404)
        reply = await site.ask("GET", "/engine_metrics")
        assert (reply.status, "--enable-metrics" in reply.json["error"]["message"]) == (501, True)


async def test_engine_metrics_of_an_empty_fleet_are_503() -> None:
    async with control_site(prefill=0, decode=0) as site:
        assert (await site.ask("GET", "/engine_metrics")).status == 503
