"""The route table: every path the balancer answers, with its methods, its handler and who may use it.

A request is proxied to a pair, sent to all workers, sent to one, answered here, or refused with a reason.

The paths and methods are SGLang 0.5.23's (all of entrypoints/http_server.py, by
their default names) and sglang-router's. Access is SGLang's own ``auth_level``:
what it calls ADMIN_OPTIONAL is ADMIN here, health and metrics need no key.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from pdserve.balancer.api.auth import ANY_ORIGIN, Access, KeyRing, answer_preflight, cross_origin_lines
from pdserve.balancer.api.errors import route_error
from pdserve.balancer.api.fanout import FanOutControl
from pdserve.balancer.api.forward import ControlRefused, WorkerAsker
from pdserve.balancer.api.health import HealthControl
from pdserve.balancer.api.info import InfoControl
from pdserve.balancer.api.workers import WorkersControl
from pdserve.balancer.fleet import weights
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.balancer.request.request import Route
from pdserve.http.answer import Answer
from pdserve.http.incoming import IncomingRequest

Handler = Callable[[IncomingRequest, bytes], Awaitable[Answer | None]]
"""Takes the request with its body; returns the answer, or None if it has answered itself.

May raise ``ControlRefused``."""

GET, POST = ("GET",), ("POST",)
EITHER = ("GET", "POST")

_PLAIN = (
    "it needs one forward pass and no decode: send it to a plain SGLang server (no --disaggregation-mode)"
)
_SCORE = f"{_PLAIN}, or read logprobs from /generate with return_logprob and max_new_tokens 1"

UNSERVED: dict[str, tuple[tuple[str, ...], str]] = {
    "/encode": (("POST", "PUT"), f"embeddings are not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/embeddings": (("POST",), f"embeddings are not served by prefill/decode pairs; {_PLAIN}"),
    "/classify": (("POST", "PUT"), f"classification is not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/classify": (("POST",), f"classification is not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/score": (("POST",), f"scoring is not served by prefill/decode pairs; {_SCORE}"),
    "/v1/rerank": (("POST", "PUT"), f"reranking is not served by prefill/decode pairs; {_SCORE}"),
    "/v1/decisions": (("POST",), f"decisions are scored, not generated; {_SCORE}"),
    "/v1/systemone": (("POST",), f"decisions are scored, not generated; {_SCORE}"),
    "/v1/audio/transcriptions": (
        ("POST",),
        "transcription requests carry no rendezvous of a prefill/decode pair; send the audio as a content "
        "part of /v1/chat/completions, or to a plain SGLang server",
    ),
    "/v1/realtime": (
        ("GET",),
        "the realtime websocket is not served by prefill/decode pairs; use /v1/chat/completions with "
        "stream, or a plain SGLang server",
    ),
    "/api/chat": (
        ("POST",),
        "Ollama's requests carry no rendezvous of a prefill/decode pair; use /v1/chat/completions",
    ),
    "/api/generate": (
        ("POST",),
        "Ollama's requests carry no rendezvous of a prefill/decode pair; use /generate or /v1/completions",
    ),
}
"""SGLang's routes that a prefill/decode pair cannot serve: path to (methods, what to do instead).

A pair generates text. Embedding, classifying and scoring end with the prefill of a model, so
their place is a plain SGLang server. The Ollama and audio routes generate, but their bodies
have no fields for the pair's rendezvous.
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What happens on one path with one method."""

    handle: Handler
    access: Access
    answers: bool = False
    """True if the handler always answers by itself."""


class RouteMap:
    """The table of paths. ``add`` while it is built, ``find`` from then on."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, Endpoint]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Endpoint]]] = []

    def add(
        self, access: Access, methods: Iterable[str], handle: Handler, *paths: str, answers: bool = False
    ) -> None:
        """Serve paths. ``{id}`` in one stands for one part, ``{id:path}`` for any number of them."""
        endpoint = Endpoint(handle, access, answers)
        for path in paths:
            if path not in self._paths and "{" in path:
                pattern = re.sub(r"\{\w+:path\}", ".+", path)
                pattern = re.sub(r"\{\w+\}", "[^/]+", pattern)
                self._paths[path] = {}
                self._patterns.append((re.compile(pattern, re.DOTALL), self._paths[path]))
            self._paths.setdefault(path, {}).update(dict.fromkeys(methods, endpoint))

    def find(self, path: str) -> Mapping[str, Endpoint] | None:
        """Return what is served there, by method; None if there is no such path."""
        methods = self._paths.get(path)
        if methods is not None and "{" not in path:
            return methods
        return next((methods for pattern, methods in self._patterns if pattern.fullmatch(path)), None)


