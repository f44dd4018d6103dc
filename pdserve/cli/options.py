"""Every option of the ``pdserve`` command, as a type: name, panel, help with unit and default.

An option that is not given is ``None``; its default lives in pdserve/config. The text
between parentheses that ends each help is its unit and that default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FLEET, LISTEN, ENGINE, RUN, ROUTING = "Fleet", "Addresses", "SGLang", "Running", "Routing"
TRANSFER, LIMITS, KEYS = "KV transfer", "Limits", "Keys and TLS"


def option(*names: str, panel: str, text: str, metavar: str | None = None) -> Any:
    """An option in our form of help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


# -- several commands --------------------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Argument(
        help="Folder or hub id; default: the embedded SmolLM2-135M-Instruct; `tiny`: a toy for tests.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None, option("--config", panel=RUN, text="TOML file; options win over it. (path; default none)")
]
Device = Annotated[
    str | None,
    option("--device", panel=ENGINE, metavar="auto|cpu|cuda", text="Where workers run. (name; default auto)"),
]
TensorParallel = Annotated[
    int | None, option("--tp", panel=ENGINE, text="Tensor parallel size of each server. (GPUs; default 1)")
]
PolicyName = Annotated[
    str | None,
    option(
        "--policy",
        panel=ROUTING,
        text="pair_cost, least_load, cache_aware, power_of_two, round_robin or random. "
        "(name; default pair_cost)",
    ),
]
Slo = Annotated[
    str | None,
    option(
        "--slo",
        panel=ROUTING,
        metavar="ttft=S,tpot=S",
        text="Time to first token and per token that requests need; what cannot meet it is refused at once. "
        "(seconds; default none)",
    ),
]
QueueOrder = Annotated[
    str | None,
    option(
        "--queue-order",
        panel=ROUTING,
        metavar="auto|fcfs|shortest",
        text="Who is served next; auto: the shortest under overload. (name; default auto)",
    ),
]
PredictLengths = Annotated[
    bool | None,
    option(
        "--predict-lengths/--no-predict-lengths",
        panel=ROUTING,
        text="Expect answers as long as like ones were. (flag; default on)",
    ),
]
LogFormat = Annotated[
    str | None,
    option("--log-format", panel=RUN, metavar="text|json", text="Form of logs. (name; default text)"),
]
LogLevel = Annotated[
    str | None, option("--log-level", panel=RUN, text="debug, info, warning or error. (name; default info)")
]
ApiKey = Annotated[
    str | None,
    option(
        "--api-key",
        panel=KEYS,
        metavar="KEY",
        text="Clients must send it as a bearer token; better given as PDSERVE_API_KEY. (text; default none)",
    ),
]
AdminApiKey = Annotated[
    str | None,
    option(
        "--admin-api-key",
        panel=KEYS,
        metavar="KEY",
        text="The same for control routes; or PDSERVE_ADMIN_API_KEY. (text; default: the key of clients)",
    ),
]
Host = Annotated[
    str | None, option("--host", panel=LISTEN, text="Address to listen on. (address; default 127.0.0.1)")
]
Port = Annotated[int | None, option("--port", panel=LISTEN, text="Port to listen on. (port; default 30000)")]

# -- launch ------------------------------------------------------------------------------------

