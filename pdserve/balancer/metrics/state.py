"""Fills in the state document (pdserve/state/document.py) from the fleet, its metrics and the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from msgspec import structs

from pdserve import __version__
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.worker import PairState, Worker
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.pairs import PairFlow, PairTraffic, kv_bytes_per_token
from pdserve.balancer.metrics.workers import KVSent, WorkerFigures, WorkerMetrics
from pdserve.scheduling.kv_room import committed_tokens
from pdserve.state.document import (
    BootstrapFigures,
    EventEntry,
    LengthFigures,
    QueueFigures,
    RegimeFigures,
    StateDocument,
)
from pdserve.state.workers import (
    AdmissionFigures,
    CreditFigures,
    FittedFigures,
    KVSentFigures,
    LoadFigures,
    PairEntry,
    WedgeFigures,
    WorkerEntry,
    WorkerQueues,
)
from pdserve.types import InstanceId, Role, WorkerLoad

_LOAD_FIELDS = LoadFigures.__struct_fields__
_UNUSED = PairFlow()
"""What a pair has carried that no request went over."""


def render_state(fleet: WorkerFleet, metrics: WorkerMetrics, ledger: RequestLedger) -> StateDocument:
    """The document now."""
    watcher, now_s = fleet.watcher, time.monotonic()
    seen = {worker.instance_id: metrics.of(worker) for worker in fleet.workers()}
    ledger_s = ledger.clock()
    ledger.advance(ledger_s)
    lengths = {} if fleet.scheduler.lengths is None else fleet.scheduler.lengths.snapshot()
    return StateDocument(
        version=__version__,
        now_s=time.time(),
        uptime_s=now_s - fleet.started_s,
        model=fleet_model(fleet),
        policy=fleet.scheduler.policy.name,
        regime=msgspec.convert(fleet.scheduler.admission.regime.snapshot(), RegimeFigures),
        lengths=msgspec.convert(lengths, LengthFigures),
        bootstrap=BootstrapFigures(
            url=_without_user(fleet.config.bootstrap_url),
            connected=watcher is not None and watcher.is_connected,
            epoch=watcher.epoch if watcher is not None else "",
        ),
        workers=[_worker(fleet, worker, now_s, seen[worker.instance_id]) for worker in fleet.workers()],
        capacity=fleet.capacity(),
        pairs=_pairs(fleet, ledger.traffic, seen),
        waiting=fleet.scheduler.num_waiting,
        queue=_queue(fleet),
        events=[
            EventEntry(time_s=event.time_s, event=event.event, worker=event.worker, detail=event.detail)
            for event in fleet.events
        ],
        requests=ledger.request_counts(),
        recent=[record.render() for record in ledger.recent],
        rates=ledger.rolling.rates(ledger_s),
        latency=ledger.rolling.latency(ledger_s),
        series=structs.replace(ledger.rolling.series(ledger_s), waiting=metrics.waiting()),
    )


def fleet_model(fleet: WorkerFleet) -> str:
    """The name the fleet serves under: the first worker's that has one, else an empty string."""
    names = (worker.info.served_model_name or worker.info.model for worker in fleet.workers())
    return next((name for name in names if name), "")


def _worker(fleet: WorkerFleet, worker: Worker, now_s: float, figures: WorkerFigures) -> WorkerEntry:
    info, view = worker.info, worker.view
    load = fleet.scheduler.table.load(worker.instance_id)
    credit = fleet.scheduler.table.credit(worker.instance_id)
    return WorkerEntry(
        worker_id=info.worker_id,
        instance_id=info.instance_id,
        role=info.role._value_,
        url=info.url,
        state=worker.state._value_,
        age_s=now_s - figures.joined_s,
        inflight=worker.num_inflight,
        bootstrap_host=info.bootstrap_host,
        bootstrap_port=info.bootstrap_port,
        tokens_s=figures.tokens_s,
        kv_usage=kv_usage(load),
        queues=_queues(worker.role, load),
        kv_sent=_kv_sent(figures.sent),
        load=None if load is None else _load(load),
        load_age_s=None if load is None else max(0.0, now_s - load.timestamp_s),
        errors=worker.breaker.errors,
        failures=dict(worker.failures),
        breaker=worker.breaker.state._value_,
        paused=worker.is_paused,
        draining=worker.is_draining,
        leaving=worker.is_leaving or worker.info.is_leaving,
        admission=_admission(worker),
        wedge=WedgeFigures(stalled_s=worker.stalled_s, wedged=worker.num_wedged),
        mismatch=fleet.why_kept_out(worker),
        last_error=worker.last_error,
        credit=CreditFigures(reqs=credit.reqs, prompt_tokens=credit.prompt_tokens),
        fitted=FittedFigures(
            prefill_tokens_s=view.prefill_tokens_s,
            step_base_s=view.step_base_s,
            step_slope_s=view.step_slope_s,
        ),
    )


