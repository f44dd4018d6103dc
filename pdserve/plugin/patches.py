"""Small replacements of SGLang functions, most of them for a machine without a GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from pdserve import leftovers
from pdserve.config import WorkerEnv, worker_pid


def skip_host_register(*_args: Any, **_kwargs: Any) -> None:
    """REPLACE for ``_cuda_host_register``: host pools are the pools here, nothing to page-lock."""


def snapshot_path_of_worker(_instance_id: str) -> str:
    """REPLACE for ``shm_path_for``: named after the worker's process id, see leftovers.py."""
    return str(leftovers.snapshot_path(worker_pid()))


def fork_scheduler_processes(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND ``_set_envs_and_config``: let SGLang's children be forked when the launcher asked for it.

    SGLang forces ``spawn``, which imports torch and SGLang again in each child.
    Forking is safe here because no CUDA context exists and the parent has
    started no thread that holds a lock at this point (worker.py starts its
    threads later).
    """
    result = original(*args, **kwargs)
    if WorkerEnv.from_environ().fork_children:
        multiprocessing.set_start_method("fork", force=True)
    return result
