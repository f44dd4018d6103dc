"""The state document: ``GET /pdserve/state``, read by monitor, tests and operators.

Every key has its meaning and unit in docs/state.schema.json; a test holds the two together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pdserve import __version__
from pdserve.balancer.fleet.events import FleetEvent
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.pairs import PairTraffic, kv_bytes_per_token
from pdserve.balancer.metrics.workers import KVSent, WorkerFigures, WorkerMetrics
from pdserve.scheduling.kv_room import committed_tokens
from pdserve.scheduling.workers import PairRecord, Worker
from pdserve.types import InstanceId, Role, WorkerLoad

_EVENT_FIELDS = tuple(FleetEvent.__dataclass_fields__)
_LOAD_FIELDS = tuple(WorkerLoad.__dataclass_fields__)


def render_state(fleet: WorkerFleet, metrics: WorkerMetrics, ledger: RequestLedger) -> dict[str, object]:
    """Plain dicts and lists, ready for JSON."""
    watcher, now_s = fleet.watcher, time.monotonic()
    workers = fleet.workers()
    seen = {worker.instance_id: metrics.of(worker) for worker in workers}
    document: dict[str, object] = {
        "version": __version__,
        "now_s": time.time(),
        "uptime_s": now_s - fleet.started_s,
        "model": fleet_model(fleet),
        "policy": fleet.policy.name,
        "regime": fleet.admission.regime.snapshot(),
        "lengths": {} if fleet.lengths is None else fleet.lengths.snapshot(),
        "bootstrap": {
            "url": _without_user(fleet.config.bootstrap_url),
            "connected": watcher is not None and watcher.is_connected,
            "epoch": watcher.epoch if watcher is not None else "",
        },
        "workers": [_worker(fleet, worker, now_s, seen.get(worker.instance_id)) for worker in workers],
        "pairs": _pairs(fleet.pairs(), ledger.traffic, seen),
        "waiting": fleet.num_waiting,
        "queue": _queue(fleet),
        "events": [{name: getattr(event, name) for name in _EVENT_FIELDS} for event in fleet.events],
        **ledger.snapshot(),
    }
    if isinstance(series := document.get("series"), dict):
        series["waiting"] = metrics.waiting()
    return document


def fleet_model(fleet: WorkerFleet) -> str:
    """The name the fleet serves under: the first worker's that has one, else an empty string."""
    names = (worker.info.served_model_name or worker.info.model for worker in fleet.workers())
    return next((name for name in names if name), "")


def _worker(
    fleet: WorkerFleet, worker: Worker, now_s: float, figures: WorkerFigures | None
) -> dict[str, object]:
    info, view = worker.info, worker.view
    load = fleet.table.load(worker.instance_id)
    credit = fleet.table.credit(worker.instance_id)
    return {
        "worker_id": info.worker_id,
        "instance_id": info.instance_id,
        "role": info.role._value_,
        "url": info.url,
        "state": worker.state._value_,
        "age_s": None if figures is None else now_s - figures.joined_s,
        "inflight": worker.num_inflight,
        "bootstrap_host": info.bootstrap_host,
        "bootstrap_port": info.bootstrap_port,
        "tokens_s": None if figures is None else figures.tokens_s,
        "kv_usage": kv_usage(load),
        "queues": _queues(worker.role, load),
        "kv_sent": _kv_sent(figures.sent if figures else None),
        "load": None if load is None else {name: getattr(load, name) for name in _LOAD_FIELDS},
        "load_age_s": None if load is None else max(0.0, now_s - load.timestamp_s),
        "errors": worker.breaker.errors,
        "failures": dict(worker.failures),
        "breaker": worker.breaker.state._value_,
        "draining": worker.is_draining,
        "leaving": worker.is_leaving,
        "admission": _admission(worker),
        "wedge": {"stalled_s": worker.stalled_s, "wedged": worker.num_wedged},
        "last_error": worker.last_error,
        "credit": {"reqs": credit.reqs, "prompt_tokens": credit.prompt_tokens},
        "fitted": {
            "prefill_tokens_s": view.prefill_tokens_s,
            "step_base_s": view.step_base_s,
            "step_slope_s": view.step_slope_s,
        },
    }


def kv_usage(load: WorkerLoad | None) -> float | None:
    """Share of the KV pool in use, 0 to 1; None without a sample."""
    if load is None:
        return None
    usage = (
        load.num_used_tokens / load.max_total_num_tokens if load.max_total_num_tokens else load.token_usage
    )
    return min(1.0, max(0.0, usage))


