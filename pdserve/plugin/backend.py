"""Our KV manager and bootstrap server behind SGLang's backend name ``nixl``.

The name stays ``nixl`` because many of SGLang's gates test for it; the classes
are swapped by REPLACE hooks (``hooks.py``). In this module the base classes are
the originals: it must be imported before the hooks are applied.

    rank starts ── reports layout + route ──► bootstrap service
    decode heartbeat fails ── asks the prefill itself ──► only then gives it up
"""

from __future__ import annotations

import logging
import sys
from typing import Any
from urllib.parse import urlsplit

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer
from sglang.srt.disaggregation.nixl.conn import NixlKVBootstrapServer, NixlKVSender
from sglang.srt.disaggregation.utils import DisaggregationMode

from pdserve.bootstrap.client import LeaseClient
from pdserve.bootstrap.messages import RankRoute
from pdserve.config.worker_env import WorkerEnv, go_past_proxies
from pdserve.errors import PdserveError
from pdserve.plugin.dataplane import unsupported
from pdserve.plugin.geometry import describe_layout, rank_index
from pdserve.plugin.membership import ask_instance
from pdserve.plugin.patches import close_bootstrap_sessions
from pdserve.plugin.receiving import PdserveKVReceiver
from pdserve.plugin.stats import TransferStats
from pdserve.plugin.transfer_manager import TransferManager
from pdserve.transfer.nixl import AgentTuning, tune_agents
from pdserve.types import InstanceId, Role

__all__ = ["PdserveKVBootstrapServer", "PdserveKVManager", "PdserveKVReceiver", "PdserveKVSender"]

logger = logging.getLogger(__name__)

PROGRESS_DELAY_US = 5000
"""On CPU, longest sleep of NIXL's progress thread between UCX events, should one be missed."""


