"""Who is a member of the fleet: reports, leases, refusals. Pure: ``now`` is passed in, no sockets.

rank reports ─► instance known ─► Register ─► member with a lease ─► expires / leaves / superseded
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from pdserve.bootstrap.messages import PROTOCOL_VERSION, FleetView, Lease, RankRoute, Refusal, Register
from pdserve.errors import PdserveError
from pdserve.types import InstanceId, KVLayoutDescriptor, WorkerInfo

logger = logging.getLogger(__name__)

UNREGISTERED_TTL_S = 900.0
"""How long reported ranks wait for their server to register: weights of a large model load in between."""


class Refused(PdserveError):
    """The request is refused; ``refusal`` is the body of the answer and ``status`` its HTTP status."""

    STATUS: ClassVar[dict[str, int]] = {"ranks_pending": 425, "unknown_instance": 404, "bad_request": 400}

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(code=code, message=message)
        self.status = self.STATUS.get(code, 409)


@dataclass(slots=True)
class Instance:
    """What is known of one worker process. ``worker`` is None until it registers."""

    instance_id: InstanceId
    ranks: dict[int, RankRoute] = field(default_factory=dict)
    worker: WorkerInfo | None = None
    lease_s: float = 0.0
    expires_s: float = 0.0

    @property
    def has_all_ranks(self) -> bool:
        """True once as many ranks have reported as the instance says it has."""
        return bool(self.ranks) and len(self.ranks) >= next(iter(self.ranks.values())).num_ranks

    @property
    def kv_layout(self) -> KVLayoutDescriptor | None:
        """Layout of the first rank; ``report_rank`` keeps the others equal."""
        return next(iter(self.ranks.values())).kv_layout if self.ranks else None


class Registry:
    """All instances. ``on_gone`` is called with the id of each instance that leaves, whatever the cause."""

    def __init__(self, on_gone: Callable[[InstanceId], None] = lambda _: None) -> None:
        self.epoch = secrets.token_hex(8)
        self.version = 0
        self._on_gone = on_gone
        self._instances: dict[InstanceId, Instance] = {}

    def get(self, instance_id: InstanceId) -> Instance | None:
        """The instance, or None."""
        return self._instances.get(instance_id)

    def members(self) -> list[WorkerInfo]:
        """Registered workers, oldest first."""
        return [i.worker for i in self._instances.values() if i.worker is not None]

    def view(self, uptime_s: float) -> FleetView:
        """The document that balancers watch."""
        return FleetView(epoch=self.epoch, version=self.version, workers=self.members(), uptime_s=uptime_s)

    def report_rank(self, instance_id: InstanceId, report: RankRoute, now: float) -> Instance:
        """Take one rank's report. Raises Refused if it contradicts its siblings or the fleet."""
        instance = self._instances.get(instance_id) or Instance(instance_id)
        for sibling in instance.ranks.values():
            if differences := report.kv_layout.differences(sibling.kv_layout):
                raise Refused("mismatch", f"ranks of one server disagree: {'; '.join(differences)}")
        self._check_fits_fleet(f"{report.role} server", instance_id, "", report.kv_layout, None)
        instance.ranks[report.rank] = report
        if instance.worker is None:
            instance.expires_s = now + UNREGISTERED_TTL_S
        self._instances[instance_id] = instance
        return instance

    def register(self, request: Register, now: float) -> Lease:
        """Make the worker a member. Raises Refused: ranks_pending, mismatch, protocol."""
        worker = request.worker
        if request.protocol != PROTOCOL_VERSION:
            raise Refused(
                "protocol",
                f"{worker.worker_id} speaks protocol {request.protocol}, this service {PROTOCOL_VERSION}: "
                "run the same pdserve version on every machine",
            )
        for report in request.ranks:
            self.report_rank(worker.instance_id, report, now)
        instance = self._instances.get(worker.instance_id)
        if instance is None or not instance.has_all_ranks:
            found = 0 if instance is None else len(instance.ranks)
            raise Refused("ranks_pending", f"{worker.worker_id}: {found} ranks have reported so far")
        layout = instance.kv_layout
        assert layout is not None
        self._check_fits_fleet(
            worker.worker_id, worker.instance_id, worker.worker_id, layout, worker.served_model_name
        )
        self._supersede(worker)
        instance.worker = msgspec.structs.replace(worker, kv_layout=layout)
        instance.lease_s = request.lease_s
        instance.expires_s = now + request.lease_s
        self.version += 1
        logger.info("joined worker=%s role=%s url=%s", worker.worker_id, worker.role, worker.url)
        return self.lease(worker.instance_id)

    def lease(self, instance_id: InstanceId) -> Lease:
        """The lease of a registered instance."""
        instance = self._instances[instance_id]
        assert instance.worker is not None
        ranks = [instance.ranks[rank] for rank in sorted(instance.ranks)]
        return Lease(worker=instance.worker, ranks=ranks, lease_s=instance.lease_s, epoch=self.epoch)

    def set_address(self, instance_id: InstanceId, host: str, port: int) -> None:
        """Record where SGLang's bootstrap protocol is served for this prefill instance."""
        instance = self._instances[instance_id]
        if instance.worker is not None:
            changed = msgspec.structs.replace(instance.worker, bootstrap_host=host, bootstrap_port=port)
            if changed != instance.worker:
                instance.worker = changed
                self.version += 1

    def heartbeat(self, instance_id: InstanceId, now: float) -> Lease:
        """Renew. Raises Refused unknown_instance if it must register (again)."""
        instance = self._instances.get(instance_id)
        if instance is None or instance.worker is None:
            raise Refused("unknown_instance", f"instance {instance_id} has no lease here: register again")
        instance.expires_s = now + instance.lease_s
        return self.lease(instance_id)

    def deregister(self, instance_id: InstanceId, reason: str) -> bool:
        """Forget the instance; True if it was known."""
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return False
        if instance.worker is not None:
            self.version += 1
            logger.info("left worker=%s reason=%s", instance.worker.worker_id, reason or "none given")
        self._on_gone(instance_id)
        return True

    def expire(self, now: float) -> list[InstanceId]:
        """Drop instances whose lease (or wait to register) has run out."""
        late = [i.instance_id for i in self._instances.values() if i.expires_s <= now]
        for instance_id in late:
            self.deregister(instance_id, "lease ran out")
        return late

    def _supersede(self, worker: WorkerInfo) -> None:
        """A restarted worker replaces its predecessor at once: same name, other instance."""
        for other in self.members():
            if other.worker_id == worker.worker_id and other.instance_id != worker.instance_id:
                self.deregister(other.instance_id, f"superseded by instance {worker.instance_id}")

    def _check_fits_fleet(
        self,
        who: str,
        instance_id: InstanceId,
        worker_id: str,
        layout: KVLayoutDescriptor,
        model: str | None,
    ) -> None:
        for other in self._instances.values():
            if other.instance_id == instance_id or other.worker is None or other.kv_layout is None:
                continue
            if other.worker.worker_id == worker_id:
                continue  # about to be superseded
            differences = layout.differences(other.kv_layout)
            if model is not None and model != other.worker.served_model_name:
                differences.insert(0, f"model: {model} != {other.worker.served_model_name}")
            if differences:
                raise Refused(
                    "mismatch",
                    f"{who} cannot join: {'; '.join(differences)} (theirs: {other.worker.worker_id}). "
                    "Start it with the same model and KV flags as the fleet, or stop the others first",
                )
