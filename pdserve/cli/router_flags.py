"""The flags of ``python -m sglang_router.launch_router`` 0.3.2 and what each is to ``pdserve balance``.

A flag is one of ours under another name (``field``), or accepted without effect
(``note`` says why), or refused (``refusal``) because to ignore it would leave the
user less protected, or served by less, than asked for. Flags that cli/options.py
declares under the same name are not here; cli/router_flags.py reads the table. Pure data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RouterFlag:
    """One flag. ``nargs`` as argparse has it: ``"0"`` a switch, ``"1"``, ``"*"`` or ``"+"``."""

    nargs: str = "1"
    field: str = ""
    read: Callable[[str], Any] = str
    """Makes the setting of one value."""
    note: str = ""
    refusal: str = ""
    default: str = ""
    """The value that asks for nothing: neither noted nor refused."""
    needs: str = ""
    """The switch without which it has no effect."""

    @property
    def why_ignored(self) -> str:
        """Why it is without effect, when it is."""
        return self.note or (f"only {self.needs} uses it" if self.needs else "")


def _note(text: str, nargs: str = "1", default: str = "") -> RouterFlag:
    return RouterFlag(nargs, note=text, default=default)


def _refuse(text: str, nargs: str = "1", default: str = "") -> RouterFlag:
    return RouterFlag(nargs, refusal=text, default=default)


def _otlp_http(address: str) -> str:
    """``host:port`` of a collector as sglang-router has it, for gRPC, as the address of its OTLP/HTTP."""
    url = address if "://" in address else f"http://{address}"
    return url.removesuffix("/").removesuffix(":4317") + ":4318" if url.endswith((":4317", ":4317/")) else url


ROUTER_DEFAULTS: dict[str, Any] = {
    "host": "0.0.0.0",
    "port": 30000,
    "policy": "cache_aware",
    "cache_threshold": 0.3,
    "balance_abs_threshold": 64,
    "balance_rel_threshold": 1.5,
    "max_tree_size": 2**26,
    "max_body_bytes": 512 * 2**20,
    "request_s": 1800.0,
    "drain_s": 180.0,
    "max_concurrent_requests": 0,
    "queue_size": 100,
    "queue_timeout_s": 60.0,
    "max_retries": 5,
    "breaker_failures": 10,
    "request_id_headers": ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
    "log_level": "info",
}
"""With ``--pd-disaggregation`` these stand in for pdserve's own defaults."""

_MODEL = "the workers tokenize and parse; start them with it"
_HISTORY = "conversations are not stored here"
_RETRY = "a retry goes to another pair at once"
_BREAKER = "a worker comes back when it answers and a token came through one of its pairs"
_HEALTH = "readiness is a real token through each pair"
_METRICS = "metrics are at /metrics on the balancer's own port"
_POLICY = "no policy here uses it"
_K8S = "only --service-discovery uses it"
_NO_K8S = "workers join through --bootstrap or POST /workers"
_KEYS = "control routes have one key: give it by PDSERVE_ADMIN_API_KEY or --admin-api-key"
_MTLS = "connections to workers have no client certificates or own authorities; use a network you trust"

