"""The balancer's own metrics as Prometheus text, rendered from the counts at each scrape.

RequestLedger ─┐
WorkerFleet ───┼─► render_metrics ─► text/plain; version=0.0.4
WorkerMetrics ─┘
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pdserve import __version__
from pdserve.balancer.fleet.breaker import BreakerState
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.worker import PairRecord, PairState, Worker, WorkerState
from pdserve.balancer.metrics import catalog
from pdserve.balancer.metrics.catalog import Metric
from pdserve.balancer.metrics.exposition import label_pairs
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.pairs import PairFlow, kv_bytes_per_token
from pdserve.balancer.metrics.state import kv_usage
from pdserve.balancer.metrics.windows import LatencyWindow
from pdserve.balancer.metrics.workers import WorkerFigures, WorkerMetrics
from pdserve.scheduling.regime import Regime

_WORKER_STATES = tuple(state.value for state in WorkerState)
_BREAKER_STATES = tuple(state.value for state in BreakerState)


def render_metrics(fleet: WorkerFleet, metrics: WorkerMetrics, ledger: RequestLedger) -> str:
    """Every family of the catalogue that has a sample."""
    page = _Page()
    for name, window in ledger.rolling.latencies.items():
        page.histogram(catalog.LATENCIES[name], window)
    _add_requests(page, ledger)
    _add_service(page, fleet)
    page.histogram(catalog.KV_TRANSFER, metrics.kv_transfer)
    for worker in fleet.workers():
        _add_worker(page, fleet, worker, metrics.of(worker))
    policy = label_pairs([("policy", fleet.scheduler.policy.name)])
    for record in fleet.pairs():
        num_requests = fleet.scheduler.num_requests(record.key)
        _add_pair(page, record, num_requests, ledger.traffic.find(record.key), policy)
    return page.text()


class _Page:
    """Samples by family; families come out in the catalogue's order.

    ``labels`` are written once for each worker and pair (``label_pairs``): a fleet of 64 has a
    thousand pairs, with several samples each.
    """

    def __init__(self) -> None:
        self._samples: dict[str, list[str]] = {metric.name: [] for metric in catalog.METRICS}

    def add(self, metric: Metric, value: float | None, labels: str = "") -> None:
        """One sample; None is not one."""
        if value is not None:
            name = metric.name
            shown = f"{name}{{{labels}}}" if labels else name
            self._samples[name].append(f"{shown} {_number(value)}")

    def choice(self, metric: Metric, states: Sequence[str], now: str, labels: str) -> None:
        """A sample for each state, 1 for the present one."""
        for state in states:
            self.add(metric, state == now, f'{labels},state="{state}"')

    def histogram(self, metric: Metric, window: LatencyWindow) -> None:
        """Buckets, sum and count since the start."""
        counts, seconds = window.totals(metric.bounds)
        bounds = [*(_number(bound) for bound in metric.bounds), "+Inf"]
        lines = [
            f'{metric.name}_bucket{{le="{le}"}} {count}' for le, count in zip(bounds, counts, strict=True)
        ]
        lines += [f"{metric.name}_sum {_number(seconds)}", f"{metric.name}_count {counts[-1]}"]
        self._samples[metric.name] = lines

    def text(self) -> str:
        """The exposition."""
        lines: list[str] = []
        for metric in catalog.METRICS:
            if samples := self._samples[metric.name]:
                lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
                lines += samples
        return "\n".join(lines) + "\n"


def _labels(metric: Metric, *values: str) -> str:
    return label_pairs(zip(metric.labels, values, strict=True))


def _add_requests(page: _Page, ledger: RequestLedger) -> None:
    page.add(catalog.RECEIVED, ledger.total)
    for (route, outcome, is_stream), number in sorted(ledger.counts.items()):
        ways = _labels(catalog.REQUESTS, route, outcome, str(is_stream).lower())
        page.add(catalog.REQUESTS, number, ways)
    page.add(catalog.RETRIES, ledger.retried)
    page.add(catalog.RESUMES, ledger.resumed, _labels(catalog.RESUMES, "failed"))
    page.add(catalog.RESUMES, ledger.moved, _labels(catalog.RESUMES, "moved"))
    page.add(catalog.DEFLECTED, ledger.deflected)
    page.add(catalog.PROMPT_TOKENS, ledger.prompt_tokens)
    page.add(catalog.OUTPUT_TOKENS, ledger.completion_tokens)
    page.add(catalog.INFLIGHT, ledger.inflight)


def _add_service(page: _Page, fleet: WorkerFleet) -> None:
    admission, now_s, watcher = fleet.scheduler.admission, time.monotonic(), fleet.watcher
    page.add(catalog.BUILD, 1, _labels(catalog.BUILD, __version__, fleet.scheduler.policy.name))
    page.add(catalog.STARTED, round(time.time() - now_s + fleet.started_s, 3))
    for reason, number in sorted(admission.shed.items()):
        page.add(catalog.SHED, number, _labels(catalog.SHED, reason))
    page.add(catalog.DISPATCHED, admission.placement.num_open)
    page.add(catalog.QUEUED, len(admission.queue))
    page.add(catalog.QUEUE_SIZE, admission.queue.size)
    oldest_s = admission.queue.oldest_s
    page.add(catalog.OLDEST, 0.0 if oldest_s is None else now_s - oldest_s)
    page.add(catalog.CONNECTED, watcher is not None and watcher.is_connected)
    regime = admission.regime
    for each in Regime:
        page.add(catalog.REGIME, each is regime.regime, _labels(catalog.REGIME, str(each)))
    for role, score in regime.scores.items():
        page.add(catalog.SCORE, score, _labels(catalog.SCORE, str(role)))


def _add_worker(page: _Page, fleet: WorkerFleet, worker: Worker, figures: WorkerFigures) -> None:
    who = _labels(catalog.WORKER_INFLIGHT, str(worker.worker_id), str(worker.role))
    page.choice(catalog.WORKER_STATE, _WORKER_STATES, str(worker.state), who)
    page.choice(catalog.BREAKER, _BREAKER_STATES, str(worker.breaker.state), who)
    page.add(catalog.OPENED, worker.breaker.opened, who)
    for kind, number in sorted(worker.failures.items()):
        page.add(catalog.LEG_ERRORS, number, f'{who},kind="{kind}"')
    page.add(catalog.WORKER_INFLIGHT, worker.num_inflight, who)
    load = fleet.scheduler.table.load(worker.instance_id)
    if load is not None:
        page.add(catalog.WORKER_RUNNING, load.num_running_reqs, who)
        page.add(catalog.WORKER_WAITING, load.queued_reqs, who)
        page.add(catalog.WORKER_KV, kv_usage(load), who)
        page.add(catalog.WORKER_AGE, max(0.0, time.monotonic() - load.timestamp_s), who)
    _add_figures(page, figures, who)


def _add_figures(page: _Page, figures: WorkerFigures, who: str) -> None:
    page.add(catalog.WORKER_TOKENS, figures.tokens_s, who)
    if figures.sent is None:
        return
    counters = figures.sent.counters
    page.add(catalog.KV_BYTES, counters.kv_bytes, who)
    page.add(catalog.KV_TRANSFERS, counters.transfers, who)
    page.add(catalog.KV_FAILURES, counters.failures, who)
    page.add(catalog.KV_CHUNKS, counters.direct_chunks, f'{who},path="direct"')
    page.add(catalog.KV_CHUNKS, counters.packed_chunks, f'{who},path="packed"')


def _add_pair(page: _Page, record: PairRecord, num_requests: int, flow: PairFlow | None, policy: str) -> None:
    pair = _labels(catalog.PAIR_READY, record.prefill.info.worker_id, record.decode.info.worker_id)
    page.add(catalog.DECISIONS, num_requests, f"{pair},{policy}")
    page.add(catalog.PROBES, record.probes, pair)
    page.add(catalog.PAIR_READY, record.state is PairState.READY, pair)
    if flow is not None:
        page.add(catalog.PAIR_TOKENS, flow.prompt_tokens, pair)
        if token_bytes := kv_bytes_per_token(record.prefill.info.kv_layout):
            page.add(catalog.PAIR_BYTES, flow.prompt_tokens * token_bytes, pair)


def _number(value: float) -> str:
    """As short as it is exact; booleans are 0 and 1."""
    if isinstance(value, int):
        return str(int(value))
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