class PdserveKVManager(TransferManager):
    """SGLang's NIXL manager with DRAM pools on CPU, our data plane, membership in the bootstrap service."""

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        self._pdserve_env = WorkerEnv.from_environ()
        if _pools_are_host_memory(server_args):
            if not self._pdserve_env.stock:
                # Asked when SGLang makes the agent: by then the manager knows what it serves.
                tune_agents(self._tune_agent)
            # NIXL refuses host memory announced as VRAM; the kinds travel to the peer with the registration.
            args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
        self.transfer_stats = TransferStats.open()
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        if disaggregation_mode == DisaggregationMode.DECODE:
            self._report_rank(None)

    def _tune_agent(self) -> AgentTuning:
        # The outbox and the inbox poll the agent whenever something can happen; SGLang's own path does not.
        is_polled = not unsupported(self, self._pdserve_env)
        return AgentTuning(PROGRESS_DELAY_US, has_progress_thread=not is_polled)

    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        """Prefill ranks: tell the bootstrap service instead of a server on the own host."""
        if self._pdserve_env.bootstrap_url:
            self._report_rank(payload)
        else:
            super()._register_topology_row(url, payload)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, which would ask a proxy that the environment names for the world outside."""
        if bootstrap_addr not in self.prefill_info_table:
            go_past_proxies(urlsplit(f"//{bootstrap_addr}").hostname or "")
        return bool(super().try_ensure_parallel_info(bootstrap_addr))

    def _report_rank(self, route: dict[str, Any] | None) -> None:
        env = self._pdserve_env
        if not env.bootstrap_url:
            return
        rank, num_ranks = rank_index(self)
        model = ModelConfig.from_server_args(self.server_args)
        report = RankRoute(
            role=Role.DECODE if route is None else Role.PREFILL,
            rank=rank,
            num_ranks=num_ranks,
            kv_layout=describe_layout(
                self.kv_args,
                is_mla=self.is_mla_backend,
                total_kv_heads=int(model.get_total_num_kv_heads()),
                tp_size=int(self.attn_tp_size),
                model_dtype=str(model.dtype).removeprefix("torch."),
                # A pipeline stage registers only its own layers; the fleet compares whole models.
                num_layers=int(model.num_hidden_layers) if self.pp_size > 1 else None,
                converts_pages=self.converts_pages,
            ),
            route=None if route is None else {**route, "converts_pages": self.converts_pages},
        )
        try:
            client = LeaseClient(env.bootstrap_url)
            client.report_rank_patiently(InstanceId(env.instance_id), report)
        except PdserveError as exc:
            # The launcher looks for this line; a traceback from here would only hide it.
            sys.stderr.write(f"pdserve: refused by the bootstrap service: {exc}\n")
            sys.stderr.flush()
            raise

    def _handle_node_failure(self, failed_bootstrap_addr: str) -> None:
        """Two missed heartbeats may mean a lost *service*: ask the prefill before failing its rooms."""
        if self._prefill_is_alive(failed_bootstrap_addr):
            logger.warning(
                "bootstrap service silent at %s but the prefill server answers; its requests go on",
                failed_bootstrap_addr,
            )
            self.heartbeat_failures[failed_bootstrap_addr] = 0
            return
        if self.decode_plane is not None:
            self.decode_plane.bury(
                {f"{ip}:{port}" for ip, port in self._rank_endpoints(failed_bootstrap_addr)}
            )
        super()._handle_node_failure(failed_bootstrap_addr)
        close_bootstrap_sessions(failed_bootstrap_addr)

    def _rank_endpoints(self, bootstrap_addr: str) -> set[tuple[str, int]]:
        """Control sockets of the prefill ranks that this server has connected to behind an address."""
        with self.connection_lock:
            return {
                (str(entry["rank_ip"]), int(entry["rank_port"]))
                for key, entries in self.connection_pool.items()
                if key.startswith(f"{bootstrap_addr}_")
                for entry in entries
            }

    def _prefill_is_alive(self, bootstrap_addr: str) -> bool:
        """True if the very instance that was registered at this address still answers HTTP."""
        endpoints = self._rank_endpoints(bootstrap_addr)
        ips, ports = {ip for ip, _ in endpoints}, {port for _, port in endpoints}
        info = self.prefill_info_table.get(bootstrap_addr)
        if info is None or info.prefill_http_port is None or not ips:
            return False
        for ip in ips:
            answer = ask_instance(ip, int(info.prefill_http_port))
            # The rank ports are new at every start: equal ports mean the same instance.
            if not ports & set(answer.get("rank_ports", [])):
                return False
        return True


class PdserveKVSender(NixlKVSender):
    """SGLang's sender; counts what it moved, and fails at once when decode gave the room up before."""

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)
        plane = mgr.prefill_plane
        reason = None if plane is None else plane.failure_of(bootstrap_room)
        if reason is not None:
            mgr.record_failure(bootstrap_room, reason)
            mgr.update_status(bootstrap_room, KVPoll.Failed)

    @property
    def supports_host_tensor_indices(self) -> bool:
        """SGLang then hands page ids over while they still travel to the host, and waits for nothing."""
        plane = self.kv_mgr.prefill_plane
        return plane is not None and plane.is_gpu

    def _register_prefill_dp_rank(self) -> None:
        env = self.kv_mgr._pdserve_env
        if not env.bootstrap_url:
            super()._register_prefill_dp_rank()
            return
        try:
            LeaseClient(env.bootstrap_url).report_dp_rank(
                InstanceId(env.instance_id), self.bootstrap_room, int(self.kv_mgr.attn_dp_rank)
            )
        except PdserveError as exc:
            logger.error("room=%s: DP rank could not be registered: %s", self.bootstrap_room, exc)

    def get_transfer_metric(self) -> Any:
        """SGLang asks once, when a request's transfer has succeeded."""
        metric = super().get_transfer_metric()
        manager = self.kv_mgr
        plane = manager.prefill_plane
        record = None if plane is None else plane.take_record(self.bootstrap_room)
        if record is not None:
            # SGLang multiplies pages by page bytes, which is wrong for a part of the heads.
            metric.transfer_total_bytes = record.nbytes
        if manager.transfer_stats is not None:
            counted = {"kv_bytes": int(metric.transfer_total_bytes or 0)}
            if record is not None:
                counted = record.counters()
            counted["latency_us"] = round((metric.transfer_latency_s or 0.0) * 1e6)
            manager.transfer_stats.add(rank_index(manager)[0], transfers=1, **counted)
        return metric


class PdserveKVBootstrapServer(NixlKVBootstrapServer):
    """Silent when the fleet has a bootstrap service; SGLang's own server when it has none."""

    def __init__(self, host: str, port: int) -> None:
        if WorkerEnv.from_environ().bootstrap_url:
            self.host, self.port = host, port
            return
        super().__init__(host, port)

    def close(self) -> None:
        """Stop the server if one was started."""
        if hasattr(self, "thread"):
            CommonKVBootstrapServer.close(self)


def _pools_are_host_memory(server_args: Any) -> bool:
    return str(server_args.device) == "cpu"
