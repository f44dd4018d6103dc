"""Memory that pools and slabs lie in, on the host or on one GPU, named by address.

torch is imported only for GPU memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.errors import ConfigError

PAGE = 4096
"""Host buffers start on a page: what transports register."""


class Buffer:
    """``nbytes`` at ``address``, alive as long as this object. Contents start undefined."""

    def __init__(self, nbytes: int, *, is_gpu: bool = False, device: int = 0) -> None:
        """Allocate; ``device`` is the CUDA index. Raises ConfigError when there is no such GPU."""
        self.nbytes = nbytes
        self.is_gpu = is_gpu
        self.device = device if is_gpu else 0
        self._tensor: Any = None
        if is_gpu:
            import torch

            if not torch.cuda.is_available() or device >= torch.cuda.device_count():
                raise ConfigError(f"no CUDA device {device} here; use host memory, or a machine with a GPU")
            self._tensor = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
            self.address = int(self._tensor.data_ptr())
            return
        self._array = np.empty(nbytes + PAGE, dtype=np.uint8)
        skip = -int(self._array.ctypes.data) % PAGE
        self._view = self._array[skip : skip + nbytes]
        self.address = int(self._view.ctypes.data)

    def write(self, content: npt.NDArray[np.uint8]) -> None:
        """Fill from the start; returns when the bytes are there."""
        if self.is_gpu:
            import torch

            self._tensor[: len(content)].copy_(torch.from_numpy(content))
            torch.cuda.synchronize(self.device)
            return
        self._view[: len(content)] = content

    def read(self) -> npt.NDArray[np.uint8]:
        """All bytes, copied to host memory."""
        if self.is_gpu:
            copied: npt.NDArray[np.uint8] = self._tensor.cpu().numpy()
            return copied
        return self._view.copy()