NumPrefill = Annotated[
    int | None, option("-p", "--prefill", panel=FLEET, text="Prefill servers. (count; default 1)")
]
NumDecode = Annotated[
    int | None, option("-d", "--decode", panel=FLEET, text="Decode servers. (count; default 1)")
]
ServiceHost = Annotated[
    str | None, option("--host", panel=LISTEN, text="Address of the service. (address; default 127.0.0.1)")
]
ServicePort = Annotated[
    int | None, option("--port", panel=LISTEN, text="Port of the service. (port; default 30000)")
]
BootstrapPort = Annotated[
    int | None,
    option("--bootstrap-port", panel=LISTEN, text="Bootstrap service. (port; default 0: any free one)"),
]
Monitor = Annotated[
    bool,
    option("--monitor/--no-monitor", panel=RUN, text="Open the live monitor when ready. (flag; default off)"),
]
DryRun = Annotated[
    bool, option("--dry-run", panel=RUN, text="Print the commands, start nothing. (flag; default off)")
]
LogDir = Annotated[
    str | None,
    option("--log-dir", panel=RUN, text="One log per process. (folder; default: new one in the cache)"),
]
StartMethod = Annotated[
    str | None,
    option(
        "--start-method",
        panel=RUN,
        metavar="auto|fork|spawn",
        text="How workers start; fork is quicker, CPU only. (name; default auto)",
    ),
]
PrefillArgs = Annotated[
    str | None,
    option("--prefill-args", panel=ENGINE, text="SGLang flags of prefill only. (one string; default none)"),
]
DecodeArgs = Annotated[
    str | None,
    option("--decode-args", panel=ENGINE, text="SGLang flags of decode only. (one string; default none)"),
]
DataPlane = Annotated[
    str | None,
    option("--data-plane", panel=TRANSFER, metavar="on|off", text="off: SGLang's own. (name; default on)"),
]
TransferPath = Annotated[
    str | None,
    option(
        "--transfer-path",
        panel=TRANSFER,
        metavar="auto|direct|packed",
        text="How KV travels; auto: whatever is quicker. (name; default auto)",
    ),
]
SlabMb = Annotated[
    int | None,
    option("--slab-mb", panel=TRANSFER, text="Slab of each rank. (MiB; default 0: 64 on CPU, 1024 on GPU)"),
]
ReadyTimeout = Annotated[
    float | None,
    option("--ready-timeout", panel=RUN, text="Longest wait until ready. (seconds; default 600)"),
]

# -- prefill, decode ---------------------------------------------------------------------------

Join = Annotated[
    str, option("--join", panel=FLEET, metavar="HOST:PORT", text="Bootstrap service to join. (address)")
]
WorkerHost = Annotated[
    str, option("--host", panel=LISTEN, text="Address to listen on. (address; default 127.0.0.1)")
]
WorkerPort = Annotated[
    int, option("--port", panel=LISTEN, text="Port to listen on. (port; default 0: first free from 31000)")
]
WorkerName = Annotated[
    str, option("--name", panel=FLEET, text="Name in the fleet. (name; default role-hostname-port)")
]
AdvertiseHost = Annotated[
    str,
    option(
        "--advertise-host",
        panel=LISTEN,
        text="Host by which others reach this server. (address; default: the one it listens on)",
    ),
]

# -- bootstrap ---------------------------------------------------------------------------------

BootstrapOwnPort = Annotated[
    int | None, option("--port", panel=LISTEN, text="Port to listen on. (port; default 8997)")
]
PortRange = Annotated[
    str | None,
    option(
        "--port-range",
        panel=LISTEN,
        metavar="A-B",
        text="Ports for prefill servers. (ports; default 0-0: any free ones)",
    ),
]
BootstrapAdvertiseHost = Annotated[
    str | None,
    option(
        "--advertise-host",
        panel=LISTEN,
        text="Host by which others reach this service. (address; default: the one it listens on)",
    ),
]
Lease = Annotated[
    float | None, option("--lease", panel=RUN, text="Silence that ends a server. (seconds; default 10)")
]

# -- balance -----------------------------------------------------------------------------------

