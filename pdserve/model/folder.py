"""How a model folder is written: whole or not at all.

A builder fills a temporary sibling of the target and renames it into place, so a
reader sees either no folder or a complete one. Two builders may race: the first
rename wins and the loser throws its copy away.

    .<name>.<pid>-<random>.tmp/  ──os.rename──►  <name>/
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "model.safetensors"
_STALE_S = 3600.0  # no build takes an hour: an older temporary folder has lost its builder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_model_folder(path: Path) -> bool:
    """True if the folder has a configuration, weights and a tokenizer as our builders write them."""
    return all((path / name).is_file() for name in ("config.json", WEIGHTS_FILE, "tokenizer.json"))


def publish(target: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary folder, then rename it to ``target``; returns ``target``.

    An already complete ``target`` (also one that appears meanwhile) is kept as
    it is; an incomplete one is replaced. If ``write`` raises, nothing is left.
    """
    if is_model_folder(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        write(temporary)
        _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _rename(temporary: Path, target: Path) -> None:
    while True:
        try:
            os.rename(temporary, target)  # noqa: PTH104 - Path.rename documents no atomicity
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if is_model_folder(target):
            return
        # Someone's half folder: move it away in one step, so that a racing builder cannot see it emptied.
        aside = _temporary(target)
        try:
            target.rename(aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        try:
            is_stale = time.time() - leftover.stat().st_mtime > _STALE_S
        except FileNotFoundError:
            continue
        if is_stale:
            shutil.rmtree(leftover, ignore_errors=True)
