"""Every path the balancer answers: what it does there and who may ask. Read once at start, asked per request.

    proxied to a pair · told to all workers · asked of one · answered here · refused with a reason

The paths and methods are SGLang 0.5.23's (all of entrypoints/http_server.py, by
their default names) and sglang-router's. Access is SGLang's own ``auth_level``:
what it calls ADMIN_OPTIONAL is ADMIN here, health and metrics need no key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pdserve.balancer.api.auth import Access, KeyRing
from pdserve.balancer.api.errors import route_error
from pdserve.balancer.api.fanout import FanOutControl
from pdserve.balancer.api.forward import ControlRefused, WorkerAsker
from pdserve.balancer.api.health import DataPlane, HealthControl
from pdserve.balancer.api.info import InfoControl
from pdserve.balancer.api.unserved import UNSERVED
from pdserve.balancer.api.workers import WorkersControl
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.balancer.request.request import Route
from pdserve.config.balancer import BalancerConfig
from pdserve.http.answer import Answer
from pdserve.http.client import HttpClient
from pdserve.http.incoming import IncomingRequest

Handler = Callable[[IncomingRequest, bytes], Awaitable[Answer | None]]
"""Takes the request with its body; returns the answer, or None if it has answered itself."""

GET, POST = ("GET",), ("POST",)
EITHER = ("GET", "POST")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What happens on one path with one method."""

    handle: Handler
    access: Access
    answers: bool = False
    """True if the handler always answers by itself."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    """``prefix + something + suffix``; only a deep one's something may have slashes."""

    prefix: str
    suffix: str
    is_deep: bool
    methods: Mapping[str, Endpoint]

    def matches(self, path: str) -> bool:
        if not (path.startswith(self.prefix) and path.endswith(self.suffix)):
            return False
        middle = path[len(self.prefix) : len(path) - len(self.suffix)]
        return bool(middle) and (self.is_deep or "/" not in middle)


