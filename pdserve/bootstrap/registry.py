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
from pdserve.bootstrap.route_table import RankRow, RouteError
from pdserve.errors import PdserveError
from pdserve.types import InstanceId, KVLayoutDescriptor, Role, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)

UNREGISTERED_TTL_S = 900.0
"""How long reported ranks wait for their server to register: weights of a large model load in between."""

MAX_SUPERSEDED = 1024

_FLAGS = {"page_size": "--page-size", "dtype": "--kv-cache-dtype", "layout": "attention backend"}
"""What an operator sets to change a field of the layout; the other fields follow from the model."""


class Refused(PdserveError):
    """The request is refused; ``refusal`` is the body of the answer and ``status`` its HTTP status."""

    STATUS: ClassVar[dict[str, int]] = {
        "bad_request": 400, "unknown_instance": 404, "ranks_pending": 425, "no_port": 503,
    }  # fmt: skip

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
    def first_rank(self) -> RankRoute | None:
        """The rank that reported first; ``report_rank`` keeps the others in agreement with it."""
        return next(iter(self.ranks.values()), None)

    @property
    def has_all_ranks(self) -> bool:
        """True once as many ranks have reported as the instance says it has."""
        first = self.first_rank
        return first is not None and len(self.ranks) >= first.num_ranks


class MemberRegistry:
    """All instances. ``on_gone`` is called with the id of each instance that leaves, whatever the cause."""

    def __init__(self, on_gone: Callable[[InstanceId], None] = lambda _: None) -> None:
        self.epoch = secrets.token_hex(8)
        self.version = 0
        self._on_gone = on_gone
        self._instances: dict[InstanceId, Instance] = {}
        self._superseded: dict[InstanceId, WorkerId] = {}  # oldest first

    def get(self, instance_id: InstanceId) -> Instance | None:
        """The instance, or None."""
        return self._instances.get(instance_id)

    def members(self) -> list[WorkerInfo]:
        """Registered workers, in the order in which their instances became known."""
        return [i.worker for i in self._instances.values() if i.worker is not None]

    def namesake(self, worker: WorkerInfo) -> WorkerInfo | None:
        """The live member that has this worker's name but is another instance."""
        for other in self.members():
            if other.worker_id == worker.worker_id and other.instance_id != worker.instance_id:
                return other
        return None

    def view(self, uptime_s: float) -> FleetView:
        """The document that balancers watch."""
        return FleetView(epoch=self.epoch, version=self.version, workers=self.members(), uptime_s=uptime_s)

    def report_rank(self, instance_id: InstanceId, report: RankRoute, now: float) -> Instance:
        """Take one rank's report. Raises Refused if it is malformed or contradicts siblings or fleet."""
        _check_report(report)
        instance = self._instances.get(instance_id) or Instance(instance_id)
        for rank, sibling in instance.ranks.items():
            _check_sibling(report, rank, sibling)
        self._check_layout(f"{report.role} server", instance_id, None, report.kv_layout)
        instance.ranks[report.rank] = report
        if instance.worker is None:
            instance.expires_s = now + UNREGISTERED_TTL_S
        self._instances[instance_id] = instance
        return instance

    def admit(self, request: Register, now: float) -> Instance:
        """Take the ranks it brings and check that ``register`` would accept; makes nobody a member.

        Raises:
            Refused: protocol, bad_request, name_taken, ranks_pending, mismatch.
        """
        worker = request.worker
        if request.protocol != PROTOCOL_VERSION:
            raise Refused(
                "protocol",
                f"{worker.worker_id} speaks protocol {request.protocol}, this service {PROTOCOL_VERSION}: "
                "run the same pdserve version on every machine",
            )
        if not worker.worker_id or not worker.instance_id or request.lease_s <= 0:
            raise Refused("bad_request", "worker_id and instance_id must not be empty, lease_s above 0")
        self._check_name(worker)
        for report in request.ranks:
            self.report_rank(worker.instance_id, report, now)
        instance = self._instances.get(worker.instance_id)
        first = None if instance is None else instance.first_rank
        if instance is None or first is None or not instance.has_all_ranks:
            ranks = f"{len(instance.ranks)} of {first.num_ranks}" if instance and first else "none"
            raise Refused("ranks_pending", f"{worker.worker_id}: {ranks} of its ranks have reported so far")
        if first.role != worker.role:
            raise Refused(
                "bad_request", f"{worker.worker_id} is {worker.role}, but its ranks are {first.role}"
            )
        self._check_model(worker)
        self._check_layout(worker.worker_id, worker.instance_id, worker.worker_id, first.kv_layout)
        return instance

    def register(
        self, request: Register, now: float, bootstrap_host: str = "", bootstrap_port: int | None = None
    ) -> Lease:
        """Make the worker a member, with its address and instead of its namesake. Raises as ``admit``."""
        instance = self.admit(request, now)
        first = instance.first_rank
        assert first is not None
        self.supersede(request.worker)
        worker = msgspec.structs.replace(
            request.worker,
            kv_layout=first.kv_layout,
            bootstrap_host=bootstrap_host,
            bootstrap_port=bootstrap_port,
        )
        if instance.worker != worker:
            self.version += 1
            logger.info(
                "joined worker=%s role=%s instance=%s url=%s",
                worker.worker_id, worker.role, worker.instance_id, worker.url,
            )  # fmt: skip
        instance.worker = worker
        instance.lease_s = request.lease_s
        instance.expires_s = now + request.lease_s
        self._superseded.pop(worker.instance_id, None)
        return self.lease(worker.instance_id)

    def lease(self, instance_id: InstanceId) -> Lease:
        """The lease of a registered instance."""
        instance = self._instances[instance_id]
        assert instance.worker is not None
        ranks = [instance.ranks[rank] for rank in sorted(instance.ranks)]
        return Lease(worker=instance.worker, ranks=ranks, lease_s=instance.lease_s, epoch=self.epoch)

    def heartbeat(self, instance_id: InstanceId, now: float, *, is_leaving: bool = False) -> Lease:
        """Renew; ``is_leaving`` shows in the view from now on.

        Raises:
            Refused: unknown_instance if it must register (again).
        """
        instance = self._instances.get(instance_id)
        if instance is None or instance.worker is None:
            raise Refused("unknown_instance", f"instance {instance_id} has no lease here: register again")
        instance.expires_s = now + instance.lease_s
        if is_leaving and not instance.worker.is_leaving:
            instance.worker = msgspec.structs.replace(instance.worker, is_leaving=True)
            self.version += 1
            logger.info("leaving worker=%s instance=%s", instance.worker.worker_id, instance_id)
        return self.lease(instance_id)

    def deregister(self, instance_id: InstanceId, reason: str) -> bool:
        """Forget the instance; True if it was known."""
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return False
        if instance.worker is not None:
            self.version += 1
            logger.info(
                "left worker=%s instance=%s reason=%s",
                instance.worker.worker_id, instance_id, reason or "none given",
            )  # fmt: skip
        self._on_gone(instance_id)
        return True

    def supersede(self, worker: WorkerInfo) -> bool:
        """Drop the predecessor of a restarted worker: same name, other instance. True if there was one."""
        former = self.namesake(worker)
        if former is None:
            return False
        self.deregister(former.instance_id, f"superseded by instance {worker.instance_id}")
        self._superseded[former.instance_id] = former.worker_id
        if len(self._superseded) > MAX_SUPERSEDED:
            del self._superseded[next(iter(self._superseded))]
        return True

    def expire(self, now: float) -> list[InstanceId]:
        """Drop instances whose lease (or wait to register) has run out."""
        late = [i.instance_id for i in self._instances.values() if i.expires_s <= now]
        for instance_id in late:
            self.deregister(instance_id, "lease ran out")
        return late

    def forgive(self, stalled_s: float) -> None:
        """Extend every lease by a time in which this service itself could not hear anybody."""
        for instance in self._instances.values():
            instance.expires_s += stalled_s

    def _check_name(self, worker: WorkerInfo) -> None:
        # Without this, two live processes with one name would replace each other for ever.
        successor = self.namesake(worker)
        if successor is not None and worker.instance_id in self._superseded:
            raise Refused(
                "name_taken",
                f"{worker.worker_id} was replaced by a newer process of that name (pid {successor.pid}, "
                f"{successor.url}): stop one of them, or start it under another name",
            )

    def _check_model(self, worker: WorkerInfo) -> None:
        for other in self.members():
            if worker.instance_id == other.instance_id or worker.worker_id == other.worker_id:
                continue
            ours, theirs = _model_name(worker), _model_name(other)
            if ours != theirs:
                raise Refused(
                    "mismatch",
                    f"{worker.worker_id} cannot join: model: {ours} != {theirs} (fleet: {self._names()}). "
                    "Start it with the same model and --served-model-name, or stop the others first",
                )

    def _check_layout(
        self, who: str, instance_id: InstanceId, worker_id: WorkerId | None, layout: KVLayoutDescriptor
    ) -> None:
        for other in self._instances.values():
            if other.instance_id == instance_id or other.worker is None or other.worker.kv_layout is None:
                continue
            if other.worker.worker_id == worker_id:
                continue  # about to be superseded
            if differences := layout.differences(other.worker.kv_layout):
                flags = {_FLAGS.get(text.partition(":")[0], "model") for text in differences}
                raise Refused(
                    "mismatch",
                    f"{who} cannot join: {'; '.join(differences)} (fleet: {self._names()}). "
                    f"Start it with the same {' and '.join(sorted(flags))}, or stop the others first",
                )

    def _names(self) -> str:
        names = [member.worker_id for member in self.members()]
        return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