@dataclass(frozen=True, slots=True)
class DataPlane:
    """What the routes use of the proxy: serving prompts, ending those of a name or all, the books."""

    dispatch: Callable[[Route, bytes, IncomingRequest], Awaitable[None]]
    abort: Callable[[str], list[str]]
    abort_all: Callable[[], None]
    ledger: RequestLedger


def build_routes(
    asker: WorkerAsker, plane: DataPlane, metrics: WorkerMetrics, health: HealthControl
) -> RouteMap:
    """Build the whole table over one fleet.

    Raises:
        ConfigError: if ``worker_hosts`` is malformed.
    """
    routes = RouteMap()
    _add_prompts(routes, plane)
    _add_health(routes, health)
    _add_info(routes, InfoControl(asker, plane.ledger, metrics))
    fan_out = FanOutControl(asker, plane.abort, plane.abort_all)
    _add_fan_outs(routes, fan_out)
    _add_weights(routes, fan_out)
    _add_workers(routes, WorkersControl(asker))
    for path, (methods, _) in UNSERVED.items():
        routes.add(Access.CLIENT, methods, _unserved, path)
    return routes


def _add_prompts(routes: RouteMap, plane: DataPlane) -> None:
    for route in Route:
        methods = ("POST", "PUT") if route is Route.GENERATE else POST
        routes.add(Access.CLIENT, methods, _prompt(plane, route), route, answers=True)


def _add_health(routes: RouteMap, health: HealthControl) -> None:
    public = partial(routes.add, Access.PUBLIC, GET)
    public(health.liveness, "/liveness")
    public(health.readiness, "/health", "/readiness", "/ping")
    public(health.acceptance, "/ready")
    public(health.health_generate, "/health_generate")
    routes.add(Access.ADMIN, GET, health.state, "/pdserve/state")


def _add_info(routes: RouteMap, info: InfoControl) -> None:
    routes.add(Access.PUBLIC, GET, info.metrics, "/metrics")
    routes.add(Access.PUBLIC, GET, info.own_metrics, "/pdserve/metrics")
    routes.add(Access.PUBLIC, GET, info.engine_metrics, "/engine_metrics")
    client = partial(routes.add, Access.CLIENT)
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
    routes.add(Access.ADMIN, EITHER, info.any_worker, "/get_weights_by_name")


def _add_fan_outs(routes: RouteMap, control: FanOutControl) -> None:
    admin = partial(routes.add, Access.ADMIN)
    admin(EITHER, control.flush_cache, "/flush_cache")
    admin(POST, control.abort_request, "/abort_request")
    admin(POST, control.pause, "/pause_generation")
    admin(POST, control.go_on, "/continue_generation")
    admin(("POST", "PUT"), control.fan_out, "/set_internal_state")
    admin(EITHER, control.fan_out, "/configure_logging", "/set_trace_level", "/freeze_gc", "/slow_down")
    admin(POST, control.fan_out, "/add_external_corpus", "/remove_external_corpus")
    admin(GET, control.fan_out, "/list_external_corpora", "/is_scaling_elastic_ep")
    admin(("PUT", "DELETE", "GET"), control.fan_out_slow, "/hicache/storage-backend")
    admin(POST, control.fan_out_slow, "/hicache/storage-backend/clear")
    admin(POST, control.fan_out_slow, "/scale_elastic_ep", "/dumper/{method}")
    admin(EITHER, control.fan_out_slow, "/start_profile", "/stop_profile")
    admin(EITHER, control.fan_out_slow, "/start_expert_distribution_record")
    admin(EITHER, control.fan_out_slow, "/stop_expert_distribution_record")
    admin(EITHER, control.fan_out_slow, "/dump_expert_distribution_record")
    admin(EITHER, control.fan_out_slow, "/resume_memory_occupation")
    admin(EITHER, control.release_memory, "/release_memory_occupation")
    admin(POST, control.one_worker, "/pd_role_switch")
    # Sessions are the client's own: SGLang asks for no admin key either.
    routes.add(Access.CLIENT, EITHER, control.open_session, "/open_session")
    routes.add(Access.CLIENT, EITHER, control.fan_out, "/close_session")