def kv_usage(load: WorkerLoad | None) -> float | None:
    """Share of the KV pool in use, 0 to 1; None without a sample."""
    if load is None:
        return None
    usage = (
        load.num_used_tokens / load.max_total_num_tokens if load.max_total_num_tokens else load.token_usage
    )
    return min(1.0, max(0.0, usage))


def _load(load: WorkerLoad) -> LoadFigures:
    return LoadFigures(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def _queues(role: Role, load: WorkerLoad | None) -> WorkerQueues | None:
    """Requests by where they are. SGLang's own waiting figure counts most of these queues in."""
    if load is None:
        return None
    is_prefill = role is Role.PREFILL
    bootstrap, prealloc = load.prefill_bootstrap_queue_reqs, load.decode_prealloc_queue_reqs
    transfer, retracted = load.decode_transfer_queue_reqs, load.decode_retracted_queue_reqs
    return WorkerQueues(
        bootstrap=bootstrap,
        waiting=max(0, load.num_waiting_reqs - bootstrap - prealloc - transfer - retracted),
        inflight_or_transfer=load.prefill_inflight_queue_reqs if is_prefill else transfer,
        prealloc=prealloc,
        running=load.num_running_reqs,
        retracted=retracted,
    )


def _kv_sent(sent: KVSent | None) -> KVSentFigures | None:
    """What the worker's own data plane counts; None for a stock SGLang server."""
    if sent is None:
        return None
    counters = sent.counters
    return KVSentFigures(
        bytes=counters.kv_bytes,
        bytes_s=sent.bytes_s,
        transfers=counters.transfers,
        failures=counters.failures,
        path=sent.path,
        transfer_s=sent.transfer_s,
    )


def _queue(fleet: WorkerFleet) -> QueueFigures:
    """``shed`` counts refused requests by reason, ``completed_per_s`` those that ended in the last 30 s."""
    admission, now_s = fleet.scheduler.admission, time.monotonic()
    oldest_s = admission.queue.oldest_s
    return QueueFigures(
        length=len(admission.queue),
        size=admission.queue.size,
        oldest_wait_s=0.0 if oldest_s is None else now_s - oldest_s,
        shed=dict(admission.shed),
        dispatched=admission.placement.num_open,
        max_dispatched=fleet.config.max_concurrent_requests,
        completed_per_s=admission.completions.per_s(now_s),
    )


def _admission(worker: Worker) -> AdmissionFigures:
    """What is promised on a worker, and its limits; a limit of 0 is not known."""
    view = worker.view
    return AdmissionFigures(
        reqs=view.num_reqs,
        max_reqs=view.max_running_requests,
        promised_tokens=worker.slots.promised_tokens,
        committed_tokens=committed_tokens(worker.slots),
        capacity_tokens=view.kv_capacity,
        queued_s=view.queued_tokens / (view.prefill_tokens_s * view.info.dp_size)
        if worker.role is Role.PREFILL
        else 0.0,
        overloaded=worker.slots.is_overloaded,
        held=worker.slots.held_for is not None,
    )


def _without_user(url: str) -> str:
    """An address without the name and password that may stand in it."""
    scheme, slashes, rest = url.rpartition("//")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _pairs(
    fleet: WorkerFleet, traffic: PairTraffic, seen: Mapping[InstanceId, WorkerFigures]
) -> list[PairEntry]:
    """A row for each pair: a thousand of them in a fleet of 64, twice a second.

    What depends on the prefill worker alone is computed once for each.
    """
    rows: list[PairEntry] = []
    find, last, token_bytes, path = traffic.find, None, 0, ""
    num_requests = fleet.scheduler.num_requests
    apart = {worker.instance_id: why for worker in fleet.workers() if (why := fleet.why_kept_out(worker))}
    for record in fleet.pairs():
        why = (apart.get(record.key[0]) or apart.get(record.key[1]) or "") if apart else ""
        prefill, decode = record.prefill.info, record.decode.info
        if prefill is not last:
            last, token_bytes = prefill, kv_bytes_per_token(prefill.kv_layout)
            figures = seen.get(prefill.instance_id)
            path = figures.sent.path if figures is not None and figures.sent is not None else ""
        flow = find((prefill.instance_id, decode.instance_id)) or _UNUSED
        has_bytes = bool(token_bytes) and flow is not _UNUSED
        rows.append(
            PairEntry(
                prefill=prefill.worker_id,
                decode=decode.worker_id,
                state=(PairState.UNTESTED if why else record.state)._value_,
                probe_s=record.probe_s,
                probes=record.probes,
                error=why or record.error,
                requests=num_requests(record.key),
                prompt_tokens=flow.prompt_tokens,
                kv_bytes=flow.prompt_tokens * token_bytes if has_bytes else None,
                kv_bytes_s=flow.tokens_s * token_bytes if has_bytes else None,
                transfer_p50_s=flow.transfer_p50_s,
                kv_path="" if flow is _UNUSED else path,
            )
        )
    return rows
