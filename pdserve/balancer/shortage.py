"""Why no pair can serve a request now, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.balancer.member import PairKey, PairRecord, PairState, Worker, WorkerState
from pdserve.types import Role


def explain_shortage(
    workers: Sequence[Worker], pairs: Sequence[PairRecord], exclude: frozenset[PairKey], bootstrap: str = ""
) -> str:
    """One sentence for the client and the operator.

    ``bootstrap`` says what is wrong with the bootstrap service, if anything.
    """
    absent = [str(role) for role in Role if not any(worker.role is role for worker in workers)]
    if absent:
        reason = f"no {' and no '.join(absent)} server is registered"
        return f"{reason}; {bootstrap}" if bootstrap else reason
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
