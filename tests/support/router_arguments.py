"""The flags of sglang_router 0.3.2 (name and argparse nargs; 0: a switch), and how the list was made.

``arguments_in(source)`` reads the ``add_argument`` calls of sglang_router/router_args.py
in the released wheel, without its ``--router-`` prefix. The wheel is no dependency.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

ARGUMENTS = """
--api-key 1
--assignment-mode 1
--backend 1
--balance-abs-threshold 1
--balance-rel-threshold 1
--bucket-adjust-interval-secs 1
--ca-cert-paths *
--cache-threshold 1
--cb-failure-threshold 1
--cb-success-threshold 1
--cb-timeout-duration-secs 1
--cb-window-duration-secs 1
--chat-template 1
--client-cert-path 1
--client-key-path 1
--control-plane-api-keys *
--control-plane-audit-enabled 0
--cors-allowed-origins *
--decode 1
--decode-policy 1
--decode-selector +
--disable-circuit-breaker 0
--disable-health-check 0
--disable-retries 0
--dp-aware 0
--enable-igw 0
--enable-trace 0
--eviction-interval-secs 1
--health-check-endpoint 1
--health-check-interval-secs 1
--health-check-timeout-secs 1
--health-failure-threshold 1
--health-success-threshold 1
--history-backend 1
--host 1
--jwt-audience 1
--jwt-issuer 1
--jwt-jwks-uri 1
--jwt-role-mapping *
--log-dir 1
--log-level 1
--max-concurrent-requests 1
--max-idle-secs 1
--max-payload-size 1
--max-tree-size 1
--mcp-config-path 1
--mini-lb 0
--model-path 1
--oracle-connect-descriptor 1
--oracle-password 1
--oracle-pool-max 1
--oracle-pool-min 1
--oracle-pool-timeout-secs 1
--oracle-tns-alias 1
--oracle-username 1
--oracle-wallet-path 1
--otlp-traces-endpoint 1
--pd-disaggregation 0
--policy 1
--port 1
--postgres-db-url 1
--postgres-pool-max 1
--prefill +
--prefill-policy 1
--prefill-selector +
--prometheus-duration-buckets +
--prometheus-host 1
--prometheus-port 1
--queue-size 1
--queue-timeout-secs 1
--rate-limit-tokens-per-second 1
--reasoning-parser 1
--redis-pool-max 1
--redis-retention-days 1
--redis-url 1
--request-id-headers *
--request-timeout-secs 1
--retry-backoff-multiplier 1
--retry-initial-backoff-ms 1
--retry-jitter-factor 1
--retry-max-backoff-ms 1
--retry-max-retries 1
--selector +
--service-discovery 0
--service-discovery-namespace 1
--service-discovery-port 1
--shutdown-grace-period-secs 1
--tls-cert-path 1
--tls-key-path 1
--tokenizer-cache-enable-l0 0
--tokenizer-cache-enable-l1 0
--tokenizer-cache-l0-max-entries 1
--tokenizer-cache-l1-max-memory 1
--tokenizer-path 1
--tool-call-parser 1
--worker-startup-check-interval 1
--worker-startup-timeout-secs 1
--worker-urls *
"""


def parsed() -> dict[str, str]:
    """Name to nargs."""
    return {name: nargs for name, nargs in (line.split() for line in ARGUMENTS.split("\n") if line)}


def arguments_in(source: str) -> Iterator[tuple[str, str]]:
    """(name, nargs) of every flag."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            given = {keyword.arg: ast.unparse(keyword.value).strip("'") for keyword in node.keywords}
            nargs = "0" if given.get("action") == "store_true" else given.get("nargs", "1")
            yield _name(node.args[0]), nargs


def _name(node: ast.expr) -> str:
    """A literal, or an f-string without what is put in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
