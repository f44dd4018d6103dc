"""What workers, balancer and bootstrap service say to each other, as JSON over HTTP.

PROTOCOL_VERSION history:
  1  first: register / heartbeat / deregister / ranks / view
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.types import InstanceId, KVLayoutDescriptor, Role, WorkerInfo

PROTOCOL_VERSION = 1


class RankRoute(msgspec.Struct, frozen=True, kw_only=True):
    """One scheduler rank reports itself: ``PUT /fleet/instances/{instance_id}/ranks``.

    ``route`` is the payload that SGLang's prefill ranks PUT to ``/route``
    (``rank_ip``, ``rank_port``, ``attn_tp_size`` …), ``None`` for decode ranks.
    ``num_ranks`` is how many ranks the instance has in all.
    """

    role: Role
    rank: int
    num_ranks: int
    kv_layout: KVLayoutDescriptor
    route: dict[str, Any] | None = None


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """A worker offers itself: ``POST /fleet/register``; answered by Lease or Refusal.

    ``ranks`` is empty at first (the ranks report themselves) and filled from
    the Lease when the worker re-registers with a restarted service.
    ``worker.bootstrap_port`` is the port a former lease assigned, if any: the
    service binds the same one again so that running requests go on.
    """

    worker: WorkerInfo
    ranks: list[RankRoute] = []
    lease_s: float = 10.0
    protocol: int = PROTOCOL_VERSION


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted. Renew within ``lease_s``. ``worker`` has the assigned ``bootstrap_*`` and KV layout."""

    worker: WorkerInfo
    ranks: list[RankRoute]
    lease_s: float
    epoch: str


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /fleet/heartbeat``; 404 means 'I do not know you: register again'.

    ``is_leaving`` says once and for all that this instance will stop.
    """

    instance_id: InstanceId
    is_leaving: bool = False


class Deregister(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /fleet/deregister``: the instance is gone or going; idempotent."""

    instance_id: InstanceId
    reason: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every non-200 answer. ``code``: ``ranks_pending`` (425, try again), ``mismatch`` (409),
    ``protocol`` (409), ``unknown_instance`` (404), ``bad_request`` (400), ``name_taken``
    (409: a newer process has this worker's name), ``no_port`` (503, try again)."""

    code: str
    message: str


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """All members with a live lease: ``GET /fleet/view?epoch=E&after=V&wait_s=20`` (long poll).

    Answers at once if ``epoch`` differs or ``version > after``, else when the
    view changes or after ``wait_s``. ``epoch`` is new at every service start.
    """

    epoch: str
    version: int
    workers: list[WorkerInfo]
    uptime_s: float = 0.0