ROUTER_FLAGS: dict[str, RouterFlag] = {
    # what it balances
    "--worker-urls": _refuse("only prefill/decode pairs are served: give --prefill and --decode", "*"),
    "--mini-lb": _note("pdserve's balancer serves in its place", "0"),
    "--enable-igw": _refuse("one balancer serves one model; start one for each", "0"),
    "--backend": _refuse("the workers must be SGLang servers", default="sglang"),
    "--dp-aware": _note("SGLang takes the data-parallel rank from the request's room", "0"),
    # routing
    "--eviction-interval-secs": _note("what is remembered is bounded at each insertion"),
    "--max-tree-size": RouterFlag(field="max_tree_size", read=int),
    "--bucket-adjust-interval-secs": _note(_POLICY),
    "--max-idle-secs": _note(_POLICY),
    "--assignment-mode": _note(_POLICY),
    # limits
    "--max-payload-size": RouterFlag(field="max_body_bytes", read=int),
    "--request-timeout-secs": RouterFlag(field="request_s", read=float),
    "--request-id-headers": RouterFlag("*", "request_id_headers", str.lower),
    "--shutdown-grace-period-secs": RouterFlag(field="drain_s", read=float),
    "--max-concurrent-requests": RouterFlag(
        field="max_concurrent_requests", read=lambda text: max(0, int(text))
    ),
    "--queue-timeout-secs": RouterFlag(field="queue_timeout_s", read=float),
    "--rate-limit-tokens-per-second": _note("requests are limited by --max-concurrent-requests"),
    "--cors-allowed-origins": _note("browsers of other origins are not admitted", "*"),
    "--worker-startup-timeout-secs": _note("a worker may come up at any time"),
    "--worker-startup-check-interval": _note("a worker may come up at any time"),
    # retries and failures
    "--retry-max-retries": RouterFlag(field="max_retries", read=int),
    "--disable-retries": RouterFlag("0", "max_retries", lambda _: 0),
    "--retry-initial-backoff-ms": _note(_RETRY),
    "--retry-max-backoff-ms": _note(_RETRY),
    "--retry-backoff-multiplier": _note(_RETRY),
    "--retry-jitter-factor": _note(_RETRY),
    "--cb-failure-threshold": RouterFlag(field="breaker_failures", read=int),
    "--cb-success-threshold": _note(_BREAKER),
    "--cb-timeout-duration-secs": _note(_BREAKER),
    "--cb-window-duration-secs": _note(_BREAKER),
    "--disable-circuit-breaker": _note(_BREAKER, "0"),
    "--health-failure-threshold": _note(_HEALTH),
    "--health-success-threshold": _note(_HEALTH),
    "--health-check-timeout-secs": _note(_HEALTH),
    "--health-check-interval-secs": _note(_HEALTH),
    "--health-check-endpoint": _note(_HEALTH),
    "--disable-health-check": _note(_HEALTH, "0"),
    # Kubernetes
    "--service-discovery": _refuse(_NO_K8S, "0"),
    "--selector": _note(_K8S, "+"),
    "--service-discovery-port": _note(_K8S),
    "--service-discovery-namespace": _note(_K8S),
    "--prefill-selector": _note(_K8S, "+"),
    "--decode-selector": _note(_K8S, "+"),
    # what it tells
    "--log-dir": _note("the log goes to stderr"),
    "--prometheus-port": _note(_METRICS),
    "--prometheus-host": _note(_METRICS),
    "--prometheus-duration-buckets": _note(_METRICS, "+"),
    "--enable-trace": RouterFlag("0", "otlp_endpoint", lambda _: _otlp_http("localhost:4317")),
    "--otlp-traces-endpoint": RouterFlag(field="otlp_endpoint", read=_otlp_http, needs="--enable-trace"),
    # models
    "--model-path": _note(_MODEL),
    "--tokenizer-path": _note(_MODEL),
    "--chat-template": _note(_MODEL),
    "--tokenizer-cache-enable-l0": _note(_MODEL, "0"),
    "--tokenizer-cache-l0-max-entries": _note(_MODEL),
    "--tokenizer-cache-enable-l1": _note(_MODEL, "0"),
    "--tokenizer-cache-l1-max-memory": _note(_MODEL),
    "--reasoning-parser": _note(_MODEL),
    "--tool-call-parser": _note(_MODEL),
    "--mcp-config-path": _note("tools are the client's to call"),
    "--history-backend": _note(_HISTORY, default="none"),
    "--oracle-wallet-path": _note(_HISTORY),
    "--oracle-tns-alias": _note(_HISTORY),
    "--oracle-connect-descriptor": _note(_HISTORY),
    "--oracle-username": _note(_HISTORY),
    "--oracle-password": _note(_HISTORY),
    "--oracle-pool-min": _note(_HISTORY),
    "--oracle-pool-max": _note(_HISTORY),
    "--oracle-pool-timeout-secs": _note(_HISTORY),
    "--postgres-db-url": _note(_HISTORY),
    "--postgres-pool-max": _note(_HISTORY),
    "--redis-url": _note(_HISTORY),
    "--redis-pool-max": _note(_HISTORY),
    "--redis-retention-days": _note(_HISTORY),
    # security
    "--client-cert-path": _refuse(_MTLS),
    "--client-key-path": _refuse(_MTLS),
    "--ca-cert-paths": _refuse(_MTLS, "*"),
    "--control-plane-api-keys": _refuse(_KEYS, "*"),
    "--control-plane-audit-enabled": _refuse("there is no audit log", "0"),
    "--jwt-issuer": _refuse(_KEYS),
    "--jwt-audience": _refuse(_KEYS),
    "--jwt-jwks-uri": _refuse(_KEYS),
    "--jwt-role-mapping": _refuse(_KEYS, "*"),
}


@dataclass(slots=True)
class RouterOptions:
    """What sglang-router's flags came to. ``ignored`` are those without effect, in order, each once."""

    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """One line on the flags without effect; empty if there are none. Never a value: some are secrets."""
        reasons: dict[str, list[str]] = {}
        for name in self.ignored:
            reasons.setdefault(ROUTER_FLAGS[name].why_ignored, []).append(name)
        told = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        return f"note: accepted without effect: {told}" if told else ""


def take_router_flags(argv: Sequence[str]) -> tuple[list[str], RouterOptions]:
    """The arguments without sglang-router's own flags, and what those say.

    Raises:
        ConfigError: for a flag that is refused, without its value or with a wrong one.
    """
    rest: list[str] = []
    options = RouterOptions()
    dependent: list[tuple[str, RouterFlag, list[str]]] = []
    at = 0
    while at < len(argv):
        name, equals, given = argv[at].partition("=")
        at += 1
        flag = ROUTER_FLAGS.get(name)
        if flag is None:
            rest.append(argv[at - 1])
            continue
        values = [given] if equals else _values(flag, argv[at:])
        at += 0 if equals else len(values)
        if flag.needs:
            dependent.append((name, flag, values))
        else:
            _apply(name, flag, values, options)
    for name, flag, values in dependent:  # they win over what their switch sets
        _apply(name, flag if flag.needs in argv else replace(flag, field=""), values, options)
    return rest, options


def _values(flag: RouterFlag, following: Sequence[str]) -> list[str]:
    """The values of a flag as argparse reads them: a negative number is a value, another dash ends them."""
    wanted = {"0": 0, "1": 1}.get(flag.nargs, len(following))
    values: list[str] = []
    for text in following[:wanted]:
        if text.startswith("-") and not _is_number(text):
            break
        values.append(text)
    return values


def _apply(name: str, flag: RouterFlag, values: list[str], options: RouterOptions) -> None:
    if flag.nargs in "1+" and not values:
        raise ConfigError(f"{name} needs a value")
    asks_nothing = (flag.default and values == [flag.default]) or (flag.nargs == "*" and not values)
    if asks_nothing:
        return
    if flag.refusal:
        raise ConfigError(f"{name} is not supported: {flag.refusal}")
    if not flag.field:
        if name not in options.ignored:
            options.ignored.append(name)
        return
    try:
        read = tuple(flag.read(value) for value in values or [""])
    except ValueError:
        raise ConfigError(f"{name} takes a number, got {values[0]!r}") from None
    options.settings[flag.field] = read if flag.nargs in "*+" else read[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
