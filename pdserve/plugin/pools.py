"""KV pools on CPU: SGLang's own, refused before they are allocated if the machine cannot hold them.

Linux grants the memory and kills somebody later; on a GPU the allocator itself
refuses. Servers that start together look and allocate one after the other, so
that the second sees what the first has taken.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import psutil
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from pdserve.process.scratch import SHARED_MEMORY

RESERVE_SHARE = 0.05
"""Part of the machine's memory that no pool may take: weights' temporaries, page tables, the kernel."""


class PdserveMHAPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.head_num * (self.head_dim + self.v_head_dim) * self.store_dtype.itemsize)
        with _one_server_at_a_time():
            _check_this_machine(slots * row * int(self.layer_num), slots)
            super()._create_buffers()


class PdserveMLAPool(MLATokenToKVPool):
    """``MLATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.kv_cache_dim * self.store_dtype.itemsize)
        with _one_server_at_a_time():
            _check_this_machine(slots * row * int(self.layer_num), slots)
            super()._create_buffers()


def check_fits(pool_bytes: int, num_tokens: int, free_bytes: int) -> None:
    """Raise RuntimeError, in the words the launcher looks for, if the pool is larger than what is free."""
    if pool_bytes > free_bytes:
        raise RuntimeError(
            f"Not enough memory: a KV pool of {num_tokens} tokens needs {pool_bytes / 1e9:.1f} GB, "
            f"this machine has {free_bytes / 1e9:.1f} GB to give; use a lower --max-total-tokens"
        )


def _check_this_machine(pool_bytes: int, num_tokens: int) -> None:
    memory = psutil.virtual_memory()
    check_fits(pool_bytes, num_tokens, int(memory.available - RESERVE_SHARE * memory.total))


@contextlib.contextmanager
def _one_server_at_a_time() -> Iterator[None]:
    # The kernel lets go of the lock when the holder dies, however it dies.
    with (SHARED_MEMORY / "pdserve-pools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
