"""Every setting of the balancer."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config.setting import FAILURES, FLEET, KEYS, LIMITS, LISTEN, ROUTING, RUN, setting

DEFLECT_AUTO = "auto"
DEFLECT = (DEFLECT_AUTO, "off")
QUEUE_ORDERS = ("auto", "fcfs", "shortest")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Listening address, routing, limits and keys of the balancer. Times in seconds."""

    host: str = setting("127.0.0.1", "Address to listen on.", "address", "--host", panel=LISTEN)
    port: int = setting(30000, "Port to listen on.", "port", "--port")

    bootstrap_url: str = setting(
        "", "Bootstrap service that knows the workers.", "address", "--bootstrap HOST:PORT", panel=FLEET
    )
    prefill: tuple[tuple[str, int | None], ...] = setting(
        (),
        'A prefill server and its bootstrap port; repeatable. In a file: [["http://10.0.0.1:30001", 8998]].',
        "URL",
        "--prefill URL [PORT|none]",
    )
    decode: tuple[str, ...] = setting((), "A decode server; repeatable.", "URL", "--decode URL")
    expect_prefill: int = setting(
        0,
        "Prefill servers that there should be; health, monitor and doctor tell how many are missing.",
        "count",
        "--expect-prefill",
        empty="those named by --prefill",
    )
    expect_decode: int = setting(
        0, "The same for decode.", "count", "--expect-decode", empty="those named by --decode"
    )
    worker_hosts: tuple[str, ...] = setting(
        (),
        "Name, address or network (10.0.0.0/8) that POST /workers may name; repeatable.",
        "host",
        "--worker-hosts HOST",
        empty="loopback, hosts of --prefill and --decode",
    )

    policy: str = setting(
        "pair_cost",
        "pair_cost, least_load, cache_aware, power_of_two, round_robin or random.",
        "name",
        "--policy",
        panel=ROUTING,
    )
    prefill_policy: str = setting(
        "", "Policy of the prefill leg.", "name", "--prefill-policy", empty="--policy"
    )
    decode_policy: str = setting("", "Policy of the decode leg.", "name", "--decode-policy", empty="--policy")
    cache_threshold: float = setting(
        0.3,
        "cache_aware: match from which the cache decides, 0 to 1.",
        "share of a prompt",
        "--cache-threshold",
    )
    balance_abs_threshold: int = setting(
        64,
        "cache_aware: lead of the fullest worker over the emptiest from which load decides.",
        "requests",
        "--balance-abs-threshold",
    )
    balance_rel_threshold: float = setting(
        1.5,
        "cache_aware: the same as a ratio; load decides when both are exceeded.",
        "factor",
        "--balance-rel-threshold",
    )
    max_tree_size: int = setting(2**26, "cache_aware: prompt bytes remembered per worker.", "bytes", "")
    prefix_ttl_s: float = setting(
        600.0,
        "pair_cost: a prefix is forgotten after this time without a use.",
        "seconds",
        "",
    )
    slo_ttft_s: float = setting(
        0.0,
        "A request that can no longer get its first token within this is refused at once.",
        "seconds",
        "",
        empty="none is",
    )
    slo_tpot_s: float = setting(
        0.0,
        "Decode workers are not filled beyond the batch that keeps this time per token.",
        "seconds",
        "",
        empty="no bound",
    )
    deflect: str = setting(
        "off",
        "auto: a decode server prefills a request itself, without a prefill server, where that is quicker "
        "within the SLO or no prefill server is there.",
        "name",
        "--deflect",
        choices=DEFLECT,
    )
    queue_order: str = setting(
        "auto",
        "Which waiting request is served next: fcfs; shortest, by expected work, with aging; "
        "auto, shortest under overload, else fcfs. A request's priority goes before either.",
        "name",
        "--queue-order",
        choices=QUEUE_ORDERS,
    )
    predict_lengths: bool = setting(
        True,
        "Expect answers as long as similar ones were; off: as long as max_tokens allows, at most 512 tokens.",
        "flag",
        "--predict-lengths/--no-predict-lengths",
    )
    load_poll_s: float = setting(0.25, "Time between two polls of a worker's load.", "seconds", "")

    max_concurrent_requests: int = setting(
        0,
        "Requests dispatched at once.",
        "count",
        "",
        panel=LIMITS,
        empty="as many as the workers have room for",
    )
    queue_size: int = setting(
        1024, "Requests that may wait for a pair; more get 503.", "count", "--queue-size"
    )
    queue_timeout_s: float = setting(
        60.0, "How long a request may wait for a pair before 503.", "seconds", "--queue-timeout"
    )
    prefill_queue_s: float = setting(
        60.0,
        "Longest expected wait in a prefill server's queue; a request that would wait longer waits in the "
        "balancer, where SGLang's 300 s bootstrap timer does not run.",
        "seconds",
        "",
    )
    stream_heartbeat_s: float = setting(
        0.0,
        "A stream that is silent for so long gets its head, if that is not out, and an SSE comment; an error "
        "after its head is an event, without a status code.",
        "seconds",
        "--stream-heartbeat-s",
        empty="off",
    )
    max_body_bytes: int = setting(512 * 2**20, "Longest request body.", "bytes", "--max-body-bytes")
    max_header_bytes: int = setting(64 * 2**10, "Longest request head.", "bytes", "")
    header_s: float = setting(15.0, "Longest time a client may take to send a request's head.", "seconds", "")
    body_s: float = setting(60.0, "Longest pause of a client within a body.", "seconds", "")
    write_s: float = setting(
        120.0, "Longest time a client may leave its answer unread once our buffers are full.", "seconds", ""
    )
    max_connections: int = setting(
        0, "Client connections at once.", "count", "", empty="as many as open files allow"
    )

    max_retries: int = setting(
        2, "Tries on another pair after a failure.", "count", "--max-retries", panel=FAILURES
    )
    retry_ratio: float = setting(
        0.2, "Retries per request of the recent past, besides ten a minute.", "share", ""
    )
    max_resumes: int = setting(
        3,
        "How often one streamed answer may go on on another pair when its decode server dies, hangs or gives "
        "it up; 0: never, its stream then ends with an error.",
        "count",
        "--max-resumes",
    )
    resume_ratio: float = setting(
        1.0, "Resumes per request of the recent past, besides ten a minute.", "share", ""
    )
    breaker_failures: int = setting(
        3,
        "Failures in a row that take a worker out of service; a broken connection does so at once.",
        "count",
        "",
    )
    connect_s: float = setting(5.0, "Time to make a connection to a worker.", "seconds", "")
    request_s: float = setting(1800.0, "Longest silence of a worker inside one response.", "seconds", "")
    probe_s: float = setting(120.0, "Longest wait for a new pair's first token.", "seconds", "")
    wedge_s: float = setting(
        60.0,
        "A worker with requests in flight that makes no progress for this long counts as dead; 0: never.",
        "seconds",
        "",
    )

    api_key: str = setting(
        "",
        "Clients must send it as a bearer token; better given as PDSERVE_API_KEY.",
        "text",
        "--api-key KEY",
        panel=KEYS,
    )
    admin_api_key: str = setting(
        "",
        "The same for control routes; or PDSERVE_ADMIN_API_KEY.",
        "text",
        "--admin-api-key KEY",
        empty="the key of clients",
    )
    worker_api_key: str = setting(
        "",
        "Sent to the workers with the balancer's own requests; or PDSERVE_WORKER_API_KEY.",
        "text",
        "--worker-api-key KEY",
        empty="the key of control routes",
    )
    tls_cert_path: str = setting(
        "", "Certificate of this service, PEM.", "path", "--tls-cert-path", empty="no TLS"
    )
    tls_key_path: str = setting("", "Its private key, PEM.", "path", "--tls-key-path", empty="no TLS")

    shutdown_delay_s: float = setting(
        5.0,
        "How long the service still takes requests after SIGTERM, with readiness 503, until load balancers "
        "have noticed; Ctrl-C waits for none.",
        "seconds",
        "--shutdown-delay",
        panel=RUN,
    )
    drain_s: float = setting(
        30.0, "How long requests in flight may finish at shutdown.", "seconds", "--drain"
    )
    request_id_headers: tuple[str, ...] = setting(
        ("x-request-id",),
        "Headers that may carry a client's own request id, the first one wins.",
        "names",
    )
    log_level: str = setting("info", "How much is logged.", "name", "--log-level", choices=LOG_LEVELS)
    log_format: str = setting(
        "text", "Form of logs; json: one object per line.", "name", "--log-format", choices=("text", "json")
    )
    log_requests: bool = setting(
        False,
        "One line per request with its pair and the reason for it.",
        "flag",
        "--log-requests/--no-log-requests",
    )
    otlp_endpoint: str = setting(
        "",
        "Collector that takes OpenTelemetry traces by OTLP/HTTP, http://127.0.0.1:4318.",
        "URL",
        "--otlp-endpoint URL",
    )
    otlp_sample: float = setting(
        1.0,
        "Share of requests traced, 0 to 1; a client's own traceparent decides for its request.",
        "share",
        "--otlp-sample SHARE",
    )

    @property
    def worker_key(self) -> str:
        """What the balancer's own requests to workers are authorized with; empty: nothing."""
        return self.worker_api_key or self.api_key or self.admin_api_key

    @property
    def worker_control_key(self) -> str:
        """The same for their control routes, such as ``/abort_request``."""
        return self.worker_api_key or self.admin_api_key or self.api_key

    @property
    def control_key(self) -> str:
        """What our own control routes ask for; empty: nothing."""
        return self.admin_api_key or self.api_key
