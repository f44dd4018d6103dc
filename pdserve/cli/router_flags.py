"""The flags of ``python -m sglang_router.launch_router`` 0.3.2 and what each is to ``pdserve balance``.

A flag sets one of our settings (``SETTINGS``), is refused because to ignore it would leave the user less
protected, or served by less, than asked for (``REFUSED``), or is accepted without effect (``IGNORED``).
Flags that are options of ``pdserve balance`` under the same name are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RouterFlag:
    """A flag that is one of our settings. ``nargs`` as in argparse; ``"0"`` is a switch."""

    setting: str
    read: Callable[[str], Any] = str
    """Makes the setting of one value."""
    nargs: str = "1"


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

_KEYS = "control routes have one key: give it by PDSERVE_ADMIN_API_KEY or --admin-api-key"
_MTLS = "connections to workers have no client certificates or own authorities; use a network you trust"

TRACE, TRACE_ENDPOINT = "--enable-trace", "--otlp-traces-endpoint"

SETTINGS: dict[str, RouterFlag] = {
    "--max-tree-size": RouterFlag("max_tree_size", int),
    "--max-payload-size": RouterFlag("max_body_bytes", int),
    "--request-timeout-secs": RouterFlag("request_s", float),
    "--request-id-headers": RouterFlag("request_id_headers", str.lower, "*"),
    "--shutdown-grace-period-secs": RouterFlag("drain_s", float),
    "--max-concurrent-requests": RouterFlag("max_concurrent_requests", lambda text: max(0, int(text))),
    "--queue-timeout-secs": RouterFlag("queue_timeout_s", float),
    "--retry-max-retries": RouterFlag("max_retries", int),
    "--disable-retries": RouterFlag("max_retries", lambda _: 0, "0"),
    "--cb-failure-threshold": RouterFlag("breaker_failures", int),
    TRACE: RouterFlag("otlp_endpoint", nargs="0"),
    TRACE_ENDPOINT: RouterFlag("otlp_endpoint", _otlp_http),
}

REFUSED: dict[str, tuple[str, str]] = {
    "--worker-urls": ("*", "only prefill/decode pairs are served: give --prefill and --decode"),
    "--enable-igw": ("0", "one balancer serves one model; start one for each"),
    "--backend": ("1", "the workers must be SGLang servers"),
    "--service-discovery": ("0", "workers join through --bootstrap or POST /workers"),
    "--client-cert-path": ("1", _MTLS),
    "--client-key-path": ("1", _MTLS),
    "--ca-cert-paths": ("*", _MTLS),
    "--control-plane-api-keys": ("*", _KEYS),
    "--control-plane-audit-enabled": ("0", "there is no audit log"),
    "--jwt-issuer": ("1", _KEYS),
    "--jwt-audience": ("1", _KEYS),
    "--jwt-jwks-uri": ("1", _KEYS),
    "--jwt-role-mapping": ("*", _KEYS),
}
"""Number of values and reason. An empty list of values, and ``--backend sglang``, ask for nothing."""

_IGNORED = """
1 --assignment-mode --bucket-adjust-interval-secs --cb-success-threshold --cb-timeout-duration-secs
--cb-window-duration-secs --chat-template --eviction-interval-secs --health-check-endpoint
--health-check-interval-secs --health-check-timeout-secs --health-failure-threshold
--health-success-threshold --history-backend --log-dir --max-idle-secs --mcp-config-path --model-path
--oracle-connect-descriptor --oracle-password --oracle-pool-max --oracle-pool-min
--oracle-pool-timeout-secs --oracle-tns-alias --oracle-username --oracle-wallet-path --postgres-db-url
--postgres-pool-max --prometheus-host --prometheus-port --rate-limit-tokens-per-second --reasoning-parser
--redis-pool-max --redis-retention-days --redis-url --retry-backoff-multiplier --retry-initial-backoff-ms
--retry-jitter-factor --retry-max-backoff-ms --service-discovery-namespace --service-discovery-port
--tokenizer-cache-l0-max-entries --tokenizer-cache-l1-max-memory --tokenizer-path --tool-call-parser
--worker-startup-check-interval --worker-startup-timeout-secs
0 --disable-circuit-breaker --disable-health-check --dp-aware --mini-lb --tokenizer-cache-enable-l0
--tokenizer-cache-enable-l1
* --cors-allowed-origins
+ --decode-selector --prefill-selector --prometheus-duration-buckets --selector
"""
IGNORED: dict[str, str] = {}
"""Flags without effect and their number of values: tokenizers, conversation stores, health checks,
Kubernetes and metrics of the router are the workers' task, or the balancer has its own way."""
for _word in _IGNORED.split():
    if len(_word) == 1:
        _nargs = _word
    else:
        IGNORED[_word] = _nargs


@dataclass(slots=True)
class RouterOptions:
    """What sglang-router's flags came to. ``ignored`` are those without effect, in order, each once."""

    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """One line on the flags without effect; empty if there are none. Never a value: some are secrets."""
        names = ", ".join(self.ignored)
        return f"note: accepted without effect, see docs/balancer.md: {names}" if names else ""


def take_router_flags(argv: Sequence[str]) -> tuple[list[str], RouterOptions]:
    """The arguments without sglang-router's own flags, and what those say.

    Raises:
        ConfigError: for a flag that is refused, without its value or with a wrong one.
    """
    rest: list[str] = []
    options = RouterOptions()
    at = 0
    while at < len(argv):
        name, equals, given = argv[at].partition("=")
        at += 1
        nargs = number_of_values(name)
        if nargs is None:
            rest.append(argv[at - 1])
            continue
        values = [given] if equals else _values(nargs, argv[at:])
        at += 0 if equals else len(values)
        if nargs in "1+" and not values:
            raise ConfigError(f"{name} needs a value")
        if name == TRACE_ENDPOINT and TRACE not in argv:
            options.ignored.append(f"{name} without {TRACE}")
        else:
            _apply(name, values, options)
    return rest, options


def number_of_values(name: str) -> str | None:
    """A flag's ``nargs``; None for a word that is no flag of these tables."""
    if name in SETTINGS:
        return SETTINGS[name].nargs
    return REFUSED[name][0] if name in REFUSED else IGNORED.get(name)


def _values(nargs: str, following: Sequence[str]) -> list[str]:
    """The values of a flag as argparse reads them: a negative number is a value, another dash ends them."""
    wanted = {"0": 0, "1": 1}.get(nargs, len(following))
    values: list[str] = []
    for text in following[:wanted]:
        if text.startswith("-") and not _is_number(text):
            break
        values.append(text)
    return values


def _apply(name: str, values: list[str], options: RouterOptions) -> None:
    if number_of_values(name) == "*" and not values:
        return
    if name in REFUSED:
        if (name, values) != ("--backend", ["sglang"]):
            raise ConfigError(f"{name} is not supported: {REFUSED[name][1]}")
    elif name in IGNORED:
        if name not in options.ignored:
            options.ignored.append(name)
    elif name == TRACE:
        options.settings.setdefault("otlp_endpoint", _otlp_http("localhost:4317"))
    else:
        flag = SETTINGS[name]
        try:
            read = tuple(flag.read(value) for value in values or [""])
        except ValueError:
            raise ConfigError(f"{name} takes a number, got {values[0]!r}") from None
        options.settings[flag.setting] = read if flag.nargs == "*" else read[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
