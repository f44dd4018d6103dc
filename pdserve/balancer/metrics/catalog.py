"""Every metric of the balancer: name, kind, labels, unit, help text. docs/metrics.md lists the same.

Names and buckets of the latencies are those of SGLang with another prefix; buckets below the first of
SGLang are ours. Labels ``worker_id`` and ``worker_role`` are those that
the balancer adds to the workers' own metrics.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

PREFIX = "pdserve:"


class Kind(enum.StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. ``bounds`` of histograms are inclusive upper ones, of ``metrics_window.SECONDS``."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


FIRST_TOKEN_S = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200,
    400,
)  # fmt: skip
WHOLE_S = (*FIRST_TOKEN_S, 600, 1200, 1800, 2400)
TOKEN_S = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4,
    0.6, 0.8, 1, 2, 4, 6, 8,
)  # fmt: skip
QUEUE_S = (
    0.0001,
    0.001,
    0.005,
    0.01,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    3,
    4,
    5,
    10,
    15,
    20,
    30,
    40,
    60,
    80,
    100,
    200,
)
STAGE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

WORKER = ("worker_id", "worker_role")
PAIR = ("prefill", "decode")


def _latency(name: str, help_: str, bounds: tuple[float, ...]) -> Metric:
    return Metric(PREFIX + name, Kind.HISTOGRAM, "seconds", help_, (), bounds)


def _counter(name: str, unit: str, help_: str, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(PREFIX + name, Kind.COUNTER, unit, help_, labels)


def _gauge(name: str, unit: str, help_: str, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(PREFIX + name, Kind.GAUGE, unit, help_, labels)


LATENCIES = {
    "ttft_s": _latency(
        "time_to_first_token_seconds",
        "From receipt of a request to the first byte of its stream; streams only, however they ended.",
        FIRST_TOKEN_S,
    ),
    "tpot_s": _latency(
        "time_per_output_token_seconds",
        "Mean time per token after the first, one value for each completed stream of two tokens or more.",
        TOKEN_S,
    ),
    "itl_s": _latency(
        "inter_token_latency_seconds",
        "Time between two events of a stream, which carry a token each; every eighth gap is measured.",
        TOKEN_S,
    ),
    "e2e_s": _latency(
        "e2e_request_latency_seconds",
        "From receipt of a request to the end of its answer; completed requests only.",
        WHOLE_S,
    ),
    "queue_s": _latency(
        "queue_time_seconds",
        "From receipt of a request until the pair of its last attempt was held.",
        QUEUE_S,
    ),
    "prefill_s": _latency(
        "prefill_time_seconds",
        "From then to the end of the prefill leg: its queue, its work and the sending of the KV.",
        FIRST_TOKEN_S,
    ),
    "transfer_s": _latency(
        "handover_time_seconds",
        "From the end of the prefill leg to decode's first byte; streams only.",
        STAGE_S,
    ),
    "resume_gap_s": _latency(
        "resume_gap_seconds",
        "From the last bytes of a failed decode server to the first of one that goes on with its answer.",
        STAGE_S,
    ),
    "move_gap_s": _latency(
        "move_gap_seconds",
        "The same where nothing had failed: the answer was moved on purpose.",
        STAGE_S,
    ),
}
"""By their names in the state document."""

KV_TRANSFER = _latency(
    "kv_transfer_seconds",
    "KV transfers of pdserve's workers by their own figures: each worker's mean of 5 s, as often as it sent.",
    STAGE_S,
)

BUILD = _gauge("build_info", "1", "Version and policy of this balancer.", ("version", "policy"))
STARTED = _gauge("start_time_seconds", "seconds", "When this balancer was started, Unix time.")
RECEIVED = _counter("requests_received_total", "requests", "Requests that take a prompt, as they came in.")
REQUESTS = _counter(
    "requests_total",
    "requests",
    "Requests that ended: completed, failed, aborted (its client left or asked for it), shed (no pair).",
    ("route", "outcome", "is_streaming"),
)
RETRIES = _counter("retries_total", "attempts", "Further attempts at requests whose first one failed.")
RESUMES = _counter(
    "resumes_total", "answers",
    "Streamed answers that went on on another pair: their server had failed, or they were moved on purpose.",
    ("cause",),
)  # fmt: skip
DEFLECTED = _counter(
    "deflected_total", "attempts", "Attempts with a decode server that prefilled the request itself."
)
SHED = _counter("requests_shed_total", "requests", "Requests refused for want of a pair.", ("reason",))
PROMPT_TOKENS = _counter("prompt_tokens_total", "tokens", "Prompt tokens of completed requests.")
OUTPUT_TOKENS = _counter("generation_tokens_total", "tokens", "Tokens generated for completed requests.")
INFLIGHT = _gauge("requests_inflight", "requests", "Requests received and not ended.")
DISPATCHED = _gauge("requests_dispatched", "requests", "Requests that hold a pair.")
QUEUED = _gauge("queue_length", "requests", "Requests that wait for a pair.")
QUEUE_SIZE = _gauge("queue_size", "requests", "How many may wait.")
OLDEST = _gauge("queue_oldest_seconds", "seconds", "How long the first in line has waited.")
CONNECTED = _gauge("bootstrap_connected", "1", "1 while the bootstrap service answers; 0 without one too.")
REGIME = _gauge(
    "regime",
    "1",
    "1 for what the fleet is short of: normal (of nothing), prefill_short, decode_short, overload (of both).",
    ("regime",),
)
SCORE = _gauge("role_score", "1", "How full a role is, smoothed; 1: full, with requests waiting.", ("role",))

DECISIONS = _counter("decisions_total", "requests", "Times a pair was chosen.", (*PAIR, "policy"))
PROBES = _counter("pair_probes_total", "probes", "Times a pair was tested by a real token.", PAIR)
PAIR_READY = _gauge("pair_ready", "1", "1 while a pair takes traffic.", PAIR)
PAIR_TOKENS = _counter("pair_prompt_tokens_total", "tokens", "Prompt tokens whose KV went over a pair.", PAIR)
PAIR_BYTES = _counter(
    "pair_kv_bytes_total",
    "bytes",
    "The same in bytes of KV; only where the prefill worker has told its KV layout.",
    PAIR,
)

WORKER_STATE = _gauge(
    "worker_state",
    "1",
    "1 for the state a worker is in: joining, ready, suspect, draining.",
    (*WORKER, "state"),
)
BREAKER = _gauge(
    "breaker_state",
    "1",
    "1 for the state of a worker's breaker: closed, half_open, open.",
    (*WORKER, "state"),
)
OPENED = _counter("breaker_opened_total", "times", "Times a worker's breaker opened.", WORKER)
LEG_ERRORS = _counter(
    "leg_errors_total",
    "legs",
    "Legs that a worker was blamed for: unreachable, timeout, overload (503), rejected (any other 5xx),"
    " unclear (either of the pair, as when the KV did not arrive).",
    (*WORKER, "kind"),
)
WORKER_INFLIGHT = _gauge("worker_inflight_requests", "requests", "Legs of ours on a worker.", WORKER)
WORKER_RUNNING = _gauge(
    "worker_running_requests", "requests", "Requests in a worker's running batch.", WORKER
)
WORKER_WAITING = _gauge(
    "worker_waiting_requests",
    "requests",
    "Requests in a worker's queues, those of the KV transfer too.",
    WORKER,
)
WORKER_KV = _gauge("worker_kv_usage", "ratio", "Share of a worker's KV pool in use, 0 to 1.", WORKER)
WORKER_TOKENS = _gauge(
    "worker_tokens_per_second",
    "tokens/s",
    "Uncached prompt tokens (prefill) or generated tokens (decode) per second, over ten seconds.",
    WORKER,
)
WORKER_AGE = _gauge("worker_load_age_seconds", "seconds", "Age of a worker's last load figures.", WORKER)
KV_BYTES = _counter(
    "worker_kv_sent_bytes_total", "bytes", "KV sent by a pdserve worker since its start.", WORKER
)
KV_TRANSFERS = _counter(
    "worker_kv_transfers_total",
    "transfers",
    "KV transfers that succeeded, since that worker's start.",
    WORKER,
)
KV_FAILURES = _counter(
    "worker_kv_transfer_failures_total", "transfers", "KV transfers that failed, the same.", WORKER
)
KV_CHUNKS = _counter(
    "worker_kv_chunks_total",
    "chunks",
    "Chunks sent page to page (direct) or through slabs (packed), the same.",
    (*WORKER, "path"),
)

METRICS: tuple[Metric, ...] = (
    *LATENCIES.values(),
    KV_TRANSFER,
    BUILD,
    STARTED,
    RECEIVED,
    REQUESTS,
    RETRIES,
    RESUMES,
    DEFLECTED,
    SHED,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    INFLIGHT,
    DISPATCHED,
    QUEUED,
    QUEUE_SIZE,
    OLDEST,
    CONNECTED,
    REGIME,
    SCORE,
    DECISIONS,
    PROBES,
    PAIR_READY,
    PAIR_TOKENS,
    PAIR_BYTES,
    WORKER_STATE,
    BREAKER,
    OPENED,
    LEG_ERRORS,
    WORKER_INFLIGHT,
    WORKER_RUNNING,
    WORKER_WAITING,
    WORKER_KV,
    WORKER_TOKENS,
    WORKER_AGE,
    KV_BYTES,
    KV_TRANSFERS,
    KV_FAILURES,
    KV_CHUNKS,
)
"""All metrics, in the order in which they are published."""
BY_NAME = {metric.name: metric for metric in METRICS}
