"""This server's place in the fleet: what it says of itself, and the lease it keeps.

Runs in SGLang's HTTP process. The scheduler ranks have reported their KV
layout to the service before (backend.py); this side adds the address and the
promise to be alive.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pdserve import __version__
from pdserve.bootstrap.client import STOP_S, LeaseClient, LeaseKeeper
from pdserve.config.worker_env import WorkerEnv
from pdserve.errors import PdserveError
from pdserve.plugin.local_prefill.hooks import unsupported
from pdserve.plugin.stats import TransferStats, publish
from pdserve.types import InstanceId, PriorityFlags, Role, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)

LEAVE_S = 0.5
"""From saying so until SGLang may end: balancers hear of it, and what they sent before arrives."""
INSTANCE_PATH = "/pdserve/instance"
"""Added to every pdserve worker's HTTP server: who are you, really (see worker.py)."""
ASK_S = 2.0


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
            "resumes": not self._env.stock,
            "worker_id": self._env.worker_id,
            "prefills_locally": not unsupported(self._server_args, self._env),
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
        priorities = priority_flags(self._server_args)
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
            low_priority_first=priorities.low_priority_first,
            default_priority=priorities.default_priority,
            resume_id="" if self._env.stock else self._env.instance_id,
            prefills_locally=not unsupported(self._server_args, self._env),
        )


def leave_before_draining(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """AROUND ``SignalHandler.sigterm_handler``: the fleet hears first, so that no new requests come.

    From this handler on SGLang ends as soon as it has no request. It is called in the event loop.
    """
    env, go_on = WorkerEnv.from_environ(), partial(original, *args, **kwargs)
    if not env.bootstrap_url:
        go_on()
        return
    loop = asyncio.get_running_loop()
    threading.Thread(target=_leave, args=(env, loop, go_on), name="pdserve-leave", daemon=True).start()


def _leave(env: WorkerEnv, loop: asyncio.AbstractEventLoop, go_on: Callable[[], Any]) -> None:
    client = LeaseClient(env.bootstrap_url, timeout_s=STOP_S)
    try:
        client.heartbeat(InstanceId(env.instance_id), is_leaving=True)
        time.sleep(LEAVE_S)
    except PdserveError as exc:  # the service is gone, or does not know this instance: nothing to wait for
        logger.info("could not say that this worker leaves: %s", exc)
    loop.call_soon_threadsafe(go_on)


def ask_instance(host: str, port: int, api_key: str = "") -> dict[str, Any]:
    """What the worker that listens there says of itself (``describe``); empty if it is none of ours."""
    connection = http.client.HTTPConnection(host, port, timeout=ASK_S)
    try:
        connection.request(
            "GET", INSTANCE_PATH, headers={"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        response = connection.getresponse()
        body = response.read()
        return dict(json.loads(body)) if response.status == 200 else {}
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return {}
    finally:
        connection.close()


def keeps_prefixes(server_args: Any) -> bool:
    """True if what was computed or received once is found again by the next prompt that begins alike."""
    if str(server_args.disaggregation_mode) == "decode":
        return bool(server_args.disaggregation_decode_enable_radix_cache)
    return not server_args.disable_radix_cache


def priority_flags(server_args: Any) -> PriorityFlags:
    """The server's own, of which the balancer's queue takes its order."""
    return PriorityFlags(**{name: getattr(server_args, name) for name in PriorityFlags.__struct_fields__})


def reachable_host(listen_host: str) -> str:
    """A wildcard address cannot be dialled: use this machine's address instead."""
    if listen_host not in ("0.0.0.0", "::", ""):
        return listen_host
    from sglang.srt.utils.network import get_local_ip_auto

    return str(get_local_ip_auto("127.0.0.1"))
