"""Which GPUs this machine offers, asked of ``nvidia-smi``: importing torch for it would cost seconds."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from pdserve.config.worker_env import environment
from pdserve.errors import ConfigError

QUERY = ("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")
QUERY_S = 20.0
"""Longest wait for nvidia-smi; it takes seconds when the driver is not loaded yet."""


def find_gpus(environ: Mapping[str, str] | None = None) -> list[int]:
    """Indices of the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves; empty without a driver."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    env = environment() if environ is None else environ
    return visible_gpus(done.stdout, env.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listing: str, visible: str | None) -> list[int]:
    """Parse ``index, uuid`` lines and keep what ``visible`` names, in its order, as CUDA does.

    An entry may be an index or the beginning of a UUID; the first entry that is
    neither ends the list. ``None`` keeps every GPU.
    """
    uuids: dict[int, str] = {}
    for line in listing.splitlines():
        index, _, uuid = line.partition(",")
        if index.strip().isdigit():
            uuids[int(index)] = uuid.strip()
    if visible is None:
        return sorted(uuids)
    chosen: list[int] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        match = [i for i, uuid in uuids.items() if entry == str(i) or uuid.startswith(entry)]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen += match
    return chosen


def choose_device(asked: str, gpus: Sequence[int]) -> str:
    """ "cpu" or "cuda": what ``--device`` asks for, "auto" meaning CUDA if there is a GPU.

    Raises:
        ConfigError: if CUDA is asked for and no GPU is usable.
    """
    if asked == "auto":
        return "cuda" if gpus else "cpu"
    if asked == "cuda" and not gpus:
        raise ConfigError(
            "--device cuda: no usable GPU (nvidia-smi lists none, or CUDA_VISIBLE_DEVICES hides them); "
            "use --device cpu"
        )
    return asked
