"""KV pools on CPU: SGLang's own, refused before they are allocated if the machine cannot hold them.

Linux grants the memory and kills somebody later; on a GPU the allocator itself refuses.
"""

from __future__ import annotations

import psutil
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool


class PdserveMHAPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.head_num * (self.head_dim + self.v_head_dim) * self.store_dtype.itemsize)
        check_fits(slots * row * int(self.layer_num), slots, psutil.virtual_memory().available)
        super()._create_buffers()


class PdserveMLAPool(MLATokenToKVPool):
    """``MLATokenToKVPool`` after a look at the free memory."""

    def _create_buffers(self) -> None:
        slots = int(self.size + self.page_size)
        row = int(self.kv_cache_dim * self.store_dtype.itemsize)
        check_fits(slots * row * int(self.layer_num), slots, psutil.virtual_memory().available)
        super()._create_buffers()


def check_fits(pool_bytes: int, num_tokens: int, free_bytes: int) -> None:
    """Raise RuntimeError, in the words the launcher looks for, if the pool is larger than what is free."""
    if pool_bytes > free_bytes:
        raise RuntimeError(
            f"Not enough memory: a KV pool of {num_tokens} tokens needs {pool_bytes / 1e9:.1f} GB, "
            f"this machine has {free_bytes / 1e9:.1f} GB free; give a lower --max-total-tokens"
        )