def _queues(role: Role, load: WorkerLoad | None) -> dict[str, int] | None:
    """Requests by where they are. SGLang's own waiting figure counts most of these queues in."""
    if load is None:
        return None
    is_prefill = role is Role.PREFILL
    bootstrap, prealloc = load.prefill_bootstrap_queue_reqs, load.decode_prealloc_queue_reqs
    transfer, retracted = load.decode_transfer_queue_reqs, load.decode_retracted_queue_reqs
    return {
        "bootstrap": bootstrap,
        "waiting": max(0, load.num_waiting_reqs - bootstrap - prealloc - transfer - retracted),
        "inflight_or_transfer": load.prefill_inflight_queue_reqs if is_prefill else transfer,
        "prealloc": prealloc,
        "running": load.num_running_reqs,
        "retracted": retracted,
    }


def _kv_sent(sent: KVSent | None) -> dict[str, object] | None:
    """What the worker's own data plane tells; None for a stock SGLang server."""
    if sent is None:
        return None
    counters = sent.counters
    return {
        "bytes": counters.kv_bytes,
        "bytes_s": sent.bytes_s,
        "transfers": counters.transfers,
        "failures": counters.failures,
        "path": sent.path,
        "transfer_s": sent.transfer_s,
    }


def _queue(fleet: WorkerFleet) -> dict[str, object]:
    """``shed`` counts refused requests by reason, ``completed_per_s`` those that ended in the last 30 s."""
    admission, now_s = fleet.admission, time.monotonic()
    oldest_s = admission.line.oldest_s
    return {
        "length": len(admission.line),
        "size": admission.line.size,
        "oldest_wait_s": 0.0 if oldest_s is None else now_s - oldest_s,
        "shed": dict(admission.shed),
        "dispatched": admission.placement.num_open,
        "max_dispatched": fleet.config.max_concurrent_requests,
        "completed_per_s": admission.completions.per_s(now_s),
    }


def _admission(worker: Worker) -> dict[str, object]:
    """What is promised of a worker, and its limits; a limit of 0 is not known."""
    view = worker.view
    return {
        "reqs": view.num_reqs,
        "max_reqs": view.max_running_requests,
        "promised_tokens": worker.promised_tokens,
        "committed_tokens": committed_tokens(worker),
        "capacity_tokens": view.kv_capacity,
        "queued_s": view.queued_tokens / (view.prefill_tokens_s * view.info.dp_size)
        if worker.role is Role.PREFILL
        else 0.0,
        "overloaded": worker.is_overloaded,
        "held": worker.held_for is not None,
    }


def _without_user(url: str) -> str:
    """An address without the name and password that may stand in it."""
    scheme, slashes, rest = url.rpartition("//")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _pairs(
    records: Sequence[PairRecord], traffic: PairTraffic, seen: Mapping[InstanceId, WorkerFigures]
) -> list[dict[str, object]]:
    """A thousand rows of a fleet of 64, twice a second: what depends on the prefill worker alone is
    found out once for each."""
    rows: list[dict[str, object]] = []
    find, last, token_bytes, path = traffic.find, None, 0, ""
    for record in records:
        prefill = record.prefill.info
        if prefill is not last:
            last, token_bytes = prefill, kv_bytes_per_token(prefill.kv_layout)
            figures = seen.get(prefill.instance_id)
            path = figures.sent.path if figures is not None and figures.sent is not None else ""
        decode = record.decode.info
        row: dict[str, object] = {
            "prefill": prefill.worker_id,
            "decode": decode.worker_id,
            "state": record.state._value_,
            "probe_s": record.probe_s,
            "probes": record.probes,
            "error": record.error,
            "requests": record.requests,
            "prompt_tokens": 0,
            "kv_bytes": None,
            "kv_bytes_s": None,
            "transfer_p50_s": None,
            "kv_path": "",
        }
        if (flow := find((prefill.instance_id, decode.instance_id))) is not None:
            row["prompt_tokens"], row["kv_path"] = flow.prompt_tokens, path
            row["transfer_p50_s"] = flow.transfer_p50_s
            if token_bytes:
                row["kv_bytes"] = flow.prompt_tokens * token_bytes
                row["kv_bytes_s"] = flow.tokens_s * token_bytes
        rows.append(row)
    return rows
