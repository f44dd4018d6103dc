"""Small replacements of SGLang functions, most of them for a machine without a GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pdserve.config.worker_env import WorkerEnv, worker_pid
from pdserve.plugin.membership import ask_instance
from pdserve.process import scratch
from pdserve.process.limits import RESERVE_SHARE, whole_memory

logger = logging.getLogger(__name__)

GPU_PAGE_SIZE = 16
"""Tokens a page. At 1 every token is a descriptor and the segment allocator is not in use."""

LISTEN_S = 30.0
"""A server that does not listen for so long says so in its log."""
LISTEN_POLL_S = 0.02
LOCAL = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}

_bootstrap_sessions: dict[tuple[int, str], Any] = {}
"""By thread and address: a ``requests.Session`` is not for two threads at once."""
_sessions_lock = threading.Lock()


def skip_host_register(*_args: Any, **_kwargs: Any) -> None:
    """REPLACE for ``_cuda_host_register``: host pools are the pools here, nothing to page-lock."""


def budget_of_this_machine(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND ``host_memory_budget_bytes``: leave free a share of this machine, not 10 GiB of any."""
    from sglang.srt.mem_cache.pool_host import base

    reserve = int(RESERVE_SHARE * whole_memory()) or base.HICACHE_HOST_MEMORY_RESERVE_BYTES
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = min(base.HICACHE_HOST_MEMORY_RESERVE_BYTES, reserve)
    return original(*args, **kwargs)


def snapshot_path_of_worker(_instance_id: str) -> str:
    """REPLACE for ``shm_path_for``: named after the worker's process id, see process/scratch.py."""
    return str(scratch.snapshot_path(worker_pid()))


def fork_scheduler_processes(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND ``_set_envs_and_config``: let SGLang's children be forked when the launcher asked for it.

    SGLang forces ``spawn``, which imports torch and SGLang again in each child.
    Forking is safe here because no CUDA context exists and the parent has
    started no thread that holds a lock at this point (worker.py starts its
    threads later).
    """
    result = original(*args, **kwargs)
    if WorkerEnv.from_environ().fork_children:  # only ever reached on CPU, see hooks.py
        multiprocessing.set_start_method("fork", force=True)
    return result


def leave_room_for_slab(
    original: Callable[..., Any], configurator: Any, budget_bytes: int, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``KVCacheConfigurator.config_from_budget``: on a GPU the slab is not the pool's to take.

    It is allocated after the pool, out of what SGLang keeps free for activations otherwise.
    """
    env = WorkerEnv.from_environ()
    is_gpu = not str(configurator.device).startswith("cpu")
    slab_bytes = env.data_plane.slab_bytes(is_gpu=True) if is_gpu and not env.stock else 0
    return original(configurator, budget_bytes - slab_bytes, *args, **kwargs)


def default_page_size(original: Callable[..., Any], view: Any) -> Any:
    """AROUND ``_page_size_default``: 16 tokens on a GPU where SGLang takes 1, as pdserve sets on CPU.

    SGLang comes here when neither the user nor the model nor the attention backend wants a size. Trees of
    draft tokens, sliding windows and recurrent state keep SGLang's, because parts of it refuse pages there.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of

    declared = original(view)
    env = WorkerEnv.from_environ()
    if declared.get("page_size") != 1 or view.device != "cuda" or env.stock or not env.data_plane.is_on:
        return declared
    is_special = (view.speculative_eagle_topk or 0) > 1 or view.uses_mamba_radix_cache
    is_special = is_special or model_config_of(view).is_hybrid_swa
    return declared if is_special else {"page_size": GPU_PAGE_SIZE}


def name_forward_stream(original: Callable[..., Any], configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``_build_token_to_kv_pool_allocator``: the allocator's freed pages cool behind the forwards.

    SGLang hands the same stream to its unified allocator. A draft model's runner comes
    second, with the target's allocator and a stream that the scheduler does not use.
    """
    from pdserve.plugin.kv_pool import PdservePagedAllocator

    allocator = original(configurator, *args, **kwargs)
    if isinstance(allocator, PdservePagedAllocator) and allocator.forward_stream is None:
        allocator.forward_stream = configurator.forward_stream
    return allocator


def wait_until_listening(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``_freeze_gc_after_server_warmup``: let this very server's HTTP socket be open first.

    With --skip-server-warmup SGLang reaches this step, and after it the launch callback that registers us,
    before uvicorn listens, and even if it never will, for another server has the port.
    """
    host, port = LOCAL.get(str(server_args.host), str(server_args.host)), int(server_args.port)
    key = str(server_args.api_key or server_args.admin_api_key or "")
    own, since_s = WorkerEnv.from_environ().instance_id, time.monotonic()
    while own and (found := ask_instance(host, port, key).get("instance_id")) != own:
        if not threading.main_thread().is_alive():
            raise RuntimeError(f"the server ended before it listened on {host}:{port}")
        if time.monotonic() - since_s > LISTEN_S:
            since_s = time.monotonic()
            logger.warning("not listening on %s:%d yet; there is %s", host, port, found or "no worker")
        time.sleep(LISTEN_POLL_S)
    return original(server_args, *args, **kwargs)


def bootstrap_session(bootstrap_addr: str) -> Any:
    """REPLACE for ``_get_bootstrap_session``: kept per thread and address as SGLang's, until it is closed.

    SGLang never closes one, for its prefill servers are few. Here each prefill instance has an address of
    its own.
    """
    import requests

    with _sessions_lock:
        key = (threading.get_ident(), bootstrap_addr)
        if key not in _bootstrap_sessions:
            session = _bootstrap_sessions[key] = requests.Session()
            session.mount("http://", requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1))
        return _bootstrap_sessions[key]


def close_bootstrap_sessions(bootstrap_addr: str) -> None:
    """Close every thread's session with a prefill that has left; a query under way ends as it would."""
    with _sessions_lock:
        gone = [key for key in _bootstrap_sessions if key[1] == bootstrap_addr]
        sessions = [_bootstrap_sessions.pop(key) for key in gone]
    for session in sessions:
        session.close()


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, ended at once when its loop has ended.

    SGLang's prefill manager keeps a non-daemon thread in a blocking receive, so
    a scheduler that was asked to shut down would hang until it is killed 15 s later.
    """
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
