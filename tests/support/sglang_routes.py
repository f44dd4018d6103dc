"""SGLang 0.5.23's HTTP routes by their default names: a committed list, and how it was made.

``routes_in(source)`` reads the decorators of a module's text (``@app.get("/x")``,
``@router.post(...)``, ``@app.api_route("/x", methods=[...])``); a name taken from the
environment counts by its default, and ``@auth_level(...)`` means ADMIN. The list is
what it finds in entrypoints/{http_server,v1_loads,elastic_ep}.py of the released
wheel. ``/metrics`` (mounted by add_prometheus_middleware) and FastAPI's own pages
have no decorator and were added by hand.
tests/balancer/api/test_routes.py makes it again from the installed wheel, without importing it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

SOURCES = ("http_server.py", "v1_loads.py", "elastic_ep.py")
NOT_DECORATED = """
GET /metrics
GET /openapi.json
GET /docs
GET /docs/oauth2-redirect
GET /redoc
"""

DECORATED = """
GET /
HEAD /
POST /abort_request ADMIN
POST /add_external_corpus ADMIN
POST /api/chat
POST /api/generate
POST /api/show
GET /api/tags
POST /begin_weight_update ADMIN
POST /classify
PUT /classify
GET /close_session
POST /close_session
GET /configure_logging ADMIN
POST /configure_logging ADMIN
POST /continue_generation ADMIN
POST /destroy_weights_update_group ADMIN
POST /detokenize
GET /dump_expert_distribution_record ADMIN
POST /dump_expert_distribution_record ADMIN
POST /dumper/{method} ADMIN
POST /encode
PUT /encode
POST /end_weight_update ADMIN
GET /flush_cache ADMIN
POST /flush_cache ADMIN
GET /freeze_gc ADMIN
POST /freeze_gc ADMIN
POST /generate
PUT /generate
GET /get_hicache_l3_cache_layout
GET /get_model_info
GET /get_remote_instance_transfer_engine_info ADMIN
GET /get_server_info
GET /get_weights_by_name ADMIN
POST /get_weights_by_name ADMIN
GET /health
GET /health_generate
DELETE /hicache/storage-backend ADMIN
GET /hicache/storage-backend ADMIN
PUT /hicache/storage-backend ADMIN
POST /hicache/storage-backend/clear ADMIN
POST /init_weights_send_group_for_remote_instance ADMIN
POST /init_weights_update_group ADMIN
POST /invocations
GET /is_scaling_elastic_ep ADMIN
GET /list_external_corpora ADMIN
POST /load_lora_adapter ADMIN
POST /load_lora_adapter_from_tensors ADMIN
GET /model_info
GET /open_session
POST /open_session
POST /parse_function_call
POST /pause_generation ADMIN
POST /pd_role_switch ADMIN
GET /ping
GET /ready
GET /release_memory_occupation ADMIN
POST /release_memory_occupation ADMIN
GET /remote_instance_transfer_engine_info ADMIN
POST /remove_external_corpus ADMIN
GET /resume_memory_occupation ADMIN
POST /resume_memory_occupation ADMIN
POST /scale_elastic_ep ADMIN
POST /send_weights_to_remote_instance ADMIN
POST /separate_reasoning
GET /server_info
POST /set_internal_state ADMIN
PUT /set_internal_state ADMIN
GET /set_trace_level ADMIN
POST /set_trace_level ADMIN
GET /slow_down ADMIN
POST /slow_down ADMIN
GET /start_expert_distribution_record ADMIN
POST /start_expert_distribution_record ADMIN
GET /start_profile ADMIN
POST /start_profile ADMIN
GET /stop_expert_distribution_record ADMIN
POST /stop_expert_distribution_record ADMIN
GET /stop_profile ADMIN
POST /stop_profile ADMIN
POST /tokenize
POST /unload_lora_adapter ADMIN
POST /update_weight_version ADMIN
POST /update_weights_from_disk ADMIN
POST /update_weights_from_distributed ADMIN
POST /update_weights_from_ipc ADMIN
POST /update_weights_from_tensor ADMIN
POST /v1/audio/transcriptions
POST /v1/chat/completions
POST /v1/classify
POST /v1/completions
POST /v1/decisions
POST /v1/detokenize
POST /v1/embeddings
GET /v1/loads
POST /v1/messages
POST /v1/messages/count_tokens
GET /v1/models
GET /v1/models/{model:path}
GET /v1/realtime
POST /v1/rerank
PUT /v1/rerank
POST /v1/responses
GET /v1/responses/{response_id}
POST /v1/responses/{response_id}/cancel
POST /v1/score
POST /v1/systemone
POST /v1/tokenize
POST /vertex_generate
GET /weights_checker ADMIN
POST /weights_checker ADMIN
"""


def parsed(text: str) -> set[tuple[str, str, bool]]:
    """(method, path, is admin's) of each line of a list above."""
    rows = (line.split() for line in text.split("\n") if line)
    return {(row[0], row[1], row[2:] == ["ADMIN"]) for row in rows}


def routes_in(source: str) -> Iterator[tuple[str, str, bool]]:
    """(method, path, is admin's) of every decorated endpoint."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
            calls = [call for call in node.decorator_list if isinstance(call, ast.Call)]
            is_admin = any(isinstance(call.func, ast.Name) and call.func.id == "auth_level" for call in calls)
            for call in calls:
                if isinstance(call.func, ast.Attribute):
                    yield from ((*route, is_admin) for route in _routes_of(call.func.attr, call))


def _routes_of(kind: str, call: ast.Call) -> Iterator[tuple[str, str]]:
    methods = {"get": ["GET"], "post": ["POST"], "put": ["PUT"], "delete": ["DELETE"], "head": ["HEAD"]}
    methods["websocket"] = ["GET"]
    if kind == "api_route":
        given = next(keyword.value for keyword in call.keywords if keyword.arg == "methods")
        methods["api_route"] = ast.literal_eval(given)
    path = _path(call.args[0]) if kind in methods and call.args else None
    if path is not None:
        yield from ((method, path) for method in methods[kind])


def _path(node: ast.expr) -> str | None:
    """A literal, or the default of ``os.environ.get(name, default)``."""
    if isinstance(node, ast.Call):
        node = node.args[-1]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
