"""What both data planes need of SGLang: geometry from KVArgs, slabs, dead prefill ranks.

``unsupported`` names what keeps a server on SGLang's own NIXL path; the rest of
this module is only used when it finds nothing.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pdserve.config.worker_env import WorkerEnv
from pdserve.errors import RegistrationFailed
from pdserve.kv.layout import PagedRegions, by_layer
from pdserve.kv.memory import Buffer
from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.nixl import NixlEngine
from pdserve.transfer.slots import NUM_SLOTS, Slab

logger = logging.getLogger(__name__)

BACKENDS = ("UCX",)
"""NIXL backends whose writes carry messages, which completion is counted by."""


def unsupported(manager: Any, env: WorkerEnv) -> str:
    """Why this rank must stay on SGLang's own path; empty when the data plane can serve it.

    ``manager`` is SGLang's CommonKVManager, initialised.
    """
    args = manager.kv_args
    # Not set yet on a GPU prefill when it reports to the bootstrap service.
    kinds = set(getattr(args, "kv_data_mem_kinds", None) or ["VRAM"])
    checks = (
        (env.stock or not env.data_plane.is_on, "switched off"),
        (not args.kv_data_ptrs, "no KV regions on this rank"),
        (manager.pp_size > 1, "pipeline parallelism"),
        (manager.attn_cp_size > 1 or manager.dcp_size > 1, "context parallelism"),
        (manager.kv_shard_size > 1, "sharded KV pages"),
        (manager.is_hybrid_mla_backend, "hybrid MLA pools"),
        (bool(args.state_types), f"state pools ({', '.join(str(kind) for kind in args.state_types)})"),
        (manager.defer_decode_allocation, "prefill_complete allocation"),
        (bool(getattr(args, "mla_compression_ratios", None)), "compressed MLA layers"),
        (len(set(args.kv_item_lens)) > 1, "regions of different page sizes"),
        (len(kinds) > 1, f"mixed memory kinds ({', '.join(sorted(kinds))})"),
        (bool(manager.server_args.enable_pd_role_switch), "role switching"),
    )
    return next((reason for is_so, reason in checks if is_so), "")


def regions_of(args: Any, *, is_mla: bool, total_kv_heads: int, tp_size: int) -> PagedRegions:
    """The rank's pools from SGLang's KVArgs, layer by layer; every region is dense."""
    page_size = int(args.page_size)
    row_bytes = int(args.kv_item_lens[0]) // page_size
    num_pages = min(
        int(length) // int(item) for length, item in zip(args.kv_data_lens, args.kv_item_lens, strict=True)
    )
    num_draft = int(args.num_draft_entries)
    bases = tuple(int(pointer) for pointer in args.kv_data_ptrs)
    return PagedRegions(
        bases=bases if is_mla else by_layer(bases, num_draft),
        num_pages=num_pages,
        page_size=page_size,
        row_bytes=row_bytes,
        token_stride=row_bytes,
        num_kv_heads=1 if is_mla else max(1, total_kv_heads // tp_size),
        regions_per_layer=1 if is_mla else 2,
        num_draft_regions=num_draft,
    )


MIN_SLAB_BYTES = 32 << 20
"""A GPU that cannot spare this much cannot serve either."""


def make_slab(engine: NixlEngine, nbytes: int, kind: MemoryKind, device: int) -> Slab:
    """Allocate and register slab memory on the pools' device.

    SGLang has sized its pools before; if the device cannot give so much any more, a
    smaller slab does (smaller pieces, the same bytes).
    """
    while True:
        try:
            buffer = Buffer(nbytes, is_gpu=kind is MemoryKind.VRAM, device=device)
            break
        except RuntimeError as exc:  # torch.cuda.OutOfMemoryError
            if nbytes <= MIN_SLAB_BYTES:
                raise RegistrationFailed(
                    f"no room for a slab of {nbytes >> 20} MiB: {exc}; lower --mem-fraction-static"
                ) from exc
            logger.warning("no room for a slab of %d MiB, trying half", nbytes >> 20)
            nbytes //= 2
    spans = np.array([(buffer.address, nbytes, device_id(kind, device))], dtype=np.uint64)
    engine.register(spans, kind)
    return Slab(buffer.address, nbytes, nbytes // NUM_SLOTS, buffer)


def device_id(kind: MemoryKind, device: int) -> int:
    """NIXL's device number of memory: host memory is always 0."""
    return device if kind is MemoryKind.VRAM else 0


ACK_PATIENCE_S = 0.5
"""A live rank acknowledges within milliseconds; ask about it only after this long."""

ACK_POLL_S = 0.5

ACK_GIVE_UP_S = 120.0
"""Far beyond SGLang's own time-out: a room still here was never handed back to us."""

GPU_TEARDOWN_S = 3.0
"""A dying process closes its sockets before the network card has let go of its GPU memory: deregistering
100 GB takes seconds, in which writes that were posted may still run."""

Endpoint = tuple[str, int]


class DeadPeerWatch:
    """Finds dead prefill ranks among those that owe an abort acknowledgement. Thread-safe.

    A decode server keeps the pages of an aborted transfer until every prefill rank
    has said that nothing of it can land any more. A dead rank never says so, and
    SGLang waits 30 s for it. The rank's control port is bound by the process that
    writes: when it refuses connections, that process is gone.
    """

    def __init__(self, is_gone: Callable[[Endpoint], bool] | None = None, *, settle_s: float = 0.0) -> None:
        """``settle_s``: a rank counts as dead so long after it was first found gone."""
        self._is_gone = is_gone or refuses_connections
        self._settle_s = settle_s
        self._waiting: dict[int, tuple[tuple[Endpoint, ...], float]] = {}
        self._gone_since_s: dict[Endpoint, float] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, room: int, endpoints: Sequence[Endpoint]) -> None:
        """The room waits for acknowledgements of these ranks from now on."""
        with self._wake:
            self._waiting[room] = (tuple(endpoints), time.monotonic())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdserve-dead-peers", daemon=True)
                self._thread.start()
            self._wake.notify()

    def forget(self, room: int) -> None:
        """The room waits no longer."""
        with self._wake:
            self._waiting.pop(room, None)

    def are_all_dead(self, room: int) -> bool:
        """True once every rank the room waits for is known to be gone."""
        with self._wake:
            endpoints, _ = self._waiting.get(room, ((), 0.0))
            before_s = time.monotonic() - self._settle_s
            return bool(endpoints) and all(
                self._gone_since_s.get(endpoint, math.inf) <= before_s for endpoint in endpoints
            )

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting:
                    self._wake.wait()
            time.sleep(ACK_POLL_S)
            self.look()

    def look(self) -> None:
        """Ask about every rank that some room has waited for too long."""
        now_s = time.monotonic()
        with self._wake:
            for room in [
                room for room, (_, since_s) in self._waiting.items() if now_s - since_s > ACK_GIVE_UP_S
            ]:
                self._waiting.pop(room)
            asked = {
                endpoint
                for endpoints, since_s in self._waiting.values()
                if now_s - since_s >= ACK_PATIENCE_S
                for endpoint in endpoints
            } - self._gone_since_s.keys()
        for endpoint in asked:
            if self._is_gone(endpoint):
                logger.warning("prefill rank %s:%d is dead; its aborted transfers are released", *endpoint)
                with self._wake:
                    self._gone_since_s[endpoint] = time.monotonic()


def refuses_connections(endpoint: Endpoint) -> bool:
    """True if nobody listens there. A time-out or an unreachable host proves nothing and is False."""
    try:
        socket.create_connection(endpoint, timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
