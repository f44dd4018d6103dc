"""What an operator should look at in a state document, the worst first. Pure.

The monitor's "needs attention" and ``pdserve doctor URL`` show this one list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.state.document import StateDocument
from pdserve.state.workers import WorkerEntry

STALLED_S = 10.0
KV_FULL = 0.9
RECENT_S = 900.0
"""How long a worker that left is a problem."""
REMOVED = "removed by an operator"
LAYOUTS_DIFFER = "KV layouts differ"
MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``subject``: the worker, or the part of the service.

    ``is_error``: requests fail or a part of the fleet is out of use; else it is slower than it could be.
    """

    subject: str
    what: str
    why: str
    what_to_do: str
    is_error: bool = True


def find_problems(state: StateDocument) -> list[Problem]:
    """All problems; errors before warnings."""
    found = [*_workers(state), *_roles(state), *_bootstrap(state), *_pairs(state), *_pressure(state)]
    return sorted([*found, *_departures(state)], key=lambda problem: not problem.is_error)


def _workers(state: StateDocument) -> Iterator[Problem]:
    for worker in state.workers:
        if worker.mismatch:
            yield Problem(
                worker.worker_id,
                f"kept out: {worker.mismatch}",
                "with the others it would give wrong answers; they have its share of the load",
                "see docs/operating.md, weights; it comes back by itself once it agrees with the others",
            )
        elif worker.is_troubled:
            what = "suspect" if worker.state == "suspect" else f"breaker {worker.breaker}"
            yield Problem(
                worker.worker_id,
                f"{what}: {worker.last_error}" if worker.last_error else what,
                f"the balancer sends it no request ({worker.url}); the others have its share of the load",
                "look at its log and restart it if it is gone; the balancer tries it again by itself",
            )
    for worker in state.workers:
        if worker.wedge.stalled_s >= STALLED_S:
            yield Problem(
                worker.worker_id,
                f"makes no progress for {worker.wedge.stalled_s:.0f} s",
                "its scheduler or a transfer hangs; the balancer takes it for dead after wedge_s",
                "look at its log and restart it",
            )

    for worker in state.workers:
        if worker.paused:
            yield Problem(
                worker.worker_id,
                "generation is paused",
                "its requests wait, and new ones go elsewhere while somebody else can serve",
                f"POST /continue_generation?worker={worker.worker_id}",
                is_error=False,
            )


def _roles(state: StateDocument) -> Iterator[Problem]:
    for role in ("prefill", "decode"):
        if not any(worker.role == role for worker in state.workers):
            yield Problem(
                "workers",
                f"no {role} worker",
                "every request needs one of each role",
                f"start one: `pdserve {role} --join HOST:PORT`, or look at its log",
            )
    for row in state.capacity:
        if row.present and row.absent:
            yield Problem(
                "workers",
                f"{row.absent} {'is' if row.expected - row.present == 1 else 'are'} missing",
                "the others have their share of the load",
                "look at their logs: the launcher restarts what it started, and tells when it gives up",
            )


def _bootstrap(state: StateDocument) -> Iterator[Problem]:
    service = state.bootstrap
    if service is not None and service.url and not service.connected:
        yield Problem(
            "bootstrap",
            f"service at {service.url} lost: nobody can join",
            "workers that die go unnoticed, and decode servers find no new prefill server",
            "start it again: `pdserve bootstrap` with the same address; workers register by themselves",
        )


def _pairs(state: StateDocument) -> Iterator[Problem]:
    failed: dict[str, list[str]] = {}
    for pair in state.pairs:
        if pair.state == "failed":
            failed.setdefault(pair.error, []).append(pair.label)
    for error, labels in failed.items():
        more = f" and {len(labels) - MAX_NAMED} more" if len(labels) > MAX_NAMED else ""
        what = f"{', '.join(labels[:MAX_NAMED])}{more} failed: {error or 'no token came through'}"
        if error.startswith(LAYOUTS_DIFFER):
            why = "KV pages of one do not fit the other: these pairs never take traffic"
            todo = "start both roles with the same model, --page-size, --dtype and --kv-cache-dtype"
            yield Problem("KV layouts", what, why, todo)
        else:
            why = "the balancer sends requests only where its own token came through"
            todo = "look at the logs of both workers; if every pair fails, run `pdserve doctor` there"
            yield Problem("pairs", what, why, todo)


def _pressure(state: StateDocument) -> Iterator[Problem]:
    queue, rates = state.queue, state.rates
    if queue is not None and queue.length:
        yield Problem(
            "queue",
            f"{queue.length} requests wait for a pair, the oldest for {queue.oldest_wait_s:.1f} s",
            "requests may wait longer than clients do, or are refused with 503",
            "add workers of the role that is short (see the regime), or send less",
            is_error=False,
        )
    if rates is not None and rates.failed_s:
        yield Problem(
            "requests",
            f"{rates.failed_s:.2g} a second fail",
            "clients get errors",
            "see the errors of recent requests in `pdserve monitor`",
            is_error=False,
        )
    full = [worker for worker in state.workers if (worker.kv_usage or 0.0) >= KV_FULL]
    if full:
        most = max(full, key=lambda worker: worker.kv_usage or 0.0)
        others = f" (and {len(full) - 1} more)" if len(full) > 1 else ""
        yield _kv_problem(most, f"KV pool {most.kv_usage:.0%} used{others}")
    for worker in state.workers:
        if worker.queues is not None and worker.queues.retracted:
            yield _kv_problem(worker, f"{worker.queues.retracted} requests retracted for lack of KV room")


def _kv_problem(worker: WorkerEntry, what: str) -> Problem:
    return Problem(
        worker.worker_id,
        what,
        "decode servers then retract running requests, prefill servers stop taking new ones",
        "add servers of that role, raise --mem-fraction-static or --max-total-tokens, or send less",
        is_error=False,
    )


def _departures(state: StateDocument) -> Iterator[Problem]:
    """Workers that left within ``RECENT_S``, were not removed by an operator and are not back."""
    present = {worker.worker_id for worker in state.workers}
    gone = {event.worker: event for event in state.events if event.event == "gone"}
    for name, event in gone.items():
        age_s = state.now_s - event.time_s
        if age_s <= RECENT_S and name not in present and event.detail != REMOVED:
            yield Problem(
                name,
                f"left the fleet {age_s:.0f} s ago: {event.detail}",
                "its process ended, or lost the bootstrap service for longer than its lease",
                "look at its log; the launcher restarts what it started",
                is_error=False,
            )
