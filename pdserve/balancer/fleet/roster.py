"""Which workers and pairs there are. Data only: no task, no verdict, no clock."""

from __future__ import annotations

import uuid
from urllib.parse import urlsplit

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.workers import PairKey, PairRecord, Worker
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo


class Roster:
    """Members by instance id, and a record for each prefill x decode pair of them."""

    def __init__(self) -> None:
        self.members: dict[InstanceId, Worker] = {}
        self.records: dict[PairKey, PairRecord] = {}
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