def _model_name(worker: WorkerInfo) -> str:
    """Paths may differ between machines; what clients ask for may not."""
    return worker.served_model_name or worker.model


def _check_report(report: RankRoute) -> None:
    if not 0 <= report.rank < report.num_ranks:
        raise Refused("bad_request", f"rank must be 0..{report.num_ranks - 1}, got {report.rank}")
    if report.role is not Role.PREFILL:
        return
    if report.route is None:
        raise Refused("bad_request", f"prefill rank {report.rank} reports no route")
    try:
        row = RankRow.parse(report.route)
    except RouteError as exc:
        raise Refused("bad_request", str(exc)) from exc
    if row.num_ranks != report.num_ranks:
        raise Refused("bad_request", f"{report.num_ranks} ranks, but the topology has {row.num_ranks}")


def _check_sibling(report: RankRoute, rank: int, sibling: RankRoute) -> None:
    if differences := report.kv_layout.differences(sibling.kv_layout):
        raise Refused(
            "mismatch", f"ranks {report.rank} and {rank} of one server disagree: {'; '.join(differences)}"
        )
    if (report.role, report.num_ranks) != (sibling.role, sibling.num_ranks):
        raise Refused(
            "bad_request",
            f"ranks {report.rank} and {rank} of one server disagree: "
            f"{report.role}, {report.num_ranks} ranks != {sibling.role}, {sibling.num_ranks} ranks",
        )
