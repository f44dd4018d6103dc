"""The SGLang platform pdserve runs on: CPU, or CUDA with every CUDA decision kept.

SGLang asks each installed platform plugin for a class; ours answers only in a
process that pdserve's launcher started (``PDSERVE_ACTIVE=1``), so installing
pdserve changes nothing for a plain SGLang server.

The CPU platform is out-of-tree on purpose (``_enum = OOT``): the in-tree CPU
path insists on Intel AMX kernels for attention, ours on torch's own.
Source of the seam: sglang/srt/platforms/{__init__,interface}.py in 0.5.23.
"""

from __future__ import annotations

from pdserve.config.worker_env import WorkerEnv


def activate() -> str | None:
    """Entry point ``sglang.srt.platforms``: name the platform class, or None to stay inert."""
    if not WorkerEnv.from_environ().is_active:
        return None
    import torch

    if torch.cuda.is_available() and torch.version.hip is None:
        return "pdserve.plugin.devices:PdserveCudaPlatform"
    return "pdserve.plugin.devices:PdservePlatform"
