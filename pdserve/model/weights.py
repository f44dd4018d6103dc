"""Float32 arrays to a safetensors checkpoint, by numpy alone.

Numpy has no bfloat16, so such weights travel as uint16 arrays of their bits; the
file declares them BF16. Importing torch for this would cost seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ModelDtype = Literal["float32", "bfloat16"]
"""What weights are stored as; spelled as in ``config.json``."""

Weights = Mapping[str, NDArray[Any]]
"""Checkpoint name -> float32 array, or uint16 array that holds bfloat16 bits."""


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, nearest and ties to even, as uint16 bits of the same shape; no NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def encode_weights(values: NDArray[np.float32], dtype: ModelDtype) -> NDArray[Any]:
    """Float32 in, what ``write_weights`` stores for ``dtype`` out."""
    return bfloat16_bits(values) if dtype == "bfloat16" else np.ascontiguousarray(values, dtype=np.float32)


def write_weights(path: Path, weights: Weights) -> None:
    """Write a safetensors file; uint16 arrays are stored as BF16, float32 arrays as F32."""
    from safetensors import TensorSpec, serialize_file

    specs = {
        name: TensorSpec(
            dtype="bfloat16" if array.dtype == np.uint16 else array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in weights.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600; a cache may be shared