class RouteMap:
    """The table of paths. ``add`` while it is built, ``find`` from then on."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, Endpoint]] = {}
        self._patterns: list[_Pattern] = []

    def add(
        self, path: str, methods: Iterable[str], handle: Handler, access: Access, *, answers: bool = False
    ) -> None:
        """Serve a path. ``{id}`` in it stands for one part, ``{id:path}`` for any number of them."""
        endpoints = {method: Endpoint(handle, access, answers) for method in methods}
        if path in self._paths:
            self._paths[path].update(endpoints)
            return
        self._paths[path] = endpoints
        if "{" in path:
            prefix, _, rest = path.partition("{")
            name, _, suffix = rest.partition("}")
            self._patterns.append(_Pattern(prefix, suffix, ":" in name, self._paths[path]))

    def find(self, path: str) -> Mapping[str, Endpoint] | None:
        """What is served there, by method; None if there is no such path."""
        methods = self._paths.get(path)
        if methods is not None and "{" not in path:
            return methods
        return next((pattern.methods for pattern in self._patterns if pattern.matches(path)), None)


class Dispatcher(DataPlane, Protocol):
    """What is asked of the data plane besides."""

    async def dispatch(self, route: Route, body: bytes, client: IncomingRequest) -> None:
        """Serve a prompt by some pair."""
        ...


class _Table:
    """A surface under construction: control handlers may raise ``ControlRefused``."""

    def __init__(self) -> None:
        self.routes = RouteMap()

    def add(self, access: Access, methods: Iterable[str], handle: Handler, *paths: str) -> None:
        for path in paths:
            self.routes.add(path, methods, partial(_guarded, handle), access)


def build_routes(
    fleet: WorkerFleet,
    pool: HttpClient,
    dispatcher: Dispatcher,
    metrics: WorkerMetrics,
    config: BalancerConfig,
) -> RouteMap:
    """The whole surface over one fleet.

    Raises:
        ConfigError: if ``worker_hosts`` is malformed.
    """
    table = _Table()
    asker = WorkerAsker(fleet, pool, config)
    health = HealthControl(asker, dispatcher, metrics)
    _add_prompts(table.routes, dispatcher)
    _add_health(table, health)
    _add_info(table, InfoControl(asker, dispatcher, metrics))
    _add_fan_outs(table, FanOutControl(asker, health, dispatcher))
    _add_workers(table, WorkersControl(asker))
    for path, (methods, _) in UNSERVED.items():
        table.add(Access.CLIENT, methods, _unserved, path)
    return table.routes


def _add_prompts(routes: RouteMap, dispatcher: Dispatcher) -> None:
    for route in Route:
        methods = ("POST", "PUT") if route is Route.GENERATE else POST
        routes.add(route, methods, _prompt(dispatcher, route), Access.CLIENT, answers=True)


def _add_health(table: _Table, health: HealthControl) -> None:
    public = partial(table.add, Access.PUBLIC, GET)
    public(health.liveness, "/liveness")
    public(health.readiness, "/health", "/readiness", "/ping")
    public(health.acceptance, "/ready")
    public(health.health_generate, "/health_generate")
    table.add(Access.ADMIN, GET, health.state, "/pdserve/state")


def _add_info(table: _Table, info: InfoControl) -> None:
    table.add(Access.PUBLIC, GET, info.metrics, "/metrics")
    table.add(Access.PUBLIC, GET, info.own_metrics, "/pdserve/metrics")
    table.add(Access.PUBLIC, GET, info.engine_metrics, "/engine_metrics")
    client = partial(table.add, Access.CLIENT)
    client(GET, info.server_info, "/server_info", "/get_server_info")
    client(GET, info.loads, "/v1/loads", "/get_loads")
    client(GET, info.any_worker, "/v1/responses/{id}")
    client(POST, info.any_worker, "/v1/responses/{id}/cancel")
    client(GET, info.any_worker, "/v1/models", "/v1/models/{model:path}", "/model_info", "/get_model_info")
    client(GET, info.any_worker, "/", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")
    client(GET, info.any_worker, "/api/tags", "/get_hicache_l3_cache_layout")
    client(POST, info.any_worker, "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize")
    client(POST, info.any_worker, "/parse_function_call", "/separate_reasoning")
    client(POST, info.any_worker, "/v1/messages/count_tokens", "/api/show")
    table.add(Access.ADMIN, EITHER, info.any_worker, "/get_weights_by_name")


def _add_fan_outs(table: _Table, control: FanOutControl) -> None:
    admin = partial(table.add, Access.ADMIN)
    admin(EITHER, control.flush_cache, "/flush_cache")
    admin(POST, control.abort_request, "/abort_request")
    admin(POST, control.pause, "/pause_generation")
    admin(POST, control.go_on, "/continue_generation")
    admin(("POST", "PUT"), control.fan_out, "/set_internal_state")
    admin(EITHER, control.fan_out, "/configure_logging", "/set_trace_level", "/freeze_gc", "/slow_down")
    admin(POST, control.fan_out, "/update_weight_version", "/add_external_corpus", "/remove_external_corpus")
    admin(GET, control.fan_out, "/list_external_corpora", "/is_scaling_elastic_ep")
    admin(("PUT", "DELETE", "GET"), control.fan_out_slow, "/hicache/storage-backend")
    admin(
        POST, control.fan_out_slow, "/hicache/storage-backend/clear", "/scale_elastic_ep", "/dumper/{method}"
    )
    admin(EITHER, control.fan_out_slow, "/start_profile", "/stop_profile")
    record = "expert_distribution_record"
    admin(EITHER, control.fan_out_slow, f"/start_{record}", f"/stop_{record}", f"/dump_{record}")
    update = "/update_weights_from_"
    admin(
        POST, control.fan_out_slow, *(update + source for source in ("disk", "tensor", "distributed", "ipc"))
    )
    admin(POST, control.fan_out_slow, "/begin_weight_update", "/end_weight_update")
    admin(POST, control.init_weights_update_group, "/init_weights_update_group")
    admin(POST, control.fan_out_slow, "/destroy_weights_update_group")
    admin(EITHER, control.fan_out_slow, "/weights_checker", "/resume_memory_occupation")
    admin(EITHER, control.release_memory, "/release_memory_occupation")
    admin(POST, control.fan_out_slow, "/load_lora_adapter", "/load_lora_adapter_from_tensors")
    admin(POST, control.fan_out_slow, "/unload_lora_adapter")
    admin(POST, control.one_worker, "/pd_role_switch")
    admin(POST, control.one_worker, "/init_weights_send_group_for_remote_instance")
    admin(POST, control.one_worker, "/send_weights_to_remote_instance")
    engine_info = "remote_instance_transfer_engine_info"
    admin(GET, control.one_worker, f"/{engine_info}", f"/get_{engine_info}")
    # Sessions are the client's own: SGLang asks for no admin key either.
    table.add(Access.CLIENT, EITHER, control.open_session, "/open_session")
    table.add(Access.CLIENT, EITHER, control.fan_out, "/close_session")


def _add_workers(table: _Table, workers: WorkersControl) -> None:
    admin = partial(table.add, Access.ADMIN)
    admin(GET, workers.list_all, "/workers")
    admin(POST, workers.add, "/workers")
    admin(GET, workers.show, "/workers/{id:path}")
    admin(("PUT", "PATCH"), workers.change, "/workers/{id:path}")
    admin(("DELETE",), workers.remove, "/workers/{id:path}")
    admin(POST, workers.add_by_query, "/add_worker")
    admin(POST, workers.remove_by_query, "/remove_worker")
    admin(GET, workers.list_urls, "/list_workers")


def _prompt(dispatcher: Dispatcher, route: Route) -> Handler:
    dispatch = dispatcher.dispatch  # the dispatcher's own coroutine: no other around it on the busiest path
    return lambda client, body: dispatch(route, body, client)


async def _guarded(handle: Handler, client: IncomingRequest, body: bytes) -> Answer | None:
    try:
        return await handle(client, body)
    except ControlRefused as exc:
        return exc.answer or route_error(client.path, exc.status, str(exc))


async def _unserved(client: IncomingRequest, body: bytes) -> Answer:
    return route_error(client.path, 501, UNSERVED[client.path][1])


class BalancerApi:
    """What ``HttpServer`` asks: ``refuse`` at the head of a request, ``serve`` once it is whole."""

    def __init__(self, routes: RouteMap, keys: KeyRing) -> None:
        self._routes = routes
        self._keys = keys

    def refuse(self, client: IncomingRequest) -> Answer | None:
        """An error if the path, the method or the key is wrong; nobody's body is read for nothing."""
        methods = self._routes.find(client.path)
        if methods is None:
            return route_error(client.path, 404, f"there is no {client.path} here")
        if b"origin" in client.headers and (answer := _cross_origin(client, methods)):
            return answer
        endpoint = methods.get(client.method) or _as_get(methods, client.method)
        if endpoint is None:
            allowed = ", ".join(methods)
            answer = route_error(client.path, 405, f"{client.path} takes {allowed}, not {client.method}")
            return answer.with_headers((b"allow", allowed.encode()))
        client.endpoint = endpoint
        return self._keys.refuse(endpoint.access, client.headers)

    def error(self, path: str, status: int, message: str) -> Answer:
        """An error of HTTP itself."""
        return route_error(path, status, message)

    def serve(self, client: IncomingRequest) -> Awaitable[object]:
        """Answer one request."""
        endpoint: Endpoint = client.endpoint
        handling = endpoint.handle(client, client.body)
        return handling if endpoint.answers else _answered(client, handling)


async def _answered(client: IncomingRequest, handling: Awaitable[Answer | None]) -> None:
    answer = await handling
    if answer is not None:
        await client.answer(answer)


def _cross_origin(client: IncomingRequest, methods: Mapping[str, Endpoint]) -> Answer | None:
    """Let web pages ask what clients may, as SGLang does, and no control route; the answer to a preflight."""
    if any(endpoint.access is Access.ADMIN for endpoint in methods.values()):
        return None
    client.lines = b"access-control-allow-origin: *\r\n"
    if client.method != "OPTIONS" or b"access-control-request-method" not in client.headers:
        return None
    wanted = client.headers.get(b"access-control-request-headers", b"*")
    allowed = (
        (b"access-control-allow-methods", ", ".join(methods).encode()),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", b"600"),
    )
    return Answer(200, b"", allowed)


def _as_get(methods: Mapping[str, Endpoint], method: str) -> Endpoint | None:
    return methods.get("GET") if method == "HEAD" else None