def _add_weights(routes: RouteMap, control: FanOutControl) -> None:
    admin = partial(routes.add, Access.ADMIN)
    admin(POST, control.change_weights, *weights.ROUTES)
    admin(POST, control.fan_out_slow, "/begin_weight_update", "/end_weight_update")
    admin(POST, control.init_weights_update_group, "/init_weights_update_group")
    admin(POST, control.fan_out_slow, "/destroy_weights_update_group")
    admin(EITHER, control.fan_out_slow, "/weights_checker")
    admin(POST, control.one_worker, "/init_weights_send_group_for_remote_instance")
    admin(POST, control.one_worker, "/send_weights_to_remote_instance")
    admin(GET, control.one_worker, "/remote_instance_transfer_engine_info")
    admin(GET, control.one_worker, "/get_remote_instance_transfer_engine_info")


def _add_workers(routes: RouteMap, workers: WorkersControl) -> None:
    admin = partial(routes.add, Access.ADMIN)
    admin(GET, workers.list_all, "/workers")
    admin(POST, workers.add, "/workers")
    admin(GET, workers.show, "/workers/{id:path}")
    admin(("PUT", "PATCH"), workers.change, "/workers/{id:path}")
    admin(("DELETE",), workers.remove, "/workers/{id:path}")
    admin(POST, workers.add_by_query, "/add_worker")
    admin(POST, workers.remove_by_query, "/remove_worker")
    admin(GET, workers.list_urls, "/list_workers")


def _prompt(plane: DataPlane, route: Route) -> Handler:
    dispatch = plane.dispatch  # the dispatcher's own coroutine: no other around it on the busiest path
    return lambda client, body: dispatch(route, body, client)


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
        if b"origin" in client.headers and (answer := self._cross_origin(client, methods or {})):
            return answer
        if methods is None:
            return route_error(client.path, 404, f"there is no {client.path} here")
        endpoint = methods.get(client.method) or _as_get(methods, client.method)
        if endpoint is None:
            allowed = ", ".join(methods)
            answer = route_error(client.path, 405, f"{client.path} takes {allowed}, not {client.method}")
            return answer.with_headers((b"allow", allowed.encode()))
        client.endpoint = endpoint
        return self._keys.refuse(endpoint.access, client.headers)

    def error(self, client: IncomingRequest | None, status: int, message: str) -> Answer:
        """An error of HTTP itself."""
        if client is None:
            return route_error("", status, message).with_headers(*ANY_ORIGIN)
        return route_error(client.path, status, message)

    def serve(self, client: IncomingRequest) -> Awaitable[object]:
        """Answer one request."""
        endpoint: Endpoint = client.endpoint
        handling = endpoint.handle(client, client.body)
        return handling if endpoint.answers else _answered(client, handling)

    def _cross_origin(self, client: IncomingRequest, methods: Mapping[str, Endpoint]) -> Answer | None:
        """Let the page read whatever the answer will be; the answer itself, if a browser asks beforehand."""
        if not all(self._keys.lets_pages_ask(endpoint.access) for endpoint in methods.values()):
            return None
        client.lines = cross_origin_lines(client.headers[b"origin"])
        return answer_preflight(client.method, client.headers)


async def _answered(client: IncomingRequest, handling: Awaitable[Answer | None]) -> None:
    try:
        answer = await handling
    except ControlRefused as exc:
        answer = exc.answer or route_error(client.path, exc.status, str(exc))
    if answer is not None:
        await client.answer(answer)


def _as_get(methods: Mapping[str, Endpoint], method: str) -> Endpoint | None:
    return methods.get("GET") if method == "HEAD" else None
