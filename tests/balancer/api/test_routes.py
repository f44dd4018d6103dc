"""Every route of SGLang is answered, with its methods and its access; nothing is a surprise."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from pdserve.balancer.api.auth import Access
from pdserve.balancer.api.forward import WorkerAsker
from pdserve.balancer.api.health import HealthControl
from pdserve.balancer.api.routes import UNSERVED, DataPlane, Endpoint, RouteMap, build_routes
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.balancer.proxy.dispatcher import PairDispatcher
from pdserve.balancer.request.request import Route
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.http.client import HttpClient
from tests.support.control_worker import control_site
from tests.support.sglang_routes import DECORATED, NOT_DECORATED, SOURCES, parsed, routes_in

OF_SGLANG = sorted(parsed(DECORATED) | parsed(NOT_DECORATED))
OF_ROUTER = [
    *(("GET", path) for path in ("/liveness", "/readiness", "/get_loads", "/engine_metrics", "/workers")),
    *((method, "/workers/prefill-0") for method in ("GET", "PUT", "PATCH", "DELETE")),
    *(("POST", path) for path in ("/workers", "/add_worker", "/remove_worker")),
    *(("GET", path) for path in ("/list_workers", "/pdserve/state")),
]
PUBLIC = {"/health", "/health_generate", "/ready", "/ping", "/metrics"}
"""What SGLang leaves open, and /ping, which SageMaker asks without a key."""


def built(config: BalancerConfig) -> RouteMap:
    pool = HttpClient()
    fleet = WorkerFleet(config, pool)
    dispatcher = PairDispatcher(config, fleet, pool)
    plane = DataPlane(dispatcher.dispatch, dispatcher.abort, dispatcher.abort_all, dispatcher.ledger)
    asker, metrics = WorkerAsker(fleet, pool, config), WorkerMetrics()
    return build_routes(asker, plane, metrics, HealthControl(asker, dispatcher.ledger, metrics))


@pytest.fixture
async def routes() -> RouteMap:
    return built(BalancerConfig())


def endpoint_of(routes: RouteMap, method: str, path: str) -> Endpoint | None:
    filled = (
        path.replace("{model:path}", "a/b").replace("{response_id}", "resp_1").replace("{method}", "dump")
    )
    methods = routes.find(filled)
    return (methods or {}).get("GET" if method == "HEAD" else method)


def test_the_committed_list_is_that_of_the_installed_wheel() -> None:
    try:
        wheel = distribution("sglang")
    except PackageNotFoundError:
        pytest.skip("sglang is not installed")
    folder = Path(str(wheel.locate_file("sglang/srt/entrypoints")))
    found = {route for name in SOURCES for route in routes_in((folder / name).read_text())}
    assert found == parsed(DECORATED)


async def test_every_route_of_sglang_is_answered_with_its_access(routes: RouteMap) -> None:
    misses = []
    for method, path, is_admin in OF_SGLANG:
        endpoint = endpoint_of(routes, method, path)
        wanted = Access.ADMIN if is_admin else Access.PUBLIC if path in PUBLIC else Access.CLIENT
        if endpoint is None or endpoint.access is not wanted:
            misses.append((method, path, wanted, endpoint))
    assert not misses


async def test_every_route_of_the_router_is_answered(routes: RouteMap) -> None:
    assert not [row for row in OF_ROUTER if endpoint_of(routes, *row) is None]


async def test_no_method_beyond_sglangs(routes: RouteMap) -> None:
    """A method that SGLang does not take would be answered 405 by it, and so here."""
    theirs = {(method, path) for method, path, _ in OF_SGLANG}
    for path in {path for _, path in theirs} - {"/"}:
        methods = routes.find(path.replace("{response_id}", "x").replace("{method}", "x")) or {}
        assert {(method, path) for method in methods} <= theirs, path


async def test_every_prompt_route_is_a_clients(routes: RouteMap) -> None:
    for route in Route:
        endpoint = endpoint_of(routes, "POST", route)
        assert endpoint is not None
        assert endpoint.access is Access.CLIENT


async def test_near_misses_are_no_paths(routes: RouteMap) -> None:
    paths = (
        *("/workers/", "/v1/responses/", "/v1/responses/a/b", "/v1/responses//cancel", "/dumper/"),
        *("/dumper/a/b", "/generate/", "/v1/models/", "", "//", "/v1/responses/{id}x/cancel/"),
    )
    assert not [path for path in paths if routes.find(path) is not None]
    assert routes.find("/workers/{id:path}") is routes.find("/workers/x")  # a worker of an odd name


async def test_bad_worker_hosts_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"worker_hosts.*10\.0\.0\.0/40"):
        built(BalancerConfig(worker_hosts=("10.0.0.0/40",)))


async def test_what_a_pair_cannot_serve_is_501_with_what_to_do() -> None:
    async with control_site(prefill=0, decode=0) as site:
        for path, ((method, *_), _) in UNSERVED.items():
            reply = await site.ask(method, path, {} if method == "POST" else None)
            assert reply.status == 501, path
            message = reply.json["message"] if path.startswith("/v1/") else reply.json["error"]["message"]
            assert "plain SGLang server" in message or "use /" in message, path


async def test_keys_open_what_they_are_for() -> None:
    async with control_site(api_key="client", admin_api_key="admin") as site:
        control = [(path, 401, 200) for path in ("/workers", "/flush_cache", "/pdserve/state")]
        for path, client, admin in [("/liveness", 200, 200), ("/v1/models", 200, 401), *control]:
            for key, status in (("client", client), ("admin", admin)):
                reply = await site.ask("GET", path, authorization=f"Bearer {key}")
                assert reply.status == status, (path, key)
        assert (await site.ask("GET", "/workers")).status == 401
