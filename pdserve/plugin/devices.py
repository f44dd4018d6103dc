"""The platform classes that ``platform.activate`` names; imported only inside SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from pdserve.config.worker_env import WorkerEnv


class SegmentedPools:
    """Paged KV pools whose pages come from the segment allocator, unless the data plane is switched off."""

    def get_paged_allocator_cls(self) -> type[Any] | None:
        """SGLang asks when the page size is above 1; None is its own allocator."""
        env = WorkerEnv.from_environ()
        if env.stock or not env.data_plane.is_on:
            return None
        from pdserve.plugin.kv_pool import PdservePagedAllocator

        return PdservePagedAllocator


class PdservePlatform(SegmentedPools, CpuDeviceMixin, SRTPlatform):
    """CPU: torch-native attention, torch allocators, no graphs, no pinned memory."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """The only backend that needs neither Triton nor AMX."""
        return "torch_native"

    def get_kv_pool_cls(self, *, kind: str) -> type[Any] | None:
        """SGLang's pools with a check of the free memory first."""
        from pdserve.plugin.kv_pool import PdserveMHAPool, PdserveMLAPool

        return {"mha": PdserveMHAPool, "mla": PdserveMLAPool}.get(kind)

    def get_dispatch_key_name(self) -> str:
        """Fused ops fall back to their plain torch form."""
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        """Name SGLang's profiler route uses."""
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """Activity SGLang's profiler route records."""
        import torch

        return torch.profiler.ProfilerActivity.CPU

    def empty_cache(self) -> None:
        """Nothing: a garbage collection at every idle wake-up would cost more than it frees."""


class PdserveCudaPlatform(SegmentedPools, CudaSRTPlatform):
    """CUDA as SGLang has it. ``_enum`` stays CUDA, so no feature is refused as out-of-tree."""