Bootstrap = Annotated[
    str | None,
    option(
        "--bootstrap", panel=FLEET, metavar="HOST:PORT", text="Bootstrap service. (address; default none)"
    ),
]
PrefillUrls = Annotated[
    list[str] | None,
    option(
        "--prefill",
        panel=FLEET,
        metavar="URL [PORT|none]",
        text="A prefill server and its bootstrap port; repeatable. (URL; default none)",
    ),
]
DecodeUrls = Annotated[
    list[str] | None,
    option("--decode", panel=FLEET, metavar="URL", text="A decode server; repeatable. (URL; default none)"),
]
WorkerHosts = Annotated[
    list[str] | None,
    option(
        "--worker-hosts",
        panel=FLEET,
        metavar="HOST",
        text="Name, address or network (10.0.0.0/8) that POST /workers may name; repeatable. "
        "(host; default: loopback, hosts of --prefill and --decode)",
    ),
]
PrefillPolicy = Annotated[
    str | None,
    option("--prefill-policy", panel=ROUTING, text="Policy of the prefill leg. (name; default: --policy)"),
]
DecodePolicy = Annotated[
    str | None,
    option("--decode-policy", panel=ROUTING, text="Policy of the decode leg. (name; default: --policy)"),
]
CacheThreshold = Annotated[
    float | None,
    option(
        "--cache-threshold",
        panel=ROUTING,
        text="cache_aware: match from which the cache decides. (share of a prompt; default 0.3)",
    ),
]
BalanceAbsThreshold = Annotated[
    int | None,
    option(
        "--balance-abs-threshold",
        panel=ROUTING,
        text="cache_aware: lead of the fullest worker from which load decides. (requests; default 64)",
    ),
]
BalanceRelThreshold = Annotated[
    float | None,
    option(
        "--balance-rel-threshold",
        panel=ROUTING,
        text="cache_aware: the same as a ratio. (factor; default 1.5)",
    ),
]
MaxRetries = Annotated[
    int | None,
    option("--max-retries", panel=ROUTING, text="Tries on another pair after a failure. (count; default 2)"),
]
QueueSize = Annotated[
    int | None,
    option("--queue-size", panel=LIMITS, text="Requests that may wait for a pair. (count; default 1024)"),
]
QueueTimeout = Annotated[
    float | None,
    option("--queue-timeout", panel=LIMITS, text="How long one may wait before 503. (seconds; default 60)"),
]
MaxBodyBytes = Annotated[
    int | None,
    option("--max-body-bytes", panel=LIMITS, text="Longest request body. (bytes; default 536870912)"),
]
WorkerApiKey = Annotated[
    str | None,
    option(
        "--worker-api-key",
        panel=KEYS,
        metavar="KEY",
        text="Sent to the workers; or PDSERVE_WORKER_API_KEY. (text; default: the key of control routes)",
    ),
]
TlsCertPath = Annotated[
    str | None,
    option("--tls-cert-path", panel=KEYS, text="Certificate of this service, PEM. (path; default: no TLS)"),
]
TlsKeyPath = Annotated[
    str | None, option("--tls-key-path", panel=KEYS, text="Its private key, PEM. (path; default: no TLS)")
]
LogRequests = Annotated[
    bool | None,
    option(
        "--log-requests/--no-log-requests",
        panel=RUN,
        text="One line per request with its pair and why. (flag; default off)",
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    option(
        "--otlp-endpoint",
        panel=RUN,
        metavar="URL",
        text="Send OpenTelemetry traces there, by OTLP/HTTP: http://127.0.0.1:4318. (URL; default none)",
    ),
]
OtlpSample = Annotated[
    float | None,
    option("--otlp-sample", panel=RUN, metavar="SHARE", text="Requests traced. (0 to 1; default 1)"),
]
PdDisaggregation = Annotated[
    bool,
    option(
        "--pd-disaggregation",
        panel=ROUTING,
        text="Take the defaults of sglang_router.launch_router instead: port 30000 of every address, "
        "cache_aware, 5 retries, a queue of 100. (flag; default off)",
    ),
]

# -- chat --------------------------------------------------------------------------------------

Question = Annotated[
    str | None, typer.Argument(help="Ask once and leave; default: converse.", show_default=False)
]
ServiceUrl = Annotated[
    str, option("--url", panel=LISTEN, text="The service. (URL; default http://127.0.0.1:30000)")
]
SystemPrompt = Annotated[str, option("--system", panel=RUN, text="System prompt. (text; default none)")]
MaxTokens = Annotated[int, option("--max-tokens", panel=RUN, text="Longest answer. (tokens; default 512)")]
Temperature = Annotated[float, option("--temperature", panel=RUN, text="0 is greedy. (number; default 0)")]
ChatKey = Annotated[
    str,
    option(
        "--api-key",
        panel=KEYS,
        metavar="KEY",
        text="The service's key; or PDSERVE_API_KEY. (text; default none)",
    ),
]
