"""Every setting of the balancer, with its default and unit. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Listening address, routing, limits and keys of the balancer. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 30000
    bootstrap_url: str = ""
    prefill: tuple[tuple[str, int | None], ...] = ()
    """Static prefill servers, ``(url, bootstrap_port)``; for fleets without a bootstrap service."""
    decode: tuple[str, ...] = ()
    worker_hosts: tuple[str, ...] = ()
    """Hosts (names, addresses or networks such as ``10.0.0.0/8``) that ``POST /workers`` may name
    besides the loopback and the hosts of ``prefill`` and ``decode``."""

    policy: str = "pair_cost"
    prefill_policy: str = ""
    """Policy for the prefill leg alone; empty: ``policy``."""
    decode_policy: str = ""
    cache_threshold: float = 0.3
    """cache_aware: share of the prompt that must match for the choice to follow the cache."""
    balance_abs_threshold: int = 64
    """cache_aware: requests by which the fullest worker may exceed the emptiest."""
    balance_rel_threshold: float = 1.5
    """cache_aware: factor by which it may; beyond both, load decides."""
    max_tree_size: int = 2**26
    """cache_aware: prompt bytes remembered per worker."""
    prefix_ttl_s: float = 600.0
    """pair_cost: a prefix is forgotten after so long without a use."""
    slo_ttft_s: float = 0.0
    """A request that can no longer get its first token within this is refused at once; 0: none is."""
    slo_tpot_s: float = 0.0
    """Decode workers are not filled beyond the batch that keeps this time per token; 0: no bound."""
    queue_order: str = "auto"
    """Who waits longest for a pair: fcfs, shortest (least expected work first, with aging), or auto:
    shortest under overload, else fcfs. ``priority`` goes before either."""
    predict_lengths: bool = True
    """Expect answers as long as like ones were; else as long as ``max_tokens`` allows, at most 512 tokens."""

    load_poll_s: float = 0.25

    max_concurrent_requests: int = 0
    """Requests dispatched at once, 0: as many as the workers have room for."""
    queue_size: int = 1024
    """Requests that may wait for a pair; more are refused with 503."""
    queue_timeout_s: float = 60.0
    """How long one may wait before 503."""
    prefill_queue_s: float = 60.0
    """Longest expected wait in a prefill server's queue; a request that would wait longer waits here,
    where SGLang's 300 s bootstrap timer does not run."""

    connect_s: float = 5.0
    request_s: float = 1800.0
    """Longest silence of a worker inside one response."""
    probe_s: float = 120.0
    wedge_s: float = 60.0
    """A worker with requests in flight that makes no progress for this long is taken for dead; 0: never."""
    max_retries: int = 2
    retry_ratio: float = 0.2
    """Retries allowed per request of the recent past, besides ten a minute."""
    breaker_failures: int = 3
    """Failures in a row that take a worker out of service; a broken connection does so at once."""
    drain_s: float = 30.0
    """How long requests in flight may finish at shutdown."""

    max_body_bytes: int = 512 * 2**20
    max_header_bytes: int = 64 * 2**10
    header_s: float = 15.0
    """Longest time a client may take to send a request's head."""
    body_s: float = 60.0
    """Longest pause of a client while it sends a body."""
    write_s: float = 120.0
    """Longest time a client may leave its answer unread once our buffers are full."""
    max_connections: int = 0
    """Client connections at once, 0: as many as the process may have open files for."""

    api_key: str = ""
    """Clients must send ``Authorization: Bearer KEY``; empty: anyone may ask."""
    admin_api_key: str = ""
    """The same for control routes; empty: ``api_key``."""
    worker_api_key: str = ""
    """Sent to the workers with the balancer's own questions; empty: ``admin_api_key`` or ``api_key``."""
    tls_cert_path: str = ""
    tls_key_path: str = ""

    request_id_headers: tuple[str, ...] = ("x-request-id",)
    log_level: str = "info"
    log_format: str = "text"
    """``json``: one object per line."""
    log_requests: bool = False
    """One line per request with its pair and the reason for it."""
    otlp_endpoint: str = ""
    """Where an OpenTelemetry collector takes traces by OTLP/HTTP, ``http://host:4318``; empty: no traces."""
    otlp_sample: float = 1.0
    """Share of requests traced of those whose client has not decided already, 0 to 1."""

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
