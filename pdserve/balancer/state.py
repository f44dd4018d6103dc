"""The state document: ``GET /pdserve/state``, read by monitor, tests and operators. Pure."""

from __future__ import annotations

import time
from dataclasses import asdict

from pdserve import __version__
from pdserve.balancer.fleet import Fleet
from pdserve.balancer.member import PairRecord, Worker
from pdserve.balancer.room import committed_tokens
from pdserve.types import Role


def render_state(fleet: Fleet, dispatcher_snapshot: dict[str, object]) -> dict[str, object]:
    """Plain dicts and lists, ready for JSON.

    ``dispatcher_snapshot`` brings what the data plane knows (``requests``,
    ``recent``) and may override any other key.
    """
    watcher = fleet.watcher
    return {
        "version": __version__,
        "uptime_s": time.monotonic() - fleet.started_s,
        "model": fleet_model(fleet),
        "policy": fleet.policy.name,
        "bootstrap": {
            "url": _without_user(fleet.config.bootstrap_url),
            "connected": watcher is not None and watcher.is_connected,
            "epoch": watcher.epoch if watcher is not None else "",
        },
        "workers": [_worker(fleet, worker) for worker in fleet.workers()],
        "pairs": [_pair(record) for record in fleet.pairs()],
        "waiting": fleet.num_waiting,
        "queue": _queue(fleet),
        "events": [asdict(event) for event in fleet.events],
        **dispatcher_snapshot,
    }


def fleet_model(fleet: Fleet) -> str:
    """The name the fleet serves under: the first worker's that has one, else an empty string."""
    names = (worker.info.served_model_name or worker.info.model for worker in fleet.workers())
    return next((name for name in names if name), "")


def _worker(fleet: Fleet, worker: Worker) -> dict[str, object]:
    info = worker.info
    load = fleet.table.load(worker.instance_id)
    view = fleet.table.view(worker.instance_id)
    credit = fleet.table.credit(worker.instance_id)
    return {
        "worker_id": info.worker_id,
        "instance_id": info.instance_id,
        "role": str(info.role),
        "url": info.url,
        "state": str(worker.state),
        "inflight": worker.num_inflight,
        "bootstrap_host": info.bootstrap_host,
        "bootstrap_port": info.bootstrap_port,
        "load": None if load is None else {**asdict(load), "decode_moments": list(load.decode_moments)},
        "load_age_s": None if load is None else max(0.0, time.monotonic() - load.timestamp_s),
        "errors": worker.breaker.errors,
        "breaker": str(worker.breaker.state),
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


def _queue(fleet: Fleet) -> dict[str, object]:
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


def _pair(record: PairRecord) -> dict[str, object]:
    return {
        "prefill": record.prefill.worker_id,
        "decode": record.decode.worker_id,
        "state": str(record.state),
        "probe_s": record.probe_s,
        "probes": record.probes,
        "error": record.error,
        "requests": record.requests,
    }
