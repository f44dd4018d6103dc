"""This server's place in the fleet: what it says of itself, and the lease it keeps.

Runs in SGLang's HTTP process. The scheduler ranks have reported their KV
layout to the service before (backend.py); this side adds the address and the
promise to be alive.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from pdserve import __version__
from pdserve.bootstrap.client import LeaseKeeper
from pdserve.config.worker_env import WorkerEnv
from pdserve.plugin.stats import TransferStats, publish
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)


class WorkerMembership:
    """Registers once the server is ready, renews, and leaves on ``stop``; inert without a service."""

    def __init__(self, env: WorkerEnv, server_args: Any, on_refused: Callable[[Exception], None]) -> None:
        self._env = env
        self._server_args = server_args
        self._on_refused = on_refused
        self._keeper: LeaseKeeper | None = None
        self._stats = TransferStats.create()
        self._stopped = threading.Event()

    def start(self) -> None:
        """SGLang calls this when it takes requests (its launch callback)."""
        if self._server_args.enable_metrics:
            publish(self._stats, self._stopped)
        if not self._env.bootstrap_url or self._env.role is None:
            return
        self._keeper = LeaseKeeper(self._env.bootstrap_url, self._worker_info(), on_refused=self._on_refused)
        self._keeper.start()

    def stop(self) -> None:
        """Leave the fleet now rather than when the lease runs out."""
        self._stopped.set()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.stop()

    async def describe(self) -> dict[str, Any]:
        """``GET /pdserve/instance``: which instance answers here, and its ranks' transfer ports."""
        lease = None if self._keeper is None else self._keeper.lease
        routes = [] if lease is None else [rank.route for rank in lease.ranks if rank.route]
        return {
            "instance_id": self._env.instance_id,
            "worker_id": self._env.worker_id,
            "role": self._env.role or "",
            "rank_ports": [int(route["rank_port"]) for route in routes],
            "pid": os.getpid(),
            "version": __version__,
            "transfer": self._stats.total(),
        }

    def _worker_info(self) -> WorkerInfo:
        from sglang.srt.runtime_context import get_parallel, get_serving
        from sglang.version import __version__ as sglang_version

        assert self._env.role is not None
        serving, parallel = get_serving(), get_parallel()
        host = self._env.advertise_host or reachable_host(str(serving.host))
        return WorkerInfo(
            worker_id=WorkerId(self._env.worker_id or f"{self._env.role}-{self._env.instance_id[:8]}"),
            instance_id=InstanceId(self._env.instance_id),
            role=Role(self._env.role),
            url=f"http://{host}:{serving.port}",
            model=str(self._server_args.model_path),
            served_model_name=str(serving.served_model_name or self._server_args.model_path),
            tp_size=int(parallel.tp_size),
            dp_size=int(parallel.dp_size),
            sglang_version=str(sglang_version),
            pid=os.getpid(),
            keeps_prefixes=keeps_prefixes(self._server_args),
        )


def keeps_prefixes(server_args: Any) -> bool:
    """True if what was computed or received once is found again by the next prompt that begins alike."""
    if str(server_args.disaggregation_mode) == "decode":
        return bool(server_args.disaggregation_decode_enable_radix_cache)
    return not server_args.disable_radix_cache


def reachable_host(listen_host: str) -> str:
    """A wildcard address cannot be dialled: use this machine's address instead."""
    if listen_host not in ("0.0.0.0", "::", ""):
        return listen_host
    from sglang.srt.utils.network import get_local_ip_auto

    return str(get_local_ip_auto("127.0.0.1"))
