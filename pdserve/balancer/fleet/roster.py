"""The fleet's members and their pairs. Data only: no task, no clock."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from pdserve.balancer.fleet.weights import Weights
from pdserve.balancer.fleet.worker import PairRecord, PairState, Worker, WorkerState
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.workers import PairKey
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo


class Roster:
    """Members by instance id, and a record for each prefill x decode pair of them."""

    def __init__(self) -> None:
        self.members: dict[InstanceId, Worker] = {}
        self.records: dict[PairKey, PairRecord] = {}
        self.agreed = Weights()
        """What every worker must have loaded to serve."""
        self._in_order: list[PairRecord] | None = None

    def __contains__(self, worker: Worker) -> bool:
        return self.members.get(worker.instance_id) is worker

    def add(self, worker: Worker) -> list[PairRecord]:
        """Take in a member; returns its new pairs."""
        self.members[worker.instance_id] = worker
        self._in_order = None
        is_prefill = worker.role is Role.PREFILL
        partners = [other for other in self.members.values() if other.role is not worker.role]
        records = [
            PairRecord(worker, other) if is_prefill else PairRecord(other, worker) for other in partners
        ]
        self.records.update({record.key: record for record in records})
        return records

    def remove(self, worker: Worker) -> list[PairRecord]:
        """Forget a member; returns the pairs that go with it."""
        del self.members[worker.instance_id]
        self._in_order = None
        doomed = self.pairs_of(worker)
        for record in doomed:
            del self.records[record.key]
        return doomed

    def find(self, worker_id: WorkerId) -> Worker | None:
        """The member of that name."""
        return next((worker for worker in self.members.values() if worker.worker_id == worker_id), None)

    def pairs_of(self, worker: Worker) -> list[PairRecord]:
        """The pairs that ``worker`` is part of."""
        return [record for record in self.records.values() if worker in (record.prefill, record.decode)]

    def ready_pairs(self) -> list[PairRecord]:
        """The pairs that may take traffic: of the same weights, and paused ones only if there is no other."""
        ready = [record for record in self.records.values() if record.state is PairState.READY]
        if apart := {worker for worker in self.members.values() if worker.weights != self.agreed}:
            ready = [record for record in ready if apart.isdisjoint((record.prefill, record.decode))]
        return [record for record in ready if not record.is_paused] or ready

    def alone(self) -> list[Worker]:
        """The decode workers that may be given requests to prefill themselves."""
        return [
            worker
            for worker in self.members.values()
            if worker.info.prefills_locally
            and worker.state is WorkerState.READY
            and not (worker.mismatch or worker.is_paused or worker.weights != self.agreed)
        ]

    def why_apart(self, worker: Worker) -> str:
        """Why the worker may not serve with the others: it has other weights. Empty if it has not."""
        if worker.weights == self.agreed:
            return ""
        verb = "was told" if worker.is_ahead else "has"
        return f"{worker.worker_id} {verb} other weights ({worker.weights}) than the fleet ({self.agreed})"

    def is_behind(self, worker: Worker) -> bool:
        """True if the worker has missed something that the fleet has, and is not being told just now."""
        return worker.weights != self.agreed and not worker.is_ahead and not worker.num_updates

    def workers(self) -> list[Worker]:
        """Every member, prefill first, each role in the order of its names."""
        return sorted(
            self.members.values(), key=lambda w: (w.role is Role.DECODE, len(w.worker_id), w.worker_id)
        )

    def pairs(self) -> list[PairRecord]:
        """Every pair, in the order of ``workers``; sorted at changes only, there may be thousands."""
        if self._in_order is None:
            order = {worker.instance_id: index for index, worker in enumerate(self.workers())}
            self._in_order = sorted(self.records.values(), key=lambda r: (order[r.key[0]], order[r.key[1]]))
        return list(self._in_order)


def explain_shortage(workers: Sequence[Worker], pairs: Sequence[PairRecord], hint: str = "") -> str:
    """Why no pair is ready, in one sentence for the client and the operator.

    ``hint`` is what to do if a role has no server at all.
    """
    absent = [str(role) for role in Role if not any(worker.role is role for worker in workers)]
    if absent:
        reason = f"no {' and no '.join(absent)} server is registered"
        return f"{reason}; {hint}" if hint else reason
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
    return _explain_probes(workers, pairs)


def _explain_probes(workers: Sequence[Worker], pairs: Sequence[PairRecord]) -> str:
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


def static_workers(config: BalancerConfig) -> list[WorkerInfo]:
    """Describe ``config.prefill`` and ``config.decode`` as ``prefill-0``, ``decode-0`` ….

    A prefill server's bootstrap host is the host of its URL, as SGLang's own
    router takes it. What only the server knows (model) stays empty.

    Raises:
        ConfigError: for an address that is not ``http://host:port`` or ``https://host:port``.
    """
    prefills = [_worker(Role.PREFILL, index, url, port) for index, (url, port) in enumerate(config.prefill)]
    return prefills + [_worker(Role.DECODE, index, url, None) for index, url in enumerate(config.decode)]


def _worker(role: Role, index: int, url: str, bootstrap_port: int | None) -> WorkerInfo:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        is_usable = is_usable and not parts.username and not parts.password
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(
            f"--{role} expects http://host:port or https://host:port, got {_without_user(url)!r}"
        )
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(uuid.uuid4().hex),
        role=role,
        url=f"{parts.scheme}://{parts.netloc}",
        model="",
        bootstrap_host=(parts.hostname or "") if role is Role.PREFILL else "",
        bootstrap_port=bootstrap_port,
    )


def _without_user(url: str) -> str:
    """A password in a refused address must not reach the log."""
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition('//')[0]}//…@{tail}" if at else url
