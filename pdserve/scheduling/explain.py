"""Why no pair can serve a request now, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.scheduling.kv_room import committed_tokens
from pdserve.scheduling.workers import PairKey, PairRecord, PairState, Worker, WorkerState
from pdserve.types import Role

NUM_NAMED = 4
"""Full workers described one by one; of more, the client learns only how many there are."""


def explain_fullness(
    usable: Sequence[PairRecord], lacks_room: Callable[[Worker], bool], num_open: int, max_open: int
) -> str:
    """Why a request has to wait although there are pairs that take traffic.

    ``lacks_room`` tells it of one worker; ``max_open`` bounds the requests under way, 0: nothing does.
    """
    if 0 < max_open <= num_open:
        return f"{num_open} requests are under way, which is the limit (max_concurrent_requests)"
    for role, row in (
        (Role.DECODE, dict.fromkeys(record.decode for record in usable)),
        (Role.PREFILL, dict.fromkeys(record.prefill for record in usable)),
    ):
        full = [worker for worker in row if lacks_room(worker)]
        if len(full) == len(row):
            named = "; ".join(_fullness(worker) for worker in full[:NUM_NAMED])
            return f"all {len(full)} usable {role} servers are full: {named}"
    return "others are first in line"


def _fullness(worker: Worker) -> str:
    view = worker.view
    if worker.is_overloaded:
        return f"{worker.worker_id} says so"
    parts = [f"{view.num_reqs} of {view.max_running_requests or 'any number of'} requests"]
    if view.kv_capacity:
        parts.append(f"{committed_tokens(worker)} of {view.kv_capacity} KV tokens promised")
    if worker.role is Role.PREFILL:
        parts = [f"{view.queued_tokens:.0f} tokens queued at {view.prefill_tokens_s:.0f}/s", *parts[1:]]
    return f"{worker.worker_id}: {', '.join(parts)}"


def explain_shortage(
    workers: Sequence[Worker], pairs: Sequence[PairRecord], exclude: frozenset[PairKey], hint: str = ""
) -> str:
    """One sentence for the client and the operator.

    ``hint`` is what to do if a role has no server at all.
    """
    absent = [str(role) for role in Role if not any(worker.role is role for worker in workers)]
    if absent:
        reason = f"no {' and no '.join(absent)} server is registered"
        return f"{reason}; {hint}" if hint else reason
    ready = [record for record in pairs if record.state is PairState.READY]
    if ready and all(record.key in exclude for record in ready):
        labels = ", ".join(record.label for record in ready)
        return f"every ready pair has already failed this request: {labels}"
    silent = [worker for worker in workers if not worker.answers.is_set()]
    for role in Role:
        of_role = [worker for worker in workers if worker.role is role]
        if all(worker in silent for worker in of_role):
            first = of_role[0]
            return f"no {role} server answers; {first.worker_id}: {first.last_error or 'not asked yet'}"
    draining = [worker for worker in workers if worker.is_draining]
    for role in Role:
        of_role = [worker for worker in workers if worker.role is role]
        if all(worker in draining for worker in of_role):
            return f"every {role} server is draining: {', '.join(worker.worker_id for worker in of_role)}"
    failed = [record for record in pairs if record.state is PairState.FAILED]
    if len(failed) == len(pairs):
        return f"all {len(pairs)} pairs failed their test; {failed[-1].label}: {failed[-1].error}"
    testing = len(pairs) - len(failed)
    reason = f"{testing} of {len(pairs)} pairs are still being tested"
    errors = [record for record in pairs if record.error]
    if any(worker.state is WorkerState.SUSPECT for worker in workers) or errors:
        last = errors[-1] if errors else pairs[-1]
        reason += f"; {last.label}: {last.error or 'a worker is suspect'}"
    return reason
