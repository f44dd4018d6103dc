"""Small replacements of SGLang functions, most of them for a machine without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from pdserve.config.worker_env import WorkerEnv, worker_pid
from pdserve.process import scratch

LISTEN_S = 30.0


def skip_host_register(*_args: Any, **_kwargs: Any) -> None:
    """REPLACE for ``_cuda_host_register``: host pools are the pools here, nothing to page-lock."""


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
    """AROUND ``_freeze_gc_after_server_warmup``: let the HTTP socket be open first.

    With --skip-server-warmup SGLang reaches this step, and after it the launch
    callback that registers us, before uvicorn listens.
    """
    address = (str(server_args.host).replace("0.0.0.0", "127.0.0.1"), int(server_args.port))
    deadline = time.monotonic() + LISTEN_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=1).close()
            break
        except OSError:
            time.sleep(0.02)
    return original(server_args, *args, **kwargs)


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
